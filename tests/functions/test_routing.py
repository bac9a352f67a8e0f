"""Who answers and why: strategies, preferences, switches, rests; in two processes on one store as in one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.store.base import Store
from tests import upstream as fake
from tests.functions.doors import Door, opened, refusal
from tests.server import PROVIDER_KEY
from tests.upstream import Upstream

CONFIG = """
[aliases]
pair = [{ provider = "openai", model = "gpt-4o-mini" }, { provider = "lab", model = "m", priority = 1 }]
trio = [
  { provider = "openai", model = "gpt-4o-mini" },
  { provider = "lab", model = "m" },
  { provider = "near", model = "n" },
]

[providers.lab]
base_url = "http://127.0.0.1:9/v1"
requires = []
priority = 5
default_model = "m"
first_content_timeout = 1
refuses = ["response_format with tools"]

[providers.near]
base_url = "http://127.0.0.1:9/v1"
requires = []
priority = 7
default_model = "n"
local = true
free = true
refuses = ["tools"]

[prices]
"lab/m" = { input = 0.001, output = 0.001 }

[models]
"lab/m" = { context_window = 2000, capabilities = ["chat", "tools"] }
"""
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@asynccontextmanager
async def process(folder: Path, provider: Upstream, store: Store | None = None) -> AsyncIterator[Door]:
    """All three providers are the same loopback server."""
    (folder / "gateway.toml").write_text(CONFIG.replace("http://127.0.0.1:9/v1", provider.url))
    async with opened(folder, provider.url, store, LAB_API_KEY=PROVIDER_KEY, NEAR_API_KEY=PROVIDER_KEY) as door:
        yield door


@pytest.fixture
async def door(tmp_path: Path, provider: Upstream) -> AsyncIterator[Door]:
    async with process(tmp_path, provider) as door:
        yield door


async def route(door: Door, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
    answer = await door.ask("POST", "/v1/route", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def candidates(door: Door, model: str, **more: Any) -> list[str]:
    return [each["deployment"] for each in (await route(door, model, **more))["candidates"]]


async def answered_by(door: Door, model: str, **more: Any) -> str:
    answer = await door.chat(model=model, **more)
    assert answer.status_code == 200, answer.text
    told = answer.json()["lightrail"]
    return f"{told['provider']}/{told['model']}"


@pytest.mark.parametrize(
    ("model", "first"),
    [
        ("auto", ["lab/m", "near/n", "openai/gpt-4o-mini"]),
        ("auto:local", ["near/n", "lab/m", "openai/gpt-4o-mini"]),
        ("auto:remote", ["lab/m", "openai/gpt-4o-mini"]),
        ("auto:price", ["near/n", "lab/m"]),
    ],
)
async def test_the_dry_run_tells_whom_the_request_then_asks(door: Door, model: str, first: list[str]) -> None:
    assert (await candidates(door, model))[: len(first)] == first
    assert await answered_by(door, model) == first[0]


async def test_a_request_goes_where_it_can_be_answered(door: Door) -> None:
    told = await route(door, "auto:price", tools=TOOLS)
    assert told["candidates"][0]["deployment"] == "lab/m"
    assert {"deployment": "near/n", "filter": "capability"}.items() <= told["removed"][0].items()
    assert "tools" in told["removed"][0]["reason"]
    long = await candidates(door, "auto:price", tools=TOOLS, max_tokens=4000)
    assert "lab/m" not in long
    assert await answered_by(door, "trio", tools=TOOLS, max_tokens=4000) == "openai/gpt-4o-mini"


async def test_json_and_tools_at_once_go_to_whoever_takes_both(door: Door) -> None:
    both: dict[str, Any] = {"tools": TOOLS, "response_format": {"type": "json_object"}}
    assert await answered_by(door, "auto:price", tools=TOOLS) == "lab/m"
    assert (await answered_by(door, "auto:price", **both)).startswith("openai/")
    assert await answered_by(door, "lab/m", models=["openai/gpt-4o-mini"], **both) == "openai/gpt-4o-mini"
    assert await answered_by(door, "lab/m", **both) == "lab/m"  # which says itself what it does not take
    assert refusal(await door.chat(model="lab/m", models=["near/n"], **both)) == (
        400,
        "unsupported_parameter",
        "response_format",
    )


async def test_the_record_tells_the_same_as_the_dry_run(door: Door) -> None:
    answer = await door.chat(model="auto:price", tools=TOOLS)
    row = (await door.ask("GET", f"/v1/generation?id={answer.json()['id']}")).json()
    expected = await route(door, "auto:price", tools=TOOLS)
    assert row["routing"]["strategy"] == "price"
    assert row["routing"]["candidates"] == expected["candidates"]
    assert row["routing"]["removed"] == expected["removed"]
    assert row["attempts"][0]["provider"] == "lab"


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"only": ["near"]}, ["near/n"]),
        ({"ignore": ["lab"], "order": ["near", "OpenAI"]}, ["near/n", "openai/gpt-4o-mini"]),
        ({"sort": "local"}, ["near/n"]),
        ({"max_price": {"prompt": 0.01}, "sort": "price"}, ["near/n", "lab/m"]),
        ({"order": ["openai"], "allow_fallbacks": False}, ["openai/gpt-4o-mini"]),
        ({"order": ["near", "lab"], "allow_fallbacks": False}, ["near/n", "lab/m"]),
    ],
)
async def test_preferences_of_the_request(door: Door, wish: dict[str, Any], expected: list[str]) -> None:
    found = await candidates(door, "trio", provider=wish)
    assert found[: len(expected)] == expected
    assert await answered_by(door, "trio", provider=wish) == expected[0]


@pytest.mark.parametrize(
    ("model", "more", "seen"),
    [
        ("trio", {"provider": {"only": ["groq"]}}, (400, "unknown_provider", "provider")),
        ("trio", {"provider": {"only": ["nobody"]}}, (400, "unknown_provider", "provider")),
        (
            "trio",
            {"provider": {"max_price": {"prompt": -1}}},
            (400, "decimal_below_min_value", "provider.max_price.prompt"),
        ),
        ("trio", {"provider": {"sort": "luck"}}, (400, "invalid_value", "provider.sort")),
        ("trio", {"provider": {"onlyy": ["lab"]}}, (400, "unknown_parameter", "provider.onlyy")),
        (
            "trio",
            {"provider": {"max_price": {"promt": 0}}},
            (400, "unknown_parameter", "provider.max_price.promt"),
        ),
        ("pair", {"provider": {"order": ["near"], "allow_fallbacks": False}}, (400, "unknown_provider", "provider")),
        ("near/n", {"tools": TOOLS}, (400, "unsupported_parameter", "tools")),
        ("near/n", {"provider": {"max_price": {"prompt": 0}}}, None),
        ("lab/m", {"provider": {"max_price": {"prompt": 0}}}, (400, "invalid_value", "provider.max_price")),
        ("auto:fast", {}, (404, "model_not_found", "model")),
    ],
)
async def test_what_leaves_nobody_says_so(door: Door, model: str, more: Any, seen: Any) -> None:
    answer = await door.chat(model=model, **more)
    assert (refusal(answer) if seen else answer.status_code) == (seen or 200)
    dry = await door.ask("POST", "/v1/route", {"model": model, "messages": [{"role": "user", "content": "x"}], **more})
    body = dry.json()
    assert (body.get("error", {}).get("code") or None) == (seen[1] if seen else None)
    if seen and dry.status_code == 200:
        assert body["candidates"] == []
        assert body["status"] == seen[0]


async def test_who_pins_providers_is_served_by_no_other(door: Door, provider: Upstream) -> None:
    pinned = {"order": ["openai", "lab"], "allow_fallbacks": False}
    told = await route(door, "trio", provider=pinned)
    assert [each["deployment"] for each in told["candidates"]] == ["openai/gpt-4o-mini", "lab/m"]
    provider.next(fake.answer(500, fake.error("broken")))
    provider.next(fake.answer(500, fake.error("broken")))
    assert await answered_by(door, "trio", provider=pinned) == "lab/m", "its own fallback"
    provider.always("gpt-4o-mini", fake.answer(500, fake.error("broken")))
    alone = await door.chat(model="trio", provider={**pinned, "order": ["openai"]})
    assert refusal(alone)[:2] == (502, "upstream_error")


async def test_models_may_stand_for_the_model(door: Door, provider: Upstream) -> None:
    """As in OpenRouter's own example."""
    body = {"models": ["near/n", "lab/m"], "messages": [{"role": "user", "content": "hello"}]}
    assert (await door.ask("POST", "/v1/chat/completions", body)).json()["model"] == "near/n"
    provider.always("n", fake.answer(500, fake.error("broken")))
    assert (await door.ask("POST", "/v1/chat/completions", body)).json()["lightrail"]["provider"] == "lab"
    nothing = await door.ask("POST", "/v1/chat/completions", {**body, "models": []})
    assert refusal(nothing)[::2] == (400, "model")


