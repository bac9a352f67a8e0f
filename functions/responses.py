"""How an answer leaves: whole, or as server-sent events; and how a caller who leaves first is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import quote

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from shared import limits, sse
from shared.errors import GatewayError, Overloaded
from shared.exchange import Exchange
from shared.gateway import Gateway
from shared.schema import JSON
from shared.telemetry import logger

LAST_WORDS = 5.0
"""Seconds past a request's own time in which its error event can still be read."""
LONGEST_NAME, LONGEST_LIST = 64, 1000
"""Characters of a dropped parameter's name, and bytes of all of them, in a header; the body has them whole."""
HOLD = 10.0
"""Seconds of silence after which a comment goes out, and with the first one the headers."""


class JSONBytes(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class Listener:
    """While it lasts, a caller who hangs up cancels the current task; `hung_up` tells that from other cancellations."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.hung_up = False

    async def __aenter__(self) -> Listener:
        self._task = asyncio.current_task()
        self._ear = asyncio.ensure_future(self._listen())
        return self

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.hung_up = True
        assert self._task is not None
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._ear.cancel()
        if not self.hung_up:
            return False
        assert self._task is not None
        if kind is None:  # hung up in the very moment of the end: the cancellation is still to come
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        self._task.uncancel()
        return kind is asyncio.CancelledError


def answer_headers(exchange: Exchange, *, known: bool = True) -> dict[str, str]:
    """OpenAI's six `x-ratelimit-*`, and, once that is known, who answered and how often was asked."""
    headers = {
        "x-request-id": exchange.id,
        "x-lightrail-cache": exchange.cache,
        **limits.rate_headers(exchange.key, exchange.hold.start),
    }
    if known:
        provider, model = exchange.answered_by
        headers |= {
            "x-lightrail-provider": provider,
            "x-lightrail-model": model,
            "x-lightrail-attempts": str(len(exchange.attempts)),
        }
        if exchange.dropped:
            headers["x-lightrail-dropped"] = listed(exchange.dropped)
    return headers


def listed(names: Iterable[str]) -> str:
    """Names that callers made up, fit for a header: percent-encoded, and cut where they are long or many."""
    told = ""
    for name in names:
        quoted = quote(name[:LONGEST_NAME], safe="") + ("..." if len(name) > LONGEST_NAME else "")
        if len(told) + len(quoted) > LONGEST_LIST:
            return f"{told}, ..."
        told += f", {quoted}" if told else quoted
    return told


class Events(Protocol):
    """A stream's dialect towards the caller."""

    def of(self, chunks: list[JSON], exchange: Exchange) -> bytes:
        """OpenAI's chunks as they are to be sent; once `exchange.answer.ended`, the end too."""
        ...

    def failure(self, error: GatewayError, exchange: Exchange, *, begun: bool) -> bytes | None:
        """How the stream ends with an error; None: with the error's own status, for nothing has `begun`."""
        ...


class Chunks:
    """OpenAI's own."""

    def of(self, chunks: list[JSON], exchange: Exchange) -> bytes:
        events = b"".join(map(sse.encode, chunks))
        return events + sse.DONE if exchange.answer and exchange.answer.ended else events

    def failure(self, error: GatewayError, exchange: Exchange, *, begun: bool) -> bytes | None:
        if not begun:
            return None
        return sse.encode(exchange.answer.error(error) if exchange.answer else error.body())


class EventStream(Response):
    """A model's answer as it comes. Status and headers wait for the first content, `hold` seconds at most.

    An answer that is kept for whoever asks again is made to its end, whether or not the caller stays."""

    def __init__(
        self, gateway: Gateway, exchange: Exchange, events: Events | None = None, *, hold: float = HOLD
    ) -> None:
        self.background = None
        self.raw_headers = []
        self._gateway = gateway
        self._exchange = exchange
        self._events = events or Chunks()
        self._hold = hold
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._spoke = asyncio.get_running_loop().time()
        beat = asyncio.ensure_future(self._beat())
        exchange = self._exchange
        try:
            ear = Listener(receive if exchange.ticket is None else never)
            async with ear as listener, asyncio.timeout_at(exchange.deadline + LAST_WORDS):
                await self._relay(beat)
            if listener.hung_up:
                exchange.interrupt()
        except TimeoutError:  # the caller does not read: nothing more can be said, and nothing is held for it
            exchange.interrupt()
        except GatewayError as error:
            await self._fail(error)
        except asyncio.CancelledError:  # the server is stopping
            exchange.interrupt()
            await self._fail(stopping())
        except Exception:  # noqa: BLE001 whatever it is, the stream ends with an error event
            logger.exception("unexpected", extra={"id": exchange.id})
            exchange.error = GatewayError("The gateway failed to relay this answer.")
            await self._fail(exchange.error)
        finally:
            beat.cancel()

    async def _relay(self, beat: asyncio.Future[None]) -> None:
        async with aclosing(self._gateway.stream(self._exchange)) as batches:
            async for batch in batches:
                if events := self._events.of(batch, self._exchange):
                    if self._exchange.ticket:
                        self._exchange.ticket.add(events)
                    await self._write(events)
        beat.cancel()
        await self._end()

    async def _fail(self, error: GatewayError) -> None:
        """With its own status where that is still free, else as the last event; after the last one, not at all."""
        exchange = self._exchange
        if not (exchange.answer and exchange.answer.ended):
            events = self._events.failure(error, exchange, begun=self._begun)
            if events is None:
                error.headers = {**answer_headers(exchange), **error.headers}
                raise error
            await self._write(events)
        await self._end()

    async def _beat(self) -> None:
        """Comments keep a silent stream alive; the first one commits to status 200."""
        loop = asyncio.get_running_loop()
        while True:
            silent_until = self._spoke + self._hold
            await asyncio.sleep(max(0.0, silent_until - loop.time()))
            if self._spoke + self._hold <= loop.time():
                self._exchange.committed = True
                await self._write(sse.COMMENT)

    async def _write(self, data: bytes) -> None:
        self._spoke = asyncio.get_running_loop().time()
        if not self._begun:
            self._begun = True
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "x-accel-buffering": "no",
                **answer_headers(self._exchange, known=not self._exchange.committed),
            }
            if self._exchange.ticket:
                self._exchange.ticket.head(200, headers)
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def never() -> Message:
    """What is to be heard of a caller whose leaving changes nothing."""
    return await asyncio.Future()


def stopping() -> Overloaded:
    """What a caller is told whose answer the server's own end cuts short."""
    return Overloaded("The gateway is shutting down; please try again.")
