"""Who can be asked for what: providers as rows of data, and the deployments that a model's name means."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from shared.errors import ModelNotFound, NoProvider
from shared.prices import FREE, Price, PriceTable
from shared.schema import JSON
from shared.settings import Settings

ROWS = Path(__file__).with_name("providers") / "providers.toml"
PLAIN_ID = re.compile(r"(?!.*(?:\.\.|//|/\.))[A-Za-z0-9@][A-Za-z0-9._:@/+-]{0,198}(?<!/)")
"""A model id, never a path, a query or an escape; ids with slashes are common (`accounts/fireworks/models/x`)."""
PROVIDER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

ECHOED = ("annotations", "refusal", "audio", "reasoning_details", "cache_control", "prompt_cache_breakpoint")
"""Fields of messages that clients echo back, or write for one provider, and that most others refuse."""


class ConfigError(ValueError):
    """Something in `gateway.toml` or in a provider's variable is wrong; the message names it, never a secret."""


class Row(BaseModel):
    """Unknown fields are refused: a misspelt one would do nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ReportedCost(Row):
    """Where in `usage` the provider says what it charged (`cost.total_cost`), and how many units are a dollar."""

    path: str
    per_usd: int = Field(default=1, gt=0)


class Provider(Row):
    """A company's endpoint, our account there, and everything in which its wire differs from OpenAI's.

    Models are named by shell patterns (`gpt-5*`); parameters and features as in `Call.features`."""

    name: str
    title: str = ""  # as people are shown it
    dialect: str = "openai"
    base_url: str = ""  # the API root, without a slash at the end
    root_path: str = ""  # what a base URL that names only a host lacks
    auth: Literal["bearer", "api-key"] = "bearer"  # the header that carries the key
    api_key: SecretStr | None = Field(default=None, repr=False)  # from the environment only
    requires: tuple[Literal["api_key", "base_url"], ...] = ("api_key",)  # the variables that switch it on
    enabled: bool | None = None  # false: off; true: on without its variables
    priority: int = 100  # the lowest comes first
    default_model: str | None = None  # for `/generate` and round robin
    prices: str | None = None  # its name in the price table
    lists: tuple[str, ...] = ("*",)  # models of the price table that it serves on our surfaces; "!…" takes away
    id_prefix: str = ""  # what the price table leaves out of its ids
    free: bool = False  # nobody is charged for its tokens
    local: bool = False  # on the deployer's own machines

    first_content_timeout: float | None = Field(default=None, gt=0)  # seconds; else the settings'
    gap_timeout: float | None = Field(default=None, gt=0)
    slow: Mapping[str, float] = {}  # seconds to the first content, by model pattern

    completions: tuple[str, ...] = ()  # models with a /completions of their own; others are asked by chat
    embeddings: tuple[str, ...] = ()  # models that may be asked for embeddings
    base64: bool = False  # whether it knows `encoding_format`
    token_ids: bool = False  # whether prompts and inputs may be token ids

    output_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # the name that chat takes
    stream_options: bool = True  # whether it must, and may, be asked for usage in streams
    obfuscation: bool = False  # whether it pads streamed chunks unless told not to
    renames: Mapping[str, str] = {}  # parameters under another name
    drops: tuple[str, ...] = ()  # tuning parameters that it refuses: left out, and the caller is told
    drops_by_model: Mapping[str, tuple[str, ...]] = {}
    refuses: tuple[str, ...] = ()  # features that it lacks and that change what the answer means
    tool_choice: Mapping[str, str] = {}  # its own words
    defaults: Mapping[str, Any] = {}  # sent unless the caller says otherwise
    keeps: tuple[str, ...] = ()  # extensions of ours that are also its own
    developer: bool = True  # whether it knows the role; else `system`
    strips: tuple[str, ...] = ECHOED  # fields of messages that it refuses
    echoes_reasoning: str | None = None  # under which name it takes reasoning back in the history
    bare_audio: bool = False  # audio parts hold the base64 itself
    tool_id_length: int | None = None  # tool call ids must be this many ASCII letters and digits

    reasoning_on_top: bool = False  # reasoning tokens are not counted in `completion_tokens`
    cost: ReportedCost | None = None

    def first_content_for(self, model: str, settings: Settings) -> float:
        """Seconds that a stream of this model may take to its first content."""
        slow = next((seconds for pattern, seconds in self.slow.items() if fnmatchcase(model, pattern)), None)
        return slow or self.first_content_timeout or settings.first_content_timeout

    def has(self, surface: Literal["completions", "embeddings"], model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in getattr(self, surface))

    def dropped(self, model: str) -> set[str]:
        """The tuning parameters that this model is not sent."""
        found = set(self.drops)
        for pattern, names in self.drops_by_model.items():
            if fnmatchcase(model, pattern):
                found.update(names)
        return found

    def variable(self, what: str) -> str:
        """`GROQ_API_KEY`."""
        return f"{self.name.upper().replace('-', '_')}_{what.upper()}"

    @property
    def missing(self) -> list[str]:
        """What keeps it from being on: variables by their names, or the switch."""
        if self.enabled is False:
            return ["enabled = true"]
        unset = [what for what in self.requires if not getattr(self, what)] if self.enabled is None else []
        return [self.variable(what) for what in unset] or ([] if self.base_url else [self.variable("base_url")])


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model at one provider. `price` is None where nobody knows it."""

    provider: Provider
    model: str
    price: Price | None = None
    context_window: int | None = None
    max_output: int | None = None
    capabilities: tuple[str, ...] = ()
    weight: int = 1
    priority: int = 0

    @property
    def id(self) -> str:
        return f"{self.provider.name}/{self.model}"


