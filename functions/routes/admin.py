"""`/admin/usage` and `/admin/generations`: what was spent, by whom, on what."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import QueryParams

from functions.deps import Administrator, Offered
from functions.responses import JSONBytes
from shared import books, generations
from shared.errors import InvalidRequest
from shared.schema import JSON
from shared.store.base import VirtualKey

router = APIRouter(prefix="/admin", tags=["admin"])
GROUPS = ("key", "model", "provider", "day")
DAYS, MOST_DAYS = 30, 366
PAGE, MOST_PAGE = 50, 100
COUNTS = ("requests", "prompt_tokens", "completion_tokens", "cost")


@router.get("/usage", response_model=None)
async def usage(request: Request, _: Administrator, services: Offered) -> JSONBytes:
    """Requests, tokens and cost from day to day (`from`, `to`: YYYY-MM-DD, UTC), grouped by `group_by`."""
    asked = _known(request.query_params, "group_by", "from", "to", "key")
    group = asked.get("group_by", "key")
    if group not in GROUPS:
        raise InvalidRequest(f"'group_by' is one of {', '.join(GROUPS)}.", param="group_by", code="invalid_value")
    last = _day(asked, "to", int(time.time()) // 86400)
    first = _day(asked, "from", last - DAYS + 1)
    oldest = int(time.time()) // 86400 - services.settings.generation_ttl_days
    if not 0 <= last - first < MOST_DAYS:
        raise InvalidRequest(f"'from' to 'to' must be 1 to {MOST_DAYS} days.", param="from", code="invalid_value")
    sums: dict[str, JSON] = {}
    for key in await _keys(services, asked.get("key")):
        async for row in books.usage(services.store, key.id, first, last, oldest):
            name = key.id if group == "key" else _date(row["day"]) if group == "day" else row[group] or "unknown"
            entry = sums.setdefault(name, {group: name, **({"name": key.name} if group == "key" else {})})
            for count in COUNTS:
                entry[count] = entry.get(count, 0) + row[count]
    data = sorted(sums.values(), key=lambda entry: entry[group] if group == "day" else -entry["cost"])
    total = {count: sum(entry[count] for entry in data) for count in COUNTS}
    body = {"object": "list", "group_by": group, "from": _date(first), "to": _date(last)}
    return JSONBytes({**body, "data": [_priced(entry) for entry in data], "total": _priced(total)})


@router.get("/generations", response_model=None)
async def list_generations(request: Request, _: Administrator, services: Offered) -> JSONBytes:
    """One key's records of a day (`key`, `day`: YYYY-MM-DD, UTC), oldest first, by pages (`after`, `limit`)."""
    asked = _known(request.query_params, "key", "day", "after", "limit")
    if "key" not in asked:
        raise InvalidRequest("Name a key: ?key=<id>.", param="key", code="missing_required_parameter")
    limit = asked.get("limit", str(PAGE))
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= MOST_PAGE:
        raise InvalidRequest(f"'limit' is a number from 1 to {MOST_PAGE}.", param="limit", code="invalid_value")
    key = (await _keys(services, asked["key"]))[0]
    day = _day(asked, "day", int(time.time()) // 86400)
    rows = await services.store.generations(key.id, day, asked.get("after", "")[:64], int(limit) + 1)
    data = [generations.view(row, key, admin=True) for row in rows[: int(limit)]]
    return JSONBytes({"object": "list", "data": data, "has_more": len(rows) > len(data)})


async def _keys(services: Offered, key_id: str | None) -> Sequence[VirtualKey]:
    """One key, or all: deleted ones too, for the money they spent stays spent."""
    if key_id is None:
        return [key async for key in services.store.keys()]
    key = await services.store.key(key_id)
    if key is None:
        raise InvalidRequest("No key with this id.", param="key", code="invalid_value")
    return [key]


def _known(params: QueryParams, *names: str) -> dict[str, str]:
    if unknown := [name for name in params if name not in names]:
        raise InvalidRequest(
            f"Unknown parameter: '{unknown[0][:64]}'.", param=unknown[0][:64], code="unknown_parameter"
        )
    return dict(params)


def _day(asked: dict[str, str], name: str, default: int) -> int:
    """A day's number since the epoch."""
    if name not in asked:
        return default
    try:
        day = int(datetime.strptime(asked[name], "%Y-%m-%d").replace(tzinfo=UTC).timestamp()) // 86400
    except ValueError:
        day = -1
    if day < 0:
        raise InvalidRequest(f"'{name}' is a day, YYYY-MM-DD.", param=name, code="invalid_value")
    return day


def _date(day: int) -> str:
    return datetime.fromtimestamp(day * 86400, UTC).strftime("%Y-%m-%d")


def _priced(entry: dict[str, Any]) -> JSON:
    return {name: value for name, value in entry.items() if name != "cost"} | {
        "cost_usd": generations.dollars(entry["cost"])
    }
