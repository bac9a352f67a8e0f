"""One request, start to finish: planned, admitted, routed, answered, recorded, settled."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import ceil
from typing import Any, Protocol, TypeAlias, TypeVar

from shared import history
from shared.answer import Answer
from shared.cache import Cache, Kept
from shared.catalog import Catalog, Deployment
from shared.errors import (
    Forbidden,
    GatewayError,
    Overloaded,
    ProviderError,
)
from shared.exchange import Attempt, Exchange, Routing
from shared.health import RetryBudget, blames_account
from shared.keys import Credential
from shared.limits import GRACE, Limits
from shared.planning import DEFAULT_OUTPUT, Plan, Planner
from shared.providers.dialect import Outgoing
from shared.router import (
    MAX_ATTEMPTS,
    MOST_TOLD,
    Order,
    Removal,
    awake,
    one_each,
    ordered,
    permitted,
    switched_on,
)
from shared.schema import JSON, Call
from shared.state import State
from shared.store.base import Hold, Store, VirtualKey
from shared.telemetry import logger
from shared.tokens import Prompt
from shared.upstream import Upstream
from shared.vault import Vault

Chunks: TypeAlias = AsyncGenerator[list[JSON], None]
"""What each read of a stream brought, as OpenAI's chunks; an error event is the last."""

TOKENS_PER_CHARACTER = 3
"""At most: between two looks at the meter, which cost more than a chunk, a stream cannot outgrow its hold."""
LONGEST_WAIT = 2.0
"""Seconds that a provider may ask us to wait, and be waited for, where nobody else is left."""
JITTER = (0.05, 0.2)
"""Seconds before a second try."""

Admission = TypeVar("Admission")


class Reading(Protocol):
    """What is read beside admission, and then put into the call."""

    async def read(self) -> None: ...

    def applied(self, call: Call) -> Call: ...


