"""What is sent to Anthropic, and what is made of its answers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.catalog import Catalog, Deployment
from shared.errors import ProviderError, UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.anthropic import DIALECT
from shared.providers.dialect import END, Piece
from shared.schema import Call, Usage
from shared.settings import Settings
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests.kit import Kit, streamed, whole

CATALOG = Catalog.load(
    Settings.read({"ANTHROPIC_API_KEY": "sk-ant-0123456789", "GATEWAY_CONFIG": "none"}), PriceTable.vendored()
)
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def at(model: str) -> Deployment:
    return CATALOG.resolve(f"anthropic/{model}").deployments[0]


BUDGET, ADAPTIVE = at("claude-sonnet-4-5"), at("claude-opus-4-6")
BY_DEFAULT, BETWEEN, ALWAYS = at("claude-opus-5"), at("claude-sonnet-5-5"), at("claude-opus-5-5")
NEVER = at("claude-3-5-haiku-latest")


def ask(**body: Any) -> Call:
    return Call("chat", {"model": "asked", "messages": HI, **body})


def sent(call: Call, to: Deployment = BUDGET, max_tokens: int | None = None) -> dict[str, Any]:
    return json.loads(DIALECT.request(call, to, max_tokens).content)


def dropped(call: Call, to: Deployment = BUDGET) -> tuple[str, ...]:
    return DIALECT.request(call, to, None).dropped


def conversation(*messages: dict[str, Any], to: Deployment = BUDGET, **body: Any) -> list[tuple[str, Any]]:
    return [(turn["role"], turn["content"]) for turn in sent(ask(messages=list(messages), **body), to)["messages"]]


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def function(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def calling(*ids: str, arguments: str = "{}", **more: Any) -> dict[str, Any]:
    calls = [{"id": each, "type": "function", "function": {"name": "f", "arguments": arguments}} for each in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def result(call_id: str, content: Any = "ok", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content, **more}


# What is sent


def test_a_plain_request() -> None:
    outgoing = DIALECT.request(ask(), BUDGET, 99)
    assert outgoing.url == "https://api.anthropic.com/v1/messages"
    assert outgoing.headers == {
        "content-type": "application/json",
        "anthropic-version": "2023-06-01",
        "x-api-key": "sk-ant-0123456789",
    }
    assert json.loads(outgoing.content) == {
        "model": "claude-sonnet-4-5",
        "max_tokens": 99,
        "messages": [{"role": "user", "content": [text("Hi")]}],
    }
    assert outgoing.dropped == ()


def test_a_bound_is_always_sent() -> None:
    assert sent(ask(max_completion_tokens=7, max_tokens=8), max_tokens=99)["max_tokens"] == 7
    assert sent(ask())["max_tokens"] == 64000
    assert sent(ask(), at("claude-3-haiku-20240307"))["max_tokens"] == 4096
    assert sent(ask(), Deployment(BUDGET.provider.model_copy(update={"max_output": {}}), "m"))["max_tokens"] == 4096


def test_parameters_go_under_its_names() -> None:
    call = ask(
        temperature=0.2,
        top_k=7,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        user="user-7",
        service_tier="default",
        cache_control={"type": "ephemeral"},
        modalities=["text"],
        n=1,
    )
    wanted = {"temperature": 0.2, "top_k": 7, "stop_sequences": ["a", "b"], "stream": True}
    wanted |= {"metadata": {"user_id": "user-7"}, "service_tier": "standard_only"}
    assert sent(call).items() >= (wanted | {"cache_control": {"type": "ephemeral"}}).items()
    assert dropped(call) == ()
    assert sent(ask(stop="a"))["stop_sequences"] == ["a"]
    assert sent(ask(top_p=0.5))["top_p"] == 0.5


def test_what_it_lacks_is_dropped_and_told_or_refused() -> None:
    lacking = {"seed": 1, "logprobs": True, "logit_bias": {"1": 1}, "frequency_penalty": 0.5, "metadata": {"a": "b"}}
    lacking |= {"service_tier": "flex", "verbosity": "low", "prompt_cache_key": "x", "thinking": {"type": "enabled"}}
    assert dropped(ask(**lacking)) == tuple(sorted(lacking))
    assert sent(ask(**lacking)).keys() == {"model", "max_tokens", "messages"}
    assert dropped(ask(presence_penalty=0, logprobs=False, parallel_tool_calls=True, models=["x"])) == ()
    with pytest.raises(UnsupportedParameter, match="seed"):
        dropped(ask(seed=1, strict=True))


def test_a_temperature_over_one_is_one_and_told() -> None:
    assert sent(ask(temperature=1.7))["temperature"] == 1
    assert dropped(ask(temperature=1.7)) == ("temperature",)
    assert sent(ask(temperature=0))["temperature"] == 0


def test_only_one_of_temperature_and_top_p_is_sent() -> None:
    both = ask(temperature=0.5, top_p=0.9)
    assert "top_p" not in sent(both)
    assert dropped(both) == ("top_p",)
    newer = ask(temperature=0.5, top_p=0.9, top_k=3)
    assert not sent(newer, BY_DEFAULT).keys() & {"temperature", "top_p", "top_k"}
    assert dropped(newer, BY_DEFAULT) == ("temperature", "top_k", "top_p")


def test_stop_sequences_that_are_whitespace_are_left_out_and_told() -> None:
    assert sent(ask(stop=["\n", "x", ""]))["stop_sequences"] == ["x"]
    assert dropped(ask(stop=["\n", "x"])) == ("stop",)
    assert "stop_sequences" not in sent(ask(stop=" "))


@pytest.mark.parametrize("user", ["me@example.com", "+49 170 1234567", "4917012345678", "x" * 300, "größer"])
def test_a_user_who_is_no_opaque_id_is_told_as_one(user: str) -> None:
    told = sent(ask(user=user))["metadata"]["user_id"]
    assert len(told) == 32
    assert user not in told
    assert told == sent(ask(safety_identifier=user))["metadata"]["user_id"]


def test_of_two_names_of_a_user_the_other_is_told_as_dropped() -> None:
    assert dropped(ask(user="u1", safety_identifier="u1")) == ()
    assert dropped(ask(user="u1", safety_identifier="s1")) == ("safety_identifier",)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "openrouter:web_search"}]}, "tools"),
        ({"tools": [function()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages"),
        *(
            ({"messages": [*HI, {"role": role, "content": [part]}]}, "messages")
            for role in ("system", "developer", "assistant")
            for part in (
                {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}},
                {"type": "file", "file": {"file_data": "JVBE"}},
                {"type": "document", "source": {}},
            )
        ),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}]}, "messages"),
        ({"messages": [calling("1", arguments="[1]")]}, "messages"),
        ({"messages": [calling("1", arguments="{")]}, "messages"),
        ({"messages": [calling("1", arguments='{"a":' * 70 + "1" + "}" * 70)]}, "messages"),
    ],
)
def test_what_changes_the_meaning_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(ask(**body))
    assert refused.value.param == param


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "https://x.example"}},
        {"type": "image_url", "image_url": {"url": "data:image/bmp;base64,AA=="}},
        {"type": "image_url", "image_url": {"url": "data:image/png,raw"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_data": "data:application/zip;base64,AA=="}},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,/w=="}},
        {"type": "file", "file": {"file_data": "data:;,"}},
    ],
)
def test_parts_that_it_cannot_take_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(ask(messages=[{"role": "user", "content": [part]}]))
    assert refused.value.param == "messages"


def test_parts() -> None:
    notes = base64.b64encode("Grüße".encode()).decode()
    parts = [
        text("see"),
        text(" \n"),
        {"type": "image_url", "image_url": {"url": "https://x.example/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/JPG;charset=x;base64,AA=="}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,BB==", "filename": "a.pdf"}},
        {"type": "file", "file": {"file_data": "CC=="}},
        {"type": "file", "file": {"file_data": f"data:text/markdown;base64,{notes}"}},
        {"type": "file", "file": {"file_data": "https://x.example/a.pdf"}},
        {"type": "document", "source": {"type": "text"}, "citations": {"enabled": True}},
    ]
    assert conversation({"role": "user", "name": "me", "content": parts}) == [
        (
            "user",
            [
                text("see"),
                {"type": "image", "source": {"type": "url", "url": "https://x.example/a.png"}},
                {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "AA=="}},
                {
                    "type": "document",
                    "source": {"type": "base64", "media_type": "application/pdf", "data": "BB=="},
                    "title": "a.pdf",
                },
                {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "CC=="}},
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Grüße"}},
                {"type": "document", "source": {"type": "url", "url": "https://x.example/a.pdf"}},
                parts[-1],
            ],
        )
    ]


def test_what_the_system_says_comes_first_wherever_it_stood() -> None:
    later = {"role": "system", "content": [text("Be kind.", cache_control={"type": "ephemeral"}), text("")]}
    body = sent(ask(messages=[{"role": "developer", "content": "Be brief."}, *HI, later]))
    assert body["system"] == [text("Be brief."), text("Be kind.", cache_control={"type": "ephemeral"})]
    assert [turn["role"] for turn in body["messages"]] == ["user"]
    alone = sent(ask(messages=[{"role": "system", "content": "Say hi."}]))
    assert alone["messages"] == [{"role": "user", "content": [text("Say hi.")]}]
    assert "system" not in alone


def test_turns_alternate_and_results_come_first() -> None:
    assert conversation(
        *HI,
        {"role": "user", "content": "there"},
        calling("toolu_1", "toolu_2", content="Wait.", refusal=None),
        result("toolu_1"),
        result("toolu_2", [text("a"), text("")]),
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": " "},
    ) == [
        ("user", [text("Hi"), text("there")]),
        (
            "assistant",
            [
                text("Wait."),
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
                {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
            ],
        ),
        (
            "user",
            [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("ok")]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": [text("a")]},
                text("And?"),
            ],
        ),
        ("assistant", [text("No.")]),
    ]


def test_a_result_that_stands_after_a_text_comes_first_all_the_same() -> None:
    (_, _, (_, content)) = conversation(*HI, calling("a"), {"role": "user", "content": "So?"}, result("a", ""))
    assert [block["type"] for block in content] == ["tool_result", "text"]
    assert "content" not in content[0]


def test_an_answer_begun_for_it_ends_without_whitespace() -> None:
    assert conversation(*HI, {"role": "assistant", "content": "Well, \n"})[-1] == ("assistant", [text("Well,")])


@pytest.mark.parametrize("call_id", ["functions.f:0", "call ✓", "", "a" * 200 + "|x"])
def test_foreign_call_ids_become_its_own(call_id: str) -> None:
    (_, (_, [use]), (_, [answered])) = conversation(*HI, calling(call_id), result(call_id))
    assert use["id"] == answered["tool_use_id"]
    assert re.fullmatch("[a-zA-Z0-9_-]+", use["id"])
    assert use["id"] != call_id


def test_calls_of_one_id_in_two_turns_become_two() -> None:
    """ "`tool_use` ids must be unique"; Kimi's are of their turn."""
    turn = [calling("functions.f:0"), result("functions.f:0")]
    blocks = [block for _, said in conversation(*HI, *turn, *turn) for block in said if block["type"] != "text"]
    first, answered, second, answered_too = (block.get("id") or block["tool_use_id"] for block in blocks)
    assert first == answered != second == answered_too


