"""`POST /v1/route`: who would be asked, in what order, and why not the others; nobody is called, nothing is spent."""

from __future__ import annotations

from fastapi import APIRouter, Request

from functions.deps import Identified, Offered, body
from functions.openapi import described
from functions.responses import JSONBytes
from shared import generations
from shared.errors import GatewayError
from shared.exchange import Routing
from shared.router import Removal
from shared.schema import parse

router = APIRouter(tags=["models"])


@router.post("/route", response_model=None, openapi_extra=described("chat", answers=False))
async def explain(request: Request, key: Identified, services: Offered) -> JSONBytes:
    """Takes what `/v1/chat/completions` takes. The first candidate is the one that would be asked now."""
    call, gateway = parse("chat", await body(request, services.settings)), services.gateway
    if gateway.state.old:
        await gateway.state.read()
    removed: list[Removal] = []
    try:
        plan = gateway.plan(call, removed=removed)
        told = Routing(plan.strategy, gateway.choose(plan, key, removed, ahead=1), removed).told(key)
    except GatewayError as refused:
        told = {**Routing("none", None, removed).told(key), "status": refused.status, **refused.body()}
    seen = told if key.role == "admin" else generations.permitted(told)
    return JSONBytes({"object": "route", "model": call.model, **seen})
