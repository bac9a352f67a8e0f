"""Every row of the table of upstream faults, on real sockets: what the caller sees, what is recorded, what is left.

Ids are the table's: C connecting, H heads, S statuses, J JSON, Z encodings, B bodies, E events, K callers, X several
faults in a row. Rows that concern a whole server (C9, K1, K2, X2) are in tests/functions/test_faults.py.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from email.utils import formatdate
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest

from shared.errors import GatewayError
from shared.schema import parse
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from shared.upstream import Notes
from shared.upstream import Upstream as OurSide
from tests import upstream as fake
from tests.faults import Authority, black_hole
from tests.kit import Kit, Outcome, whole
from tests.server import free_port
from tests.upstream import (
    DONE,
    END,
    Step,
    Upstream,
    answer,
    apart,
    chunk,
    close,
    drip,
    echo,
    endless,
    event,
    framed,
    head,
    rst,
    send,
    sleep,
    stream,
)

SECRET = "sk-test-Zx81kQvT55mNwe02"
BUDGETS = {"CONNECT_TIMEOUT": "5", "FIRST_CONTENT_TIMEOUT": "1", "GAP_TIMEOUT": "1", "TOTAL_TIMEOUT": "30"}
"""Seconds; `SHORT` is for faults that only the total time ends."""
PATIENT = {**BUDGETS, "FIRST_CONTENT_TIMEOUT": "10", "GAP_TIMEOUT": "10"}
SHORT = {**PATIENT, "TOTAL_TIMEOUT": "1"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
COST = 5 * 1000 + 3 * 2000
"""Of that in nano-dollars, at $1 and $2 per million tokens."""


# The world --------------------------------------------------------------------------------------------------------


class World:
    """A gateway before two fakes and whatever other places a test names.

    The first fake is the providers `first` and `again`, the second one `second` and `spare`: what one provider does
    to its rest does not touch the other."""

    def __init__(self, kit: Kit, ours: OurSide, key: str, first: Upstream, second: Upstream) -> None:
        self.kit = kit
        self.ours = ours
        self.key = key
        self.first = first
        self.second = second
        self.settled = 0

    async def ask(self, model: str = "first/m", *others: str, text: str = "hi", **more: Any) -> Outcome:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        async with asyncio.timeout(30):
            outcome = await self.kit.ask(self.key, {**body, "models": list(others)} if others else body)
        self.settled += outcome.row.cost
        return outcome

    async def works(self) -> None:
        """A plain request is answered 200, and nothing is left of those before."""
        plain = await self.ask("first/plain", "second/plain")
        assert (plain.error, said(plain)) == (None, "hi")
        assert plain.key.open == {}
        assert plain.key.spent == self.settled
        assert not self.kit.gateway.open
        for pool in self.ours._pools.values():
            assert all(connection.is_idle() for connection in pool._pool.connections)
            assert not pool._pool._requests
        assert self.first.malformed + self.second.malformed == []


Open: TypeAlias = Callable[..., Awaitable[World]]


def tasks() -> set[asyncio.Task[Any]]:
    """All but the tests' own."""
    return {task for task in asyncio.all_tasks() if "TestRunner" not in repr(task.get_coro())}


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """No task and no file outlives a test."""
    process, running = psutil.Process(), tasks()
    files = process.num_fds()
    yield
    await until(lambda: process.num_fds() <= files and tasks() <= running)


@pytest.fixture
async def open_world(tmp_path: Path, nothing_left: None) -> AsyncIterator[Open]:
    """`open_world(BUDGETS, hole="http://…")`: more providers, as URL or row; checked and closed after the test."""
    worlds: list[World] = []
    async with AsyncExitStack() as stack:

        async def make(budgets: dict[str, str] = BUDGETS, max_connections: int = 100, **places: Any) -> World:
            first = await stack.enter_async_context(Upstream(SECRET))
            second = await stack.enter_async_context(Upstream(SECRET))
            rows = {"first": first.url, "again": first.url, "second": second.url, "spare": second.url, **places}
            config = "".join(f"[providers.{name}]\n{lines(row)}" for name, row in rows.items())
            (tmp_path / "gateway.toml").write_text(f"{config}[prices]\ndefault = {{ input = 1, output = 2 }}\n")
            keys = {f"{name.upper()}_API_KEY": SECRET for name in rows}
            store = SQLiteStore(str(tmp_path / "test.db"))
            stack.push_async_callback(store.close)
            kit = Kit(store, lambda _: whole({}), {**budgets, **keys}, str(tmp_path / "gateway.toml"))
            ours = kit.gateway._upstream = OurSide(kit.services.settings, max_connections=max_connections)
            stack.push_async_callback(ours.close)
            key = (await kit.keys.create(VirtualKey("", "", "test")))[1]
            worlds.append(World(kit, ours, key, first, second))
            return worlds[-1]

        yield make
        for world in worlds:
            await world.works()


def lines(row: str | dict[str, Any]) -> str:
    """A provider's row in TOML."""
    given = row if isinstance(row, dict) else {"base_url": row}
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items())


@pytest.fixture
async def world(open_world: Open) -> World:
    return await open_world()


def said(outcome: Outcome) -> str:
    """The text, however it came."""
    message = (outcome.chunks[0].get("choices") or [{}])[0].get("message") if outcome.chunks else None
    return message["content"] if message else outcome.text


def attempts(outcome: Outcome) -> list[tuple[str, str | None]]:
    return [(each["provider"], each["error"]) for each in outcome.row.doc["attempts"]]


# What the fakes say -----------------------------------------------------------------------------------------------


