"""OpenAI's shapes: what a caller may send, checked strictly and once, and the ledger of tokens.

What was checked is what is forwarded: `parse` decodes the body once and validates that very object without changing it,
but that the first of `models` stands in for a `model` that is not there.
Bounds and codes are those of https://platform.openai.com/docs/api-reference (recorded answers where it is silent).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, cast

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from shared.errors import InvalidRequest
from shared.wording import invalid, missing

JSON: TypeAlias = dict[str, Any]

MAX_DEPTH = 64
"""Deeper nesting than any tool schema; orjson can read deeper than it can write."""


class Shape(BaseModel):
    """Strict (no "5" for 5, no 1 for true), and open: unknown fields go to providers that speak OpenAI."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, defer_build=True, hide_input_in_errors=True
    )


MAX_ID = 256
Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
"""Of a user or a session, under which history is kept."""


def _kind(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Text: TypeAlias = Annotated[str, Field(max_length=10_485_760)]
OneOrMany: TypeAlias = Annotated[Annotated[str, Tag("one")] | Annotated[list[str], Tag("many")], Discriminator(_kind)]
ToolName: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=64)]


class TextPart(Shape):
    type: Literal["text"]
    text: Text


class RefusalPart(Shape):
    type: Literal["refusal"]
    refusal: str


class ImageURL(Shape):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Shape):
    type: Literal["image_url"]
    image_url: ImageURL


class InputAudio(Shape):
    data: str
    format: str


class AudioPart(Shape):
    type: Literal["input_audio"]
    input_audio: InputAudio


class File(Shape):
    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class FilePart(Shape):
    type: Literal["file"]
    file: File


class OtherPart(Shape):
    """A provider's own part, e.g. `video_url` or `thinking`: its business."""

    type: str


def _part(value: Any) -> str:
    kind: Any = cast("JSON", value).get("type") if isinstance(value, dict) else None
    return kind if kind in ("text", "refusal", "image_url", "input_audio", "file") else "other"


Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[RefusalPart, Tag("refusal")]
    | Annotated[ImagePart, Tag("image_url")]
    | Annotated[AudioPart, Tag("input_audio")]
    | Annotated[FilePart, Tag("file")]
    | Annotated[OtherPart, Tag("other")],
    Discriminator(_part),
]
Content: TypeAlias = Annotated[
    Annotated[Text, Tag("one")] | Annotated[Annotated[list[Part], Field(min_length=1)], Tag("many")],
    Discriminator(_kind),
]


class FunctionCall(Shape):
    name: str
    arguments: str


class ToolCall(Shape):
    id: str
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None


class SystemMessage(Shape):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Shape):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Shape):
    """Clients echo it back whole, nulls and all."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    function_call: FunctionCall | None = None


class ToolMessage(Shape):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


class FunctionMessage(Shape):
    role: Literal["function"]
    content: str | None
    name: str


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Discriminator("role")
]


class Function(Shape):
    name: ToolName
    description: str | None = None
    parameters: JSON | None = None
    strict: bool | None = None


class Tool(Shape):
    """`function` is required of a function tool; other types are the provider's own."""

    type: str
    function: Function | None = None


class StreamOptions(Shape):
    include_usage: bool | None = None


class JSONSchema(Shape):
    name: ToolName
    schema_: JSON | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


def _choice(value: Any) -> str:
    return "named" if isinstance(value, dict) else "mode"


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[JSON, Tag("named")], Discriminator(_choice)
]
Temperature: TypeAlias = Annotated[float, Field(ge=0, le=2)]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
Stop: TypeAlias = Annotated[
    Annotated[str, Tag("one")] | Annotated[Annotated[list[str], Field(max_length=4)], Tag("many")],
    Discriminator(_kind),
]
Whole: TypeAlias = Annotated[int, Field(ge=1, le=10_000_000)]


Names: TypeAlias = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64)]
Dollars: TypeAlias = Annotated[float, Field(ge=0)]


class MaxPrice(Shape):
    """US dollars per million tokens, and per request; OpenRouter's."""

    prompt: Dollars | None = None
    completion: Dollars | None = None
    request: Dollars | None = None


class Preferences(Shape):
    """The extension `provider`: OpenRouter's preferences; what we do not know of them is for OpenRouter."""

    order: Names | None = None
    only: Names | None = None
    ignore: Names | None = None
    allow_fallbacks: bool | None = None
    sort: Literal["price", "latency", "throughput", "local", "remote", "round_robin", "priority"] | None = None
    max_price: MaxPrice | None = None
    require_parameters: bool | None = None


class Caching(Shape):
    """The extension `cache`. `refresh` asks anew and keeps the answer; `ttl` is in seconds."""

    mode: Literal["on", "off", "refresh"] = "on"
    ttl: Annotated[int, Field(ge=1, le=604_800)] | None = None


