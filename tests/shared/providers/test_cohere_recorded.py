"""Every recorded answer of Cohere's API goes through unharmed, and every request built for it fits Cohere's own schema.

What is expected is worked out here, plainly, from the recording itself; the recordings lie beside the checkout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shared.catalog import Catalog, Deployment
from shared.errors import UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.cohere import DIALECT
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
        self.id, self.surface = row["id"].removeprefix("cohere/"), row["api"]
        self.meta = json.loads((folder / "response.meta.json").read_text())
        self.sent: dict[str, Any] | None = json.loads((folder / "request.json").read_text())["body"]
        self.raw = (folder / self.meta["body_file"]).read_bytes()
        self.status, self.stream = self.meta["status"], self.meta["stream"]

    @property
    def call(self) -> Call:
        """What an OpenAI caller would have asked for."""
        model = self.meta["model"] or "command-a-03-2025"
        if self.surface == "embeddings":
            return Call("embeddings", {"model": model, "input": (self.sent or {}).get("texts") or ["?"]})
        sent = self.sent or {"messages": [{"role": "user", "content": "?"}]}
        return parse("chat", json.dumps(as_openai({**sent, "model": model, "stream": self.stream})).encode())

    @property
    def to(self) -> Deployment:
        return deployment(self.call.model)


@cache
def deployment(model: str) -> Deployment:
    settings = Settings.read({"COHERE_API_KEY": "co-0123456789", "GATEWAY_CONFIG": "none"})
    return Catalog.load(settings, PriceTable.vendored()).resolve(f"cohere/{model}").deployments[0]


CASES = [Case(row) for row in json.loads((WIRE / "index.json").read_text())["cases"] if row["provider"] == "cohere"]
CHATS = [case for case in CASES if case.surface == "chat" and case.status == 200]
FINISHES = {"COMPLETE": "stop", "STOP_SEQUENCE": "stop", "MAX_TOKENS": "length", "TOOL_CALL": "tool_calls"}


def by_id(case: Case) -> str:
    return case.id


def as_openai(sent: dict[str, Any]) -> dict[str, Any]:
    """A recorded request, said OpenAI's way."""
    asked = dict(sent)
    if stop := asked.pop("stop_sequences", None):
        asked["stop"] = stop
    if choice := asked.pop("tool_choice", None):
        asked["tool_choice"] = choice.lower()
    if thinking := asked.pop("thinking", None):
        asked["reasoning_effort"] = "max" if thinking["type"] == "enabled" else "none"
    if schema := asked.get("response_format", {}).get("json_schema"):
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return asked


def expected_usage(usage: dict[str, Any]) -> tuple[int, int, int, int]:
    billed, output = usage["billed_units"], usage["billed_units"].get("output_tokens", 0)
    return billed["input_tokens"], 0, output, min(usage.get("tokens", {}).get("reasoning_tokens", 0), output)


def assert_same_usage(given: Usage | None, recorded: dict[str, Any]) -> None:
    assert given is not None
    assert (given.prompt, given.cache_read, given.output, given.reasoning) == expected_usage(recorded)
    if tokens := recorded.get("tokens"):
        assert given.details["prompt"]["tokens"] == tokens["input_tokens"]
        assert given.details["completion"]["tokens"] == tokens["output_tokens"]


@pytest.mark.parametrize("case", [case for case in CHATS if not case.stream], ids=by_id)
def test_a_whole_answer_says_the_same(case: Case) -> None:
    recorded = json.loads(case.raw)
    body, usage = DIALECT.completion(case.call, case.to, json.loads(case.raw))
    (choice,) = body["choices"]
    was, message = recorded["message"], choice["message"]
    parts = was.get("content") or []
    assert (message["content"] or "") == "".join(part["text"] for part in parts if part["type"] == "text")
    thoughts = [part["thinking"] for part in parts if part["type"] == "thinking"]
    assert message.get("reasoning_content", "") == "".join([*thoughts, was.get("tool_plan") or ""])
    assert message.get("tool_calls", []) == was.get("tool_calls", [])
    assert message.get("extra_content", {}).get("cohere", {}).get("citations") == was.get("citations")
    assert choice["finish_reason"] == FINISHES[recorded["finish_reason"]]
    assert choice["native_finish_reason"] == recorded["finish_reason"]
    assert_same_usage(usage, recorded["usage"])


