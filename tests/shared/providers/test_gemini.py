"""What is sent to Gemini, and what is made of its answers."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.catalog import Catalog, Deployment
from shared.errors import FAULTS, ProviderError, UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.gemini import DIALECT
from shared.schema import Call, Usage, parse
from shared.settings import Settings
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.kit import Kit, streamed, whole

KEY = "AIzaUnit0123456789"
CATALOG = Catalog.load(Settings.read({"GEMINI_API_KEY": KEY, "GATEWAY_CONFIG": "none"}), PriceTable.vendored())
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
WEATHER = {"name": "weather", "description": "Of a place", "parameters": {"type": "object", "properties": {"at": {}}}}
TOOLS = [{"type": "function", "function": WEATHER}]


def at(model: str = "gemini-2.5-flash") -> Deployment:
    return CATALOG.resolve(f"gemini/{model}").deployments[0]


FLASH, THREE, PLAIN = at(), at("gemini-3.5-flash"), at("gemini-2.0-flash")


def ask(**body: Any) -> Call:
    return parse("chat", json.dumps({"model": "asked", "messages": HI, **body}).encode())


def sent(call: Call, to: Deployment = FLASH, max_tokens: int | None = None) -> dict[str, Any]:
    return json.loads(DIALECT.request(call, to, max_tokens).content)


def config(to: Deployment = FLASH, **body: Any) -> dict[str, Any]:
    return sent(ask(**body), to).get("generationConfig", {})


def contents(*messages: dict[str, Any], to: Deployment = FLASH) -> list[dict[str, Any]]:
    return sent(ask(messages=list(messages)), to)["contents"]


def refusal(call: Call, to: Deployment = FLASH) -> str | None:
    with pytest.raises(UnsupportedParameter) as caught:
        DIALECT.request(call, to, None)
    return caught.value.param


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def calling(*calls: tuple[str, str], content: str | None = None, **more: Any) -> dict[str, Any]:
    """An assistant's message that calls `weather`: ids and arguments."""
    made = [
        {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}, **more}
        for call_id, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(call_id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# What is sent


def test_a_plain_request() -> None:
    outgoing = DIALECT.request(ask(), FLASH, None)
    root = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-flash"
    assert outgoing.url == f"{root}:generateContent"
    assert outgoing.headers == {"content-type": "application/json", "x-goog-api-key": KEY}
    assert json.loads(outgoing.content) == {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
    assert DIALECT.request(ask(stream=True), FLASH, None).url == f"{root}:streamGenerateContent?alt=sse"
    assert "/models/a%2Fb%3Ac:generateContent" in DIALECT.request(ask(), at("a/b:c"), None).url


def test_parameters_go_under_geminis_names() -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "n": 2, "seed": 3, "stop": ["a", "b"], "max_tokens": 9}
    given |= {"presence_penalty": 1, "frequency_penalty": -1, "logprobs": True, "top_logprobs": 2}
    assert config(PLAIN, **given) == {
        "temperature": 0.5,
        "topP": 0.9,
        "topK": 7,
        "candidateCount": 2,
        "seed": 3,
        "stopSequences": ["a", "b"],
        "maxOutputTokens": 9,
        "presencePenalty": 1,
        "frequencyPenalty": -1,
        "responseLogprobs": True,
        "logprobs": 2,
    }
    assert DIALECT.request(ask(**given), PLAIN, None).dropped == ()
    assert config(stop="x")["stopSequences"] == ["x"]
    assert config(max_completion_tokens=6, max_tokens=5)["maxOutputTokens"] == 6
    assert sent(ask(), FLASH, 77)["generationConfig"] == {"maxOutputTokens": 77}


def test_what_it_lacks_is_dropped_and_told() -> None:
    tuned: dict[str, Any] = {"user": "u", "logit_bias": {"1": 1}, "presence_penalty": 1, "logprobs": True}
    outgoing = DIALECT.request(ask(**tuned, tools=TOOLS, parallel_tool_calls=False, seed=2**40), FLASH, None)
    assert outgoing.dropped == ("logit_bias", "logprobs", "parallel_tool_calls", "presence_penalty", "seed", "user")
    assert json.loads(outgoing.content)["generationConfig"] == {"seed": 2**31 - 1}
    harmless = ask(tools=TOOLS, parallel_tool_calls=True, modalities=["text"], stream=True, stream_options={})
    assert DIALECT.request(harmless, FLASH, None).dropped == ()
    assert refusal(ask(user="u", strict=True)) == "user"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "x"}}, "audio"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"messages": [user([{"type": "video_url", "video_url": {"url": "x"}}])]}, "messages"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "http://a.example/b.png"}}])]}, "messages"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "data:image/png,raw"}}])]}, "messages"),
        ({"messages": [user([{"type": "file", "file": {"file_id": "file-abc"}}])]}, "messages"),
        *(
            ({"messages": [*HI, {"role": role, "content": [part]}]}, "messages")
            for role, part in (
                ("system", {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}),
                ("developer", {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}),
                ("system", {"type": "file", "file": {"file_data": "https://a.example/b.pdf"}}),
                ("assistant", {"type": "file", "file": {"file_data": "https://a.example/b.pdf"}}),
            )
        ),
        ({"messages": [*HI, {"role": "function", "name": "f", "content": "1"}]}, "messages"),
        ({"messages": [*HI, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]}, "messages"),
        ({"messages": [*HI, calling(("1", "[1]")), result("1", "x")]}, "messages"),
        ({"messages": [*HI, calling(("1", "{oops")), result("1", "x")]}, "messages"),
    ],
)
def test_what_it_cannot_be_told_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert refusal(ask(**body)) == param


