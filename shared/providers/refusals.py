"""What a provider's refusal means: every shape of error body there is, to one row of `FAULTS` and a clean message."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, cast

import orjson

from shared.errors import ProviderError
from shared.schema import JSON

MAX_MESSAGE = 500
PARAM = re.compile(r"[A-Za-z_][\w.\[\]-]{0,127}")
MAX_WAIT = 60.0
"""Seconds; a longer wish is not worth waiting for, and is often a mistake."""


class Said(NamedTuple):
    """What an error body says, wherever it says it; `reasons` are further codes."""

    message: str = ""
    type: str = ""
    code: str = ""
    param: str | None = None
    status: int | None = None
    reasons: str = ""
    wait: str = ""


class Sign(NamedTuple):
    """How a fault shows: in `type` and `code` at any status, in the message's words at these."""

    fault: str
    codes: re.Pattern[str]
    statuses: frozenset[int]
    words: re.Pattern[str]


def _sign(fault: str, codes: str, statuses: set[int], words: str) -> Sign:
    return Sign(fault, re.compile(codes, re.IGNORECASE), frozenset(statuses), re.compile(words, re.IGNORECASE))


NOTHING = r"(?!)"
SIGNS = (
    _sign("rate_limit", r"throttlingexception|servicequotaexceeded", set(), NOTHING),  # Bedrock: "Too many tokens, …"
    _sign(
        "money",
        r"insufficient_quota|billing|insufficient_(balance|funds|credits)|payment_required|perday\w*-freetier",
        {400, 401, 402, 403, 412, 429},
        r"insufficient (balance|funds|credits?)|(\bno|\bany|out of|not enough|more) (\w+ )?credits|spending limit"
        r"|credit balance is too low|specified (\w+ )?usage limits",  # Anthropic, with a 400
    ),
    _sign(
        "policy",
        r"content_filter|content_policy|responsibleai|moderation|safety_check|prohibited_content",
        {400, 403, 422, 451},
        r"content management policy|violates? (our |the )?(usage|content|safety)|requires moderation|safety_check"
        r"|\bflagged\b",
    ),
    _sign(
        "context",
        r"context_length|context_size|context_window|too_many_prompt_tokens|prompt_too_long",
        {400, 413, 422, 429, 500},
        r"(maximum|max|exceed\w*|available|model'?s) (the )?(\w+ )?context"
        r"|context (length|window|size) (of|is|exceeded)|prompt (is )?too long|too many (input |prompt )?tokens"
        r"|length of all messages|^request too large for"
        r"|reduce the length|input (length|tokens?) .{0,40}exceed|input is too long",
    ),
    _sign(
        "model_gone",
        r"model_not_found|model_decommissioned|deploymentnotfound|invalid_model|model_not_available|unknown_model",
        {400, 403, 422},
        r"(invalid|unknown) model\b|model .{0,90}(not found|not exist|decommissioned|deprecated|no longer|unavailable)"
        r"|not a valid model|supported (api )?model names are|to sample from this model|access to (the |this )?model"
        r"|model identifier is invalid|with on-demand throughput",  # Bedrock
    ),
    _sign(
        "server", r"tool_use_failed|json_validate_failed", set(), NOTHING
    ),  # Groq: the model's own words were no call
    _sign("rate_limit", r"rate_?limit|too_many_requests|throttl|capacity_exceeded|resource_exhausted", set(), NOTHING),
    _sign("overloaded", r"overloaded|unavailable_error|engine_busy|modelnotready", set(), NOTHING),
    _sign(
        "auth",
        r"invalid_api_key|api_key_invalid|authentication|unauthori[sz]ed|permission_denied",
        {400},
        r"(incorrect|invalid|missing|wrong|valid) api[ _-]?key|user location is not supported",
    ),
)
"""In this order; what shows no sign is told by its status alone."""
STATUSES = {
    401: "auth",
    402: "money",
    403: "auth",
    404: "model_gone",
    405: "protocol",  # 405 to 426: it was asked in a way that the gateway's operator must mend
    407: "protocol",
    410: "protocol",
    426: "protocol",
    408: "not_now",
    409: "not_now",
    413: "body_too_large",
    424: "server",  # Bedrock: the model behind it failed
    425: "not_now",
    429: "rate_limit",
    498: "rate_limit",  # Groq's flex tier is full: https://console.groq.com/docs/errors
    503: "overloaded",
    529: "overloaded",
}
OURS = {
    "auth": "The provider refused the gateway's credentials.",
    "money": "The gateway's account at the provider has no credit left.",
}
"""Said instead of what the provider says about our account."""
AMBIGUOUS = frozenset({500, 502, 504, 520, 522, 524})
"""Somebody between us gave up waiting: the provider may have done the work."""


