"""Prices: exact to the nano-dollar, never too low, and never zero by mistake."""

from __future__ import annotations

import copy
from datetime import UTC, date, datetime
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from genai_prices import Usage as TheirUsage
from genai_prices.data import providers
from genai_prices.types import ModelInfo, ModelPrice, Provider
from hypothesis import given
from hypothesis import strategies as st

from infra import refresh_prices
from shared.prices import FREE, VENDORED, Price, PriceTable
from shared.schema import Usage

TABLE = PriceTable.vendored()
PRICED = [(provider, model) for provider in TABLE.providers for model in TABLE.models(provider)]
TOKENS = st.integers(0, 2_000_000)
USAGES = st.builds(Usage, input=TOKENS, cache_read=TOKENS, cache_write=TOKENS, cache_write_1h=TOKENS, output=TOKENS)
PEAK = datetime.combine(date.fromisoformat(TABLE.date), datetime.min.time(), UTC).replace(hour=7)
"""When DeepSeek is dearest, on the day of the table."""
KINDS = ("input", "cache_read", "cache_write", "cache_write_1h", "output")
DOLLARS = st.decimals(0, 1000, places=6)


def row(**price: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "date": "2026-01-01",
        "source": "test",
        "providers": {"openai": {"models": [{"id": "m", "price": {"input": "1", "output": "2", **price}}]}},
    }


@given(USAGES, st.tuples(*[DOLLARS] * 5))
def test_a_cost_is_the_exact_sum_rounded_up_once(usage: Usage, rates: tuple[Decimal, ...]):
    price = Price.of(**dict(zip(KINDS, rates, strict=True)))
    exact = sum(Decimal(getattr(usage, kind)) * rate * 1000 for kind, rate in zip(KINDS, rates, strict=True))
    cost = price.cost(usage)
    assert cost.total == int(exact.to_integral_value(ROUND_CEILING))
    assert cost.prompt >= 0
    assert cost.completion >= 0
    assert cost.prompt + cost.completion == cost.total


@pytest.mark.parametrize(("kind", "dollars"), list(zip(KINDS, (1, 2, 3, 4, 5), strict=True)))
def test_five_kinds_are_priced_apart(kind: str, dollars: int):
    price = Price.of(input=1, cache_read=2, cache_write=3, cache_write_1h=4, output=5)
    cost = price.cost(Usage(**{kind: 1_000_000}))
    assert cost.total == dollars * 10**9
    assert (cost.completion if kind == "output" else cost.prompt) == cost.total


def test_a_cache_without_a_price_costs_what_is_next_to_it():
    assert Price.of(input=1, output=2) == Price.of(input=1, output=2, cache_read=1, cache_write=1, cache_write_1h=1)
    assert Price.of(input=1, output=2, cache_write=3).cache_write_1h == Price.of(input=3, output=0).input


def test_a_long_prompt_pays_its_tier_for_all_of_the_request():
    price = Price.of(input=1, output=2, tiers=[{"above": 100, "input": 10, "output": 20}])
    assert price.cost(Usage(input=60, cache_read=40, output=7)).total == 114_000
    assert price.cost(Usage(input=60, cache_read=41, output=7)).total == 1_150_000


def test_a_request_may_cost_something_by_itself():
    assert Price.of(input=0, output=0, request="0.012").cost(Usage()).total == 12_000_000


@given(USAGES, st.sampled_from(PRICED), TOKENS, TOKENS)
def test_no_cost_is_above_the_most(usage: Usage, model: tuple[str, str], more: int, longer: int):
    price = TABLE.price(*model)
    assert price
    assert price.cost(usage).total <= price.most(usage.prompt + more, usage.output + longer)


@pytest.mark.parametrize("wrong", ["-1", "NaN", "", "cheap", 0.1, None, True, "1e9", "Infinity"])
def test_what_is_no_price_is_refused_by_name(wrong: Any):
    with pytest.raises(ValueError, match=r"^output: "):
        Price.of(input=1, output=wrong)


