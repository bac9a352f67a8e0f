"""`GET|POST|DELETE /history` and `GET /history/sessions`: what was said, to the key that it belongs to."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ConfigDict

from functions.deps import Identified, Offered, body
from functions.openapi import takes
from functions.responses import JSONBytes
from shared import history
from shared.schema import JSON, Id, Shape, checked, validated

router = APIRouter(tags=["account"])


class SessionRequest(Shape):
    """Both ids are required."""

    user_id: Id
    session_id: Id


class UserRequest(Shape):
    user_id: Id


class ForgetRequest(UserRequest):
    """Nothing unknown: a misspelt `session_id` would forget them all."""

    model_config = ConfigDict(extra="forbid")

    session_id: Id | None = None


@router.get("/history", response_model=None)
async def show(request: Request, key: Identified, services: Offered) -> JSONBytes:
    """The latest 50 messages of a session, oldest first (`?user_id=…&session_id=…`)."""
    return await _said(validated(SessionRequest, dict(request.query_params)), key.id, services)


@router.post("/history", response_model=None, openapi_extra=takes(SessionRequest))
async def show_posted(request: Request, key: Identified, services: Offered) -> JSONBytes:
    """The same, with the ids in a JSON body."""
    return await _said(checked(SessionRequest, await body(request, services.settings)), key.id, services)


@router.get("/history/sessions", response_model=None)
async def sessions(request: Request, key: Identified, services: Offered) -> JSONBytes:
    """A user's sessions, the latest first (`?user_id=…`)."""
    asked = validated(UserRequest, dict(request.query_params))
    found = await services.store.sessions(key.id, asked["user_id"])
    data = [{"session_id": each.id, "title": each.title, "updated": each.updated} for each in found]
    return JSONBytes({"object": "list", "sessions": data})


@router.delete("/history", response_model=None)
async def forget(request: Request, key: Identified, services: Offered) -> JSONBytes:
    """Forget one session, or, without `session_id`, all of a user's."""
    asked = validated(ForgetRequest, dict(request.query_params))
    return JSONBytes({"deleted": await services.store.forget(key.id, asked["user_id"], asked.get("session_id"))})


async def _said(asked: JSON, key_id: str, services: Offered) -> JSONBytes:
    messages = await services.store.said(key_id, asked["user_id"], asked["session_id"], history.SHOWN)
    return JSONBytes({"history": [history.shown(each) for each in messages]})
