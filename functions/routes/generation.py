"""`GET /v1/generation?id=gen-…`: the record of one answer."""

from __future__ import annotations

from fastapi import APIRouter, Request

from functions.deps import Identified, Offered
from functions.responses import JSONBytes
from shared import generations
from shared.errors import InvalidRequest

router = APIRouter(tags=["account"])


@router.get("/generation", response_model=None)
async def generation(request: Request, key: Identified, services: Offered) -> JSONBytes:
    """Tokens, cost, latency, attempts and status of one of the caller's own requests."""
    ids = request.query_params.getlist("id")
    if len(ids) != 1 or not ids[0].startswith(generations.PREFIX):
        raise InvalidRequest("Name one generation: ?id=gen-…", param="id", code="invalid_value")
    row = await generations.find(services.store, ids[0][:64], key)
    owner = key if row.key_id == key.id else await services.store.key(row.key_id)
    return JSONBytes(generations.view(row, owner or key, admin=key.role == "admin"))
