"""Crashes are settled once, days are summed up once, and it adds up to what was spent."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from shared import books
from shared.errors import StoreUnavailable
from shared.store.base import LAST, Entry, Refused, Rollup, Store, VirtualKey
from shared.store.sqlite import CLEANING, SQLiteStore
from tests.shared.store.callers import (
    DAY,
    KEPT,
    NOW,
    TTL,
    Forgetful,
    ask,
    at_once,
    new_key,
    open_one,
    read,
    row,
    settle,
)

LATER = NOW + TTL


async def finish(store: Store, key: VirtualKey, cost: int, now: int = NOW, **doc: Any) -> None:
    """A request from its admission to its end, recorded and settled."""
    asked = await open_one(store, key, money=cost, now=now)
    await store.record(row(asked, cost, **doc), KEPT)
    await settle(store, asked, cost)


async def spend(store: Store, key: VirtualKey, first: int, last: int) -> list[dict[str, Any]]:
    return [group async for group in books.usage(store, key.id, first, last)]


async def test_a_record_is_put_once_and_the_first_stands(store: Store):
    asked = await open_one(store, await new_key(store))
    first, second = row(asked, 5, note="a \N{SNOWMAN}", price=0.5), row(asked, 6)
    assert await store.record(first, KEPT) == first
    assert await store.record(second, KEPT) == first
    assert await store.generation(first.id) == first
    assert await store.generation("gen-none") is None


async def test_an_expired_record_is_not_shown_but_still_counts(store: Store):
    key = await new_key(store)
    old, kept = row(await open_one(store, key), 1), row(await open_one(store, key), 2)
    await store.record(old, 1)
    await store.record(kept, KEPT)
    assert await store.generation(old.id) is None
    assert sorted(await store.generations(key.id, old.day), key=lambda row: row.cost) == [old, kept]


async def test_a_days_records_come_in_pages_that_are_full_but_for_the_last(store: Store):
    key, other = await new_key(store), await new_key(store)
    rows = [row(ask(key), 1) for _ in range(7)]
    for each in [*rows, row(ask(other), 1), row(ask(key, now=NOW + DAY), 1)]:
        await store.record(each, KEPT)
    day, pages, after = NOW // DAY, [], ""
    while page := await store.generations(key.id, day, after, 3):
        pages.append(page)
        after = page[-1].id
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [each for page in pages for each in page] == rows


async def test_a_dead_request_is_charged_all_it_held_at_its_deadline(store: Store):
    key = await new_key(store, balance=100)
    asked = await open_one(store, key, money=40, tokens=9)
    assert await books.sweep(store, await read(store, key), LATER - 1, KEPT) == 0
    assert await books.sweep(store, await read(store, key), LATER, KEPT) == 1
    assert await books.sweep(store, await read(store, key), LATER, KEPT) == 0
    after, record = await read(store, key), await store.generation(f"gen-{asked.request_id}")
    assert (after.spent, after.balance, after.open) == (40, 60, {})
    assert record is not None
    assert (record.cost, record.key_id, record.doc["status"]) == (40, key.id, "lost")
    assert await books.check(store, after, LATER) == 0


async def test_a_crash_between_record_and_settle_is_settled_by_the_record(store: Store):
    key = await new_key(store, balance=100)
    asked = await open_one(store, key, money=40)
    await store.record(row(asked, 15), KEPT)
    assert await books.sweep(store, await read(store, key), LATER, KEPT) == 1
    after = await read(store, key)
    assert (after.spent, after.balance) == (15, 85)
    assert await books.check(store, after, LATER) == 0


async def test_two_sweeps_and_the_request_itself_settle_once(store: Store):
    key = await new_key(store, balance=1000)
    late = [await open_one(store, key, money=40) for _ in range(5)]
    seen = await read(store, key)

    async def sweep() -> int:
        return await books.sweep(store, seen, LATER, KEPT)

    async def finally_done(number: int) -> int:
        stands = await store.record(row(late[number], 15, created=LATER), KEPT)
        return await settle(store, late[number], stands.cost, now=LATER)

    assert sum(await at_once([sweep, sweep, *(partial(finally_done, number) for number in range(5))])) == 5
    after = await read(store, key)
    assert (after.requests, after.open) == (5, {})
    assert after.spent in range(5 * 15, 5 * 40 + 1)
    assert await books.check(store, after, LATER) == 0


async def test_with_lost_replies_and_dead_callers_the_books_come_out_even(store: Store):
    key, dice = await new_key(store, balance=30_000, concurrency=1000), random.Random(3)
    door = Forgetful(store)

    async def call(money: int, cost: int, dies: float) -> None:
        asked = ask(key, money)
        if isinstance(await door.admit(asked), Refused) or dies < 0.1:
            return
        await door.record(row(asked, cost), KEPT)
        if dies > 0.2:
            await settle(door, asked, cost)

    prices = [dice.randint(1, 1000) for _ in range(40)]
    await at_once(partial(call, price, dice.randint(0, price), dice.random()) for price in prices)
    seen = await read(store, key)
    assert seen.open  # somebody did die
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(books.sweep, door, seen, LATER, KEPT)
    after = await read(store, key)
    assert after.open == {}
    assert after.balance >= 0
    assert await books.check(store, after, LATER) == 0


async def test_the_check_finds_what_is_missing_and_says_nothing_while_requests_run(store: Store):
    key = await new_key(store)
    await finish(store, key, 10)
    asked = await open_one(store, key, money=7)
    assert await books.check(store, await read(store, key), NOW) is None
    await settle(store, asked, 7)  # without a record
    assert await books.check(store, await read(store, key), NOW) == 7


async def test_what_is_old_enough_is_summed_up_and_counted_once(store: Store):
    key = await new_key(store)
    for cost, model in ((5, "a"), (6, "a"), (7, "b")):
        await finish(store, key, cost, model=model)
    day, later = NOW // DAY, NOW + books.LAG
    await finish(store, key, 100, now=later)
    before = await spend(store, key, day, day + 2)
    await books.roll_up(store, await read(store, key), later)
    assert await store.rollups(key.id, 0, day + 9) == []
    for moment in (later + 1, later + 1, later + DAY):
        await books.roll_up(store, await read(store, key), moment)
        assert await spend(store, key, day, day + 2) == before
        assert await books.check(store, await read(store, key), moment) == 0
    (rollup,) = await store.rollups(key.id, 0, day + 9)
    assert (rollup.day, rollup.cost, rollup.requests) == (day, 118, 4)
    assert [(group["day"], group["model"], group["requests"], group["cost"]) for group in before] == [
        (day, "a", 2, 11),
        (day, "b", 1, 7),
        (day, "m", 1, 100),
    ]
    assert (before[0]["provider"], before[0]["prompt_tokens"], before[0]["completion_tokens"]) == ("p", 2, 4)


async def test_sums_outlive_their_rows(store: Store):
    key = await new_key(store)
    await finish(store, key, 5)
    await books.roll_up(store, key, NOW + 3 * DAY)
    later = NOW + 20 * DAY
    assert await books.check(store, await read(store, key), later) == 0
    groups = [group async for group in books.usage(store, key.id, 0, later // DAY, oldest=later // DAY)]
    assert [group["cost"] for group in groups] == [5]


async def test_sums_wait_for_open_holds_and_for_the_rows_of_those_just_closed(store: Store):
    key = await new_key(store)
    await finish(store, key, 5, now=NOW - books.LAG)
    await open_one(store, key, money=8)
    await finish(store, key, 3, now=NOW + 1)
    later = NOW + 2 * DAY
    seen = await read(store, key)
    await books.sweep(store, seen, later, KEPT)
    await books.roll_up(store, seen, later)
    assert [rollup.cost for rollup in await store.rollups(key.id, 0, later // DAY)] == []
    await books.roll_up(store, await read(store, key), later)
    sums = {rollup.day: rollup.cost for rollup in await store.rollups(key.id, 0, later // DAY)}
    assert sums == {NOW // DAY: 8, later // DAY: 8}, "what was lost belongs to the day it was found"
    assert await books.check(store, await read(store, key), later) == 0


@pytest.mark.parametrize("count", [0, books.PAGE, books.PAGE + 1])
async def test_days_of_many_pages_are_summed_up_whole(sqlite: Store, count: int):
    key = await new_key(sqlite)
    for _ in range(count):
        await sqlite.record(row(ask(key), 1), KEPT)
    await books.roll_up(sqlite, key, NOW + 2 * DAY)
    assert [rollup.cost for rollup in await sqlite.rollups(key.id, 0, NOW)] == ([count] if count else [])


async def test_a_sum_that_is_cut_goes_on_where_it_was(sqlite: Store):
    """By the clock, or by a store that fails: no page is read twice, and none is left out."""
    key = await new_key(sqlite)
    for _ in range(3 * books.PAGE):
        await sqlite.record(row(ask(key), 1), KEPT)
    pages = Pages(sqlite, most=2)
    with pytest.raises(StoreUnavailable):
        await books.roll_up(pages, key, NOW + 2 * DAY)
    assert [rollup.cost for rollup in await sqlite.rollups(key.id, 0, NOW)] == [2 * books.PAGE]
    assert [group["cost"] for group in await spend(sqlite, key, NOW // DAY, NOW // DAY)] == [3 * books.PAGE]
    pages.most = 99
    await books.roll_up(pages, key, NOW + 2 * DAY)
    assert [rollup.cost for rollup in await sqlite.rollups(key.id, 0, NOW)] == [3 * books.PAGE]
    assert len([page for page in pages.read if page]) == 3


class Pages:
    """A store that gives out so many pages of entries and then fails."""

    def __init__(self, store: Store, most: int) -> None:
        self._store = store
        self.most = most
        self.read: list[list[Entry]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def entries(self, *asked: Any) -> list[Entry]:
        page = await self._store.entries(*asked)
        if page and len(self.read) >= self.most:
            raise StoreUnavailable("cut")
        if page:
            self.read.append(page)
        return page


async def test_two_who_sum_up_at_once_count_each_row_once(store: Store):
    key = await new_key(store)
    for cost in range(1, 8):
        await finish(store, key, cost)
    door = Forgetful(store)
    await at_once([partial(books.roll_up, door, key, NOW + DAY) for _ in range(5)])
    assert [rollup.cost for rollup in await store.rollups(key.id, 0, NOW // DAY)] == [28]
    assert await books.check(store, await read(store, key), NOW + DAY) == 0


async def test_a_long_pause_loses_no_money(tmp_path: Path):
    """A laptop that was off while its rows expired sums them up when it is back."""
    store = SQLiteStore(str(tmp_path / "test.db"))
    key = await new_key(store)
    for _ in range(150):
        asked = await open_one(store, key, money=5)
        await store.record(row(asked, 5), expires=NOW + 1)
        await settle(store, asked, 5)
    back = NOW + 30 * DAY
    await books.roll_up(store, key, back, days=60)
    spent = await read(store, key)
    assert spent.spent == 750
    assert sum(group["cost"] for group in await spend(store, key, NOW // DAY, back // DAY)) == 750
    await store.close()


async def test_what_expires_before_it_is_summed_up_stays(tmp_path: Path):
    """Of a day that is summed up to its noon, too."""
    store = SQLiteStore(str(tmp_path / "test.db"))
    key = await new_key(store)
    for moment in (NOW, NOW + books.LAG):
        asked = await open_one(store, key, money=5, now=moment)
        await store.record(row(asked, 5), expires=NOW + 1)
        await settle(store, asked, 5)
    await books.roll_up(store, key, NOW + books.LAG + 1)
    other = await new_key(store)
    for _ in range(CLEANING):
        await store.record(row(ask(other), 1), KEPT)
    assert [row.created for row in await store.generations(key.id, NOW // DAY)] == [NOW + books.LAG]
    assert await books.check(store, await read(store, key), NOW + DAY) == 0
    await store.close()


async def test_a_file_from_before_sums_could_grow_is_read_on(tmp_path: Path):
    file = tmp_path / "test.db"
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE rollups (key_id TEXT, day INTEGER, cost INTEGER, requests INTEGER, groups BLOB)")
        db.execute("INSERT INTO rollups VALUES ('k', 1, 5, 1, '[]')")
        db.commit()
    for _ in range(2):
        store = SQLiteStore(str(file))
        assert await store.rollups("k", 0, 2) == [Rollup("k", 1, 5, 1, (), LAST)]
        await store.close()
