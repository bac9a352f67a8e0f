"""Amazon Bedrock's Converse: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html.

Streams are …/API_runtime_ConverseStream.html. One shape for all models; what each family has beyond it goes into
`additionalModelRequestFields`, and which model is of which family stands in the row.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, cast
from urllib.parse import quote

import orjson
from botocore.eventstream import EventStreamBuffer, EventStreamHeaderParser, ParserError  # pyright: ignore[reportMissingTypeStubs] it has no types

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers import answers, refusals
from shared.providers.conversation import CallIds, as_claude_wants, function_of, heard, in_turns
from shared.providers.dialect import END, Decoder, Outgoing, Piece, Translate
from shared.providers.parameters import Parameters, hides_reasoning, refuse, unsupported
from shared.providers.parts import data_uri, kind_of
from shared.providers.pieces import count_of, delta, more_arguments, object_of, text_of, tool_call
from shared.providers.schemas import held, held_tool
from shared.providers.thinking import WAYS, Place, is_signed, level, signed, stretches, think
from shared.providers.through_chat import ThroughChat
from shared.schema import JSON, Call, Usage
from shared.sse import MAX_EVENT, TooLong

OWN = ("guardrailConfig", "performanceConfig", "promptVariables", "requestMetadata")
"""Fields of Converse's own that callers may give as they are."""
FURTHER = "additionalModelRequestFields"
MAX_TOKENS = 16_384
"""Where nobody says how much, and part of it is to be thought with: else it is for Bedrock to say."""
PARTS = {
    "system": {"text"},
    "developer": {"text"},
    "user": {"text", "image_url", "file", "input_audio"},
    "assistant": {"text", "refusal"},
    "tool": {"text", "image_url", "file"},
}
ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}
IMAGES = {f"image/{name}": name for name in ("png", "jpeg", "gif", "webp")} | {"image/jpg": "jpeg"}
OFFICE = "application/vnd.openxmlformats-officedocument."
DOCUMENTS = {
    "application/pdf": "pdf",
    "text/csv": "csv",
    "application/msword": "doc",
    OFFICE + "wordprocessingml.document": "docx",
    "application/vnd.ms-excel": "xls",
    OFFICE + "spreadsheetml.sheet": "xlsx",
    "text/html": "html",
    "text/plain": "txt",
    "text/markdown": "md",
}
SERVICE_TIERS = ("default", "flex", "priority", "reserved")
CALL_IDS = {"claude": r"[a-zA-Z0-9_-]{1,64}", "mistral": r"[a-zA-Z0-9]{9}"}
CALL_ID = r"[a-zA-Z0-9_.:-]{1,64}"
"""https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_ToolUseBlock.html; those two want less."""
FORCED = ("any", "tool")
CACHING = ("claude", "nova", "nova-2")
"""Families that refuse no cache points: https://docs.aws.amazon.com/bedrock/latest/userguide/prompt-caching.html"""


class BedrockDialect:
    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        refuse(call, to)
        row, parameters = to.provider, Parameters(call, to)
        content = orjson.dumps(_body(call, parameters, to, call.max_tokens or max_tokens))
        url = f"{row.base_url}/model/{quote(to.model, safe='')}/converse{'-stream' if call.stream else ''}"
        headers = {"content-type": "application/json", **row.credentials}
        return Outgoing(url, headers, content, parameters.dropped(), None if row.api_key else row.region)

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        message = _message(body["output"]["message"]["content"], to, hidden=hides_reasoning(call))
        choice: JSON = {"index": 0, "message": message}
        answers.finish(choice, text_of(body["stopReason"]))
        return Piece({"choices": [choice]}, _usage(body.get("usage")))

    def stream(self, call: Call, to: Deployment) -> Translate:
        return _Stream(to, hidden=hides_reasoning(call))

    def decoder(self) -> Decoder:
        return EventStream()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        kind = headers.get("x-amzn-errortype", "").partition(":")[0]  # "ThrottlingException:http://internal.amazon…"
        return refusals.failure(status, headers, content, kind)


DIALECT = ThroughChat(BedrockDialect())


MAX_KEPT_HEADERS = 512
"""Bytes of the headers of a frame that are remembered; an ordinary one has 80."""
STATUSES = {"throttlingException": 429, "validationException": 400, "serviceUnavailableException": 503}
"""What the exceptions of a stream would have been before it; the others are failures of the model or the service."""


