"""A strict fake of OpenAI's API on a loopback socket: it echoes, misbehaves by script, and keeps what it was sent.

    async with Upstream() as upstream:                 # upstream.url is the base URL, .../v1
        upstream.next(answer(429, error("busy")))      # for the next request only; more calls queue up
        upstream.always("slow", sleep(5), echo())      # for every request that names this model
        upstream.greet(rst())                          # for the next connection, before anything is read
        ...
        assert [seen.json["model"] for seen in upstream.seen] == ["gpt-4o", "slow"]
        assert not upstream.malformed

A script is steps, run in turn once the request has been read; the connection is then kept for the next request unless
a step closed it. `close` and `rst` end a script. What a real provider would refuse is answered 400 and kept in
`malformed`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

Step: TypeAlias = Callable[["Exchange"], Awaitable[None]]

END = b"0\r\n\r\n"
"""The last chunk of a chunked body."""
DONE = b"data: [DONE]\n\n"
MAX_HEAD = 65536


class MalformedError(Exception):
    """What was received is not what a careful HTTP client would send to OpenAI."""


@dataclass
class Seen:
    """One request as it came. `closed_after`: seconds until the peer hung up before its answer was complete."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    json: Any
    connection: int
    at: float = field(default_factory=time.monotonic)
    closed_after: float | None = None
    answered: bool = False


class Peer(asyncio.StreamReaderProtocol):
    """A connection that notes the moment at which the other side hangs up, read or not."""

    def __init__(self, reader: asyncio.StreamReader, serve: Callable[..., Awaitable[None]]) -> None:
        super().__init__(reader, self.connected)
        self.serve = serve
        self.exchange: Exchange | None = None
        self.task: asyncio.Task[None] | None = None

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.task = asyncio.current_task()
        await self.serve(self, reader, writer)

    def eof_received(self) -> bool | None:
        self.gone()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone(reset=exc is not None)
        super().connection_lost(exc)

    def gone(self, *, reset: bool = False) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange and exchange.seen and (reset or not exchange.writer.is_closing()):
            exchange.seen.closed_after = time.monotonic() - exchange.seen.at
            if self.task:
                self.task.cancel()


class Exchange:
    """What a step works on: the request seen last (None before the first) and the wire."""

    def __init__(self, upstream: Upstream, peer: Peer, number: int, wire: tuple[Any, Any]) -> None:
        self.upstream = upstream
        self.peer = peer
        self.number = number
        self.reader: asyncio.StreamReader = wire[0]
        self.writer: asyncio.StreamWriter = wire[1]
        self.seen: Seen | None = None

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self) -> Seen | None:
        """The next request, or None when the peer has closed an idle connection."""
        self.peer.exchange = None
        self.seen = None
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as cut:
            if cut.partial:
                raise MalformedError("cut inside the head") from None
            return None
        except asyncio.LimitOverrunError:
            raise MalformedError(f"a head of more than {MAX_HEAD} bytes") from None
        method, path, headers = parse_head(head)
        try:
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        except asyncio.IncompleteReadError:
            raise MalformedError("cut inside the body") from None
        self.seen = Seen(method, path, headers, body, None, self.number)
        self.upstream.seen.append(self.seen)
        self.peer.exchange = self
        check_headers(self.seen, self.upstream)
        self.seen.json = parse_json(body) if body else None
        return self.seen


