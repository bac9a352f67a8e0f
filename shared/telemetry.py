"""One log line per request: JSON by Powertools on Lambda, readable in a terminal; and the request's metrics."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.logging.formatter import LambdaPowertoolsFormatter

from shared.metrics import Knows, Metrics, Nowhere, measure
from shared.schema import JSON
from shared.settings import Settings

logger = Logger(service="lightrail", logger_handler=logging.StreamHandler(sys.stderr))

SECRET_LOOKS = re.compile(
    r"lr-[0-9A-Za-z]{20,}|(?i:bearer)\s+[^\s\"',;]+|\b(?:sk|gsk|xai|pplx|fw|csk|tgp|AIza|AKIA|key)[-_][\w-]{12,}"
)
REDACTED = "[redacted]"


class Redactor:
    """Takes known secrets, and all that looks like one, out of a line on its way out."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted({secret for secret in secrets if len(secret) >= 8}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, line: str) -> str:
        line = SECRET_LOOKS.sub(REDACTED, line)
        return self._known.sub(REDACTED, line) if self._known else line


class JSONLines(LambdaPowertoolsFormatter):
    """Powertools' own JSON, redacted."""

    redact = Redactor()

    def format(self, record: logging.LogRecord) -> str:
        record.__dict__.pop("line", None)  # the terminal's
        return self.redact(super().format(record))


class Terminal(logging.Formatter):
    """`12:00:01 200 POST /v1/chat/completions gpt-4o → openai/gpt-4o 532 ms …`, redacted."""

    redact = Redactor()

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = record.__dict__.get("line")
        if extra is None:
            given = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
            extra = " ".join([record.getMessage(), *(f"{name}={value}" for name, value in given.items())])
            extra = f"{record.levelname} {extra}" if record.levelno > logging.INFO else extra
        if record.exc_info:
            extra = f"{extra}\n{self.formatException(record.exc_info)}"
        return self.redact(f"{clock} {extra}")


_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "location", "taskName"}


class Telemetry:
    """Where a finished request is told: the log, and the metrics."""

    def __init__(
        self,
        settings: Settings,
        secrets: Iterable[str] = (),
        metrics: Metrics | None = None,
        knows: Knows = lambda provider, model: False,
    ) -> None:
        formatter = JSONLines() if settings.on_lambda else Terminal()
        formatter.redact = Redactor(secrets)
        if isinstance(formatter, JSONLines):
            formatter.append_keys(service=logger.service)  # pyright: ignore[reportUnknownMemberType] untyped there
        logger.setLevel(settings.log_level.upper())
        for handler in logger.handlers:
            handler.setFormatter(formatter)
        self.metrics = metrics or Nowhere()
        self._knows = knows
        self._complained = False

    def request(self, told: dict[str, Any], doc: JSON | None = None, open_requests: int = 0) -> None:
        """One line for one request: `id method path route status ms` and, of a model call, what its record says."""
        shown = {name: value for name, value in told.items() if value is not None}
        logger.info("request", extra={**shown, "line": terminal_line(shown)})
        try:
            measure(self.metrics, shown, doc, open_requests, self._knows)
        except Exception:  # a deployer's own may raise anything, and no request suffers from it
            if not self._complained:
                self._complained = True
                logger.exception("metrics.failed")


def terminal_line(told: dict[str, Any]) -> str:
    parts = [f"{told['status']} {told['method']} {told['path']}"]
    if "model" in told:
        parts.append(f"{told['model']} → {told['answered']}" if "answered" in told else told["model"])
    parts.append(f"{told['ms']:.0f} ms")
    if "prompt_tokens" in told:
        parts.append(f"{told['prompt_tokens']}+{told['completion_tokens']} tokens")
    if "cost_usd" in told:
        parts.append(f"${told['cost_usd']:.6f}")
    parts += [str(told[name]) for name in ("outcome", "error") if name in told and told[name] != "ok"]
    parts.append(told["id"])
    return "  ".join(parts)