async def test_round_robin_is_strict_for_each_key_at_any_concurrency(tmp_path: Path, provider: Upstream) -> None:
    async with process(tmp_path, provider) as one, process(tmp_path, provider) as other:
        key = (await one.make())["key"]
        ask = {"provider": {"sort": "round_robin"}}
        answers = await asyncio.gather(
            *(door.chat(key, "trio", **ask) for door in (one, other) for _ in range(15)),
            *(one.chat(model="trio", **ask) for _ in range(7)),
        )
        names = Counter(answer.json()["lightrail"]["provider"] for answer in answers[:30])
        assert names == {"openai": 10, "lab": 10, "near": 10}
        in_turn = [(await one.chat(key, "auto:round-robin")).json()["lightrail"]["provider"] for _ in range(6)]
        assert in_turn == ["lab", "near", "openai"] * 2
        body = {"model": "auto:round-robin", "messages": [{"role": "user", "content": "x"}]}
        dry = [(await one.ask("POST", "/v1/route", body, key)).json()["candidates"][0]["deployment"] for _ in range(2)]
        assert dry == ["lab/m", "lab/m"], "the dry run tells the next turn, and takes none"


async def test_a_switch_holds_everywhere_within_seconds(tmp_path: Path, provider: Upstream) -> None:
    async with process(tmp_path, provider) as one, process(tmp_path, provider) as other:
        assert await answered_by(other, "pair") == "openai/gpt-4o-mini"
        changed = await one.ask("PATCH", "/admin/models/openai/gpt-4o-mini", {"enabled": False})
        assert changed.json()["enabled"] is False
        assert await answered_by(one, "pair") == "lab/m"
        other.services.gateway.state._read_at = 0.0  # pyright: ignore[reportPrivateUsage] as if seconds had passed
        assert await answered_by(other, "pair") == "lab/m"
        assert refusal(await other.chat()) == (404, "model_not_found", "model")
        await other.ask("PATCH", "/admin/providers/lab", {"enabled": False})
        assert refusal(await other.chat(model="pair")) == (404, "model_not_found", "model")
        shown = {each["id"]: each["active"] for each in (await other.ask("GET", "/v1/models")).json()["data"]}
        names = ("openai/gpt-4o-mini", "openai/gpt-4o", "lab/m", "pair", "trio", "auto")
        assert [shown[name] for name in names] == [False, True, False, False, True, True]
        assert (await other.ask("GET", "/v1/models/lab/m")).json()["active"] is False
        assert (await other.ask("GET", "/health")).json()["active_providers"] == ["near", "openai"]
        unknown = await other.ask("POST", "/generate", {"prompt": "x", "provider": "nobody"})
        assert unknown.json()["error"]["message"].endswith("Available: near")
        for path in ("/admin/models/openai/gpt-4o-mini", "/admin/providers/lab"):
            assert (await one.ask("PATCH", path, {"enabled": None})).json()["switched"] is None
        assert await answered_by(one, "pair") == "openai/gpt-4o-mini"