class _Frames(EventStreamBuffer):
    """botocore's own reader, but the headers of most frames are the same, and are parsed once."""

    def _parse_headers(self) -> Any:
        start, prelude = 12, cast("Any", self)._prelude
        raw = cast("bytes", cast("Any", self)._data[start : prelude.headers_end])
        return _headers(raw) if len(raw) <= MAX_KEPT_HEADERS else _headers.__wrapped__(raw)


@lru_cache(64)
def _headers(raw: bytes) -> Mapping[str, Any]:
    return cast("Any", EventStreamHeaderParser()).parse(raw)


class EventStream:
    """Binary frames with checksums, which are checked: https://smithy.io/2.0/aws/amazon-eventstream.html.

    An exception becomes the event "error", whose data has its name as `type`."""

    def __init__(self) -> None:
        self._frames: Any = _Frames()
        self._size = 0

    def feed(self, piece: bytes, /) -> list[tuple[str | None, bytes]]:
        self._size += len(piece)
        if self._size > MAX_EVENT:
            raise TooLong
        self._frames.add_data(piece)
        try:
            events = [_event(frame.headers, frame.payload) for frame in self._frames]
        except ParserError as wrong:
            raise ProviderError("protocol", "The provider's stream is garbled.", ambiguous=True) from wrong
        if events:
            self._size = len(piece)
        return events


def _event(headers: Mapping[str, Any], payload: bytes) -> tuple[str | None, bytes]:
    match headers.get(":message-type"):
        case "exception":
            kind, message = headers.get(":exception-type"), _told(payload)
        case "error":
            kind, message = headers.get(":error-code"), headers.get(":error-message")
        case _:
            return headers.get(":event-type"), payload
    return "error", orjson.dumps({"type": kind, "message": message, "status_code": STATUSES.get(str(kind), 500)})


def _told(payload: bytes) -> Any:
    """An exception's message; where the model behind it failed, its own."""
    try:
        said = object_of(orjson.loads(payload))
    except orjson.JSONDecodeError:
        return payload.decode("utf-8", "replace")
    return said.get("originalMessage") or said.get("message")


# What is sent


class _Thought(NamedTuple):
    """What is sent as `additionalModelRequestFields`, as `outputConfig.effort` and as the bound of the output.

    `on`: the model may think, be it unasked, and takes no sampling parameters then."""

    fields: JSON
    effort: str | None
    max_tokens: int | None
    on: bool


def _body(call: Call, parameters: Parameters, to: Deployment, max_tokens: int | None) -> JSON:
    family, messages = to.provider.family(to.model), cast("list[JSON]", call.body["messages"])
    tools, choice = _tools(parameters, to, called=list(dict.fromkeys(chain.from_iterable(map(_called, messages)))))
    thought = _thought(call, parameters, to, max_tokens, forced="toolChoice" in tools or choice.get("type") in FORCED)
    system, turns = _conversation(messages, parameters, to, reminded=thought.on or family != "claude")
    own: JSON = parameters.take(FURTHER) if isinstance(call.body.get(FURTHER), dict) else {}
    fields: JSON = {
        **thought.fields,
        **({"tool_choice": choice} if choice else {}),
        **({} if thought.on else _top_k(parameters, family)),
        **(own or {}),
    }
    return _given(
        system=system,
        messages=turns,
        toolConfig=tools,
        inferenceConfig=_inference(parameters, family, thought),
        outputConfig=_output(parameters, to, thought),
        serviceTier=_service_tier(parameters),
        additionalModelRequestFields=fields,
        **{name: parameters.take(name) for name in OWN},
    )


def _given(**fields: Any) -> JSON:
    return {name: value for name, value in fields.items() if value not in (None, [], {})}


def _inference(parameters: Parameters, family: str | None, thought: _Thought) -> JSON:
    """Claude's newer models refuse `temperature` and `top_p` together."""
    temperature = None if thought.on else parameters.within("temperature", 0, 1)
    one = thought.on or (family == "claude" and temperature is not None)
    return _given(
        maxTokens=thought.max_tokens,
        temperature=temperature,
        topP=None if one else parameters.take("top_p"),
        stopSequences=parameters.stops(blank=False),
    )