def test_cache_points_pass_wherever_they_stand() -> None:
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    call = ask(
        messages=[
            {"role": "user", "content": [text("a", **hour), text("b")]},
            {**calling("1"), **hour},
            result("1", **hour),
        ],
        tools=[{**function("f"), **hour}, function("g", **hour)],
    )
    body = sent(call)
    assert body["messages"][0]["content"] == [text("a", **hour), text("b")]
    assert [turn["content"][-1]["cache_control"] for turn in body["messages"][1:]] == [hour["cache_control"]] * 2
    assert [tool["cache_control"] for tool in body["tools"]] == [hour["cache_control"]] * 2


def test_tools() -> None:
    own = {"type": "web_search_20260318", "name": "web_search", "max_uses": 2}
    schema = {"type": "object", "properties": {"a": {"minimum": 1}}}
    body = sent(ask(tools=[function("f", description="F", parameters=schema), function("g"), own]))
    assert body["tools"] == [
        {"name": "f", "description": "F", "input_schema": schema},
        {"name": "g", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
        own,
    ]
    assert "tool_choice" not in body


def test_strict_tools_are_held_to_what_claude_can_be_held_to() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}}
    call = ask(tools=[function("f", parameters=schema, strict=True)])
    held = {"properties": {"a": {"type": "integer", "description": "{minimum: 1}"}}, "additionalProperties": False}
    assert sent(call)["tools"] == [{"name": "f", "input_schema": {"type": "object", **held}, "strict": True}]
    assert dropped(call) == ("tools.parameters.minimum",)


