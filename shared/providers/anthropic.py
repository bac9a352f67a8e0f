"""Anthropic's Messages: https://platform.claude.com/docs/en/api/messages and …/build-with-claude/streaming."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import orjson

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers import answers, refusals
from shared.providers.conversation import CallIds, as_claude_wants, function_of, heard, in_turns
from shared.providers.dialect import END, Outgoing, Piece, Translate
from shared.providers.parameters import Parameters, refuse, unsupported
from shared.providers.parts import data_uri, kind_of
from shared.providers.pieces import count_of, delta, more_arguments, object_of, text_of, tool_call
from shared.providers.schemas import held, held_tool
from shared.providers.thinking import Place, Thought, signed, stretches, think
from shared.providers.through_chat import ThroughChat
from shared.schema import JSON, Call, Usage
from shared.sse import Decoder

HEADERS = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
MAX_TOKENS = 4096
"""Where nobody says how much: the API demands a bound."""
PARTS = {
    "system": {"text"},
    "developer": {"text"},
    "user": {"text", "image_url", "file", "document", "search_result", "container_upload"},
    "assistant": {"text", "refusal"},
    "tool": {"text", "image_url", "file", "document", "search_result"},
}
"""Which parts a message may have, by its role; the last three are Anthropic's own."""
ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}
THOUGHTS = ("thinking", "redacted_thinking")
IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
TOOL_CHOICES = {"auto": "auto", "required": "any", "none": "none"}
SERVICE_TIERS = {"auto": "auto", "default": "standard_only", "standard_only": "standard_only"}
NO_PARAMETERS: JSON = {"properties": {}, "additionalProperties": False}
OWN_TOOL = re.compile(r"[a-z0-9_]+_20\d{6}")
"""`web_search_20260318`: https://platform.claude.com/docs/en/agents-and-tools/tool-use/tool-reference"""
OPAQUE = re.compile(r"(?=.*[A-Za-z])[\w.:-]{1,256}", re.ASCII)
"""A user id that is no mail address or telephone number, which are refused."""


class AnthropicDialect:
    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        refuse(call, to)
        parameters = Parameters(call, to)
        body = _body(call, parameters, to, call.max_tokens or max_tokens or to.max_output or MAX_TOKENS)
        content = orjson.dumps({name: value for name, value in body.items() if value is not None})
        headers = {**HEADERS, **to.provider.credentials}
        return Outgoing(to.provider.base_url + "/messages", headers, content, parameters.dropped())

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        if refusals.is_refusal(body):
            raise refusals.in_answer(body)
        choice: JSON = {"index": 0, "message": _message(body, to)}
        answers.finish(choice, text_of(body["stop_reason"]))
        return Piece({"choices": [choice]}, _usage(object_of(body.get("usage"))))

    def stream(self, call: Call, to: Deployment) -> Translate:
        return _Stream(to)

    def decoder(self) -> Decoder:
        return Decoder()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        return refusals.failure(status, headers, content)


DIALECT = ThroughChat(AnthropicDialect())


# What is sent


def _body(call: Call, parameters: Parameters, to: Deployment, max_tokens: int) -> JSON:
    tools, choice = _tools(parameters, to)
    thought = _thought(call, parameters, to, max_tokens, forced=bool(choice) and choice["type"] in ("any", "tool"))
    system, turns = _conversation(call.body["messages"], parameters, to, thought)
    return {
        "model": to.model,
        "max_tokens": max_tokens,
        "tools": tools or None,
        "tool_choice": choice,
        "system": system or None,
        "messages": turns,
        "stream": call.stream or None,
        **_sampling(parameters, thought),
        "stop_sequences": parameters.stops(blank=False) or None,
        "thinking": thought.thinking,
        "output_config": _output(parameters, to, thought),
        "metadata": _metadata(parameters),
        "service_tier": _service_tier(parameters),
        "cache_control": parameters.take("cache_control"),
    }


def _thought(call: Call, parameters: Parameters, to: Deployment, max_tokens: int, *, forced: bool) -> Thought:
    """Anthropic's own `thinking` goes as it is; else what the caller says in OpenAI's or OpenRouter's words."""
    match call.body.get("thinking"):
        case {"type": "enabled", "budget_tokens": int()} | {"type": "adaptive" | "between_tools"}:
            return Thought(parameters.take("thinking"), None, on=True)
        case {"type": "disabled"}:
            return Thought(parameters.take("thinking"), None, on=False)
        case _:
            pass  # another provider's
    return think(call, parameters, to, max_tokens, forced=forced)


