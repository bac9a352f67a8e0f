"""Answers kept and given again: to whom, for what, for how long; and one call for many who ask the same at once."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.assembly import assembled
from shared.cache import MEMORY, Cache, Kept
from shared.errors import GatewayError, StoreUnavailable, UpstreamTimeout
from shared.exchange import Exchange
from shared.schema import JSON, Call, Surface, Usage
from shared.store.base import KeyChange, Note, Store, VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.kit import Kit, Outcome, streamed, whole

ENVIRON = {"OPENAI_API_KEY": "sk-test-openai-key", "GROQ_API_KEY": "gsk-test-groq-key"}
CONFIG = """
[aliases]
fast = [
  { provider = "groq", model = "llama-3.3-70b-versatile" },
  { provider = "openai", model = "gpt-4o-mini", priority = 1 },
]
"""
COST = 10 * 150 + 5 * 600
"""Of one `answer`, in nano-dollars."""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield store
    await store.close()


@pytest.fixture
def another(store: SQLiteStore, tmp_path: Path) -> Callable[[], Kit]:
    """Makes gateways that share one store and nothing else, as processes do."""
    (tmp_path / "gateway.toml").write_text(CONFIG)
    return lambda: Kit(store, lambda _: whole(answer()), ENVIRON, str(tmp_path / "gateway.toml"))


@pytest.fixture
def kit(another: Callable[[], Kit]) -> Kit:
    return another()


async def key_of(kit: Kit, **limits: Any) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test", **limits)))[1]


def ask(model: str = "openai/gpt-4o-mini", **more: Any) -> JSON:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "cache": {}, **more}


def answer(text: str = "pong", finish: str = "stop", **message: Any) -> JSON:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": usage}


def event(body: JSON) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def piece(finish: str | None = None, index: int = 0, **delta: Any) -> bytes:
    return event({"choices": [{"index": index, "delta": delta, "finish_reason": finish}]})


DONE = b"data: [DONE]\n\n"
USAGE = event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}})


def cached(outcome: Outcome) -> bool:
    """By the record; the answer itself must say the same."""
    told = {chunk["lightrail"]["cache"] for chunk in outcome.chunks if "lightrail" in chunk}
    assert told <= {"hit" if outcome.row.doc["cached"] else "miss"}
    return outcome.row.doc["cached"]


# What a hit is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [{}, {"cache": None}, {"cache": {"mode": "off"}}])
async def test_nothing_is_kept_unless_asked(kit: Kit, cache: JSON) -> None:
    key = await key_of(kit)
    for _ in range(2):
        outcome = await kit.ask(key, {name: value for name, value in ask().items() if name != "cache"} | cache)
        assert outcome.chunks[0]["lightrail"]["cache"] == "off"
    assert len(kit.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hit_is_admitted_and_recorded_and_costs_nothing(kit: Kit, stream: bool) -> None:
    kit.reply = lambda _: streamed(piece(content="pong"), piece("stop"), USAGE, DONE) if stream else whole(answer())
    key = await key_of(kit, rpm=3, tpm=10_000, balance=10**9, credit=10**9)
    body = ask(stream=stream, max_tokens=500)
    miss, hit = await kit.ask(key, body), await kit.ask(key, body)
    assert (cached(miss), cached(hit), len(kit.requests)) == (False, True, 1)
    assert (miss.spent, hit.spent, hit.row.cost, hit.key.balance) == (COST, 0, 0, 10**9 - COST)
    minute = hit.row.created // 60
    assert (hit.key.left("r", minute), hit.key.left("t", minute)) == (1, 10_000 - 15)
    assert hit.key.open == {}
    doc, usage = hit.row.doc, hit.chunks[-1]["usage"]
    assert (doc["provider"], doc["model"], doc["attempts"]) == ("openai", "gpt-4o-mini", [])
    assert (doc["status"], doc["finish_reason"]) == ("ok", "stop")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["cost"]) == (10, 5, 0)
    assert hit.chunks[0]["id"] == hit.row.id != miss.row.id
    await kit.ask(key, body)
    with pytest.raises(GatewayError, match="3 requests per minute"):
        await kit.ask(key, body)


KEPT = Kept("openai", "gpt-4o-mini", Usage(10, output=5), body={"choices": []})


def shared(first: tuple[Call, str], then: tuple[Call, str]) -> bool:
    """Whether the second caller is given what was kept for the first."""

    async def asked() -> bool:
        cache = Cache(cast("Store", None))
        one, other = (cache.lookup(*each) for each in (first, then))
        assert one is not None
        assert other is not None
        assert await one.reuse(0) is None
        one.land(KEPT)
        return await other.reuse(0) is not None

    return asyncio.run(asked())


VALUES = st.sampled_from([0, 1, 0.5, "a", "b", "", True, False, [], ["a"], ["b"], [1], {}, {"a": 1}, {"a": {"b": 2}}])
FIELDS = [
    "model", "messages", "models", "provider", "temperature", "top_p", "n", "stop", "seed", "max_tokens", "tools",
    "tool_choice", "response_format", "logprobs", "reasoning_effort", "modalities", "service_tier", "strict",
    "logit_bias", "prediction", "verbosity", "a_field_of_tomorrow",
]  # fmt: skip
UNTOLD = ["stream", "stream_options", "user", "metadata", "session_id", "store", "safety_identifier"]


@given(name=st.sampled_from(FIELDS), before=VALUES, after=VALUES, kind=st.sampled_from(["chat", "completions"]))
def test_whatever_may_change_the_answer_is_a_miss(name: str, before: Any, after: Any, kind: Surface) -> None:
    one, other = (Call(kind, {**ask(), name: value}) for value in (before, after))
    assert shared((one, "key"), (other, "key")) == (json.dumps(before) == json.dumps(after))
    assert not shared((one, "key"), (other, "another key"))
    assert not shared((one, "key"), (Call(kind, ask()), "key"))


@given(
    changes=st.dictionaries(st.sampled_from(UNTOLD), VALUES),
    cache=st.sampled_from([{}, {"mode": "on"}, {"ttl": 5}]),
    nulls=st.sets(st.sampled_from(["temperature", "tools", "seed"])),
)
def test_what_says_only_how_the_answer_comes_is_a_hit(changes: JSON, cache: JSON, nulls: set[str]) -> None:
    """In whatever order the fields come."""
    other = dict(reversed([*ask(**changes, cache=cache).items(), *((name, None) for name in nulls)]))
    assert shared((Call("chat", ask()), "key"), (Call("chat", other), "key"))


def test_a_chat_is_no_completion_and_no_embedding() -> None:
    body = {"model": "m", "messages": [], "prompt": "x", "input": "x", "cache": {}}
    surfaces: list[Surface] = ["chat", "completions", "embeddings"]
    for one in surfaces:
        for other in surfaces:
            assert shared((Call(one, body), "key"), (Call(other, body), "key")) == (one == other)


async def test_no_key_is_ever_given_what_was_made_for_another(kit: Kit) -> None:
    keys = [await key_of(kit) for _ in range(4)]
    kit.reply = lambda _: whole(answer(f"number {len(kit.requests)}"))
    first = [(await kit.ask(key, ask())).chunks[0]["choices"] for key in keys]
    again = await asyncio.gather(*(kit.ask(key, ask()) for key in keys * 3))
    assert [outcome.chunks[0]["choices"] for outcome in again] == first * 3
    assert len(kit.requests) == len(keys)


async def test_an_answer_is_kept_for_as_long_as_asked(store: SQLiteStore) -> None:
    start = time.time() - 5000
    now, call = [start], Call("chat", ask(cache={"ttl": 1000}))
    here, there = (Cache(store, lambda: now[0]) for _ in range(2))
    first = here.lookup(call, "key")
    assert first is not None
    assert await first.reuse(0) is None
    first.land(KEPT)
    found: list[bool] = []
    for after in (0, 59, 61):
        now[0] = start + after
        lookup = here.lookup(call, "key")
        assert lookup is not None
        found.append(await lookup.reuse(0) is not None)
        lookup.land(None)
    assert found == [True, True, False]  # without a look into the store, memory is believed for a minute
    await first.keep()
    late = there.lookup(call, "key")
    assert late is not None
    await late.read()
    assert await late.reuse(0) is None  # in the store it ends with its time, which is over by the real clock


async def test_refresh_asks_anew_and_keeps_what_comes(another: Callable[[], Kit]) -> None:
    here, there = another(), another()
    key = await key_of(here)
    await here.ask(key, ask())
    here.reply = lambda _: whole(answer("newer"))
    anew = await here.ask(key, ask(cache={"mode": "refresh"}))
    assert (cached(anew), anew.chunks[0]["choices"][0]["message"]["content"]) == (False, "newer")
    for kit in (here, there):
        hit = await kit.ask(key, ask())
        assert (cached(hit), hit.chunks[0]["choices"][0]["message"]["content"]) == (True, "newer")
    assert (len(here.requests), len(there.requests)) == (2, 0)


# Whole and in pieces -----------------------------------------------------------------------------------------------

CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
    {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]
LOGPROBS = {"content": [{"token": "po", "logprob": -0.1, "bytes": [112, 111], "top_logprobs": []}], "refusal": None}
CASES: dict[str, tuple[JSON, JSON, list[bytes]]] = {
    "text": ({}, answer(), [piece(content="po"), piece(content="ng"), piece("stop")]),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": name}} for name in "fg"]},
        answer(cast("str", None), "tool_calls", tool_calls=CALLS),
        [
            piece(tool_calls=[{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f"}}]),
            piece(tool_calls=[{"index": 0, "function": {"arguments": '{"x": '}}]),
            piece(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
            piece(
                tool_calls=[
                    {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
                ]
            ),
            piece("tool_calls"),
        ],
    ),
    "two choices": (
        {"n": 2},
        {
            **answer(),
            "choices": [
                {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": why}
                for i, text, why in ((0, "one", "stop"), (1, "two", "length"))
            ],
        },
        [
            *(piece(content="o"), piece(index=1, content="tw"), piece(content="ne"), piece(index=1, content="o")),
            *(piece("length", index=1), piece("stop")),
        ],
    ),
    "reasoning": (
        {"reasoning_effort": "low"},
        answer(reasoning_content="hm, a ping"),
        [piece(reasoning_content="hm, "), piece(reasoning_content="a ping"), piece(content="pong"), piece("stop")],
    ),
    "logprobs": (
        {"logprobs": True},
        {"choices": [{**answer()["choices"][0], "logprobs": LOGPROBS}], "usage": answer()["usage"]},
        [
            event({"choices": [{"index": 0, "delta": {"content": "pong"}, "logprobs": LOGPROBS}]}),
            piece("stop"),
        ],
    ),
    "beside": (
        {},
        {**answer(), "system_fingerprint": "fp_1", "citations": ["https://a.example"]},
        [event({**json.loads(data[6:]), "system_fingerprint": "fp_1", "citations": ["https://a.example"]})
         for data in (piece(content="po"), piece(content="ng"), piece("stop"))],
    ),
}  # fmt: skip


def said(body: JSON) -> JSON:
    """A whole body without what belongs to this answer alone, and without nulls."""
    own = ("id", "created", "object", "lightrail", "usage")
    kept = {name: value for name, value in body.items() if name not in own}
    kept["choices"] = [
        {
            **{name: value for name, value in choice.items() if value is not None and name != "message"},
            "message": {name: value for name, value in choice["message"].items() if value},
        }
        for choice in kept["choices"]
    ]
    return kept


@pytest.mark.parametrize("first", ["whole", "stream"])
@pytest.mark.parametrize("case", CASES)
async def test_what_was_kept_one_way_is_given_the_other_way_too(kit: Kit, case: str, first: str) -> None:
    more, body, events = CASES[case]
    key = await key_of(kit)

    def reply(request: httpx.Request) -> httpx.Response:
        stream = json.loads(request.content).get("stream")
        return streamed(*events, USAGE, DONE) if stream else whole(copy.deepcopy(body))

    kit.reply = reply
    outcomes = [
        await kit.ask(key, ask(**more, stream=stream))
        for stream in ((False, False, True) if first == "whole" else (True, True, False))
    ]
    assert ([cached(outcome) for outcome in outcomes], len(kit.requests)) == ([False, True, True], 1)
    live, again, other = (
        said(outcome.chunks[0] if outcome.row.doc["stream"] is False else assembled(outcome.chunks))
        for outcome in outcomes
    )
    assert live == again == other
    assert all(outcome.row.doc["finish_reason"] == outcomes[0].row.doc["finish_reason"] for outcome in outcomes)


async def test_a_stream_is_replayed_as_it_came_chunk_by_chunk(kit: Kit) -> None:
    kit.reply = lambda _: streamed(*(piece(content=letter) for letter in "pong" * 10), piece("stop"), USAGE, DONE)
    key = await key_of(kit)
    live, hit = [await kit.ask(key, ask(stream=True, stream_options={"include_usage": True})) for _ in range(2)]
    assert cached(hit)
    plain = [[chunk["choices"] for chunk in outcome.chunks] for outcome in (live, hit)]
    assert plain[0] == plain[1]
    assert len(plain[1]) == 42
    assert hit.chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in hit.chunks[:-1])


async def test_completions_and_embeddings_are_kept_too(kit: Kit) -> None:
    text = {"choices": [{"index": 0, "text": "pong", "finish_reason": "stop"}], "usage": answer()["usage"]}
    vector = {"data": [{"index": 0, "embedding": [0.5, 1.0]}], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    kit.reply = lambda request: whole(copy.deepcopy(vector if "embeddings" in request.url.path else text))
    key = await key_of(kit)
    legacy = {"model": "openai/gpt-3.5-turbo-instruct", "prompt": "ping", "cache": {}}
    for body in (legacy, {**legacy, "stream": True}):
        outcome = await kit.ask(key, body, "completions")
        assert outcome.text == "pong"
    assert cached(outcome)
    for form in ("float", "base64"):
        asked = {"model": "openai/text-embedding-3-small", "input": "x", "encoding_format": form, "cache": {}}
        one, other = [await kit.ask(key, asked, "embeddings") for _ in range(2)]
        assert (cached(one), cached(other)) == (False, True)
        assert one.chunks[0]["data"] == other.chunks[0]["data"]
    assert len(kit.requests) == 3


async def test_what_was_dropped_is_told_with_a_hit_too(kit: Kit) -> None:
    key = await key_of(kit)
    body = ask("groq/llama-3.3-70b-versatile", logit_bias={"1": 1})
    outcomes = [await kit.ask(key, body) for _ in range(2)]
    assert [outcome.row.doc["dropped"] for outcome in outcomes] == [["logit_bias"]] * 2


# Where it is kept --------------------------------------------------------------------------------------------------


async def test_another_process_finds_it_in_the_store(another: Callable[[], Kit]) -> None:
    here, there = another(), another()
    key = await key_of(here)
    await here.ask(key, ask())
    for stream in (False, True):
        hit = await there.ask(key, ask(stream=stream))
        assert cached(hit)
    assert (len(here.requests), len(there.requests)) == (1, 0)


class NoNotes(SQLiteStore):
    """A store that is well, but for its notes."""

    down = True
    reads = 0

    async def notes(self, names: Any) -> list[Note]:
        self.reads += 1
        if self.down:
            raise StoreUnavailable("no notes")
        return await super().notes(names)

    async def write_note(self, *args: Any, **more: Any) -> bool:
        if self.down:
            raise StoreUnavailable("no notes")
        return await super().write_note(*args, **more)


async def test_without_the_store_there_is_still_an_answer_and_memory(tmp_path: Path) -> None:
    store = NoNotes(str(tmp_path / "test.db"))
    kit = Kit(store, lambda _: whole(answer()), ENVIRON)
    key = await key_of(kit)
    assert [cached(await kit.ask(key, ask())) for _ in range(2)] == [False, True]
    assert store.reads
    other = Kit(store, lambda _: whole(answer()), ENVIRON)
    assert not cached(await other.ask(key, ask()))
    await store.close()


async def test_memory_spares_the_store(tmp_path: Path) -> None:
    store = NoNotes(str(tmp_path / "test.db"))
    store.down = False
    kit = Kit(store, lambda _: whole(answer()), ENVIRON)
    key = await key_of(kit)
    await kit.ask(key, ask())
    before = store.reads
    for _ in range(5):
        assert cached(await kit.ask(key, ask()))
    assert store.reads == before
    await store.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_too_long_to_keep_is_given_and_not_kept(kit: Kit, stream: bool) -> None:
    words = ["x" * 1000] * 400
    kit.reply = lambda _: (
        streamed(*(piece(content=word) for word in words), piece("stop"), USAGE, DONE)
        if stream
        else whole(answer("".join(words)))
    )
    key = await key_of(kit)
    outcomes = [await kit.ask(key, ask(stream=stream)) for _ in range(2)]
    assert [cached(outcome) for outcome in outcomes] == [False, False]
    assert all(outcome.error is None for outcome in outcomes)


@pytest.mark.parametrize("size", [10, 300_000])
def test_memory_is_bounded_and_what_was_used_last_stays(size: int) -> None:
    cache, data = Cache(cast("Store", None)), b"x" * size
    many = 2 * MEMORY // (size + 400)
    for number in range(many):
        cache.put(str(number), data, time.time() + 60)
        assert cache.get("0") is not None
    kept = sum(cache.get(str(number)) is not None for number in range(many))
    assert kept * size <= MEMORY
    assert kept < many * 0.6
    assert cache.get(str(many - 1)) is not None


# What is never kept ------------------------------------------------------------------------------------------------

BROKEN: dict[str, Callable[[], httpx.Response]] = {
    "an error": lambda: whole({"error": {"message": "no"}}, 400),
    "nothing": lambda: whole({"choices": []}),
    "no JSON": lambda: whole(b"<html>"),
    "a cut body": lambda: whole(b'{"choices": [{"index": 0, "mess'),
    "an error in 200": lambda: whole({"error": {"message": "no", "code": 400}}),
    "a stream without content": lambda: streamed(piece(role="assistant"), DONE),
    "a cut stream": lambda: streamed(piece(content="po")),
    "a broken stream": lambda: streamed(piece(content="po"), error=httpx.ReadError("reset")),
    "an error in the stream": lambda: streamed(piece(content="po"), event({"error": {"message": "no"}})),
    "one of two choices": lambda: streamed(piece(content="a"), piece(index=1, content="b"), piece("stop"), DONE),
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_what_is_no_whole_answer_is_not_kept(kit: Kit, kind: str) -> None:
    key, stream = await key_of(kit), "stream" in kind or "choices" in kind
    kit.reply = lambda _: BROKEN[kind]()
    failed = await kit.ask(key, ask(stream=stream))
    assert failed.row.doc["status"] == "failed"
    kit.reply = lambda _: streamed(piece(content="pong"), piece("stop"), DONE) if stream else whole(answer())
    after = await kit.ask(key, ask(stream=stream))
    assert (after.row.doc["status"], cached(after)) == ("ok", False)


async def test_what_the_keys_money_cut_short_is_not_kept(kit: Kit) -> None:
    """The second choice counts, too."""
    body = {**answer(), "choices": [{**answer()["choices"][0], "index": 0}, {**answer()["choices"][0], "index": 1}]}
    body["choices"][1]["finish_reason"] = "length"
    kit.reply = lambda _: whole(copy.deepcopy(body))
    poor = await key_of(kit, balance=10**9, credit=10**9)
    assert [cached(await kit.ask(poor, ask(n=2))) for _ in range(2)] == [False, False]
    assert [cached(await kit.ask(poor, ask(n=2, max_tokens=5))) for _ in range(2)] == [False, True]
    assert [cached(await kit.ask(await key_of(kit), ask(n=2))) for _ in range(2)] == [False, False]


async def test_what_was_said_until_the_caller_left_is_not_kept(kit: Kit) -> None:
    kit.reply = lambda _: streamed(*(piece(content=f"{n} ") for n in range(50)), piece("stop"), DONE)
    key = await key_of(kit)
    exchange = await kit.admit(key, ask(stream=True))
    chunks = kit.gateway.stream(exchange)
    await anext(chunks)
    await chunks.aclose()
    exchange.interrupt()
    await kit.gateway.close(exchange)
    assert not cached(await kit.ask(key, ask(stream=True)))


# Whose answer it may be --------------------------------------------------------------------------------------------


async def fast(kit: Kit) -> tuple[str, str]:
    """A key's id and itself, for which an answer of Groq's is kept."""
    made, key = await kit.keys.create(VirtualKey("", "", "test"))
    assert (await kit.ask(key, ask("fast"))).row.doc["provider"] == "groq"
    assert cached(await kit.ask(key, ask("fast")))
    return made.id, key


async def test_a_key_that_may_no_longer_use_who_answered_is_answered_by_another(kit: Kit) -> None:
    key_id, key = await fast(kit)
    await kit.keys.change(key_id, KeyChange(models=("openai/*",)))
    outcome = await kit.ask(key, ask("fast"))
    assert (cached(outcome), outcome.row.doc["provider"]) == (False, "openai")


async def test_who_was_switched_off_is_not_heard_from_the_cache_either(kit: Kit) -> None:
    _, key = await fast(kit)
    await kit.gateway.state.turn("groq", {"enabled": False}, wake=False)
    outcome = await kit.ask(key, ask("fast"))
    assert (cached(outcome), outcome.row.doc["provider"]) == (False, "openai")


async def test_who_only_rests_is(kit: Kit) -> None:
    """When a provider is down, its kept answers are worth most."""
    _, key = await fast(kit)
    kit.reply = lambda request: whole({}, 401) if "groq" in request.url.host else whole(answer())
    assert (await kit.ask(key, ask("fast", seed=1))).row.doc["provider"] == "openai"
    hit = await kit.ask(key, ask("fast"))
    assert (cached(hit), hit.row.doc["provider"]) == (True, "groq")


async def test_a_revoked_key_is_given_nothing(kit: Kit) -> None:
    key_id, key = await fast(kit)
    await kit.keys.delete(key_id)
    with pytest.raises(GatewayError) as refused:
        await kit.ask(key, ask("fast"))
    assert refused.value.status == 401


# Many at once ------------------------------------------------------------------------------------------------------


class Gate(httpx.AsyncByteStream):
    """A body that is held back until the gate is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.bodies: list[bytes] = []

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await self.opened.wait()
        for data in self.bodies:
            yield data


