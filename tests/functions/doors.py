"""The app in this process, before the loopback provider: asked over ASGI, without a socket of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from functions.app import create_app
from functions.deps import Services
from shared.settings import Settings
from shared.store.base import Admitted, Ask, Generation, Hold, Store, VirtualKey
from tests.server import ADMIN_KEY, PEPPER, PROVIDER_KEY

MODEL = "openai/gpt-4o-mini"
DAY = 86400


@dataclass
class Door:
    """The app, and a client that speaks to it; `ask` is by LR_ADMIN_KEY unless told otherwise, None by nobody."""

    app: FastAPI
    client: httpx.AsyncClient

    @property
    def services(self) -> Services:
        return self.app.state.services

    @property
    def store(self) -> Store:
        return self.services.store

    async def ask(
        self, method: str, path: str, body: Any = None, key: str | None = ADMIN_KEY, **headers: str
    ) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            named["authorization"] = f"Bearer {key}"
        return await self.client.request(method, path, json=body, headers=named)

    async def chat(self, key: str | None = ADMIN_KEY, model: str = MODEL, **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
        return await self.ask("POST", "/v1/chat/completions", body, key)

    async def make(self, **fields: Any) -> dict[str, Any]:
        answer = await self.ask("POST", "/admin/keys", {"name": "test", **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def key(self, key_id: str) -> VirtualKey:
        key = await self.store.key(key_id)
        assert key is not None
        return key

    async def open_request(self, key_id: str, money: int, tokens: int, now: int, request_id: str = "open-0001") -> Hold:
        """A request that is admitted, and not settled yet."""
        hold = Hold(money, tokens, now, 600)
        key = await self.key(key_id)
        assert isinstance(await self.store.admit(Ask(key_id, key.hash, request_id, hold)), Admitted)
        return hold

    async def settled(self, key_id: str, row: Generation) -> None:
        """A request of the past: admitted, recorded and charged."""
        hold = await self.open_request(key_id, row.cost, row.doc["tokens"]["total_tokens"], row.created, row.id[4:])
        await self.store.record(row, row.created + 400 * DAY)
        tokens = row.doc["tokens"]["total_tokens"]
        await self.store.settle(key_id, row.id[4:], hold, row.cost, tokens, row.created)


@asynccontextmanager
async def opened(folder: Path, provider: str, store: Store | None = None, **environ: str) -> AsyncIterator[Door]:
    """The app as it lives: started, asked, ended. `provider` is OpenAI's base URL."""
    variables = {
        "DATABASE_URL": f"sqlite:///{folder / 'lightrail.db'}",
        "LR_ADMIN_KEY": ADMIN_KEY,
        "LR_KEY_PEPPER": PEPPER,
        "OPENAI_API_KEY": PROVIDER_KEY,
        "OPENAI_BASE_URL": provider,
        "GATEWAY_CONFIG": str(folder / "gateway.toml"),
        **environ,
    }
    app = create_app(Settings.read(variables), store)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gw", trust_env=False) as client,
    ):
        yield Door(app, client)


async def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until it is; raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 what is waited for happens elsewhere
            await asyncio.sleep(0.01)


def refusal(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    """A refusal in short: status, code and param."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]
