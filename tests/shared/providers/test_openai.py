"""What is sent to a provider that speaks OpenAI's format, and what is made of its answers."""

from __future__ import annotations

import base64
import copy
import json
import re
import struct
import time
from contextlib import suppress
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from shared.catalog import Deployment
from shared.config import Provider, ReportedCost
from shared.errors import FAULTS, ProviderError, UnsupportedParameter
from shared.providers import openai
from shared.providers.refusals import clean
from shared.schema import Call, Usage

DIALECT = openai.DIALECT
STREAM_WORDS = ["choices", "delta", "message", "content", "tool_calls", "function", "arguments", "index", "id", "type"]
OTHER_WORDS = ["text", "finish_reason", "usage", "prompt_tokens", "cost", "data", "embedding", "error", "code", "loc"]
ODD_WORDS = [
    "metadata",
    "raw",
    "reasoning",
    "thinking",
    "x_groq",
    "detail",
    "msg",
    "name",
    "errors",
    "prompt_tokens_details",
]
WORDS = st.sampled_from([*STREAM_WORDS, *OTHER_WORDS, *ODD_WORDS])
HI = [{"role": "user", "content": "Hi"}]
SAID = {"role": "assistant", "content": "a"}
CHAT = Call("chat", {"model": "asked", "messages": HI})


def at(model: str = "m", **row: Any) -> Deployment:
    return Deployment(Provider(name="p", base_url="https://p.example/v1", **row), model)


def sent(call: Call, to: Deployment, max_tokens: int | None = None) -> dict[str, Any]:
    return json.loads(DIALECT.request(call, to, max_tokens).content)


def ask(**body: Any) -> Call:
    return Call("chat", {"model": "asked", "messages": HI, **body})


# What is sent


def test_the_url_is_the_rows_and_the_key_is_a_header() -> None:
    key = SecretStr("sk-1")
    bearer = DIALECT.request(CHAT, at("any/../thing?", api_key=key), None)
    assert bearer.url == "https://p.example/v1/chat/completions"
    assert bearer.headers == {"content-type": "application/json", "authorization": "Bearer sk-1"}
    assert DIALECT.request(CHAT, at(api_key=key, auth="api-key"), None).headers["api-key"] == "sk-1"
    assert "authorization" not in DIALECT.request(CHAT, at(), None).headers


def test_the_callers_body_is_copied_without_our_extensions() -> None:
    ours = {
        "models": ["a"],
        "provider": {"sort": "price"},
        "cache": {},
        "session_id": "s",
        "strict": False,
        "store": True,
    }
    call = ask(**ours, temperature=0.5, top_k=7, seed=None)
    before = json.dumps(call.body)
    assert sent(call, at()) == {"model": "m", "messages": HI, "temperature": 0.5, "top_k": 7}
    assert json.dumps(call.body) == before
    kept = sent(call, at(keeps=("models", "provider")))
    assert (kept["models"], kept["provider"]) == (["a"], {"sort": "price"})
    assert sent(ask(store=True), at())["store"] is True


def test_usage_is_always_asked_for_in_streams() -> None:
    call = ask(stream=True, stream_options={"include_usage": False, "other": 1})
    assert sent(call, at())["stream_options"] == {"include_usage": True, "other": 1}
    assert sent(ask(stream=True), at(obfuscation=True))["stream_options"] == {
        "include_usage": True,
        "include_obfuscation": False,
    }
    assert "stream_options" not in sent(call, at(stream_options=False))
    assert "stream_options" not in sent(CHAT, at())


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_bound_on_output_goes_under_the_right_name(name: Any) -> None:
    to = at(output_limit=name)
    assert {k: v for k, v in sent(ask(max_tokens=5), to).items() if "max" in k} == {name: 5}
    assert {k: v for k, v in sent(ask(max_completion_tokens=6, max_tokens=5), to, 99).items() if "max" in k} == {
        name: 6
    }
    assert sent(CHAT, to, 99)[name] == 99
    native = Call("completions", {"model": "a", "prompt": "x", "max_tokens": 5})
    assert sent(native, at(output_limit=name, completions=("*",)))["max_tokens"] == 5


