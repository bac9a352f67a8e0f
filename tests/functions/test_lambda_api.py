"""The function that answers whole: Mangum before the same app, called as the managed runtime calls it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functions import api
from functions.api import Handler
from shared.keys import Keys
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.apigateway import buffered, headers_of, rest_event, url_event
from tests.server import PEPPER, PROVIDER_KEY

Ask = Callable[..., Any]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "DATABASE_URL": f"sqlite:///{tmp_path}/lightrail.db",
        "LR_KEY_PEPPER": PEPPER,
        "OPENAI_API_KEY": PROVIDER_KEY,
        "CORS_ORIGINS": "https://page.example",
        "MAX_BODY_BYTES": "4194304",
        "AWS_LAMBDA_FUNCTION_NAME": "lightrail-test-api",
    }


@pytest.fixture
def handler(environ: dict[str, str]) -> Iterator[Handler]:
    made = Handler(environ)
    yield made
    made.close()


@pytest.fixture
def key(environ: dict[str, str]) -> str:
    """An administrator's."""

    async def create() -> str:
        store = SQLiteStore(environ["DATABASE_URL"].removeprefix("sqlite:///"))
        _, key = await Keys(store, PEPPER).create(VirtualKey("", "", "root", "admin"))
        await store.close()
        return key

    return asyncio.run(create())


@pytest.fixture
def ask(handler: Handler, key: str) -> Ask:
    """`ask(method, path, body)`: status, headers and JSON, through API Gateway's rules for whole answers."""

    def asked(method: str, path: str, body: Any = None, *more: tuple[str, str]) -> tuple[int, dict[str, str], Any]:
        headers = [("Authorization", f"Bearer {key}"), ("Content-Type", "application/json"), ("Host", "gw"), *more]
        said = handler(rest_event(method, path, headers, b"" if body is None else json.dumps(body).encode()), None)
        head, _, text = buffered(said).partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), found, json.loads(text) if text[:1] in (b"{", b"[") else text

    return asked


def test_the_function_that_lambda_names_is_there():
    assert callable(api.handler)


def test_it_answers_with_envelope_and_errors_as_everywhere(ask: Ask):
    status, headers, body = ask("GET", "/health")
    assert (status, body["status"]) == (200, "ok")
    assert headers["cache-control"] == "no-store"
    assert headers["x-request-id"].startswith("req-")
    status, _, body = ask("GET", "/v1/nothing")
    assert (status, body["error"]["code"]) == (404, "unknown_url")
    status, headers, body = ask("DELETE", "/v1/models")
    assert (status, headers["allow"], body["error"]["code"]) == (405, "GET, HEAD", "method_not_allowed")


def test_one_process_answers_many(ask: Ask):
    status, _, made = ask("POST", "/admin/keys", {"name": "ada", "rpm": 60})
    assert status == 201
    status, _, listed = ask("GET", "/admin/keys")
    assert status == 200
    assert made["id"] in [key["id"] for key in listed["data"]]
    status, _, changed = ask("PATCH", f"/admin/keys/{made['id']}", {"enabled": False})
    assert (status, changed["enabled"]) == (200, False)


def test_paths_with_slashes_and_queries_arrive_whole(ask: Ask):
    status, _, model = ask("GET", "/prod/v1/models/openai/gpt-4o-mini")
    assert (status, model["id"]) == (200, "openai/gpt-4o-mini")
    status, _, refused = ask("GET", "/prod/v1/generation?id=gen-a%26b&other=1")
    assert (status, refused["error"]["code"]) == (404, "not_found")


def test_a_path_is_decoded_once_and_a_slash_at_its_end_is_another_path(ask: Ask):
    status, _, model = ask("GET", "/v1/models/openai%2Fgpt-4o-mini")
    assert (status, model["id"]) == (200, "openai/gpt-4o-mini")
    status, _, refused = ask("GET", "/v1/models/openai%252Fgpt-4o-mini")
    assert status == 404
    assert "openai%2Fgpt-4o-mini" in refused["error"]["message"]
    status, _, refused = ask("GET", "/v1/key/")
    assert (status, refused["error"]["code"]) == (404, "unknown_url")


def test_no_answer_has_a_header_that_the_edge_would_rename_or_drop(ask: Ask):
    for method, path in (("GET", "/health"), ("GET", "/v1/key"), ("GET", "/nowhere"), ("PUT", "/v1/key"), ("GET", "/")):
        _, headers, _ = ask(method, path)
        assert not [name for name in headers if name.startswith("x-amzn-remapped-")]
        assert "x-request-id" in headers


