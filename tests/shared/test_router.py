"""Routing is pure, so its tests are tables: who is left, in what order, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest

from shared.catalog import Deployment, Strategy
from shared.config import Provider
from shared.errors import ContextLengthExceeded, Forbidden, InvalidRequest, ModelNotFound, Overloaded, ProviderError
from shared.health import Health, Rest
from shared.prices import Price
from shared.router import (
    NO_PREFERENCES,
    Candidate,
    Needs,
    Pool,
    Preferences,
    Removal,
    awake,
    filtered,
    one_each,
    ordered,
    permitted,
    switched_on,
)
from shared.state import Switch, Switches
from shared.store.base import VirtualKey

NOW = 1_800_000_000.0
NEEDS = Needs((), 1000, 500, stream=True)


def row(name: str, **more: Any) -> Provider:
    return Provider(name=name, base_url="https://example.com/v1", **more)


def to(name: str, price: tuple[int, int] | None = (1, 1), provider: Provider | None = None, **more: Any) -> Deployment:
    owner, _, model = name.partition("/")
    cost = Price.of(input=price[0], output=price[1]) if price else None
    return Deployment(provider or row(owner), model, cost, **more)


def pool(*found: Deployment, ranks: Sequence[int] = ()) -> Pool:
    places = ranks or [0] * len(found)
    return Pool(Candidate("route", each, rank) for each, rank in zip(found, places, strict=True))


def order(members: Pool, strategy: Strategy = "priority", **more: Any) -> list[str]:
    given: dict[str, Any] = {
        "needs": NEEDS, "health": Health(), "now": NOW, "dice": Random(7).random, "wish": NO_PREFERENCES, **more
    }  # fmt: skip
    found = ordered(members, strategy, given.pop("wish"), **given)
    return [each.candidate.to.id for each in found.first(99)]


def ids(members: Pool) -> list[str]:
    return [each.to.id for each in members.candidates]


CHEAP_IN = to("a/cheap-in", (1, 9))
CHEAP_OUT = to("b/cheap-out", (9, 1))
UNKNOWN = to("c/unknown", None)
LOCAL = to("d/local", (0, 0), row("d", local=True), priority=9)


@pytest.mark.parametrize(
    ("strategy", "needs", "expected"),
    [
        ("price", Needs((), 1000, 10), ["d/local", "a/cheap-in", "b/cheap-out", "c/unknown"]),
        ("price", Needs((), 10, 1000), ["d/local", "b/cheap-out", "a/cheap-in", "c/unknown"]),
        ("price", Needs(), ["d/local", "a/cheap-in", "b/cheap-out", "c/unknown"]),
    ],
)
def test_the_cheapest_is_the_cheapest_for_this_request(strategy: Strategy, needs: Needs, expected: list[str]) -> None:
    assert order(pool(UNKNOWN, CHEAP_IN, CHEAP_OUT, LOCAL), strategy, needs=needs) == expected


def test_a_long_prompt_is_priced_by_its_tier() -> None:
    tiered = Deployment(
        row("t"), "tiered", Price.of(input=1, output=1, tiers=[{"above": 2000, "input": 50, "output": 50}])
    )
    flat = to("f/flat", (2, 2))
    assert order(pool(tiered, flat), "price", needs=Needs((), 1000, 100)) == ["t/tiered", "f/flat"]
    assert order(pool(tiered, flat), "price", needs=Needs((), 3000, 100)) == ["f/flat", "t/tiered"]


@pytest.mark.parametrize(("strategy", "first"), [("local", "d/local"), ("remote", "a/cheap-in")])
def test_near_or_far_comes_first_and_the_others_stay_as_fallbacks(strategy: Strategy, first: str) -> None:
    found = order(pool(LOCAL, CHEAP_IN), strategy)
    assert found[0] == first
    assert len(found) == 2


def test_priority_decides_and_weight_shares_among_equals() -> None:
    members = pool(to("a/x", weight=3), to("b/x", weight=1), to("z/last", priority=1))
    dice = Random(1).random
    firsts = Counter(order(members, dice=dice)[0] for _ in range(4000))
    assert firsts["z/last"] == 0
    assert 0.72 < firsts["a/x"] / 4000 < 0.78
    assert all(order(members, dice=dice)[2] == "z/last" for _ in range(50))


def test_equal_weights_share_equally_also_in_second_place() -> None:
    members, dice = pool(*(to(f"p{n}/x") for n in range(4))), Random(2).random
    seconds = Counter(order(members, dice=dice)[1] for _ in range(4000))
    assert all(0.2 < seconds[f"p{n}/x"] / 4000 < 0.3 for n in range(4))


def test_the_fast_comes_first_and_the_unknown_before_the_slow() -> None:
    health = Health()
    for _ in range(5):
        health.measure("a/x", 0.2, 20, NOW)
        health.measure("b/x", 9.0, 300, NOW)
    members = pool(to("a/x"), to("b/x"), to("c/x"))
    assert order(members, "latency", health=health) == ["a/x", "c/x", "b/x"]
    assert order(members, "throughput", health=health) == ["b/x", "c/x", "a/x"]
    assert order(members, "latency", health=health, now=NOW + 3600)[2] == "b/x"
    health.measure("b/x", 0.1, None, NOW, stream=False)
    assert order(members, "latency", health=health) == ["a/x", "c/x", "b/x"], "a short whole answer is no fast start"
    assert order(members, "latency", health=health, needs=Needs())[0] == "b/x"
    assert health.latencies(NOW + 86400)["b/x"] == pytest.approx(1.0, abs=0.01), "what is long ago is forgotten"


def test_turns_go_round_in_one_order_whatever_the_dice_say() -> None:
    members = pool(to("a/x", priority=5), to("b/x"), to("c/x", weight=9))
    firsts = [order(members, "round_robin", turn=turn, dice=Random(turn).random)[0] for turn in range(1, 8)]
    assert firsts == ["b/x", "c/x", "a/x"] * 2 + ["b/x"]
    assert order(members, "round_robin", turn=2) == ["c/x", "a/x", "b/x"]


def test_later_names_are_fallbacks_under_every_strategy() -> None:
    members = pool(to("a/dear", (9, 9)), to("b/free", (0, 0), priority=-5), ranks=[0, 1])
    for strategy in ("priority", "price", "latency", "throughput", "local", "remote", "round_robin"):
        assert order(members, strategy, turn=2) == ["a/dear", "b/free"], strategy


def test_the_callers_own_order_of_providers_comes_before_the_strategy() -> None:
    wish = Preferences.of({"order": ["C", "b"]})
    assert order(pool(to("a/x", (0, 0)), to("b/x"), to("c/x")), "price", wish=wish) == ["c/x", "b/x", "a/x"]


OPENROUTER = row("openrouter", keeps=("provider", "models"))


@pytest.mark.parametrize(
    ("wish", "left"),
    [
        ({"only": ["A"]}, ["a/x", "openrouter/x"]),  # OpenRouter has an `a` of its own, perhaps
        ({"only": ["a", "openrouter"]}, ["a/x", "openrouter/x"]),
        ({"only": ["b"], "ignore": ["openrouter"]}, ["b/x"]),
        ({"ignore": ["a", "b"]}, ["openrouter/x"]),
        ({"max_price": {"prompt": 1}}, ["a/x", "openrouter/x"]),
        ({"max_price": {"completion": 0.5}}, []),
        ({"only": ["a"], "ignore": ["a", "openrouter"]}, []),
        ({"order": ["b"], "allow_fallbacks": False}, ["b/x"]),
        ({"order": ["b", "a"], "allow_fallbacks": False}, ["a/x", "b/x"]),
        ({"order": ["b", "openrouter"], "allow_fallbacks": False}, ["b/x", "openrouter/x"]),
        ({"order": ["azure"], "allow_fallbacks": False}, ["openrouter/x"]),  # which may have that
        ({"only": ["openrouter"], "data_collection": "deny"}, ["openrouter/x"]),
    ],
)
def test_preferences_leave_some_out(wish: dict[str, Any], left: list[str]) -> None:
    members, removed = pool(to("a/x"), to("b/x", (2, 2)), to("openrouter/x", provider=OPENROUTER)), list[Removal]()
    if left:
        assert ids(filtered(members, NEEDS, Preferences.of(wish), removed)) == left
        assert {each.candidate.to.id for each in removed} | set(left) == set(ids(members))
        return
    with pytest.raises(InvalidRequest) as refused:
        filtered(members, NEEDS, Preferences.of(wish), removed)
    assert (refused.value.param or "").startswith("provider")
    assert len(removed) == 3


TOOLLESS = row("t", refuses=("tools", "image_url"))


@pytest.mark.parametrize(
    ("needs", "left", "error"),
    [
        (Needs({"tools"}, 10, 10), ["v/x", "w/x"], None),
        (Needs({"image_url"}, 10, 10), ["v/x"], None),
        (Needs({"n"}, 10, 10), ["t/x", "v/x", "w/x"], None),
        (Needs((), 3000, 9, 1500), ["t/x", "v/x"], None),
        (Needs({"tools"}, 3000, 9, 3000), ["v/x"], None),
        (Needs((), 90_000, 9, 20_000), [], ContextLengthExceeded),
        (Needs({"json_schema"}, 10, 10), ["t/x", "v/x"], None),
        (Needs((), 3000, 99_000), ["t/x", "v/x", "w/x"], None),  # nobody said how long the answer has to be
    ],
)
def test_who_cannot_is_not_asked(needs: Needs, left: list[str], error: type[Exception] | None) -> None:
    members = pool(
        to("t/x", provider=TOOLLESS, context_window=5000),
        to("v/x", context_window=100_000),
        to("w/x", context_window=4000, capabilities=("chat", "tools"), declared=True),
    )
    if error is None:
        assert ids(filtered(members, needs, NO_PREFERENCES, [])) == left
    else:
        with pytest.raises(error, match="every deployment of 'route'"):
            filtered(members, needs, NO_PREFERENCES, [])


def test_a_filter_that_leaves_nobody_names_itself() -> None:
    with pytest.raises(InvalidRequest, match="does not support 'tools'") as refused:
        filtered(pool(to("t/x", provider=TOOLLESS), to("t/y", provider=TOOLLESS)), Needs({"tools"}), NO_PREFERENCES, [])
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(ModelNotFound, match="switched off"):
        switched_on(pool(to("a/x", enabled=False), to("b/x", enabled=False)), [])


def test_one_that_was_named_is_asked_whatever_we_think_it_can_do() -> None:
    alone = pool(to("t/x", provider=TOOLLESS, context_window=10))
    assert filtered(alone, Needs({"tools"}, 1000, 1000), NO_PREFERENCES, []) is alone


@pytest.mark.parametrize(
    ("models", "left"),
    [
        (None, ["a/x", "b/y", "c/un"]),
        (("route",), ["a/x", "b/y", "c/un"]),
        (("a/*", "y"), ["a/x", "b/y"]),
        (("c/un",), ["c/un"]),
        ((), None),
        (("a",), None),
    ],
)
def test_a_key_sees_its_models_only(models: tuple[str, ...] | None, left: list[str] | None) -> None:
    key, members = VirtualKey("k", "h", "n", models=models), pool(to("a/x"), to("b/y"), to("c/un", None))
    removed: list[Removal] = []
    if left is None:
        with pytest.raises(Forbidden):
            permitted(members, key, None, removed)
    else:
        assert ids(permitted(members, key, None, removed)) == left
    assert len(removed) == 3 - len(left or ())


def failing(health: Health, target: str, fault: str = "server", times: int = 3, wait: float | None = None) -> None:
    for _ in range(times):
        health.failed(target, ProviderError(fault, "x", retry_after=wait), NOW)


def rested(members: Pool, health: Health, now: float = NOW) -> list[str]:
    found = ordered(
        members, "round_robin", NO_PREFERENCES, needs=NEEDS, health=health, now=now, dice=lambda: 0.5, turn=1
    )
    return [each.candidate.to.id for each in awake(found, health, now, []).first(9)]


@pytest.mark.parametrize(
    ("trouble", "left"),
    [
        (lambda health: failing(health, "a/x"), ["a/y", "b/x"]),
        (lambda health: failing(health, "a/x", times=2), ["a/x", "a/y", "b/x"]),
        (lambda health: failing(health, "a/x", "rate_limit", 1, 7), ["a/y", "b/x"]),
        (lambda health: failing(health, "a/x", "auth", 1), ["b/x"]),  # the account's: all of the provider's rest
        (lambda health: failing(health, "a/x", "money", 1), ["b/x"]),
        (lambda health: failing(health, "a/x", "bad_request", 9), ["a/x", "a/y", "b/x"]),
        (lambda health: failing(health, "a/x", "context", 9), ["a/x", "a/y", "b/x"]),
    ],
)
def test_what_failed_rests(trouble: Callable[[Health], None], left: list[str]) -> None:
    health = Health()
    trouble(health)
    assert rested(pool(to("a/x"), to("a/y"), to("b/x")), health) == left


def test_the_last_one_standing_never_rests() -> None:
    health, members = Health(), pool(to("a/x"), to("b/x"))
    failing(health, "a/x", "rate_limit", 1, 30)
    failing(health, "b/x", "rate_limit", 1, 5)
    assert rested(members, health) == ["b/x", "a/x"], "the first to wake is asked first"
    assert rested(pool(to("a/x")), health) == ["a/x"]


def test_an_account_without_money_is_never_asked() -> None:
    health, members = Health(), pool(to("a/x"), to("a/y"))
    failing(health, "a/x", "money", 1)
    with pytest.raises(Overloaded) as refused:
        rested(members, health)
    assert refused.value.headers["retry-after"] == "60"
    failing(health, "b/x", "server")
    assert rested(pool(to("a/x"), to("b/x")), health) == ["b/x"]
    assert rested(members, health, NOW + 601) == ["a/x", "a/y"]


def test_equals_share_under_every_strategy_that_measures() -> None:
    members, dice = pool(*(to(f"p{n}/x") for n in range(4)), to("z/x", (9, 9), priority=-1)), Random(3).random
    for strategy in ("price", "latency", "throughput"):
        firsts = Counter(order(members, strategy, dice=dice)[0] for _ in range(400))
        if strategy == "price":
            assert all(60 < firsts[f"p{n}/x"] < 140 for n in range(4)), strategy
        else:
            assert firsts == {"z/x": 400}, "nobody was measured: by priority"


@pytest.mark.parametrize("names", [("a", "a/x"), ("a/x", "a")])
def test_of_two_rests_the_graver_counts(names: tuple[str, str]) -> None:
    health, members = Health(), pool(to("a/x"), to("a/y"))
    rests = {"a": Rest(NOW + 50, "money"), "a/x": Rest(NOW + 90, "server")}
    health.learn({name: rests[name] for name in names}, NOW)
    with pytest.raises(Overloaded):
        rested(members, health)


def test_what_is_left_of_many_is_worked_out_once() -> None:
    """A route over all there is has a thousand candidates, and each request asks for the same few of them."""
    members, removed = pool(*(to(f"p{n}/x", context_window=1000 + n) for n in range(30))), list[Removal]()
    key = VirtualKey("k", "h", "n", models=("p1/*", "p2/*"))
    switches = Switches({"p2": Switch(enabled=False)})

    def parted() -> Pool:
        long = filtered(members, Needs({"tools"}, 990, 0, 11), Preferences.of({"ignore": ["p9"]}), removed)
        return switched_on(permitted(long, key, None, removed), removed, switches.applied)

    assert parted() is parted()
    assert ids(parted()) == ["p1/x"]
    assert Counter(removal.filter for removal in removed) == {
        "provider": 3, "context": 3, "permission": 3 * 26, "enabled": 3
    }  # fmt: skip
    other = Switches({"p2": Switch(enabled=True)})
    assert ids(switched_on(permitted(members, key, None, removed), removed, other.applied)) == ["p1/x", "p2/x"]
    assert switched_on(members, removed, Switches({"q": Switch(enabled=False)}).applied) is members


@pytest.mark.parametrize("wish", [{"max_price": {"image": [1], "prompt": None}}, {"data_collection": "deny"}])
def test_a_preference_that_we_do_not_know_is_for_those_who_may(wish: dict[str, Any]) -> None:
    members = pool(to("a/x"), to("openrouter/x", provider=OPENROUTER))
    assert ids(filtered(members, NEEDS, Preferences.of(wish), [])) == ["openrouter/x"]
    assert ids(filtered(members, NEEDS, Preferences.of(dict.fromkeys(wish)), [])) == ["a/x", "openrouter/x"]


def test_the_first_of_each_provider_takes_turns_and_named_fallbacks_stay() -> None:
    members = pool(to("a/x"), to("a/y", priority=1), to("b/x"), to("a/z"), ranks=[0, 0, 0, 1])
    assert ids(one_each(members)) == ["a/x", "b/x", "a/z"]
