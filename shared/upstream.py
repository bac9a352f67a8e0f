"""The one place that calls providers: httpx, timeouts, capped reading, faults to ProviderError."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import import_module
from math import inf
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import Any, Literal, cast

import httpx
import orjson

from shared import sse
from shared.assembly import assembled
from shared.catalog import Deployment
from shared.connections import Pool, TLSFailed, Unanswered, UnknownHost
from shared.errors import ProviderError
from shared.providers.dialect import END, Dialect, Outgoing, Piece
from shared.providers.echo import EchoTransport
from shared.schema import JSON, Call, too_deep
from shared.settings import Settings
from shared.telemetry import REDACTED, logger

MAX_BODY = 16 * 1024 * 1024
MAX_ERROR_BODY = 64 * 1024
MAX_CONNECTIONS = 1000
"""To one provider: what one of them holds up leaves the others alone."""
TRAILER_SECONDS = 5.0
"""What a stream may still take, after its finish reason, to send usage and `[DONE]`."""
DRAIN_SECONDS = 0.25
"""What it may take, after `[DONE]`, to end the body; else the connection is not reused."""
LOOK_SECONDS = 0.25
"""How often a timer looks at most whether its time, which may have come nearer, is up."""
COLD = 10.0
"""Seconds to the first content after which a model of the deployer's own is taken to have been started for it."""
MAX_BAD_EVENTS = 3
MAX_HOPS = 5
MAX_DEPTH = 200
ENCODINGS = frozenset({"gzip", "x-gzip", "deflate"})
MAX_ENCODINGS = 2
INFLATED = 64 * 1024
"""Bytes that are decompressed at a time."""

HEADERS = {"user-agent": "lightrail", "accept": "*/*", "accept-encoding": "identity"}
CONTENT = ("content", "reasoning_content", "tool_calls", "refusal", "function_call", "audio")
FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
"""How a stream of server-sent events begins."""
ALARMING = frozenset({"tls", "auth", "money", "model_gone"})
"""Faults that last until somebody mends the account or the configuration."""


@dataclass(slots=True)
class Notes:
    """What the record of an attempt tells of the way there and back, beside its error.

    `retried_stale`: a kept connection was dead, and the request went out once more on a new one. `bad_events`: how
    many events of the stream could not be read, and were dropped. `cold_start_ms`: until a model on a machine of the
    deployer's own began to answer, where that was so long that it had to be loaded first."""

    retried_stale: bool = False
    bad_events: int = 0
    cold_start_ms: int = 0


