"""A virtual key as JSON: what administrators may say of one, and what is shown of it."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shared.errors import InvalidRequest
from shared.schema import JSON
from shared.store.base import NEVER, UNLIMITED, KeyChange, VirtualKey, is_unlimited
from shared.wording import invalid

DOLLAR = 10**9
GRACE, MOST_GRACE = 86400, 30 * 86400
"""Seconds for which a rotated key's old secret is still good, unless said otherwise."""
MOST_DOLLARS = 100_000_000
MAX_CONCURRENCY = 1000
"""The key's item grows with each open request."""


def _moment(value: Any) -> Any:
    """Epoch seconds from RFC 3339 text, which must name its zone."""
    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError("expected epoch seconds, or a time such as 2030-01-31T12:00:00Z")
    return int(moment.timestamp())


def _dollars(value: Any) -> Any:
    """Nano-dollars from a JSON number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number of US dollars, or null for no limit")
    if not 0 <= value <= MOST_DOLLARS:
        raise ValueError(f"expected an amount from 0 to {MOST_DOLLARS}")
    return int(Decimal(str(value)) * DOLLAR)


PerMinute: TypeAlias = Annotated[int, Field(ge=0, le=10**12)] | None
Dollars: TypeAlias = Annotated[float, Field(ge=0, le=MOST_DOLLARS)]
Money: TypeAlias = Annotated[int, BeforeValidator(_dollars, json_schema_input_type=Dollars)] | None
Moment: TypeAlias = Annotated[
    Annotated[int, Field(ge=0, lt=NEVER)], BeforeValidator(_moment, json_schema_input_type=int | str)
]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]


class KeyFields(BaseModel):
    """What may be said of a key; null means no limit, all models, or no expiry."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    role: Literal["user", "admin"] = "user"
    enabled: bool = True
    expires_at: Moment | None = None
    models: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=200)] | None = None
    rpm: PerMinute = None
    tpm: PerMinute = None
    concurrency: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] = 100
    daily_budget_usd: Money = None
    balance_usd: Money = None
    metadata: JSON = {}


class KeyPatch(KeyFields):
    """What `PATCH` takes: what it names is changed, the rest left alone."""

    name: Name = ""


class KeyRequest(KeyFields):
    """What `POST /admin/keys` takes: `name` is required; no `models` means all, an empty list none."""

    name: Name


Form = TypeVar("Form", KeyPatch, KeyRequest)


def _or(value: int | None, none: int) -> int:
    return none if value is None else value


def read(form: type[Form], body: JSON) -> Form:
    """Check a body; raises InvalidRequest with the field's path."""
    try:
        return form.model_validate(body)
    except ValidationError as refused:
        raise invalid(refused.errors(include_url=False, include_input=False)[0], body) from None


def wanted(form: KeyPatch | KeyRequest) -> VirtualKey:
    """The key to make, still without id and hash."""
    balance = _or(form.balance_usd, UNLIMITED)
    return VirtualKey(
        id="",
        hash="",
        name=form.name,
        role=form.role,
        enabled=form.enabled,
        expires_at=_or(form.expires_at, NEVER),
        models=None if form.models is None else tuple(form.models),
        rpm=_or(form.rpm, UNLIMITED),
        tpm=_or(form.tpm, UNLIMITED),
        concurrency=form.concurrency,
        daily_budget=_or(form.daily_budget_usd, UNLIMITED),
        balance=balance,
        credit=balance,
        metadata=form.metadata,
    )


def change(form: KeyPatch) -> KeyChange:
    """Only what the body named is changed."""
    named, whole = form.model_fields_set, wanted(form)
    if not named:
        raise InvalidRequest("Name at least one field to change.")
    fields = {name.removesuffix("_usd"): name for name in named}
    changes = {field: getattr(whole, field) for field in fields if field != "models"}
    return KeyChange(**changes, models=whole.models, all_models="models" in named and whole.models is None)


def grace(given: Any) -> int:
    """A rotation's grace period, checked; raises InvalidRequest."""
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= MOST_GRACE:
        message = f"Invalid 'grace_seconds': expected whole seconds from 0 to {MOST_GRACE}."
        raise InvalidRequest(message, param="grace_seconds", code="invalid_value")
    return given


def shown(key: VirtualKey, now: int) -> JSON:
    """A key for the eyes of its owner or an administrator; unlimited is null, times are epoch seconds."""
    left_today = key.left("d", now // 86400)
    return {
        "id": key.id,
        "object": "key",
        "masked": key.masked,
        "name": key.name,
        "role": key.role,
        "enabled": key.enabled,
        "created_at": key.created_at,
        "expires_at": None if key.expires_at >= NEVER else key.expires_at,
        "models": None if key.models is None else list(key.models),
        "rpm": _limit(key.rpm),
        "tpm": _limit(key.tpm),
        "concurrency": key.concurrency,
        "daily_budget_usd": _money(key.daily_budget),
        "balance_usd": _money(key.balance + sum(hold.money for hold in key.open.values())),
        "metadata": dict(key.metadata),
        "spend_usd": key.spent / DOLLAR,
        "requests": key.requests,
        "open_requests": len(key.open),
        "remaining": {
            "requests": None if is_unlimited(key.rpm) else max(0, key.left("r", now // 60)),
            "tokens": None if is_unlimited(key.tpm) else max(0, key.left("t", now // 60)),
            "daily_budget_usd": None if is_unlimited(key.daily_budget) else max(0, left_today) / DOLLAR,
            "balance_usd": None if is_unlimited(key.balance) else max(0, key.balance) / DOLLAR,
            "concurrency": key.concurrency - len(key.open),
        },
    }


def _limit(amount: int) -> int | None:
    return None if is_unlimited(amount) else amount


def _money(nano: int) -> float | None:
    return None if is_unlimited(nano) else nano / DOLLAR
