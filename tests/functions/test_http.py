"""HTTP as every route speaks it: paths, methods, bodies, headers, origins, and the document that describes it all."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.functions.doors import MODEL, Door, opened, refusal
from tests.server import ADMIN_KEY, PROVIDER_KEY
from tests.upstream import Upstream, answer, echo, error, sleep, stream

HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT = {"model": MODEL, "messages": HELLO}
COMPLETION = {"model": "openai/gpt-3.5-turbo-instruct", "prompt": "hello"}
EMBEDDING = {"model": "openai/text-embedding-3-small", "input": "hello"}
ROUTES = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions", COMPLETION),
    ("POST", "/v1/embeddings", EMBEDDING),
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/{MODEL}", None),
    ("GET", "/v1/capabilities", None),
    ("GET", "/v1/key", None),
]
ORIGIN = "https://chat.example"


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_v1_may_be_left_out(door: Door, method: str, path: str, body: Any) -> None:
    key = (await door.make())["key"]
    long, short = [await door.ask(method, each, body, key) for each in (path, path.removeprefix("/v1"))]
    assert (long.status_code, short.status_code) == (200, 200)
    assert long.json().keys() == short.json().keys()
    if method == "POST":
        assert short.json()["id"].startswith("gen-")
        assert short.headers["x-request-id"] == short.json()["id"]
        for path_of_record in ("/generation", "/v1/generation"):
            record = await door.ask("GET", f"{path_of_record}?id={short.json()['id']}", key=key)
            assert record.json()["status"] == "ok"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models"),
        ("GET", "/v1"),
        ("GET", "/v1/v1/models"),
        ("GET", "/v1/models_"),
        ("POST", "/v1/chat/completions/"),
        ("GET", "/v1/admin/keys"),
        ("GET", "/admin"),
        ("GET", "/admin/keys/a/b"),
        ("GET", "/v1/health"),
        ("GET", "/openapi.json/"),
        ("GET", "/docs"),
    ],
)
async def test_an_unknown_path_is_404(door: Door, method: str, path: str) -> None:
    assert refusal(await door.ask(method, path)) == (404, "unknown_url", None)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/chat/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/openai/gpt-4o", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/openapi.json", "GET, HEAD"),
        ("DELETE", "/admin/keys", "GET, HEAD, POST"),
        ("POST", "/admin/keys/some", "GET, HEAD, PATCH, DELETE"),
        ("GET", "/admin/keys/some/rotate", "POST"),
        ("OPTIONS", "/v1/key", "GET, HEAD"),
        ("BREW", "/v1/key", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_and_told_the_right_ones(door: Door, method: str, path: str, allowed: str) -> None:
    refused = await door.ask(method, path)
    assert refusal(refused) == (405, "method_not_allowed", None)
    assert refused.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/v1/models", "/openapi.json"])
async def test_head_is_get_without_the_body(door: Door, path: str) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    got, head = [await door.client.request(method, path, headers=headers) for method in ("GET", "HEAD")]
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"] != "0"


async def test_a_refusal_of_head_has_no_body_either(door: Door) -> None:
    for path, status in (("/v1/chat/completions", 405), ("/v1/models", 401), ("/nowhere", 404)):
        refused = await door.client.head(path)
        assert (refused.status_code, refused.content) == (status, b"")


@pytest.fixture
async def narrow(tmp_path: Path, provider: Upstream) -> AsyncIterator[Door]:
    async with opened(tmp_path, provider.url, MAX_BODY_BYTES="2000") as door:
        yield door


def padded(body: dict[str, Any], length: int) -> bytes:
    text = httpx.Request("POST", "http://gw", json=body).content
    return text + b" " * (length - len(text))


@pytest.mark.parametrize(("method", "path", "body"), [*ROUTES[:3], ("POST", "/admin/keys", {"name": "x"})])
async def test_a_body_over_the_limit_is_413_with_and_without_a_length(
    narrow: Door, provider: Upstream, method: str, path: str, body: Any
) -> None:
    async def pieces(data: bytes) -> AsyncIterator[bytes]:
        for at in range(0, len(data), 700):
            yield data[at : at + 700]

    headers = {"authorization": f"Bearer {ADMIN_KEY}", "content-type": "application/json"}
    for content in (padded(body, 2001), pieces(padded(body, 2001))):
        refused = await narrow.client.request(method, path, content=content, headers=headers)
        assert refusal(refused) == (413, "body_too_large", None)
        assert "2000 bytes" in refused.json()["error"]["message"]
    assert provider.seen == []
    for content in (padded(body, 2000), pieces(padded(body, 2000))):
        taken = await narrow.client.request(method, path, content=content, headers=headers)
        assert taken.status_code in (200, 201)


async def test_an_over_long_body_is_refused_by_its_header_before_it_is_read_or_the_key_looked_at(narrow: Door) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"content-length": "2001", "content-type": "application/json", "authorization": "Bearer nonsense"}
    refused = await narrow.client.post("/v1/chat/completions", content=never(), headers=headers)
    assert refusal(refused) == (413, "body_too_large", None)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON;charset=UTF-8", 200),
        ("application/vnd.api+json", 200),
        (None, 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
async def test_a_body_is_json_or_says_nothing(door: Door, content_type: str | None, status: int) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    if content_type is not None:
        headers["content-type"] = content_type
    answered = await door.client.post("/v1/chat/completions", content=padded(CHAT, 0), headers=headers)
    assert answered.status_code == status, answered.text
    if status == 415:
        assert refusal(answered) == (415, "unsupported_content_type", None)


async def test_a_body_is_utf_8_whatever_its_charset_says(door: Door) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}", "content-type": "application/json; charset=iso-8859-1"}
    said = json.dumps({**CHAT, "messages": [{"role": "user", "content": "größer"}]}, ensure_ascii=False)
    answered = await door.client.post("/v1/chat/completions", content=said.encode(), headers=headers)
    assert answered.json()["choices"][0]["message"]["content"] == "größer"
    refused = await door.client.post("/v1/chat/completions", content=said.encode("latin-1"), headers=headers)
    assert refusal(refused) == (400, None, None)


async def answers_of_every_kind(door: Door, provider: Upstream) -> dict[str, httpx.Response]:
    poor = (await door.make(balance_usd=0))["key"]
    disabled = (await door.make(enabled=False))["key"]
    provider.always("fails", answer(500, error("no")))
    provider.always("breaks", stream({"choices": [{"index": 0, "delta": {"content": "hal"}}]}, end=False))
    return {
        "chat": await door.chat(),
        "stream": await door.chat(stream=True),
        "embedding": await door.ask("POST", "/v1/embeddings", EMBEDDING),
        "models": await door.ask("GET", "/v1/models"),
        "created": await door.ask("POST", "/admin/keys", {"name": "x"}),
        "usage": await door.ask("GET", "/admin/usage"),
        "health": await door.ask("GET", "/health", key=None),
        "health in text": await door.ask("GET", "/health", key=None, accept="text/plain"),
        "root": await door.ask("GET", "/", key=None),
        "openapi": await door.ask("GET", "/openapi.json", key=None),
        "400": await door.chat(temperature=9),
        "401": await door.chat(None),
        "403": await door.chat(disabled),
        "403 at admission": await door.chat(poor),
        "404": await door.ask("GET", "/nowhere"),
        "404 model": await door.chat(model="nothing"),
        "405": await door.ask("DELETE", "/health"),
        "415": await door.client.post("/v1/embeddings", content=b"x", headers={"content-type": "text/plain", **ADMIN}),
        "502": await door.chat(model="openai/fails"),
        "502 before the stream": await door.chat(model="openai/fails", stream=True),
    }


ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
KINDS_OF_ID = {"chat": "gen-", "stream": "gen-", "embedding": "gen-", "502": "gen-", "502 before the stream": "gen-"}


async def test_every_answer_has_its_time_its_id_and_is_never_cached(door: Door, provider: Upstream) -> None:
    ids = set[str]()
    for kind, answered in (await answers_of_every_kind(door, provider)).items():
        headers = answered.headers
        asked_a_model = kind in KINDS_OF_ID
        timing = r"gateway;dur=\d+\.\d\d" + (r", upstream;dur=\d+\.\d\d" if asked_a_model else "")
        assert re.fullmatch(timing, headers["server-timing"]), kind
        assert re.fullmatch(r"(gen|req)-[0-9A-Za-z]{16}", headers["x-request-id"]), kind
        assert headers["x-request-id"].startswith(KINDS_OF_ID.get(kind, "")), kind
        assert headers.get_list("cache-control") == ["no-store"], kind
        assert len(headers.get_list("x-request-id")) == 1, kind
        ids.add(headers["x-request-id"])
        if kind[0] in "45":
            assert answered.headers["content-type"] == "application/json", kind
            assert int(kind[:3]) == refusal(answered)[0], kind
        if asked_a_model:
            assert headers["x-lightrail-provider"] == "openai", kind
            assert headers["x-lightrail-attempts"] == ("2" if kind.startswith("502") else "1"), kind
            assert headers["x-lightrail-cache"] == "off", kind
    assert len(ids) == 20


async def test_time_spent_upstream_is_told_apart_from_our_own(door: Door, provider: Upstream) -> None:
    provider.next(sleep(0.3), echo())
    timing = (await door.chat()).headers["server-timing"]
    gateway, upstream = (float(each) for each in re.findall(r"dur=([\d.]+)", timing))
    assert gateway < 250
    assert 300 <= upstream < 1500


MANY = [f"unknown_{number:04}" for number in range(1000)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["seed", "x\r\nset-cookie: a=b"], "seed, x%0D%0Aset-cookie%3A%20a%3Db"),
        (["é☃"], "%C3%A9%E2%98%83"),
        (["a" * 300_000, "b"], "a" * 64 + "..., b"),
        (MANY, ", ".join(MANY[:71]) + ", ..."),
    ],
    ids=["line-ends", "letters", "long", "many"],
)
async def test_what_was_dropped_is_told_in_a_header_whatever_it_is_called(
    tmp_path: Path, provider: Upstream, names: list[str], told: str, stream: bool
) -> None:
    row = f"[providers.lab]\nbase_url = '{provider.url}'\ndrops = {json.dumps(names)}\n"
    (tmp_path / "gateway.toml").write_text(row, "utf-8")
    async with opened(tmp_path, provider.url, LAB_API_KEY=PROVIDER_KEY) as door:
        answer = await door.chat(model="lab/llama", stream=stream, **dict.fromkeys(names, 1))
        assert answer.status_code == 200
        assert answer.headers["x-lightrail-dropped"] == told
        body = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
        assert body["lightrail"]["dropped"] == sorted(names)
        record = await door.ask("GET", f"/v1/generation?id={body['id']}")
        assert len(record.content) < 20_000, "a record is to fit into the table"


async def test_limits_left_are_told_as_openai_tells_them(door: Door) -> None:
    key = (await door.make(rpm=7, tpm=100_000))["key"]
    headers = (await door.chat(key, max_tokens=10)).headers
    assert headers["x-ratelimit-limit-requests"] == "7"
    assert headers["x-ratelimit-remaining-requests"] == "6"
    assert headers["x-ratelimit-limit-tokens"] == "100000"
    assert 90_000 < int(headers["x-ratelimit-remaining-tokens"]) < 99_990
    for kind in ("requests", "tokens"):
        assert re.fullmatch(r"([1-9]|[1-5]\d|60)s", headers[f"x-ratelimit-reset-{kind}"])


@pytest.fixture
async def shared(tmp_path: Path, provider: Upstream) -> AsyncIterator[Door]:
    """A gateway that pages from two origins may call."""
    async with opened(tmp_path, provider.url, CORS_ORIGINS=f"{ORIGIN}, https://console.example") as door:
        yield door


async def test_no_page_may_call_unless_its_origin_is_set(door: Door) -> None:
    answered = await door.ask("GET", "/v1/models", origin=ORIGIN)
    assert answered.status_code == 200
    preflight = await door.ask("OPTIONS", "/v1/models", key=None, origin=ORIGIN, access_control_request_method="GET")
    assert preflight.status_code == 405
    for each in (answered, preflight):
        assert not any(name.startswith("access-control") for name in each.headers)


async def test_a_preflight_of_a_set_origin_is_answered_without_a_key(shared: Door) -> None:
    for method, path in (("POST", "/v1/chat/completions"), ("PATCH", "/admin/keys/x"), ("DELETE", "/admin/keys/x")):
        preflight = await shared.ask(
            "OPTIONS",
            path,
            key=None,
            origin=ORIGIN,
            access_control_request_method=method,
            access_control_request_headers="authorization,content-type,x-stainless-lang",
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert method in preflight.headers["access-control-allow-methods"]
        allowed = preflight.headers["access-control-allow-headers"].lower()
        assert {"authorization", "content-type", "x-stainless-lang"} <= {each.strip() for each in allowed.split(",")}
        assert "access-control-allow-credentials" not in preflight.headers


async def test_a_page_of_a_set_origin_may_read_answers_errors_and_streams_and_their_headers(
    shared: Door, provider: Upstream
) -> None:
    provider.always("fails", answer(500, error("no")))
    provider.always("breaks", stream({"choices": [{"index": 0, "delta": {"content": "hal"}}]}))
    key = (await shared.make(rpm=100, tpm=1_000_000))["key"]
    common = {"x-request-id", "server-timing"}
    answered = common | {f"x-lightrail-{name}" for name in ("provider", "model", "attempts", "cache")}
    answered |= {
        f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
    }
    for body, auth, expected in (
        (CHAT, key, answered),
        ({**CHAT, "logit_bias": {"1": 1}, "model": "openai/o3"}, key, answered | {"x-lightrail-dropped"}),
        ({**CHAT, "stream": True}, key, answered),
        ({**CHAT, "model": "openai/fails"}, key, answered),
        ({**CHAT, "model": "openai/breaks", "stream": True}, key, answered),
        ({**CHAT, "n": 0}, key, common),
        (CHAT, "nonsense", common),
    ):
        each = await shared.ask("POST", "/v1/chat/completions", body, auth, origin=ORIGIN)
        assert each.headers["access-control-allow-origin"] == ORIGIN, each.text
        exposed = {name.strip() for name in each.headers["access-control-expose-headers"].split(",")}
        assert expected <= set(each.headers) & exposed, (body, each.text)
        ours = {name for name in each.headers if name.startswith(("x-lightrail-", "x-ratelimit-"))}
        assert ours <= exposed
    for path in ("/nowhere", "/health", "/admin/usage"):
        assert (await shared.ask("GET", path, origin=ORIGIN)).headers["access-control-allow-origin"] == ORIGIN


async def test_another_origin_is_given_nothing(shared: Door) -> None:
    answered = await shared.ask("GET", "/v1/models", origin="https://evil.example")
    assert "access-control-allow-origin" not in answered.headers
    assert answered.headers["vary"].lower() == "origin"


async def test_any_origin_may_be_let_in_by_a_star(tmp_path: Path, provider: Upstream) -> None:
    async with opened(tmp_path, provider.url, CORS_ORIGINS="*") as door:
        answered = await door.chat(None)
        assert answered.status_code == 401
        assert (await door.ask("GET", "/v1/models", origin=ORIGIN)).headers["access-control-allow-origin"] == "*"


async def test_root_and_health_say_who_is_there(door: Door) -> None:
    root = await door.ask("GET", "/", key=None)
    assert root.json() == {"name": "Lightrail", "version": door.app.version, "docs": "/openapi.json"}
    await door.chat()
    health = (await door.ask("GET", "/health", key=None)).json()
    assert 0 <= health.pop("uptime_secs") < 60
    assert health == {
        "status": "ok",
        "version": door.app.version,
        "active_providers": ["openai"],
        "provider_count": 1,
        "total_requests": 1,
        "backends_available": 1,
    }


async def test_health_is_one_line_of_text_where_text_is_asked_for(door: Door) -> None:
    health = await door.ask("GET", "/health", key=None, accept="text/plain")
    assert health.headers["content-type"].startswith("text/plain")
    assert re.fullmatch(r"\S[^\n]+\n", health.text)
    either = await door.ask("GET", "/health", key=None, accept="application/json, text/plain, */*")
    assert either.json()["status"] == "ok"


# The document ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def document(door: Door) -> Any:
    return (await door.ask("GET", "/openapi.json", key=None)).json()


async def test_the_document_is_valid_openapi(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()


async def test_it_names_every_route_that_there_is_and_no_other(door: Door, document: Any) -> None:
    there = {
        (method.lower(), route.path.replace(":path", ""))
        for router in door.app.routes
        for route in (router.effective_route_contexts() if hasattr(router, "effective_route_contexts") else [router])
        for method in route.methods
    }
    named = {(method, path) for path, operations in document["paths"].items() for method in operations}
    shortened = {(method, path.removeprefix("/v1")) for method, path in named if path.startswith("/v1/")}
    assert there == named | shortened | {("get", "/openapi.json"), ("head", "/openapi.json")}
    assert len({each["operationId"] for path in document["paths"].values() for each in path.values()}) == len(named)


async def test_it_says_which_routes_need_no_key(door: Door, document: Any) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            status = (await door.ask(method.upper(), path.replace("{", "").replace("}", ""), key=None)).status_code
            assert (status == 401) is (operation.get("security", document["security"]) == [{"key": []}]), path


def conforms(document: Any, value: Any, name: str) -> None:
    """Raises where a value is not as the document's schema of this name says."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def shape(document: Any, path: str, of: str) -> str:
    """The name of the schema of what a route takes, or answers."""
    operation = document["paths"][path]["post"]
    given = operation["requestBody"] if of == "request" else operation["responses"][of]
    return given["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 2, "logit_bias": {"1": 1}}),
        ("/v1/completions", COMPLETION),
        ("/v1/completions", {**COMPLETION, "model": MODEL}),
        ("/v1/embeddings", EMBEDDING),
        ("/v1/embeddings", {**EMBEDDING, "encoding_format": "base64"}),
    ],
)
async def test_answers_are_as_the_document_says(door: Door, document: Any, path: str, body: Any) -> None:
    answered = await door.ask("POST", path, body)
    assert answered.status_code == 200
    conforms(document, body, shape(document, path, "request"))
    conforms(document, answered.json(), shape(document, path, "200"))
    with pytest.raises(jsonschema.ValidationError):
        conforms(document, {**answered.json(), "usage": "much"}, shape(document, path, "200"))


