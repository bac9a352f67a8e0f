"""Every recorded answer of Anthropic's Messages goes through unharmed, and every request built fits its own schema.

What is expected is worked out here, plainly, from the recording itself; the recordings lie beside the checkout.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shared.catalog import Catalog, Deployment
from shared.errors import InvalidRequest, UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.anthropic import DIALECT
from shared.providers.dialect import END
from shared.schema import Call, Usage, parse
from shared.settings import Settings
from shared.sse import Decoder

WIRE = Path(__file__).resolve().parents[4] / "shared" / "wire"
if not WIRE.is_dir():
    pytest.skip("the recordings are not beside this checkout", allow_module_level=True)


class Case:
    def __init__(self, row: dict[str, Any]) -> None:
        folder = WIRE / row["id"]
        self.id = row["id"].removeprefix("anthropic/messages-")
        self.meta = json.loads((folder / "response.meta.json").read_text())
        self.sent: dict[str, Any] | None = json.loads((folder / "request.json").read_text())["body"]
        self.raw = (folder / self.meta["body_file"]).read_bytes()
        self.status, self.stream = self.meta["status"], self.meta["stream"]

    @property
    def call(self) -> Call:
        return Call("chat", {"model": "asked", "messages": [{"role": "user", "content": "?"}], "stream": self.stream})

    @property
    def to(self) -> Deployment:
        return deployment(self.meta["model"])


@cache
def catalog() -> Catalog:
    settings = Settings.read({"ANTHROPIC_API_KEY": "sk-ant-0123456789", "GATEWAY_CONFIG": "none"})
    return Catalog.load(settings, PriceTable.vendored())


@cache
def deployment(model: str) -> Deployment:
    return catalog().resolve(f"anthropic/{model}").deployments[0]


CASES = [
    Case(row)
    for row in json.loads((WIRE / "index.json").read_text())["cases"]
    if row["provider"] == "anthropic" and row["api"] == "messages"
]
WHOLE = [case for case in CASES if case.status == 200 and not case.stream]
STREAMED = [case for case in CASES if case.status == 200 and case.stream]
FAILED = [case for case in CASES if case.status != 200]


def by_id(case: Case) -> str:
    return case.id


# What is answered

FINISHES = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
FINISHES |= {"refusal": "content_filter"}


def meant(content: list[dict[str, Any]], stop: str, usage: dict[str, Any], refusal: str | None) -> dict[str, Any]:
    """What a recorded message says, in plain words."""

    def of(kind: str) -> list[dict[str, Any]]:
        return [block for block in content if block["type"] == kind]

    hour = (usage.get("cache_creation") or {}).get("ephemeral_1h_input_tokens", 0)
    return {
        "text": "".join(block["text"] for block in of("text")),
        "reasoning": "".join(block["thinking"] for block in of("thinking")),
        "calls": [(block["id"], block["name"], block["input"]) for block in of("tool_use")],
        "signed": [block for block in content if block["type"] in ("thinking", "redacted_thinking")],
        "cited": [c["url"] for block in of("text") for c in block.get("citations") or () if "url" in c],
        "finish": FINISHES[stop],
        "native": stop,
        "refusal": refusal,
        "usage": Usage(
            input=usage["input_tokens"],
            cache_read=usage.get("cache_read_input_tokens") or 0,
            cache_write=(usage.get("cache_creation_input_tokens") or 0) - hour,
            cache_write_1h=hour,
            output=usage["output_tokens"],
            reasoning=(usage.get("output_tokens_details") or {}).get("thinking_tokens", 0),
        ),
    }


@pytest.mark.parametrize("case", WHOLE, ids=by_id)
def test_a_whole_answer_says_the_same(case: Case) -> None:
    recorded = json.loads(case.raw)
    body, usage = DIALECT.completion(case.call, case.to, json.loads(case.raw))
    [choice] = body["choices"]
    message = choice["message"]
    signed = message.get("extra_content", {}).get("anthropic", {"model": case.to.model, "thinking": []})
    assert signed["model"] == case.to.model
    assert {
        "text": message["content"] or "",
        "reasoning": message.get("reasoning_content", ""),
        "calls": [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls_of(message)],
        "signed": signed["thinking"],
        "cited": [note["url_citation"]["url"] for note in message.get("annotations", ())],
        "finish": choice["finish_reason"],
        "native": choice.get("native_finish_reason", choice["finish_reason"]),
        "refusal": message.get("refusal"),
        "usage": usage,
    } == meant(recorded["content"], recorded["stop_reason"], recorded["usage"], None)
    for note in message.get("annotations", ()):
        assert message["content"][note["url_citation"]["start_index"] : note["url_citation"]["end_index"]]


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def events(raw: bytes) -> Iterator[dict[str, Any]]:
    """Server-sent events, read the simplest way, up to the end of the first message."""
    for block in re.split(rb"\r?\n\r?\n", raw):
        data = [line[5:] for line in re.split(rb"\r?\n", block) if line.startswith(b"data:")]
        if data:
            event = json.loads(b"\n".join(data))
            yield event
            if event["type"] == "message_stop":
                return


def recorded_stream(case: Case) -> dict[str, Any]:
    """The message that a recorded stream adds up to."""
    blocks: dict[int, dict[str, Any]] = {}
    inputs: dict[int, str] = {}
    usage: dict[str, Any] = {}
    stop, refusal = "", None
    for event in events(case.raw):
        match event:
            case {"type": "message_start", "message": message}:
                usage |= {name: count for name, count in message["usage"].items() if count is not None}
            case {"type": "content_block_start", "index": index, "content_block": block}:
                blocks[index] = block
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                block = blocks[index]
                match delta:
                    case {"type": "text_delta", "text": text}:
                        block["text"] += text
                    case {"type": "thinking_delta", "thinking": text}:
                        block["thinking"] += text
                    case {"type": "signature_delta", "signature": text}:
                        block["signature"] = text
                    case {"type": "input_json_delta", "partial_json": text}:
                        inputs[index] = inputs.get(index, "") + text
                    case {"type": "citations_delta", "citation": citation}:
                        block["citations"] = [*(block.get("citations") or ()), citation]
            case {"type": "message_delta", "delta": delta, "usage": counts}:
                stop, refusal = delta["stop_reason"], (delta.get("stop_details") or {}).get("explanation")
                usage |= {name: count for name, count in counts.items() if count is not None}
    for index, text in inputs.items():
        if text:
            blocks[index]["input"] = json.loads(text)
    return meant([blocks[index] for index in sorted(blocks)], stop, usage, refusal)


def translated(case: Case, pieces: list[bytes]) -> dict[str, Any]:
    """What our chunks add up to, put together as the OpenAI SDKs do: by index, strings appended."""
    decoder, translate = Decoder(), DIALECT.stream(case.call, case.to)
    said: dict[str, Any] = {"text": "", "reasoning": "", "refusal": None, "signed": [], "cited": [], "usage": None}
    calls: list[dict[str, str]] = []
    for name, data in (event for piece in pieces for event in decoder.feed(piece)):
        for piece in translate(name, json.loads(data)):
            if piece is END:
                done = [(call["id"], call["name"], json.loads(call["arguments"])) for call in calls]
                return said | {"calls": done}
            said["usage"] = piece.usage or said["usage"]
            for choice in piece.body["choices"]:
                assert choice.keys() <= {"index", "delta", "finish_reason", "native_finish_reason"}
                delta = choice["delta"]
                said["text"] += delta.pop("content", "")
                said["reasoning"] += delta.pop("reasoning_content", "")
                said["refusal"] = delta.pop("refusal", said["refusal"])
                said["cited"] += [note["url_citation"]["url"] for note in delta.pop("annotations", ())]
                if signed := delta.pop("extra_content", None):
                    assert signed["anthropic"]["model"] == case.to.model
                    said["signed"] = signed["anthropic"]["thinking"]
                for call in delta.pop("tool_calls", ()):
                    if call["index"] == len(calls):
                        assert call["type"] == "function"
                        calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                    calls[call["index"]]["arguments"] += call["function"]["arguments"]
                assert not delta
                if finish := choice.get("finish_reason"):
                    assert "finish" not in said
                    said |= {"finish": finish, "native": choice.get("native_finish_reason", finish)}
    raise AssertionError("no end")


@pytest.mark.parametrize("case", STREAMED, ids=by_id)
def test_a_stream_says_the_same_wherever_it_is_cut(case: Case) -> None:
    wanted = recorded_stream(case)
    assert translated(case, [case.raw]) == wanted
    dice = random.Random(case.id)
    for _ in range(3):
        cuts = sorted(dice.choices(range(len(case.raw)), k=dice.choice([1, 7, 40])))
        pieces = [case.raw[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert translated(case, pieces) == wanted


FAULTS = {400: "bad_request", 401: "auth", 404: "model_gone"}


@pytest.mark.parametrize("case", FAILED, ids=by_id)
def test_a_failure_means_what_it_says(case: Case) -> None:
    refusal = DIALECT.failure(case.status, case.meta["headers"], case.raw)
    assert refusal.fault == ("context" if b"prompt is too long" in case.raw else FAULTS[case.status])
    assert refusal.status == case.status
    said = json.loads(case.raw)["error"]["message"]
    if refusal.fault == "auth":
        assert "key" not in refusal.message
    else:
        assert refusal.message == said


# What is sent


def as_openai(sent: dict[str, Any]) -> dict[str, Any]:
    """What an OpenAI caller would have said to have this request sent; Anthropic's own tools are named as they are."""
    body: dict[str, Any] = {
        name: sent[name]
        for name in ("model", "max_tokens", "temperature", "top_p", "stream", "thinking", "cache_control")
        if name in sent
    }
    system = sent.get("system") or []
    parts = [{"type": "text", "text": system}] if isinstance(system, str) else system
    body["messages"] = [{"role": "system", "content": [part]} for part in parts]
    for message in sent["messages"]:
        body["messages"] += messages_of(message, sent["model"])
    if stop := sent.get("stop_sequences"):
        body["stop"] = stop
    if tools := sent.get("tools"):
        body["tools"] = [function_of(tool) for tool in tools]
    match sent.get("tool_choice"):
        case {"type": "tool", "name": name}:
            body["tool_choice"] = {"type": "function", "function": {"name": name}}
        case {"type": kind}:
            body["tool_choice"] = {"any": "required"}.get(kind, kind)
    if form := sent.get("output_config", {}).get("format"):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": form["schema"]}}
    return body


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    if "input_schema" not in tool:
        return tool
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def messages_of(message: dict[str, Any], model: str) -> list[dict[str, Any]]:
    content = message["content"]
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    if message["role"] == "user":
        results = [
            {"role": "tool", "tool_call_id": block["tool_use_id"], "content": block.get("content") or ""}
            for block in content
            if block["type"] == "tool_result"
        ]
        parts = [part_of(block) for block in content if block["type"] != "tool_result"]
        return results + ([{"role": "user", "content": parts}] if parts else [])
    said: dict[str, Any] = {"role": "assistant", "content": "".join(b["text"] for b in content if b["type"] == "text")}
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block["input"])},
        }
        for block in content
        if block["type"] == "tool_use"
    ]
    thought = [block for block in content if block["type"] in ("thinking", "redacted_thinking")]
    signed = {"extra_content": {"anthropic": {"model": model, "thinking": thought}}} if thought else {}
    return [{**said, **({"tool_calls": calls} if calls else {}), **signed}]


