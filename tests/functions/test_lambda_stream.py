"""The runtime loop before a strict Runtime API: as its own process behind an API Gateway, and here with other apps."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from functions import runtime
from functions.api import Handler as APIHandler
from functions.secrets import Current
from functions.stream import MARGIN, Handler
from shared.connections import IDLE_SECONDS
from shared.keys import Keys
from shared.store.base import Generation, VirtualKey
from shared.store.sqlite import SQLiteStore
from tests import upstream as fake
from tests.apigateway import APIGateway, headers_of, rest_event, url_event
from tests.runtime_api import Event, RuntimeAPI, process
from tests.server import PEPPER, PROVIDER_KEY, ROOT
from tests.upstream import Upstream, echo

MODEL = "openai/gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "hello"}]
JSON_TYPE = ("Content-Type", "application/json")
SECONDS = 15


# The real process -----------------------------------------------------------------------------------------------------


def settings_for(folder: Path, provider: str) -> dict[str, str]:
    return {
        "DATABASE_URL": f"sqlite:///{folder}/lightrail.db",
        "LR_KEY_PEPPER": PEPPER,
        "OPENAI_API_KEY": PROVIDER_KEY,
        "OPENAI_BASE_URL": provider,
        "MAX_BODY_BYTES": "4194304",
    }


@dataclass
class Cloud:
    """All of it: clients talk to `gateway`, which talks to the process through `api`, and to the provider it does."""

    api: RuntimeAPI
    gateway: APIGateway
    store: SQLiteStore
    log: Path
    user: VirtualKey
    key: str
    process: int

    def chat(self, seconds: float = 900, **more: Any) -> Event:
        return self.api.invoke(chat_event(self.key, **more), seconds)

    async def row(self, event: Event) -> Generation:
        headers = dict(headers_of(event.prelude))
        row = await self.store.generation(headers["x-request-id"])
        assert row is not None
        return row

    async def spent(self) -> int:
        """Settles first: nothing may be left open."""
        key = await self.store.key(self.user.id)
        assert key is not None
        assert not key.open
        return key.spent

    async def idle(self) -> None:
        """The process has done all its work: it asks for the next event."""
        await until(lambda: self.api.waiting > 0)


@pytest.fixture(scope="module")
async def only_cloud(provider_for_all: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cloud]:
    folder = tmp_path_factory.mktemp("lambda")
    environ = settings_for(folder, provider_for_all.url)
    store = SQLiteStore(f"{folder}/lightrail.db")
    user, key = await Keys(store, PEPPER).create(VirtualKey("", "", "ada"))
    async with RuntimeAPI() as api, APIGateway(api, APIHandler(environ)) as gateway:
        with process(api, environ, folder / "log") as started:
            yield Cloud(api, gateway, store, folder / "log", user, key, started.pid)
    await store.close()


@pytest.fixture
async def cloud(only_cloud: Cloud, provider: Upstream) -> AsyncIterator[Cloud]:
    await only_cloud.idle()
    yield only_cloud
    await only_cloud.idle()
    violations, only_cloud.api.violations = only_cloud.api.violations, []
    assert not violations
    assert not provider.malformed


@pytest.fixture
async def client(cloud: Cloud) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=cloud.key, base_url=f"{cloud.gateway.url}/v1", max_retries=0) as client:
        yield client


async def until(true: Callable[[], bool], seconds: float = SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 what is waited for happens in another process
            await asyncio.sleep(0.01)


async def over(*events: Event) -> None:
    async with asyncio.timeout(SECONDS):
        for event in events:
            await event.over.wait()


def chat_event(key: str, kind: Callable[..., Any] = rest_event, **more: Any) -> dict[str, Any]:
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True, **more}).encode()
    headers = [("Authorization", f"Bearer {key}"), JSON_TYPE, ("Host", "gw")]
    return kind("POST", "/v1/chat/completions", headers, body)


def events_of(event: Event) -> list[Any]:
    """The server-sent events of an answer: JSON, or the word at the end."""
    lines = [line for line in event.body.decode().split("\n\n") if line.startswith("data: ")]
    return [line[6:] if line.endswith("[DONE]") else json.loads(line[6:]) for line in lines]


async def test_each_piece_arrives_before_the_provider_sends_the_next(
    client: AsyncOpenAI, cloud: Cloud, provider: Upstream
):
    arrived = asyncio.Event()

    async def after_arrival(_: Any) -> None:
        async with asyncio.timeout(SECONDS):
            await arrived.wait()
        arrived.clear()

    opened = fake.head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
    steps = [step for letter in "hello" for step in (fake.chunk(fake.event(piece(letter))), after_arrival)]
    provider.next(fake.send(opened), *steps, fake.chunk(fake.event(piece("", "stop")), fake.DONE), fake.send(fake.END))
    text = ""
    async for chunk in await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True):
        text += chunk.choices[0].delta.content or ""
        arrived.set()
    assert text == "hello"
    event = list(cloud.api.events.values())[-1]
    assert len({at for at, _ in event.chunks}) == len(event.chunks) >= 6
    assert not event.trailers


async def test_an_answer_is_recorded_and_charged_before_the_next_event_is_asked_for(
    client: AsyncOpenAI, cloud: Cloud, provider: Upstream
):
    before = await cloud.spent()
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    await cloud.idle()
    row = await cloud.store.generation(chunks[0].id)
    assert row
    assert row.doc["status"] == "ok"
    assert await cloud.spent() - before == row.cost > 0
    assert f'"id":"{chunks[0].id}"' in cloud.log.read_text()
    metrics = [json.loads(line) for line in cloud.log.read_text().splitlines() if '"CloudWatchMetrics"' in line]
    assert metrics[-1]["id"] == chunks[0].id


async def test_whole_answers_pass_the_same_way(client: AsyncOpenAI, cloud: Cloud):
    said = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert said.choices[0].message.content == "hello"
    vectors = await client.embeddings.create(model="openai/text-embedding-3-small", input="hello")
    assert len(vectors.data[0].embedding) == 3


async def test_the_other_routes_are_answered_by_the_other_function(client: AsyncOpenAI, cloud: Cloud):
    said = await client.chat.completions.create(model=MODEL, messages=HELLO)
    await cloud.idle()
    assert MODEL in [model.id async for model in client.models.list()]
    row = await client.get("/generation", cast_to=httpx.Response, options={"params": {"id": said.id}})
    assert row.json()["model_requested"] == MODEL


async def test_refusals_keep_their_status(cloud: Cloud):
    async with AsyncOpenAI(api_key="lr-wrong", base_url=f"{cloud.gateway.url}/v1", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    event = cloud.api.invoke(rest_event("GET", "/chat/completions", [("Host", "gw")]))
    await over(event)
    assert event.prelude["statusCode"] == 405
    assert event.prelude["headers"]["allow"] == "POST"
    assert json.loads(event.body)["error"]["code"] == "method_not_allowed"
    async with httpx.AsyncClient(base_url=cloud.gateway.url, trust_env=False) as client:
        for path, status in (("/v1/chat/completions", 405), ("/health", 200)):
            answered = await client.head(path)
            assert (answered.status_code, answered.content) == (status, b"")


async def test_a_function_urls_event_is_answered_alike(cloud: Cloud):
    event = cloud.api.invoke(chat_event(cloud.key, url_event))
    await over(event)
    assert event.prelude["headers"]["content-type"].startswith("text/event-stream")
    assert events_of(event)[-1] == "[DONE]"


async def test_two_events_share_a_connection_to_the_provider(cloud: Cloud, provider: Upstream):
    for _ in range(2):
        await over(cloud.chat())
        await cloud.idle()
    first, second = provider.seen
    assert first.connection == second.connection


async def test_after_a_freeze_a_connection_that_may_have_died_is_not_used(cloud: Cloud, provider: Upstream):
    await over(cloud.chat())
    await cloud.idle()
    os.kill(cloud.process, signal.SIGSTOP)  # which is how an environment rests between two events
    try:
        await asyncio.sleep(IDLE_SECONDS + 0.5)
    finally:
        os.kill(cloud.process, signal.SIGCONT)
    await over(cloud.chat())
    first, second = provider.seen
    assert first.connection != second.connection


async def test_a_stream_ends_cleanly_before_the_platform_cuts_it(cloud: Cloud, provider: Upstream):
    provider.always("gpt-4o-mini", echo(pace=0.2))
    before, began = await cloud.spent(), time.monotonic()
    event = cloud.chat(seconds=MARGIN + 1, messages=[{"role": "user", "content": "on and on" * 20}])
    await over(event)
    assert time.monotonic() - began < 2.5
    said = events_of(event)
    assert len([each for each in said if "error" in each]) == 1
    assert "[DONE]" not in said
    assert said[-1]["error"]["code"] == "upstream_timeout"
    assert len(said) > 2
    assert not event.trailers
    await cloud.idle()
    row = await cloud.row(event)
    assert row.doc["status"] == "failed"
    assert row.doc["error"]["code"] == "upstream_timeout"
    assert await cloud.spent() - before == row.cost > 0


async def test_what_the_platform_ends_is_settled_by_then_though_the_store_has_a_bad_moment(
    cloud: Cloud, provider: Upstream
):
    provider.always("gpt-4o-mini", echo(pace=0.2))
    event = cloud.chat(seconds=MARGIN + 1, messages=[{"role": "user", "content": "on and on" * 20}])
    await until(lambda: len(event.chunks) > 1)
    file = cloud.log.with_name("lightrail.db")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # nobody else can write
        await over(event)
        await asyncio.sleep(1.0)
    await cloud.idle()
    assert time.monotonic() - event.taken_at < event.deadline, "Lambda would have killed it"
    assert (await cloud.row(event)).doc["error"]["code"] == "upstream_timeout"
    assert await cloud.spent() > 0


async def test_a_whole_answer_is_a_504_before_the_platform_cuts_it(cloud: Cloud, provider: Upstream):
    provider.next(fake.sleep(5), echo())
    event = cloud.chat(seconds=MARGIN + 0.5, stream=False)
    await over(event)
    assert event.prelude["statusCode"] == 504
    assert json.loads(event.body)["error"]["code"] == "upstream_timeout"
    await cloud.idle()
    row = await cloud.row(event)
    assert (row.doc["status"], row.doc["error"]["code"], row.cost) == ("failed", "upstream_timeout", 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_where_no_time_is_left_the_provider_is_not_asked(cloud: Cloud, provider: Upstream, stream: bool):
    spent = await cloud.spent()
    event = cloud.chat(stream=stream, seconds=MARGIN - 0.1)
    await over(event)
    await cloud.idle()
    assert event.prelude["statusCode"] == 504
    assert json.loads(event.body)["error"]["code"] == "upstream_timeout"
    assert provider.seen == []
    assert (await cloud.row(event)).doc["status"] == "failed"
    assert await cloud.spent() == spent


async def test_a_caller_who_does_not_read_does_not_keep_an_answer_from_its_record(cloud: Cloud, provider: Upstream):
    flood = [piece("x" * 65536)] * 400
    provider.next(fake.stream(*flood, end=False))
    event = cloud.chat(seconds=MARGIN + 1)
    event.reading.clear()
    row, deadline = None, time.monotonic() + event.deadline - 0.5
    while row is None and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        row = next(iter(await rows(cloud)), None) if event.begun else None
        row = row if row and row.doc["status"] == "cancelled" else None
    assert row, "recorded while still nobody reads"
    assert await cloud.spent() > 0
    event.reading.set()
    await over(event)
    assert "error" in events_of(event)[-1]


async def test_when_the_platform_stops_listening_the_provider_is_hung_up_on(cloud: Cloud, provider: Upstream):
    provider.next(echo(pace=0.2))
    event = cloud.chat(messages=[{"role": "user", "content": "on and on" * 20}])
    await until(lambda: len(event.chunks) > 2)
    cloud.api.hang_up(event)
    await over(event)
    await cloud.idle()
    assert event.truncated
    assert (await cloud.row(event)).doc["status"] == "cancelled"
    await until(lambda: provider.seen[-1].closed_after is not None)


def http(body: str | None, **more: Any) -> dict[str, Any]:
    return {**rest_event("POST", "/v1/chat/completions", [JSON_TYPE, ("Host", "gw")]), "body": body, **more}


@pytest.mark.parametrize(
    ("payload", "status", "code"),
    [
        (b"{", 400, None),
        (b"\xff", 400, None),
        ({"requestContext": {}}, 400, None),
        ({"requestContext": {}, "version": "2.0"}, 400, None),
        (http("{}", headers=["Host"], multiValueHeaders=None), 400, None),
        (http("{}", multiValueHeaders={"Accept": [1]}), 400, None),
        (http("%%%%", isBase64Encoded=True), 400, None),
        (http("e30", isBase64Encoded=True), 400, None),
        (http("\ud800"), 400, None),
        (http({"not": "text"}), 400, None),  # type: ignore[arg-type]
        (http("x" * 6_000_000), 413, "body_too_large"),
        (http("{}", headers={"Host": "a:b:c"}, multiValueHeaders=None), 400, None),
    ],
    ids=[
        "cut",
        "no-text",
        "empty",
        "empty-url",
        "headers",
        "header",
        "base64",
        "padding",
        "half",
        "map",
        "6MB",
        "host",
    ],
)
async def test_a_bad_event_is_refused_and_the_next_is_answered(
    cloud: Cloud, payload: Any, status: int, code: str | None
):
    if status == 413:
        payload["multiValueHeaders"]["Authorization"] = [f"Bearer {cloud.key}"]
    bad, good = cloud.api.invoke(payload), cloud.chat()
    await over(bad, good)
    assert bad.prelude["statusCode"] == status
    error = json.loads(bad.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert events_of(good)[-1] == "[DONE]"


@pytest.mark.parametrize("payload", [{}, {"source": "aws.events", "detail-type": "Scheduled Event"}, [], None, "ping"])
async def test_an_event_that_is_no_request_does_no_harm(cloud: Cloud, payload: Any):
    event = cloud.api.invoke(payload)
    await over(event)
    assert event.prelude["statusCode"] == 200
    assert event.body == b"{}"
    assert event.error is None


async def rows(cloud: Cloud) -> list[Generation]:
    """Today's, the latest first."""
    found = await cloud.store.generations(cloud.user.id, int(time.time()) // 86400, limit=1000)
    return sorted(found, key=lambda row: row.id, reverse=True)


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


# Beginnings -----------------------------------------------------------------------------------------------------------


async def test_an_error_at_init_is_reported(tmp_path: Path):
    async with RuntimeAPI() as api:
        with process(api, {"DATABASE_URL": "mongodb://nowhere"}, tmp_path / "log") as started:
            await until(lambda: started.poll() is not None)
        assert started.returncode == 1
        assert api.init_error["errorType"] == "Runtime.ValueError"
        assert api.init_error["errorMessage"].startswith("DATABASE_URL must be")
        assert "DATABASE_URL must be" in (tmp_path / "log").read_text()
        assert (api.asked, api.violations) == (0, [])


async def test_a_package_with_something_missing_says_so_too(tmp_path: Path):
    (tmp_path / "functions").symlink_to(ROOT / "functions")
    async with RuntimeAPI() as api:
        with process(api, {}, tmp_path / "log", root=tmp_path) as started:
            await until(lambda: started.poll() is not None)
        assert api.init_error["errorType"] == "Runtime.ModuleNotFoundError"
        assert "shared" in api.init_error["errorMessage"]


async def test_a_snapshot_is_taken_between_init_and_the_first_event(provider: Upstream, tmp_path: Path):
    environ = {**settings_for(tmp_path, provider.url), "AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start"}
    async with RuntimeAPI(snapshot=True) as api:
        with process(api, environ, tmp_path / "log"):
            async with asyncio.timeout(SECONDS):
                await api.snapshot_taken()
            event = api.invoke(rest_event("GET", "/health", [("Host", "gw")]))
            await asyncio.sleep(0.1)
            assert not api.asked
            api.restore()
            await over(event)
        assert event.prelude["statusCode"] == 200
        assert not api.violations


async def test_events_are_answered_side_by_side_where_the_platform_hands_them_out_so(
    provider: Upstream, tmp_path: Path
):
    environ = {**settings_for(tmp_path, provider.url), "AWS_LAMBDA_MAX_CONCURRENCY": "3"}
    store = SQLiteStore(f"{tmp_path}/lightrail.db")
    _, key = await Keys(store, PEPPER).create(VirtualKey("", "", "ada"))
    await store.close()
    provider.always("gpt-4o-mini", echo(pace=0.1))
    async with RuntimeAPI(parallel=3) as api:
        with process(api, environ, tmp_path / "log"):
            await until(lambda: api.waiting == 3)
            three = [api.invoke(chat_event(key)) for _ in range(3)]
            await over(*three)
            await until(lambda: api.waiting == 3)
        assert not api.violations
    starts, ends = ([event.chunks[at][0] for event in three] for at in (0, -1))
    assert max(starts) < min(ends)
    assert all(events_of(event)[-1] == "[DONE]" for event in three)


# Other apps, in this process ------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(app: Any, *, parallel: int = 1, current: Current | None = None) -> AsyncIterator[RuntimeAPI]:
    """Any ASGI app in our loop; breaking a rule of the Runtime API fails the test."""
    async with RuntimeAPI(parallel) as api:
        client = runtime.RuntimeAPI(api.address)
        current = current or Current({"DATABASE_URL": "sqlite:///never-opened.db"})
        handler = Handler(client, app, current, alone=parallel == 1)
        loop = asyncio.ensure_future(runtime.serve(client, handler, parallel))
        yield api
        assert not loop.done(), loop.result()
        loop.cancel()
        await asyncio.wait([loop])
        assert not api.violations


def saying(*messages: dict[str, Any] | BaseException, headers: Any = ()) -> Any:
    """An app that sends these body messages, or raises."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if messages and not isinstance(messages[0], BaseException):
            await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
        for message in messages:
            if isinstance(message, BaseException):
                raise message
            await send({"type": "http.response.body", **message})

    return app


def get(path: str = "/", *headers: tuple[str, str]) -> dict[str, Any]:
    return rest_event("GET", path, [("Host", "gw"), *headers])


async def test_a_crash_before_the_answer_is_reported_as_an_error():
    async with running(saying(KeyError("a secret sk-8Hn3Jq7Wc2Zt5Kx9Vd4Bm6"))) as api:
        crashed, next_one = api.invoke(get()), api.invoke({})
        await over(crashed, next_one)
    assert not crashed.begun
    assert crashed.error["errorType"] == "Runtime.KeyError"
    assert "secret" not in crashed.error["errorMessage"]
    assert any("test_lambda_stream" in line for line in crashed.error["stackTrace"])
    assert next_one.body == b"{}"


async def test_a_crash_within_the_answer_is_a_trailer_and_for_a_stream_an_event_too():
    half = {"body": b"data: {}\n\n", "more_body": True}
    stream = saying(half, KeyError("why"), headers=[(b"content-type", b"text/event-stream")])
    async with running(stream) as api:
        crashed = api.invoke(get())
        await over(crashed, api.invoke({}))
    assert crashed.fault["errorType"] == "Runtime.KeyError"
    assert crashed.error is None
    assert events_of(crashed)[-1]["error"]["code"] == "internal_error"
    async with running(saying(half, KeyError("why"))) as api:
        crashed = api.invoke(get())
        await over(crashed)
    assert crashed.fault["errorType"] == "Runtime.KeyError"
    assert crashed.body == half["body"]


async def test_a_stream_that_said_its_done_is_given_no_error_after_it():
    done = {"body": b"data: [DONE]\n\n", "more_body": True}
    async with running(saying(done, KeyError("why"), headers=[(b"content-type", b"text/event-stream")])) as api:
        event = api.invoke(get())
        await over(event)
    assert event.body == done["body"]
    assert event.fault


async def test_a_crash_after_the_answer_changes_nothing_in_it():
    async with running(saying({"body": b"all of it"}, KeyError("late"))) as api:
        event, next_one = api.invoke(get()), api.invoke({})
        await over(event, next_one)
    assert event.body == b"all of it"
    assert not event.trailers
    assert next_one.body == b"{}"


async def test_an_app_that_says_nothing_or_not_all_is_a_crash():
    async with running(saying()) as api:
        event = api.invoke(get())
        await over(event)
    assert event.error["errorType"] == "Runtime.RuntimeError"
    async with running(saying({"body": b"half", "more_body": True})) as api:
        event = api.invoke(get())
        await over(event)
    assert event.fault["errorType"] == "Runtime.RuntimeError"


async def test_headers_too_large_for_the_platform_are_a_500_and_the_app_is_hung_up_on():
    hung_up = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        big = [(b"x-much", b"x" * 16_400)]
        await send({"type": "http.response.start", "status": 200, "headers": big})
        await send({"type": "http.response.body", "body": b"lost", "more_body": True})
        if (await receive())["type"] == "http.disconnect":
            hung_up.set()

    async with running(app) as api:
        event, next_one = api.invoke(get()), api.invoke({})
        await over(event, next_one)
    assert hung_up.is_set()
    assert event.prelude["statusCode"] == 500
    assert json.loads(event.body)["error"]["code"] == "internal_error"


@pytest.mark.parametrize("spare", [0, 1])
async def test_headers_may_be_as_large_as_the_platform_allows(spare: int):
    frame = len(runtime.prelude(200, [(b"x-much", b"")]))
    value = b"x" * (runtime.MAX_PRELUDE - frame + spare)
    async with running(saying({"body": b"ok"}, headers=[(b"x-much", value)])) as api:
        event = api.invoke(get())
        await over(event)
    assert event.prelude["statusCode"] == (500 if spare else 200)


async def test_cookies_repeated_headers_and_binary_bodies_go_both_ways():
    seen: list[Any] = []
    answered = [
        (b"Content-Type", b"audio/mpeg"),
        (b"set-cookie", b"a=1; Path=/"),
        (b"set-cookie", b"b=2, c"),
        (b"x-many", b"1"),
        (b"x-many", b"2"),
        (b"x-latin", "é".encode("latin-1")),
    ]
    noise = bytes(range(256)) * 9

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["headers"], scope["path"], scope["query_string"], (await receive())["body"]))
        await send({"type": "http.response.start", "status": 201, "headers": answered})
        await send({"type": "http.response.body", "body": bytes(20), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await send({"type": "http.response.body", "body": noise})

    given = [("Host", "gw"), ("X-Many", "1"), ("X-Many", "2, 3"), ("Cookie", "a=1"), ("Cookie", "b=2")]
    async with running(app) as api:
        rest = api.invoke(rest_event("PUT", "/prod/a%20b/c?q=1&q=%26&empty=", given, noise))
        url = api.invoke(url_event("PUT", "/a%20b/c?q=1&q=%26&empty=", given[:3], noise, ("a=1", "b=2")))
        await over(rest, url)
    for event in (rest, url):
        assert event.prelude == {
            "statusCode": 201,
            "headers": {"content-type": "audio/mpeg", "x-many": "1, 2", "x-latin": "é"},
            "cookies": ["a=1; Path=/", "b=2, c"],
        }
        assert event.body == bytes(20) + noise
    (rest_headers, *rest_rest), (url_headers, *url_rest) = seen
    assert rest_rest == url_rest == ["/a b/c", b"q=1&q=%26&empty=", noise]
    assert [(bytes(name), bytes(value)) for name, value in rest_headers if not name.startswith(b"x-forwarded-")] == [
        (name.lower().encode(), value.encode()) for name, value in given
    ]
    assert dict(map(tuple, url_headers))[b"x-many"] == b"1,2, 3"
    assert dict(map(tuple, url_headers))[b"cookie"] == b"a=1; b=2"


async def test_work_after_the_last_byte_is_done_before_the_next_event_is_asked_for():
    done: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await saying({"body": b"all"})(scope, receive, send)
        await asyncio.sleep(0.2)
        done.append(time.monotonic())

    async with running(app) as api:
        event, next_one = api.invoke(get()), api.invoke({})
        await over(event)
        assert not done, "the caller does not wait for it"
        assert api.asked == 1
        await over(next_one)
    assert next_one.taken_at > done[0]


async def test_each_event_has_its_own_trace():
    traces: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        traces.append(os.environ["_X_AMZN_TRACE_ID"])
        await saying({"body": b""})(scope, receive, send)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_X_AMZN_TRACE_ID", "none")
        async with running(app) as api:
            await over(api.invoke(get(), trace="Root=1"), api.invoke(get(), trace="Root=2"))
    assert traces == ["Root=1", "Root=2"]


async def test_an_app_that_outlives_its_time_is_cut_with_a_504():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async with running(app) as api:
        event = api.invoke(get(), seconds=2.2)
        await over(event)
    assert event.prelude["statusCode"] == 504
    assert json.loads(event.body)["error"]["code"] == "upstream_timeout"


async def test_a_whole_answer_has_no_longer_than_the_edge_waits_in_silence():
    ends: list[dict[bool, float]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        now = asyncio.get_running_loop().time()
        ends.append({streamed: at - now for streamed, at in scope["state"]["deadlines"].items()})
        await saying({"body": b""})(scope, receive, send)

    async with running(app) as api:
        await over(api.invoke(get(), seconds=900), api.invoke(get(), seconds=60))
    long, short = ends
    assert long == {True: pytest.approx(900 - MARGIN, abs=1), False: pytest.approx(290, abs=1)}
    assert short == {True: pytest.approx(60 - MARGIN, abs=1), False: pytest.approx(60 - MARGIN, abs=1)}


async def test_two_environments_out_of_one_snapshot_do_not_draw_the_same():
    current = Current({"DATABASE_URL": "sqlite:///never-opened.db"})
    handler = Handler(runtime.RuntimeAPI("127.0.0.1:1"), saying(), current)
    state = random.getstate()
    drawn: set[float] = set()
    for _ in range(2):
        random.setstate(state)
        await handler.restored()
        drawn.add(random.random())
    assert len(drawn) == 2


async def test_without_a_platform_the_loop_ends():
    client = runtime.RuntimeAPI("127.0.0.1:1")
    current = Current({"DATABASE_URL": "sqlite:///never-opened.db"})
    with pytest.RaisesGroup(runtime.RefusedError):
        await runtime.serve(client, Handler(client, saying(), current), 1)


async def test_an_answer_under_way_is_whole_though_the_platform_refuses_one_more_event():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(5):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b"end"})

    async with RuntimeAPI(parallel=2) as api:
        client, current = runtime.RuntimeAPI(api.address), Current({"DATABASE_URL": "sqlite:///never-opened.db"})
        loop = asyncio.ensure_future(runtime.serve(client, Handler(client, app, current, alone=False), 2))
        await until(lambda: api.waiting == 2)
        event = api.invoke(get())
        await until(lambda: event.chunks != [])
        api.refuse()
        with pytest.RaisesGroup(runtime.RefusedError):
            await loop
    assert event.body == b"xxxxxend"
    assert not event.truncated


# The strict Runtime API itself ----------------------------------------------------------------------------------------

TYPE = "Content-Type: application/vnd.awslambda.http-integration-response"
MODE = "Lambda-Runtime-Function-Response-Mode: streaming"
CHUNKED = "Transfer-Encoding: chunked"
TRAILER = "Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body"
GOOD = (TYPE, MODE, CHUNKED, TRAILER)
BODY = fake.framed(b"{}" + bytes(8)) + fake.framed(b"x")
END = b"0\r\n\r\n"
FAULT = {"errorType": "Runtime.X", "errorMessage": "", "stackTrace": []}
FAULT_TRAILERS = (
    b"0\r\nLambda-Runtime-Function-Error-Type: Runtime.X\r\nLambda-Runtime-Function-Error-Body: "
    + base64.b64encode(json.dumps(FAULT).encode())
    + b"\r\n\r\n"
)


async def post(api: RuntimeAPI, path: str, headers: tuple[str, ...], body: bytes) -> int:
    reader, writer = await asyncio.open_connection(*api.address.split(":"))
    lines = [f"POST /2018-06-01/runtime/{path} HTTP/1.1", f"Host: {api.address}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    status = int((await reader.readuntil(b"\r\n")).split()[1])
    writer.close()
    return status


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        (GOOD, BODY + END, 202),
        (GOOD, BODY + FAULT_TRAILERS, 202),
        ((MODE, CHUNKED, TRAILER), BODY + END, 400),
        ((TYPE, CHUNKED), BODY + END, 400),
        ((TYPE, f"{MODE}s", CHUNKED), BODY + END, 400),
        ((TYPE, MODE, "Content-Length: 12"), b"{}" + bytes(10), 400),
        (GOOD, fake.framed(b"{}") + END, 400),
        (GOOD, fake.framed(b"{}" + bytes(7) + b"x") + END, 400),
        (GOOD, fake.framed(b'{"status":200}' + bytes(8)) + END, 400),
        (GOOD, fake.framed(b'{"headers":{"a":1}}' + bytes(8)) + END, 400),
        (GOOD, fake.framed(b'{"headers":{"a":"b\\r\\nc: d"}}' + bytes(8)) + END, 400),
        (GOOD, fake.framed(b'{"cookies":["a\\u0000"]}' + bytes(8)) + END, 400),
        (GOOD, fake.framed(b'{"headers":{"a":"%b"}}' % (b"x" * 16384) + bytes(8)) + END, 400),
        (GOOD, b"{}" + bytes(8) + b"\r\n", 400),
        ((TYPE, MODE, CHUNKED), BODY + FAULT_TRAILERS, 400),
        (GOOD, BODY + b"0\r\nX-Other: 1\r\n\r\n", 400),
        (GOOD, BODY + b"0\r\nLambda-Runtime-Function-Error-Type: Runtime.X\r\n\r\n", 400),
    ],
    ids=(
        *(
            "good",
            "trailers",
            "type",
            "no-mode",
            "mode",
            "length",
            "no-nuls",
            "7-nuls",
            "prelude",
            "header",
            "lines",
            "nul",
            "large",
        ),
        *("bare", "undeclared", "other", "half"),
    ),
)
async def test_the_runtime_api_takes_what_aws_takes(headers: tuple[str, ...], body: bytes, status: int):
    async with RuntimeAPI() as api:
        event = api.invoke({})
        taken = await runtime.RuntimeAPI(api.address).next()
        assert await post(api, f"invocation/{taken.id}/response", headers, body) == status
        assert bool(api.violations) == (status != 202)
        assert event.fault == (FAULT if body.endswith(FAULT_TRAILERS) and status == 202 else None)


async def test_the_runtime_api_takes_one_answer_for_each_event_and_no_error_after_it():
    async with RuntimeAPI() as api:
        client = runtime.RuntimeAPI(api.address)
        assert await post(api, "invocation/unknown/response", GOOD, BODY + END) == 400
        api.invoke({})
        taken = await client.next()
        with pytest.raises(runtime.RefusedError, match="403"):
            await client.next()
        stream = await client.respond(taken.id, asyncio.Event())
        stream.write(b"{}" + bytes(8))
        await until(lambda: api.events[taken.id].begun)
        with pytest.raises(runtime.RefusedError, match="403"):
            await client.failed(f"invocation/{taken.id}", KeyError())
        stream.end()
        assert await stream.taken() is None
        assert await post(api, f"invocation/{taken.id}/response", GOOD, BODY + END) == 403
        with pytest.raises(runtime.RefusedError, match="403"):
            await client.restored()


async def test_an_event_of_any_size_is_read_whole():
    async with RuntimeAPI() as api:
        for payload in ({}, {"x": "y" * 3000}, {"x": "é" * 3_000_000}):
            api.invoke(payload)
            taken = await runtime.RuntimeAPI(api.address).next()
            assert json.loads(taken.event) == payload
            assert taken.deadline == pytest.approx(time.time() + 900, abs=5)
            await runtime.RuntimeAPI(api.address).failed(f"invocation/{taken.id}", KeyError())
        assert not api.violations
