"""Which deployments may answer, in what order. Pure: clock, dice, health and switches are arguments.

`filtered` takes away who cannot, `permitted` who must not, `ordered` sorts by a strategy, `awake` lets the tired sleep.
Each names in `removed` whom it took away and why, which the record and `POST /v1/route` show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from shared.catalog import Deployment, Strategy
from shared.errors import ContextLengthExceeded, Forbidden, GatewayError, InvalidRequest, ModelNotFound, Overloaded
from shared.health import PRIOR_LATENCY, PRIOR_THROUGHPUT, Health, Rest
from shared.providers.parameters import PARAMETERS
from shared.schema import JSON
from shared.store.base import VirtualKey

MAX_ATTEMPTS = 3
DEAR_TIERS = frozenset({"priority", "fast", "scale"})
"""https://platform.openai.com/docs/guides/priority-processing: faster, at a price of their own."""
NANO = 10**9
UNKNOWN = float("inf")


class Candidate(NamedTuple):
    """A deployment, and the name under which the caller came to it: the permission is the name's.

    `rank`: which of the names that the caller gave, the first is 0; a later one is only a fallback."""

    asked: str
    to: Deployment
    rank: int = 0


class Pool:
    """Candidates by rank and priority, and what can be told of them before any request: made once for a route.

    `groups` numbers those of one rank and priority; `even`: all have the same weight. `choosy`: what can be
    asked differs between models. `where`: the places of a deployment, or of all of a provider's, by name."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self.candidates = sorted(candidates, key=_level)
        found = [candidate.to for candidate in self.candidates]
        self.ids = [to.id for to in found]
        self.names = [to.provider.name for to in found]
        self.providers = {to.provider.name: to.provider for to in found}
        self.local = [to.provider.local for to in found]
        self.where: dict[str, list[int]] = {}
        for at, to in enumerate(found):
            self.where[to.id] = [at]
            self.where.setdefault(to.provider.name, []).append(at)
        self.ranks = [candidate.rank for candidate in self.candidates]
        self.groups = [0]
        for one, other in pairwise(map(_level, self.candidates)):
            self.groups.append(self.groups[-1] + (one != other))
        self.shares = [1 / to.weight for to in found]
        self.even = len(set(self.shares)) == 1
        self.window = min((to.context_window for to in found if to.context_window), default=UNKNOWN)
        self.enabled = all(to.enabled for to in found)
        self.choosy = any(to.declared or to.provider.refuses_by_model for to in found)
        self.plain = not any(to.price and (to.price.tiers or to.price.request) for to in found)
        self.inputs = [to.price.input if to.price else UNKNOWN for to in found]
        self.outputs = [to.price.output if to.price else UNKNOWN for to in found]

    def __len__(self) -> int:
        return len(self.candidates)


def _level(candidate: Candidate) -> tuple[int, int]:
    return candidate.rank, candidate.to.priority


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
        """Of the checked body; null is as good as absent."""
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
    """What a request asks of whoever answers: its features (`Call.features`), and its size in tokens.

    `output` is what is reserved for the answer, `bound` what the caller wants room for, if any."""

    features: Collection[str] = ()
    prompt: int = 0
    output: int = 0
    bound: int = 0


class Ranked(NamedTuple):
    """A candidate in its place; `score` is what the strategy sorted by, the lower the better, where it measures."""

    candidate: Candidate
    score: float | None = None


class Order(NamedTuple):
    """The pool's candidates in order, by their places in it."""

    pool: Pool
    places: Sequence[int]
    scores: Sequence[float] | None = None

    def first(self, most: int) -> list[Ranked]:
        return [Ranked(self.pool.candidates[at], self.scores[at] if self.scores else None) for at in self.places[:most]]


def filtered(pool: Pool, needs: Needs, wish: Preferences, removed: list[Removal]) -> Pool:
    """Those that can be asked this, before anybody knows whose key it is. Raises the error of the emptying filter.

    Where there is but one, it is asked whatever we think that it can do: its provider knows better."""
    if wish is not NO_PREFERENCES:
        pool = _keep(pool, "provider", partial(_unwanted, wish), removed, _nobody_wanted)
        if wish.max_price:
            pool = _keep(pool, "max_price", partial(_dear, wish.max_price), removed, _too_dear)
    if len(pool) == 1:
        return pool
    if needs.features and (pool.choosy or any(_lacking(row.refuses, needs) for row in pool.providers.values())):
        pool = _keep(pool, "capability", partial(_incapable, needs), removed, _nobody_capable)
    if pool.window < needs.prompt + needs.bound:
        pool = _keep(pool, "context", partial(_short, needs), removed, _too_long)
    return pool


