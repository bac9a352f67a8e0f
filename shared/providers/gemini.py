"""Google's Gemini API; Vertex AI speaks the same.

https://ai.google.dev/api/generate-content and https://ai.google.dev/api/embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import hypot
from typing import Any, cast
from urllib.parse import quote

import orjson

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers import answers, refusals
from shared.providers.conversation import function_of, heard, in_turns
from shared.providers.dialect import Outgoing, Piece, Translate
from shared.providers.parameters import EFFORTS, Parameters, hides_reasoning, refuse, unsupported
from shared.providers.parts import data_uri, kind_of
from shared.providers.pieces import MAX_TOKENS, text_of
from shared.providers.through_chat import ThroughChat
from shared.schema import JSON, Call, Usage
from shared.sse import Decoder

NAMES = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "n": "candidateCount",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "logprobs": "responseLogprobs",
    "top_logprobs": "logprobs",
}
PARTS = {
    "system": {"text"},
    "developer": {"text"},
    "user": {"text", "image_url", "file", "input_audio"},
    "assistant": {"text", "refusal", "image_url"},
    "tool": {"text", "image_url", "file", "input_audio"},
}
"""Which parts a message may have, by its role: models draw, too, and `systemInstruction` is "currently, text only"."""
ROLES = {"system": "system", "developer": "system", "assistant": "model"}
INT32 = 1 << 31
BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576, "xhigh": 32_768, "max": 32_768}
"""Tokens to think with: https://ai.google.dev/gemini-api/docs/openai#thinking"""
UNSIGNED = "skip_thought_signature_validator"
"""For calls that Gemini did not make: https://ai.google.dev/gemini-api/docs/thought-signatures#faqs"""
MEDIA_TYPES = {
    "gif": "image/gif", "heic": "image/heic", "jpeg": "image/jpeg", "jpg": "image/jpeg", "pdf": "application/pdf",
    "png": "image/png", "webp": "image/webp",
}  # fmt: skip
MAX_INPUTS = 100
"""Texts to embed: "at most 100 requests can be in one batch"."""

FINISHES = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "LANGUAGE": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
    "MODEL_ARMOR": "content_filter",
}
"""https://ai.google.dev/api/generate-content#FinishReason; with any other word, such as MALFORMED_FUNCTION_CALL, the
answer broke off."""
TEXT = {"text"}
SOURCES = ("citationMetadata", "groundingMetadata", "urlContextMetadata")
COUNTS = (
    "promptTokenCount", "toolUsePromptTokenCount", "cachedContentTokenCount",
    "candidatesTokenCount", "thoughtsTokenCount",
)  # fmt: skip


class GeminiDialect:
    """Its parts that OpenAI has no shape for, and its thought signatures, go to and fro as `extra_content.google`.

    `{"thought_signature": …}` on a tool call, as on Gemini's own OpenAI endpoint, or on the message, for its text;
    `{"parts": […]}` on the message: images it made, code it ran; and, of `SOURCES`, where its answer comes from."""

    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        refuse(call, to)
        parameters = Parameters(call, to)
        if call.surface == "embeddings":
            method, body = "batchEmbedContents", _embed(to, parameters)
        else:
            method = "streamGenerateContent?alt=sse" if call.stream else "generateContent"
            body = _generate(call, to, parameters, call.max_tokens or max_tokens)
        url = f"{to.provider.base_url}/models/{quote(to.model, safe='')}:{method}"
        headers = {"content-type": "application/json", **to.provider.credentials}
        return Outgoing(url, headers, orjson.dumps(body), parameters.dropped())

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        if body.get("error"):
            raise refusals.in_answer(body)
        if call.surface == "embeddings":
            return _embeddings(call, to, body)
        choices: list[JSON] = []
        for place, candidate in enumerate(body.get("candidates") or ()):
            message = _message(candidate)
            message.setdefault("content", None if "tool_calls" in message else "")
            finish = _finish(candidate, candidate["finishReason"], called="tool_calls" in message)
            choices.append(
                {"index": answers.place_of(candidate, place), "message": message, **_logprobs(candidate), **finish}
            )
        choices = choices or [{**choice, "message": {"content": None}} for choice in _blocked(call, body)]
        if not choices:
            raise ProviderError("empty", answers.EMPTY, ambiguous=True)
        return Piece({"choices": choices}, _ledger(body))

    def stream(self, call: Call, to: Deployment) -> Translate:
        called: dict[int, int] = {}  # how many calls each choice has made

        def translate(event: str | None, data: JSON) -> list[Piece]:
            if data.get("error"):
                raise refusals.in_answer(data)
            choices: list[JSON] = []
            for candidate in data.get("candidates") or ():
                index, delta = answers.place_of(candidate, 0), _message(candidate)
                if calls := delta.get("tool_calls"):
                    first = called.get(index, 0)
                    called[index] = first + len(calls)
                    for place, made in enumerate(calls, first):
                        made["index"] = place
                choice: JSON = {"index": index, "delta": delta}
                if "logprobsResult" in candidate:
                    choice |= _logprobs(candidate)
                if word := candidate.get("finishReason"):
                    choice |= _finish(candidate, word, called=index in called)
                choices.append(choice)
            choices = choices or [{**choice, "delta": {}} for choice in _blocked(call, data)]
            return [Piece({"choices": choices}, _ledger(data))]

        return translate

    def decoder(self) -> Decoder:
        return Decoder()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        return refusals.failure(status, headers, content)


