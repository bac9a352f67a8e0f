"""A tool loop of three turns through the stock OpenAI client, before a fake Bedrock that takes nothing amiss."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from openai import AsyncOpenAI

from tests import server as processes
from tests.eventstream import event
from tests.server import PROVIDER_KEY
from tests.upstream import Exchange, MalformedError, Seen, Upstream, answer, framed, head, send

MODEL = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
PATH = "/model/us.anthropic.claude-sonnet-4-5-20250929-v1%3A0/converse"
ROLE = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI", "token")
REGION = "eu-central-1"
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
FIELDS = {"messages", "system", "inferenceConfig", "toolConfig", "additionalModelRequestFields"}
TURNS: list[tuple[str, list[tuple[str, dict[str, str]]]]] = [
    ("I look up both.", [("weather", {"place": "Oslo"}), ("time", {})]),
    ("Rome, too.", [("weather", {"place": "Rome"})]),
]
"""What the fake model thinks and calls, turn by turn; then it answers."""
RESULTS = {"weather": "rain", "time": "noon"}
REDACTED = base64.b64encode(b"not to be seen").decode()


def signature(thought: str) -> str:
    return base64.b64encode(thought.encode()).decode()


def check_signature(seen: Seen, host: str) -> None:
    """As AWS does: the request is signed once more, of the headers that it names, and the two must agree."""
    names = re.search(r"SignedHeaders=([a-z0-9;-]+), ", seen.headers["authorization"])
    if not names:
        raise MalformedError("403: no AWS signature")
    headers = {name: seen.headers[name] for name in names[1].split(";")}
    request = AWSRequest("POST", f"http://{host}{seen.path}", headers, seen.body)
    request.context["timestamp"] = seen.headers["x-amz-date"]
    signer = SigV4Auth(ROLE, "bedrock", REGION)
    canonical = signer.canonical_request(request)
    expected = signer.signature(signer.string_to_sign(request, canonical), request)
    if not seen.headers["authorization"].endswith(f"Signature={expected}"):
        raise MalformedError("403: The request signature we calculated does not match the signature you provided.")
    if "x-amz-security-token" not in headers:
        raise MalformedError("403: The security token included in the request is invalid.")


def check(body: dict[str, Any]) -> int:
    """Raise MalformedError for what Bedrock, or Claude behind it, refuses, in their words; returns the turn."""
    if unknown := body.keys() - FIELDS:
        raise MalformedError(f"extraneous key [{unknown.pop()}] is not permitted")
    thinking = body["additionalModelRequestFields"]
    if thinking.keys() != {"thinking"} or not 1024 <= thinking["thinking"]["budget_tokens"] < body[
        "inferenceConfig"
    ].get("maxTokens", 0):
        raise MalformedError("`max_tokens` must be greater than `thinking.budget_tokens`")
    if body["inferenceConfig"].keys() != {"maxTokens"}:
        raise MalformedError("`temperature` may only be set to 1 when thinking is enabled")
    if not all(
        tool["toolSpec"].keys() == {"name", "description", "inputSchema"} for tool in body["toolConfig"]["tools"]
    ):
        raise MalformedError("toolSpec: extraneous key")
    roles = [message["role"] for message in body["messages"]]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise MalformedError("A conversation must alternate between user and assistant roles.")
    for at, message in enumerate(body["messages"]):
        if message.keys() != {"role", "content"} or not message["content"]:
            raise MalformedError(f"The content field in the Message object at messages.{at} is empty.")
        check_turn(body, at, message["content"])
    return len(roles) // 2


def check_turn(body: dict[str, Any], at: int, content: list[dict[str, Any]]) -> None:
    before = body["messages"][at - 1]["content"] if at else []
    called = [block["toolUse"]["toolUseId"] for block in before if "toolUse" in block]
    results = [block.get("toolResult", {}).get("toolUseId") for block in content[: len(called)]]
    if results != called:
        raise MalformedError("Expected toolResult blocks at messages for the following Ids")
    if any("toolUse" in block for block in content) and "reasoningContent" not in content[0]:
        raise MalformedError("Expected `thinking` or `redacted_thinking`, but found `tool_use`.")
    for block in content:
        ((kind, said),) = block.items()
        match kind, said:
            case "text", str(text) if text.strip():
                pass
            case "reasoningContent", {"reasoningText": {"text": thought, "signature": signed, **rest}} if not rest:
                if signed != signature(thought):
                    raise MalformedError("Invalid `signature` in `thinking` block")
            case "reasoningContent", {"redactedContent": redacted} if redacted == REDACTED:
                pass
            case "toolUse", {"toolUseId": call_id, "name": _, "input": dict(), **rest} if not rest:
                if not re.fullmatch("[a-zA-Z0-9_-]{1,64}", call_id):
                    raise MalformedError("toolUseId failed to satisfy constraint")
            case "toolResult", {"toolUseId": _, "content": [{"text": str()}], **rest} if not rest:
                pass
            case _:
                raise MalformedError(f"messages.{at}: {kind}: extraneous key is not permitted")


def blocks(turn: int) -> list[dict[str, Any]]:
    if turn == len(TURNS):
        return [{"text": "Rain in both."}]
    thought, calls = TURNS[turn]
    return [
        {"reasoningContent": {"reasoningText": {"text": thought, "signature": signature(thought)}}},
        {"reasoningContent": {"redactedContent": REDACTED}},
        *(
            {"toolUse": {"toolUseId": f"tooluse_{turn}{index}", "name": name, "input": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ),
    ]


def events(said: list[dict[str, Any]], end: dict[str, Any]) -> Iterator[bytes]:
    """https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_ConverseStreamOutput.html"""
    yield event("messageStart", role="assistant")
    for index, block in enumerate(said):
        deltas: list[dict[str, Any]] = []
        match block:
            case {"text": text}:
                deltas = [{"text": text[:5]}, {"text": text[5:]}]
            case {"reasoningContent": {"reasoningText": {"text": text, "signature": signed}}}:
                deltas = [{"reasoningContent": {"text": text}}, {"reasoningContent": {"signature": signed}}]
            case {"reasoningContent": redacted}:
                deltas = [{"reasoningContent": redacted}]
            case {"toolUse": {"input": given, **use}}:
                whole = json.dumps(given) if given else ""
                yield event("contentBlockStart", contentBlockIndex=index, start={"toolUse": use})
                deltas = [{"toolUse": {"input": part}} for part in ("", whole[:5], whole[5:])]
        for delta in deltas:
            yield event("contentBlockDelta", contentBlockIndex=index, delta=delta)
        yield event("contentBlockStop", contentBlockIndex=index)
    yield event("messageStop", stopReason=end["stopReason"])
    yield event("metadata", usage=end["usage"], metrics={"latencyMs": 1})


async def bedrock(exchange: Exchange) -> None:
    """One answer: the next turn's calls, or what they came to."""
    seen, upstream = exchange.seen, exchange.upstream
    assert seen
    if seen.path not in (PATH, f"{PATH}-stream"):
        raise MalformedError(f"404: {seen.path}")
    if upstream.key is None:
        check_signature(seen, upstream.host)
    turn = check(seen.json)
    usage = {"inputTokens": 10, "cacheReadInputTokens": 5, "outputTokens": 20, "totalTokens": 35}
    end = {"stopReason": "end_turn" if turn == len(TURNS) else "tool_use", "usage": usage}
    if seen.path == PATH:
        message = {"role": "assistant", "content": blocks(turn)}
        await answer(200, {"output": {"message": message}, "metrics": {"latencyMs": 1}, **end})(exchange)
        return
    kind = {"content-type": "application/vnd.amazon.eventstream", "transfer-encoding": "chunked"}
    await send(head(200, kind), *map(framed, events(blocks(turn), end)), framed(b""))(exchange)


