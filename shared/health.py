"""What is resting, and how fast the rest are: what this process saw of each deployment. No I/O; `now` is epoch seconds.

A deployment rests after failures; a provider, by its name, when it refuses our account. After a rest one request is let
through as a probe: its success ends the matter, its failure doubles the rest. What was on its way when the rest began
says nothing new.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, KeysView, Mapping
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

from shared.errors import ProviderError

FAILURES = 3
"""In a row, after which a deployment rests."""
REST, LONGEST_REST = 10.0, 120.0
"""Seconds; doubled with each probe that fails."""
PROBE = 30.0
"""Seconds for which the others wait for a probe's verdict."""
AT_ONCE: Mapping[str, float] = {"rate_limit": 5.0, "overloaded": 0.0, "model_gone": 600.0, "auth": 60.0, "money": 600.0}
"""Faults that need no repetition, with the seconds of rest where the provider names none; 0: only where it does."""
ACCOUNT = frozenset({"auth", "money"})
"""Faults of our account at the provider: all its deployments rest."""
NEUTRAL = frozenset(
    {"bad_request", "body_too_large", "context", "policy", "too_large", "pool_timeout", "total_timeout"}
)
"""The caller's doing or the gateway's own: no sign of the deployment's health."""

MOST = 4096
"""Deployments of which something is known at a time: callers may name models as they like."""
FADE = 300.0
"""Seconds in which what was measured loses two thirds of its weight against the prior."""
FRESH = 5.0
"""Seconds in which it loses too little to be worked out anew."""
PRIOR_LATENCY, PRIOR_THROUGHPUT, PRIOR_WEIGHT = 1.0, 50.0, 0.5
"""Of a deployment never measured: seconds to the first content, output tokens per second; and what they weigh."""


class Rest(NamedTuple):
    """Until when, and why."""

    until: float
    fault: str

    @property
    def absolute(self) -> bool:
        """Whether nothing may be sent meanwhile, not even where nobody else is left: no money comes from asking."""
        return self.fault == "money"


@dataclass(slots=True)
class _Breaker:
    """`since`: when the rest began, or was heard of. `probed`: until when a probe's verdict is waited for."""

    failures: int = 0
    rested: int = 0
    rest: Rest | None = None
    since: float = 0.0
    probed: float = 0.0


@dataclass(slots=True)
class _Mean:
    """A mean of what was measured lately; the prior, where that is little or long ago."""

    prior: float
    total: float = 0.0
    weight: float = 0.0
    at: float = 0.0

    def add(self, value: float, now: float) -> None:
        faded = exp(min(0.0, self.at - now) / FADE)
        self.total, self.weight, self.at = self.total * faded + value, self.weight * faded + 1, now

    def value(self, now: float) -> float:
        faded = exp(min(0.0, self.at - now) / FADE)
        return (self.prior * PRIOR_WEIGHT + self.total * faded) / (PRIOR_WEIGHT + self.weight * faded)


class _Means:
    """One by deployment; what they come to is worked out at most every few seconds: each request asks for all."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._means: dict[str, _Mean] = {}
        self._values: dict[str, float] = {}
        self._at = 0.0

    def add(self, target: str, value: float, now: float) -> None:
        mean = self._means.pop(target, None) or _Mean(self._prior)
        mean.add(value, now)
        self._means[target], self._values[target] = mean, mean.value(now)
        if len(self._means) > MOST:
            oldest = next(iter(self._means))
            del self._means[oldest]
            self._values.pop(oldest, None)

    def values(self, now: float) -> Mapping[str, float]:
        if abs(now - self._at) > FRESH:
            self._values, self._at = {target: mean.value(now) for target, mean in self._means.items()}, now
        return self._values


def blames_account(error: ProviderError) -> bool:
    """Whether all of the provider's deployments would say so: who may not use one model may use another."""
    return error.fault in ACCOUNT and error.status != 403


