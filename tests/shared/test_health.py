"""What rests, for how long, who probes it; and how many second tries there may be."""

from __future__ import annotations

import pytest

from shared.errors import FAULTS, ProviderError
from shared.health import ACCOUNT, AT_ONCE, LONGEST_REST, MOST, NEUTRAL, PROBE, REST, Health, Rest, RetryBudget

NOW = 1_800_000_000.0
SERVER = ProviderError("server", "x")


def broken(times: int = 3, now: float = NOW) -> Health:
    health = Health()
    for _ in range(times):
        health.failed("a/x", SERVER, now)
    return health


def test_every_fault_that_is_told_apart_exists() -> None:
    assert {*NEUTRAL, *AT_ONCE, *ACCOUNT} <= FAULTS.keys()


def test_a_success_between_failures_keeps_a_deployment_up() -> None:
    health = broken(2)
    health.succeeded("a/x", NOW - 60)
    health.failed("a/x", SERVER, NOW)
    assert health.resting(NOW) == {}


def test_after_a_rest_one_request_probes() -> None:
    health, later = broken(), NOW + REST + 1
    assert health.resting(NOW + REST - 1)["a/x"].fault == "server"
    assert health.resting(later) == {}
    health.begin("a/x", later)
    assert "a/x" in health.resting(later), "the others wait for the probe"
    assert health.succeeded("a/x", later) == ["a/x"]
    assert health.resting(later) == {}


def test_a_probe_that_fails_doubles_the_rest_up_to_a_limit() -> None:
    health, now, rests = broken(), NOW, list[float]()
    for _ in range(6):
        now = health.resting(now)["a/x"].until + 0.1
        health.begin("a/x", now)
        health.failed("a/x", SERVER, now)
        rests.append(health.resting(now)["a/x"].until - now)
    assert rests == pytest.approx([20, 40, 80, LONGEST_REST, LONGEST_REST, LONGEST_REST])


def test_a_probe_that_was_given_up_lets_the_next_one_through() -> None:
    health, later = broken(), NOW + REST + 1
    health.begin("a/x", later)
    health.end("a/x")  # its caller hung up
    assert health.resting(later) == {}


def test_who_asked_before_the_rest_does_not_end_it() -> None:
    health = broken()
    assert health.succeeded("a/x", NOW - 5) == [], "a stream that began when all was well"
    assert "a/x" in health.resting(NOW + 1)
    assert health.succeeded("a/x", NOW + 1) == ["a/x"], "the last one standing was asked all the same"
    health.learn({"a/x": Rest(NOW + 50, "server")}, NOW)
    assert health.succeeded("a/x", NOW - 1) == []


@pytest.mark.parametrize(("error", "seconds"), [(SERVER, REST), (ProviderError("rate_limit", "x"), 5.0)])
def test_many_failures_at_once_are_one(error: ProviderError, seconds: float) -> None:
    health = Health()
    told = [health.failed("a/x", error, NOW + number / 100) for number in range(20)]
    assert len([each for each in told if each]) == 1, "each change is written for the others"
    assert health.resting(NOW)["a/x"].until < NOW + seconds + 1


def test_a_graver_or_much_longer_rest_takes_the_place_of_the_last() -> None:
    health = Health()
    health.failed("a/x", ProviderError("auth", "x"), NOW)
    assert health.failed("a/x", ProviderError("money", "x"), NOW) == ("a", Rest(NOW + 600, "money"))
    health.failed("b/x", ProviderError("rate_limit", "x", retry_after=2), NOW)
    assert health.failed("b/x", ProviderError("rate_limit", "x", retry_after=9), NOW) is None
    assert health.failed("b/x", ProviderError("rate_limit", "x", retry_after=30), NOW) == (
        "b/x",
        Rest(NOW + 30, "rate_limit"),
    )


def test_who_may_not_use_one_model_may_use_another() -> None:
    health = Health()
    health.failed("bedrock/a", ProviderError("auth", "x", status=403), NOW)
    assert health.resting(NOW).keys() == {"bedrock/a"}
    health.failed("bedrock/a", ProviderError("auth", "x", status=401), NOW)
    assert health.resting(NOW).keys() == {"bedrock/a", "bedrock"}


def test_a_probe_that_never_ends_is_not_waited_for() -> None:
    health, later = broken(), NOW + REST + 1
    health.begin("a/x", later)
    assert health.resting(later + PROBE - 1)
    assert not health.resting(later + PROBE + 1)


def test_names_that_callers_make_up_fill_no_memory() -> None:
    health = Health()
    for number in range(MOST + 100):
        health.failed(f"a/{number}", ProviderError("model_gone", "x"), NOW)
        health.measure(f"b/{number}", 1.0, 1.0, NOW)
        health.measure("c/x", 2.0, 50.0, NOW)
    assert len(health.resting(NOW)) == len(health.latencies(NOW)) == len(health.throughputs(NOW)) == MOST
    assert "c/x" in health.latencies(NOW), "who is asked often stays"


def test_what_was_measured_is_known_at_once_and_fades_within_seconds() -> None:
    health = Health()
    health.measure("a/x", 9.0, None, NOW)
    first = health.latencies(NOW)["a/x"]
    health.measure("a/x", 9.0, None, NOW + 1)
    assert health.latencies(NOW + 1)["a/x"] > first
    assert health.latencies(NOW + 1000)["a/x"] < first


def test_what_a_provider_says_about_waiting_is_obeyed() -> None:
    health = Health()
    told = health.failed("a/x", ProviderError("rate_limit", "x", retry_after=42), NOW)
    assert told == ("a/x", Rest(NOW + 42, "rate_limit"))
    assert health.failed("b/x", ProviderError("overloaded", "x"), NOW) is None


def test_other_processes_are_believed_but_not_about_the_past() -> None:
    health = Health()
    health.learn({"a/x": Rest(NOW + 50, "server"), "b": Rest(NOW - 1, "auth")}, NOW)
    assert health.resting(NOW).keys() == {"a/x"}
    health.learn({"a/x": Rest(NOW + 10, "server")}, NOW)
    assert health.resting(NOW)["a/x"].until == NOW + 50
    health.wake(["a/x"])
    assert health.resting(NOW) == {}


def test_second_tries_are_a_tenth_or_three_in_ten_seconds() -> None:
    budget = RetryBudget()
    assert [budget.take(NOW) for _ in range(5)] == [True, True, True, False, False]
    assert budget.take(NOW + 10.1)
    busy = RetryBudget()
    for number in range(100):
        busy.request(NOW + number / 100)
    assert [busy.take(NOW + 1) for _ in range(12)].count(True) == 10


def test_the_budget_forgets_and_does_not_grow() -> None:
    budget = RetryBudget()
    for number in range(10_000):
        budget.request(NOW + number)
    assert len(budget._requests) <= 11  # pyright: ignore[reportPrivateUsage] memory is what is tested
