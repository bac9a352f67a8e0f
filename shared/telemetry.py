"""One log line and a few metrics per request, by Powertools: JSON and EMF on Lambda, readable in a terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.logging.formatter import LambdaPowertoolsFormatter
from aws_lambda_powertools.metrics import MetricUnit

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
    """Where a finished request is told: the log always, CloudWatch through EMF on Lambda."""

    def __init__(self, settings: Settings, secrets: Iterable[str] = ()) -> None:
        formatter = JSONLines() if settings.on_lambda else Terminal()
        formatter.redact = Redactor(secrets)
        if isinstance(formatter, JSONLines):
            formatter.append_keys(service=logger.service)  # pyright: ignore[reportUnknownMemberType] untyped there
        logger.setLevel(settings.log_level.upper())
        for handler in logger.handlers:
            handler.setFormatter(formatter)
        self._metrics = Metrics(namespace="Lightrail", service="gateway") if settings.on_lambda else None

    def request(self, told: dict[str, Any]) -> None:
        """One line for one request: `id method path status ms` and, of a model call, what the record says."""
        shown = {name: value for name, value in told.items() if value is not None}
        logger.info("request", extra={**shown, "line": terminal_line(shown)})
        if self._metrics is not None:
            self._emit(shown)

    def _emit(self, told: dict[str, Any]) -> None:
        metrics = self._metrics
        assert metrics is not None
        metrics.add_dimension(name="provider", value=str(told.get("provider", "none")))
        metrics.add_metric("Requests", MetricUnit.Count, 1)
        metrics.add_metric("Errors", MetricUnit.Count, int(told["status"] >= 500 or told.get("outcome") == "failed"))
        metrics.add_metric("Latency", MetricUnit.Milliseconds, told["ms"])
        for name, field in (("PromptTokens", "prompt_tokens"), ("CompletionTokens", "completion_tokens")):
            if field in told:
                metrics.add_metric(name, MetricUnit.Count, told[field])
        if "cost_usd" in told:
            metrics.add_metric("CostUSD", MetricUnit.NoUnit, told["cost_usd"])
        metrics.add_metadata(key="id", value=told["id"])
        metrics.flush_metrics()
        sys.stdout.flush()  # which is a pipe on Lambda, and would keep the line for later


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
