"""A Bedrock that takes nothing amiss, with Claude behind it.

https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.eventstream import event
from tests.strict.loop import ANSWER, TURNS, plan, thinks
from tests.upstream import Exchange, MalformedError, Seen, answer, framed, head, send

MODEL = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
PATH = "/model/us.anthropic.claude-sonnet-4-5-20250929-v1%3A0/converse"
ROLE = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI", "token")
REGION = "eu-central-1"
FIELDS = {"messages", "system", "inferenceConfig", "toolConfig", "additionalModelRequestFields"}
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
    match body.get("additionalModelRequestFields"):
        case {"thinking": {"type": "enabled", "budget_tokens": int(budget)}, **rest} if not rest:
            if not 1024 <= budget < body["inferenceConfig"].get("maxTokens", 0):
                raise MalformedError("`max_tokens` must be greater than `thinking.budget_tokens`")
            if body["inferenceConfig"].keys() != {"maxTokens"}:
                raise MalformedError("`temperature` may only be set to 1 when thinking is enabled")
        case None:
            pass
        case _:
            raise MalformedError("extraneous key in additionalModelRequestFields")
    if not all(
        tool["toolSpec"].keys() == {"name", "description", "inputSchema"} for tool in body["toolConfig"]["tools"]
    ):
        raise MalformedError("toolSpec: extraneous key")
    roles = [message["role"] for message in body["messages"]]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise MalformedError("A conversation must alternate between user and assistant roles.")
    used = [
        block["toolUse"]["toolUseId"] for said in body["messages"] for block in said["content"] if "toolUse" in block
    ]
    if len(set(used)) < len(used):
        raise MalformedError("messages: `tool_use` ids must be unique")
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
    manual, last = "additionalModelRequestFields" in body, at == len(body["messages"]) - 2
    first = begun(body["messages"], at)["content"][0]
    if last and manual and any("toolUse" in block for block in content) and "reasoningContent" not in first:
        raise MalformedError("Expected `thinking` or `redacted_thinking`, but found `tool_use`.")
    if last and thoughts(content) not in ([], thoughts(blocks(body, at // 2))):
        raise MalformedError("`thinking` blocks in the latest assistant message cannot be modified.")
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


def begun(messages: list[dict[str, Any]], at: int) -> dict[str, Any]:
    """The first message of the assistant's turn that this one is of: a loop of tools is one turn."""
    while at > 1 and "toolResult" in messages[at - 1]["content"][0]:
        at -= 2
    return messages[at]


def thoughts(content: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """And where they stand."""
    return [(at, block) for at, block in enumerate(content) if "reasoningContent" in block]


def blocks(body: dict[str, Any], turn: int) -> list[dict[str, Any]]:
    thought, calls = thinks(turn, between=False), plan(turn)[1]
    thinking = {"reasoningContent": {"reasoningText": {"text": thought, "signature": signature(thought)}}}
    hidden = {"reasoningContent": {"redactedContent": REDACTED}}
    uses = [
        {"toolUse": {"toolUseId": f"tooluse_{turn}{index}", "name": name, "input": arguments}}
        for index, (name, arguments) in enumerate(calls)
    ]
    if "additionalModelRequestFields" in body and thought:
        return [thinking, hidden, uses[0], *([hidden, *uses[1:]] if uses[1:] else ())]
    return uses or [{"text": ANSWER}]


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
    said = blocks(seen.json, turn)
    usage = {"inputTokens": 10, "cacheReadInputTokens": 5, "outputTokens": 20, "totalTokens": 35}
    end = {"stopReason": "tool_use" if turn < len(TURNS) else "end_turn", "usage": usage}
    if seen.path == PATH:
        message = {"role": "assistant", "content": said}
        await answer(200, {"output": {"message": message}, "metrics": {"latencyMs": 1}, **end})(exchange)
        return
    kind = {"content-type": "application/vnd.amazon.eventstream", "transfer-encoding": "chunked"}
    await send(head(200, kind), *map(framed, events(said, end)), framed(b""))(exchange)
