"""What is never exceeded and never lost, whatever the callers do (I1 to I5 of the design)."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import anyio.lowlevel
import pytest

from shared.store.base import Admitted, Refused, Store
from tests.shared.store.callers import (
    DAY,
    MINUTE,
    NOW,
    Forgetful,
    ask,
    at_once,
    conserved,
    hold,
    new_key,
    open_one,
    read,
    settle,
)


@pytest.mark.parametrize("loses_replies", [False, True])
async def test_64_callers_get_exactly_the_limit_in_every_minute(store: Store, loses_replies: bool):
    key = await new_key(store, rpm=100)
    door = Forgetful(store) if loses_replies else store

    async def call(now: int) -> str:
        asked = ask(key, now=now)
        answer = await door.admit(asked)
        if isinstance(answer, Refused):
            return answer.reason
        await settle(door, asked, cost=0)
        return "admitted"

    for minute in range(2 if loses_replies else 3):
        answers = Counter(await at_once([partial(call, NOW + minute * MINUTE)] * 110))
        assert answers == {"admitted": 100, "rpm": 10}
    after = await read(store, key)
    assert (after.requests, after.open) == (100 * (minute + 1), {})
    assert not isinstance(door, Forgetful) or door.lost > 10


async def test_tokens_used_and_tokens_left_are_the_limit(store: Store):
    key, dice = await new_key(store, tpm=20_000, concurrency=1000), random.Random(1)
    door = Forgetful(store)

    async def call(tokens: int, used: int) -> int:
        asked = ask(key, tokens=tokens)
        if isinstance(await door.admit(asked), Refused):
            return 0
        await door.settle(key.id, asked.request_id, asked.hold, 0, used, NOW)
        return used

    sizes = [dice.randint(100, 2000) for _ in range(45)]
    used = sum(await at_once(partial(call, size, dice.randint(1, size)) for size in sizes))
    assert used + (await read(store, key)).left("t", NOW // MINUTE) == 20_000


async def test_a_budget_is_never_overspent_and_no_money_is_lost(store: Store):
    key, dice = await new_key(store, balance=100_000, concurrency=1000), random.Random(2)
    door, lowest = Forgetful(store), [100_000]

    async def call(money: int, cost: int) -> int:
        asked = ask(key, money)
        answer = await door.admit(asked)
        if isinstance(answer, Refused):
            assert answer.reason == "balance"
            return 0
        assert conserved(answer.key)
        lowest.append(answer.key.balance)
        await settle(door, asked, cost)
        await settle(door, asked, cost)  # by someone who could not know that it was done
        return cost

    estimates = [dice.randint(1, 5000) for _ in range(60)]
    spent = sum(await at_once(partial(call, estimate, dice.randint(0, estimate)) for estimate in estimates))
    after = await read(store, key)
    assert (after.spent, after.open) == (spent, {})
    assert min(lowest) >= 0


async def test_never_more_are_open_than_may_be(store: Store):
    key, most = await new_key(store, concurrency=8), 0
    now_open: set[str] = set()

    async def call() -> str:
        nonlocal most
        asked = ask(key)
        answer = await store.admit(asked)
        if isinstance(answer, Refused):
            return answer.reason
        now_open.add(asked.request_id)
        most = max(most, len(answer.key.open), len(now_open))
        await anyio.lowlevel.checkpoint()
        now_open.remove(asked.request_id)
        await settle(store, asked, 0)
        return "admitted"

    answers = await at_once([call] * 90)
    assert most == 8
    assert set(answers) == {"admitted", "concurrency"}


async def test_a_reply_that_was_lost_is_an_admission_even_at_the_limit(store: Store):
    key = await new_key(store, rpm=1)
    asked = await open_one(store, key)
    again = await store.admit(asked)
    assert isinstance(again, Admitted)
    assert list(again.key.open) == [asked.request_id]
    assert again.key.left("r", NOW // MINUTE) == 0


async def test_a_refusal_changes_nothing(store: Store):
    key = await new_key(store, rpm=5, tpm=100, daily_budget=50, balance=1000)
    await open_one(store, key, money=10, tokens=10)
    before = await read(store, key)
    for money, tokens, reason in ((1, 91, "tpm"), (41, 1, "daily_budget")):
        answer = await store.admit(ask(key, money, tokens))
        assert answer == Refused(reason, before)
    assert await read(store, key) == before


async def test_a_settled_request_gives_back_what_it_did_not_use(store: Store):
    key = await new_key(store, rpm=5, tpm=100, daily_budget=50, balance=1000)
    asked = await open_one(store, key, money=40, tokens=60)
    assert await settle(store, asked, cost=15, tokens=25)
    after = await read(store, key)
    assert (after.balance, after.spent, after.requests, after.open) == (985, 15, 1, {})
    assert after.left("r", NOW // MINUTE) == 4
    assert after.left("t", NOW // MINUTE) == 75
    assert after.left("d", NOW // DAY) == 35


async def test_nothing_goes_back_into_a_minute_that_is_over(store: Store):
    key = await new_key(store, tpm=100, daily_budget=50, balance=1000)
    asked = await open_one(store, key, money=40, tokens=60)
    await settle(store, asked, cost=15, tokens=25, now=NOW + MINUTE)
    after = await read(store, key)
    assert (after.left("t", NOW // MINUTE), after.left("t", NOW // MINUTE + 1)) == (40, 100)
    assert after.left("d", NOW // DAY) == 35


async def test_nothing_goes_back_into_a_day_that_is_over(store: Store):
    key = await new_key(store, daily_budget=50, balance=1000)
    asked = await open_one(store, key, money=40)
    await settle(store, asked, cost=15, now=NOW + DAY)
    after = await read(store, key)
    assert (after.left("d", NOW // DAY), after.left("d", NOW // DAY + 1)) == (10, 50)
    assert after.balance == 985


async def test_a_cost_above_the_estimate_is_charged_in_full(store: Store):
    key = await new_key(store, tpm=100, daily_budget=50, balance=50)
    asked = await open_one(store, key, money=40, tokens=60)
    await settle(store, asked, cost=70, tokens=130)
    after = await read(store, key)
    assert (after.balance, after.spent) == (-20, 70)
    assert after.left("t", NOW // MINUTE) == -30
    assert after.left("d", NOW // DAY) == -20


async def test_a_release_undoes_the_admission(store: Store):
    key = await new_key(store, rpm=5, tpm=100, daily_budget=50, balance=1000)
    asked = await open_one(store, key, money=40, tokens=60)
    assert await store.release(key.id, asked.request_id, asked.hold, NOW + 5)
    assert not await store.release(key.id, asked.request_id, asked.hold, NOW + 5)
    assert not await settle(store, asked, cost=1)
    after = await read(store, key)
    assert (after.balance, after.spent, after.requests, after.open) == (1000, 0, 0, {})
    assert after.left("r", NOW // MINUTE) == 5
    assert after.left("t", NOW // MINUTE) == 100
    assert after.left("d", NOW // DAY) == 50


async def test_a_hold_grows_while_there_is_money(store: Store):
    key = await new_key(store, daily_budget=100, balance=1000)
    asked = await open_one(store, key, money=40)
    old, more, most, too_much = asked.hold, hold(70), hold(100), hold(101)
    assert await store.extend(key.id, asked.request_id, old, more)
    assert await store.extend(key.id, asked.request_id, old, more)  # its reply was lost
    assert not await store.extend(key.id, asked.request_id, more, too_much)
    assert await store.extend(key.id, asked.request_id, more, most)
    assert not await store.extend(key.id, "never admitted", old, more)
    after = await read(store, key)
    assert after.open == {asked.request_id: most}
    assert (after.balance, after.left("d", NOW // DAY)) == (900, 0)


async def test_a_hold_that_grew_unnoticed_is_settled_whole(store: Store):
    key = await new_key(store, balance=1000)
    asked = await open_one(store, key, money=40)
    await store.extend(key.id, asked.request_id, asked.hold, hold(70))
    assert await settle(store, asked, cost=50)
    after = await read(store, key)
    assert (after.balance, after.spent, after.open) == (950, 50, {})


async def test_an_unlimited_key_is_still_counted(store: Store):
    key = await new_key(store)
    await settle(store, await open_one(store, key, money=10**12, tokens=10**6), cost=10**12, tokens=10**6)
    after = await read(store, key)
    assert (after.spent, after.requests, after.has_money_limit) == (10**12, 1, False)


async def test_old_windows_go_and_recent_ones_stay_shut(store: Store):
    key = await new_key(store, rpm=1)
    await settle(store, await open_one(store, key), cost=0)
    soon, late = NOW + 2 * MINUTE, NOW + 7 * MINUTE
    await settle(store, await open_one(store, key, now=soon), cost=0)
    slow_clock = await store.admit(ask(key, now=NOW))
    assert isinstance(slow_clock, Refused)
    assert slow_clock.reason == "rpm"
    await settle(store, await open_one(store, key, now=late), cost=0)
    minutes = {name for name in (await read(store, key)).windows if name[0] == "r"}
    assert minutes == {f"r{late // MINUTE}"}
