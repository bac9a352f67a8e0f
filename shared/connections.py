"""Connections to one provider: straight on asyncio, and able to tell one that died in the pool from one that broke.

httpcore's own streams go through anyio, at nearly twice the CPU a read, and do not say whether any of an answer came.
"""

# ruff: noqa: ASYNC109 the timeouts are in httpcore's signatures
from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

IDLE_SECONDS = 4.0
"""How long a connection may wait in the pool: less than servers do, of which uvicorn's 5 s are the shortest."""
MAX_UNREAD = 256 * 1024
"""Bytes that may wait to be read, give or take one read of the loop; then the provider has to."""
HAPPY_EYEBALLS = 0.25
"""Seconds after which a host's next address is tried, too: https://datatracker.ietf.org/doc/html/rfc8305#section-5."""


class UnknownHost(httpcore.ConnectError):
    """The name has no address."""


class TLSFailed(httpcore.ConnectError):
    """The certificate is not to be trusted, or there is no TLS."""


class Unanswered(httpcore.ReadError):
    """The connection ended before a byte of answer; `reused`: after it had served, so it may have died in the pool."""

    def __init__(self, *, reused: bool) -> None:
        super().__init__("The connection ended before an answer.")
        self.reused = reused


class Pool(httpx.AsyncHTTPTransport):
    """The connections to one provider, `size` at most; raises httpx's errors, caused by httpcore's or ours."""

    def __init__(self, context: ssl.SSLContext, proxy: str | None, size: int) -> None:
        limits = httpx.Limits(max_connections=size, keepalive_expiry=IDLE_SECONDS)
        super().__init__(verify=context, limits=limits, proxy=proxy, trust_env=False)
        self._sockets = Sockets()
        self._pool._network_backend = self._sockets  # pyright: ignore[reportPrivateUsage] no public way in httpx 0.28

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it, and, where a kept connection proves dead, once more on a new one: `retried_stale` in extensions."""
        try:
            return await super().handle_async_request(request)
        except httpx.ReadError as error:
            if not (isinstance(error.__cause__, Unanswered) and error.__cause__.reused):
                raise
        self._sockets.trusted_since = time.time()  # what else is idle died with it
        request.extensions["retried_stale"] = True
        return await super().handle_async_request(request)


class Sockets(httpcore.AsyncNetworkBackend):
    """Opens connections; those that were idle already at `trusted_since` (epoch seconds) are not used again."""

    trusted_since = 0.0

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> Connection:
        """`timeout` is for everything: the name, the connection, and TLS if that follows."""
        loop = asyncio.get_running_loop()
        connection = Connection(self, None if timeout is None else loop.time() + timeout)
        try:
            async with asyncio.timeout(timeout):
                await loop.create_connection(lambda: connection, host, port, happy_eyeballs_delay=HAPPY_EYEBALLS)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except (socket.gaierror, UnicodeError) as error:
            raise UnknownHost(str(error)) from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        return connection


class Connection(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One socket, which nobody writes to or reads from without a whole request's own time limit."""

    _transport: asyncio.Transport

    def __init__(self, sockets: Sockets, connected_by: float | None) -> None:
        self._sockets = sockets
        self._connected_by = connected_by
        self._unread: list[bytes] = []
        self._size = 0
        self._ended = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._used = 0.0
        self._served = False
        self._asked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread.append(data)
        self._size += len(data)
        if self._size > MAX_UNREAD:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended, self._error = True, exc
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """All that came, once something has; nothing at the end."""
        if not self._unread and not self._ended:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._unread:
            data = self._unread[0] if len(self._unread) == 1 else b"".join(self._unread)
            self._unread.clear()
            if self._size > MAX_UNREAD:
                self._transport.resume_reading()
            self._size, self._used, self._served, self._asked = 0, time.time(), True, False
            return data
        if self._asked:
            raise Unanswered(reused=self._served) from self._error
        if self._error is not None:
            raise httpcore.ReadError(str(self._error)) from self._error
        return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """What cannot be sent is noticed by whoever reads the answer."""
        self._asked = True
        self._transport.write(buffer)

    async def aclose(self) -> None:
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(self._connected_by):
                transport = await loop.start_tls(self._transport, self, ssl_context, server_hostname=server_hostname)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise TLSFailed(str(error)) from error
        if transport is None:
            raise TLSFailed("The connection ended before TLS began.")
        self._transport, self._served = transport, False
        return self

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`, which httpcore asks of an idle connection, says that it is not to be used again.

        Its own clock stands still while a laptop sleeps or a function is frozen."""
        if info != "is_readable":
            return self._transport.get_extra_info(info)
        oldest = max(self._sockets.trusted_since, time.time() - IDLE_SECONDS)
        return self._ended or bool(self._unread) or self._used < oldest