def _sampling(parameters: Parameters, thought: Thought) -> JSON:
    """One of `temperature` and `top_p`, as newer models refuse both together, and none where Claude thinks.

    A temperature over 1 is cut, as Anthropic's own https://platform.claude.com/docs/en/api/openai-sdk does."""
    if thought.on:
        return {}
    temperature = parameters.within("temperature", 0, 1)
    top_p = parameters.take("top_p") if temperature is None else None
    return {"temperature": temperature, "top_p": top_p, "top_k": parameters.take("top_k")}


def _output(parameters: Parameters, to: Deployment, thought: Thought) -> JSON | None:
    """https://platform.claude.com/docs/en/build-with-claude/structured-outputs"""
    config: JSON = {"effort": thought.effort} if thought.effort else {}
    if asked := parameters.schema(to):
        config["format"] = {
            "type": "json_schema",
            "schema": held(asked["schema"], "response_format.json_schema", parameters, to),
        }
    return config or None


def _metadata(parameters: Parameters) -> JSON | None:
    """Who the user is stays the caller's secret, where it is one."""
    safety, user = parameters.take("safety_identifier"), parameters.take("user")
    if user and safety not in (None, user):
        parameters.keep_back("safety_identifier")  # there is room for one
    if not (user := user or safety):
        return None
    named = OPAQUE.fullmatch(user := str(user))
    return {"user_id": user if named else hashlib.blake2b(user.encode("utf-8", "replace"), digest_size=16).hexdigest()}


def _service_tier(parameters: Parameters) -> str | None:
    tier = SERVICE_TIERS.get(parameters.take("service_tier") or "")
    if tier is None:
        parameters.keep_back("service_tier")
    return tier


def _tools(parameters: Parameters, to: Deployment) -> tuple[list[JSON], JSON | None]:
    tools = [_tool(tool, parameters, to) for tool in parameters.take("tools") or ()]
    parallel: bool | None = parameters.take("parallel_tool_calls")
    match parameters.take("tool_choice"):
        case None:
            choice: JSON | None = None if parallel is not False else {"type": "auto"}
        case str(mode):
            choice = {"type": TOOL_CHOICES[mode]}
        case {"type": "function", "function": {"name": str(name)}}:
            choice = {"type": "tool", "name": name}
        case _:
            raise unsupported(to, "tool_choice", "takes no 'tool_choice' but a mode or a function")
    if choice and parallel is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    return tools, choice if tools else None


def _tool(tool: JSON, parameters: Parameters, to: Deployment) -> JSON:
    """A function, or one of Anthropic's own tools, as it is."""
    if tool["type"] != "function":
        if OWN_TOOL.fullmatch(tool["type"]):
            return tool
        raise unsupported(to, "tools", "takes no tools but functions and Anthropic's own")
    function: JSON = tool["function"]
    schema: JSON = {"type": "object", **(function.get("parameters") or NO_PARAMETERS)}
    sent: JSON = {
        "name": function["name"],
        "description": function.get("description"),
        "input_schema": held_tool(schema, parameters, to) if function.get("strict") else schema,
        "strict": function.get("strict") or None,
    }
    sent = {name: value for name, value in sent.items() if value is not None}
    return _cached(_cached(sent, function), tool)


def _cached(block: JSON, said: JSON) -> JSON:
    """With the caller's cache point, and its `ttl`: https://platform.claude.com/docs/en/build-with-claude/prompt-caching"""
    control = said.get("cache_control")
    return {**block, "cache_control": control} if isinstance(control, dict) else block


def _conversation(
    messages: list[JSON], parameters: Parameters, to: Deployment, thought: Thought
) -> tuple[list[JSON], list[JSON]]:
    """What the system says, wherever it says it, and the turns of user and assistant, results of tools first."""
    ids = CallIds(to.provider.tool_ids or ".*")
    said = (
        (ROLES.get(message["role"], "user"), _blocks(message, to, thought, ids))
        for message in heard(messages, parameters, to)
    )
    system, turns = in_turns(said, to)
    as_claude_wants(turns, lambda block: block["type"] == "tool_result")
    return system, turns


def _blocks(message: JSON, to: Deployment, thought: Thought, ids: CallIds) -> list[JSON]:
    """With the message's own cache point at its end."""
    *before, last = _spoken(message, to, thought, ids) or [{}]
    return [*before, _cached(last, message)] if last else []