def test_tuning_parameters_are_dropped_and_told() -> None:
    to = at("o3-mini", drops=("logit_bias", "seed"), drops_by_model={"o3*": ("temperature",), "gpt*": ("top_p",)})
    outgoing = DIALECT.request(ask(logit_bias={"1": 1}, temperature=1, top_p=1, seed=None), to, None)
    assert outgoing.dropped == ("logit_bias", "temperature")
    assert not json.loads(outgoing.content).keys() & {"logit_bias", "temperature"}
    with pytest.raises(UnsupportedParameter) as caught:
        DIALECT.request(ask(temperature=1, strict=True), to, None)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize(
    ("body", "refuses", "param"),
    [
        ({"n": 2}, "n", "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema", "response_format"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "image_url",
            "messages",
        ),
    ],
)
def test_what_changes_the_meaning_is_refused(body: dict[str, Any], refuses: str, param: str) -> None:
    with pytest.raises(UnsupportedParameter, match=refuses) as caught:
        DIALECT.request(ask(**body), at(refuses=(refuses,)), None)
    assert caught.value.param == param
    DIALECT.request(ask(**body), at(), None)


def test_parameters_go_under_the_providers_names_and_words() -> None:
    to = at(renames={"seed": "random_seed"}, tool_choice={"required": "any"}, defaults={"safe": True, "seen": 1})
    body = sent(ask(seed=1, tool_choice="required", seen=2), to)
    assert (body["random_seed"], body["tool_choice"], body["safe"], body["seen"]) == (1, "any", True, 2)
    assert "seed" not in body
    named = {"type": "function", "function": {"name": "f"}}
    assert sent(ask(tool_choice=named), to)["tool_choice"] == named


def test_what_clients_echo_is_cleaned_of_what_the_provider_refuses() -> None:
    echoed = {
        "role": "assistant",
        "content": None,
        "annotations": [],
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning_content": "hm",
        "name": "x",
    }
    call = ask(messages=[{"role": "developer", "content": "d"}, echoed])
    to = at(developer=False, strips=("annotations", "name"))
    system, assistant = sent(call, to)["messages"]
    assert system == {"role": "system", "content": "d"}
    assert assistant == {"role": "assistant", "content": None}
    assert DIALECT.request(call, to, None).dropped == ("messages.name",)
    developer, assistant = sent(call, at(echoes_reasoning="reasoning"))["messages"]
    assert developer["role"] == "developer"
    assert assistant == {"role": "assistant", "content": None, "reasoning": "hm", "name": "x"}


def test_parts_lose_cache_points_and_audio_its_wrapping() -> None:
    parts = [
        {"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
    ]
    call = ask(messages=[{"role": "user", "content": parts}])
    assert sent(call, at(bare_audio=True))["messages"][0]["content"] == [
        {"type": "text", "text": "t"},
        {"type": "input_audio", "input_audio": "QUJD"},
    ]
    assert sent(call, at(strips=()))["messages"][0]["content"] == parts


def test_tool_ids_are_mapped_alike_for_call_and_result() -> None:
    def history(call_id: str) -> Call:
        made = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        return ask(
            messages=[
                *HI,
                {"role": "assistant", "content": None, "tool_calls": [made]},
                {"role": "tool", "tool_call_id": call_id, "content": "1"},
            ]
        )

    found = set()
    for call_id in ("call_abcdefghijklmnop", "toolu_01", "x", "ünï", "aB3dE6gH9"):
        _, assistant, tool = sent(history(call_id), at(tool_ids="[A-Za-z0-9]{9}"))["messages"]
        assert re.fullmatch("[A-Za-z0-9]{9}", tool["tool_call_id"])
        assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"]
        found.add(tool["tool_call_id"])
    assert len(found) == 5
    assert "aB3dE6gH9" in found


def test_two_turns_of_one_id_become_two_where_ids_have_a_form() -> None:
    made = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = [{"role": "assistant", "content": None, "tool_calls": [made]}, {"role": "tool", "content": "1"}]
    turn[1]["tool_call_id"] = "functions.f:0"
    kept = sent(ask(messages=[*HI, *turn, *turn]), at())["messages"]
    assert [each["tool_call_id"] for each in kept if each["role"] == "tool"] == ["functions.f:0"] * 2
    _, *messages = sent(ask(messages=[*HI, *turn, *turn]), at(tool_ids=".{1,40}"))["messages"]
    first, answered, second, answered_too = (
        each.get("tool_call_id") or each["tool_calls"][0]["id"] for each in messages
    )
    assert first == answered == "functions.f:0"
    assert first != second == answered_too


def test_what_the_stock_client_adds_to_messages_stays_here() -> None:
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {}}
    call = {"id": "c", "type": "function", "index": 0, "function": function}
    said = {"role": "assistant", "content": "", "parsed": None, "tool_calls": [call]}
    _, assistant = sent(ask(messages=[*HI, said]), at())["messages"]
    made = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert assistant == {"role": "assistant", "content": "", "tool_calls": [made]}


