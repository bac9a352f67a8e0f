"""What tokens cost: nano-dollars, whole numbers, from a dated table that lies beside this file.

The table is made by `infra/refresh_prices.py` from genai-prices (https://github.com/pydantic/genai-prices, MIT) and is
read on first use. What it does not know has no price: `None`, never zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import orjson

from shared.schema import JSON, Usage

Dollars: TypeAlias = Decimal | str | int
"""No floats: 0.1 is not a price."""

SCHEMA = 1
VENDORED = Path(__file__).with_name("prices.json")
MILLION = 1_000_000


def _up(amount: int) -> int:
    """From nano-dollars times a million tokens to nano-dollars, rounded up."""
    return -(-amount // MILLION)


def _nano(dollars: object) -> int:
    """Nano-dollars; a price finer than that is rounded up. Raises ValueError for all that is not a price."""
    if isinstance(dollars, bool) or not isinstance(dollars, Decimal | str | int):
        raise ValueError(f"{dollars!r} is not a price")
    try:
        amount = Decimal(dollars)
    except InvalidOperation:
        raise ValueError(f"{dollars!r} is not a price") from None
    if not amount.is_finite() or not 0 <= amount < MILLION:
        raise ValueError(f"{dollars!r} is not a price")
    return int(amount.scaleb(9).to_integral_value(ROUND_CEILING))


@dataclass(frozen=True, slots=True)
class Cost:
    """Nano-dollars. The sum was rounded up once; the parts are cut so that they add up to it."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-dollars per million tokens, one rate for each of `Usage`'s five kinds, and `request` for each answer.

    `tiers` are (prompt tokens, price) in rising order: a prompt longer than that pays the tier's rates for the whole
    request, cached and generated tokens too, as OpenAI, Google, Anthropic and xAI do."""

    input: int
    output: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    request: int = 0
    tiers: tuple[tuple[int, Price], ...] = ()

    @classmethod
    def of(
        cls,
        *,
        input: Dollars,  # noqa: A002 - the ledger's word
        output: Dollars,
        cache_read: Dollars | None = None,
        cache_write: Dollars | None = None,
        cache_write_1h: Dollars | None = None,
        request: Dollars = 0,
        tiers: Sequence[Mapping[str, Any]] = (),
    ) -> Price:
        """From US dollars per million tokens (`request`: per request); a tier is the same with `above` in tokens.

        A cache without a price of its own costs what plain tokens cost. Raises ValueError, by the name of the rate."""
        written = input if cache_write is None else cache_write
        given = {
            "input": input,
            "output": output,
            "cache_read": input if cache_read is None else cache_read,
            "cache_write": written,
            "cache_write_1h": written if cache_write_1h is None else cache_write_1h,
            "request": request,
        }
        rates: dict[str, int] = {}
        for kind, dollars in given.items():
            try:
                rates[kind] = _nano(dollars)
            except ValueError as wrong:
                raise ValueError(f"{kind}: {wrong}") from None
        steps: list[tuple[int, Price]] = []
        for tier in tiers:
            above, rest = tier.get("above"), {kind: dollars for kind, dollars in tier.items() if kind != "above"}
            if not isinstance(above, int) or above < (steps[-1][0] + 1 if steps else 0):
                raise ValueError(f"above: {above!r} is not a number of tokens in rising order")
            steps.append((above, cls.of(**cast("dict[str, Any]", {"request": request, **rest}))))
        return cls(**rates, tiers=tuple(steps))

    def at(self, prompt_tokens: int) -> Price:
        """The rates in force for a prompt of this length."""
        for above, price in reversed(self.tiers):
            if prompt_tokens > above:
                return price
        return self

    def cost(self, usage: Usage) -> Cost:
        """What an answer costs; never less than the exact amount, and less than a nano-dollar more."""
        price = self.at(usage.prompt)
        prompt = (
            usage.input * price.input
            + usage.cache_read * price.cache_read
            + usage.cache_write * price.cache_write
            + usage.cache_write_1h * price.cache_write_1h
            + MILLION * price.request
        )
        total = _up(prompt + usage.output * price.output)
        return Cost(prompt=_up(prompt), completion=total - _up(prompt))

    def most(self, prompt_tokens: int, output_tokens: int) -> int:
        """Nano-dollars that no answer within these tokens exceeds, whatever was cached, whichever tier it fell in."""
        reachable = [self, *(price for above, price in self.tiers if prompt_tokens > above)]
        return max(
            _up(
                prompt_tokens * max(price.input, price.cache_read, price.cache_write, price.cache_write_1h)
                + output_tokens * price.output
                + MILLION * price.request
            )
            for price in reachable
        )


FREE = Price.of(input=0, output=0)
"""Said, not guessed: what costs nothing, such as a model on the deployer's own machine."""


