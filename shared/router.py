"""Which deployments may answer, in what order. Pure: clock, dice, health and switches are arguments.

`filtered` takes away who cannot, `permitted` who must not, `ordered` sorts by a strategy, `awake` lets the tired sleep.
Each names in `removed` whom it took away and why, which the record and `POST /v1/route` show.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import filterfalse, islice, pairwise
from typing import Any, Generic, NamedTuple, TypeVar

from shared.catalog import Deployment, Strategy
from shared.errors import ContextLengthExceeded, Forbidden, GatewayError, InvalidRequest, ModelNotFound, Overloaded
from shared.health import PRIOR_LATENCY, PRIOR_THROUGHPUT, Health, Rest
from shared.providers.parameters import PARAMETERS
from shared.schema import JSON
from shared.store.base import VirtualKey

MAX_ATTEMPTS = 3
MOST_TOLD = 20
"""Of long lists the beginning is told."""
NANO = 10**9
RATES = {"prompt": "input", "completion": "output", "request": "request"}
"""What `max_price` may limit, and how a price calls it."""
UNKNOWN = float("inf")
NAMES, OTHERS = ("order", "only", "ignore"), ("allow_fallbacks", "sort", "require_parameters")
"""The preferences that are lists of providers, and the rest."""


class Candidate(NamedTuple):
    """A deployment, and the name under which the caller came to it: the permission is the name's.

    `rank`: which of the names that the caller gave, the first is 0; a later one is only a fallback."""

    asked: str
    to: Deployment
    rank: int = 0


class Pool:
    """Candidates by rank and priority, and what can be told of them before any request: made once for a route.

    `groups` numbers those of one rank and priority; `even`: all have the same weight. `choosy`: what can be asked
    differs between models. `uneven`: the prices that are more than a rate for each side, by place. `where`: the places
    of a deployment, or of all of a provider's, by name."""

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
        self.windows = sorted({to.context_window for to in found if to.context_window}) or [UNKNOWN]
        self.enabled = all(to.enabled for to in found)
        self.choosy = any(to.declared or to.provider.refuses_by_model for to in found)
        self.uneven = [
            (at, to.price) for at, to in enumerate(found) if to.price and (to.price.tiers or to.price.request)
        ]
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

    def told(self, key: VirtualKey) -> JSON:
        """Where the key may not use it, that is the reason that counts, whatever else there was."""
        forbidden = key.models is not None and _forbidden(self.candidate, key.models)
        name, why = ("permission", forbidden) if forbidden else (self.filter, self.why)
        return {"deployment": self.candidate.to.id, "filter": name, "reason": why}


@dataclass(frozen=True, slots=True)
class Preferences:
    """The request's `provider: {…}`, as OpenRouter has it; prices are US dollars per million tokens.

    `unknown`: what only those may answer who have such preferences of their own."""

    order: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    allow_fallbacks: bool = True
    sort: Strategy | None = None
    max_price: tuple[tuple[str, float], ...] = ()
    require_parameters: bool = False
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: JSON) -> Preferences:
        """Of the checked body; null is as good as absent."""
        names = {each: tuple(name.lower() for name in given.get(each) or ()) for each in NAMES}
        rest: dict[str, Any] = {each: given[each] for each in OTHERS if given.get(each) is not None}
        prices: JSON = given.get("max_price") or {}
        limits = tuple((name, limit) for name in RATES if (limit := prices.get(name)) is not None)
        unknown = [each for each in given if each not in (*NAMES, *OTHERS, "max_price") and given[each] is not None]
        unknown += [f"max_price.{each}" for each in prices if each not in RATES and prices[each] is not None]
        return cls(**names, **rest, max_price=limits, unknown=tuple(each[:64] for each in unknown[:8]))

    @property
    def pinned(self) -> bool:
        """Whether nobody outside `order` may answer: its providers are each other's only fallbacks."""
        return bool(self.order) and not self.allow_fallbacks

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
    stream: bool = False


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
        pinned = wish.pinned and not pool.providers.keys().isdisjoint(wish.order)
        pool = WANTED(pool, (wish, pinned), removed)
        if wish.max_price:
            pool = CHEAP(pool, wish.max_price, removed)
    if len(pool) == 1:
        return pool
    features = frozenset(needs.features)
    if features and (pool.choosy or any(_lacking(row.refuses, features) for row in pool.providers.values())):
        pool = CAPABLE(pool, features, removed)
    if (size := needs.prompt + needs.bound) > pool.windows[0]:
        pool = ROOMY(pool, pool.windows[bisect_left(pool.windows, size) - 1], removed)
    return pool


