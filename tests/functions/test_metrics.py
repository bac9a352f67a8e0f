"""`GET /metrics`, and what of a deployer's own is called by name in `gateway.toml`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from functions.deps import build
from shared import tokens
from shared.config import ConfigError
from shared.metrics import Nowhere, Prometheus
from shared.settings import Settings
from tests.functions.doors import Door, opened, refusal
from tests.server import PEPPER, ROOT
from tests.upstream import Upstream, answer

FIELD = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"[a-z_]+(?:\{{{FIELD}(?:,{FIELD})*\}})? (?:\d+(?:\.\d+)?(?:e-?\d+)?|\+Inf)")
COMMENT = re.compile(r"# (?:HELP [a-z_]+ .+|TYPE [a-z_]+ (?:counter|gauge|histogram))")


async def test_an_admin_reads_what_was_counted(door: Door, provider: Upstream) -> None:
    provider.always("gpt-4o", answer(500, {"error": {"message": "no"}}))
    await door.chat()
    await door.chat(model="openai/gpt-4o")
    await door.chat(model="openai/a-name-that-somebody-made-up")
    limited = await door.make(rpm=0)
    assert (await door.chat(limited["key"])).status_code == 429
    await door.ask("GET", "/v1/models/openai/gpt-4o")
    await door.ask("GET", "/nowhere/at/all")
    metrics = await door.ask("GET", "/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = metrics.text.splitlines()
    assert metrics.text.endswith("\n")
    assert [line for line in lines if not (SAMPLE.fullmatch(line) or COMMENT.fullmatch(line))] == []
    for expected in (
        'ai_requests_total{provider="openai",route="/chat/completions",status="200"} 2',
        'ai_requests_total{provider="none",route="/chat/completions",status="502"} 1',
        'ai_requests_total{provider="none",route="/models/{name:path}",status="200"} 1',
        'ai_requests_total{provider="none",route="other",status="404"} 1',
        'ai_requests_rate_limited{provider="none"} 1',
        'ai_errors_total{kind="server",provider="none"} 1',
        'ai_tokens_used_accurate{kind="completion",model="gpt-4o-mini",provider="openai"} 5',
        "ai_requests_open 0",
    ):
        assert expected in lines
    assert "somebody" not in metrics.text
    assert "nowhere" not in metrics.text


async def test_others_do_not(door: Door) -> None:
    made = await door.make()
    assert refusal(await door.ask("GET", "/metrics", key=made["key"])) == (403, "admin_required", None)
    assert refusal(await door.ask("GET", "/metrics", key=None)) == (401, "invalid_api_key", None)


async def test_where_metrics_go_elsewhere_that_is_said(tmp_path: Path, provider: Upstream) -> None:
    async with opened(tmp_path, provider.url, AWS_LAMBDA_FUNCTION_NAME="lightrail-api") as door:
        told = await door.ask("GET", "/metrics")
        assert refusal(told) == (404, "not_found", None)
        assert "CloudWatch" in told.json()["error"]["message"]
    (tmp_path / "gateway.toml").write_text('metrics = "none"\n')
    async with opened(tmp_path, provider.url) as door:
        told = await door.ask("GET", "/metrics")
        assert refusal(told) == (404, "not_found", None)
        assert "gateway.toml" in told.json()["error"]["message"]


async def test_metrics_of_ones_own_are_told_and_can_break_nothing(
    tmp_path: Path, provider: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    class Own(Nowhere):
        def count(self, name: str, value: float = 1, /, **labels: str) -> None:
            seen.append((name, labels))
            raise ConnectionError("statsd is away")

    module = ModuleType("own_metrics")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "own_metrics", module)
    (tmp_path / "gateway.toml").write_text('metrics = "own_metrics:Own"\n')
    async with opened(tmp_path, provider.url) as door:
        assert (await door.chat()).status_code == 200
        assert (await door.ask("GET", "/health")).status_code == 200
    route = {"route": "/chat/completions", "status": "200", "provider": "openai"}
    assert seen == [
        ("ai_requests_total", route),
        ("ai_requests_total", {**route, "route": "/health", "provider": "none"}),
    ]


# gateway.toml ------------------------------------------------------------------------------------------------------


def examples() -> str:
    """The shipped file with all its examples switched on: in each paragraph, what follows a line with `#` alone."""
    shown: list[str] = []
    for paragraph in (ROOT / "gateway.toml").read_text().split("\n\n"):
        _, _, example = paragraph.partition("\n#\n")
        shown += [line.removeprefix("#").removeprefix(" ") for line in example.splitlines()]
    first, second = "\n".join(shown).split("[aliases]\n", 1)
    return f"{first}[aliases]\n{second.replace('[aliases]', '')}"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("shared.own")
    module.statsd, module.moderate, module.qwen_tokens = Prometheus, lambda text: None, len
    monkeypatch.setitem(sys.modules, "shared.own", module)
    return module


def settings(folder: Path, toml: str, **environ: str) -> Settings:
    (folder / "gateway.toml").write_text(toml)
    return Settings.read({"LR_KEY_PEPPER": PEPPER, "GATEWAY_CONFIG": str(folder / "gateway.toml"), **environ})


def test_every_example_of_the_shipped_file_works(tmp_path: Path, own: ModuleType) -> None:
    environ = {"OLLAMA_BASE_URL": "http://localhost:11434", "LAB_API_KEY": "k"}
    try:
        services = build(settings(tmp_path, examples(), **environ))
        seeds = {
            "gpt-3.5-turbo": "mistral:7b",
            "gpt-4": "llama3:8b",
            "gpt-4-turbo": "llama3:8b",
            "claude-3-opus": "llama3:8b",
            "claude-3-sonnet": "mistral:7b",
        }
        told = {name: [to.id for to in services.catalog.resolve(name).deployments] for name in seeds}
        assert told == {name: [f"ollama/{model}"] for name, model in seeds.items()}
        assert services.catalog.listing("claude-3-sonnet").backends == ("ollama/mistral:7b", "ollama/qwen:7b")
        assert tokens.estimate_text("四个字符", "qwen3-32b") == 4
        assert [check.name for check in services.catalog.file.safety] == [
            "length",
            "words",
            "card numbers",
            "moderation",
        ]
    finally:
        tokens.use({})


@pytest.mark.parametrize(
    ("toml", "wrong"),
    [
        ('metrics = "statsd"', "metrics: 'statsd' is no function"),
        ("[[safety]]\nmax_bytes = 5", "safety.0.name: Field required"),
        ('[[safety]]\nname = "a"\nmax_byte = 5', "safety.0.max_byte: Extra inputs are not permitted"),
        ('[[safety]]\nname = "a"\ncontains = [""]', "safety.0.contains.0"),
        ('[[safety]]\nname = "a"', "safety.a: checks nothing"),
        ('[estimators]\n"x-*" = "lama"', "estimators.x-*: there is no 'lama'"),
    ],
)
def test_a_mistake_stops_the_start_by_its_name(tmp_path: Path, toml: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(settings(tmp_path, toml))
    assert f"gateway.toml: {wrong}" in str(caught.value)
