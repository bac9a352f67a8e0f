"""How Claude is asked to think, wherever it is served.

https://platform.claude.com/docs/en/build-with-claude/thinking and …/effort; which model takes what stands in its row.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, cast

from shared.catalog import Deployment
from shared.providers.parameters import EFFORTS, Parameters, hides_reasoning
from shared.providers.pieces import object_of
from shared.schema import JSON, Call

LEAST = 1024
"""Tokens: a smaller budget is refused."""
LEVELS = ("low", "medium", "high", "xhigh", "max")
WAYS = ("reasoning_effort", "reasoning")


Place: TypeAlias = tuple[int, int]
"""In an answer: how many characters and how many calls of it come before."""
START: Place = (0, 0)


class Stretch(NamedTuple):
    """A piece of what an assistant said: what it thought, its text after that, and then its calls."""

    thinking: list[JSON]
    content: str | list[JSON] | None
    calls: list[JSON]


class Thought(NamedTuple):
    """What is sent as `thinking` and as `output_config.effort`. `on`: Claude may think, be it unasked."""

    thinking: JSON | None
    effort: str | None
    on: bool


def think(call: Call, parameters: Parameters, to: Deployment, max_tokens: int, *, forced: bool) -> Thought:
    """What the caller asks for, in the model's own way; what cannot be is told as dropped.

    `max_tokens` includes what is thought. `forced`: to call a tool, at which only models that think by themselves may
    think. With a budget it must be shown what it thought at the start of the turn whose calls are now answered:
    https://platform.claude.com/docs/en/build-with-claude/thinking-tool-workflows"""
    how = to.provider.thinks(to.model)
    effort, budget = parameters.reasoning()
    if effort is None and budget is None:
        return Thought(None, None, how in ("disabled", "between_tools", "always"))
    if effort == "none":
        if how == "always":
            parameters.keep_back(*WAYS)
        off: JSON | None = {"type": how} if how in ("disabled", "between_tools") else None
        return Thought(off, None, how in ("between_tools", "always"))
    hidden = hides_reasoning(call)
    if how == "budget" and not forced and max_tokens > LEAST and not _forgotten(call, to):
        wish = budget or int(EFFORTS[effort or "medium"] * max_tokens)
        thinking: JSON = {"type": "enabled", "budget_tokens": max(LEAST, min(wish, max_tokens * 19 // 20))}
        return Thought(thinking | ({"display": "omitted"} if hidden else {}), None, on=True)
    if how in ("never", "budget") or (how == "adaptive" and forced):
        parameters.keep_back(*WAYS)
        return Thought(None, None, on=False)
    if budget:
        parameters.keep_back(*WAYS)
    shown = "omitted" if hidden else "summarized"  # newer models show nothing unless told to
    thinking = {"type": "adaptive", "display": shown}
    return Thought(thinking, level(effort, to) if effort else None, on=True)


def level(effort: str, to: Deployment) -> str:
    """The strongest that the model knows and that is not above the caller's."""
    known = (levels for pattern, levels in to.provider.thinking_levels.items() if fnmatchcase(to.model, pattern))
    levels, order = next(known, LEVELS), list(EFFORTS)
    return next((level for level in reversed(levels) if order.index(level) <= order.index(effort)), levels[0])


def signed(thought: list[tuple[Place, JSON]], end: Place, to: Deployment) -> JSON:
    """What `stretches` takes back, as `extra_content`. Signatures are of no use to another model.

    Where Claude thought in between, too, `places` says where each block stands, and last where the answer ends."""
    kept: JSON = {"model": to.model, "thinking": [block for _, block in thought]}
    if any(place != START for place, _ in thought):
        kept["places"] = [*(list(place) for place, _ in thought), list(end)]
    return {to.provider.dialect: kept}


def stretches(message: JSON, to: Deployment, *, reminded: bool) -> list[Stretch]:
    """What the assistant said, in the order in which it did; `reminded`: with what it thought, as far as that is known.

    "`thinking` blocks in the latest assistant message cannot be modified", and moving them does. Where the client has
    changed the text or the calls, their old places mean nothing, and all that was thought comes first."""
    content = message.get("content") or message.get("refusal")
    calls: list[JSON] = message.get("tool_calls") or []
    thinking = thoughts(message, to) if reminded else []
    if thinking and (told := _kept(message, to).get("places")):
        text = content if isinstance(content, str) else _joined(content or [])
        if text is not None and (places := _places(told, len(thinking), (len(text), len(calls)))):
            blocks: list[list[JSON]] = [[], *([block] for block in thinking)]
            steps = zip(blocks, pairwise(places), strict=True)
            return [Stretch(block, text[a:b], calls[m:n]) for block, ((a, m), (b, n)) in steps]
    return [Stretch(thinking, content, calls)]


def _places(told: Any, thinking: int, end: Place) -> list[Place]:
    """The start, and what `signed` told; none where it is not of this message. No message may end with a thought."""
    places = [START]
    for place in cast("list[Any]", told) if isinstance(told, list) else ():
        match place:
            case [int(text), int(calls)] if text >= places[-1][0] and calls >= places[-1][1]:
                places.append((text, calls))
            case _:
                return []
    return places if len(places) == thinking + 2 and places[-2] != places[-1] == end else []


def _joined(parts: list[JSON]) -> str | None:
    """Of texts, as some clients return them; None where there is anything else, which Claude did not say."""
    return "".join(part["text"] for part in parts) if all(part["type"] == "text" for part in parts) else None


def thoughts(message: JSON, to: Deployment) -> list[JSON]:
    """What this very model thought before it said this, as it signed it: only so it takes it back."""
    blocks: Any = _kept(message, to).get("thinking")
    if not isinstance(blocks, list):
        return []
    return [block for block in map(object_of, cast("list[Any]", blocks)) if is_signed(block)]


def _kept(message: JSON, to: Deployment) -> JSON:
    kept = object_of(object_of(message.get("extra_content")).get(to.provider.dialect))
    return kept if kept.get("model") == to.model else {}


def is_signed(block: JSON) -> bool:
    """Or encrypted; on either wire. Other thoughts are refused in a history."""
    said = object_of(block.get("reasoningContent")) or block
    said = object_of(said.get("reasoningText")) or said
    return bool(said.get("signature") or said.get("data") or said.get("redactedContent"))


def _forgotten(call: Call, to: Deployment) -> bool:
    """Whether what was thought before the calls now answered is not known, as they are another's, or nobody kept it.

    "A tool-use loop is one assistant turn", which need only begin with a thought: later calls may have none. Nor may
    an answer that the caller began, and Claude is to end, stand without one."""
    first: JSON | None = None
    messages: list[JSON] = call.body["messages"]
    for message in reversed(messages):
        if message["role"] == "assistant":
            if first is None and not message.get("tool_calls"):
                return message is messages[-1] and not thoughts(message, to)
            first = message
        elif first is not None and message["role"] == "user":
            break
    return first is not None and not thoughts(first, to)
