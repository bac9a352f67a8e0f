"""What is told of a request: one line for people, JSON and metrics on Lambda; and never a secret, to anyone."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server, serving
from tests.server import gateway as start
from tests.upstream import DONE, Exchange, Step, Upstream, answer, chunk, close, dumped, event, head, send

HELLO: Any = [{"role": "user", "content": "hello"}]
ASKED = {"model": "openai/gpt-4o-mini", "messages": HELLO}


async def lines(server: Server, start: int, many: int) -> list[str]:
    """What the process logged from byte `start` on, once that is so many lines; fails where it is more."""
    async with asyncio.timeout(5):
        while (text := server.log.read_bytes()[start:].decode()).count("\n") < many:
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.05)
    assert server.log.read_bytes()[start:].decode() == text
    return text.splitlines()


async def test_a_request_is_one_line_that_people_can_read(server: Server, provider: Upstream) -> None:
    made = await asyncio.to_thread(server.key)
    provider.always("fails", answer(500, {"error": {"message": "no"}}))
    await asyncio.sleep(0.2)
    start, asked = server.log.stat().st_size, asyncio.to_thread
    whole = (await asked(server.ask, "POST", "/v1/chat/completions", made["key"], ASKED))[1]
    await asked(server.ask, "POST", "/v1/chat/completions", made["key"], {**ASKED, "model": "openai/fails"})
    await asked(server.ask, "GET", "/v1/models?x=secret", "nonsense")
    await asked(server.ask, "GET", "/nowhere%0A12:00:00%20200%20GET%20/forged%1B[31m", made["key"])
    answered, failed, refused, unknown = await lines(server, start, 4)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d 200 POST /v1/chat/completions  openai/gpt-4o-mini → openai/gpt-4o-mini  "
        rf"\d+ ms  \d+\+5 tokens  \$0\.\d{{6}}  {whole['id']}",
        answered,
    )
    assert re.fullmatch(
        r"\S+ 502 POST /v1/chat/completions  openai/fails  \d+ ms  0\+0 tokens  failed  upstream_error  "
        r"gen-[0-9A-Za-z]{16}",
        failed,
    )
    assert re.fullmatch(r"\S+ 401 GET /v1/models  \d+ ms  req-[0-9A-Za-z]{16}", refused)
    assert re.fullmatch(r"\S+ 404 GET /nowhere%0A12:00:00%20200%20GET%20/forged%1B%5B31m  \d+ ms  req-\S+", unknown)


async def test_on_lambda_each_line_is_json_and_each_request_is_measured(tmp_path: Path, provider: Upstream) -> None:
    environ = {"AWS_LAMBDA_FUNCTION_NAME": "lightrail-stream", "AWS_REGION": "eu-central-1"}
    with start(tmp_path, provider.url, **environ) as server:
        made = await asyncio.to_thread(server.key)
        await asyncio.sleep(0.2)
        begun, log = server.log.stat().st_size, []
        provider.always("fails", answer(500, {"error": {"message": "no"}}))
        statuses: dict[str, int] = {}
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            headers = {"authorization": f"Bearer {made['key']}"}
            for body in (ASKED, {**ASKED, "stream": True}, {**ASKED, "model": "openai/fails"}):
                answered = await client.post("/v1/chat/completions", json=body, headers=headers)
                statuses[answered.headers["x-request-id"]] = answered.status_code
            health = await client.get("/health")
            statuses[health.headers["x-request-id"]] = 200
        log = [json.loads(line) for line in await lines(server, begun, 8)]
    told = {line["id"]: line for line in log if line.get("message") == "request"}
    metrics = {line["id"]: line for line in log if "_aws" in line}
    assert {name: line["status"] for name, line in told.items()} == statuses
    assert set(metrics) == set(statuses)
    for line in told.values():
        assert line.items() >= {"level": "INFO", "service": "lightrail"}.items()
        assert line["ms"] > 0
    whole, streamed, failed, health = told.values()
    assert (
        whole.items()
        >= {
            "method": "POST",
            "path": "/v1/chat/completions",
            "model": "openai/gpt-4o-mini",
            "provider": "openai",
            "answered": "openai/gpt-4o-mini",
            "outcome": "ok",
            "attempts": 1,
            "completion_tokens": 5,
        }.items()
    )
    assert whole["cost_usd"] > 0
    assert streamed["outcome"] == "ok"
    assert (failed["outcome"], failed["error"]) == ("failed", "upstream_error")
    assert "model" not in health
    for name, line in metrics.items():
        [directive] = line["_aws"]["CloudWatchMetrics"]
        assert directive["Namespace"] == "Lightrail"
        assert [{"service", "provider"}] == [set(each) for each in directive["Dimensions"]]
        assert all(metric["Name"] in line for metric in directive["Metrics"])
        assert line["Requests"] == [1]
        assert line["Errors"] == [int(name == failed["id"])]
        assert line["Latency"] == [told[name]["ms"]]
    assert metrics[whole["id"]]["CostUSD"] == [whole["cost_usd"]]
    assert metrics[whole["id"]]["provider"] == "openai"
    assert metrics[health["id"]]["provider"] == "none"


# The canary --------------------------------------------------------------------------------------------------------

PART = 8
"""So many characters of a secret in a row are a leak."""
PLAIN_LOOKING = "canary+of/the.lab=Zq9Xw4"
"""A provider key that no pattern could know for one."""
LAB = '[providers.lab]\nbase_url = "{url}"\nrequires = ["api_key"]\n'


def parrot(status: int, body: Any, **headers: str) -> Step:
    """Answers with our own credential wherever `body` and `headers` say `{auth}` or `{key}`."""

    async def step(exchange: Exchange) -> None:
        assert exchange.seen
        auth = exchange.seen.headers["authorization"]

        def filled(text: str) -> str:
            return text.replace("{auth}", auth).replace("{key}", auth.removeprefix("Bearer "))

        data = filled(dumped(body).decode() if not isinstance(body, str) else body).encode()
        told = {name.replace("_", "-"): filled(value) for name, value in headers.items()}
        await answer(status, data, told)(exchange)

    return step


def parrot_stream(*pieces: str, end: Step) -> list[Step]:
    async def step(exchange: Exchange) -> None:
        assert exchange.seen
        auth = exchange.seen.headers["authorization"]
        for piece in pieces:
            text = piece.replace("{auth}", auth).replace("{key}", auth.removeprefix("Bearer "))
            await chunk(f"data: {text}\n\n".encode())(exchange)

    return [send(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})), step, end]


WORD = '{"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": null}]}'
SAID = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}
PARROTS: dict[str, list[Step]] = {
    f"e{status}": [parrot(status, {"error": {"message": "Bad key: {auth}, {key}, '{key}'", "code": "{key}"}})]
    for status in (400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 503)
} | {
    "text": [parrot(400, "your key {key} is bad, header Authorization: {auth}")],
    "page": [parrot(502, "<html>{auth} {key}</html>", content_type="text/html")],
    "detail": [parrot(422, {"detail": [{"loc": ["header", "{key}"], "msg": "{auth}"}]})],
    "param": [parrot(400, {"error": {"message": "no", "param": "{key}", "type": "{key}", "code": "{key}"}})],
    "headers": [parrot(429, {"error": {"message": "no"}}, retry_after="{key}", x_request_id="{key}", x_key="{auth}")],
    "fine": [parrot(200, SAID, x_request_id="{key}", openai_organization="{key}", set_cookie="k={key}")],
    "in200": [parrot(200, {"error": {"message": "{auth} and {key}"}})],
    "redirect": [parrot(307, {}, location="https://{key}.example/{key}")],
    "broken": [parrot(200, '{"choices": [{"{key}')],
    "s-error": parrot_stream(WORD, '{"error": {"message": "{auth}; {key}", "code": "{key}"}}', end=close()),
    "s-first": parrot_stream('{"error": {"message": "{auth}; {key}", "type": "{key}"}}', end=close()),
    "s-odd": parrot_stream("{key}", "{auth}", "[", "{", "}", WORD, end=close()),
    "s-cut": parrot_stream(WORD, '{"choices": [{"{key}', end=close()),
    "s-name": parrot_stream(
        '{"id": "{key}", "system_fingerprint": "{key}", "choices": []}', WORD, end=send(chunked_end := b"0\r\n\r\n")
    ),
}


def parts(secret: str) -> set[str]:
    return {secret[at : at + PART] for at in range(len(secret) - PART + 1)}


@pytest.mark.parametrize(
    ("provider_name", "on_lambda"),
    [
        ("openai", False),
        ("openai", True),
        pytest.param(
            "lab",
            False,
            marks=pytest.mark.xfail(
                strict=True,
                reason="shared/providers/refusals.py: a key that looks like none is not taken out of error messages",
            ),
        ),
    ],
)
async def test_a_provider_that_tells_our_credentials_tells_them_to_nobody(
    tmp_path: Path, provider: Upstream, provider_name: str, on_lambda: bool
) -> None:
    admin, pepper, sk = "Adm1nCanaryQx7Rw2Zt9Kp4V", "PepperCanaryHs6Dn3Wb8Ym1", "sk-CanaryPv5Jt8Gc2Lz7Fx4Rk"
    (tmp_path / "gateway.toml").write_text(LAB.format(url=provider.url))
    environ = {
        "LR_ADMIN_KEY": admin,
        "LR_KEY_PEPPER": pepper,
        "OPENAI_API_KEY": sk,
        "LAB_API_KEY": PLAIN_LOOKING,
        "LOG_LEVEL": "DEBUG",
        "GATEWAY_CONFIG": str(tmp_path / "gateway.toml"),
        **({"AWS_LAMBDA_FUNCTION_NAME": "lightrail", "AWS_REGION": "eu-central-1"} if on_lambda else {}),
    }
    provider_key, provider.key = provider.key, None
    answers: dict[str, bytes] = {}
    try:
        with start(tmp_path, provider.url, **environ) as server:
            async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:
                as_admin = {"authorization": f"Bearer {admin}"}
                made = (await client.post("/admin/keys", json={"name": "canary"}, headers=as_admin)).json()
                old = made["key"]
                rotated = (await client.post(f"/admin/keys/{made['id']}/rotate", headers=as_admin)).json()["key"]
                keys = [key for key in (old, rotated)]

                async def ask(name: str, method: str, path: str, key: str, body: Any = None) -> None:
                    headers = {"authorization": f"Bearer {key}"}
                    answered = await client.request(method, path, json=body, headers=headers)
                    answers[name] = str(answered.headers.raw).encode() + answered.content

                for model, script in PARROTS.items():
                    provider.always(model, *script)
                    for stream in (False, True):
                        body = {**ASKED, "model": f"{provider_name}/{model}", "stream": stream}
                        name = f"{model} {'stream' if stream else 'whole'}"
                        await ask(name, "POST", "/v1/chat/completions", rotated, body)
                await ask("old", "POST", "/v1/chat/completions", old, ASKED)
                await ask("own", "GET", "/v1/key", rotated)
                await ask("models", "GET", "/v1/models", rotated)
                await ask("keys", "GET", "/admin/keys", admin)
                await ask("key", "GET", f"/admin/keys/{made['id']}", admin)
                await ask("usage", "GET", "/admin/usage", admin)
                await ask("records", "GET", f"/admin/generations?key={made['id']}&limit=100", admin)
                await ask("disable", "PATCH", f"/admin/keys/{made['id']}", admin, {"enabled": False})
                await ask("disabled", "GET", "/v1/key", rotated)
                await ask("wrong", "GET", "/v1/key", rotated[:-1])
                await ask("health", "GET", "/health", "none")
        log = server.log.read_text()
    finally:
        provider.key = provider_key
    assert len(provider.seen) == 2 * len(PARROTS) + 1
    assert not provider.malformed
    with closing(sqlite3.connect(tmp_path / "lightrail.db")) as database:
        hashes = [text for row in database.execute("SELECT hash, old_hash FROM keys") for text in row if text]
        rows = [bytes(doc) for (doc,) in database.execute("SELECT doc FROM generations")]
    assert len(hashes) == 3
    assert len(rows) == len(provider.seen)
    secrets = [admin, pepper, sk, PLAIN_LOOKING, *(key[3 + len(made["id"]) :] for key in keys)]
    never_told = {part for secret in (*secrets, *hashes) for part in parts(secret)}
    never_kept = {part for secret in secrets for part in parts(secret)}
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("lightrail.db*"))
    places = {**answers, "log": log.encode(), **{f"row {at}": row for at, row in enumerate(rows)}}
    leaks = {place: [part for part in never_told if part.encode() in text] for place, text in places.items()}
    assert {place: found for place, found in leaks.items() if found} == {}
    assert [part for part in never_kept if part.encode() in kept] == []
    requests = [line for line in log.splitlines() if made["id"] not in line and "POST" in line]
    assert len(requests) >= len(provider.seen)
