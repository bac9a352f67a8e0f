"""Four who speak OpenAI's wire, and take nothing amiss: OpenAI itself, DeepSeek, Mistral and OpenRouter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.strict.loop import ANSWER, TURNS, check_answered, plan, require
from tests.upstream import DONE, Exchange, MalformedError, answer, stream

CALL = {"id", "type", "function"}
FIELDS = {"model", "messages", "tools", "stream", "reasoning_effort"}


class Manners(NamedTuple):
    """How one of them differs. `ids`: what it takes; `call_id`: what it makes, by turn and index.

    `seals`: with `reasoning_details`, which it wants back."""

    model: str
    path: str
    fields: set[str]
    assistant: set[str]
    system: str
    ids: re.Pattern[str]
    call_id: Callable[[int, int], str]
    thinks: bool = False
    seals: bool = False


OPENAI = Manners(
    "gpt-5-mini",
    "/v1/chat/completions",
    {*FIELDS, "stream_options"},
    {"role", "content", "refusal", "tool_calls"},
    "developer",
    re.compile(r".{1,40}", re.DOTALL),  # "string too long. Expected a string with maximum length 40"
    lambda turn, index: f"functions.{plan(turn)[1][index][0]}:{index}",  # Kimi's: the same in every turn
)
DEEPSEEK = Manners(
    "deepseek-v4-flash",
    "/chat/completions",
    {*FIELDS, "stream_options"},
    {"role", "content", "tool_calls", "reasoning_content"},
    "system",
    re.compile(r".+", re.DOTALL),
    lambda turn, index: f"call_{index:02}_{turn}YV8xQcKqkR0ZcZbTjB5Tn",
    thinks=True,
)
MISTRAL = Manners(
    "mistral-medium-latest",
    "/v1/chat/completions",
    FIELDS,
    {"role", "content", "tool_calls"},
    "system",
    re.compile(r"[a-zA-Z0-9]{9}"),
    lambda turn, index: f"D681PevK{turn}"[index:] + "x" * index,
)
OPENROUTER = Manners(
    "google/gemini-3-pro-preview",
    "/api/v1/chat/completions",
    {*FIELDS, "stream_options"},
    {"role", "content", "refusal", "tool_calls", "reasoning", "reasoning_details"},
    "developer",
    re.compile(r".+", re.DOTALL),
    lambda turn, index: f"tool_{turn}_{plan(turn)[1][index][0]}",
    seals=True,
)


def check(body: dict[str, Any], manners: Manners) -> int:
    """Raise MalformedError for what it refuses; returns the turn."""
    require(body["model"] == manners.model, "The model does not exist.")
    require(body.keys() <= manners.fields, f"Unrecognized request argument supplied: {body.keys() - manners.fields}")
    roles = [message["role"] for message in body["messages"]]
    require(roles[0] == manners.system and roles[1] == "user", "unknown variant of role")
    for at, message in enumerate(body["messages"]):
        known = {
            "assistant": manners.assistant,
            "tool": {"role", "content", "tool_call_id"},
        }.get(message["role"], {"role", "content"})
        require(message.keys() <= known, f"messages.{at}: Extra inputs are not permitted: {message.keys() - known}")
        require(message.get("content") or message.get("tool_calls"), f"messages.{at}: no content and no calls")
        for call in message.get("tool_calls") or ():
            require(call.keys() == CALL, f"messages.{at}.tool_calls: Extra inputs are not permitted")
            require(call["function"].keys() == {"name", "arguments"}, f"messages.{at}: Extra inputs are not permitted")
            require(isinstance(json.loads(call["function"]["arguments"]), dict), "arguments that are no JSON object")
            require(manners.ids.fullmatch(call["id"]), f"messages.{at}: tool call id was {call['id']}, invalid")
    check_answered(body["messages"])
    if manners.thinks:
        check_thoughts(body["messages"], manners)
    if manners.seals:
        check_seals(body["messages"], manners)
    return roles.count("assistant")


def check_thoughts(messages: list[dict[str, Any]], manners: Manners) -> None:
    """https://api-docs.deepseek.com/guides/thinking_mode#tool-calls; "" does not do for all of its models."""
    said = [message for message in messages if message["role"] == "assistant"]
    for turn, message in enumerate(said):
        thought = message.get("reasoning_content")
        require(thought, "The `reasoning_content` in the thinking mode must be passed back to the API.")
        calls = message.get("tool_calls") or [{"id": ""}]
        if turn < len(TURNS) and calls[0]["id"] == manners.call_id(turn, 0):
            require(thought == plan(turn)[0], "reasoning_content is not what was thought")


