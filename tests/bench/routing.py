"""What it costs to decide who is asked, among 200 deployments of 20 providers: CPU in this process, by strategy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from random import Random
from typing import get_args

from shared.catalog import Deployment, Strategy
from shared.config import Provider
from shared.errors import ProviderError
from shared.health import Health
from shared.prices import Price
from shared.router import (
    NO_PREFERENCES,
    Candidate,
    Needs,
    Order,
    Pool,
    Preferences,
    awake,
    filtered,
    ordered,
    permitted,
    switched_on,
)
from shared.state import Switch, Switches
from shared.store.base import VirtualKey

MOST, PROVIDERS, DECISIONS, BAR = 200, 20, 100, 100.0
NOW = 1_800_000_000.0
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PLAIN = VirtualKey("k", "h", "n")
HELD = VirtualKey("k", "h", "n", models=tuple(f"p{number}/*" for number in range(PROVIDERS // 2)), balance=1, credit=1)


def pool() -> Pool:
    rows = [Provider(name=f"p{number}", base_url="https://x", local=number == 3) for number in range(PROVIDERS)]
    return Pool(
        Candidate("auto", Deployment(rows[at % PROVIDERS], f"m{at}", Price.of(input=at % 7 + 1, output=at % 11 + 1)))
        for at in range(MOST)
    )


def health(everyone: Pool, ill: int) -> Health:
    """All were measured; so many rest."""
    known, dice = Health(), Random(4)
    for number, name in enumerate(everyone.ids):
        known.measure(name, dice.random(), dice.random() * 100, NOW)
        if number < ill:
            known.failed(name, ProviderError("rate_limit", "x", retry_after=30), NOW)
    return known


def measure(rounds: int) -> dict[str, list[float]]:
    """CPU microseconds a decision: by strategy with nothing else to heed, then the median strategy with more.

    One value a round; the rounds are interleaved."""
    everyone, dice = pool(), Random(5).random
    well, tired, switches = health(everyone, 0), health(everyone, 20), Switches({"p1": Switch(priority=3)})
    wish = Preferences.of({"ignore": ["p2"], "order": ["p5", "p4"]})

    def decided(
        strategy: Strategy, key: VirtualKey, known: Health, wish: Preferences, features: frozenset[str]
    ) -> Order:
        needs = Needs(features, 1000, 500, stream=True)
        left = permitted(filtered(everyone, needs, wish, []), key, None, [])
        left = switched_on(left, [], switches.applied if key is HELD else None)
        found = ordered(left, strategy, wish, needs=needs, health=known, now=NOW, dice=dice, turn=7)
        return awake(found, known, NOW, [])

    def spent(strategy: Strategy, key: VirtualKey, known: Health, wish: Preferences, *features: str) -> float:
        before, needed = time.process_time(), frozenset(features)
        for _ in range(DECISIONS):
            decided(strategy, key, known, wish, needed)
        return (time.process_time() - before) * 1e6 / DECISIONS

    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        told: dict[str, float] = {each: spent(each, PLAIN, well, NO_PREFERENCES) for each in STRATEGIES}
        told = {"median of the strategies": statistics.median(told.values()), **told}
        told["the median, while 20 of the 200 rest"] = statistics.median(
            spent(each, PLAIN, tired, NO_PREFERENCES) for each in STRATEGIES
        )
        told["the median, by a held key, with switches, tools and wishes"] = statistics.median(
            spent(each, HELD, tired, wish, "tools") for each in STRATEGIES
        )
        for name, value in told.items() if turn else ():
            found.setdefault(name, []).append(value)
    return found


def report(found: Mapping[str, list[float]]) -> str:
    title = f"CPU us of a routing decision over {MOST} deployments"
    lines = [f"{title:60}{'us (min..max)':>24}{'bar':>8}", "-" * 92]
    for name, values in found.items():
        cell = f"{statistics.median(values):.1f} ({min(values):.1f}..{max(values):.1f})"
        lines.append(f"{name:60}{cell:>24}{BAR:>8.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(measure(15)))
