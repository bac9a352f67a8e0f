"""An Anthropic that takes nothing amiss: https://platform.claude.com/docs/en/api/messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.strict.loop import ANSWER, TURNS, plan, thinks
from tests.upstream import Exchange, MalformedError, answer, stream

MODELS = ["claude-sonnet-4-5", "claude-opus-5"]
"""One that thinks by a budget, and one that thinks as it likes."""
LOOK = "Let me look."
FIELDS = {"model", "messages", "max_tokens", "system", "stream", "tools", "thinking", "output_config"}


def signature(model: str, thought: str) -> str:
    return f"{model}:{thought}"[::-1]


def check(body: dict[str, Any]) -> int:
    """Raise MalformedError for what Anthropic refuses, in its words; returns the turn."""
    if unknown := body.keys() - FIELDS:
        raise MalformedError(f"{unknown.pop()}: Extra inputs are not permitted")
    manual = body["model"] == "claude-sonnet-4-5"
    match body.get("thinking"):
        case {"type": "enabled", "budget_tokens": int(budget), **rest} if manual and not rest:
            if not 1024 <= budget < body["max_tokens"]:
                raise MalformedError("max_tokens must be greater than thinking.budget_tokens")
        case {"type": "adaptive", "display": "summarized", **rest} if not manual and not rest:
            assert body["output_config"] == {"effort": "medium"}
        case None if manual:
            pass
        case _:
            raise MalformedError("thinking is not as this model takes it")
    if not all(tool.keys() == {"name", "description", "input_schema"} for tool in body["tools"]):
        raise MalformedError("tools.0: Extra inputs are not permitted")
    if not all(block["type"] == "text" for block in body.get("system", [])):
        raise MalformedError("system.0.type: Input should be 'text'")
    roles = [message["role"] for message in body["messages"]]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise MalformedError("roles must alternate")
    used = [block["id"] for message in body["messages"] for block in message["content"] if block["type"] == "tool_use"]
    if len(set(used)) < len(used):
        raise MalformedError("messages: `tool_use` ids must be unique")
    for at, message in enumerate(body["messages"]):
        if message.keys() != {"role", "content"} or not message["content"]:
            raise MalformedError(f"messages.{at}: Extra inputs are not permitted")
        check_turn(body, at, message["content"])
    return len(roles) // 2


def check_turn(body: dict[str, Any], at: int, content: list[dict[str, Any]]) -> None:
    called = [block["id"] for block in body["messages"][at - 1]["content"] if block["type"] == "tool_use"] if at else []
    results = [block.get("tool_use_id") for block in content[: len(called)]]
    if results != called:
        raise MalformedError("tool_use ids were found without tool_result blocks immediately after")
    calls, last = any(block["type"] == "tool_use" for block in content), at == len(body["messages"]) - 2
    manual, first = (body.get("thinking") or {}).get("type") == "enabled", begun(body["messages"], at)
    if last and calls and manual and first["content"][0]["type"] != "thinking":
        raise MalformedError("Expected `thinking` or `redacted_thinking`, but found `tool_use`.")
    if last and thoughts(content) not in ([], thoughts(blocks(body, at // 2))):
        raise MalformedError("`thinking` blocks in the latest assistant message cannot be modified.")
    for block in content:
        match block:
            case {"type": "text", "text": text, **rest} if text.strip() and not rest:
                pass
            case {"type": "thinking", "thinking": thought, "signature": signed, **rest} if not rest:
                if signed != signature(body["model"], thought):
                    raise MalformedError("Invalid `signature` in `thinking` block")
            case {"type": "redacted_thinking", "data": str(), **rest} if not rest:
                pass
            case {"type": "tool_use", "id": call_id, "name": _, "input": dict(), **rest} if not rest:
                if not re.fullmatch("[a-zA-Z0-9_-]+", call_id):
                    raise MalformedError("tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
            case {"type": "tool_result", "tool_use_id": _, "content": [*_], **rest} if not rest:
                pass
            case _:
                raise MalformedError(f"messages.{at}: {block['type']}: Extra inputs are not permitted")


def begun(messages: list[dict[str, Any]], at: int) -> dict[str, Any]:
    """The first message of the assistant's turn that this one is of: a loop of tools is one turn."""
    while at > 1 and messages[at - 1]["content"][0]["type"] == "tool_result":
        at -= 2
    return messages[at]


def thoughts(content: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """And where they stand."""
    return [(at, block) for at, block in enumerate(content) if block["type"].endswith("thinking")]


def blocks(body: dict[str, Any], turn: int) -> list[dict[str, Any]]:
    between = body["model"] == MODELS[1]
    thought, calls = thinks(turn, between=between), plan(turn)[1]
    thinking = {"type": "thinking", "thinking": thought, "signature": signature(body["model"], thought)}
    uses = [
        {"type": "tool_use", "id": f"toolu_{turn}{index}", "name": name, "input": arguments}
        for index, (name, arguments) in enumerate(calls)
    ]
    if between and uses:
        hidden = {"type": "redacted_thinking", "data": thought[::-1]}
        return [{"type": "text", "text": LOOK}, thinking, uses[0], *([hidden, *uses[1:]] if uses[1:] else ())]
    return [*([thinking] if "thinking" in body and thought else ()), *(uses or [{"type": "text", "text": ANSWER}])]


def events(body: dict[str, Any], said: list[dict[str, Any]], end: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """https://platform.claude.com/docs/en/build-with-claude/streaming"""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": []}
    usage = {**end["usage"], "output_tokens": 1}
    yield {"type": "message_start", "message": {**message, "stop_reason": None, "usage": usage}}
    yield {"type": "ping"}
    for index, block in enumerate(said):
        match block:
            case {"type": "text", "text": text}:
                empty, deltas = {"text": ""}, [{"type": "text_delta", "text": text}]
            case {"type": "thinking", "thinking": text, "signature": signed}:
                empty = {"thinking": "", "signature": ""}
                deltas = [
                    {"type": "thinking_delta", "thinking": text},
                    {"type": "signature_delta", "signature": signed},
                ]
            case {"type": "redacted_thinking"}:
                empty, deltas = {}, []
            case _:
                whole = json.dumps(block["input"]) if block["input"] else ""
                empty = {"input": {}}
                deltas = [{"type": "input_json_delta", "partial_json": part} for part in ("", whole[:5], whole[5:])]
        yield {"type": "content_block_start", "index": index, "content_block": block | empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": end["stop_reason"], "stop_sequence": None},
        "usage": {"output_tokens": end["usage"]["output_tokens"]},
    }
    yield {"type": "message_stop"}


async def anthropic(exchange: Exchange) -> None:
    """One answer: the next turn's calls, or what they came to."""
    seen = exchange.seen
    assert seen
    if seen.path != "/v1/messages" or seen.headers.get("anthropic-version") != "2023-06-01":
        raise MalformedError(f"404: {seen.path}")
    turn = check(seen.json)
    said = blocks(seen.json, turn)
    end = {
        "stop_reason": "tool_use" if turn < len(TURNS) else "end_turn",
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 20},
    }
    if seen.json.get("stream"):
        sent = [
            f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events(seen.json, said, end)
        ]
        await stream(*sent)(exchange)
    else:
        whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": seen.json["model"]}
        await answer(200, {**whole, "content": said, "stop_sequence": None, **end})(exchange)
