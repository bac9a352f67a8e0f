"""Every recorded answer of Bedrock's Converse goes through unharmed, and every recorded request is built again.

What is expected is worked out here, plainly, from the recording itself; the recordings lie beside the checkout.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from shared.assembly import assembled
from shared.catalog import Catalog, Deployment
from shared.errors import ProviderError, UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.bedrock import DIALECT
from shared.providers.dialect import END
from shared.schema import Call, Usage, parse
from shared.settings import Settings
from tests.shared.providers.test_bedrock import assert_valid

WIRE = Path(__file__).resolve().parents[4] / "shared" / "wire"
if not WIRE.is_dir():
    pytest.skip("the recordings are not beside this checkout", allow_module_level=True)


class Case:
    def __init__(self, row: dict[str, Any]) -> None:
        folder = WIRE / row["id"]
        self.id = row["id"].removeprefix("bedrock/converse-")
        self.meta = json.loads((folder / "response.meta.json").read_text())
        request = json.loads((folder / "request.json").read_text())
        self.sent, self.path = request["body"], request["path"]
        self.raw = (folder / self.meta["body_file"]).read_bytes()
        self.status, self.stream = self.meta["status"], self.meta["stream"]

    @property
    def to(self) -> Deployment:
        return deployment(self.meta["model"])

    @property
    def call(self) -> Call:
        return Call("chat", {"model": "asked", "messages": [{"role": "user", "content": "?"}], "stream": self.stream})


@cache
def deployment(model: str) -> Deployment:
    settings = Settings.read({"BEDROCK_API_KEY": "bedrock-0123456789", "GATEWAY_CONFIG": "none"})
    return Catalog.load(settings, PriceTable.vendored()).resolve(f"bedrock/{model}").deployments[0]


CASES = [
    Case(row)
    for row in json.loads((WIRE / "index.json").read_text())["cases"]
    if row["provider"] == "bedrock"
    and row["api"] == "converse"  # InvokeModel's bodies are each model's own: not spoken
]
FINISHES = {
    "end_turn": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "guardrail_intervened": "content_filter",
}


def by_id(case: Case) -> str:
    return case.id


def expected_usage(usage: dict[str, Any] | None) -> Usage | None:
    if usage is None:
        return None
    read, written = usage.get("cacheReadInputTokens", 0), usage.get("cacheWriteInputTokens", 0)
    assert usage["totalTokens"] == usage["inputTokens"] + usage["outputTokens"] + read + written
    return Usage(input=usage["inputTokens"], cache_read=read, cache_write=written, output=usage["outputTokens"])


def expected(blocks: list[dict[str, Any]], stop: str, to: Deployment) -> dict[str, Any]:
    """What an answer of these content blocks says."""
    uses = [block["toolUse"] for block in blocks if "toolUse" in block]
    cited = [part for block in blocks for part in block.get("citationsContent", {}).get("content", [])]
    thoughts = [block for block in blocks if "reasoningContent" in block]
    texts = [block["reasoningContent"]["reasoningText"] for block in thoughts]
    signed = [{"reasoningContent": {"reasoningText": text}} for text in texts if "signature" in text]
    return {
        "text": "".join(block["text"] for block in [*blocks, *cited] if "text" in block),
        "reasoning": "".join(text["text"] for text in texts),
        "calls": [
            (use["toolUseId"], use["name"], use["input"]) for use in uses if use.get("type") != "server_tool_use"
        ],
        "signed": {"bedrock": {"model": to.model, "thinking": signed}} if signed else None,
        "finish": (FINISHES[stop], stop),
    }


def said(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    return {
        "text": message["content"] or "",
        "reasoning": message.get("reasoning_content", ""),
        "calls": [
            (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in message.get("tool_calls", [])
        ],
        "signed": message.get("extra_content"),
        "finish": (choice["finish_reason"], choice.get("native_finish_reason", choice["finish_reason"])),
    }


@pytest.mark.parametrize("case", [case for case in CASES if case.status == 200 and not case.stream], ids=by_id)
def test_a_whole_answer_says_the_same(case: Case) -> None:
    recorded = json.loads(case.raw)
    body, usage = DIALECT.completion(case.call, case.to, json.loads(case.raw))
    (choice,) = body["choices"]
    assert said(choice) == expected(recorded["output"]["message"]["content"], recorded["stopReason"], case.to)
    assert usage == expected_usage(recorded.get("usage"))


def frames(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Frames read the simplest way, checksums unseen: lengths, string headers, payload."""
    found: list[tuple[str, dict[str, Any]]] = []
    while raw:
        total, length = (int.from_bytes(raw[at : at + 4]) for at in (0, 4))
        headers = dict(re.findall(rb"(:[a-z-]+)\x07..([ -~]+?)(?=.:|\Z)", raw[12 : 12 + length], re.DOTALL))
        found.append((headers[b":event-type"].decode(), json.loads(raw[12 + length : total - 4])))
        raw = raw[total:]
    return found