@pytest.mark.parametrize(
    ("body", "choice"),
    [
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"tool_choice": function("f")}, {"type": "tool", "name": "f"}),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"type": "any", "disable_parallel_tool_use": True},
        ),
    ],
)
def test_tool_choice(body: dict[str, Any], choice: dict[str, Any]) -> None:
    assert sent(ask(tools=[function()], **body))["tool_choice"] == choice
    assert "tool_choice" not in sent(ask(**body))


def test_the_newest_models_cannot_be_made_to_call() -> None:
    for to in (ALWAYS, BETWEEN, at("claude-fable-5-2")):
        with pytest.raises(UnsupportedParameter, match="tool_choice"):
            sent(ask(tools=[function()], tool_choice="required"), to)
    assert sent(ask(tools=[function()], tool_choice="required"), BY_DEFAULT)["tool_choice"] == {"type": "any"}


def test_structured_output() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    assert sent(ask(response_format=form))["output_config"] == wanted
    both = sent(ask(response_format=form, reasoning_effort="low"), ADAPTIVE)
    assert both["output_config"] == {"effort": "low", **wanted}
    assert "output_config" not in sent(ask(response_format={"type": "text"}))
    with pytest.raises(UnsupportedParameter, match="json_schema"):
        sent(ask(response_format=form), NEVER)
    bounded = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "maxItems": 3}}}
    call = ask(response_format=bounded)
    assert sent(call)["output_config"]["format"]["schema"] == {"type": "array", "description": "{maxItems: 3}"}
    assert dropped(call) == ("response_format.json_schema.maxItems",)


def adaptive(display: str = "summarized") -> dict[str, Any]:
    return {"type": "adaptive", "display": display}


def enabled(tokens: int) -> dict[str, Any]:
    return {"type": "enabled", "budget_tokens": tokens}


