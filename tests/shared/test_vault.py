"""What clients throw away comes back to the call that it belongs to, and to no other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.config import Provider
from shared.schema import Call
from shared.store.sqlite import SQLiteStore
from shared.vault import Vault

ROW = Provider(name="together", base_url="https://x", echoes_reasoning="reasoning")
"""Of whose Kimi each turn's first call has the same id: https://github.com/fw-ai/fireconnect/issues/16"""


@pytest.fixture
async def vault(tmp_path: Path) -> AsyncIterator[Vault]:
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield Vault(store)
    await store.close()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(thought: str | None = None, call_id: str = "search:0") -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": "search", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    return said | ({"reasoning_content": thought} if thought else {})


def tool(call_id: str = "search:0") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "7"}


async def keep(vault: Vault, messages: list[Any], said: dict[str, Any], key: str = "k1") -> None:
    await vault.keep(key, Call("chat", {"model": "m", "messages": messages}), [said], ROW)


async def recalled(vault: Vault, messages: list[Any], key: str = "k1") -> list[str | None]:
    """The thoughts of the assistant's messages, as they are put back."""
    call = Call("chat", {"model": "m", "messages": messages})
    recall = vault.recall(call, key, [ROW])
    assert recall
    await recall.read()
    said = recall.applied(call).body["messages"]
    return [each.get("reasoning_content") for each in said if each["role"] == "assistant"]


async def test_two_turns_of_the_same_id_are_told_apart(vault: Vault) -> None:
    history: list[Any] = [user("Oslo?")]
    for thought in ("One.", "Two."):
        await keep(vault, history, assistant(thought))
        history += [assistant(), tool()]
    history += [{"role": "assistant", "content": "Rain."}, user("Rome?")]
    await keep(vault, history, assistant("Three."))
    assert await recalled(vault, [*history, assistant(), tool()]) == ["One.", "Two.", None, "Three."]


async def test_two_conversations_of_the_same_id_are_told_apart(vault: Vault) -> None:
    await keep(vault, [user("Ann's secret?")], assistant("Ann wants to know."))
    await keep(vault, [user("Bob's?")], assistant("Bob wants to know."))
    assert await recalled(vault, [user("Ann's secret?"), assistant(), tool()]) == ["Ann wants to know."]
    assert await recalled(vault, [user("Carl's?"), assistant(), tool()]) == [None]
    assert await recalled(vault, [user("Bob's?"), assistant(), tool()], key="k2") == [None]


async def test_a_client_may_forget_what_was_before_the_question(vault: Vault) -> None:
    long = [user("Hello"), {"role": "assistant", "content": "Hi."}, user("Oslo?")]
    await keep(vault, long, assistant("One."))
    parts = user("Oslo?") | {"content": [{"type": "text", "text": "Oslo?"}]}
    assert await recalled(vault, [{"role": "system", "content": "Anew."}, parts, assistant(), tool()]) == ["One."]


DETAIL = {"type": "reasoning.encrypted", "format": "google-gemini-v1", "index": 0}


@pytest.mark.parametrize(
    ("returned", "whose"),
    [
        (None, "Bob"),
        ({**DETAIL, "data": "Ann"}, "Ann"),  # the same question and id in another conversation do not take its place
        ({**DETAIL, "data": "Ann", "format": "google-gemini-v1" * 2}, "Bob"),
        ({"type": "reasoning.text", "text": "Hm", "data": "Ann", "index": 0}, "Bob"),
    ],
)
async def test_details_are_believed_unless_the_client_garbled_them(vault: Vault, returned: Any, whose: str) -> None:
    await keep(vault, [user("Oslo?")], assistant() | {"reasoning_details": [{**DETAIL, "data": "Bob"}]})
    said = assistant() | ({"reasoning_details": [returned]} if returned else {})
    call = Call("chat", {"model": "m", "messages": [user("Oslo?"), said, tool()]})
    recall = vault.recall(call, "k1", [ROW])
    assert recall
    await recall.read()
    assert recall.applied(call).body["messages"][1]["reasoning_details"][0]["data"] == whose
