"""Secrets from SSM: read in one batch, when first needed, again after five minutes; kept while nothing newer can be."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import httpx
import pytest
from moto import mock_aws

from functions.app import assemble
from functions.secrets import PATIENCE, RETRY, TTL, Current, Secrets
from shared.errors import StoreUnavailable
from shared.keys import Keys
from shared.store import open_store
from shared.store.base import VirtualKey
from tests.apigateway import rest_event
from tests.bench import cold
from tests.runtime_api import RuntimeAPI, process
from tests.server import PEPPER, PROVIDER_KEY
from tests.upstream import Upstream

PATH = "/lightrail/test"
PRESENT = {"LR_KEY_PEPPER": PEPPER, "OPENAI_API_KEY": PROVIDER_KEY}


class Clock:
    """The wall's, as the test sets it."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class ParameterStore:
    """SSM, as moto plays it. `calls` is what was asked; while `down`, nothing is answered, nor so many times where it
    is `throttled`, each of which takes the `clock` five seconds."""

    def __init__(self) -> None:
        self.client: Any = boto3.client("ssm", region_name="us-east-1")
        self.calls: list[str] = []
        self.down = False
        self.throttled = 0
        self.clock: Clock | None = None

    def put(self, **secrets: str) -> None:
        for name, value in secrets.items():
            self.client.put_parameter(Name=f"{PATH}/{name}", Value=value, Type="SecureString", Overwrite=True)


@pytest.fixture
def ssm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ParameterStore]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        store = ParameterStore()
        answer = botocore.client.BaseClient._make_api_call

        def noted(self: Any, operation: str, arguments: Any) -> Any:
            if operation == "GetParametersByPath":
                store.calls.append(arguments.get("NextToken") or arguments["Path"])
                if store.down:
                    raise botocore.client.ClientError({"Error": {"Code": "InternalServerError"}}, operation)
                if store.throttled:
                    store.throttled -= 1
                    if store.clock:
                        store.clock.now += 5
                    raise botocore.client.ClientError({"Error": {"Code": "ThrottlingException"}}, operation)
            return answer(self, operation, arguments)

        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", noted)
        yield store


async def test_they_are_read_decrypted_in_one_batch_and_only_when_asked_for(ssm: ParameterStore, clock: Clock):
    ssm.put(**PRESENT)
    ssm.client.put_parameter(Name="/lightrail/other/GROQ_API_KEY", Value="other-stage", Type="SecureString")
    secrets = Secrets(PATH, clock)
    assert ssm.calls == []
    found = await asyncio.gather(*(secrets.current() for _ in range(5)))
    assert found == [PRESENT] * 5
    assert ssm.calls == [PATH]


async def test_more_than_a_page_is_read_whole(ssm: ParameterStore, clock: Clock):
    many = {f"PROVIDER{number}_API_KEY": f"key-{number}" for number in range(23)}
    ssm.put(**many)
    assert await Secrets(PATH, clock).current() == many
    assert len(ssm.calls) == 3


async def test_a_change_is_seen_after_five_minutes_and_not_before(ssm: ParameterStore, clock: Clock):
    ssm.put(**PRESENT)
    secrets = Secrets(PATH, clock)
    first = await secrets.current()
    ssm.put(OPENAI_API_KEY="sk-changed-changed")
    clock.now += TTL - 1
    assert await secrets.current() is first
    clock.now += 1
    assert (await secrets.current())["OPENAI_API_KEY"] == "sk-changed-changed"
    clock.now += TTL
    same = await secrets.current()
    clock.now += TTL
    assert await secrets.current() is same
    assert len(ssm.calls) == 4


async def test_a_clock_set_back_does_not_keep_them_for_ever(ssm: ParameterStore, clock: Clock):
    ssm.put(**PRESENT)
    secrets = Secrets(PATH, clock)
    await secrets.current()
    clock.now -= 10_000
    await secrets.current()
    assert len(ssm.calls) == 2


