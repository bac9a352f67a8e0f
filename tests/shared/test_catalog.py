"""Names to deployments, and what a deployer may change about them."""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path

import pytest

from shared.catalog import Catalog
from shared.config import ConfigError, Provider
from shared.errors import ModelNotFound, NoProvider
from shared.prices import FREE, Price, PriceTable
from shared.settings import Settings

KEYS = {"OPENAI_API_KEY": "sk-openai-1", "GROQ_API_KEY": "gsk_1", "TOGETHER_API_KEY": "t-1"}


def table(**models: list[str]) -> PriceTable:
    providers = {
        name: {"models": [{"id": model, "context": 8000, "price": {"input": "1", "output": "2"}} for model in known]}
        for name, known in models.items()
    }
    return PriceTable({"schema": 1, "source": "test", "date": "2026-01-01", "providers": providers})


PRICES = table(
    openai=["gpt-4o", "gpt-4o-mini", "gpt-4o-transcribe"],
    groq=["llama-3.3-70b-versatile", "shared-model"],
    together=["meta-llama/Llama-3.3-70B-Instruct-Turbo", "shared-model"],
    mistral=["mistral-small-latest"],
    fireworks=["gpt-oss-20b"],
)


def load(toml: str = "", tmp_path: Path | None = None, **environ: str) -> Catalog:
    path = "absent.toml"
    if tmp_path:
        (tmp_path / "gateway.toml").write_text(toml)
        path = str(tmp_path / "gateway.toml")
    return Catalog.load(Settings.read({"GATEWAY_CONFIG": path, **(environ or KEYS)}), PRICES)


def ids(catalog: Catalog, name: str) -> list[str]:
    return [to.id for to in catalog.resolve(name).deployments]


def test_variables_switch_providers_on() -> None:
    catalog = load(OPENAI_API_KEY="sk-1", OLLAMA_BASE_URL="http://localhost:11434", AZURE_API_KEY="k")
    assert [row.name for row in catalog.on()] == ["openai", "ollama"]
    assert catalog.why_off("openai") is None
    assert catalog.why_off("Groq") == "set GROQ_API_KEY"
    assert catalog.why_off("azure") == "set AZURE_BASE_URL"
    assert catalog.why_off("llamacpp") == "set LLAMACPP_BASE_URL"


def test_a_base_url_may_name_only_the_host() -> None:
    catalog = load(OLLAMA_BASE_URL="http://localhost:11434/", AZURE_API_KEY="k", AZURE_BASE_URL="https://x.azure.com")
    assert {row.name: row.base_url for row in catalog.on()} == {
        "azure": "https://x.azure.com/openai/v1",
        "ollama": "http://localhost:11434/v1",
    }


def test_the_demo_is_on_only_when_asked_for() -> None:
    settings = Settings.read({"GATEWAY_CONFIG": "absent.toml"})
    assert Catalog.load(settings, PRICES).on() == ()
    demo = Catalog.load(settings, PRICES, also=["demo"])
    assert ids(demo, "demo/echo") == ["demo/echo"]
    assert demo.resolve("demo/echo").deployments[0].price is FREE
    assert demo.resolve("demo/echo").deployments[0].provider.base_url == "demo://echo"


def test_no_credential_shows_in_a_repr() -> None:
    catalog = load(OPENAI_API_KEY="sk-secret-value")
    row = catalog.on()[0]
    assert row.api_key
    assert row.api_key.get_secret_value() == "sk-secret-value"
    shown = f"{row!r} {row} {catalog.resolve('openai/x')!r} {catalog.models()!r} {row.model_dump()!r}"
    assert "sk-secret" not in shown


def test_a_provider_and_a_model_name_one_deployment() -> None:
    catalog = load()
    route = catalog.resolve("OpenAI/gpt-4o")
    assert route.asked == "OpenAI/gpt-4o"
    (to,) = route.deployments
    assert (to.id, to.provider.name, to.model, to.context_window) == ("openai/gpt-4o", "openai", "gpt-4o", 8000)
    assert to.price == Price.of(input=1, output=2)
    assert ids(catalog, "groq/some/Brand-new:model@v1") == ["groq/some/Brand-new:model@v1"]
    assert catalog.resolve("groq/unpriced").deployments[0].price is None


