"""Every recorded answer of Gemini's, Vertex AI's included, goes through unharmed; what is sent fits Google's schemas.

What is expected is worked out here, plainly, from the recording itself; the recordings lie beside the checkout.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shared.catalog import Catalog, Deployment
from shared.errors import InvalidRequest, ProviderError, UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.gemini import DIALECT
from shared.schema import Call, Usage, parse
from shared.settings import Settings
from shared.sse import Decoder

WIRE = Path(__file__).resolve().parents[4] / "shared" / "wire"
if not WIRE.is_dir():
    pytest.skip("the recordings are not beside this checkout", allow_module_level=True)


@cache
def deployment(model: str) -> Deployment:
    settings = Settings.read({"GEMINI_API_KEY": "AIza-0123456789", "GATEWAY_CONFIG": "none"})
    return Catalog.load(settings, PriceTable.vendored()).resolve(f"gemini/{model}").deployments[0]


class Case:
    def __init__(self, row: dict[str, Any]) -> None:
        folder = WIRE / row["id"]
        self.id, self.api = row["id"], row["api"]
        self.meta = json.loads((folder / "response.meta.json").read_text())
        self.sent: dict[str, Any] | None = json.loads((folder / "request.json").read_text())["body"]
        self.raw = (folder / self.meta["body_file"]).read_bytes()
        self.status, self.stream = self.meta["status"], self.meta["stream"]
        self.model = (self.meta["model"] or "gemini").partition(":")[0]

    @property
    def to(self) -> Deployment:
        return deployment(self.model)

    @property
    def call(self) -> Call:
        body = {"model": self.model, "messages": [{"role": "user", "content": "?"}], "stream": self.stream}
        return Call("chat", body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The answer's JSON objects, read the simplest way."""
        if self.meta["framing"] == "sse":
            return [json.loads(line[6:]) for line in self.raw.decode().splitlines() if line.startswith("data: ")]
        body = json.loads(self.raw)
        return body if isinstance(body, list) else [body]


CASES = [
    Case(row)
    for row in json.loads((WIRE / "index.json").read_text())["cases"]
    if row["provider"] in ("gemini", "vertex") and row["api"] in ("generateContent", "embeddings")
]
BROKEN = {
    "vertex/generate-multimodal-tool-return-matrix-tool-return-content-url-image-goog": ("server", "UNEXPECTED_TOOL"),
    "vertex/generate-gemini-token-counts-streaming": ("server", "broke its answer off: 1"),  # `enum-encoding=int`
    "gemini/generate-google-stream-no-args-tool-call": ("protocol", "in pieces, unasked"),  # of Vertex, by a flag
}  # fmt: skip
ANSWERED = [case for case in CASES if case.api == "generateContent" and case.status == 200]
WHOLE = [case for case in ANSWERED if not case.stream and case.id not in BROKEN]
STREAMED = [case for case in ANSWERED if case.stream and case.id not in BROKEN]
FAILED = [case for case in CASES if case.status != 200]
EMBEDDED = [case for case in CASES if case.api == "embeddings" and case.status == 200 and "gemini/" in case.id]


def by_id(case: Case) -> str:
    return case.id