def test_only_what_is_said_to_be_free_is_free():
    assert Price.of(input=0, output="0.00") == FREE
    assert FREE.cost(Usage(input=10**9, output=10**9)).total == FREE.most(10**9, 10**9) == 0
    free = [(provider, model) for provider, model in PRICED if TABLE.price(provider, model) == FREE]
    assert {provider for provider, _ in free} == {"openrouter"}
    assert all(model.endswith(":free") for _, model in free)
    assert all(price.input and price.output for name in PRICED if (price := TABLE.price(*name)) and price != FREE)


@pytest.mark.parametrize("model", ["no-such-model", "", "gpt-4o\n", "whisper-1", "moderation"])
def test_an_unknown_model_and_one_not_priced_by_the_token_have_no_price(model: str):
    assert TABLE.price("openai", model) is None
    assert TABLE.price("nobody", model) is None


def test_a_model_is_found_as_its_provider_and_others_write_it():
    assert TABLE.price("openai", "gpt-4o") == TABLE.price("openai", "GPT-4o-2024-08-06")
    assert TABLE.price("openai", "gpt-5.2-20251211") == TABLE.price("openai", "gpt-5.2-2025-12-11") is not None
    assert TABLE.price("azure", "claude-sonnet-4-5") == TABLE.price("anthropic", "claude-sonnet-4-5-20250929")
    assert TABLE.context("openai", "gpt-4o") == 128_000
    assert TABLE.context("openai", "no-such-model") is None


def theirs(provider: Provider, model: ModelInfo, usage: Usage) -> Decimal:
    given = TheirUsage(
        input_tokens=usage.prompt,
        cache_read_tokens=usage.cache_read,
        cache_write_tokens=usage.cache_write + usage.cache_write_1h,
        cache_write_1h_tokens=usage.cache_write_1h,
        output_tokens=usage.output,
    )
    return model.calc_price(given, provider, genai_request_timestamp=PEAK).total_price


TEXT = {f"{kind}_mtok" for kind in KINDS} | {"requests_kcount", "web_searches_kcount", "storage_searches_kcount"}
SAME = [
    (provider, model)
    for provider in providers
    if provider.id in TABLE.providers
    for model in provider.models
    if TABLE.price(provider.id, model.id) not in (None, FREE)
    and {"input_mtok", "output_mtok"} <= (priced := set(vars(model.get_prices(PEAK)))) <= TEXT
    and ("cache_write_1h_mtok" in priced) >= ("cache_write_mtok" in priced)
]


@pytest.mark.parametrize(("provider", "model"), SAME[::9], ids=lambda it: it.id)
@pytest.mark.parametrize("prompt", [10, 150_000, 300_000])
def test_our_cost_is_that_of_genai_prices(provider: Provider, model: ModelInfo, prompt: int):
    usage = Usage(input=prompt, cache_read=7, output=11)
    if "cache_write_1h_mtok" in vars(model.get_prices(PEAK)):
        usage = Usage(input=prompt, cache_read=7, cache_write=5, cache_write_1h=3, output=11)
    price = TABLE.price(provider.id, model.id)
    assert price
    exact = theirs(provider, model, usage) * 10**9
    assert price.cost(usage).total == int(exact.to_integral_value(ROUND_CEILING))


def test_every_name_in_the_package_finds_its_own_price():
    for provider in providers:
        if provider.id in TABLE.providers:
            for model in provider.models:
                found = TABLE._look_up(provider.id, model.id)
                assert found
                assert found[0]["id"] == model.id


