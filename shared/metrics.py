"""What is counted and timed of each request, and where that goes: CloudWatch, Prometheus, or a place of one's own.

Labels are few and known beforehand: routes, statuses, faults, providers, and models that the catalog lists; never what
a caller wrote.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Protocol, TypeAlias

from aws_lambda_powertools import Metrics as Powertools
from aws_lambda_powertools.metrics import MetricUnit

from shared.config import ConfigError, imported
from shared.schema import JSON
from shared.settings import Settings

Knows: TypeAlias = Callable[[str, str], bool]
"""Whether a provider is known to have a model; any other is somebody's guess, and no label."""
LIMITED = ("rate_limit_exceeded", "request_too_large_for_limit")


class Metrics(Protocol):
    """Called after a request's last byte, in the event loop: what takes long belongs in a thread of its own.

    What it raises is logged once and harms no request."""

    def count(self, name: str, value: float = 1, /, **labels: str) -> None: ...
    def gauge(self, name: str, value: float, /, **labels: str) -> None: ...
    def timing(self, name: str, seconds: float, /, **labels: str) -> None: ...
    def error(self, kind: str, /, **labels: str) -> None: ...
    def flush(self, request_id: str) -> None:
        """All is said of one request; on Lambda the process may now stand still for hours."""
        ...


def measure(to: Metrics, told: JSON, doc: JSON | None, open_requests: int, knows: Knows) -> None:
    """What one finished request says: `told` is what the log is told, `doc` the record of a model call."""
    provider = told.get("provider") or "none"
    to.count("ai_requests_total", route=told["route"], status=str(told["status"]), provider=provider)
    to.timing("ai_request_seconds", told["ms"] / 1000, route=told["route"], provider=provider)
    to.gauge("ai_requests_open", open_requests)
    if told["status"] == 429 or told.get("error") in LIMITED:  # in typed events it is a 200
        to.count("ai_requests_rate_limited", provider=provider)
    fault = doc["attempts"][-1]["error"] if doc and doc["attempts"] else None
    if told["status"] >= 500 or told.get("outcome") == "failed":
        to.error(fault or "gateway", provider=provider)
    if doc:
        _answered(to, doc, knows)
    to.flush(told["id"])


def _answered(to: Metrics, doc: JSON, knows: Knows) -> None:
    def who(provider: str | None, model: str | None) -> dict[str, str]:
        if not (provider and model):
            return {"provider": "none", "model": "none"}
        return {"provider": provider, "model": model if knows(provider, model) else "other"}

    for attempt in doc["attempts"]:
        fault = attempt["error"] or "none"
        to.count("ai_attempts_total", fault=fault, **who(attempt["provider"], attempt["model"]))
    answerer = who(doc["provider"], doc["model"])
    if doc["cached"]:
        to.count("ai_cache_hits_total", **answerer)
        return  # its tokens were used, and its time taken, when it was first made
    if doc["time_to_first_token_ms"] is not None:
        to.timing("ai_time_to_first_token_seconds", doc["time_to_first_token_ms"] / 1000, **answerer)
    used = "ai_tokens_used_accurate" if doc["tokens"]["source"] == "provider" else "ai_tokens_used_estimated"
    for kind in ("prompt", "completion"):
        if many := doc["tokens"][f"{kind}_tokens"]:
            to.count(used, many, kind=kind, **answerer)
    if doc["cost"]["total_cost"]:
        to.count("ai_cost_usd_total", doc["cost"]["total_cost"], **answerer)


class Nowhere:
    """No metrics."""

    def count(self, name: str, value: float = 1, /, **labels: str) -> None: ...
    def gauge(self, name: str, value: float, /, **labels: str) -> None: ...
    def timing(self, name: str, seconds: float, /, **labels: str) -> None: ...
    def error(self, kind: str, /, **labels: str) -> None: ...
    def flush(self, request_id: str) -> None: ...


class EMF:
    """A line for CloudWatch on stdout per request and provider, by Powertools. Dimensions: service, stage, provider.

    A metric costs $0.30 a month for each provider that it is told of, so there are only these; the rest is in the log's
    own line, for Logs Insights. https://aws.amazon.com/cloudwatch/pricing/"""

    NAMES: Mapping[str, tuple[str, MetricUnit]] = {
        "ai_requests_total": ("Requests", MetricUnit.Count),
        "ai_errors_total": ("Errors", MetricUnit.Count),
        "ai_requests_rate_limited": ("RateLimited", MetricUnit.Count),
        "ai_request_seconds": ("Latency", MetricUnit.Milliseconds),
        "ai_time_to_first_token_seconds": ("TimeToFirstToken", MetricUnit.Milliseconds),
        "ai_tokens_used_accurate": ("TokensAccurate", MetricUnit.Count),
        "ai_tokens_used_estimated": ("TokensEstimated", MetricUnit.Count),
        "ai_cost_usd_total": ("CostUSD", MetricUnit.NoUnit),
        "ai_cache_hits_total": ("CacheHits", MetricUnit.Count),
    }

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._powertools = Powertools(namespace="Lightrail", service="gateway")
        self._told: dict[str, dict[str, float]] = {}

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        if name in self.NAMES:
            told = self._told.setdefault(labels["provider"], {"ai_errors_total": 0})  # whose mean is the error rate
            told[name] = told.get(name, 0) + value

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """None: one environment's is nobody's."""

    def timing(self, name: str, seconds: float, /, **labels: str) -> None:
        self.count(name, round(seconds * 1000, 2), **labels)

    def error(self, kind: str, /, **labels: str) -> None:
        self.count("ai_errors_total", **labels)

    def flush(self, request_id: str) -> None:
        told, self._told = self._told, {}
        for provider, values in told.items():
            line = self._powertools
            line.add_dimension(name="provider", value=provider)
            line.add_dimension(name="stage", value=self._stage)
            for name, value in values.items():
                line.add_metric(*self.NAMES[name], value)
            line.add_metadata(key="id", value=request_id)
            line.flush_metrics()
        sys.stdout.flush()  # which is a pipe on Lambda, and would keep the line for later


