"""One request, start to finish: admitted, routed, answered, recorded, settled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeAlias

from shared.answer import Answer
from shared.catalog import Catalog, Deployment
from shared.errors import Forbidden, GatewayError, Overloaded, ProviderError, RateLimited
from shared.exchange import Attempt, Exchange
from shared.keys import Credential
from shared.limits import GRACE, Limits
from shared.providers.dialect import Outgoing
from shared.router import MAX_ATTEMPTS, Candidate, capable, permitted
from shared.schema import JSON, Call
from shared.store.base import Hold, VirtualKey
from shared.tokens import Prompt
from shared.upstream import Upstream

Chunks: TypeAlias = AsyncGenerator[list[JSON], None]
"""What each read of a stream brought, as OpenAI's chunks; an error event is the last."""

DEFAULT_OUTPUT = 4096
"""Output tokens that are reserved at a time where the caller set no bound."""
TOKENS_PER_CHARACTER = 3
"""At most: between two looks at the meter, which cost more than a chunk, a stream cannot outgrow its hold."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request, who may answer it, and what the first of them would be sent: nothing is spent yet."""

    call: Call
    candidates: Sequence[Candidate]
    outgoing: Outgoing


class Gateway:
    """Collaborators come in here; there are no globals. `clock` is the wall clock, in epoch seconds."""

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        upstream: Upstream,
        total_timeout: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._limits = limits
        self._upstream = upstream
        self._total_timeout = total_timeout
        self._clock = clock
        self.open: set[Exchange] = set()
        self.answered = 0
        self._idle = asyncio.Event()

    def plan(self, call: Call) -> Plan:
        """Names to deployments; raises ModelNotFound, NoProvider or UnsupportedParameter, before the key is charged."""
        found: dict[str, Candidate] = {}
        for name in (call.model, *call.fallbacks):
            for to in self._catalog.resolve(name).deployments:
                found.setdefault(to.id, Candidate(name, to))
        candidates, outgoing = capable(list(found.values()), lambda to: self._upstream.prepare(call, to))
        return Plan(call, candidates, outgoing)

    async def admit(self, plan: Plan, credential: Credential, request_id: str) -> Exchange:
        """The store's one write before the provider, then the model permission on the key that it returned."""
        call, now = plan.call, self._clock()
        first = [candidate.to for candidate in plan.candidates[:MAX_ATTEMPTS]]
        prompt, output = Prompt.read(call.body, call.surface), reserved_output(call, first)
        estimate = prompt.estimate(first[0].model)
        money = most_money(first, prompt, output)
        hold = Hold(money, estimate + output, int(now), int(self._total_timeout) + GRACE)
        key = await self._limits.admit(credential, request_id, hold)
        try:
            candidates = permitted(plan.candidates, key, call.body.get("service_tier"))[:MAX_ATTEMPTS]
            if key.has_money_limit and most_money(candidates, prompt, output) > money:
                candidates, hold = await self._afford(candidates, prompt, output, key, request_id, hold)
        except GatewayError:
            await self._limits.release(key, request_id, hold, int(now))
            raise
        exchange = Exchange(request_id, key, call, candidates, hold, prompt, estimate, output, now)
        if candidates[0] is plan.candidates[0].to and exchange.bound(candidates[0]) is None:
            exchange.outgoing = plan.outgoing
        self.open.add(exchange)
        return exchange

    async def _afford(
        self, candidates: list[Deployment], prompt: Prompt, output: int, key: VirtualKey, request_id: str, hold: Hold
    ) -> tuple[list[Deployment], Hold]:
        """Hold more where those that the key may use are dearer than those that came first; else leave them out."""
        larger = replace(hold, money=most_money(candidates, prompt, output))
        if await self._limits.extend(key, request_id, hold, larger):
            return candidates, larger
        cheap = [to for to in candidates if most_money([to], prompt, output) <= hold.money]
        if not cheap:
            raise Forbidden("This request may cost more than is left of this key's money.", code="insufficient_quota")
        return cheap, hold

    async def complete(self, exchange: Exchange) -> JSON:
        """A whole answer, from the first deployment that gives one; raises the last refusal."""
        for to, outgoing in self._attempts(exchange):
            try:
                piece = await self._upstream.complete(exchange.call, to, outgoing, exchange.deadline)
            except ProviderError as error:
                exchange.failed(error)
            else:
                exchange.answered()
                return Answer(exchange).completed(piece)
        raise self._refusal(exchange)

    async def stream(self, exchange: Exchange) -> Chunks:
        """A stream, which ends in one honest way: finish reasons, or one error event; before content it may raise.

        Once `exchange.committed`, or once something was sent, an error is an event."""
        answer = exchange.answer = Answer(exchange)
        try:
            for to, outgoing in self._attempts(exchange):
                try:
                    async with aclosing(
                        self._upstream.stream(exchange.call, to, outgoing, exchange.deadline)
                    ) as batches:
                        async for batch in batches:
                            if not batch:
                                answer.all_said()
                                if answer.whole:
                                    yield answer.ending()
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
                        exchange.failed(error)
                        if answer.started:
                            raise error.answer() from error
                        continue
                if not answer.ended:
                    yield answer.ending()
                return
            raise self._refusal(exchange)
        except GatewayError as error:
            exchange.error = error
            if not (answer.started or exchange.committed):
                raise
            yield [answer.error(error)]

    async def close(self, exchange: Exchange) -> JSON:
        """Record and settle, however the request ended; after the caller's last byte. Returns the record."""
        try:
            row, used = exchange.row(self._clock())
            now = int(self._clock())
            await self._limits.settle(exchange.key, exchange.request_id, exchange.hold, row, used, now)
            self.answered += 1
            return dict(row.doc)
        finally:
            self.open.discard(exchange)
            self._idle.set()

    async def drained(self) -> None:
        """Wait until every open request is settled."""
        while self.open:
            self._idle.clear()
            await self._idle.wait()

    def _attempts(self, exchange: Exchange) -> Iterator[tuple[Deployment, Outgoing]]:
        """Each deployment in turn while falling back is right, with what it is to be sent."""
        for to in exchange.candidates:
            outgoing, exchange.outgoing = exchange.outgoing, None
            try:
                outgoing = outgoing or self._upstream.prepare(exchange.call, to, exchange.bound(to))
            except GatewayError as refused:  # it cannot be asked this: not an attempt
                exchange.error = refused
                continue
            exchange.attempt(Attempt(to), outgoing.dropped)
            yield to, outgoing
            if not exchange.last_error or not exchange.last_error.falls_back:
                return
            if asyncio.get_running_loop().time() >= exchange.deadline:
                return

    def _refusal(self, exchange: Exchange) -> GatewayError:
        """What the caller is told when nobody answered: the last refusal, unless the providers are merely busy."""
        errors = [attempt.error for attempt in exchange.attempts if attempt.error]
        if not errors:
            return exchange.error or Overloaded("No deployment could take this request.")
        if not errors[-1].falls_back:
            return errors[-1].answer()
        busy = [error for error in errors if error.fault == "rate_limit"]
        if 0 < len(busy) < len(errors):
            wait = max(1, min(60, round(busy[-1].retry_after or 1)))
            return Overloaded("No provider could answer: some are at their rate limit.", retry_after=wait)
        answer = errors[-1].answer()
        if isinstance(answer, RateLimited):
            answer.headers["retry-after"] = str(max(1, min(60, round(min(e.retry_after or 1 for e in busy)))))
        return answer

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


def reserved_output(call: Call, candidates: Sequence[Deployment]) -> int:
    """Output tokens to reserve: the caller's bound, else the model's, `DEFAULT_OUTPUT` at most; for each choice."""
    if call.surface == "embeddings":
        return 0
    most = max(min(to.max_output or DEFAULT_OUTPUT, DEFAULT_OUTPUT) for to in candidates)
    return (call.max_tokens or most) * call.generated