def gated(kit: Kit, *bodies: bytes, stream: bool = False) -> Gate:
    gate = Gate()
    gate.bodies = list(bodies) or [json.dumps(answer()).encode()]
    kind = "text/event-stream" if stream else "application/json"
    kit.reply = lambda _: httpx.Response(200, headers={"content-type": kind}, stream=gate)
    return gate


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 what is waited for happens elsewhere
            await asyncio.sleep(0.001)


async def started(kit: Kit, key: str, many: int, **more: Any) -> list[asyncio.Task[Outcome]]:
    """So many of the same request, all admitted, and one of them with the provider."""
    tasks = [asyncio.ensure_future(kit.ask(key, ask(**more))) for _ in range(many)]
    await until(lambda: len(kit.gateway.open) == many and bool(kit.requests))
    await asyncio.sleep(0.01)
    return tasks


@pytest.fixture
async def tidy(kit: Kit) -> AsyncIterator[None]:
    """Nothing is left behind: no task, no flight, no open request, no exception that nobody heard of."""
    before, unheard = asyncio.all_tasks(), list[JSON]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    yield
    await asyncio.sleep(0)
    assert kit.gateway.open == set()
    assert kit.gateway.cache.flights == {}
    left = [task.get_coro().__qualname__ for task in asyncio.all_tasks() - before]
    assert not [name for name in left if not name.startswith("TestRunner.")]
    assert not unheard
    loop.set_exception_handler(None)


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_hundred_of_the_same_are_one_call(kit: Kit, stream: bool) -> None:
    events = [piece(content="po"), piece(content="ng"), piece("stop"), USAGE, DONE]
    key = await key_of(kit)
    gate = gated(kit, *events, stream=True) if stream else gated(kit)
    tasks = await started(kit, key, 100, stream=stream)
    gate.opened.set()
    outcomes = await asyncio.gather(*tasks)
    assert len(kit.requests) == 1
    assert sum(cached(outcome) for outcome in outcomes) == 99
    assert len({outcome.row.id for outcome in outcomes}) == 100
    assert len({json.dumps([chunk["choices"] for chunk in outcome.chunks]) for outcome in outcomes}) == 1
    owner = await kit.services.store.key(outcomes[0].key.id)
    assert owner is not None
    assert (owner.requests, owner.spent) == (100, COST)


