"""Keys come, change, rotate and go; who is refused is told why, in one order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest

from shared.store.base import UNLIMITED, Admitted, Ask, KeyChange, Refused, Store, VirtualKey
from tests.shared.store.callers import DAY, MINUTE, NOW, ask, hold, new_key, open_one, read, settle

FULL = VirtualKey(
    id="full",
    hash="h",
    name='a "name" \N{SNOWMAN}',
    role="admin",
    expires_at=NOW + DAY,
    models=("openai/*", "fast"),
    rpm=1,
    tpm=2,
    concurrency=3,
    daily_budget=4,
    balance=5,
    credit=5,
    old_hash="g",
    old_until=NOW,
    created_at=NOW,
    metadata={"team": {"size": 2.5, "tags": ["a", None]}},
)


async def reason(store: Store, asked: Ask) -> str:
    answer = await store.admit(asked)
    return answer.reason if isinstance(answer, Refused) else "admitted"


@pytest.mark.parametrize("models", [None, (), ("openai/*", "fast")])
async def test_a_key_is_read_as_it_was_written(store: Store, models: tuple[str, ...] | None):
    blank = await new_key(store)
    key = replace(FULL, id=f"{blank.id}-full", models=models)
    assert await store.add_key(key)
    assert await store.key(key.id) == key
    assert await store.key(blank.id) == blank


async def test_an_id_is_taken_once(store: Store):
    key = await new_key(store)
    assert await store.add_key(key)  # the same key again is a lost reply
    assert not await store.add_key(replace(key, hash="another secret"))
    assert await read(store, key) == key


async def test_all_keys_are_listed_tombstones_too(store: Store):
    made = {(await new_key(store)).id for _ in range(5)}
    await store.change_key(min(made), KeyChange(deleted=True), NOW)
    listed = {key.id: key async for key in store.keys()}
    assert made <= listed.keys()
    assert listed[min(made)].deleted


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"deleted": True, "enabled": False}, "unknown"),
        ({"enabled": False, "expires_at": NOW}, "disabled"),
        ({"expires_at": NOW, "concurrency": 0}, "expired"),
        ({"concurrency": 0, "rpm": 0}, "concurrency"),
        ({"rpm": 0, "tpm": 9}, "rpm"),
        ({"tpm": 9, "daily_budget": 9}, "tpm"),
        ({"daily_budget": 9, "balance": 9}, "daily_budget"),
        ({"balance": 9}, "balance"),
        ({"rpm": 1, "tpm": 10, "daily_budget": 10, "balance": 10, "concurrency": 1, "expires_at": NOW + 1}, "admitted"),
    ],
)
async def test_the_first_reason_is_told(store: Store, fields: dict[str, Any], expected: str):
    assert await reason(store, ask(await new_key(store, **fields), money=10, tokens=10)) == expected


async def test_a_wrong_secret_and_a_wrong_id_are_both_unknown_and_learn_nothing(store: Store):
    key = await new_key(store)
    assert await store.admit(replace(ask(key), key_hash="guess")) == Refused("unknown", None)
    assert await store.admit(replace(ask(key), key_id="no such key")) == Refused("unknown", None)
    assert await store.key("no such key") is None


async def test_a_wrong_secret_cannot_use_another_callers_open_request(store: Store):
    key = await new_key(store)
    asked = await open_one(store, key)
    assert await reason(store, replace(asked, key_hash="guess")) == "unknown"


async def test_after_a_rotation_the_old_secret_is_good_for_its_grace(store: Store):
    key = await new_key(store)
    change = KeyChange(hash="new", old_hash=key.hash, old_until=NOW + 10)
    changed = await store.change_key(key.id, change, NOW)
    assert changed is not None
    assert await reason(store, ask(changed)) == "admitted"
    assert await reason(store, ask(key, now=NOW + 9)) == "admitted"
    assert await reason(store, ask(key, now=NOW + 10)) == "unknown"


async def test_a_tombstone_admits_nobody_but_settles_what_is_open(store: Store):
    key = await new_key(store, balance=100)
    asked = await open_one(store, key, money=10)
    await store.change_key(key.id, KeyChange(deleted=True), NOW)
    assert await reason(store, ask(key)) == "unknown"
    assert await settle(store, asked, cost=10)
    assert (await read(store, key)).spent == 10


async def test_a_change_touches_only_what_it_names(store: Store):
    key = await new_key(store, models=("a",), metadata={"a": 1})
    changed = await store.change_key(key.id, KeyChange(name="new", enabled=False, metadata={"b": 2}), NOW)
    assert changed == replace(key, name="new", enabled=False, metadata={"b": 2})
    assert await store.key(key.id) == changed
    changed = await store.change_key(key.id, KeyChange(all_models=True, enabled=True), NOW)
    assert changed == replace(key, name="new", models=None, metadata={"b": 2})
    changed = await store.change_key(key.id, KeyChange(models=()), NOW)
    assert changed is not None
    assert changed.models == ()


async def test_a_key_that_is_not_there_is_not_changed_into_being(store: Store):
    assert await store.change_key("nobody", KeyChange(name="x", rpm=5), NOW) is None
    assert await store.key("nobody") is None
    assert not await settle(store, ask(VirtualKey("nobody", "h", "n")), cost=1)
    assert await store.key("nobody") is None


@pytest.mark.parametrize("twice", [False, True])
async def test_limits_change_by_difference_under_open_holds(store: Store, twice: bool):
    key = await new_key(store, rpm=10, tpm=1000, daily_budget=500, balance=1000)
    asked = await open_one(store, key, money=200, tokens=300)
    change = KeyChange(rpm=3, tpm=400, daily_budget=600, balance=700)
    changed = await store.change_key(key.id, change, NOW)
    if twice:
        changed = await store.change_key(key.id, change, NOW)
    assert changed is not None
    assert (changed.left("r", NOW // MINUTE), changed.left("t", NOW // MINUTE)) == (2, 100)
    assert changed.left("d", NOW // DAY) == 400
    assert (changed.balance, changed.credit) == (500, 700)  # 700 to spend: 500, and 200 held
    assert await reason(store, ask(key, tokens=101)) == "tpm"
    await settle(store, asked, cost=50, tokens=100)
    after = await read(store, key)
    assert (after.balance, after.spent) == (650, 50)
    assert (after.left("t", NOW // MINUTE), after.left("d", NOW // DAY)) == (300, 550)
    assert after.left("r", NOW // MINUTE + 1) == 3


async def test_a_limit_is_lifted_and_set_again(store: Store):
    key = await new_key(store, rpm=1, balance=10)
    await open_one(store, key, money=10)
    lifted = await store.change_key(key.id, KeyChange(rpm=UNLIMITED, balance=UNLIMITED), NOW)
    assert lifted is not None
    assert not lifted.has_money_limit
    await open_one(store, key, money=500)
    await store.change_key(key.id, KeyChange(rpm=2, balance=600), NOW)
    after = await read(store, key)
    assert (after.left("r", NOW // MINUTE), after.balance) == (0, 90)


async def test_a_change_during_traffic_loses_nothing(store: Store):
    key = await new_key(store, rpm=100, balance=10_000)

    async def traffic() -> None:
        for _ in range(10):
            await settle(store, await open_one(store, key, money=10), cost=7)

    async def changes() -> None:
        for rpm in (90, 80, 70):
            assert await store.change_key(key.id, KeyChange(rpm=rpm), NOW)

    async with anyio.create_task_group() as group:
        group.start_soon(traffic)
        group.start_soon(traffic)
        group.start_soon(changes)
    after = await read(store, key)
    assert (after.spent, after.requests, after.left("r", NOW // MINUTE)) == (140, 20, 50)


async def test_what_was_admitted_is_what_the_store_holds(store: Store):
    key = await new_key(store, rpm=10)
    asked = ask(key, money=5, tokens=6)
    answer = await store.admit(asked)
    assert isinstance(answer, Admitted)
    assert answer.key == await store.key(key.id)
    assert answer.key.open == {asked.request_id: hold(5, 6)}