@pytest.mark.parametrize(
    "model",
    [
        "",
        "..",
        "a/../b",
        "a//b",
        "/a",
        "a/",
        "a?b",
        "a#b",
        "a b",
        "a\\b",
        "a\n",
        "a%2e",
        "é",
        "a\x00",
        "a/.b",
        "x" * 300,
    ],
)
def test_only_plain_model_ids_reach_a_provider(model: str) -> None:
    with pytest.raises(ModelNotFound):
        load().resolve(f"openai/{model}")


def test_a_bare_name_means_all_that_serve_it_by_priority() -> None:
    catalog = load()
    assert ids(catalog, "shared-model") == ["groq/shared-model", "together/shared-model"]
    assert ids(catalog, "meta-llama/Llama-3.3-70B-Instruct-Turbo") == [
        "together/meta-llama/Llama-3.3-70B-Instruct-Turbo"
    ]
    assert ids(load(GROQ_API_KEY="x"), "shared-model") == ["groq/shared-model"]


def test_what_is_not_found_says_which_variable_would_help() -> None:
    catalog = load()
    with pytest.raises(ModelNotFound, match="set MISTRAL_API_KEY for mistral") as caught:
        catalog.resolve("mistral-small-latest")
    assert caught.value.param == "model"
    with pytest.raises(ModelNotFound, match="provider 'mistral' is off: set MISTRAL_API_KEY"):
        catalog.resolve("mistral/mistral-small-latest")
    with pytest.raises(ModelNotFound, match="'nothing-like-it' does not exist"):
        catalog.resolve("nothing-like-it")
    with pytest.raises(NoProvider, match="OPENAI_API_KEY"):
        load(UNRELATED="1").resolve("gpt-4o")


def test_aliases_are_ordered_and_skip_what_is_off(tmp_path: Path) -> None:
    toml = """
    [aliases]
    fast = [
        { provider = "openai", model = "gpt-4o-mini", priority = 2 },
        { provider = "groq", model = "llama-3.3-70b-versatile", weight = 3 },
        { provider = "Mistral", model = "mistral-small-latest" },
        { provider = "together", model = "shared-model", enabled = false },
    ]
    "gpt-4o" = [{ provider = "groq", model = "shared-model" }]
    gone = [{ provider = "mistral", model = "x" }]
    """
    catalog = load(toml, tmp_path)
    assert ids(catalog, "fast") == ["groq/llama-3.3-70b-versatile", "openai/gpt-4o-mini"]
    assert [to.weight for to in catalog.resolve("fast").deployments] == [3, 1]
    assert ids(catalog, "gpt-4o") == ["groq/shared-model"]
    with pytest.raises(ModelNotFound, match="set MISTRAL_API_KEY"):
        catalog.resolve("gone")
    listed = {listing.id: listing for listing in catalog.models()}
    assert "mistral/mistral-small-latest" in listed["fast"].backends
    assert listed["fast"].deployments
    assert not listed["gone"].deployments


def test_models_lists_what_is_on() -> None:
    listed = [listing.id for listing in load().models()]
    assert "openai/gpt-4o" in listed
    assert "together/shared-model" in listed
    assert not [name for name in listed if name.startswith(("mistral/", "azure/"))]
    assert "openai/gpt-4o-transcribe" not in listed  # not on our surfaces
    found = load(FIREWORKS_API_KEY="f").models()
    assert (
        next(each.id for each in found if each.backends == (each.id,))
        == "fireworks/accounts/fireworks/models/gpt-oss-20b"
    )


def test_a_deployer_changes_rows_and_adds_providers(tmp_path: Path) -> None:
    toml = """
    [providers.openai]
    priority = 1000
    first_content_timeout = 7

    [providers.my-own]
    base_url = "https://llm.example/v1"
    drops = ["seed"]

    [models."my-own/big"]
    context_window = 1000
    max_output = 100
    capabilities = ["chat", "vision"]
    """
    catalog = load(toml, tmp_path, **KEYS, MY_OWN_API_KEY="k")
    assert catalog.on()[-1].name == "openai"
    assert catalog.on()[-1].first_content_for("gpt-4o", Settings()) == 7
    assert catalog.on()[-1].first_content_for("o3", Settings()) == 120
    (to,) = catalog.resolve("big").deployments
    assert (to.id, to.context_window, to.max_output, to.capabilities) == ("my-own/big", 1000, 100, ("chat", "vision"))
    assert load(toml, tmp_path, **KEYS).why_off("my-own") == "set MY_OWN_API_KEY"


