"""Which deployments may answer, in what order. Pure: clock, dice, health and switches are arguments.

`filtered` takes away who cannot, `ordered` sorts the rest by a strategy, `awake` lets the tired sleep. Each names in
`removed` whom it took away and why, which the record and `POST /v1/route` show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from shared.catalog import Deployment, Strategy
from shared.errors import ContextLengthExceeded, Forbidden, GatewayError, InvalidRequest, ModelNotFound, Overloaded
from shared.health import Health, Rest
from shared.providers.parameters import PARAMETERS
from shared.schema import JSON
from shared.store.base import VirtualKey

MAX_ATTEMPTS = 3
DEAR_TIERS = frozenset({"priority", "fast", "scale"})
"""https://platform.openai.com/docs/guides/priority-processing: faster, at a price of their own."""
NANO = 10**9


class Candidate(NamedTuple):
    """A deployment, and the name under which the caller came to it: the permission is the name's.

    `rank`: which of the names that the caller gave, the first is 0; a later one is only a fallback."""

    asked: str
    to: Deployment
    rank: int = 0


class Removal(NamedTuple):
    """Who was taken away, by which filter, and why, in words for the caller."""

    candidate: Candidate
    filter: str
    why: str


@dataclass(frozen=True, slots=True)
class Preferences:
    """The request's `provider: {…}`, as OpenRouter has it; prices are US dollars per million tokens."""

    order: Sequence[str] = ()
    only: Collection[str] = ()
    ignore: Collection[str] = ()
    allow_fallbacks: bool = True
    sort: Strategy | None = None
    max_price: Mapping[str, float] = field(default_factory=dict[str, float])
    require_parameters: bool = False

    @classmethod
    def of(cls, given: JSON) -> Preferences:
        names = {each: [name.lower() for name in given.get(each) or ()] for each in ("order", "only", "ignore")}
        rest: dict[str, Any] = {
            each: given[each]
            for each in ("allow_fallbacks", "sort", "max_price", "require_parameters")
            if given.get(each) is not None
        }
        return cls(**names, **rest)

    @property
    def names(self) -> set[str]:
        return {*self.order, *self.only, *self.ignore}


NO_PREFERENCES = Preferences()


class Needs(NamedTuple):
    """What a request asks of whoever answers: its features (`Call.features`), and its size in tokens."""

    features: Collection[str] = ()
    prompt: int = 0
    output: int = 0


class Ranked(NamedTuple):
    """A candidate in its place; `score` is what the strategy sorted by, the lower the better, where it measures."""

    candidate: Candidate
    score: float | None = None


def filtered(
    candidates: Sequence[Candidate], needs: Needs, wish: Preferences, removed: list[Removal]
) -> Sequence[Candidate]:
    """Those that can be asked this, before anybody knows whose key it is. Raises the error of the emptying filter.

    A single deployment that the caller named is asked whatever we think that it can do: its provider knows better."""
    if wish is not NO_PREFERENCES:
        candidates = _keep(candidates, "only", lambda to: _wanted(to, wish), removed, _unwanted)
        if wish.max_price:
            candidates = _keep(candidates, "max_price", lambda to: _dear(to, wish.max_price), removed, _too_dear)
    if len(candidates) == 1:
        return candidates
    lacks = {to.provider.name: _lacks(to, needs.features) for _, to, _ in candidates} if needs.features else {}
    if needs.features:
        candidates = _keep(
            candidates,
            "capability",
            lambda to: lacks[to.provider.name] or _undeclared(to, needs.features),
            removed,
            _incapable,
        )
    tokens = needs.prompt + needs.output
    if any(to.context_window and to.context_window < tokens for _, to, _ in candidates):
        candidates = _keep(candidates, "context", lambda to: _short(to, needs), removed, _too_long)
    return candidates


def permitted(
    candidates: Sequence[Candidate], key: VirtualKey, tier: str | None, removed: list[Removal]
) -> Sequence[Candidate]:
    """Those that the key may use, and, under a money limit, that have a price. Raises Forbidden when none is left.

    `tier`: the `service_tier` asked for; the dearer ones have no price in the table."""
    asked = candidates[0].asked
    if key.models is not None:
        allowed = [candidate for candidate in candidates if may_use(key, candidate.asked, candidate.to)]
        _note(candidates, allowed, "permission", "the key may not use it", removed)
        if not allowed:
            raise Forbidden(f"This key may not use the model '{asked}'.", code="model_not_allowed")
        candidates = allowed
    if key.has_money_limit:
        priced = [candidate for candidate in candidates if candidate.to.price is not None]
        _note(candidates, priced, "price", "it has no known price", removed)
        if not priced or tier in DEAR_TIERS:
            what = f"The service tier '{tier}'" if priced else f"The model '{asked}'"
            message = f"{what} has no known price, so a key with a budget cannot use it."
            raise Forbidden(message, code="model_not_priced")
        candidates = priced
    return candidates