async def test_an_administrator_sees_all_that_can_be_asked_in_its_place(tmp_path: Path, provider: Upstream) -> None:
    (tmp_path / "gateway.toml").write_text(
        f'[providers.far]\nbase_url = "{provider.url}"\nrequires = []\npriority = 9\n'
        '[aliases]\nsome = [{ provider = "far", model = "only-here", priority = 3 }]\n'
    )
    async with opened(tmp_path, provider.url, ROUND_ROBIN="far/in-turn") as door:
        listed = {each["id"]: each for each in (await door.ask("GET", "/admin/models")).json()["data"]}
        assert listed["far/only-here"]["priority"] == listed["far/in-turn"]["priority"] == 9
        assert listed["openai/gpt-4o"]["priority"] == 10
        await door.ask("PATCH", "/admin/providers/openai", {"priority": 1})
        listed = {each["id"]: each for each in (await door.ask("GET", "/admin/models")).json()["data"]}
        assert listed["openai/gpt-4o"]["priority"] == 1


async def test_an_administrator_puts_deployments_in_another_place(door: Door) -> None:
    await door.ask("PATCH", "/admin/models/lab/m", {"priority": 1})
    await door.ask("PATCH", "/admin/models/openai/gpt-4o-mini", {"priority": 2})
    assert await candidates(door, "pair") == ["lab/m", "openai/gpt-4o-mini"]
    await door.ask("PATCH", "/admin/providers/openai", {"priority": 1})
    assert (await candidates(door, "auto"))[0] == "lab/m", "a model's own place comes before its provider's"
    listed = {each["id"]: each for each in (await door.ask("GET", "/admin/models")).json()["data"]}
    assert (listed["lab/m"]["priority"], listed["lab/m"]["switched"]) == (1, {"enabled": None, "priority": 1})
    providers = {each["id"]: each for each in (await door.ask("GET", "/admin/providers")).json()["data"]}
    assert (providers["openai"]["priority"], providers["openai"]["configured"]) == (1, True)
    assert providers["groq"]["missing"] == ["GROQ_API_KEY"]


