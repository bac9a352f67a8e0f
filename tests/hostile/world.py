"""Two tenants, their keys and objects, and listeners nobody may call: what the placeholders of the cases stand for."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.server import ADMIN_KEY, PEPPER, PROVIDER_KEY, Server
from tests.upstream import Upstream

MODEL, EMBED_MODEL, FORBIDDEN_MODEL = "openai/gpt-4o-mini", "openai/text-embedding-3-small", "openai/gpt-4o"
SECRET_OF_B = "secret-of-b-7f3k9q"
AMPLE = {"models": [MODEL, EMBED_MODEL], "rpm": 1_000_000, "tpm": 1_000_000_000, "daily_budget_usd": 1000}
PART = 8
"""So many characters of a secret in a row are a leak; the masked form of a key shows fewer, and of its public id."""


@dataclass
class World:
    """`words` are the placeholders; `secrets` must appear nowhere but in the request that carries them."""

    server: Server
    upstream: Upstream
    database: Path
    words: dict[str, str]
    secrets: set[bytes] = field(default_factory=set)
    canary_hits: list[str] = field(default_factory=list)
    read: int = 0

    def key(self, name: str, **fields: Any) -> dict[str, Any]:
        """A key with ample limits but for the given ones; all parts of its secret are watched from now on."""
        made = self.server.key(name=name, **{**AMPLE, **fields})
        self.watch(made["key"].removeprefix("lr-").removeprefix(made["id"]))
        return made

    def watch(self, secret: str) -> None:
        self.secrets |= {secret[at : at + PART].encode() for at in range(len(secret) - PART + 1)}

    def fill(self, text: str) -> str:
        """Known placeholders replaced, unknown ones left."""
        return re.sub(r"\{\{(\w+)\}\}", lambda found: self.words.get(found[1], found[0]), text)

    def leaks(self, text: bytes) -> list[bytes]:
        return [secret for secret in self.secrets if secret in text]

    def new_log(self) -> bytes:
        """What the process printed since the last call."""
        with self.server.log.open("rb") as log:
            log.seek(self.read)
            text = log.read()
        self.read += len(text)
        return text

    def kept(self) -> bytes:
        """Every byte of the database, its write-ahead log included."""
        return b"".join(path.read_bytes() for path in self.database.parent.glob(f"{self.database.name}*"))

    def hosts_called(self) -> set[int]:
        """Ports to which the gateway's process has connections of its own making."""
        connections = psutil.Process(self.server.process.pid).net_connections("inet")
        return {each.raddr.port for each in connections if each.raddr and each.laddr.port != self.server.port}


@asynccontextmanager
async def populated(server: Server, upstream: Upstream, database: Path) -> AsyncIterator[World]:
    """A world with tenants A and B; B has a generation and a conversation that hold `SECRET_OF_B`."""
    world = World(server, upstream, database, {})
    for secret in (ADMIN_KEY, PEPPER, PROVIDER_KEY):
        world.watch(secret)
    async with AsyncExitStack() as stack:
        canary = await stack.enter_async_context(listener(world, None))
        redirect = await stack.enter_async_context(listener(world, f"http://{canary}/latest/meta-data/"))
        made, key_b, deleted = world.key("A"), world.key("B", models=None)["key"], world.key("deleted")
        key = made["key"]
        assert server.ask("DELETE", f"/admin/keys/{deleted['id']}", ADMIN_KEY)[0] in (200, 204)
        expired = world.key("expired", expires_at=int(time.time()) + 1)
        until_expired = time.time() + 1.1
        asked = {
            "model": MODEL,
            "messages": [{"role": "user", "content": SECRET_OF_B}],
            "user": "user-of-b",
            "session_id": "session-of-b",
            "store": True,
        }
        status, generation = await asyncio.to_thread(server.ask, "POST", "/v1/chat/completions", key_b, asked)
        assert status == 200, generation
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "of A"}]}
        status, own = await asyncio.to_thread(server.ask, "POST", "/v1/chat/completions", key, asked)
        assert status == 200, own
        world.words |= {
            "KEY": key,
            "KEY_B": key_b,
            "KEY_ID": made["id"],
            "KEY_HASH": stored_hash(database, made["id"]),
            "KEY_MINUS_LAST": key[:-1],
            "KEY_UPPER": key.upper(),
            "DISABLED_KEY": world.key("disabled", enabled=False)["key"],
            "EXPIRED_KEY": expired["key"],
            "DELETED_KEY": deleted["key"],
            "POOR_KEY": world.key("poor", balance_usd=0.0000001)["key"],
            "ADMIN": ADMIN_KEY,
            "PROVIDER_KEY": PROVIDER_KEY,
            "MODEL": MODEL,
            "MODEL_UPPER": MODEL.upper(),
            "EMBED_MODEL": EMBED_MODEL,
            "FORBIDDEN_MODEL": FORBIDDEN_MODEL,
            "GEN_ID": own["id"],
            "GEN_ID_OF_B": generation["id"],
            "CONV_ID_OF_B": "session-of-b",
            "CURSOR_OF_B": "session-of-b",
            "USER_B": "user-of-b",
            "SECRET_OF_B": SECRET_OF_B,
            "CANARY_HOST": canary,
            "CANARY_REDIRECT_TO_METADATA": redirect,
            "GENERATION": "/v1/generation",
            "HISTORY": "/history",
            "ADMIN_KEYS": "/admin/keys",
            "CHAT_PATH_UPPER": "/V1/CHAT/COMPLETIONS",
        }
        await asyncio.sleep(until_expired - time.time())
        yield world


@asynccontextmanager
async def listener(world: World, target: str | None) -> AsyncIterator[str]:
    """`host:port` of a server that records every hit and redirects to `target`."""

    async def hit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        world.canary_hits.append(target or "canary")
        await reader.read(65536)
        moved = f"302 Found\r\nLocation: {target}" if target else "200 OK"
        writer.write(f"HTTP/1.1 {moved}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        writer.close()

    server = await asyncio.start_server(hit, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def stored_hash(database: Path, key_id: str) -> str:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as store:
        return store.execute("SELECT hash FROM keys WHERE id = ?", (key_id,)).fetchone()[0]
