"""Every recorded answer of a provider that speaks OpenAI's format goes through unharmed: whole, streamed, failed.

What is expected is worked out here, plainly, from the recording itself. The recordings lie beside the checkout; their
README says where they come from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shared.catalog import Catalog, Deployment
from shared.errors import ProviderError, UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.openai import OpenAIDialect
from shared.schema import Call, Usage
from shared.settings import Settings
from shared.sse import Decoder

WIRE = Path(__file__).resolve().parents[4] / "shared" / "wire"
if not WIRE.is_dir():
    pytest.skip("the recordings are not beside this checkout", allow_module_level=True)

NAMED = ["azure", "cerebras", "deepseek", "fireworks", "groq", "llamacpp", "mistral", "ollama", "openai"]
NAMED += ["openrouter", "perplexity", "together", "xai"]
BY_URL = ["gpustack", "huggingface"]
SURFACES = ("chat", "completions", "embeddings")
DIALECT = OpenAIDialect()


class Case:
    def __init__(self, row: dict[str, Any]) -> None:
        folder = WIRE / row["id"]
        self.id, self.provider, self.surface = row["id"], row["provider"], row["api"]
        self.meta = json.loads((folder / "response.meta.json").read_text())
        self.sent = json.loads((folder / "request.json").read_text()).get("body")
        self.raw = (folder / self.meta["body_file"]).read_bytes()
        self.status, self.stream = self.meta["status"], self.meta["stream"]
        body = dict(self.sent) if isinstance(self.sent, dict) else {"messages": [{"role": "user", "content": "?"}]}
        body["model"] = body.get("model") or self.meta["model"] or "deployment"
        self.call = Call(self.surface, {**body, "stream": self.stream})

    @property
    def to(self) -> Deployment:
        return deployment(self.provider, self.call.model)


CASES = [
    Case(row)
    for row in json.loads((WIRE / "index.json").read_text())["cases"]
    if row["provider"] in NAMED + BY_URL and row["api"] in SURFACES
]
WHOLE = [case for case in CASES if case.status == 200 and not case.stream]
STREAMED = [case for case in CASES if case.status == 200 and case.stream]
FAILED = [case for case in CASES if case.status != 200]


def by_id(case: Case) -> str:
    return case.id


@cache
def catalog() -> Catalog:
    variables = {f"{name.upper()}_API_KEY": "sk-recorded-0123456789" for name in NAMED}
    variables |= {f"{name.upper()}_BASE_URL": f"https://{name}.example/v1" for name in [*NAMED, *BY_URL]}
    path = Path(__file__).with_name("gateway_with_own_providers.toml")
    return Catalog.load(Settings.read({**variables, "GATEWAY_CONFIG": str(path)}), PriceTable.vendored())


@cache
def deployment(provider: str, model: str) -> Deployment:
    return catalog().resolve(f"{provider}/{model}").deployments[0]


def joined(content: Any, kind: str, field: str) -> str:
    """Mistral's content may be parts, whose thinking may be parts again."""
    if isinstance(content, str) or content is None:
        return (content or "") if kind == "text" else ""
    found = [part[field] for part in content if part["type"] == kind]
    return "".join(text if isinstance(text, str) else "".join(p["text"] for p in text) for text in found)


def words(message: dict[str, Any]) -> dict[str, Any]:
    """What a recorded message or delta says."""
    content = message.get("content")
    thought = message.get("reasoning_content") or message.get("reasoning") or joined(content, "thinking", "thinking")
    return {"text": joined(content, "text", "text"), "reasoning": thought, "refusal": message.get("refusal") or ""}


FINISH = {"eos": "stop"}