def permitted(pool: Pool, key: VirtualKey, unpriced: str | None, removed: list[Removal]) -> Pool:
    """Those that the key may use, and, under a money limit, that have a price. Raises Forbidden when none is left.

    `unpriced`: what in the request has no known price, if anything (`Call.unpriced`)."""
    if key.models is not None:
        pool = PERMITTED(pool, key.models, removed)
    if key.has_money_limit:
        pool = PRICED(pool, None, removed)
        if unpriced:
            raise _not_priced(unpriced)
    return pool


def switched_on(pool: Pool, removed: list[Removal], switch: Callable[[Deployment], Deployment] | None = None) -> Pool:
    """As they are switched, without what is off; raises ModelNotFound where that is all."""
    if switch:
        pool = _switched(pool, switch)
    return pool if pool.enabled else ENABLED(pool, None, removed)


KEPT = 16
"""Parts of pools that each filter keeps for whoever asks for the same; one of a thousand deployments is some 300 KB."""


@lru_cache(KEPT)
def _switched(pool: Pool, switch: Callable[[Deployment], Deployment]) -> Pool:
    switched = [switch(candidate.to) for candidate in pool.candidates]
    if all(new is candidate.to for new, candidate in zip(switched, pool.candidates, strict=True)):
        return pool
    return Pool(candidate._replace(to=new) for new, candidate in zip(switched, pool.candidates, strict=True))


