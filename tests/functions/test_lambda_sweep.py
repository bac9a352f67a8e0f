"""The sweep: what crashed is settled, days are summed up, books are checked, and time is kept, over all keys."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from functions import sweep
from functions.sweep import Memory, Run
from shared import books
from shared.errors import StoreUnavailable
from shared.keys import time_ordered
from shared.store.base import Admitted, Ask, Entry, Generation, Hold, Rollup, Store, VirtualKey
from shared.store.sqlite import SQLiteStore

DAY = 86400
NOW = int(time.time())
DAYS = 7
TOKENS = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


@dataclass
class Context:
    """What the handler asks Lambda's context for."""

    milliseconds: int = 900_000

    def get_remaining_time_in_millis(self) -> int:
        return self.milliseconds


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SQLiteStore]:
    """Also what the handler opens, by its environment; it remembers nothing from other tests."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/lightrail.db")
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "lightrail-test-sweep")
    monkeypatch.setenv("STAGE", "test")
    sweep.MEMORY.looked.clear()
    store = SQLiteStore(str(tmp_path / "lightrail.db"))
    yield store
    asyncio.run(store.close())


def key(name: str = "key-00000001") -> VirtualKey:
    return VirtualKey(name, "hash", name)


async def admitted(store: Store, key: VirtualKey, start: int) -> tuple[str, Hold]:
    request_id, hold = time_ordered(start), Hold(1000, 3, start, 600)
    assert isinstance(await store.admit(Ask(key.id, key.hash, request_id, hold)), Admitted)
    return request_id, hold


async def spent(store: Store, key: VirtualKey, cost: int, at: int) -> None:
    """A request of that time, as it should be: recorded, charged."""
    request_id, hold = await admitted(store, key, at)
    doc = {"model": "m", "provider": "p", "status": "ok", "tokens": TOKENS}
    await store.record(Generation(f"gen-{request_id}", key.id, at, cost, doc), NOW + DAYS * DAY)
    await store.settle(key.id, request_id, hold, cost, 3, at)


def metrics(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines() if "CloudWatchMetrics" in line]


def test_a_request_that_crashed_is_settled(store: SQLiteStore):
    async def crashed() -> None:
        await store.add_key(key())
        await admitted(store, key(), NOW - 700)
        await admitted(store, key(), NOW)

    asyncio.run(crashed())
    told = sweep.handler({}, Context())
    after = asyncio.run(store.key(key().id))
    assert told["settled"] == 1
    assert after
    assert (after.spent, len(after.open)) == (1000, 1)


def test_a_day_is_summed_up_before_its_rows_expire(store: SQLiteStore):
    old = NOW - 3 * DAY

    async def lived() -> None:
        await store.add_key(key())
        await spent(store, key(), 5, old)
        await spent(store, key(), 7, old)

    asyncio.run(lived())
    sweep.handler({}, Context())
    (rollup,) = asyncio.run(store.rollups(key().id, 0, NOW // DAY))
    assert (rollup.day, rollup.cost, rollup.requests) == (old // DAY, 12, 2)


def test_books_that_are_right_are_a_metric_of_zero(store: SQLiteStore, capsys: pytest.CaptureFixture[str]):
    asyncio.run(store.add_key(key()))
    asyncio.run(spent(store, key(), 5, NOW - 100))
    told = sweep.handler({"source": "aws.events"}, Context())
    (line,) = metrics(capsys.readouterr().out)
    assert (told["keys"], told["differing"], told["left_over"]) == (1, 0, 0)
    assert line["BooksDiffer"] == [0.0]
    assert line["_aws"]["CloudWatchMetrics"][0]["Namespace"] == "Lightrail"
    assert sorted(*line["_aws"]["CloudWatchMetrics"][0]["Dimensions"]) == ["service", "stage"]
    assert (line["service"], line["stage"], line["KeysLeftOver"]) == ("sweep", "test", [0.0])


def test_books_that_are_wrong_are_a_metric_and_a_log_line(
    store: SQLiteStore, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    async def forged() -> None:
        await store.add_key(replace(key(), spent=2_000_000_000))
        await store.add_key(key("key-00000002"))

    asyncio.run(forged())
    told = sweep.handler({}, Context())
    (line,) = metrics(capsys.readouterr().out)
    assert told["differing"] == 1
    assert line["BooksDiffer"] == [1.0]
    (record,) = [record for record in caplog.records if record.getMessage() == "books.differ"]
    assert (record.__dict__["key"], record.__dict__["spent_beyond_rows_usd"]) == (key().id, 2.0)


@pytest.mark.parametrize(("spent", "differing"), [(0, 0), (9, 1)])
def test_a_key_in_use_is_checked_too(store: SQLiteStore, spent: int, differing: int):
    async def open_one() -> None:
        await store.add_key(replace(key(), spent=spent))
        await admitted(store, key(), NOW)

    asyncio.run(open_one())
    assert sweep.handler({}, Context())["differing"] == differing


class Watched:
    """A store that notes what the books ask of it, and takes `pause` seconds for each page of entries."""

    def __init__(self, store: Store, pause: float = 0.0) -> None:
        self._store = store
        self._pause = pause
        self.asked: list[tuple[str, str]] = []
        self.pages: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def entries(self, key_id: str, *rest: Any) -> list[Entry]:
        page = await self._store.entries(key_id, *rest)
        if page:
            await asyncio.sleep(self._pause)
            self.pages.append(key_id)
        return page

    async def roll_up(self, rollup: Rollup, after: str) -> bool:
        self.asked.append(("roll_up", rollup.key_id))
        return await self._store.roll_up(rollup, after)

    async def key(self, key_id: str) -> VirtualKey | None:
        self.asked.append(("check", key_id))
        return await self._store.key(key_id)


def clock(seconds: float) -> Callable[[], float]:
    """What Lambda says is left, of so many seconds that may be used."""
    end = time.monotonic() + sweep.MARGIN + seconds
    return lambda: end - time.monotonic()


async def test_a_run_that_is_cut_within_a_days_rows_is_gone_on_with_by_the_next(store: SQLiteStore):
    """And a busy key keeps none of the others waiting."""
    busy, calm = key("key-busy"), key("key-calm")
    for each in (busy, calm):
        await store.add_key(each)
    await spent(store, calm, 5, NOW - 3 * DAY)
    rows = 6 * books.PAGE
    for _ in range(rows):
        await spent_unsettled(store, busy, NOW - 3 * DAY)
    watched, memory, sums = Watched(store, pause=0.05), Memory(), []
    for _ in range(10):
        told = await Run(watched, DAYS, memory, NOW, clock(0.17))()
        sums.append(sum(rollup.requests for rollup in await store.rollups(busy.id, 0, NOW // DAY)))
        if not told["left_over"]:
            break
    assert len(sums) > 2
    assert sums == sorted(sums)
    assert sums[0] > 0
    assert sums[-1] == rows
    assert (told["failed"], told["left_over"]) == (0, 0)
    assert len(await store.rollups(calm.id, 0, NOW // DAY)) == 1
    assert watched.pages.count(busy.id) <= 6 + len(sums), "at most the page at which it was cut is read again"


async def spent_unsettled(store: Store, key: VirtualKey, at: int) -> None:
    doc = {"model": "m", "provider": "p", "status": "ok", "tokens": TOKENS}
    await store.record(Generation(f"gen-{time_ordered(at)}", key.id, at, 0, doc), NOW + DAYS * DAY)


async def test_all_keys_are_summed_up_before_any_is_checked(store: SQLiteStore):
    for number in range(3 * sweep.AT_ONCE):
        each = key(f"key-{number:08}")
        await store.add_key(each)
        await spent(store, each, 5, NOW - 3 * DAY)
    watched = Watched(store)
    await Run(watched, DAYS, Memory(), NOW, clock(60))()
    steps = [step for step, _ in watched.asked]
    assert steps.index("check") == steps.count("roll_up") == 3 * sweep.AT_ONCE


async def test_what_there_was_no_time_for_is_told_and_comes_first_in_the_next_run(store: SQLiteStore):
    keys = [key(f"key-{number:08}") for number in range(40)]
    for each in keys:
        await store.add_key(each)
    memory = Memory()
    assert (await Run(store, DAYS, memory, NOW, lambda: 0.0)())["left_over"] == 40
    memory.looked |= {each.id: (NOW - 2 * DAY, 7) for each in keys[8:]}
    watched = Watched(store)
    assert (await Run(watched, DAYS, memory, NOW, clock(60))())["left_over"] == 0
    checked = [key_id for step, key_id in watched.asked if step == "check"]
    assert set(checked[:8]) == {each.id for each in keys[:8]}


async def test_a_new_process_begins_anywhere(store: SQLiteStore):
    """Lest the last keys never have their turn, where each run is a new one's."""
    for number in range(40):
        await store.add_key(key(f"key-{number:08}"))
    orders: set[tuple[str, ...]] = set()
    for _ in range(2):
        watched = Watched(store)
        await Run(watched, DAYS, Memory(), NOW, clock(60))()
        orders.add(tuple(key_id for step, key_id in watched.asked if step == "check"))
    assert len(orders) == 2