def test_reasoning_that_is_not_known_is_stood_for_where_it_must_be_there() -> None:
    history = ask(messages=[*HI, {"role": "assistant", "content": "a", "reasoning_content": "r"}, *HI, SAID, *HI])
    row = at(echoes_reasoning="reasoning_content", unknown_reasoning=" ")
    thoughts = [each.get("reasoning_content") for each in sent(history, row)["messages"]]
    assert thoughts == [None, "r", None, " ", None]


def test_files_go_as_urls_where_that_is_the_providers_way() -> None:
    parts = [
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"}},
        {"type": "file", "file": {"file_data": "https://example.com/a.pdf"}},
    ]
    row = at(file_urls=True, refuses=("file_id",))
    assert sent(ask(messages=[{"role": "user", "content": parts}]), row)["messages"][0]["content"] == [
        {"type": "file_url", "file_url": {"url": "JVBERi0="}, "file_name": "a.pdf"},
        {"type": "file_url", "file_url": {"url": "https://example.com/a.pdf"}},
    ]
    by_id = ask(messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}])
    with pytest.raises(UnsupportedParameter, match="file_id"):
        DIALECT.request(by_id, row, None)


# Legacy completions


PROMPT = Call("completions", {"model": "asked", "prompt": "Once", "max_tokens": 4, "logprobs": 2, "stream": True})


def test_a_prompt_goes_to_its_own_endpoint_or_becomes_a_user_message() -> None:
    native = DIALECT.request(PROMPT, at("x-instruct", completions=("*-instruct",)), None)
    assert native.url.endswith("/v1/completions")
    assert json.loads(native.content)["prompt"] == "Once"
    assert native.dropped == ()
    through_chat = DIALECT.request(PROMPT, at(completions=("*-instruct",), output_limit="max_completion_tokens"), None)
    assert through_chat.url.endswith("/chat/completions")
    body = json.loads(through_chat.content)
    assert body["messages"] == [{"role": "user", "content": "Once"}]
    assert body["max_completion_tokens"] == 4
    assert not body.keys() & {"prompt", "logprobs", "max_tokens"}
    assert through_chat.dropped == ("logprobs",)
    assert sent(Call("completions", {"model": "a", "prompt": ["One"]}), at())["messages"][0]["content"] == "One"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
    ],
)
def test_what_chat_cannot_do_for_a_prompt_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        DIALECT.request(Call("completions", {"model": "a", **body}), at(), None)
    assert caught.value.param == param


def test_a_chat_answer_becomes_a_text_completion() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "upon"}, "logprobs": {}, "finish_reason": "eos"}
    body, usage = DIALECT.completion(
        PROMPT, at(), {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    )
    text = {"index": 0, "text": "upon", "logprobs": None, "finish_reason": "stop", "native_finish_reason": "eos"}
    assert body == {"choices": [text]}
    assert usage == Usage(input=1, output=2)
    translate = DIALECT.stream(PROMPT, at())
    chunk = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "up"}, "finish_reason": None}]}
    text = {"index": 0, "text": "up", "logprobs": None, "finish_reason": None}
    assert [piece.body for piece in translate(None, chunk)] == [{"choices": [text]}]


# Embeddings


VECTOR = [0.5, -1.25, 3.0]
PACKED = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()


@pytest.mark.parametrize("given", [VECTOR, PACKED])
def test_embeddings_are_given_as_asked_for(given: Any) -> None:
    for asked, wanted in ((None, VECTOR), ("float", VECTOR), ("base64", PACKED)):
        call = Call("embeddings", {"model": "e", "input": "x", "encoding_format": asked})
        data = {"data": [{"index": 0, "embedding": given}], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
        body, usage = DIALECT.completion(call, at(), data)
        assert body["data"][0]["embedding"] == wanted
        assert usage == Usage(input=3)


def test_embedding_requests_are_said_in_the_providers_words() -> None:
    call = Call("embeddings", {"model": "e", "input": ["x"], "encoding_format": "base64", "dimensions": 8, "user": "u"})
    to = at(embeddings=("*",), renames={"dimensions": "output_dimension"}, drops=("user",), defaults={"chat": 1})
    outgoing = DIALECT.request(call, to, None)
    assert outgoing.url.endswith("/embeddings")
    assert json.loads(outgoing.content) == {"model": "m", "input": ["x"], "output_dimension": 8}
    assert outgoing.dropped == ("user",)
    assert sent(call, at(embeddings=("*",), base64=True))["encoding_format"] == "base64"
    for body, row in (({"input": "x"}, {}), ({"input": [1]}, {"embeddings": ("*",)})):
        with pytest.raises(UnsupportedParameter):
            DIALECT.request(Call("embeddings", {"model": "e", **body}), at(**row), None)


# Answers


def whole(message: dict[str, Any], finish: Any = "stop", **body: Any) -> dict[str, Any]:
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": finish}], **body}
    return DIALECT.completion(CHAT, at(), answer).body["choices"][0]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "a", "reasoning": "r"},
        {"content": "a", "reasoning_content": "r", "reasoning": None},
        {"content": "a", "reasoning_content": "r", "reasoning": "r"},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}, {"type": "text", "text": "a"}]},
        {"content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}, {"type": "reference"}]},
    ],
)
def test_reasoning_has_one_name_and_content_is_text(message: dict[str, Any]) -> None:
    assert whole(dict(message))["message"] == {"content": "a", "reasoning_content": "r"}
    chunk = {"choices": [{"index": 0, "delta": dict(message)}]}
    (piece,) = DIALECT.stream(CHAT, at())(None, chunk)
    assert piece.body["choices"][0]["delta"] == {"content": "a", "reasoning_content": "r"}