@lru_cache(KEPT)
def one_each(pool: Pool) -> Pool:
    """The first of each provider: turns go round the providers, not round their models.

    Those of later names are fallbacks, and stay."""
    first: dict[str, Candidate] = {}
    for candidate in pool.candidates:
        first.setdefault(candidate.to.id if candidate.rank else candidate.to.provider.name, candidate)
    return Pool(first.values())


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

    Those that a strategy takes to be the best alike go by priority, the lowest first, and among equals by weighted
    chance."""
    everyone = range(len(pool))
    scores: list[float] | None = None
    match strategy:
        case "round_robin":
            places = _turned(pool, turn)
        case "price":
            scores = _prices(pool, max(1, needs.prompt), max(1, needs.output))
            places = _best_first(pool, scores, dice)
        case "latency":
            known = health.latencies(now, stream=needs.stream)
            scores = [known.get(each, PRIOR_LATENCY) for each in pool.ids]
            places = _best_first(pool, scores, dice)
        case "throughput":
            known = health.throughputs(now)
            scores = [-known.get(each, PRIOR_THROUGHPUT) for each in pool.ids]
            places = _best_first(pool, scores, dice)
        case "local" | "remote":
            drawn = _shared_out(pool, everyone, dice)
            places = sorted(drawn, key=pool.local.__getitem__, reverse=strategy == "local")
        case "priority":
            places = _shared_out(pool, everyone, dice)
    if wish.order:
        wanted = {name: place for place, name in enumerate(wish.order)}
        places = sorted(places, key=lambda at: wanted.get(pool.names[at], len(wanted)))
    if pool.ranks[-1]:
        places = sorted(places, key=pool.ranks.__getitem__)
    return Order(pool, places, scores)


def awake(order: Order, health: Health, now: float, removed: list[Removal]) -> Order:
    """Without those that rest; where all do, those that may be asked all the same, the first to wake first.

    Raises Overloaded where none may: our account at each of them has no credit."""
    pool = order.pool
    if not (resting := health.resting(now, pool.where.keys())):
        return order
    rests: dict[int, Rest] = {}
    for name, rest in resting.items():
        for at in pool.where[name]:  # its own rest, or its provider's, whichever is the graver
            rests[at] = max(rests[at], rest, key=_gravity) if at in rests else rest
    if up := [*filterfalse(rests.__contains__, order.places)]:
        down = islice(filter(rests.__contains__, order.places), MOST_TOLD)
        removed += [Removal(pool.candidates[at], "resting", _tired(rests[at], now)) for at in down]
        return order._replace(places=up)
    tired = sorted((at for at in order.places if not rests[at].absolute), key=lambda at: rests[at].until)
    if not tired:
        wait = max(1, round(min(rest.until for rest in rests.values()) - now))
        message = f"The gateway's account at this model's provider has no credit; it is asked again in {wait} s."
        raise Overloaded(message, retry_after=min(60, wait))
    return order._replace(places=tired)


def _gravity(rest: Rest) -> tuple[bool, float]:
    return rest.absolute, rest.until


def may_use(key: VirtualKey, asked: str, to: Deployment) -> bool:
    return key.models is None or any(name in key.models for name in names_of(asked, to))


def names_of(asked: str, to: Deployment) -> list[str]:
    """A key's list may name an alias, a bare model, a deployment, or all of a provider as `provider/*`.

    A provider's own id with a slash in it is no bare name: it reads like another provider's deployment. Nor is one that
    is an alias: whoever may use that may not use what it hides."""
    return [asked, to.id, f"{to.provider.name}/*"] + ([] if "/" in to.model or to.shadowed else [to.model])


By = TypeVar("By", bound=Hashable)


class Filter(Generic[By]):
    """Takes away those in whom `fault` finds one, by what is asked; where nobody is left, raises the `complaint`.

    What it leaves of a pool of many is kept: a request costs no time that grows with all there is."""

    def __init__(
        self,
        name: str,
        fault: Callable[[Candidate, By], str | None],
        complaint: Callable[[str, Sequence[Removal]], GatewayError],
    ) -> None:
        self._name = name
        self._fault = fault
        self._complaint = complaint
        self._kept = lru_cache(KEPT)(self._parted)

    def __call__(self, pool: Pool, by: By, removed: list[Removal]) -> Pool:
        left, gone = self._parted(pool, by) if len(pool) == 1 else self._kept(pool, by)
        removed += gone
        if not left:
            raise self._complaint(pool.candidates[0].asked, gone)
        return left

    def _parted(self, pool: Pool, by: By) -> tuple[Pool, Sequence[Removal]]:
        faults = [self._fault(candidate, by) for candidate in pool.candidates]
        if not any(faults):
            return pool, ()
        both = list(zip(pool.candidates, faults, strict=True))
        gone = [Removal(each, self._name, why) for each, why in both if why]
        return Pool(each for each, why in both if not why), gone


def _unwanted(candidate: Candidate, by: tuple[Preferences, bool]) -> str | None:
    """A provider that has preferences of the same kind (OpenRouter) is asked, and told of them: it may have whom they
    name. Not where it is another that they name (`only`), or that they are `pinned` to."""
    (wish, pinned), name = by, candidate.to.provider.name
    passes_on = "provider" in candidate.to.provider.keeps
    if name in wish.ignore:
        return "the request ignores its provider"
    if wish.unknown and not passes_on:
        return f"it does not know 'provider.{wish.unknown[0]}'"
    if pinned and name not in wish.order:
        return "the request wants other providers only"
    if passes_on and name not in (*wish.order, *wish.only):
        return None
    if (wish.only and name not in wish.only) or (wish.pinned and name not in wish.order):
        return "the request wants other providers only"
    return None


def _nobody_wanted(asked: str, taken: Sequence[Removal]) -> GatewayError:
    names = ", ".join(sorted({removal.candidate.to.provider.name for removal in taken}))
    message = f"'provider' leaves no provider for the model '{asked[:128]}', which is served by: {names}."
    return InvalidRequest(message, param="provider", code="unknown_provider")


def _dear(candidate: Candidate, most: Sequence[tuple[str, float]]) -> str | None:
    price = candidate.to.price
    if price is None:
        return "its price is not known"
    for name, limit in most:
        if (rate := getattr(price, RATES[name])) > float(limit) * NANO:
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


def _lacking(refused: Collection[str], features: Collection[str]) -> list[str]:
    return [feature for feature in features if feature in refused]


def _incapable(candidate: Candidate, features: frozenset[str]) -> str | None:
    to = candidate.to
    if lacking := _lacking(to.provider.refused(to.model), features):
        return f"its provider does not support '{min(lacking)}'"
    if to.declared:
        wanted = {CAPABILITIES[feature] for feature in features if feature in CAPABILITIES}
        if lacking := wanted.difference(to.capabilities):
            return f"it is not declared to have '{min(lacking)}'"
    return None


def _nobody_capable(asked: str, taken: Sequence[Removal]) -> GatewayError:
    feature = taken[0].why.split("'")[1]
    message = f"No deployment of '{asked[:128]}' can be asked this: {_one_of(taken)}."
    return InvalidRequest(message, param=PARAMETERS.get(feature, feature), code="unsupported_parameter")


def _short(candidate: Candidate, window: float) -> str | None:
    own = candidate.to.context_window
    return f"its context is {own} tokens, and more may be needed" if own and own <= window else None


def _too_long(asked: str, taken: Sequence[Removal]) -> GatewayError:
    message = f"This request is too long for every deployment of '{asked[:128]}': {_one_of(taken)}."
    return ContextLengthExceeded(message, param="messages")


def _forbidden(candidate: Candidate, models: tuple[str, ...]) -> str | None:
    return None if any(name in models for name in names_of(candidate.asked, candidate.to)) else "the key may not use it"


def _not_allowed(asked: str, _: Sequence[Removal]) -> GatewayError:
    return Forbidden(f"This key may not use the model '{asked}'.", code="model_not_allowed")


def _unpriced(candidate: Candidate, _: None) -> str | None:
    return "it has no known price" if candidate.to.price is None else None


def _not_priced(what: str, _: Sequence[Removal] = ()) -> GatewayError:
    message = f"{what} has no known price, so a key with a budget cannot use it."
    return Forbidden(message, code="model_not_priced")


def _off(candidate: Candidate, _: None) -> str | None:
    return None if candidate.to.enabled else "it is switched off"


def _all_off(asked: str, _: Sequence[Removal]) -> GatewayError:
    return ModelNotFound(f"The model '{asked[:128]}' is switched off.", param="model")


def _one_of(taken: Sequence[Removal]) -> str:
    return f"{taken[0].candidate.to.id}: {taken[0].why}"


WANTED = Filter("provider", _unwanted, _nobody_wanted)
CHEAP = Filter("max_price", _dear, _too_dear)
CAPABLE = Filter("capability", _incapable, _nobody_capable)
ROOMY = Filter("context", _short, _too_long)
PERMITTED = Filter("permission", _forbidden, _not_allowed)
PRICED = Filter("price", _unpriced, lambda asked, _: _not_priced(f"The model '{asked}'"))
ENABLED = Filter("enabled", _off, _all_off)


def _tired(rest: Rest, now: float) -> str:
    return f"it rests {max(0, rest.until - now):.0f} s more after '{rest.fault}'"


def _shared_out(pool: Pool, places: Sequence[int], dice: Callable[[], float]) -> Sequence[int]:
    """By priority, and among equals by a draw that prefers the weightier: https://doi.org/10.1016/j.ipl.2005.11.003."""
    groups, shares = pool.groups, pool.shares
    if groups[-1] == len(pool) - 1:
        return places
    if pool.even:
        return sorted(places, key=lambda at: groups[at] + dice())
    return sorted(places, key=lambda at: groups[at] - dice() ** shares[at])


def _best_first(pool: Pool, scores: Sequence[float], dice: Callable[[], float]) -> Sequence[int]:
    """By score, the lowest first; where several have the best, they share."""
    places = sorted(range(len(pool)), key=scores.__getitem__)
    best = scores.count(scores[places[0]])
    return [*_shared_out(pool, places[:best], dice), *places[best:]] if best > 1 else places


def _prices(pool: Pool, prompt: int, output: int) -> list[float]:
    """US dollars for a request of this size; infinite where no price is known."""
    a, b = prompt / 1e15, output / 1e15  # of nano-dollars per million tokens
    prices = [a * into + b * out for into, out in zip(pool.inputs, pool.outputs, strict=True)]
    for at, price in pool.uneven:
        now = price.at(prompt)
        prices[at] = a * now.input + b * now.output + now.request / NANO
    return prices


def _turned(pool: Pool, turn: int) -> Sequence[int]:
    """Each of the first rank in its turn, in one fixed order."""
    members = pool.ranks.count(pool.ranks[0])
    start = (turn - 1) % members
    return [*range(start, members), *range(start), *range(members, len(pool))]
