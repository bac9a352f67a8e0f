"""What a caller may send: refused with OpenAI's own path and code, or passed on as it was."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidRequest
from shared.schema import MAX_DEPTH, decode, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
    ({"presence_penalty": 3}, "presence_penalty", "decimal_above_max_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"n": 2.5}, "n", "invalid_type"),
    ({"max_tokens": "10"}, "max_tokens", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"stream": "false"}, "stream", "invalid_type"),
    ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": [None]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 7.5}]}, "messages[0].content", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "invalid_type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        "missing_required_parameter",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "has space"}}]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f\n"}}]}, "tools[0].function.name", "invalid_value"),
    ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
    ({"model": ""}, "model", "empty_string"),
    ({"model": 5}, "model", "invalid_type"),
    ({"models": ["a"] * 9}, "models", "array_above_max_length"),
]


@pytest.mark.parametrize(("change", "param", "code"), REFUSED)
def test_a_wrong_chat_parameter_is_named(change: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse("chat", orjson.dumps({**CHAT, **change}))
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.body()["error"]["message"]


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_what_is_required_is_asked_for(missing: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != missing}
    with pytest.raises(InvalidRequest) as refused:
        parse("chat", orjson.dumps(body))
    assert (refused.value.param, refused.value.code) == (missing, "missing_required_parameter")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": False, "stream_options": {}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse("chat", orjson.dumps({**CHAT, **body}))
    assert refused.value.param == param


def calling(*ids: str) -> dict[str, Any]:
    calls = [{"id": each, "type": "function", "function": {"name": "f", "arguments": "{}"}} for each in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "7"}


HI: dict[str, Any] = {"role": "user", "content": "hi"}
LEGACY: list[dict[str, Any]] = [
    HI,
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "function", "name": "f", "content": "7"},
]
OF_NO_CALL = "Invalid parameter: messages with role 'tool' must be a response to a preceeding message"
UNANSWERED = "must be followed by tool messages responding to each 'tool_call_id'.*: "


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([HI, result("a")], "messages.[1].role", OF_NO_CALL),
        ([result("a"), HI], "messages.[0].role", OF_NO_CALL),
        ([HI, calling("a"), result("a"), HI, result("a")], "messages.[4].role", OF_NO_CALL),
        ([HI, calling("a"), result("b")], "messages.[2].tool_call_id", "'b' not found in 'tool_calls'"),
        ([HI, calling("a", "b"), result("b"), HI], "messages.[3].role", f"{UNANSWERED}a$"),
        ([HI, calling("b", "a"), HI, result("a")], "messages.[2].role", f"{UNANSWERED}b, a$"),
        ([HI, calling("a"), calling("b"), result("b")], "messages.[2].role", f"{UNANSWERED}a$"),
        ([HI, calling("a")], "messages.[1].role", f"{UNANSWERED}a$"),
    ],
)
def test_calls_and_their_results_belong_together(messages: list[Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        parse("chat", orjson.dumps({**CHAT, "messages": messages}))
    assert (refused.value.param, refused.value.code) == (param, None)


@pytest.mark.parametrize(
    "messages",
    [
        [HI, calling("a", "b"), result("b"), result("a"), calling("a"), result("a"), HI],
        [{**HI, "tool_calls": "mine"}, {"role": "assistant", "content": "a", "tool_calls": []}, HI],
        LEGACY,
        [*LEGACY, calling("a"), result("a"), *LEGACY[1:]],
    ],
)
def test_conversations_with_calls_that_are_fine(messages: list[Any]) -> None:
    assert parse("chat", orjson.dumps({**CHAT, "messages": messages})).body["messages"] == messages


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": []}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"parallel_tool_calls": True, "functions": [{"name": "f"}]}, "parallel_tool_calls"),
    ],
)
def test_what_only_tools_can_mean_is_refused_without_them(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{param}' is only allowed when 'tools' are specified") as refused:
        parse("chat", orjson.dumps({**CHAT, **body}))
    assert refused.value.param == param


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1, "top_p": None, "stop": None, "tools": None, "seed": -(2**63)},
        {"made_up_parameter": {"deep": [1, None]}, "service_tier": "flex"},
        {"messages": [{"role": "assistant", "content": None, "annotations": [], "audio": None, "function_call": None}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
        {
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "function", "name": "f", "content": None},
            ]
        },
        {"tools": [{"type": "web_search_preview"}], "tool_choice": {"type": "web_search_preview"}},
        {"tool_choice": "none", "parallel_tool_calls": None, "reasoning_effort": "xhigh"},
        {"reasoning_effort": "a word of somebody's own"},
        {"functions": [{"name": "f"}], "function_call": "auto", "tool_choice": "auto"},
    ],
)
def test_what_is_fine_or_unknown_goes_through_untouched(change: dict[str, Any]) -> None:
    assert parse("chat", orjson.dumps({**CHAT, **change})).body == {**CHAT, **change}


@pytest.mark.parametrize(
    ("surface", "body", "param"),
    [
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": [1, "a"]}, "input[1]"),
        ("embeddings", {"input": [[1], ["a"]]}, "input[1][0]"),
        ("embeddings", {"input": "x", "encoding_format": "xml"}, "encoding_format"),
        ("embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
        ("completions", {"prompt": "x", "best_of": 50}, "best_of"),
        ("completions", {"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
        ("completions", {"prompt": "x", "best_of": 2, "n": 3}, "best_of"),
        ("completions", {"prompt": "x", "echo": 5}, "echo"),
        ("completions", {}, "prompt"),
    ],
)
def test_the_other_surfaces_are_as_strict(surface: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(surface, orjson.dumps({"model": "m", **body}))
    assert refused.value.param == param


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b'{"model":',
        b"[1,2]",
        b"null",
        b'{"a":1}}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\xe2\x80"}',
        '{"a":1}'.encode("utf-16"),
        b"[" * 20_000 + b"]" * 20_000,
        b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(raw)


def test_nesting_up_to_the_limit_is_read() -> None:
    fine = b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert decode(fine)
    with pytest.raises(InvalidRequest):
        decode(fine.replace(b"[]", b"[[]]"))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["model", "messages", "tools", "stop", "n", "stream", "input", "prompt", "response_format"])
        | st.text(max_size=6),
        JSON_VALUES,
        max_size=6,
    ),
    st.sampled_from(["chat", "completions", "embeddings"]),
)
def test_any_json_is_checked_or_refused_never_a_crash(body: dict[str, Any], surface: Any) -> None:
    try:
        call = parse(surface, orjson.dumps({**CHAT, **body}))
    except InvalidRequest as refused:
        assert refused.message
    else:
        assert call.body["model"]
        assert call.features is not None
        assert call.generated >= call.choices >= 0
        assert call.max_tokens is None or call.max_tokens > 0
        assert isinstance(call.fallbacks, list)