@dataclass(frozen=True, slots=True)
class Route:
    """What a name means: the deployments that may answer, in order. `named`: the caller chose this one deployment."""

    asked: str
    deployments: tuple[Deployment, ...]
    named: bool = False


class Listing(NamedTuple):
    """A name that `/v1/models` shows. `backends` also names what is off now; `deployments` is what can answer."""

    id: str
    deployments: tuple[Deployment, ...]
    backends: tuple[str, ...]

    @property
    def active(self) -> bool:
        return bool(self.deployments)


class Entry(Row):
    """One line of an alias: the lowest `priority` is tried first; among equals, `weight` shares."""

    provider: str
    model: str
    weight: int = Field(default=1, ge=1)
    priority: int = 0
    enabled: bool = True


class Rates(Row):
    """US dollars per million tokens."""

    input: Decimal
    output: Decimal
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None


class Facts(Row):
    """What a deployer knows of a model; naming it here also lists it."""

    context_window: int | None = Field(default=None, gt=0)
    max_output: int | None = Field(default=None, gt=0)
    capabilities: tuple[str, ...] = ()


NO_FACTS = Facts()


class GatewayFile(Row):
    """`gateway.toml`. Prices and models are keyed `provider/model`; the price `default` is for all that have none."""

    providers: dict[str, dict[str, Any]] = {}
    aliases: dict[str, tuple[Entry, ...]] = {}
    prices: dict[str, Rates] = {}
    models: dict[str, Facts] = {}