@pytest.mark.usefixtures("tidy")
async def test_a_hundred_that_come_while_the_answer_does_are_one_call(kit: Kit) -> None:
    """Those whose look into the cache came too early, and whose admission came too late, are not forgotten."""
    key = await key_of(kit)
    outcomes = await asyncio.gather(*(kit.ask(key, ask()) for _ in range(100)))
    assert len(kit.requests) == 1
    assert sum(cached(outcome) for outcome in outcomes) == 99


@pytest.mark.usefixtures("tidy")
async def test_a_mix_of_whole_and_streamed_is_one_call(kit: Kit) -> None:
    key, gate = await key_of(kit), gated(kit)
    tasks = await started(kit, key, 1)
    tasks += [asyncio.ensure_future(kit.ask(key, ask(stream=bool(n % 2)))) for n in range(10)]
    await until(lambda: len(kit.gateway.open) == 11)
    gate.opened.set()
    assert all(outcome.error is None for outcome in await asyncio.gather(*tasks))
    assert len(kit.requests) == 1


@pytest.mark.usefixtures("tidy")
async def test_without_the_cache_everyone_asks(kit: Kit) -> None:
    key = await key_of(kit)
    for cache in (None, {"mode": "refresh"}):
        kit.requests.clear()
        await asyncio.gather(*(kit.ask(key, ask(cache=cache)) for _ in range(5)))
        assert len(kit.requests) == 5


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("stream", [False, True])
async def test_when_the_first_fails_the_next_one_asks(kit: Kit, stream: bool) -> None:
    key, first = await key_of(kit), asyncio.Event()
    good = [piece(content="pong"), piece("stop"), DONE] if stream else [json.dumps(answer()).encode()]

    class FirstFails(httpx.AsyncByteStream):
        def __init__(self, number: int) -> None:
            self.number = number

        async def __aiter__(self) -> AsyncIterator[bytes]:
            if self.number > 1:
                for data in good:
                    yield data
            else:
                await first.wait()
                yield b'data: {"error": {"message": "no", "code": 400}}\n\n' if stream else b"{}"

    kind = "text/event-stream" if stream else "application/json"
    kit.reply = lambda _: httpx.Response(200, headers={"content-type": kind}, stream=FirstFails(len(kit.requests)))
    tasks = await started(kit, key, 5, stream=stream)
    first.set()
    outcomes = await asyncio.gather(*tasks)
    assert [outcome.error is None for outcome in outcomes].count(False) == 1
    assert len(kit.requests) == 2
    assert sum(cached(outcome) for outcome in outcomes) == 3


