"""`/admin/models` and `/admin/providers`: what is on, what rests, how fast it was; and switching it, everywhere."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field

from functions.deps import Administrator, Offered, Services, body
from functions.openapi import takes
from functions.responses import JSONBytes
from shared.catalog import Deployment, placed
from shared.config import PLAIN_ID, Provider
from shared.errors import InvalidRequest, ModelNotFound, NotFound
from shared.health import Rest
from shared.schema import JSON, Shape, checked

router = APIRouter(prefix="/admin", tags=["admin"])


class SwitchPatch(Shape):
    """What is named is changed; null means as `gateway.toml` says. `resting: false` ends a rest."""

    enabled: bool | None = None
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] | None = None
    resting: bool | None = None


FIELDS = frozenset(SwitchPatch.model_fields)


@router.get("/providers", response_model=None)
async def list_providers(_: Administrator, services: Offered) -> JSONBytes:
    """All providers known, on or off, by priority."""
    await services.gateway.state.read()
    return JSONBytes(
        {"object": "list", "data": [_provider(row, services) for row in services.catalog.providers.values()]}
    )


@router.patch("/providers/{name}", response_model=None, openapi_extra=takes(SwitchPatch))
async def switch_provider(name: str, request: Request, _: Administrator, services: Offered) -> JSONBytes:
    """Switch a provider off or on, put it in another place, wake it; it holds in every process within seconds."""
    row = services.catalog.providers.get(name.lower())
    if row is None:
        raise NotFound(f"No provider with the name '{name[:64]}'.")
    await _turn(row.name, row, request, services)
    return JSONBytes(_provider(row, services))


@router.get("/models", response_model=None)
async def list_models(_: Administrator, services: Offered) -> JSONBytes:
    """All deployments that are listed, and those that were switched or rest though they are not."""
    await services.gateway.state.read()
    known = {to.id: to for to in services.catalog.deployments()}
    state, now = services.gateway.state, time.time()
    for name in {*state.switches.named, *state.health.resting(now)} - known.keys():
        if "/" in name and (found := _found(name, services)):
            known[name] = found
    return JSONBytes({"object": "list", "data": [_deployment(to, services) for to in known.values()]})


@router.patch("/models/{name:path}", response_model=None, openapi_extra=takes(SwitchPatch))
async def switch_model(name: str, request: Request, _: Administrator, services: Offered) -> JSONBytes:
    """The same for one deployment, `provider/model`."""
    to = _found(name, services)
    if to is None:
        raise ModelNotFound(f"No deployment '{name[:128]}': name it as provider/model.", param="model")
    await _turn(to.id, to.provider, request, services)
    return JSONBytes(_deployment(to, services))


async def _turn(name: str, row: Provider, request: Request, services: Services) -> None:
    given = checked(SwitchPatch, await body(request, services.settings))
    if unknown := given.keys() - FIELDS:
        raise InvalidRequest(
            f"Unknown field: '{min(unknown)[:64]}'.", param=min(unknown)[:64], code="unknown_parameter"
        )
    if given.get("resting"):
        raise InvalidRequest("'resting' can only be ended: false.", param="resting", code="invalid_value")
    if given.get("enabled") and row.missing:
        message = f"The provider '{row.name}' is off: {services.catalog.why_off(row.name)}."
        raise InvalidRequest(message, param="enabled", code="invalid_value")
    change = {name: value for name, value in given.items() if name != "resting"}
    await services.gateway.state.turn(name, change, wake="resting" in given)


def _found(name: str, services: Services) -> Deployment | None:
    provider, slash, model = name.partition("/")
    row = services.catalog.providers.get(provider.lower())
    return placed(services.catalog.deployment(row, model)) if row and slash and PLAIN_ID.fullmatch(model) else None


def _provider(row: Provider, services: Services) -> JSON:
    state, now = services.gateway.state, time.time()
    switch = state.switches.named.get(row.name)
    return {
        "id": row.name,
        "object": "provider",
        "title": row.title,
        "configured": not row.missing,
        "missing": row.missing,
        "enabled": switch is None or switch.enabled is not False,
        "priority": switch.priority if switch and switch.priority is not None else row.priority,
        "default_model": row.default_model,
        "switched": switch._asdict() if switch else None,
        "resting": _rest(state.health.resting(now).get(row.name), now),
    }


def _deployment(to: Deployment, services: Services) -> JSON:
    state, now = services.gateway.state, time.time()
    health, own, now_so = state.health, state.switches.named.get(to.id), state.switches.applied(to)
    resting = health.resting(now)
    return {
        "id": to.id,
        "object": "deployment",
        "provider": to.provider.name,
        "model": to.model,
        "configured": not to.provider.missing,
        "enabled": now_so.enabled,
        "priority": now_so.priority,
        "switched": own._asdict() if own else None,
        "resting": _rest(resting.get(to.provider.name) or resting.get(to.id), now),
        "latency_seconds": health.latencies(now).get(to.id),
        "whole_answer_seconds": health.latencies(now, stream=False).get(to.id),
        "tokens_per_second": health.throughputs(now).get(to.id),
    }


def _rest(rest: Rest | None, now: float) -> JSON | None:
    return {"seconds_left": max(0.0, round(rest.until - now, 1)), "fault": rest.fault} if rest else None
