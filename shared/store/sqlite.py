"""The embedded store: one SQLite file, which survives restarts and may be shared by several processes."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, TypeVar

import orjson

from shared.errors import StoreUnavailable
from shared.store.base import (
    LAST,
    Admitted,
    Ask,
    Entry,
    Generation,
    Hold,
    KeyChange,
    Message,
    Move,
    Note,
    Refused,
    Rollup,
    Session,
    VirtualKey,
    changed,
    check_size,
    is_own,
    stale,
    title_of,
    verdict,
)

T = TypeVar("T")
Row = tuple[Any, ...]

BUSY_SECONDS, BUSY_STEP = 3.0, 0.005
"""How long to wait for another process's transaction, and between two tries."""
CLEANING, MOST_CLEANED = 100, 1000
"""Every so many records and notes, at most so many expired ones of each are deleted."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, hash TEXT NOT NULL, name TEXT NOT NULL, role TEXT NOT NULL, enabled INTEGER NOT NULL,
    expires_at INTEGER NOT NULL, models TEXT, rpm INTEGER NOT NULL, tpm INTEGER NOT NULL, concurrency INTEGER NOT NULL,
    daily_budget INTEGER NOT NULL, balance INTEGER NOT NULL, credit INTEGER NOT NULL, spent INTEGER NOT NULL,
    requests INTEGER NOT NULL, old_hash TEXT, old_until INTEGER NOT NULL, created_at INTEGER NOT NULL,
    deleted INTEGER NOT NULL, metadata TEXT NOT NULL, windows TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holds (
    key_id TEXT, request_id TEXT, money INTEGER NOT NULL, tokens INTEGER NOT NULL, start INTEGER NOT NULL,
    ttl INTEGER NOT NULL, PRIMARY KEY (key_id, request_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns (
    key_id TEXT, route TEXT, turn INTEGER NOT NULL, PRIMARY KEY (key_id, route)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS generations (
    id TEXT PRIMARY KEY, key_id TEXT NOT NULL, created INTEGER NOT NULL, cost INTEGER NOT NULL, doc BLOB NOT NULL,
    day INTEGER NOT NULL, expires INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS generations_by_day ON generations (key_id, day, id);
CREATE INDEX IF NOT EXISTS generations_by_expiry ON generations (expires);
CREATE TABLE IF NOT EXISTS rollups (
    key_id TEXT, day INTEGER, cost INTEGER NOT NULL, requests INTEGER NOT NULL, groups BLOB NOT NULL,
    upto TEXT NOT NULL, PRIMARY KEY (key_id, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS notes (
    name TEXT PRIMARY KEY, body BLOB NOT NULL, expires INTEGER NOT NULL, version INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS notes_by_expiry ON notes (expires);
CREATE TABLE IF NOT EXISTS messages (
    key_id TEXT, user TEXT, session TEXT, id TEXT, role TEXT NOT NULL, content TEXT NOT NULL, created INTEGER NOT NULL,
    doc BLOB NOT NULL, PRIMARY KEY (key_id, user, session, id)
);
CREATE TABLE IF NOT EXISTS sessions (
    key_id TEXT, user TEXT, session TEXT, updated INTEGER NOT NULL, title TEXT NOT NULL,
    PRIMARY KEY (key_id, user, session)
) WITHOUT ROWID;
"""
COLUMNS = [each.name for each in fields(VirtualKey) if each.name not in ("open", "turns")]
FLAGS, DOCUMENTS = ("enabled", "deleted"), ("models", "metadata", "windows")
READ_KEY = f"SELECT {', '.join(COLUMNS)} FROM keys WHERE id = ?"  # noqa: S608 our own names
PUT_KEY = f"REPLACE INTO keys ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608 the same
READ_GENERATION = "SELECT id, key_id, created, cost, doc FROM generations "
READ_NOTE = "SELECT * FROM notes WHERE name = ?"
CLEAN_GENERATIONS = """DELETE FROM generations WHERE id IN (
    SELECT id FROM generations NATURAL JOIN (SELECT key_id, day, upto FROM rollups)
    WHERE expires <= ? AND id <= upto LIMIT ?)"""
