"""What is configured: the providers as shipped, and `gateway.toml` as the deployer wrote it, both checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from shared.schema import JSON
from shared.settings import Settings

ROWS = Path(__file__).with_name("providers") / "providers.toml"
PLAIN_ID = re.compile(r"(?!.*(?:\.\.|//|/\.))[A-Za-z0-9@][A-Za-z0-9._:@/+-]{0,198}(?<!/)")
"""A model id, never a path, a query or an escape; ids with slashes are common (`accounts/fireworks/models/x`)."""
PROVIDER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

ECHOED = (
    "annotations", "refusal", "audio", "reasoning_details", "cache_control", "prompt_cache_breakpoint", "extra_content",
)  # fmt: skip
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


Thinking: TypeAlias = Literal["never", "budget", "adaptive", "disabled", "between_tools", "always"]
"""Never; with a budget of tokens; as much as it likes (adaptive): where that is on by itself, the word that ends it, or
`always` where none does."""

Family: TypeAlias = Literal["claude", "gpt", "gpt-oss", "mistral", "nova", "nova-2", "qwen"]


class Provider(Row):
    """A company's endpoint, our account there, and everything in which its wire differs from OpenAI's.

    Models are named by shell patterns (`gpt-5*`); parameters and features as in `Call.features`."""

    name: str
    title: str = ""  # as people are shown it
    dialect: Literal["openai", "anthropic", "gemini", "bedrock", "cohere"] = "openai"
    base_url: str = ""  # the API root, without a slash at the end
    root_path: str = ""  # what a base URL that names only a host lacks
    auth: Literal["bearer", "api-key", "x-api-key", "x-goog-api-key"] = "bearer"  # the header that carries the key
    region: str | None = Field(default=None, pattern=r"^[a-z0-9-]{1,32}$")  # AWS's; else that of the settings
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
    answers_elsewhere: bool = False  # whether a late answer may be fetched by a 303 to its own host, as Modal's must

    completions: tuple[str, ...] = ()  # models with a /completions of their own; others are asked by chat
    embeddings: tuple[str, ...] = ()  # models that may be asked for embeddings
    base64: bool = False  # whether it knows `encoding_format`
    token_ids: bool = False  # whether prompts and inputs may be token ids

    output_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # the name that chat takes
    max_output: Mapping[str, int] = {}  # tokens that its models can make at most; the first that fits
    stream_options: bool = True  # whether it must, and may, be asked for usage in streams
    obfuscation: bool = False  # whether it pads streamed chunks unless told not to
    renames: Mapping[str, str] = {}  # parameters under another name
    drops: tuple[str, ...] = ()  # tuning parameters that it refuses: left out, and the caller is told
    drops_by_model: Mapping[str, tuple[str, ...]] = {}
    refuses: tuple[str, ...] = ()  # features that it lacks and that change what the answer means
    refuses_by_model: Mapping[str, tuple[str, ...]] = {}
    tool_choice: Mapping[str, str] = {}  # its own words
    defaults: Mapping[str, Any] = {}  # sent unless the caller says otherwise
    keeps: tuple[str, ...] = ()  # extensions of ours that are also its own
    developer: bool = True  # whether it knows the role; else `system`
    strips: tuple[str, ...] = ECHOED  # fields of messages that it refuses
    echoes_reasoning: str | None = None  # under which name it takes reasoning back in the history
    bare_audio: bool = False  # audio parts hold the base64 itself
    file_urls: bool = False  # files are `file_url` parts, with a URL or the base64 itself
    unknown_reasoning: str | None = None  # stands for it where it is not known, and must be there all the same
    tool_ids: str | None = None  # the form that tool call ids must have; each is then for one call

    reasoning_on_top: bool = False  # reasoning tokens are not counted in `completion_tokens`
    cost: ReportedCost | None = None

    thinking: Mapping[str, Thinking] = {}  # how Claude models are asked to think, and told not to; the first that fits
    thinking_levels: Mapping[str, tuple[str, ...]] = {}  # words for effort that the models know, weakest first
    thinking_budgets: Mapping[str, tuple[int, int]] = {}  # tokens to think with, least and most; 0: thinking may be off
    families: Mapping[str, Family] = {}  # whose own parameters a model of Bedrock takes; the first that fits
    strict_tools: tuple[str, ...] = ()  # models of Bedrock that can be held to a tool's schema
    signed_calls: tuple[str, ...] = ()  # models that refuse a call in the history without its signature

    @property
    def starts_cold(self) -> bool:
        """Whether its models run on the deployer's own machines, which may have to load them first."""
        return self.local or self.answers_elsewhere

    @property
    def credentials(self) -> dict[str, str]:
        """The header that carries our key; none where there is no key."""
        if self.api_key is None:
            return {}
        key = self.api_key.get_secret_value()
        return {"authorization": f"Bearer {key}"} if self.auth == "bearer" else {self.auth: key}

    def first_content_for(self, model: str, settings: Settings) -> float:
        """Seconds that a stream of this model may take to its first content."""
        slow = (seconds for pattern, seconds in self.slow.items() if fnmatchcase(model, pattern))
        return max(self.first_content_timeout or settings.first_content_timeout, next(slow, 0))

    def reasons(self, model: str) -> bool:
        """Whether the model thinks before it answers: the ones that are slow to their first content do."""
        return any(fnmatchcase(model, pattern) for pattern in self.slow)

    def has(self, surface: Literal["completions", "embeddings"], model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in getattr(self, surface))

    def dropped(self, model: str) -> set[str]:
        """The tuning parameters that this model is not sent."""
        found = set(self.drops)
        for pattern, names in self.drops_by_model.items():
            if fnmatchcase(model, pattern):
                found.update(names)
        return found

    def refused(self, model: str) -> set[str]:
        """The features that this model lacks."""
        by_model = (names for pattern, names in self.refuses_by_model.items() if fnmatchcase(model, pattern))
        return set(self.refuses).union(*by_model)

    def most_output(self, model: str) -> int | None:
        return next((most for pattern, most in self.max_output.items() if fnmatchcase(model, pattern)), None)

    def thinks(self, model: str) -> Thinking:
        """A model that nobody has told of is taken for a new one."""
        for pattern, how in self.thinking.items():
            if fnmatchcase(model, pattern):
                return how
        return "always"

    def family(self, model: str) -> Family | None:
        return next((family for pattern, family in self.families.items() if fnmatchcase(model, pattern)), None)

    def keeps_to_schemas(self, model: str) -> bool:
        """Whether it can be told to call its tools as their schemas say, and not otherwise."""
        return any(fnmatchcase(model, pattern) for pattern in self.strict_tools)

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
    priority: int = 0  # where several may answer, the lowest comes first; 0: as its provider
    enabled: bool = True


