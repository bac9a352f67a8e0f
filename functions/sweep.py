"""Lambda, on a schedule: settle what crashed requests left open, sum rows up before they expire, check the books."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aws_lambda_powertools.metrics import EphemeralMetrics, MetricUnit

from shared import books
from shared.errors import StoreUnavailable
from shared.keys import ID, random_text
from shared.limits import overdue
from shared.schema import JSON
from shared.settings import Settings
from shared.store import open_store
from shared.store.base import Store, VirtualKey
from shared.telemetry import Telemetry, logger

AT_ONCE = 16
MARGIN = 15.0
"""Seconds before the end of its time at which no further keys are begun."""
HOUR, DAY = 3600, 86400
LAG = 2.0
"""Seconds to look again after: an index may be that much behind the table."""


@dataclass
class Memory:
    """What a warm process still knows: how far it came, and of each key when its books were looked at, with its number
    of requests if they were right. A new process begins anywhere, lest the last keys never have their turn."""

    after: str = field(default_factory=lambda: random_text(ID))
    looked: dict[str, tuple[int, int | None]] = field(default_factory=dict[str, tuple[int, int | None]])

    def is_due(self, key: VirtualKey, now: int) -> bool:
        """Once an hour for a key in use, once a day for one at rest: to look costs reads."""
        at, requests = self.looked.get(key.id, (0, None))
        return now - at >= HOUR and (key.requests != requests or now // DAY != at // DAY)


@dataclass
class Run:
    """One run over all keys; `time_left` is in seconds. What it does twice does no harm, here or in another process."""

    store: Store
    days: int
    memory: Memory
    now: int
    time_left: Callable[[], float]
    settled: int = 0
    differing: int = 0
    failed: int = 0

    async def __call__(self) -> JSON:
        keys = [key async for key in self.store.keys()]
        keys.sort(key=lambda key: (key.id <= self.memory.after, key.id))
        late = [key for key in keys if overdue(key, self.now)]
        done = await self._each(late, self._settle)
        due = [key for key in keys if self.memory.is_due(key, self.now)]
        if looked := await self._each(due, self._look):
            self.memory.after = due[looked - 1].id
        return {
            "keys": len(keys),
            "settled": self.settled,
            "differing": self.differing,
            "failed": self.failed,
            "left_over": len(late) - done + len(due) - looked,
        }

    async def _each(self, keys: Sequence[VirtualKey], work: Callable[[VirtualKey], Awaitable[None]]) -> int:
        """How many there was time for; the rest is the next run's."""
        for start in range(0, len(keys), AT_ONCE):
            if self.time_left() < MARGIN:
                return start
            batch = keys[start : start + AT_ONCE]
            outcomes = await asyncio.gather(*map(work, batch), return_exceptions=True)
            for key, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, BaseException):  # one key's trouble is not the others'
                    self.failed += 1
                    logger.error("sweep.failed", extra={"key": key.id, "reason": repr(outcome)})
        return len(keys)

    async def _settle(self, key: VirtualKey) -> None:
        self.settled += await books.sweep(self.store, key, self.now, self.days * DAY)

    async def _look(self, key: VirtualKey) -> None:
        await books.roll_up(self.store, key.id, self.now, self.days)
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

    The metrics `BooksDiffer` (keys whose rows do not add up to what they have spent) and `HoldsSettled` are counts."""
    settings = Settings.read(os.environ)
    Telemetry(settings)
    told = asyncio.run(run(settings, MEMORY, lambda: context.get_remaining_time_in_millis() / 1000))
    logger.info("sweep", extra=told)
    metrics = EphemeralMetrics(namespace="Lightrail", service="sweep")
    metrics.add_metric("BooksDiffer", MetricUnit.Count, told["differing"])
    metrics.add_metric("HoldsSettled", MetricUnit.Count, told["settled"])
    metrics.flush_metrics()
    if told["failed"]:
        raise StoreUnavailable(f"The sweep failed for {told['failed']} keys; its log names them.")
    return told
