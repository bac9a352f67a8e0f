"""Random callers, administrators and crashes, against a model that counts what was used instead of what is left."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import books
from shared.store.base import Ask, Hold, KeyChange, Refused, Store, VirtualKey
from tests.shared.store.callers import DAY, KEPT, MINUTE, NOW, TTL, new_key, read, row

small = st.integers(0, 60)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 40), st.integers(0, 40), st.sampled_from([None, "auto", "fast"])),
        st.tuples(st.just("admit_again"), st.integers(0, 9)),
        st.tuples(st.just("extend"), st.integers(0, 9), st.integers(0, 30)),
        st.tuples(st.just("settle"), st.integers(0, 9), small, small),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.sampled_from([1, 20, 60, 90, 300, DAY])),
        st.tuples(st.just("sweep")),
        st.tuples(st.just("limit"), st.sampled_from(["rpm", "tpm", "daily_budget", "balance"]), st.integers(0, 150)),
    ),
    max_size=25,
)


@dataclass
class Model:
    """One key by simple bookkeeping. `used` counts requests, tokens and money by window."""

    store: Store
    key: VirtualKey
    limits: dict[str, int]
    now: int = NOW
    spent: int = 0
    requests: int = 0
    credit: int = 200
    used: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    open: dict[str, Hold] = field(default_factory=dict)
    asked: list[Ask] = field(default_factory=list)

    @property
    def held(self) -> int:
        return sum(hold.money for hold in self.open.values())

    def windows(self, now: int) -> tuple[str, str, str]:
        return f"r{now // MINUTE}", f"t{now // MINUTE}", f"d{now // DAY}"

    def left(self, name: str) -> int:
        return self.limits[{"r": "rpm", "t": "tpm", "d": "daily_budget"}[name[0]]] - self.used[name]

    def chosen(self, number: int) -> Ask | None:
        return self.asked[number % len(self.asked)] if self.asked else None

    def expected(self, money: int, tokens: int) -> str:
        requests, used_tokens, day = self.windows(self.now)
        refusals = {
            "concurrency": len(self.open) + 1 > self.key.concurrency,
            "rpm": self.left(requests) < 1,
            "tpm": self.left(used_tokens) < tokens,
            "daily_budget": self.left(day) < money,
            "balance": self.spent + self.held + money > self.credit,
        }
        return next((reason for reason, refused in refusals.items() if refused), "admitted")

    async def admit(self, money: int, tokens: int, turn: str | None) -> None:
        request_id, hold = f"{self.key.id}-{len(self.asked)}", Hold(money, tokens, self.now, TTL)
        asked = Ask(self.key.id, self.key.hash, request_id, hold, turn)
        expected, answer = self.expected(money, tokens), await self.store.admit(asked)
        assert (answer.reason if isinstance(answer, Refused) else "admitted") == expected
        if expected == "admitted":
            self.asked.append(asked)
            self.open[asked.request_id] = asked.hold
            self.used.update(dict(zip(self.windows(self.now), (1, tokens, money), strict=True)))
            self.turns.update(filter(None, [turn]))

    async def admit_again(self, number: int) -> None:
        """A reply that was lost: another admission only of what is not open any more, which no gateway sends."""
        asked = self.chosen(number)
        if asked and asked.request_id in self.open:
            assert not isinstance(await self.store.admit(asked), Refused)

    async def extend(self, number: int, more: int) -> None:
        asked = self.chosen(number)
        if asked and (old := self.open.get(asked.request_id)):
            day, new = self.windows(old.start)[2], Hold(old.money + more, old.tokens, old.start, old.ttl)
            fits = self.left(day) >= more and self.spent + self.held + more <= self.credit
            assert await self.store.extend(self.key.id, asked.request_id, old, new) == fits or more == 0
            if fits:
                self.open[asked.request_id] = new
                self.used[day] += more

    async def settle(self, number: int, cost: int, tokens: int) -> None:
        """By a caller who may not know of an extension, or that it is settled."""
        if asked := self.chosen(number):
            hold = self.open.get(asked.request_id)
            if hold:
                cost = min(cost, hold.money)
                await self.store.record(row(asked, cost), KEPT)
            settled = await self.store.settle(self.key.id, asked.request_id, asked.hold, cost, tokens, self.now)
            assert settled == (hold is not None)
            self.close(asked.request_id, cost, tokens)

    def close(self, request_id: str, cost: int, tokens: int) -> None:
        if hold := self.open.pop(request_id, None):
            self.spent += cost
            self.requests += 1
            _, minute, day = self.windows(hold.start)
            if minute in self.windows(self.now):
                self.used[minute] += tokens - hold.tokens
            if day in self.windows(self.now):
                self.used[day] += cost - hold.money

    async def release(self, number: int) -> None:
        if asked := self.chosen(number):
            hold = self.open.pop(asked.request_id, None)
            done = await self.store.release(self.key.id, asked.request_id, asked.hold, self.now)
            assert done == (hold is not None)
            if hold:
                back = dict(zip(self.windows(hold.start), (1, hold.tokens, hold.money), strict=True))
                self.used.subtract({name: amount for name, amount in back.items() if name in self.windows(self.now)})

    async def wait(self, seconds: int) -> None:
        self.now += seconds

    async def sweep(self) -> None:
        overdue = {name: hold for name, hold in self.open.items() if hold.start + hold.ttl <= self.now}
        settled = await books.sweep(self.store, await read(self.store, self.key), self.now, KEPT)
        assert settled == len(overdue)
        for name, hold in overdue.items():
            self.close(name, hold.money, hold.tokens)

    async def limit(self, name: str, value: int) -> None:
        change: dict[str, Any] = {name: value}
        await self.store.change_key(self.key.id, KeyChange(**change), self.now)
        if name == "balance":
            self.credit = value + self.spent
        else:
            self.limits[name] = value

    async def agrees(self) -> None:
        key = await read(self.store, self.key)
        assert (key.open, key.spent, key.requests, key.credit) == (self.open, self.spent, self.requests, self.credit)
        assert key.balance == self.credit - self.spent - self.held
        assert key.turns == self.turns
        names = self.windows(self.now)
        assert [key.left_in(name) for name in names] == [self.left(name) for name in names]


@given(steps=STEPS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_store_and_simple_bookkeeping_agree(store: Store, steps: list[tuple[Any, ...]]):
    limits = {"rpm": 6, "tpm": 100, "daily_budget": 120}
    model = Model(store, await new_key(store, **limits, balance=200, concurrency=4), limits)
    for verb, *arguments in steps:
        await getattr(model, verb)(*arguments)
        await model.agrees()
    await model.wait(TTL)
    await model.sweep()
    await model.agrees()
    assert await books.check(store, await read(store, model.key), model.now, days=40) == 0
