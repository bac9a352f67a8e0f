"""`/v1/models`: what a key may ask for, aliases and prices included."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.catalog import AUTO
from tests.functions.doors import Door, opened, refusal
from tests.upstream import Upstream

CONFIG = """
[aliases]
fast = [
  { provider = "groq", model = "llama-3.3-70b-versatile", priority = 1 },
  { provider = "mistral", model = "mistral-small-latest", priority = 2 },
  { provider = "openai", model = "gpt-4o-mini", priority = 3 },
  { provider = "openai", model = "gpt-4o", priority = 4, enabled = false },
]
sleeping = [{ provider = "mistral", model = "mistral-small-latest" }]

[providers.lab]
base_url = "http://127.0.0.1:9/v1"
requires = []

[prices]
"lab/priced" = { input = 0.10, output = 0.30 }

[models]
"lab/org/deep/model-7b" = { context_window = 32768, max_output = 8192, capabilities = ["chat", "tools"] }
"lab/priced" = {}
"""
FIELDS = {
    "id",
    "object",
    "created",
    "owned_by",
    "provider",
    "context_window",
    "supports_streaming",
    "capabilities",
    "pricing",
    "backends",
    "active",
}


@pytest.fixture
async def models(tmp_path: Path, provider: Upstream) -> AsyncIterator[Door]:
    """OpenAI, Groq and a lab of the deployer's own are on; Mistral is off."""
    (tmp_path / "gateway.toml").write_text(CONFIG)
    async with opened(tmp_path, provider.url, GROQ_API_KEY="gsk-1234567890abcdef") as door:
        yield door


async def listed(door: Door, key: str) -> dict[str, Any]:
    answer = await door.ask("GET", "/v1/models", key=key)
    assert answer.status_code == 200
    assert answer.json()["object"] == "list"
    return {model["id"]: model for model in answer.json()["data"]}


async def test_every_model_has_every_field(models: Door) -> None:
    found = await listed(models, (await models.make())["key"])
    assert len(found) > 20
    for model in found.values():
        assert set(model) == FIELDS
        assert model["object"] == "model"
        assert abs(model["created"] - time.time()) < 60
        assert model["owned_by"] == model["provider"]
        assert model["pricing"] is None or set(model["pricing"]) == {
            "input_cost_per_1k",
            "output_cost_per_1k",
            "currency",
        }
    gpt = found["openai/gpt-4o-mini"]
    assert gpt["pricing"] == {"input_cost_per_1k": 0.00015, "output_cost_per_1k": 0.0006, "currency": "USD"}
    assert gpt.items() >= {"provider": "openai", "context_window": 128000, "supports_streaming": True}.items()
    assert set(gpt["capabilities"]) >= {"chat", "streaming", "tools"}
    assert (gpt["backends"], gpt["active"]) == (["openai/gpt-4o-mini"], True)
    assert found["openai/text-embedding-3-small"]["capabilities"] == ["embeddings"]
    assert found["openai/text-embedding-3-small"]["supports_streaming"] is False


async def test_no_model_of_a_provider_that_is_off_is_listed(models: Door) -> None:
    found = await listed(models, (await models.make())["key"])
    on = {"openai", "groq", "lab"}
    assert {model["provider"] for name, model in found.items() if name not in ("sleeping", *AUTO)} == on
    assert not any(name.startswith(("mistral/", "demo/")) for name in found)


async def test_an_alias_names_its_deployments_in_order_and_shows_the_first_that_is_on(models: Door) -> None:
    found = await listed(models, (await models.make())["key"])
    assert list(found)[:2] == ["fast", "sleeping"]
    fast = found["fast"]
    assert fast["backends"] == [
        "groq/llama-3.3-70b-versatile",
        "mistral/mistral-small-latest",
        "openai/gpt-4o-mini",
        "openai/gpt-4o",
    ]
    assert (fast["provider"], fast["active"]) == ("groq", True)
    assert fast["pricing"] == found["groq/llama-3.3-70b-versatile"]["pricing"] is not None