class PriceTable:
    """The prices and context windows of a table; a provider's models are indexed when first asked for.

    `{"schema", "source", "date", "providers": {<id>: {"fallback"?: [<id>], "models": [<row>]}}}`, and a row is
    `{"id", "match"?, "context"?, "price"}`: `match` is one of genai-prices' clauses (left out where it is the id),
    `price` the arguments of `Price.of`, or null where no price by the token is known. Everything wrong raises
    ValueError with the model's name, at the latest when that model is asked for; `check` asks for all of them."""

    def __init__(self, table: JSON) -> None:
        if table.get("schema") != SCHEMA:
            raise ValueError(f"prices: not a table of schema {SCHEMA}")
        if not isinstance(providers := table.get("providers"), dict) or not providers:
            raise ValueError("prices: no providers")
        self.date = str(table.get("date"))
        self.source = str(table.get("source"))
        self._providers = cast("dict[str, JSON]", providers)
        self._indexes: dict[str, _Index] = {}
        self._find = lru_cache(4096)(self._look_up)  # bounded: a caller may name any model

    @classmethod
    @cache
    def vendored(cls) -> PriceTable:
        """The table beside this file, read once."""
        return cls(orjson.loads(VENDORED.read_bytes()))

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self._providers)

    def price(self, provider: str, model: str) -> Price | None:
        """The price in force at `date`; None where there is none by the token, or the model is not known."""
        return found[1] if (found := self._find(provider, model)) else None

    def context(self, provider: str, model: str) -> int | None:
        """The context window in tokens, where the table has it."""
        return found[0].get("context") if (found := self._find(provider, model)) else None

    def models(self, provider: str) -> tuple[str, ...]:
        """The ids of the models that have a price."""
        return tuple(row["id"] for row in self._rows(provider) if row["price"] is not None)

    def check(self) -> None:
        """Read every row; raises ValueError for the first that is wrong, by its name."""
        for provider in self._providers:
            for row in self._index(provider).rows:
                _price(provider, row)
            for other in self._fallbacks(provider):
                if other not in self._providers:
                    raise ValueError(f"prices: {provider} falls back to {other}, which is not in the table")

    def _look_up(self, provider: str, model: str) -> tuple[JSON, Price | None] | None:
        asked = model.lower()
        for name in dict.fromkeys((asked, _DATE.sub(r"-\1-\2-\3", asked))):
            for owner in (provider, *self._fallbacks(provider)):
                if row := self._index(owner).find(name):
                    return row, _price(owner, row)
        return None

    def _rows(self, provider: str) -> list[JSON]:
        return self._providers.get(provider, {}).get("models", [])

    def _fallbacks(self, provider: str) -> list[str]:
        """Whose models this provider also sells, at their price: Azure OpenAI's, Google Anthropic's."""
        return self._providers.get(provider, {}).get("fallback", [])

    def _index(self, provider: str) -> _Index:
        if (index := self._indexes.get(provider)) is None:
            index = self._indexes[provider] = _Index(provider, self._rows(provider))
        return index


_DATE = re.compile(r"-(20\d\d)(\d\d)(\d\d)(?=[-:]|$)")
"""OpenRouter names a dated model `-20251211`, OpenAI itself `-2025-12-11`."""

Test: TypeAlias = Callable[[str], bool]


class _Index:
    """One provider's rows by exact name and, in the table's order, by their clauses."""

    def __init__(self, provider: str, rows: list[JSON]) -> None:
        self.rows = rows
        self.exact: dict[str, JSON] = {}
        self.tests: list[tuple[Test, JSON]] = []
        for place, row in enumerate(rows):
            try:
                clause: JSON = row.get("match") or {"equals": row["id"]}
                test = _test(clause)
                for name in (row["id"], *equals(clause)):
                    self.exact.setdefault(name.lower(), row)
            except (KeyError, TypeError, AttributeError, ValueError, re.error) as wrong:
                raise ValueError(f"prices: {provider}, row {place}, {str(row)[:80]}: {wrong!r}") from None
            if row.get("match"):
                self.tests.append((test, row))

    def find(self, name: str) -> JSON | None:
        return self.exact.get(name) or next((row for test, row in self.tests if test(name)), None)


def equals(clause: JSON) -> Iterator[str]:
    """The names that a clause accepts as they stand."""
    if "equals" in clause:
        yield clause["equals"]
    for inner in clause.get("or", ()):
        yield from equals(inner)


def _test(clause: JSON) -> Test:
    """A clause as a function of a lower-case name."""
    ((kind, value),) = clause.items()
    match kind, value:
        case "or" | "and", [*clauses]:
            tests = [_test(inner) for inner in clauses]
            judge = any if kind == "or" else all
            return lambda name: judge(test(name) for test in tests)
        case "regex", str():
            pattern = re.compile(value)
            return lambda name: pattern.search(name) is not None
        case "equals" | "starts_with" | "ends_with" | "contains", str():
            return partial(_COMPARE[kind], value.lower())
        case _:
            raise ValueError(f"{kind!r} is not a clause")


_COMPARE: Mapping[str, Callable[[str, str], bool]] = {
    "equals": lambda value, name: name == value,
    "starts_with": lambda value, name: name.startswith(value),
    "ends_with": lambda value, name: name.endswith(value),
    "contains": lambda value, name: value in name,
}


def _price(provider: str, row: JSON) -> Price | None:
    try:
        return None if row["price"] is None else Price.of(**row["price"])
    except (KeyError, TypeError, ValueError) as wrong:
        raise ValueError(f"prices: {provider}/{row['id']}: {wrong}") from None
