"""What processes tell each other by the one shared item: rests and switches, and what they do not believe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from shared.errors import ProviderError
from shared.health import REST, Rest
from shared.state import FRESH, NAME, State, Switch
from shared.store.base import NEVER, Note
from shared.store.sqlite import SQLiteStore

NOW = 1_800_000_000.0


class Time:
    """`at` is what every clock shows."""

    def __init__(self) -> None:
        self.at = NOW

    def __call__(self) -> float:
        return self.at


class Slow(SQLiteStore):
    """Notes are read at once, and given out when `gate` opens."""

    gate: asyncio.Event | None = None

    async def note(self, name: str) -> Note | None:
        note, gate = await super().note(name), self.gate
        if gate:
            await gate.wait()
        return note


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Slow]:
    store = Slow(str(tmp_path / "test.db"))
    yield store
    await store.close()


@pytest.fixture
def time() -> Time:
    return Time()


def broken(state: State, target: str = "a/x") -> None:
    for _ in range(3):
        if rested := state.health.failed(target, ProviderError("server", "x"), NOW):
            state.rest(*rested)


async def read_later(state: State, time: Callable[[], float], seconds: float = FRESH) -> None:
    assert isinstance(time, Time)
    time.at += seconds
    assert state.old
    await state.read()


async def test_a_rest_that_is_over_is_not_an_awakening(store: Slow, time: Time) -> None:
    one, other = State(store, time), State(store, time)
    broken(one)
    await one.share()
    await other.read()
    time.at += REST + 1
    broken(other, "b/x")  # what it writes leaves out what is over
    other.rest("b/x", Rest(time.at + 9, "server"))
    await other.share()
    await read_later(one, time)
    one.health.begin("a/x", time.at)
    assert "a/x" in one.health.resting(time.at), "one request probes, the others wait"


async def test_an_awakening_is_told_before_the_rest_is_over(store: Slow, time: Time) -> None:
    one, other = State(store, time), State(store, time)
    broken(one)
    await one.share()
    await other.read()
    assert other.health.resting(time.at)
    one.wake(one.health.succeeded("a/x", time.at))
    await one.share()
    await read_later(other, time)
    assert not other.health.resting(time.at)
    assert not one.health.resting(time.at)


async def test_what_woke_before_it_was_told_is_not_told(store: Slow, time: Time) -> None:
    one = State(store, time)
    broken(one)
    one.wake(one.health.succeeded("a/x", time.at))
    await one.share()
    assert await store.note(NAME) is None
    assert not one.health.resting(time.at)


async def test_an_old_answer_is_not_fresh(store: Slow, time: Time) -> None:
    """A process that was frozen while it read hears what was true then."""
    state, admin = State(store, time), State(store, time)
    store.gate = gate = asyncio.Event()
    reading = asyncio.ensure_future(state.read())
    await asyncio.sleep(0.1)
    store.gate = None
    time.at += 3600
    await admin.turn("a/x", {"enabled": False}, wake=False)
    gate.set()
    await reading
    assert state.old
    await state.read()
    assert state.switches.named == {"a/x": Switch(False)}


async def test_a_slow_read_does_not_undo_a_switch(store: Slow, time: Time) -> None:
    state = State(store, time)
    store.gate = gate = asyncio.Event()
    reading = asyncio.ensure_future(state.read())
    await asyncio.sleep(0.1)
    store.gate = None
    time.at += 1
    await state.turn("a/x", {"enabled": False}, wake=False)
    gate.set()
    await reading
    assert state.switches.named == {"a/x": Switch(False)}


async def test_a_clock_that_is_set_back_does_not_keep_what_is_old(store: Slow, time: Time) -> None:
    state = State(store, time)
    await state.read()
    assert not state.old
    time.at -= 3600
    assert state.old
    await state.read()
    assert not state.old


async def test_what_a_newer_gateway_writes_is_read_as_far_as_it_is_known(store: Slow, time: Time) -> None:
    doc: dict[str, Any] = {
        "switches": {"a/x": {"enabled": False, "weight": 3}},
        "rests": {"b/x": [NOW + 50, "server", "by whom"]},
        "more": {},
    }
    await store.write_note(NAME, orjson.dumps(doc), NEVER, int(NOW))
    state = State(store, time)
    await state.read()
    assert state.switches.named == {"a/x": Switch(False)}
    assert state.health.resting(NOW) == {"b/x": Rest(NOW + 50, "server")}
    assert await state.turn("a/x", {"priority": 2}, wake=False) == Switch(False, 2)
    note = await store.note(NAME)
    assert note is not None
    assert "more" in orjson.loads(note.body)


async def test_switches_that_say_the_same_stay_the_same(store: Slow, time: Time) -> None:
    """Pools that were made by them are kept as long as they are."""
    state = State(store, time)
    await state.turn("a", {"priority": 2}, wake=False)
    before = state.switches
    await read_later(state, time)
    assert state.switches is before


async def test_what_another_has_told_is_not_told_again(store: Slow, time: Time) -> None:
    one, other = State(store, time), State(store, time)
    for state in (one, other):
        broken(state)
        await state.share()
        time.at += 1
    note = await store.note(NAME)
    assert note is not None
    assert note.version == 1


async def test_what_wakes_while_its_rest_is_told_stays_awake(store: Slow, time: Time) -> None:
    one = State(store, time)
    broken(one)
    store.gate = gate = asyncio.Event()
    sharing = asyncio.ensure_future(one.share())
    await asyncio.sleep(0.1)
    one.wake(one.health.succeeded("a/x", time.at))
    gate.set()
    await sharing
    assert not one.health.resting(time.at)
    await one.share()
    note = await store.note(NAME)
    assert note is not None
    assert orjson.loads(note.body)["rests"] == {}
