"""Lambda, on a schedule: settle what crashed requests left open, sum rows up before they expire, check the books."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aws_lambda_powertools.metrics import EphemeralMetrics, MetricUnit

from shared import books
from shared.errors import StoreUnavailable
from shared.limits import overdue
from shared.schema import JSON
from shared.settings import Settings
from shared.store import open_store
from shared.store.base import Store, VirtualKey
from shared.telemetry import Telemetry, logger

AT_ONCE = 16
MARGIN = 15.0
"""Seconds before the end of its time at which a run stops, wherever it is."""
HOUR, DAY = 3600, 86400
LAG = 2.0
"""Seconds to look again after: an index may be that much behind the table."""


@dataclass
class Memory:
    """What a warm process still knows: of each key when its books were looked at, with its number of requests if they
    were right."""

    looked: dict[str, tuple[int, int | None]] = field(default_factory=dict[str, tuple[int, int | None]])

    def when(self, key: VirtualKey) -> int:
        return self.looked.get(key.id, (0, None))[0]

    def is_due(self, key: VirtualKey, now: int) -> bool:
        """Once an hour for a key in use, once a day for one at rest: to look costs reads."""
        at, requests = self.looked.get(key.id, (0, None))
        return now - at >= HOUR and (key.requests != requests or now // DAY != at // DAY)


@dataclass
class Run:
    """One run over all keys; `time_left` is in seconds. What it does twice does no harm, here or in another process,
    and what it has no time for is the next run's: of that, the keys are in `left`."""

    store: Store
    days: int
    memory: Memory
    now: int
    time_left: Callable[[], float]
    settled: int = 0
    differing: int = 0
    failed: set[str] = field(default_factory=set[str])
    left: set[str] = field(default_factory=set[str])

    async def __call__(self) -> JSON:
        keys = [key async for key in self.store.keys()]
        random.shuffle(keys)  # a new process begins anywhere, lest the last keys never have their turn
        keys.sort(key=self.memory.when)
        due = [key for key in keys if self.memory.is_due(key, self.now)]
        await self._each([key for key in keys if overdue(key, self.now)], self._settle)
        await self._each(due, self._roll_up)  # first of all keys, for rows expire; then there is time to check
        await self._each([key for key in due if key.id not in self.failed], self._check)
        return {
            "keys": len(keys),
            "settled": self.settled,
            "differing": self.differing,
            "failed": len(self.failed),
            "left_over": len(self.left),
        }

    async def _each(self, keys: Sequence[VirtualKey], work: Callable[[VirtualKey], Awaitable[None]]) -> None:
        """In turn, `AT_ONCE` side by side; a long one keeps none of the others waiting, nor does one's trouble."""
        waiting = iter(keys)
        left = {key.id for key in keys}

        async def worker() -> None:
            for key in waiting:
                try:
                    await work(key)
                except Exception as trouble:  # noqa: BLE001 whatever it is, it is logged, and fails the run in the end
                    self.failed.add(key.id)
                    logger.error("sweep.failed", extra={"key": key.id, "reason": repr(trouble)})
                left.discard(key.id)

        with suppress(TimeoutError):
            async with asyncio.timeout(self.time_left() - MARGIN), asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(worker())
        self.left |= left

    async def _settle(self, key: VirtualKey) -> None:
        self.settled += await books.sweep(self.store, key, self.now, self.days * DAY)

    async def _roll_up(self, key: VirtualKey) -> None:
        await books.roll_up(self.store, key, self.now, self.days)

    async def _check(self, key: VirtualKey) -> None:
        read = await self.store.key(key.id)
        if read is None:
            return
        difference = await books.check(self.store, read, self.now, self.days)
        if difference:
            await asyncio.sleep(LAG)
            difference = await books.check(self.store, read, self.now, self.days)
        if difference:
            self.differing += 1
            logger.error("books.differ", extra={"key": key.id, "spent_beyond_rows_usd": difference / 10**9})
        else:
            self.memory.looked[key.id] = self.now, None if difference is None else key.requests


MEMORY = Memory()


async def run(settings: Settings, memory: Memory, time_left: Callable[[], float]) -> JSON:
    store = open_store(settings.database_url, settings.table_name)
    try:
        return await Run(store, settings.generation_ttl_days, memory, int(time.time()), time_left)()
    finally:
        await store.close()


def handler(event: Any, context: Any) -> JSON:
    """What was done, which is also logged; raises StoreUnavailable where some of it could not be.

    The metrics are counts: `BooksDiffer` of keys whose rows do not add up to what they have spent, `KeysLeftOver` of
    keys for which there was no time, `HoldsSettled`."""
    settings = Settings.read(os.environ)
    Telemetry(settings)
    told = asyncio.run(run(settings, MEMORY, lambda: context.get_remaining_time_in_millis() / 1000))
    logger.info("sweep", extra=told)
    metrics = EphemeralMetrics(namespace="Lightrail", service="sweep")
    metrics.add_dimension(name="stage", value=settings.stage)
    metrics.add_metric("BooksDiffer", MetricUnit.Count, told["differing"])
    metrics.add_metric("KeysLeftOver", MetricUnit.Count, told["left_over"])
    metrics.add_metric("HoldsSettled", MetricUnit.Count, told["settled"])
    metrics.flush_metrics()
    if told["failed"]:
        raise StoreUnavailable(f"The sweep failed for {told['failed']} keys; its log names them.")
    return told
