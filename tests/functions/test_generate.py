"""`POST /generate`: a prompt in, text out; failover in order, one provider by name, a cache that tells them apart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.functions.doors import Door, opened, refusal
from tests.server import PROVIDER_KEY
from tests.upstream import Upstream, answer, error, whole


@pytest.fixture
async def google() -> AsyncIterator[Upstream]:
    async with Upstream(header="x-goog-api-key") as google:
        yield google


@pytest.fixture
async def both(tmp_path: Path, provider: Upstream, google: Upstream) -> AsyncIterator[Door]:
    """OpenAI, which echoes, and Gemini, which says what it is told to with `gemini`."""
    accounts = {"GEMINI_API_KEY": "gemini-key-of-the-tests", "GEMINI_BASE_URL": google.url}
    async with opened(tmp_path, provider.url, **accounts) as door:
        yield door


def gemini(text: str) -> Any:
    """https://ai.google.dev/api/generate-content"""
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP", "index": 0}
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 2, "totalTokenCount": 7}
    return answer(200, {"candidates": [candidate], "usageMetadata": usage})


async def test_the_first_provider_answers_and_the_same_prompt_again_is_cached(door: Door, provider: Upstream) -> None:
    made = await door.make(balance_usd=1)
    for cached in (False, True, True):
        answered = await door.ask("POST", "/generate", {"prompt": "What is Rust?"}, made["key"])
        assert answered.status_code == 200
        assert answered.json() == {"provider": "OpenAI", "output": "What is Rust?", "cached": cached}
        assert answered.headers["x-lightrail-cache"] == ("hit" if cached else "miss")
        assert answered.headers["x-request-id"].startswith("gen-")
    assert len(provider.seen) == 1
    record = await door.ask("GET", f"/v1/generation?id={answered.headers['x-request-id']}", key=made["key"])
    assert (record.json()["cached"], record.json()["cost"]["total_cost"]) == (True, 0)
    assert (await door.key(made["id"])).requests == 3


async def test_who_wants_no_cache_says_so(door: Door, provider: Upstream) -> None:
    key = (await door.make())["key"]
    for mode in ("off", "off", "refresh", "on"):
        body = {"prompt": "hello", "cache": {"mode": mode}}
        last = await door.ask("POST", "/generate", body, key)
        assert last.json()["cached"] == (mode == "on")
    assert len(provider.seen) == 3


async def test_what_one_provider_said_is_never_told_as_anothers(
    both: Door, provider: Upstream, google: Upstream
) -> None:
    """The seed's cache was keyed on the prompt alone."""
    key = (await both.make())["key"]
    google.next(gemini("I am Gemini"))
    asked = {"prompt": "Who are you?"}
    said = [
        (await both.ask("POST", "/generate", {**asked, **named}, key)).json()
        for named in ({}, {"provider": "Gemini"}, {"provider": "OpenAI"}, {}, {"provider": "Gemini"})
    ]
    assert [(each["provider"], each["output"], each["cached"]) for each in said] == [
        ("OpenAI", "Who are you?", False),
        ("Gemini", "I am Gemini", False),
        ("OpenAI", "Who are you?", False),
        ("OpenAI", "Who are you?", True),
        ("Gemini", "I am Gemini", True),
    ]
    assert (len(provider.seen), len(google.seen)) == (2, 1)


async def test_another_key_is_not_told_what_this_one_was(door: Door, provider: Upstream) -> None:
    for _ in range(2):
        answered = await door.ask("POST", "/generate", {"prompt": "hello"}, (await door.make())["key"])
        assert answered.json()["cached"] is False
    assert len(provider.seen) == 2


@pytest.mark.parametrize("failure", [answer(429, error("busy")), answer(401, error("key")), answer(200, b"{}")])
async def test_when_openai_fails_gemini_answers(both: Door, provider: Upstream, google: Upstream, failure: Any) -> None:
    provider.always("gpt-4o-mini", failure)
    google.next(gemini("here"))
    key = (await both.make())["key"]
    answered = await both.ask("POST", "/generate", {"prompt": "hello"}, key)
    assert answered.json() == {"provider": "Gemini", "output": "here", "cached": False}
    assert answered.headers["x-lightrail-provider"] == "gemini"
    provider.by_model.clear()
    again = await both.ask("POST", "/generate", {"prompt": "hello"}, key)
    assert again.json() == {"provider": "Gemini", "output": "here", "cached": True}
    assert not google.malformed


async def test_the_provider_key_travels_in_a_header_only(both: Door, google: Upstream) -> None:
    """The seed put it into the URL."""
    google.next(gemini("here"))
    await both.ask("POST", "/generate", {"prompt": "hello", "provider": "gemini"}, (await both.make())["key"])
    [seen] = google.seen
    assert "gemini-key-of-the-tests" not in seen.path + seen.body.decode()
    assert seen.headers["x-goog-api-key"] == "gemini-key-of-the-tests"


@pytest.mark.parametrize("name", ["openai", "OpenAI", "OPENAI", "oPeNaI"])
async def test_a_provider_is_named_in_any_case_and_none_other_answers(
    both: Door, provider: Upstream, google: Upstream, name: str
) -> None:
    key = (await both.make())["key"]
    answered = await both.ask("POST", "/generate", {"prompt": "hello", "provider": name}, key)
    assert answered.json()["provider"] == "OpenAI"
    provider.always("gpt-4o-mini", answer(401, error("no")))
    refused = await both.ask("POST", "/generate", {"prompt": "another", "provider": name}, key)
    assert refusal(refused) == (502, "upstream_auth_error", None)
    assert google.seen == []