class Asked(Shape):
    """What all three share, our own extensions included (design §2). What is read of a body is declared here."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    user: Annotated[str, Field(max_length=512)] | None = None
    models: Annotated[list[str], Field(max_length=8)] | None = None
    provider: Preferences | None = None
    cache: Caching | None = None
    strict: bool | None = None


class Sampling(Asked):
    """What chat and legacy completions share."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Whole | None = None
    stop: Stop | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    service_tier: str | None = None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    functions: list[JSON] | None = None
    modalities: list[str] | None = None
    audio: JSON | None = None
    prediction: JSON | None = None
    metadata: JSON | None = None
    store: bool | None = None
    session_id: Id | None = None


def _prompt(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return "text" if not isinstance(value, list) else "texts"
    return "tokens" if isinstance(value[0], int) else "token_lists" if isinstance(value[0], list) else "texts"


Tokens: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Input: TypeAlias = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[Annotated[list[Text], Field(min_length=1, max_length=2048)], Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Annotated[list[Tokens], Field(min_length=1, max_length=2048)], Tag("token_lists")],
    Discriminator(_prompt),
]


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Input
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: str | None = None


class EmbeddingRequest(Asked):
    """`POST /v1/embeddings`."""

    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=100_000)] | None = None


Surface: TypeAlias = Literal["chat", "completions", "embeddings"]
SHAPES: Mapping[Surface, type[Shape]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
    "embeddings": EmbeddingRequest,
}
OURS = frozenset({"models", "provider", "cache", "session_id", "strict"})
"""Our extensions of the request: never forwarded, but for what a provider's row `keeps`."""

DEAR_TIERS = frozenset({"priority", "fast", "scale"})
"""https://platform.openai.com/docs/guides/priority-processing: faster, at a price of their own."""

FORMAT_AND_TOOLS = "response_format with tools"
"""Some take either, but not both at once."""


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request. `body` is the caller's own object, never changed; what goes out is built from it."""

    surface: Surface
    body: JSON

    @property
    def model(self) -> str:
        return self.body["model"]

    @property
    def fallbacks(self) -> list[str]:
        """Further models to ask, in order: the extension `models`."""
        return self.body.get("models") or []

    @property
    def stream(self) -> bool:
        return self.surface != "embeddings" and bool(self.body.get("stream"))

    @property
    def include_usage(self) -> bool:
        return self.stream and bool(_inner(self.body, "stream_options").get("include_usage"))

    @property
    def keeps_history(self) -> bool:
        """`session_id` with `store`: what is said goes into our own history, under `user`."""
        return self.surface == "chat" and bool(self.body.get("session_id") and self.body.get("store"))

    @property
    def choices(self) -> int:
        """How many choices the answer has: `n` for each prompt."""
        if self.surface == "embeddings":
            return 0
        return (self.body.get("n") or 1) * (self._prompts if self.surface == "completions" else 1)

    @property
    def unpriced(self) -> str | None:
        """What makes it dearer than any table tells beforehand, in words for the caller."""
        match self.body:
            case {"service_tier": tier} if tier in DEAR_TIERS:
                return f"The service tier '{tier}'"
            case {"cached_content": str()} | {"extra_body": {"google": {"cached_content": str()}}}:
                return "What 'cached_content' adds to the prompt"
            case _:
                return None

    @property
    def generated(self) -> int:
        """How many are generated, and paid: with `best_of`, more than come back."""
        best_of = (self.body.get("best_of") or 1) * self._prompts if self.surface == "completions" else 1
        return max(self.choices, best_of)

    @property
    def _prompts(self) -> int:
        prompt: str | list[Any] = self.body["prompt"]
        return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1

    @property
    def max_tokens(self) -> int | None:
        """The caller's own bound on the output of each choice; chat has two names for it."""
        if self.surface == "embeddings":
            return None
        newer = self.body.get("max_completion_tokens") if self.surface == "chat" else None
        return newer or self.body.get("max_tokens")

    @property
    def features(self) -> set[str]:
        """The parameters in use that change what the answer means, as `Provider.refuses` names them."""
        body, found = self.body, set[str]()
        if self.surface != "embeddings" and (body.get("n") or 1) > 1:
            found.add("n")
        if self.surface == "completions":
            return found | {name for name in ("suffix", "echo") if body.get(name)}
        if self.surface == "embeddings":
            return {"dimensions"} if body.get("dimensions") else found
        found |= {name for name in ("tools", "functions", "audio") if body.get(name)}
        if (body.get("modalities") or ["text"]) != ["text"]:
            found.add("modalities")
        if (form := _inner(body, "response_format").get("type")) not in (None, "text"):
            found |= {"response_format", form, FORMAT_AND_TOOLS} if "tools" in found else {"response_format", form}
        if body.get("tool_choice") == "required" or isinstance(body.get("tool_choice"), dict):
            found.add("tool_choice")
        for message in body["messages"]:
            if isinstance(content := message.get("content"), list):
                found |= {part["type"] for part in cast("list[JSON]", content) if part["type"] != "text"}
                if any(part["type"] == "file" and part["file"].get("file_id") for part in cast("list[JSON]", content)):
                    found.add("file_id")
        return found


def parse(surface: Surface, raw: bytes) -> Call:
    """Decode and check a body; raises InvalidRequest with OpenAI's own `param` and `code`."""
    body = decode(raw)
    if body.get("model") is None and isinstance(named := body.get("models"), list) and named:
        body["model"] = cast("list[Any]", named)[0]
    validated(SHAPES[surface], body)
    _check_together(surface, body)
    return Call(surface, body)


