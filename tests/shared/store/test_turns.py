"""Round robin: each admission of a key to a route gets the next turn, and nobody else gets that one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from shared.store.base import Admitted, Ask, KeyChange, Refused, Store, VirtualKey
from tests.shared.store.callers import NOW, Forgetful, ask, at_once, new_key, read, settle


def ask_turn(key: VirtualKey, route: str = "auto") -> Ask:
    return replace(ask(key), turn=route)


async def test_64_callers_of_two_processes_get_successive_turns(store: Store, other: Store):
    key = await new_key(store, concurrency=1000)

    async def call(door: Store) -> int:
        asked = ask_turn(key)
        answer = await door.admit(asked)
        assert isinstance(answer, Admitted)
        await settle(door, asked, cost=0)
        return answer.key.turns["auto"]

    turns = await at_once(partial(call, door) for door in [store, other] * 60)
    assert sorted(turns) == list(range(1, 121))
    assert (await read(store, key)).turns == {"auto": 120}


async def test_lost_replies_take_no_second_turn(store: Store):
    key = await new_key(store, rpm=90, concurrency=1000)
    door = Forgetful(store)

    async def call() -> bool:
        return isinstance(await door.admit(ask_turn(key)), Admitted)

    assert sum(await at_once([call] * 100)) == 90
    assert (await read(store, key)).turns == {"auto": 90}
    assert door.lost > 3


async def test_a_lost_reply_shows_the_key_as_it_stands(store: Store):
    key = await new_key(store)
    lost = ask_turn(key)
    await store.admit(lost)
    await store.admit(ask_turn(key))
    again = await store.admit(lost)
    assert isinstance(again, Admitted)
    assert again.key.turns == {"auto": 2}


async def test_a_refusal_takes_no_turn(store: Store):
    key = await new_key(store, rpm=1)
    for expected in (Admitted, Refused):
        answer = await store.admit(ask_turn(key))
        assert isinstance(answer, expected)
        assert answer.key is not None
        assert answer.key.turns == {"auto": 1}


async def test_who_asks_for_no_turn_takes_none(store: Store):
    key = await new_key(store)
    await store.admit(ask(key))
    assert (await read(store, key)).turns == {}


@pytest.mark.parametrize("step", ["settle", "release", "change_key"])
async def test_what_comes_later_leaves_turns_alone(store: Store, step: str):
    key = await new_key(store, rpm=10)
    asked = ask_turn(key)
    await store.admit(asked)
    match step:
        case "settle":
            assert await settle(store, asked, cost=0)
        case "release":
            assert await store.release(key.id, asked.request_id, asked.hold, NOW)
        case _:
            changed = await store.change_key(key.id, KeyChange(rpm=5, name="new", balance=7), NOW)
            assert changed is not None
            assert changed.turns == {"auto": 1}
    assert (await read(store, key)).turns == {"auto": 1}


async def test_routes_of_any_name_are_counted_apart(store: Store):
    key, other = await new_key(store), await new_key(store)
    routes = ["auto", "auto:round-robin", "rr:auto", "r1", "a.b/c#d :e\n\N{SNOWMAN}", "", "x" * 200]
    for turn in (1, 2):
        for route in routes:
            await store.admit(ask_turn(key, route))
        assert (await read(store, key)).turns == dict.fromkeys(routes, turn)
    assert (await read(store, other)).turns == {}
