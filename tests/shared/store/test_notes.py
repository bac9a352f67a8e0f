"""Notes: one stands under a name until it expires, and is written over only by those who may."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.store.base import MAX_NOTE, NEVER, Note, Store
from tests.shared.store.callers import KEPT, NOW, Forgetful, at_once

PAST = 1
"""An expiry behind any clock."""


def new_name() -> str:
    return f"note/{secrets.token_hex(6)}#\N{SNOWMAN}"


@pytest.mark.parametrize("body", [b"", bytes(range(256)), b"x" * MAX_NOTE], ids=["empty", "bytes", "longest"])
async def test_a_note_is_read_as_it_was_written(store: Store, body: bytes):
    name = new_name()
    assert await store.note(name) is None
    assert await store.write_note(name, body, NEVER, NOW)
    assert await store.note(name) == Note(name, body, NEVER, 1)
    assert await store.notes([name]) == [Note(name, body, NEVER, 1)]


async def test_a_name_may_be_of_1024_bytes(store: Store):
    name = new_name()[:-1].ljust(1021, ".") + "\N{SNOWMAN}"
    assert await store.write_note(name, b"a", KEPT, NOW, 0)
    assert await store.notes([name]) == [Note(name, b"a", KEPT, 1)]


async def test_a_longer_body_is_a_mistake_and_not_written(store: Store):
    name = new_name()
    with pytest.raises(ValueError, match="350,000 bytes"):
        await store.write_note(name, b"x" * (MAX_NOTE + 1), KEPT, NOW)
    assert await store.note(name) is None


async def test_an_expired_note_is_not_there(store: Store):
    kept, expired = new_name(), new_name()
    await store.write_note(kept, b"a", KEPT, NOW)
    await store.write_note(expired, b"b", PAST, NOW)
    assert await store.note(expired) is None
    assert [note.name for note in await store.notes([expired, kept, new_name()])] == [kept]


async def test_many_are_read_and_each_once(store: Store):
    names = [new_name() for _ in range(130)]
    await at_once(partial(store.write_note, name, name.encode(), KEPT, NOW) for name in names)
    found = await store.notes([*names, *names[:5], new_name()])
    assert sorted((note.name, note.body) for note in found) == sorted((name, name.encode()) for name in names)
    assert await store.notes([]) == []


async def test_more_come_than_one_reply_holds(store: Store):
    names = [new_name() for _ in range(50)]
    for name in names:
        await store.write_note(name, bytes(MAX_NOTE), KEPT, NOW)
    assert len(await store.notes(names)) == 50  # 17.5 MB


async def test_over_nothing_one_of_64_writes(store: Store, other: Store):
    name = new_name()

    async def claim(door: Store, number: int) -> int | None:
        return number if await door.write_note(name, f"claim {number}".encode(), KEPT, NOW, 0) else None

    works = [partial(claim, door, number) for number, door in enumerate([store, other] * 32)]
    (winner,) = (number for number in await at_once(works) if number is not None)
    assert await store.note(name) == Note(name, f"claim {winner}".encode(), KEPT, 1)


async def test_an_expired_note_is_nothing_to_write_over(store: Store):
    name = new_name()
    await store.write_note(name, b"old", NOW, NOW - 10)
    assert not await store.write_note(name, b"new", KEPT, NOW - 1, 0)
    assert not await store.write_note(name, b"new", KEPT, NOW, 1)
    assert await store.write_note(name, b"new", KEPT, NOW, 0)
    assert await store.note(name) == Note(name, b"new", KEPT, 2)


async def test_over_a_version_that_one_alone_is_written(store: Store):
    name = new_name()
    assert not await store.write_note(name, b"a", KEPT, NOW, 1)
    assert await store.write_note(name, b"a", KEPT, NOW)
    assert await store.write_note(name, b"b", KEPT, NOW, 1)
    assert not await store.write_note(name, b"c", KEPT, NOW, 1)
    assert await store.write_note(name, b"d", NEVER, NOW)
    assert await store.note(name) == Note(name, b"d", NEVER, 3)


@pytest.mark.parametrize("over", [0, 1])
async def test_a_reply_that_was_lost_is_a_note_that_was_written(store: Store, over: int):
    name = new_name()
    for version in range(over):
        await store.write_note(name, b"before", KEPT, NOW, version)
    for _ in range(2):
        assert await store.write_note(name, b"mine", KEPT, NOW, over)
    assert await store.note(name) == Note(name, b"mine", KEPT, over + 1)
    assert not await store.write_note(name, b"mine", KEPT, NOW, over + 5)


async def test_64_writers_of_one_note_lose_nothing(store: Store, other: Store):
    name, doors = new_name(), [Forgetful(store, 1), Forgetful(other, 2)]

    async def add(door: Any, word: str) -> None:
        while True:
            note = await door.note(name)
            words = note.body.decode().split() if note else []
            if word in words:  # written by a write whose reply was lost, and over which others wrote
                return
            body = " ".join([*words, word]).encode()
            if await door.write_note(name, body, KEPT, NOW, note.version if note else 0):
                return

    works = [partial(add, doors[number % 2], f"w{number}") for number in range(40)]
    await at_once(works, callers=8)
    note = await store.note(name)
    assert note is not None
    assert sorted(note.body.decode().split()) == sorted(f"w{number}" for number in range(40))
    assert note.version == 40


async def test_a_dropped_note_is_gone_and_begins_again(store: Store):
    name = new_name()
    await store.write_note(name, b"a", KEPT, NOW)
    await store.write_note(name, b"b", KEPT, NOW)
    for _ in range(2):
        await store.drop_note(name)
    assert await store.note(name) is None
    assert await store.write_note(name, b"c", KEPT, NOW, 0)
    assert await store.note(name) == Note(name, b"c", KEPT, 1)


async def test_a_note_and_a_key_of_one_name_do_not_meet(store: Store):
    name = f"KEY#{secrets.token_hex(6)}"
    await store.write_note(name, b"a", KEPT, NOW)
    assert await store.key(name.removeprefix("KEY#")) is None


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("write"), st.sampled_from([b"a", b"b"]), st.sampled_from([PAST, KEPT, NEVER]), st.integers(-1, 3)
        ),
        st.tuples(st.just("drop")),
    ),
    max_size=12,
)


@given(steps=STEPS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_note_and_a_variable_agree(store: Store, steps: list[tuple[Any, ...]]):
    name, stands = new_name(), None
    for step in steps:
        match step:
            case ("write", body, expires, choice):
                over = None if choice < 0 else choice
                version = stands.version if stands and stands.expires > NOW else 0
                own = stands is not None and stands.body == body and stands.version > choice
                fits = over in (None, version)
                assert await store.write_note(name, body, expires, NOW, over) == (fits or own)
                if fits:
                    stands = Note(name, body, expires, stands.version + 1 if stands else 1)
            case _:
                await store.drop_note(name)
                stands = None
        assert await store.note(name) == (stands if stands and stands.expires > NOW else None)
