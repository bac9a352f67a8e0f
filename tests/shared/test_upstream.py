"""What only real sockets show of the way to a provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shared.errors import GatewayError
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from shared.upstream import Upstream as OurSide
from tests import upstream as fake
from tests.faults import Authority
from tests.kit import Kit, whole
from tests.upstream import Upstream


@pytest.fixture
async def provider() -> AsyncIterator[Upstream]:
    async with Upstream() as provider:
        yield provider


@pytest.fixture
async def kit(tmp_path: Path, provider: Upstream) -> AsyncIterator[Kit]:
    store = SQLiteStore(str(tmp_path / "test.db"))
    environ = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": provider.url, "GAP_TIMEOUT": "1"}
    kit = Kit(store, lambda _: whole({}), environ)
    kit.gateway._upstream = OurSide(kit.services.settings)
    yield kit
    await kit.gateway._upstream.close()
    await store.close()


@pytest.fixture
async def key(kit: Kit) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test")))[1]


def ask(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": text}], **more}


def said(text: str) -> bytes:
    body = {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}
    data = fake.dumped(body)
    return fake.head(200, {"content-length": len(data)}) + data


async def test_what_comes_after_an_answer_never_reaches_the_next_caller(kit: Kit, provider: Upstream, key: str) -> None:
    provider.next(fake.send(said("mine") + said("smuggled")))
    first = await kit.ask(key, ask())
    second = await kit.ask(key, ask("honest"))
    assert first.chunks[0]["choices"][0]["message"]["content"] == "mine"
    assert second.chunks[0]["choices"][0]["message"]["content"] == "honest"
    assert [seen.connection for seen in provider.seen] == [1, 2]


async def test_what_comes_after_a_stream_never_reaches_the_next_caller(kit: Kit, provider: Upstream, key: str) -> None:
    event = fake.event({"choices": [{"index": 0, "delta": {"content": "mine"}, "finish_reason": "stop"}]})
    opened = fake.head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
    provider.next(fake.send(opened + fake.framed(event + fake.DONE) + fake.END + said("smuggled")))
    first = await kit.ask(key, ask(stream=True))
    second = await kit.ask(key, ask("honest"))
    assert (first.text, second.chunks[0]["choices"][0]["message"]["content"]) == ("mine", "honest")
    assert [seen.connection for seen in provider.seen] == [1, 2]


async def test_connections_are_used_again(kit: Kit, provider: Upstream, key: str) -> None:
    for stream in (False, True, True, False):
        assert (await kit.ask(key, ask(stream=stream))).error is None
    assert {seen.connection for seen in provider.seen} == {1}


async def test_a_provider_that_does_not_hang_up_after_its_last_word_holds_nobody_up(
    kit: Kit, provider: Upstream, key: str
) -> None:
    event = fake.event({"choices": [{"index": 0, "delta": {"content": "all"}, "finish_reason": "stop"}]})
    provider.next(fake.stream(event + fake.DONE, end=False), fake.sleep(5))
    async with asyncio.timeout(2):
        outcome = await kit.ask(key, ask(stream=True))
    assert (outcome.text, outcome.row.doc["status"]) == ("all", "ok")
    assert (await kit.ask(key, ask())).error is None
    assert provider.seen[-1].connection == 2


@pytest.mark.parametrize(
    ("script", "status", "fault"),
    [
        ([fake.close()], 502, "closed_before_headers"),
        ([fake.rst()], 502, "closed_before_headers"),
        ([fake.send(b"HTTP/1.1 200 O"), fake.close()], 502, "protocol"),
        ([fake.send(b"SSH-2.0-server\r\n\r\n"), fake.close()], 502, "protocol"),
        ([fake.send(fake.head(200, {"content-length": 500}) + b'{"choi'), fake.close()], 502, "disconnected"),
    ],
)
async def test_broken_connections_are_told_apart(
    kit: Kit, provider: Upstream, key: str, script: list[Any], status: int, fault: str
) -> None:
    provider.next(*script)
    outcome = await kit.ask(key, ask())
    assert isinstance(outcome.error, GatewayError)
    assert (outcome.error.status, outcome.row.doc["attempts"][0]["error"]) == (status, fault)
    assert outcome.row.cost == 0


async def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    store = SQLiteStore(str(tmp_path / "test.db"))
    environ = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    kit = Kit(store, lambda _: whole({}), environ)
    kit.gateway._upstream = OurSide(kit.services.settings)
    key = (await kit.keys.create(VirtualKey("", "", "test")))[1]
    outcome = await kit.ask(key, ask())
    assert isinstance(outcome.error, GatewayError)
    assert (outcome.error.status, outcome.error.code) == (502, "upstream_unavailable")
    await kit.gateway._upstream.close()
    await store.close()


class Proxy:
    """Sends requests on, and opens tunnels; `seen` are the request lines."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __aenter__(self) -> Proxy:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target = head.decode().split(" ")[:2]
        self.seen.append(f"{method} {target}")
        host = target.removeprefix("http://").partition("/")[0]
        there, beyond = await asyncio.open_connection(*host.split(":"))
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            beyond.write(head.replace(b"http://" + host.encode(), b""))
        await asyncio.gather(pipe(reader, beyond, f"http://{host}".encode()), pipe(there, writer))


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, without: bytes | None = None) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data.replace(without, b"") if without else data)
            await writer.drain()
    writer.close()


@pytest.mark.parametrize("safe", [False, True], ids=["http", "https"])
async def test_providers_are_reached_through_a_proxy(tmp_path: Path, safe: bool) -> None:
    authority = Authority(tmp_path) if safe else None
    async with Upstream(tls=authority.server() if authority else None) as provider, Proxy() as proxy:
        store = SQLiteStore(str(tmp_path / "test.db"))
        environ = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": provider.url, "PROXY_URL": proxy.url}
        kit = Kit(store, lambda _: whole({}), environ)
        ours = kit.gateway._upstream = OurSide(kit.services.settings)
        if authority:
            ours._context = authority.trusting()
        key = (await kit.keys.create(VirtualKey("", "", "test")))[1]
        for stream in (False, True):
            assert (await kit.ask(key, ask(stream=stream))).error is None
        target = f"CONNECT {provider.host}" if safe else f"POST http://{provider.host}/v1/chat/completions"
        assert proxy.seen == [target]
        assert {seen.connection for seen in provider.seen} == {1}
        await ours.close()
        await store.close()
