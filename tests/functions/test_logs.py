"""What is told of a request: one line for people, JSON and metrics on Lambda; and never a secret, to anyone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.keys import mint
from shared.telemetry import JSONLines, Redactor, Terminal
from tests.functions.doors import until
from tests.server import Server
from tests.server import gateway as start
from tests.upstream import END, Exchange, Step, Upstream, answer, chunk, close, dumped, head, send

HELLO: Any = [{"role": "user", "content": "hello"}]
ASKED = {"model": "openai/gpt-4o-mini", "messages": HELLO}


async def lines(server: Server, start: int, many: int) -> list[str]:
    """What the process logged from byte `start` on, once that is so many lines; fails where it is more."""

    def logged() -> str:
        return server.log.read_bytes()[start:].decode()

    await until(lambda: logged().count("\n") >= many)
    await asyncio.sleep(0.05)
    assert logged().count("\n") == many
    return logged().splitlines()


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
    environ = {"AWS_LAMBDA_FUNCTION_NAME": "lightrail-stream", "AWS_REGION": "eu-central-1", "PYTHONUNBUFFERED": "1"}
    environ["STAGE"] = "prod"
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
        assert line["level"] == "INFO"
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
        assert [{"service", "stage", "provider"}] == [set(each) for each in directive["Dimensions"]]
        assert line["stage"] == "prod"
        assert all(metric["Name"] in line for metric in directive["Metrics"])
        assert line["Requests"] == [1]
        assert line["Errors"] == [int(name == failed["id"])]
        assert line["Latency"] == [told[name]["ms"]]
    assert metrics[whole["id"]]["CostUSD"] == [whole["cost_usd"]]
    assert metrics[whole["id"]]["provider"] == "openai"
    assert metrics[health["id"]]["provider"] == "none"


def test_a_line_is_redacted_on_its_way_out_whatever_was_put_in() -> None:
    key, known = mint()[1], "a known secret"
    for form in (Terminal(), JSONLines()):
        form.redact = Redactor([known, "short"])
        record = logging.makeLogRecord(
            {
                "levelno": 20,
                "levelname": "INFO",
                "msg": f"{key} {known} Bearer abc.def sk-1234567890abcdef short",
                "url": key,
            }
        )
        line = form.format(record)
        assert line.count("[redacted]") == 5
        assert "short" in line  # too short to be taken out of every line
        assert not any(secret in line for secret in (key, known, "abc.def", "1234567890"))


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
FINISH = WORD.replace('"content": "hi"', "").replace("null", '"stop"')
SAID = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}
PARROTS: dict[str, list[Step]] = {
    f"e{status}": [parrot(status, {"error": {"message": "Bad key: {auth}, {key}, '{key}'", "code": "{key}"}})]
    for status in (400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 503)
} | {
    "text": [parrot(400, "your key {key} is bad, header Authorization: {auth}")],
    "long": [parrot(500, {"error": {"message": "na " * 162 + "{key}"}})],  # cut at 500 characters
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
    "s-name": parrot_stream('{"id": "{key}", "model": "{key}", "choices": []}', WORD, FINISH, end=send(END)),
}


def parts(secret: str) -> set[bytes]:
    return {secret[at : at + PART].encode() for at in range(len(secret) - PART + 1)}


ADMIN, PEPPER, SK = "Adm1nCanaryQx7Rw2Zt9Kp4V", "PepperCanaryHs6Dn3Wb8Ym1", "sk-CanaryPv5Jt8Gc2Lz7Fx4Rk"
ON_LAMBDA = {"AWS_LAMBDA_FUNCTION_NAME": "lightrail", "AWS_REGION": "eu-central-1"}


class Told:
    """Everything that callers were told, by place."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.places: dict[str, bytes] = {}

    async def ask(self, method: str, path: str, key: str, body: Any = None) -> Any:
        answered = await self.client.request(method, path, json=body, headers={"authorization": f"Bearer {key}"})
        place = f"{len(self.places)}: {method} {path} {(body or {}).get('model')} {answered.status_code}"
        self.places[place] = str(answered.headers.raw).encode() + b"\n" + answered.content
        return answered.json() if answered.headers["content-type"] == "application/json" else None