DIALECT = ThroughChat(GeminiDialect())


def _generate(call: Call, to: Deployment, parameters: Parameters, max_tokens: int | None) -> JSON:
    system, turns = _conversation(call.body["messages"], parameters, to)
    body: JSON = {"contents": turns}
    if system:
        body["systemInstruction"] = {"parts": system}
    tools, choice = parameters.take("tools"), parameters.take("tool_choice")
    if tools:
        body["tools"] = [{"functionDeclarations": [_declaration(tool, to, parameters) for tool in tools]}]
        if calling := _calling(choice, to):
            body["toolConfig"] = {"functionCallingConfig": calling}
    if cached := _cached_content(call, parameters):
        body["cachedContent"] = cached
    if config := _config(call, to, parameters, max_tokens):
        body["generationConfig"] = config
    return body


def _cached_content(call: Call, parameters: Parameters) -> str | None:
    """`cachedContents/…`, by itself or as on Gemini's own OpenAI endpoint.

    https://ai.google.dev/gemini-api/docs/caching and https://ai.google.dev/gemini-api/docs/openai#extra-body"""
    match call.body:
        case {"cached_content": str(name)}:
            parameters.take("cached_content")
            return name
        case {"extra_body": {"google": {"cached_content": str(name)}} as given}:
            parameters.take("extra_body")
            if given != {"google": {"cached_content": name}}:
                parameters.keep_back("extra_body")  # the rest of it
            return name
        case _:
            return None


def _config(call: Call, to: Deployment, parameters: Parameters, max_tokens: int | None) -> JSON:
    config: JSON = {theirs: value for name, theirs in NAMES.items() if (value := parameters.take(name)) is not None}
    if max_tokens is not None:
        config["maxOutputTokens"] = max_tokens
    if stops := parameters.stops():
        config["stopSequences"] = stops
    if (seed := parameters.within("seed", -INT32, INT32 - 1)) is not None:
        config["seed"] = seed
    match parameters.take("response_format"):
        case {"type": "json_object"}:
            config["responseMimeType"] = "application/json"
        case {"type": "json_schema", "json_schema": {**wanted}}:
            config["responseMimeType"] = "application/json"
            if schema := wanted.get("schema"):
                config["responseJsonSchema"] = schema
        case _:
            pass
    if thinking := _thinking(call, to, parameters):
        config["thinkingConfig"] = thinking
    return config


