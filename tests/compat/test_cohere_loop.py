"""A tool loop of three turns through the stock OpenAI client, before a fake Cohere that takes nothing amiss."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.server import PROVIDER_KEY
from tests.strict.cohere import MODEL, cohere
from tests.strict.loop import ANSWER, START, TURNS, client_of_gateway, kept, made, results, said
from tests.upstream import Upstream


@pytest.fixture(scope="module")
async def fake(anyio_backend: str) -> AsyncIterator[Upstream]:
    async with Upstream(key=PROVIDER_KEY) as upstream:
        upstream.always(MODEL, cohere)
        yield upstream


@pytest.fixture(scope="module")
async def client(fake: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    variables = {"COHERE_API_KEY": PROVIDER_KEY, "COHERE_BASE_URL": f"http://{fake.host}/v2"}
    async with client_of_gateway(tmp_path_factory.mktemp("cohere"), **variables) as client:
        yield client


@pytest.mark.parametrize("whole", [True, False], ids=["the client keeps its plan", "the gateway does"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop(client: AsyncOpenAI, fake: Upstream, streams: bool, whole: bool) -> None:
    asked: Any = {"model": f"cohere/{MODEL}", "streams": streams, "temperature": 1.5}
    messages = list(START)
    for plan, calls in TURNS:
        answer = await said(client, messages=messages, **asked)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 20)
        message = answer.choices[0].message.model_dump()
        assert (message["reasoning_content"], made(message)) == (plan, calls)
        messages += [kept(answer, whole=whole), *results(message)]
    answer = await said(client, messages=messages, **asked)
    assert not fake.malformed
    message = answer.choices[0].message.model_dump()
    assert (message["content"], answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert message["extra_content"]["cohere"]["citations"][0]["text"] == "Rain"
    plans = [sent["tool_plan"] for sent in fake.seen[-1].json["messages"] if "tool_plan" in sent]
    assert plans == [plan for plan, _ in TURNS]
