"""How a stream leaves: what keeps it alive while nothing comes, and that it ends once, whoever ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from functions.responses import Events, EventStream, never
from functions.typed import TypedEvents
from shared.schema import JSON
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.functions.doors import until
from tests.kit import Kit

CHUNK = {"choices": [{"index": 0, "delta": {"content": "pong"}, "finish_reason": None}]}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
BODY: JSON = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def event(body: JSON) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class Paced(httpx.AsyncByteStream):
    """A provider's stream in steps: bytes, or an event to wait for."""

    def __init__(self, *steps: bytes | asyncio.Event) -> None:
        self.steps = steps

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for step in self.steps:
            if isinstance(step, bytes):
                yield step
            else:
                await step.wait()


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield Kit(store, lambda _: httpx.Response(500), {"OPENAI_API_KEY": "sk-test-openai-key"})
    await store.close()


@pytest.fixture
async def key(kit: Kit) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test")))[1]


def speaks(kit: Kit, *steps: bytes | asyncio.Event) -> None:
    kit.reply = lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Paced(*steps))


class Caller:
    """Who asked, and what has reached him."""

    def __init__(self) -> None:
        self.start: dict[bytes, bytes] | None = None
        self.data = b""
        self.ended = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert self.start is None
            self.start = dict(message["headers"])
        else:
            self.data += message["body"]
            self.ended += not message["more_body"]


async def asked(
    kit: Kit, key: str, events: Callable[[], Events] | None = None, **more: Any
) -> tuple[Caller, asyncio.Task[None]]:
    """An answer on its way, as its route sends it, settled in the end."""
    exchange, caller = await kit.admit(key, {**BODY, **more}), Caller()
    response = EventStream(kit.gateway, exchange, events() if events else None, hold=0.05)

    async def answered() -> None:
        try:
            await response({"type": "http"}, never, caller.send)
        finally:
            await kit.gateway.close(exchange)

    return caller, asyncio.ensure_future(answered())


async def test_who_waits_for_anothers_answer_is_kept_alive_meanwhile(kit: Kit, key: str) -> None:
    gate = asyncio.Event()
    speaks(kit, gate, event(CHUNK), event(LAST), b"data: [DONE]\n\n")
    _, leading = await asked(kit, key, cache={})
    await until(lambda: len(kit.requests) == 1)
    follower, following = await asked(kit, key, cache={})
    await until(lambda: follower.data.count(b": keep-alive\n\n") >= 3)
    assert follower.start is not None
    assert b"x-lightrail-provider" not in follower.start
    gate.set()
    await asyncio.gather(leading, following)
    *_, last, done = [part for part in follower.data.split(b"\n\n") if part and not part.startswith(b":")]
    assert done == b"data: [DONE]"
    told = json.loads(last[6:])["lightrail"]
    assert (told["provider"], told["cache"], len(kit.requests)) == ("openai", "hit", 1)


@pytest.mark.parametrize("events", [None, TypedEvents], ids=["OpenAI's", "typed"])
async def test_a_server_that_stops_after_the_end_adds_nothing_to_it(kit: Kit, key: str, events: Any) -> None:
    """The provider's connection may still be read to its end, so that it can be used again."""
    speaks(kit, event(CHUNK), event(LAST), b"data: [DONE]\n\n", asyncio.Event())
    caller, answering = await asked(kit, key, events)
    end = b'"type":"done"' if events else b"[DONE]"
    await until(lambda: end in caller.data)
    before = caller.data
    answering.cancel()
    await asyncio.gather(answering, return_exceptions=True)
    assert (caller.data, caller.ended) == (before, 1)
    assert before.count(end) == 1


@pytest.mark.parametrize("events", [None, TypedEvents], ids=["OpenAI's", "typed"])
@pytest.mark.parametrize("said", [True, False])
async def test_a_server_that_stops_ends_each_stream_with_one_error(kit: Kit, key: str, events: Any, said: bool) -> None:
    speaks(kit, *([event(CHUNK)] if said else []), asyncio.Event())
    caller, answering = await asked(kit, key, events)
    await until(lambda: (b"pong" if said else b": keep-alive") in caller.data)
    answering.cancel()
    await asyncio.gather(answering, return_exceptions=True)
    assert (caller.data.count(b"shutting down"), caller.ended, b"[DONE]" in caller.data) == (1, 1, False)
    assert caller.data.count(b'"type":"done"') == bool(events)


async def test_a_failure_after_a_comment_is_an_event_in_its_dialect(kit: Kit, key: str) -> None:
    for events, expected in ((None, [b'{"error":']), (TypedEvents, [b'"type":"error"', b'"type":"done"'])):
        gate = asyncio.Event()
        speaks(kit, gate, event({"error": {"message": "no", "code": 400}}))
        caller, answering = await asked(kit, key, events)
        await until(lambda caller=caller: b": keep-alive" in caller.data)
        gate.set()
        await answering
        told = [part for part in caller.data.split(b"\n\n") if part and not part.startswith(b":")]
        assert len(told) == len(expected)
        assert all(word in part for word, part in zip(expected, told, strict=True))
