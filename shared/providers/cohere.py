"""Cohere's own API, version 2: https://docs.cohere.com/reference/chat and https://docs.cohere.com/reference/embed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import orjson

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers import answers, refusals
from shared.providers.conversation import heard
from shared.providers.dialect import END, Outgoing, Piece, Translate
from shared.providers.parameters import EFFORTS, Parameters, hides_reasoning, refuse, unsupported
from shared.providers.parts import kind_of
from shared.providers.pieces import count_of, delta, tool_call
from shared.providers.through_chat import ThroughChat
from shared.schema import JSON, Call, Usage
from shared.sse import Decoder

OWN = ("citation_options", "documents", "priority", "safety_mode")
"""Parameters of Cohere's that callers may give as they are."""
PARTS = {
    "system": {"text"},
    "user": {"text", "image_url"},
    "assistant": {"text", "refusal"},
    "tool": {"text", "document"},
}
"""Which parts a message may have, by its role."""
TOOL_CHOICES = {"required": "REQUIRED", "none": "NONE"}
NO_PARAMETERS: JSON = {"type": "object", "properties": {}}
MAX_OUTPUT = 32_000
"""Tokens that a model which thinks can make: https://docs.cohere.com/docs/command-a-reasoning"""
MAX_SEED = 2**64 - 1
DENIED = 498
"""https://docs.cohere.com/reference/chat: "a request or response contains a deny-listed token"."""


class CohereDialect:
    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        refuse(call, to)
        parameters = Parameters(call, to)
        if call.surface == "embeddings":
            path, body = "/embed", _embed(parameters, to)
        else:
            path, body = "/chat", _chat(call, parameters, to, call.max_tokens or max_tokens)
        content = orjson.dumps({name: value for name, value in body.items() if value is not None})
        headers = {"content-type": "application/json", **to.provider.credentials}
        return Outgoing(to.provider.base_url + path, headers, content, parameters.dropped())

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        if isinstance(body.get("message"), str):
            raise refusals.in_answer(body)
        if call.surface == "embeddings":
            vectors = [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(body["embeddings"]["float"])
            ]
            as_base64 = call.body.get("encoding_format") == "base64"
            data, _ = answers.embeddings({"data": vectors}, to.provider, as_base64=as_base64)
            return Piece(data, _usage(body.get("meta")))
        choice: JSON = {"index": 0, "message": _message_of(body["message"], hidden=hides_reasoning(call))}
        if made := body.get("logprobs"):
            choice["logprobs"] = _logprobs(made)
        answers.finish(choice, body.get("finish_reason"))
        return Piece({"choices": [choice]}, _usage(body.get("usage")))

    def stream(self, call: Call, to: Deployment) -> Translate:
        return _Stream(hidden=hides_reasoning(call))

    def decoder(self) -> Decoder:
        return Decoder()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        error = refusals.failure(status, headers, content)
        return ProviderError("policy", error.message, status=status) if status == DENIED else error


DIALECT = ThroughChat(CohereDialect())


# What is sent


def _embed(parameters: Parameters, to: Deployment) -> JSON:
    """`input_type` is mandatory, and OpenAI's API has none: callers may give it; most texts are stored to be found."""
    given: str | list[Any] = parameters.take("input")
    if not isinstance(given, str) and not isinstance(given[0], str):
        raise unsupported(to, "input", "takes text, not token ids")
    parameters.take("encoding_format")  # base64 is made here
    return {
        "model": to.model,
        "texts": [given] if isinstance(given, str) else given,
        "input_type": parameters.take("input_type") or "search_document",
        "embedding_types": ["float"],
        "output_dimension": parameters.take("dimensions"),
        "truncate": parameters.take("truncate") or "NONE",  # its default cuts silently where OpenAI's API refuses
    }


def _chat(call: Call, parameters: Parameters, to: Deployment, max_tokens: int | None) -> JSON:
    body = call.body
    frequency = parameters.within("frequency_penalty", 0, 1)  # "only one of" them: docs.cohere.com/reference/errors
    presence = None if frequency else parameters.within("presence_penalty", 0, 1)
    return {
        "model": to.model,
        "messages": _messages(body["messages"], parameters, to),
        "stream": call.stream,
        "max_tokens": max_tokens,
        "temperature": parameters.within("temperature", 0, 1),
        "p": parameters.within("top_p", 0.01, 0.99),
        "k": parameters.take("top_k"),
        "seed": parameters.within("seed", 0, MAX_SEED),
        "frequency_penalty": frequency or None,
        "presence_penalty": presence or None,
        "stop_sequences": parameters.stops() or None,
        "logprobs": parameters.take("logprobs") or None,
        "response_format": _response_format(parameters.take("response_format") or {}),
        "thinking": _thinking(parameters, to, max_tokens),
        **_tools(parameters, to),
        **{name: parameters.take(name) for name in OWN},
    }