def _thinking(call: Call, to: Deployment, parameters: Parameters) -> JSON | None:
    """https://ai.google.dev/gemini-api/docs/thinking; what is asked of a model that does not think was dropped."""
    row, model = to.provider, to.model
    levels = next((levels for pattern, levels in row.thinking_levels.items() if fnmatchcase(model, pattern)), None)
    bounds = next((bounds for pattern, bounds in row.thinking_budgets.items() if fnmatchcase(model, pattern)), None)
    if not (levels or bounds):
        return None
    effort, tokens = parameters.reasoning()
    if effort:
        tokens = BUDGETS[effort]
    if tokens is None:
        return None
    least, most = bounds or (1, INT32)
    if tokens == 0 < least:  # it cannot be stopped from thinking
        parameters.keep_back("reasoning_effort", "reasoning")
    shown = {"includeThoughts": True} if tokens and not hides_reasoning(call) else {}
    if levels:
        effort = effort or next((name for name, budget in BUDGETS.items() if budget >= tokens), "high")
        level = next((level for level in levels if EFFORTS[level] >= EFFORTS[effort]), levels[-1])
        return {"thinkingLevel": level.upper(), **shown}
    return {"thinkingBudget": max(least, min(most, tokens)), **shown}


def _declaration(tool: JSON, to: Deployment, parameters: Parameters) -> JSON:
    if tool["type"] != "function":
        raise unsupported(to, "tools", f"does not support tools of the type '{tool['type']}'")
    function: JSON = tool["function"]
    if function.get("strict"):
        parameters.tell("tools.strict")
    declared = {
        "name": function["name"],
        "description": function.get("description"),
        "parametersJsonSchema": function.get("parameters"),
    }
    return {name: value for name, value in declared.items() if value}


def _calling(choice: Any, to: Deployment) -> JSON | None:
    """https://ai.google.dev/gemini-api/docs/function-calling#function_calling_modes"""
    match choice:
        case None | "auto":
            return None
        case "none":
            return {"mode": "NONE"}
        case "required":
            return {"mode": "ANY"}
        case {"type": "function", "function": {"name": str(name)}}:
            return {"mode": "ANY", "allowedFunctionNames": [name]}
        case _:
            raise unsupported(to, "tool_choice", "does not support such a 'tool_choice'")


def _conversation(messages: list[JSON], parameters: Parameters, to: Deployment) -> tuple[list[JSON], list[JSON]]:
    """The parts of the system instruction, wherever they stood, and the turns: neighbours of one role are one."""
    functions: dict[str, str] = {}
    said = (
        (ROLES.get(message["role"], "user"), _spoken(message, functions, to))
        for message in heard(messages, parameters, to)
    )
    return in_turns(said, to, "parts")


def _spoken(message: JSON, functions: dict[str, str], to: Deployment) -> list[JSON]:
    """`functions`: the names of those called until now, by the ids of the calls."""
    match message["role"]:
        case "assistant":
            parts = _said(message, to)
            functions.update({call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()})
            return parts
        case "tool":
            return [_result(message, functions, to)]
        case "function":
            raise unsupported(to, "messages", "takes no messages of the role 'function'")
        case _:
            return _parts(message["content"], message["role"], to)


def _said(message: JSON, to: Deployment) -> list[JSON]:
    """An assistant's message; of several calls at once, Gemini signs the first."""
    parts = _parts(message.get("content"), "assistant", to)
    if refusal := message.get("refusal"):
        parts.append({"text": refusal})
    if message.get("function_call"):
        raise unsupported(to, "messages", "takes calls as 'tool_calls' only")
    google = _google(message)
    if isinstance(signature := google.get("thought_signature"), str):
        last = parts.pop() if parts else {"text": ""}
        parts.append({**last, "thoughtSignature": signature})
    if isinstance(others := google.get("parts"), list):
        parts = [*cast("list[JSON]", others), *parts]
    calls = [_called(call, to) for call in message.get("tool_calls") or ()]
    if calls and any(fnmatchcase(to.model, pattern) for pattern in to.provider.signed_calls):
        calls[0].setdefault("thoughtSignature", UNSIGNED)
    return parts + calls


def _called(call: JSON, to: Deployment) -> JSON:
    """The arguments go as they came: their order and numbers are part of what Gemini may have cached."""
    name, text, _ = function_of(call, to)
    part: JSON = {"functionCall": {"id": call["id"], "name": name, "args": orjson.Fragment(text)}}
    if isinstance(signature := _google(call).get("thought_signature"), str):
        part["thoughtSignature"] = signature
    return part