class Upstream:
    """Sends for all dialects alike. Time is the event loop's; `deadline` is when the whole request must be over.

    Requests go to httpx's transport itself: its client would keep cookies, follow the environment and look for
    redirects, and costs half as much again."""

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._max_connections = max_connections
        self._demo = EchoTransport()
        self._pools: dict[tuple[str, bytes], Pool] = {}
        timeouts = {"connect": settings.connect_timeout, "pool": settings.connect_timeout, "read": None, "write": None}
        self._extensions = {"timeout": timeouts}  # reading and writing are timed by `complete` and `stream`

    def _pool(self, url: httpx.URL) -> httpx.AsyncBaseTransport:
        if url.scheme == "demo":
            return self._demo
        if self._transport is not None:
            return self._transport
        origin = url.scheme, url.netloc
        if origin not in self._pools:
            context = self._context if url.scheme == "https" else SSLContext(PROTOCOL_TLS_CLIENT)  # trusts nobody
            self._pools[origin] = Pool(context, self._settings.proxy, self._max_connections)
        return self._pools[origin]

    @cached_property
    def _context(self) -> SSLContext:
        """Made at first use: it reads a hundred certificates."""
        return httpx.create_ssl_context(trust_env=False)

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()
        self._pools.clear()

    def prepare(self, call: Call, to: Deployment, max_tokens: int | None = None) -> Outgoing:
        """What would be sent; raises UnsupportedParameter for what this deployment cannot be asked."""
        return dialect_of(to).request(call, to, max_tokens)

    async def complete(
        self, call: Call, to: Deployment, outgoing: Outgoing, deadline: float, notes: Notes | None = None
    ) -> Piece:
        """A whole answer, in OpenAI's shape; raises ProviderError."""
        notes = notes or Notes()
        async with _faults(to), Timer(deadline), self._send(to, outgoing, notes) as response:
            await _check(response, to)
            body = _decoded(response)
            async for start in body:
                match _kind(start, response):
                    case "blank":
                        continue
                    case "json":
                        return dialect_of(to).completion(call, to, _json(await _read(body, MAX_BODY, start)))
                    case "events":
                        return await _gathered(_Reader(call, to, notes), start, body)
            raise _empty()

    async def stream(
        self, call: Call, to: Deployment, outgoing: Outgoing, deadline: float, notes: Notes | None = None
    ) -> AsyncGenerator[list[Piece], None]:
        """What each read of the stream brought, beginning with its first content; raises ProviderError.

        An empty list is the provider's own `[DONE]`; after it the body is only read to its end, so that the connection
        may be reused. A stream may end without one: only finish reasons tell a whole answer. Must be iterated by one
        task, whose cancellation is how time runs out."""
        notes = notes or Notes()
        patience, asked = to.provider.first_content_for(to.model, self._settings), _now()
        async with (
            _faults(to),
            Timer(deadline, "first_content_timeout", patience) as timer,
            self._send(to, outgoing, notes) as response,
        ):
            await _check(response, to)
            gap = to.provider.gap_timeout or self._settings.gap_timeout
            reader, held, opened, begun = _Reader(call, to, notes), list[Piece](), False, False
            body = _decoded(response)
            async for data in body:
                if not opened:
                    kind = _kind(data, response)
                    if kind == "json":
                        whole = dialect_of(to).completion(call, to, _json(await _read(body, MAX_BODY, data)))
                        timer.rest()
                        yield [_as_chunk(call, whole)]
                        yield []
                        return
                    opened = kind == "events"
                if reader.done:
                    continue
                pieces = reader.feed(data)
                if not begun:
                    held += pieces
                    if not any(map(has_content, held)):
                        if reader.done:
                            raise _empty()
                        continue
                    begun, pieces = True, held
                    if to.provider.starts_cold and _now() - asked >= COLD:
                        notes.cold_start_ms = round((_now() - asked) * 1000)
                timer.rest()  # the caller's own slowness is not the provider's
                if pieces:
                    yield pieces
                if reader.done:
                    yield []
                timer.wait("gap_timeout", DRAIN_SECONDS if reader.done else TRAILER_SECONDS if reader.finished else gap)
            if not opened:
                raise _empty()
            reader.end()

    @asynccontextmanager
    async def _send(self, to: Deployment, outgoing: Outgoing, notes: Notes) -> AsyncGenerator[httpx.Response]:
        url = _url(outgoing.url)
        headers = {**HEADERS, **outgoing.headers}
        if outgoing.region is not None:
            headers |= await _signed(outgoing)
        request = httpx.Request("POST", url, headers=headers, content=outgoing.content, extensions=self._extensions)
        asked = _now()
        try:
            response = await self._pool(url).handle_async_request(request)
        finally:
            notes.retried_stale = "retried_stale" in request.extensions
        if to.provider.answers_elsewhere and response.status_code == 303:
            response = await self._fetched(url, headers, response)
            notes.cold_start_ms = round((_now() - asked) * 1000)  # it was long enough to be sent elsewhere
        try:
            yield response
        finally:
            await response.aclose()

    async def _fetched(self, url: httpx.URL, headers: dict[str, str], response: httpx.Response) -> httpx.Response:
        """The late answer, from where the provider says that it will be: our key goes to no other host.

        https://modal.com/docs/guide/webhook-timeouts: after 150 s, and after every further 150 s."""
        for _ in range(MAX_HOPS):
            if response.status_code != 303 or not (onward := _same_host(url, response.headers.get("location", ""))):
                break
            await response.aclose()
            request = httpx.Request("GET", onward, headers=headers, extensions=self._extensions)
            response = await self._pool(url).handle_async_request(request)
        return response


def _now() -> float:
    return asyncio.get_running_loop().time()


def _same_host(url: httpx.URL, location: str) -> httpx.URL | None:
    try:
        onward = url.join(location)
    except httpx.InvalidURL:
        return None
    return onward if (onward.scheme, onward.netloc) == (url.scheme, url.netloc) else None