def test_the_vendored_table_is_whole_dated_and_small():
    TABLE.check()
    assert set(TABLE.providers) == refresh_prices.WANTED
    assert date.fromisoformat(TABLE.date)
    assert TABLE.source.startswith("genai-prices ")
    assert VENDORED.stat().st_size < 400_000


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (row(output="-1"), "openai/m: output"),
        (row(output=None), "openai/m: output"),
        (row(cash_read="1"), "openai/m: .*cash_read"),
        (row(tiers=[{"above": 9, "input": "1"}]), "openai/m: .*output"),
        (row(tiers=[{"input": "1", "output": "1"}]), "openai/m: above"),
        ({**row(), "schema": 2}, "schema"),
        ({**row(), "providers": {}}, "no providers"),
        ({**row(), "providers": {"openai": {"models": [{"id": "m"}]}}}, "openai/m: 'price'"),
        ({**row(), "providers": {"openai": {"models": [{"id": "m", "match": {"like": "m"}, "price": None}]}}}, "like"),
        ({**row(), "providers": {"openai": {"models": [{"id": "m", "match": {"regex": "("}, "price": None}]}}}, "'m'"),
        ({**row(), "providers": {"azure": {"fallback": ["nobody"], "models": []}}}, "nobody"),
    ],
)
def test_a_broken_table_is_refused_by_name(broken: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        PriceTable(broken).check()


# The tool


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    path = tmp_path / "prices.json"
    path.write_bytes(VENDORED.read_bytes())
    return path


def refreshed(path: Path, *options: str, **change: Any) -> int:
    """Run the tool on a package that says what the vendored file says, changed."""
    table = orjson.loads(VENDORED.read_bytes())
    table["date"] = "2031-01-01"
    for provider, rows in change.items():
        if rows is None:
            del table["providers"][provider]
        else:
            for found in table["providers"][provider]["models"]:
                found["price"] = {**(found["price"] or {}), **rows.get(found["id"], {})} or None
    return refresh_prices.main(list(options), path, lambda _: copy.deepcopy(table))


def test_a_refresh_without_news_writes_nothing(vendored: Path, capsys: pytest.CaptureFixture[str]):
    vendored.chmod(0o444)
    assert refreshed(vendored) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert vendored.read_bytes() == VENDORED.read_bytes()


def test_the_installed_package_makes_the_vendored_file_again():
    made = refresh_prices.table(date.fromisoformat(TABLE.date))
    if made["source"] != TABLE.source:
        pytest.skip(f"another release is installed: {made['source']}")
    assert refresh_prices.written(made) == VENDORED.read_bytes()


def test_a_changed_price_is_told_and_written(vendored: Path, capsys: pytest.CaptureFixture[str]):
    assert refreshed(vendored, openai={"gpt-4o": {"input": "3"}}) == 0
    assert "openai/gpt-4o: input 2.5 → 3" in capsys.readouterr().out
    table = PriceTable(orjson.loads(vendored.read_bytes()))
    assert table.date == "2031-01-01"
    assert table.price("openai", "gpt-4o") != TABLE.price("openai", "gpt-4o")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"groq": None}, "groq: vanished"),
        ({"openai": {"gpt-4o": {"input": "0"}}}, "openai/gpt-4o: input 2.5 → 0"),
        ({"openai": {"gpt-4o": {"output": "1000"}}}, "openai/gpt-4o: output 10 → 1000"),
        ({"openai": {"gpt-4o": {"output": "0.1"}}}, "openai/gpt-4o: output 10 → 0.1"),
    ],
)
def test_a_suspicious_change_is_refused_until_accepted(
    vendored: Path, change: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
):
    assert refreshed(vendored, **change) == 1
    assert told in capsys.readouterr().err
    assert vendored.read_bytes() == VENDORED.read_bytes()
    assert refreshed(vendored, "--accept", **change) == 0
    assert vendored.read_bytes() != VENDORED.read_bytes()


def test_of_hours_the_dearest_and_of_years_the_one_in_force_are_taken():
    deepseek = next(provider for provider in providers if provider.id == "deepseek")
    model = next(model for model in deepseek.models if model.id == "deepseek-v4-pro")
    made = {
        day: refresh_prices._row(deepseek, model, date.fromisoformat(day))["price"]
        for day in ("2026-08-16", "2026-11-21")
    }
    assert isinstance(model.prices, list)
    peak = next(price.prices for price in reversed(model.prices))
    assert isinstance(peak, ModelPrice)
    assert Decimal(made["2026-11-21"]["output"]) == peak.output_mtok
    assert Decimal(made["2026-08-16"]["output"]) == peak.output_mtok, "hours without a date of their own hold always"