def recorded_stream(raw: bytes) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
    """The content blocks that a recorded stream adds up to, its stop reason and its usage."""
    blocks: dict[int, dict[str, Any]] = {}
    stop, usage = "", {}
    for name, data in frames(raw):
        match name, data:
            case "contentBlockStart", {"start": {"toolUse": use}}:
                blocks[data["contentBlockIndex"]] = {"toolUse": {**use, "input": ""}}
            case "contentBlockDelta", {"delta": {"text": text}}:
                block = blocks.setdefault(data["contentBlockIndex"], {"text": ""})
                block["text"] += text
            case "contentBlockDelta", {"delta": {"toolUse": {"input": text}}}:
                blocks[data["contentBlockIndex"]]["toolUse"]["input"] += text
            case "contentBlockDelta", {"delta": {"reasoningContent": thought}}:
                blank = {"reasoningContent": {"reasoningText": {"text": ""}}}
                block = blocks.setdefault(data["contentBlockIndex"], blank)["reasoningContent"]["reasoningText"]
                block |= {key: block.get(key, "") + text for key, text in thought.items()}
            case "messageStop", _:
                stop = data["stopReason"]
            case "metadata", _:
                usage = data["usage"]
            case _:
                pass
    for block in blocks.values():
        if "toolUse" in block:
            block["toolUse"]["input"] = json.loads(block["toolUse"]["input"] or "{}")
    return [blocks[index] for index in sorted(blocks)], stop, usage


def translated(case: Case, pieces: list[bytes]) -> tuple[dict[str, Any], Usage | None]:
    """What our chunks add up to."""
    decoder, translate = DIALECT.decoder(), DIALECT.stream(case.call, case.to)
    events = (event for piece in pieces for event in decoder.feed(piece))
    made = [chunk for name, data in events for chunk in translate(name, json.loads(data))]
    assert made.pop() is END
    assert END not in made
    (choice,) = assembled(chunk.body for chunk in made)["choices"]
    return said(choice), next((chunk.usage for chunk in reversed(made) if chunk.usage), None)


