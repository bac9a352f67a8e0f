"""`POST /generate` and `POST /rr-chat/stream`: a prompt in, text out; a chat that goes round the providers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from functions.answering import Asked
from functions.deps import Caller, Offered, body
from functions.openapi import takes
from functions.typed import TypedEvents, rate_limited, refused
from shared.catalog import Catalog, Route
from shared.errors import ContentPolicyViolation, InvalidRequest, NoProvider, RateLimited
from shared.exchange import Exchange
from shared.history import Context
from shared.planning import Plan
from shared.schema import JSON, Caching, Call, Id, Shape, checked
from shared.state import Switches

router = APIRouter(tags=["models"])
Words = Annotated[str, Field(min_length=1, max_length=1_000_000)]


class GenerateRequest(Shape):
    """`POST /generate`. `provider`: its name or title, in any case; none other answers then."""

    prompt: Words
    provider: Annotated[str, Field(max_length=64)] | None = None
    cache: Caching | None = None


class TurnRequest(Shape):
    """`POST /rr-chat/stream`."""

    user_id: Id
    session_id: Id
    message: Words


@router.post("/generate", response_model=None, openapi_extra=takes(GenerateRequest))
async def generate(request: Request, caller: Caller, services: Offered) -> Response:
    """Text for a prompt, from the first provider that has an answer; the same prompt again comes from the cache."""
    asked = Asked(request, caller, services, await body(request, services.settings))

    def plan(raw: bytes) -> Plan:
        given = checked(GenerateRequest, raw)
        route = chosen(services.catalog, given.get("provider"), services.gateway.state.switches)
        messages = [{"role": "user", "content": given["prompt"]}]
        cache: JSON = given.get("cache") or {"mode": "on"}
        call = Call("chat", {"model": route.asked, "messages": messages, "cache": cache})
        return services.gateway.plan(call, route, key_id=caller.key_id)

    def shape(completion: JSON, exchange: Exchange) -> JSON:
        provider, _ = exchange.answered_by
        message: JSON = completion["choices"][0]["message"]
        return {
            "provider": services.catalog.providers[provider].title,
            "output": message["content"] or message["refusal"] or "",
            "cached": exchange.kept is not None,
        }

    return await asked.answered(await asked.checked(plan), shape=shape)


@router.post("/rr-chat/stream", response_model=None, openapi_extra=takes(TurnRequest))
async def take_turn(request: Request, caller: Caller, services: Offered) -> Response:
    """Answer a message of a session as typed events, each time by the next provider in turn."""
    asked = Asked(request, caller, services, await body(request, services.settings))

    def plan(raw: bytes) -> Plan:
        given = checked(TurnRequest, raw)
        call: JSON = {
            "model": "rr-chat/stream",  # whose turns are its own
            "messages": [{"role": "user", "content": given["message"]}],
            "stream": True,
            "user": given["user_id"],
            "session_id": given["session_id"],
            "store": True,
        }
        return services.gateway.plan(Call("chat", call), services.catalog.taking_turns())

    planned = await asked.checked(plan)
    said = planned.call.body
    context = Context(services.store, caller.key_id, said["user"], said["session_id"])
    try:
        return await asked.answered(planned, context=context, events=TypedEvents())
    except (RateLimited, ContentPolicyViolation) as error:  # 200, as the seed has it
        request.state.told["error"] = error.code
        events = rate_limited(error) if isinstance(error, RateLimited) else refused(error)
        return Response(events, headers=error.headers, media_type="text/event-stream")


def chosen(catalog: Catalog, provider: str | None, switches: Switches) -> Route:
    """The default models of the providers that are on, by priority, or of the one that is named.

    Raises InvalidRequest for one that is not there, NoProvider where none is."""
    defaults = catalog.defaults()
    if not defaults:
        raise NoProvider("No provider with a chat model is on: set a provider's API key, for example OPENAI_API_KEY.")
    if provider is None:
        return Route("auto", defaults)
    for to in defaults:
        if provider.lower() in (to.provider.name, to.provider.title.lower()):
            return Route(to.id, (to,))
    available = ", ".join(to.provider.title for to in defaults if switches.applied(to).enabled)
    message = f"Provider '{provider}' not found. Available: {available}"
    raise InvalidRequest(message, param="provider", code="unknown_provider")