async def test_errors_are_as_the_document_says(door: Door, provider: Upstream, document: Any) -> None:
    for kind, answered in (await answers_of_every_kind(door, provider)).items():
        if kind[0] in "45":
            conforms(document, answered.json(), "Error")
    for path, operations in document["paths"].items():
        for operation in operations.values():
            refused = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert refused == {"$ref": "#/components/schemas/Error"}, path
            assert "422" not in operation["responses"]


async def test_a_tool_call_is_as_the_document_says(door: Door, provider: Upstream, document: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    provider.next(answer(200, {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}))
    answered = (await door.chat()).json()
    assert answered["choices"][0]["message"]["tool_calls"] == [call]
    conforms(document, answered, "ChatCompletion")


async def test_what_openais_client_sends_is_as_the_document_says(door: Door, provider: Upstream, document: Any) -> None:
    sent: list[Any] = []

    async def noted(request: httpx.Request) -> None:
        sent.append(json.loads(request.content))

    http = httpx.AsyncClient(transport=httpx.ASGITransport(door.app), event_hooks={"request": [noted]}, trust_env=False)
    client = openai.AsyncOpenAI(api_key=ADMIN_KEY, base_url="http://gw/v1", http_client=http, max_retries=0)
    async with client:
        await client.chat.completions.create(model=MODEL, messages=HELLO)
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True}}
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        messages: Any = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hello"}, picture]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ]
        form: Any = {"type": "json_schema", "json_schema": {"name": "said", "schema": {"type": "object"}}}
        await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=[tool],  # type: ignore[list-item]
            tool_choice="auto",
            parallel_tool_calls=True,
            response_format=form,
            temperature=0.5,
            top_p=1,
            n=1,
            stop=["\n"],
            seed=7,
            logprobs=True,
            top_logprobs=3,
            max_completion_tokens=50,
            metadata={"a": "b"},
            user="user-7",
        )
        options: Any = {"include_usage": True}
        async for _ in await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options=options
        ):
            pass
        await client.completions.create(model=COMPLETION["model"], prompt=["hello"], max_tokens=5, echo=False)
        await client.embeddings.create(model=EMBEDDING["model"], input=["hello", "you"], dimensions=3)
        await client.embeddings.create(model=EMBEDDING["model"], input=[[1, 2], [3]])
    names = [*(["ChatRequest"] * 3), "CompletionRequest", *(["EmbeddingRequest"] * 2)]
    assert {shape(document, path, "request") for _, path, body in ROUTES if body} == set(names)
    for body, name in zip(sent, names, strict=True):
        conforms(document, body, name)
        with pytest.raises(jsonschema.ValidationError):
            conforms(document, {**body, "model": 5}, name)


async def test_keys_are_made_and_changed_as_the_document_says(document: Any) -> None:
    conforms(document, {"name": "ada", "models": ["a"], "rpm": None, "balance_usd": 1.5}, "KeyRequest")
    conforms(document, {"rpm": 5}, "KeyPatch")
    for wrong in ({}, {"name": "ada", "budget": 5}, {"name": "ada", "role": "root"}, {"name": "ada", "rpm": "5"}):
        with pytest.raises(jsonschema.ValidationError):
            conforms(document, wrong, "KeyRequest")


async def test_a_stream_is_server_sent_events_that_no_proxy_holds_back(door: Door) -> None:
    streamed = await door.chat(stream=True)
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert streamed.headers["x-accel-buffering"] == "no"
    assert streamed.text.endswith("data: [DONE]\n\n")