@pytest.mark.parametrize("case", [case for case in CASES if case.status == 200 and case.stream], ids=by_id)
def test_a_stream_says_the_same_wherever_it_is_cut(case: Case) -> None:
    got, usage = translated(case, [case.raw])
    blocks, stop, recorded = recorded_stream(case.raw)
    assert got == expected(blocks, stop, case.to)
    assert usage == expected_usage(recorded)
    dice = random.Random(case.id)
    for count in (1, 7, 40):
        cuts = sorted(dice.choices(range(len(case.raw)), k=count))
        pieces = [case.raw[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert translated(case, pieces) == (got, usage)


FAULTS = {
    "bare-profile-only-model-id-is-rejected-e400": "model_gone",
    "error-handling-with-bedrock-amazon-nova-2-lite-v1-0-raises-appro-e403": "auth",
    "multimodal-tool-return-matrix-direct-uploaded-file-document-bedr-e400": "bad_request",
    "multimodal-tool-return-matrix-direct-uploaded-file-image-bedrock-e400": "bad_request",
    "real-error-scenarios-bedrock-amazon-nova-2-lite-v1-0-handles-con-e400": "context",
    "retired-model-id-preserves-provider-error-e404": "model_gone",
    "should-handle-api-error-scenarios-e400": "model_gone",
}


@pytest.mark.parametrize("case", [case for case in CASES if case.status != 200], ids=by_id)
def test_a_failure_means_what_it_says(case: Case) -> None:
    refusal = DIALECT.failure(case.status, case.meta["headers"], case.raw)
    assert (refusal.fault, refusal.status) == (FAULTS[case.id], case.status)
    assert not re.search(r"https?://|arn:|\d{12}", refusal.message)


# Requests


NOT_OPENAIS = {"guardContent", "s3Location", "document", "systemTool"}
"""What no caller of OpenAI's API could have meant; documents come with citations, or from S3."""
REBUILT = [case for case in CASES if not NOT_OPENAIS & set(re.findall(r'"(\w+)":', json.dumps(case.sent)))]


def content_of(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Converse's content as OpenAI's parts, cache points as `cache_control` of what they stand on."""
    parts: list[dict[str, Any]] = []
    for block in blocks:
        match block:
            case {"text": text}:
                parts.append({"type": "text", "text": text})
            case {"image": {"format": kind, "source": {"bytes": data}}}:
                parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}})
            case {"cachePoint": _}:
                parts[-1]["cache_control"] = {"type": "ephemeral"}
            case _:
                raise KeyError(f"not OpenAI's: {list(block)}")
    return parts


def messages_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    results = [block["toolResult"] for block in turn["content"] if "toolResult" in block]
    uses = [block["toolUse"] for block in turn["content"] if "toolUse" in block]
    rest = [block for block in turn["content"] if not block.keys() & {"toolResult", "toolUse"}]
    said = [{"role": "tool", "tool_call_id": r["toolUseId"], "content": content_of(r["content"])} for r in results]
    calls = [
        {
            "id": use["toolUseId"],
            "type": "function",
            "function": {"name": use["name"], "arguments": json.dumps(use["input"])},
        }
        for use in uses
    ]
    if rest or calls:
        said.append(
            {"role": turn["role"], "content": content_of(rest) or None, **({"tool_calls": calls} if calls else {})}
        )
    return said


def as_openai(sent: dict[str, Any]) -> dict[str, Any]:
    """A recorded request, said OpenAI's way."""
    inference = sent.get("inferenceConfig", {})
    names = {"maxTokens": "max_tokens", "temperature": "temperature", "topP": "top_p", "stopSequences": "stop"}
    asked: dict[str, Any] = {names[name]: value for name, value in inference.items() if value != []}
    system = content_of(sent.get("system", []))
    asked["messages"] = [{"role": "system", "content": system}] if system else []
    for turn in sent["messages"]:
        asked["messages"] += messages_of(turn)
    if tools := sent.get("toolConfig"):
        asked["tools"] = [
            {
                "type": "function",
                "function": {
                    **{name: value for name, value in tool["toolSpec"].items() if name != "inputSchema"},
                    "parameters": tool["toolSpec"]["inputSchema"]["json"],
                },
            }
            for tool in tools["tools"]
        ]
        if choice := tools.get("toolChoice"):
            asked["tool_choice"] = {"auto": "auto", "any": "required"}[next(iter(choice))]
    if form := sent.get("outputConfig"):
        definition = form["textFormat"]["structure"]["jsonSchema"]
        schema = {**definition, "schema": json.loads(definition["schema"])}
        asked["response_format"] = {"type": "json_schema", "json_schema": schema}
    for name in ("guardrailConfig", "additionalModelRequestFields"):
        if sent.get(name):
            asked[name] = sent[name]
    return asked


def plain(sent: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty, a default, or said by leaving it out; schemas as objects."""
    body = {name: value for name, value in sent.items() if value not in ([], {}, None)}
    if config := body.get("inferenceConfig"):
        body["inferenceConfig"] = {name: value for name, value in config.items() if value != []}
    if config := body.get("toolConfig"):
        body["toolConfig"] = {name: value for name, value in config.items() if value != {"auto": {}}}
    if form := body.get("outputConfig"):
        definition = form["textFormat"]["structure"]["jsonSchema"]
        body["outputConfig"] = {**definition, "schema": json.loads(definition["schema"])}
    for turn in body["messages"]:
        for block in turn["content"]:
            block.get("toolResult", {}).pop("status", None)  # success, which is its default
    return body


@pytest.mark.parametrize("case", REBUILT, ids=by_id)
def test_a_recorded_request_is_built_again(case: Case) -> None:
    asked = {**as_openai(case.sent), "model": "asked", "stream": case.path.endswith("-stream")}
    outgoing = DIALECT.request(parse("chat", json.dumps(asked).encode()), case.to, None)
    assert_valid(outgoing)
    assert outgoing.url.endswith(f"/model/{quote(case.meta['model'], safe='')}/{case.path.rpartition('/')[2]}")
    wanted, got = plain(case.sent), plain(json.loads(outgoing.content))
    if outgoing.dropped == ("top_p",):  # beside a temperature
        del wanted["inferenceConfig"]["topP"]
    else:
        assert outgoing.dropped == ()
    assert got == wanted


def test_what_is_not_openais_is_refused() -> None:
    part = {"type": "guardContent", "guardContent": {"text": {"text": "x"}}}
    call = Call("chat", {"model": "asked", "messages": [{"role": "user", "content": [part]}]})
    with pytest.raises(UnsupportedParameter):
        DIALECT.request(call, deployment("amazon.nova-lite-v1:0"), None)


def test_an_error_where_an_answer_should_be() -> None:
    case = next(case for case in CASES if case.status == 400)
    with pytest.raises(ProviderError) as caught:
        DIALECT.completion(case.call, case.to, json.loads(case.raw))
    assert caught.value.fault == "protocol"
