"""`POST /v1/chat/completions`, `/v1/completions`, `/v1/embeddings`: the routes that ask a model."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from functions.answering import answer
from functions.deps import Caller, Offered
from functions.openapi import described

router = APIRouter(tags=["models"])


@router.post("/chat/completions", response_model=None, openapi_extra=described("chat"))
async def chat_completions(request: Request, caller: Caller, services: Offered) -> Response:
    """Answer a chat: whole, or as server-sent events when `stream` is set."""
    return await answer("chat", request, caller, services)


@router.post("/completions", response_model=None, openapi_extra=described("completions"))
async def completions(request: Request, caller: Caller, services: Offered) -> Response:
    """Complete a prompt (legacy), whole or streamed; a chat-only model gets it as a user message."""
    return await answer("completions", request, caller, services)


@router.post("/embeddings", response_model=None, openapi_extra=described("embeddings"))
async def embeddings(request: Request, caller: Caller, services: Offered) -> Response:
    """Embed texts, as floats or base64."""
    return await answer("embeddings", request, caller, services)
