"""`make run`: the same app under uvicorn, with keys made at the first start and everything kept in one SQLite file."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from dotenv import load_dotenv
from fastapi import FastAPI
from pydantic import ValidationError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from functions.app import create_app
from functions.deps import Services
from shared import books
from shared.errors import InvalidRequest, StoreUnavailable
from shared.keys import mint, time_ordered
from shared.settings import Settings
from shared.store.base import VirtualKey
from shared.telemetry import logger

FOLDER = Path(".lightrail")
"""Pepper, admin key and user key of this checkout; ignored by git, readable by its owner only."""
GRACEFUL = 10
"""Seconds that streams in flight have to end by themselves; then each ends with an error event."""
BOOKS_EVERY = 600
"""Seconds between two looks at what nobody settled."""


def kept(name: str, make: str) -> tuple[str, bool]:
    """The content of a file in `FOLDER`, and whether it was made just now; raises ValueError."""
    path = FOLDER / name
    try:
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return path.read_text().strip(), False
        with os.fdopen(descriptor, "w") as file:
            file.write(make + "\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be kept: {error.strerror}") from error
    return make, True


def pepper() -> str:
    return kept("pepper", secrets.token_urlsafe(32))[0]


def main() -> int:
    load_dotenv(".env")
    try:
        settings = Settings.read(os.environ)
        if settings.lr_key_pepper is None:
            settings = settings.model_copy(update={"lr_key_pepper": pepper()})
        app = create_app(settings, demo="--demo" in sys.argv)
        services: Services = app.state.services
        if not services.catalog.on():
            raise ValueError("\n  ".join(["no provider is on.", *why_off(services)]))
        try_to_listen(settings)
        keys = asyncio.run(first_keys(services))
    except ValueError as error:
        print(f"Lightrail cannot start: {told(error)}", file=sys.stderr)
        return 2
    Server(app, settings, keys).run()
    return 0


def try_to_listen(settings: Settings) -> None:
    """Before any key is made or shown; raises ValueError.

    The server opens its own sockets: on one it is given asyncio may set no TCP_NODELAY, at 40 ms an answer."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            advice = "End what listens there, or choose another: PORT=8081 make run"
            raise ValueError(f"PORT: {settings.port} is in use. {advice}") from None
        raise ValueError(f"HOST, PORT: cannot listen on {settings.host} {settings.port}: {error.strerror}") from None


def told(error: ValueError) -> str:
    """A settings error by its variable's name; never its value."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors(include_input=False))
    return str(error)


async def first_keys(services: Services) -> dict[str, tuple[str, bool]]:
    """An admin and a user key, made once, where no LR_ADMIN_KEY is set; shown whole at that time only.

    Raises ValueError where the store or the folder cannot be had."""
    shown: dict[str, tuple[str, bool]] = {}
    try:
        await services.keys.ensure_admin()
        for role in () if services.settings.lr_admin_key else ("admin", "user"):
            key, new = kept(f"{role}-key", mint()[1])
            await services.keys.keep(VirtualKey("", "", f"first {role} key", role), key)
            shown[role] = key, new
    except StoreUnavailable as trouble:
        raise ValueError(f"DATABASE_URL: the store does not answer: {trouble.__cause__ or trouble}") from trouble
    await services.store.close()  # it opens again when next asked, within the server's own loop
    return shown


def why_off(services: Services) -> list[str]:
    catalog = services.catalog
    shipped = [provider for provider in catalog.providers.values() if provider.name != "demo"]
    return [f"{provider.title}: {why}" for provider in shipped if (why := catalog.why_off(provider.name))]


class Wire(HttpToolsProtocol):
    """httptools, not h11, which lets a request with both framings through; refuses what is no HTTP in our own shape."""

    def send_400_response(self, msg: str) -> None:
        body = orjson.dumps(InvalidRequest(msg).body())
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"cache-control: no-store\r\nx-request-id: req-{time_ordered(time.time())}\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


async def keep_books(services: Services) -> None:
    """What the `sweep` function does on AWS: settle what crashed requests left open, sum up days before they expire."""
    ttl = services.settings.generation_ttl_days
    while True:
        now = int(time.time())
        try:
            async for key in services.store.keys():
                await services.limits.sweep(key, now)
                await books.roll_up(services.store, key.id, now, ttl)
        except StoreUnavailable as trouble:
            logger.warning("books.postponed", extra={"reason": str(trouble)})
        await asyncio.sleep(BOOKS_EVERY)


class Server(uvicorn.Server):
    """Says where it serves, and with which keys, once it does. `grace`: see `GRACEFUL`."""

    def __init__(
        self, app: FastAPI, settings: Settings, keys: dict[str, tuple[str, bool]], grace: int = GRACEFUL
    ) -> None:
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
        self._keys = keys
        self._books: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(self._banner(f"http://{f'[{host}]' if ':' in host else host}:{port}"), flush=True)
            self._books = asyncio.ensure_future(keep_books(self._services))

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        if self._books:
            self._books.cancel()
        await super().shutdown(sockets)

    def _banner(self, address: str) -> str:
        catalog, lines = self._services.catalog, ["", f"Lightrail serves on {address}", ""]
        for role, (key, new) in self._keys.items():
            where = FOLDER / f"{role}-key"
            shown, once = (key, "shown this once; ") if new else (f"{key[:6]}***", "")
            lines.append(f"  {role} key   {shown}   ({once}kept in {where})")
        if self._services.settings.lr_admin_key:
            lines.append("  admin key  LR_ADMIN_KEY; make user keys with POST /admin/keys")
        on = catalog.on()
        lines += ["", "  on   " + ", ".join(f"{provider.title} ({provider.name}/…)" for provider in on)]
        lines += [f"  off  {line}" for line in why_off(self._services)]
        model = f"{on[0].name}/{on[0].default_model}" if on and on[0].default_model else "<provider>/<model>"
        key = f"$(cat {FOLDER / 'user-key'})" if self._keys else "$LR_ADMIN_KEY"
        lines += [
            "",
            f'  curl -N {address}/v1/chat/completions -H "Authorization: Bearer {key}" \\',
            "    -H 'Content-Type: application/json' \\",
            f'    -d \'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}\'',
            "",
        ]
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