def _google(carrier: JSON) -> JSON:
    """What an answer of Gemini's left on a message or a tool call."""
    match carrier.get("extra_content"):
        case {"google": {**kept}}:
            return cast("JSON", kept)
        case _:
            return {}


def _result(message: JSON, functions: Mapping[str, str], to: Deployment) -> JSON:
    """https://ai.google.dev/api/caching#FunctionResponse"""
    name = functions.get(message["tool_call_id"])
    if name is None:
        raise unsupported(to, "messages", "needs the tool call that a tool's message answers before it")
    parts = _parts(message["content"], "tool", to)
    output = "".join(part["text"] for part in parts if "text" in part)
    result: JSON = {"id": message["tool_call_id"], "name": name, "response": {"output": output}}
    if media := [part for part in parts if "text" not in part]:
        result["parts"] = media
    return {"functionResponse": result}


def _parts(content: str | list[JSON] | None, role: str, to: Deployment) -> list[JSON]:
    """Without empty texts, and without what only steers the price: cache points."""
    if not isinstance(content, list):
        return [{"text": content}] if content else []
    return [sent for part in content if (sent := _part(part, role, to)) != {"text": ""}]


def _part(part: JSON, role: str, to: Deployment) -> JSON:
    kind = kind_of(part, role, PARTS, to)
    match part:
        case {"type": "text", "text": text} | {"type": "refusal", "refusal": text}:
            return {"text": text}
        case {"type": "image_url", "image_url": {"url": uri}}:
            return _media(uri, to)
        case {"type": "file", "file": {"file_data": str(uri)} | {"file_id": str(uri)}}:
            return _media(uri, to)
        case {"type": "input_audio", "input_audio": {"data": data, "format": sound}}:
            return {"inlineData": {"mimeType": f"audio/{sound}", "data": data}}
        case _:
            raise unsupported(to, "messages", f"does not support this '{kind}'")


def _media(uri: str, to: Deployment) -> JSON:
    """Bytes, or a URL that Google fetches: https://ai.google.dev/gemini-api/docs/file-input-methods."""
    if uri.startswith(("https://", "gs://")):
        kind = MEDIA_TYPES.get(uri.partition("?")[0].rpartition(".")[2].lower())
        return {"fileData": {"fileUri": uri, **({"mimeType": kind} if kind else {})}}
    if found := data_uri(uri):
        return {"inlineData": {"mimeType": found[0], "data": found[1]}}
    raise unsupported(to, "messages", "takes images and files as base64 data URIs, https:// or gs:// URLs")


def _message(candidate: JSON) -> JSON:
    """What a candidate says, as a message or delta."""
    content: JSON = candidate.get("content") or {}
    parts: list[JSON] = content.get("parts") or []
    if len(parts) == 1 and parts[0].keys() == TEXT and candidate.keys().isdisjoint(SOURCES):  # most chunks
        return {"content": text_of(parts[0]["text"])} if parts[0]["text"] else {}
    text, thoughts = list[str](), list[str]()
    calls: list[JSON] = []
    google: JSON = {}
    for part in parts:
        signature = part.get("thoughtSignature")
        match part:
            case {"functionCall": call}:
                calls.append(_call(call, signature))
                continue
            case {"text": str(said)}:
                (thoughts if part.get("thought") else text).append(said)
            case _ if part.keys() - {"thoughtSignature"}:
                google.setdefault("parts", []).append(part)
                continue
            case _:
                pass
        if signature:
            google["thought_signature"] = signature
    google |= {name: candidate[name] for name in SOURCES if candidate.get(name)}
    message: JSON = {}
    if text:
        message["content"] = "".join(text)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if google:
        message["extra_content"] = {"google": google}
    return message