def part_of(block: dict[str, Any]) -> dict[str, Any]:
    cached = {"cache_control": block["cache_control"]} if "cache_control" in block else {}
    match block:
        case {"type": "image", "source": {"media_type": kind, "data": data}}:
            return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}, **cached}
        case {"type": "document", "source": {"media_type": kind, "data": data}}:
            return {"type": "file", "file": {"file_data": f"data:{kind};base64,{data}"}, **cached}
        case _:
            return block


ORDER = ["thinking", "redacted_thinking", "text", "tool_use"]


def plain(turn: dict[str, Any]) -> Any:
    """What a turn means, without what makes no difference and what Anthropic's own tools did."""
    content = turn["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    blocks = [
        {name: value for name, value in block.items() if value is not None and name not in ("is_error", "caller")}
        for block in blocks
    ]
    for block in blocks:
        if block["type"] == "tool_result" and isinstance(block.get("content"), str):
            block["content"] = [{"type": "text", "text": block["content"]}]
    if turn["role"] == "assistant":
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        blocks = [block for block in blocks if block["type"] in ORDER and block["type"] != "text"]
        blocks += [{"type": "text", "text": text}] if text else []
        blocks.sort(key=lambda block: ORDER.index(block["type"]))
    return turn["role"], blocks


SENT = [case for case in CASES if isinstance(case.sent, dict)]
BAD = ["completion-error-e400", "handles-context", "validation-error"]
"""Refused as no message at all, with a placeholder for its megabytes of text, and with a temperature of -5."""