def events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, read the simplest way."""
    for line in raw.decode().splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def recorded_stream(raw: bytes) -> dict[str, Any]:
    """What a recorded stream adds up to."""
    said: dict[str, Any] = {"text": "", "reasoning": "", "calls": {}, "citations": [], "finish": None}
    for event in events(raw):
        message = event.get("delta", {}).get("message", {})
        match event["type"]:
            case "content-delta":
                said["text"] += message["content"].get("text", "")
                said["reasoning"] += message["content"].get("thinking", "")
            case "tool-plan-delta":
                said["reasoning"] += message["tool_plan"]
            case "tool-call-start":
                call = message["tool_calls"]
                said["calls"][event["index"]] = {"id": call["id"], "name": call["function"]["name"], "arguments": ""}
            case "tool-call-delta":
                said["calls"][event["index"]]["arguments"] += message["tool_calls"]["function"]["arguments"]
            case "citation-start":
                said["citations"].append(message["citations"])
            case "message-end":
                said["finish"] = FINISHES[event["delta"]["finish_reason"]]
                said["usage"] = event["delta"]["usage"]
    said["calls"] = [{**call, "arguments": json.loads(call["arguments"] or "{}")} for call in said["calls"].values()]
    return said


def translated(case: Case, pieces: list[bytes]) -> dict[str, Any]:
    """What our chunks add up to, put together as the OpenAI SDKs do: by index, strings appended."""
    decoder, translate = Decoder(), DIALECT.stream(case.call, case.to)
    said: dict[str, Any] = {"text": "", "reasoning": "", "calls": [], "citations": [], "finish": None}
    ended = False
    for name, data in (event for piece in pieces for event in decoder.feed(piece)):
        if data == b"[DONE]":
            break
        assert not ended, "nothing comes after the end"
        for piece in translate(name, json.loads(data)):
            if piece is END:
                ended = True
                continue
            (choice,) = piece.body["choices"]
            delta = choice["delta"]
            said["text"] += delta.get("content") or ""
            said["reasoning"] += delta.get("reasoning_content") or ""
            said["citations"] += delta.get("extra_content", {}).get("cohere", {}).get("citations", [])
            said["finish"] = choice.get("finish_reason") or said["finish"]
            said["usage"] = piece.usage or said.get("usage")
            for call in delta.get("tool_calls", []):
                if call["index"] == len(said["calls"]):
                    assert call["type"] == "function"
                    said["calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                else:
                    assert call.keys() == {"index", "function"}
                said["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    assert ended
    for call in said["calls"]:
        call["arguments"] = json.loads(call["arguments"])
    return said


@pytest.mark.parametrize("case", [case for case in CHATS if case.stream], ids=by_id)
def test_a_stream_says_the_same_wherever_it_is_cut(case: Case) -> None:
    said, wanted = translated(case, [case.raw]), recorded_stream(case.raw)
    assert_same_usage(said["usage"], wanted.pop("usage"))
    assert {name: said[name] for name in wanted} == wanted
    assert translated(case, [case.raw[at : at + 61] for at in range(0, len(case.raw), 61)]) == said


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.surface == "embeddings" and case.status == 200], ids=by_id
)
def test_embeddings_are_openais(case: Case) -> None:
    recorded = json.loads(case.raw)
    body, usage = DIALECT.completion(case.call, case.to, json.loads(case.raw))
    assert [item["embedding"] for item in body["data"]] == recorded["embeddings"]["float"]
    assert [(item["object"], item["index"]) for item in body["data"]] == [
        ("embedding", at) for at in range(len(recorded["embeddings"]["float"]))
    ]
    assert usage is not None
    assert (usage.prompt, usage.output) == (recorded["meta"]["billed_units"].get("input_tokens", 0), 0)


FAULTS = {401: "auth", 400: "context", 404: "model_gone"}


@pytest.mark.parametrize("case", [case for case in CASES if case.status != 200], ids=by_id)
def test_a_failure_means_what_it_says(case: Case) -> None:
    refusal = DIALECT.failure(case.status, case.meta["headers"], case.raw)
    assert refusal.fault == FAULTS[case.status]
    assert refusal.status == case.status
    assert not re.search(r"https?://|\*\*\*|[0-9a-f]{8}-[0-9a-f]{4}", refusal.message)


# Requests


CHAT_FIELDS = {
    **{name: {} for name in ("model", "stream", "max_tokens", "stop_sequences", "temperature", "seed", "k", "p")},
    **{name: {} for name in ("frequency_penalty", "presence_penalty", "safety_mode", "documents", "strict_tools")},
    "logprobs": {"type": "boolean"},
    "tool_choice": {"enum": ["REQUIRED", "NONE"]},
    "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/root.ChatMessageV2"}},
    "tools": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/root.ToolV2"}},
    "thinking": {"$ref": "#/$defs/root.Thinking"},
    "response_format": {"$ref": "#/$defs/root.ResponseFormatV2"},
    "citation_options": {"$ref": "#/$defs/root.CitationOptions"},
}
"""https://docs.cohere.com/reference/chat: the schema file has the parts of a request, not the whole."""
OPEN = {"Document"}
"""Whose fields are the caller's own."""


