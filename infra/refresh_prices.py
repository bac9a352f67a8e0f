"""Make `shared/prices.json` from the installed genai-prices: `python infra/refresh_prices.py [--accept] [--date DATE]`.

Prints each changed price, old → new in US dollars per million tokens, and refuses to write what looks wrong. The table
leaves out, or takes from the dear side:

- Of prices that change with the hour (DeepSeek's) the dearest of the day holds all day; of those that changed with the
  years the one in force at `--date`.
- Models with prices of their own for audio, image or video *output* (voice and image models) cost their dearest
  modality in and out, as the ledger does not tell modalities apart; all others cost what text costs.
- Batch, flex, priority and fast variants are left out: the standard price holds. So are fees for searches.
- A model with an input price alone (embeddings) would charge the same for output, not nothing.
- No price by the token (by the hour, page or letter), or none at all, is null; OpenRouter's `:free` is a said zero.
"""

# ruff: noqa: T201 - its answer is what it prints

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import orjson
from genai_prices.data import providers
from genai_prices.types import ModelInfo, ModelPrice, Provider, StartDateConstraint, TieredPrices, TimeOfDateConstraint

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere

from shared.prices import SCHEMA, VENDORED, PriceTable, equals
from shared.schema import JSON

WANTED = frozenset({
    "anthropic", "aws", "azure", "cerebras", "cohere", "deepseek", "fireworks", "google", "groq", "mistral", "openai",
    "openrouter", "perplexity", "together", "x-ai",
})  # fmt: skip
KINDS = ("input", "output", "cache_read", "cache_write", "cache_write_1h", "request")
"""As in `Price.of`."""
JUMP = 10
"""A price that grows or shrinks by more than this is more often a slip than news."""


def table(today: date) -> JSON:
    """The whole file: providers and models sorted where order carries no meaning, prices as strings."""
    return {
        "schema": SCHEMA,
        "source": f"genai-prices {version('genai-prices')}",
        "date": today.isoformat(),
        "providers": {
            provider.id: _provider(provider, today)
            for provider in sorted(providers, key=lambda provider: provider.id)
            if provider.id in WANTED
        },
    }


def _provider(provider: Provider, today: date) -> JSON:
    fallback = [other for other in provider.fallback_model_providers or () if other in WANTED]
    rows = [_row(provider, model, today) for model in provider.models]  # in their order: the first match counts
    for row, model in zip(rows, provider.models, strict=True):
        for name in {model.id, *equals(row.get("match", {}))}:
            if provider.find_model(name) not in (None, model):
                raise ValueError(f"{provider.id}/{model.id}: {name!r} is another model's too")
    return {"fallback": fallback, "models": rows} if fallback else {"models": rows}


def _row(provider: Provider, model: ModelInfo, today: date) -> JSON:
    row: JSON = {"id": model.id}
    if (match := _clause(model.match)) != {"equals": model.id}:
        row["match"] = match
    if model.context_window is not None:
        row["context"] = model.context_window
    prices = [_rates(price) for price in _in_force(model, today)]
    if provider.id == "openrouter" and model.id.endswith(":free") and not any(prices):
        row["price"] = {"input": "0", "output": "0"}
    else:
        row["price"] = None if None in prices else _dearest(cast("list[JSON]", prices))
    return row


def _clause(clause: Any) -> JSON:
    (field,) = fields(clause)
    value = getattr(clause, field.name)
    return {field.name.rstrip("_"): [_clause(inner) for inner in value] if isinstance(value, list) else value}


def _in_force(model: ModelInfo, today: date) -> list[ModelPrice]:
    """The prices of one day: the last that has begun, and those of hours that come after it in the list."""
    if isinstance(model.prices, ModelPrice):
        return [model.prices]
    found: list[ModelPrice] = []
    for conditional in reversed(model.prices):
        match conditional.constraint:
            case TimeOfDateConstraint():
                found.append(conditional.prices)
            case StartDateConstraint(start_date=start) if start > today:
                pass
            case _:
                return [*found, conditional.prices]
    return [*found, model.prices[0].prices]


def _rates(price: ModelPrice) -> JSON | None:
    """`Price.of`'s arguments with Decimals, or None if the tokens have no price."""
    given = {key.removesuffix("_mtok"): value for key, value in vars(price).items() if value is not None}
    if "input" not in given and "output" not in given:
        return None
    starts = sorted({tier.start for value in given.values() if isinstance(value, TieredPrices) for tier in value.tiers})
    base, *tiers = ({"above": start, **_at(given, start + 1)} for start in (-1, *starts))
    return {**{kind: rate for kind, rate in base.items() if kind != "above"}, **({"tiers": tiers} if tiers else {})}


def _at(given: dict[str, Decimal | TieredPrices], prompt: int) -> dict[str, Decimal]:
    """The rates of a prompt of this length."""
    flat = {key: _tier(value, prompt) for key, value in given.items()}
    speaks = any(key in flat for key in ("output_audio", "output_image", "output_video"))

    def dearest(*keys: str) -> Decimal | None:
        return max((flat[key] for key in keys if key in flat), default=None)

    modalities = ("audio", "image", "video") if speaks else ()
    taken = dearest("input", *(f"input_{kind}" for kind in modalities))
    made = dearest(*(key for key in flat if key.startswith("output")))  # reasoning and citations are output, too
    rates = {
        "input": made if taken is None else taken,
        "output": taken if made is None else made,
        "cache_read": dearest("cache_read", *(f"cache_{kind}_read" for kind in modalities)),
        "cache_write": flat.get("cache_write"),
        "cache_write_1h": flat.get("cache_write_1h"),
        "request": flat["requests_kcount"] / 1000 if "requests_kcount" in flat else None,
    }
    return {kind: rate for kind, rate in rates.items() if rate is not None}


