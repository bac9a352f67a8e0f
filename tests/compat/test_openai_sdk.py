"""The stock OpenAI client, pointed at the gateway as a user would point it, over real sockets."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests import upstream as fake
from tests.server import Server
from tests.upstream import Upstream

MODEL = "openai/gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


@pytest.fixture
def client(server: Server, provider: Upstream, make_key: Callable[..., Any]) -> Iterator[OpenAI]:
    with OpenAI(api_key=make_key()["key"], base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: Server, provider: Upstream, make_key: Callable[..., Any]) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=make_key()["key"], base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


async def off_loop(work: Callable[[], Any]) -> Any:
    """The synchronous client in a thread: the fake provider answers from this loop."""
    import anyio.to_thread

    return await anyio.to_thread.run_sync(work)


def completion(message: dict[str, Any], finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **more}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }


def piece(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
    }


async def test_a_whole_chat(client: OpenAI) -> None:
    said = await off_loop(lambda: client.chat.completions.create(model=MODEL, messages=HELLO))
    assert said.choices[0].message.content == "hello"
    assert said.choices[0].finish_reason == "stop"
    assert said.id.startswith("gen-")
    assert said.model == MODEL
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens > 0
    assert said.usage.cost > 0
    assert said.usage.cost_source == "computed"
    assert said.lightrail["provider"] == "openai"


async def test_a_streamed_chat_without_usage_puts_it_on_the_finish_chunk(client: OpenAI) -> None:
    stream = lambda: list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))  # noqa: E731
    chunks = await off_loop(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {(chunk.model, chunk.created) for chunk in chunks} == {(MODEL, chunks[0].created)}
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].lightrail["model"] == "gpt-4o-mini"


async def test_a_streamed_chat_with_usage_ends_in_a_chunk_of_its_own(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = lambda: list(  # noqa: E731
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options)
    )
    chunks = await off_loop(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_several_choices(client: OpenAI) -> None:
    said = await off_loop(lambda: client.chat.completions.create(model=MODEL, messages=HELLO, n=3))
    assert [choice.index for choice in said.choices] == [0, 1, 2]
    stream = lambda: list(client.chat.completions.create(model=MODEL, messages=HELLO, n=2, stream=True))  # noqa: E731
    texts = {0: "", 1: ""}
    finishes: list[tuple[int, str]] = []
    for chunk in await off_loop(stream):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes += [(choice.index, choice.finish_reason)] if choice.finish_reason else []
    assert texts == {0: "hello", 1: "hello"}
    assert finishes == [(0, "stop"), (1, "stop")]


async def test_a_tool_call_and_its_result(client: OpenAI, provider: Upstream) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place":"Oslo"}'}}
    provider.next(fake.answer(200, completion({"content": None, "tool_calls": [call]}, "tool_calls")))
    first = await off_loop(lambda: client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER]))
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls[0].function.arguments == '{"place":"Oslo"}'
    history = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]
    await off_loop(lambda: client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER]))
    assert [said["role"] for said in provider.seen[-1].json["messages"]] == ["user", "assistant", "tool"]
    assert provider.seen[-1].json["messages"][1]["tool_calls"] == [call]


async def test_parallel_tool_calls_stream_in_pieces(client: OpenAI, provider: Upstream) -> None:
    def part(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
        named = {"id": f"call_{index}", "type": "function"} if name else {}
        function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
        return piece({"tool_calls": [{"index": index, **named, "function": function}]})

    provider.next(
        fake.stream(
            piece({"role": "assistant", "content": None}),
            part(0, "", "weather"),
            part(0, '{"place":'),
            part(0, '"Oslo"}'),
            part(1, "", "weather"),
            part(1, '{"place":"Rome"}'),
            piece({}, "tool_calls"),
            fake.DONE,
        )
    )
    stream = lambda: list(  # noqa: E731
        client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], stream=True)
    )
    calls: dict[int, dict[str, str]] = {}
    for chunk in await off_loop(stream):
        for call in chunk.choices[0].delta.tool_calls or ():
            entry = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
            entry["arguments"] += call.function.arguments or ""
    assert calls == {
        0: {"id": "call_0", "name": "weather", "arguments": '{"place":"Oslo"}'},
        1: {"id": "call_1", "name": "weather", "arguments": '{"place":"Rome"}'},
    }


async def test_an_image_goes_through(client: OpenAI, provider: Upstream) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}]
    said = await off_loop(lambda: client.chat.completions.create(model=MODEL, messages=messages))
    assert said.choices[0].message.content == "what is it?"
    assert provider.seen[-1].json["messages"] == messages


async def test_structured_output_is_parsed(client: OpenAI, provider: Upstream) -> None:
    class Place(BaseModel):
        city: str
        people: int

    provider.next(fake.answer(200, completion({"content": '{"city":"Oslo","people":717710}', "refusal": None})))
    said = await off_loop(lambda: client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Place))
    assert said.choices[0].message.parsed == Place(city="Oslo", people=717710)
    assert provider.seen[-1].json["response_format"]["json_schema"]["schema"]["required"] == ["city", "people"]


async def test_logprobs(client: OpenAI, provider: Upstream) -> None:
    logprobs = {"content": [{"token": "hi", "logprob": -0.1, "bytes": [104, 105], "top_logprobs": []}], "refusal": None}
    provider.next(fake.answer(200, completion({"content": "hi"}, logprobs=logprobs)))
    said = await off_loop(
        lambda: client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2)
    )
    assert said.choices[0].logprobs.content[0].logprob == -0.1
    assert provider.seen[-1].json["top_logprobs"] == 2


async def test_legacy_completions_of_a_completion_model(client: OpenAI, provider: Upstream) -> None:
    model = "openai/gpt-3.5-turbo-instruct"
    said = await off_loop(lambda: client.completions.create(model=model, prompt="once upon"))
    assert (said.object, said.choices[0].text) == ("text_completion", "once upon")
    assert provider.seen[-1].path == "/v1/completions"
    chunks = await off_loop(lambda: list(client.completions.create(model=model, prompt="once", stream=True)))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "once"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_legacy_completions_of_a_chat_model(client: OpenAI, provider: Upstream) -> None:
    said = await off_loop(lambda: client.completions.create(model=MODEL, prompt="once upon"))
    assert (said.object, said.choices[0].text) == ("text_completion", "once upon")
    assert provider.seen[-1].path == "/v1/chat/completions"
    chunks = await off_loop(lambda: list(client.completions.create(model=MODEL, prompt="once", stream=True)))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "once"
    assert {chunk.object for chunk in chunks} == {"text_completion"}


async def test_embeddings_are_floats_either_way(client: OpenAI, provider: Upstream) -> None:
    model = "openai/text-embedding-3-small"
    default = await off_loop(lambda: client.embeddings.create(model=model, input=["a", "bcd"]))
    assert provider.seen[-1].json["encoding_format"] == "base64"  # what the client asks for by itself
    floats = await off_loop(lambda: client.embeddings.create(model=model, input=["a", "bcd"], encoding_format="float"))
    assert (
        [each.embedding for each in default.data] == [each.embedding for each in floats.data] == [[1.0] * 3, [3.0] * 3]
    )
    raw = await off_loop(
        lambda: client.embeddings.with_raw_response.create(model=model, input="a", encoding_format="base64")
    )
    assert struct.unpack("<3f", base64.b64decode(raw.http_response.json()["data"][0]["embedding"])) == (1.0, 1.0, 1.0)


async def test_models_list_and_retrieve(client: OpenAI) -> None:
    models = await off_loop(lambda: list(client.models.list()))
    assert MODEL in {model.id for model in models}
    one = await off_loop(lambda: client.models.retrieve(MODEL))
    assert (one.id, one.object, one.provider) == (MODEL, "model", "openai")
    assert one.pricing["input_cost_per_1k"] == 0.00015
    with pytest.raises(openai.NotFoundError):
        await off_loop(lambda: client.models.retrieve("no-such-model"))


async def test_headers_of_a_raw_response(server: Server, provider: Upstream, make_key: Callable[..., Any]) -> None:
    key = make_key(rpm=50, tpm=100_000)["key"]
    with OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0) as client:
        raw = await off_loop(lambda: client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO))
    headers = raw.headers
    assert headers["x-request-id"] == raw.parse().id == raw.request_id
    assert headers["x-lightrail-provider"] == "openai"
    assert headers["x-lightrail-model"] == "gpt-4o-mini"
    assert headers["x-lightrail-attempts"] == "1"
    assert headers["x-lightrail-cache"] == "off"
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("50", "49")
    assert 0 < int(headers["x-ratelimit-remaining-tokens"]) < 100_000
    assert headers["x-ratelimit-reset-tokens"].endswith("s")
    assert headers["cache-control"] == "no-store"
    assert "gateway;dur=" in headers["server-timing"]
    assert "upstream;dur=" in headers["server-timing"]


async def test_the_async_client(async_client: AsyncOpenAI) -> None:
    said = await async_client.chat.completions.create(model=MODEL, messages=HELLO)
    assert said.choices[0].message.content == "hello"
    stream = await async_client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "hello"
    async with async_client.chat.completions.stream(model=MODEL, messages=HELLO) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.content == "hello"


UPSTREAM_STATUSES = [
    (400, fake.error("bad parameter", param="temperature", code="invalid_value"), openai.BadRequestError, 400),
    (401, fake.error("Incorrect API key provided: sk-xyz", code="invalid_api_key"), openai.InternalServerError, 502),
    (402, fake.error("Insufficient balance"), openai.InternalServerError, 502),
    (403, fake.error("Country not supported"), openai.InternalServerError, 502),
    (404, fake.error("The model does not exist", code="model_not_found"), openai.NotFoundError, 404),
    (422, {"detail": [{"loc": ["body", "x"], "msg": "field required"}]}, openai.BadRequestError, 400),
    (429, fake.error("Rate limit reached", code="rate_limit_exceeded"), openai.RateLimitError, 429),
    (429, fake.error("You exceeded your current quota", code="insufficient_quota"), openai.InternalServerError, 502),
    (500, fake.error("The server had an error", "server_error"), openai.InternalServerError, 502),
    (503, b"<html>busy</html>", openai.InternalServerError, 503),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "body", "raised", "seen"), UPSTREAM_STATUSES)
async def test_every_upstream_refusal_is_the_right_exception(
    server: Server,
    async_client: AsyncOpenAI,
    provider: Upstream,
    status: int,
    body: Any,
    raised: Any,
    seen: int,
    stream: bool,
) -> None:
    provider.always("gpt-4o-mini", fake.answer(status, body))
    server.wake("openai")
    with pytest.raises(raised) as refusal:
        await async_client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert refusal.value.status_code == seen
    assert set(refusal.value.response.json()["error"]) == {"message", "type", "param", "code"}
    assert refusal.value.request_id.startswith("gen-")
    assert "sk-xyz" not in refusal.value.response.text
    assert "<html>" not in refusal.value.response.text
    server.wake("openai")


async def test_our_own_refusals_are_the_right_exceptions(server: Server, make_key: Callable[..., Any]) -> None:
    def ask(key: str, **more: Any) -> None:
        with OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0) as client:
            client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **more})

    good = make_key()["key"]
    cases: list[tuple[Any, str, str, dict[str, Any]]] = [
        (openai.AuthenticationError, "invalid_api_key", "lr-nonsense", {}),
        (openai.BadRequestError, "decimal_above_max_value", good, {"temperature": 3}),
        (openai.NotFoundError, "model_not_found", good, {"model": "no-such-model"}),
        (openai.PermissionDeniedError, "key_disabled", make_key(enabled=False)["key"], {}),
        (openai.PermissionDeniedError, "key_expired", make_key(expires_at=1)["key"], {}),
        (openai.PermissionDeniedError, "model_not_allowed", make_key(models=["groq/*"])["key"], {}),
        (openai.PermissionDeniedError, "insufficient_quota", make_key(balance_usd=0.0000001)["key"], {}),
        (
            openai.PermissionDeniedError,
            "model_not_priced",
            make_key(balance_usd=5)["key"],
            {"model": "openai/unheard-of"},
        ),
        (openai.RateLimitError, "request_too_large_for_limit", make_key(tpm=5)["key"], {}),
    ]
    for raised, code, key, more in cases:
        with pytest.raises(raised) as refusal:
            await off_loop(lambda key=key, more=more: ask(key, **more))
        assert refusal.value.code == code


async def test_a_stream_that_breaks_raises(async_client: AsyncOpenAI, provider: Upstream) -> None:
    provider.next(fake.stream(piece({"role": "assistant", "content": "half"}), end=False), fake.close())
    stream = await async_client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    said = ""
    with pytest.raises(openai.APIError) as broken:
        async for chunk in stream:
            said += chunk.choices[0].delta.content or ""
    assert said == "half"
    assert broken.value.code == "upstream_unavailable"


async def test_a_slow_provider_is_waited_for_no_longer_than_the_client_asks(
    async_client: AsyncOpenAI, provider: Upstream
) -> None:
    provider.next(fake.sleep(5), fake.echo())
    with pytest.raises(openai.APITimeoutError):
        await async_client.chat.completions.create(model=MODEL, messages=HELLO, timeout=0.3)