class Health:
    """Keyed by deployment id (`groq/llama-3.3-70b`), the account's faults by provider name."""

    def __init__(self) -> None:
        self._breakers: dict[str, _Breaker] = {}
        self._latency = {True: _Means(PRIOR_LATENCY), False: _Means(PRIOR_LATENCY)}
        self._throughput = _Means(PRIOR_THROUGHPUT)

    def resting(self, now: float, among: KeysView[str] | None = None) -> dict[str, Rest]:
        """The rests, of all or of these names; one that is over counts on while a request probes what rested."""
        if not self._breakers:
            return {}
        found = self._breakers
        if among is not None:
            found = {name: self._breakers[name] for name in self._breakers.keys() & among}
        return {name: b.rest for name, b in found.items() if b.rest and (b.rest.until > now or b.probed > now)}

    def begin(self, target: str, now: float) -> None:
        """A request is on its way: a probe, where a rest is just over."""
        for _, breaker in self._of(target):
            if breaker.rest and breaker.rest.until <= now:
                breaker.probed = now + PROBE

    def end(self, target: str) -> None:
        """It ended without a verdict."""
        for _, breaker in self._of(target):
            breaker.probed = 0.0

    def succeeded(self, target: str, began: float) -> list[str]:
        """All is well again, unless a rest has begun since the request did; returns what had rested until now."""
        well = [(name, breaker) for name, breaker in self._of(target) if not breaker.rest or breaker.since <= began]
        for name, _ in well:
            del self._breakers[name]
        return [name for name, breaker in well if breaker.rest]

    def failed(self, target: str, error: ProviderError, now: float, *, silent: bool = False) -> tuple[str, Rest] | None:
        """Count a failure; returns what has to rest from now on, or for longer than it had to, if anything does.

        `silent`: it had most of the request's time, and said nothing."""
        self.end(target)
        fault = error.fault
        if fault in NEUTRAL and not (silent and fault == "total_timeout"):
            return None
        name = target.partition("/")[0] if blames_account(error) else target
        breaker = self._breaker(name)
        breaker.failures += 1
        seconds = error.retry_after or AT_ONCE.get(fault, 0.0)
        if not seconds and breaker.failures < FAILURES:
            return None
        asleep = breaker.rest if breaker.rest and breaker.rest.until > now else None
        if asleep is None:
            breaker.rested += 1
        if not error.retry_after:
            seconds = min(max(seconds, LONGEST_REST), (seconds or REST) * 2 ** (breaker.rested - 1))
        rest = Rest(now + seconds, fault)
        if asleep and rest.absolute <= asleep.absolute and rest.until < asleep.until + REST:
            return None
        breaker.rest, breaker.since = rest, now
        return name, rest

    def learn(self, rests: Mapping[str, Rest], now: float) -> None:
        """What other processes found out."""
        for name, rest in rests.items():
            breaker = self._breaker(name) if rest.until > now else None
            if breaker and (breaker.rest is None or breaker.rest.until < rest.until):
                breaker.rest, breaker.since, breaker.failures = rest, now, max(breaker.failures, FAILURES - 1)

    def wake(self, names: Iterable[str]) -> None:
        """Somebody knows better."""
        for name in names:
            self._breakers.pop(name, None)

    def measure(
        self, target: str, latency: float, throughput: float | None, now: float, *, stream: bool = True
    ) -> None:
        """Seconds to the first content; output tokens per second after it, where there were enough to tell."""
        self._latency[stream].add(target, latency, now)
        if throughput is not None:
            self._throughput.add(target, throughput, now)

    def latencies(self, now: float, *, stream: bool = True) -> Mapping[str, float]:
        """By deployment, of those that were measured: by streams, or by whole answers, whose first content is all."""
        return self._latency[stream].values(now)

    def throughputs(self, now: float) -> Mapping[str, float]:
        return self._throughput.values(now)

    def _breaker(self, name: str) -> _Breaker:
        breaker = self._breakers.setdefault(name, _Breaker())
        if len(self._breakers) > MOST:
            del self._breakers[next(iter(self._breakers))]
        return breaker

    def _of(self, target: str) -> list[tuple[str, _Breaker]]:
        names = (target, target.partition("/")[0])
        return [(name, self._breakers[name]) for name in names if name in self._breakers]


class RetryBudget:
    """Second tries are a tenth of the requests of the last ten seconds, or three: a dying provider meets no storm."""

    SECONDS, SHARE, FLOOR = 10.0, 0.1, 3

    def __init__(self) -> None:
        self._requests: deque[float] = deque()
        self._retries: deque[float] = deque()

    def request(self, now: float) -> None:
        self._requests.append(now)
        while self._requests[0] <= now - self.SECONDS:
            self._requests.popleft()

    def take(self, now: float) -> bool:
        """Whether one more may be made; if so, it is counted."""
        for moments in (self._requests, self._retries):
            while moments and moments[0] <= now - self.SECONDS:
                moments.popleft()
        if len(self._retries) >= max(self.FLOOR, len(self._requests) * self.SHARE):
            return False
        self._retries.append(now)
        return True
