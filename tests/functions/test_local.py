"""`make run`: the first start and the next ones, what keeps it from starting, and how requests end with it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest

from functions import local
from functions.app import create_app
from shared.errors import StoreUnavailable
from shared.keys import mint
from shared.settings import Settings
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.functions.doors import MODEL, Door, opened, refusal, until
from tests.server import ADMIN_KEY, INHERITED, PEPPER, PROVIDER_KEY, ROOT, Server, free_port, serving
from tests.upstream import DONE, Step, Upstream, answer, chunk, echo, event, head, send, sleep, stream

HELLO: Any = [{"role": "user", "content": "hello"}]
COMMAND = [sys.executable, "-m", "functions.local"]
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
COST = 10 * 150 + 5 * 600
"""Of that, in nano-dollars, by gpt-4o-mini's price of $0.15 and $0.60 per million tokens."""


def start(folder: Path, *arguments: str, **environ: str) -> AbstractContextManager[Server]:
    """As a developer starts it, in `folder`, with nothing in the environment but this."""
    return serving([*COMMAND, *arguments], {"GATEWAY_CONFIG": str(ROOT / "gateway.toml"), **environ}, folder)


Fail: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """The exit code and the words of a start, in this process, that must not come to serving."""

    def start(*arguments: str, **environ: str) -> tuple[int, str]:
        inherited = {name: value for name, value in os.environ.items() if name in INHERITED}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "environ", {**inherited, "PORT": str(free_port()), **environ})
        monkeypatch.setattr(sys, "argv", ["local.py", *arguments])
        code, printed = local.main(), capsys.readouterr()
        assert printed.out == ""
        return code, printed.err

    return start


def curl_line(log: str) -> str:
    return log[log.index("curl ") :].partition("\n\n")[0]


def test_the_first_start_makes_and_shows_keys_and_the_next_ones_keep_them(tmp_path: Path) -> None:
    with start(tmp_path, "--demo", AZURE_API_KEY="0123456789abcdef") as server:
        log = server.log.read_text()
        admin, user = (tmp_path / f".lightrail/{role}-key" for role in ("admin", "user"))
        admin_key, user_key = admin.read_text().strip(), user.read_text().strip()
        assert f"Lightrail serves on {server.url}" in log
        for role, key in (("admin", admin_key), ("user", user_key)):
            assert f"{role + ' key':<11}{key}   (shown this once; kept in .lightrail/{role}-key)" in log
        assert log.count("\n  on   ") == 1
        assert "(demo/…)" in log
        assert "off  OpenAI: set OPENAI_API_KEY\n" in log
        assert "off  Azure OpenAI: set AZURE_BASE_URL\n" in log
        assert "off  Ollama: set OLLAMA_BASE_URL\n" in log
        folder = tmp_path / ".lightrail"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(
            ("pepper", "admin-key", "user-key"), 0o600
        )
        status, said = server.ask("POST", "/v1/chat/completions", user_key, {"model": "demo/echo", "messages": HELLO})
        assert (status, said["choices"][0]["message"]["content"][-5:]) == (200, "hello")
        assert server.ask("GET", "/admin/keys", user_key)[0] == 403
        assert server.ask("GET", "/admin/keys", admin_key)[0] == 200
    with start(tmp_path, "--demo") as server:
        log = server.log.read_text()
        assert admin_key not in log
        assert user_key not in log
        assert f"user key   {user_key[:6]}***   (kept in .lightrail/user-key)" in log
        assert user.read_text().strip() == user_key
        status, record = server.ask("GET", f"/v1/generation?id={said['id']}", user_key)
        assert (status, record["status"], record["provider"]) == (200, "ok", "demo")
        assert len(server.ask("GET", "/admin/keys", admin_key)[1]["data"]) == 2