NO_FACTS = Facts()


class Check(Row):
    """A `[[safety]]`: whatever of it is set must hold for all text of a request together."""

    name: str = Field(min_length=1, max_length=64)  # which a refused caller is told
    max_bytes: int | None = Field(default=None, ge=1)  # of UTF-8
    max_characters: int | None = Field(default=None, ge=1)
    contains: tuple[
        Annotated[str, Field(min_length=1)], ...
    ] = ()  # what must not occur, even within a word, in any case
    matches: tuple[str, ...] = ()  # regular expressions, of which none may be found
    call: str | None = None  # "package.module:function"
    timeout: float = Field(default=5, gt=0)  # seconds that the function may take, if it is async


class GatewayFile(Row):
    """`gateway.toml`. Prices and models are keyed `provider/model`; the price `default` is for all that have none.

    `metrics`: see `metrics.chosen`. `estimators`: a pattern of model ids to what `tokens.use` knows."""

    metrics: str | None = None
    safety: tuple[Check, ...] = ()
    estimators: dict[str, str] = {}
    providers: dict[str, dict[str, Any]] = {}
    aliases: dict[str, tuple[Entry, ...]] = {}
    prices: dict[str, Rates] = {}
    models: dict[str, Facts] = {}


Checked = TypeVar("Checked", bound=BaseModel)


