"""A tool loop of three turns through the stock OpenAI client, before a fake Anthropic that takes nothing amiss."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.server import PROVIDER_KEY
from tests.strict.anthropic import MODELS, anthropic, blocks, signature
from tests.strict.loop import ANSWER, START, TURNS, client_of_gateway, kept, made, results, said, thinks
from tests.upstream import Upstream


@pytest.fixture(scope="module")
async def fake(anyio_backend: str) -> AsyncIterator[Upstream]:
    async with Upstream(key=PROVIDER_KEY, header="x-api-key") as upstream:
        for model in MODELS:
            upstream.always(model, anthropic)
        yield upstream


@pytest.fixture(scope="module")
async def client(fake: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    variables = {"ANTHROPIC_API_KEY": PROVIDER_KEY, "ANTHROPIC_BASE_URL": f"http://{fake.host}/v1"}
    async with client_of_gateway(tmp_path_factory.mktemp("anthropic"), **variables) as client:
        yield client


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("whole", [True, False], ids=["with its signatures", "without them"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop(client: AsyncOpenAI, fake: Upstream, streams: bool, whole: bool, model: str) -> None:
    asked: Any = {"model": f"anthropic/{model}", "streams": streams, "reasoning_effort": "medium"}
    messages = list(START)
    for turn, (_, calls) in enumerate(TURNS):
        answer = await said(client, messages=messages, **asked)
        choice, usage = answer.choices[0], answer.usage
        assert choice.finish_reason == "tool_calls"
        assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens) == (15, 5, 20)
        message = choice.message.model_dump()
        thought = thinks(turn, between=model == MODELS[1])
        assert (message.get("reasoning_content", ""), made(message)) == (thought, calls)
        if thought:
            assert message["extra_content"]["anthropic"]["thinking"][0]["signature"] == signature(model, thought)
        messages += [kept(answer, whole=whole), *results(message)]
    answer = await said(client, messages=messages, **asked)
    assert not fake.malformed
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    body = fake.seen[-1].json
    assert "thinking" in body, "to the end"
    turns = [turn["content"] for turn in body["messages"] if turn["role"] == "assistant"]
    assert turns == [blocks(body, number) for number in range(len(TURNS))]
