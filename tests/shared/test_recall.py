"""What clients throw away of a turn with tools, on its way through the gateway: to who needs it, in nobody's way."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Forbidden, StoreUnavailable
from shared.schema import JSON
from shared.store.base import Admitted, Ask, Note, Refused, VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.kit import Kit, streamed, whole

ENVIRON = {"OPENAI_API_KEY": "sk-test-openai", "DEEPSEEK_API_KEY": "sk-test-deepseek"}
THOUGHT = "The weather, then the time."


class Watched(SQLiteStore):
    """Counts what is read of the vault's notes, and fails on demand; where `together`, reads and admissions wait for
    one another."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reads: list[int] = []
        self.written = 0
        self.down = False
        self.together: dict[str, asyncio.Event] | None = None

    async def _meet(self, name: str, other: str) -> None:
        if self.together:
            self.together[name].set()
            async with asyncio.timeout(5):
                await self.together[other].wait()

    async def admit(self, ask: Ask) -> Admitted | Refused:
        await self._meet("admit", "notes")
        return await super().admit(ask)

    async def notes(self, names: Sequence[str]) -> list[Note]:
        if names[0].startswith("CALL#"):
            self.reads.append(len(names))
            await self._meet("notes", "admit")
            if self.down:
                raise StoreUnavailable("no notes")
        return await super().notes(names)

    async def write_note(self, *args: Any, **more: Any) -> bool:
        if self.down:
            raise StoreUnavailable("no notes")
        self.written += 1
        return await super().write_note(*args, **more)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Watched]:
    store = Watched(str(tmp_path / "test.db"))
    yield store
    await store.close()


@pytest.fixture
def kit(store: Watched) -> Kit:
    return Kit(store, lambda _: whole(copy.deepcopy(CALLED)), ENVIRON)


async def key_of(kit: Kit, **limits: Any) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test", **limits)))[1]


def call(name: str) -> JSON:
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": "{}"}}


CALLS = [call("weather"), call("time")]
MESSAGE = {"role": "assistant", "content": None, "reasoning_content": THOUGHT, "tool_calls": CALLS}
CALLED: JSON = {
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "tool_calls"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
}
ASKED: list[JSON] = [{"role": "user", "content": "Oslo?"}]
TURN: list[JSON] = [
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    *({"role": "tool", "tool_call_id": each["id"], "content": "rain"} for each in CALLS),
]
"""As a stock client sends it back."""


def ask(model: str = "deepseek/deepseek-chat", turns: int = 0, **more: Any) -> JSON:
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
    return {"model": model, "messages": [*ASKED, *copy.deepcopy(TURN) * turns], "tools": tools, **more}


def thought(kit: Kit) -> str | None:
    """What the provider was told last of the assistant's first turn."""
    sent = json.loads(kit.requests[-1].content)["messages"]
    return next(each.get("reasoning_content") for each in sent if each["role"] == "assistant")


@pytest.mark.parametrize("stream", [False, True])
async def test_it_comes_back_to_who_demands_it(kit: Kit, store: Watched, stream: bool) -> None:
    deltas = [
        {"reasoning_content": THOUGHT[:9]},
        {"reasoning_content": THOUGHT[9:]},
        *({"tool_calls": [{"index": at, **each}]} for at, each in enumerate(CALLS)),
    ]
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    if stream:
        events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
        kit.reply = lambda _: streamed(*events, b"data: [DONE]\n\n")
    key = await key_of(kit)
    await kit.ask(key, ask(stream=stream))
    assert store.written == 1, "the calls of a turn come back together, so one note is enough"
    await kit.ask(key, ask(turns=1, stream=stream))
    assert (thought(kit), store.reads) == (THOUGHT, [2])


async def test_another_keys_calls_find_nothing(kit: Kit, store: Watched) -> None:
    await kit.ask(await key_of(kit), ask())
    await kit.ask(await key_of(kit), ask(turns=1))
    assert THOUGHT not in kit.requests[-1].content.decode()
    assert store.reads == [2]


