"""What a route may ask for: who calls, and the objects that answer, each built once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

from fastapi import Depends, Request

from shared import metrics, tokens
from shared.catalog import Catalog
from shared.config import in_file
from shared.errors import BodyTooLarge, InvalidKey, UnsupportedContentType
from shared.gateway import Gateway
from shared.idempotency import Idempotency
from shared.keys import Credential, Keys
from shared.limits import Limits
from shared.prices import PriceTable
from shared.safety import Safety
from shared.settings import Settings
from shared.store import open_store
from shared.store.base import Store, VirtualKey
from shared.telemetry import Telemetry
from shared.upstream import Upstream

LAST_WORDS = 10.0
"""Seconds that open requests have to settle when the process ends."""


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    store: Store
    keys: Keys
    catalog: Catalog
    upstream: Upstream
    limits: Limits
    gateway: Gateway
    idempotency: Idempotency
    telemetry: Telemetry
    started: float = field(default_factory=time.time)

    async def close(self) -> None:
        """End well: open requests settle first, then connections close. What cannot settle now, the sweep will."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self.gateway.drained()
        await self.upstream.close()
        await self.store.close()


Offer: TypeAlias = Callable[[], Awaitable[Services]]
"""The services for one request, asked once; raises GatewayError while there are none."""


def build(
    settings: Settings, store: Store | None = None, *, demo: bool = False, upstream: Upstream | None = None
) -> Services:
    """Raises ValueError where the settings do not suffice; connects to nothing yet.

    `demo`: where no provider is on, `demo/echo` is. `upstream`: one whose connections shall be used on."""
    if settings.lr_key_pepper is None:
        raise ValueError("LR_KEY_PEPPER is not set: it keys the hashes of virtual keys (`make run` makes one).")
    catalog = Catalog.load(settings, PriceTable.vendored())
    if demo and not catalog.on():
        catalog = Catalog.load(settings, PriceTable.vendored(), also=("demo",))
    with in_file(Path(settings.gateway_config)):
        safety, measured = Safety(catalog.file.safety), metrics.chosen(catalog.file.metrics, settings)
        tokens.use(catalog.file.estimators)
    store = store or open_store(settings.database_url, settings.table_name)
    limits, upstream = Limits(store, settings.generation_ttl_days), upstream or Upstream(settings)
    secrets = [settings.lr_key_pepper, settings.lr_admin_key or "", *settings.provider_variables.values()]
    return Services(
        settings=settings,
        store=store,
        keys=Keys(store, settings.lr_key_pepper, settings.lr_admin_key),
        catalog=catalog,
        upstream=upstream,
        limits=limits,
        gateway=Gateway(catalog, limits, upstream, store, settings.total_timeout, safety.examine),
        idempotency=Idempotency(store),
        telemetry=Telemetry(settings, secrets, measured, catalog.knows),
    )


async def services(request: Request) -> Services:
    """Dependencies are `async` even where they await nothing: FastAPI sends the others through a thread."""
    return request.state.services


async def credential(request: Request) -> Credential:
    """Who the caller says to be, without asking the store. An over-long body is refused first, by its header."""
    offered = await services(request)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > offered.settings.max_body_bytes:
        raise too_large(offered.settings)
    given = request.headers.getlist("authorization")
    if len(given) > 1:
        raise InvalidKey("More than one Authorization header.")
    return offered.keys.credential(given[0] if given else None)


async def identified(request: Request) -> VirtualKey:
    return await (await services(request)).keys.identify(await credential(request))


async def administrator(request: Request) -> VirtualKey:
    return await (await services(request)).keys.administrator(await credential(request))


Offered = Annotated[Services, Depends(services)]
Caller = Annotated[Credential, Depends(credential)]
Identified = Annotated[VirtualKey, Depends(identified)]
Administrator = Annotated[VirtualKey, Depends(administrator)]


async def body(request: Request, settings: Settings) -> bytes:
    """The request's bytes, at most `max_body_bytes`; raises BodyTooLarge or UnsupportedContentType."""
    read = bytearray()
    async for piece in request.stream():
        read += piece
        if len(read) > settings.max_body_bytes:
            raise too_large(settings)
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise UnsupportedContentType("Send the body as JSON, with 'Content-Type: application/json'.")
    return bytes(read)


def too_large(settings: Settings) -> BodyTooLarge:
    return BodyTooLarge(f"The body of your request is larger than {settings.max_body_bytes} bytes.")