FINISHES = {"STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "content_filter", "RECITATION": "content_filter"}


def recorded(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices that recorded events add up to."""
    said: dict[int, dict[str, Any]] = {}
    for event in events:
        for candidate in event.get("candidates", ()):
            made = said.setdefault(candidate.get("index", 0), blank())
            parts = candidate.get("content", {}).get("parts", [])
            for part in parts:
                if "functionCall" in part:
                    call = part["functionCall"]
                    made["calls"].append((call["name"], call.get("args", {}), part.get("thoughtSignature")))
                    continue
                made["reasoning" if part.get("thought") else "text"] += part.get("text", "")
                if part and "text" not in part:
                    made["others"].append(part)
                elif "thoughtSignature" in part:
                    made["signature"] = part["thoughtSignature"]
            word = candidate.get("finishReason")
            made["native"] = word or made["native"]
            made["finish"] = FINISHES[made["native"]] if made["native"] else None
            if made["native"] == "STOP" and made["calls"]:
                made["finish"] = "tool_calls"
    return said


def blank() -> dict[str, Any]:
    return {"text": "", "reasoning": "", "calls": [], "others": [], "signature": None, "finish": None, "native": None}


def take(said: dict[int, dict[str, Any]], choice: dict[str, Any]) -> None:
    """Put one of our choices, whole or streamed, to what was said."""
    made = said.setdefault(choice["index"], blank())
    message = choice.get("message") or choice["delta"]
    made["text"] += message.get("content") or ""
    made["reasoning"] += message.get("reasoning_content") or ""
    for call in message.get("tool_calls", []):
        if "delta" in choice:
            assert call["index"] == len(made["calls"])
        assert call["type"] == "function"
        assert call["id"]
        signature = call.get("extra_content", {}).get("google", {}).get("thought_signature")
        made["calls"].append((call["function"]["name"], json.loads(call["function"]["arguments"]), signature))
    google = message.get("extra_content", {}).get("google", {})
    made["others"] += google.get("parts", [])
    made["signature"] = google.get("thought_signature") or made["signature"]
    made["finish"] = choice.get("finish_reason") or made["finish"]
    made["native"] = choice.get("native_finish_reason") or made["native"]


def expected_usage(events: list[dict[str, Any]]) -> tuple[int, int, int, int] | None:
    """Prompt with what tools added, of it cached, output with thoughts, of it thoughts: the last that were told."""
    told = [event["usageMetadata"] for event in events if "promptTokenCount" in event.get("usageMetadata", {})]
    if not told:
        return None
    last = told[-1]
    thoughts = last.get("thoughtsTokenCount", 0)
    prompt = last["promptTokenCount"] + last.get("toolUsePromptTokenCount", 0)
    return prompt, last.get("cachedContentTokenCount", 0), last.get("candidatesTokenCount", 0) + thoughts, thoughts


def assert_same_usage(given: Usage | None, events: list[dict[str, Any]]) -> None:
    got = given and (given.prompt, given.cache_read, given.output, given.reasoning)
    assert got == expected_usage(events)
    if given and (total := events[-1]["usageMetadata"].get("totalTokenCount")):
        assert given.total == total


@pytest.mark.parametrize("case", WHOLE, ids=by_id)
def test_a_whole_answer_says_the_same(case: Case) -> None:
    body, usage = DIALECT.completion(case.call, case.to, json.loads(case.raw))
    said: dict[int, dict[str, Any]] = {}
    for choice in body["choices"]:
        take(said, choice)
    assert said == recorded(case.events)
    assert_same_usage(usage, case.events)


def translated(case: Case, pieces: list[bytes]) -> tuple[dict[int, dict[str, Any]], Usage | None]:
    """The choices that our chunks add up to; ids are left out, as some are invented."""
    translate, usage = DIALECT.stream(case.call, case.to), None
    said: dict[int, dict[str, Any]] = {}
    decoder = Decoder()
    events = [json.loads(data) for piece in pieces for _, data in decoder.feed(piece)]
    for event in events if case.meta["framing"] == "sse" else case.events:
        for body, now in translate(None, event):
            usage = now or usage
            for choice in body["choices"]:
                take(said, choice)
    return said, usage


@pytest.mark.parametrize("case", STREAMED, ids=by_id)
def test_a_stream_says_the_same_wherever_it_is_cut(case: Case) -> None:
    said, usage = translated(case, [case.raw])
    assert said == recorded(case.events)
    assert all(made["finish"] for made in said.values())
    assert_same_usage(usage, case.events)
    dice = random.Random(case.id)
    for _ in range(3):
        cuts = sorted(dice.choices(range(len(case.raw)), k=dice.choice([1, 7, 40])))
        pieces = [case.raw[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert translated(case, pieces) == (said, usage)


@pytest.mark.parametrize("case", [case for case in ANSWERED if case.id in BROKEN], ids=by_id)
def test_an_answer_that_broke_off_is_a_failure(case: Case) -> None:
    fault, words = BROKEN[case.id]
    with pytest.raises(ProviderError, match=words) as caught:
        translated(case, [case.raw]) if case.stream else DIALECT.completion(case.call, case.to, case.events[0])
    assert caught.value.fault == fault


@pytest.mark.parametrize("case", EMBEDDED, ids=by_id)
def test_embeddings_are_of_unit_length(case: Case) -> None:
    assert case.sent
    asked = case.sent["requests"]
    size = asked[0].get("outputDimensionality")
    call = Call(
        "embeddings", {"model": case.model, "input": ["?"] * len(asked), **({"dimensions": size} if size else {})}
    )
    body, usage = DIALECT.completion(call, case.to, json.loads(case.raw))
    was = json.loads(case.raw)
    for got, vector in zip(body["data"], was["embeddings"], strict=True):
        length = math.hypot(*vector["values"])
        assert got["embedding"] == pytest.approx([value / length for value in vector["values"]], abs=1e-6)
        assert math.hypot(*got["embedding"]) == pytest.approx(1, abs=1e-5)
    told = was.get("usageMetadata", {}).get("promptTokenCount")
    assert usage == (Usage(input=told) if told else None)


FAULTS = {400: "bad_request", 401: "auth", 403: "auth", 404: "model_gone", 429: "rate_limit"}
FAULTS_BY_WORDS = {"API_KEY_INVALID": "auth"}


@pytest.mark.parametrize("case", FAILED, ids=by_id)
def test_a_failure_means_what_it_says(case: Case) -> None:
    refusal = DIALECT.failure(case.status, case.meta["headers"], case.raw)
    said = case.raw.decode()
    assert refusal.fault == next(
        (fault for words, fault in FAULTS_BY_WORDS.items() if words in said), FAULTS[case.status]
    )
    assert 0 < len(refusal.message) <= 500
    assert not re.search(r"https?://|test-project|fake-project|\d{12}", refusal.message)
    assert refusal.retry_after == (48 if "RetryInfo" in said else None)


# What would be sent


@cache
def schema() -> Draft202012Validator:
    """A request as google-genai's types describe its fields; the whole of it is no type of theirs."""
    text = json.loads((WIRE / "schemas" / "gemini.json").read_text())
    content, tool = ({"$ref": f"#/$defs/root.{name}"} for name in ("Content", "Tool"))
    fields = {
        "contents": {"type": "array", "items": content, "minItems": 1},
        "systemInstruction": content,
        "tools": {"type": "array", "items": tool},
        "toolConfig": {"$ref": "#/$defs/root.ToolConfig"},
        "generationConfig": {"$ref": "#/$defs/root.GenerationConfig"},
    }
    whole = {"type": "object", "properties": fields, "required": ["contents"], "additionalProperties": False}
    return Draft202012Validator({**whole, "$defs": text["$defs"]})


@cache
def discovered(name: str) -> Draft202012Validator:
    """A type of Vertex AI's discovery document, as JSON Schema, without fields unknown to it."""
    types = json.loads((WIRE / "schemas" / "vertex.json").read_text())["schemas"]

    def strict(part: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in part:
            return {"$ref": f"#/$defs/{part['$ref']}"}
        kept = {name: part[name] for name in ("type", "enum") if name in part and part[name] != "any"}
        if "items" in part:
            kept["items"] = strict(part["items"])
        if isinstance(part.get("additionalProperties"), dict):
            kept["additionalProperties"] = strict(part["additionalProperties"])
        if "properties" in part:
            kept["properties"] = {name: strict(value) for name, value in part["properties"].items()}
            kept["additionalProperties"] = False
        return kept

    defs = {key: strict(value) for key, value in types.items()}
    return Draft202012Validator({"$ref": f"#/$defs/GoogleCloudAiplatformV1beta1{name}", "$defs": defs})


def assert_valid(body: dict[str, Any]) -> None:
    for validator in (schema(), discovered("GenerateContentRequest")):
        assert [(list(error.absolute_path), error.message[:200]) for error in validator.iter_errors(body)] == []
    for turn in body["contents"]:
        assert turn["role"] in ("user", "model")
        assert turn["parts"]
        assert all(len(part.keys() - {"thoughtSignature"}) == 1 for part in turn["parts"])
    roles = [turn["role"] for turn in body["contents"]]
    assert all(a != b for a, b in pairwise(roles))


def camel(name: str) -> str:
    head, *more = name.split("_")
    return head + "".join(word.title() for word in more)


def part_of(part: dict[str, Any]) -> dict[str, Any]:
    """A recorded part with the names of its fields in camel case."""
    part = {camel(name): value for name, value in part.items()}
    for name in ("inlineData", "fileData"):
        if name in part:
            part[name] = {camel(key): value for key, value in part[name].items()}
    return part


def as_openai(case: Case) -> dict[str, Any]:
    """A recorded request, said OpenAI's way."""
    assert case.sent
    messages: list[dict[str, Any]] = []
    if system := case.sent.get("systemInstruction"):
        parts = system["parts"] if isinstance(system["parts"], list) else [system["parts"]]
        messages.append({"role": "system", "content": "".join(part["text"] for part in parts)})
    ids: list[str] = []
    for turn in case.sent["contents"]:
        parts = [part_of(part) for part in turn["parts"]]
        calls = [part for part in parts if "functionCall" in part]
        results = [part["functionResponse"] for part in parts if "functionResponse" in part]
        if calls:
            made = [tool_call(part, len(ids) + place) for place, part in enumerate(calls)]
            ids += [call["id"] for call in made]
            messages.append({"role": "assistant", "content": None, "tool_calls": made})
        for result in results:
            answered = ids.pop(0)
            media = [content_of(part_of(part)) for part in result.get("parts", ())]
            content = [{"type": "text", "text": json.dumps(result["response"])}, *media]
            messages.append({"role": "tool", "tool_call_id": answered, "content": content})
        if not calls and not results:
            role = "assistant" if turn["role"] == "model" else "user"
            messages.append({"role": role, "content": [content_of(part) for part in parts]})
    body: dict[str, Any] = {"model": case.model, "messages": messages, "stream": case.stream}
    if declared := [tool for each in case.sent.get("tools", ()) for tool in each.get("functionDeclarations", ())]:
        body["tools"] = [{"type": "function", "function": function(tool)} for tool in declared]
    config = {camel(name): value for name, value in case.sent.get("generationConfig", {}).items()}
    names = {"temperature": "temperature", "topP": "top_p", "maxOutputTokens": "max_tokens", "candidateCount": "n"}
    names |= {"stopSequences": "stop", "seed": "seed", "logprobs": "top_logprobs", "responseLogprobs": "logprobs"}
    body |= {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if budget := config.get("thinkingConfig", {}).get("thinkingBudget"):
        body["reasoning"] = {"max_tokens": budget}
    if wanted := config.get("responseJsonSchema") or config.get("responseSchema"):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}
    return body


def tool_call(part: dict[str, Any], place: int) -> dict[str, Any]:
    call = part["functionCall"]
    made = {"name": call["name"], "arguments": json.dumps(call["args"])}
    kept = {"google": {"thought_signature": part["thoughtSignature"]}} if "thoughtSignature" in part else {}
    return {"id": call.get("id") or f"call_{place}", "type": "function", "function": made, "extra_content": kept}


def function(tool: dict[str, Any]) -> dict[str, Any]:
    given = {camel(name): value for name, value in tool.items()}
    named = {"name": given["name"], "parameters": given.get("parametersJsonSchema") or given.get("parameters")}
    return named | ({"description": given["description"]} if given.get("description") else {})


def content_of(part: dict[str, Any]) -> dict[str, Any]:
    if "text" in part:
        return {"type": "text", "text": part["text"]}
    if "inlineData" in part:
        kind, data = part["inlineData"]["mimeType"], part["inlineData"]["data"]
        if kind.startswith("audio/"):
            return {"type": "input_audio", "input_audio": {"data": data, "format": kind.removeprefix("audio/")}}
        uri = f"data:{kind};base64,{data}"
    else:
        kind, uri = part["fileData"]["mimeType"], part["fileData"]["fileUri"]
    if kind.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": uri}}
    return {"type": "file", "file": {"file_data": uri}}


ASKED = [case for case in CASES if case.api == "generateContent" and case.sent and case.status in (200, 429)]


@pytest.mark.parametrize("case", ASKED, ids=by_id)
def test_a_recorded_request_is_built_again(case: Case) -> None:
    assert case.sent
    call = parse("chat", json.dumps(as_openai(case)).encode())
    built = json.loads(DIALECT.request(call, case.to, None).content)
    assert_valid(built)
    assert [turn["role"] for turn in built["contents"]] == [turn.get("role") for turn in case.sent["contents"]]
    for turn, was in zip(built["contents"], case.sent["contents"], strict=True):
        for part, recorded_part in zip(turn["parts"], was["parts"], strict=True):
            assert_same_part(part, part_of(recorded_part))
    config = {camel(name): value for name, value in case.sent.get("generationConfig", {}).items()}
    built_config = built.get("generationConfig", {})
    for name in ("temperature", "topP", "maxOutputTokens", "stopSequences", "seed", "candidateCount"):
        assert built_config.get(name) == config.get(name)
    if "thinkingBudget" in (thinking := config.get("thinkingConfig", {})) and "2.5" in case.model:
        assert built_config["thinkingConfig"] == thinking
    wanted = config.get("responseJsonSchema") or config.get("responseSchema")
    assert built_config.get("responseJsonSchema") == wanted
    assert built_config.get("responseMimeType") == ("application/json" if wanted else None)


def assert_same_part(part: dict[str, Any], was: dict[str, Any]) -> None:
    if "functionResponse" in was:
        assert part["functionResponse"]["name"] == was["functionResponse"]["name"]
        assert json.loads(part["functionResponse"]["response"]["output"]) == was["functionResponse"]["response"]
    elif "functionCall" in was:
        kept = {name: value for name, value in part["functionCall"].items() if name in was["functionCall"]}
        assert kept == was["functionCall"]
        assert part.get("thoughtSignature") == was.get("thoughtSignature")
    elif "fileData" in was:
        assert part["fileData"]["fileUri"] == was["fileData"]["fileUri"]
        assert part["fileData"].get("mimeType") in (None, was["fileData"]["mimeType"])
    else:
        assert part == was


def calls_of_others() -> Iterator[Any]:
    """What was recorded for providers that speak OpenAI's format, if it is what OpenAI's own API would take."""
    for row in json.loads((WIRE / "index.json").read_text())["cases"]:
        if row["api"] == "chat" and row["provider"] in ("openai", "openrouter", "groq", "mistral", "deepseek", "xai"):
            with suppress(InvalidRequest):
                body = json.loads((WIRE / row["id"] / "request.json").read_text())["body"]
                yield pytest.param(parse("chat", json.dumps(body).encode()), id=row["id"])


@pytest.mark.parametrize("call", list(calls_of_others()))
@pytest.mark.parametrize("model", ["gemini-2.5-flash", "gemini-3.1-pro-preview"])
def test_a_request_meant_for_others_is_valid_or_refused_by_name(call: Call, model: str) -> None:
    try:
        outgoing = DIALECT.request(call, deployment(model), None)
    except UnsupportedParameter as refused:
        assert refused.param in call.body
        return
    assert_valid(json.loads(outgoing.content))
    assert set(outgoing.dropped) <= {*call.body, "tools.strict"}


@pytest.mark.parametrize("dimensions", [None, 256])
def test_a_request_for_embeddings_is_valid(dimensions: int | None) -> None:
    call = Call(
        "embeddings", {"model": "e", "input": ["a", "b"], "dimensions": dimensions, "encoding_format": "base64"}
    )
    body = json.loads(DIALECT.request(call, deployment("gemini-embedding-001"), None).content)
    assert list(body) == ["requests"]
    for each in body["requests"]:
        assert list(discovered("EmbedContentRequest").iter_errors(each)) == []
