"""What stock OpenAI clients throw away, kept by tool call id and put back: signatures, thinking, reasoning.

Some providers refuse the next turn of a tool loop without it. A client that returns `extra_content` itself is believed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from shared.config import Provider
from shared.errors import StoreUnavailable
from shared.schema import JSON, Call
from shared.store.base import MAX_NOTE, Store
from shared.telemetry import logger

TTL = 30 * 86400
"""Seconds: how long after its last turn a conversation with tools can be taken up again."""
MOST = 100
"""Calls of a history, from its end, that are looked up: one round trip."""
RETURNED = ("extra_content", "reasoning_content")


class Vault:
    """Its notes are the key's own: another key's tool call ids find nothing."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def recall(self, call: Call, key_id: str, rows: Iterable[Provider]) -> Recall | None:
        """None where nothing can be missing, or nobody who may answer would care."""
        if call.surface != "chat":
            return None
        ids = [
            each["id"]
            for message in call.body["messages"]
            if message["role"] == "assistant" and not message.get("extra_content")
            for each in message.get("tool_calls") or ()
            if not each.get("extra_content")
        ]
        if not ids or not any(map(cares, rows)):
            return None
        return Recall(self._store, {note_name(key_id, call_id): call_id for call_id in ids[-MOST:]})

    async def keep(self, key_id: str, message: JSON, row: Provider) -> None:
        """Remember what this message holds beyond what clients return; it may fail: the answer is out already."""
        calls: list[JSON] = message.get("tool_calls") or []
        whole = {name: message[name] for name in RETURNED if message.get(name)}
        if not row.echoes_reasoning:
            whole.pop("reasoning_content", None)
        now = int(self._clock())
        for call in calls:
            doc = {
                "message": whole,
                "call": {"extra_content": call["extra_content"]} if "extra_content" in call else {},
            }
            body = orjson.dumps(doc)
            if not any(doc.values()) or len(body) > MAX_NOTE:
                continue
            try:
                await self._store.write_note(note_name(key_id, call["id"]), body, now + TTL, now)
            except StoreUnavailable as trouble:
                logger.warning("vault.unkept", extra={"reason": str(trouble)})


class Recall:
    """The read of one request. `names`: notes to tool call ids."""

    def __init__(self, store: Store, names: Mapping[str, str]) -> None:
        self._store = store
        self._names = names
        self._found: dict[str, Any] = {}

    async def read(self) -> None:
        try:
            notes = await self._store.notes(list(self._names))
        except StoreUnavailable as trouble:  # the provider may take it all the same
            logger.warning("vault.unread", extra={"reason": str(trouble)})
            return
        self._found = {self._names[note.name]: orjson.loads(note.body) for note in notes}

    def applied(self, call: Call) -> Call:
        """The call with what was found put back where it is missing; the same call where nothing was."""
        if not self._found:
            return call
        messages = [self._restored(message) for message in call.body["messages"]]
        return Call(call.surface, {**call.body, "messages": messages})

    def _restored(self, message: JSON) -> JSON:
        calls: list[JSON] = message.get("tool_calls") or []
        found = [self._found.get(call["id"]) for call in calls] if message["role"] == "assistant" else []
        if not any(found):
            return message
        whole: JSON = next(doc["message"] for doc in found if doc)
        return {
            **message,
            **{name: value for name, value in whole.items() if not message.get(name)},
            "tool_calls": [{**doc["call"], **call} if doc else call for call, doc in zip(calls, found, strict=True)],
        }


def cares(row: Provider) -> bool:
    """Whether a provider needs, of its own earlier answers, what clients throw away."""
    return row.dialect != "openai" or row.echoes_reasoning is not None


def note_name(key_id: str, call_id: str) -> str:
    return f"CALL#{key_id}#{hashlib.blake2b(call_id.encode('utf-8', 'replace'), digest_size=20).hexdigest()}"