async def test_a_key_is_looked_at_again_when_used_after_an_hour_and_at_rest_after_a_day(store: SQLiteStore):
    memory, idle = Memory(), key()
    noon = NOW // DAY * DAY + DAY // 2
    await store.add_key(idle)
    await Run(store, DAYS, memory, noon, lambda: 900)()
    used = replace(idle, requests=1)
    assert not memory.is_due(idle, noon + 3700)
    assert not memory.is_due(used, noon + 600)
    assert memory.is_due(used, noon + 3700)
    assert memory.is_due(idle, noon + DAY)


def test_one_keys_trouble_is_not_the_others_and_fails_the_run(store: SQLiteStore, caplog: pytest.LogCaptureFixture):
    old = NOW - 3 * DAY

    async def made() -> None:
        for name in ("key-00000001", "key-00000002"):
            await store.add_key(key(name))
            await spent(store, key(name), 5, old)
        await store.record(Generation(f"gen-{time_ordered(old)}", "key-00000001", old, 1, {}), NOW + DAY)

    asyncio.run(made())
    with pytest.raises(StoreUnavailable, match="1 keys"):
        sweep.handler({}, Context())
    assert [record.__dict__["key"] for record in caplog.records if record.getMessage() == "sweep.failed"] == [
        "key-00000001"
    ]
    assert len(asyncio.run(store.rollups("key-00000002", 0, NOW // DAY))) == 1