class Catalog:
    """Everything is looked up in dicts made once; nothing here does I/O but `load`."""

    def __init__(self, providers: Iterable[Provider], prices: PriceTable, file: GatewayFile | None = None) -> None:
        file = file or GatewayFile()
        self.providers = {row.name: row for row in sorted(providers, key=lambda row: row.priority)}
        self._on = tuple(row for row in self.providers.values() if not row.missing)
        self._table = prices
        self._facts = file.models
        own = {name: _price(name, rates) for name, rates in file.prices.items()}
        self._default_price = own.pop("default", None)
        self._prices = own
        for section, keys in (("prices", own), ("models", file.models)):
            for key in keys:
                self._split(key, f"{section}.{key}")
        self._aliases = {name: self._entries(name, entries) for name, entries in file.aliases.items()}
        self._serving = self._index()
        self._routes: dict[str, Route] = {}  # aliases and listed names only, so that callers cannot make it grow

    @classmethod
    def load(cls, settings: Settings, prices: PriceTable, *, also: Collection[str] = ()) -> Catalog:
        """The shipped rows, changed and added to by `gateway.toml`; `also` names providers to switch on regardless.

        Raises ConfigError."""
        path = Path(settings.gateway_config)
        try:
            given = tomllib.loads(path.read_text("utf-8"), parse_float=Decimal) if path.is_file() else {}
            file = _checked(GatewayFile, given, "")
            rows: dict[str, JSON] = tomllib.loads(ROWS.read_text("utf-8"))
            providers = [
                _provider(name, rows.get(name, {}), file.providers.get(name, {}), settings, on=name in also)
                for name in {**rows, **file.providers}
            ]
            return cls(providers, prices, file)
        except ConfigError as wrong:
            raise ConfigError(f"{path}: {wrong}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as wrong:
            raise ConfigError(f"{path}: not TOML: {wrong}") from None

    def on(self) -> tuple[Provider, ...]:
        """The providers that can be asked, by priority."""
        return self._on

    def why_off(self, provider: str) -> str | None:
        """What to do to switch a provider on ("set GROQ_API_KEY"); None where it is on or unknown."""
        row = self.providers.get(provider.lower())
        return f"set {' and '.join(row.missing)}" if row and row.missing else None

    def resolve(self, name: str) -> Route:
        """`provider/model`, a bare model name or an alias to a route; raises ModelNotFound or NoProvider."""
        if route := self._routes.get(name):
            return route
        if not self._on:
            raise NoProvider("No provider is configured: set a provider's API key, for example OPENAI_API_KEY.")
        head, slash, model = name.partition("/")
        if name in self._aliases:
            route = Route(name, tuple(self._alias(name)))
        elif slash and (row := self.providers.get(head.lower())):
            route = Route(name, (self._named(row, model),), named=True)
            if name != route.deployments[0].id or all(row is not other for other in self._serving.get(model, ())):
                return route
        else:
            rows = self._serving.get(name, ())
            route = Route(name, tuple(self._deployment(row, name) for row in rows if not row.missing))
        if not route.deployments:
            raise self._unknown(name)
        return self._routes.setdefault(name, route)

    def defaults(self) -> tuple[Deployment, ...]:
        """Each provider's default model, by priority: the members of `/generate`, round robin and `auto`."""
        return tuple(self._deployment(row, row.default_model) for row in self._on if row.default_model)

    def models(self) -> list[Listing]:
        """Aliases, then all models known of the providers that are on, as `provider/model`."""
        listings = [
            Listing(name, tuple(self._alias(name)), tuple(f"{entry.provider}/{entry.model}" for entry in entries))
            for name, entries in self._aliases.items()
        ]
        found = [
            self._deployment(row, model) for model, rows in self._serving.items() for row in rows if not row.missing
        ]
        found.sort(key=lambda to: (to.provider.priority, to.id))
        return listings + [Listing(to.id, (to,), (to.id,)) for to in found]

    def _named(self, row: Provider, model: str) -> Deployment:
        if row.missing:
            raise ModelNotFound(f"The provider '{row.name}' is off: {self.why_off(row.name)}.", param="model")
        if not PLAIN_ID.fullmatch(model):
            raise ModelNotFound("The model is not a plain model id.", param="model")
        return self._deployment(row, model)

    def _unknown(self, name: str) -> ModelNotFound:
        if name in self._aliases:
            rows = [self.providers[entry.provider] for entry in self._aliases[name]]
        else:
            rows = self._serving.get(name, [])
        advice = dict.fromkeys(f"{why} for {row.name}/…" for row in rows if (why := self.why_off(row.name)))
        hint = f" It is served by providers that are off: {', '.join(advice)}." if advice else ""
        return ModelNotFound(f"The model '{name[:128]}' does not exist or no provider serves it.{hint}", param="model")

    def _alias(self, name: str) -> list[Deployment]:
        rows = [(self.providers[entry.provider], entry) for entry in self._aliases[name] if entry.enabled]
        return [
            replace(self._deployment(row, entry.model), weight=entry.weight, priority=entry.priority)
            for row, entry in rows
            if not row.missing
        ]

    def _entries(self, alias: str, entries: tuple[Entry, ...]) -> list[Entry]:
        head, slash, _ = alias.partition("/")
        if not PLAIN_ID.fullmatch(alias) or alias.split(":")[0] == "auto" or (slash and head.lower() in self.providers):
            raise ConfigError(f"aliases.{alias}: not a name for an alias")
        if not entries:
            raise ConfigError(f"aliases.{alias}: has no entries")
        named = [entry.model_copy(update={"provider": entry.provider.lower()}) for entry in entries]
        for index, entry in enumerate(named):
            self._split(f"{entry.provider}/{entry.model}", f"aliases.{alias}[{index}]")
        return sorted(named, key=lambda entry: entry.priority)

    def _split(self, key: str, where: str) -> tuple[str, str]:
        provider, _, model = key.partition("/")
        if provider not in self.providers:
            raise ConfigError(f"{where}: there is no provider '{provider}'")
        if not PLAIN_ID.fullmatch(model):
            raise ConfigError(f"{where}: '{model}' is not a plain model id")
        return provider, model

    def _index(self) -> dict[str, list[Provider]]:
        """Model to the providers that list it, on or off, by priority."""
        serving: dict[str, list[Provider]] = {}
        for row in self.providers.values():
            known = self._table.models(row.prices) if row.prices and row.lists else ()
            ids = dict.fromkeys(
                row.id_prefix + model for model in known if _listed(row, model) and PLAIN_ID.fullmatch(model)
            )
            ids |= dict.fromkeys(
                model for owner, _, model in (key.partition("/") for key in self._facts) if owner == row.name
            )
            if row.default_model:
                ids[row.default_model] = None
            for model in ids:
                serving.setdefault(model, []).append(row)
        return serving

    def _deployment(self, row: Provider, model: str) -> Deployment:
        facts = self._facts.get(f"{row.name}/{model}", NO_FACTS)
        return Deployment(
            row,
            model,
            price=self._price(row, model),
            context_window=facts.context_window or (self._table.context(row.prices, model) if row.prices else None),
            max_output=facts.max_output,
            capabilities=facts.capabilities or _capabilities(row, model),
        )

    def _price(self, row: Provider, model: str) -> Price | None:
        if own := self._prices.get(f"{row.name}/{model}"):
            return own
        if row.free:
            return FREE
        return (self._table.price(row.prices, model) if row.prices else None) or self._default_price


def _listed(row: Provider, model: str) -> bool:
    matching = [pattern for pattern in row.lists if fnmatchcase(model, pattern.removeprefix("!"))]
    return bool(matching) and not any(pattern.startswith("!") for pattern in matching)


def _capabilities(row: Provider, model: str) -> tuple[str, ...]:
    """What can be told without asking: from the row, and from the name of an embedding model."""
    if "embed" in model.lower() and row.has("embeddings", model):
        return ("embeddings",)
    more = [name for name, there in (("tools", "tools" not in row.refuses), ("local", row.local)) if there]
    return ("chat", "streaming", *(["completions"] if row.has("completions", model) else []), *more)


def _price(name: str, rates: Rates) -> Price:
    try:
        return Price.of(**rates.model_dump())
    except ValueError as wrong:
        raise ConfigError(f"prices.{name}.{wrong}") from None


Checked = TypeVar("Checked", bound=BaseModel)


def _checked(kind: type[Checked], given: Mapping[str, Any], where: str) -> Checked:
    try:
        return kind.model_validate(given)
    except ValidationError as refused:
        wrong = refused.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ConfigError(f"{where}{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None


def _provider(name: str, shipped: JSON, given: JSON, settings: Settings, *, on: bool) -> Provider:
    """A row as shipped, as the deployer changed it, and as the environment completes it."""
    if not PROVIDER_NAME.fullmatch(name):
        raise ConfigError(f"providers.{name}: not a name for a provider: lower-case letters, digits, - and _")
    row = _checked(Provider, {"name": name, "title": name, **shipped, **given}, f"providers.{name}.")
    key, url = (settings.provider_variables.get(row.variable(what)) for what in ("api_key", "base_url"))
    if row.api_key is not None:
        raise ConfigError(f"providers.{name}.api_key: keys belong in the environment: set {row.variable('api_key')}")
    if key is not None and not (key.strip().isascii() and key.strip().isprintable()):
        raise ConfigError(f"{row.variable('api_key')}: has characters that no header can carry")
    if not (row.base_url or "base_url" in row.requires):
        raise ConfigError(f'providers.{name}.base_url: is needed, or requires = ["base_url"]')
    source = row.variable("base_url") if url else f"providers.{name}.base_url"
    update: JSON = {
        "base_url": _base_url(url or row.base_url, row.root_path, source),
        "api_key": SecretStr(key.strip()) if key and key.strip() else None,
    }
    return row.model_copy(update=update | ({"enabled": True} if on else {}))


def _base_url(url: str, root_path: str, source: str) -> str:
    """Without the slash at its end; anything but scheme, host, port and path would be lost or leak."""
    if not url:
        return ""
    try:
        parts = urlsplit(url.strip())
        odd = parts.query or parts.fragment or "@" in parts.netloc or not parts.hostname or (parts.port == 0)
    except ValueError:
        odd, parts = True, urlsplit("")
    if odd or parts.scheme not in ("http", "https", "demo") or re.search(r"[\s\\\x00-\x1f]", url.strip()):
        raise ConfigError(f"{source}: not a plain URL such as https://host/v1")
    path = parts.path.rstrip("/") or root_path
    return f"{parts.scheme}://{parts.netloc}{path}"
