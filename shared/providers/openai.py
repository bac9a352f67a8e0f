"""OpenAI's own wire format, and everybody's who speaks it; how each differs is its row in providers.toml.

https://platform.openai.com/docs/api-reference/chat, …/completions and …/embeddings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, cast

import orjson

from shared.catalog import Deployment
from shared.config import Provider
from shared.errors import ProviderError
from shared.providers import answers, refusals
from shared.providers.dialect import Outgoing, Piece, Translate, guarded
from shared.providers.parameters import ours, refuse, told, unsupported
from shared.schema import JSON, Call
from shared.sse import Decoder

INPUTS = {"completions": "prompt", "embeddings": "input"}
PATHS = {"chat": "/chat/completions", "completions": "/completions", "embeddings": "/embeddings"}
JSON_BODY = {"content-type": "application/json"}
REASONING = ("reasoning_content", "reasoning")
CACHE_POINTS = ("cache_control", "prompt_cache_breakpoint")
"""What `strips` takes from the parts of a message, too: Anthropic's, and OpenAI's own."""
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class OpenAIDialect:
    """Everything is decided by the row; nothing is kept between calls."""

    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        row, through_chat = to.provider, _through_chat(call, to)
        _refuse(call, to, through_chat)
        body, dropped = _body(call, to, through_chat)
        if call.surface == "embeddings":
            if row.base64:
                body["encoding_format"] = call.body.get("encoding_format") or "float"
        else:
            _limit_output(body, row, call.max_tokens or max_tokens, chat=call.surface == "chat" or through_chat)
            if call.stream:
                _ask_for_usage(body, row)
        if "messages" in body:
            body["messages"] = [_message(message, row) for message in body["messages"]]
        if isinstance(choice := body.get("tool_choice"), str):
            body["tool_choice"] = row.tool_choice.get(choice, choice)
        path = PATHS["chat" if through_chat else call.surface]
        return Outgoing(row.base_url + path, {**JSON_BODY, **row.credentials}, orjson.dumps(body), dropped)

    @guarded
    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        match call.surface:
            case "embeddings":
                asked = call.body.get("encoding_format")
                return answers.embeddings(body, to.provider, as_base64=asked == "base64")
            case "completions":
                return answers.text(body, to.provider, through_chat=_through_chat(call, to))
            case "chat":
                return answers.chat(body, to.provider)

    def stream(self, call: Call, to: Deployment) -> Translate:
        row = to.provider
        if call.surface == "chat":
            return guarded(answers.ChatStream(row))
        return guarded(answers.TextStream(row, chat=_through_chat(call, to)))

    def decoder(self) -> Decoder:
        return Decoder()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        return refusals.failure(status, headers, content)


DIALECT = OpenAIDialect()


def _through_chat(call: Call, to: Deployment) -> bool:
    return call.surface == "completions" and not to.provider.has("completions", to.model)


def _refuse(call: Call, to: Deployment, through_chat: bool) -> None:
    """Raise UnsupportedParameter for what would change the meaning if it were left out."""
    row, body = to.provider, call.body
    if call.surface == "embeddings" and not row.has("embeddings", to.model):
        raise unsupported(to, "model", "makes no embeddings")
    if name := INPUTS.get(call.surface):
        _refuse_input(to, name, body[name], through_chat)
    lacking = {name for name in ("suffix", "echo") if through_chat and body.get(name)}
    if through_chat and (body.get("best_of") or 1) > (body.get("n") or 1):
        lacking.add("best_of")
    refuse(call, to, lacking)


def _refuse_input(to: Deployment, name: str, given: str | list[Any] | None, through_chat: bool) -> None:
    if not isinstance(given, list):
        return
    if not isinstance(given[0], str) and (through_chat or not to.provider.token_ids):
        raise unsupported(to, name, "takes text, not token ids")
    if through_chat and len(given) != 1:
        raise unsupported(to, name, "takes one prompt at a time")


def _body(call: Call, to: Deployment, through_chat: bool) -> tuple[JSON, tuple[str, ...]]:
    """The caller's parameters under the provider's names, without ours and without nulls; and what was dropped."""
    row, given = to.provider, call.body
    own, drops = ours(call, to), row.dropped(to.model)
    if through_chat:
        drops.add("logprobs")  # chat's have another shape
    dropped = {name for name in drops if given.get(name) is not None}
    body: JSON = dict(row.defaults) if call.surface != "embeddings" else {}
    for name, value in given.items():
        if value is not None and name not in own and name not in drops:
            body[row.renames.get(name, name)] = value
    body["model"] = to.model
    if wish := body.get("provider"):
        body["provider"] = _preferences(wish, row)
    if not row.base64:
        body.pop("encoding_format", None)
    if through_chat:
        prompt = body.pop("prompt")
        body["messages"] = [{"role": "user", "content": prompt if isinstance(prompt, str) else prompt[0]}]
        for name in ("best_of", "echo", "suffix"):
            body.pop(name, None)
    return body, told(sorted(dropped), call, to)


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


def _message(message: JSON, row: Provider) -> JSON:
    """Clients echo an assistant's message back whole: nulls, empty lists, annotations, reasoning and all."""
    sent: JSON = {
        name: value
        for name, value in message.items()
        if (value is not None or name == "content") and name not in row.strips and name not in REASONING
    }
    if row.echoes_reasoning and (reasoning := message.get("reasoning_content") or message.get("reasoning")):
        sent[row.echoes_reasoning] = reasoning
    if isinstance(sent.get("content"), list):
        sent["content"] = [_part(part, row) for part in cast("list[JSON]", sent["content"])]
    if sent.get("tool_calls") == []:
        del sent["tool_calls"]
    if sent["role"] == "developer" and not row.developer:
        sent["role"] = "system"
    if "extra_content" in row.strips and any("extra_content" in call for call in sent.get("tool_calls") or ()):
        sent["tool_calls"] = [
            {name: value for name, value in call.items() if name != "extra_content"} for call in sent["tool_calls"]
        ]
    if length := row.tool_id_length:
        if calls := sent.get("tool_calls"):
            sent["tool_calls"] = [{**call, "id": _short_id(call["id"], length)} for call in calls]
        if call_id := sent.get("tool_call_id"):
            sent["tool_call_id"] = _short_id(call_id, length)
    return sent


def _part(part: JSON, row: Provider) -> JSON:
    match part:
        case {"type": "input_audio", "input_audio": {"data": data}} if row.bare_audio:
            return {**part, "input_audio": data}
        case _:
            return {name: value for name, value in part.items() if name not in CACHE_POINTS or name not in row.strips}


def _short_id(call_id: str, length: int) -> str:
    """The same for the call and its result, also in a history that another provider made."""
    if re.fullmatch(rf"[A-Za-z0-9]{{{length}}}", call_id):
        return call_id
    digest = hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=length).digest()
    return "".join(BASE62[byte % 62] for byte in digest)