@pytest.mark.parametrize(
    ("to", "body", "thinking", "effort", "told"),
    [
        (BUDGET, {"reasoning_effort": "high", "max_tokens": 10_000}, enabled(8000), None, ()),
        (BUDGET, {"reasoning_effort": "minimal", "max_tokens": 2000}, enabled(1024), None, ()),
        (BUDGET, {"reasoning_effort": "max", "max_tokens": 2000}, enabled(1900), None, ()),
        (BUDGET, {"reasoning_effort": "low", "max_tokens": 1024}, None, None, ("reasoning_effort",)),
        (BUDGET, {"reasoning": {"max_tokens": 3000}}, enabled(3000), None, ()),
        (BUDGET, {"reasoning": {"max_tokens": 10}}, enabled(1024), None, ()),
        (BUDGET, {"reasoning_effort": "none"}, None, None, ()),
        (
            BUDGET,
            {"reasoning": {"enabled": True, "exclude": True}, "max_tokens": 4000},
            enabled(2000) | {"display": "omitted"},
            None,
            (),
        ),
        (BUDGET, {"tools": [function()], "reasoning_effort": "low"}, enabled(12800), None, ()),
        (
            BUDGET,
            {"tools": [function()], "tool_choice": "required", "reasoning_effort": "low"},
            None,
            None,
            ("reasoning_effort",),
        ),
        (
            BUDGET,  # an answer that the caller began has no thought to stand after
            {"messages": [*HI, {"role": "assistant", "content": "Well"}], "reasoning_effort": "low"},
            None,
            None,
            ("reasoning_effort",),
        ),
        (ADAPTIVE, {"reasoning_effort": "minimal"}, adaptive(), "low", ()),
        (ADAPTIVE, {"reasoning_effort": "xhigh"}, adaptive(), "high", ()),
        (ADAPTIVE, {"reasoning_effort": "max"}, adaptive(), "max", ()),
        (ADAPTIVE, {"reasoning_effort": "none"}, None, None, ()),
        (
            ADAPTIVE,
            {"tools": [function()], "tool_choice": "required", "reasoning_effort": "low"},
            None,
            None,
            ("reasoning_effort",),
        ),
        (
            BY_DEFAULT,
            {"tools": [function()], "tool_choice": "required", "reasoning_effort": "low"},
            adaptive(),
            "low",
            (),
        ),
        (BY_DEFAULT, {"reasoning_effort": "xhigh"}, adaptive(), "xhigh", ()),
        (BY_DEFAULT, {"reasoning_effort": "none"}, {"type": "disabled"}, None, ()),
        (BY_DEFAULT, {"reasoning": {"max_tokens": 2000}}, adaptive(), None, ("reasoning",)),
        (BY_DEFAULT, {"reasoning": {"effort": "low", "exclude": True}}, adaptive("omitted"), "low", ()),
        (BETWEEN, {"reasoning": {"enabled": False}}, {"type": "between_tools"}, None, ()),
        (ALWAYS, {"reasoning_effort": "none"}, None, None, ("reasoning_effort",)),
        (NEVER, {"reasoning_effort": "high"}, None, None, ("reasoning_effort",)),
        (NEVER, {"reasoning_effort": "none"}, None, None, ()),
        (ADAPTIVE, {"reasoning_effort": "some"}, None, None, ("reasoning_effort",)),
        (ADAPTIVE, {"reasoning": "much"}, None, None, ("reasoning",)),
        (ADAPTIVE, {}, None, None, ()),
        (ADAPTIVE, {"thinking": {"type": "adaptive"}}, {"type": "adaptive"}, None, ()),
        (BUDGET, {"thinking": enabled(2000)}, enabled(2000), None, ()),
    ],
)
def test_a_model_is_asked_to_think_in_its_own_way(
    to: Deployment, body: dict[str, Any], thinking: Any, effort: str | None, told: tuple[str, ...]
) -> None:
    built = sent(ask(**body), to)
    assert built.get("thinking") == thinking
    assert built.get("output_config", {}).get("effort") == effort
    assert dropped(ask(**body), to) == told


def test_nothing_is_sampled_otherwise_while_it_thinks() -> None:
    thinking = ask(reasoning_effort="low", temperature=0.3, top_p=0.9, top_k=2)
    assert not sent(thinking).keys() & {"temperature", "top_p", "top_k"}
    assert dropped(thinking) == ("temperature", "top_k", "top_p")
    assert sent(ask(reasoning_effort="none", temperature=0.3))["temperature"] == 0.3


