"""What a request asks for, and who can be asked it: names to candidates, before anybody knows whose key it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.cache import Cache, Lookup
from shared.catalog import Catalog, Deployment, Route, Strategy
from shared.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from shared.providers.dialect import Outgoing
from shared.router import MAX_ATTEMPTS, NO_PREFERENCES, Candidate, Needs, Pool, Preferences, Removal, filtered
from shared.schema import Call
from shared.tokens import Prompt
from shared.upstream import Upstream

DEFAULT_OUTPUT = 4096
"""Output tokens that are reserved at a time where the caller set no bound."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request, who can answer it, and what the first of them would be sent: nothing is spent yet.

    `turn`: the route whose turn is taken. `removed`: who cannot answer, and why."""

    call: Call
    pool: Pool
    outgoing: Outgoing | None
    strategy: Strategy
    wish: Preferences
    needs: Needs
    prompt: Prompt
    output: int
    removed: list[Removal]
    automatic: bool = False
    turn: str | None = None
    lookup: Lookup | None = None


class Planner:
    """Spends nothing, and asks nobody."""

    def __init__(self, catalog: Catalog, upstream: Upstream, cache: Cache) -> None:
        self._catalog = catalog
        self._upstream = upstream
        self._cache = cache
        self._pools: dict[tuple[str, str], Pool] = {}

    def plan(
        self,
        call: Call,
        route: Route | None = None,
        removed: list[Removal] | None = None,
        key_id: str | None = None,
    ) -> Plan:
        """Names to deployments that can be asked this; `route` stands for what the call's name means.

        `removed` learns who cannot, also where nobody can. `key_id`: for whom an answer may be kept.
        Raises ModelNotFound, NoProvider or InvalidRequest, before the key is charged."""
        routes = [route] if route else [self._catalog.resolve(name) for name in (call.model, *call.fallbacks)]
        removed = [] if removed is None else removed
        pool = self._pool(call, routes)
        wish, first = self._wish(call, pool), [candidate.to for candidate in pool.candidates[:MAX_ATTEMPTS]]
        prompt, output = Prompt.read(call.body, call.surface), reserved_output(call, first)
        needs = Needs(
            call.features,
            prompt.estimate(first[0].model),
            output // max(1, call.generated),
            call.max_tokens or 0,
            call.stream,
        )
        lookup = self._cache.lookup(call, key_id) if key_id else None
        pool, outgoing = filtered(pool, needs, wish, removed), None
        if not (lookup and lookup.found):  # else somebody was asked this
            pool, outgoing = self._askable(call, pool, wish, removed)
        strategy, turn = wish.sort or routes[0].strategy, None
        if strategy == "round_robin":
            turn = call.model if route or self._catalog.is_route(call.model) else "models"
        automatic = routes[0].automatic
        return Plan(call, pool, outgoing, strategy, wish, needs, prompt, output, removed, automatic, turn, lookup)

    def _pool(self, call: Call, routes: Sequence[Route]) -> Pool:
        """Who the names mean; made once for a route, whose name is one of few."""
        name, kind = routes[0].asked, "embeddings" if call.surface == "embeddings" else "chat"
        known = len(routes) == 1 and routes[0] is self._catalog.known(name)
        if known and (pool := self._pools.get((name, kind))):
            return pool
        found: dict[str, Candidate] = {}
        for rank, route in enumerate(routes):
            for to in route.deployments:
                if not route.automatic or kind in to.capabilities:  # a chat model takes legacy completions, too
                    found.setdefault(to.id, Candidate(route.asked, to, rank))
        if not found:
            raise ModelNotFound(f"'{call.model[:128]}' has no model for {call.surface}.", param="model")
        pool = Pool(found.values())
        if known:
            self._pools[name, kind] = pool
        return pool

    def _wish(self, call: Call, pool: Pool) -> Preferences:
        """The caller's preferences; raises InvalidRequest for a provider, or a preference, that nobody knows."""
        if not (given := call.body.get("provider")):
            return NO_PREFERENCES
        wish = Preferences.of(given)
        if any("provider" in row.keeps for row in pool.providers.values()):
            return wish
        if wish.unknown:
            message = f"Unrecognized request argument supplied: provider.{wish.unknown[0]}"
            raise InvalidRequest(message, param=f"provider.{wish.unknown[0]}", code="unknown_parameter")
        if unknown := wish.names - self._catalog.providers.keys():
            known = ", ".join(row.name for row in self._catalog.on())
            message = f"There is no provider '{min(unknown)[:64]}'. Available: {known}."
            raise InvalidRequest(message, param="provider", code="unknown_provider")
        return wish

    def _askable(self, call: Call, pool: Pool, wish: Preferences, removed: list[Removal]) -> tuple[Pool, Outgoing]:
        """Without those that refuse to be asked this, up to the first that does not, and what that would be sent.

        With `require_parameters` all are tried, and what would be dropped is a refusal. Raises the first refusal
        where all refuse."""
        refusals: dict[str, UnsupportedParameter] = {}
        outgoing: Outgoing | None = None
        for candidate in pool.candidates:
            try:
                prepared = self._upstream.prepare(call, candidate.to)
                if wish.require_parameters and prepared.dropped:
                    message = f"The model '{candidate.to.id}' does not support '{prepared.dropped[0]}'."
                    raise UnsupportedParameter(message, param=prepared.dropped[0])
            except UnsupportedParameter as refused:
                refusals[candidate.to.id] = refused
                removed.append(Removal(candidate, "capability", refused.message))
                continue
            outgoing = outgoing or prepared
            if not wish.require_parameters:
                break
        if outgoing is None:
            raise next(iter(refusals.values()))
        return Pool(each for each in pool.candidates if each.to.id not in refusals) if refusals else pool, outgoing


def reserved_output(call: Call, candidates: Sequence[Deployment]) -> int:
    """Output tokens to reserve: the caller's bound, else the model's, `DEFAULT_OUTPUT` at most; for each choice."""
    if call.surface == "embeddings":
        return 0
    most = max(min(to.max_output or DEFAULT_OUTPUT, DEFAULT_OUTPUT) for to in candidates)
    return (call.max_tokens or most) * call.generated
