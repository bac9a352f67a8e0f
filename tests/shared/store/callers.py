"""Who stands before the store in these tests: keys, asks, and callers who lose replies."""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import anyio

from shared.keys import time_ordered
from shared.store.base import Admitted, Ask, Generation, Hold, Store, VirtualKey

T = TypeVar("T")

NOW = 20_000 * 86400 + 3600 * 12
"""Noon of a day, at the start of a minute."""
MINUTE, DAY = 60, 86400
TTL = 90
KEPT = 10**10
"""An expiry far ahead of any clock; rows with it are shown."""

_numbers = itertools.count()


async def new_key(store: Store, **fields: Any) -> VirtualKey:
    """A key that no other test has, its credit equal to its balance."""
    key_id = f"key{secrets.token_hex(6)}"
    if "balance" in fields:
        fields["credit"] = fields["balance"]
    key = VirtualKey(key_id, f"hash of {key_id}", "test", **fields)
    assert await store.add_key(key)
    return key


def hold(money: int = 0, tokens: int = 0, now: int = NOW, ttl: int = TTL) -> Hold:
    return Hold(money, tokens, now, ttl)


def ask(key: VirtualKey, money: int = 0, tokens: int = 0, now: int = NOW, request_id: str | None = None) -> Ask:
    request_id = request_id or f"{time_ordered(now)[:8]}{next(_numbers):08}"
    return Ask(key.id, key.hash, request_id, hold(money, tokens, now))


async def open_one(store: Store, key: VirtualKey, money: int = 0, tokens: int = 0, now: int = NOW) -> Ask:
    """An admitted request."""
    asked = ask(key, money, tokens, now)
    assert isinstance(await store.admit(asked), Admitted)
    return asked


async def settle(store: Store, asked: Ask, cost: int, tokens: int = 0, now: int | None = None) -> bool:
    moment = asked.hold.start if now is None else now
    return await store.settle(asked.key_id, asked.request_id, asked.hold, cost, tokens, moment)


def row(asked: Ask, cost: int, created: int | None = None, **doc: Any) -> Generation:
    """The record of a request that took one prompt and two completion tokens."""
    tokens = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    doc = {"model": "m", "provider": "p", "status": "ok", "tokens": tokens, **doc}
    moment = asked.hold.start if created is None else created
    return Generation(f"gen-{asked.request_id}", asked.key_id, moment, cost, doc)


async def read(store: Store, key: VirtualKey) -> VirtualKey:
    """The key as it stands, its books checked."""
    found = await store.key(key.id)
    assert found is not None
    assert conserved(found)
    return found


def conserved(key: VirtualKey) -> bool:
    return key.balance + sum(hold.money for hold in key.open.values()) + key.spent == key.credit


async def at_once(works: Iterable[Callable[[], Awaitable[T]]], callers: int = 64) -> list[T]:
    """The answers, in any order, of so many callers who share the work."""
    waiting, answers = iter(list(works)), list[T]()

    async def caller() -> None:
        for work in waiting:
            answers.append(await work())

    async with anyio.create_task_group() as group:
        for _ in range(callers):
            group.start_soon(caller)
    return answers


class Forgetful:
    """A store that loses one reply in ten, its work done; the caller cannot tell and sends again."""

    def __init__(self, store: Store, seed: int = 7) -> None:
        self._store = store
        self._dice = random.Random(seed)
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def send(*args: Any) -> Any:
            while self._dice.random() < 0.1:
                await method(*args)
                self.lost += 1
            return await method(*args)

        return send