async def test_an_alias_whose_providers_are_off_is_shown_as_inactive_and_cannot_be_called(models: Door) -> None:
    key = (await models.make())["key"]
    sleeping = (await listed(models, key))["sleeping"]
    assert (sleeping["active"], sleeping["backends"]) == (False, ["mistral/mistral-small-latest"])
    assert (sleeping["provider"], sleeping["pricing"], sleeping["capabilities"]) == ("mistral", None, [])
    answer = await models.chat(key, model="sleeping")
    assert refusal(answer) == (404, "model_not_found", "model")
    assert "MISTRAL_API_KEY" in answer.json()["error"]["message"]


async def test_own_models_have_own_facts_and_no_price_is_null(models: Door) -> None:
    found = await listed(models, (await models.make())["key"])
    own = found["lab/org/deep/model-7b"]
    assert own.items() >= {"context_window": 32768, "pricing": None, "supports_streaming": False}.items()
    assert own["capabilities"] == ["chat", "tools"]
    assert found["lab/priced"]["pricing"] == {
        "input_cost_per_1k": 0.0001,
        "output_cost_per_1k": 0.0003,
        "currency": "USD",
    }


@pytest.mark.parametrize(
    ("allowed", "seen"),
    [
        (["openai/gpt-4o-mini"], {"openai/gpt-4o-mini", "fast", *AUTO}),
        (["lab/*"], {"lab/org/deep/model-7b", "lab/priced", *AUTO}),
        (["fast"], {"fast"}),
        (["sleeping"], {"sleeping"}),
        (["mistral/*"], set()),
        ([], set()),
    ],
)
async def test_a_limited_key_sees_only_what_it_may_use(models: Door, allowed: list[str], seen: set[str]) -> None:
    key = (await models.make(models=allowed))["key"]
    assert set(await listed(models, key)) == seen
    for name in ("openai/gpt-4o-mini", "lab/priced", "fast"):
        answer = await models.ask("GET", f"/v1/models/{name}", key=key)
        assert answer.status_code == (200 if name in seen else 404)


@pytest.mark.parametrize("name", ["openai/gpt-4o-mini", "lab/org/deep/model-7b", "fast", "sleeping"])
@pytest.mark.parametrize("escaped", [False, True])
async def test_one_model_is_what_the_list_shows(models: Door, name: str, escaped: bool) -> None:
    key = (await models.make())["key"]
    path = name.replace("/", "%2F") if escaped else name
    answer = await models.ask("GET", f"/v1/models/{path}", key=key)
    assert answer.status_code == 200
    assert answer.json() == (await listed(models, key))[name]


async def test_what_can_be_asked_for_can_be_retrieved_though_it_is_not_listed(models: Door) -> None:
    key = (await models.make())["key"]
    bare = (await models.ask("GET", "/v1/models/gpt-4o-mini", key=key)).json()
    assert (bare["id"], bare["provider"], bare["backends"]) == ("gpt-4o-mini", "openai", ["openai/gpt-4o-mini"])
    unheard = (await models.ask("GET", "/v1/models/openai/ft:gpt-4o-mini:ada::7", key=key)).json()
    assert (unheard["id"], unheard["active"]) == ("openai/ft:gpt-4o-mini:ada::7", True)


@pytest.mark.parametrize("name", ["nothing", "mistral/mistral-small-latest", "nobody/gpt-4o", "openai/../x", ""])
async def test_a_model_that_nobody_serves_is_404(models: Door, name: str) -> None:
    key = (await models.make())["key"]
    answer = await models.client.get(
        f"http://gw/v1/models/{name.replace('..', '%2E%2E')}", headers={"authorization": f"Bearer {key}"}
    )
    assert refusal(answer) == (404, "model_not_found", "model")