def _call(call: JSON, signature: str | None) -> JSON:
    """Raises ProviderError for a call in pieces, which Vertex makes where it is asked for them."""
    if not isinstance(call.get("name"), str) or "partialArgs" in call or call.get("willContinue"):
        raise ProviderError("protocol", "The provider sent a tool call in pieces, unasked.", ambiguous=True)
    made: JSON = {
        "id": call.get("id") or answers.new_id(),
        "type": "function",
        "function": {"name": call["name"], "arguments": orjson.dumps(call.get("args") or {}).decode()},
    }
    if signature:
        made["extra_content"] = {"google": {"thought_signature": signature}}
    return made


def _finish(candidate: JSON, word: str, *, called: bool) -> JSON:
    if word not in FINISHES:
        said = refusals.clean(f"{word} {candidate.get('finishMessage') or ''}")
        raise ProviderError("server", f"The provider broke its answer off: {said}", ambiguous=True)
    reason = "tool_calls" if called and word == "STOP" else FINISHES[word]
    return {"finish_reason": reason, "native_finish_reason": word}


def _blocked(call: Call, body: JSON) -> list[JSON]:
    """The choices that a filter prevented: https://ai.google.dev/api/generate-content#PromptFeedback."""
    feedback: JSON = body.get("promptFeedback") or {}
    reason = feedback.get("blockReason")
    filtered = {"finish_reason": "content_filter", "native_finish_reason": reason}
    return [{"index": index, **filtered} for index in range(call.choices)] if reason else []


def _logprobs(candidate: JSON) -> JSON:
    """https://ai.google.dev/api/generate-content#LogprobsResult"""
    if not (result := candidate.get("logprobsResult")):
        return {}
    tops: list[JSON] = result.get("topCandidates") or [{"candidates": []} for _ in result["chosenCandidates"]]
    content = [
        {**_token(chosen), "top_logprobs": [_token(each) for each in top["candidates"]]}
        for chosen, top in zip(result["chosenCandidates"], tops, strict=True)
    ]
    return {"logprobs": {"content": content, "refusal": None}}


def _token(said: JSON) -> JSON:
    return {"token": said["token"], "logprob": said["logProbability"], "bytes": list(said["token"].encode())}


def _ledger(body: JSON) -> Usage | None:
    """https://ai.google.dev/api/generate-content#UsageMetadata: cached tokens are part of the prompt's, thoughts not
    of the candidates'. None where there are no numbers yet, or they cannot be trusted."""
    if not (raw := body.get("usageMetadata")):
        return None
    prompt, tools, cached, output, thoughts = [raw.get(name, 0) for name in COUNTS]
    for count in (prompt, tools, cached, output, thoughts):
        if type(count) is not int or not 0 <= count < MAX_TOKENS:
            return None
    read = min(cached, prompt)
    return Usage(prompt - read + tools, read, 0, 0, output + thoughts, thoughts) if prompt else None


def _embed(to: Deployment, parameters: Parameters) -> JSON:
    given = parameters.take("input")
    texts = cast("list[Any]", given) if isinstance(given, list) else [given]
    if not isinstance(texts[0], str):
        raise unsupported(to, "input", "takes text, not token ids")
    if len(texts) > MAX_INPUTS:
        raise unsupported(to, "input", f"takes {MAX_INPUTS} inputs at most at a time")
    parameters.take("encoding_format")  # base64 is made here
    asked: JSON = {"model": f"models/{to.model}"}
    if dimensions := parameters.take("dimensions"):
        asked["outputDimensionality"] = dimensions
    return {"requests": [{**asked, "content": {"parts": [{"text": text}]}} for text in texts]}


def _embeddings(call: Call, to: Deployment, body: JSON) -> Piece:
    """Vectors of a reduced size are of unit length only once they are made so: gemini-embedding-001's are not.

    https://ai.google.dev/gemini-api/docs/embeddings#quality-for-smaller-dimensions"""
    made: list[JSON] = body.get("embeddings") or []
    data: list[JSON] = []
    for index, embedding in enumerate(made):
        vector: list[float] = embedding["values"]
        length = (call.body.get("dimensions") and hypot(*vector)) or 1.0
        data.append({"object": "embedding", "index": index, "embedding": [value / length for value in vector]})
    as_base64 = call.body.get("encoding_format") == "base64"
    return answers.embeddings({"data": data}, to.provider, as_base64=as_base64)._replace(usage=_ledger(body))