@pytest.mark.parametrize(
    ("word", "reason"),
    [("eos", "stop"), ("model_length", "length"), ("stop", "stop"), ("tool_calls", "tool_calls"), ("what?", "stop")],
)
def test_finish_reasons_are_openais_words(word: str, reason: str) -> None:
    choice = whole({"content": "a"}, word)
    assert choice["finish_reason"] == reason
    assert choice.get("native_finish_reason", reason) == word


@pytest.mark.parametrize(("word", "fault"), [("insufficient_system_resource", "overloaded"), ("error", "server")])
def test_a_finish_that_is_a_failure_is_raised(word: str, fault: str) -> None:
    with pytest.raises(ProviderError) as caught:
        whole({"content": "a"}, word)
    assert (caught.value.fault, caught.value.falls_back) == (fault, True)


def test_whole_tool_calls_have_ids_types_and_arguments_as_text() -> None:
    made = [{"index": 0, "function": {"name": "f", "arguments": {"a": 1}}}, {"id": "x", "function": {"name": "g"}}]
    first, second = whole({"content": None, "tool_calls": made}, "tool_calls")["message"]["tool_calls"]
    assert first["id"].startswith("call_")
    assert (first["type"], first["function"]["arguments"]) == ("function", '{"a":1}')
    assert second == {"id": "x", "type": "function", "function": {"name": "g", "arguments": ""}}