THOUGHTS = [
    {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
    {"type": "redacted_thinking", "data": "ZGF0YQ=="},
]


def signed(model: str = "claude-sonnet-4-5", thinking: Any = THOUGHTS) -> dict[str, Any]:
    return {"extra_content": {"anthropic": {"model": model, "thinking": thinking}}}


def test_thoughts_are_put_back_unchanged_and_first() -> None:
    said = calling("1", content="I look.", **signed())
    history = [*HI, said, result("1")]
    (_, (_, content), _) = conversation(*history, reasoning_effort="low")
    assert content[:2] == THOUGHTS
    assert [block["type"] for block in content[2:]] == ["text", "tool_use"]
    assert conversation(*history)[1][1][0] == text("I look."), "none where it does not think now"
    said["extra_content"]["anthropic"]["model"] = "claude-opus-5"
    assert conversation(*history, to=BY_DEFAULT)[1][1][:2] == THOUGHTS, "as it thinks unasked"
    assert len(conversation(*history, to=BY_DEFAULT, reasoning_effort="none")[1][1]) == 2
    assert len(conversation(*history, to=ALWAYS)[1][1]) == 2, "another model's are of no use"


@pytest.mark.parametrize(
    "extra",
    [
        {},
        signed("claude-opus-4-5"),
        signed(thinking=[]),
        signed(thinking=[{"type": "thinking", "thinking": "cut off"}, "x", None]),
        {"extra_content": {"google": {"thought_signature": "x"}}},
        {"extra_content": "x"},
    ],
)
def test_without_its_thoughts_an_open_call_is_answered_without_thinking(extra: dict[str, Any]) -> None:
    call = ask(messages=[*HI, calling("1", **extra), result("1")], reasoning_effort="low")
    body = sent(call)
    assert "thinking" not in body
    assert [block["type"] for block in body["messages"][1]["content"]] == ["tool_use"]
    assert dropped(call) == ("reasoning_effort",)
    assert sent(call, ADAPTIVE)["thinking"] == adaptive()


def test_a_loop_of_tools_goes_on_thinking_where_its_start_was_thought_over() -> None:
    """Without interleaving, Claude thinks before the first call only: the whole loop is one turn."""
    first, later = [*HI, calling("1", **signed()), result("1")], [calling("2"), result("2")]
    call = ask(messages=[*first, *later], reasoning_effort="medium")
    assert sent(call)["thinking"] == enabled(32000)
    assert dropped(call) == ()
    assert conversation(*first, *later, reasoning_effort="medium")[1][1][:2] == THOUGHTS
    foreign = [*HI, calling("1"), result("1"), calling("2", **signed()), result("2")]
    assert dropped(ask(messages=foreign, reasoning_effort="medium")) == ("reasoning_effort",)
    anew = ask(messages=[*first, *HI, *later], reasoning_effort="medium")
    assert dropped(anew) == ("reasoning_effort",), "the turn that goes on began without"
    asked = ask(messages=[*first, {"role": "developer", "content": "x"}, *later, *HI], reasoning_effort="medium")
    assert dropped(asked) == ()


def test_thoughts_of_what_was_answered_long_ago_are_not_demanded() -> None:
    done = [*HI, calling("1"), result("1"), {"role": "assistant", "content": "Done."}, *HI]
    assert sent(ask(messages=done, reasoning_effort="low"))["thinking"] == enabled(12800)


MUSED = [
    text("Let me look."),
    {"type": "thinking", "thinking": "One.", "signature": "b25l"},
    {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
    {"type": "thinking", "thinking": "Two.", "signature": "dHdv"},
    {"type": "redacted_thinking", "data": "dGhyZWU="},
    text(" And there."),
    {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
]
"""What it thought in between, too."""


def mused(content: list[dict[str, Any]] = MUSED) -> dict[str, Any]:
    return {"type": "message", "content": content, "stop_reason": "tool_use"}


def streamed_musing() -> list[dict[str, Any]]:
    deltas = {"text": ("text_delta", "text"), "thinking": ("signature_delta", "signature")}
    events = [BEGUN]
    for index, block in enumerate(MUSED):
        kind, name = deltas.get(block["type"], ("", ""))
        events.append(start(index, **{**block, name: ""} if name else block))
        events += [delta(index, kind, **{name: block[name]})] if name else []
        events.append(stop(index))
    return [*events, *end("tool_use")]


def test_what_was_thought_in_between_goes_back_to_its_place() -> None:
    """ "`thinking` blocks in the latest assistant message cannot be modified": their order counts, too."""
    said = DIALECT.completion(ask(), ADAPTIVE, mused()).body["choices"][0]["message"]
    *_, kept = deltas(run(*streamed_musing(), to=ADAPTIVE))
    assert kept == {"extra_content": said["extra_content"]}
    asked: dict[str, Any] = {"to": ADAPTIVE, "reasoning_effort": "low"}

    def again(**changed: Any) -> Any:
        return conversation(*HI, {**said, **changed}, result("t1"), result("t2"), **asked)[1][1]

    assert again() == MUSED
    assert again(content=[{"type": "text", "text": said["content"]}]) == MUSED, "as some clients put it"
    first = {"thinking", "redacted_thinking"}
    simple = ["thinking", "thinking", "redacted_thinking", "text", "tool_use", "tool_use"]
    for other in ("Let me look again. And there.", "Let me", "", None):
        blocks = again(content=other)
        assert [block["type"] for block in blocks] == [kind for kind in simple if other or kind != "text"]
        assert [block for block in blocks if block["type"] in first] == [MUSED[1], MUSED[3], MUSED[4]]
    one = conversation(*HI, {**said, "tool_calls": said["tool_calls"][:1]}, result("t1"), **asked)[1][1]
    assert [block["type"] for block in one] == simple[:-1]


@pytest.mark.parametrize(
    "places",
    [None, "x", 7, [], [[0, 0]] * 4, [[12, 0], [12, 1], [12, 1]], [[12, 0], [3, 1], [12, 1], [23, 2]],
     [[12, 0], [12, 1], [12, "1"], [23, 2]], [[-1, 0], [12, 1], [12, 1], [23, 2]], [[12, 0], [12, 1], [23, 2], [23, 2]],
     [[12], [12, 1], [12, 1], [23, 2]], [{}, 1, None, [23, 2]]],
)  # fmt: skip
def test_places_that_cannot_be_are_not_believed(places: Any) -> None:
    said = DIALECT.completion(ask(), ADAPTIVE, mused()).body["choices"][0]["message"]
    assert said["extra_content"]["anthropic"]["places"] == [[12, 0], [12, 1], [12, 1], [23, 2]]
    said["extra_content"]["anthropic"]["places"] = places
    history = conversation(*HI, said, result("t1"), result("t2"), to=ADAPTIVE, reasoning_effort="low")
    assert history[1][1] == [MUSED[1], MUSED[3], MUSED[4], text("Let me look. And there."), MUSED[2], MUSED[6]]


def test_what_the_client_adds_is_not_lost_between_thoughts() -> None:
    said = DIALECT.completion(ask(), ADAPTIVE, mused([MUSED[2], MUSED[3], MUSED[6]])).body["choices"][0]["message"]
    said["content"] = [{"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}]
    with pytest.raises(UnsupportedParameter):
        conversation(*HI, said, result("t1"), result("t2"), to=ADAPTIVE, reasoning_effort="low")


def test_blank_text_before_a_thought_is_left_out() -> None:
    blank = [text("\n\n"), *MUSED[1:]]
    said = DIALECT.completion(ask(), ADAPTIVE, mused(blank)).body["choices"][0]["message"]
    history = conversation(*HI, said, result("t1"), result("t2"), to=ADAPTIVE, reasoning_effort="low")
    assert history[1][1] == MUSED[1:]


def test_what_chats_alone_have_nobody_has_checked_in_a_legacy_completion() -> None:
    odd = {"messages": [1], "tools": 5, "response_format": "x", "max_completion_tokens": -5, "session_id": 7}
    call = Call("completions", {"model": "m", "prompt": "Once", "max_tokens": 4, **odd})
    assert sent(call)["messages"] == [{"role": "user", "content": [text("Once")]}]
    assert sent(call)["max_tokens"] == 4
    assert dropped(call) == ("max_completion_tokens", "messages", "response_format", "tools")


def test_a_legacy_completion_is_one_user_message() -> None:
    call = Call("completions", {"model": "m", "prompt": ["Once"], "max_tokens": 4, "logprobs": 1, "echo": False})
    assert sent(call) == {
        "model": "claude-sonnet-4-5",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [text("Once")]}],
    }
    assert dropped(call) == ("logprobs",)
    body, usage = DIALECT.completion(call, BUDGET, answer([text(" upon")]))
    assert body["choices"] == [
        {
            "index": 0,
            "text": " upon",
            "logprobs": None,
            "finish_reason": "stop",
            "native_finish_reason": "end_turn",
        }
    ]
    assert usage
    translate = DIALECT.stream(call, BUDGET)
    pieces = [piece for event in EVENTS for piece in translate(event["type"], json.loads(json.dumps(event)))]
    assert "".join(choice["text"] for piece in pieces for choice in piece.body.get("choices", ())) == "Hello"
    assert pieces[-1] is END


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "logprobs": 1, "strict": True}, "logprobs"),
    ],
)
def test_what_chat_cannot_do_for_a_prompt_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(Call("completions", {"model": "m", **body}))
    assert refused.value.param == param