def _top_k(parameters: Parameters, family: str | None) -> JSON:
    """https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters.html; other families' is not said there."""
    match family:
        case "claude":
            return _given(top_k=parameters.take("top_k"))
        case "nova" | "nova-2":
            return _given(inferenceConfig=_given(topK=parameters.take("top_k")))
        case _:
            return {}


def _thought(call: Call, parameters: Parameters, to: Deployment, max_tokens: int | None, *, forced: bool) -> _Thought:
    """With a budget Claude cannot be forced to call, and must be shown what it thought before the calls now answered:
    https://docs.aws.amazon.com/bedrock/latest/userguide/claude-messages-extended-thinking.html"""
    family = to.provider.family(to.model)
    if family != "claude":
        return _effort(parameters, to, family, max_tokens)
    bound = max_tokens or to.max_output or MAX_TOKENS
    thinking, effort, on = think(call, parameters, to, bound, forced=forced)
    budgeted = thinking is not None and "budget_tokens" in thinking
    return _Thought(_given(thinking=thinking), effort, bound if budgeted else max_tokens, on)


def _effort(parameters: Parameters, to: Deployment, family: str | None, max_tokens: int | None) -> _Thought:
    """What the others are told, in words of their own, of which `level` is the nearest."""
    asked = parameters.reasoning().effort
    none = _Thought({}, None, max_tokens, on=False)
    effort = level(asked, to) if asked and asked != "none" else None
    match family:
        case "gpt" if asked:  # https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters-openai.html
            return none._replace(fields={"reasoning": {"effort": effort or "none"}})
        case "gpt-oss" if effort:
            return none._replace(fields={"reasoning_effort": effort})
        case "qwen" if effort:
            return none._replace(fields={"reasoning_config": effort})
        case "nova-2" if effort:  # https://docs.aws.amazon.com/nova/latest/nova2-userguide/extended-thinking.html
            if effort == "high" and max_tokens:  # "`maxTokens` must be unset when … maxReasoningEffort is 'high'"
                parameters.keep_back(*WAYS)
                effort = "medium"
            fields: JSON = {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": effort}}
            return none._replace(fields=fields, on=effort == "high")
        case "nova-2" if asked:  # it does not think unless told to
            return none
        case _:
            parameters.keep_back(*WAYS)
            return none


def _output(parameters: Parameters, to: Deployment, thought: _Thought) -> JSON:
    """https://docs.aws.amazon.com/bedrock/latest/userguide/structured-output.html: the schema is JSON in a string."""
    if not (asked := parameters.schema(to)):
        return _given(effort=thought.effort)
    claude = to.provider.family(to.model) == "claude"
    schema = held(asked["schema"], "response_format.json_schema", parameters, to) if claude else asked["schema"]
    described = _given(name=asked["name"], description=asked.get("description"), schema=orjson.dumps(schema).decode())
    return _given(effort=thought.effort, textFormat={"type": "json_schema", "structure": {"jsonSchema": described}})


def _service_tier(parameters: Parameters) -> JSON | None:
    """https://docs.aws.amazon.com/bedrock/latest/userguide/service-tiers-inference.html"""
    tier = parameters.take("service_tier")
    if tier in SERVICE_TIERS:
        return {"type": tier}
    if tier != "auto":
        parameters.keep_back("service_tier")
    return None


def _tools(parameters: Parameters, to: Deployment, called: list[str]) -> tuple[JSON, JSON]:
    """`toolConfig`; and Claude's own `tool_choice`, where Converse has no words for it.

    Where the history has calls, Converse demands tools: those that were called, if the caller gives none any more."""
    claude = to.provider.family(to.model) == "claude"
    tools = [spec for tool in parameters.take("tools") or () for spec in _tool(tool, parameters, to)]
    alone = parameters.take("parallel_tool_calls") is False
    choice: Any = parameters.take("tool_choice")
    if not tools or choice == "none":
        if not called:
            return {}, {}
        if choice == "none" and tools and not claude:
            raise unsupported(to, "tool_choice", "cannot be kept from calling tools after it has called some")
        named = [{"toolSpec": {"name": name, "inputSchema": {"json": {"type": "object"}}}} for name in called]
        return {"tools": tools or named}, {"type": "none"} if claude else {}
    match choice:
        case None | "auto":  # its default, which some models refuse to be told
            said: JSON = {"type": "auto"}
        case "required":
            said = {"type": "any"}
        case {"type": "function", "function": {"name": str(name)}}:
            said = {"type": "tool", "name": name}
        case _:
            raise unsupported(to, "tool_choice", "takes no 'tool_choice' but a mode or a function")
    if alone and claude:
        return {"tools": tools}, {**said, "disable_parallel_tool_use": True}
    if alone:
        parameters.keep_back("parallel_tool_calls")
    kind = said.pop("type")
    return {"tools": tools, **({} if kind == "auto" else {"toolChoice": {kind: said}})}, {}


def _tool(tool: JSON, parameters: Parameters, to: Deployment) -> list[JSON]:
    if tool["type"] != "function":
        raise unsupported(to, "tools", "takes no tools but functions")
    function: JSON = tool["function"]
    strict = bool(function.get("strict")) and to.provider.keeps_to_schemas(to.model)
    if function.get("strict") and not strict:
        parameters.tell("tools.strict")
    schema: JSON = {"type": "object", **(function.get("parameters") or {})}
    if strict:
        schema = held_tool(schema, parameters, to)
    described = (function.get("description") or "").strip() or None
    spec = _given(name=function["name"], description=described, inputSchema={"json": schema}, strict=strict or None)
    family = to.provider.family(to.model)
    return [{"toolSpec": spec}, *(_cache_point("claude", function, tool) if family == "claude" else ())]


def _cache_point(family: str | None, *said: JSON) -> list[JSON]:
    """Anthropic's `cache_control`, as a block of its own after what it stands on; only Claude's may last an hour.

    Left out where there is no such cache, and not told: it changes nothing but the price."""
    control = next(filter(None, (object_of(each.get("cache_control")) for each in said)), None)
    if control is None or family not in CACHING:
        return []
    ttl = control.get("ttl") if family == "claude" else None
    return [{"cachePoint": _given(type="default", ttl=ttl if ttl in ("5m", "1h") else None)}]


def _called(message: JSON) -> Iterator[str]:
    """The names of the functions that a message of the history calls."""
    if message["role"] == "assistant":
        yield from (call["function"]["name"] for call in message.get("tool_calls") or () if call.get("function"))


def _conversation(
    messages: list[JSON], parameters: Parameters, to: Deployment, *, reminded: bool
) -> tuple[list[JSON], list[JSON]]:
    """What the system says, wherever it says it, and the turns of user and assistant, results of tools first.

    `reminded`: with what the model thought before. "A conversation must start with a user message": where it starts
    with a greeting, it is one that says next to nothing, and that is told."""
    blocks = _Blocks(to)
    said = (
        (ROLES.get(message["role"], "user"), blocks.of(message, reminded=reminded))
        for message in heard(messages, parameters, to)
    )
    system, turns = in_turns(said, to)
    as_claude_wants(turns, lambda block: "toolResult" in block)
    if turns[0]["role"] != "user":
        turns.insert(0, {"role": "user", "content": [{"text": "."}]})
        parameters.tell("messages.role")
    for turn in turns if blocks.documents else ():
        _name_documents(turn["content"])
    return system, turns


def _name_documents(content: list[JSON]) -> None:
    """ "A text block must be included when using documents": their names, where nobody says a word."""
    places = [at for at, block in enumerate(content) if "document" in block]
    if places and not any("text" in block for block in content):
        content.insert(places[0], {"text": ", ".join(content[at]["document"]["name"] for at in places)})


class _Blocks:
    """What the messages of one conversation become; two documents of one name are refused."""

    def __init__(self, to: Deployment) -> None:
        self._to = to
        self._family = to.provider.family(to.model)
        self._names: set[str] = set()
        self._ids = CallIds(CALL_IDS.get(self._family or "", CALL_ID))

    @property
    def documents(self) -> bool:
        """Whether there were any."""
        return bool(self._names)

    def of(self, message: JSON, *, reminded: bool) -> list[JSON]:
        match message:
            case {"role": "function"} | {"role": "assistant", "function_call": dict()}:
                raise unsupported(self._to, "messages", "does not support 'functions'")
            case {"role": "tool", "tool_call_id": call_id, "content": content}:
                said = self._content(content, "tool")
                points = [block for block in said if "cachePoint" in block]  # none may stand inside
                result = [block for block in said if "cachePoint" not in block]
                blocks = [{"toolResult": {"toolUseId": self._ids.of_result(call_id), "content": result}}, *points[:1]]
            case {"role": "assistant"}:
                blocks: list[JSON] = []
                for thinking, content, calls in stretches(message, self._to, reminded=reminded):
                    blocks += [*thinking, *self._content(content, "assistant"), *map(self._tool_use, calls)]
            case _:
                blocks = self._content(message["content"], message["role"])
        return [*blocks, *(_cache_point(self._family, message) if blocks else ())]

    def _content(self, content: str | list[JSON] | None, role: str) -> list[JSON]:
        """Without texts that say nothing, which are refused."""
        parts: list[JSON] = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        blocks: list[JSON] = []
        for part in parts:
            block = self._block(part, role)
            if "text" not in block or block["text"].strip():
                blocks += [block, *_cache_point(self._family, part)]
        return blocks

    def _block(self, part: JSON, role: str) -> JSON:
        kind = kind_of(part, role, PARTS, self._to)
        match part:
            case {"type": "text", "text": text} | {"type": "refusal", "refusal": text}:
                return {"text": text}
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                media, data = self._data(url, IMAGES, "images")
                return {"image": {"format": media, "source": {"bytes": data}}}
            case {"type": "input_audio", "input_audio": {"data": data, "format": media}}:
                return {"audio": {"format": media, "source": {"bytes": data}}}
            case {"type": "file", "file": {"file_data": str(url), **more}}:
                media, data = self._data(url, DOCUMENTS, "files")
                return {"document": {"format": media, "name": self._name(more), "source": {"bytes": data}}}
            case _:
                raise unsupported(self._to, "messages", f"does not support this '{kind}'")

    def _data(self, url: str, formats: Mapping[str, str], what: str) -> tuple[str, str]:
        """The format and the base64 of a data URI. Other URLs, S3's too, would be read on the gateway's account."""
        media, data = data_uri(url) or ("", "")
        if not data or media not in formats:
            raise unsupported(self._to, "messages", f"takes no {what} but {', '.join(formats)} as data URIs")
        return formats[media], data

    def _name(self, file: JSON) -> str:
        """https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_DocumentBlock.html has the alphabet."""
        given: str = file.get("filename") or ""
        stem = given.rpartition(".")[0] or given
        plain = re.sub(r"[^A-Za-z0-9()\[\]-]+", " ", stem).strip()[:180] or "document"
        number, name = 1, plain
        while name in self._names:
            number += 1
            name = f"{plain} {number}"
        self._names.add(name)
        return name

    def _tool_use(self, call: JSON) -> JSON:
        name, _, given = function_of(call, self._to)
        return {"toolUse": {"toolUseId": self._ids.of_call(call["id"]), "name": name, "input": given}}


# What is answered


def _message(blocks: list[JSON], to: Deployment, *, hidden: bool) -> JSON:
    """The texts, the thoughts and the calls; what the provider's own tools did is not the caller's."""
    text = ""
    uses: list[JSON] = []
    thinking: list[tuple[Place, JSON]] = []
    for block in blocks:
        if "reasoningContent" in block:
            thinking.append(((len(text), len(uses)), block))
        elif "toolUse" not in block:
            text += "".join(_texts(block))
        elif block["toolUse"].get("type") != "server_tool_use":
            uses.append(block["toolUse"])
    said: JSON = {"role": "assistant", "content": text or (None if uses else "")}
    spoken = (object_of(block["reasoningContent"].get("reasoningText")).get("text") for _, block in thinking)
    if (reasoning := "".join(text_of(part) for part in spoken if part is not None)) and not hidden:
        said["reasoning_content"] = reasoning
    if uses:
        said["tool_calls"] = [
            tool_call(use["toolUseId"], use["name"], orjson.dumps(use["input"]).decode()) for use in uses
        ]
    if kept := [(place, block) for place, block in thinking if is_signed(block)]:
        said["extra_content"] = signed(kept, (len(text), len(uses)), to)
    return said


def _texts(block: JSON) -> Iterator[str]:
    cited: list[JSON] = object_of(block.get("citationsContent")).get("content") or []
    yield from (text_of(part["text"]) for part in (block, *cited) if "text" in part)


class _Stream:
    """What each event brings; unknown ones are none of the caller's. Only calls have a start for certain.

    A call that is open is kept under its block's index: its index `at` among the calls, none for the provider's own
    tools, and whether its arguments were `told`. So are thoughts, as far as they have come; they go back when whole."""

    def __init__(self, to: Deployment, *, hidden: bool) -> None:
        self._to = to
        self._hidden = hidden
        self._length = 0
        self._count = 0
        self._calls: dict[int, JSON] = {}
        self._thoughts: dict[int, dict[str, str]] = {}
        self._signed: list[tuple[Place, JSON]] = []
        self._due = {"messageStop", "metadata"}

    def __call__(self, event: str | None, data: JSON) -> list[Piece]:
        match event:
            case "contentBlockDelta":
                return self._more(data["contentBlockIndex"], data["delta"])
            case "contentBlockStart":
                return self._begun(data["contentBlockIndex"], data["start"])
            case "contentBlockStop":
                return self._ended(data["contentBlockIndex"])
            case "messageStop":
                choice: JSON = {"index": 0, "delta": {}}
                answers.finish(choice, text_of(data["stopReason"]))
                end = self._length, self._count
                kept = signed(self._signed, end, self._to) if self._signed else None  # once: clients join what is twice
                pieces = [*delta(extra_content=kept), Piece({"choices": [choice]})]
            case "metadata":
                pieces = [Piece({"choices": []}, _usage(data.get("usage")))]
            case "error":
                raise refusals.in_answer(data)
            case _:
                return []
        self._due.discard(event)
        return pieces if self._due else [*pieces, END]

    def _begun(self, index: int, start: JSON) -> list[Piece]:
        if "toolUse" not in start:
            return []
        use: JSON = start["toolUse"]
        if use.get("type") == "server_tool_use":
            self._calls[index] = {"at": None}
            return []
        at, self._count = self._count, self._count + 1
        self._calls[index] = {"at": at, "told": False}
        return delta(tool_calls=[{"index": at, **tool_call(use["toolUseId"], use["name"], "")}])

    def _more(self, index: int, said: JSON) -> list[Piece]:
        match said:
            case {"text": text}:
                self._length += len(text_of(text))
                return delta(content=text)
            case {"toolUse": {"input": arguments}}:
                return more_arguments(self._calls[index], text_of(arguments))
            case {"reasoningContent": {**thought}}:
                known = self._thoughts.setdefault(index, {})
                for name, part in thought.items():
                    known[name] = _joined(name, known.get(name, ""), text_of(part))
                return [] if self._hidden else delta(reasoning_content=thought.get("text"))
            case _:
                return []

    def _ended(self, index: int) -> list[Piece]:
        if call := self._calls.get(index):
            return [] if call.get("told") else more_arguments(call, "{}")
        thought, place = self._thoughts.pop(index, {}), (self._length, self._count)
        if redacted := thought.get("redactedContent"):
            self._signed.append((place, {"reasoningContent": {"redactedContent": redacted}}))
        elif thought.get("signature"):
            self._signed.append((place, {"reasoningContent": {"reasoningText": {"text": "", **thought}}}))
        return []


def _joined(name: str, before: str, part: str) -> str:
    """Redacted content is bytes, each piece a base64 of its own."""
    if name != "redactedContent" or not before:
        return before + part
    return base64.b64encode(base64.b64decode(before) + base64.b64decode(part)).decode()


def _usage(counts: Any) -> Usage | None:
    """https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_TokenUsage.html

    The input is counted without the cache: https://docs.aws.amazon.com/bedrock/latest/userguide/prompt-caching.html."""
    counts = object_of(counts)
    if "inputTokens" not in counts or "outputTokens" not in counts:
        return None
    written = count_of(counts, "cacheWriteInputTokens")
    details = [object_of(detail) for detail in counts.get("cacheDetails") or ()]
    for_an_hour = sum(count_of(detail, "inputTokens") for detail in details if detail.get("ttl") == "1h")
    return Usage(
        input=count_of(counts, "inputTokens"),
        cache_read=count_of(counts, "cacheReadInputTokens"),
        cache_write=written - min(for_an_hour, written),
        cache_write_1h=min(for_an_hour, written),
        output=count_of(counts, "outputTokens"),
    )
