"""A tool loop of three turns through the stock OpenAI client, before a fake Bedrock that takes nothing amiss."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.server import PROVIDER_KEY
from tests.strict.bedrock import MODEL, REGION, ROLE, bedrock, blocks
from tests.strict.loop import ANSWER, START, TURNS, client_of_gateway, kept, made, results, said, thinks
from tests.upstream import Upstream


@pytest.fixture(scope="module", params=["by key", "by role"])
async def fake(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Upstream]:
    key = PROVIDER_KEY if request.param == "by key" else None
    async with Upstream(key=key, header="authorization" if key else "x-amz-date") as upstream:
        upstream.always(None, bedrock)
        yield upstream


@pytest.fixture(scope="module")
async def client(fake: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    folder = tmp_path_factory.mktemp("bedrock")
    variables = {"BEDROCK_BASE_URL": f"http://{fake.host}", "AWS_REGION": REGION}
    variables |= {"BEDROCK_API_KEY": fake.key} if fake.key else by_role(folder)
    async with client_of_gateway(folder, **variables) as client:
        yield client


def by_role(folder: Path) -> dict[str, str]:
    config = folder / "gateway.toml"
    config.write_text("[providers.bedrock]\nenabled = true\n")
    return {
        "GATEWAY_CONFIG": str(config),
        "AWS_ACCESS_KEY_ID": ROLE.access_key,
        "AWS_SECRET_ACCESS_KEY": ROLE.secret_key,
        "AWS_SESSION_TOKEN": str(ROLE.token),
    }


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop(client: AsyncOpenAI, fake: Upstream, streams: bool) -> None:
    asked: Any = {"model": f"bedrock/{MODEL}", "streams": streams, "reasoning_effort": "medium"}
    asked |= {"max_completion_tokens": 4000, "temperature": 0.3}
    messages = list(START)
    for turn, (_, calls) in enumerate(TURNS):
        answer = await said(client, messages=messages, **asked)
        choice, usage = answer.choices[0], answer.usage
        assert choice.finish_reason == "tool_calls"
        assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens) == (15, 5, 20)
        message = choice.message.model_dump()
        assert (message.get("reasoning_content", ""), made(message)) == (thinks(turn, between=False), calls)
        messages += [kept(answer, whole=True), *results(message)]
    answer = await said(client, messages=messages, **asked)
    assert not fake.malformed
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    body = fake.seen[-1].json
    assert "thinking" in body["additionalModelRequestFields"], "to the end"
    turns = [turn["content"] for turn in body["messages"] if turn["role"] == "assistant"]
    assert turns == [blocks(body, number) for number in range(len(TURNS))]
