"""Requests signed with the process's own AWS role, exactly as botocore's own client would sign them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import botocore.auth
import httpx
import pytest
from botocore.awsrequest import AWSResponse
from botocore.session import Session

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers import signature
from shared.providers.bedrock import DIALECT
from shared.providers.dialect import Outgoing
from shared.schema import Call
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.eventstream import event
from tests.kit import Kit, streamed, whole
from tests.shared.providers.test_bedrock import ROW

REGION = "eu-central-1"
ROLE = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI", "AWS_SESSION_TOKEN": "token+/="}
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
MODELS = [
    "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
    "amazon.nova-lite-v1:0",
    "arn:aws:bedrock:eu-central-1:123456789012:application-inference-profile/a1b2c3",
]


@pytest.fixture(autouse=True)
def no_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody's AWS account: no variables, no files, no machine's metadata."""
    for name in (*ROLE, "AWS_PROFILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    signature._role.cache_clear()
    yield
    signature._role.cache_clear()


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ROLE.items():
        monkeypatch.setenv(name, value)


def outgoing(model: str, *, stream: bool = False) -> Outgoing:
    row = ROW.model_copy(update={"api_key": None})
    body = {"model": "asked", "messages": [{"role": "user", "content": "Grüß Gott"}], "stream": stream}
    return DIALECT.request(Call("chat", body), Deployment(row, model), None)


def by_botocore(model: str, *, stream: bool) -> Any:
    """What botocore's own client would have sent."""
    client = Session().create_client("bedrock-runtime", region_name=REGION)
    sent: list[Any] = []

    def caught(request: Any, **_: Any) -> AWSResponse:
        sent.append(request)
        return AWSResponse(request.url, 418, {}, None)

    client.meta.events.register("before-send", caught)
    ask = client.converse_stream if stream else client.converse
    with pytest.raises(Exception):  # noqa: B017 whatever it makes of a teapot
        ask(modelId=model, messages=[{"role": "user", "content": [{"text": "Grüß Gott"}]}])
    return sent[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", MODELS)
async def test_it_is_what_botocores_client_would_send(
    role: None, monkeypatch: pytest.MonkeyPatch, model: str, stream: bool
) -> None:
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: NOW)
    ours, theirs = outgoing(model, stream=stream), by_botocore(model, stream=stream)
    assert ours.url == theirs.url
    assert httpx.URL(ours.url).raw_path.decode() in theirs.url, "and httpx leaves it as it is"
    assert json.loads(ours.content) == json.loads(theirs.body)
    given = {name: value.decode() if isinstance(value, bytes) else value for name, value in theirs.headers.items()}
    names = given["Authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    added = {"host", "x-amz-date", "x-amz-security-token"}
    alike = {name: value for name, value in given.items() if name.lower() in set(names) - added}
    signed = await signature.signed(Outgoing(theirs.url, alike, theirs.body, region=REGION))
    assert signed["Authorization"] == given["Authorization"]
    assert signed["X-Amz-Security-Token"] == ROLE["AWS_SESSION_TOKEN"]


async def test_all_that_is_sent_is_signed(role: None) -> None:
    signed = await signature.signed(outgoing(MODELS[0]))
    assert signed["content-type"] == "application/json"
    scope = f"Credential=AKIDEXAMPLE/{signed['X-Amz-Date'][:8]}/{REGION}/bedrock/aws4_request"
    names = "SignedHeaders=content-type;host;x-amz-date;x-amz-security-token"
    assert signed["Authorization"].startswith(f"AWS4-HMAC-SHA256 {scope}, {names}, Signature=")
    assert ROLE["AWS_SECRET_ACCESS_KEY"] not in str(signed)


async def test_without_a_role_the_gateway_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProviderError) as caught:
        await signature.signed(outgoing(MODELS[0]))
    assert caught.value.fault == "auth"
    for name, value in ROLE.items():
        monkeypatch.setenv(name, value)
    assert "Authorization" in await signature.signed(outgoing(MODELS[0])), "it is looked for again"


class Metadata(BaseHTTPRequestHandler):
    """What a container, or a function that was restored, asks for its role's keys: new ones each time."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        soon = datetime.now(UTC) + timedelta(seconds=60)  # botocore renews ten minutes before
        keys = {"AccessKeyId": f"AKID{self.asked}", "SecretAccessKey": "s", "Token": "t"}
        body = json.dumps({**keys, "Expiration": soon.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


async def test_keys_that_expire_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_port}/keys")
        used = [(await signature.signed(outgoing(MODELS[0])))["Authorization"] for _ in range(2)]
        server.shutdown()
    first, second = (each.partition("Credential=")[2].partition("/")[0] for each in used)
    assert first != second


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "gateway.toml"
    path.write_text("[providers.bedrock]\nenabled = true\n")
    return str(path)


async def ask(kit: Kit, **more: Any) -> Any:
    key = (await kit.keys.create(VirtualKey("", "", "test")))[1]
    body = {"model": "bedrock/amazon.nova-lite-v1:0", "messages": [{"role": "user", "content": "hi"}], **more}
    return await kit.ask(key, body)


async def test_the_gateway_signs_what_it_sends_by_role(role: None, config: str, tmp_path: Path) -> None:
    said = event("contentBlockDelta", contentBlockIndex=0, delta={"text": "ho"})
    end = event("messageStop", stopReason="end_turn")
    store = SQLiteStore(str(tmp_path / "test.db"))
    kit = Kit(store, lambda _: streamed(said, end), {"AWS_REGION": "us-west-2"}, config)
    outcome = await ask(kit, stream=True)
    (request,) = kit.requests
    assert outcome.text == "ho"
    assert request.url.host == "bedrock-runtime.us-west-2.amazonaws.com"
    assert request.url.raw_path == b"/model/amazon.nova-lite-v1%3A0/converse-stream"
    assert "/us-west-2/bedrock/aws4_request" in request.headers["authorization"]
    assert request.headers["x-amz-security-token"] == ROLE["AWS_SESSION_TOKEN"]
    await store.close()


async def test_with_a_key_nothing_is_signed(role: None, config: str, tmp_path: Path) -> None:
    body = {"output": {"message": {"role": "assistant", "content": [{"text": "ho"}]}}, "stopReason": "end_turn"}
    store = SQLiteStore(str(tmp_path / "test.db"))
    kit = Kit(store, lambda _: whole(body), {"BEDROCK_API_KEY": "bedrock-api-key-1"}, config)
    outcome = await ask(kit)
    (request,) = kit.requests
    assert outcome.chunks[0]["choices"][0]["message"]["content"] == "ho"
    assert request.headers["authorization"] == "Bearer bedrock-api-key-1"
    assert not [name for name in request.headers if name.startswith("x-amz")]
    await store.close()