@cache
def chat_schema() -> Draft202012Validator:
    """Stricter than the file, which lets unknown fields pass."""
    parts = json.loads((WIRE / "schemas" / "cohere.json").read_text())["$defs"]
    for name, part in parts.items():
        if "properties" in part and name not in OPEN:
            part["additionalProperties"] = False
            if "role" in part["properties"] or "type" in part["properties"]:
                kind = "role" if "role" in part["properties"] else "type"
                part["required"] = [*part.get("required", []), kind]
    return Draft202012Validator(
        {"type": "object", "properties": CHAT_FIELDS, "additionalProperties": False, "$defs": parts}
    )


def assert_valid(body: dict[str, Any]) -> None:
    errors = [f"{error.json_path}: {error.message}" for error in chat_schema().iter_errors(body)]
    assert not errors, errors


def same_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Texts are parts, empty ones are none, and null is nothing."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    content = [part for part in content or [] if part.get("text") != ""]
    return {**message, "content": content}


@pytest.mark.parametrize("case", [case for case in CASES if case.surface == "chat" and case.sent], ids=by_id)
def test_a_recorded_request_is_built_again(case: Case) -> None:
    assert case.sent
    outgoing = DIALECT.request(case.call, case.to, None)
    built = json.loads(outgoing.content)
    assert outgoing.dropped == ()
    assert_valid(built)
    assert [same_parts(message) for message in built.pop("messages")] == [
        same_parts(message) for message in case.sent["messages"]
    ]
    sent = {name: value for name, value in case.sent.items() if name != "messages"}
    assert built == {"stream": False, **sent}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.status == 200 and (case.sent or {}).get("texts")], ids=by_id
)
def test_a_recorded_embedding_is_asked_for_again(case: Case) -> None:
    assert case.sent
    body = {name: case.sent[name] for name in ("model", "input_type", "truncate") if name in case.sent}
    body |= {"input": case.sent["texts"], "dimensions": case.sent.get("output_dimension")}
    outgoing = DIALECT.request(Call("embeddings", body), case.to, None)
    sent = {name: value for name, value in case.sent.items() if value is not None}
    assert json.loads(outgoing.content) == {"truncate": "NONE", "embedding_types": ["float"], **sent}


def openai_calls() -> Iterator[Any]:
    for row in json.loads((WIRE / "index.json").read_text())["cases"]:
        if row["provider"] == "openai" and row["api"] == "chat" and row["status"] == 200:
            body = json.loads((WIRE / row["id"] / "request.json").read_text())["body"]
            if isinstance(body, dict):
                yield pytest.param(body, id=row["id"])


@pytest.mark.parametrize("body", list(openai_calls()))
@pytest.mark.parametrize("model", ["command-a-03-2025", "command-a-reasoning-08-2025"])
def test_a_request_meant_for_openai_is_valid_or_refused(body: dict[str, Any], model: str) -> None:
    refused = {"n", "functions", "modalities", "audio", "input_audio", "file"}
    call = Call("chat", body)
    try:
        outgoing = DIALECT.request(call, deployment(model), None)
    except UnsupportedParameter as error:
        named = isinstance(body.get("tool_choice"), dict)
        assert call.features & refused or named or any(m["role"] == "function" for m in body["messages"]), error.message
        return
    assert_valid(json.loads(outgoing.content))
