"""One request, start to finish: who may ask, who answers, what it costs, whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.errors import Forbidden, GatewayError, ModelNotFound, TooLargeForLimit, UnsupportedParameter
from shared.schema import parse
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.kit import Body, Kit, streamed, whole

ENVIRON = {
    "OPENAI_API_KEY": "sk-test-openai-key",
    "GROQ_API_KEY": "gsk-test-groq-key",
    "OLLAMA_BASE_URL": "http://127.0.0.1:1/v1",
}
CONFIG = """
[aliases]
fast = [
  { provider = "groq", model = "llama-3.3-70b-versatile" },
  { provider = "openai", model = "gpt-4o-mini", priority = 1 },
]
[prices]
"openai/dear" = { input = 1000, output = 1000 }
"""
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    (tmp_path / "gateway.toml").write_text(CONFIG)
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield Kit(store, lambda _: whole(answer()), ENVIRON, str(tmp_path / "gateway.toml"))
    await store.close()


async def key_of(kit: Kit, **limits: Any) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test", **limits)))[1]


def ask(model: str = "openai/gpt-4o-mini", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, **more}


def answer(text: str = "pong", finish: str = "stop", **usage: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, **usage}
    return {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": finish}], "usage": counts}


def piece(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def by_host(**replies: Any) -> Any:
    """Answers by provider; each a response maker."""
    return lambda request: next(reply() for name, reply in replies.items() if name in request.url.host)


async def test_an_answer_is_charged_what_it_cost(kit: Kit) -> None:
    key = await key_of(kit, balance=10**9, credit=10**9, tpm=10_000)
    outcome = await kit.ask(key, ask())
    cost = 10 * 150 + 5 * 600  # $0.15 and $0.60 per million tokens, in nano-dollars
    assert outcome.row.cost == outcome.spent == cost
    assert outcome.key.balance == 10**9 - cost
    assert outcome.key.left("t", outcome.row.created // 60) == 10_000 - 15
    assert outcome.chunks[0]["usage"]["cost"] == cost / 10**9
    assert outcome.row.doc["cost"]["prompt_cost"] + outcome.row.doc["cost"]["completion_cost"] == cost / 10**9
    assert outcome.row.doc["cost"]["source"] == "computed"


async def test_a_busy_deployment_falls_back(kit: Kit) -> None:
    kit.reply = by_host(groq=lambda: whole({"error": {"message": "slow down"}}, 429), openai=lambda: whole(answer()))
    outcome = await kit.ask(await key_of(kit), ask("fast"))
    assert outcome.text == "" and outcome.chunks[0]["choices"][0]["message"]["content"] == "pong"  # noqa: PT018
    assert outcome.chunks[0]["lightrail"] == {
        "provider": "openai",
        "model": "gpt-4o-mini",
        "attempts": 2,
        "cache": "off",
        "dropped": [],
    }
    assert outcome.chunks[0]["model"] == "fast"
    assert [(tried["provider"], tried["error"]) for tried in outcome.row.doc["attempts"]] == [
        ("groq", "rate_limit"),
        ("openai", None),
    ]
    assert outcome.row.doc["provider_health"] == "degraded"


async def test_a_stream_falls_back_until_its_first_content(kit: Kit) -> None:
    role = b'data: {"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}\n\n'
    error = b'data: {"error":{"message":"no capacity","code":503}}\n\n'
    kit.reply = by_host(groq=lambda: streamed(role, error), openai=lambda: streamed(piece("po"), piece("ng", "stop")))
    outcome = await kit.ask(await key_of(kit), ask("fast", stream=True))
    assert (outcome.text, outcome.error) == ("pong", None)
    assert [tried["provider"] for tried in outcome.row.doc["attempts"]] == ["groq", "openai"]


async def test_a_stream_never_falls_back_after_it(kit: Kit) -> None:
    error = b'data: {"error":{"message":"no capacity","code":503}}\n\n'
    kit.reply = by_host(groq=lambda: streamed(piece("po"), error), openai=lambda: streamed(piece("no", "stop")))
    outcome = await kit.ask(await key_of(kit), ask("fast", stream=True))
    assert outcome.text == "po"
    assert outcome.chunks[-1]["error"]["code"]
    assert [tried["provider"] for tried in outcome.row.doc["attempts"]] == ["groq"]


async def test_what_is_the_callers_own_fault_is_not_tried_elsewhere(kit: Kit) -> None:
    refusal = {"error": {"message": "bad image", "param": "messages", "code": "invalid_image", "type": "x"}}
    kit.reply = lambda _: whole(refusal, 400)
    outcome = await kit.ask(await key_of(kit), ask("fast"))
    assert isinstance(outcome.error, GatewayError)
    assert (outcome.error.status, outcome.error.param, outcome.error.code) == (400, "messages", "invalid_image")
    assert len(kit.requests) == 1
    assert (outcome.row.cost, outcome.row.doc["status"]) == (0, "failed")


async def test_when_all_are_busy_the_caller_is_told_when_to_come_back(kit: Kit) -> None:
    kit.reply = lambda _: whole({"error": {"message": "slow down"}}, 429, **{"retry-after": "7"})
    outcome = await kit.ask(await key_of(kit), ask("fast"))
    assert isinstance(outcome.error, GatewayError)
    assert (outcome.error.status, outcome.error.headers["retry-after"]) == (429, "7")
    kit.reply = by_host(groq=lambda: whole({}, 429), openai=lambda: whole({}, 500))
    mixed = await kit.ask(await key_of(kit), ask("fast"))
    assert isinstance(mixed.error, GatewayError)
    assert mixed.error.status == 503


async def test_models_in_the_request_are_fallbacks(kit: Kit) -> None:
    kit.reply = by_host(groq=lambda: whole(answer()), openai=lambda: whole({}, 500))
    outcome = await kit.ask(await key_of(kit), ask(models=["groq/llama-3.3-70b-versatile"]))
    assert outcome.row.doc["provider"] == "groq"
    assert b'"models"' not in kit.requests[-1].content


@pytest.mark.parametrize(
    ("models", "allowed"),
    [
        (None, True),
        ((), False),
        (("fast",), True),
        (("openai/*",), True),
        (("openai/gpt-4o-mini",), True),
        (("gpt-4o-mini",), True),
        (("mistral/*",), False),
        (("openai/gpt-4o",), False),
    ],
)
async def test_a_key_is_held_to_its_models(kit: Kit, models: tuple[str, ...] | None, allowed: bool) -> None:
    key = await key_of(kit, models=models)
    if allowed:
        assert (await kit.ask(key, ask("fast"))).error is None
        return
    with pytest.raises(Forbidden) as refused:
        await kit.ask(key, ask("fast"))
    assert refused.value.code == "model_not_allowed"
    assert kit.requests == []
    [kept] = [each async for each in kit.services.store.keys()]
    assert (kept.open, kept.requests, kept.balance) == ({}, 0, kept.credit)


async def test_a_fallback_that_the_key_may_not_use_is_not_used(kit: Kit) -> None:
    kit.reply = lambda _: whole({}, 500)
    outcome = await kit.ask(await key_of(kit, models=("groq/*",)), ask("fast"))
    assert {request.url.host for request in kit.requests} == {"api.groq.com"}
    assert outcome.error is not None


async def test_a_model_without_a_price_is_refused_to_keys_with_a_budget_only(kit: Kit) -> None:
    with pytest.raises(Forbidden) as refused:
        await kit.ask(await key_of(kit, daily_budget=10**9), ask("openai/unheard-of"))
    assert refused.value.code == "model_not_priced"
    free = await kit.ask(await key_of(kit), ask("openai/unheard-of"))
    assert (free.row.cost, free.row.doc["cost"]["total_cost"], free.row.doc["cost"]["source"]) == (0, None, None)
    assert free.chunks[0]["usage"]["cost"] is None


async def test_a_local_model_is_free_under_any_budget(kit: Kit) -> None:
    outcome = await kit.ask(await key_of(kit, balance=0, credit=0), ask("ollama/qwen3"))
    assert (outcome.error, outcome.row.cost) == (None, 0)


async def test_a_whole_answer_under_a_budget_is_bounded_by_what_was_reserved(kit: Kit) -> None:
    await kit.ask(await key_of(kit), ask())
    assert "max_completion_tokens" not in json.loads(kit.requests[-1].content)
    await kit.ask(await key_of(kit, balance=10**9, credit=10**9), ask(n=2))
    assert json.loads(kit.requests[-1].content)["max_completion_tokens"] == 4096


async def test_a_stream_extends_its_hold_and_ends_with_length_when_it_cannot(kit: Kit) -> None:
    words = [piece("word " * 200) for _ in range(60)]  # about 12,000 tokens
    kit.reply = lambda _: streamed(*words, piece("", "stop"))
    rich = await kit.ask(await key_of(kit, balance=10**9, credit=10**9), ask(stream=True))
    assert rich.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert rich.key.balance + rich.key.spent == rich.key.credit
    held = 600 * 4096 + 150 * 3000  # one reservation of output, and the prompt; not two
    poor = await kit.ask(await key_of(kit, balance=held, credit=held), ask(stream=True))
    assert poor.chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len(poor.text) < len(rich.text)
    assert poor.key.balance >= 0
    assert poor.key.balance + poor.key.spent == held
    assert poor.row.doc["finish_reason"] == "length"


async def test_a_request_that_could_never_pass_is_told_so(kit: Kit) -> None:
    with pytest.raises(TooLargeForLimit):
        await kit.ask(await key_of(kit, tpm=100), ask(max_tokens=500))
    assert kit.requests == []


async def test_a_budget_refuses_before_anything_is_spent(kit: Kit) -> None:
    with pytest.raises(Forbidden) as refused:
        await kit.ask(await key_of(kit, balance=10**6, credit=10**6), ask("openai/dear"))
    assert refused.value.code == "insufficient_quota"
    assert kit.requests == []


async def test_missing_usage_is_estimated_and_marked(kit: Kit) -> None:
    kit.reply = lambda _: streamed(piece("four little words here"), piece("", "stop"))
    outcome = await kit.ask(await key_of(kit), ask(stream=True))
    assert outcome.row.doc["tokens"]["source"] == outcome.row.doc["cost"]["source"] == "estimated"
    assert 3 <= outcome.chunks[-1]["usage"]["completion_tokens"] <= 6
    assert outcome.chunks[-1]["usage"]["cost_source"] == "estimated"
    kit.reply = lambda _: whole({"choices": answer()["choices"]})
    told = await kit.ask(await key_of(kit), ask())
    assert told.row.doc["tokens"]["source"] == "estimated"
    assert told.row.cost > 0


async def test_a_caller_who_leaves_stops_the_provider_and_pays_for_what_was_made(kit: Kit) -> None:
    closed = asyncio.Event()

    class Endless(Body):
        async def aclose(self) -> None:
            closed.set()

    words = [piece("word ") for _ in range(1000)]
    headers = {"content-type": "text/event-stream"}
    kit.reply = lambda _: httpx.Response(200, headers=headers, stream=Endless(*words))
    exchange = await kit.admit(await key_of(kit), ask(stream=True))
    chunks = kit.gateway.stream(exchange)
    for _ in range(20):
        await anext(chunks)
    exchange.interrupt()
    await chunks.aclose()
    assert closed.is_set()
    doc = await kit.gateway.close(exchange)
    assert doc["status"] == "cancelled"
    assert 15 <= doc["tokens"]["completion_tokens"] <= 30
    assert doc["tokens"]["source"] == "estimated"


async def test_what_a_deployment_cannot_do_is_refused_by_name_or_routed_around(kit: Kit) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        kit.gateway.plan(parse("chat", json.dumps(ask("groq/llama-3.3-70b-versatile", n=2)).encode()))
    assert refused.value.param == "n"
    outcome = await kit.ask(await key_of(kit), ask("fast", n=2))
    assert outcome.row.doc["provider"] == "openai"
    assert outcome.row.doc["attempts"][0]["provider"] == "openai"


async def test_a_dropped_parameter_is_reported(kit: Kit) -> None:
    outcome = await kit.ask(await key_of(kit), ask("groq/llama-3.3-70b-versatile", logit_bias={"1": 1}))
    assert outcome.chunks[0]["lightrail"]["dropped"] == ["logit_bias"]
    assert b"logit_bias" not in kit.requests[-1].content
    with pytest.raises(UnsupportedParameter):
        await kit.ask(await key_of(kit), ask("groq/llama-3.3-70b-versatile", logit_bias={"1": 1}, strict=True))


async def test_an_unknown_model_is_not_found_before_the_store_is_asked(kit: Kit) -> None:
    with pytest.raises(ModelNotFound):
        await kit.ask("lr-no-key-is-needed", ask("no-such-model"))


async def test_a_provider_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    store = SQLiteStore(str(tmp_path / "test.db"))
    kit = Kit(store, lambda _: streamed(), {**ENVIRON, "FIRST_CONTENT_TIMEOUT": "0.05", "GAP_TIMEOUT": "0.05"})

    class Silent(Body):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for piece in super().__aiter__():
                yield piece
            await asyncio.sleep(30)

    def silent(*pieces: bytes) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Silent(*pieces))

    key = await key_of(kit)
    kit.reply = lambda _: silent(b": still thinking\n\n")
    nothing = await kit.ask(key, ask(stream=True))
    assert isinstance(nothing.error, GatewayError)
    assert (nothing.error.status, nothing.error.code) == (504, "upstream_timeout")
    assert nothing.row.doc["attempts"][0]["error"] == "first_content_timeout"
    kit.reply = lambda _: silent(piece("half"))
    half = await kit.ask(key, ask(stream=True))
    assert (half.text, half.chunks[-1]["error"]["code"]) == ("half", "upstream_timeout")
    assert half.row.doc["attempts"][0]["error"] == "gap_timeout"
    await store.close()


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        (lambda: whole(b"<html>login</html>", **{"content-type": "text/html"}), "content_type"),
        (lambda: whole(b"", 302, location="http://169.254.169.254/"), "redirect"),
        (lambda: whole(b""), "empty"),
        (lambda: whole({}), "empty"),
        (lambda: whole({"choices": []}), "empty"),
        (lambda: whole(b'{"choices": [{"index"'), "protocol"),
        (lambda: whole(b"x" * (17 * 1024 * 1024)), "too_large"),
        (lambda: whole(b"not gzip", **{"content-encoding": "gzip"}), "decode"),
        (lambda: whole(b"\x8b\x00", **{"content-encoding": "br"}), "decode"),
        (lambda: whole({"error": {"message": "upstream died", "code": 502}}), "server"),
    ],
)
async def test_what_is_no_answer_is_an_error_and_costs_nothing(kit: Kit, response: Any, fault: str) -> None:
    kit.reply = lambda _: response()
    outcome = await kit.ask(await key_of(kit), ask())
    assert isinstance(outcome.error, GatewayError)
    assert 500 <= outcome.error.status < 600
    assert outcome.row.doc["attempts"][0]["error"] == fault
    assert outcome.row.cost == 0
    assert "169.254" not in outcome.error.message


async def test_a_whole_answer_where_a_stream_was_asked_for_is_one_chunk(kit: Kit) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = answer("", "tool_calls")
    body["choices"][0]["message"] |= {"content": None, "tool_calls": [call]}
    kit.reply = lambda _: whole(body)
    outcome = await kit.ask(await key_of(kit), ask(stream=True))
    assert outcome.error is None
    assert outcome.chunks[0]["choices"][0]["delta"]["tool_calls"][0] == {"index": 0, **call}
    assert outcome.chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert outcome.chunks[-1]["usage"]["total_tokens"] == 15


async def test_a_permitted_name_does_not_open_the_door_to_other_models(kit: Kit) -> None:
    kit.reply = lambda _: whole({}, 500)
    outcome = await kit.ask(await key_of(kit, models=("fast",)), ask("fast", models=["openai/gpt-4o"]))
    assert {tried["model"] for tried in outcome.row.doc["attempts"]} == {"llama-3.3-70b-versatile", "gpt-4o-mini"}
    assert all(b'gpt-4o"' not in request.content for request in kit.requests)


async def test_a_providers_own_id_is_not_mistaken_for_anothers_deployment(tmp_path: Path) -> None:
    store = SQLiteStore(str(tmp_path / "test.db"))
    kit = Kit(store, lambda _: whole(answer()), {**ENVIRON, "OPENROUTER_API_KEY": "sk-or-test"})
    with pytest.raises(Forbidden):
        await kit.ask(await key_of(kit, models=("openai/gpt-4o-mini",)), ask("openrouter/openai/gpt-4o-mini"))
    await store.close()


@pytest.mark.parametrize(
    ("surface", "body"),
    [
        ("completions", {"prompt": "x", "max_completion_tokens": -(10**8)}),
        ("completions", {"prompt": "x", "messages": [1], "tools": 5, "response_format": "x"}),
        ("chat", {"messages": HELLO, "prompt": [], "input": [], "best_of": "x"}),
        ("embeddings", {"input": "x", "n": "x", "stream": True, "max_tokens": -5}),
    ],
)
async def test_fields_of_another_surface_change_no_reservation(kit: Kit, surface: Any, body: dict[str, Any]) -> None:
    vector = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [1.0]}]}
    kit.reply = lambda _: whole(vector if surface == "embeddings" else answer())
    model = "openai/text-embedding-3-small" if surface == "embeddings" else "openai/gpt-4o-mini"
    key = await key_of(kit, balance=10**9, credit=10**9)
    exchange = await kit.admit(key, {"model": model, **body}, surface)
    assert exchange.hold.money > 0
    assert exchange.key.balance < 10**9
    await kit.gateway.close(exchange)
    assert (await kit.ask(key, {"model": model, **body}, surface)).error is None


async def test_an_allowed_fallback_is_found_however_far_back(tmp_path: Path) -> None:
    entries = ["groq", "mistral", "deepseek", "openai"]
    config = ", ".join(
        f'{{ provider = "{name}", model = "gpt-4o", priority = {at} }}' for at, name in enumerate(entries)
    )
    (tmp_path / "gateway.toml").write_text(
        f"[aliases]\nmany = [{config}]\n[prices]\ndefault = {{ input = 1, output = 1 }}"
    )
    store = SQLiteStore(str(tmp_path / "test.db"))
    environ = {f"{name.upper()}_API_KEY": "sk-test-test" for name in entries}
    kit = Kit(store, lambda _: whole(answer()), environ, str(tmp_path / "gateway.toml"))
    outcome = await kit.ask(await key_of(kit, models=("openai/*",), balance=10**9, credit=10**9), ask("many"))
    assert (outcome.error, outcome.row.doc["provider"]) == (None, "openai")
    held = 4096 * 1000 + 900 * 1000  # enough for those that come first, at $1, but not for gpt-4o at $10
    poor = await key_of(kit, models=("openai/*",), balance=held, credit=held)
    with pytest.raises(Forbidden) as refused:
        await kit.ask(poor, ask("many"))
    assert refused.value.code == "insufficient_quota"
    await store.close()


async def test_every_prompt_of_a_list_is_reserved_for(kit: Kit) -> None:
    body = {"model": "openai/gpt-3.5-turbo-instruct", "prompt": ["a", "b", "c", "d"], "max_tokens": 1000, "n": 2}
    exchange = await kit.admit(await key_of(kit), body, "completions")
    assert exchange.output == 4 * 2 * 1000
    await kit.gateway.close(exchange)


async def test_what_a_reasoning_model_thinks_is_bounded_too(kit: Kit) -> None:
    kit.reply = lambda _: streamed(piece("ok", "stop"))
    await kit.ask(await key_of(kit, balance=10**9, credit=10**9), ask("openai/o4-mini", stream=True))
    assert json.loads(kit.requests[-1].content)["max_completion_tokens"] == 4096
    await kit.ask(await key_of(kit), ask("openai/o4-mini", stream=True))
    assert "max_completion_tokens" not in json.loads(kit.requests[-1].content)


async def test_a_stream_that_lacks_a_choice_is_not_whole(kit: Kit) -> None:
    kit.reply = lambda _: streamed(piece("one", "stop"))
    cut = await kit.ask(await key_of(kit), ask(n=2, stream=True))
    assert cut.chunks[-1]["error"]["code"] == "upstream_unavailable"
    kit.reply = lambda _: streamed(piece("one", "stop"), b"data: [DONE]\n\n")
    said_so = await kit.ask(await key_of(kit), ask(n=2, stream=True))
    assert said_so.chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_what_only_the_last_provider_refuses_is_the_callers_answer(kit: Kit) -> None:
    refusal = {"error": {"message": "bad image", "code": "invalid_image"}}
    kit.reply = by_host(groq=lambda: whole({}, 429), openai=lambda: whole(refusal, 400))
    outcome = await kit.ask(await key_of(kit), ask("fast"))
    assert outcome.error is not None
    assert (outcome.error.status, outcome.error.code) == (400, "invalid_image")


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        ({"error": {"message": "This model's maximum context length is 8192 tokens."}}, "context_length_exceeded"),
        ({"error": {"message": "The prompt was filtered", "code": "content_filter"}}, "content_policy_violation"),
    ],
)
async def test_refusals_that_clients_act_on_have_openais_code(kit: Kit, refusal: Any, code: str) -> None:
    kit.reply = lambda _: whole(refusal, 400)
    outcome = await kit.ask(await key_of(kit), ask())
    assert outcome.error is not None
    assert (outcome.error.status, outcome.error.code) == (400, code)


@pytest.mark.parametrize("status", [202, 204, 405, 410])
async def test_a_providers_oddities_are_not_the_callers_fault(kit: Kit, status: int) -> None:
    kit.reply = lambda _: whole(b"", status)
    outcome = await kit.ask(await key_of(kit), ask())
    assert outcome.error is not None
    assert outcome.error.status == 502


async def test_no_error_tells_our_key_whatever_it_looks_like(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text('[providers.lab]\nbase_url = "http://lab.test/v1"\n')
    store = SQLiteStore(str(tmp_path / "test.db"))
    secret = "hunter2 swordfish"
    kit = Kit(store, lambda _: whole({}), {"LAB_API_KEY": secret}, str(tmp_path / "gateway.toml"))
    for status, body in ((400, {"error": {"message": f"{secret} is wrong"}}), (200, {"error": f"no {secret}"})):
        kit.reply = lambda _, status=status, body=body: whole(body, status)
        outcome = await kit.ask(await key_of(kit), ask("lab/m"))
        assert outcome.error is not None
        assert secret not in outcome.error.message + json.dumps(dict(outcome.row.doc))
    await store.close()


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 5, "completion_tokens": 10**12, "total_tokens": 10**12},
    ],
)
async def test_usage_that_cannot_be_is_not_believed(kit: Kit, usage: dict[str, int]) -> None:
    kit.reply = lambda _: whole({**answer("word " * 500), "usage": usage})
    outcome = await kit.ask(await key_of(kit), ask())
    assert outcome.row.doc["tokens"]["source"] == "estimated"
    assert 400 <= outcome.row.doc["tokens"]["completion_tokens"] <= 700


async def test_what_broke_off_is_booked_to_who_broke_it_off(kit: Kit) -> None:
    kit.reply = by_host(groq=lambda: whole({}, 500), openai=lambda: streamed(piece("half")))
    outcome = await kit.ask(await key_of(kit), ask("fast", stream=True))
    assert outcome.row.cost > 0
    assert (outcome.row.doc["provider"], outcome.row.doc["status"]) == ("openai", "failed")


async def test_a_dear_service_tier_is_not_for_keys_with_a_budget(kit: Kit) -> None:
    with pytest.raises(Forbidden) as refused:
        await kit.ask(await key_of(kit, balance=10**9, credit=10**9), ask(service_tier="priority"))
    assert refused.value.code == "model_not_priced"
    assert (await kit.ask(await key_of(kit), ask(service_tier="priority"))).error is None


@pytest.mark.parametrize("given", [{"cached_content": "c"}, {"extra_body": {"google": {"cached_content": "c"}}}])
async def test_nor_is_a_prompt_of_which_a_part_is_elsewhere(kit: Kit, given: dict[str, Any]) -> None:
    """Of Gemini's explicit caches nobody knows beforehand how large they are."""
    with pytest.raises(Forbidden) as refused:
        await kit.ask(await key_of(kit, balance=10**9, credit=10**9), ask(**given))
    assert refused.value.code == "model_not_priced"
    assert (await kit.ask(await key_of(kit), ask(**given))).error is None


async def test_an_answer_too_deep_to_be_written_is_no_answer(kit: Kit) -> None:
    deep = b'{"choices": [{"index": 0, "message": {"content": "x", "odd": ' + b"[" * 400 + b"]" * 400 + b"}}]}"
    kit.reply = lambda _: whole(deep)
    outcome = await kit.ask(await key_of(kit), ask())
    assert outcome.error is not None
    assert outcome.error.code == "upstream_protocol_error"