def body(text: str = "hello", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": USAGE, **more}


def delta(text: str | None = None, finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    said = {**({} if text is None else {"content": text}), **more}
    return {"choices": [{"index": index, "delta": said, "finish_reason": finish}]}


USED = {"choices": [], "usage": USAGE}
EVENTS = (delta("", role="assistant"), delta("hel"), delta("lo"), delta(finish="stop"), USED)
"""A stream that says hello, without its `[DONE]`."""
HELLO = b"".join(map(event, EVENTS)) + DONE
STREAM = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
CHUNKED = {"content-type": "application/json", "transfer-encoding": "chunked"}
CLOSING = {"content-type": "text/event-stream", "connection": "close"}


def raw(data: bytes, status: int = 200, **headers: Any) -> Step:
    """These bytes as a whole body; `content_type="text/plain"` and the like are its headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return send(head(status, {"content-length": len(data), **named}) + data)


def sse(data: bytes) -> Step:
    return send(head(200, STREAM) + framed(data) + END)


def either(for_whole: Step, for_stream: Step) -> Step:
    """One or the other, as it was asked for."""

    async def step(exchange: fake.Exchange) -> None:
        assert exchange.seen
        await (for_stream if exchange.seen.json.get("stream") else for_whole)(exchange)

    return step


# Faults before the first content ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What `first` does with every request, and what comes of it where nobody else may answer.

    `tries`: how often it is asked; `modes`: whether to ask for a stream; `short`: in the short budgets."""

    id: str
    script: Sequence[Step]
    answer: tuple[int, str | None]
    fault: str
    tries: int = 1
    falls_back: bool = True
    ambiguous: bool = False
    modes: tuple[bool, ...] = (False, True)
    short: bool = False


UNAVAILABLE, PROTOCOL = (502, "upstream_unavailable"), (502, "upstream_protocol_error")
FAILED, BUSY, TIMEOUT = (502, "upstream_error"), (503, "overloaded"), (504, "upstream_timeout")
LIMITED, REFUSED, AUTH = (429, "rate_limit_exceeded"), (400, None), (502, "upstream_auth_error")
HTML = b"<html><body><h1>Log in</h1></body></html>"
QUOTA = fake.error("You exceeded your current quota", "insufficient_quota", code="insufficient_quota")
LEAKY = fake.error(f"Bad key {SECRET} of org-Abc123456789 at https://api.internal.example/v1?key=1")
LONG = fake.error("This model's maximum context length is 10 tokens.", code="context_length_exceeded")
FASTAPI = {"detail": [{"loc": ["body", "messages"], "msg": "Field required", "type": "missing"}]}
NESTED = b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
ERROR = {"error": {"message": "The engine broke", "type": "server_error"}}
LIMIT = {"error": {"message": "Slow down", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
ROLE = event(delta("", role="assistant"))


@cache
def bomb() -> bytes:
    """200 MB of nothing."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(200)), packer.flush()])


def refused(status: int, data: Any = None, **headers: Any) -> list[Step]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return [answer(status, data or fake.error("No.", "x"), named)]


def limited(**headers: Any) -> list[Step]:
    return refused(429, fake.error("Slow down", "rate_limit_error"), **headers)


def web_page(status: int) -> list[Step]:
    return [raw(HTML, status, content_type="text/html")]


def late(step: Callable[[], Step]) -> Step:
    """Made when it is needed."""

    async def steps(exchange: fake.Exchange) -> None:
        await step()(exchange)

    return steps


def in_an_hour(seconds: float = 3600) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


WHOLE, STREAMED = (False,), (True,)
ROWS = [
    Row("C5", [close()], UNAVAILABLE, "closed_before_headers", ambiguous=True),
    Row("C6", [rst()], UNAVAILABLE, "closed_before_headers", ambiguous=True),
    Row("H1", [send(b"HTTP/1.1 200 O"), close()], PROTOCOL, "protocol", ambiguous=True),
    Row("H1 headers", [send(b"HTTP/1.1 200 OK\r\nx: y\r\n"), close()], PROTOCOL, "protocol", ambiguous=True),
    Row("H2", [sleep(30)], TIMEOUT, "first_content_timeout", ambiguous=True, modes=STREAMED),
    Row("H2 whole", [sleep(30)], TIMEOUT, "total_timeout", 1, False, True, WHOLE, short=True),
    Row("H3 line", [send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), close()], PROTOCOL, "protocol", ambiguous=True),
    Row("H3 NUL", [send(head(200, {"x": "a\0b"}) + b"{}"), close()], PROTOCOL, "protocol", ambiguous=True),
    Row("H3 200 kB", [send(head(200, {"x": "a" * 200_000}) + b"{}"), close()], PROTOCOL, "protocol", ambiguous=True),
    *(Row(f"H5 {status}", [raw(b"", status, location="/v1/x")], PROTOCOL, "redirect") for status in (301, 302, 303)),
    Row("H5 other host", [raw(b"", 307, location=f"http://u:p@elsewhere.test/?{SECRET}")], PROTOCOL, "redirect"),
    Row("H5 metadata", [raw(b"", 308, location="http://169.254.169.254/latest")], PROTOCOL, "redirect"),
    Row("H5 nowhere", [raw(b"", 302)], PROTOCOL, "redirect"),
    Row("H5 101", [raw(b"", 101, upgrade="x"), close()], PROTOCOL, "protocol", ambiguous=True),
    Row("S1", refused(400, fake.error("Bad temperature")), REFUSED, "bad_request", falls_back=False),
    Row("S1 foreign", refused(400, {"message": "nope"}), REFUSED, "bad_request", falls_back=False),
    Row("S1 HTML", web_page(400), REFUSED, "bad_request", falls_back=False),
    Row("S1 secrets", refused(400, LEAKY), REFUSED, "bad_request", falls_back=False),
    Row("S1 context", refused(400, LONG), (400, "context_length_exceeded"), "context"),
    Row("S2 401", refused(401), AUTH, "auth"),
    Row("S2 403", refused(403), AUTH, "auth"),
    Row("S3 402", refused(402), AUTH, "money"),
    Row("S3 429", refused(429, QUOTA), AUTH, "money"),
    Row("S4", refused(404), (404, "model_not_found"), "model_gone"),
    *(Row(f"S5 {status}", refused(status), BUSY, "not_now", tries=2) for status in (408, 409, 425)),
    Row("S6", refused(413), (413, "body_too_large"), "body_too_large", falls_back=False),
    Row("S7", refused(422, FASTAPI), REFUSED, "bad_request", falls_back=False),
    Row("S8 2", limited(retry_after="2"), LIMITED, "rate_limit", tries=2, modes=WHOLE),
    Row("S8 350 ms", limited(retry_after_ms="350"), LIMITED, "rate_limit", tries=2),
    Row("S8 reset", limited(x_ratelimit_reset_requests="1s"), LIMITED, "rate_limit", tries=2, modes=WHOLE),
    Row("S8 30", limited(retry_after="30"), LIMITED, "rate_limit"),
    Row("S8 date", limited(retry_after=in_an_hour()), LIMITED, "rate_limit", tries=2),
    Row("S8 past", limited(retry_after=in_an_hour(-99)), LIMITED, "rate_limit", tries=2),
    *(Row(f"S8 {told}", limited(retry_after=told), LIMITED, "rate_limit", 2) for told in ("-5", "abc", "99999999")),
    Row("S8 absent", limited(), LIMITED, "rate_limit", tries=2),
    Row("S9", refused(500), FAILED, "server", tries=2, ambiguous=True),
    *(Row(f"S10 {n}", web_page(n), FAILED, "server", 2, ambiguous=True) for n in (502, 504, 520, 522, 524)),
    *(Row(f"S10 {n}", web_page(n), FAILED, "server", 2) for n in (521, 523)),
    Row("S10 503", refused(503), BUSY, "overloaded", tries=2),
    Row("S10 503 long", refused(503, retry_after="20"), BUSY, "overloaded"),
    Row("S10 529", refused(529, retry_after_ms="60"), BUSY, "overloaded", tries=2),
    Row("S11", [answer(200, ERROR)], FAILED, "error_in_200", tries=2),
    Row("S11 limit", [answer(200, LIMIT)], LIMITED, "rate_limit", tries=2),
    Row("S12", web_page(200), PROTOCOL, "content_type"),
    Row("S12 as JSON", [raw(HTML)], PROTOCOL, "content_type"),
    Row("S12 captive", [raw(b"Please pay for this network.", content_type="text/plain")], PROTOCOL, "content_type"),
    Row("S16 204", [send(b"HTTP/1.1 204 No Content\r\n\r\n")], PROTOCOL, "empty", ambiguous=True),
    Row("S16 nothing", [raw(b"")], PROTOCOL, "empty", ambiguous=True),
    Row("S16 a line", [raw(b"\r\n")], PROTOCOL, "empty", ambiguous=True),
    Row("S16 null", [raw(b"null")], PROTOCOL, "empty", ambiguous=True),
    Row("S16 object", [raw(b"{}")], PROTOCOL, "empty", ambiguous=True),
    Row("S16 choices", [raw(b'{"choices": []}')], PROTOCOL, "empty", ambiguous=True),
    Row("S16 stream", [stream()], PROTOCOL, "empty", ambiguous=True),
    Row("S16 done", [stream(DONE)], PROTOCOL, "empty", ambiguous=True),
    Row(
        "J1", [send(head(200, {"content-length": 9}) + b'{"cho'), close()], UNAVAILABLE, "disconnected", ambiguous=True
    ),
    Row("J1 chunk", [send(head(200, CHUNKED) + b'ff\r\n{"cho'), close()], UNAVAILABLE, "disconnected", ambiguous=True),
    Row("J1 prefix", [raw(fake.dumped(body())[:90])], PROTOCOL, "protocol", ambiguous=True),
    Row("J2 NaN", [raw(b'{"choices": [NaN]}')], PROTOCOL, "protocol", ambiguous=True),
    Row("J2 nested", [raw(NESTED)], PROTOCOL, "protocol", ambiguous=True),
    Row("J2 array", [raw(b'[{"choices": []}]')], PROTOCOL, "protocol", ambiguous=True),
    Row("J4 choices", [answer(200, body(choices="none"))], PROTOCOL, "protocol", ambiguous=True),
    Row("J4 message", [answer(200, body(choices=[{"message": "hi"}]))], PROTOCOL, "protocol", ambiguous=True),
    Row("J4 content", [answer(200, body(choices=[{"message": {"content": 5}}]))], PROTOCOL, "protocol", ambiguous=True),
    Row("J4 delta", [stream({"choices": [{"delta": {"content": 5}}]})], PROTOCOL, "protocol", ambiguous=True),
    Row("J4 index", [stream({"choices": [{"index": [], "delta": {}}]})], PROTOCOL, "protocol", ambiguous=True),
    Row("Z2", [raw(fake.dumped(body()), content_encoding="gzip")], PROTOCOL, "decode"),
    Row("Z2 br", [raw(b"\x8b\x02\x80hi\x03", content_encoding="br")], PROTOCOL, "decode"),
    Row("Z2 unknown", [raw(b"hi", content_encoding="martian")], PROTOCOL, "decode"),
    Row("Z2 many", [raw(b"hi", content_encoding="gzip, " * 5000 + "gzip")], PROTOCOL, "decode"),
    Row("Z3", [late(lambda: raw(bomb(), content_encoding="gzip"))], PROTOCOL, "too_large", 1, False, True),
    Row(
        "Z3 twice",
        [late(lambda: raw(gzip.compress(bomb()), content_encoding="gzip, gzip"))],
        PROTOCOL,
        "too_large",
        falls_back=False,
        ambiguous=True,
    ),
    Row(
        "Z3 stream",
        [late(lambda: raw(bomb(), content_encoding="gzip", content_type="text/event-stream"))],
        PROTOCOL,
        "too_large",
        falls_back=False,
        ambiguous=True,
    ),
    Row("B1", [send(head() + b'{"a": "'), endless(bytes(65536))], PROTOCOL, "too_large", 1, False, True),
    Row("B1 stream", [send(head(200, CLOSING)), endless(b"data: 1" * 9999)], PROTOCOL, "too_large", 1, False, True),
    Row("E6", [stream(b"event: error\n" + event(ERROR["error"]))], FAILED, "error_in_200", 2),
    Row("E6 data", [stream(ROLE, ERROR)], FAILED, "error_in_200", 2),
    Row("E6 limit", [stream(LIMIT)], LIMITED, "rate_limit", 2),
    Row("E6 then more", [stream(ERROR, *EVENTS, DONE)], FAILED, "error_in_200", 2),
    Row("E8", [stream(ROLE, end=False), sleep(30)], TIMEOUT, "first_content_timeout", ambiguous=True, modes=STREAMED),
    Row(
        "E9",
        [send(head(200, STREAM)), endless(framed(b": wait\n\n"), 0.02)],
        TIMEOUT,
        "first_content_timeout",
        ambiguous=True,
        modes=STREAMED,
    ),
    Row("E10", [stream(ROLE, end=False), sleep(0.02), rst()], UNAVAILABLE, "disconnected", ambiguous=True),
    Row("E10 FIN", [stream(ROLE, end=False), close()], UNAVAILABLE, "disconnected", ambiguous=True),
    Row("E11", [send(head(200, CLOSING) + HELLO[:30]), close()], UNAVAILABLE, "disconnected", ambiguous=True),
    Row("E14", [stream(b"data: {\n\n" * 4)], PROTOCOL, "protocol", ambiguous=True),
    Row("E14 last", [stream(ROLE, b"data: {\n\n")], PROTOCOL, "protocol", ambiguous=True),
]


def each(rows: Sequence[Any]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=[row.id for row in rows])


PLACES = (("first", "second"), ("again", "spare"))
"""For the modes, of which the first must not disturb the second."""


@each(ROWS)
async def test_before_content_with_nobody_else(open_world: Open, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    world = await open_world(SHORT if row.short else BUDGETS)
    world.first.always("m", *row.script)
    for mode, (place, _) in zip(row.modes, PLACES, strict=False):
        outcome, asked = await world.ask(f"{place}/m", stream=mode), len(world.first.seen)
        assert isinstance(outcome.error, GatewayError)
        assert (outcome.error.status, outcome.error.code) == row.answer
        assert attempts(outcome) == [(place, row.fault)] * row.tries
        assert {each["ambiguous"] for each in outcome.row.doc["attempts"]} == {row.ambiguous}
        assert outcome.chunks == []
        assert (outcome.row.doc["status"], outcome.row.cost, outcome.spent) == ("failed", 0, 0)
        assert outcome.row.doc["error"]["code"] == row.answer[1]
        assert asked == row.tries * (2 if place == "again" else 1)
        told = json.dumps([outcome.error.body(), outcome.row.doc])
        assert not any(word in told for word in (SECRET, "internal.example", "Abc123", "<h1>", "elsewhere", "169.254"))
        if row.answer[0] in (429, 503):
            assert 1 <= int(outcome.error.headers["retry-after"]) <= 60
    alarms = [record for record in caplog.records if record.levelname == "ERROR"]
    assert bool(alarms) == (row.fault in ("redirect", "auth", "money", "model_gone"))
    assert SECRET not in caplog.text
    if row.id == "H5 other host":
        assert {vars(record)["host"] for record in alarms} == {"elsewhere.test"}


@each(ROWS)
async def test_before_content_with_somebody_else(open_world: Open, row: Row) -> None:
    world = await open_world(SHORT if row.short else BUDGETS)
    world.first.always("m", *row.script)
    for mode, (place, other) in zip(row.modes, PLACES, strict=False):
        outcome = await world.ask(f"{place}/m", f"{other}/m", stream=mode)
        if row.falls_back:
            assert (outcome.error, said(outcome)) == (None, "hi")
            assert attempts(outcome)[-1] == (other, None)
            assert {fault for _, fault in attempts(outcome)[:-1]} == {row.fault}
            assert outcome.row.doc["provider"] == other
            assert outcome.row.cost == outcome.spent > 0
        else:
            assert isinstance(outcome.error, GatewayError)
            assert (outcome.error.status, outcome.error.code) == row.answer
            assert (world.second.seen, outcome.spent) == ([], 0)
    if "timeout" in row.fault:
        await until(lambda: all(seen.closed_after is not None for seen in world.first.seen))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 nobody tells
            await asyncio.sleep(0.01)


# What is no fault in the end --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """What `first` answers, in a way that nobody should, and what the caller gets of it all the same."""

    id: str
    script: Sequence[Step]
    text: str = "hello"
    modes: tuple[bool, ...] = (False, True)
    source: str = "provider"
    finish: str = "stop"


def interim(status: int) -> Step:
    return send(b"HTTP/1.1 %d Wait\r\nlink: </style.css>\r\n\r\n" % status)


def deflated(data: bytes) -> bytes:
    """Without zlib's header, which many servers leave out."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def used(usage: Any) -> list[Step]:
    """Usage as a provider should not tell it, whole and streamed."""
    chunks = [*EVENTS[:-1], {"choices": [], "usage": usage}]
    return [either(answer(200, {**body(), "usage": usage}), stream(*chunks, DONE))]


def ending(*events: Any) -> list[Step]:
    """A stream that says hello and then ends so."""
    return [stream(ROLE, delta("hello"), *events)]


DATA, FINISH = fake.dumped(body()), delta(finish="stop")
LONG_TEXT = "word " * 2_000_000
TEXTS = {"content_type": "text/plain"}
WIDE = {
    "E5 separators": "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei",
    "E20 events": '\n\ndata: [DONE]\n\n{"error":1}',
}
ODD = [
    *(Odd(f"H4 {status}", [interim(status), either(answer(200, body()), sse(HELLO))]) for status in (100, 102, 103)),
    Odd("S13", [either(raw(DATA, **TEXTS), raw(HELLO, **TEXTS))]),
    Odd("S13 nothing told", [either(raw(DATA, content_type=""), raw(HELLO, content_type=""))]),
    Odd("S13 crossed", [either(raw(DATA, content_type="text/event-stream"), raw(HELLO))]),
    Odd("S14", [answer(200, body())], modes=STREAMED),
    Odd("S15", [sse(HELLO)], modes=WHOLE),
    Odd("S15 not ended", [stream(*EVENTS), close()], modes=WHOLE),
    Odd("J2 BOM", [raw(b"\xef\xbb\xbf" + DATA)]),
    Odd("J2 surrogate", [raw(DATA.replace(b"hello", b"h\\ud83d\\\\u"))], "h\ufffd\\u"),
    Odd("J2 UTF-8", [raw(DATA.replace(b"hello", b"h\xff\xc3("))], "h\ufffd\ufffd("),
    Odd("J2 twice", [raw(DATA.replace(b'"content":', b'"content":"no","content":'))]),
    Odd("J2 surrogate event", [sse(HELLO.replace(b"hel", b"h\\ud83d"))], "h\ufffdlo"),
    *(
        Odd(f"J3 {usage}", used(usage), source="estimated")
        for usage in (None, {}, {"prompt_tokens": "5", "completion_tokens": "3"}, {"prompt_tokens": -5}, "many")
    ),
    Odd("J3 float", used({"prompt_tokens": 5.5, "completion_tokens": 3.0}), source="estimated"),
    Odd("J3 huge", used({"prompt_tokens": 5, "completion_tokens": 10**15}), source="estimated"),
    Odd("J3 negative", used({"prompt_tokens": 5, "completion_tokens": -(10**9)}), source="estimated"),
    Odd("J4", [either(answer(200, body(id=7, created="now", model=None, object=[], x=1)), sse(HELLO))]),
    Odd(
        "Z1 gzip",
        [
            either(
                raw(gzip.compress(DATA), content_encoding="gzip"),
                raw(gzip.compress(HELLO), content_encoding="gzip", content_type="text/event-stream"),
            )
        ],
    ),
    Odd("Z1 members", [raw(gzip.compress(DATA[:50]) + gzip.compress(DATA[50:]), content_encoding="x-gzip")]),
    Odd("Z1 deflate", [raw(zlib.compress(DATA), content_encoding="deflate")]),
    Odd("Z1 bare deflate", [raw(deflated(DATA), content_encoding="deflate")]),
    Odd("Z1 twice", [raw(gzip.compress(gzip.compress(DATA)), content_encoding="gzip, gzip")]),
    Odd("Z1 identity", [raw(DATA, content_encoding="identity")]),
    Odd("E1 CRLF", [sse(HELLO.replace(b"\n", b"\r\n"))]),
    Odd("E1 CR", [sse(HELLO.replace(b"\n", b"\r"))]),
    Odd("E1 mixed", [sse(HELLO.replace(b"\n", b"\r\n", 3).replace(b"}\n\n", b"}\r\r", 2))]),
    Odd("E2", [send(head(200, CLOSING)), drip(HELLO.replace(b"lo", "l✓😀".encode())), close()], "hell✓😀"),
    Odd("E3 lines", [sse(HELLO.replace(b'{"choices":', b'{"choices":\ndata:'))]),
    Odd("E3 no space", [sse(HELLO.replace(b"data: ", b"data:"))]),
    Odd("E3 no colon", [sse(HELLO.replace(b"[DONE]\n\n", b"[DONE]\ndata\n\n"))]),
    Odd("E4", [sse(b"\xef\xbb\xbf: hi\n" + HELLO.replace(b"data", b": keep-alive\nid: 7\nretry: 5\nx: y\nz\ndata"))]),
    Odd("E4 names", [sse(HELLO.replace(b"data", b"event: message\ndata"))]),
    *(
        Odd(name, [either(answer(200, body(text)), stream(delta(text), FINISH, USED, DONE))], text)
        for name, text in WIDE.items()
    ),
    Odd("E12", [stream(*EVENTS[:-1]), close()], modes=STREAMED, source="estimated"),
    Odd("E12 cut", [stream(*EVENTS[:-1], end=False), rst()], modes=STREAMED, source="estimated"),
    Odd("E13 none", [stream(*EVENTS)]),
    Odd("E13 twice", [stream(*EVENTS, DONE, DONE)]),
    Odd("E13 more", [stream(*EVENTS, DONE, delta("no"), ERROR)]),
    Odd("E13 spaces", [stream(*EVENTS, b"data:  [DONE] \r\r")]),
    Odd("E14", [stream(ROLE, b"data: {\n\ndata:\n\ndata: null\n\n", delta("hel"), b"data: 5\n\n", *EVENTS[2:], DONE)]),
    Odd("E14 trailing", [stream(*EVENTS, b"data: {\n\n")]),
    Odd("E15", [stream(delta(LONG_TEXT), FINISH, USED, DONE)], LONG_TEXT, source="estimated"),
    Odd(
        "E16",
        [stream(*[delta(f"{n} ") for n in range(10_000)], FINISH, USED, DONE)],
        "".join(f"{n} " for n in range(10_000)),
        source="estimated",
    ),
    Odd(
        "E16 at once",
        [sse(b"".join(event(delta(f"{n} ")) for n in range(10_000)) + event(FINISH) + DONE)],
        "".join(f"{n} " for n in range(10_000)),
        source="estimated",
    ),
    Odd(
        "E17",
        ending(
            delta(role="assistant"),
            delta(None),
            {"choices": [{"index": 0, "delta": {"content": None}}]},
            {"choices": [{"index": 0}]},
            FINISH,
            USED,
            DONE,
        ),
    ),
    Odd("E18 last", ending({**FINISH, "usage": USAGE}, DONE)),
    Odd("E18 every", [stream(*({**each, "usage": USAGE} for each in EVENTS), DONE)]),
    Odd("E18 twice", ending(FINISH, {"choices": [], "usage": {**USAGE, "completion_tokens": 2}}, USED, DONE)),
    Odd("E19 twice", ending(delta(finish="length"), FINISH, USED, DONE), finish="length"),
    Odd("E19 unknown", ending(delta(finish="eos_token"), USED, DONE)),
    Odd("E19 more", [stream(delta("hel"), FINISH, delta("lo"), USED, DONE)]),
]


@each(ODD)
async def test_odd_answers_are_answers(world: World, row: Odd) -> None:
    world.first.always("m", *row.script)
    for mode in row.modes:
        outcome = await world.ask(stream=mode)
        assert outcome.error is None
        assert said(outcome) == row.text
        assert attempts(outcome) == [("first", None)]
        doc = outcome.row.doc
        assert (doc["status"], doc["finish_reason"], doc["tokens"]["source"]) == ("ok", row.finish, row.source)
        if row.source == "provider":
            assert outcome.spent == COST
        usage = outcome.chunks[-1]["usage"]
        assert all(type(usage[name]) is int and usage[name] > 0 for name in USAGE)
        assert 0 < outcome.spent == outcome.row.cost < 10**10
        for told in outcome.chunks:
            assert (told["id"], told["model"], type(told["created"])) == (outcome.row.id, "first/m", int)
            assert "error" not in told


# Faults after the first content -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """How a stream goes on that has said `hel`. `code` is the error event's."""

    id: str
    script: Sequence[Step]
    code: str
    fault: str
    short: bool = False


def flushed(data: bytes) -> bytes:
    """The beginning of a gzip stream that can be read at once."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)


HEL = b"".join(map(event, EVENTS[:2]))
ZIPPED = send(head(200, {**STREAM, "content-encoding": "gzip"}))
BEGUN = stream(HEL, end=False)
HALF = b'data: {"choices": [{"ind'
BAD = b"data: {\n\n"
LATE, CUT = ("upstream_timeout", "total_timeout", True), ("upstream_unavailable", "disconnected")
BROKEN = [
    Broken("E7", [stream(HEL, ERROR, delta("lo"), DONE)], "upstream_error", "error_in_200"),
    Broken("E7 event", [stream(HEL, b"event: error\n" + event(ERROR["error"]))], "upstream_error", "error_in_200"),
    Broken("E7 limit", [stream(HEL, LIMIT)], "rate_limit_exceeded", "rate_limit"),
    Broken("E8", [BEGUN, sleep(30)], "upstream_timeout", "gap_timeout"),
    Broken("E9", [BEGUN, endless(framed(b": wait\n"), 0.02)], *LATE),
    Broken("E9 bytes", [BEGUN, endless(framed(b"x"), 0.02)], *LATE),
    Broken("E10 RST", [BEGUN, sleep(0.05), rst()], *CUT),
    Broken("E10 FIN", [BEGUN, close()], *CUT),
    Broken("E10 chunk", [BEGUN, send(b"ff\r\ndata: {"), close()], *CUT),
    Broken("E11", [send(head(200, CLOSING) + HEL + HALF), close()], *CUT),
    Broken("E11 clean", [stream(HEL, HALF)], *CUT),
    Broken("E14", [stream(HEL, BAD * 4, *EVENTS[2:], DONE)], "upstream_protocol_error", "protocol"),
    Broken("E14 last", [stream(HEL, BAD)], "upstream_protocol_error", "protocol"),
    Broken("J4", [stream(HEL, {"choices": [{"delta": {"content": {}}}]})], "upstream_protocol_error", "protocol"),
    Broken("E15", [BEGUN, endless(framed(b"x" * 65536))], "upstream_protocol_error", "too_large"),
    Broken("E19 never", [stream(*EVENTS[:3], USED)], *CUT),
    Broken("Z2", [ZIPPED, chunk(flushed(HEL)), sleep(0.05), chunk(b"x" * 99)], "upstream_protocol_error", "decode"),
]


@each(BROKEN)
async def test_after_content_nobody_else_is_asked(open_world: Open, row: Broken) -> None:
    world = await open_world(SHORT if row.short else BUDGETS)
    world.first.always("m", *row.script)
    outcome = await world.ask("first/m", "second/m", stream=True)
    *chunks, last = outcome.chunks
    assert (outcome.error, outcome.text[:3]) == (None, "hel")
    assert last["error"]["code"] == row.code
    assert "choices" not in last
    assert not any("error" in chunk or chunk["choices"][0]["finish_reason"] for chunk in chunks)
    assert attempts(outcome) == [("first", row.fault)]
    assert world.second.seen == []
    doc = outcome.row.doc
    assert (doc["status"], doc["provider"], doc["error"]["code"]) == ("failed", "first", row.code)
    if row.id != "E19 never":
        assert doc["tokens"]["source"] == "estimated"
    assert outcome.row.cost == outcome.spent > 0


# Connecting -------------------------------------------------------------------------------------------------------


def resolving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the form `….test` are answered by the test: `slow.test` after a second, the others are not known."""
    real = socket.getaddrinfo

    def fake(host: Any, *rest: Any, **more: Any) -> Any:
        if not str(host).endswith(".test"):
            return real(host, *rest, **more)
        if host == "slow.test":
            time.sleep(1)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fake)


@pytest.mark.parametrize(
    ("row", "fault", "answer", "tries"),
    [
        ("C1 refused", "connect", UNAVAILABLE, 2),
        ("C2 unknown", "dns", UNAVAILABLE, 1),
        ("C2 slow", "connect_timeout", TIMEOUT, 1),
        ("C4 hole", "connect_timeout", TIMEOUT, 1),
    ],
)
async def test_nobody_there(
    open_world: Open, monkeypatch: pytest.MonkeyPatch, row: str, fault: str, answer: tuple[int, str], tries: int
) -> None:
    resolving(monkeypatch)
    with black_hole() as port:
        world = await open_world(
            {**BUDGETS, "CONNECT_TIMEOUT": "0.5"},
            refused=f"http://127.0.0.1:{free_port()}/v1",
            unknown="http://unknown.test/v1",
            slow="http://slow.test/v1",
            hole=f"http://127.0.0.1:{port}/v1",
        )
        place = row.split()[1]
        for mode in (False, True):
            alone = await world.ask(f"{place}/{mode}", stream=mode)
            assert isinstance(alone.error, GatewayError)
            assert (alone.error.status, alone.error.code) == answer
            assert attempts(alone) == [(place, fault)] * tries
            assert (alone.row.cost, alone.row.doc["attempts"][0]["ambiguous"]) == (0, False)
            helped = await world.ask(f"{place}/{mode}", "second/m", stream=mode)
            assert (said(helped), helped.row.doc["provider"]) == ("hi", "second")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.mark.parametrize(
    ("row", "certificate"),
    [
        ("C3 self-signed", {"trusted": False}),
        ("C3 wrong name", {"name": "elsewhere.test"}),
        ("C3 expired", {"days": -1}),
        ("C3 no TLS", None),
    ],
)
async def test_nobody_to_trust(
    open_world: Open, authority: Authority, caplog: pytest.LogCaptureFixture, row: str, certificate: Any
) -> None:
    tls = None if certificate is None else authority.server(**certificate)
    async with Upstream(SECRET, tls=tls) as stranger:
        world = await open_world(strange=f"https://{stranger.host}/v1")
        if tls is None:
            stranger.greet(send(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
            stranger.greet(send(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        world.ours._context = authority.trusting()
        with caplog.at_level("ERROR"):
            alone = await world.ask("strange/m")
        assert isinstance(alone.error, GatewayError)
        assert (alone.error.status, alone.error.code) == UNAVAILABLE
        assert attempts(alone) == [("strange", "tls")]
        assert "certificate" not in str(alone.error.body()).lower()
        assert [record.message for record in caplog.records] == ["upstream.alarm"]
        helped = await world.ask("strange/m", "second/m", stream=True)
        assert (said(helped), helped.row.doc["provider"]) == ("hi", "second")
        assert stranger.seen == []


async def test_a_server_that_can_be_trusted(open_world: Open, authority: Authority) -> None:
    """C10: though it offers HTTP/2, it is spoken to in HTTP/1.1, so that there are no GOAWAYs."""
    async with Upstream(SECRET, tls=authority.server()) as safe:
        world = await open_world(safe=safe.url)
        world.ours._context = authority.trusting()
        for mode in (False, True, False):
            assert said(await world.ask("safe/m", stream=mode)) == "hi"
        assert {seen.connection for seen in safe.seen} == {1}
        safe.next(sleep(0.05), rst())
        assert attempts(await world.ask("safe/m"))[-1] == ("safe", None)
        await world.ours.close()


@pytest.mark.parametrize("death", [[close()], [rst()], [sleep(0.05), close()]], ids=["C7 FIN", "C7 RST", "C7 late"])
@pytest.mark.parametrize("mode", [False, True], ids=["whole", "stream"])
async def test_a_kept_connection_that_died_is_nobodys_failure(world: World, death: list[Step], mode: bool) -> None:
    world.first.next(echo())
    world.first.next(*death)
    assert said(await world.ask(stream=mode)) == "hi"
    again = await world.ask(stream=mode)
    assert (said(again), attempts(again)) == ("hi", [("first", None)])
    assert [seen.connection for seen in world.first.seen] == [1, 1, 2]
    assert again.row.doc["attempts"][0]["retried_stale"]
    assert again.row.cost == again.spent > 0


async def test_a_new_connection_that_dies_is_a_failure(world: World) -> None:
    """C7: the second try is the last one, and only what came without a byte of answer is tried again."""
    world.first.next(echo())
    world.first.always("dead", close())
    world.first.always("late", send(b"H"), close())
    await world.ask()
    dead = await world.ask("first/dead")
    assert attempts(dead) == [("first", "closed_before_headers")]
    await world.ask()
    late = await world.ask("first/late")
    assert attempts(late) == [("first", "protocol")]
    assert [seen.connection for seen in world.first.seen] == [1, 1, 2, 3, 3]


async def test_after_one_dead_connection_the_other_idle_ones_are_not_tried(world: World) -> None:
    """C7: a server that was started anew has forgotten them all."""
    world.first.always("slow", sleep(0.1), echo())
    await asyncio.gather(*(world.ask("first/slow") for _ in range(3)))
    world.first.next(close())
    assert said(await world.ask()) == "hi"
    assert [seen.connection for seen in world.first.seen][3:] == [1, 4]
    assert world.first.connections == 4


async def test_an_idle_connection_that_was_closed_is_not_used(world: World) -> None:
    """C8."""
    world.first.next(echo(), close())
    assert said(await world.ask()) == "hi"
    await asyncio.sleep(0.05)
    again = await world.ask()
    assert (said(again), attempts(again)) == ("hi", [("first", None)])
    assert [seen.connection for seen in world.first.seen] == [1, 2]


async def test_a_connection_that_idled_while_the_clocks_stood_still_is_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C9: a sleeping laptop's monotonic clock does not go on; its wall clock does."""
    assert said(await world.ask()) == "hi"
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 360)
    assert said(await world.ask()) == "hi"
    assert [seen.connection for seen in world.first.seen] == [1, 2]


async def test_one_provider_that_holds_all_its_connections_does_not_hold_up_the_next(open_world: Open) -> None:
    """C11."""
    world = await open_world(max_connections=1)
    enough = asyncio.Event()

    async def talk(exchange: fake.Exchange) -> None:
        while not enough.is_set():
            await chunk(event(delta("on ")))(exchange)
            await asyncio.sleep(0.02)

    world.first.always("slow", BEGUN, talk, chunk(event(FINISH), b""))
    slow = asyncio.ensure_future(world.ask("first/slow", stream=True))
    await until(lambda: bool(world.first.seen))
    alone = await world.ask()
    assert isinstance(alone.error, GatewayError)
    assert (alone.error.status, alone.error.code, alone.error.headers["retry-after"]) == (*BUSY, "1")
    assert attempts(alone) == [("first", "pool_timeout")]
    assert (alone.row.cost, alone.row.doc["attempts"][0]["ambiguous"]) == (0, False)
    helped = await world.ask("first/m", "second/m")
    assert attempts(helped) == [("first", "pool_timeout"), ("second", None)]
    enough.set()
    assert (await slow).error is None


async def test_a_cold_model_may_take_its_time(open_world: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """H7: as long as its row says; and how long it took is told, of a deployer's own models."""
    monkeypatch.setattr("shared.upstream.COLD", 1.2)
    async with Upstream(SECRET) as cold:
        world = await open_world(
            cold={"base_url": cold.url, "first_content_timeout": 10, "local": True},
            hosted={"base_url": cold.url, "first_content_timeout": 10},
        )
        for row, slow in (("cold", True), ("cold", False), ("hosted", True)):
            cold.next(sleep(1.5 if slow else 0), echo())
            outcome = await world.ask(f"{row}/m", stream=True)
            assert said(outcome) == "hi"
            cold_start = outcome.row.doc["attempts"][0].get("cold_start_ms")
            assert (cold_start >= 1500) if row == "cold" and slow else (cold_start is None)
        await world.ours.close()


@pytest.mark.parametrize("mode", [False, True], ids=["whole", "stream"])
async def test_a_late_answer_is_fetched_where_the_provider_says_it_will_be(open_world: Open, mode: bool) -> None:
    """H6: five times at most, at the same host only, and only of a provider whose row says so."""
    async with Upstream(SECRET) as late:
        world = await open_world(late={"base_url": late.url, "answers_elsewhere": True})
        onward = raw(b"", 303, location="/v1/chat/completions?result=fc-1")
        late.next(onward)
        late.next(onward)
        late.next(sse(HELLO) if mode else answer(200, body()))
        outcome = await world.ask("late/m", stream=mode)
        assert (said(outcome), attempts(outcome)) == ("hello", [("late", None)])
        assert outcome.row.doc["attempts"][0]["cold_start_ms"] > 0
        assert [(seen.method, seen.path) for seen in late.seen[1:]] == [("GET", "/v1/chat/completions?result=fc-1")] * 2
        assert late.seen[2].headers["authorization"] == f"Bearer {SECRET}"
        for script in ([onward] * 6, [raw(b"", 303, location=f"{world.second.url}/x")], [raw(b"", 307, location="/x")]):
            late.forget()
            for step in script:
                late.next(step)
            assert attempts(await world.ask("late/m", stream=mode)) == [("late", "redirect")]
            assert len(late.seen) == len(script)
        assert world.second.seen == []
        await world.ours.close()


# Cuts, sequences and the end of time ------------------------------------------------------------------------------


def pieces(world: World, model: str, mode: bool, notes: Notes | None = None) -> Any:
    """What `upstream` makes of an answer, without the gateway around it."""
    asked = {"model": f"first/{model}", "messages": [{"role": "user", "content": "hi"}], "stream": mode}
    call, to = parse("chat", fake.dumped(asked)), world.kit.catalog.resolve(f"first/{model}").deployments[0]
    deadline = asyncio.get_running_loop().time() + 10
    ask = world.ours.stream if mode else world.ours.complete
    return ask(call, to, world.ours.prepare(call, to), deadline, notes)


async def streamed(world: World, model: str, notes: Notes | None = None) -> str:
    text = ""
    async with aclosing(pieces(world, model, mode=True, notes=notes)) as batches:
        async for batch in batches:
            for chunk, _ in batch:
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return text


async def test_what_went_wrong_on_the_way_is_noted(world: World) -> None:
    """C7, E14: though the caller does not notice."""
    world.first.next(echo())
    world.first.next(close())
    await world.ask()
    stale = Notes()
    await pieces(world, "m", mode=False, notes=stale)
    assert stale == Notes(retried_stale=True, bad_events=0)
    world.first.next(stream(ROLE, BAD * 2, *EVENTS[1:3], BAD, *EVENTS[3:], DONE))
    bad = Notes()
    assert await streamed(world, "m", bad) == "hello"
    assert bad == Notes(retried_stale=False, bad_events=3)


SHORTEST = b"".join(event(delta(text, finish)) for text, finish in (("h✓", None), ("l😀", None), (None, "stop"))) + DONE
CUTS = {
    "E1 CRLF": SHORTEST.replace(b"\n", b"\r\n"),
    "E1 CR": SHORTEST.replace(b"\n", b"\r"),
    "E2": SHORTEST,
    "E3": SHORTEST.replace(b'"delta":', b'"delta":\ndata:').replace(b"data: ", b"data:"),
    "E13": SHORTEST + DONE + event(delta("no")),
}


@pytest.mark.parametrize("row", CUTS)
async def test_cut_in_two_segments_at_every_byte(open_world: Open, row: str) -> None:
    world, data = await open_world(PATIENT), CUTS[row]
    for cut in range(1, len(data)):
        world.first.always(f"cut-{cut}", send(head(200, CLOSING)), apart(data[:cut], data[cut:]), close())
    for start in range(1, len(data), 20):
        models = [f"cut-{cut}" for cut in range(start, min(start + 20, len(data)))]
        assert set(await asyncio.gather(*(streamed(world, model) for model in models))) == {"h✓l😀"}


async def test_who_never_answers_a_whole_request_is_left_out_after_three(open_world: Open) -> None:
    """H7: each may wait until the total time, so that nobody else is asked; but not for ever."""
    world = await open_world({**BUDGETS, "TOTAL_TIMEOUT": "0.5"})
    world.first.always("m", sleep(30))
    late = [await world.ask("first/m", "second/m") for _ in range(3)]
    assert [(each.error.status, each.error.code) for each in late if isinstance(each.error, GatewayError)] == [
        (504, "upstream_timeout")
    ] * 3
    assert attempts(await world.ask("first/m", "second/m")) == [("second", None)]


async def test_one_byte_a_segment(open_world: Open) -> None:
    """E2."""
    world = await open_world(PATIENT)
    world.first.always("m", send(head(200, CLOSING)), apart(*(bytes([byte]) for byte in SHORTEST)), close())
    assert await streamed(world, "m") == "h✓l😀"


async def test_all_busy_in_different_ways_is_503(world: World) -> None:
    """S8: 429 is for when all say so."""
    world.first.always("m", *limited(retry_after="7"))
    world.second.always("m", *limited(retry_after="3"))
    both = await world.ask("first/m", "second/m")
    assert isinstance(both.error, GatewayError)
    assert (both.error.status, both.error.headers["retry-after"]) == (429, "3")
    world.second.always("n", *refused(500))
    mixed = await world.ask("again/m", "spare/n")
    assert isinstance(mixed.error, GatewayError)
    assert (mixed.error.status, mixed.error.code) == BUSY


async def test_one_answer_after_three_faults(open_world: Open) -> None:
    """X1: nobody there, then silence, then a stream that breaks off: one clear end, one row, one settlement."""
    world = await open_world(refused=f"http://127.0.0.1:{free_port()}/v1")
    world.first.always("m", sleep(30))
    world.second.always("m", stream(HEL, ERROR))
    outcome = await world.ask("refused/m", "first/m", "second/m", stream=True)
    assert (outcome.text, outcome.chunks[-1]["error"]["code"]) == ("hel", "upstream_error")
    assert attempts(outcome) == [
        ("refused", "connect"),
        ("first", "first_content_timeout"),
        ("second", "error_in_200"),
    ]
    assert [each["ambiguous"] for each in outcome.row.doc["attempts"]] == [False, True, False]
    assert outcome.key.requests == 1
    assert outcome.row.cost == outcome.spent > 0


async def test_a_fault_then_another_then_none(world: World) -> None:
    """Switches in sequence: each request meets the next one."""
    for script in ([close()], [sse(HELLO)], [stream(HEL), close()], [answer(200, body())]):
        world.first.next(*script)
    told = [await world.ask(stream=mode) for mode in (False, True, True, False)]
    assert [said(outcome) for outcome in told] == ["", "hello", "hel", "hello"]
    assert [outcome.row.doc["status"] for outcome in told] == ["failed", "ok", "failed", "ok"]


async def test_the_platforms_deadline_ends_a_stream_before_the_platform_does(world: World) -> None:
    """X3."""
    world.first.always("m", BEGUN, endless(framed(event(delta("lo"))), 0.02))
    exchange = await world.kit.admit(world.key, {**ASK, "stream": True})
    exchange.deadline = asyncio.get_running_loop().time() + 0.3
    chunks = [chunk async for batch in world.kit.gateway.stream(exchange) for chunk in batch]
    assert chunks[-1]["error"]["code"] == "upstream_timeout"
    row = await world.kit.gateway.close(exchange)
    assert (row["status"], row["attempts"][0]["error"]) == ("failed", "total_timeout")
    assert row["cost"]["total_cost"] > 0
    world.settled += round(row["cost"]["total_cost"] * 10**9)


ASK = {"model": "first/m", "messages": [{"role": "user", "content": "hi"}]}


def peak() -> int:
    """The most memory that this process ever had, in bytes, since `start_anew`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell peaks of memory")
@pytest.mark.parametrize("mode", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("row", ["Z3", "Z3 twice", "B1"])
async def test_a_bomb_does_not_fill_the_memory(world: World, row: str, mode: bool) -> None:
    script = {
        "Z3": [raw(bomb(), content_encoding="gzip")],
        "Z3 twice": [raw(gzip.compress(bomb()), content_encoding="gzip, gzip")],
        "B1": [send(head(200, {"content-length": 10**9}) + b"{"), endless(b" " * 65536)],
    }[row]
    world.first.always("m", *script)
    await world.ask("second/m")
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    outcome = await world.ask(stream=mode)
    assert attempts(outcome) == [("first", "too_large")]
    assert peak() - before < 64 * 2**20