@pytest.mark.parametrize(
    ("path", "body", "seen"),
    [
        ("/admin/models/nonsense", {"enabled": False}, (404, "model_not_found", "model")),
        ("/admin/models/nobody/x", {"enabled": False}, (404, "model_not_found", "model")),
        ("/admin/models/openai/../x", {"enabled": False}, (404, None, None)),
        ("/admin/providers/nobody", {"enabled": False}, (404, "not_found", None)),
        ("/admin/providers/openai", {"enabled": "no"}, (400, "invalid_type", "enabled")),
        ("/admin/providers/openai", {"priority": -9_000_000}, (400, "integer_below_min_value", "priority")),
        ("/admin/providers/openai", {"colour": 1}, (400, "unknown_parameter", "colour")),
        ("/admin/providers/openai", {"resting": True}, (400, "invalid_value", "resting")),
        ("/admin/providers/groq", {"enabled": True}, (400, "invalid_value", "enabled")),
        ("/admin/models/groq/x", {"enabled": True}, (400, "invalid_value", "enabled")),
        ("/admin/providers/openai", [], (400, None, None)),
    ],
)
async def test_a_wrong_switch_changes_nothing(door: Door, path: str, body: Any, seen: tuple[Any, ...]) -> None:
    answer = await door.ask("PATCH", path, body)
    assert answer.status_code == seen[0]
    if seen[1]:
        assert refusal(answer) == seen
    assert not door.services.gateway.state.switches.named


