"""The chunks of a stream put together: the body that the same answer would have had as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

from shared.schema import JSON

GROWING = frozenset({"content", "reasoning_content", "refusal", "text", "summary", "arguments", "data", "transcript"})
"""What comes a piece at a time; other strings come whole."""
FIRST = frozenset({"finish_reason", "native_finish_reason"})
"""Of everything else that comes twice, the last holds."""


def assembled(chunks: Iterable[JSON]) -> JSON:
    """Chunks of OpenAI's shape, chat or text, as the gateway gives them out, to one whole body of the same surface.

    Choices and tool calls are told apart by `index`; usage, cost and whatever else stands beside the choices is the
    last that came. The chunks are left as they are. Takes time and memory in proportion to their size."""
    body, choices = JSON(), defaultdict[int, list[JSON]](list)
    for chunk in chunks:
        body |= {name: value for name, value in chunk.items() if value is not None}
        for choice in chunk.get("choices") or ():
            choices[choice.get("index") or 0].append(choice)
    body["choices"] = [_choice(index, pieces) for index, pieces in sorted(choices.items())]
    body["object"] = "text_completion" if any("text" in choice for choice in body["choices"]) else "chat.completion"
    return body


def _choice(index: int, pieces: Sequence[JSON]) -> JSON:
    choice: JSON = {**_merged(pieces), "index": index}
    if "delta" in choice:
        choice["message"] = _message(choice.pop("delta") or {})
    return choice


def _merged(pieces: Sequence[JSON]) -> JSON:
    """One object of many: each field from all the pieces that have it."""
    names = dict.fromkeys(chain.from_iterable(pieces))
    return {
        name: _joined(name, [value for piece in pieces if (value := piece.get(name)) is not None]) for name in names
    }


def _joined(name: str, values: Sequence[Any]) -> Any:
    if not values:
        return None
    if name in GROWING and all(isinstance(value, str) for value in values):
        return "".join(values)
    if all(isinstance(value, dict) for value in values):
        return _merged(values)
    if all(isinstance(value, list) for value in values):
        items = list(chain.from_iterable(values))
        pieced = name in PUT_TOGETHER and all(isinstance(item, dict) for item in items)
        return PUT_TOGETHER[name](items) if pieced else items
    return values[0 if name in FIRST else -1]


def _tool_calls(pieces: list[JSON]) -> list[JSON]:
    calls = defaultdict[int, list[JSON]](list)
    for piece in pieces:
        calls[piece.get("index") or 0].append({name: value for name, value in piece.items() if name != "index"})
    return [_merged(calls[index]) for index in sorted(calls)]


def _reasoning_details(pieces: list[JSON]) -> list[JSON]:
    """OpenRouter's: a text or a summary comes in pieces of one index, its signature last; all else comes whole.

    https://openrouter.ai/docs/use-cases/reasoning-tokens"""
    details: list[JSON] = []
    for (kind, _), group in groupby(pieces, lambda piece: (piece.get("type"), piece.get("index"))):
        run = list(group)
        details += [_merged(run)] if kind in ("reasoning.text", "reasoning.summary") else run
    return details


PUT_TOGETHER: Mapping[str, Callable[[list[JSON]], list[JSON]]] = {
    "tool_calls": _tool_calls,
    "reasoning_details": _reasoning_details,
}
"""Lists whose items come in pieces."""


def _message(delta: JSON) -> JSON:
    """A whole message always has these three, and nothing else that is empty; one that only calls has null content."""
    said = {name: value for name, value in delta.items() if value}
    silent = None if said.keys() & {"tool_calls", "function_call", "refusal", "audio"} else ""
    return {**said, "role": "assistant", "content": said.get("content", silent), "refusal": said.get("refusal")}


def chunked(body: JSON) -> JSON:
    """The reverse: a whole body as the one chunk that says it all, finish reasons included."""
    choices = [
        {**{name: value for name, value in choice.items() if name != "message"}, "delta": _delta(choice["message"])}
        if "message" in choice
        else dict(choice)
        for choice in body["choices"]
    ]
    return {**body, "choices": choices}


def _delta(message: JSON) -> JSON:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]} if calls else message
