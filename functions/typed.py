"""Typed events, the dialect of `/rr-chat/stream` (design §5): one JSON object per `data:`, each with `type` and `ts`.

`provider` comes first and names who answered; `done` comes last, always, once.
"""

from __future__ import annotations

import time
from typing import Any

from shared import sse
from shared.errors import GatewayError, InvalidRequest, RateLimited, UpstreamAuthError
from shared.exchange import Exchange
from shared.schema import JSON

TIMEOUTS = {
    "gap_timeout": "chunk_timeout", "first_content_timeout": "request_timeout", "total_timeout": "request_timeout",
    "connect_timeout": "request_timeout",
}  # fmt: skip

WARNINGS = {
    "length": "The answer is cut off: it reached the most that may be said.",
    "content_filter": "The answer is cut off: the provider's content filter stopped it.",
}
"""By finish reason: the answer is there, but it is not all."""


def event(kind: str, **fields: Any) -> bytes:
    """`ts`: milliseconds since the epoch."""
    return sse.encode({"type": kind, "ts": int(time.time() * 1000), **fields})


class TypedEvents:
    """One stream's; it knows whether the provider was named."""

    def __init__(self) -> None:
        self._named = False

    def of(self, chunks: list[JSON], exchange: Exchange) -> bytes:
        """OpenAI's chunks as events; errors among them end the stream."""
        answer = exchange.answer
        events = (
            b"" if self._named or (answer and not answer.started and "error" in chunks[0]) else self._provider(exchange)
        )
        for chunk in chunks:
            if "error" in chunk:
                assert exchange.error is not None
                return events + self._end(exchange.error, exchange)
            for choice in chunk.get("choices", ()):
                delta: JSON = choice.get("delta") or {}
                if text := delta.get("content") or delta.get("refusal"):
                    events += event("delta", content=text)
        if answer and answer.ended:
            usage = exchange.usage
            if warning := WARNINGS.get(answer.finish_reason or ""):
                events += event("warning", message=warning)
            events += event("usage", tokens=usage.total, accurate=usage.source == "provider") + event("done")
        return events

    def failure(self, error: GatewayError, exchange: Exchange, *, begun: bool) -> bytes | None:
        return self._end(error, exchange)

    def _provider(self, exchange: Exchange) -> bytes:
        self._named = True
        provider, model = exchange.answered_by
        return event("provider", provider=provider, model_id=model)

    def _end(self, error: GatewayError, exchange: Exchange) -> bytes:
        if isinstance(error, RateLimited) and not self._named:
            return rate_limited(error)
        told = {"message": error.message, "code": error.code, "class": class_of(error, exchange)}
        return event("error", **told) + event("done")


def rate_limited(error: RateLimited) -> bytes:
    """A whole stream, as the seed has it."""
    return event("rate_limited", retry_after_ms=int(error.headers["retry-after"]) * 1000) + event("done")


def refused(error: GatewayError) -> bytes:
    """A whole stream, for what a safety check refuses."""
    told = {"message": error.message, "code": error.code, "class": "client"}
    return event("error", **told) + event("done")


def class_of(error: GatewayError, exchange: Exchange) -> str:
    """What the page may do about it."""
    last, asked = exchange.last_error, {attempt.to.id for attempt in exchange.attempts}
    if isinstance(error, InvalidRequest):
        return "client"
    if last and last.falls_back and len(asked) > 1 and not (exchange.answer and exchange.answer.started):
        return "provider_switch"  # one after the other, and nobody is left
    if last and last.fault in TIMEOUTS:
        return TIMEOUTS[last.fault]
    again = error.status >= 500 or isinstance(error, RateLimited)
    return "retryable" if again and not isinstance(error, UpstreamAuthError) else "non_retryable"