Labels: TypeAlias = tuple[tuple[str, str], ...]


class Prometheus:
    """Sums of this process, which `GET /metrics` tells as text; one event loop writes and reads them.

    The client library would bring locks, a global registry, multiprocess files and collectors of its own to import, for
    the thirty lines that these three kinds need. https://prometheus.io/docs/instrumenting/exposition_formats/"""

    BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
    """Upper bounds, in seconds."""
    HELP: Mapping[str, str] = {
        "ai_requests_total": "Requests answered, by route and HTTP status; provider: who answered, or none.",
        "ai_requests_rate_limited": "Requests refused because of a rate limit, a key's or a provider's.",
        "ai_requests_open": "Model calls that are not settled yet.",
        "ai_request_seconds": "Time from the request to the last byte of its answer.",
        "ai_time_to_first_token_seconds": "Time to the first content of a stream.",
        "ai_errors_total": "Requests that failed, by the fault of the last attempt; gateway: it was no provider's.",
        "ai_attempts_total": "Deployments asked, by what came of it; fault none: it answered.",
        "ai_tokens_used_accurate": "Tokens that providers reported.",
        "ai_tokens_used_estimated": "Tokens estimated because a provider reported none.",
        "ai_cost_usd_total": "What answers cost, in US dollars.",
        "ai_cache_hits_total": "Answers that came from the cache.",
    }

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, float]] = {}
        self._gauges: dict[str, dict[Labels, float]] = {}
        self._timings: dict[str, dict[Labels, list[float]]] = {}  # the number in each bucket, those above all, the sum

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        series, key = self._counters.setdefault(name, {}), tuple(sorted(labels.items()))
        series[key] = series.get(key, 0) + value

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        self._gauges.setdefault(name, {})[tuple(sorted(labels.items()))] = value

    def timing(self, name: str, seconds: float, /, **labels: str) -> None:
        series = self._timings.setdefault(name, {})
        seen = series.setdefault(tuple(sorted(labels.items())), [0] * (len(self.BUCKETS) + 2))
        seen[bisect_left(self.BUCKETS, seconds)] += 1
        seen[-1] += seconds

    def error(self, kind: str, /, **labels: str) -> None:
        self.count("ai_errors_total", kind=kind, **labels)

    def flush(self, request_id: str) -> None:
        """Nothing: it is asked."""

    def text(self) -> str:
        """Prometheus' text format, version 0.0.4."""
        lines: list[str] = []
        for kind, families in (("counter", self._counters), ("gauge", self._gauges)):
            for name, series in families.items():
                lines += self._head(name, kind)
                lines += [f"{name}{_braced(labels)} {value}" for labels, value in series.items()]
        for name, series in self._timings.items():
            lines += self._head(name, "histogram")
            for labels, (*buckets, total) in series.items():
                for bound, below in zip((*self.BUCKETS, "+Inf"), accumulate(buckets), strict=True):
                    lines.append(f"{name}_bucket{_braced((*labels, ('le', str(bound))))} {below}")
                lines += [f"{name}_sum{_braced(labels)} {total}", f"{name}_count{_braced(labels)} {sum(buckets)}"]
        return "".join(line + "\n" for line in lines)

    def _head(self, name: str, kind: str) -> list[str]:
        return [*([f"# HELP {name} {self.HELP[name]}"] if name in self.HELP else []), f"# TYPE {name} {kind}"]


def _braced(labels: Labels) -> str:
    told = [f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels]
    return "{" + ",".join(told) + "}" if told else ""


_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def chosen(name: str | None, settings: Settings) -> Metrics:
    """What `metrics` in `gateway.toml` names: emf, prometheus, none, or `package.module:factory`, called without
    arguments. Unset: EMF on Lambda, else Prometheus. Raises ConfigError."""
    match name or ("emf" if settings.on_lambda else "prometheus"):
        case "emf":
            return EMF(settings.stage)
        case "prometheus":
            return Prometheus()
        case "none":
            return Nowhere()
        case own:
            factory = imported(own, "metrics")
    try:
        made: Metrics = factory()
    except Exception as wrong:
        raise ConfigError(f"metrics: '{own}' failed: {type(wrong).__name__}: {wrong}") from wrong
    methods = ("count", "gauge", "timing", "error", "flush")
    if lacking := [each for each in methods if not callable(getattr(made, each, None))]:
        raise ConfigError(f"metrics: what '{own}' makes has no {', '.join(lacking)}")
    return made
