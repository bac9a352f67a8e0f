"""A tool loop of three turns through the stock OpenAI client, before a Gemini that refuses what Google's would."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.strict.gemini import DUMMY, MODEL, OWN, gemini, signatures
from tests.strict.loop import ANSWER, START, TURNS, client_of_gateway, kept, made, results, said
from tests.upstream import Upstream

KEY = "AIzaLoop0123456789"


@pytest.fixture(scope="module")
async def google(anyio_backend: str) -> AsyncIterator[Upstream]:
    async with Upstream(key=KEY, header="x-goog-api-key") as upstream:
        upstream.always(None, gemini)
        yield upstream


@pytest.fixture(scope="module")
async def client(google: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    variables = {"GEMINI_API_KEY": KEY, "GEMINI_BASE_URL": f"http://{google.host}"}
    async with client_of_gateway(tmp_path_factory.mktemp("gemini"), **variables) as client:
        yield client


@pytest.mark.parametrize("whole", [True, False], ids=["all kept", "extra_content thrown away"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop(client: AsyncOpenAI, google: Upstream, streams: bool, whole: bool) -> None:
    asked: Any = {"model": f"gemini/{MODEL}", "streams": streams, "reasoning_effort": "low"}
    messages = list(START)
    for thought, calls in TURNS:
        answer = await said(client, messages=messages, **asked)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 12)
        message = answer.choices[0].message.model_dump()
        assert (message["reasoning_content"], made(message)) == (thought, calls)
        messages += [kept(answer, whole=whole), *results(message)]
    answer = await said(client, messages=messages, **asked)
    assert google.malformed == []
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    body = google.seen[-1].json
    assert signatures(body) == [OWN[0], None, OWN[1]]
    assert body["generationConfig"] == {"thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True}}


async def test_a_history_made_elsewhere(client: AsyncOpenAI, google: Upstream) -> None:
    calls = [
        {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        for call_id in ("toolu_01A", "call_x|y")
    ]
    message: Any = {"role": "assistant", "content": None, "tool_calls": calls}
    answer = await said(client, f"gemini/{MODEL}", [*START, message, *results(message)], streams=False)
    assert answer.choices[0].message.tool_calls
    assert google.malformed == []
    assert signatures(google.seen[-1].json) == [DUMMY, None]


async def test_what_it_refuses_is_told(client: AsyncOpenAI, google: Upstream) -> None:
    forged = {"google": {"thought_signature": "forged"}}
    function = {"name": "weather", "arguments": "{}"}
    call = {"id": "1", "type": "function", "function": function, "extra_content": forged}
    message: Any = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(openai.BadRequestError, match="Corrupted thought signature"):
        await said(client, f"gemini/{MODEL}", [*START, message, *results(message)], streams=False)
    assert "Corrupted thought signature" in google.malformed.pop()
