"""`/admin/keys`: make, list, change, rotate and delete virtual keys."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request

from functions import keyform
from functions.deps import Administrator, Offered, body
from functions.openapi import takes
from functions.responses import JSONBytes
from shared.errors import InvalidRequest
from shared.schema import decode

router = APIRouter(prefix="/admin/keys", tags=["admin"])


@router.post("", status_code=201, response_model=None, openapi_extra=takes(keyform.KeyRequest))
async def create(request: Request, _: Administrator, services: Offered) -> JSONBytes:
    """Make a key. It is shown this once."""
    form = keyform.read(keyform.KeyRequest, decode(await body(request, services.settings)))
    made, key = await services.keys.create(keyform.wanted(form))
    return JSONBytes({"key": key, **keyform.shown(made, int(time.time()))}, status_code=201)


@router.get("", response_model=None)
async def list_keys(_: Administrator, services: Offered) -> JSONBytes:
    """All keys, by name."""
    now = int(time.time())
    keys = [key async for key in services.store.keys() if not key.deleted]
    keys.sort(key=lambda key: (key.name, key.id))
    return JSONBytes({"object": "list", "data": [keyform.shown(key, now) for key in keys]})


@router.get("/{key_id}", response_model=None)
async def show(key_id: str, _: Administrator, services: Offered) -> JSONBytes:
    return JSONBytes(keyform.shown(await services.keys.get(key_id), int(time.time())))


@router.patch("/{key_id}", response_model=None, openapi_extra=takes(keyform.KeyPatch))
async def change(key_id: str, request: Request, _: Administrator, services: Offered) -> JSONBytes:
    """Change a key; limits by difference, so that what is open and what was used today stay right."""
    form = keyform.read(keyform.KeyPatch, decode(await body(request, services.settings)))
    changed = await services.keys.change(key_id, keyform.change(form))
    return JSONBytes(keyform.shown(changed, int(time.time())))


@router.delete("/{key_id}", response_model=None)
async def delete(key_id: str, _: Administrator, services: Offered) -> JSONBytes:
    """Refuse the key from its next request on."""
    await services.keys.delete(key_id)
    return JSONBytes({"id": key_id, "object": "key", "deleted": True})


@router.post("/{key_id}/rotate", response_model=None)
async def rotate(key_id: str, request: Request, _: Administrator, services: Offered) -> JSONBytes:
    """A new secret, shown this once; the old one is good for `grace_seconds` more (a day, unless said otherwise)."""
    raw = await body(request, services.settings)
    given = decode(raw) if raw.strip() else {}
    grace = keyform.grace(given.pop("grace_seconds", keyform.GRACE))
    if given:
        unknown = next(iter(given))[:64]
        raise InvalidRequest(
            f"Unrecognized request argument supplied: {unknown}", param=unknown, code="unknown_parameter"
        )
    changed, key = await services.keys.rotate(key_id, grace)
    return JSONBytes({"key": key, **keyform.shown(changed, int(time.time()))})