def _checked(kind: type[Checked], given: Mapping[str, Any], where: str) -> Checked:
    try:
        return kind.model_validate(given)
    except ValidationError as refused:
        wrong = refused.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ConfigError(f"{where}{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None


def read(path: Path) -> tuple[list[Provider], GatewayFile]:
    """The shipped rows, changed and added to by the file at `path`, and that file. Raises ConfigError."""
    with in_file(path):
        given = tomllib.loads(path.read_text("utf-8"), parse_float=Decimal) if path.is_file() else {}
        file = _checked(GatewayFile, given, "")
        rows: dict[str, JSON] = tomllib.loads(ROWS.read_text("utf-8"))
        names = {**rows, **file.providers}
        return [_provider(name, rows.get(name, {}), file.providers.get(name, {})) for name in names], file


def imported(name: str, where: str) -> Callable[..., Any]:
    """What `package.module:function` names; raises ConfigError, whatever the import of a deployer's own code does."""
    module, colon, attribute = name.partition(":")
    try:
        found: object = getattr(import_module(module), attribute) if colon else None
    except Exception as wrong:
        raise ConfigError(f"{where}: '{name}' cannot be imported: {type(wrong).__name__}: {wrong}") from wrong
    if not callable(found):
        raise ConfigError(f"{where}: '{name}' is no function: write \"package.module:function\"")
    return found


@contextmanager
def in_file(path: Path) -> Generator[None]:
    try:
        yield
    except ConfigError as wrong:
        raise ConfigError(f"{path}: {wrong}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as wrong:
        raise ConfigError(f"{path}: not TOML: {wrong}") from None


def _provider(name: str, shipped: JSON, given: JSON) -> Provider:
    """A row as shipped and as the deployer changed it."""
    where = f"providers.{name}"
    if not PROVIDER_NAME.fullmatch(name):
        raise ConfigError(f"{where}: not a name for a provider: lower-case letters, digits, - and _")
    row = _checked(Provider, {"name": name, "title": name, **shipped, **given}, f"{where}.")
    if row.api_key is not None:
        raise ConfigError(f"{where}.api_key: keys belong in the environment: set {row.variable('api_key')}")
    if row.base_url:
        return row.model_copy(update={"base_url": _base_url(row.base_url, row.root_path, f"{where}.base_url")})
    if "base_url" not in row.requires:
        raise ConfigError(f'{where}.base_url: is needed, or requires = ["base_url"]')
    return row


def with_account(row: Provider, settings: Settings, *, on: bool) -> Provider:
    """The row with what the environment says about our account."""
    update: JSON = {"enabled": True} if on else {}
    if row.dialect == "bedrock":
        region = row.region or settings.aws_region
        update |= {"region": region, "base_url": row.base_url.replace("{region}", region)}
    if key := settings.provider_variables.get(row.variable("api_key"), "").strip():
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{row.variable('api_key')}: has characters that no header can carry")
        update["api_key"] = SecretStr(key)
    if url := settings.provider_variables.get(row.variable("base_url"), "").strip():
        update["base_url"] = _base_url(url, row.root_path, row.variable("base_url"))
    return row.model_copy(update=update)


def _base_url(url: str, root_path: str, source: str) -> str:
    """Without the slash at its end; anything but scheme, host, port and path would be lost or leak."""
    try:
        parts = urlsplit(url)
        plain = parts.hostname and parts.port != 0 and "@" not in parts.netloc and not (parts.query or parts.fragment)
    except ValueError:
        parts, plain = urlsplit(""), False
    if not plain or parts.scheme not in ("http", "https", "demo") or re.search(r"[\s\\]", url):
        raise ConfigError(f"{source}: not a plain URL such as https://host/v1")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or root_path}"