def test_a_body_that_is_no_text_reaches_the_app_as_it_is(handler: Handler, key: str):
    headers = [("Authorization", f"Bearer {key}"), ("Content-Type", "application/json")]
    said = handler(rest_event("POST", "/admin/keys", headers, b'{"name": "\xff"}'), None)
    assert said["statusCode"] == 400


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"statusCode": 200, "body": "x"}, 200),
        ({"statusCode": "200", "body": "x"}, 502),
        ({"statusCode": 200, "body": {"not": "text"}}, 502),
        ({"statusCode": 200, "headers": {"x": 1}}, 502),
        ({"statusCode": 200, "cookies": ["a=1"]}, 502),
        ({"statusCode": 200, "body": "%", "isBase64Encoded": True}, 502),
        ({"statusCode": 200, "body": "x" * 7_000_000}, 502),
        (None, 502),
    ],
)
def test_the_stand_in_takes_what_the_edge_takes(answer: Any, status: int):
    assert buffered(answer).startswith(f"HTTP/1.1 {status} ".encode())


def test_the_stand_in_renames_and_drops_what_the_edge_does():
    headers = {"WWW-Authenticate": "Bearer", "Transfer-Encoding": "chunked", "date": "now", "x-other": "1"}
    assert headers_of({"headers": headers}) == [
        ("x-amzn-Remapped-WWW-Authenticate", "Bearer"),
        ("x-amzn-Remapped-date", "now"),
        ("x-other", "1"),
    ]


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/chat%2Fcompletions", "/v1/{proxy+}"),
        ("/v1", "/v1"),
        ("/v1/", "/v1"),
        ("/chat", "/{proxy+}"),
        ("/", "/"),
    ],
)
def test_the_stand_in_finds_the_route_that_says_most(path: str, route: str):
    assert rest_event("GET", path, [])["resource"] == route
    assert rest_event("GET", path, [])["path"] == path


def test_a_page_of_another_origin_may_ask(ask: Ask):
    origin = ("Origin", "https://page.example")
    status, headers, _ = ask("OPTIONS", "/v1/models", None, origin, ("Access-Control-Request-Method", "GET"))
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")


def test_a_function_urls_event_is_answered_too(handler: Handler):
    said = handler(url_event("GET", "/health", [("Accept", "text/plain")]), None)
    assert (said["statusCode"], said["body"]) == (200, "Lightrail AI Gateway is healthy\n")


def test_two_authorization_headers_are_not_taken_for_one(handler: Handler, key: str):
    twice = [("Authorization", f"Bearer {key}")] * 2
    said = handler(rest_event("GET", "/v1/models", twice), None)
    assert said["statusCode"] == 401
    assert "More than one" in json.loads(said["body"])["error"]["message"]


def test_a_body_in_base64_is_decoded(handler: Handler, key: str):
    event = rest_event("POST", "/admin/keys", [("Authorization", f"Bearer {key}")])
    event |= {"body": base64.b64encode(b'{"name": "ada"}').decode(), "isBase64Encoded": True}
    assert handler(event, None)["statusCode"] == 201


@pytest.mark.parametrize("event", [{}, {"source": "aws.events"}, [], None, "ping"])
def test_an_event_that_is_no_request_does_no_harm(handler: Handler, event: Any):
    assert handler(event, None) == {}


@pytest.mark.parametrize(
    "event",
    [
        {"requestContext": {}},
        {"requestContext": {}, "version": "2.0"},
        {**rest_event("POST", "/admin/keys", []), "body": "%%%", "isBase64Encoded": True},
        {**rest_event("POST", "/admin/keys", []), "body": 5},
    ],
    ids=["empty", "empty-url", "base64", "number"],
)
def test_a_malformed_event_is_a_400_and_the_next_is_answered(handler: Handler, event: Any):
    said = handler(event, None)
    assert said["statusCode"] == 400
    assert set(json.loads(said["body"])["error"]) == {"message", "type", "param", "code"}
    assert buffered(said).startswith(b"HTTP/1.1 400")
    assert handler(rest_event("GET", "/health", []), None)["statusCode"] == 200


def test_a_body_as_large_as_events_may_be_is_a_413(ask: Ask):
    status, _, body = ask("POST", "/admin/keys", {"name": "x" * 5_900_000})
    assert (status, body["error"]["code"]) == (413, "body_too_large")


def test_settings_that_are_wrong_fail_the_start(environ: dict[str, str]):
    with pytest.raises(ValueError, match="DATABASE_URL must be"):
        Handler({**environ, "DATABASE_URL": "mongodb://nowhere"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat%2Fcompletions", "/embeddings"])
def test_no_spelling_of_a_model_route_is_answered_here(handler: Handler, key: str, path: str):
    headers = [("Authorization", f"Bearer {key}"), ("Content-Type", "application/json"), ("Host", "gw")]
    told = handler(rest_event("POST", path, headers, b'{"model": "openai/gpt-4o-mini", "messages": []}'), None)
    assert told["statusCode"] == 404
    assert json.loads(told["body"])["error"]["code"] == "unknown_url"


def test_a_method_that_is_no_text_is_a_bad_request(handler: Handler):
    told = handler({**rest_event("GET", "/health", [("Host", "gw")]), "httpMethod": {"a": 1}}, None)
    assert told["statusCode"] == 400
