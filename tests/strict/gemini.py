"""A Gemini that refuses what Google's would refuse: https://ai.google.dev/gemini-api/docs/thought-signatures."""

from __future__ import annotations

import base64
import re
from typing import Any

from tests.strict.loop import ANSWER, TURNS, plan, require
from tests.upstream import END, Exchange, MalformedError, answer, dumped, framed, head, send

MODEL = "gemini-3.5-flash"
DUMMY = "skip_thought_signature_validator"
PATH = re.compile(r"/v1beta/models/gemini-3\.5-flash:(generateContent|streamGenerateContent\?alt=sse)")
FIELDS = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig"}
PARTS = ("text", "functionCall", "functionResponse")


def signature(thought: str) -> str:
    """What it signs the first call of a turn with, or, of "", its text."""
    return base64.b64encode(f"signed: {thought}".encode()).decode()


OWN = [signature(thought) for thought, _ in (*TURNS, plan(len(TURNS)))]


def check(body: dict[str, Any]) -> int:
    """Raise MalformedError for what Google refuses as INVALID_ARGUMENT; returns the turn."""
    require(body.keys() <= FIELDS, f"Unknown name in {sorted(body)}")
    require("role" not in body["systemInstruction"] or body["systemInstruction"]["role"] == "user", "system role")
    require(all("text" in part for part in body["systemInstruction"]["parts"]), "system instructions are text only")
    turns = body["contents"]
    require(turns and turns[0]["role"] == "user", "Please ensure that the first turn is the user's")
    for before, turn in zip([None, *turns], turns, strict=False):
        require(turn.keys() == {"role", "parts"}, f"Unknown name in {sorted(turn)}")
        require(turn["role"] in ("user", "model"), "Please use a valid role: user, model.")
        require(turn["parts"], "must include at least one parts field")
        for part in turn["parts"]:
            require(part.keys() & set(PARTS) and part.keys() <= {*PARTS, "thoughtSignature"}, "Unknown name at parts")
            require(part.get("thoughtSignature", DUMMY) in (DUMMY, *OWN), "Corrupted thought signature.")
        check_calls(turn, before or {"parts": []})
    return sum(turn["role"] == "model" for turn in turns)


def check_calls(turn: dict[str, Any], before: dict[str, Any]) -> None:
    calls = [part for part in turn["parts"] if "functionCall" in part]
    for part in calls:
        require(turn["role"] == "model", "function call in a turn of the user")
        require(part["functionCall"].keys() == {"id", "name", "args"}, "Unknown name at function_call")
        require(isinstance(part["functionCall"]["args"], dict), "args is not a struct")
    if calls:
        require(calls[0].get("thoughtSignature"), "Function call is missing a thought_signature in functionCall parts.")
    results = [part["functionResponse"] for part in turn["parts"] if "functionResponse" in part]
    asked = [part["functionCall"] for part in before["parts"] if "functionCall" in part]
    require(len(results) == len(asked), "the number of function response parts is not that of function calls")
    for result, made in zip(results, asked, strict=True):
        require((result["id"], result["name"]) == (made["id"], made["name"]), "a response to another call")
        require(isinstance(result["response"], dict), "response is not a struct")


def parts(turn: int) -> list[dict[str, Any]]:
    """Of calls at once it signs the first; it gives them no ids."""
    thought, calls = plan(turn)
    signed = {"thoughtSignature": signature(thought)}
    if not calls:
        return [{"text": ANSWER, **signed}]
    made = [{"functionCall": {"name": name, "args": args}} for name, args in calls]
    return [{"text": thought, "thought": True}, {**made[0], **signed}, *made[1:]]


async def gemini(exchange: Exchange) -> None:
    """One answer: the next turn's calls, or what they came to."""
    seen = exchange.seen
    assert seen
    if not PATH.fullmatch(seen.path) or "authorization" in seen.headers:
        raise MalformedError(f"404: {seen.path}")
    said = parts(check(seen.json))
    usage = {"promptTokenCount": 20, "candidatesTokenCount": 5, "thoughtsTokenCount": 7, "totalTokenCount": 32}
    if "stream" not in seen.path:
        whole = {"content": {"role": "model", "parts": said}, "finishReason": "STOP", "index": 0}
        await answer(200, {"candidates": [whole], "usageMetadata": usage})(exchange)
        return
    events = [{"candidates": [{"content": {"role": "model", "parts": [part]}, "index": 0}]} for part in said]
    last: Any = {"content": {"role": "model", "parts": [{"text": ""}]}, "finishReason": "STOP", "index": 0}
    events.append({"candidates": [last], "usageMetadata": usage})
    opened = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
    sent = [framed(b"data: " + dumped(event) + b"\r\n\r\n") for event in events]
    await send(opened, *sent, END)(exchange)


def signatures(body: Any) -> list[str | None]:
    """Of the calls in a request, in order."""
    parts = [part for turn in body["contents"] for part in turn["parts"] if "functionCall" in part]
    return [part.get("thoughtSignature") for part in parts]
