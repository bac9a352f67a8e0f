"""uvicorn, held to what the gateway promises: strict framing, honest ends, books kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from functions.deps import Services
from shared import books
from shared.errors import InvalidRequest, StoreUnavailable
from shared.keys import time_ordered
from shared.settings import Settings
from shared.telemetry import logger

GRACEFUL = 10
"""Seconds that streams in flight have to end by themselves; then each ends with an error event."""
BOOKS_EVERY = 600
"""Seconds between two looks at what nobody settled."""
LONGEST_PAUSE = 366
"""Days for which a laptop may have been off before its first look; its rows wait so long to be summed up."""
MAX_HEAD = 65536
"""Bytes of a request line and its headers."""


class Wire(HttpToolsProtocol):
    """httptools, not h11, which lets a request with both framings through; refuses what is no HTTP in our own shape."""

    head = 0
    reading_head = True

    def on_message_begin(self) -> None:
        self.head, self.reading_head = 0, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.reading_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self.reading_head:
            if self.head > MAX_HEAD:  # what came before this piece, which may hold a body already
                self.send_400_response("The headers of your request are too large.")
                return
            self.head += len(data)
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        body = orjson.dumps(InvalidRequest(msg).body())
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncache-control: no-store\r\n"
            f"server-timing: gateway;dur=0\r\nx-request-id: req-{time_ordered(time.time())}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


async def keep_books(services: Services) -> None:
    """What the `sweep` function does on AWS: settle what crashed requests left open, sum up days before they expire."""
    days = LONGEST_PAUSE
    while True:
        now = int(time.time())
        try:
            async for key in services.store.keys():
                await services.limits.sweep(key, now)
                await books.roll_up(services.store, key, now, days)
            days = services.settings.generation_ttl_days
        except StoreUnavailable as trouble:
            logger.warning("books.postponed", extra={"reason": str(trouble)})
        await asyncio.sleep(BOOKS_EVERY)


class Server(uvicorn.Server):
    """Calls `ready` with its address once it serves; `grace`: see `GRACEFUL`."""

    def __init__(self, app: FastAPI, settings: Settings, ready: Callable[[str], None], grace: int = GRACEFUL) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=Wire,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=grace,
            )
        )
        self._services: Services = app.state.services
        self._ready = ready
        self._books: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            self._books = asyncio.ensure_future(keep_books(self._services))

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        if self._books:
            self._books.cancel()
        await super().shutdown(sockets)