@pytest.mark.parametrize("name", ["x", "", "groq", "open ai", "openai/gpt-4o", "__class__", "\u041epenAI"])
async def test_an_unknown_provider_is_told_those_there_are(both: Door, provider: Upstream, name: str) -> None:
    refused = await both.ask("POST", "/generate", {"prompt": "hello", "provider": name}, (await both.make())["key"])
    assert refusal(refused) == (400, "unknown_provider", "provider")
    assert refused.json()["error"]["message"] == f"Provider '{name}' not found. Available: OpenAI, Gemini"
    assert provider.seen == []


STATUSES = [
    (answer(400, error("bad", param="messages", code="x")), 400, "invalid_request_error"),
    (answer(401, error("bad key")), 502, "provider_error"),
    (answer(402, error("no money")), 502, "provider_error"),
    (answer(429, error("slow")), 429, "rate_limit_error"),
    (answer(500, error("oh")), 502, "provider_error"),
    (answer(503, error("busy")), 503, "overloaded_error"),
    (answer(200, b"<html>"), 502, "provider_error"),
]


@pytest.mark.parametrize(("failure", "status", "kind"), STATUSES)
async def test_an_error_has_its_own_status_and_openais_shape(
    door: Door, provider: Upstream, failure: Any, status: int, kind: str
) -> None:
    """The seed answered 500 with a text, whatever it was, the provider's own body within."""
    made = await door.make()
    provider.always("gpt-4o-mini", failure)
    refused = await door.ask("POST", "/generate", {"prompt": "hello"}, made["key"])
    assert refused.status_code == status
    refusal(refused)
    assert refused.json()["error"]["type"] == kind
    assert PROVIDER_KEY not in refused.text
    provider.by_model.clear()
    after = await door.ask("POST", "/generate", {"prompt": "hello"}, made["key"])
    assert after.json().get("cached", False) is False


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "empty_string"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": ["hello"]}, "prompt", "invalid_type"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": "x" * 1_000_001}, "prompt", "string_above_max_length"),
        ({"prompt": "x", "provider": 5}, "provider", "invalid_type"),
        ({"prompt": "x", "provider": ["openai"]}, "provider", "invalid_type"),
        ({"prompt": "x", "provider": "y" * 65}, "provider", "string_above_max_length"),
        ({"prompt": "x", "cache": {"mode": "always"}}, "cache.mode", "invalid_value"),
        ({"prompt": "x", "cache": True}, "cache", "invalid_type"),
    ],
)
async def test_a_wrong_body_is_refused_by_the_field(
    door: Door, provider: Upstream, body: Any, param: str, code: str
) -> None:
    made = await door.make()
    assert refusal(await door.ask("POST", "/generate", body, made["key"])) == (400, code, param)
    assert refusal(await door.ask("POST", "/generate", body, None)) == (401, "invalid_api_key", None)
    assert provider.seen == []


@pytest.mark.parametrize("data", [b"", b"[]", b'"x"', b"{", b"\xff", b'{"prompt": "\\ud800"}'])
async def test_what_is_no_object_of_json_is_refused(door: Door, data: bytes) -> None:
    headers = {"authorization": f"Bearer {(await door.make())['key']}", "content-type": "application/json"}
    refused = await door.client.post("/generate", content=data, headers=headers)
    assert refusal(refused) == (400, None, None)


async def test_a_key_is_held_to_its_models_here_too(both: Door, google: Upstream) -> None:
    key = (await both.make(models=["gemini/*"]))["key"]
    google.next(gemini("here"))
    assert (await both.ask("POST", "/generate", {"prompt": "hello"}, key)).json()["provider"] == "Gemini"
    named = {"prompt": "hello", "provider": "OpenAI"}
    assert refusal(await both.ask("POST", "/generate", named, key))[:2] == (403, "model_not_allowed")


async def test_a_prompt_is_given_as_it_is(door: Door, provider: Upstream) -> None:
    prompt = 'Line\r\n"quoted" \u2028 \x00 {{x}} \U0001f600'
    answered = await door.ask("POST", "/generate", {"prompt": prompt}, (await door.make())["key"])
    assert answered.json()["output"] == prompt
    assert provider.seen[0].json["messages"] == [{"role": "user", "content": prompt}]


async def test_a_refusal_of_the_model_is_its_output(door: Door, provider: Upstream) -> None:
    said = whole("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]})
    said["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I will not."}
    provider.next(answer(200, said))
    answered = await door.ask("POST", "/generate", {"prompt": "hello"}, (await door.make())["key"])
    assert answered.json()["output"] == "I will not."


async def test_a_provider_without_a_default_model_answers_by_its_first(tmp_path: Path, provider: Upstream) -> None:
    (tmp_path / "gateway.toml").write_text(
        f'[providers.lab]\ntitle = "The Lab"\nbase_url = "{provider.url}"\nrequires = []\n'
        '[models]\n"lab/embed" = { capabilities = ["embeddings"] }\n"lab/m" = { capabilities = ["chat"] }\n'
    )
    async with opened(tmp_path, provider.url, OPENAI_API_KEY="", LAB_API_KEY=PROVIDER_KEY) as door:
        key = (await door.make())["key"]
        for name in (None, "lab", "the lab"):
            answered = await door.ask("POST", "/generate", {"prompt": "hello", "provider": name}, key)
            assert answered.json()["provider"] == "The Lab"
        assert provider.seen[0].json["model"] == "m"


async def test_without_a_provider_it_says_what_to_do(tmp_path: Path, provider: Upstream) -> None:
    async with opened(tmp_path, provider.url, OPENAI_API_KEY="") as door:
        assert refusal(await door.ask("POST", "/generate", {"prompt": "x"}, (await door.make())["key"]))[:2] == (
            503,
            "no_provider",
        )
