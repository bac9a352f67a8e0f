"""The faults that only a whole server shows: callers who leave or do not read (K), and its own sudden death (X2).

The other rows of the table are in tests/shared/test_faults.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared import books
from shared.limits import GRACE, Limits
from shared.store.base import Generation, VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.functions.doors import MODEL, until
from tests.server import ADMIN_KEY, PEPPER, PROVIDER_KEY, Server, serving
from tests.upstream import Exchange, Step, Upstream, chunk, echo, event, head, send, sleep

HELLO: Any = [{"role": "user", "content": "hello"}]
OPENED = send(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
PROMPT, OUTPUT = 150, 600
"""Nano-dollars per token of gpt-4o-mini."""


def said(text: str | None = None, finish: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


@asynccontextmanager
async def asked(server: Server, key: str, **more: Any) -> AsyncIterator[asyncio.StreamReader]:
    """The answer to a streamed request on a connection of its own; who leaves the block hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**20)
    data = json.dumps({"model": MODEL, "messages": HELLO, "stream": True, **more}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: localhost", f"authorization: Bearer {key}"]
    lines += ["content-type: application/json", f"content-length: {len(data)}", "", ""]
    writer.write("\r\n".join(lines).encode() + data)
    try:
        yield reader
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)  # which it takes to close


async def records(server: Server, key_id: str, seconds: float = 5) -> list[Any]:
    """The key's rows of today, once there are any."""
    async with asyncio.timeout(seconds):
        while True:
            page = await asyncio.to_thread(server.ask, "GET", f"/admin/generations?key={key_id}", ADMIN_KEY)
            if page[1]["data"]:
                return page[1]["data"]
            await asyncio.sleep(0.05)


async def key_of(server: Server, key_id: str) -> Any:
    return (await asyncio.to_thread(server.ask, "GET", f"/admin/keys/{key_id}", ADMIN_KEY))[1]


WORDS = 60


@pytest.mark.parametrize("chunks", [1, 50, WORDS], ids=["K1 first", "K1 most", "K1 all but usage"])
async def test_leaving_early_is_not_cheaper_than_what_was_made(server: Server, provider: Upstream, chunks: int) -> None:
    made = await asyncio.to_thread(server.key, balance_usd=5)
    script: list[Step] = [OPENED]
    for _ in range(WORDS):
        script += [chunk(said("word ")), sleep(0.002)]
    provider.next(*script[: 1 + 2 * chunks], *([chunk(said(finish="stop"))] if chunks == WORDS else []), sleep(30))
    async with asked(server, made["key"]) as reader:
        for _ in range(chunks):
            await reader.readuntil(b"data: ")
    await until(lambda: provider.seen[0].closed_after is not None, 2)
    [row] = await records(server, made["id"])
    assert (row["status"], row["tokens"]["source"]) == ("cancelled", "estimated")
    assert row["tokens"]["completion_tokens"] >= chunks
    key = await key_of(server, made["id"])
    assert (key["open_requests"], key["spend_usd"]) == (0, row["cost"]["total_cost"])
    assert key["spend_usd"] * 1e9 >= chunks * OUTPUT + PROMPT


def variables(folder: Path, provider: Upstream, **more: str) -> dict[str, str]:
    return {
        "DATABASE_URL": f"sqlite:///{folder / 'lightrail.db'}",
        "LR_ADMIN_KEY": ADMIN_KEY,
        "LR_KEY_PEPPER": PEPPER,
        "OPENAI_API_KEY": PROVIDER_KEY,
        "OPENAI_BASE_URL": provider.url,
        "PYTHON_DOTENV_DISABLED": "1",
        **more,
    }


async def test_a_caller_who_does_not_read_pauses_the_provider_and_is_cut_in_the_end(
    tmp_path: Path, provider: Upstream
) -> None:
    """K2."""
    sent = 0

    async def flood(exchange: Exchange) -> None:
        nonlocal sent
        while True:
            await chunk(said("x " * 30_000))(exchange)
            sent += 60_000

    provider.next(OPENED, flood)
    environ = variables(tmp_path, provider, TOTAL_TIMEOUT="1")
    with serving([sys.executable, "-m", "functions.local"], environ, tmp_path) as server:
        made = await asyncio.to_thread(server.key)
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        async with asked(server, made["key"]) as reader:
            await reader.readuntil(b"data: ")
            await asyncio.sleep(0.5)  # nobody reads on: a reader's own buffer is full soon
            level = sent
            await asyncio.sleep(0.5)
            assert sent - level < 10 * 2**20, "paused, once all buffers are full"
            assert process.memory_info().rss - before < 64 * 2**20
            [row] = await records(server, made["id"], 10)
            assert row["status"] in ("cancelled", "failed")
            await until(lambda: provider.seen[0].closed_after is not None, 5)
            assert (await key_of(server, made["id"]))["open_requests"] == 0


