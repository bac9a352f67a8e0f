"""Chats remembered: what was said in a session, by whom. It belongs to the key; a failure loses a memory, no answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from shared.errors import StoreUnavailable
from shared.schema import JSON, Call
from shared.store.base import Message, Store
from shared.telemetry import logger

CONTEXT = 10
"""Messages of a session that its next answer is given to know."""
SHOWN = 50


class Context:
    """The last messages of a session, read beside admission, and put before the new one."""

    def __init__(self, store: Store, key_id: str, user: str, session: str) -> None:
        self._store = store
        self._of = (key_id, user, session)
        self._said: list[Message] = []

    async def read(self) -> None:
        try:
            self._said = await self._store.said(*self._of, limit=CONTEXT)
        except StoreUnavailable as trouble:
            logger.warning("history.unread", extra={"reason": str(trouble)})

    def applied(self, call: Call) -> Call:
        """What was asked and answered: some providers take nothing but turns."""
        turns = [
            {"role": each.role, "content": each.content}
            for one, other in pairwise(each for each in self._said if each.content)
            if (one.role, other.role) == ("user", "assistant")
            for each in (one, other)
        ]
        return Call(call.surface, {**call.body, "messages": [*turns, *call.body["messages"]]}) if turns else call


async def keep(store: Store, key_id: str, call: Call, request_id: str, answer: JSON, row: Mapping[str, Any]) -> None:
    """Write down what the user said and what came of it, whole or not; `row` is the record.

    The result of a tool is not the user's, and a call of one no text: they are not history."""
    now, messages = int(time.time()), list[Message]()
    told: JSON = {"generation_id": f"gen-{request_id}", **{name: row[name] for name in ("provider", "model", "status")}}
    if row["status"] != "ok":
        told["partial"] = True
    if (last := call.body["messages"][-1])["role"] == "user":
        messages.append(Message(f"{request_id}-0", "user", text_of(last["content"]), now))
    if text := answer.get("content") or answer.get("refusal"):
        messages.append(Message(f"{request_id}-1", "assistant", text, now, told))
    try:
        await store.say(key_id, call.body["user"], call.body["session_id"], messages)
    except StoreUnavailable as trouble:
        logger.warning("history.unkept", extra={"id": request_id, "reason": str(trouble)})


def text_of(content: str | list[JSON]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def shown(message: Message) -> JSON:
    return {"role": message.role, "content": message.content, "created": message.created, **message.doc}