def checked(shape: type[Shape], raw: bytes) -> JSON:
    """The object of a body that has this shape; raises InvalidRequest."""
    return validated(shape, decode(raw))


def validated(shape: type[Shape], body: JSON) -> JSON:
    """The same object; raises InvalidRequest where it has not this shape."""
    try:
        shape.model_validate(body)
    except ValidationError as refused:
        raise invalid(refused.errors(include_url=False, include_context=True, include_input=False)[0], body) from None
    return body


def decode(raw: bytes) -> JSON:
    """The JSON object of a body; raises InvalidRequest for anything else, and for nesting over `MAX_DEPTH`."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise InvalidRequest(
            "We could not parse the JSON body of your request. The gateway expects a JSON object in UTF-8."
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body of your request must be a JSON object.")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and too_deep(body, MAX_DEPTH):
        raise InvalidRequest(f"The JSON body of your request is nested more than {MAX_DEPTH} levels deep.")
    return cast("JSON", body)


def _inner(body: JSON, name: str) -> JSON:
    """An optional object of a checked body; empty for null."""
    return body.get(name) or {}


def too_deep(value: Any, most: int) -> bool:
    """Whether objects and arrays are nested more than `most` levels deep."""
    level: list[JSON | list[Any]] = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _check_together(surface: Surface, body: JSON) -> None:
    """What one field alone cannot tell."""
    if body.get("stream_options") is not None and not body.get("stream"):
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    if surface == "chat":
        if body.get("session_id") and body.get("store") and not 0 < len(body.get("user") or "") <= MAX_ID:
            message = f"'session_id' with 'store' needs a 'user' of 1 to {MAX_ID} characters, whose history it is."
            raise InvalidRequest(message, param="user", code="missing_required_parameter")
        if body.get("top_logprobs") is not None and not body.get("logprobs"):
            raise InvalidRequest("'top_logprobs' requires 'logprobs' to be true.", param="top_logprobs")
        for index, tool in enumerate(body.get("tools") or ()):
            if tool["type"] == "function" and tool.get("function") is None:
                raise missing(f"tools[{index}].function")
        if not body.get("tools"):
            _check_without_tools(body)
        form = _inner(body, "response_format")
        if form.get("type") == "json_schema" and form.get("json_schema") is None:
            raise missing("response_format.json_schema")
        _check_results(body["messages"])
    if surface == "completions" and (body.get("best_of") or 1) > 1:
        if body.get("stream"):
            raise InvalidRequest("You cannot stream results with 'best_of' above 1.", param="best_of")
        if body["best_of"] < (body.get("n") or 1):
            raise InvalidRequest("'best_of' must not be below 'n'.", param="best_of")


def _check_without_tools(body: JSON) -> None:
    """OpenAI refuses both whatever they say; a `tool_choice` that asks for no call is let pass."""
    for name in ("tool_choice", "parallel_tool_calls"):
        if body.get(name) not in (None, "none", "auto"):
            message = f"Invalid value for '{name}': '{name}' is only allowed when 'tools' are specified."
            raise InvalidRequest(message, param=name)


def _check_results(messages: list[JSON]) -> None:
    """Each call has its result right after it, and no result is without a call."""
    asked: set[str] = set()
    due: dict[str, None] = {}
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in asked:
                raise _unasked(message["tool_call_id"], index, any_asked=bool(asked))
            due.pop(message["tool_call_id"], None)
        elif due:
            raise _unanswered(due, index)
        else:
            calls: list[JSON] = (message["role"] == "assistant" and message.get("tool_calls")) or []
            due = dict.fromkeys(call["id"] for call in calls)
            asked = set(due)
    if due:
        raise _unanswered(due, len(messages) - 1)


def _unasked(call_id: str, index: int, *, any_asked: bool) -> InvalidRequest:
    if any_asked:
        message = (
            f"Invalid parameter: 'tool_call_id' of '{call_id[:64]}' not found in 'tool_calls' of previous message."
        )
        return InvalidRequest(message, param=f"messages.[{index}].tool_call_id")
    message = (
        "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
    )
    return InvalidRequest(message, param=f"messages.[{index}].role")


def _unanswered(due: Iterable[str], index: int) -> InvalidRequest:
    message = (
        "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
        f"The following tool_call_ids did not have response messages: {', '.join(due)[:256]}"
    )
    return InvalidRequest(message, param=f"messages.[{index}].role")


@dataclass(frozen=True, slots=True)
class Usage:
    """The ledger of one answer: five disjoint kinds of token that cost money, and where the numbers come from.

    `reasoning` is part of `output`. `cost` is the provider's own figure in nano-dollars, if it gave one. `details` are
    the provider's further counts, passed on under OpenAI's names."""

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    output: int = 0
    reasoning: int = 0
    source: Literal["provider", "estimated"] = "provider"
    cost: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def prompt(self) -> int:
        return self.input + self.cache_read + self.cache_write + self.cache_write_1h

    @property
    def total(self) -> int:
        return self.prompt + self.output
