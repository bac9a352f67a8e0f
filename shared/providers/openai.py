"""OpenAI's own wire format, and everybody's who speaks it; how each differs is its row in providers.toml.

https://platform.openai.com/docs/api-reference/chat, …/completions and …/embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import orjson

from shared.catalog import Deployment
from shared.config import Provider
from shared.errors import ProviderError
from shared.providers import answers, refusals
from shared.providers.conversation import CallIds
from shared.providers.dialect import Outgoing, Piece, Translate
from shared.providers.parameters import ours, refuse, told, unsupported
from shared.providers.through_chat import ThroughChat
from shared.schema import JSON, Call
from shared.sse import Decoder

INPUTS = {"completions": "prompt", "embeddings": "input"}
PATHS = {"chat": "/chat/completions", "completions": "/completions", "embeddings": "/embeddings"}
JSON_BODY = {"content-type": "application/json"}
PUT_TOGETHER = ("index", "parsed", "parsed_arguments")
"""https://github.com/openai/openai-python: fields of its own streamed and parsed messages, which the API refuses."""
SAID_OTHERWISE = ("reasoning_content", "reasoning", *PUT_TOGETHER)
CACHE_POINTS = ("cache_control", "prompt_cache_breakpoint")
"""What `strips` takes from the parts of a message, too: Anthropic's, and OpenAI's own."""


class OpenAIDialect:
    """Everything is decided by the row; nothing is kept between calls."""

    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        row = to.provider
        _refuse(call, to)
        body, dropped = _body(call, to)
        if call.surface == "embeddings":
            if row.base64:
                body["encoding_format"] = call.body.get("encoding_format") or "float"
        else:
            _limit_output(body, row, call.max_tokens or max_tokens, chat=call.surface == "chat")
            if call.stream:
                _ask_for_usage(body, row)
        if "messages" in body:
            ids = CallIds(row.tool_ids) if row.tool_ids else None
            body["messages"] = [_message(message, row, ids) for message in body["messages"]]
        if isinstance(choice := body.get("tool_choice"), str):
            body["tool_choice"] = row.tool_choice.get(choice, choice)
        return Outgoing(
            row.base_url + PATHS[call.surface], {**JSON_BODY, **row.credentials}, orjson.dumps(body), dropped
        )

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        match call.surface:
            case "embeddings":
                asked = call.body.get("encoding_format")
                return answers.embeddings(body, to.provider, as_base64=asked == "base64")
            case "completions":
                return answers.text(body, to.provider)
            case "chat":
                return answers.chat(body, to.provider)

    def stream(self, call: Call, to: Deployment) -> Translate:
        return answers.ChatStream(to.provider) if call.surface == "chat" else answers.TextStream(to.provider)

    def decoder(self) -> Decoder:
        return Decoder()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        return refusals.failure(status, headers, content)


DIALECT = ThroughChat(OpenAIDialect())


def _refuse(call: Call, to: Deployment) -> None:
    """Raise UnsupportedParameter for what would change the meaning if it were left out."""
    if (name := INPUTS.get(call.surface)) and not to.provider.token_ids:
        given: str | list[Any] = call.body[name]
        if isinstance(given, list) and not isinstance(given[0], str):
            raise unsupported(to, name, "takes text, not token ids")
    refuse(call, to)


def _body(call: Call, to: Deployment) -> tuple[JSON, tuple[str, ...]]:
    """The caller's parameters under the provider's names, without ours and without nulls; and what was dropped."""
    row, given = to.provider, call.body
    own, drops = ours(call, to), row.dropped(to.model)
    dropped = {name for name in drops if given.get(name) is not None}
    if "name" in row.strips and any(map(_is_named, given.get("messages") or ())):
        dropped.add("messages.name")
    body: JSON = dict(row.defaults) if call.surface != "embeddings" else {}
    for name, value in given.items():
        if value is not None and name not in own and name not in drops:
            body[row.renames.get(name, name)] = value
    body["model"] = to.model
    if wish := body.get("provider"):
        body["provider"] = _preferences(wish, row)
    if not row.base64:
        body.pop("encoding_format", None)
    return body, told(sorted(dropped), call, to)


def _is_named(message: JSON) -> bool:
    """As one of several who speak; a tool's name is known from its call."""
    return bool(message.get("name")) and message["role"] not in ("tool", "function")


def _preferences(wish: JSON, row: Provider) -> JSON:
    """OpenRouter's own, https://openrouter.ai/docs/features/provider-routing, without what only we understand."""
    sent = dict(wish)
    for name in ("order", "only", "ignore"):
        if sent.get(name):
            sent[name] = [each for each in sent[name] if each.lower() != row.name]
    if sent.get("sort") in ("local", "remote", "round_robin", "priority"):
        del sent["sort"]
    return sent


def _limit_output(body: JSON, row: Provider, bound: int | None, *, chat: bool) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body.pop(name, None)
    if bound is not None:
        body[row.output_limit if chat else "max_tokens"] = bound


def _ask_for_usage(body: JSON, row: Provider) -> None:
    """Always: the books need it. Whether the caller sees it is the gateway's business."""
    options: JSON = {**(body.pop("stream_options", None) or {}), "include_usage": True}
    if row.obfuscation:
        options["include_obfuscation"] = False  # half the bytes of a stream
    if row.stream_options:
        body["stream_options"] = options


def _message(message: JSON, row: Provider, ids: CallIds | None) -> JSON:
    """Clients echo an assistant's message back whole: nulls, empty lists, annotations, reasoning and all."""
    sent: JSON = {
        name: value
        for name, value in message.items()
        if (value is not None or name == "content") and name not in row.strips and name not in SAID_OTHERWISE
    }
    if row.echoes_reasoning and sent["role"] == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning") or row.unknown_reasoning
        sent |= {row.echoes_reasoning: reasoning} if reasoning else {}
    if isinstance(sent.get("content"), list):
        sent["content"] = [_part(part, row) for part in cast("list[JSON]", sent["content"])]
    if sent.get("tool_calls") == []:
        del sent["tool_calls"]
    if sent["role"] == "developer" and not row.developer:
        sent["role"] = "system"
    if calls := sent.get("tool_calls"):
        sent["tool_calls"] = [_call(call, row, ids) for call in calls]
    if ids and "tool_call_id" in sent:
        sent["tool_call_id"] = ids.of_result(sent["tool_call_id"])
    return sent


def _call(call: JSON, row: Provider, ids: CallIds | None) -> JSON:
    """Without what the stock client adds where it puts a stream together."""
    sent = {name: value for name, value in call.items() if name not in row.strips and name not in PUT_TOGETHER}
    if ids:
        sent["id"] = ids.of_call(call["id"])
    if call.get("function"):
        sent["function"] = {name: value for name, value in call["function"].items() if name not in PUT_TOGETHER}
    return sent


def _part(part: JSON, row: Provider) -> JSON:
    match part:
        case {"type": "input_audio", "input_audio": {"data": data}} if row.bare_audio:
            return {**part, "input_audio": data}
        case {"type": "file", "file": {"file_data": str(data), **more}} if row.file_urls:
            url = data.partition(";base64,")[2] or data
            return {"type": "file_url", "file_url": {"url": url}} | (
                {"file_name": more["filename"]} if more.get("filename") else {}
            )
        case _:
            return {name: value for name, value in part.items() if name not in CACHE_POINTS or name not in row.strips}