async def _signed(outgoing: Outgoing) -> dict[str, str]:
    from shared.providers.signature import signed  # botocore: a cold start pays for it only where somebody signs

    return await signed(outgoing)


@lru_cache(1024)
def _url(text: str) -> httpx.URL:
    """Parsed once. Bounded: some dialects' paths hold the model that the caller named."""
    return httpx.URL(text)


def without(secret: str, text: str) -> str:
    """The text without the secret, also where only the beginning of it was left at a cut."""
    told = next((length for length in range(len(secret), 7, -1) if secret[:length] in text), 0)
    return text.replace(secret[:told], REDACTED) if told else text


def _keyless(to: Deployment, text: str) -> str:
    key = to.provider.api_key
    return text if key is None else without(key.get_secret_value(), text)


class Timer:
    """Cancels its block, as ProviderError, once nothing came for as long as was to be waited, or at the deadline.

    As `asyncio.timeout`, but to wait anew costs an assignment, not a new timer: it is done for every chunk."""

    def __init__(self, deadline: float, fault: str = "total_timeout", seconds: float = inf) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline
        self._fired = False
        self.wait(fault, seconds)

    def wait(self, fault: str, seconds: float) -> None:
        """Something came: for the next thing wait so long; `fault` says what it is if it does not come."""
        due = self._loop.time() + seconds
        self._due, self._fault = (due, fault) if due < self._deadline else (self._deadline, "total_timeout")

    def rest(self) -> None:
        """Not waiting: whoever is at work now is not to be cancelled."""
        self._due = inf

    async def __aenter__(self) -> Timer:
        if self._deadline <= self._loop.time():
            raise ProviderError("total_timeout", "There was no time left to ask the provider.")
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._look()
        return self

    def _look(self) -> None:
        now = self._loop.time()
        if self._due <= now:
            self._fired = True
            self._task.cancel()
        else:
            self._handle = self._loop.call_at(min(self._due, now + LOOK_SECONDS), self._look)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handle.cancel()
        if self._fired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise ProviderError(self._fault, "The provider did not answer in time.", ambiguous=True)


def dialect_of(to: Deployment) -> Dialect:
    return _dialect(to.provider.dialect)


@cache
def _dialect(name: str) -> Dialect:
    """Imported when first asked for: a cold start pays for the dialects that it speaks."""
    return import_module(f"shared.providers.{name}").DIALECT


def has_content(piece: Piece) -> bool:
    """Whether the caller would see something: the border past which nobody else may answer."""
    for choice in piece.body.get("choices", ()):
        delta = choice.get("delta")
        if choice.get("finish_reason") or choice.get("text") or (delta and any(delta.get(name) for name in CONTENT)):
            return True
    return False


