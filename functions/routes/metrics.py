"""`GET /metrics`: what this process has counted, for Prometheus; with an admin key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from functions.deps import Administrator, Offered
from shared.errors import NotFound
from shared.metrics import Prometheus

router = APIRouter(tags=["admin"])
FORMAT = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics", response_model=None, response_class=PlainTextResponse)
async def metrics(_: Administrator, services: Offered) -> Response:
    """Prometheus' text format. 404 where metrics go elsewhere, and on Lambda, where no process sees all requests."""
    kept = services.telemetry.metrics
    if not isinstance(kept, Prometheus):
        where = (
            "in CloudWatch, namespace Lightrail" if services.settings.on_lambda else "where `gateway.toml` sends them"
        )
        raise NotFound(f"Nothing is kept here for Prometheus: the metrics of this gateway are {where}.")
    kept.gauge("ai_requests_open", len(services.gateway.open))
    return PlainTextResponse(kept.text(), media_type=FORMAT)
