"""A stream's chunks make the body that a whole answer would have had."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from shared.assembly import assembled


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, index: int = 0, **more: Any) -> Any:
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish, "logprobs": None}
    return {"id": "gen-1", "object": "chat.completion.chunk", "model": "m", "choices": [{**choice, **more}]}


def message(*chunks: Any) -> Any:
    return assembled(chunks)["choices"][0]["message"]


def test_text_reasoning_and_what_stands_beside_the_choices() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    chunks = [
        {**chunk({"role": "assistant", "content": ""}), "usage": None, "system_fingerprint": "fp"},
        chunk({"reasoning_content": "Hm"}),
        chunk({"reasoning_content": "m."}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk(finish="stop"),
        {"id": "gen-1", "model": "m", "choices": [], "usage": usage, "lightrail": {"attempts": 1}},
    ]
    before = deepcopy(chunks)
    said = {"role": "assistant", "content": "Hello", "reasoning_content": "Hmm.", "refusal": None}
    assert assembled(chunks) == {
        "id": "gen-1",
        "object": "chat.completion",
        "model": "m",
        "system_fingerprint": "fp",
        "choices": [{"index": 0, "message": said, "finish_reason": "stop", "logprobs": None}],
        "usage": usage,
        "lightrail": {"attempts": 1},
    }
    assert chunks == before


def test_choices_that_come_mixed_and_out_of_order() -> None:
    body = assembled(
        [
            chunk({"content": "b"}, index=1),
            chunk({"content": "a"}),
            chunk({"content": "B"}, "length", 1),
            chunk({}, "stop"),
        ]
    )
    told = [(each["index"], each["message"]["content"], each["finish_reason"]) for each in body["choices"]]
    assert told == [(0, "a", "stop"), (1, "bB", "length")]


def test_reasoning_details_are_joined_as_openrouter_made_them() -> None:
    def text(**fields: Any) -> Any:
        return chunk({"reasoning_details": [{"type": "reasoning.text", "format": "anthropic-claude-v1", **fields}]})

    sealed = [{"type": "reasoning.encrypted", "data": data, "id": data, "index": 1} for data in ("x", "y")]
    said = message(
        chunk({"role": "assistant", "reasoning_details": []}),
        text(text="", signature="", index=0),
        text(text="Let", index=0),
        text(text=" me.", index=0),
        text(signature="s0", index=0),
        text(text="So", index=1),
        chunk({"reasoning_details": [{"type": "reasoning.summary", "summary": "**Ge", "index": 1}]}),
        chunk({"reasoning_details": [{"type": "reasoning.summary", "summary": "t**", "index": 1}, *sealed]}),
    )
    assert said["reasoning_details"] == [
        {"type": "reasoning.text", "format": "anthropic-claude-v1", "text": "Let me.", "signature": "s0", "index": 0},
        {"type": "reasoning.text", "format": "anthropic-claude-v1", "text": "So", "index": 1},
        {"type": "reasoning.summary", "summary": "**Get**", "index": 1},
        *sealed,
    ]


def test_tool_calls_by_index_with_their_arguments_joined() -> None:
    def call(index: int, **fields: Any) -> Any:
        return {"index": index, **fields}

    said = message(
        chunk({"role": "assistant", "content": None}),
        chunk({"tool_calls": [call(1, id="b", type="function", function={"name": "g", "arguments": ""})]}),
        chunk({"tool_calls": [call(0, id="a", type="function", function={"name": "f", "arguments": '{"x'})]}),
        chunk({"tool_calls": [call(0, function={"arguments": '": "\\'}), call(1, function={"arguments": "{}"})]}),
        chunk({"tool_calls": [call(0, function={"arguments": 'n"}'}, extra_content={"google": {"thought": "s"}})]}),
        chunk({}, "tool_calls"),
    )
    assert said["content"] is None
    assert said["tool_calls"] == [
        {
            "id": "a",
            "type": "function",
            "function": {"name": "f", "arguments": '{"x": "\\n"}'},
            "extra_content": {"google": {"thought": "s"}},
        },
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_extra_content_is_merged_and_the_old_function_call_joined() -> None:
    said = message(
        chunk({"extra_content": {"google": {"a": 1}}, "function_call": {"name": "f", "arguments": "{"}}),
        chunk({"extra_content": {"google": {"b": 2}}, "function_call": {"arguments": "}"}}),
    )
    assert said["extra_content"] == {"google": {"a": 1, "b": 2}}
    assert said["function_call"] == {"name": "f", "arguments": "{}"}


def test_refusal_and_logprobs() -> None:
    def token(text: str) -> Any:
        return {"token": text, "logprob": -1.0}

    body = assembled(
        [
            chunk({"refusal": "I can"}, logprobs={"content": None, "refusal": [token("I can")]}),
            chunk({"refusal": "not."}, logprobs={"content": None, "refusal": [token("not.")]}),
            chunk({}, "stop"),
        ]
    )
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": "I cannot."}
    assert choice["logprobs"] == {"content": None, "refusal": [token("I can"), token("not.")]}


def test_the_first_finish_reason_and_the_last_usage_hold() -> None:
    body = assembled(
        [
            {**chunk({"content": "a"}, "length", native_finish_reason="max"), "usage": {"completion_tokens": 9}},
            {**chunk({}, "stop", native_finish_reason="end"), "usage": {"completion_tokens": 12}},
        ]
    )
    choice = body["choices"][0]
    assert (choice["finish_reason"], choice["native_finish_reason"]) == ("length", "max")
    assert body["usage"] == {"completion_tokens": 12}


def test_a_text_completion() -> None:
    def piece(text: str, finish: str | None = None) -> Any:
        logprobs = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": [{text: -1.0}], "text_offset": [0]}
        choice = {"index": 0, "text": text, "logprobs": logprobs if text else None, "finish_reason": finish}
        return {"object": "text_completion", "choices": [choice]}

    body = assembled([piece("Hel"), piece("lo"), piece("", "stop")])
    assert body["object"] == "text_completion"
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "stop")
    assert choice["logprobs"]["tokens"] == ["Hel", "lo"]
    assert choice["logprobs"]["top_logprobs"] == [{"Hel": -1.0}, {"lo": -1.0}]


@pytest.mark.parametrize("chunks", [[], [{"choices": []}], [{"id": "x"}]])
def test_nothing_is_an_answer_without_choices(chunks: Any) -> None:
    assert assembled(chunks)["choices"] == []


def test_a_long_stream_takes_time_in_proportion() -> None:
    body = assembled(chunk({"content": "word "}) for _ in range(100_000))
    assert len(body["choices"][0]["message"]["content"]) == 500_000