class _Reader:
    """The bytes of one stream to pieces; drops what is no event, but not many of them, and not at the end."""

    def __init__(self, call: Call, to: Deployment, notes: Notes) -> None:
        dialect = dialect_of(to)
        self._decoder = dialect.decoder()
        self._translate = dialect.stream(call, to)
        self._notes = notes
        self._bad = 0
        self.done = False
        self._unfinished = call.choices

    def feed(self, data: bytes) -> list[Piece]:
        pieces: list[Piece] = []
        for name, text in self._decoder.feed(data):
            if text.strip() == b"[DONE]":
                self.done = True  # whatever still comes is no part of this answer
                break
            event = _event(text)
            if event is None:
                self._bad += 1
                self._notes.bad_events += 1
                if self._bad > MAX_BAD_EVENTS:
                    raise ProviderError("protocol", "The provider's stream could not be read.", ambiguous=True)
                continue
            self._bad = 0
            pieces += self._translate(name, event)
            if pieces and pieces[-1] is END:
                pieces.pop()
                self.done = True
                break
        for body, _ in pieces:
            for choice in body.get("choices", ()):
                self._unfinished -= bool(choice.get("finish_reason"))
        return pieces

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason: only usage can still come."""
        return self._unfinished <= 0

    def end(self) -> None:
        if self._bad and not self.finished:
            raise ProviderError("protocol", "The provider's stream ended in something unreadable.", ambiguous=True)


def _event(text: bytes) -> JSON | None:
    try:
        event = orjson.loads(text)
    except orjson.JSONDecodeError:
        event = _mended(text)
    if not isinstance(event, dict):
        return None
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and too_deep(event, MAX_DEPTH):
        return None  # orjson reads more than it can write
    return cast("JSON", event)


def _mended(text: bytes) -> Any:
    """What is JSON but for a byte order mark or characters that are none, such as half an emoji: these are U+FFFD."""
    try:
        loose = json.dumps(json.loads(text.decode("utf-8-sig", "replace")), ensure_ascii=False)
        return orjson.loads(loose.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        return None


def _as_chunk(call: Call, whole: Piece) -> Piece:
    """A whole answer, sent where a stream was asked for, as its one chunk."""
    body = dict(whole.body)
    if call.surface == "chat":
        body["choices"] = [
            {**{k: v for k, v in choice.items() if k != "message"}, "delta": _delta(choice["message"])}
            for choice in body["choices"]
        ]
    return Piece(body, whole.usage)


def _delta(message: JSON) -> JSON:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]} if calls else message


async def _gathered(reader: _Reader, start: bytes, body: AsyncGenerator[bytes]) -> Piece:
    """A stream, sent where a whole answer was asked for, put together."""
    pieces, size = reader.feed(start), len(start)
    while not reader.done and (data := await anext(body, b"")):
        size += len(data)
        if size > MAX_BODY:
            raise _too_large()
        pieces += reader.feed(data)
    reader.end()
    answer = assembled(chunk for chunk, _ in pieces)
    if not (reader.done or reader.finished) or not all(choice.get("finish_reason") for choice in answer["choices"]):
        raise ProviderError("disconnected", "The provider's stream ended before its answer.", ambiguous=True)
    if not answer["choices"]:
        raise _empty()
    return Piece(answer, next((usage for _, usage in reversed(pieces) if usage), None))


async def _check(response: httpx.Response, to: Deployment) -> None:
    """Raise what a status or content type other than an answer's means."""
    status = response.status_code
    if status == 200:
        if _content_type(response).startswith("text/html"):
            raise ProviderError("content_type", "The provider answered with a web page.", status=status)
    elif status < 300:
        raise ProviderError("empty", f"The provider answered with status {status}.", status=status, ambiguous=True)
    elif status < 400:
        host = _keyless(to, _host(response.headers.get("location")))
        logger.error("upstream.redirect", extra={"deployment": to.id, "host": host})
        message = "The provider answered with a redirect, which is never followed."
        raise ProviderError("redirect", message, status=status)
    else:
        content = await _read(_decoded(response), MAX_ERROR_BODY, cut=True)
        raise dialect_of(to).failure(status, response.headers, content)


def _host(location: str | None) -> str:
    """Where a redirect leads, without whatever else its URL says."""
    found = re.match(r"(?:[a-zA-Z][\w+.-]*:)?//(?:[^/?#]*@)?([^/?#]{1,255})", location or "")
    return found[1] if found else ""


def _content_type(response: httpx.Response) -> str:
    return response.headers.get("content-type", "").lower()


def _kind(start: bytes, response: httpx.Response) -> Literal["blank", "json", "events"]:
    """By how the body begins: the content type is often wrong. Raises ProviderError for text that is neither."""
    text, told = start.removeprefix(sse.BOM).lstrip(), _content_type(response)
    if not text:
        return "blank"
    if text.startswith((b"{", b"[")):
        return "json"
    if told.startswith("text/event-stream") or any(text.startswith(each) or each.startswith(text) for each in FIELDS):
        return "events"
    if told.startswith("text/") or text.startswith(b"<"):
        raise ProviderError("content_type", "The provider answered with text that is no answer.", status=200)
    return "json" if told.startswith("application/json") else "events"


def _json(text: bytes) -> JSON:
    body = _event(text.strip())
    if body is None:
        if text.strip() == b"null":
            raise _empty()
        raise ProviderError("protocol", "The provider's answer is not a JSON object.", ambiguous=True)
    return body


