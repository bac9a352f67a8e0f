"""A deployer's own checks on the text of requests, from `gateway.toml`: what one refuses is neither sent nor paid."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from shared.config import Check, ConfigError, imported
from shared.errors import ContentPolicyViolation, GatewayError
from shared.schema import JSON, OURS, SHAPES, Call
from shared.telemetry import logger

READ = frozenset(
    {"messages", "prompt", "suffix", "input", "tools", "functions", "tool_choice", "response_format", "prediction"}
)
UNREAD = (OURS | {field for shape in SHAPES.values() for field in shape.model_fields}) - READ
"""Fields of a body that no model reads. One that the schema does not know may be read, by whom it is forwarded to."""
TAGS = frozenset({"role", "type", "id", "tool_call_id", "signature", "encrypted_content"})
"""What strings of these names say is for programs."""
MOST_REASON = 300
"""Characters of a function's reason that the caller is told."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A check made ready; `contains` is case-folded."""

    row: Check
    contains: tuple[str, ...]
    matches: tuple[re.Pattern[str], ...]
    function: Callable[[str], Any] | None


class Safety:
    """The checks, in the order of the file; the first that refuses ends it, so a limit on size spares the others work.

    A pattern runs to its end: Python's `re` cannot be stopped, so nested repeats such as `(a+)+` take for ever on texts
    made for them. Write `(?>…)` or `a++` where a repeat is in a repeat, and put a size check before it."""

    def __init__(self, checks: Sequence[Check] = ()) -> None:
        """Raises ConfigError, which names the check."""
        self._rules = [_rule(check) for check in checks]
        names = [check.name for check in checks]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"safety: there are two checks named '{double}'")

    async def examine(self, call: Call) -> None:
        """Raises ContentPolicyViolation, which names the check and never what it found; or GatewayError where a check
        could not be made: what was not checked is not sent."""
        if not self._rules:
            return
        text = "\n".join(texts(call))
        for rule in self._rules:
            if refused := _refused(rule, text) or await _reason(rule, text):
                raise ContentPolicyViolation(f"The safety check '{rule.row.name}' refused this request{refused}")


def _rule(check: Check) -> Rule:
    where = f"safety.{check.name}"
    if not (check.max_bytes or check.max_characters or check.contains or check.matches or check.call):
        raise ConfigError(f"{where}: checks nothing: set max_bytes, max_characters, contains, matches or call")
    matches: list[re.Pattern[str]] = []
    for index, pattern in enumerate(check.matches):
        try:
            matches.append(re.compile(pattern))
        except re.error as wrong:
            raise ConfigError(f"{where}.matches[{index}]: {wrong}") from None
        if matches[-1].search(""):
            raise ConfigError(f"{where}.matches[{index}]: matches every text")
    contains = tuple(text.casefold() for text in check.contains)
    return Rule(check, contains, tuple(matches), imported(check.call, f"{where}.call") if check.call else None)


def _refused(rule: Rule, text: str) -> str | None:
    """How the message ends, if the size, a text or a pattern refuses."""
    row = rule.row
    if row.max_characters and len(text) > row.max_characters:
        return f": it has {len(text)} characters of text, and {row.max_characters} are allowed."
    if row.max_bytes and (size := _bytes(text)) > row.max_bytes:
        return f": it has {size} bytes of text, and {row.max_bytes} are allowed."
    folded = text.casefold() if rule.contains else ""
    if any(unwanted in folded for unwanted in rule.contains):
        return "."
    return "." if any(pattern.search(text) for pattern in rule.matches) else None


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


async def _reason(rule: Rule, text: str) -> str | None:
    """How the message ends, if the function refuses; raises GatewayError where it fails or takes too long."""
    if rule.function is None:
        return None
    try:
        async with asyncio.timeout(rule.row.timeout):
            reason = rule.function(text)
            if isawaitable(reason):
                reason = await reason
        if not isinstance(reason, str | None):
            raise TypeError(f"it returned {type(reason).__name__}, not None or a reason")
    except Exception as error:  # noqa: BLE001 whatever it is, nothing is sent
        # what it says is not logged: it may quote the request
        logger.error("safety.failed", extra={"check": rule.row.name, "error": type(error).__name__, "at": _at(error)})
        raise GatewayError(f"The safety check '{rule.row.name}' failed, so this request was not sent.") from None
    return None if reason is None else f": {reason[:MOST_REASON]}"


def _at(error: BaseException) -> str:
    """The file and line that raised it."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""


def texts(call: Call) -> Iterator[str]:
    """All that a model might read: messages of every role, prompts, inputs, tools and their arguments, schemas, names
    and addresses of files, and fields that the schema does not know. Not what is inside images, sound and PDFs.

    Raises ContentPolicyViolation for token ids, which are text that nobody here can read."""
    counted = {"completions": "prompt", "embeddings": "input"}.get(call.surface)
    for field, value in call.body.items():
        if field not in UNREAD:
            if field == counted and isinstance(value, list) and not isinstance(value[0], str):
                raise ContentPolicyViolation(
                    "This gateway checks the text of requests: send text, not token ids.", param=field
                )
            yield from _strings(value, field)


def _strings(value: Any, field: str) -> Iterator[str]:
    """The strings in the value of a field."""
    if isinstance(value, str):
        if value[:5].lower() == "data:" and field.endswith(("url", "uri", "data")):
            yield from _linked(value)
        else:
            yield value
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _strings(inner, field)
    elif isinstance(value, dict):
        members = cast("JSON", value)
        sealed = TAGS | {"data"} if members.get("type") == "base64" or field == "input_audio" else TAGS
        for name, inner in members.items():
            if field == "properties":
                yield name  # of a schema
            if not (name in sealed and isinstance(inner, str)):
                yield from _strings(inner, name)


def _linked(uri: str) -> Iterator[str]:
    """The text of a data URI, where it is text."""
    head, _, data = uri.partition(",")
    head = head.lower()
    if head.startswith(("data:text/", "data:application/json")) or head in ("data:", "data:;base64"):
        try:
            raw = base64.b64decode(data) if head.endswith(";base64") else unquote_to_bytes(data)
        except binascii.Error:
            raw = data.encode()
        yield raw.decode("utf-8", "replace")