class Gateway:
    """Collaborators come in here; there are no globals. `clock` is the wall clock, in epoch seconds.

    `examine` raises for what a safety check refuses."""

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        upstream: Upstream,
        store: Store,
        total_timeout: float,
        examine: Callable[[Call], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.time,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._catalog = catalog
        self._limits = limits
        self._upstream = upstream
        self._store = store
        self._vault = Vault(store, clock)
        self._examine = examine
        self._total_timeout = total_timeout
        self._clock = clock
        self._dice = dice
        self._retries = RetryBudget()
        self.cache = Cache(store, clock)
        self.plan = Planner(catalog, upstream, self.cache).plan  # the first step of each request
        self.state = State(store, clock)
        self.open: set[Exchange] = set()
        self.answered = 0
        self._idle = asyncio.Event()

    def choose(
        self, plan: Plan, key: VirtualKey, removed: list[Removal], *, ahead: int = 0, kept: bool = False
    ) -> Order:
        """Who is to be tried, in order, of those that this key may use; raises GatewayError where nobody is left.

        `ahead`: turns that are not taken yet. `kept`: the answer is there, so that it is no matter who rests."""
        now, state = self._clock(), self.state
        pool = permitted(plan.pool, key, plan.call.unpriced, removed)
        pool = switched_on(pool, removed, state.switches.applied if state.switches.named else None)
        if plan.strategy == "round_robin" and plan.automatic:
            pool = one_each(pool)
        turn = key.turns.get(plan.turn, 0) + ahead if plan.turn else 0
        order = ordered(
            pool,
            plan.strategy,
            plan.wish,
            needs=plan.needs,
            health=state.health,
            now=now,
            dice=self._dice,
            turn=turn,
        )
        if not (plan.wish.allow_fallbacks or plan.wish.pinned):
            others = [pool.candidates[at] for at in order.places[1:MOST_TOLD]]
            removed += [Removal(each, "allow_fallbacks", "it is no first choice") for each in others]
            order = order._replace(places=order.places[:1])
        return order if kept else awake(order, state.health, now, removed)

    async def admit(
        self, plan: Plan, credential: Credential, request_id: str, context: Reading | None = None
    ) -> Exchange:
        """The store's one write before the provider, reads beside it, then what only the key it returned can tell.

        `context` reads what belongs into the call. Whatever was read is thrown away where the key is refused."""
        call, now = plan.call, self._clock()
        lookup = plan.lookup
        recall = self._vault.recall(call, credential.key_id, plan.pool.providers.values())
        looks = None if lookup is None or lookup.found or lookup.anew else lookup
        reads = [each.read() for each in (self.state if self.state.old else None, looks, recall, context) if each]
        key, hold = await beside(reads, self._reserve(plan, credential, request_id, int(now)))
        removed = list(plan.removed)
        try:
            for reading in (recall, context):
                call = reading.applied(call) if reading else call
            prompt = plan.prompt if call is plan.call else Prompt.read(call.body, call.surface)
            if self._examine:
                await self._examine(plan.call)
            order = self.choose(plan, key, removed, kept=lookup is not None and lookup.found)
            candidates = deployments(order)
            if key.has_money_limit and most_money(candidates, prompt, plan.output) > hold.money:
                order, hold = await self._afford(order, prompt, plan.output, key, request_id, hold, removed)
                candidates = deployments(order)
        except BaseException:  # whatever it was, nothing was asked
            await self._limits.release(key, request_id, hold, int(now))
            raise
        estimate = plan.needs.prompt if call is plan.call else prompt.estimate(candidates[0].model)
        exchange = Exchange(request_id, key, call, candidates, hold, prompt, estimate, plan.output, now)
        exchange.routing, exchange.lookup = Routing(plan.strategy, order, removed), lookup
        if call is plan.call and candidates[0] is plan.pool.candidates[0].to and exchange.bound(candidates[0]) is None:
            exchange.outgoing = plan.outgoing
        self.open.add(exchange)
        self._retries.request(now)
        return exchange

    async def _reserve(self, plan: Plan, credential: Credential, request_id: str, now: int) -> tuple[VirtualKey, Hold]:
        """Admit for the dearest of those that come first; where the key has too little, for the cheapest it may use."""
        first = [candidate.to for candidate in plan.pool.candidates[:MAX_ATTEMPTS]]
        money = most_money(first, plan.prompt, plan.output)
        hold = Hold(money, plan.needs.prompt + plan.output, now, ceil(self._total_timeout) + GRACE)
        try:
            return await self._limits.admit(credential, request_id, hold, plan.turn), hold
        except Forbidden as poor:
            asked = poor.code == "insufficient_quota" and len(plan.pool) > 1
            if (key := await self._store.key(credential.key_id) if asked else None) is None:
                raise
            found = deployments(self.choose(plan, key, [], ahead=1))
            less = replace(hold, money=min(most_money([to], plan.prompt, plan.output) for to in found))
            if less.money >= money:
                raise
        return await self._limits.admit(credential, request_id, less, plan.turn), less

    async def _afford(
        self,
        order: Order,
        prompt: Prompt,
        output: int,
        key: VirtualKey,
        request_id: str,
        hold: Hold,
        removed: list[Removal],
    ) -> tuple[Order, Hold]:
        """Hold more where those that the key may use are dearer than those that came first; leave out the too dear."""
        costs = {at: most_money([order.pool.candidates[at].to], prompt, output) for at in order.places[:MAX_ATTEMPTS]}
        for money in sorted({*costs.values()}, reverse=True):
            larger = replace(hold, money=max(money, hold.money))
            if larger == hold or await self._limits.extend(key, request_id, hold, larger):
                dear = [at for at, cost in costs.items() if cost > larger.money]
                removed += [Removal(order.pool.candidates[at], "money", "too little is left for it") for at in dear]
                return order._replace(places=[at for at, cost in costs.items() if cost <= larger.money]), larger
        raise Forbidden("This request may cost more than is left of this key's money.", code="insufficient_quota")

    async def complete(self, exchange: Exchange) -> JSON:
        """A whole answer, from the cache or from the first deployment that gives one; raises the last refusal."""
        answer = Answer(exchange)
        if kept := await self._reused(exchange):
            return answer.completed(kept.whole())
        while found := await self._next(exchange):
            try:
                piece = await self._upstream.complete(exchange.call, *found, exchange.deadline, exchange.notes)
            except ProviderError as error:
                self._failed(exchange, error)
            else:
                body = answer.completed(piece)
                self._answered(exchange, answer)
                return body
        raise self._refusal(exchange)

    async def stream(self, exchange: Exchange) -> Chunks:
        """A stream, which ends in one honest way: finish reasons, or one error event; before content it may raise.

        Once `exchange.committed`, or once something was sent, an error is an event."""
        answer = Answer(exchange)
        try:
            if kept := await self._reused(exchange):
                for piece in kept.pieces():
                    if chunks := answer.take([piece]):
                        yield chunks
                yield answer.ending()
                return
            while found := await self._next(exchange):
                try:
                    answers = self._upstream.stream(exchange.call, *found, exchange.deadline, exchange.notes)
                    async with aclosing(answers) as batches:
                        async for batch in batches:
                            if not batch:
                                answer.all_said()
                                if answer.whole:
                                    yield self._ending(exchange, answer)
                            elif chunks := answer.take(batch):
                                yield chunks
                                if exchange.grows and not answer.ended and not await self._may_go_on(exchange, answer):
                                    answer.cut_short()
                                    break
                    if not answer.whole:
                        raise ProviderError(
                            "disconnected", "The provider's stream ended before its answer.", ambiguous=True
                        )
                except ProviderError as error:
                    if not answer.whole:  # else only the trailer is lost: the answer is whole
                        self._failed(exchange, error)
                        if answer.started:
                            raise error.answer() from error
                        answer = Answer(exchange)  # what it said, unseen, is not the next one's
                        continue
                if not answer.ended:
                    yield self._ending(exchange, answer)
                return
            raise self._refusal(exchange)
        except GatewayError as error:
            exchange.error = error
            if not (answer.started or exchange.committed):
                raise
            yield [answer.error(error)]

    async def _reused(self, exchange: Exchange) -> Kept | None:
        """An answer kept for this very request, unless nobody, or not this key, may use who gave it any more.

        Raises Overloaded where those are left who may not be asked now, either."""
        kept = await exchange.lookup.reuse(exchange.deadline) if exchange.lookup else None
        if not kept or exchange.routing is None or (order := exchange.routing.order) is None:
            return None
        if f"{kept.provider}/{kept.model}" in order.pool.where:
            exchange.kept, exchange.dropped = kept, kept.dropped
        else:
            exchange.waiting = deployments(awake(order, self.state.health, self._clock(), []))
            exchange.outgoing = None
        return exchange.kept

    async def close(self, exchange: Exchange) -> JSON:
        """Record and settle, however the request ended; after the caller's last byte. Returns the record."""
        try:
            if exchange.attempts:
                self.state.health.end(exchange.deployment.id)
            if exchange.lookup:
                exchange.lookup.land(None)
            if exchange.ticket:  # before it is paid: whatever happens now, it is paid once
                await (exchange.ticket.keep() if exchange.status == "ok" else exchange.ticket.drop())
            row, used = exchange.row(self._clock())
            now = int(self._clock())
            await self._limits.settle(exchange.key, exchange.request_id, exchange.hold, row, used, now)
            self.answered += 1
            if exchange.lookup:
                await exchange.lookup.keep()
            if exchange.remembers and exchange.answer and exchange.status == "ok" and not exchange.kept:
                own, said = exchange.deployment.provider, exchange.answer.messages
                await self._vault.keep(exchange.key.id, exchange.call, said, own)
            if exchange.keeps_history and exchange.answer:
                message = next(iter(exchange.answer.messages), JSON())
                await history.keep(self._store, exchange.key.id, exchange.call, exchange.request_id, message, row.doc)
            await self.state.share()
            return dict(row.doc)
        finally:
            self.open.discard(exchange)
            self._idle.set()

    async def drained(self) -> None:
        """Wait until every open request is settled."""
        while self.open:
            self._idle.clear()
            await self._idle.wait()

    async def _next(self, exchange: Exchange) -> tuple[Deployment, Outgoing] | None:
        """Who is to be asked now, and what: the same once more, the next in the route, or nobody."""
        error, outgoing = exchange.last_error, exchange.outgoing
        if error:
            if len(exchange.attempts) >= MAX_ATTEMPTS or self._now() >= exchange.deadline:
                return None
            if outgoing and (wait := self._second_try(exchange, error)) is not None:
                await asyncio.sleep(wait)
                return self._begin(exchange, exchange.deployment, outgoing)
            if not error.falls_back:
                return None
            outgoing = None
        while exchange.waiting:
            to = exchange.waiting.pop(0)
            if error and error.fault == "context" and not larger(to, exchange.deployment):
                continue
            if to.provider.name in exchange.refusing:
                continue
            try:
                outgoing = outgoing or self._upstream.prepare(exchange.call, to, exchange.bound(to))
            except GatewayError as refused:  # it cannot be asked this: not an attempt
                exchange.error = refused
                continue
            return self._begin(exchange, to, outgoing)
        return None

    def _begin(self, exchange: Exchange, to: Deployment, outgoing: Outgoing) -> tuple[Deployment, Outgoing]:
        self.state.health.begin(to.id, self._clock())
        exchange.attempt(Attempt(to), outgoing)
        return to, outgoing

    def _second_try(self, exchange: Exchange, error: ProviderError) -> float | None:
        """Seconds after which the same deployment is asked again; None where it is not.

        Once, where that leaves a try for each of the others, and while such tries are few. Where others are left,
        nobody waits for a busy one."""
        tried = [attempt for attempt in exchange.attempts if attempt.to is exchange.deployment]
        if error.retries == "no" or len(tried) > 1 or len(exchange.attempts) + len(exchange.waiting) >= MAX_ATTEMPTS:
            return None
        wait = random.uniform(*JITTER)  # noqa: S311 not a secret
        if error.retries == "wait":
            wait = max(wait, error.retry_after or 0)
            if exchange.waiting or wait > LONGEST_WAIT:
                return None
        if self._now() + wait >= exchange.deadline or not self._retries.take(self._clock()):
            return None
        return wait

    def _failed(self, exchange: Exchange, error: ProviderError) -> None:
        exchange.failed(error)
        to, spent = exchange.deployment, exchange.attempts[-1].seconds
        silent = not (exchange.answer and exchange.answer.started) and spent > self._total_timeout / 2
        rested = self.state.health.failed(to.id, error, self._clock(), silent=silent)
        if rested and (blames_account(error) or self._catalog.knows(to.provider.name, to.model)):
            self.state.rest(*rested)  # others need not hear of names that a caller made up

    def _ending(self, exchange: Exchange, answer: Answer) -> list[JSON]:
        chunks = answer.ending()
        self._answered(exchange, answer)
        return chunks

    def _answered(self, exchange: Exchange, answer: Answer) -> None:
        """The deployment is well, and was so fast; whoever waits for the same answer has it now."""
        exchange.answered()
        to, health, now = exchange.deployment.id, self.state.health, self._clock()
        self.state.wake(health.succeeded(to, now - exchange.attempts[-1].seconds))
        health.measure(to, *exchange.speed(), now, stream=exchange.call.stream)
        if exchange.lookup:
            exchange.lookup.land(answer.kept())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _refusal(self, exchange: Exchange) -> GatewayError:
        """What the caller is told when nobody answered: the last refusal, unless the providers are merely busy.

        Where one of them failed, it is not the caller's fault that others lack the model, or are too small."""
        errors = [attempt.error for attempt in exchange.attempts if attempt.error]
        if not errors:
            return exchange.error or Overloaded("No deployment could take this request.")
        if not errors[-1].falls_back:
            return errors[-1].answer()
        busy = [error for error in errors if error.fault == "rate_limit"]
        soonest = min(busy, key=lambda error: error.retry_after or 1, default=errors[-1])
        if len(busy) == len(errors):
            return soonest.answer()
        if busy:
            return Overloaded("No provider could answer: some are at their rate limit.", retry_after=soonest.wait)
        answers = [error.answer() for error in errors]
        return next((answer for answer in reversed(answers) if answer.status >= 500), answers[-1])

    async def _may_go_on(self, exchange: Exchange, answer: Answer) -> bool:
        """Keep the hold ahead of a growing stream; False when the key's money ends here."""
        call = exchange.call
        if answer.length < exchange.enough_until:
            return True
        spare = exchange.output - answer.meter.tokens * 1.25 - 64
        if spare > 0:
            exchange.enough_until = answer.length + int(spare) // TOKENS_PER_CHARACTER
            return True
        old, output = exchange.hold, exchange.output + DEFAULT_OUTPUT * call.generated
        new = replace(old, money=max(old.money, most_money([exchange.deployment], exchange.prompt, output)))
        if not await self._limits.extend(exchange.key, exchange.request_id, old, new):
            return False
        exchange.hold, exchange.output = new, output
        return True


def most_money(candidates: Sequence[Deployment], prompt: Prompt, output: int) -> int:
    """What the dearest may cost at most, in nano-dollars; one without a price counts nothing."""
    return max((to.price.most(prompt.at_most(to.model), output) for to in candidates if to.price), default=0)


def deployments(order: Order) -> list[Deployment]:
    """Those of which one after the other may be tried."""
    return [each.candidate.to for each in order.first(MAX_ATTEMPTS)]


async def beside(reads: Sequence[Coroutine[Any, Any, None]], admission: Awaitable[Admission]) -> Admission:
    """The admission, and reads that go on meanwhile; they end with it where it refuses. Who fails has read nothing."""
    if not reads:
        return await admission
    tasks = [asyncio.ensure_future(read) for read in reads]
    try:
        admitted = await admission
        for failed in await asyncio.gather(*tasks, return_exceptions=True):
            if failed:
                logger.error("read.failed", exc_info=failed)
    finally:
        for task in tasks:
            task.cancel()
    return admitted


def larger(to: Deployment, than: Deployment) -> bool:
    """Whether it may take what was too long for the other; where that is not known, it is worth a try."""
    return not to.context_window or not than.context_window or to.context_window > than.context_window