def _spoken(message: JSON, to: Deployment, thought: Thought, ids: CallIds) -> list[JSON]:
    match message:
        case {"role": "function"} | {"role": "assistant", "function_call": dict()}:
            raise unsupported(to, "messages", "does not support 'functions'")
        case {"role": "tool", "tool_call_id": call_id, "content": content}:
            result: JSON = {"type": "tool_result", "tool_use_id": ids.of_result(call_id)}
            return [result | ({"content": blocks} if (blocks := _content(content, "tool", to)) else {})]
        case {"role": "assistant"}:
            said: list[JSON] = []
            for thinking, content, calls in stretches(message, to, reminded=thought.on):
                said += [*thinking, *_content(content, "assistant", to), *(_tool_use(call, to, ids) for call in calls)]
            return said
        case _:
            return _content(message["content"], message["role"], to)


def _content(content: str | list[JSON] | None, role: str, to: Deployment) -> list[JSON]:
    """Without texts that say nothing, which are refused."""
    parts: list[JSON] = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    blocks = (_cached(_block(part, role, to), part) for part in parts)
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def _block(part: JSON, role: str, to: Deployment) -> JSON:
    kind = kind_of(part, role, PARTS, to)
    match part:
        case {"type": "text", "text": text} | {"type": "refusal", "refusal": text}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": url}}:
            return {"type": "image", "source": _image(url, to)}
        case {"type": "file", "file": {"file_data": str(data), **more}}:
            named = {"title": more["filename"]} if more.get("filename") else {}
            return {"type": "document", "source": _document(data, to), **named}
        case {"type": "document" | "search_result" | "container_upload"}:
            return part  # Anthropic's own
        case _:
            raise unsupported(to, "messages", f"does not support this '{kind}'")


def _image(url: str, to: Deployment) -> JSON:
    if url.startswith(("https://", "http://")):
        return {"type": "url", "url": url}
    kind, data = data_uri(url) or ("", "")
    kind = "image/jpeg" if kind == "image/jpg" else kind
    if kind not in IMAGES:
        raise unsupported(to, "messages", f"takes no images but {', '.join(IMAGES)}")
    return {"type": "base64", "media_type": kind, "data": data}


def _document(file: str, to: Deployment) -> JSON:
    """https://platform.claude.com/docs/en/build-with-claude/pdf-support; bare base64 is taken for a PDF's."""
    if file.startswith(("https://", "http://")):
        return {"type": "url", "url": file}
    kind, data = data_uri(file) or ("" if file.startswith("data:") else "application/pdf", file)
    if kind == "application/pdf":
        return {"type": "base64", "media_type": kind, "data": data}
    try:
        if kind.startswith("text/"):
            return {"type": "text", "media_type": "text/plain", "data": base64.b64decode(data).decode()}
    except ValueError:
        pass
    raise unsupported(to, "messages", "takes no files but PDF and text in UTF-8")


def _tool_use(call: JSON, to: Deployment, ids: CallIds) -> JSON:
    name, _, given = function_of(call, to)
    return _cached({"type": "tool_use", "id": ids.of_call(call["id"]), "name": name, "input": given}, call)


# What is answered


def _message(body: JSON, to: Deployment) -> JSON:
    """The texts, the thoughts and the calls; what Anthropic's own tools did is not the caller's."""
    said: JSON = {"role": "assistant", "content": ""}
    blocks: list[JSON] = body["content"]
    annotations: list[JSON] = []
    uses: list[JSON] = []
    thinking: list[tuple[Place, JSON]] = []
    for block in blocks:
        start = len(said["content"])
        if block["type"] == "text":
            said["content"] += block["text"]
            annotations += _annotations(block.get("citations"), start, len(said["content"]))
        elif block["type"] == "tool_use":
            uses.append(block)
        elif block["type"] in THOUGHTS:
            thinking.append(((start, len(uses)), block))
    end = len(said["content"]), len(uses)
    said["content"] = said["content"] or (None if uses else "")
    if text := "".join(text_of(block["thinking"]) for _, block in thinking if block["type"] == "thinking"):
        said["reasoning_content"] = text
    if uses:
        said["tool_calls"] = [
            tool_call(block["id"], block["name"], orjson.dumps(block["input"]).decode()) for block in uses
        ]
    if annotations:
        said["annotations"] = annotations
    if explanation := _explanation(body):
        said["refusal"] = explanation
    if thinking:
        said["extra_content"] = signed(thinking, end, to)
    return said


def _explanation(said: JSON) -> str:
    """Why it refuses: https://platform.claude.com/docs/en/build-with-claude/handling-stop-reasons"""
    return text_of(object_of(said.get("stop_details")).get("explanation") or "")


def _annotations(citations: list[JSON] | None, start: int, end: int) -> list[JSON]:
    """Those that name a page on the web, in OpenAI's shape: https://platform.claude.com/docs/en/build-with-claude/citations"""
    return [
        {
            "type": "url_citation",
            "url_citation": {"url": url, "title": cited.get("title") or "", "start_index": start, "end_index": end},
        }
        for cited in citations or ()
        if isinstance(url := cited.get("url"), str)
    ]


