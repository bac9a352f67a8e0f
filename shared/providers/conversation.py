"""A history that any providers may have made, as the next one takes it: its turns, its tool calls and their ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import orjson

from shared.catalog import Deployment
from shared.providers.parameters import Parameters, unsupported
from shared.schema import JSON, MAX_DEPTH, too_deep

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SHORT = 9
"""Letters and digits of an id that is made here: what all who want ids of some form take."""


SHARPER = ("high", "original")
"""Details of pictures that ask for more than a provider may give by itself."""


def heard(messages: list[JSON], parameters: Parameters, to: Deployment, *, detail: bool = False) -> Iterator[JSON]:
    """The messages, one by one; what of them is lost is told: who of several said it, `detail` that cannot be said.

    Raises UnsupportedParameter for an answer that was only spoken: what it was, its provider alone knows."""
    for message in messages:
        content = message.get("content")
        if message.get("name") and message["role"] != "tool":
            parameters.tell("messages.name")
        if message["role"] == "assistant" and message.get("audio"):
            if not (content or message.get("refusal") or message.get("tool_calls")):
                raise unsupported(to, "messages", "cannot be reminded of an 'audio'")
            parameters.tell("messages.audio")
        if isinstance(content, list) and not detail and any(map(_sharper, cast("list[JSON]", content))):
            parameters.tell("messages.image_url.detail")
        yield message


def _sharper(part: JSON) -> bool:
    return part["type"] == "image_url" and part["image_url"].get("detail") in SHARPER


def in_turns(
    said: Iterable[tuple[str, list[JSON]]], to: Deployment, field: str = "content"
) -> tuple[list[JSON], list[JSON]]:
    """What the system says, wherever it says it, and the others' turns: neighbours of one role are one.

    All demand a turn: where nobody else speaks, what the system says is the user's."""
    system: list[JSON] = []
    turns: list[JSON] = []
    for role, blocks in said:
        if role in ("system", "developer"):
            system += blocks
        elif turns and turns[-1]["role"] == role:
            turns[-1][field] += blocks
        elif blocks:
            turns.append({"role": role, field: blocks})
    if not turns and not system:
        raise unsupported(to, "messages", "needs something to be said")
    return (system, turns) if turns else ([], [{"role": "user", field: system}])


def as_claude_wants(turns: list[JSON], is_result: Callable[[JSON], bool]) -> None:
    """Results of tools first, and "final assistant content cannot end with trailing whitespace"."""
    for turn in turns:
        turn["content"].sort(key=is_result, reverse=True)
    last: JSON = turns[-1]["content"][-1]
    if turns[-1]["role"] == "assistant" and "text" in last:
        last["text"] = last["text"].rstrip()


class CallIds:
    """The ids in one conversation, in the form that a provider takes, each for one call and its result.

    Kimi's are of one turn: in the next the same come again. Cohere's are as long as the names of its functions."""

    def __init__(self, form: str) -> None:
        self._form = re.compile(form, re.DOTALL)
        self._unanswered: dict[str, list[str]] = {}
        self._used: set[str] = set()

    def of_call(self, call_id: str) -> str:
        """Of a call, in the order of the history."""
        sent, times = call_id, 0
        while sent in self._used or not self._form.fullmatch(sent):
            sent, times = _made(call_id, times), times + 1
        self._used.add(sent)
        self._unanswered.setdefault(call_id, []).append(sent)
        return sent

    def of_result(self, call_id: str) -> str:
        """Of the result of the first call of this id that has none yet; one without a call is for others to refuse."""
        unanswered = self._unanswered.get(call_id)
        return unanswered.pop(0) if unanswered else call_id


def _made(call_id: str, times: int) -> str:
    seed = f"{call_id} {times}" if times else call_id
    digest = hashlib.blake2b(seed.encode("utf-8", "replace"), digest_size=SHORT).digest()
    return "".join(BASE62[byte % 62] for byte in digest)


def function_of(call: JSON, to: Deployment) -> tuple[str, str, JSON]:
    """The name of a function that was called, and its arguments, as they came and as they are.

    Raises UnsupportedParameter where they are no JSON object, which none of the providers with objects there take."""
    if not (function := call.get("function")):
        raise unsupported(to, "messages", "takes no tool calls but functions'")
    text = function["arguments"].strip() or "{}"
    try:
        given = orjson.loads(text)
    except orjson.JSONDecodeError:
        given = None
    if not isinstance(given, dict) or too_deep(given, MAX_DEPTH):
        raise unsupported(to, "messages", "takes no tool calls whose arguments are not a JSON object")
    return function["name"], text, cast("JSON", given)
