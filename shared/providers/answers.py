"""Answers in OpenAI's shape, whatever a provider adds to it, leaves out or calls by another name.

https://platform.openai.com/docs/api-reference/chat/object and …/chat-streaming: what comes out is that, plus
`reasoning_content` and, where it differs, `native_finish_reason`.
"""

from __future__ import annotations

import base64
from array import array
from decimal import Decimal
from sys import byteorder
from typing import Any, cast
from uuid import uuid4

import orjson

from shared.config import Provider
from shared.errors import ProviderError
from shared.providers import refusals
from shared.providers.dialect import Piece
from shared.providers.pieces import MAX_TOKENS, object_of, text_or_none
from shared.schema import JSON, Usage

LEAKS = ("obfuscation", "p", "user_id")
"""Padding against traffic analysis (OpenAI, Mistral), and OpenRouter's id of our account."""
FINISHES = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
FINISH_WORDS = {
    "model_length": "length",  # Mistral
    "max_tokens": "length",
    "model_context_window_exceeded": "length",  # Anthropic
    "MAX_TOKENS": "length",
    "tool_use": "tool_calls",
    "tool_call": "tool_calls",
    "TOOL_CALL": "tool_calls",  # Cohere
    "refusal": "content_filter",
    "guardrail_intervened": "content_filter",  # Bedrock
    "content_filtered": "content_filter",
    "SAFETY": "content_filter",
}
"""Other words, such as Together's `eos`, mean `stop`."""
FAILURES = {
    "insufficient_system_resource": "overloaded",  # https://api-docs.deepseek.com/api/create-chat-completion
    "error": "server",  # Mistral, OpenRouter
    "abort": "server",  # vLLM
    "network_error": "server",
    "malformed_model_output": "server",  # Bedrock
    "malformed_tool_use": "server",
    "ERROR": "server",  # Cohere
    "TIMEOUT": "server",
}
"""Finish reasons that are none: the answer broke off."""
EMPTY = "The provider's answer is empty."


class ToolCalls:
    """The tool calls of one streamed choice: each gets its index from 0, and its id, type and name once.

    Some providers leave `index` out or send 0 for all, repeat `id`, or send it as ""."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._at: dict[Any, int] = {}
        self._count = 0
        self._without_id: set[int] = set()

    def fix(self, pieces: list[JSON]) -> None:
        for piece in pieces:
            given, function = piece.get("index"), cast("JSON", piece.get("function") or {})
            if "name" in function:
                function["name"] = text_or_none(function["name"])
            if call_id := text_or_none(piece.pop("id", None)):
                at = self._ids.get(call_id)
            else:
                at = self._at.get(given, self._count - 1 if given is None and not function.get("name") else None)
            if at is None or at < 0 or (not call_id and at in self._without_id and function.get("name")):
                at = self._open(piece, call_id, function)
            else:
                piece.pop("type", None)
                function.pop("name", None)
            self._at[given] = piece["index"] = at
            if not isinstance(function.get("arguments", ""), str):
                function["arguments"] = _arguments(function["arguments"])

    def _open(self, piece: JSON, call_id: str | None, function: JSON) -> int:
        at = self._count
        self._count += 1
        if not call_id:
            self._without_id.add(at)
        piece["id"] = call_id = call_id or new_id()
        self._ids[call_id] = at
        if not piece.get("type"):
            piece["type"] = "function"
        if piece["type"] == "function":
            piece["function"] = function
            function.setdefault("name", "")
            function.setdefault("arguments", "")
        return at


class ChatStream:
    """Chat chunks. What an ordinary chunk costs is a handful of look-ups; the rest is paid by those who need it."""

    def __init__(self, row: Provider) -> None:
        self._row = row
        self._calls: dict[Any, ToolCalls] = {}

    def __call__(self, event: str | None, data: JSON) -> list[Piece]:
        usage = head(event, data, self._row)
        choices: list[JSON] | None = data.get("choices")
        if not choices:
            return ending(data, usage)
        for choice in choices:
            if type(choice.get("index")) is not int:
                choice["index"] = place_of(choice, 0)
            message: JSON | None = choice.pop("message", None)  # Perplexity: all the text until now, again
            delta: JSON | None = choice.get("delta")
            if delta is None:
                delta = choice["delta"] = message or dict[str, Any]()
            if calls := tidy(delta):
                self._calls.setdefault(choice["index"], ToolCalls()).fix(calls)
            if (word := choice.get("finish_reason")) or "native_finish_reason" in choice:
                finish(choice, word)
        return [Piece(data, usage)]


class TextStream:
    """Legacy completion chunks."""

    def __init__(self, row: Provider) -> None:
        self._row = row

    def __call__(self, event: str | None, data: JSON) -> list[Piece]:
        usage = head(event, data, self._row)
        if not data.get("choices"):
            return ending(data, usage)
        data["choices"] = [_text_choice(choice, 0) for choice in data["choices"]]
        return [Piece(data, usage)]


def head(event: str | None, data: JSON, row: Provider) -> Usage | None:
    """Take off what is not the caller's; the usage, wherever it stands. Raises ProviderError for an error."""
    if event == "error" or data.get("error"):
        raise refusals.in_answer(data)
    for leak in LEAKS:
        data.pop(leak, None)
    raw = data.pop("usage", None)
    if "x_groq" in data:  # https://console.groq.com/docs/api-reference
        extra: JSON = data.pop("x_groq") or {}
        if extra.get("error"):
            raise refusals.in_answer(extra)
        raw = raw or extra.get("usage")
    if choices := data.get("choices"):
        first = object_of(choices[0])
        if first.get("error"):
            raise refusals.in_answer(first)
        if raw is None and "usage" in first:  # Moonshot's older models
            raw = first.pop("usage")
    return ledger(raw, row) if raw else None