def test_there_are_no_embeddings() -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(Call("embeddings", {"model": "m", "input": "a"}))
    assert refused.value.param == "model"


# What is answered

USAGE = {
    "input_tokens": 5,
    "cache_read_input_tokens": 7,
    "cache_creation_input_tokens": 30,
    "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
    "output_tokens": 40,
    "output_tokens_details": {"thinking_tokens": 25},
}
LEDGER = Usage(input=5, cache_read=7, cache_write=10, cache_write_1h=20, output=40, reasoning=25)


def answer(content: list[dict[str, Any]], stop: str = "end_turn", **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": content, "stop_reason": stop, "usage": USAGE, **more}


CITED = {"type": "web_search_result_location", "url": "https://x.example", "title": "X", "cited_text": "…"}
WHOLE = answer(
    [
        *THOUGHTS,
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
        text("It is ", citations=None),
        text("blue", citations=[CITED, {"type": "char_location", "cited_text": "…"}]),
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
        {"type": "something_new", "data": 1},
    ],
    "tool_use",
    container={"id": "c"},
    stop_details=None,
)


def test_a_whole_answer() -> None:
    body, usage = DIALECT.completion(ask(), BUDGET, json.loads(json.dumps(WHOLE)))
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "It is blue",
                "reasoning_content": "Hm.",
                "tool_calls": [
                    {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                ],
                "annotations": [
                    {
                        "type": "url_citation",
                        "url_citation": {"url": "https://x.example", "title": "X", "start_index": 6, "end_index": 10},
                    }
                ],
                **signed(),
            },
            "finish_reason": "tool_calls",
            "native_finish_reason": "tool_use",
        }
    ]
    assert usage == LEDGER


@pytest.mark.parametrize(
    ("word", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("something_new", "stop"),
    ],
)
def test_finish_reasons(word: str, finish: str) -> None:
    body, _ = DIALECT.completion(ask(), BUDGET, answer([], word))
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["native_finish_reason"]) == (finish, word)
    assert body["choices"][0]["message"]["content"] == ""


def test_an_answer_without_counts_is_one_all_the_same() -> None:
    piece = DIALECT.completion(ask(), BUDGET, {"content": [text("Hi")], "stop_reason": "end_turn"})
    assert (piece.body["choices"][0]["message"]["content"], piece.usage) == ("Hi", None)


def test_a_refusal_is_told_in_its_words() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "Not this."}
    body, _ = DIALECT.completion(ask(), BUDGET, answer([], "refusal", stop_details=details))
    assert body["choices"][0]["message"]["refusal"] == "Not this."
    pieces = DIALECT.stream(ask(), BUDGET)(
        None, {"type": "message_delta", "delta": {"stop_reason": "refusal", "stop_details": details}, "usage": USAGE}
    )
    assert pieces[0].body["choices"][0]["delta"] == {"refusal": "Not this."}
    assert pieces[1].body["choices"][0]["finish_reason"] == "content_filter"


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, kind: str, **more: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **more}}