async def test_what_the_client_returns_itself_is_believed(kit: Kit) -> None:
    key = await key_of(kit)
    await kit.ask(key, ask())
    body = ask(turns=1)
    body["messages"][1]["reasoning_content"] = "my own"
    await kit.ask(key, body)
    assert thought(kit) == "my own"


@pytest.mark.parametrize(
    "body",
    [
        ask("openai/gpt-4o-mini", turns=1),
        ask(),
        {"model": "deepseek/deepseek-chat", "messages": [*ASKED, {"role": "assistant", "content": "x"}, *ASKED]},
    ],
)
async def test_where_nobody_cares_nothing_is_read(kit: Kit, store: Watched, body: JSON) -> None:
    await kit.ask(await key_of(kit), body)
    assert store.reads == []


async def test_a_provider_that_refuses_it_is_not_sent_it(kit: Kit) -> None:
    """It is put back for the whole route, of which only some know it."""
    key = await key_of(kit)
    await kit.ask(key, ask())
    kit.reply = lambda request: whole({}, 503) if "deepseek" in request.url.host else whole(copy.deepcopy(CALLED))
    outcome = await kit.ask(key, ask(turns=1, models=["openai/gpt-4o-mini"]))
    assert outcome.row.doc["provider"] == "openai"
    assert THOUGHT not in kit.requests[-1].content.decode()


async def test_it_is_read_beside_the_admission(kit: Kit, store: Watched) -> None:
    key = await key_of(kit)
    await kit.ask(key, ask())
    store.together = {"admit": asyncio.Event(), "notes": asyncio.Event()}
    await kit.ask(key, ask(turns=1))
    assert thought(kit) == THOUGHT


@pytest.mark.parametrize("down", ["to write", "to read"])
async def test_without_the_store_there_is_still_an_answer(kit: Kit, store: Watched, down: str) -> None:
    key = await key_of(kit, balance=10**9, credit=10**9)
    store.down = down == "to write"
    assert (await kit.ask(key, ask())).error is None
    store.down = down == "to read"
    outcome = await kit.ask(key, ask(turns=1))
    assert (outcome.error, outcome.row.doc["status"], outcome.key.open) == (None, "ok", {})
    assert THOUGHT not in kit.requests[-1].content.decode()


async def test_a_long_history_is_looked_up_from_its_end_in_one_round_trip(kit: Kit, store: Watched) -> None:
    turns = [
        message
        for each in (call(f"n{number}") for number in range(150))
        for message in (
            {"role": "assistant", "content": None, "tool_calls": [each]},
            {"role": "tool", "tool_call_id": each["id"], "content": "x"},
        )
    ]
    await kit.ask(await key_of(kit), {**ask(), "messages": [*ASKED, *turns]})
    assert store.reads == [100]


async def test_of_a_turn_that_broke_off_nothing_is_kept(kit: Kit, store: Watched) -> None:
    delta = {"reasoning_content": THOUGHT, "tool_calls": [{"index": 0, **CALLS[0]}]}
    kit.reply = lambda _: streamed(b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode())
    outcome = await kit.ask(await key_of(kit), ask(stream=True))
    assert (outcome.row.doc["status"], store.written) == ("failed", 0)


async def test_what_comes_back_is_held_too(kit: Kit) -> None:
    """It is sent, so it costs: a budget that cannot bear it is not overspent."""
    called = copy.deepcopy(CALLED)
    called["choices"][0]["message"]["reasoning_content"] = "word " * 50_000
    called["usage"] = {"prompt_tokens": 10, "completion_tokens": 50_000, "total_tokens": 50_010}
    kit.reply = lambda _: whole(copy.deepcopy(called))
    made, key = await kit.keys.create(VirtualKey("", "", "test", balance=10**8, credit=10**8))
    left = (await kit.ask(key, ask(max_tokens=60_000))).key.balance
    with pytest.raises(Forbidden, match="money"):
        await kit.ask(key, ask(turns=1, max_tokens=50))
    owner = await kit.services.store.key(made.id)
    assert owner is not None
    assert (len(kit.requests), owner.balance, owner.open) == (1, left, {})