def ending(data: JSON, usage: Usage | None) -> list[Piece]:
    """A chunk without choices: the usage, or nothing (Azure's verdict on the prompt), or an error in disguise."""
    if refusals.is_refusal(data):
        raise refusals.in_answer(data)
    data["choices"] = []
    return [Piece(data, usage)] if usage else []


def tidy(said: JSON) -> list[JSON] | None:
    """One text, one reasoning text, no empty fields, in a message or a delta; returns the tool calls, if any.

    Raises TypeError for what must be text, and is none."""
    if type(content := said.get("content")) is list:
        _join(said, cast("list[JSON]", content))
    elif type(content) is not str:
        text_or_none(content)
    if "refusal" in said:
        text_or_none(said["refusal"])
    if "reasoning" in said:
        reasoning = said.pop("reasoning")
        if reasoning and not said.get("reasoning_content"):
            said["reasoning_content"] = reasoning
    if "reasoning_content" in said and not isinstance(said["reasoning_content"], str):
        del said["reasoning_content"]
    if "tool_calls" in said and not said["tool_calls"]:
        del said["tool_calls"]
    return said.get("tool_calls")


def _join(said: JSON, parts: list[JSON]) -> None:
    """Mistral's parts: https://docs.mistral.ai/capabilities/reasoning."""
    said["content"] = "".join(part["text"] for part in parts if part.get("type") == "text" and part.get("text"))
    if thoughts := "".join(_thought(part["thinking"]) for part in parts if part.get("type") == "thinking"):
        said["reasoning_content"] = thoughts


def _thought(thinking: Any) -> str:
    return thinking if isinstance(thinking, str) else "".join(part.get("text") or "" for part in thinking or ())


def finish(choice: JSON, word: str | None) -> None:
    """OpenAI's finish reason, and the provider's own word where it is another. Raises ProviderError for a failure."""
    native = choice.pop("native_finish_reason", None) or word
    if not word:
        return
    if word in FAILURES:
        raise ProviderError(FAILURES[word], "The provider broke its answer off.", ambiguous=True)
    choice["finish_reason"] = reason = word if word in FINISHES else FINISH_WORDS.get(word, "stop")
    if native != reason:
        choice["native_finish_reason"] = native


def place_of(choice: JSON, place: int) -> int:
    """Its index; its place where it says none. Raises TypeError for what is no index."""
    index: Any = choice.get("index")
    if index is None:
        return place
    if type(index) is not int:
        raise TypeError(index)
    return index


def _text_choice(choice: JSON, place: int) -> JSON:
    choice["index"] = place_of(choice, place)
    finish(choice, choice.get("finish_reason"))
    return text_choice(choice, text_or_none(choice.get("text")), choice.get("logprobs"))


def text_choice(choice: JSON, text: str | None, logprobs: Any) -> JSON:
    """https://platform.openai.com/docs/api-reference/completions/object"""
    kept = {name: choice[name] for name in ("native_finish_reason", "content_filter_results") if name in choice}
    return {
        "index": choice.get("index", 0),
        "text": text or "",
        "logprobs": logprobs,
        "finish_reason": choice.get("finish_reason"),
        **kept,
    }


def chat(body: JSON, row: Provider) -> Piece:
    """A whole chat answer."""
    usage = _whole(body, row)
    for place, choice in enumerate(body["choices"]):
        choice["index"] = place_of(choice, place)
        if not choice.get("message"):
            if not choice.get("finish_reason"):
                raise ProviderError("empty", EMPTY, ambiguous=True)
            choice["message"] = {"role": "assistant"}  # Azure, where its filter caught the answer
        message: JSON = choice["message"]
        choice.pop("delta", None)  # Perplexity
        message.setdefault("content", None)
        for call in tidy(message) or ():
            call.pop("index", None)
            call["id"] = text_or_none(call.get("id")) or new_id()
            call["type"] = call.get("type") or "function"
            function: JSON | None = call.get("function")
            if function is not None:
                function["name"] = text_or_none(function.get("name")) or ""
                if not isinstance(function.get("arguments"), str):
                    function["arguments"] = _arguments(function.get("arguments"))
        finish(choice, choice.get("finish_reason"))
    return Piece(body, usage)


