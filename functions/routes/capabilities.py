"""`GET /v1/capabilities`: which parameter each provider takes, drops or refuses."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter, Request

from functions.deps import Identified, Offered
from functions.responses import JSONBytes
from shared.capabilities import capabilities
from shared.errors import InvalidRequest

router = APIRouter(tags=["models"])
ALL = {"": False, "false": False, "true": True}


@router.get("/capabilities", response_model=None)
async def list_capabilities(request: Request, _: Identified, services: Offered) -> JSONBytes:
    """What the providers that are on can be asked, by priority; with `?all=true` those that are off, too."""
    if (given := request.query_params.get("all", "")) not in ALL:
        raise InvalidRequest("'all' is true or false.", param="all", code="invalid_value")
    found = await to_thread.run_sync(capabilities, services.catalog)  # the first time it is work of some 100 ms
    data = [
        {
            "provider": each.provider.name,
            "title": each.provider.title,
            "on": each.on,
            "models": each.models,
            "parameters": each.parameters,
        }
        for each in found
        if each.on or ALL[given]
    ]
    return JSONBytes({"object": "list", "data": data})
