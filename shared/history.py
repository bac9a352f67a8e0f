"""Chats remembered: what was said in a session, by whom. It belongs to the key; a failure loses a memory, no answer."""

from __future__ import annotations

import time
from typing import Any, cast

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
        before = [{"role": each.role, "content": each.content} for each in self._said if each.content]
        return Call(call.surface, {**call.body, "messages": [*before, *call.body["messages"]]}) if before else call


async def keep(store: Store, key_id: str, call: Call, request_id: str, text: str, row: JSON) -> None:
    """Write down what the user said last and what came of it, whole or not; `row` is the record."""
    now = int(time.time())
    told: JSON = {
        "generation_id": f"gen-{request_id}",
        "provider": row["provider"],
        "model": row["model"],
        "status": row["status"],
    }
    if row["status"] != "ok":
        told["partial"] = True
    messages = [Message(f"{request_id}-0", "user", asked(call), now, {})]
    if text or row["status"] == "ok":
        messages.append(Message(f"{request_id}-1", "assistant", text, now, told))
    try:
        await store.say(key_id, call.body["user"], call.body["session_id"], messages)
    except StoreUnavailable as trouble:
        logger.warning("history.unkept", extra={"id": request_id, "reason": str(trouble)})


def asked(call: Call) -> str:
    """The text of the user's last message."""
    content: Any = next((each["content"] for each in reversed(call.body["messages"]) if each["role"] == "user"), "")
    if isinstance(content, str):
        return content
    parts = cast("list[JSON]", content)
    return "\n".join(part["text"] for part in parts if part.get("type") == "text")


def shown(message: Message) -> JSON:
    return {"role": message.role, "content": message.content, "created": message.created, **message.doc}