def permitted(pool: Pool, key: VirtualKey, tier: str | None, removed: list[Removal]) -> Pool:
    """Those that the key may use, and, under a money limit, that have a price. Raises Forbidden when none is left.

    `tier`: the `service_tier` asked for; the dearer ones have no price in the table."""
    asked = pool.candidates[0].asked
    if key.models is not None:
        allowed = [may_use(key, candidate.asked, candidate.to) for candidate in pool.candidates]
        pool = _left(pool, allowed, "permission", "the key may not use it", removed)
        if not pool:
            raise Forbidden(f"This key may not use the model '{asked}'.", code="model_not_allowed")
    if key.has_money_limit:
        priced = [candidate.to.price is not None for candidate in pool.candidates]
        pool = _left(pool, priced, "price", "it has no known price", removed)
        if not pool or tier in DEAR_TIERS:
            what = f"The service tier '{tier}'" if pool else f"The model '{asked}'"
            message = f"{what} has no known price, so a key with a budget cannot use it."
            raise Forbidden(message, code="model_not_priced")
    return pool


def switched_on(pool: Pool, removed: list[Removal]) -> Pool:
    """Without what is switched off; raises ModelNotFound where that is all."""
    if pool.enabled:
        return pool
    return _keep(pool, "enabled", lambda to: None if to.enabled else "it is switched off", removed, _off)


def ordered(
    pool: Pool,
    strategy: Strategy,
    wish: Preferences,
    *,
    needs: Needs,
    health: Health,
    now: float,
    dice: Callable[[], float],
    turn: int = 0,
) -> Order:
    """By the caller's order of names, then of providers, then by the strategy. `turn` counts from 1.

    What a strategy cannot tell apart goes by priority, the lowest first, and among equals by weighted chance."""
    scores: list[float] | None = None
    match strategy:
        case "round_robin":
            places = _turned(pool, turn)
        case "price":
            places = range(len(pool))
            scores = _prices(pool, max(1, needs.prompt), max(1, needs.output))
        case "latency":
            places, known = range(len(pool)), health.latencies(now)
            scores = [known.get(each, PRIOR_LATENCY) for each in pool.ids]
        case "throughput":
            places, known = range(len(pool)), health.throughputs(now)
            scores = [-known.get(each, PRIOR_THROUGHPUT) for each in pool.ids]
        case _:
            places = _shared_out(pool, dice)
    if scores:
        places = sorted(places, key=scores.__getitem__)
    elif strategy in ("local", "remote"):
        places = sorted(places, key=pool.local.__getitem__, reverse=strategy == "local")
    if wish.order:
        wanted = {name: place for place, name in enumerate(wish.order)}
        places = sorted(places, key=lambda at: wanted.get(pool.names[at], len(wanted)))
    if pool.ranks[-1]:
        places = sorted(places, key=pool.ranks.__getitem__)
    return Order(pool, places, scores)


def awake(order: Order, health: Health, now: float, removed: list[Removal]) -> Order:
    """Without those that rest; where all do, those that may be asked all the same, the first to wake first.

    Raises Overloaded where none may: our account at each of them has no credit."""
    resting = health.resting(now)
    if not resting:
        return order
    pool = order.pool
    rests = {at: rest for name, rest in resting.items() for at in pool.where.get(name, ())}
    up = [at for at in order.places if at not in rests] if rests else order.places
    if up:
        removed += [Removal(pool.candidates[at], "resting", _tired(rest, now)) for at, rest in rests.items()]
        return order._replace(places=up)
    tired = sorted((at for at in order.places if not rests[at].absolute), key=lambda at: rests[at].until)
    if not tired:
        wait = max(1, round(min(rest.until for rest in rests.values()) - now))
        message = f"The gateway's account at this model's provider has no credit; it is asked again in {wait} s."
        raise Overloaded(message, retry_after=min(60, wait))
    return order._replace(places=tired)


def may_use(key: VirtualKey, asked: str, to: Deployment) -> bool:
    """A key's list may name an alias, a bare model, a deployment, or all of a provider as `provider/*`.

    A provider's own id with a slash in it is no bare name: it reads like another provider's deployment."""
    if key.models is None:
        return True
    names = [asked, to.id, f"{to.provider.name}/*"] + ([] if "/" in to.model else [to.model])
    return any(name in key.models for name in names)


Complaint: TypeAlias = Callable[[str, Sequence[Removal]], GatewayError]
"""By the name asked for and whoever was taken away."""


def _keep(
    pool: Pool,
    name: str,
    fault: Callable[[Deployment], str | None],
    removed: list[Removal],
    complaint: Complaint,
) -> Pool:
    """The candidates in which `fault` finds nothing wrong."""
    faults = [fault(candidate.to) for candidate in pool.candidates]
    if not any(faults):
        return pool
    taken = [Removal(each, name, why) for each, why in zip(pool.candidates, faults, strict=True) if why]
    removed += taken
    if len(taken) == len(pool):
        raise complaint(pool.candidates[0].asked, taken)
    return Pool(each for each, why in zip(pool.candidates, faults, strict=True) if not why)


def _left(pool: Pool, stays: Sequence[bool], name: str, why: str, removed: list[Removal]) -> Pool:
    """The same, where all have the same fault; the pool may be left empty."""
    if all(stays):
        return pool
    removed += [Removal(each, name, why) for each, stay in zip(pool.candidates, stays, strict=True) if not stay]
    return Pool(each for each, stay in zip(pool.candidates, stays, strict=True) if stay)