async def test_the_last_good_ones_are_kept_while_none_can_be_read(ssm: ParameterStore, clock: Clock):
    ssm.put(**PRESENT)
    secrets = Secrets(PATH, clock)
    await secrets.current()
    ssm.down = True
    clock.now += TTL
    for _ in range(3):
        assert await secrets.current() == PRESENT
    assert len(ssm.calls) == 2
    ssm.down = False
    ssm.put(OPENAI_API_KEY="sk-changed-changed")
    clock.now += PATIENCE
    assert (await secrets.current())["OPENAI_API_KEY"] == "sk-changed-changed"


async def test_an_answer_that_makes_no_sense_does_not_lose_the_last_good_ones(
    ssm: ParameterStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    ssm.put(**PRESENT)
    secrets = Secrets(PATH, clock)
    await secrets.current()
    monkeypatch.setattr(secrets, "_fetch", lambda: {}["Parameters"])
    clock.now += TTL
    assert await secrets.current() == PRESENT


async def test_who_has_secrets_does_not_wait_for_new_ones(
    ssm: ParameterStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    ssm.put(**PRESENT)
    secrets = Secrets(PATH, clock)
    await secrets.current()
    clock.now += TTL
    hanging = threading.Event()
    monkeypatch.setattr(secrets, "_fetch", lambda: hanging.wait(5) and PRESENT)
    first = asyncio.ensure_future(secrets.current())
    await asyncio.sleep(0.05)
    async with asyncio.timeout(1):
        assert await secrets.current() == PRESENT
    assert not first.done()
    hanging.set()
    assert await first == PRESENT


async def test_a_new_environment_waits_for_its_turn_in_a_burst(ssm: ParameterStore, clock: Clock):
    ssm.put(**PRESENT)
    ssm.throttled, ssm.clock = 1, clock
    assert await Secrets(PATH, clock).current() == PRESENT
    assert len(ssm.calls) == 2


async def test_but_for_seconds_only_and_not_where_it_has_some(ssm: ParameterStore, clock: Clock):
    ssm.put(**PRESENT)
    ssm.throttled, ssm.clock = 2, clock
    with pytest.raises(StoreUnavailable):
        await Secrets(PATH, clock).current()
    assert len(ssm.calls) == 2

    secrets = Secrets(PATH, clock)
    assert await secrets.current() == PRESENT
    clock.now += TTL
    ssm.throttled = 1
    assert await secrets.current() == PRESENT
    assert len(ssm.calls) == 4


async def test_while_there_never_were_any_it_is_a_503(ssm: ParameterStore, clock: Clock):
    ssm.down = True
    secrets = Secrets(PATH, clock)
    with pytest.raises(StoreUnavailable) as refused:
        await secrets.current()
    assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")
    ssm.down = False
    ssm.put(**PRESENT)
    clock.now += RETRY
    assert await secrets.current() == PRESENT


# What is made of them -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def asked(current: Current) -> AsyncIterator[httpx.AsyncClient]:
    app = assemble(current.settings, current)
    app.add_api_route("/crash", crash)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gw", trust_env=False) as client:
        yield client
    await current.close()


async def crash() -> None:
    raise RuntimeError


def environ(folder: Path, **more: str) -> dict[str, str]:
    return {"DATABASE_URL": f"sqlite:///{folder}/lightrail.db", "SECRETS_PATH": PATH, **more}


async def test_a_changed_key_is_effective_without_a_new_process(ssm: ParameterStore, clock: Clock, tmp_path: Path):
    ssm.put(**PRESENT)
    current = Current(environ(tmp_path), clock)
    first = await current()
    assert first.settings.provider_variables["OPENAI_API_KEY"] == PROVIDER_KEY
    assert [provider.name for provider in first.catalog.on()] == ["openai"]
    assert await current() is first
    ssm.put(GROQ_API_KEY="gsk-new-new-new-new")
    clock.now += TTL
    second = await current()
    assert {provider.name for provider in second.catalog.on()} == {"openai", "groq"}
    assert second.upstream is first.upstream, "connections stay"
    assert second.started == first.started
    await current.close()


async def test_no_secret_is_ever_a_plain_environment_value(ssm: ParameterStore, tmp_path: Path):
    ssm.put(**PRESENT, AWS_LAMBDA_FUNCTION_NAME="no-secret", GROQ_BASE_URL="https://groq.example/v1")
    plain = {"LR_KEY_PEPPER": "another-pepper-0123", "GROQ_API_KEY": "gsk-plain-plain", "LR_ADMIN_KEY": "x" * 20}
    current = Current(environ(tmp_path, **plain))
    settings = (await current()).settings
    assert settings.lr_key_pepper == PEPPER
    assert settings.lr_admin_key is None
    assert settings.aws_lambda_function_name is None
    assert settings.provider_variables == {
        "OPENAI_API_KEY": PROVIDER_KEY,
        "GROQ_BASE_URL": "https://groq.example/v1",
    }
    await current.close()


async def test_callers_are_told_503_until_the_secrets_are_there(ssm: ParameterStore, clock: Clock, tmp_path: Path):
    async with asked(Current(environ(tmp_path), clock)) as client:
        for _ in range(2):
            answer = await client.get("/health")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "store_unavailable"
            assert answer.headers["x-request-id"].startswith("req-")
        ssm.put(**PRESENT)
        clock.now += RETRY
        assert (await client.get("/health")).status_code == 200


async def test_a_page_of_a_set_origin_can_read_that_too(ssm: ParameterStore, clock: Clock, tmp_path: Path):
    origin = {"origin": "https://page.example"}
    async with asked(Current(environ(tmp_path, CORS_ORIGINS=origin["origin"]), clock)) as client:
        preflight = await client.options("/v1/models", headers={**origin, "access-control-request-method": "GET"})
        assert (preflight.status_code, ssm.calls) == (200, [])
        for status in (503, 500):
            answer = await client.get("/crash", headers=origin)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin["origin"]
            assert "retry-after" in answer.headers["access-control-expose-headers"]
            assert answer.headers["x-request-id"].startswith("req-")
            ssm.put(**PRESENT)
            clock.now += RETRY


async def test_a_change_for_the_worse_is_logged_and_not_followed(
    ssm: ParameterStore, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    ssm.put(**PRESENT)
    current = Current(environ(tmp_path), clock)
    good = await current()
    ssm.put(LR_KEY_PEPPER="too-short")
    clock.now += TTL
    assert await current() is good
    (record,) = [record for record in caplog.records if record.getMessage() == "secrets.insufficient"]
    assert "too-short" not in record.__dict__["reason"]
    await current.close()


async def test_without_a_path_the_environment_is_all(tmp_path: Path):
    variables = {"DATABASE_URL": f"sqlite:///{tmp_path}/lightrail.db", **PRESENT}
    current = Current(variables)
    assert (await current()).settings.lr_key_pepper == PEPPER
    await current.close()


async def test_a_process_reads_them_with_its_first_request_and_answers_by_them(provider: Upstream, tmp_path: Path):
    with cold.table(tmp_path) as (url, environ), cold.parameters() as ssm:
        store = open_store(url, None)
        user, key = await Keys(store, PEPPER).create(VirtualKey("", "", "ada"))
        asked = {"model": "openai/gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        headers = [("Authorization", f"Bearer {key}"), ("Content-Type", "application/json"), ("Host", "gw")]
        environ |= {"SECRETS_PATH": "/lightrail/bench", "AWS_ENDPOINT_URL_SSM": ssm, "OPENAI_BASE_URL": provider.url}
        async with RuntimeAPI() as api, asyncio.timeout(30):
            with process(api, environ, tmp_path / "log"):
                await api.invoke({}).over.wait()
                assert cold.Parameters.asked == 0, "neither init nor an event that needs none has read them"
                event = api.invoke(rest_event("POST", "/v1/chat/completions", headers, json.dumps(asked).encode()))
                await event.over.wait()
                await api.invoke({}).over.wait()
        after = await store.key(user.id)
        await store.close()
    assert event.body.endswith(b"data: [DONE]\n\n")
    assert after
    assert (after.requests, len(after.open), after.spent > 0) == (1, 0, True)
    assert cold.Parameters.asked == 1
    assert not api.violations
    log = (tmp_path / "log").read_text()
    assert PROVIDER_KEY not in log
    assert PEPPER not in log