@pytest.fixture(scope="module", params=["by key", "by role"])
async def fake(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Upstream]:
    key = PROVIDER_KEY if request.param == "by key" else None
    async with Upstream(key=key, header="authorization" if key else "x-amz-date") as upstream:
        upstream.by_model[None] = (bedrock,)  # the model is in the path alone
        yield upstream


@pytest.fixture(scope="module")
async def client(fake: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    folder = tmp_path_factory.mktemp("bedrock")
    variables = {"BEDROCK_BASE_URL": f"http://{fake.host}", "AWS_REGION": REGION}
    variables |= {"BEDROCK_API_KEY": fake.key} if fake.key else by_role(folder)
    with processes.gateway(folder, fake.url, **variables) as server:
        async with AsyncOpenAI(
            api_key=server.key()["key"], base_url=f"{server.url}/v1", max_retries=0, timeout=20
        ) as client:
            yield client


def by_role(folder: Path) -> dict[str, str]:
    config = folder / "gateway.toml"
    config.write_text("[providers.bedrock]\nenabled = true\n")
    return {
        "GATEWAY_CONFIG": str(config),
        "AWS_ACCESS_KEY_ID": ROLE.access_key,
        "AWS_SECRET_ACCESS_KEY": ROLE.secret_key,
        "AWS_SESSION_TOKEN": str(ROLE.token),
    }


async def said(client: AsyncOpenAI, messages: list[Any], *, streams: bool) -> tuple[Any, str, Any]:
    """The assistant's message as a stock client keeps it, its finish reason and the usage."""
    asked: Any = {"model": f"bedrock/{MODEL}", "messages": messages, "tools": TOOLS, "reasoning_effort": "medium"}
    asked |= {"max_completion_tokens": 4000, "temperature": 0.3}
    if not streams:
        whole = await client.chat.completions.create(**asked)
        return whole.choices[0].message.model_dump(), whole.choices[0].finish_reason, whole.usage
    options: Any = {"include_usage": True}
    async with client.chat.completions.stream(**asked, stream_options=options) as stream_of_events:
        async for _ in stream_of_events:
            pass
        whole = await stream_of_events.get_final_completion()
    return whole.choices[0].message.model_dump(), whole.choices[0].finish_reason, whole.usage


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop(client: AsyncOpenAI, fake: Upstream, streams: bool) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Look it up."}, {"role": "user", "content": "Oslo, Rome?"}]
    for thought, calls in TURNS:
        message, finish, usage = await said(client, messages, streams=streams)
        assert finish == "tool_calls"
        assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens) == (15, 5, 20)
        assert message["reasoning_content"] == thought
        made = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
        assert made == calls
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
    turns = [turn["content"] for turn in fake.seen[-1].json["messages"] if turn["role"] == "assistant"]
    assert [turn[:2] for turn in turns] == [blocks(number)[:2] for number in range(len(TURNS))]