def test_the_curl_line_works_as_it_is_printed(tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine: what README and banner print cannot be tried")
    with start(tmp_path, "--demo") as server:
        printed = curl_line(server.log.read_text())
        environ = {"PATH": os.environ["PATH"]}
        ran = subprocess.run(
            ["sh", "-c", printed], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
        )
        events = [line.removeprefix("data: ") for line in ran.stdout.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(each)["choices"][0]["delta"].get("content") or "" for each in events[:-1]]
        assert "".join(chunks).endswith("Hello!")
        assert len(chunks) > 5  # word by word


async def test_with_an_admin_key_of_ones_own_only_a_user_key_is_made_and_yours_is_not_shown(
    server: Server, provider: Upstream
) -> None:
    log = server.log.read_text()
    assert "on   OpenAI (openai/…)\n" in log
    assert "off  Groq: set GROQ_API_KEY\n" in log
    assert "$(cat .lightrail/user-key)" in curl_line(log)
    assert f'"model": "{MODEL.partition("/")[0]}/' in curl_line(log)
    assert not any(secret in log for secret in (ADMIN_KEY, PROVIDER_KEY, PEPPER))
    assert [path.name for path in (server.log.parent / ".lightrail").iterdir()] == ["user-key"]


def test_without_a_provider_it_says_what_to_set_and_does_not_start(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name in INHERITED}
    ended = subprocess.run(
        COMMAND,
        env={**environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    said = ended.stderr
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said.startswith("Lightrail cannot start: no provider is on.")
    assert "OpenAI: set OPENAI_API_KEY" in said
    assert "Azure OpenAI: set AZURE_API_KEY and AZURE_BASE_URL" in said
    assert "lr-" not in said


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "eighty-eighty"),
        ("PORT", "65537"),
        ("LR_ADMIN_KEY", "short-canary"),
        ("LR_KEY_PEPPER", "short-canary"),
        ("TOTAL_TIMEOUT", "-5"),
        ("OPENAI_BASE_URL", "https://user:canary@host/v1"),
        ("OPENAI_API_KEY", "canary\n\u00e9"),
        ("DATABASE_URL", "mysql://canary@host/db"),
    ],
)
def test_a_wrong_variable_is_named_and_its_value_is_not(fail: Fail, variable: str, value: str) -> None:
    code, said = fail("--demo", **{variable: value})
    assert code == 2
    assert said.startswith("Lightrail cannot start: ")
    assert variable in said
    assert value not in said
    assert "canary" not in said


def test_a_store_that_cannot_be_opened_is_told_by_its_variable(fail: Fail, tmp_path: Path) -> None:
    for admin in ({}, {"LR_ADMIN_KEY": ADMIN_KEY}):
        code, said = fail("--demo", DATABASE_URL=f"sqlite:///{tmp_path}/nowhere/x.db", **admin)
        assert code == 2
        assert said.startswith("Lightrail cannot start: DATABASE_URL: ")


def test_a_folder_that_cannot_hold_keys_is_told(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / ".lightrail").write_text("a file where the folder should be")
    code, said = fail("--demo")
    assert (code, said) == (2, "Lightrail cannot start: .lightrail/pepper cannot be kept: File exists\n")


