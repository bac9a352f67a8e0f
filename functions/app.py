"""The ASGI app: routers, one envelope around every answer, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from functions.deps import Offer, Services, build
from functions.openapi import schema
from functions.responses import JSONBytes
from functions.routes import (
    MODEL_PATHS,
    admin,
    answers,
    capabilities,
    chats,
    generation,
    health,
    history,
    key,
    keys,
    metrics,
    models,
    routing,
    switches,
)
from shared import generations
from shared.errors import GatewayError, InvalidRequest, MethodNotAllowed, NotFound
from shared.exchange import Exchange
from shared.keys import time_ordered
from shared.settings import Settings
from shared.store.base import Store
from shared.telemetry import logger

VERSION = "0.1.0"
METHODS = ("GET", "HEAD", "POST", "PATCH", "DELETE")
EXPOSED = [
    "x-request-id",
    "retry-after",
    "server-timing",
    *(f"x-lightrail-{name}" for name in ("provider", "model", "attempts", "cache", "dropped")),
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]


def create_app(settings: Settings, store: Store | None = None, *, demo: bool = False) -> FastAPI:
    """One gateway. Raises ValueError where the settings do not suffice. `demo`: see `build`."""
    services = build(settings, store, demo=demo)

    async def offer() -> Services:
        return services

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await services.keys.ensure_admin()
        yield
        await services.close()

    app = assemble(settings, offer, lifespan)
    app.state.services = services
    return app


def assemble(
    settings: Settings,
    offer: Offer,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    *,
    asks_models: bool = True,
) -> FastAPI:
    """The app around services that need not be there yet: each request asks `offer` for them."""
    app = FastAPI(
        title="Lightrail",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Envelope, offer=offer)
    if settings.allowed_origins:  # the last one added is the outermost: a page may read whatever is answered
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_exception_handler(GatewayError, refuse)
    app.add_exception_handler(HTTPException, unrouted)
    app.include_router(health.router)
    for module in (*((answers,) if asks_models else ()), models, capabilities, routing, generation, key):
        app.include_router(module.router, prefix="/v1")
        app.include_router(module.router, include_in_schema=False)
    if asks_models:
        app.include_router(chats.router)
    for module in (history, keys, admin, switches, metrics):
        app.include_router(module.router)
    app.openapi = lambda: schema(app)  # made when first asked for, not at a cold start
    return app


async def refuse(_: Request, error: Exception) -> JSONBytes:
    assert isinstance(error, GatewayError)
    return JSONBytes(error.body(), status_code=error.status, headers=error.headers)


async def unrouted(request: Request, error: Exception) -> JSONBytes:
    """What the framework itself refuses: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    where = f"({request.method} {request.url.path[:200]})"
    refusal = {
        404: NotFound(f"Invalid URL {where}.", code="unknown_url"),
        405: MethodNotAllowed(f"Method not allowed {where}."),
    }.get(error.status_code, InvalidRequest(f"Bad request {where}."))
    if error.status_code == 405:
        refusal.headers["allow"] = ", ".join(method for method in METHODS if answers_to(request, method))
    return await refuse(request, refusal)


def answers_to(request: Request, method: str) -> bool:
    """Whether any route takes this method at the request's path; the framework would name the first route's only."""
    scope = {**request.scope, "method": "GET" if method == "HEAD" else method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


async def unstoppable(work: Coroutine[Any, Any, None]) -> None:
    """Do the work to its end even where the current task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


class Envelope:
    """Around every answer: its id and time, `no-store`, settling, one log line; an error of ours where code failed."""

    def __init__(self, app: ASGIApp, offer: Offer) -> None:
        self._app = app
        self._offer = offer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path = time.perf_counter(), scope["path"]
        prefix = "gen" if scope["method"] == "POST" and path.removeprefix("/v1") in MODEL_PATHS else "req"
        told: dict[str, Any] = {
            "id": f"{prefix}-{time_ordered(time.time())}",
            "method": scope["method"],
            "path": quote(path[:200], safe="/:@+"),  # a line end in it would forge a line of the log
            "status": 0,
            "ms": 0.0,
        }
        state = scope.setdefault("state", {})
        state["told"] = told
        if scope["method"] == "HEAD":  # what GET would be told, without the body
            scope = {**scope, "method": "GET"}

        async def enveloped(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                message["headers"] = [*message["headers"], *self._headers(message, told, began)]
            elif told["method"] == "HEAD":
                message["body"] = b""
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                told["ms"] = round((time.perf_counter() - began) * 1000, 2)

        try:
            services = state["services"] = await self._offer()
        except GatewayError as error:
            logger.error("not_ready", extra={"id": told["id"], "reason": error.message})
            await JSONBytes(error.body(), status_code=error.status, headers=error.headers)(scope, receive, enveloped)
            return
        try:
            await self._app(scope, receive, enveloped)
        except ClientDisconnect:
            told["status"] = 499  # the caller hung up while sending: nobody is there to be told
        except Exception:
            logger.exception("unexpected", extra={"id": told["id"]})
            error = GatewayError("The gateway failed to handle this request; its operator finds it by the request id.")
            if exchange := told.get("exchange"):
                exchange.error = error
            if told["status"]:
                raise
            await JSONBytes(error.body(), status_code=error.status)(scope, receive, enveloped)
        finally:
            told["route"] = getattr(scope.get("route"), "path", "other")  # as it is declared, not as it was called
            await unstoppable(self._finish(services, told, began))

    async def _finish(self, services: Services, told: dict[str, Any], began: float) -> None:
        """After the caller's last byte: record and settle a model call, then tell the log."""
        told["ms"] = told["ms"] or round((time.perf_counter() - began) * 1000, 2)
        doc = None
        if exchange := told.pop("exchange", None):
            doc = await services.gateway.close(exchange)
            told |= generations.summary(doc)
        services.telemetry.request(told, doc, len(services.gateway.open))

    def _headers(self, message: Message, told: dict[str, Any], began: float) -> list[tuple[bytes, bytes]]:
        total = (time.perf_counter() - began) * 1000
        exchange: Exchange | None = told.get("exchange")
        upstream = exchange.upstream_seconds * 1000 if exchange else 0.0
        timing = f"gateway;dur={max(0.0, total - upstream):.2f}" + (
            f", upstream;dur={upstream:.2f}" if exchange else ""
        )
        headers = [(b"server-timing", timing.encode()), (b"cache-control", b"no-store")]
        if not any(name == b"x-request-id" for name, _ in message["headers"]):
            headers.append((b"x-request-id", told["id"].encode()))
        return headers