def stop(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def end(word: str = "end_turn", **usage: Any) -> list[dict[str, Any]]:
    return [
        {"type": "message_delta", "delta": {"stop_reason": word}, "usage": usage or {"output_tokens": 40}},
        {"type": "message_stop"},
    ]


BEGUN = {"type": "message_start", "message": {"content": [], "usage": {**USAGE, "output_tokens": 1}}}
EVENTS: list[dict[str, Any]] = [
    BEGUN,
    {"type": "ping"},
    start(0, type="text", text=""),
    delta(0, "text_delta", text="Hel"),
    delta(0, "text_delta", text="lo"),
    stop(0),
    *end(),
]


def run(*events: dict[str, Any], to: Deployment = BUDGET) -> list[Piece]:
    translate = DIALECT.stream(ask(), to)
    return [piece for event in events for piece in translate(event["type"], json.loads(json.dumps(event)))]


def deltas(pieces: list[Piece]) -> list[Any]:
    return [choice["delta"] for piece in pieces for choice in piece.body.get("choices", ()) if choice["delta"]]


def test_a_stream() -> None:
    pieces = run(*EVENTS)
    assert deltas(pieces) == [{"content": "Hel"}, {"content": "lo"}]
    assert pieces[-2] == Piece(
        {
            "choices": [
                {"index": 0, "delta": {}, "finish_reason": "stop", "native_finish_reason": "end_turn"},
            ]
        },
        LEDGER,
    )
    assert pieces[-1] is END


THINKING_EVENTS: list[dict[str, Any]] = [
    BEGUN,
    start(0, type="thinking", thinking="", signature=""),
    delta(0, "thinking_delta", thinking="H"),
    delta(0, "thinking_delta", thinking="m."),
    delta(0, "signature_delta", signature="c2ln"),
    stop(0),
    start(1, **THOUGHTS[1]),
    stop(1),
    start(2, type="server_tool_use", id="srvtoolu_1", name="web_search", input={}),
    delta(2, "input_json_delta", partial_json='{"query":'),
    stop(2),
    start(3, type="web_search_tool_result", content=[]),
    stop(3),
    start(4, type="text", text="It is ", citations=[]),
    delta(4, "citations_delta", citation=CITED),
    delta(4, "text_delta", text="blue"),
    stop(4),
    start(5, type="tool_use", id="toolu_1", name="f", input={}),
    delta(5, "input_json_delta", partial_json=""),
    delta(5, "input_json_delta", partial_json='{"a":'),
    delta(5, "input_json_delta", partial_json="1}"),
    stop(5),
    start(6, type="tool_use", id="toolu_2", name="g", input={}),
    stop(6),
    start(7, type="tool_use", id="toolu_3", name="h", input={"b": 2}),
    stop(7),
    start(8, type="something_new"),
    delta(8, "something_new"),
    stop(8),
    {"type": "something_new"},
    *end("tool_use", output_tokens=40),
]


def test_a_stream_that_thinks_and_calls() -> None:
    pieces = run(*THINKING_EVENTS)

    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        name = {"name": more.pop("name")} if "name" in more else {}
        return {"tool_calls": [{"index": index, **more, "function": {**name, "arguments": arguments}}]}

    assert deltas(pieces) == [
        {"reasoning_content": "H"},
        {"reasoning_content": "m."},
        {"content": "It is "},
        {"content": "blue"},
        {
            "annotations": [
                {
                    "type": "url_citation",
                    "url_citation": {"url": "https://x.example", "title": "X", "start_index": 0, "end_index": 10},
                }
            ]
        },
        call(0, "", id="toolu_1", type="function", name="f"),
        call(0, '{"a":'),
        call(0, "1}"),
        call(1, "", id="toolu_2", type="function", name="g"),
        call(1, "{}"),
        call(2, "", id="toolu_3", type="function", name="h"),
        call(2, '{"b":2}'),
        signed(),
    ]
    assert pieces[-2].body["choices"][0]["finish_reason"] == "tool_calls"


def test_the_last_count_of_each_kind_holds() -> None:
    (*_, finish, _) = run(BEGUN, *end(output_tokens=50, input_tokens=9, cache_read_input_tokens=None))
    assert finish.usage == Usage(5 + 4, 7, 10, 20, 50, 25)
    (*_, finish, _) = run({"type": "message_start", "message": {}}, *end())
    assert finish.usage is None


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("overloaded_error", "overloaded"),
        ("rate_limit_error", "rate_limit"),
        ("authentication_error", "auth"),
        ("billing_error", "money"),
        ("api_error", "error_in_200"),
    ],
)
def test_an_error_inside_a_stream_is_raised(kind: str, fault: str) -> None:
    with pytest.raises(ProviderError) as caught:
        run(*EVENTS[:4], {"type": "error", "error": {"type": kind, "message": "Overloaded"}})
    assert caught.value.fault == fault


