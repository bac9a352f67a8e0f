"""The one place that calls providers: httpx, timeouts, capped reading, faults to ProviderError."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
from importlib import import_module
from math import inf
from typing import Any, cast

import httpx
import orjson

from shared import sse
from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers.dialect import END, Dialect, Outgoing, Piece
from shared.providers.echo import EchoTransport
from shared.schema import JSON, Call, too_deep
from shared.settings import Settings
from shared.telemetry import REDACTED

MAX_BODY = 16 * 1024 * 1024
MAX_ERROR_BODY = 64 * 1024
MAX_CONNECTIONS = 1000
IDLE_SECONDS = 4.0
"""How long a connection may wait in the pool: less than servers do, of which uvicorn's 5 s are the shortest."""
TRAILER_SECONDS = 5.0
"""What a stream may still take, after its finish reason, to send usage and `[DONE]`."""
DRAIN_SECONDS = 0.25
"""What it may take, after `[DONE]`, to end the body; else the connection is not reused."""
LOOK_SECONDS = 0.25
"""How often a timer looks at most whether its time, which may have come nearer, is up."""
MAX_BAD_EVENTS = 3
MAX_DEPTH = 200

HEADERS = {"user-agent": "lightrail", "accept": "*/*", "accept-encoding": "identity"}
CONTENT = ("content", "reasoning_content", "tool_calls", "refusal", "function_call", "audio")


class Upstream:
    """Sends for all dialects alike. Time is the event loop's; `deadline` is when the whole request must be over.

    Requests go to httpx's transport itself: its client would keep cookies, follow the environment and look for
    redirects, and costs half as much again."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        self._transport = transport
        self._demo = EchoTransport()
        self._urls: dict[str, httpx.URL] = {}
        timeouts = {"connect": settings.connect_timeout, "pool": settings.connect_timeout, "read": None, "write": None}
        self._extensions = {"timeout": timeouts}  # reading and writing are timed by `complete` and `stream`

    @property
    def transport(self) -> httpx.AsyncBaseTransport:
        """Made at first use: it costs a TLS context."""
        if self._transport is None:
            limits = httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=IDLE_SECONDS)
            self._transport = httpx.AsyncHTTPTransport(limits=limits, proxy=self._settings.proxy, trust_env=False)
        return self._transport

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()

    def prepare(self, call: Call, to: Deployment, max_tokens: int | None = None) -> Outgoing:
        """What would be sent; raises UnsupportedParameter for what this deployment cannot be asked."""
        return dialect_of(to).request(call, to, max_tokens)

    async def complete(self, call: Call, to: Deployment, outgoing: Outgoing, deadline: float) -> Piece:
        """A whole answer, in OpenAI's shape; raises ProviderError."""
        async with _faults(to), Timer(deadline), self._send(outgoing) as response:
            await _check(response, to)
            return dialect_of(to).completion(call, to, await _json(response))

    async def stream(
        self, call: Call, to: Deployment, outgoing: Outgoing, deadline: float
    ) -> AsyncGenerator[list[Piece], None]:
        """What each read of the stream brought, beginning with its first content; raises ProviderError.

        An empty list is the provider's own `[DONE]`; after it the body is only read to its end, so that the connection
        may be reused. A stream may end without one: only finish reasons tell a whole answer. Must be iterated by one
        task, whose cancellation is how time runs out."""
        patience = to.provider.first_content_for(to.model, self._settings)
        async with (
            _faults(to),
            Timer(deadline, "first_content_timeout", patience) as timer,
            self._send(outgoing) as response,
        ):
            await _check(response, to)
            if response.headers.get("content-type", "").startswith("application/json"):
                yield [_as_chunk(call, dialect_of(to).completion(call, to, await _json(response)))]
                return
            reader, held, begun = _Reader(call, to), list[Piece](), False
            gap = to.provider.gap_timeout or self._settings.gap_timeout
            async for data in _decoded(response):
                if reader.done:
                    continue
                pieces = reader.feed(data)
                if not begun:
                    held += pieces
                    if not any(map(has_content, held)):
                        if reader.done:
                            raise ProviderError("empty", "The provider's stream held no answer.", ambiguous=True)
                        continue
                    begun, pieces = True, held
                timer.rest()  # the caller's own slowness is not the provider's
                if pieces:
                    yield pieces
                if reader.done:
                    yield []
                timer.wait("gap_timeout", DRAIN_SECONDS if reader.done else TRAILER_SECONDS if reader.finished else gap)
            reader.end()

    @asynccontextmanager
    async def _send(self, outgoing: Outgoing) -> AsyncGenerator[httpx.Response]:
        url = self._urls.get(outgoing.url)
        if url is None:
            url = self._urls[outgoing.url] = httpx.URL(outgoing.url)
        headers = {**HEADERS, **outgoing.headers}
        request = httpx.Request("POST", url, headers=headers, content=outgoing.content, extensions=self._extensions)
        transport = self._demo if url.scheme == "demo" else self.transport
        response = await transport.handle_async_request(request)
        try:
            yield response
        finally:
            await response.aclose()