def test_prices_of_a_deployers_own(tmp_path: Path) -> None:
    toml = """
    [prices]
    default = { input = 9, output = 9 }
    "openai/gpt-4o" = { input = 0.15, output = 0.6, cache_read = 0.075 }
    "vllm/paid" = { input = 1, output = 1 }
    """
    catalog = load(toml, tmp_path, **KEYS, VLLM_BASE_URL="http://gpu:8000/v1")
    price = {
        name: catalog.resolve(name).deployments[0].price
        for name in ("openai/gpt-4o", "groq/new", "vllm/a", "vllm/paid")
    }
    assert price["openai/gpt-4o"] == Price.of(input=Decimal("0.15"), output=Decimal("0.6"), cache_read=Decimal("0.075"))
    assert price["groq/new"] == Price.of(input=9, output=9)
    assert price["vllm/a"] is FREE
    assert price["vllm/paid"] == Price.of(input=1, output=1)


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[providers.groq]\ndrop = ['x']", "providers.groq.drop"),
        ("[providers.groq]\napi_key = 'gsk_very_secret'", "set GROQ_API_KEY"),
        ("[providers.mine]\n", "providers.mine.base_url"),
        ("[providers.mine]\nbase_url = 'https://u:p@host/v1'", "providers.mine.base_url"),
        ("[providers.mine]\nbase_url = 'file:///etc/passwd'", "providers.mine.base_url"),
        ("[providers.Mine]\nbase_url = 'https://host/v1'", "providers.Mine"),
        ("[providers.groq]\ngap_timeout = 0", "providers.groq.gap_timeout"),
        ("[aliases]\na = [{ provider = 'nobody', model = 'x' }]", r"aliases.a\[0\]: there is no provider 'nobody'"),
        ("[aliases]\na = [{ provider = 'groq', model = '../x' }]", "not a plain model id"),
        ("[aliases]\na = [{ provider = 'groq' }]", "aliases.a.0.model"),
        ("[aliases]\na = []", "aliases.a"),
        ("[aliases]\n'auto:price' = [{ provider = 'groq', model = 'x' }]", "aliases.auto:price"),
        ("[aliases]\n'groq/x' = [{ provider = 'groq', model = 'x' }]", "aliases.groq/x"),
        ("[prices]\n'groq/x' = { input = -1, output = 1 }", "prices.groq/x.input"),
        ("[prices]\n'nobody/x' = { input = 1, output = 1 }", "prices.nobody/x"),
        ("[models.x]\n", "models.x"),
        ("[alias]\n", "alias"),
        ("[[[", "not TOML"),
    ],
)
def test_a_mistake_is_named_by_file_and_field(tmp_path: Path, toml: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        load(toml, tmp_path)
    assert "gateway.toml" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["https://host/v1?key=1", "just-a-name", "https://a b/", "https://user:pw@host/v1"])
def test_a_wrong_variable_is_named_without_its_value(value: str) -> None:
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL") as caught:
        load(OPENAI_API_KEY="k", OPENAI_BASE_URL=value)
    assert value not in str(caught.value)
    assert ".toml" not in str(caught.value)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        load(OPENAI_API_KEY="sk-\u2028x")


def test_names_of_callers_take_no_memory() -> None:
    catalog = load()
    catalog.resolve("openai/gpt-4o")
    before = sys.getsizeof(catalog._routes), len(catalog._routes)
    for number in range(500):
        catalog.resolve(f"openai/model-{number}")
        catalog.resolve("oPENai/gpt-4o")
    assert (sys.getsizeof(catalog._routes), len(catalog._routes)) == before


def test_every_shipped_row_is_sound() -> None:
    settings = Settings.read({"GATEWAY_CONFIG": "absent.toml"})
    rows = Catalog.load(settings, PriceTable.vendored()).providers
    assert {"openai", "azure", "groq", "mistral", "deepseek", "xai", "openrouter", "together"} <= rows.keys()
    assert next(iter(rows)) == "openai"
    known = set(PriceTable.vendored().providers)
    for row in rows.values():
        assert isinstance(row, Provider)
        assert row.prices in known | {None}
        assert row.title
        assert row.free == row.local
