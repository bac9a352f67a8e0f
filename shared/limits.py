"""Admit reserves, settle corrects: what a key may use, said in OpenAI's errors and headers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from shared import books
from shared.errors import Forbidden, GatewayError, InvalidKey, RateLimited, StoreUnavailable, TooLargeForLimit
from shared.keys import Credential
from shared.store.base import Ask, Generation, Hold, Refused, Store, VirtualKey, is_unlimited
from shared.telemetry import logger

GRACE = 30
"""Seconds past a request's own total time after which its hold is overdue: by then it has settled or died."""
DOLLAR = 10**9

SETTLE_WAITS = (0.05, 0.2, 0.4, 0.6, 1.0, 3.0)
"""Seconds; most of them within the last moments that a platform leaves."""


class Limits:
    """Every request passes here twice: one conditional write to come in, one to go out."""

    def __init__(self, store: Store, generation_ttl_days: int) -> None:
        self._store = store
        self._ttl = generation_ttl_days * 86400

    async def admit(self, credential: Credential, request_id: str, hold: Hold, turn: str | None = None) -> VirtualKey:
        """The key as it stands after the reservation; raises the refusal in OpenAI's words.

        `turn`: the route whose turn is taken with it."""
        ask = Ask(credential.key_id, credential.key_hash, request_id, hold, turn)
        outcome = await self._store.admit(ask)
        if isinstance(outcome, Refused) and outcome.key and overdue(outcome.key, hold.start):
            await self.sweep(outcome.key, hold.start)  # what a crashed request still holds may be what is missing
            outcome = await self._store.admit(ask)
        if isinstance(outcome, Refused):
            raise refused(outcome, hold)
        return outcome.key

    async def release(self, key: VirtualKey, request_id: str, hold: Hold, now: int) -> None:
        await insistently(lambda: self._store.release(key.id, request_id, hold, now), "release", request_id)

    async def extend(self, key: VirtualKey, request_id: str, old: Hold, new: Hold) -> bool:
        """Whether the longer stream may be held; a store that cannot say so counts as no."""
        try:
            return await self._store.extend(key.id, request_id, old, new)
        except StoreUnavailable:
            return False

    async def settle(
        self, key: VirtualKey, request_id: str, hold: Hold, row: Generation, tokens: int, now: int
    ) -> None:
        """Record, then charge, however often it takes; what still fails the sweep settles at the hold's deadline."""

        async def both() -> None:
            standing = await self._store.record(row, row.created + self._ttl)
            await self._store.settle(key.id, request_id, hold, standing.cost, tokens, now)

        await insistently(both, "settle", request_id)
        if overdue(key, now):
            await insistently(lambda: self.sweep(key, now), "sweep", request_id)

    async def sweep(self, key: VirtualKey, now: int) -> int:
        return await books.sweep(self._store, key, now, self._ttl)


async def insistently(work: Callable[[], Awaitable[object]], what: str, request_id: str) -> None:
    """Try again through a store's bad moment; give up with one log line, never with an error for the caller."""
    for wait in (*SETTLE_WAITS, None):
        try:
            await work()
        except StoreUnavailable as trouble:
            if wait is None:
                logger.error("store.gave_up", extra={"what": what, "id": request_id, "reason": str(trouble)})
                return
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311 jitter, not a secret
        else:
            return


def overdue(key: VirtualKey, now: int) -> bool:
    return any(hold.deadline <= now for hold in key.open.values())


def refused(outcome: Refused, hold: Hold) -> GatewayError:
    """The refusal as the caller is told it: status, code, and when to try again."""
    key = outcome.key
    if key is None or outcome.reason == "unknown":
        return InvalidKey("Incorrect API key provided.")
    headers = rate_headers(key, hold.start)
    minute_ends = 60 - hold.start % 60
    match outcome.reason:
        case "disabled":
            return Forbidden("This API key is disabled.", code="key_disabled")
        case "expired":
            return Forbidden("This API key has expired.", code="key_expired")
        case "concurrency":
            return RateLimited(f"Too many open requests: this key may have {key.concurrency}.", 1, headers)
        case "rpm" if key.rpm < 1:
            return TooLargeForLimit("This key may make no requests: its limit is 0 per minute.", headers)
        case "rpm":
            return RateLimited(f"Rate limit reached: {key.rpm} requests per minute.", minute_ends, headers)
        case "tpm" if hold.tokens > key.tpm:
            return TooLargeForLimit(
                f"Request too large: it may use {hold.tokens} tokens, and this key's limit is {key.tpm} per minute. "
                "Shorten it or lower max_tokens.",
                headers,
            )
        case "tpm":
            return RateLimited(
                f"Rate limit reached: {key.tpm} tokens per minute, {max(0, key.left('t', hold.minute))} left, "
                f"{hold.tokens} needed.",
                minute_ends,
                headers,
            )
        case "daily_budget":
            left, which = key.left("d", hold.day), "daily budget"
        case _:
            left, which = key.balance, "balance"
    return Forbidden(
        f"This request may cost ${hold.money / DOLLAR:.6f}, and ${max(0, left) / DOLLAR:.6f} of this key's {which} "
        "is left.",
        code="insufficient_quota",
    )


def rate_headers(key: VirtualKey, now: int) -> dict[str, str]:
    """OpenAI's six `x-ratelimit-*`; an unlimited kind has none."""
    reset = f"{60 - now % 60}s"
    headers: dict[str, str] = {}
    for name, kind, limit in (("requests", "r", key.rpm), ("tokens", "t", key.tpm)):
        if not is_unlimited(limit):
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, key.left("r" if kind == "r" else "t", now // 60)))
            headers[f"x-ratelimit-reset-{name}"] = reset
    return headers
