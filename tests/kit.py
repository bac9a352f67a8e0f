"""The gateway in this process, before a provider that is a function: for what needs no sockets."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from functions.deps import Services, build
from shared.catalog import Catalog
from shared.errors import GatewayError
from shared.exchange import Exchange
from shared.keys import Keys, id_of, time_ordered
from shared.schema import JSON, Surface, parse
from shared.settings import Settings
from shared.store.base import Generation, Store, VirtualKey
from shared.upstream import Upstream

PEPPER = "pepper-of-the-tests-Qk94Zs"


class Body(httpx.AsyncByteStream):
    """A response body that comes in these pieces, and then ends, or breaks with `error`."""

    def __init__(self, *pieces: bytes, error: Exception | None = None) -> None:
        self.pieces = pieces
        self.error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
        if self.error:
            raise self.error


def streamed(*pieces: bytes, error: Exception | None = None, status: int = 200) -> httpx.Response:
    return httpx.Response(status, headers={"content-type": "text/event-stream"}, stream=Body(*pieces, error=error))


def whole(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return httpx.Response(status, headers={"content-type": "application/json", **headers}, stream=Body(data))


@dataclass
class Outcome:
    """What the caller got, chunk by chunk, and what the record and the key say afterwards."""

    chunks: list[JSON]
    row: Generation
    key: VirtualKey
    spent: int
    error: GatewayError | None = None

    @property
    def text(self) -> str:
        deltas = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in deltas)


class Kit:
    """`reply(request)` is the provider. Time stands where `now` says, if it says."""

    def __init__(
        self, store: Store, reply: Callable[[httpx.Request], Any], environ: dict[str, str], config: str = "none"
    ) -> None:
        self.requests: list[httpx.Request] = []
        self.reply = reply
        settings = Settings.read({"LR_KEY_PEPPER": PEPPER, "GATEWAY_CONFIG": config, **environ})
        self.upstream = Upstream(settings, httpx.MockTransport(self._handle))
        self.services: Services = build(settings, store, upstream=self.upstream)
        self.gateway = self.services.gateway

    @property
    def keys(self) -> Keys:
        return self.services.keys

    @property
    def catalog(self) -> Catalog:
        return self.services.catalog

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.reply(request)

    async def admit(self, key: str, body: JSON, surface: Surface = "chat") -> Exchange:
        plan = self.gateway.plan(parse(surface, orjson.dumps(body)), key_id=id_of(key))
        return await self.gateway.admit(plan, self.keys.credential(f"Bearer {key}"), time_ordered(time.time()))

    async def ask(self, key: str, body: JSON, surface: Surface = "chat") -> Outcome:
        """One request from admission to settlement, whole or streamed as the body says."""
        exchange, chunks, error = await self.admit(key, body, surface), list[JSON](), None
        try:
            if exchange.call.stream:
                async for batch in self.gateway.stream(exchange):
                    chunks += orjson.loads(orjson.dumps(batch))
            else:
                chunks = [await self.gateway.complete(exchange)]
        except GatewayError as raised:
            exchange.error = error = raised
        await self.gateway.close(exchange)
        store = self.services.store
        row, owner = await store.generation(exchange.id), await store.key(exchange.key.id)
        assert row is not None
        assert owner is not None
        return Outcome(chunks, row, owner, owner.spent - exchange.key.spent, error)