def _response_format(form: JSON) -> JSON | None:
    """https://docs.cohere.com/docs/structured-outputs: a schema is always kept to, so `strict` need not be said."""
    if form.get("type") in (None, "text"):
        return None
    schema: JSON = form.get("json_schema") or {}
    return {"type": "json_object", **({"json_schema": schema["schema"]} if schema.get("schema") else {})}


def _thinking(parameters: Parameters, to: Deployment, max_tokens: int | None) -> JSON | None:
    """https://docs.cohere.com/docs/reasoning: models that can think do so unless told not to."""
    own: JSON | None = parameters.take("thinking")
    effort, budget = parameters.reasoning()
    if own or (effort is None and budget is None):
        return own
    if not to.provider.reasons(to.model):
        if effort != "none":
            parameters.keep_back("reasoning_effort", "reasoning")
        return None
    if effort == "none":
        return {"type": "disabled"}
    if effort and effort != "max":  # without a budget it thinks for as long as it likes
        budget = max(1, int(EFFORTS[effort] * (max_tokens or to.max_output or MAX_OUTPUT)))
    return {"type": "enabled", "token_budget": budget} if budget else {"type": "enabled"}


def _tools(parameters: Parameters, to: Deployment) -> JSON:
    """https://docs.cohere.com/docs/structured-outputs: strictness is one switch for all tools, so one strict tool turns
    it on, where all can be: "Tools with only optional parameters are not supported in this mode"."""
    tools: list[JSON] = parameters.take("tools") or []
    choice: str | JSON | None = parameters.take("tool_choice")
    if isinstance(choice, dict):
        raise unsupported(to, "tool_choice", "cannot be told which function to call")
    if any(tool["type"] != "function" for tool in tools):
        raise unsupported(to, "tools", "takes no tools but functions")
    if not tools:
        return {}
    functions: list[JSON] = [tool["function"] for tool in tools]
    strict = parameters.take("strict_tools")
    if not strict and any(function.get("strict") for function in functions):
        strict = all((function.get("parameters") or NO_PARAMETERS).get("required") for function in functions)
        if not strict:
            parameters.tell("tools.strict")
    return {
        "tools": [{"type": "function", "function": _function(function)} for function in functions],
        "tool_choice": TOOL_CHOICES.get(choice or ""),
        "strict_tools": strict or None,
    }


def _function(function: JSON) -> JSON:
    described = {"description": function["description"]} if function.get("description") else {}
    return {"name": function["name"], **described, "parameters": function.get("parameters") or NO_PARAMETERS}


def _messages(messages: list[JSON], parameters: Parameters, to: Deployment) -> list[JSON]:
    """What the system says comes first and in one: https://docs.cohere.com/reference/errors takes it nowhere else."""
    system: list[JSON] = []
    others: list[JSON] = []
    for message in heard(messages, parameters, to, detail=True):
        if message["role"] in ("system", "developer"):
            content = _content(message["content"], "system", to)
            system += content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        elif (sent := _message(message, to)) is not None:
            others.append(sent)
    return [{"role": "system", "content": system}, *others] if system else others


def _message(message: JSON, to: Deployment) -> JSON | None:
    """None for a turn in which the assistant said nothing, which Cohere refuses."""
    role: str = message["role"]
    if role == "function" or message.get("function_call"):
        raise unsupported(to, "messages", "does not support 'functions'")
    if role != "assistant":
        sent: JSON = {"role": role, "content": _content(message["content"], role, to)}
        return sent | {"tool_call_id": message["tool_call_id"]} if role == "tool" else sent
    sent = {"role": role}
    if content := _content(message.get("content") or message.get("refusal") or "", role, to):
        sent["content"] = content
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [_call(call, to) for call in calls]
        if (plan := message.get("reasoning_content")) and to.provider.echoes_reasoning:
            sent[to.provider.echoes_reasoning] = plan
    return sent if len(sent) > 1 else None


def _content(content: str | list[JSON], role: str, to: Deployment) -> str | list[JSON]:
    """Without empty texts, and without cache points: what is cached, and that it is, is Cohere's own affair."""
    if isinstance(content, str):
        return content
    return [part for part in (_part(part, role, to) for part in content) if part.get("text") != ""]


def _part(part: JSON, role: str, to: Deployment) -> JSON:
    kind = kind_of(part, role, PARTS, to)
    if kind not in part:
        raise unsupported(to, "messages", f"takes no '{kind}' without one")
    if kind == "refusal":
        return {"type": "text", "text": part["refusal"]}
    return {"type": kind, kind: part[kind]}


def _call(call: JSON, to: Deployment) -> JSON:
    function: JSON | None = call.get("function")
    if function is None:
        raise unsupported(to, "messages", "takes no tool calls but functions'")
    sent = {"name": function["name"], "arguments": function["arguments"] or "{}"}
    return {"id": call["id"], "type": "function", "function": sent}


# What is answered