def ordered(
    candidates: Sequence[Candidate],
    strategy: Strategy,
    wish: Preferences,
    *,
    needs: Needs,
    health: Health,
    now: float,
    dice: Callable[[], float],
    turn: int = 0,
) -> list[Ranked]:
    """By the caller's order of names, then of providers, then by the strategy. `turn` counts from 1.

    What a strategy cannot tell apart goes by priority, the lowest first, and among equals by weighted chance."""
    if len(candidates) == 1:
        return [Ranked(candidates[0])]
    if strategy == "round_robin":
        ranked = [Ranked(candidate) for candidate in _turned(candidates, turn)]
    else:
        score = _scores(strategy, needs, health, now)
        keyed = [
            (candidate.rank, score(candidate.to), candidate.to.priority, _draw(candidate.to, dice), candidate)
            for candidate in candidates
        ]
        keyed.sort(key=lambda row: row[:4])
        told = strategy not in ("priority", "local", "remote")
        ranked = [Ranked(row[4], row[1] if told else None) for row in keyed]
    if wish.order:
        place = {name: at for at, name in enumerate(wish.order)}
        ranked.sort(key=lambda each: (each.candidate.rank, place.get(each.candidate.to.provider.name, len(place))))
    return ranked


def awake(ranked: Sequence[Ranked], health: Health, now: float, removed: list[Removal]) -> Sequence[Ranked]:
    """Without those that rest; where all do, those that may be asked all the same, the first to wake first.

    Raises Overloaded where none may: our account at each of them has no credit."""
    rests = [health.resting(each.candidate.to.id, now) for each in ranked]
    if not any(rests):
        return ranked
    up = [each for each, rest in zip(ranked, rests, strict=True) if rest is None]
    if up:
        for each, rest in zip(ranked, rests, strict=True):
            if rest:
                removed.append(Removal(each.candidate, "resting", _resting(rest, now)))
        return up
    tired = [(rest.until, each) for each, rest in zip(ranked, rests, strict=True) if rest and not rest.absolute]
    if not tired:
        wait = max(1, min(60, round(min(rest.until for rest in rests if rest) - now)))
        raise Overloaded("No deployment can be asked: all rest after failures.", retry_after=wait)
    return [each for _, each in sorted(tired, key=lambda pair: pair[0])]


def switched_on(candidates: Sequence[Candidate], removed: list[Removal]) -> Sequence[Candidate]:
    """Without what is switched off; raises ModelNotFound where that is all."""
    return _keep(candidates, "enabled", lambda to: None if to.enabled else "it is switched off", removed, _off)


def may_use(key: VirtualKey, asked: str, to: Deployment) -> bool:
    """A key's list may name an alias, a bare model, a deployment, or all of a provider as `provider/*`.

    A provider's own id with a slash in it is no bare name: it reads like another provider's deployment."""
    if key.models is None:
        return True
    names = [asked, to.id, f"{to.provider.name}/*"] + ([] if "/" in to.model else [to.model])
    return any(name in key.models for name in names)


Complaint: TypeAlias = Callable[[str, Sequence[Removal]], GatewayError]


def _keep(
    candidates: Sequence[Candidate],
    name: str,
    fault: Callable[[Deployment], str | None],
    removed: list[Removal],
    complaint: Complaint,
) -> Sequence[Candidate]:
    """The candidates in which `fault` finds nothing wrong."""
    kept: list[Candidate] = []
    taken: list[Removal] = []
    for candidate in candidates:
        if why := fault(candidate.to):
            taken.append(Removal(candidate, name, why))
        else:
            kept.append(candidate)
    removed += taken
    if not kept:
        raise complaint(candidates[0].asked, taken)
    return kept


def _note(
    before: Iterable[Candidate], after: Collection[Candidate], name: str, why: str, removed: list[Removal]
) -> None:
    if len(after) < len(before if isinstance(before, Sequence) else list(before)):
        kept = set(map(id, after))
        removed += [Removal(candidate, name, why) for candidate in before if id(candidate) not in kept]


def _wanted(to: Deployment, wish: Preferences) -> str | None:
    """A provider that has preferences of the same kind (OpenRouter) is asked, and told of them, unless it is named."""
    name = to.provider.name
    if name in wish.ignore:
        return "the request ignores its provider"
    if "provider" in to.provider.keeps and name not in wish.names:
        return None
    if wish.only and name not in wish.only:
        return "the request wants other providers only"
    return None


