"""A tool loop of three turns through the stock OpenAI client, before a fake Anthropic that takes nothing amiss."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests import server as processes
from tests.server import PROVIDER_KEY
from tests.upstream import Exchange, MalformedError, Upstream, answer, stream

MODELS = ["claude-sonnet-4-5", "claude-opus-5"]
"""One that thinks by a budget, and one that thinks as it likes."""
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
FIELDS = {"model", "messages", "max_tokens", "system", "stream", "tools", "thinking", "output_config"}
TURNS: list[tuple[str, list[tuple[str, dict[str, str]]]]] = [
    ("I look up both.", [("weather", {"place": "Oslo"}), ("time", {})]),
    ("Rome, too.", [("weather", {"place": "Rome"})]),
]
"""What the fake model thinks and calls, turn by turn; then it answers."""
RESULTS = {"weather": "rain", "time": "noon"}


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
        case _:
            raise MalformedError("thinking is not as this model takes it")
    if not all(tool.keys() == {"name", "description", "input_schema"} for tool in body["tools"]):
        raise MalformedError("tools.0: Extra inputs are not permitted")
    roles = [message["role"] for message in body["messages"]]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise MalformedError("roles must alternate")
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
    if any(block["type"] == "tool_use" for block in content) and content[0]["type"] != "thinking":
        raise MalformedError("Expected `thinking` or `redacted_thinking`, but found `tool_use`.")
    for block in content:
        match block:
            case {"type": "text", "text": text, **rest} if text.strip() and not rest:
                pass
            case {"type": "thinking", "thinking": thought, "signature": signed, **rest} if not rest:
                if signed != signature(body["model"], thought):
                    raise MalformedError("Invalid `signature` in `thinking` block")
            case {"type": "tool_use", "id": call_id, "name": _, "input": dict(), **rest} if not rest:
                if not re.fullmatch("[a-zA-Z0-9_-]+", call_id):
                    raise MalformedError("tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
            case {"type": "tool_result", "tool_use_id": _, "content": [*_], **rest} if not rest:
                pass
            case _:
                raise MalformedError(f"messages.{at}: {block['type']}: Extra inputs are not permitted")


def blocks(model: str, turn: int) -> list[dict[str, Any]]:
    if turn == len(TURNS):
        return [{"type": "text", "text": "Rain in both."}]
    thought, calls = TURNS[turn]
    return [
        {"type": "thinking", "thinking": thought, "signature": signature(model, thought)},
        *(
            {"type": "tool_use", "id": f"toolu_{turn}{index}", "name": name, "input": arguments}
            for index, (name, arguments) in enumerate(calls)
        ),
    ]


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
    said = blocks(seen.json["model"], turn)
    end = {
        "stop_reason": "end_turn" if turn == len(TURNS) else "tool_use",
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


@pytest.fixture(scope="module")
async def fake(anyio_backend: str) -> AsyncIterator[Upstream]:
    async with Upstream(key=PROVIDER_KEY, header="x-api-key") as upstream:
        for model in MODELS:
            upstream.always(model, anthropic)
        yield upstream


@pytest.fixture(scope="module")
async def client(fake: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    variables = {"ANTHROPIC_API_KEY": PROVIDER_KEY, "ANTHROPIC_BASE_URL": f"http://{fake.host}/v1"}
    with processes.gateway(tmp_path_factory.mktemp("anthropic"), fake.url, **variables) as server:
        async with AsyncOpenAI(
            api_key=server.key()["key"], base_url=f"{server.url}/v1", max_retries=0, timeout=20
        ) as client:
            yield client


async def said(client: AsyncOpenAI, model: str, messages: list[Any], *, streams: bool) -> tuple[Any, str, Any]:
    """The assistant's message as a stock client keeps it, its finish reason and the usage."""
    asked: Any = {"model": f"anthropic/{model}", "messages": messages, "tools": TOOLS, "reasoning_effort": "medium"}
    if not streams:
        whole = await client.chat.completions.create(**asked)
        return whole.choices[0].message.model_dump(), whole.choices[0].finish_reason, whole.usage
    options: Any = {"include_usage": True}
    async with client.chat.completions.stream(**asked, stream_options=options) as stream_of_events:
        async for _ in stream_of_events:
            pass
        whole = await stream_of_events.get_final_completion()
    return whole.choices[0].message.model_dump(), whole.choices[0].finish_reason, whole.usage


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("keeps", [True, False], ids=["with its signatures", "without them"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop(client: AsyncOpenAI, fake: Upstream, streams: bool, keeps: bool, model: str) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Look it up."}, {"role": "user", "content": "Oslo, Rome?"}]
    for thought, calls in TURNS:
        message, finish, usage = await said(client, model, messages, streams=streams)
        assert finish == "tool_calls"
        assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens) == (15, 5, 20)
        assert message["reasoning_content"] == thought
        made = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
        assert made == calls
        assert message["extra_content"]["anthropic"]["thinking"][0]["signature"] == signature(model, thought)
        if not keeps:  # as most clients; the gateway remembers
            del message["extra_content"], message["reasoning_content"]
        messages += [
            message,
            *(
                {"role": "tool", "tool_call_id": call["id"], "content": RESULTS[call["function"]["name"]]}
                for call in message["tool_calls"]
            ),
        ]
    message, finish, _ = await said(client, model, messages, streams=streams)
    assert not fake.malformed
    assert (message["content"], finish) == ("Rain in both.", "stop")
    turns = fake.seen[-1].json["messages"]
    assert [turn["content"][0]["thinking"] for turn in turns if turn["role"] == "assistant"] == [t for t, _ in TURNS]