class Upstream:
    """The server, its scripts and its notes; with `key`, no other will do, as bearer or in another `header`."""

    def __init__(
        self, key: str | None = None, header: str = "authorization", tls: ssl.SSLContext | None = None
    ) -> None:
        self.key = key
        self.header = header
        self.tls = tls
        self.forget()

    def forget(self) -> None:
        """Drop notes and scripts; open connections stay."""
        self.seen: list[Seen] = []
        self.malformed: list[str] = []
        self.queue: deque[Sequence[Step]] = deque()
        self.by_model: dict[str | None, Sequence[Step]] = {}
        self.greetings: deque[Sequence[Step]] = deque()

    def next(self, *steps: Step) -> None:
        self.queue.append(steps)

    def always(self, model: str | None, *steps: Step) -> None:
        """None: whoever names no model in the body."""
        self.by_model[model] = steps

    def greet(self, *steps: Step) -> None:
        self.greetings.append(steps)

    async def __aenter__(self) -> Self:
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.server = await asyncio.get_running_loop().create_server(
            lambda: Peer(asyncio.StreamReader(limit=MAX_HEAD), self.serve), "127.0.0.1", 0, ssl=self.tls
        )
        self.port: int = self.server.sockets[0].getsockname()[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http{'s' if self.tls else ''}://{self.host}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()
        await asyncio.sleep(0)  # the transports close in the loop's next turn

    async def serve(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        self.connections += 1
        exchange = Exchange(self, peer, self.connections, (reader, writer))
        try:
            if self.greetings:
                await run(exchange, self.greetings.popleft())
            while not writer.is_closing() and await exchange.receive():
                await run(exchange, self.script(exchange.seen))
        except MalformedError as fault:
            self.malformed.append(str(fault))
            if not writer.is_closing():
                body = dumped(error(str(fault)))
                writer.write(head(400, {"content-length": len(body), "connection": "close"}) + body)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the peer hung up (kept in `closed_after`), or the server is going down
        finally:
            peer.exchange = None
            writer.close()
            self.tasks.discard(task)

    def script(self, seen: Seen | None) -> Sequence[Step]:
        model = seen.json.get("model") if seen and isinstance(seen.json, dict) else None
        if model in self.by_model:
            return self.by_model[model]
        return self.queue.popleft() if self.queue else (echo(),)


async def run(exchange: Exchange, steps: Sequence[Step]) -> None:
    for step in steps:
        await step(exchange)
        if exchange.writer.is_closing():
            break
    if exchange.seen:
        exchange.seen.answered = True


# Steps -------------------------------------------------------------------------------------------------------------


def recv() -> Step:
    """Read one more request (in a greeting: the first), without answering it."""

    async def step(exchange: Exchange) -> None:
        if not await exchange.receive():
            exchange.writer.close()

    return step


def send(*pieces: bytes) -> Step:
    """Bytes as they are; each piece is written by itself."""

    async def step(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)

    return step


def chunk(*pieces: bytes) -> Step:
    """Each piece as one HTTP chunk; an empty one ends the body."""
    return send(*map(framed, pieces))


def apart(*pieces: bytes) -> Step:
    """Each piece is on its way by itself, and read before the next one is, by a reader in this process."""

    async def step(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)
            await asyncio.sleep(0.001)

    return step


def endless(piece: bytes, every: float = 0.0) -> Step:
    """The same again and again, until the peer hangs up."""

    async def step(exchange: Exchange) -> None:
        while True:
            await exchange.send(piece)
            await asyncio.sleep(every)

    return step


def sleep(seconds: float) -> Step:
    async def step(_: Exchange) -> None:
        await asyncio.sleep(seconds)

    return step


def drip(data: bytes, every: float = 0.0) -> Step:
    """One byte at a time, `every` seconds."""

    async def step(exchange: Exchange) -> None:
        for at in range(len(data)):
            await exchange.send(data[at : at + 1])
            await asyncio.sleep(every)

    return step


def close() -> Step:
    async def step(exchange: Exchange) -> None:
        exchange.writer.close()

    return step


def rst() -> Step:
    """Reset the connection: what was sent may be lost with it."""

    async def step(exchange: Exchange) -> None:
        sock = exchange.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.writer.close()
        exchange.writer.transport.abort()

    return step


def answer(status: int = 200, body: Any = None, headers: dict[str, Any] | None = None) -> Step:
    """A whole answer with its length; `body` is bytes, or anything JSON can say."""
    data = body if isinstance(body, bytes) else dumped(body)
    return send(head(status, {"content-length": len(data), **(headers or {})}) + data)


def stream(*events: Any, status: int = 200, end: bool = True) -> Step:
    """Server-sent events, each its own HTTP chunk: bytes as they are, all else as `data: <json>`."""
    pieces = [each if isinstance(each, bytes) else event(each) for each in events]
    opened = head(status, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
    return send(opened, *map(framed, pieces), *([END] if end else []))


def recorded(case: Path) -> Step:
    """A recording as `wire/README.md` describes it, cut where the recorder saw cuts."""
    meta = json.loads((case / "response.meta.json").read_text())
    body = (case / meta.get("body_file", "response.json")).read_bytes()
    sizes = iter(meta.get("wire_chunks") or [len(body)])
    headers = {name: value for name, value in meta["headers"].items() if name.lower() != "transfer-encoding"}
    opened = head(meta["status"], {**headers, "transfer-encoding": "chunked"})
    at, pieces = 0, []
    for size in sizes:
        pieces.append(body[at : at + size])
        at += size
    return send(opened, *(framed(piece) for piece in pieces if piece), END)


def echo(pace: float = 0.0) -> Step:
    """What a healthy OpenAI answers, saying the last user text back; streams are cut into code points."""

    async def step(exchange: Exchange) -> None:
        seen = exchange.seen
        assert seen
        kind = seen.path.partition("?")[0].removeprefix("/v1/")
        if seen.method != "POST" or kind not in SURFACES:
            await answer(404, error(f"Unknown request URL: {seen.method} {seen.path}", code="unknown_url"))(exchange)
            return
        check_body(kind, seen.json)
        if kind == "embeddings":
            await answer(200, embeddings(seen.json))(exchange)
        elif seen.json.get("stream"):
            opened = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
            await exchange.send(opened)
            for each in chunks(kind, seen.json):
                await exchange.send(framed(event(each)))
                if pace:
                    await asyncio.sleep(pace)
            await exchange.send(framed(DONE) + END)
        else:
            await answer(200, whole(kind, seen.json))(exchange)

    return step


# Bytes -------------------------------------------------------------------------------------------------------------


def head(status: int = 200, headers: dict[str, Any] | None = None) -> bytes:
    """A status line and headers, `application/json` unless told otherwise."""
    given = {"content-type": "application/json", "x-request-id": "req_fake", **(headers or {})}
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode()


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data: Any) -> bytes:
    return b"data: " + dumped(data) + b"\n\n"


def dumped(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def error(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> Any:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# OpenAI's manners --------------------------------------------------------------------------------------------------

QUIET = ("assistant", "tool", "function")
"""Roles that may speak without text."""
SURFACES = {"chat/completions": "messages", "completions": "prompt", "embeddings": "input"}


def words(kind: str, asked: Any) -> str:
    """What to say back: the last user text, cut at `max_tokens` code points."""
    if kind == "completions":
        prompt = asked["prompt"]
        text = prompt if isinstance(prompt, str) else "".join(map(str, prompt))
    else:
        said = [message["content"] for message in asked["messages"] if message["role"] == "user"]
        last = said[-1] if said else ""
        text = last if isinstance(last, str) else "".join(part.get("text", "") for part in last)
    return (text or "ok")[: asked.get("max_completion_tokens") or asked.get("max_tokens")]


def usage(asked: Any, text: str) -> dict[str, int]:
    prompt, answered = len(json.dumps(asked)) // 8, len(text) * (asked.get("n") or 1)
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


def reason(asked: Any, text: str) -> str:
    return "length" if len(text) == (asked.get("max_completion_tokens") or asked.get("max_tokens")) else "stop"


def whole(kind: str, asked: Any) -> dict[str, Any]:
    text = words(kind, asked)
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if "chat" in kind else {"text": text}
    choice = {**said, "logprobs": None, "finish_reason": reason(asked, text)}
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion" if "chat" in kind else "text_completion",
        "created": int(time.time()),
        "model": asked["model"],
        "choices": [{"index": index, **choice} for index in range(asked.get("n") or 1)],
        "usage": usage(asked, text),
    }


def chunks(kind: str, asked: Any) -> Iterator[dict[str, Any]]:
    text = words(kind, asked)
    wants_usage = bool((asked.get("stream_options") or {}).get("include_usage"))
    frame = {"id": "chatcmpl-fake", "created": int(time.time()), "model": asked["model"]}
    frame["object"] = "chat.completion.chunk" if "chat" in kind else "text_completion"

    def piece(index: int, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **({"delta": said} if "chat" in kind else {"text": said.get("content", "")})}
        return {
            **frame,
            "choices": [{**choice, "logprobs": None, "finish_reason": finish}],
            **({"usage": None} if wants_usage else {}),
        }

    for index in range(asked.get("n") or 1):
        if "chat" in kind:
            yield piece(index, {"role": "assistant", "content": "", "refusal": None})
        for letter in text:
            yield piece(index, {"content": letter})
        yield piece(index, {}, reason(asked, text))
    if wants_usage:
        yield {**frame, "choices": [], "usage": usage(asked, text)}


def embeddings(asked: Any) -> dict[str, Any]:
    given = asked["input"]
    many = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    vectors = [[float(len(each))] * (asked.get("dimensions") or 3) for each in many]
    if asked.get("encoding_format") == "base64":
        packed = [base64.b64encode(struct.pack(f"<{len(each)}f", *each)).decode() for each in vectors]
    else:
        packed = vectors
    tokens = len(json.dumps(given)) // 8 + 1
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": at, "embedding": each} for at, each in enumerate(packed)],
        "model": asked["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


# Strictness --------------------------------------------------------------------------------------------------------

REQUEST_LINE = re.compile(rb"(GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS) (/[!-~]*) HTTP/1\.1")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[\t !-~\x80-\xff]*[!-~\x80-\xff])?)[ \t]*")


def parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Raises `MalformedError` for what RFC 9112 forbids, and for chunked requests, which providers need not take."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    if not (request := REQUEST_LINE.fullmatch(first)):
        raise MalformedError(f"request line {first!r}")
    headers: dict[str, str] = {}
    for line in lines:
        if not (header := HEADER.fullmatch(line)):
            raise MalformedError(f"header line {line!r}")
        name = header[1].decode().lower()
        if name in headers:
            raise MalformedError(f"{name} twice")
        headers[name] = header[2].decode("latin-1")
    if "transfer-encoding" in headers or not re.fullmatch(r"\d{1,9}", headers.get("content-length", "0")):
        raise MalformedError("framing other than a plain content-length")
    return request[1].decode(), request[2].decode(), headers


def check_headers(seen: Seen, upstream: Upstream) -> None:
    if seen.headers.get("host") != upstream.host:
        raise MalformedError(f"host {seen.headers.get('host')!r}")
    scheme = "Bearer " if upstream.header == "authorization" else ""
    bearer = re.fullmatch(rf"{scheme}([!-~]+)", seen.headers.get(upstream.header, ""))
    if not bearer or upstream.key not in (None, bearer[1]):
        raise MalformedError("no bearer, or not the provider's key")
    if seen.method == "POST":
        if "content-length" not in seen.headers:
            raise MalformedError("no content-length")
        if seen.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise MalformedError(f"content-type {seen.headers.get('content-type')!r}")


def parse_json(body: bytes) -> Any:
    """Strict: UTF-8, no NaN, no lone surrogate, and no key twice, which two readers may read in two ways."""

    def constant(word: str) -> Any:
        raise MalformedError(f"JSON with {word}")

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise MalformedError("JSON with a key twice")
        return dict(pairs)

    try:
        data = json.loads(body.decode(), parse_constant=constant, object_pairs_hook=object_of)
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as fault:
        raise MalformedError(f"JSON: {fault}") from fault
    return data


def speaks(message: Any) -> bool:
    return (
        isinstance(message, dict) and "role" in message and (message["role"] != "user" or bool(message.get("content")))
    )


def check_body(kind: str, body: Any) -> None:
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not body["model"]:
        raise MalformedError("no model")
    if not body.get(SURFACES[kind]):
        raise MalformedError(f"no {SURFACES[kind]}")
    if kind == "chat/completions" and not all(speaks(message) for message in body["messages"]):
        raise MalformedError("a message without role or content")
    if body.get("stream_options") and not body.get("stream"):
        raise MalformedError("stream_options without stream")