def without(secret: str, text: str) -> str:
    """The text without the secret, also where only the beginning of it was left at a cut."""
    told = next((length for length in range(len(secret), 7, -1) if secret[:length] in text), 0)
    return text.replace(secret[:told], REDACTED) if told else text


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

    def __init__(self, call: Call, to: Deployment) -> None:
        dialect = dialect_of(to)
        self._decoder = dialect.decoder()
        self._translate = dialect.stream(call, to)
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
        return None
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and too_deep(event, MAX_DEPTH):
        return None  # orjson reads more than it can write
    return cast("JSON", event) if isinstance(event, dict) else None


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


async def _check(response: httpx.Response, to: Deployment) -> None:
    """Raise what a status or content type other than an answer's means."""
    status = response.status_code
    if 200 < status < 300:
        raise ProviderError("empty", f"The provider answered with status {status}.", status=status, ambiguous=True)
    if status == 200:
        if response.headers.get("content-type", "").startswith("text/html"):
            raise ProviderError("content_type", "The provider answered with a web page.", status=status)
        return
    if 300 <= status < 400:
        raise ProviderError(
            "redirect", "The provider answered with a redirect, which is never followed.", status=status
        )
    raise dialect_of(to).failure(status, response.headers, await _read(response, MAX_ERROR_BODY, cut=True))


async def _json(response: httpx.Response) -> JSON:
    text = await _read(response, MAX_BODY)
    body = _event(text.strip())
    if body is None:
        body = _event(text.decode("utf-8-sig", "replace").encode())
    if body is None:
        kind = "empty" if text.strip() in (b"", b"null") else "protocol"
        raise ProviderError(kind, "The provider's answer is not a JSON object.", ambiguous=True)
    return body


async def _read(response: httpx.Response, cap: int, *, cut: bool = False) -> bytes:
    body = bytearray()
    async for data in _decoded(response):
        body += data
        if len(body) > cap:
            if cut:
                return bytes(body[:cap])
            raise ProviderError("too_large", "The provider's answer is too large.", ambiguous=True)
    return bytes(body)


async def _decoded(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The body's bytes. `identity` is asked for; gzip and deflate are undone in bounded steps all the same."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        async for data in _raw(response):
            yield data
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ProviderError("decode", "The provider's answer has an encoding that was not asked for.")
    inflater, total = zlib.decompressobj(wbits=47), 0  # 47: gzip or zlib, whichever its header says
    async for data in _raw(response):
        while data:
            try:
                plain = inflater.decompress(data, 65536)
            except zlib.error:
                raise ProviderError("decode", "The provider's answer could not be decompressed.") from None
            data, total = inflater.unconsumed_tail, total + len(plain)
            if total > MAX_BODY:
                raise ProviderError("too_large", "The provider's answer is too large.", ambiguous=True)
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
    except ProviderError as error:
        if (key := to.provider.api_key) is not None:
            error.message = without(key.get_secret_value(), error.message)
            error.param = error.param and without(key.get_secret_value(), error.param)
        raise
    except sse.TooLong:
        raise ProviderError("too_large", "The provider's answer is too large.", ambiguous=True) from None
    except httpx.ConnectTimeout as error:
        raise ProviderError("connect_timeout", "The provider could not be reached in time.") from error
    except httpx.ConnectError as error:
        raise ProviderError("connect", "The provider could not be reached.") from error
    except httpx.PoolTimeout as error:
        raise ProviderError("pool_timeout", "Too many requests to this provider are open.") from error
    except (httpx.ReadError, httpx.WriteError, httpx.CloseError) as error:
        raise ProviderError("disconnected", "The provider closed the connection.", ambiguous=True) from error
    except httpx.RemoteProtocolError as error:
        if "without sending a response" in str(error):
            message = "The provider closed the connection before it answered."
            raise ProviderError("closed_before_headers", message, ambiguous=True) from error
        kind = "disconnected" if "closed connection" in str(error) else "protocol"
        raise ProviderError(kind, "The provider's answer was cut short or malformed.", ambiguous=True) from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise ProviderError("protocol", "The provider's answer could not be read.", ambiguous=True) from error