def _unwanted(wish: Preferences, to: Deployment) -> str | None:
    """A provider that has preferences of the same kind (OpenRouter) is asked, and told of them, unless it is named."""
    name = to.provider.name
    if name in wish.ignore:
        return "the request ignores its provider"
    if "provider" in to.provider.keeps and name not in wish.names:
        return None
    if wish.only and name not in wish.only:
        return "the request wants other providers only"
    return None


def _nobody_wanted(asked: str, taken: Sequence[Removal]) -> GatewayError:
    names = ", ".join(sorted({removal.candidate.to.provider.name for removal in taken}))
    message = f"'provider' leaves no provider for the model '{asked[:128]}', which is served by: {names}."
    return InvalidRequest(message, param="provider", code="unknown_provider")


def _dear(most: Mapping[str, float], to: Deployment) -> str | None:
    if to.price is None:
        return "its price is not known"
    for name, rate in (("prompt", to.price.input), ("completion", to.price.output), ("request", to.price.request)):
        if (limit := most.get(name)) is not None and rate > float(limit) * NANO:
            return f"its {name} price is {rate / NANO:g}, above {limit:g}"
    return None


def _too_dear(asked: str, taken: Sequence[Removal]) -> GatewayError:
    message = f"'provider.max_price' leaves no deployment of '{asked[:128]}': {_one_of(taken)}."
    return InvalidRequest(message, param="provider.max_price", code="invalid_value")


CAPABILITIES = {
    "tools": "tools", "functions": "tools", "image_url": "vision", "json_schema": "json_schema",
    "input_audio": "audio", "file": "files",
}  # fmt: skip
"""Which capability a feature needs, where a deployer declared them (`[models]` in gateway.toml)."""


def _lacking(refused: Collection[str], needs: Needs) -> list[str]:
    return [feature for feature in needs.features if feature in refused]


def _incapable(needs: Needs, to: Deployment) -> str | None:
    if lacking := _lacking(to.provider.refused(to.model), needs):
        return f"its provider does not support '{min(lacking)}'"
    if to.declared:
        wanted = {CAPABILITIES[feature] for feature in needs.features if feature in CAPABILITIES}
        if lacking := wanted.difference(to.capabilities):
            return f"it is not declared to have '{min(lacking)}'"
    return None


def _nobody_capable(asked: str, taken: Sequence[Removal]) -> GatewayError:
    feature = taken[0].why.split("'")[1]
    message = f"No deployment of '{asked[:128]}' can be asked this: {_one_of(taken)}."
    return InvalidRequest(message, param=PARAMETERS.get(feature, feature), code="unsupported_parameter")


def _short(needs: Needs, to: Deployment) -> str | None:
    window = to.context_window
    if not window or window >= needs.prompt + needs.bound:
        return None
    return f"its context is {window} tokens, and {needs.prompt} + {needs.bound} may be needed"


def _too_long(asked: str, taken: Sequence[Removal]) -> GatewayError:
    message = f"This request is too long for every deployment of '{asked[:128]}': {_one_of(taken)}."
    return ContextLengthExceeded(message, param="messages")


def _off(asked: str, taken: Sequence[Removal]) -> GatewayError:
    return ModelNotFound(f"The model '{asked[:128]}' is switched off.", param="model")


def _one_of(taken: Sequence[Removal]) -> str:
    return f"{taken[0].candidate.to.id}: {taken[0].why}"


def _tired(rest: Rest, now: float) -> str:
    return f"it rests {max(0, rest.until - now):.0f} s more after '{rest.fault}'"


def _shared_out(pool: Pool, dice: Callable[[], float]) -> Sequence[int]:
    """By priority, and among equals by a draw that prefers the weightier: https://doi.org/10.1016/j.ipl.2005.11.003."""
    if pool.groups[-1] == len(pool) - 1:
        return range(len(pool))
    if pool.even:
        draws = [group + dice() for group in pool.groups]
    else:
        draws = [group - dice() ** share for group, share in zip(pool.groups, pool.shares, strict=True)]
    return sorted(range(len(pool)), key=draws.__getitem__)


def _prices(pool: Pool, prompt: int, output: int) -> list[float]:
    """US dollars for a request of this size; infinite where no price is known."""
    if pool.plain:
        a, b = prompt / 1e15, output / 1e15  # of nano-dollars per million tokens
        return [a * into + b * out for into, out in zip(pool.inputs, pool.outputs, strict=True)]
    return [_price(candidate.to, prompt, output) for candidate in pool.candidates]


def _price(to: Deployment, prompt: int, output: int) -> float:
    if to.price is None:
        return UNKNOWN
    price = to.price.at(prompt)
    return (prompt * price.input + output * price.output) / 1e15 + price.request / NANO


def _turned(pool: Pool, turn: int) -> Sequence[int]:
    """Each of the first rank in its turn, in one fixed order."""
    members = pool.ranks.count(pool.ranks[0])
    start = (turn - 1) % members
    return [*range(start, members), *range(start), *range(members, len(pool))]
