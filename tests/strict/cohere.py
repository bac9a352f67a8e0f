"""A Cohere that takes nothing amiss: https://docs.cohere.com/reference/chat and https://docs.cohere.com/reference/errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.strict.loop import ANSWER, TURNS, check_answered, plan, require
from tests.upstream import Exchange, MalformedError, answer, stream

MODEL = "command-a-03-2025"
FIELDS = {"model", "messages", "stream", "tools", "tool_choice", "temperature", "max_tokens"}


def check(body: dict[str, Any]) -> int:
    """Raise MalformedError for what Cohere refuses; returns the turn."""
    require(body.keys() <= FIELDS, f"unknown field {body.keys() - FIELDS}")
    for tool in body["tools"]:
        require(tool.keys() == {"type", "function"} and tool["function"]["parameters"], "a tool without parameters")
    require(body.get("temperature", 0) <= 1, "temperature must be between 0 and 1.0 inclusive.")
    turns = 0
    for at, message in enumerate(body["messages"]):
        match message:
            case {"role": "system", "content": [*_], **rest} if at == 0 and not rest:
                pass
            case {"role": "user", "content": str(text), **rest} if text and not rest:
                pass
            case {"role": "assistant", "tool_calls": [*calls], **rest} if rest.keys() <= {"tool_plan"}:
                turns += 1
                arguments = [json.loads(call["function"]["arguments"]) for call in calls]
                require(all(isinstance(each, dict) for each in arguments), "arguments that are no JSON object")
            case {"role": "assistant", "content": str(text), **rest} if text and not rest:
                turns += 1
            case {"role": "tool", "content": str(), "tool_call_id": _, **rest} if not rest:
                pass
            case _:
                raise MalformedError(f"message {at} is not Cohere's: {message}")
    check_answered(body["messages"])
    return turns


def message(turn: int) -> dict[str, Any]:
    """Its ids begin with the name of the function, which may have 64 characters."""
    thought, calls = plan(turn)
    if not calls:
        citation = {"start": 0, "end": 4, "text": "Rain", "sources": [], "type": "TEXT_CONTENT"}
        return {"content": [{"type": "text", "text": ANSWER}], "citations": [citation]}
    return {
        "tool_plan": thought,
        "tool_calls": [
            {
                "id": f"{name}_as_if_its_name_were_a_long_one_{turn}_{name}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(given, separators=(",", ":"))},
            }
            for name, given in calls
        ],
    }


def events(said: dict[str, Any], end: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """https://docs.cohere.com/docs/tool-use-streaming"""
    yield "message-start", {"id": "1", "delta": {"message": {"role": "assistant", "content": [], "tool_calls": []}}}
    if thought := said.get("tool_plan"):
        yield "tool-plan-delta", {"delta": {"message": {"tool_plan": thought}}}
    for index, call in enumerate(said.get("tool_calls", [])):
        whole = call["function"]["arguments"]
        opened = {**call, "function": {"name": call["function"]["name"], "arguments": ""}}
        yield "tool-call-start", {"index": index, "delta": {"message": {"tool_calls": opened}}}
        for piece in (whole[:5], whole[5:]):
            arguments = {"tool_calls": {"function": {"arguments": piece}}}
            yield "tool-call-delta", {"index": index, "delta": {"message": arguments}}
        yield "tool-call-end", {"index": index}
    for index, part in enumerate(said.get("content", [])):
        start = {"content": {"type": "text", "text": ""}}
        yield "content-start", {"index": index, "delta": {"message": start}}
        yield "content-delta", {"index": index, "delta": {"message": {"content": {"text": part["text"]}}}}
        for citation in said["citations"]:
            yield "citation-start", {"index": 0, "delta": {"message": {"citations": citation}}}
            yield "citation-end", {"index": 0}
        yield "content-end", {"index": index}
    yield "message-end", {"delta": end}


async def cohere(exchange: Exchange) -> None:
    """One answer: the next turn's calls, or what they came to."""
    seen = exchange.seen
    assert seen
    if seen.path != "/v2/chat":
        raise MalformedError(f"404: {seen.path}")
    turn = check(seen.json)
    said = message(turn)
    end = {
        "finish_reason": "TOOL_CALL" if turn < len(TURNS) else "COMPLETE",
        "usage": {
            "billed_units": {"input_tokens": 10, "output_tokens": 20},
            "tokens": {"input_tokens": 500, "output_tokens": 40},
        },
    }
    if seen.json["stream"]:
        sent = [
            f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
            for kind, data in events(said, end)
        ]
        await stream(*sent, b"data: [DONE]\n\n")(exchange)
    else:
        await answer(200, {"id": "1", "message": {"role": "assistant", **said}, **end})(exchange)