@pytest.mark.usefixtures("tidy")
async def test_where_all_fail_nobody_waits_for_one_after_the_other(kit: Kit) -> None:
    """Each waits for two others at most: ten requests to a provider that is down take three times as long as one."""
    slow = 0.1
    key = await key_of(kit)

    class SlowFailure(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            await asyncio.sleep(slow)
            yield b"{}"

    kind = {"content-type": "application/json"}
    kit.reply = lambda _: httpx.Response(200, headers=kind, stream=SlowFailure())
    began = asyncio.get_running_loop().time()
    outcomes = await asyncio.gather(*(kit.ask(key, ask()) for _ in range(10)))
    assert all(outcome.error for outcome in outcomes)
    assert asyncio.get_running_loop().time() - began < 6 * slow
    assert len(kit.requests) == 10


async def leave(kit: Kit, exchange: Exchange, task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    exchange.interrupt()
    await kit.gateway.close(exchange)


@pytest.mark.usefixtures("tidy")
async def test_when_the_first_hangs_up_the_next_one_asks(kit: Kit) -> None:
    key, gate = await key_of(kit), gated(kit)
    leader = await kit.admit(key, ask())
    leading = asyncio.ensure_future(kit.gateway.complete(leader))
    await until(lambda: len(kit.requests) == 1)
    followers = await started(kit, key, 1)
    followers += [asyncio.ensure_future(kit.ask(key, ask())) for _ in range(3)]
    await until(lambda: len(kit.gateway.open) == 5)
    await leave(kit, leader, leading)
    await until(lambda: len(kit.requests) == 2)
    gate.opened.set()
    outcomes = await asyncio.gather(*followers)
    assert (len(kit.requests), sum(cached(outcome) for outcome in outcomes)) == (2, 3)


@pytest.mark.usefixtures("tidy")
async def test_a_follower_who_hangs_up_disturbs_nobody(kit: Kit) -> None:
    key, gate = await key_of(kit), gated(kit)
    tasks = await started(kit, key, 3)
    follower = await kit.admit(key, ask())
    following = asyncio.ensure_future(kit.gateway.complete(follower))
    await asyncio.sleep(0.01)
    await leave(kit, follower, following)
    gate.opened.set()
    assert sum(cached(outcome) for outcome in await asyncio.gather(*tasks)) == 2
    row = await kit.services.store.generation(follower.id)
    assert row is not None
    assert (row.doc["status"], row.cost, len(kit.requests)) == ("cancelled", 0, 1)


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_follower_waits_no_longer_than_it_may(kit: Kit, stream: bool) -> None:
    key, gate = await key_of(kit), gated(kit)
    tasks = await started(kit, key, 1)
    follower = await kit.admit(key, ask(stream=stream))
    follower.deadline = asyncio.get_running_loop().time() + 0.05
    with pytest.raises(UpstreamTimeout):
        await (anext(kit.gateway.stream(follower)) if stream else kit.gateway.complete(follower))
    await kit.gateway.close(follower)
    gate.opened.set()
    await asyncio.gather(*tasks)
    assert len(kit.requests) == 1


@pytest.mark.usefixtures("tidy")
async def test_what_was_too_long_to_keep_still_serves_those_who_wait(kit: Kit) -> None:
    key, gate = await key_of(kit), gated(kit, json.dumps(answer("x" * 400_000)).encode())
    tasks = await started(kit, key, 5)
    gate.opened.set()
    assert sum(cached(outcome) for outcome in await asyncio.gather(*tasks)) == 4
    assert len(kit.requests) == 1


async def test_an_endless_answer_does_not_fill_the_memory(kit: Kit) -> None:
    """What is remembered for the cache has an end, and what is not remembered whole is not kept."""
    word = piece(content="x" * 10_000)
    kit.reply = lambda _: streamed(*[word] * 600, piece("stop"), DONE)
    exchange = await kit.admit(await key_of(kit), ask(stream=True))
    async for _ in kit.gateway.stream(exchange):
        pass
    assert exchange.answer is not None
    assert exchange.answer.kept() is None
    assert sum(len(message["content"]) for message in exchange.answer.messages) <= 4 * 2**20
    await kit.gateway.close(exchange)