def in_database(path: Path) -> tuple[set[str], list[bytes], bytes]:
    """The hashes, the records, and every byte of the files."""
    with closing(sqlite3.connect(path)) as database:
        hashes = {text for row in database.execute("SELECT hash, old_hash FROM keys") for text in row if text}
        rows = [bytes(doc) for (doc,) in database.execute("SELECT doc FROM generations")]
    return hashes, rows, b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))


@pytest.mark.parametrize(
    ("deployments", "environ"),
    [
        pytest.param("openai/", {}, id="terminal"),
        pytest.param("openai/", ON_LAMBDA, id="lambda"),
        pytest.param("lab/", {}, id="odd key"),
    ],
)
async def test_a_provider_that_tells_our_credentials_tells_them_to_nobody(
    tmp_path: Path, provider: Upstream, deployments: str, environ: dict[str, str]
) -> None:
    (tmp_path / "gateway.toml").write_text(LAB.format(url=provider.url))
    secrets = {"LR_ADMIN_KEY": ADMIN, "LR_KEY_PEPPER": PEPPER, "OPENAI_API_KEY": SK, "LAB_API_KEY": PLAIN_LOOKING}
    more = {"LOG_LEVEL": "DEBUG", "GATEWAY_CONFIG": str(tmp_path / "gateway.toml"), **environ}
    name, parrots = deployments.removesuffix("/"), PARROTS
    provider.key, strict = None, provider.key
    try:
        with start(tmp_path, provider.url, **secrets, **more) as server:
            async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:
                made = (await client.post("/admin/keys", json={"name": "c"}, headers=bearer(ADMIN))).json()
                path = f"/admin/keys/{made['id']}"
                rotated = (await client.post(f"{path}/rotate", headers=bearer(ADMIN))).json()
                told = Told(client)
                for model, script in parrots.items():
                    provider.always(model, *script)
                    for stream in (False, True):
                        await client.patch(f"/admin/providers/{name}", json={"resting": False}, headers=bearer(ADMIN))
                        asked = {**ASKED, "model": f"{name}/{model}", "stream": stream}
                        await told.ask("POST", "/v1/chat/completions", rotated["key"], asked)
                await told.ask("POST", "/v1/chat/completions", made["key"], ASKED)
                for key, place in (
                    (rotated["key"], "/v1/key"),
                    (rotated["key"], "/v1/models"),
                    (rotated["key"][:-1], "/v1/key"),
                    ("none", "/health"),
                    (ADMIN, "/admin/keys"),
                    (ADMIN, path),
                    (ADMIN, "/admin/usage"),
                    (ADMIN, f"/admin/generations?key={made['id']}&limit=100"),
                ):
                    await told.ask("GET", place, key)
                records = (
                    await client.get(f"/admin/generations?key={made['id']}&limit=100", headers=bearer(ADMIN))
                ).json()
                await told.ask("PATCH", path, ADMIN, {"enabled": False})
                await told.ask("GET", "/v1/key", rotated["key"])
        log = server.log.read_bytes()
    finally:
        provider.key = strict
    assert len(records["data"]) == 2 * len(parrots) + 1
    assert {seen.json["model"] for seen in provider.seen} == {*parrots, "gpt-4o-mini"}
    assert not provider.malformed
    hashes, rows, kept = in_database(tmp_path / "lightrail.db")
    assert len(hashes) == 4  # of three keys, one of them rotated
    assert len(rows) == len(records["data"])
    ours = [*secrets.values(), *(each["key"].removeprefix(f"lr-{made['id']}") for each in (made, rotated))]
    never_kept = set[bytes]().union(*map(parts, ours))
    never_told = never_kept.union(*map(parts, hashes))
    places = {**told.places, "log": log, **{f"record {at}": row for at, row in enumerate(rows)}}
    leaks = {place: [part for part in never_told if part in text] for place, text in places.items()}
    assert {place: found for place, found in leaks.items() if found} == {}
    assert [part for part in never_kept if part in kept] == []


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