def test_several_choices_are_for_older_models() -> None:
    assert config(n=2) == {"candidateCount": 2}
    assert refusal(ask(n=2), THREE) == "n"
    assert config(THREE, n=1) == {"candidateCount": 1}


def test_the_system_is_told_apart_and_neighbours_are_one_turn() -> None:
    body = sent(
        ask(
            messages=[
                {"role": "system", "content": "one"},
                user("a"),
                user([{"type": "text", "text": "b"}, {"type": "text", "text": ""}]),
                {"role": "assistant", "content": "c"},
                {"role": "developer", "content": [{"type": "text", "text": "two"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "d"}]},
                {"role": "assistant", "content": ""},
                user("e"),
            ]
        )
    )
    assert body["systemInstruction"] == {"parts": [{"text": "one"}, {"text": "two"}]}
    assert body["contents"] == [
        {"role": "user", "parts": [{"text": "a"}, {"text": "b"}]},
        {"role": "model", "parts": [{"text": "c"}, {"text": "d"}]},
        {"role": "user", "parts": [{"text": "e"}]},
    ]
    alone = sent(ask(messages=[{"role": "system", "content": "say hi"}]))
    assert alone == {"contents": [{"role": "user", "parts": [{"text": "say hi"}]}]}


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        (
            {"type": "image_url", "image_url": {"url": "data:image/webp;base64,AAAA", "detail": "low"}},
            {"inlineData": {"mimeType": "image/webp", "data": "AAAA"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://a.example/b.PNG?c=d.e"}},
            {"fileData": {"fileUri": "https://a.example/b.PNG?c=d.e", "mimeType": "image/png"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "gs://bucket/photo"}, "cache_control": {"type": "ephemeral"}},
            {"fileData": {"fileUri": "gs://bucket/photo"}},
        ),
        (
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}},
            {"inlineData": {"mimeType": "application/pdf", "data": "JVBE"}},
        ),
        (
            {"type": "file", "file": {"file_id": "https://generativelanguage.googleapis.com/v1beta/files/abc"}},
            {"fileData": {"fileUri": "https://generativelanguage.googleapis.com/v1beta/files/abc"}},
        ),
        (
            {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}},
            {"inlineData": {"mimeType": "audio/wav", "data": "UklG"}},
        ),
    ],
)
def test_images_files_and_audio(part: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert contents(user([part]))[0]["parts"] == [wanted]


def test_tools_and_how_they_are_to_be_used() -> None:
    body = sent(ask(tools=TOOLS))
    assert body["tools"] == [
        {"functionDeclarations": [{**{k: v for k, v in WEATHER.items() if k != "parameters"},
                                   "parametersJsonSchema": WEATHER["parameters"]}]}
    ]  # fmt: skip
    assert "toolConfig" not in body
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, wanted in (
        ("auto", None),
        ("none", {"mode": "NONE"}),
        ("required", {"mode": "ANY"}),
        (named, {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
    ):
        built = sent(ask(tools=TOOLS, tool_choice=choice))
        assert built.get("toolConfig") == (wanted and {"functionCallingConfig": wanted})
    strict = DIALECT.request(ask(tools=[{"type": "function", "function": {**WEATHER, "strict": True}}]), FLASH, None)
    assert strict.dropped == ("tools.strict",)


@pytest.mark.parametrize(
    ("given", "wanted", "dropped"),
    [
        ({"cached_content": "cachedContents/abc"}, "cachedContents/abc", ()),
        ({"extra_body": {"google": {"cached_content": "cachedContents/abc"}}}, "cachedContents/abc", ()),
        (
            {"extra_body": {"google": {"cached_content": "cachedContents/abc", "safety_settings": []}}},
            "cachedContents/abc",
            ("extra_body",),
        ),
        ({"cached_content": 5}, None, ("cached_content",)),
        ({"extra_body": {"google": {"safety_settings": []}}}, None, ("extra_body",)),
    ],
)
def test_a_cache_of_ones_own_is_named(given: dict[str, Any], wanted: str | None, dropped: tuple[str, ...]) -> None:
    assert sent(ask(**given)).get("cachedContent") == wanted
    assert DIALECT.request(ask(**given), FLASH, None).dropped == dropped


def test_answers_in_json() -> None:
    assert config(response_format={"type": "text"}) == {}
    assert config(response_format={"type": "json_object"}) == {"responseMimeType": "application/json"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}}}
    wanted = {"responseMimeType": "application/json", "responseJsonSchema": {"type": "object"}}
    assert config(response_format=form) == wanted


def test_only_newer_models_take_json_and_tools_at_once() -> None:
    both = ask(tools=TOOLS, response_format={"type": "json_object"})
    for model, taken in (("gemini-2.0-flash", False), ("gemini-2.5-pro", False), ("gemini-3.5-flash", True)):
        assert both.features.isdisjoint(at(model).provider.refused(model)) is taken
        assert sent(both, at(model))["tools"]  # where nobody else can be asked, it says so itself


@pytest.mark.parametrize(
    ("model", "asked", "wanted"),
    [
        ("gemini-2.5-flash", {"reasoning_effort": "none"}, {"thinkingBudget": 0}),
        ("gemini-2.5-flash", {"reasoning_effort": "low"}, {"thinkingBudget": 1024, "includeThoughts": True}),
        ("gemini-2.5-flash", {"reasoning_effort": "max"}, {"thinkingBudget": 24576, "includeThoughts": True}),
        ("gemini-2.5-flash", {"reasoning": {"max_tokens": 2000}}, {"thinkingBudget": 2000, "includeThoughts": True}),
        ("gemini-2.5-flash", {"reasoning": {"effort": "high", "exclude": True}}, {"thinkingBudget": 24576}),
        ("gemini-2.5-flash", {"reasoning": {"enabled": False}}, {"thinkingBudget": 0}),
        ("gemini-2.5-flash", {"reasoning": {"exclude": True}}, None),
        ("gemini-2.5-pro", {"reasoning_effort": "none"}, {"thinkingBudget": 128}),
        ("gemini-3-pro-preview", {"reasoning_effort": "medium"}, {"thinkingLevel": "HIGH", "includeThoughts": True}),
        ("gemini-3.1-pro-preview", {"reasoning_effort": "none"}, {"thinkingLevel": "LOW"}),
        ("gemini-3.5-flash", {"reasoning_effort": "minimal"}, {"thinkingLevel": "MINIMAL", "includeThoughts": True}),
        ("gemini-3.8-flash", {"reasoning_effort": "minimal"}, {"thinkingLevel": "LOW", "includeThoughts": True}),
        ("gemini-3.5-flash", {"reasoning_effort": "xhigh"}, {"thinkingLevel": "HIGH", "includeThoughts": True}),
        ("gemini-3.5-flash", {"reasoning": {"max_tokens": 5000}}, {"thinkingLevel": "MEDIUM", "includeThoughts": True}),
        ("gemini-3.5-flash", {"reasoning": {"max_tokens": 10**6}}, {"thinkingLevel": "HIGH", "includeThoughts": True}),
        ("gemini-flash-latest", {"reasoning_effort": "low"}, {"thinkingLevel": "LOW", "includeThoughts": True}),
        ("gemini-3.5-flash", {}, None),
    ],
)
def test_how_much_is_thought(model: str, asked: dict[str, Any], wanted: Any) -> None:
    outgoing = DIALECT.request(ask(**asked), at(model), None)
    assert json.loads(outgoing.content).get("generationConfig", {}).get("thinkingConfig") == wanted
    never_off = asked.get("reasoning_effort") == "none" and model != "gemini-2.5-flash"
    assert outgoing.dropped == (("reasoning_effort",) if never_off else ())


def test_a_model_that_does_not_think_is_not_told_to() -> None:
    for asked in ({"reasoning_effort": "low"}, {"reasoning": {"effort": "low"}}):
        outgoing = DIALECT.request(ask(**asked), PLAIN, None)
        assert outgoing.dropped == tuple(asked)
        assert "generationConfig" not in json.loads(outgoing.content)


# Conversations with tools


def test_calls_and_their_results() -> None:
    turns = contents(
        user("?"),
        calling(("toolu_01/+", '{"b": 1.0, "a": 12345678901234567890}'), ("ünï", " "), content="Let me see."),
        result("ünï", [{"type": "text", "text": "dry"}, {"type": "text", "text": " and warm"}]),
        result("toolu_01/+", '{"error": "rain"}'),
        user("So?"),
    )
    calls = [
        {"functionCall": {"id": "toolu_01/+", "name": "weather", "args": {"b": 1.0, "a": 12345678901234567890}}},
        {"functionCall": {"id": "ünï", "name": "weather", "args": {}}},
    ]
    answers = [
        {"functionResponse": {"id": "ünï", "name": "weather", "response": {"output": "dry and warm"}}},
        {"functionResponse": {"id": "toolu_01/+", "name": "weather", "response": {"output": '{"error": "rain"}'}}},
    ]
    assert turns == [
        {"role": "user", "parts": [{"text": "?"}]},
        {"role": "model", "parts": [{"text": "Let me see."}, *calls]},
        {"role": "user", "parts": [*answers, {"text": "So?"}]},
    ]


def test_arguments_go_as_they_came() -> None:
    call = ask(messages=[*HI, calling(("1", '{"b": 1.0,  "a":1e3}')), result("1", "x")])
    assert b'"args":{"b": 1.0,  "a":1e3}' in DIALECT.request(call, FLASH, None).content


def test_a_tool_may_give_an_image() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    part = contents(*HI, calling(("1", "{}")), result("1", [{"type": "text", "text": "here"}, image]))[2]["parts"][0]
    wanted = {"id": "1", "name": "weather", "response": {"output": "here"}}
    inline = {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}
    assert part == {"functionResponse": {**wanted, "parts": [inline]}}


SIGNED = {"extra_content": {"google": {"thought_signature": "c2lnbmVk"}}}
FOREIGN = {"extra_content": {"anthropic": {"thinking": []}}}


def test_signatures_return_where_they_were() -> None:
    message = calling(("1", "{}"), ("2", "{}"), content="Well,")
    message["tool_calls"][0] |= SIGNED
    text = {"role": "assistant", "content": "It rains.", "extra_content": {"google": {"thought_signature": "dGV4dA=="}}}
    results = [result("1", "x"), result("2", "y")]
    for to in (FLASH, THREE):
        turns = contents(*HI, message, *results, text, *HI, to=to)
        assert [part.get("thoughtSignature") for part in turns[1]["parts"]] == [None, "c2lnbmVk", None]
        assert turns[3]["parts"] == [{"text": "It rains.", "thoughtSignature": "dGV4dA=="}]
    silent = {"role": "assistant", "content": None, "extra_content": text["extra_content"]}
    assert contents(*HI, silent)[1]["parts"] == [{"text": "", "thoughtSignature": "dGV4dA=="}]


@pytest.mark.parametrize("more", [{}, FOREIGN, {"extra_content": None}, {"extra_content": {"google": "?"}}])
def test_calls_that_others_made_are_said_to_be_so(more: dict[str, Any]) -> None:
    history = (*HI, calling(("1", "{}"), ("2", "{}"), **more), result("1", "x"), result("2", "y"))
    history = (*history, calling(("3", "{}"), **more), result("3", "z"))
    for to, first in ((THREE, "skip_thought_signature_validator"), (FLASH, None)):
        turns = contents(*history, to=to)
        assert [part.get("thoughtSignature") for part in turns[1]["parts"]] == [first, None]
        assert [part.get("thoughtSignature") for part in turns[3]["parts"]] == [first]


def test_what_openai_has_no_shape_for_goes_to_and_fro() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": "AAAA"}, "thoughtSignature": "aW1n"}
    parts = [{"executableCode": {"code": "1+1", "language": "PYTHON"}}, {"text": "See:"}, {}, image]
    grounds = {"groundingMetadata": {"webSearchQueries": ["x"]}}
    body = {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP", **grounds}]}
    message = DIALECT.completion(ask(), FLASH, body).body["choices"][0]["message"]
    assert message["content"] == "See:"
    assert message["extra_content"] == {"google": {"parts": [parts[0], image], **grounds}}
    assert contents(*HI, {"role": "assistant", **message})[1]["parts"] == [parts[0], image, {"text": "See:"}]


def test_a_picture_that_a_model_drew_is_its_own() -> None:
    drawn = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    turn = contents(*HI, {"role": "assistant", "content": [drawn]}, *HI)[1]
    assert turn == {"role": "model", "parts": [{"inlineData": {"mimeType": "image/png", "data": "AAAA"}}]}


# Whole answers


def candidate(*parts: dict[str, Any], finish: Any = "STOP", **more: Any) -> dict[str, Any]:
    return {"content": {"role": "model", "parts": list(parts)}, "finishReason": finish, **more}


def answered(*candidates: dict[str, Any], call: Call | None = None, **body: Any) -> dict[str, Any]:
    return DIALECT.completion(call or ask(), FLASH, {"candidates": list(candidates), **body}).body


def function_call(name: str = "weather", signature: str | None = None, **call: Any) -> dict[str, Any]:
    signed = {"thoughtSignature": signature} if signature else {}
    return {"functionCall": {"name": name, **call}, **signed}


def test_a_whole_answer() -> None:
    thought = {"text": "Hm.", "thought": True}
    body = answered(candidate(thought, {"text": "Hel"}, {"text": "lo", "thoughtSignature": "dGV4dA=="}))
    message = {
        "content": "Hello",
        "reasoning_content": "Hm.",
        "extra_content": {"google": {"thought_signature": "dGV4dA=="}},
    }
    finish = {"finish_reason": "stop", "native_finish_reason": "STOP"}
    assert body == {"choices": [{"index": 0, "message": message, **finish}]}


def test_calls_in_a_whole_answer() -> None:
    made = answered(candidate(function_call(signature="cw==", args={"at": "Oslo"}, id="fc-1"), function_call("now")))
    (choice,) = made["choices"]
    assert (choice["finish_reason"], choice["native_finish_reason"]) == ("tool_calls", "STOP")
    assert choice["message"]["content"] is None
    first, second = choice["message"]["tool_calls"]
    assert first == {
        "id": "fc-1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"at":"Oslo"}'},
        "extra_content": {"google": {"thought_signature": "cw=="}},
    }
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert second["id"].startswith("call_")
    assert "extra_content" not in second
    cut = answered(candidate(function_call(), finish="MAX_TOKENS"))
    assert cut["choices"][0]["finish_reason"] == "length"


FILTERED = "SAFETY RECITATION LANGUAGE BLOCKLIST PROHIBITED_CONTENT SPII MODEL_ARMOR"
FILTERED += " IMAGE_SAFETY IMAGE_PROHIBITED_CONTENT IMAGE_RECITATION"
BROKEN = "MALFORMED_FUNCTION_CALL UNEXPECTED_TOOL_CALL TOO_MANY_TOOL_CALLS OTHER NO_IMAGE MISSING_THOUGHT_SIGNATURE"
BROKEN += " FINISH_REASON_UNSPECIFIED NOT_YET_INVENTED"


@pytest.mark.parametrize("word", FILTERED.split())
def test_what_a_filter_stopped(word: str) -> None:
    (choice,) = answered({"content": {}, "finishReason": word})["choices"]
    wanted = {"index": 0, "message": {"content": ""}, "finish_reason": "content_filter", "native_finish_reason": word}
    assert choice == wanted


@pytest.mark.parametrize("word", BROKEN.split())
def test_no_other_word_is_a_silent_stop(word: str) -> None:
    broken = {"finishReason": word, "finishMessage": "Malformed function call: see https://x.example/y"}
    for read in (
        lambda: answered(broken),
        lambda: DIALECT.stream(ask(), FLASH)(None, {"candidates": [broken]}),
    ):
        with pytest.raises(ProviderError, match=rf"{word} Malformed function call: see \[url\]") as caught:
            read()
        assert caught.value.fault == "server"


def test_a_prompt_that_was_blocked() -> None:
    usage = {"promptTokenCount": 7, "totalTokenCount": 7}
    body = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage}
    call = ask(n=2)
    finish = {"finish_reason": "content_filter", "native_finish_reason": "PROHIBITED_CONTENT"}
    piece = DIALECT.completion(call, FLASH, body)
    assert piece.body["choices"] == [{"index": i, "message": {"content": None}, **finish} for i in (0, 1)]
    assert piece.usage == Usage(input=7)
    (piece,) = DIALECT.stream(call, FLASH)(None, body)
    assert piece.body["choices"] == [{"index": i, "delta": {}, **finish} for i in (0, 1)]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({}, "empty"),
        ({"candidates": []}, "empty"),
        ({"promptFeedback": {}}, "empty"),
        ({"candidates": [{"content": {"parts": [{"text": "a"}]}}]}, "protocol"),
        ({"candidates": [{"content": "x", "finishReason": "STOP"}]}, "protocol"),
        ({"candidates": "x"}, "protocol"),
        ({"candidates": [candidate({"functionCall": {"args": {}}})]}, "protocol"),
        ({"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}, "overloaded"),
        ({"error": {"code": 500, "message": "boom", "status": "INTERNAL"}}, "server"),
        ({"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}}, "rate_limit"),
    ],
)
def test_what_is_no_answer_is_a_failure(body: dict[str, Any], fault: str) -> None:
    with pytest.raises(ProviderError) as caught:
        DIALECT.completion(ask(), FLASH, body)
    assert caught.value.fault == fault
    if "error" in body:
        with pytest.raises(ProviderError) as caught:
            DIALECT.stream(ask(), FLASH)(None, body)
        assert caught.value.fault == fault


def test_logprobs() -> None:
    chosen = [{"token": "é", "logProbability": -0.5, "tokenId": 1}]
    tops = [{"candidates": [{"token": "é", "logProbability": -0.5}, {"token": "e", "logProbability": -1.5}]}]
    best = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    other = {"token": "e", "logprob": -1.5, "bytes": [101]}
    for more, top in (({"topCandidates": tops}, [best, other]), ({}, [])):
        made = answered(candidate({"text": "é"}, logprobsResult={"chosenCandidates": chosen, **more}))
        content = [{**best, "top_logprobs": top}]
        assert made["choices"][0]["logprobs"] == {"content": content, "refusal": None}


def counted(**raw: Any) -> Usage | None:
    return DIALECT.completion(ask(), FLASH, {"candidates": [candidate()], "usageMetadata": raw}).usage


def test_usage_is_split_by_geminis_rule() -> None:
    raw = {"promptTokenCount": 10, "cachedContentTokenCount": 6, "toolUsePromptTokenCount": 5}
    raw |= {"candidatesTokenCount": 3, "thoughtsTokenCount": 20, "totalTokenCount": 38, "trafficType": "ON_DEMAND"}
    usage = counted(**raw)
    assert usage == Usage(input=9, cache_read=6, output=23, reasoning=20)
    assert usage.total == 38
    assert counted(promptTokenCount=10, totalTokenCount=10) == Usage(input=10)
    assert counted(trafficType="ON_DEMAND") is None
    assert counted(candidatesTokenCount=23, thoughtsTokenCount=67) is None


@pytest.mark.parametrize("wrong", [-1, "5", True, 5.0, [], 2**70])
def test_insane_counts_are_never_trusted(wrong: Any) -> None:
    assert counted(promptTokenCount=wrong) is None
    assert counted(promptTokenCount=5, candidatesTokenCount=wrong) is None


# Streams


def chunks(*events: dict[str, Any], call: Call | None = None) -> list[dict[str, Any]]:
    translate = DIALECT.stream(call or ask(stream=True), FLASH)
    return [piece.body for event in events for piece in translate(None, event)]


def test_calls_keep_their_index_from_chunk_to_chunk() -> None:
    made = chunks(
        {"candidates": [{"content": {"parts": [function_call(signature="cw==")]}}]},
        {"candidates": [{"content": {"parts": [function_call("now"), function_call("then")]}}]},
        {"candidates": [candidate({"text": ""})]},
    )
    calls = [call for body in made for call in body["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather"), (1, "now"), (2, "then")]
    assert len({call["id"] for call in calls}) == 3
    assert calls[0]["extra_content"] == {"google": {"thought_signature": "cw=="}}
    last = made[-1]["choices"][0]
    assert (last["finish_reason"], last["native_finish_reason"]) == ("tool_calls", "STOP")


def test_candidates_are_told_apart() -> None:
    made = chunks(
        {"candidates": [{"content": {"parts": [{"text": "a"}]}, "index": 0}, candidate(function_call(), index=1)]},
        {"candidates": [candidate({"text": "b"}, index=0)]},
    )
    finishes = [(choice["index"], choice.get("finish_reason")) for body in made for choice in body["choices"]]
    assert finishes == [(0, None), (1, "tool_calls"), (0, "stop")]


def test_usage_alone_is_a_chunk_without_choices() -> None:
    translate = DIALECT.stream(ask(), FLASH)
    (piece,) = translate(None, {"usageMetadata": {"promptTokenCount": 3}})
    assert piece == ({"choices": []}, Usage(input=3))


# Legacy completions and embeddings


def test_a_prompt_is_asked_as_a_user_message() -> None:
    call = Call("completions", {"model": "a", "prompt": "Once", "max_tokens": 4, "stream": True})
    body = sent(call)
    assert body["contents"] == [{"role": "user", "parts": [{"text": "Once"}]}]
    assert body["generationConfig"] == {"maxOutputTokens": 4}
    (piece,) = DIALECT.stream(call, FLASH)(None, {"candidates": [candidate({"text": " upon"})]})
    assert piece.body["choices"][0]["text"] == " upon"
    blocked = DIALECT.completion(call, FLASH, {"promptFeedback": {"blockReason": "OTHER"}})
    assert blocked.body["choices"][0]["finish_reason"] == "content_filter"


EMBEDDER = at("gemini-embedding-001")


def embed(**body: Any) -> Call:
    return Call("embeddings", {"model": "e", "input": "x", **body})


def test_texts_are_embedded_in_one_batch() -> None:
    outgoing = DIALECT.request(
        embed(input=["a", "b"], dimensions=8, encoding_format="base64", user="u"), EMBEDDER, None
    )
    assert outgoing.url.endswith("/models/gemini-embedding-001:batchEmbedContents")
    asked = {"model": "models/gemini-embedding-001", "outputDimensionality": 8}
    requests = [{**asked, "content": {"parts": [{"text": text}]}} for text in "ab"]
    assert json.loads(outgoing.content) == {"requests": requests}
    assert outgoing.dropped == ("user",)
    for body in ({"input": [1, 2]}, {"input": [[1], [2]]}, {"input": ["x"] * 101}):
        assert refusal(embed(**body), EMBEDDER) == "input"
    assert refusal(embed(), FLASH) == "model"


def test_vectors_of_a_reduced_size_are_made_one_long() -> None:
    body = {"embeddings": [{"values": [3.0, 4.0]}, {"values": [0.0, 0.0]}]}
    plain, usage = DIALECT.completion(embed(), EMBEDDER, body)
    assert [each["embedding"] for each in plain["data"]] == [[3.0, 4.0], [0.0, 0.0]]
    assert usage is None
    reduced = DIALECT.completion(embed(dimensions=2, encoding_format="base64"), EMBEDDER, body).body
    vectors = [struct.unpack("<2f", base64.b64decode(each["embedding"])) for each in reduced["data"]]
    assert math.hypot(*vectors[0]) == pytest.approx(1)
    assert vectors[0][0] == pytest.approx(0.6)
    assert vectors[1] == (0.0, 0.0)
    assert [each["index"] for each in reduced["data"]] == [0, 1]
    told = DIALECT.completion(embed(), EMBEDDER, {**body, "usageMetadata": {"promptTokenCount": 4}})
    assert told.usage == Usage(input=4)
    for wrong, fault in (({}, "empty"), ({"embeddings": [{}]}, "protocol")):
        with pytest.raises(ProviderError) as caught:
            DIALECT.completion(embed(), EMBEDDER, wrong)
        assert caught.value.fault == fault


# Refusals


def google(status: int, message: str = "no", *details: dict[str, Any], word: str = "INVALID_ARGUMENT") -> ProviderError:
    error = {"code": status, "message": message, "status": word, "details": list(details)}
    once = DIALECT.failure(status, {}, json.dumps({"error": error}).encode())
    listed = DIALECT.failure(status, {}, json.dumps([{"error": error}]).encode())
    assert (once.fault, once.message, once.retry_after) == (listed.fault, listed.message, listed.retry_after)
    return once


def quota(*ids: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": each} for each in ids]}


RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "12s"}


@pytest.mark.parametrize(
    ("refused", "fault", "wait"),
    [
        (google(429, "slow", quota("RequestsPerMinute-FreeTier"), RETRY, word="RESOURCE_EXHAUSTED"), "rate_limit", 12),
        (google(429, "slow", RETRY, word="RESOURCE_EXHAUSTED"), "rate_limit", 12),
        (google(429, "Please retry in 856.5ms.", word="RESOURCE_EXHAUSTED"), "rate_limit", 0.8565),
        (
            google(429, "gone", quota("RequestsPerDayPerModel-FreeTier"), RETRY, word="RESOURCE_EXHAUSTED"),
            "money",
            None,
        ),
        (google(429, "gone", quota("RequestsPerDayPerModel"), RETRY, word="RESOURCE_EXHAUSTED"), "rate_limit", 12),
        (google(400, "API key expired.", {"reason": "API_KEY_INVALID"}), "auth", None),
        (google(400, "User location is not supported for the API use.", word="FAILED_PRECONDITION"), "auth", None),
        (google(403, "Your API key was reported as leaked.", word="PERMISSION_DENIED"), "auth", None),
        (google(400, "The input token count (9) exceeds the maximum number of tokens allowed (8)."), "context", None),
        (google(400, "Invalid value at 'contents'"), "bad_request", None),
        (google(404, "models/x is not found for API version v1beta", word="NOT_FOUND"), "model_gone", None),
        (google(503, "The model is overloaded.", word="UNAVAILABLE"), "overloaded", None),
        (google(500, "An internal error has occurred.", word="INTERNAL"), "server", None),
        (google(429, "odd", {"violations": 7}, {"retryDelay": 5}, {"reason": []}), "rate_limit", None),
    ],
)
def test_what_a_refusal_means(refused: ProviderError, fault: str, wait: float | None) -> None:
    assert refused.fault == fault
    assert fault in FAULTS
    assert refused.retry_after == (wait and pytest.approx(wait))


def test_our_project_is_nobodys_business() -> None:
    refused = google(404, "Publisher Model `projects/our-project/locations/x/models/y` not found.", word="NOT_FOUND")
    assert "our-project" not in refused.message
    assert "locations/x/models/y" in refused.message


OF_CANDIDATES = "candidates content parts text thought thoughtSignature functionCall name args index finishReason"
OF_BODIES = "finishMessage usageMetadata promptTokenCount promptFeedback blockReason error code details violations"
OF_OTHERS = "logprobsResult chosenCandidates topCandidates embeddings values"
WORDS = st.sampled_from(f"{OF_CANDIDATES} {OF_BODIES} {OF_OTHERS}".split())
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("STOP"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(WORDS, JSONS, max_size=5), st.sampled_from(["chat", "completions", "embeddings"]))
def test_whatever_comes_is_an_answer_or_a_provider_error(body: Any, surface: Any) -> None:
    call = Call(surface, {"model": "a", "messages": HI, "prompt": "x", "input": "x", "dimensions": 2})
    with suppress(ProviderError):
        json.dumps(DIALECT.completion(call, FLASH, json.loads(json.dumps(body))).body)
    with suppress(ProviderError):
        json.dumps([piece.body for piece in DIALECT.stream(call, FLASH)(None, json.loads(json.dumps(body)))])
    assert DIALECT.failure(500, {}, json.dumps(body).encode()).message


# Through the gateway


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield Kit(store, lambda _: whole({}), {"GEMINI_API_KEY": KEY})
    await store.close()


@pytest.fixture
async def key(kit: Kit) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test")))[1]


def event(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\r\n\r\n"


SPOKEN = (
    event(
        candidates=[{"content": {"parts": [{"text": "Hm.", "thought": True}]}}], usageMetadata={"promptTokenCount": 4}
    ),
    event(candidates=[{"content": {"parts": [{"text": "Hel"}]}}]),
    event(
        candidates=[candidate({"text": "lo"})],
        usageMetadata={"promptTokenCount": 4, "candidatesTokenCount": 2, "thoughtsTokenCount": 3},
    ),
)
ASK = {"model": "gemini/gemini-2.5-flash", "messages": HI, "stream": True}


async def test_a_stream_ends_with_its_file(kit: Kit, key: str) -> None:
    kit.reply = lambda _: streamed(*SPOKEN)
    outcome = await kit.ask(key, ASK)
    assert outcome.text == "Hello"
    assert outcome.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert outcome.chunks[-1]["usage"]["completion_tokens"] == 5
    assert outcome.row.doc["native_finish_reason"] == "STOP"
    assert KEY not in str(kit.requests[0].url)


async def test_a_stream_without_its_finish_reason_is_a_failure(kit: Kit, key: str) -> None:
    kit.reply = lambda _: streamed(*SPOKEN[:-1])
    outcome = await kit.ask(key, ASK)
    assert "error" in outcome.chunks[-1]
    assert outcome.row.doc["status"] == "failed"


async def test_of_several_finish_reasons_stop_counts_least(kit: Kit, key: str) -> None:
    """Older models say STOP with every chunk, whatever comes after it."""
    said = [event(candidates=[candidate({"text": text}, index=0)]) for text in ("Co", "py")]
    kit.reply = lambda _: streamed(*said, event(candidates=[{"finishReason": "RECITATION", "index": 0}]))
    outcome = await kit.ask(key, ASK)
    assert outcome.text == "Copy"
    assert outcome.chunks[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_embeddings_without_usage_are_estimated(kit: Kit, key: str) -> None:
    kit.reply = lambda _: whole({"embeddings": [{"values": [1.0, 2.0]}]})
    outcome = await kit.ask(key, {"model": "gemini/gemini-embedding-001", "input": "hello world"}, "embeddings")
    assert outcome.chunks[0]["data"][0]["embedding"] == [1.0, 2.0]
    assert outcome.chunks[0]["usage"]["prompt_tokens"] > 0
    assert outcome.row.doc["tokens"]["source"] == "estimated"
    assert outcome.spent == outcome.row.cost > 0
