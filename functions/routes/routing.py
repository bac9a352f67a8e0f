"""`POST /v1/route`: who would be asked, in what order, and why not the others; nobody is called, nothing is spent."""

from __future__ import annotations

from fastapi import APIRouter, Request

from functions.deps import Identified, Offered, body
from functions.openapi import described
from functions.responses import JSONBytes
from shared.errors import GatewayError
from shared.exchange import Routing
from shared.router import Removal
from shared.schema import JSON, parse

router = APIRouter(tags=["models"])


@router.post("/route", response_model=None, openapi_extra=described("chat", answers=False))
async def explain(request: Request, key: Identified, services: Offered) -> JSONBytes:
    """Takes what `/v1/chat/completions` takes. The first candidate is the one that would be asked now."""
    call, gateway = parse("chat", await body(request, services.settings)), services.gateway
    if gateway.state.old:
        await gateway.state.read()
    removed: list[Removal] = []
    told: JSON = {"object": "route", "model": call.model}
    try:
        plan = await gateway.plan(call, removed=removed)
        order = gateway.choose(plan, key, removed, ahead=1)
    except GatewayError as refused:
        nobody = Routing("none", None, removed).told()
        return JSONBytes({**told, **nobody, "status": refused.status, **refused.body()})
    return JSONBytes({**told, **Routing(plan.strategy, order, removed).told()})
