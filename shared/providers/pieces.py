"""What answers are read with, and chunks are made of, by the dialects that are not OpenAI's."""

from __future__ import annotations

from typing import Any, cast

from shared.providers.dialect import Piece
from shared.schema import JSON

MAX_TOKENS = 1 << 40
"""A larger count is a mistake."""


def delta(**said: Any) -> list[Piece]:
    """A chunk with this in it; none where it is nothing."""
    return [Piece({"choices": [{"index": 0, "delta": said}]})] if any(said.values()) else []


def tool_call(call_id: Any, name: Any, arguments: str) -> JSON:
    return {"id": text_of(call_id), "type": "function", "function": {"name": text_of(name), "arguments": arguments}}


def more_arguments(call: JSON, text: str) -> list[Piece]:
    """Of a call in pieces: its index `at` among the calls, None for one that is not the caller's; `told`: has some."""
    if call["at"] is None or not text:
        return []
    call["told"] = True
    return delta(tool_calls=[{"index": call["at"], "function": {"arguments": text}}])


def text_of(value: Any) -> str:
    """Raises TypeError for what is no text: an answer without a stop reason is none."""
    if isinstance(value, str):
        return value
    raise TypeError(value)


def text_or_none(value: Any) -> str | None:
    """Raises TypeError for what is neither."""
    return None if value is None else text_of(value)


def count_of(counts: JSON, name: str) -> int:
    """A number of tokens; 0 where there is none. Cohere's documents say `number`: 11.0 is one, too."""
    value: Any = counts.get(name)
    return int(value) if type(value) in (int, float) and 0 <= value < MAX_TOKENS else 0


def object_of(value: Any) -> JSON:
    return cast("JSON", value) if isinstance(value, dict) else {}