class _Stream:
    """What each event brings; unknown ones, and unknown blocks, are none of the caller's.

    An open block is kept under its index, as it stands until now: a text with its `start` in the whole, a call with its
    index `at` among the calls and whether its arguments were `told`."""

    def __init__(self, to: Deployment) -> None:
        self._to = to
        self._open: dict[int, JSON] = {}
        self._calls = 0
        self._length = 0
        self._thoughts: list[tuple[Place, JSON]] = []
        self._counts: JSON = {}

    def __call__(self, event: str | None, data: JSON) -> list[Piece]:
        match data.get("type"):
            case "content_block_delta":
                return self._more(self._open[data["index"]], data["delta"])
            case "message_start":
                self._count(data["message"].get("usage"))
                return []
            case "content_block_start":
                self._open[data["index"]] = block = data["content_block"]
                return self._begun(block)
            case "content_block_stop":
                return self._ended(self._open.pop(data["index"]))
            case "message_delta":
                self._count(data.get("usage"))
                return self._finish(data["delta"])
            case "message_stop":
                return [END]
            case _ if refusals.is_refusal(data):
                raise refusals.in_answer(data)
            case _:
                return []

    def _begun(self, block: JSON) -> list[Piece]:
        match block["type"]:
            case "text":
                block["start"] = self._length
                return self._said(text_of(block["text"]))
            case "thinking":
                return delta(reasoning_content=text_of(block["thinking"]))
            case "tool_use":
                block |= {"at": self._calls, "told": False}
                self._calls += 1
                return delta(tool_calls=[{"index": block["at"], **tool_call(block["id"], block["name"], "")}])
            case _:
                return []

    def _more(self, block: JSON, said: JSON) -> list[Piece]:
        match said["type"]:
            case "text_delta":
                return self._said(text_of(said["text"]))
            case "input_json_delta" if block["type"] == "tool_use":
                return more_arguments(block, text_of(said["partial_json"]))
            case "thinking_delta":
                block["thinking"] += said["thinking"]
                return delta(reasoning_content=said["thinking"])
            case "signature_delta":
                block["signature"] = text_of(block.get("signature")) + said["signature"]
                return []
            case "citations_delta":
                block["citations"] = [*(block.get("citations") or ()), said["citation"]]
                return []
            case _:
                return []

    def _ended(self, block: JSON) -> list[Piece]:
        match block:
            case {"type": "tool_use", "told": False}:  # no arguments, or all at the start
                return more_arguments(block, orjson.dumps(block["input"]).decode())
            case {"type": "thinking" | "redacted_thinking"}:
                self._thoughts.append(((self._length, self._calls), block))
                return []
            case {"type": "text", "citations": [*citations]}:
                return delta(annotations=_annotations(citations, block["start"], self._length))
            case _:
                return []

    def _said(self, text: str) -> list[Piece]:
        self._length += len(text)
        return delta(content=text)

    def _finish(self, said: JSON) -> list[Piece]:
        usage = _usage(self._counts)
        if not (word := said["stop_reason"]):
            return [Piece({"choices": []}, usage)]
        kept = signed(self._thoughts, (self._length, self._calls), self._to) if self._thoughts else None
        choice: JSON = {"index": 0, "delta": {}}
        answers.finish(choice, text_of(word))
        return [
            *delta(refusal=_explanation(said)),
            *delta(extra_content=kept),
            Piece({"choices": [choice]}, usage),
        ]

    def _count(self, usage: Any) -> None:
        """The last number of each kind holds: they are sums already."""
        self._counts |= {name: count for name, count in object_of(usage).items() if count is not None}


def _usage(counts: JSON) -> Usage | None:
    """https://platform.claude.com/docs/en/build-with-claude/prompt-caching: the input is counted without the cache."""
    if "input_tokens" not in counts or "output_tokens" not in counts:
        return None
    written = count_of(counts, "cache_creation_input_tokens")
    for_an_hour = min(count_of(object_of(counts.get("cache_creation")), "ephemeral_1h_input_tokens"), written)
    output = count_of(counts, "output_tokens")
    return Usage(
        input=count_of(counts, "input_tokens"),
        cache_read=count_of(counts, "cache_read_input_tokens"),
        cache_write=written - for_an_hour,
        cache_write_1h=for_an_hour,
        output=output,
        reasoning=min(count_of(object_of(counts.get("output_tokens_details")), "thinking_tokens"), output),
    )