def _message_of(message: JSON, *, hidden: bool) -> JSON:
    """A whole answer; what it thought, and what it planned to do with the tools, is its reasoning."""
    parts: list[JSON] = message.get("content") or []
    calls: list[JSON] = message.get("tool_calls") or []
    text = "".join(_text(part.get("text")) for part in parts)
    thought = "".join(_text(part.get("thinking")) for part in parts) + _text(message.get("tool_plan"))
    said: JSON = {"role": "assistant", "content": text if text or not calls else None}
    if thought and not hidden:
        said["reasoning_content"] = thought
    if calls:
        said["tool_calls"] = [_made(call) for call in calls]
    if citations := message.get("citations"):
        said["extra_content"] = _cited(citations)
    return said


def _made(call: JSON, arguments: str = "{}") -> JSON:
    """A call of its; `arguments` where it has none yet."""
    function: JSON = call["function"]
    given = _text(function.get("arguments")) or arguments
    return tool_call(call.get("id") or answers.new_id(), function["name"], given)


class _Stream:
    """https://docs.cohere.com/docs/streaming: what each event brings; unknown ones are none of the caller's."""

    def __init__(self, *, hidden: bool) -> None:
        self._hidden = hidden
        self._calls: dict[int, int] = {}
        self._without_arguments: set[int] = set()
        self._citations: list[JSON] = []

    def __call__(self, event: str | None, data: JSON) -> list[Piece]:
        match data.get("type"):
            case "content-start" | "content-delta":
                content = data["delta"]["message"]["content"]
                pieces = self._said(_text(content.get("text")), _text(content.get("thinking")))
                if pieces and (made := data.get("logprobs")):
                    pieces[0].body["choices"][0]["logprobs"] = _logprobs([made])
                return pieces
            case "tool-plan-delta":
                return self._said("", _text(data["delta"]["message"]["tool_plan"]))
            case "tool-call-start":
                return self._begun(data["index"], data["delta"]["message"]["tool_calls"])
            case "tool-call-delta":
                arguments = _text(data["delta"]["message"]["tool_calls"]["function"]["arguments"])
                return self._more(data["index"], arguments)
            case "tool-call-end" if data["index"] in self._without_arguments:
                return self._more(data["index"], "{}")
            case "citation-start":
                self._citations.append(data["delta"]["message"]["citations"])
                return []
            case "message-end":
                return [*self._cited(), _end(data["delta"]), END]
            case None if data.get("message"):
                raise refusals.in_answer(data)
            case _:
                return []

    def _cited(self) -> list[Piece]:
        """All at once: stock clients cannot put such lists together."""
        return delta(extra_content=_cited(self._citations)) if self._citations else []

    def _said(self, text: str, thought: str) -> list[Piece]:
        if not thought or self._hidden:
            return delta(content=text)
        return delta(reasoning_content=thought, **({"content": text} if text else {}))

    def _begun(self, at: int, call: JSON) -> list[Piece]:
        self._calls[at] = index = len(self._calls)
        made = _made(call, "")
        if not made["function"]["arguments"]:
            self._without_arguments.add(at)
        return delta(tool_calls=[{"index": index, **made}])

    def _more(self, at: int, arguments: str) -> list[Piece]:
        if not arguments:
            return []
        self._without_arguments.discard(at)
        return delta(tool_calls=[{"index": self._calls[at], "function": {"arguments": arguments}}])


def _end(said: JSON) -> Piece:
    if error := said.get("error"):
        raise refusals.in_answer({"error": _text(error)})
    choice: JSON = {"index": 0, "delta": {}}
    answers.finish(choice, said.get("finish_reason"))
    return Piece({"choices": [choice]}, _usage(said.get("usage")))


def _cited(citations: list[JSON]) -> JSON:
    """https://docs.cohere.com/docs/documents-and-citations: which words come from which tool result or document."""
    return {"cohere": {"citations": citations}}


def _logprobs(made: list[JSON]) -> JSON:
    """https://docs.cohere.com/reference/chat: of texts; one of several tokens is as likely as all of them together."""
    content = [
        {"token": text, "logprob": sum(each["logprobs"]), "bytes": list(text.encode()), "top_logprobs": list[JSON]()}
        for each in made
        if (text := _text(each.get("text"))) and each.get("logprobs")
    ]
    return {"content": content, "refusal": None}


def _text(value: Any) -> str:
    """The text, "" for none; raises TypeError for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError(value)


def _usage(counts: Any) -> Usage | None:
    """What is billed, as the price is of that; `tokens`, also the template's around the prompt, stand in the details.

    Cached tokens have no price of their own."""
    if not isinstance(counts, dict):
        return None
    counts = cast("JSON", counts)
    real: JSON = counts.get("tokens") or {}
    billed: JSON = counts.get("billed_units") or real
    if not billed:
        return None
    output = count_of(billed, "output_tokens")
    details = {
        "prompt": {"tokens": count_of(real, "input_tokens")},
        "completion": {"tokens": count_of(real, "output_tokens")},
    }
    return Usage(
        input=count_of(billed, "input_tokens"),
        output=output,
        reasoning=min(count_of(real, "reasoning_tokens"), output),
        details=details if real else {},
    )
