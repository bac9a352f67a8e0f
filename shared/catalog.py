"""Who can be asked for what: providers as rows of data, and the deployments that a model's name means."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from shared import config
from shared.config import NO_FACTS, PLAIN_ID, ConfigError, Entry, GatewayFile, Provider, Rates
from shared.errors import ModelNotFound, NoProvider
from shared.prices import FREE, Price, PriceTable
from shared.settings import Settings


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model at one provider. `price` is None where nobody knows it; `declared`: the deployer listed what it can.

    `shadowed`: the model's bare name is an alias, and means something else."""

    provider: Provider
    model: str
    price: Price | None = None
    context_window: int | None = None
    max_output: int | None = None
    capabilities: tuple[str, ...] = ()
    declared: bool = False
    shadowed: bool = False
    weight: int = 1
    priority: int = 0
    enabled: bool = True
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.provider.name}/{self.model}")


Strategy: TypeAlias = Literal["priority", "price", "latency", "throughput", "local", "remote", "round_robin"]
AUTO: Mapping[str, Strategy] = {
    "auto": "priority", "auto:price": "price", "auto:latency": "latency", "auto:local": "local",
    "auto:remote": "remote", "auto:round-robin": "round_robin",
}  # fmt: skip
"""The routes over all that the key may use, and how each is put in order."""
BEHIND = 1_000_000
"""The priority from which on come, in an automatic route, the models that are nobody's default."""


@dataclass(frozen=True, slots=True)
class Route:
    """What a name means: the deployments that may answer, and how they are put in order.

    `automatic`: all that there are, of which the request's surface picks; its turns go round the providers."""

    asked: str
    deployments: tuple[Deployment, ...]
    strategy: Strategy = "priority"
    automatic: bool = False


class Listing(NamedTuple):
    """A name that `/v1/models` shows. `backends` also names what is off now; `deployments` is what can answer.

    Of an automatic route the backends are the providers' default models only: the rest would be everything."""

    id: str
    deployments: tuple[Deployment, ...]
    backends: tuple[str, ...]

    @property
    def automatic(self) -> bool:
        return self.id in AUTO


