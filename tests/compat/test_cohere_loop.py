"""A tool loop of three turns through the stock OpenAI client, before a fake Cohere that takes nothing amiss."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests import server as processes
from tests.server import PROVIDER_KEY, Server
from tests.upstream import Exchange, MalformedError, Upstream, answer, stream

MODEL = "cohere/command-a-03-2025"
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} at a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
    for name in ("weather", "time")
]
FIELDS = {"model", "messages", "stream", "tools", "tool_choice", "temperature", "max_tokens"}
TURNS: list[tuple[str, list[tuple[str, str]]]] = [
    ("I look up both.", [("weather", '{"place":"Oslo"}'), ("time", '{"place":"Oslo"}')]),
    ("Rome, too.", [("weather", '{"place":"Rome"}')]),
]
"""What the fake model plans and calls, turn by turn; then it answers."""
RESULTS = {"weather": "rain", "time": "noon"}


def check(body: dict[str, Any]) -> int:
    """Raise MalformedError for what Cohere refuses: https://docs.cohere.com/reference/errors; returns the turn."""
    if unknown := body.keys() - FIELDS:
        raise MalformedError(f"unknown field {unknown}")
    if not all(tool.keys() == {"type", "function"} and tool["function"]["parameters"] for tool in body["tools"]):
        raise MalformedError("a tool without parameters, or with fields of another's")
    if body["temperature"] > 1:
        raise MalformedError("temperature must be between 0 and 1.0 inclusive.")
    open_calls, turns = list[str](), 0
    for at, message in enumerate(body["messages"]):
        match message:
            case {"role": "system", "content": [*_], **rest} if at == 0 and not rest:
                continue
            case {"role": "user", "content": str(text), **rest} if text and not rest and not open_calls:
                continue
            case {"role": "assistant", "tool_calls": [*calls], **rest} if rest.keys() <= {"tool_plan"}:
                turns += 1
                open_calls += [call["id"] for call in calls]
                if not all(json.loads(call["function"]["arguments"]) for call in calls):
                    raise MalformedError("arguments that are no JSON object")
            case {"role": "tool", "tool_call_id": call_id, "content": str(), **rest} if not rest:
                if call_id not in open_calls:
                    raise MalformedError("tool call id not found in previous tool calls")
                open_calls.remove(call_id)
            case _:
                raise MalformedError(f"message {at} is not Cohere's: {message}")
    if open_calls:
        raise MalformedError("tool calls without results")
    return turns


def message(turn: int) -> dict[str, Any]:
    if turn == len(TURNS):
        citation = {"start": 0, "end": 4, "text": "Rain", "sources": [], "type": "TEXT_CONTENT"}
        return {"content": [{"type": "text", "text": "Rain in both."}], "citations": [citation]}
    plan, calls = TURNS[turn]
    return {
        "tool_plan": plan,
        "tool_calls": [
            {"id": f"{name}_{turn}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ],
    }


def events(said: dict[str, Any], end: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """https://docs.cohere.com/docs/tool-use-streaming"""
    yield "message-start", {"id": "1", "delta": {"message": {"role": "assistant", "content": [], "tool_calls": []}}}
    if plan := said.get("tool_plan"):
        yield "tool-plan-delta", {"delta": {"message": {"tool_plan": plan}}}
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
        "finish_reason": "COMPLETE" if turn == len(TURNS) else "TOOL_CALL",
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


@pytest.fixture(scope="module")
async def fake(anyio_backend: str) -> AsyncIterator[Upstream]:
    async with Upstream(key=PROVIDER_KEY) as upstream:
        upstream.always("command-a-03-2025", cohere)
        yield upstream


@pytest.fixture(scope="module")
def server(fake: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {"COHERE_API_KEY": PROVIDER_KEY, "COHERE_BASE_URL": f"http://{fake.host}/v2"}
    with processes.gateway(tmp_path_factory.mktemp("cohere"), fake.url, **variables) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    key = server.key()["key"]
    async with AsyncOpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0, timeout=20) as client:
        yield client


async def said(client: AsyncOpenAI, messages: list[Any], *, streams: bool) -> tuple[dict[str, Any], str, Any]:
    """The assistant's message as a stock client keeps it, its finish reason and the usage."""
    asked: Any = {"model": MODEL, "messages": messages, "tools": TOOLS, "temperature": 1.5}
    if not streams:
        whole = await client.chat.completions.create(**asked)
        return whole.choices[0].message.model_dump(), whole.choices[0].finish_reason, whole.usage
    options: Any = {"include_usage": True}
    async with client.chat.completions.stream(**asked, stream_options=options) as events:
        async for _ in events:
            pass
        whole = await events.get_final_completion()
    return whole.choices[0].message.model_dump(), whole.choices[0].finish_reason, whole.usage


@pytest.mark.parametrize("keeps", [True, False], ids=["the client keeps its plan", "the gateway does"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop(client: AsyncOpenAI, fake: Upstream, streams: bool, keeps: bool) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Look it up."}, {"role": "user", "content": "Oslo, Rome?"}]
    for plan, calls in TURNS:
        message, finish, usage = await said(client, messages, streams=streams)
        assert finish == "tool_calls"
        assert (usage.prompt_tokens, usage.completion_tokens) == (10, 20)
        assert message["reasoning_content"] == plan
        made = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        assert made == calls
        if not keeps:
            del message["reasoning_content"]
        messages += [
            message,
            *(
                {"role": "tool", "tool_call_id": call["id"], "content": RESULTS[call["function"]["name"]]}
                for call in message["tool_calls"]
            ),
        ]
    message, finish, _ = await said(client, messages, streams=streams)
    assert not fake.malformed
    assert (message["content"], finish) == ("Rain in both.", "stop")
    assert message["extra_content"]["cohere"]["citations"][0]["text"] == "Rain"
    plans = [sent["tool_plan"] for sent in fake.seen[-1].json["messages"] if "tool_plan" in sent]
    assert plans == [plan for plan, _ in TURNS]
