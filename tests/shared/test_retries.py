"""When the first one does not answer: who is asked next, with whose money, and what the caller hears if nobody does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from shared.errors import FAULTS, Forbidden, GatewayError, ProviderError
from shared.keys import time_ordered
from shared.schema import parse
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.kit import Kit, streamed, whole

CONFIG = """
[aliases]
two = [{ provider = "openai", model = "gpt-4o" }, { provider = "openai", model = "gpt-4o-mini", priority = 1 }]
pair = [{ provider = "openai", model = "gpt-4o-mini" }, { provider = "groq", model = "small", priority = 1 }]
rising = [
  { provider = "openai", model = "mid" },
  { provider = "openai", model = "dear", priority = 1 },
  { provider = "groq", model = "cheap", priority = 2 },
]
"gpt-4" = [{ provider = "groq", model = "small" }]
even = [
  { provider = "openai", model = "mid" },
  { provider = "groq", model = "mid", priority = 1 },
]

[prices]
"openai/mid" = { input = 10, output = 10 }
"groq/mid" = { input = 10, output = 10 }
"openai/dear" = { input = 1000, output = 1000 }
"groq/cheap" = { input = 0.01, output = 0.01 }
"groq/small" = { input = 0.01, output = 0.01 }

[models]
"openai/shared-1" = {}
"groq/shared-1" = {}
"openai/shared-2" = {}
"groq/shared-2" = {}
"groq/small" = { context_window = 100 }
"""
ENVIRON = {"OPENAI_API_KEY": "sk-test-openai-key", "GROQ_API_KEY": "gsk-test-groq-key"}
CENT = 10**7
"""Of nano-dollars: `mid` may cost four of them, `dear` four hundred."""
NO_CREDIT = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    (tmp_path / "gateway.toml").write_text(CONFIG)
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield Kit(store, lambda _: whole(answer()), ENVIRON, str(tmp_path / "gateway.toml"))
    await store.close()


async def key_of(kit: Kit, **limits: Any) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test", **limits)))[1]


async def poor(kit: Kit, money: int, **limits: Any) -> str:
    return await key_of(kit, balance=money, credit=money, **limits)


def ask(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}


def answer() -> dict[str, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"choices": [{"index": 0, "message": {"content": "pong"}, "finish_reason": "stop"}], "usage": usage}


def failing(*hosts: str, status: int = 500, body: Any = None) -> Callable[[httpx.Request], httpx.Response]:
    """These fail, the others answer."""
    return lambda request: whole(body or {}, status) if request.url.host in hosts else whole(answer())


OPENAI, GROQ = "api.openai.com", "api.groq.com"


def tried(row: Any) -> list[tuple[str, str | None]]:
    return [(each["model"], each["error"]) for each in row.doc["attempts"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "body"), [(402, {}), (429, NO_CREDIT), (401, {})])
async def test_who_refused_our_account_is_not_asked_for_another_model(
    kit: Kit, status: int, body: Any, stream: bool
) -> None:
    kit.reply = failing(OPENAI, status=status, body=body)
    outcome = await kit.ask(await key_of(kit), ask("two", stream=stream))
    assert len(outcome.row.doc["attempts"]) == 1
    assert outcome.error is not None
    assert (outcome.error.status, outcome.error.code) == (502, "upstream_auth_error")


async def test_who_may_not_use_one_model_may_use_the_next(kit: Kit) -> None:
    kit.reply = lambda request: whole({}, 403) if b'"gpt-4o"' in request.content else whole(answer())
    assert tried((await kit.ask(await key_of(kit), ask("two"))).row) == [("gpt-4o", "auth"), ("gpt-4o-mini", None)]


@pytest.mark.parametrize(
    ("money", "models", "reply", "expected"),
    [
        (1000 * CENT, None, failing(), ["mid"]),
        (1000 * CENT, None, failing(OPENAI, status=404), ["mid", "dear", "cheap"]),
        (5 * CENT, None, failing(OPENAI, status=404), ["mid", "cheap"]),  # `dear` is not for this key
        (CENT, None, failing(), ["cheap"]),
        (CENT, ("groq/cheap",), failing(), ["cheap"]),  # what it may not use, it need not be able to pay
        (5 * CENT, ("openai/*",), failing(), ["mid"]),
    ],
)
async def test_a_key_is_answered_by_whom_it_can_pay(
    kit: Kit, money: int, models: tuple[str, ...] | None, reply: Any, expected: list[str]
) -> None:
    kit.reply = reply
    outcome = await kit.ask(await poor(kit, money, models=models), ask("rising"))
    assert [model for model, _ in tried(outcome.row)] == expected
    assert outcome.key.balance + outcome.key.spent == money
    assert outcome.key.open == {}
    dear = [each["deployment"] for each in outcome.row.doc["routing"]["removed"] if each["filter"] == "money"]
    listed = [each["deployment"] for each in outcome.row.doc["routing"]["candidates"]]
    assert not set(dear) & set(listed)
    assert {name.partition("/")[2] for name in dear} <= {"mid", "dear"} - set(expected)


@pytest.mark.parametrize("models", [None, ("openai/dear",)])
async def test_who_can_pay_for_nobody_is_refused(kit: Kit, models: tuple[str, ...] | None) -> None:
    with pytest.raises(Forbidden) as refused:
        await kit.ask(await poor(kit, 1000, models=models), ask("rising"))
    assert refused.value.code == "insufficient_quota"
    assert kit.requests == []
    [kept] = [each async for each in kit.services.store.keys()]
    assert (kept.open, kept.balance, kept.spent) == ({}, 1000, 0)


async def test_a_switch_to_the_dear_one_is_paid_for_first(kit: Kit) -> None:
    await kit.gateway.state.turn("openai/dear", {"priority": 1}, wake=False)
    for name in ("openai/mid", "groq/cheap"):
        await kit.gateway.state.turn(name, {"priority": 9}, wake=False)
    rich = await kit.admit(await poor(kit, 1000 * CENT), ask("rising"))
    assert (rich.candidates[0].model, rich.hold.money > 400 * CENT) == ("dear", True)
    less = await kit.admit(await poor(kit, 20 * CENT), ask("rising"))
    assert {to.model for to in less.candidates} == {"mid", "cheap"}
    for exchange in (rich, less):
        await kit.gateway.close(exchange)


async def test_names_that_callers_make_up_are_not_shared(kit: Kit) -> None:
    kit.reply = lambda _: whole({"error": {"message": "no", "code": "model_not_found"}}, 404)
    key = await key_of(kit)
    for number in range(5):
        await kit.ask(key, ask(f"openai/made-up-{number}"))
    await kit.ask(key, ask("openai/gpt-4o"))
    note = await kit.services.store.note("STATE")
    assert note is not None
    assert orjson.loads(note.body)["rests"].keys() == {"openai/gpt-4o"}


async def test_a_provider_that_stays_busy_is_written_down_once(kit: Kit) -> None:
    kit.reply = lambda _: whole({}, 429, **{"retry-after": "30"})
    key = await key_of(kit)
    for _ in range(10):
        await kit.ask(key, ask("openai/gpt-4o"))
    note = await kit.services.store.note("STATE")
    assert note is not None
    assert note.version == 1


async def test_a_stream_that_began_before_the_trouble_does_not_end_the_rest(kit: Kit) -> None:
    def piece(finish: str | None) -> bytes:
        choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": finish}
        return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"

    key = await key_of(kit)
    kit.reply = lambda _: streamed(piece(None), piece("stop"))
    exchange = await kit.admit(key, ask("openai/gpt-4o", stream=True))
    chunks = kit.gateway.stream(exchange)
    await anext(chunks)
    kit.reply = lambda _: whole({}, 429, **{"retry-after": "30"})
    await kit.ask(key, ask("openai/gpt-4o"))
    kit.reply = lambda _: whole(answer())
    assert [chunk async for chunk in chunks]
    await kit.gateway.close(exchange)
    assert "openai/gpt-4o" in kit.gateway.state.health.resting(exchange.created + 1)
    assert (await kit.ask(key, ask("openai/gpt-4o"))).error is None
    assert not kit.gateway.state.health.resting(exchange.created + 1), "who asked since then knows better"


@pytest.mark.parametrize(
    ("first", "second", "seen"),
    [
        ((429, {"retry-after": "9"}), (429, {"retry-after": "4"}), (429, "rate_limit_exceeded", "4")),
        ((429, {"retry-after": "9"}), (500, {}), (503, "overloaded", "9")),
        ((500, {}), (404, {}), (502, "upstream_error", None)),
        ((404, {}), (404, {}), (404, "model_not_found", None)),
        ((404, {}), (503, {"retry-after": "20"}), (503, "overloaded", "20")),
        ((401, {}), (404, {}), (502, "upstream_auth_error", None)),
        ((500, {}), (400, {}), (400, None, None)),
    ],
)
async def test_what_is_told_when_nobody_answered(kit: Kit, first: Any, second: Any, seen: Any) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        status, headers = first if request.url.host == OPENAI else second
        return whole({"error": {"message": "no"}}, status, **headers)

    kit.reply = reply
    error = (await kit.ask(await key_of(kit), ask("pair"))).error
    assert error is not None
    assert (error.status, error.code, error.headers.get("retry-after")) == seen


async def test_a_prompt_too_long_for_the_second_is_no_fault_of_the_caller(kit: Kit) -> None:
    long = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    kit.reply = lambda request: whole({}, 500) if request.url.host == OPENAI else whole(long, 400)
    error = (await kit.ask(await key_of(kit), ask("pair"))).error
    assert error is not None
    assert error.status == 502


@pytest.mark.parametrize("fault", ["too_large", "total_timeout"])
def test_what_would_only_cost_again_is_not_to_be_tried_again(fault: str) -> None:
    assert ProviderError(fault, "x").answer().headers == {"x-should-retry": "false"}
    assert not [each for each in FAULTS if each not in ("too_large", "total_timeout") and
                "x-should-retry" in ProviderError(each, "x").answer().headers]  # fmt: skip


async def test_turns_are_each_names_own(kit: Kit) -> None:
    key, wish = await key_of(kit), {"provider": {"sort": "round_robin"}}
    names = Counter[tuple[str, str]]()
    for _ in range(4):
        for model in ("shared-1", "shared-2"):
            names[model, (await kit.ask(key, ask(model, **wish))).row.doc["provider"]] += 1
    assert set(names.values()) == {2}
    assert len(names) == 4


async def test_a_named_fallback_stays_one_where_providers_take_turns(kit: Kit) -> None:
    kit.reply = lambda request: whole(answer()) if b"unlisted" in request.content else whole({}, 500)
    outcome = await kit.ask(await key_of(kit), ask("auto:round-robin", models=["openai/unlisted"]))
    assert outcome.error is None
    assert outcome.row.doc["attempts"][-1]["model"] == "unlisted"


async def test_a_caller_who_leaves_while_a_second_try_is_waited_for_pays_nothing(kit: Kit) -> None:
    kit.reply = lambda _: whole({}, 429, **{"retry-after": "2"})
    exchange = await kit.admit(await poor(kit, 1000 * CENT), ask("openai/gpt-4o", stream=True))
    waiting = asyncio.ensure_future(anext(kit.gateway.stream(exchange)))
    while not exchange.attempts or not exchange.last_error:  # noqa: ASYNC110 what is waited for happens elsewhere
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    waiting.cancel()
    exchange.interrupt()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    doc = await kit.gateway.close(exchange)
    assert len(kit.requests) == 1
    assert (doc["status"], doc["cost"]["total_cost"]) == ("cancelled", 0)


async def test_what_a_failed_try_said_unseen_is_not_the_next_ones(kit: Kit) -> None:
    def event(index: int, finish: str | None, text: str = "", **more: Any) -> bytes:
        choice = {"index": index, "text": text, "finish_reason": finish}
        return b"data: " + orjson.dumps({"choices": [choice], **more}) + b"\n\n"

    usage = {"prompt_tokens": 9, "completion_tokens": 900, "total_tokens": 909}
    replies = iter(
        [
            streamed(event(0, "length", usage=usage), b'data: {"error":{"message":"no","code":500}}\n\n'),
            streamed(event(0, "stop", "a"), event(1, "stop", "b"), b"data: [DONE]\n\n"),
        ]
    )
    kit.reply = lambda _: next(replies)
    body = {"model": "openai/gpt-3.5-turbo-instruct", "prompt": ["x", "y"], "stream": True}
    outcome = await kit.ask(await key_of(kit), body, "completions")
    assert [error for _, error in tried(outcome.row)] == ["server", None]
    assert outcome.row.doc["finish_reason"] == "stop"
    assert outcome.row.doc["tokens"]["completion_tokens"] < 100


class Lost(Exception):
    """What nobody expects."""


async def test_what_fails_beside_or_after_admission_leaves_nothing_held(kit: Kit) -> None:
    class Reading:
        async def read(self) -> None:
            raise Lost

        def applied(self, call: Any) -> Any:
            return call

    key = await key_of(kit)
    plan = kit.gateway.plan(parse("chat", orjson.dumps(ask("openai/gpt-4o"))))
    exchange = await kit.gateway.admit(plan, kit.keys.credential(f"Bearer {key}"), time_ordered(1.0), Reading())
    await kit.gateway.close(exchange)

    class Wrong(Reading):
        async def read(self) -> None: ...

        def applied(self, call: Any) -> Any:
            raise Lost

    with pytest.raises(Lost):
        await kit.gateway.admit(plan, kit.keys.credential(f"Bearer {key}"), time_ordered(2.0), Wrong())
    [kept] = [each async for each in kit.services.store.keys()]
    assert kept.open == {}


async def test_an_alias_does_not_open_the_model_whose_name_it_has(kit: Kit) -> None:
    key = await key_of(kit, models=("gpt-4",))
    assert (await kit.ask(key, ask("gpt-4"))).row.doc["provider"] == "groq"
    for model in ("openai/gpt-4", "auto"):
        with pytest.raises(GatewayError):
            assert (await kit.ask(key, ask(model))).row.doc["model"] != "gpt-4"