def failure(status: int, headers: Mapping[str, str], content: bytes, kind: str = "") -> ProviderError:
    """What a status other than 200 means; `kind` is its type where a header has it."""
    text = content.decode("utf-8", "replace").strip()
    page = text.startswith("<")  # a proxy's, never relayed
    try:
        said = _said(orjson.loads(text))
    except orjson.JSONDecodeError:
        said = Said(message="" if page or text.startswith(("{", "[")) else text)
    said = said._replace(type=said.type or kind)
    fault = "protocol" if page and status == 404 else fault_of(status, said)
    waits = fault in ("rate_limit", "overloaded", "not_now")
    return _error(fault, status, said, retry_after(headers, said.message, said.wait) if waits else None)


def in_answer(body: JSON) -> ProviderError:
    """What an error inside a 200 means: as its own code says, if it does."""
    said = _said(body)
    return _error(fault_of(said.status, said), said.status, said, None)


def is_refusal(body: JSON) -> bool:
    """Whether a body without choices or data is an error rather than an empty answer."""
    return bool(body.get("error") or body.get("detail") or body.get("object") == "error" or body.get("type") == "error")


def fault_of(status: int | None, said: Said) -> str:
    codes = f"{said.type} {said.code} {said.reasons}"
    for sign in SIGNS:
        if sign.codes.search(codes) or (
            (status is None or status in sign.statuses) and sign.words.search(said.message)
        ):
            return sign.fault
    if status is None:
        return "error_in_200"
    return STATUSES.get(status) or ("server" if status >= 500 else "bad_request")


def _error(fault: str, status: int | None, said: Said, wait: float | None) -> ProviderError:
    message = OURS.get(fault) or clean(said.message)
    return ProviderError(
        fault,
        message
        or (f"The provider answered with status {status}." if status else "The provider answered with an error."),
        status=status,
        param=said.param if said.param and PARAM.fullmatch(said.param) and clean(said.param) == said.param else None,
        code=said.code if re.fullmatch(r"[a-z][a-z_]{2,63}", said.code) else None,
        retry_after=wait,
        ambiguous=status in AMBIGUOUS,
    )


def _said(body: Any) -> Said:
    """OpenAI's object, or a string; xAI's, Mistral's and Cohere's flat ones, FastAPI's `detail`, Gemini's array."""
    outer = _object(body)
    error: Any = outer.get("error") or outer.get("errors") or body
    if isinstance(error, str):
        return Said(message=error, type=_text(outer.get("type")), code=_text(outer.get("code")))
    inner = _object(error)
    code, param = inner.get("code"), inner.get("param")
    said = Said(
        message=_message(inner.get("message")) or _message(inner.get("detail")) or _message(inner.get("error")),
        type=_text(inner.get("type")) or _text(inner.get("status")),
        code=_text(code),
        param=param if isinstance(param, str) else None,
        status=next((c for c in (inner.get("status_code"), code, inner.get("raw_status_code")) if _is_status(c)), None),
    )
    if isinstance(details := inner.get("details"), list):
        said = said._replace(**_details(cast("list[Any]", details)))
    raw = _object(inner.get("metadata")).get("raw")
    return _behind(said, raw) if isinstance(raw, str) and raw else said


def _details(details: list[Any]) -> JSON:
    """Google's: why, which quotas have run out, and for how long. https://google.aip.dev/193"""
    reasons, wait = list[str](), ""
    for detail in details:
        match detail:
            case {"reason": str(reason)}:
                reasons.append(reason)
            case {"violations": [*quotas]}:
                reasons += [_text(_object(quota).get("quotaId")) for quota in quotas]
            case {"retryDelay": str(wait)}:
                pass
            case _:
                pass
    return {"reasons": " ".join(reasons), "wait": wait}


def _behind(said: Said, raw: str) -> Said:
    """OpenRouter's `metadata.raw`: the body, or the words, of the provider behind it."""
    try:
        inner = _said(orjson.loads(raw))
    except orjson.JSONDecodeError:
        inner = Said(message=raw)
    return inner._replace(status=said.status) if inner.message else said


def _object(value: Any) -> JSON:
    """The object, or the first of an array of them; else an empty one."""
    if isinstance(value, list) and value:
        value = cast("list[Any]", value)[0]
    return cast("JSON", value) if isinstance(value, dict) else {}


