"""Safety checks at the door: what they refuse is told by name, never sent, and costs nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.functions.doors import opened, refusal
from tests.upstream import Upstream

SEED = """
[[safety]]
name = "length"
max_bytes = 5000

[[safety]]
name = "words"
contains = ["hack"]
"""
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "how to hack"}]}),
    ("/v1/completions", {"model": "openai/gpt-3.5-turbo-instruct", "prompt": "how to hack"}),
    ("/v1/embeddings", {"model": "openai/text-embedding-3-small", "input": ["fine", "how to hack"]}),
]


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[path for path, _ in ASKED])
async def test_what_a_check_refuses_is_not_sent_and_costs_nothing(
    tmp_path: Path, provider: Upstream, path: str, body: dict[str, Any]
) -> None:
    (tmp_path / "gateway.toml").write_text(SEED)
    async with opened(tmp_path, provider.url) as door:
        made = await door.make(daily_budget_usd=1, rpm=10)
        before = await door.key(made["id"])
        for stream in (False, True) if path != "/v1/embeddings" else (False,):
            refused = await door.ask("POST", path, {**body, "stream": stream} if stream else body, made["key"])
            assert refusal(refused) == (400, "content_policy_violation", None)
            assert refused.json()["error"]["message"] == "The safety check 'words' refused this request."
        after = await door.key(made["id"])
        assert replace(after, windows={}) == before
        assert {name: after.limits[name[0]] for name in after.windows} == after.windows, "all is given back"
        assert provider.seen == []
        assert refusal(await door.ask("POST", path, body, made["key"][:-1])) == (401, "invalid_api_key", None)


async def test_what_they_let_pass_is_answered(tmp_path: Path, provider: Upstream) -> None:
    (tmp_path / "gateway.toml").write_text(SEED)
    async with opened(tmp_path, provider.url) as door:
        assert (await door.chat()).status_code == 200
        long = await door.chat(messages=[{"role": "user", "content": "x" * 5001}])
        assert refusal(long) == (400, "content_policy_violation", None)
        assert "5001 bytes of text, and 5000 are allowed" in long.json()["error"]["message"]
    assert len(provider.seen) == 1