def text(body: JSON, row: Provider) -> Piece:
    """A whole legacy completion."""
    usage = _whole(body, row)
    body["choices"] = [_text_choice(choice, place) for place, choice in enumerate(body["choices"])]
    return Piece(body, usage)


def embeddings(body: JSON, row: Provider, *, as_base64: bool) -> Piece:
    """Vectors in the encoding that the caller asked for, whichever the provider sent: little-endian float32."""
    usage = head(None, body, row)
    if not body.get("data"):
        _empty(body)
    for item in body["data"]:
        vector: str | list[float] = item["embedding"]
        if as_base64 and isinstance(vector, list):
            item["embedding"] = base64.b64encode(_swapped(array("f", vector)).tobytes()).decode()
        elif not as_base64 and isinstance(vector, str):
            item["embedding"] = _swapped(array("f", base64.b64decode(vector))).tolist()
    return Piece(body, usage)


def _swapped(floats: array[float]) -> array[float]:
    if byteorder == "big":
        floats.byteswap()
    return floats


def _whole(body: JSON, row: Provider) -> Usage | None:
    usage = head(None, body, row)
    if not body.get("choices"):
        _empty(body)
    return usage


def _empty(body: JSON) -> None:
    if refusals.is_refusal(body) or body.get("message"):
        raise refusals.in_answer(body)
    raise ProviderError("empty", EMPTY, ambiguous=True)


def _arguments(value: Any) -> str:
    """Arguments are JSON in a string, also where a server sends the object itself."""
    return "" if value is None else orjson.dumps(value).decode()


def new_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def ledger(raw: Any, row: Provider) -> Usage | None:
    """The five kinds of token, by the provider's own rule; None where its numbers cannot be trusted."""
    raw = object_of(raw)
    total, prompt = _count(raw.get("total_tokens")), _count(raw.get("prompt_tokens"))
    output = _count(raw.get("completion_tokens", 0))  # embeddings have none
    if prompt is None or output is None:
        return None
    inputs, outputs = object_of(raw.get("prompt_tokens_details")), object_of(raw.get("completion_tokens_details"))
    cached = _first(inputs.get("cached_tokens"), raw.get("prompt_cache_hit_tokens"), raw.get("num_cached_tokens"))
    read = min(cached, prompt)  # Grok on Azure counts cached tokens that it does not charge
    written = min(_first(inputs.get("cache_write_tokens")), prompt - read)
    reasoning = _first(outputs.get("reasoning_tokens"), raw.get("reasoning_tokens"))
    if reasoning and (total == prompt + output + reasoning or (row.reasoning_on_top and total != prompt + output)):
        output += reasoning
    return Usage(
        input=prompt - read - written,
        cache_read=read,
        cache_write=written,
        output=output,
        reasoning=min(reasoning, output),
        cost=_cost(raw, row),
        details=_details(prompt=inputs, completion=outputs),
    )


def _details(**sides: JSON) -> JSON:
    """The further counts, such as audio tokens; those of the ledger are left out."""
    known = ("cached_tokens", "cache_write_tokens", "reasoning_tokens")
    found = {
        side: {name: count for name, count in counts.items() if name not in known and _count(count) is not None}
        for side, counts in sides.items()
    }
    return {side: counts for side, counts in found.items() if counts}


def _cost(raw: JSON, row: Provider) -> int | None:
    """What the provider itself says that it charges, in nano-dollars."""
    if row.cost is None:
        return None
    value: Any = raw
    for step in row.cost.path.split("."):
        value = object_of(value).get(step)
    dollars = _amount(value)
    if dollars is None:
        return None
    if raw.get("is_byok") is True:  # OpenRouter charges its fee, and the provider behind it bills our own account there
        dollars += _amount(object_of(raw.get("cost_details")).get("upstream_inference_cost")) or 0
    return round(dollars * 1_000_000_000 / row.cost.per_usd)


def _amount(value: Any) -> Decimal | None:
    amount = Decimal(str(value)) if type(value) is int or type(value) is float else Decimal("NaN")
    return amount if amount.is_finite() and 0 <= amount < MAX_TOKENS else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < MAX_TOKENS else None


def _first(*values: Any) -> int:
    return next((count for count in map(_count, values) if count is not None), 0)