async def test_what_fails_rests_in_every_process_until_it_is_woken(tmp_path: Path, provider: Upstream) -> None:
    async with process(tmp_path, provider) as one, process(tmp_path, provider) as other:
        provider.next(fake.answer(429, fake.error("slow down"), {"retry-after": 30}))
        assert await answered_by(one, "pair") == "lab/m"
        told = await route(other, "pair")
        assert told["removed"][0]["filter"] == "resting"
        assert "rate_limit" in told["removed"][0]["reason"]
        assert await answered_by(other, "pair") == "lab/m"
        listed = {each["id"]: each for each in (await other.ask("GET", "/admin/models")).json()["data"]}
        assert listed["openai/gpt-4o-mini"]["resting"]["fault"] == "rate_limit"
        assert await answered_by(other, "openai/gpt-4o-mini") == "openai/gpt-4o-mini", (
            "the last one is asked all the same"
        )
        one.services.gateway.state._read_at = 0.0  # pyright: ignore[reportPrivateUsage] as if seconds had passed
        assert await answered_by(one, "pair") == "openai/gpt-4o-mini", "its success woke it for all"


async def test_an_account_without_credit_is_not_asked_again_until_somebody_says_so(
    door: Door, provider: Upstream
) -> None:
    known = [{"role": "user", "content": "known"}]
    assert (await door.chat(cache={"mode": "on"}, messages=known)).status_code == 200
    provider.next(fake.answer(402, fake.error("Insufficient balance")))
    assert refusal(await door.chat())[:2] == (502, "upstream_auth_error")
    asked = len(provider.seen)
    again = await door.chat()
    assert refusal(again)[:2] == (503, "overloaded")
    assert 0 < int(again.headers["retry-after"]) <= 60
    assert len(provider.seen) == asked
    assert await answered_by(door, "pair") == "lab/m"
    assert (await door.chat(cache={"mode": "on"}, messages=known)).headers["x-lightrail-cache"] == "hit"
    await door.ask("PATCH", "/admin/providers/openai", {"resting": False})
    assert await answered_by(door, "pair") == "openai/gpt-4o-mini"


async def test_a_store_that_does_not_tell_the_state_holds_nobody_up(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: str) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(type(door.store), "note", lambda _, name: never(name))
    door.services.gateway.state._read_at = 0.0  # pyright: ignore[reportPrivateUsage] as if seconds had passed
    async with asyncio.timeout(5):
        assert await answered_by(door, "pair") == "openai/gpt-4o-mini"


async def test_many_processes_write_the_state_without_losing_a_word(tmp_path: Path, provider: Upstream) -> None:
    async with process(tmp_path, provider) as one, process(tmp_path, provider) as other:
        names = [f"openai/model-{number}" for number in range(12)]
        doors = [one, other] * 6
        changes = [
            door.ask("PATCH", f"/admin/models/{name}", {"enabled": False})
            for door, name in zip(doors, names, strict=True)
        ]
        assert {answer.status_code for answer in await asyncio.gather(*changes)} == {200}
        await one.services.gateway.state.read()
        assert set(one.services.gateway.state.switches.named) == set(names)


async def test_a_key_of_few_models_routes_over_those(door: Door) -> None:
    key = (await door.make(models=["openai/gpt-4o"]))["key"]
    answer = await door.chat(key, "auto:price")
    assert answer.json()["lightrail"]["model"] == "gpt-4o"
    assert refusal(await door.chat(key, "pair")) == (403, "model_not_allowed", None)
    assert "openai/gpt-4o-mini" not in (await door.ask("GET", f"/v1/generation?id={answer.json()['id']}", key=key)).text
    dry = await door.ask("POST", "/v1/route", {"model": "pair", "messages": [{"role": "user", "content": "x"}]}, key)
    assert (dry.json()["candidates"], dry.json()["removed"]) == ([], []), (
        "what a key may not use is none of its business"
    )
    ignoring = {"model": "auto", "messages": [{"role": "user", "content": "x"}], "provider": {"ignore": ["near"]}}
    assert "near" not in (await door.ask("POST", "/v1/route", ignoring, key)).text
    budgeted = (await door.make(balance_usd=1, models=["auto:price"]))["key"]
    assert (await door.chat(budgeted, "auto:price")).json()["lightrail"]["provider"] == "near"
