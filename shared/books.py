"""The books: what crashed requests left open is settled, old rows are summed up, and it all adds up to what was spent.

The rows of a key, live or rolled up, always come to its `spent`: the row is written first, and says what is charged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from shared import generations
from shared.keys import time_ordered
from shared.store.base import LAST, Generation, Hold, Rollup, Store, VirtualKey

PREFIX = generations.PREFIX
LAG = 6 * 3600
"""Seconds by which sums stay behind the oldest open hold, or the clock. The row of a request has an id from before its
hold began and is there before that ends; so this is more than a request may take (2.5 hours), a crash may go unnoticed,
and the index that is read may be behind its table, together."""
DAYS = 7
"""How long rows are kept, if the caller knows no better (`GENERATION_TTL_DAYS`)."""
PAGE = 1000
COUNTS = ("requests", "prompt_tokens", "completion_tokens", "cost")


async def sweep(store: Store, key: VirtualKey, now: int, ttl: int) -> int:
    """Settle the key's overdue holds, each by the row that stands; returns how many were still open.

    A row made here is kept for `ttl` seconds."""
    settled = 0
    for request_id, hold in key.open.items():
        if hold.deadline <= now:
            row = await store.generation(PREFIX + request_id)
            row = row or await store.record(lost(key.id, request_id, hold, now), now + ttl)
            tokens = row.doc["tokens"]["total_tokens"]
            settled += await store.settle(key.id, request_id, hold, row.cost, tokens, now)
    return settled


def lost(key_id: str, request_id: str, hold: Hold, now: int) -> Generation:
    """The record of a request that nobody finished: charged with all it held.

    It belongs to the day of its discovery, for its own day may be summed up already."""
    doc = {
        **generations.BLANK,
        "status": "lost",
        "tokens": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": hold.tokens, "source": "estimated"},
        "cost": {
            "prompt_cost": None,
            "completion_cost": None,
            "total_cost": generations.dollars(hold.money),
            "currency": "USD",
            "source": "estimated",
        },
    }
    return Generation(PREFIX + request_id, key_id, now, hold.money, doc)


async def roll_up(store: Store, key: VirtualKey, now: int, days: int = DAYS) -> None:
    """Carry the sums of the days whose rows are still there on to where more rows may come.

    Each page is put down as it is read: what was done stays done, wherever this is cut. `key` is the key as it was read
    before its crashed requests were settled, for their rows may not be in the index yet."""
    end = first_id(min([now, *(hold.start for hold in key.open.values())]) - LAG)
    today = now // 86400
    standing = {rollup.day: rollup for rollup in await store.rollups(key.id, today - days, today)}
    for day in range(today - days, today + 1):
        rollup = standing.get(day) or Rollup(key.id, day)
        while rollup.upto < min(end, over(day)):
            grown = await grow(store, rollup, end)
            if grown.requests and not await store.roll_up(grown, rollup.upto):
                return  # somebody else is at it
            rollup = grown


async def usage(
    store: Store, key_id: str, first_day: int, last_day: int, oldest: int = 0
) -> AsyncIterator[dict[str, Any]]:
    """`{day, model, provider, requests, prompt_tokens, completion_tokens, cost}`, both days included.

    Before the day `oldest` there are no rows any more to ask for, only sums."""
    standing = {rollup.day: rollup for rollup in await store.rollups(key_id, first_day, last_day)}
    for day in sorted({*standing, *range(max(first_day, oldest), last_day + 1)}):
        rollup = standing.get(day) or Rollup(key_id, day)
        while rollup.upto < over(day):
            rollup = await grow(store, rollup, LAST)
        for group in rollup.groups:
            yield {"day": day, **group}


async def check(store: Store, key: VirtualKey, now: int, days: int = DAYS) -> int | None:
    """The nano-dollars by which what was spent exceeds the rows, rolled up and live.

    `key` is the key as it was read before: each row is written before its money is spent, so the rows tell of no less
    than that; of no more than is spent now and may be soon. None where that is so while requests are running."""
    today = now // 86400
    found = sum([group["cost"] async for group in usage(store, key.id, 0, today, oldest=today - days)])
    after = await store.key(key.id)
    if after is None:
        return None
    if found < key.spent:
        return key.spent - found
    soon = 2 * sum(hold.money for hold in (*key.open.values(), *after.open.values()))  # twice: estimates may be low
    if found > after.spent + soon:
        return after.spent + soon - found
    return None if soon or after.spent != key.spent else key.spent - found


async def grow(store: Store, rollup: Rollup, end: str) -> Rollup:
    """With the next page of rows up to the id `end`; up to `end` itself where those were the last."""
    page = await store.entries(rollup.key_id, rollup.day, rollup.upto, end, PAGE)
    await asyncio.sleep(0)  # SQLite reads on the spot: others may want the loop
    groups = {(group["model"], group["provider"]): dict(group) for group in rollup.groups}
    for entry in page:
        new = {"model": entry.model, "provider": entry.provider, **dict.fromkeys(COUNTS, 0)}
        group = groups.setdefault((entry.model, entry.provider), new)
        group["requests"] += 1
        group["prompt_tokens"] += entry.prompt_tokens
        group["completion_tokens"] += entry.completion_tokens
        group["cost"] += entry.cost
    return Rollup(
        rollup.key_id,
        rollup.day,
        rollup.cost + sum(entry.cost for entry in page),
        rollup.requests + len(page),
        tuple(groups.values()),
        page[-1].id if len(page) == PAGE else end,
    )


def first_id(moment: int) -> str:
    """Below the ids of all requests made at that moment or later, above all earlier ones."""
    return PREFIX + time_ordered(moment)[:8]


def over(day: int) -> str:
    """Above the ids of a day's rows: that of a request is made before its admission, whose day is the row's."""
    return first_id((day + 1) * 86400 + LAG)
