"""What the routes that ask a model share: read, plan, admit, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response

from functions.deps import Services, body
from functions.responses import Events, EventStream, JSONBytes, Listener, answer_headers, never, stopping
from shared.errors import GatewayError, InvalidRequest, NoProvider, NotFound
from shared.exchange import Exchange
from shared.gateway import Gateway, Reading
from shared.idempotency import InProgress, Replay, Ticket
from shared.keys import Credential
from shared.planning import Plan
from shared.schema import JSON, Surface, parse


async def answer(surface: Surface, request: Request, caller: Credential, services: Services) -> Response:
    """Answer one model call in OpenAI's shape; raises GatewayError for whatever refuses it."""
    asked = Asked(request, caller, services, await body(request, services.settings))
    plan = await asked.checked(lambda raw: services.gateway.plan(parse(surface, raw), key_id=caller.key_id))
    return await asked.answered(plan)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to a model route, on its way to an answer. What is admitted, the envelope settles."""

    request: Request
    caller: Credential
    services: Services
    raw: bytes

    async def checked(self, plan: Callable[[bytes], Plan]) -> Plan:
        """What is planned for the body; a bad key is told 401, whatever else is wrong."""
        try:
            return plan(self.raw)
        except (InvalidRequest, NotFound, NoProvider):
            await self.services.keys.identify(self.caller)
            raise

    async def answered(
        self,
        plan: Plan,
        *,
        context: Reading | None = None,
        events: Events | None = None,
        shape: Callable[[JSON, Exchange], JSON] | None = None,
    ) -> Response:
        """Whole or streamed, as the call says; `events` and `shape` are other dialects than OpenAI's."""
        services, told = self.services, self.request.state.told
        request_id: str = told["id"].removeprefix("gen-")
        ticket = await self._begun(request_id)
        if isinstance(ticket, Replay):
            told["id"] = f"gen-{ticket.request_id}"
            return Response(ticket.body, ticket.status, {**ticket.headers, "idempotent-replayed": "true"})
        try:
            exchange = await services.gateway.admit(plan, self.caller, request_id, context)
        except BaseException:
            if ticket:
                await ticket.drop()
            raise
        told["exchange"], exchange.ticket = exchange, ticket
        if ends := self.request.scope["state"].get("deadlines"):  # the platform's, if it has any
            exchange.deadline = min(exchange.deadline, ends[plan.call.stream])
        if plan.call.stream:
            return EventStream(services.gateway, exchange, events)
        return await whole(self.request, services.gateway, exchange, shape)

    async def _begun(self, request_id: str) -> Ticket | Replay | None:
        """With an `Idempotency-Key`: to be the first, or the first one's answer; a bad key is told 401 before that."""
        services, request = self.services, self.request
        if not (given := request.headers.getlist("idempotency-key")):
            return None
        seconds = services.settings.total_timeout + LAST_WORDS
        asked = (request.url.path, self.raw, request_id, seconds)
        try:
            begun = await services.idempotency.begin(", ".join(given), self.caller, *asked)
        except (InvalidRequest, InProgress):
            await services.keys.identify(self.caller)
            raise
        if isinstance(begun, Replay):
            await services.keys.identify(self.caller)
        return begun


LAST_WORDS = 60.0
"""Seconds past its own time in which a request settles and its answer is kept."""


async def whole(
    request: Request, gateway: Gateway, exchange: Exchange, shape: Callable[[JSON, Exchange], JSON] | None = None
) -> Response:
    try:
        async with Listener(request.receive if exchange.ticket is None else never):
            completed = await gateway.complete(exchange)
            response = JSONBytes(shape(completed, exchange) if shape else completed, headers=answer_headers(exchange))
            if exchange.ticket:
                exchange.ticket.head(200, dict(response.headers))
                exchange.ticket.add(bytes(response.body))
            return response
        exchange.interrupt()
        return Response(status_code=499)  # the caller hung up: nobody is there to read it
    except asyncio.CancelledError as stopped:
        exchange.interrupt()
        raise stopping() from stopped
    except GatewayError as error:
        exchange.error = error
        error.headers = {**answer_headers(exchange), **error.headers}
        raise