async def _read(body: AsyncGenerator[bytes], cap: int, start: bytes = b"", *, cut: bool = False) -> bytes:
    text = bytearray(start)
    async for data in body:
        text += data
        if len(text) > cap:
            break
    if len(text) > cap and not cut:
        raise _too_large()
    return bytes(text[:cap])


def _too_large() -> ProviderError:
    return ProviderError("too_large", "The provider's answer is too large.", ambiguous=True)


def _empty() -> ProviderError:
    return ProviderError("empty", "The provider's answer is empty.", ambiguous=True)


def _decoded(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The body's bytes. `identity` is asked for; gzip and deflate are undone in bounded steps all the same."""
    told = [name.strip() for name in response.headers.get("content-encoding", "").lower().split(",")]
    encodings = [name for name in told if name not in ("", "identity")]
    if len(encodings) > MAX_ENCODINGS or not ENCODINGS.issuperset(encodings):
        raise ProviderError("decode", "The provider's answer has an encoding that was not asked for.")
    body = _raw(response)
    for _ in encodings:
        body = _inflated(body)
    return body


async def _inflated(body: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    inflater, total, begun = zlib.decompressobj(wbits=47), 0, False  # 47: gzip or zlib, whichever its header says
    async for data in body:
        plain = b""
        while data or len(plain) == INFLATED:
            try:
                plain = inflater.decompress(data, INFLATED)
            except zlib.error:
                if begun:
                    raise ProviderError("decode", "The provider's answer could not be decompressed.") from None
                inflater, begun = zlib.decompressobj(wbits=-15), True  # deflate without its header, as some send it
                continue
            begun, total, data = True, total + len(plain), inflater.unconsumed_tail
            if total > MAX_BODY:
                raise _too_large()
            if inflater.unused_data:  # gzip comes in members, one after another
                data, inflater = inflater.unused_data, zlib.decompressobj(wbits=47)
            if plain:
                yield plain


async def _raw(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The body to its end; a connection on which more came than that is not used again.

    httpcore would take what is left over for the answer to the next request, which is another caller's."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    async for data in response.stream:
        yield data
    connection: Any = response.stream
    for step in ("_httpcore_stream", "_stream", "_connection", "_h11_state"):  # no public way in httpx 0.28
        connection = getattr(connection, step, None)
    if connection is not None and connection.trailing_data[0]:
        connection.send_failed()  # httpcore closes what is not in order on both sides


@asynccontextmanager
async def _faults(to: Deployment) -> AsyncGenerator[None]:
    """httpx's exceptions as faults; and no fault's message holds our key, whatever it looks like."""
    try:
        yield
    except (ProviderError, sse.TooLong, httpx.HTTPError, httpx.StreamError) as error:
        fault = error if isinstance(error, ProviderError) else _fault(error)
        fault.message = _keyless(to, fault.message)
        fault.param = fault.param and _keyless(to, fault.param)
        if fault.fault in ALARMING:
            reason = _keyless(to, str(error.__cause__ or fault.message))
            logger.error("upstream.alarm", extra={"deployment": to.id, "fault": fault.fault, "reason": reason})
        if fault is error:
            raise
        raise fault from error


def _fault(error: Exception) -> ProviderError:
    match error.__cause__:
        case UnknownHost():
            return ProviderError("dns", "The provider's name could not be resolved.")
        case TLSFailed():
            return ProviderError("tls", "No safe connection to the provider could be made.")
        case Unanswered():
            message = "The provider closed the connection before it answered."
            return ProviderError("closed_before_headers", message, ambiguous=True)
        case _:
            pass
    match error:
        case sse.TooLong():
            return _too_large()
        case httpx.ConnectTimeout():
            return ProviderError("connect_timeout", "The provider could not be reached in time.")
        case httpx.ConnectError():
            return ProviderError("connect", "The provider could not be reached.")
        case httpx.PoolTimeout():
            return ProviderError("pool_timeout", "Too many requests to this provider are open.")
        case httpx.NetworkError():
            return ProviderError("disconnected", "The provider closed the connection.", ambiguous=True)
        case httpx.RemoteProtocolError() if "without sending complete" in str(error):
            return ProviderError("disconnected", "The provider's answer was cut short.", ambiguous=True)
        case _:
            return ProviderError("protocol", "The provider's answer could not be read.", ambiguous=True)