CLEAN_NOTES = "DELETE FROM notes WHERE name IN (SELECT name FROM notes WHERE expires <= ? LIMIT ?)"
PUT_SESSION = """INSERT INTO sessions VALUES (?, ?, ?, ?, ?) ON CONFLICT (key_id, user, session)
    DO UPDATE SET updated = excluded.updated, title = ifnull(nullif(title, ''), excluded.title)"""


class SQLiteStore:
    """Each method is one transaction, done on the spot: a tenth of a millisecond, which a thread would cost thrice.

    The event loop never waits for a lock: what finds the file busy sleeps and begins again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._kept = 0

    async def add_key(self, key: VirtualKey) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            standing = read_key(db, key.id)
            if standing is None:
                put_key(db, key)
            return standing in (None, key)

        return await self._write(work)

    async def key(self, key_id: str) -> VirtualKey | None:
        return await self._read(lambda db: read_key(db, key_id))

    async def keys(self) -> AsyncIterator[VirtualKey]:
        def work(db: sqlite3.Connection) -> list[VirtualKey | None]:
            return [read_key(db, key_id) for (key_id,) in db.execute("SELECT id FROM keys ORDER BY id").fetchall()]

        for key in filter(None, await self._read(work)):
            yield key

    async def change_key(self, key_id: str, change: KeyChange, now: int) -> VirtualKey | None:
        def work(db: sqlite3.Connection) -> VirtualKey | None:
            if key := read_key(db, key_id):
                put_key(db, key := changed(key, change, now))
            return key

        return await self._write(work)

    async def admit(self, ask: Ask) -> Admitted | Refused:
        def work(db: sqlite3.Connection) -> Admitted | Refused:
            key = read_key(db, ask.key_id)
            if said := verdict(key, ask):
                return said
            assert key is not None  # an unknown one is refused
            if ask.turn is not None:
                key = take_turn(db, key, ask.turn)
            return Admitted(make(db, Move.admitting(ask.hold), key, ask.request_id, ask.hold))

        return await self._write(work)

    async def extend(self, key_id: str, request_id: str, old: Hold, new: Hold) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            key, more = read_key(db, key_id), new.money - old.money
            hold = key.open.get(request_id) if key else None
            if key is None or hold != old or min(key.balance, key.left("d", old.day)) < more:
                return hold == new
            make(db, Move.extending(old, new), key, request_id, new)
            return True

        return await self._write(work)

    async def settle(self, key_id: str, request_id: str, hold: Hold, cost: int, tokens: int, now: int) -> bool:
        return await self._close(key_id, request_id, now, lambda hold: Move.settling(hold, cost, tokens, now))

    async def release(self, key_id: str, request_id: str, hold: Hold, now: int) -> bool:
        return await self._close(key_id, request_id, now, lambda hold: Move.releasing(hold, now))

    async def _close(self, key_id: str, request_id: str, now: int, close: Callable[[Hold], Move]) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            key = read_key(db, key_id)
            hold = key.open.get(request_id) if key else None
            if key is None or hold is None:
                return False
            gone = stale(key.windows, now)
            kept = {name: left for name, left in key.windows.items() if name not in gone}
            make(db, close(hold), replace(key, windows=kept), request_id, None)
            return True

        return await self._write(work)

    async def record(self, row: Generation, expires: int) -> Generation:
        def work(db: sqlite3.Connection) -> Generation:
            self._clean(db)
            values = (row.id, row.key_id, row.created, row.cost, orjson.dumps(row.doc), row.day, expires)
            db.execute("INSERT OR IGNORE INTO generations VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            return generation_of(db.execute(READ_GENERATION + "WHERE id = ?", (row.id,)).fetchone())

        return await self._write(work)

    async def generation(self, generation_id: str) -> Generation | None:
        found = (generation_id, int(time.time()))
        row = await self._read(
            lambda db: db.execute(READ_GENERATION + "WHERE id = ? AND expires > ?", found).fetchone()
        )
        return generation_of(row) if row else None

    async def generations(self, key_id: str, day: int, after: str = "", limit: int = 100) -> list[Generation]:
        page = READ_GENERATION + "WHERE key_id = ? AND day = ? AND id > ? ORDER BY id LIMIT ?"
        asked = (key_id, day, after, limit)
        return [generation_of(row) for row in await self._read(lambda db: db.execute(page, asked).fetchall())]

    async def entries(self, key_id: str, day: int, after: str, upto: str, limit: int) -> list[Entry]:
        rows = await self.generations(key_id, day, after, limit)
        return [row.entry for row in rows if row.id <= upto]

    async def roll_up(self, rollup: Rollup, after: str) -> bool:
        values = (rollup.key_id, rollup.day, rollup.cost, rollup.requests, orjson.dumps(rollup.groups), rollup.upto)

        def work(db: sqlite3.Connection) -> bool:
            standing = "SELECT upto FROM rollups WHERE key_id = ? AND day = ?"
            if (db.execute(standing, values[:2]).fetchone() or ("",)) != (after,):
                return False
            db.execute("REPLACE INTO rollups VALUES (?, ?, ?, ?, ?, ?)", values)
            return True

        return await self._write(work)

    async def rollups(self, key_id: str, first_day: int, last_day: int) -> list[Rollup]:
        page = "SELECT * FROM rollups WHERE key_id = ? AND day BETWEEN ? AND ? ORDER BY day"
        rows = await self._read(lambda db: db.execute(page, (key_id, first_day, last_day)).fetchall())
        return [Rollup(*row, groups=tuple(orjson.loads(groups)), upto=upto) for *row, groups, upto in rows]

    async def note(self, name: str) -> Note | None:
        return next(iter(await self.notes([name])), None)

    async def notes(self, names: Sequence[str]) -> list[Note]:
        def work(db: sqlite3.Connection) -> list[Note]:
            found = (read_note(db, name) for name in dict.fromkeys(names))
            return [note for note in found if note and note.expires > time.time()]

        return await self._read(work)

    async def write_note(self, name: str, body: bytes, expires: int, now: int, over: int | None = None) -> bool:
        check_size(body)

        def work(db: sqlite3.Connection) -> bool:
            self._clean(db)
            standing = read_note(db, name)
            version = standing.version if standing and standing.expires > now else 0
            if over is not None and over != version:
                return standing is not None and is_own(standing, body, over)
            values = (name, body, expires, standing.version + 1 if standing else 1)
            db.execute("REPLACE INTO notes VALUES (?, ?, ?, ?)", values)
            return True

        return await self._write(work)

    async def drop_note(self, name: str) -> None:
        await self._write(lambda db: db.execute("DELETE FROM notes WHERE name = ?", (name,)))

    async def say(self, key_id: str, user: str, session: str, messages: Sequence[Message]) -> None:
        def work(db: sqlite3.Connection) -> None:
            for each in (message.kept for message in messages):
                values = (key_id, user, session, each.id, each.role, each.content, each.created, orjson.dumps(each.doc))
                db.execute("REPLACE INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
            updated = max(each.created for each in messages)
            db.execute(PUT_SESSION, (key_id, user, session, updated, title_of(messages)))

        if messages:
            await self._write(work)

    async def said(self, key_id: str, user: str, session: str, limit: int = 50) -> list[Message]:
        page = """SELECT id, role, content, created, doc FROM messages
            WHERE key_id = ? AND user = ? AND session = ? ORDER BY id DESC LIMIT ?"""
        rows = await self._read(lambda db: db.execute(page, (key_id, user, session, limit)).fetchall())
        return [Message(*values, doc=orjson.loads(doc)) for *values, doc in reversed(rows)]

    async def sessions(self, key_id: str, user: str, limit: int = 100) -> list[Session]:
        page = """SELECT session, updated, title FROM sessions
            WHERE key_id = ? AND user = ? ORDER BY updated DESC, session LIMIT ?"""
        rows = await self._read(lambda db: db.execute(page, (key_id, user, limit)).fetchall())
        return [Session(*row) for row in rows]

    async def forget(self, key_id: str, user: str, session: str | None = None) -> int:
        these = (key_id, user, session)

        def work(db: sqlite3.Connection) -> int:
            db.execute("DELETE FROM sessions WHERE key_id = ? AND user = ? AND session = ifnull(?, session)", these)
            gone = db.execute(
                "DELETE FROM messages WHERE key_id = ? AND user = ? AND session = ifnull(?, session)", these
            )
            return gone.rowcount

        return await self._write(work)

    async def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def _clean(self, db: sqlite3.Connection) -> None:
        """Now and then."""
        self._kept += 1
        if self._kept % CLEANING == 0:
            for clean in (CLEAN_GENERATIONS, CLEAN_NOTES):
                db.execute(clean, (int(time.time()), MOST_CLEANED))

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await self._run("BEGIN", work)

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await self._run("BEGIN IMMEDIATE", work)

    async def _run(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """Begin again, for `BUSY_SECONDS` at most, while another process writes."""
        loop = asyncio.get_running_loop()
        patience = loop.time() + BUSY_SECONDS
        while True:
            try:
                return self._transact(begin, work)
            except sqlite3.Error as error:
                busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY  # extended codes, too
                if not busy or loop.time() >= patience:
                    raise StoreUnavailable("The store cannot be reached or is busy. Please try again.") from error
            await asyncio.sleep(BUSY_STEP)

    def _transact(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        self._db = db = self._db or connect(self._path)
        db.execute(begin)
        try:
            answer = work(db)
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # some errors have rolled back already
                db.execute("ROLLBACK")
            raise
        return answer


def connect(path: str) -> sqlite3.Connection:
    """In WAL mode readers pass a writer; `synchronous` NORMAL then survives a killed process, not every power cut."""
    db = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(SCHEMA)
        if not db.execute("SELECT 1 FROM pragma_table_info('rollups') WHERE name = 'upto'").fetchone():
            db.execute(f"ALTER TABLE rollups ADD COLUMN upto TEXT NOT NULL DEFAULT '{LAST}'")  # summed up once, then
    except sqlite3.Error:
        db.close()
        raise
    return db


def read_key(db: sqlite3.Connection, key_id: str) -> VirtualKey | None:
    row = db.execute(READ_KEY, (key_id,)).fetchone()
    if row is None:
        return None
    values: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
    values |= {name: bool(values[name]) for name in FLAGS} | {name: orjson.loads(values[name]) for name in DOCUMENTS}
    values["models"] = None if values["models"] is None else tuple(values["models"])
    holds = db.execute("SELECT request_id, money, tokens, start, ttl FROM holds WHERE key_id = ?", (key_id,))
    turns = db.execute("SELECT route, turn FROM turns WHERE key_id = ?", (key_id,))
    return VirtualKey(**values, open={request_id: Hold(*hold) for request_id, *hold in holds}, turns=dict(turns))


def put_key(db: sqlite3.Connection, key: VirtualKey) -> None:
    """All but its open holds and its turns."""
    values = {name: getattr(key, name) for name in COLUMNS}
    values |= {name: orjson.dumps(values[name]) for name in DOCUMENTS}
    db.execute(PUT_KEY, tuple(values.values()))


def make(db: sqlite3.Connection, move: Move, key: VirtualKey, request_id: str, hold: Hold | None) -> VirtualKey:
    """The key after the move, with the request's hold as given, or without it."""
    holds = {open_id: held for open_id, held in key.open.items() if open_id != request_id}
    moved = replace(
        key,
        balance=key.balance + move.balance,
        spent=key.spent + move.spent,
        requests=key.requests + move.requests,
        windows={**key.windows, **{name: key.left_in(name) + more for name, more in move.windows.items()}},
        open=holds if hold is None else {**holds, request_id: hold},
    )
    values = (moved.balance, moved.spent, moved.requests, orjson.dumps(moved.windows), key.id)
    db.execute("UPDATE keys SET balance = ?, spent = ?, requests = ?, windows = ? WHERE id = ?", values)
    if hold is None:
        db.execute("DELETE FROM holds WHERE key_id = ? AND request_id = ?", (key.id, request_id))
    else:
        values = (key.id, request_id, hold.money, hold.tokens, hold.start, hold.ttl)
        db.execute("REPLACE INTO holds VALUES (?, ?, ?, ?, ?, ?)", values)
    return moved


def take_turn(db: sqlite3.Connection, key: VirtualKey, route: str) -> VirtualKey:
    turn = key.turns.get(route, 0) + 1
    db.execute("REPLACE INTO turns VALUES (?, ?, ?)", (key.id, route, turn))
    return replace(key, turns={**key.turns, route: turn})


def read_note(db: sqlite3.Connection, name: str) -> Note | None:
    row = db.execute(READ_NOTE, (name,)).fetchone()
    return Note(*row) if row else None


def generation_of(row: Row) -> Generation:
    *values, doc = row
    return Generation(*values, doc=orjson.loads(doc))
