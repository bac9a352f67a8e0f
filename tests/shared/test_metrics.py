"""What is measured of a request, and how each place is told it."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from shared.config import ConfigError
from shared.metrics import EMF, Nowhere, Prometheus, chosen, measure
from shared.schema import JSON
from shared.settings import Settings
from shared.telemetry import Telemetry

TOLD: JSON = {"id": "gen-1", "route": "/chat/completions", "status": 200, "ms": 1500.0}


def settings(**environ: str) -> Settings:
    return Settings.read(environ)


def doc(provider: str | None = "openai", model: str = "gpt-4o", *faults: str | None, **more: Any) -> JSON:
    """A record; without faults, of one attempt that answered."""
    return {
        "provider": provider,
        "model": model,
        "attempts": [{"provider": "openai", "model": model, "error": fault} for fault in faults or (None,)],
        "cached": False,
        "time_to_first_token_ms": 300.0,
        "tokens": {"prompt_tokens": 10, "completion_tokens": 5, "source": "provider"},
        "cost": {"total_cost": 0.25},
        **more,
    }


def told(to: Prometheus, record: JSON | None = None, **more: Any) -> set[str]:
    """What is told after one more request, without buckets and comments."""
    measure(to, {**TOLD, **more}, record, 2, lambda provider, model: model == "gpt-4o")
    return {line for line in to.text().splitlines() if not line.startswith("#") and "_bucket" not in line}


def test_an_answer_is_counted_timed_and_priced() -> None:
    assert told(Prometheus(), doc(), provider="openai", outcome="ok") == {
        'ai_requests_total{provider="openai",route="/chat/completions",status="200"} 1',
        "ai_requests_open 2",
        'ai_request_seconds_sum{provider="openai",route="/chat/completions"} 1.5',
        'ai_request_seconds_count{provider="openai",route="/chat/completions"} 1',
        'ai_attempts_total{fault="none",model="gpt-4o",provider="openai"} 1',
        'ai_time_to_first_token_seconds_sum{model="gpt-4o",provider="openai"} 0.3',
        'ai_time_to_first_token_seconds_count{model="gpt-4o",provider="openai"} 1',
        'ai_tokens_used_accurate{kind="prompt",model="gpt-4o",provider="openai"} 10',
        'ai_tokens_used_accurate{kind="completion",model="gpt-4o",provider="openai"} 5',
        'ai_cost_usd_total{model="gpt-4o",provider="openai"} 0.25',
    }


def test_estimated_tokens_are_counted_apart_and_nobodys_model_is_no_label() -> None:
    record = doc(
        model="made-up\nby a caller", tokens={"prompt_tokens": 7, "completion_tokens": 0, "source": "estimated"}
    )
    lines = told(Prometheus(), record, provider="openai")
    assert 'ai_tokens_used_estimated{kind="prompt",model="other",provider="openai"} 7' in lines
    assert not any("made-up" in line or "accurate" in line for line in lines)


def test_a_failure_is_counted_by_its_last_fault_and_each_attempt_by_its_own() -> None:
    failed = doc(None, "gpt-4o", "connect", "server", time_to_first_token_ms=None, cost={"total_cost": None})
    to = Prometheus()
    lines = told(to, failed, status=502, outcome="failed", error="upstream_error")
    assert 'ai_errors_total{kind="server",provider="none"} 1' in lines
    assert 'ai_attempts_total{fault="connect",model="gpt-4o",provider="openai"} 1' in lines
    assert 'ai_attempts_total{fault="server",model="gpt-4o",provider="openai"} 1' in lines
    assert 'ai_errors_total{kind="gateway",provider="none"} 1' in told(to, status=500)
    assert 'ai_requests_total{provider="none",route="/chat/completions",status="500"} 1' in told(to, status=404)
    assert 'ai_errors_total{kind="gateway",provider="none"} 1' in told(to, status=404)


def test_rate_limits_and_cache_hits_are_counted() -> None:
    to = Prometheus()
    assert 'ai_requests_rate_limited{provider="none"} 1' in told(to, status=429)
    assert 'ai_requests_rate_limited{provider="none"} 2' in told(to, error="rate_limit_exceeded")  # in a stream: 200
    assert 'ai_requests_rate_limited{provider="none"} 2' in told(to)
    lines = told(to, doc(cached=True, attempts=[]), provider="openai")
    assert 'ai_cache_hits_total{model="gpt-4o",provider="openai"} 1' in lines
    assert not any("tokens" in line for line in lines)


def test_the_text_is_prometheus_own() -> None:
    to = Prometheus()
    to.count("own_total", 2, label='a "quoted" \\ one\nof two lines')
    for seconds in (0.01, 0.05, 0.06, 1000):
        to.timing("ai_request_seconds", seconds)
    to.gauge("own_gauge", 1)
    to.gauge("own_gauge", 0.5)
    buckets = [0, 2, 3, *[3] * 10, 4]
    bounds = [*map(str, Prometheus.BUCKETS), "+Inf"]
    assert to.text().splitlines() == [
        "# TYPE own_total counter",
        r'own_total{label="a \"quoted\" \\ one\nof two lines"} 2',
        "# TYPE own_gauge gauge",
        "own_gauge 0.5",
        "# HELP ai_request_seconds Time from the request to the last byte of its answer.",
        "# TYPE ai_request_seconds histogram",
        *(f'ai_request_seconds_bucket{{le="{at}"}} {many}' for at, many in zip(bounds, buckets[1:], strict=True)),
        "ai_request_seconds_sum 1000.12",
        "ai_request_seconds_count 4",
    ]


def test_cloudwatch_is_told_once_by_request_of_what_is_worth_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    to = EMF("dev")
    lines = []
    for more in ({"status": 200}, {"status": 429}, {"status": 502, "outcome": "failed"}):
        measure(to, {**TOLD, "provider": "openai", **more}, doc(), 2, lambda provider, model: True)
        lines += [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    [directive] = lines[0]["_aws"]["CloudWatchMetrics"]
    assert directive["Namespace"] == "Lightrail"
    assert [set(each) for each in directive["Dimensions"]] == [{"service", "stage", "provider"}]
    assert {name: value for name, value in lines[0].items() if name != "_aws"} == {
        "service": "gateway",
        "stage": "dev",
        "provider": "openai",
        "id": "gen-1",
        "Requests": [1],
        "Errors": [0],
        "Latency": [1500],
        "TimeToFirstToken": [300],
        "TokensAccurate": [15],
        "CostUSD": [0.25],
    }
    assert lines[1]["RateLimited"] == [1]
    assert [line["Errors"] for line in lines] == [[0], [0], [1]]


def test_the_place_is_chosen_by_where_the_process_lives_or_by_name() -> None:
    assert isinstance(chosen(None, settings()), Prometheus)
    assert isinstance(chosen(None, settings(AWS_LAMBDA_FUNCTION_NAME="f")), EMF)
    assert isinstance(chosen("none", settings(AWS_LAMBDA_FUNCTION_NAME="f")), Nowhere)
    assert isinstance(chosen("emf", settings()), EMF)
    assert isinstance(chosen("shared.metrics:Nowhere", settings()), Nowhere)


def test_a_place_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_metrics")
    monkeypatch.setitem(sys.modules, "own_metrics", module)
    module.broken = lambda: 1 / 0
    module.nothing = lambda: None
    for name, wrong in (
        ("statsd", "'statsd' is no function"),
        ("no_such_module:made", "cannot be imported: ModuleNotFoundError"),
        ("own_metrics:broken", "'own_metrics:broken' failed: ZeroDivisionError"),
        ("own_metrics:nothing", "makes has no count, gauge, timing, error, flush"),
    ):
        with pytest.raises(ConfigError, match=f"metrics: .*{wrong}"):
            chosen(name, settings())


def test_metrics_that_raise_are_logged_once_and_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Nowhere):
        def count(self, name: str, value: float = 1, /, **labels: str) -> None:
            raise OSError("no route to statsd")

    telemetry = Telemetry(settings(), metrics=Broken())
    for _ in range(3):
        telemetry.request({**TOLD, "method": "GET", "path": "/health"})
    assert [record.msg for record in caplog.records] == ["request", "metrics.failed", "request", "request"]