@pytest.mark.parametrize(
    ("status", "kind", "message", "fault"),
    [
        (400, "invalid_request_error", "messages: at least one message is required", "bad_request"),
        (400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API.", "money"),
        (400, "invalid_request_error", "You have reached your specified API usage limits.", "money"),
        (400, "invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum", "context"),
        (
            400,
            "invalid_request_error",
            "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
            "context",
        ),
        (401, "authentication_error", "invalid x-api-key", "auth"),
        (402, "billing_error", "Payment required", "money"),
        (403, "permission_error", "Your API key does not have permission", "auth"),
        (404, "not_found_error", "model: claude-x", "model_gone"),
        (413, "request_too_large", "Request exceeds the maximum size", "body_too_large"),
        (
            429,
            "rate_limit_error",
            "This request would exceed your organization's rate limit of 30,000 input tokens per minute.",
            "rate_limit",
        ),
        (500, "api_error", "Internal server error", "server"),
        (504, "timeout_error", "Timed out", "server"),
        (529, "overloaded_error", "Overloaded", "overloaded"),
    ],
)
def test_failures(status: int, kind: str, message: str, fault: str) -> None:
    """https://platform.claude.com/docs/en/api/errors"""
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    error = DIALECT.failure(status, {"retry-after": "3"}, json.dumps(body).encode())
    assert error.fault == fault
    assert error.retry_after == (3 if fault in ("rate_limit", "overloaded") else None)


def test_an_error_in_a_200_is_raised() -> None:
    with pytest.raises(ProviderError) as caught:
        DIALECT.completion(ask(), BUDGET, {"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}})
    assert caught.value.fault == "overloaded"


def mutants(value: Any) -> Iterator[Any]:
    """The same with one thing in it replaced by something that has no business there, or left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield {other: each for other, each in value.items() if other != name}
            yield from ({**value, name: mutant} for mutant in mutants(inner))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from ([*value[:at], mutant, *value[at + 1 :]] for mutant in mutants(inner))
    yield from (None, True, 7, "x", [7], {"x": 7})


def assert_texts(said: dict[str, Any]) -> None:
    for name in ("content", "reasoning_content", "refusal"):
        assert isinstance(said.get(name), str | None)
    for call in said.get("tool_calls", ()):
        assert all(isinstance(each, str) for each in (call.get("id", ""), *call["function"].values()))


def test_a_malformed_answer_is_the_providers_fault() -> None:
    refused = 0
    for body in filter(lambda body: isinstance(body, dict), mutants(WHOLE)):
        try:
            piece = DIALECT.completion(ask(), BUDGET, json.loads(json.dumps(body)))
            assert_texts(piece.body["choices"][0]["message"])
        except ProviderError as error:
            assert error.fault in ("protocol", "error_in_200")
            refused += 1
    assert refused > 50


def test_a_malformed_stream_is_the_providers_fault() -> None:
    refused = 0
    for at, event in enumerate(THINKING_EVENTS):
        for mutant in filter(lambda body: isinstance(body, dict), mutants(event)):
            events = json.loads(json.dumps([*THINKING_EVENTS[:at], mutant, *THINKING_EVENTS[at + 1 :]]))
            translate = DIALECT.stream(ask(), BUDGET)
            try:
                for each in events:
                    for said in deltas(translate(None, each)):
                        assert_texts(said)
            except ProviderError as error:
                assert error.fault in ("protocol", "error_in_200")
                refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"content": [], "usage": USAGE},
        answer([{"type": "text"}]),
        answer([], stop=None),  # pyright: ignore[reportArgumentType]
        answer([{"type": "tool_use", "id": "1", "name": "f"}]),
        {**answer([]), "content": "text"},
    ],
)
def test_what_is_no_message_is_a_protocol_fault(body: dict[str, Any]) -> None:
    with pytest.raises(ProviderError) as caught:
        DIALECT.completion(ask(), BUDGET, body)
    assert caught.value.fault == "protocol"


# Through the gateway


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield Kit(store, lambda _: whole({}), {"ANTHROPIC_API_KEY": "sk-ant-0123456789"})
    await store.close()


def framed(*events: dict[str, Any]) -> list[bytes]:
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]


ASK = {"model": "anthropic/claude-haiku-4-5", "messages": HI}


async def test_every_kind_of_token_is_paid(kit: Kit) -> None:
    key = (await kit.keys.create(VirtualKey("", "", "test")))[1]
    kit.reply = lambda _: whole(answer([text("Hello")]))
    outcome = await kit.ask(key, ASK)
    usage = outcome.chunks[0]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (42, 40)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 25
    per_million = 5 * 1 + 7 * 0.1 + 10 * 1.25 + 20 * 2 + 40 * 5
    assert outcome.row.cost == round(per_million * 1000)


@pytest.mark.parametrize("bad", [b"data: {\n\n", b"data: [1]\n\n", b"data: {'type': 'ping'}\n\n"])
@pytest.mark.parametrize("place", range(len(EVENTS)))
async def test_a_garbled_stream_ends_once(kit: Kit, place: int, bad: bytes) -> None:
    key = (await kit.keys.create(VirtualKey("", "", "test")))[1]
    pieces = framed(*EVENTS)
    pieces[place] = bad
    kit.reply = lambda _: streamed(*pieces)
    outcome = await kit.ask(key, {**ASK, "stream": True})
    finishes = [c["finish_reason"] for chunk in outcome.chunks for c in chunk.get("choices", ()) if c["finish_reason"]]
    failed = bool(outcome.error) or any("error" in chunk for chunk in outcome.chunks)
    assert len(finishes) + failed == 1
    assert failed == (place in (2, 6)), "a block that never began, and an end that never came"


async def test_a_stream_breaks_off_with_its_error(kit: Kit) -> None:
    key = (await kit.keys.create(VirtualKey("", "", "test")))[1]
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    kit.reply = lambda _: streamed(*framed(*EVENTS[:4], error))
    outcome = await kit.ask(key, {**ASK, "stream": True})
    assert outcome.chunks[-1]["error"]["type"] == "overloaded_error"
    assert outcome.text == "Hel"