def test_a_port_in_use_is_told_with_what_to_do_and_no_key_is_made(fail: Fail, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = fail("--demo", PORT=str(port))
    assert code == 2
    assert said == (
        f"Lightrail cannot start: PORT: {port} is in use. "
        "End what listens there, or choose another: PORT=8081 make run\n"
    )
    assert not (tmp_path / ".lightrail/user-key").exists()


def test_dot_env_is_read_from_the_folder_it_runs_in_and_the_environment_wins(tmp_path: Path) -> None:
    dot_env = f"LR_ADMIN_KEY={ADMIN_KEY}\nLR_KEY_PEPPER='{PEPPER}'\n# a comment\nGROQ_API_KEY=gsk-of-the-file\nPORT=1\n"
    (tmp_path / ".env").write_text(f"{dot_env}MISTRAL_API_KEY=\nDATABASE_URL=sqlite:///named-in-env.db\n")
    with start(tmp_path) as server:
        log = server.log.read_text()
        assert "on   Groq (groq/…)\n" in log
        assert "off  Mistral: set MISTRAL_API_KEY\n" in log
        assert server.ask("GET", "/admin/keys", ADMIN_KEY)[0] == 200
        assert (tmp_path / "named-in-env.db").exists()


# Endings -----------------------------------------------------------------------------------------------------------

GRACE_OF_A_SECOND = """
import os
from functions.app import create_app
from functions.server import Server
from shared.settings import Settings

settings = Settings.read(os.environ)
Server(create_app(settings), settings, print, grace=1).run()
"""


def trickle(every: float) -> list[Step]:
    """A stream that says one word `every` seconds, for half a minute."""
    said = {"choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]}
    opened = send(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
    return [opened, *[chunk(event(said)), sleep(every)] * int(30 / every)]


def variables(folder: Path, provider: Upstream, **more: str) -> dict[str, str]:
    return {
        "DATABASE_URL": f"sqlite:///{folder / 'lightrail.db'}",
        "LR_ADMIN_KEY": ADMIN_KEY,
        "LR_KEY_PEPPER": PEPPER,
        "OPENAI_API_KEY": PROVIDER_KEY,
        "OPENAI_BASE_URL": provider.url,
        **more,
    }


async def test_on_sigterm_short_streams_finish_and_what_is_longer_ends_honestly(
    tmp_path: Path, provider: Upstream
) -> None:
    provider.always("short", echo(pace=0.1))
    provider.always("gpt-4o-mini", *trickle(0.05))
    provider.always("gpt-4o", sleep(30), answer(200, {}))
    with serving([sys.executable, "-c", GRACE_OF_A_SECOND], variables(tmp_path, provider), tmp_path) as server:
        made = await asyncio.to_thread(server.key, balance_usd=5, models=["openai/*"])
        made_free = await asyncio.to_thread(server.key)
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:

            async def ask(model: str, key: str = made["key"], **more: Any) -> httpx.Response:
                body = {"model": f"openai/{model}", "messages": HELLO, **more}
                return await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})

            asked = [
                asyncio.ensure_future(ask("short", made_free["key"], stream=True)),
                asyncio.ensure_future(ask("gpt-4o-mini", stream=True)),
                asyncio.ensure_future(ask("gpt-4o")),
            ]
            await until(lambda: len(provider.seen) == 3)
            await asyncio.sleep(0.2)
            server.process.terminate()
            short, long, whole = await asyncio.gather(*asked)
        began = time.monotonic()
        await asyncio.to_thread(server.process.wait, 10)
        assert time.monotonic() - began < 5
        log = server.log.read_text()
    finish = json.loads(short.text.split("\n\n")[-3].removeprefix("data: "))
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert short.text.endswith("data: [DONE]\n\n")
    events = [json.loads(each.removeprefix("data: ")) for each in long.text.split("\n\n") if each]
    assert [("error" in each, "choices" in each) for each in events] == [(False, True)] * (len(events) - 1) + [
        (True, False)
    ]
    assert (events[-1]["error"]["code"], events[-1]["error"]["type"]) == ("overloaded", "overloaded_error")
    assert not any(each.get("choices", [{}])[0].get("finish_reason") for each in events)
    assert 10 < len(events) < 100
    assert refusal(whole) == (503, "overloaded", None)
    assert whole.headers["x-request-id"].startswith("gen-")
    assert int(whole.headers["retry-after"]) >= 1
    assert "Traceback" not in log
    store = SQLiteStore(str(tmp_path / "lightrail.db"))
    rows = [await store.generation(answered.headers["x-request-id"]) for answered in (short, long, whole)]
    assert [row and row.doc["status"] for row in rows] == ["ok", "cancelled", "cancelled"]
    assert rows[1]
    assert rows[2]
    assert rows[1].doc["tokens"]["completion_tokens"] >= len(events) - 1
    for key_id, spent in ((made["id"], rows[1].cost + rows[2].cost), (made_free["id"], 0)):
        key = await store.key(key_id)
        assert key
        assert (key.spent, dict(key.open)) == (spent, {})
    assert rows[1].cost > 0
    await store.close()
    assert [seen.closed_after is None for seen in sorted(provider.seen, key=lambda seen: seen.json["model"])] == [
        False,
        False,
        True,
    ]


async def hang_up(server: Server, body: dict[str, Any], key: str, provider: Upstream) -> None:
    """Ask, and leave 0.3 seconds after the provider was asked; it must be left within one more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = json.dumps({"messages": HELLO, **body}).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: localhost",
        f"authorization: Bearer {key}",
        "content-type: application/json",
        f"content-length: {len(data)}",
    ]
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await until(lambda: len(provider.seen) == 1)
        await asyncio.sleep(0.3)
        if body.get("stream"):
            assert b"data: " in await reader.read(65536)
        assert provider.seen[0].closed_after is None
    finally:
        writer.close()
        await writer.wait_closed()
    await until(lambda: provider.seen[0].closed_after is not None, 1.0)


async def records(server: Server, key_id: str, many: int) -> list[Any]:
    """A key's rows of today, once there are so many."""
    rows: list[Any] = []
    async with asyncio.timeout(5):
        while len(rows) < many:
            page = await asyncio.to_thread(server.ask, "GET", f"/admin/generations?key={key_id}", ADMIN_KEY)
            rows = page[1]["data"]
    return rows


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_a_caller_who_hangs_up_stops_the_provider_and_pays_for_what_was_made(
    server: Server, provider: Upstream, streamed: bool
) -> None:
    made = await asyncio.to_thread(server.key, balance_usd=5)
    provider.next(*(trickle(0.05) if streamed else [sleep(30)]))
    await hang_up(server, {"model": MODEL, "stream": streamed}, made["key"], provider)
    [row] = await records(server, made["id"], 1)
    assert (row["status"], row["tokens"]["source"], row["cost"]["source"]) == ("cancelled", "estimated", "estimated")
    assert 4 <= row["tokens"]["completion_tokens"] <= 150
    key = (await asyncio.to_thread(server.ask, "GET", f"/admin/keys/{made['id']}", ADMIN_KEY))[1]
    assert key["spend_usd"] == row["cost"]["total_cost"] > 0
    assert (key["open_requests"], key["balance_usd"]) == (0, pytest.approx(5 - key["spend_usd"], abs=1e-9))
    assert "cancelled" in next(line for line in server.log.read_text().splitlines() if row["id"] in line)


async def test_a_caller_who_has_the_whole_answer_and_leaves_has_not_hung_up(server: Server, provider: Upstream) -> None:
    made = await asyncio.to_thread(server.key)
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    for _ in range(10):
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            headers = {"authorization": f"Bearer {made['key']}"}
            answered = await client.post("/v1/chat/completions", json=body, headers=headers)
            assert answered.text.endswith("[DONE]\n\n")
    assert {row["status"] for row in await records(server, made["id"], 10)} == {"ok"}


# A store in trouble ------------------------------------------------------------------------------------------------


class Flaky:
    """A store whose methods fail as often as `failures` says."""

    def __init__(self, folder: Path) -> None:
        self.store = SQLiteStore(str(folder / "flaky.db"))
        self.failures: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        if not self.failures.get(name):
            return getattr(self.store, name)
        self.failures[name] -= 1

        async def down(*_: object) -> None:
            raise StoreUnavailable("The store cannot be reached. Please try again.")

        async def down_while_listing() -> Any:
            raise StoreUnavailable("The store cannot be reached. Please try again.")
            yield

        return down_while_listing if name == "keys" else down


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_an_answer_is_given_first_and_settled_once_the_store_is_back(
    tmp_path: Path, provider: Upstream, streamed: bool
) -> None:
    flaky = Flaky(tmp_path)
    async with opened(tmp_path, provider.url, flaky) as door:  # type: ignore[arg-type]
        made = await door.make(balance_usd=1)
        said = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}], "usage": USAGE}
        whole = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}], "usage": USAGE}
        provider.next(stream(said, DONE) if streamed else answer(200, whole))
        flaky.failures = {"record": 2, "settle": 1}
        ended_at: list[dict[str, int]] = []
        answered = await told_of_the_end(
            door, made["key"], {"stream": streamed}, lambda: ended_at.append(dict(flaky.failures))
        )
        assert answered[0] == 200
        assert ended_at == [{"record": 2, "settle": 1}]  # the caller's last byte had left before it was even tried
        assert flaky.failures == {"record": 0, "settle": 0}
        key = await door.key(made["id"])
        assert (key.spent, key.balance, key.requests, dict(key.open)) == (COST, 10**9 - COST, 1, {})
        [row] = await flaky.store.generations(key.id, int(time.time()) // 86400)
        assert (row.cost, row.doc["status"]) == (COST, "ok")


async def told_of_the_end(door: Door, key: str, body: Any, at_end: Any) -> tuple[int, bytes]:
    """One chat, straight to the app: status and body; `at_end` is called when the last byte was given out."""
    data, answered = json.dumps({"model": MODEL, "messages": HELLO, **body}).encode(), list[Any]()
    asked = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        if not asked:
            await asyncio.Event().wait()
        return asked.pop()

    async def give(message: Any) -> None:
        answered.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            at_end()

    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
    await door.app(
        {**scope, "query_string": b"", "http_version": "1.1", "root_path": "", "scheme": "http"}, receive, give
    )
    return answered[0]["status"], b"".join(message.get("body", b"") for message in answered)


async def test_a_store_that_is_down_is_503_and_never_a_bad_key(tmp_path: Path, provider: Upstream) -> None:
    flaky = Flaky(tmp_path)
    async with opened(tmp_path, provider.url, flaky) as door:  # type: ignore[arg-type]
        good, unknown = (await door.make(rpm=5))["key"], mint()[1]
        flaky.failures = {"admit": 99, "key": 99, "keys": 99, "add_key": 99, "generation": 99}
        for key in (good, unknown, ADMIN_KEY):
            for method, path, body in (
                ("POST", "/v1/chat/completions", {"model": MODEL, "messages": HELLO}),
                ("POST", "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": True}),
                ("POST", "/v1/embeddings", {"model": "openai/text-embedding-3-small", "input": "x"}),
                ("POST", "/v1/chat/completions", {"model": "nothing"}),
                ("GET", "/v1/models", None),
                ("GET", "/v1/key", None),
                ("GET", "/v1/generation?id=gen-x", None),
                ("GET", "/admin/keys", None),
                ("POST", "/admin/keys", {"name": "x"}),
                ("GET", "/admin/usage", None),
            ):
                refused = await door.ask(method, path, body, key)
                assert refusal(refused) == (503, "store_unavailable", None), (method, path)
                assert refused.json()["error"]["type"] == "overloaded_error"
                assert int(refused.headers["retry-after"]) >= 1
        assert refusal(await door.chat("nonsense")) == (401, "invalid_api_key", None)
        assert (await door.ask("GET", "/health", key=None)).status_code == 200
        assert provider.seen == []
        flaky.failures = {"keys": 99}
        for path in ("/admin/keys", "/admin/usage"):
            assert refusal(await door.ask("GET", path)) == (503, "store_unavailable", None)
        flaky.failures = {}
        assert (await door.chat(good)).status_code == 200
        assert refusal(await door.chat(unknown)) == (401, "invalid_api_key", None)