def assembled(*chunks: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """As the OpenAI SDKs do it: by index, every string appended."""
    translate, calls = DIALECT.stream(CHAT, at()), dict[int, dict[str, str]]()
    for pieces in chunks:
        (piece,) = translate(None, {"choices": [{"index": 0, "delta": {"tool_calls": pieces}}]})
        for part in piece.body["choices"][0]["delta"]["tool_calls"]:
            call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
            call["id"] += part.get("id", "")
            call["name"] += part["function"].get("name", "")
            call["arguments"] += part["function"].get("arguments", "")
    assert list(calls) == list(range(len(calls)))
    return [(call["id"], call["name"], call["arguments"]) for call in calls.values()]


def piece(arguments: str, name: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"function": {"arguments": arguments, **({"name": name} if name is not None else {})}, **fields}


@pytest.mark.parametrize(
    "chunks",
    [
        [
            [piece("", "f", index=0, id="a", type="function")],
            [piece("{}", index=0)],
            [piece("1", "g", index=1, id="b")],
        ],
        [[piece("{", "f", id="a"), piece("1", "g", id="b")], [piece("}", id="a")]],
        [[piece("{", "f", index=0, id="a")], [piece("}", "f", index=0, id="a")], [piece("1", "g", index=0, id="b")]],
        [[piece("{", "f", index=0, id="a")], [piece("}", "", index=0, id="")], [piece("1", "g", index=1, id="b")]],
        [[piece("{", "f", index=3, id="a")], [piece("1", "g", index=7, id="b")], [piece("}", index=3)]],
        [[piece("{", "f", id="a")], [piece("}", None)], [piece("1", "g", id="b")]],
    ],
)
def test_streamed_tool_calls_are_told_apart(chunks: list[list[dict[str, Any]]]) -> None:
    assert assembled(*chunks) == [("a", "f", "{}"), ("b", "g", "1")]


def test_calls_without_ids_get_one_each() -> None:
    first, second = assembled([piece("{}", "f", index=0)], [piece("{}", "f", index=0)])
    assert first[1:] == second[1:] == ("f", "{}")
    assert first[0] != second[0]
    assert first[0].startswith("call_")


def test_padding_and_account_ids_are_taken_off_and_the_rest_stays() -> None:
    chunk = {
        "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None, "logprobs": {"content": []}}],
        "obfuscation": "xyz",
        "p": "xyz",
        "user_id": "user_1",
        "x_groq": {"id": "req"},
        "usage": None,
        "citations": ["c"],
    }
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": None, "logprobs": {"content": []}}
    assert [tuple(p) for p in DIALECT.stream(CHAT, at())(None, chunk)] == [
        ({"choices": [choice], "citations": ["c"]}, None)
    ]


def test_chunks_without_choices_pass_only_for_their_usage() -> None:
    translate = DIALECT.stream(CHAT, at())
    assert translate(None, {"choices": [], "prompt_filter_results": []}) == []
    (piece,) = translate(None, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    assert (piece.body, piece.usage) == ({"choices": []}, Usage(input=1, output=2))


# Usage


def counted(usage: Any, **row: Any) -> Usage | None:
    answer = {"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}], "usage": usage}
    return DIALECT.completion(CHAT, at(**row), answer).usage


def test_usage_is_split_by_each_providers_rule() -> None:
    plain = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    details = {"cached_tokens": 6, "cache_write_tokens": 3, "audio_tokens": 2, "odd": -1}
    thought = {"completion_tokens_details": {"reasoning_tokens": 4, "accepted_prediction_tokens": 1}}
    assert counted({**plain, "prompt_tokens_details": details, **thought}) == Usage(
        input=1,
        cache_read=6,
        cache_write=3,
        output=5,
        reasoning=4,
        details={"prompt": {"audio_tokens": 2}, "completion": {"accepted_prediction_tokens": 1}},
    )
    on_top = {**plain, "total_tokens": 19, "completion_tokens_details": {"reasoning_tokens": 4}}
    assert counted(on_top, reasoning_on_top=True) == Usage(input=10, output=9, reasoning=4)
    assert counted(on_top) == Usage(input=10, output=9, reasoning=4)  # the total gives it away
    assert counted({**on_top, "total_tokens": 15}, reasoning_on_top=True) == Usage(input=10, output=5, reasoning=4)
    hit = {**plain, "prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 2}
    assert counted(hit) == Usage(input=2, cache_read=8, output=5)
    assert counted({**plain, "prompt_tokens_details": {"cached_tokens": 99}}) == Usage(cache_read=10, output=5)


@pytest.mark.parametrize("wrong", [-1, "5", True, 5.0, None, [], 1e300, 2**70])
def test_insane_counts_are_never_trusted(wrong: Any) -> None:
    assert counted({"prompt_tokens": wrong, "completion_tokens": 5}) is None
    assert counted({"prompt_tokens": 5, "completion_tokens": wrong}) is None
    sane = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": wrong, "cost": wrong if wrong != 5.0 else None}
    sane |= {"prompt_tokens_details": {"cached_tokens": wrong}, "completion_tokens_details": wrong}
    assert counted(sane, cost=ReportedCost(path="cost")) == Usage(input=5, output=5)


@pytest.mark.parametrize("usage", ["x", 7, [], [1], {}, None, False])
def test_usage_that_is_no_object_is_none(usage: Any) -> None:
    assert counted(usage) is None


@pytest.mark.parametrize(
    ("more", "cost", "nano"),
    [
        ({"cost": 0.00019}, ReportedCost(path="cost"), 190_000),
        ({"cost": 6e-08}, ReportedCost(path="cost"), 60),
        (
            {"cost": 0, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.004}},
            ReportedCost(path="cost"),
            4_000_000,
        ),
        ({"cost": {"total_cost": 0.00614}}, ReportedCost(path="cost.total_cost"), 6_140_000),
        ({"cost_in_usd_ticks": 37756000}, ReportedCost(path="cost_in_usd_ticks", per_usd=10**10), 3_775_600),
        ({"cost": "0.1"}, ReportedCost(path="cost"), None),
        ({"cost": 1}, None, None),
    ],
)
def test_a_providers_own_cost_is_whole_nano_dollars(more: dict[str, Any], cost: Any, nano: int | None) -> None:
    usage = counted({"prompt_tokens": 1, "completion_tokens": 1, **more}, cost=cost)
    assert usage
    assert usage.cost == nano


def test_usage_is_found_wherever_it_stands() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    choice = {"index": 0, "delta": {}}
    for chunk in (
        {"choices": [choice], "usage": usage},
        {"choices": [choice], "x_groq": {"usage": usage}},
        {"choices": [{**choice, "usage": usage}]},
    ):
        (piece,) = DIALECT.stream(CHAT, at())(None, json.loads(json.dumps(chunk)))
        assert piece.usage == Usage(input=1, output=2)


# Errors


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}, {"choices": [{"index": 0}]}])
def test_an_empty_answer_is_a_failure(body: dict[str, Any]) -> None:
    with pytest.raises(ProviderError) as caught:
        DIALECT.completion(CHAT, at(), body)
    assert caught.value.fault == "empty"