@cache
def schema(name: str) -> Draft202012Validator:
    """As published, but closed: unknown fields are an error, and only what may be sent counts as a block.

    Its SDK no longer names the sampling parameters, which older models take."""
    definitions = json.loads((WIRE / "schemas" / "anthropic.json").read_text())["$defs"]
    for definition in definitions.values():
        if "properties" in definition:
            definition.setdefault("additionalProperties", False)
        for items in re.findall(r"UserMessageParam|AssistantMessageParam", definition.get("title", "")):
            union = definitions[items]["properties"]["content"]["anyOf"][1]["items"]
            union["anyOf"] = [kind for kind in union["anyOf"] if kind["$ref"].endswith("Param")]
    definitions[name]["properties"] |= {each: {"type": "number"} for each in ("temperature", "top_p", "top_k")}
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})


def assert_valid(body: dict[str, Any]) -> None:
    kind = "Streaming" if body.get("stream") else "NonStreaming"
    wrong = [
        (list(error.absolute_path), error.message[:300])
        for error in schema(f"MessageCreateParams{kind}").iter_errors(body)
    ]
    assert not wrong


@pytest.mark.parametrize("case", [case for case in SENT if not any(bad in case.id for bad in BAD)], ids=by_id)
def test_a_recorded_request_is_built_again(case: Case) -> None:
    assert case.sent
    call = parse("chat", json.dumps(as_openai(case.sent)).encode())
    before = json.dumps(call.body)
    built = json.loads(DIALECT.request(call, case.to, None).content)
    assert json.dumps(call.body) == before
    own = [tool for tool in built.get("tools", ()) if "input_schema" not in tool]
    assert_valid({**built, "tools": [tool for tool in built.get("tools", ()) if tool not in own]})
    assert list(map(plain, built["messages"])) == list(map(plain, case.sent["messages"]))
    system = [{"role": "user", "content": each["system"]} for each in (built, case.sent) if "system" in each]
    assert not system or plain(system[0]) == plain(system[1])
    names = {"model", "max_tokens", "stop_sequences", "thinking", "tool_choice", "cache_control"}
    assert {name: built.get(name) for name in names} == {
        name: case.sent.get(name) if name != "model" else case.meta["model"] for name in names
    }
    assert built.get("output_config", {}).get("format") == case.sent.get("output_config", {}).get("format")
    tools = [
        {name: value for name, value in tool.items() if name != "defer_loading"}
        for tool in case.sent.get("tools", ())
        if tool not in own
    ]
    assert [tool for tool in built.get("tools", ()) if tool not in own] == tools


OTHERS = [
    WIRE / row["id"]
    for row in json.loads((WIRE / "index.json").read_text())["cases"]
    if row["provider"] in ("openai", "openrouter", "groq", "mistral", "xai", "deepseek") and row["api"] == "chat"
]


@pytest.mark.parametrize(
    "model", ["claude-3-5-haiku-latest", "claude-sonnet-4-5", "claude-opus-4-6", "claude-opus-5-5"]
)
def test_what_others_were_asked_is_valid_here_or_refused_by_name(model: str) -> None:
    built = refused = 0
    for folder in OTHERS:
        sent = json.loads((folder / "request.json").read_text())["body"]
        if not isinstance(sent, dict):
            continue
        try:
            call = parse("chat", json.dumps({**sent, "model": "asked"}).encode())
        except InvalidRequest:
            continue
        try:
            body = json.loads(DIALECT.request(call, deployment(model), None).content)
        except UnsupportedParameter as error:
            assert error.param
            refused += 1
            continue
        assert_valid(body)
        built += 1
    assert built > 3 * refused