class Catalog:
    """Everything is looked up in dicts made once; nothing here does I/O but `load`."""

    def __init__(self, providers: Iterable[Provider], prices: PriceTable, file: GatewayFile | None = None) -> None:
        self.file = file = file or GatewayFile()
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
        self._members: list[tuple[str, str]] = []
        self._aliases = {name: self._entries(name, entries) for name, entries in file.aliases.items()}
        self._serving = self._index()
        self._defaults = tuple(placed(to) for row in self._on if (to := self._default(row)))
        self._routes: dict[str, Route] = {}  # aliases and listed names only, so that callers cannot make it grow

    @classmethod
    def load(cls, settings: Settings, prices: PriceTable, *, also: Collection[str] = ()) -> Catalog:
        """The shipped rows, changed and added to by `gateway.toml`; `also` names providers to switch on regardless.

        Raises ConfigError."""
        path = Path(settings.gateway_config)
        rows, file = config.read(path)
        rows = [config.with_account(row, settings, on=row.name in also) for row in rows]
        with config.in_file(path):
            catalog = cls(rows, prices, file)
        named = (member.partition("/") for member in settings.round_robin_members)
        catalog._members = [catalog._split(f"{name.lower()}/{model}", "ROUND_ROBIN") for name, _, model in named]
        return catalog

    def on(self) -> tuple[Provider, ...]:
        """The providers that can be asked, by priority."""
        return self._on

    def listed(self, row: Provider) -> list[Deployment]:
        """The known models of a provider, be it on or off."""
        return [self.deployment(row, model) for model, rows in self._serving.items() if any(row is o for o in rows)]

    def why_off(self, provider: str) -> str | None:
        """What to do to switch a provider on ("set GROQ_API_KEY"); None where it is on or unknown."""
        row = self.providers.get(provider.lower())
        return f"set {' and '.join(row.missing)}" if row and row.missing else None

    def knows(self, provider: str, model: str) -> bool:
        """Whether it is listed or an alias names it; other models are there because a caller wrote so."""
        named = ((entry.provider, entry.model) for entries in self._aliases.values() for entry in entries)
        return any(row.name == provider for row in self._serving.get(model, ())) or (provider, model) in named

    def resolve(self, name: str) -> Route:
        """`provider/model`, a bare model name or an alias to a route; raises ModelNotFound or NoProvider."""
        if route := self._routes.get(name):
            return route
        if not self._on:
            raise NoProvider("No provider is configured: set a provider's API key, for example OPENAI_API_KEY.")
        head, slash, model = name.partition("/")
        if name in self._aliases:
            route = Route(name, tuple(self._alias(name)))
        elif name in AUTO:
            route = Route(name, self._everything(), AUTO[name], automatic=True)
        elif slash and (row := self.providers.get(head.lower())):
            route = Route(name, (self._named(row, model),))
            if name != route.deployments[0].id or all(row is not other for other in self._serving.get(model, ())):
                return route
        else:
            rows = self._serving.get(name, ())
            found = (self.deployment(row, name) for row in rows if not row.missing)
            route = Route(name, tuple(map(placed, found)))
        if not route.deployments:
            raise self._unknown(name)
        return self._routes.setdefault(name, route)

    def known(self, name: str) -> Route | None:
        """The route that `resolve` gives out for a name again and again; None where it makes one each time."""
        return self._routes.get(name)

    def is_route(self, name: str) -> bool:
        """Whether several may answer, and the name is one of a set that callers cannot make grow."""
        return name in self._aliases or name in AUTO or len(self._serving.get(name, ())) > 1

    def defaults(self) -> tuple[Deployment, ...]:
        """The default model of each provider that is on, or else its first for chat, by priority of the providers."""
        return self._defaults

    def deployments(self) -> list[Deployment]:
        """All that are listed, that an alias names or that take turns, each in its own place."""
        named = [(entry.provider, entry.model) for entries in self._aliases.values() for entry in entries]
        rows = [(self.providers[name], model) for name, model in (*named, *self._members)]
        also = [self.deployment(row, model) for row, model in rows if not row.missing]
        return [*{to.id: placed(to) for to in (*self._known(), *also)}.values()]

    def taking_turns(self) -> Route:
        """Who answers `/rr-chat/stream`, each in turn: the members that are on; raises NoProvider where none is."""
        if not self._members:
            return replace(self.resolve("auto:round-robin"), deployments=self.defaults() or self._everything())
        rows = [(self.providers[name], model) for name, model in self._members]
        if not (on := tuple(self.deployment(row, model) for row, model in rows if not row.missing)):
            raise NoProvider(f"No member of ROUND_ROBIN is on: {self.why_off(rows[0][0].name)}.")
        return Route("auto:round-robin", on, "round_robin")

    def listing(self, name: str) -> Listing:
        """One name that can be asked for, listed or not; an alias also while it is off. Raises as `resolve`."""
        if entries := self._aliases.get(name):
            backends = tuple(f"{entry.provider}/{entry.model}" for entry in entries)
            return Listing(name, tuple(self._alias(name)), backends)
        deployments = self.resolve(name).deployments
        return Listing(name, deployments, tuple(to.id for to in (self.defaults() if name in AUTO else deployments)))

    def models(self) -> list[Listing]:
        """Aliases, the automatic routes, then all models known of the providers that are on, as `provider/model`."""
        listings = [self.listing(name) for name in (*self._aliases, *(AUTO if self._on else ()))]
        return listings + [Listing(to.id, (to,), (to.id,)) for to in self._known()]

    def _default(self, row: Provider) -> Deployment | None:
        if row.default_model:
            return self.deployment(row, row.default_model)
        return next((to for to in self.listed(row) if "chat" in to.capabilities), None)

    def _known(self) -> list[Deployment]:
        found = [
            self.deployment(row, model) for model, rows in self._serving.items() for row in rows if not row.missing
        ]
        return sorted(found, key=lambda to: (to.provider.priority, to.id))

    def _everything(self) -> tuple[Deployment, ...]:
        """All that can be asked: the providers' default models, then the others in their order."""
        defaults = self.defaults()
        ids = {to.id for to in defaults}
        others = [to for to in self._known() if to.id not in ids]
        return *defaults, *(replace(to, priority=to.priority or BEHIND + place) for place, to in enumerate(others))

    def _named(self, row: Provider, model: str) -> Deployment:
        if row.missing:
            raise ModelNotFound(f"The provider '{row.name}' is off: {self.why_off(row.name)}.", param="model")
        if not PLAIN_ID.fullmatch(model):
            raise ModelNotFound("The model is not a plain model id.", param="model")
        return self.deployment(row, model)

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
            replace(self.deployment(row, entry.model), weight=entry.weight, priority=entry.priority)
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

    def deployment(self, row: Provider, model: str) -> Deployment:
        """What is known of one model at one provider, on or off."""
        facts = self._facts.get(f"{row.name}/{model}", NO_FACTS)
        return Deployment(
            row,
            model,
            price=self._price(row, model),
            context_window=facts.context_window or (self._table.context(row.prices, model) if row.prices else None),
            max_output=facts.max_output or row.most_output(model),
            capabilities=facts.capabilities or _capabilities(row, model),
            declared=bool(facts.capabilities),
            shadowed=model in self._aliases or model in AUTO,
            priority=facts.priority,
            enabled=facts.enabled,
        )

    def _price(self, row: Provider, model: str) -> Price | None:
        if own := self._prices.get(f"{row.name}/{model}"):
            return own
        if row.free:
            return FREE
        return (self._table.price(row.prices, model) if row.prices else None) or self._default_price


def placed(to: Deployment) -> Deployment:
    """In its own place, else in its provider's."""
    return replace(to, priority=to.priority or to.provider.priority)


def _listed(row: Provider, model: str) -> bool:
    matching = [pattern for pattern in row.lists if fnmatchcase(model, pattern.removeprefix("!"))]
    return bool(matching) and not any(pattern.startswith("!") for pattern in matching)


def _capabilities(row: Provider, model: str) -> tuple[str, ...]:
    """What can be told without asking: from the row, and from the name of an embedding model."""
    if "embed" in model.lower() and row.has("embeddings", model):
        return ("embeddings",)
    native = row.has("completions", model)
    if native and "*" not in row.completions:  # OpenAI's older models: no chat
        return ("completions", "streaming")
    more = [name for name, there in (("tools", "tools" not in row.refuses), ("local", row.local)) if there]
    return ("chat", "streaming", *(["completions"] if native else []), *more)


def _price(name: str, rates: Rates) -> Price:
    try:
        return Price.of(**rates.model_dump())
    except ValueError as wrong:
        raise ConfigError(f"prices.{name}.{wrong}") from None
