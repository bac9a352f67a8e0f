"""The sweep: what crashed is settled, days are summed up, books are checked, and time is kept, over all keys."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from functions import sweep
from functions.sweep import Memory, Run
from shared.errors import StoreUnavailable
from shared.keys import time_ordered
from shared.store.base import Admitted, Ask, Generation, Hold, Store, VirtualKey
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
    assert line["_aws"]["CloudWatchMetrics"][0]["Dimensions"] == [["service"]]
    assert line["service"] == "sweep"


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


async def test_a_run_that_is_out_of_time_is_gone_on_with_by_the_next(store: SQLiteStore):
    keys = [key(f"key-{number:08}") for number in range(40)]
    for each in keys:
        await store.add_key(each)
    memory, looks = Memory(""), []

    async def run(batches: int) -> dict[str, Any]:
        left = iter([sweep.MARGIN + 1] * batches + [0.0] * 99)
        told = await Run(store, DAYS, memory, NOW, lambda: next(left))()
        looks.append(set(memory.looked))
        return told

    assert (await run(1))["left_over"] == 24
    assert (await run(1))["left_over"] == 8
    assert (await run(9))["left_over"] == 0
    assert [len(seen) for seen in looks] == [16, 32, 40]
    assert memory.after == keys[-1].id


async def test_a_new_process_begins_anywhere_and_goes_round(store: SQLiteStore):
    for number in range(4):
        await store.add_key(key(f"key-{number:08}"))
    memory = Memory("key-00000001")
    left = iter([sweep.MARGIN + 1, 0.0])
    run = Run(store, DAYS, memory, NOW, lambda: next(left))
    assert (await run())["left_over"] == 0
    assert memory.after == "key-00000001"
    assert Memory().after != Memory().after


async def test_a_key_is_looked_at_again_when_used_after_an_hour_and_at_rest_after_a_day(store: SQLiteStore):
    memory, idle = Memory(""), key()
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
        await store.record(Generation("gen-unreadable", "key-00000001", old, 1, {}), NOW + DAY)

    asyncio.run(made())
    with pytest.raises(StoreUnavailable, match="1 keys"):
        sweep.handler({}, Context())
    assert [record.__dict__["key"] for record in caplog.records if record.getMessage() == "sweep.failed"] == [
        "key-00000001"
    ]
    assert len(asyncio.run(store.rollups("key-00000002", 0, NOW // DAY))) == 1