def _message(value: Any) -> str:
    """FastAPI's list of `{loc, msg}` included: `body.messages.0.role: Input should be …`."""
    match value:
        case str():
            return value
        case {"loc": [*place], "msg": str(wrong)}:
            return f"{'.'.join(map(str, place))}: {wrong}"
        case {"detail": inner} | {"message": inner} | {"msg": inner}:
            return _message(inner)
        case [*items]:
            return "; ".join(filter(None, map(_message, items[:5])))
        case _:
            return ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if type(value) is int else ""


def _is_status(value: Any) -> bool:
    return type(value) is int and 400 <= value < 600


SECRETS = (
    (re.compile(r"(?i)\b(?:https?|wss?)://[^\s\"'<>)\]}]+"), "[url]"),
    (re.compile(r"(?i)\bbearer\s+[\w.~+/=-]{6,}"), "[key]"),
    (re.compile(r"[^\s*]{0,64}\*{3,}[\w*.-]*"), "[key]"),  # a key the provider masked itself
    (re.compile(r"(?i)\b(?:sk|pk|rk|gsk|xai|csk|pplx|fw|hf|tgp|nvapi|lr)[-_][\w.-]{6,}"), "[key]"),
    (re.compile(r"\bAIza[\w-]{20,}|\beyJ[\w-]+\.[\w.-]+|\bAKIA[A-Z0-9]{12,}"), "[key]"),
    (re.compile(r"(?i)\b(?:org|organization|proj|project|acct|account|user|team)[-_](?=\w*\d)\w{6,}"), "[id]"),
    (re.compile(r"(?i)\barn:[\w:/.-]+|\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b|\b\d{12}\b"), "[id]"),
    (re.compile(r"\b(projects/|project_number:)[\w.:-]+"), r"\1[id]"),  # Google's
    (re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.-]+\w"), "[address]"),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b"), "[host]"),
    (
        re.compile(
            r"(?i)(?<![\w.-])(?:[a-z0-9-]{1,63}\.){1,9}(?:com|net|org|io|ai|dev|app|cloud|internal|local|svc)\b(?::\d+)?"
        ),
        "[host]",
    ),
    (re.compile(r"\b(?=\w*\d)(?=\w*[a-zA-Z])\w{32,}\b"), "[id]"),
)


def clean(text: str) -> str:
    """For the caller's eyes: without keys, account ids, hosts and URLs, on one line of `MAX_MESSAGE` characters."""
    text = " ".join(text[: 4 * MAX_MESSAGE].split())
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
AGAIN = re.compile(r"(?i)(?:try again|retry) in ((?:\d[\d.]*(?:h|ms|m|s))+)")


def retry_after(headers: Mapping[str, str], message: str = "", wait: str = "") -> float | None:
    """The seconds that a provider wants to be left alone, however it says so; None where that makes no sense."""
    now = _moment(headers.get("date")) or time.time()  # the provider's own clock, where it tells it
    wishes = (
        (_number(headers.get("retry-after-ms")) or 0) / 1000,
        _seconds(headers.get("retry-after"), now),
        *(_seconds(headers.get(name), now) for name in _resets(headers)),
        _seconds(wait or (found[1] if (found := AGAIN.search(message)) else None), now),
    )
    return next((wish for wish in wishes if wish and 0 < wish <= MAX_WAIT), None)


def _resets(headers: Mapping[str, str]) -> list[str]:
    """The `x-ratelimit-reset-*` of what has run out, else all of them."""
    names = [name for name in headers if name.lower().startswith(("x-ratelimit-reset", "ratelimit-reset"))]
    spent = [name for name in names if headers.get(name.lower().replace("reset", "remaining")) == "0"]
    return spent or names


def _seconds(value: str | None, now: float) -> float | None:
    """`2`, `1m2.5s`, `350ms`, an HTTP date, or an epoch in seconds or milliseconds."""
    if not value:
        return None
    if (number := _number(value)) is not None:
        return number if number < 1e9 else number - now if number < 1e11 else number / 1000 - now
    if match := DURATION.fullmatch(value.strip()):
        hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
        return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    moment = _moment(value)
    return moment - now if moment else None


def _number(value: str | None) -> float | None:
    return float(value) if value and re.fullmatch(r"\s*\d{1,15}(\.\d{1,9})?\s*", value) else None


def _moment(value: str | None) -> float | None:
    try:
        return parsedate_to_datetime(value).timestamp() if value else None
    except ValueError:
        return None
