"""One admitted request until it is settled: who was asked, what came of it, and the record that is made of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from shared import generations
from shared.cache import Kept, Lookup
from shared.catalog import Deployment
from shared.errors import GatewayError, ProviderError
from shared.health import blames_account
from shared.idempotency import Ticket
from shared.limits import GRACE
from shared.prices import Cost
from shared.providers.dialect import Outgoing
from shared.router import MOST_TOLD, Order, Removal
from shared.schema import JSON, Call, Usage
from shared.store.base import Generation, Hold, VirtualKey
from shared.tokens import Prompt
from shared.upstream import Notes

if TYPE_CHECKING:
    from shared.answer import Answer

UNSEEN_OUTPUT_RATE = 100.0
"""Tokens per second that a model is taken to have made, unseen, when the caller hung up."""
MAX_OUTPUT = 2_000_000
"""Tokens of one choice; a provider that reports more is not believed."""


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class Attempt:
    """One deployment asked: `seconds` it took, `error` if it failed."""

    to: Deployment
    began: float = field(default_factory=now)
    seconds: float = 0.0
    error: ProviderError | None = None
    notes: Notes = field(default_factory=Notes)

    def end(self, error: ProviderError | None = None) -> None:
        self.seconds, self.error = now() - self.began, error

    def told(self) -> JSON:
        error = self.error
        return {
            "provider": self.to.provider.name,
            "model": self.to.model,
            "error": error.fault if error else None,
            "status": error.status if error else 200,
            "ambiguous": bool(error and error.ambiguous),
            "latency_ms": round(self.seconds * 1000, 1),
            **{name: value for name, value in asdict(self.notes).items() if value},
        }


class Routing(NamedTuple):
    """How the route was made: who was put in which order by which strategy, and who was taken away."""

    strategy: str
    order: Order | None
    removed: Sequence[Removal]

    def told(self, key: VirtualKey) -> JSON:
        """For the record, and for `POST /v1/route`; of long lists the beginning."""
        return {
            "strategy": self.strategy,
            "candidates": [
                {"deployment": each.candidate.to.id, "score": each.score}
                for each in (self.order.first(MOST_TOLD) if self.order else ())
            ],
            "removed": [each.told(key) for each in self.removed[:MOST_TOLD]],
        }


class Exchange:
    """`estimate`: the prompt's likely size; `output`: the reserved answer's, in tokens; `created`: the wall clock.

    `waiting`: who was not asked yet. `outgoing`: what is sent next, or was sent last.

    `committed`: the caller has a status already, so an error must be an event. `enough_until`: the length of the
    answer, in characters, to which the hold is known to suffice."""

    def __init__(
        self,
        request_id: str,
        key: VirtualKey,
        call: Call,
        candidates: Sequence[Deployment],
        hold: Hold,
        prompt: Prompt,
        estimate: int,
        output: int,
        created: float,
    ) -> None:
        self.request_id = request_id
        self.key = key
        self.call = call
        self.candidates = candidates
        self.waiting = list(candidates)
        self.hold = hold
        self.prompt = prompt
        self.estimate = estimate
        self.output = output
        self.created = created
        self.began = now()
        self.deadline = self.began + hold.ttl - GRACE
        self.outgoing: Outgoing | None = None
        self.routing: Routing | None = None
        self.lookup: Lookup | None = None
        self.kept: Kept | None = None
        self.ticket: Ticket | None = None
        self.attempts: list[Attempt] = []
        self.dropped: tuple[str, ...] = ()
        self.answer: Answer | None = None
        self.error: GatewayError | None = None
        self.first_content: float | None = None
        self.committed = False
        self.interrupted = False
        self._unbounded = key.has_money_limit and call.max_tokens is None and call.surface != "embeddings"
        self.enough_until = 0
        self._usage: Usage | None = None

    def bound(self, to: Deployment) -> int | None:
        """The output bound that the gateway sets itself, where the money has one and the caller sets none.

        A stream can be watched as it grows, but not what a reasoning model thinks to itself."""
        watched = self.call.stream and not to.provider.reasons(to.model)
        return self.output // self.call.generated if self._unbounded and not watched else None

    @property
    def grows(self) -> bool:
        """Whether the hold must be kept ahead of the stream."""
        return self._unbounded and self.bound(self.deployment) is None

    @property
    def id(self) -> str:
        return generations.PREFIX + self.request_id

    @property
    def cache(self) -> Literal["hit", "miss", "off"]:
        return "hit" if self.kept else "miss" if self.lookup else "off"

    @property
    def remembers(self) -> bool:
        """Whether the answer is needed once more when it is out."""
        return self.lookup is not None or bool(self.call.body.get("tools")) or self.keeps_history

    @property
    def keeps_history(self) -> bool:
        return self.call.keeps_history

    @property
    def answered_by(self) -> tuple[str, str]:
        """Provider and model; of a kept answer, whose it was."""
        made = self.kept
        return (made.provider, made.model) if made else (self.deployment.provider.name, self.deployment.model)

    @property
    def deployment(self) -> Deployment:
        """Who answers, or was asked last, or would have been asked first."""
        return self.attempts[-1].to if self.attempts else self.candidates[0]

    @property
    def refusing(self) -> set[str]:
        """The providers that refused our account, and would again."""
        return {each.to.provider.name for each in self.attempts if each.error and blames_account(each.error)}

    @property
    def notes(self) -> Notes:
        """What the attempt that is running notes on its way."""
        return self.attempts[-1].notes

    @property
    def last_error(self) -> ProviderError | None:
        return self.attempts[-1].error if self.attempts else None

    @property
    def upstream_seconds(self) -> float:
        """Time spent waiting for providers' first content; what came after was spent streaming."""
        running = [now() - attempt.began for attempt in self.attempts if not attempt.seconds]
        spent = sum(attempt.seconds for attempt in self.attempts) + sum(running)
        return min(spent, self.first_content - self.began) if self.first_content else spent

    def attempt(self, attempt: Attempt, outgoing: Outgoing) -> None:
        self.attempts.append(attempt)
        self.outgoing = outgoing
        self.dropped = outgoing.dropped

    def failed(self, error: ProviderError) -> None:
        self.attempts[-1].end(error)

    def answered(self) -> None:
        self.attempts[-1].end()
        self.error = None

    def speed(self) -> tuple[float, float | None]:
        """Seconds to the first content of the last attempt, and output tokens per second from there, if it streamed."""
        attempt, usage = self.attempts[-1], self.usage
        first = self.first_content or now()
        streamed = attempt.began + attempt.seconds - first
        enough = self.call.stream and usage.output >= 20 and streamed > 0.05
        return first - attempt.began, usage.output / streamed if enough else None

    def interrupt(self) -> None:
        """The caller hung up, or the server is stopping: what was made until now is what is charged."""
        if self.answer and self.answer.ended:
            return  # all was said
        self.interrupted = True
        if self.attempts and not self.attempts[-1].seconds:
            self.attempts[-1].end()

    def lightrail(self) -> JSON:
        """The `lightrail` object of a body or last chunk."""
        provider, model = self.answered_by
        return {
            "provider": provider,
            "model": model,
            "attempts": len(self.attempts),
            "cache": self.cache,
            "dropped": list(self.dropped),
        }

    @property
    def usage(self) -> Usage:
        """The provider's numbers; where there are none, an estimate of what was sent and made, marked so."""
        if self._usage is None:
            self._usage = self._find_usage()
        return self._usage

    def _find_usage(self) -> Usage:
        answer, call = self.answer, self.call
        if self.kept:
            return self.kept.usage
        made = answer.meter.tokens if answer and answer.started else 0
        reported = answer.usage if answer else None
        if reported and made <= 2 * reported.output + 50 and reported.output <= MAX_OUTPUT * max(1, call.generated):
            return reported
        if reported or (answer and answer.started):
            if self.interrupted and self.deployment.provider.reasons(self.deployment.model):
                made = max(made, self._unseen())  # what it thought is not in what was seen
            return Usage(input=self.estimate, output=made, source="estimated")
        if self.interrupted and self.attempts and not self.last_error:  # asked, and gone before the answer came
            return Usage(input=self.estimate, output=self._unseen(), source="estimated")
        return Usage()

    def _unseen(self) -> int:
        """Output tokens that the attempt is taken to have made until now, whether they were seen or not."""
        return min(int(self.attempts[-1].seconds * UNSEEN_OUTPUT_RATE), self.output)

    @property
    def cost(self) -> tuple[Cost | None, Literal["provider", "computed", "estimated"]]:
        """Nano-dollars and their source; None where neither the provider nor the price table knows."""
        if self.kept:
            return Cost(0, 0), "computed"
        usage, price = self.usage, self.deployment.price
        computed = price.cost(usage) if price else None
        if usage.cost is not None:
            prompt = usage.cost * computed.prompt // computed.total if computed and computed.total else usage.cost
            return Cost(prompt, usage.cost - prompt), "provider"
        return computed, "estimated" if usage.source == "estimated" else "computed"

    def wire_usage(self) -> JSON:
        """OpenAI's `usage`, with `cost` in dollars and where it comes from."""
        usage, (cost, source) = generations.tokens(self.usage), self.cost
        if self.call.surface == "embeddings":
            usage = {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["total_tokens"]}
        usage["cost"] = None if cost is None else generations.dollars(cost.total)
        usage["cost_source"] = source if cost is not None else None
        return usage

    @property
    def status(self) -> Literal["ok", "failed", "cancelled"]:
        return "cancelled" if self.interrupted else "failed" if self.error else "ok"

    def row(self, wall: float) -> tuple[Generation, int]:
        """The record, and the tokens used, which settle the key's TPM."""
        cost, source = self.cost
        answer = self.answer
        answered = self.kept or (self.attempts and (not self.last_error or (answer and answer.started)))
        provider, model = self.answered_by
        doc: JSON = {
            "model": model,
            "model_requested": self.call.model,
            "provider": provider if answered else None,
            "status": self.status,
            "surface": self.call.surface,
            "stream": self.call.stream,
            "finish_reason": answer.finish_reason if answer else None,
            "native_finish_reason": answer.native_finish_reason if answer else None,
            "tokens": {**generations.tokens(self.usage), "source": self.usage.source},
            "cost": {
                "prompt_cost": None if cost is None else generations.dollars(cost.prompt),
                "completion_cost": None if cost is None else generations.dollars(cost.completion),
                "total_cost": None if cost is None else generations.dollars(cost.total),
                "currency": "USD",
                "source": source if cost is not None else None,
            },
            "latency_ms": round((wall - self.created) * 1000, 1),
            "time_to_first_token_ms": (
                round((self.first_content - self.began) * 1000, 1) if self.first_content else None
            ),
            "attempts": [attempt.told() for attempt in self.attempts],
            "routing": self.routing.told(self.key) if self.routing else None,
            "provider_health": "healthy" if self.kept else _health(self.attempts),
            "cached": self.kept is not None,
            "dropped": [name[:100] for name in self.dropped[:100]],  # made up by callers, and an item has its limit
            "user": self.call.body.get("user"),
            "error": {"code": self.error.code, "message": self.error.message} if self.error else None,
        }
        row = Generation(self.id, self.key.id, self.hold.start, cost.total if cost else 0, doc)
        return row, 0 if self.kept else self.usage.total


def _health(attempts: Sequence[Attempt]) -> Literal["healthy", "degraded", "unhealthy"]:
    if not attempts or attempts[-1].error:
        return "unhealthy"
    return "degraded" if len(attempts) > 1 else "healthy"
