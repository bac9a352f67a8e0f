"""What the three model routes share: read, plan, admit, answer."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.responses import Response

from functions.deps import Services, body
from functions.responses import EventStream, JSONBytes, Listener, answer_headers, stopping
from shared.errors import GatewayError, InvalidRequest, NoProvider, NotFound
from shared.exchange import Exchange
from shared.gateway import Gateway
from shared.keys import Credential
from shared.schema import JSON, Surface, parse


async def answer(surface: Surface, request: Request, caller: Credential, services: Services) -> Response:
    """Answer one model call; raises GatewayError for whatever refuses it. What is admitted, the envelope settles."""
    told: JSON = request.state.told
    raw = await body(request, services.settings)
    try:
        plan = await services.gateway.plan(parse(surface, raw))
    except (InvalidRequest, NotFound, NoProvider):
        await services.keys.identify(caller)  # a bad key is told 401, whatever else is wrong
        raise
    request_id = told["id"].removeprefix("gen-")
    exchange = told["exchange"] = await services.gateway.admit(plan, caller, request_id)
    if ends := request.scope["state"].get("deadlines"):  # the platform's, if it has any
        exchange.deadline = min(exchange.deadline, ends[plan.call.stream])
    if plan.call.stream:
        return EventStream(services.gateway, exchange)
    return await whole(request, services.gateway, exchange)


async def whole(request: Request, gateway: Gateway, exchange: Exchange) -> Response:
    try:
        async with Listener(request.receive):
            return JSONBytes(await gateway.complete(exchange), headers=answer_headers(exchange))
        exchange.interrupt()
        return Response(status_code=499)  # the caller hung up: nobody is there to read it
    except asyncio.CancelledError as stopped:
        exchange.interrupt()
        raise stopping() from stopped
    except GatewayError as error:
        exchange.error = error
        error.headers = {**answer_headers(exchange), **error.headers}
        raise