# Sudden death ------------------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys
from functions.app import create_app
from functions.server import Server
from shared.settings import Settings
from shared.store.sqlite import SQLiteStore

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Dying(SQLiteStore):
    async def admit(self, ask, *more):
        outcome = await super().admit(ask, *more)
        return die() if sys.argv[1] == "admitted" else outcome

    async def record(self, row, *more):
        if sys.argv[1] == "answered":
            die()
        standing = await super().record(row, *more)
        return die() if sys.argv[1] == "recorded" else standing

    async def settle(self, *hold):
        settled = await super().settle(*hold)
        return die() if sys.argv[1] == "settled" else settled

settings = Settings.read(os.environ)
store = Dying(settings.database_url.removeprefix("sqlite:///"))
Server(create_app(settings, store), settings, print).run()
"""
"""The server, with a store beneath which the process dies at a step."""


async def stalls(exchange: Exchange) -> None:
    await chunk(said("hel"))(exchange)
    await asyncio.sleep(30)


async def read(reader: asyncio.StreamReader) -> bytes:
    """To the end, or to the reset."""
    data = b""
    with suppress(ConnectionError):
        while piece := await reader.read(65536):
            data += piece
    return data


STEPS = {
    "admitted": "lost",
    "asked": "lost",
    "streaming": "lost",
    "answered": "lost",
    "recorded": "ok",
    "settled": "ok",
}
"""Where the process dies, and what the record says that is found."""


@pytest.mark.parametrize("step", STEPS)
async def test_the_books_add_up_after_a_sudden_death(tmp_path: Path, provider: Upstream, step: str) -> None:
    """X2."""
    script = {"asked": [sleep(30)], "streaming": [OPENED, stalls]}.get(step, [echo()])
    provider.next(*script)
    environ = variables(tmp_path, provider, TOTAL_TIMEOUT="20")
    with serving([sys.executable, "-c", DYING, step], environ, tmp_path) as server:
        made = await asyncio.to_thread(server.key, balance_usd=5)
        async with asked(server, made["key"]) as reader:
            if step == "streaming":
                await reader.readuntil(b"data: ")
            if step in ("asked", "streaming"):
                await until(lambda: bool(provider.seen))
                os.kill(server.process.pid, signal.SIGKILL)
            assert (b"[DONE]" in await read(reader)) == (step in ("answered", "recorded", "settled"))
        assert await asyncio.to_thread(server.process.wait, 10) == -signal.SIGKILL
    store = SQLiteStore(str(tmp_path / "lightrail.db"))
    key = await standing(store, made["id"])
    holds = list(key.open.values())
    assert len(holds) == (step != "settled")
    later = int(time.time()) + 20 + GRACE + 1
    assert await Limits(store, 7 * 86400).sweep(key, later) == len(holds)
    swept = await standing(store, made["id"])
    [row] = await rows(store, key.id, later)
    assert row.doc["status"] == STEPS[step]
    if row.doc["status"] == "lost":
        assert row.cost == holds[0].money > 0
    assert (dict(swept.open), swept.spent, swept.requests) == ({}, row.cost, 1)
    assert swept.balance + swept.spent == swept.credit == 5 * 10**9
    assert await books.check(store, swept, later) == 0
    assert await Limits(store, 7 * 86400).sweep(key, later) == 0, "found once is settled once"
    assert await standing(store, made["id"]) == swept
    await store.close()


async def standing(store: SQLiteStore, key_id: str) -> VirtualKey:
    key = await store.key(key_id)
    assert key is not None
    return key


async def rows(store: SQLiteStore, key_id: str, now: int) -> list[Generation]:
    days = {now // 86400, int(time.time()) // 86400}
    return [row for day in days for row in await store.generations(key_id, day)]
