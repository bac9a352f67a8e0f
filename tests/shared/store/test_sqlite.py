"""One file: it survives restarts, serves several processes, and says so when it cannot."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from functools import partial
from pathlib import Path

import pytest

from shared import books
from shared.errors import StoreUnavailable
from shared.store.base import Admitted, Store, VirtualKey
from shared.store.sqlite import CLEANING, SQLiteStore
from tests.server import ROOT
from tests.shared.store.callers import DAY, KEPT, NOW, ask, at_once, new_key, open_one, read, row

OTHER_PROCESS = """
import asyncio, sys
from shared.store.base import Admitted, Ask, Hold
from shared.store.sqlite import SQLiteStore

async def main(path, key_id, key_hash, name, now):
    store = SQLiteStore(path)
    asks = [Ask(key_id, key_hash, f"{name}{number}", Hold(1, 1, int(now), 60), "auto") for number in range(80)]
    answers = [await store.admit(ask) for ask in asks]
    await store.close()
    print(*(answer.key.turns["auto"] for answer in answers if isinstance(answer, Admitted)))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_key_and_its_open_request_survive_a_restart(tmp_path: Path):
    path = str(tmp_path / "store.db")
    before = SQLiteStore(path)
    key = await new_key(before, rpm=5)
    asked = await open_one(before, key)
    await before.close()
    after = SQLiteStore(path)
    assert list((await read(after, key)).open) == [asked.request_id]
    await after.close()


async def test_a_closed_store_opens_again_when_it_is_asked(sqlite: Store):
    key = await new_key(sqlite)
    await sqlite.close()
    await sqlite.close()
    assert await sqlite.key(key.id) == key


async def test_two_processes_share_one_limit_and_take_turns(sqlite: Store, tmp_path: Path):
    key = await new_key(sqlite, rpm=100, concurrency=1000)
    arguments = ["-c", OTHER_PROCESS, str(tmp_path / "store.db"), key.id, key.hash]
    others = [
        await asyncio.create_subprocess_exec(
            sys.executable, *arguments, name, str(NOW), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        for name in ("a", "b")
    ]
    turns = [int(turn) for other in others for turn in (await other.communicate())[0].split()]
    assert sorted(turns) == list(range(1, 101))
    assert (await read(sqlite, key)).left("r", NOW // 60) == 0


async def test_many_stores_may_open_a_new_file_at_once(tmp_path: Path):
    stores = [SQLiteStore(str(tmp_path / "new.db")) for _ in range(8)]
    keys = [VirtualKey(f"key{number}", "h", "n") for number in range(8)]
    assert all(await at_once(partial(store.add_key, key) for store, key in zip(stores, keys, strict=True)))
    for store in stores:
        await store.close()


async def test_a_file_that_stays_locked_is_a_store_fault_and_heals(sqlite: Store, tmp_path: Path):
    key = await new_key(sqlite)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable) as caught:
        await sqlite.admit(ask(key))
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert await sqlite.key(key.id) == key  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    assert isinstance(await sqlite.admit(ask(key)), Admitted)


async def test_a_file_that_is_no_database_is_a_store_fault(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("Dear store, " * 100)
    for name in ("letter.txt", "no/such/folder/store.db"):
        store = SQLiteStore(str(tmp_path / name))
        with pytest.raises(StoreUnavailable):
            await store.key("any")
        await store.close()


async def test_expired_notes_are_deleted_in_time(sqlite: Store, tmp_path: Path):
    for number in range(CLEANING):
        await sqlite.write_note(f"n{number}", b"", KEPT if number % 2 else 1, NOW)
    await sqlite.write_note("late", b"", 1, NOW)
    db = sqlite3.connect(tmp_path / "store.db")
    left = db.execute("SELECT expires, count(*) FROM notes GROUP BY expires ORDER BY expires").fetchall()
    assert left == [(1, 1), (KEPT, CLEANING // 2)]
    db.close()


async def test_expired_records_are_deleted_in_time(sqlite: Store, tmp_path: Path):
    key = await new_key(sqlite)
    for number in range(CLEANING):
        await sqlite.record(row(ask(key), 1), KEPT if number % 2 else 1)
    db = sqlite3.connect(tmp_path / "store.db")
    left = "SELECT count(*) FROM generations WHERE expires = 1"
    assert db.execute(left).fetchone() == (CLEANING // 2,), "not before their day is summed up"
    await books.roll_up(sqlite, key, NOW + 3 * DAY)
    for _ in range(CLEANING):
        await sqlite.record(row(ask(key, now=NOW + DAY), 1), KEPT)
    assert db.execute(left).fetchone() == (0,)
    assert db.execute("SELECT count(*) FROM generations WHERE expires > 1").fetchone() == (CLEANING + CLEANING // 2,)
    db.close()
