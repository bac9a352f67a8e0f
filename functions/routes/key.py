"""`GET /v1/key`: what the caller's own key may do, and has left."""

from __future__ import annotations

import time

from fastapi import APIRouter

from functions import keyform
from functions.deps import Identified
from functions.responses import JSONBytes

router = APIRouter(tags=["account"])


@router.get("/key", response_model=None)
async def own_key(key: Identified) -> JSONBytes:
    """The caller's limits, what is left of them, and the spend."""
    return JSONBytes(keyform.shown(key, int(time.time())))