def expected_usage(provider: str, usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """By each provider's published rule; xAI alone counts reasoning on top."""
    if not usage:
        return None
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    output = usage.get("completion_tokens", 0) + (reasoning if provider == "xai" else 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    cached = cached or usage.get("prompt_cache_hit_tokens") or usage.get("num_cached_tokens") or 0
    cost: Decimal | None = None
    if provider == "openrouter" and "cost" in usage:
        cost = Decimal(str(usage["cost"])) * 10**9
        if usage.get("is_byok"):
            cost += Decimal(str(usage["cost_details"]["upstream_inference_cost"])) * 10**9
    if provider == "perplexity" and "cost" in usage:
        cost = Decimal(str(usage["cost"]["total_cost"])) * 10**9
    if provider == "xai" and "cost_in_usd_ticks" in usage:
        cost = Decimal(usage["cost_in_usd_ticks"]) / 10
    return {
        "prompt": usage["prompt_tokens"],
        "output": output,
        "reasoning": reasoning,
        "cached": min(cached, usage["prompt_tokens"]),
        "cost": cost,
    }


def given_usage(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    cost = None if usage.cost is None else Decimal(usage.cost)
    assert usage.input >= 0
    return {
        "prompt": usage.prompt,
        "output": usage.output,
        "reasoning": usage.reasoning,
        "cached": usage.cache_read,
        "cost": cost,
    }


def assert_same_usage(provider: str, given: Usage | None, recorded: dict[str, Any] | None) -> None:
    got, wanted = given_usage(given), expected_usage(provider, recorded)
    if got and wanted and got["cost"] is not None and wanted["cost"] is not None:
        assert abs(got.pop("cost") - wanted.pop("cost")) < 1  # whole nano-dollars
    assert got == wanted
    if provider == "xai" and given and recorded:
        assert given.total == recorded["total_tokens"]


LEAKS = ("user_id", "x_groq", "obfuscation", "usage", "error")


@pytest.mark.parametrize("case", [case for case in WHOLE if case.surface == "chat"], ids=by_id)
def test_a_whole_chat_answer_says_the_same(case: Case) -> None:
    recorded = json.loads(case.raw)
    body, usage = DIALECT.completion(case.call, case.to, json.loads(case.raw))
    assert not body.keys() & set(LEAKS)
    assert len(body["choices"]) == len(recorded["choices"])
    for got, was in zip(body["choices"], recorded["choices"], strict=True):
        message = got["message"]
        assert "reasoning" not in message
        assert words(message) == words(was.get("message", {}))
        assert isinstance(message["content"], str | None)
        calls = [
            (c["id"], c["type"], c["function"]["name"], c["function"]["arguments"])
            for c in message.get("tool_calls", [])
        ]
        assert calls == [
            (c["id"], "function", c["function"]["name"], c["function"]["arguments"])
            for c in was.get("message", {}).get("tool_calls") or []
        ]
        assert message.get("function_call") == was.get("message", {}).get("function_call")
        assert got["finish_reason"] == FINISH.get(was["finish_reason"], was["finish_reason"])
        native = was.get("native_finish_reason") or was["finish_reason"]
        assert got.get("native_finish_reason", got["finish_reason"]) == native
    assert_same_usage(case.provider, usage, recorded.get("usage"))


@pytest.mark.parametrize("case", [case for case in WHOLE if case.surface == "completions"], ids=by_id)
def test_a_whole_completion_says_the_same(case: Case) -> None:
    recorded = json.loads(case.raw)
    body, usage = DIALECT.completion(case.call, case.to, json.loads(case.raw))
    for got, was in zip(body["choices"], recorded["choices"], strict=True):
        assert (got["text"], got["logprobs"], got["index"]) == (was["text"], was.get("logprobs"), was.get("index", 0))
        assert got["finish_reason"] == FINISH.get(was["finish_reason"], was["finish_reason"])
    assert_same_usage(case.provider, usage, recorded.get("usage"))


@pytest.mark.parametrize("case", [case for case in WHOLE if case.surface == "embeddings"], ids=by_id)
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_come_in_the_encoding_asked_for(case: Case, encoding: str) -> None:
    recorded = json.loads(case.raw)
    call = Call("embeddings", {**case.call.body, "encoding_format": encoding})
    body, usage = DIALECT.completion(call, case.to, json.loads(case.raw))
    assert len(body["data"]) == len(recorded["data"])
    for got, was in zip(body["data"], recorded["data"], strict=True):
        assert isinstance(got["embedding"], list if encoding == "float" else str)
        assert as_floats(got["embedding"]) == pytest.approx(as_floats(was["embedding"]), abs=1e-7)
    assert_same_usage(case.provider, usage, recorded.get("usage"))


def as_floats(embedding: Any) -> list[float]:
    """Little-endian float32, as the OpenAI SDKs read it."""
    if isinstance(embedding, list):
        return embedding
    import base64
    import struct

    packed = base64.b64decode(embedding)
    return list(struct.unpack(f"<{len(packed) // 4}f", packed))


def events(raw: bytes) -> Iterator[tuple[str | None, bytes]]:
    """Server-sent events, read the simplest way: blocks between empty lines, up to `[DONE]`."""
    for block in re.split(rb"\r?\n\r?\n", raw):
        lines = [line for line in re.split(rb"\r?\n", block) if line and not line.startswith(b":")]
        data = [line.split(b":", 1)[1].strip() for line in lines if line.startswith(b"data:")]
        name = next((line.split(b":", 1)[1].strip().decode() for line in lines if line.startswith(b"event:")), None)
        if data == [b"[DONE]"]:
            return
        if data:
            yield name, b"\n".join(data)


def recorded_stream(case: Case) -> tuple[dict[int, dict[str, Any]], dict[str, Any] | None]:
    """The choices that a recorded stream adds up to, and its last usage."""
    said: dict[int, dict[str, Any]] = {}
    usage = None
    for _, data in events(case.raw):
        chunk = json.loads(data)
        usage = chunk.get("usage") or chunk.get("x_groq", {}).get("usage") or usage
        for choice in chunk.get("choices", []):
            blank = {"text": "", "reasoning": "", "refusal": "", "calls": {}, "finish": None}
            made = said.setdefault(choice["index"], blank)
            if case.surface == "completions":
                made["text"] += choice["text"]
            else:
                for name, text in words(choice.get("delta", {})).items():
                    made[name] += text
                for place, piece in enumerate(choice.get("delta", {}).get("tool_calls") or []):
                    blank_call = {"id": None, "name": None, "arguments": ""}
                    call = made["calls"].setdefault(piece.get("index", place), blank_call)
                    call["id"] = call["id"] or piece.get("id")
                    call["name"] = call["name"] or piece["function"].get("name")
                    call["arguments"] += piece["function"].get("arguments") or ""
            made["finish"] = made["finish"] or FINISH.get(choice.get("finish_reason"), choice.get("finish_reason"))
    return said, usage


def translated(case: Case, pieces: list[bytes]) -> tuple[dict[int, dict[str, Any]], Usage | None]:
    """The choices that our chunks add up to, put together as the OpenAI SDKs do: by index, strings appended."""
    decoder, translate = Decoder(), DIALECT.stream(case.call, case.to)
    said: dict[int, dict[str, Any]] = {}
    usage = None
    for name, data in (event for piece in pieces for event in decoder.feed(piece)):
        if data == b"[DONE]":
            break
        for body, now in translate(name, json.loads(data)):
            usage = now or usage
            assert not body.keys() & set(LEAKS), body.keys()
            for choice in body["choices"]:
                take(case, choice, said)
    return said, usage


def take(case: Case, choice: dict[str, Any], said: dict[int, dict[str, Any]]) -> None:
    blank = {"text": "", "reasoning": "", "refusal": "", "calls": {}, "finish": None}
    made = said.setdefault(choice["index"], blank)
    finish = choice.get("finish_reason")
    assert finish in (None, "stop", "length", "tool_calls", "content_filter", "function_call")
    made["finish"] = made["finish"] or finish
    if case.surface == "completions":
        assert choice.keys() <= {
            "index",
            "text",
            "logprobs",
            "finish_reason",
            "native_finish_reason",
            "content_filter_results",
        }
        made["text"] += choice["text"]
        return
    delta = choice["delta"]
    assert "reasoning" not in delta
    assert isinstance(delta.get("content"), str | None)
    made["text"] += delta.get("content") or ""
    made["reasoning"] += delta.get("reasoning_content") or ""
    made["refusal"] += delta.get("refusal") or ""
    for piece in delta.get("tool_calls", []):
        if piece["index"] not in made["calls"]:
            assert piece["index"] == len(made["calls"])
            assert piece["type"] == "function"
            made["calls"][piece["index"]] = {"id": piece["id"], "name": piece["function"]["name"], "arguments": ""}
        else:
            assert not {"id", "type"} & piece.keys()
            assert "name" not in piece["function"]
        made["calls"][piece["index"]]["arguments"] += piece["function"].get("arguments", "")


BROKEN_OFF = {
    "groq/chat-object-streaming-2": ("server", "tool call validation failed"),
    "openrouter/chat-object-streaming-2": ("server", "EngineCore encountered an issue"),
}
"""An error event inside a 200: https://console.groq.com/docs/errors, https://openrouter.ai/docs/api-reference/errors."""


@pytest.mark.parametrize("case", [case for case in STREAMED if case.id not in BROKEN_OFF], ids=by_id)
def test_a_stream_says_the_same_wherever_it_is_cut(case: Case) -> None:
    said, usage = translated(case, [case.raw])
    wanted, recorded = recorded_stream(case)
    assert said == wanted
    assert all(made["finish"] for made in said.values())
    assert_same_usage(case.provider, usage, recorded)
    dice = random.Random(case.id)
    for _ in range(3):
        cuts = sorted(dice.choices(range(len(case.raw)), k=dice.choice([1, 7, 40])))
        pieces = [case.raw[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert translated(case, pieces) == (said, usage)
    if len(case.raw) < 3000:
        assert translated(case, [bytes([byte]) for byte in case.raw]) == (said, usage)
        for cut in range(len(case.raw)):
            assert translated(case, [case.raw[:cut], case.raw[cut:]]) == (said, usage)


@pytest.mark.parametrize("case", [case for case in STREAMED if case.id in BROKEN_OFF], ids=by_id)
def test_an_error_inside_a_stream_is_raised(case: Case) -> None:
    fault, message = BROKEN_OFF[case.id]
    with pytest.raises(ProviderError, match=message) as caught:
        translated(case, [case.raw])
    assert caught.value.fault == fault


FAULTS_BY_STATUS = {400: "bad_request", 401: "auth", 404: "model_gone", 429: "rate_limit", 500: "server"}
FAULTS_BY_WORDS = {
    "has been decommissioned": "model_gone",
    "Invalid model:": "model_gone",
    "is not a valid model ID": "model_gone",
    "The supported API model names are": "model_gone",
    "not allowed to sample from this model": "model_gone",
    "exceeds the available context size": "context",
    "prompt too long": "context",
    "maximum context length is": "context",
    "total length of all messages is too long": "context",
    "Content violates usage guidelines": "policy",
}


@pytest.mark.parametrize("case", FAILED, ids=by_id)
def test_a_failure_means_what_it_says(case: Case) -> None:
    refusal = DIALECT.failure(case.status, case.meta["headers"], case.raw)
    said = case.raw.decode()
    wanted = next((fault for words, fault in FAULTS_BY_WORDS.items() if words in said), None)
    assert refusal.fault == (wanted or FAULTS_BY_STATUS[case.status])
    assert refusal.status == case.status
    assert 0 < len(refusal.message) <= 500
    assert not re.search(r"https?://|user_[0-9A-Z]|\*\*\*|\bsk-\w|[0-9a-f]{8}-[0-9a-f]{4}", refusal.message)
    assert refusal.message != "Provider returned error"  # OpenRouter's wrapping of what matters
    if refusal.fault == "bad_request" and case.provider == "openai":
        assert (refusal.param, refusal.code) == tuple(json.loads(said)["error"][name] for name in ("param", "code"))


def test_a_recorded_rate_limit_says_when_to_come_back() -> None:
    waits = {case.id: DIALECT.failure(case.status, case.meta["headers"], case.raw).retry_after for case in FAILED}
    assert waits["azure/chat-real-error-scenarios-azure-grok-4-1-fast-non-reasoning-handles-c-e429"] == 1
    free = {wait for case, wait in waits.items() if case.endswith("e429") and "openrouter" in case}
    assert {None, 21.0, 44.0} == free  # `x-ratelimit-reset` is in epoch milliseconds, `date` is the provider's clock


SCHEMAS = {
    "openai": ("openai.json", "components", "CreateChatCompletionRequest"),
    "groq": ("groq.json", "$defs", "CompletionCreateParams"),
    "mistral": ("mistral.json", "components", "ChatCompletionRequest"),
    "openrouter": ("openrouter.json", "components", "ChatRequest"),
}


@cache
def schema(provider: str) -> Draft202012Validator:
    file, section, name = SCHEMAS[provider]
    text = (WIRE / "schemas" / file).read_text()
    path = f"#/{section}/{name}" if section == "$defs" else f"#/{section}/schemas/{name}"
    return Draft202012Validator({"$ref": path, section: json.loads(text)[section]})


def wrong(provider: str, body: dict[str, Any]) -> set[tuple[str, str]]:
    return {(".".join(map(str, error.absolute_path)), error.validator) for error in schema(provider).iter_errors(body)}


CHATS = [case for case in CASES if case.surface == "chat" and isinstance(case.sent, dict)]


@pytest.mark.parametrize("case", [case for case in CHATS if case.provider in SCHEMAS], ids=by_id)
def test_a_request_is_as_valid_as_it_was(case: Case) -> None:
    before = json.dumps(case.call.body)
    try:
        built = json.loads(DIALECT.request(case.call, case.to, None).content)
    except UnsupportedParameter as refused:
        pytest.fail(f"refused, though the provider answered {case.status}: {refused.message}")
    assert json.dumps(case.call.body) == before
    assert wrong(case.provider, built) <= wrong(case.provider, case.sent)


@pytest.mark.parametrize(
    "case", [case for case in CHATS if case.provider == "openai" and case.status == 200], ids=by_id
)
@pytest.mark.parametrize("provider", ["groq", "mistral", "openrouter"])
def test_a_request_meant_for_openai_is_valid_elsewhere(case: Case, provider: str) -> None:
    to = deployment(provider, "some-model")
    try:
        built = json.loads(DIALECT.request(case.call, to, None).content)
    except UnsupportedParameter as refused:
        assert refused.param
        return
    allowed = wrong("openai", case.sent)
    only_openai = {"prompt_cache_options", "moderation", "web_search_options"}
    built = {name: value for name, value in built.items() if name not in only_openai}
    assert wrong(provider, built) <= allowed
