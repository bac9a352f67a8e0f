"""`make run`: the same app under uvicorn, with keys made at the first start and everything kept in one SQLite file."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import sys
from pathlib import Path

from dotenv import load_dotenv
from pydantic import ValidationError

from functions.app import create_app
from functions.deps import Services
from functions.server import Server
from shared.errors import StoreUnavailable
from shared.keys import mint
from shared.settings import Settings
from shared.store.base import VirtualKey

FOLDER = Path(".lightrail")
"""Pepper, admin key and user key of this checkout; ignored by git, readable by its owner only."""


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
    Server(app, settings, lambda address: print(banner(services, keys, address), flush=True)).run()
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
    """A user key, and an admin key where no LR_ADMIN_KEY is set, made once; shown whole at that time only.

    Raises ValueError where the store or the folder cannot be had."""
    shown: dict[str, tuple[str, bool]] = {}
    try:
        await services.keys.ensure_admin()
        for role in ("user",) if services.settings.lr_admin_key else ("admin", "user"):
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


def banner(services: Services, keys: dict[str, tuple[str, bool]], address: str) -> str:
    """What the first screen says: keys, providers, and a line to try."""
    catalog, lines = services.catalog, ["", f"Lightrail serves on {address}", ""]
    for role, (key, new) in keys.items():
        where = FOLDER / f"{role}-key"
        shown, once = (key, "shown this once; ") if new else (f"{key[:6]}***", "")
        lines.append(f"  {role + ' key':<11}{shown}   ({once}kept in {where})")
    if services.settings.lr_admin_key:
        lines.append("  admin key  LR_ADMIN_KEY; make user keys with POST /admin/keys")
    on = catalog.on()
    lines += ["", "  on   " + ", ".join(f"{provider.title} ({provider.name}/…)" for provider in on)]
    lines += [f"  off  {line}" for line in why_off(services)]
    model = f"{on[0].name}/{on[0].default_model}" if on and on[0].default_model else "<provider>/<model>"
    key = f"$(cat {FOLDER / 'user-key'})"
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