async def test_the_app_ends_only_when_what_is_open_is_settled(tmp_path: Path, provider: Upstream) -> None:
    environ = {**variables(tmp_path, provider), "GATEWAY_CONFIG": "none"}
    app = create_app(Settings.read(environ))
    services = app.state.services
    async with app.router.lifespan_context(app):
        _, key = await services.keys.create(VirtualKey("", "", "test"))
        provider.next(sleep(0.3), echo())
        door = Door(app, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gw", trust_env=False))
        asking = asyncio.ensure_future(door.chat(key))
        await until(lambda: bool(provider.seen))
    assert asking.done() or not services.gateway.open
    assert (await asking).status_code == 200
    with suppress(RuntimeError):
        await door.client.aclose()
    async for kept in services.store.keys():
        assert not kept.open
    await services.store.close()


async def test_endless_headers_are_refused_before_they_fill_the_memory(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nx-endless: ")
    answered = asyncio.ensure_future(reader.read(200))
    pieces = 0
    with suppress(ConnectionError):  # what is on its way when the server hangs up is lost, the answer sometimes with it
        while not answered.done() and pieces < 4000:
            writer.write(b"a" * 16384)
            await writer.drain()
            pieces += 1
            await asyncio.sleep(0)
        assert (await answered).startswith(b"HTTP/1.1 400")
    answered.cancel()
    writer.close()
    assert pieces < 4000