@pytest.mark.parametrize(
    "body", [{"choices": "x"}, {"choices": [1]}, {"choices": {"a": 1}}, {"choices": [{"message": 1}]}]
)
def test_a_body_of_another_shape_is_a_protocol_error(body: dict[str, Any]) -> None:
    for read in (
        lambda: DIALECT.completion(CHAT, at(), dict(body)),
        lambda: DIALECT.stream(CHAT, at())(None, dict(body)),
    ):
        try:
            read()
        except ProviderError as error:
            assert error.fault in ("protocol", "empty")


ODDITIES = [
    *({"message": {"content": odd}} for odd in (5, 0, True, 1.5, {"a": 1})),
    *({"message": {"content": "a", "refusal": odd}} for odd in (5, False, ["a"], {})),
    *({"message": {"tool_calls": [{"id": odd, "function": {"name": "f"}}]}} for odd in (5, True, ["a"])),
    *({"message": {"tool_calls": [{"id": "c", "function": {"name": odd}}]}} for odd in (5, ["a"], {"a": 1})),
    *({"index": odd, "message": {"content": "a"}} for odd in ([], ["a"], {}, "0", 1.5, True)),
]


@pytest.mark.parametrize("choice", ODDITIES, ids=str)
def test_an_odd_type_in_an_answer_is_a_protocol_error(choice: dict[str, Any]) -> None:
    finished, streamed = {"finish_reason": "stop", **copy.deepcopy(choice)}, copy.deepcopy(choice)
    streamed["delta"] = streamed.pop("message")
    for read in (
        lambda: DIALECT.completion(CHAT, at(), {"choices": [finished]}),
        lambda: DIALECT.stream(CHAT, at())(None, {"choices": [streamed]}),
    ):
        with pytest.raises(ProviderError) as caught:
            read()
        assert (caught.value.fault, caught.value.falls_back) == ("protocol", True)


@pytest.mark.parametrize("choice", [{"text": 5}, {"text": {}}, {"text": "a", "index": {}}], ids=str)
def test_an_odd_type_in_a_legacy_completion_is_a_protocol_error(choice: dict[str, Any]) -> None:
    call, to = Call("completions", {"model": "m", "prompt": "Hi"}), at(completions=("*",))
    with pytest.raises(ProviderError, match="shape"):
        DIALECT.completion(call, to, {"choices": [dict(choice)]})
    with pytest.raises(ProviderError, match="shape"):
        DIALECT.stream(call, to)(None, {"choices": [dict(choice)]})


def test_choices_without_an_index_stand_in_their_order() -> None:
    choices = [{"message": {"content": "a"}, "finish_reason": "stop", **index} for index in ({}, {"index": None})]
    made = DIALECT.completion(CHAT, at(), {"choices": choices}).body["choices"]
    assert [choice["index"] for choice in made] == [0, 1]


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(WORDS, JSONS, max_size=5), st.sampled_from(["chat", "completions", "embeddings"]), st.booleans())
def test_whatever_comes_is_an_answer_or_a_provider_error(body: Any, surface: Any, native: bool) -> None:
    call = Call(surface, {"model": "a", "messages": HI, "prompt": "x", "input": "x"})
    to = at(completions=("*",) if native else (), embeddings=("*",), cost=ReportedCost(path="cost.total_cost"))
    for read in (DIALECT.completion, lambda call, to, body: DIALECT.stream(call, to)(None, body)):
        with suppress(ProviderError):
            read(call, to, json.loads(json.dumps(body)))
    assert DIALECT.failure(500, {}, json.dumps(body).encode()).message