def _unwanted(asked: str, taken: Sequence[Removal]) -> GatewayError:
    names = ", ".join(sorted({removal.candidate.to.provider.name for removal in taken}))
    message = f"'provider' leaves no provider for the model '{asked[:128]}', which is served by: {names}."
    return InvalidRequest(message, param="provider", code="unknown_provider")


def _dear(to: Deployment, most: Mapping[str, float]) -> str | None:
    if to.price is None:
        return "its price is not known"
    for name, rate in (("prompt", to.price.input), ("completion", to.price.output), ("request", to.price.request)):
        if (limit := most.get(name)) is not None and rate > float(limit) * NANO:
            return f"its {name} price is {rate / NANO:g}, above {limit}"
    return None


def _too_dear(asked: str, taken: Sequence[Removal]) -> GatewayError:
    message = f"'provider.max_price' leaves no deployment of '{asked[:128]}': {_first(taken)}."
    return InvalidRequest(message, param="provider.max_price", code="invalid_value")


def _lacks(to: Deployment, features: Collection[str]) -> str | None:
    lacking = [feature for feature in features if feature in to.provider.refuses]
    return f"its provider does not support '{min(lacking)}'" if lacking else None


CAPABILITIES = {
    "tools": "tools", "functions": "tools", "image_url": "vision", "json_schema": "json_schema",
    "input_audio": "audio", "file": "files",
}  # fmt: skip
"""Which declared capability a feature needs; `[models]` of gateway.toml declares them."""


def _undeclared(to: Deployment, features: Collection[str]) -> str | None:
    if not to.declared:
        return None
    lacking = [need for feature in features if (need := CAPABILITIES.get(feature)) and need not in to.capabilities]
    return f"it is not declared to have '{min(lacking)}'" if lacking else None


def _incapable(asked: str, taken: Sequence[Removal]) -> GatewayError:
    feature = taken[0].why.rpartition(" '")[2].rstrip("'")
    message = f"No deployment of '{asked[:128]}' can be asked this: {_first(taken)}."
    return InvalidRequest(message, param=PARAMETERS.get(feature, feature), code="unsupported_parameter")


def _short(to: Deployment, needs: Needs) -> str | None:
    window = to.context_window
    if not window or window >= needs.prompt + needs.output:
        return None
    return f"its context is {window} tokens, and {needs.prompt} + {needs.output} may be needed"


def _too_long(asked: str, taken: Sequence[Removal]) -> GatewayError:
    message = f"This request is too long for every deployment of '{asked[:128]}': {_first(taken)}."
    return ContextLengthExceeded(message, param="messages")


def _off(asked: str, taken: Sequence[Removal]) -> GatewayError:
    return ModelNotFound(f"The model '{asked[:128]}' is switched off by an administrator.", param="model")


def _first(taken: Sequence[Removal]) -> str:
    return f"{taken[0].candidate.to.id}: {taken[0].why}"


def _resting(rest: Rest, now: float) -> str:
    return f"it rests {max(0, rest.until - now):.0f} s more after '{rest.fault}'"


def _draw(to: Deployment, dice: Callable[[], float]) -> float:
    """Sorting by this shares by weight: https://doi.org/10.1016/j.ipl.2005.11.003."""
    return -(max(dice(), 1e-12) ** (1 / to.weight))


def _scores(strategy: Strategy, needs: Needs, health: Health, now: float) -> Callable[[Deployment], float]:
    prompt, output = needs.prompt, needs.output
    match strategy:
        case "price":
            return lambda to: price_of(to, prompt, output)
        case "latency":
            return lambda to: health.latency(to.id, now)
        case "throughput":
            return lambda to: -health.throughput(to.id, now)
        case "local":
            return lambda to: not to.provider.local
        case "remote":
            return lambda to: to.provider.local
        case _:
            return lambda to: 0


def price_of(to: Deployment, prompt: int, output: int) -> float:
    """US dollars for a request of this size; infinite where no price is known."""
    if to.price is None:
        return float("inf")
    price = to.price.at(prompt) if to.price.tiers else to.price
    return (prompt * price.input + output * price.output) / 1e15 + price.request / NANO


def _turned(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    """Each in its turn, in one fixed order; those of later names follow, in theirs."""
    members = [candidate for candidate in candidates if candidate.rank == candidates[0].rank]
    rest = [candidate for candidate in candidates if candidate.rank != candidates[0].rank]
    start = (turn - 1) % len(members)
    return [*members[start:], *members[:start], *rest]
