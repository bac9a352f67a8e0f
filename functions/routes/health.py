"""`GET /health` and `GET /`: alive, since when, and who can answer. Static in cost: nobody is called."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from functions.deps import Offered
from functions.responses import JSONBytes

router = APIRouter(tags=["open"])


@router.get("/health", response_model=None)
async def health(request: Request, services: Offered) -> Response:
    """The state of this process; one line of text where `Accept` asks for text, and not for JSON as well."""
    accepted = request.headers.get("accept", "")
    if "text/plain" in accepted and "application/json" not in accepted:
        return PlainTextResponse("Lightrail AI Gateway is healthy\n")
    switches = services.gateway.state.switches
    on = [provider for provider in services.catalog.on() if switches.on(provider)]
    return JSONBytes(
        {
            "status": "ok",
            "uptime_secs": int(time.time() - services.started),
            "version": request.app.version,
            "active_providers": [provider.name for provider in on],
            "provider_count": len(on),
            "total_requests": services.gateway.answered,
            "backends_available": len(on),
        }
    )


@router.get("/", response_model=None)
async def root(request: Request) -> JSONBytes:
    return JSONBytes({"name": "Lightrail", "version": request.app.version, "docs": "/openapi.json"})