@pytest.mark.parametrize(
    ("body", "fault", "words"),
    [
        ({"error": {"message": "boom", "code": 502}}, "server", "boom"),
        ({"error": {"message": "slow down", "code": 429}}, "rate_limit", "slow down"),
        ({"error": "boom"}, "error_in_200", "boom"),
        ({"code": "x", "error": "boom"}, "error_in_200", "boom"),
        ({"error": {"message": "no", "type": "insufficient_quota"}}, "money", "no credit"),
        ({"choices": [{"index": 0, "error": {"message": "boom", "code": 503}}]}, "overloaded", "boom"),
        ({"choices": [{"index": 0, "delta": {}}], "x_groq": {"error": "boom"}}, "error_in_200", "boom"),
        ({"object": "error", "message": "boom", "code": 400}, "bad_request", "boom"),
        ({"detail": "boom"}, "error_in_200", "boom"),
    ],
)
def test_an_error_inside_a_200_is_an_error(body: dict[str, Any], fault: str, words: str) -> None:
    for read in (
        lambda: DIALECT.completion(CHAT, at(), dict(body)),
        lambda: DIALECT.stream(CHAT, at())(None, dict(body)),
    ):
        with pytest.raises(ProviderError, match=words) as caught:
            read()
        assert caught.value.fault == fault
    with pytest.raises(ProviderError, match="boom"):
        DIALECT.stream(CHAT, at())("error", {"message": "boom"})


def refused(status: int, body: Any, **headers: str) -> ProviderError:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return DIALECT.failure(status, named, content)


def openai_error(message: str = "", code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (429, openai_error("Rate limit reached", "rate_limit_exceeded"), "rate_limit"),
        (429, openai_error("You exceeded your current quota", "insufficient_quota"), "money"),
        (429, openai_error("Request too large for gpt-4o on tokens per min (TPM)", "rate_limit_exceeded"), "context"),
        (402, {"error": {"message": "Insufficient Balance"}}, "money"),
        (403, {"code": "x", "error": "Your newly created team doesn't have any credits yet."}, "money"),
        (401, {"detail": "Unauthorized"}, "auth"),
        (403, {"message": "Forbidden"}, "auth"),
        (400, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: xa***45"}, "auth"),
        (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}], "auth"),
        (
            400,
            openai_error("This model's maximum context length is 8192 tokens.", "context_length_exceeded"),
            "context",
        ),
        (400, openai_error("'max_tokens' is too large: 5000. This model's maximum context length is 4096"), "context"),
        (400, openai_error("filtered", "content_filter"), "policy"),
        (400, openai_error("x", "content_policy_violation"), "policy"),
        (404, openai_error("The model `x` does not exist", "model_not_found"), "model_gone"),
        (404, {"error": 'model "x" not found, try pulling it first'}, "model_gone"),
        (403, openai_error("Project does not have access to model `gpt-9`", "model_not_found"), "model_gone"),
        (400, openai_error("model `x` has been decommissioned", "model_decommissioned"), "model_gone"),
        (404, b"<html>nothing here</html>", "protocol"),
        (413, {"error": {"message": "too big"}}, "body_too_large"),
        (422, {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Input should be 'user'"}]}, "bad_request"),
        (400, b"<html>Bad Request</html>", "bad_request"),
        (400, openai_error("'n' must be 1"), "bad_request"),
        (400, openai_error("Failed to call a function", "tool_use_failed"), "server"),
        (498, {"error": {"message": "full", "code": "capacity_exceeded"}}, "rate_limit"),
        (500, b"", "server"),
        (502, b"<html>Bad Gateway</html>", "server"),
        (503, b"<html>no</html>", "overloaded"),
        (524, b"error code: 524", "server"),
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "overloaded"),
        (409, b"null", "not_now"),
        (418, b"[1]", "bad_request"),
        (400, b'"just a string"', "bad_request"),
        (400, {"errors": [{"message": "from the edge"}]}, "bad_request"),
    ],
)
def test_every_shape_of_refusal_has_its_meaning(status: int, body: Any, fault: str) -> None:
    refusal = refused(status, body)
    assert refusal.fault == fault
    assert refusal.fault in FAULTS
    assert refusal.status == status
    assert refusal.message
    assert "<" not in refusal.message
    refusal.answer()


