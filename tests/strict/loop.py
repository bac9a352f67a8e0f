"""One conversation, as every strict mock here holds it: two turns of calls, then an answer; and its client's side."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from tests import server as processes
from tests.upstream import MalformedError

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} at a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
START: Any = [{"role": "developer", "content": "Look it up."}, {"role": "user", "content": "Oslo, Rome?"}]
TURNS: list[tuple[str, list[tuple[str, dict[str, str]]]]] = [
    ("I look up both.", [("weather", {"place": "Oslo"}), ("time", {})]),
    ("Rome, too.", [("weather", {"place": "Rome"})]),
]
"""What a mock thinks and calls, by how many of the assistant's turns the history has; then it answers."""
ANSWER = "Rain in both."
RESULTS = {"weather": "rain", "time": "noon"}


def require(good: object, message: str) -> None:
    if not good:
        raise MalformedError(message)


def plan(turn: int) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    """What is thought and called in this turn."""
    return TURNS[turn] if turn < len(TURNS) else ("", [])


def thinks(turn: int, *, between: bool = True) -> str:
    """What Claude thinks in this turn: without interleaving nothing after a result, as the loop is one turn to it."""
    return plan(turn)[0] if between or turn == 0 else ""


def check_answered(messages: list[dict[str, Any]]) -> None:
    """Of messages as OpenAI shapes them: each call has its result, right after it, and no result is without a call."""
    due: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            require(message["tool_call_id"] in due, "tool call id not found in the calls of the previous message")
            due.remove(message["tool_call_id"])
            continue
        require(not due, "tool calls must be followed by tool messages responding to each of them")
        due = [call["id"] for call in message.get("tool_calls") or ()]
        require(len(set(due)) == len(due), "two calls of one id")
    require(not due, "tool calls must be followed by tool messages responding to each of them")


@asynccontextmanager
async def client_of_gateway(folder: Path, **variables: str) -> AsyncGenerator[AsyncOpenAI]:
    """The stock client of a gateway that knows the providers of these variables, and no other."""
    with processes.gateway(folder, "http://127.0.0.1:9/v1", **variables) as server:
        async with AsyncOpenAI(
            api_key=server.key()["key"], base_url=f"{server.url}/v1", max_retries=0, timeout=20
        ) as client:
            yield client


async def said(client: AsyncOpenAI, model: str, messages: list[Any], *, streams: bool, **more: Any) -> Any:
    """The whole completion, as a stock client puts it together."""
    asked: Any = {"model": model, "messages": messages, "tools": TOOLS, **more}
    if not streams:
        return await client.chat.completions.create(**asked)
    async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
        async for _ in events:
            pass
        return await events.get_final_completion()


def kept(completion: Any, *, whole: bool) -> dict[str, Any]:
    """The message as a client keeps it: `whole`, or with no more than OpenAI documents, as most do."""
    message = completion.choices[0].message.model_dump()
    if not whole:
        for carrier in (message, *(message.get("tool_calls") or ())):
            carrier.pop("extra_content", None)
        message.pop("reasoning_content", None)
        message.pop("reasoning_details", None)
    return message


def made(message: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """The calls by name, and their arguments."""
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    ]


def results(message: dict[str, Any]) -> list[Any]:
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": RESULTS[call["function"]["name"]]}
        for call in message.get("tool_calls") or ()
    ]