def _tier(value: Decimal | TieredPrices, prompt: int) -> Decimal:
    if isinstance(value, Decimal):
        return value
    return next((tier.price for tier in reversed(value.tiers) if prompt > tier.start), value.base)


def _dearest(prices: list[JSON]) -> JSON:
    """Kind by kind over the hours of the day."""
    first, *others = prices
    if any("tiers" in price or price.keys() != first.keys() for price in prices) and others:
        raise ValueError(f"hours, and tiers or other kinds: {prices}")
    if others:
        first = {kind: max(price[kind] for price in prices) for kind in first}
    return _dollars(first)


def _dollars(price: JSON) -> JSON:
    """Decimals as the shortest strings."""
    written = {kind: f"{rate.normalize():f}" for kind, rate in price.items() if isinstance(rate, Decimal)}
    tiers = [{"above": tier["above"], **_dollars(tier)} for tier in price.get("tiers", ())]
    return {**written, "tiers": tiers} if tiers else written


def changes(old: JSON, new: JSON) -> tuple[list[str], list[str]]:
    """What a reader of the diff wants to know, a line for each changed price, and those of the lines to stop at."""
    told: list[str] = []
    doubts = [f"{provider}: vanished" for provider in sorted({*WANTED, *old} - {*new})]
    for provider in sorted({*old} & {*new}):
        before, after = ({row["id"]: row["price"] for row in side[provider]["models"]} for side in (old, new))
        if len(before.keys() - after.keys()) > len(before) / 2:
            doubts.append(f"{provider}: {len(before.keys() - after.keys())} of {len(before)} models vanished")
        for model in sorted(before.keys() | after.keys()):
            name, was, now = f"{provider}/{model}", _flat(before.get(model)), _flat(after.get(model))
            if was == now:
                continue
            if not was or not now:
                told.append(f"{name}: {_said(was)} → {_said(now)}{' (gone)' * (model not in after)}")
                continue
            for kind in sorted({*was, *now}):
                if (a := was.get(kind)) != (b := now.get(kind)):
                    told.append(line := f"{name}: {kind} {a or '-'} → {b or '-'}")
                    if _doubtful(a, b):
                        doubts.append(line)
    told += (f"{provider}: new, {len(new[provider]['models'])} models" for provider in sorted({*new} - {*old}))
    return told, doubts


def _flat(price: JSON | None) -> dict[str, str]:
    """`{"input": "2.5", "input above 200000": "5"}`"""
    price = price or {}
    tiers = ((f"{kind} above {tier['above']}", rate) for tier in price.get("tiers", ()) for kind, rate in tier.items())
    return {kind: rate for kind, rate in (*price.items(), *tiers) if isinstance(rate, str)}


def _said(price: dict[str, str]) -> str:
    return ", ".join(f"{kind} {rate}" for kind, rate in price.items()) or "no price"


def _doubtful(was: str | None, now: str | None) -> bool:
    if was is None or now is None:
        return False
    a, b = Decimal(was), Decimal(now)
    return b == 0 or (a > 0 and not a / JUMP <= b <= a * JUMP)


def written(table: JSON) -> bytes:
    """Compact JSON with a line for each model, so that version control shows what changed."""
    head = orjson.dumps({key: value for key, value in table.items() if key != "providers"}).removesuffix(b"}")
    blocks = [
        b'%s:{%s"models":[\n%s\n]}'
        % (
            orjson.dumps(name),
            b'"fallback":%s,' % orjson.dumps(provider["fallback"]) if "fallback" in provider else b"",
            b",\n".join(orjson.dumps(row) for row in provider["models"]),
        )
        for name, provider in table["providers"].items()
    ]
    return head + b',"providers":{\n' + b",\n".join(blocks) + b"\n}}\n"


def main(argv: Sequence[str] | None = None, path: Path = VENDORED, make: Callable[[date], JSON] = table) -> int:
    """0: written, or nothing to write; 1: refused."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--accept", action="store_true", help="write although something looks wrong")
    options.add_argument("--date", type=date.fromisoformat, default=datetime.now(UTC).date(), help="prices of this day")
    chosen = options.parse_args(argv)

    old: JSON = orjson.loads(path.read_bytes()) if path.exists() else {"providers": {}}
    new = make(chosen.date)
    if {**new, "date": old.get("date")} == old:
        print(f"{path.name}: nothing changed since {old['date']}")
        return 0
    PriceTable(new).check()
    told, doubts = changes(old["providers"], new["providers"])
    print(*told, sep="\n")
    if doubts and not chosen.accept:
        print(f"\n{path.name} not written; look at these, then use --accept:", *doubts, sep="\n", file=sys.stderr)
        return 1
    path.write_bytes(text := written(new))
    print(f"\n{path.name}: {len(told)} changes, {len(text)} bytes, {new['source']} of {new['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