def check_seals(messages: list[dict[str, Any]], manners: Manners) -> None:
    """https://openrouter.ai/docs/use-cases/reasoning-tokens#preserving-reasoning-blocks: as they were made."""
    said = [message for message in messages if message["role"] == "assistant"]
    for turn, message in enumerate(said):
        own = turn < len(TURNS) and message["tool_calls"][0]["id"] == manners.call_id(turn, 0)
        require(
            message.get("reasoning_details") == (details(turn) if own else None),
            "Gemini models require OpenRouter reasoning details to be preserved in each request.",
        )


def details(turn: int) -> list[dict[str, Any]]:
    kind = {"format": "google-gemini-v1", "index": 0}
    sealed = {"type": "reasoning.encrypted", "data": f"sealed{turn}", "id": OPENROUTER.call_id(turn, 0), **kind}
    return [{"type": "reasoning.text", "text": plan(turn)[0], **kind}, sealed]


def message(manners: Manners, turn: int) -> dict[str, Any]:
    thought, calls = plan(turn)
    said: dict[str, Any] = {"role": "assistant", "content": None if calls else ANSWER}
    if manners.thinks:
        said["reasoning_content"] = thought
    if manners.seals and calls:
        said |= {"reasoning": thought, "reasoning_details": details(turn)}
    if calls:
        said["tool_calls"] = [
            {
                "id": manners.call_id(turn, index),
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(given)},
            }
            for index, (name, given) in enumerate(calls)
        ]
    return said


def deltas(said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": ""}
    if thought := said.get("reasoning_content"):
        yield {"reasoning_content": thought[:4]}
        yield {"reasoning_content": thought[4:]}
    if thought := said.get("reasoning"):
        text, sealed = said["reasoning_details"]
        for part in (thought[:4], thought[4:]):
            yield {"content": "", "reasoning": part, "reasoning_details": [{**text, "text": part}]}
        yield {"content": "", "reasoning": None, "reasoning_details": [sealed]}
    if said["content"]:
        yield {"content": said["content"]}
    for index, call in enumerate(said.get("tool_calls", ())):
        whole = call["function"]["arguments"]
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        for part in (whole[:5], whole[5:]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}


def speaking(manners: Manners) -> Callable[[Exchange], Any]:
    """One answer: the next turn's calls, or what they came to."""

    async def step(exchange: Exchange) -> None:
        seen = exchange.seen
        assert seen
        if seen.path != manners.path:
            raise MalformedError(f"404: {seen.path}")
        turn = check(seen.json, manners)
        said, finish = message(manners, turn), "tool_calls" if turn < len(TURNS) else "stop"
        usage = {"prompt_tokens": 15, "completion_tokens": 20, "total_tokens": 35}
        whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": manners.model}
        if not seen.json.get("stream"):
            choice = {"index": 0, "message": said, "finish_reason": finish}
            await answer(200, {**whole, "choices": [choice], "usage": usage})(exchange)
            return
        chunk = {**whole, "object": "chat.completion.chunk"}
        sent = [{**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas(said)]
        last = {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "usage": usage}
        await stream(*sent, last, DONE)(exchange)

    return step
