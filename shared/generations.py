"""The record of one answer: every admitted request gets one, failures too, and each number says where it came from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from shared.errors import NotFound
from shared.schema import JSON, Usage
from shared.store.base import Generation, Store, VirtualKey

DOLLAR = 10**9
PREFIX = "gen-"
BLANK: JSON = {
    "model": None,
    "model_requested": None,
    "provider": None,
    "surface": None,
    "stream": None,
    "finish_reason": None,
    "native_finish_reason": None,
    "latency_ms": None,
    "time_to_first_token_ms": None,
    "attempts": [],
    "provider_health": None,
    "cached": False,
    "dropped": [],
    "user": None,
    "error": None,
}
"""The fields of a record of which nothing is known but that it was lost."""
PATIENCE, STEP = 2.0, 0.1
"""Seconds to wait for a row whose request is still open, and between looks."""


def dollars(nano: int) -> float:
    return nano / DOLLAR


def tokens(usage: Usage) -> JSON:
    """The ledger as OpenAI's `usage`, whose prompt tokens include what was read from and written to a cache."""
    prompt_details = {**usage.details.get("prompt", {}), "cached_tokens": usage.cache_read}
    if written := usage.cache_write + usage.cache_write_1h:
        prompt_details["cache_write_tokens"] = written
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.total,
        "prompt_tokens_details": prompt_details,
        "completion_tokens_details": {**usage.details.get("completion", {}), "reasoning_tokens": usage.reasoning},
    }


def view(row: Generation, key: VirtualKey, *, admin: bool) -> JSON:
    """What `GET /v1/generation` shows: the record, and its key by the mask only."""
    routing = row.doc.get("routing")
    shown: JSON = {"id": row.id, "created": row.created, "api_key_id": key.masked, **row.doc}
    return shown if admin or not routing else {**shown, "routing": permitted(routing)}


def permitted(routing: JSON) -> JSON:
    """Without the deployments that the key may not use, which are nobody's business but an administrator's."""
    return {**routing, "removed": [each for each in routing["removed"] if each["filter"] != "permission"]}


async def find(store: Store, generation_id: str, key: VirtualKey) -> Generation:
    """One of the key's own rows; waits for one that is still being written. Raises NotFound, for others' rows too."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        row = await store.generation(generation_id)
        if row is not None and (row.key_id == key.id or key.role == "admin"):
            return row
        waiting = row is None and generation_id.removeprefix(PREFIX) in key.open
        if not waiting or asyncio.get_running_loop().time() >= deadline:
            raise NotFound("No generation with this id.", param="id")
        await asyncio.sleep(STEP)


def summary(doc: Mapping[str, Any]) -> JSON:
    """What the log line and the metrics take from a record."""
    cost = doc["cost"]["total_cost"]
    return {
        "model": doc["model_requested"],
        "answered": f"{doc['provider']}/{doc['model']}" if doc["provider"] else None,
        "provider": doc["provider"],
        "outcome": doc["status"],
        "error": doc["error"]["code"] if doc.get("error") else None,
        "prompt_tokens": doc["tokens"]["prompt_tokens"],
        "completion_tokens": doc["tokens"]["completion_tokens"],
        "cost_usd": cost,
        "attempts": len(doc["attempts"]),
    }
