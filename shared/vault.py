"""What stock OpenAI clients throw away, kept by tool call id and put back: signatures, thinking, reasoning.

Some providers refuse the next turn of a tool loop without it. A client that returns `extra_content` itself is believed.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import orjson

from shared.config import Provider
from shared.errors import StoreUnavailable
from shared.providers.pieces import object_of
from shared.schema import JSON, Call
from shared.store.base import MAX_NOTE, Store
from shared.telemetry import logger

TTL = 30 * 86400
"""Seconds: how long after its last turn a conversation with tools can be taken up again."""
MOST = 100
"""Calls of a history, from its end, that are looked up: one round trip."""
RETURNED = ("extra_content", "reasoning_content", "reasoning_details")
TWICE = re.compile(r"(.+?)\1+")


class Vault:
    """Its notes are the key's own: another key's tool call ids find nothing."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def recall(self, call: Call, key_id: str, rows: Iterable[Provider]) -> Recall | None:
        """None where nothing can be missing, or nobody who may answer would care."""
        if call.surface != "chat":
            return None
        messages: list[JSON] = call.body["messages"]
        names = note_names(key_id, messages)
        lacking = [
            name
            for message, its_names in zip(messages, names, strict=True)
            if its_names and not message.get("extra_content")
            for each, name in zip(message["tool_calls"], its_names, strict=True)
            if not each.get("extra_content")
        ]
        if not lacking or not any(map(cares, rows)):
            return None
        return Recall(self._store, names, list(dict.fromkeys(lacking[-MOST:])))

    async def keep(self, key_id: str, call: Call, messages: Iterable[JSON], row: Provider) -> None:
        """Remember what these answers hold beyond what clients return; it may fail: the answer is out already."""
        if call.surface != "chat":
            return
        returned = RETURNED if row.echoes_reasoning else ("extra_content",)
        now = int(self._clock())
        try:
            for message in messages:
                whole = {name: message[name] for name in returned if message.get(name)}
                *_, names = note_names(key_id, [*call.body["messages"], message])
                for made, note in zip(message.get("tool_calls") or (), names, strict=True):
                    doc = {"message": whole, "call": {name: made[name] for name in ("extra_content",) if name in made}}
                    whole = {}  # once: clients drop fields, not calls
                    body = orjson.dumps(doc)
                    if any(doc.values()) and len(body) <= MAX_NOTE:
                        await self._store.write_note(note, body, now + TTL, now)
        except StoreUnavailable as trouble:
            logger.warning("vault.unkept", extra={"reason": str(trouble)})


class Recall:
    """The read of one request: `names` of the calls of each message, of which these are `lacking` something."""

    def __init__(self, store: Store, names: Sequence[Sequence[str]], lacking: Sequence[str]) -> None:
        self._store = store
        self._names = names
        self._lacking = lacking
        self._found: dict[str, Any] = {}

    async def read(self) -> None:
        try:
            notes = await self._store.notes(self._lacking)
        except StoreUnavailable as trouble:  # the provider may take it all the same
            logger.warning("vault.unread", extra={"reason": str(trouble)})
            return
        self._found = {note.name: orjson.loads(note.body) for note in notes}

    def applied(self, call: Call) -> Call:
        """The call with what was found put back where it is missing; the same call where nothing was."""
        if not self._found:
            return call
        messages = [self._restored(*each) for each in zip(call.body["messages"], self._names, strict=True)]
        return Call(call.surface, {**call.body, "messages": messages})

    def _restored(self, message: JSON, names: Sequence[str]) -> JSON:
        found = [self._found.get(name) for name in names]
        if not any(found):
            return message
        whole: JSON = next(doc["message"] for doc in found if doc)
        calls = zip(message["tool_calls"], found, strict=True)
        return {
            **_filled(message, whole),
            "tool_calls": [_filled(call, doc["call"] if doc else {}) for call, doc in calls],
        }


def _filled(said: JSON, kept: JSON) -> JSON:
    return {**said, **{name: value for name, value in kept.items() if not said.get(name) or _is_garbled(name, said)}}


def _is_garbled(name: str, said: JSON) -> bool:
    """Stock clients put a streamed list together as if all its strings came in pieces: "unknownunknown"."""
    items: Any = said[name] if name == "reasoning_details" else None
    if not isinstance(items, list):
        return False
    details = [object_of(item) for item in cast("list[Any]", items)]
    return any(TWICE.fullmatch(str(each.get("format"))[:100]) or {"text", "data"} <= each.keys() for each in details)


def cares(row: Provider) -> bool:
    """Whether a provider needs, of its own earlier answers, what clients throw away."""
    return row.dialect != "openai" or row.echoes_reasoning is not None


def note_names(key_id: str, messages: Iterable[JSON]) -> list[list[str]]:
    """Of the calls of each message. A call is known by its id, and by its turn since which question.

    The id alone does not do: Kimi's are the same in every turn, and in every conversation."""
    names: list[list[str]] = []
    question, turn = "", 0
    for message in messages:
        calls: list[JSON] = []
        if message["role"] == "user":
            question, turn = _text(message["content"]), 0
        elif message["role"] == "assistant":
            turn += 1
            calls = message.get("tool_calls") or []
        names.append([_note_name(key_id, f"{turn} {call['id']} {question}") for call in calls])
    return names


def _text(content: str | list[JSON]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def _note_name(key_id: str, what: str) -> str:
    return f"CALL#{key_id}#{hashlib.blake2b(what.encode('utf-8', 'replace'), digest_size=20).hexdigest()}"