def test_a_refusal_tells_the_caller_what_was_wrong() -> None:
    body = {
        "error": {"message": "Invalid 'n'", "type": "invalid_request_error", "param": "n", "code": "integer_above_max"}
    }
    refusal = refused(400, body)
    assert (refusal.message, refusal.param, refusal.code) == ("Invalid 'n'", "n", "integer_above_max")
    listed = refused(
        422, {"detail": [{"loc": ["body", "n"], "msg": "too big"}, {"loc": ["body", "x"], "msg": "extra"}]}
    )
    assert listed.message == "body.n: too big; body.x: extra"
    raw = json.dumps(openai_error("the real reason"))
    assert refused(
        400, {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": raw}}}
    ).message == ("the real reason")


@pytest.mark.parametrize("status", [401, 402, 403])
def test_our_account_is_never_the_callers_business(status: int) -> None:
    refusal = refused(status, openai_error("Incorrect API key provided: sk-live-1234 of org-AbC123def"))
    assert refusal.answer().status == 502
    assert "1234" not in refusal.message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "2"}, 2),
        ({"retry_after_ms": "350", "retry_after": "1"}, 0.35),
        ({"retry_after_ms": "0", "retry_after": "1"}, 1),
        ({"retry_after": "0.5"}, 0.5),
        ({"x_ratelimit_reset_requests": "1s"}, 1),
        ({"x_ratelimit_reset_tokens": "1m2.5s"}, None),
        ({"x_ratelimit_reset_tokens": "350ms"}, 0.35),
        (
            {"x_ratelimit_reset_tokens": "9s", "x_ratelimit_remaining_tokens": "7", "x_ratelimit_reset_requests": "4s"},
            9,
        ),
        (
            {
                "x_ratelimit_reset_tokens": "9s",
                "x_ratelimit_reset_requests": "4s",
                "x_ratelimit_remaining_requests": "0",
            },
            4,
        ),
        ({"x_ratelimit_reset": str(int((time.time() + 3600) * 1000))}, None),
        ({"date": formatdate(1000000000, usegmt=True), "retry_after": formatdate(1000000030, usegmt=True)}, 30),
        ({"date": formatdate(1759845376, usegmt=True), "x_ratelimit_reset": "1759845420000"}, 44),
        ({"retry_after": formatdate(0, usegmt=True)}, None),
        ({"retry_after": "-5"}, None),
        ({"retry_after": "abc"}, None),
        ({"retry_after": "99999999"}, None),
        ({"retry_after": "9" * 400}, None),
        ({"retry_after": "nan"}, None),
        ({}, None),
    ],
)
def test_the_wish_to_be_left_alone_is_understood(headers: dict[str, str], seconds: float | None) -> None:
    assert refused(429, openai_error("slow"), **headers).retry_after == (seconds and pytest.approx(seconds))
    assert refused(400, openai_error("wrong"), **headers).retry_after is None


def test_the_wish_may_stand_in_the_message() -> None:
    assert refused(429, openai_error("Limit reached. Please try again in 7.66s. Visit …")).retry_after == 7.66
    assert refused(429, openai_error("Please try again in 120ms.")).retry_after == 0.12


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-AbCdEf123456",
        "gsk_AbCdEf123456789",
        "xai-AbCdEf123456789",
        "AIzaSyA1234567890abcdefghijklmnopqrstu",
        "Bearer abc.def-123456",
        "eyJhbGciOi.eyJzdWIiOi.abc",
        "sk-wrong****-key",
        "org-AbCdEf123456",
        "organization_01HXYZ",
        "proj_AbC123def",
        "user_2abcDEF9",
        "bb642ce4-5161-45c9-8f34-408850883602",
        "arn:aws:iam::123456789012:role/gateway",
        "123456789012",
        "me@example.com",
        "https://internal.example.com:8443/v1?key=abc",
        "10.0.12.7:8000",
        "my-resource.openai.azure.com",
        "gateway.prod.svc.cluster.local",
        "0123456789abcdef0123456789abcdef0123",
    ],
)
def test_messages_are_cleaned(secret: str) -> None:
    message = refused(400, openai_error(f"Wrong: {secret} was given.")).message
    assert secret not in message
    assert not re.search(r"1234|AbC|abc\b|example|azure\.com|svc|10\.0|bb642|wrong\*", message)
    assert message.startswith("Wrong: [")


@pytest.mark.parametrize(
    "harmless",
    [
        "The model 'accounts/fireworks/models/llama-v3p1-8b-instruct' is busy.",
        "messages[0].content: expected a string, got 12345 at line 1 column 335",
        "meta-llama/Llama-3.3-70B-Instruct-Turbo does not support tools.",
        "gpt-4o-2024-11-20 with user_id missing; see response_format.json_schema.strict",
    ],
)
def test_what_helps_stays(harmless: str) -> None:
    assert clean(harmless) == harmless


def test_messages_are_one_short_line_whatever_is_said() -> None:
    assert clean("a\n\tb\x00\u202ec") == "a bc"
    for text in ("x ", "a.", "*", "a@", "sk-", "9", "h", "model "):  # what a careless pattern would chew on for long
        assert len(refused(400, openai_error(text * 40_000)).message) <= 500
