"""The books: what crashed requests left open is settled, old rows are summed up, and it all adds up to what was spent.

The rows of a key, live or rolled up, always come to its `spent`: the row is written first, and says what is charged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from shared import generations
from shared.store.base import Generation, Hold, Rollup, Store, VirtualKey

PREFIX = generations.PREFIX
RIPE = 2
"""The age in days at which a day is summed up: by then nothing is on its way to it any more."""
DAYS = 7
"""How long rows are kept, if the caller knows no better (`GENERATION_TTL_DAYS`); more than `RIPE`, or some get lost."""
PAGE = 100
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


async def roll_up(store: Store, key_id: str, now: int, days: int = DAYS) -> None:
    """Sum up, once, each ripe day whose rows may still be there. A day that an open hold may belong to waits."""
    key, today = await store.key(key_id), now // 86400
    first, last = today - days, today - RIPE
    done = {rollup.day for rollup in await store.rollups(key_id, first, last)}
    waiting = min((hold.day for hold in key.open.values()), default=today) if key else today
    for day in range(first, min(last + 1, waiting)):
        if day not in done and (groups := await grouped(store, key_id, day)):
            cost, requests = (sum(group[count] for group in groups) for count in ("cost", "requests"))
            await store.roll_up(Rollup(key_id, day, cost, requests, tuple(groups)))


async def usage(
    store: Store, key_id: str, first_day: int, last_day: int, oldest: int = 0
) -> AsyncIterator[dict[str, Any]]:
    """`{day, model, provider, requests, prompt_tokens, completion_tokens, cost}`, both days included.

    Before the day `oldest` there are no rows any more to ask for, only sums."""
    rollups = {rollup.day: rollup.groups for rollup in await store.rollups(key_id, first_day, last_day)}
    for day in sorted({*rollups, *range(max(first_day, oldest), last_day + 1)}):
        for group in rollups.get(day) or await grouped(store, key_id, day):
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


async def grouped(store: Store, key_id: str, day: int) -> list[dict[str, Any]]:
    """The rows of a day in sum, by model and provider."""
    sums: dict[tuple[Any, Any], dict[str, Any]] = {}
    async for row in rows(store, key_id, day):
        model, provider, tokens = row.doc["model"], row.doc["provider"], row.doc["tokens"]
        new = {"model": model, "provider": provider, **dict.fromkeys(COUNTS, 0)}
        group = sums.setdefault((model, provider), new)
        group["requests"] += 1
        group["prompt_tokens"] += tokens["prompt_tokens"]
        group["completion_tokens"] += tokens["completion_tokens"]
        group["cost"] += row.cost
    return list(sums.values())


async def rows(store: Store, key_id: str, day: int) -> AsyncIterator[Generation]:
    after = ""
    while page := await store.generations(key_id, day, after, PAGE):
        for row in page:
            yield row
        await asyncio.sleep(0)  # SQLite reads on the spot: others may want the loop
        if len(page) < PAGE:
            return
        after = page[-1].id
