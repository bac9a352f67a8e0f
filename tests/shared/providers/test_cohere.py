"""What is sent to Cohere, and what is made of its answers."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from shared.catalog import Deployment
from shared.config import Provider
from shared.errors import ProviderError, UnsupportedParameter
from shared.providers.cohere import DIALECT
from shared.providers.dialect import END, Piece
from shared.schema import Call, Usage

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
ROW = Provider(
    name="cohere",
    dialect="cohere",
    base_url="https://c.example/v2",
    api_key=SecretStr("co-1"),
    embeddings=("embed-*",),
    refuses=("n", "functions", "modalities", "audio", "input_audio", "file"),
    echoes_reasoning="tool_plan",
    slow={"*reasoning*": 120},
)
PLAIN = Deployment(ROW, "command-a-03-2025")
THINKER = Deployment(ROW, "command-a-reasoning-08-2025")
EMBEDDER = Deployment(ROW, "embed-v4.0")
WEATHER: dict[str, Any] = {"name": "weather", "parameters": {"type": "object", "properties": {"at": {}}}}


def ask(**body: Any) -> Call:
    return Call("chat", {"model": "asked", "messages": HI, **body})


def sent(call: Call, to: Deployment = PLAIN, max_tokens: int | None = None) -> dict[str, Any]:
    return json.loads(DIALECT.request(call, to, max_tokens).content)


def dropped(call: Call, to: Deployment = PLAIN) -> tuple[str, ...]:
    return DIALECT.request(call, to, None).dropped


def messages(*said: dict[str, Any]) -> list[dict[str, Any]]:
    return sent(ask(messages=list(said)))["messages"]


# What is sent


def test_a_plain_request() -> None:
    outgoing = DIALECT.request(ask(), PLAIN, 99)
    assert outgoing.url == "https://c.example/v2/chat"
    assert outgoing.headers == {"content-type": "application/json", "authorization": "Bearer co-1"}
    wanted = {"model": "command-a-03-2025", "messages": HI, "stream": False, "max_tokens": 99}
    assert json.loads(outgoing.content) == wanted
    assert outgoing.dropped == ()


def test_parameters_go_under_coheres_names() -> None:
    call = ask(
        max_completion_tokens=5,
        top_p=0.5,
        top_k=7,
        stop="x",
        seed=3,
        temperature=0.2,
        frequency_penalty=0.1,
        stream=True,
    )
    wanted = {"max_tokens": 5, "p": 0.5, "k": 7, "stop_sequences": ["x"], "seed": 3, "temperature": 0.2}
    wanted |= {"frequency_penalty": 0.1, "stream": True}
    body = sent(call, max_tokens=99)
    assert {name: body[name] for name in wanted} == wanted
    assert dropped(call) == ()
    assert sent(ask(stop=["a", "b"]))["stop_sequences"] == ["a", "b"]
    assert "stop_sequences" not in sent(ask(stop=[]))


def test_coheres_own_parameters_pass() -> None:
    own = {"safety_mode": "STRICT", "documents": [{"data": {"text": "x"}}], "citation_options": {"mode": "OFF"}}
    call = ask(**own, thinking={"type": "disabled"})
    assert sent(call).items() >= {**own, "thinking": {"type": "disabled"}}.items()
    assert dropped(call) == ()


@pytest.mark.parametrize(
    ("name", "asked", "taken"),
    [
        ("temperature", 1.7, 1),
        ("top_p", 1.0, 0.99),
        ("top_p", 0.0, 0.01),
        ("frequency_penalty", -1.0, None),
        ("presence_penalty", 1.5, 1),
        ("seed", -5, 0),
    ],
)
def test_what_is_out_of_bounds_is_moved_to_the_nearest_and_told(name: str, asked: float, taken: float | None) -> None:
    body = sent(ask(**{name: asked}))
    assert body.get({"top_p": "p"}.get(name, name)) == taken
    assert dropped(ask(**{name: asked})) == (name,)
    with pytest.raises(UnsupportedParameter) as refused:
        sent(ask(**{name: asked, "strict": True}))
    assert refused.value.param == name


def test_only_one_penalty_is_sent() -> None:
    both = ask(frequency_penalty=0.5, presence_penalty=0.4)
    assert sent(both)["frequency_penalty"] == 0.5
    assert "presence_penalty" not in sent(both)
    assert dropped(both) == ("presence_penalty",)
    assert dropped(ask(frequency_penalty=0.5, presence_penalty=0)) == ()
    assert not sent(ask(frequency_penalty=0, presence_penalty=0)).keys() & {"frequency_penalty", "presence_penalty"}


def test_what_it_lacks_is_dropped_and_told() -> None:
    lacking = {
        "top_logprobs": 2,
        "logit_bias": {"1": 1},
        "user": "u",
        "parallel_tool_calls": False,
        "metadata": {"a": "b"},
    }
    assert dropped(ask(**lacking)) == tuple(sorted(lacking))
    assert dropped(ask(models=["x"], n=1, stream_options=None, modalities=["text"])) == ()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": WEATHER}], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}]}, "messages"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": [{"type": "document"}]}]}, "messages"),
    ],
)
def test_what_changes_the_meaning_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(ask(**body))
    assert refused.value.param == param


def test_what_the_system_says_comes_first_and_in_one() -> None:
    assert messages(
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": ""},
        *HI,
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}, {"type": "text", "text": ""}]},
    ) == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]},
        *HI,
    ]


def test_parts_are_sent_bare() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}
    cached = {"type": "text", "text": "see", "cache_control": {"type": "ephemeral"}}
    empty = {"type": "text", "text": ""}
    (message,) = messages({"role": "user", "name": "me", "content": [cached, empty, image]})
    assert message == {"role": "user", "content": [{"type": "text", "text": "see"}, image]}


def test_a_tool_conversation() -> None:
    calls = [
        {"id": f"toolu_{at}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for at, arguments in enumerate(['{"at": "Rome"}', ""])
    ]
    document = {"type": "document", "document": {"data": {"sky": "blue"}}}
    said = messages(
        *HI,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "I look.", "refusal": None},
        {"role": "tool", "tool_call_id": "toolu_0", "content": "sun"},
        {"role": "tool", "tool_call_id": "toolu_1", "content": [document]},
        {"role": "assistant", "content": "", "annotations": []},
        {"role": "assistant", "content": None, "refusal": "No."},
    )
    calls[1]["function"]["arguments"] = "{}"
    assert said == [
        *HI,
        {"role": "assistant", "tool_plan": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "toolu_0", "content": "sun"},
        {"role": "tool", "tool_call_id": "toolu_1", "content": [document]},
        {"role": "assistant", "content": "No."},
    ]


def test_tools() -> None:
    bare = {"type": "function", "function": {"name": "time", "description": "Now"}}
    body = sent(ask(tools=[{"type": "function", "function": WEATHER}, bare], tool_choice="required"))
    time = {"name": "time", "description": "Now", "parameters": {"type": "object", "properties": {}}}
    assert body["tools"] == [{"type": "function", "function": each} for each in (WEATHER, time)]
    assert body["tool_choice"] == "REQUIRED"
    auto = sent(ask(tools=[{"type": "function", "function": WEATHER}], tool_choice="auto"))
    assert not auto.keys() & {"tool_choice", "strict_tools"}
    assert "tools" not in sent(ask(tools=[], tool_choice="none"))


def test_tools_are_strict_where_all_can_be() -> None:
    needs = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
    strict = {"type": "function", "function": {"name": "f", "parameters": needs, "strict": True}}
    lenient = {"type": "function", "function": {"name": "g", "parameters": needs}}
    optional = {"type": "function", "function": {"name": "h", "parameters": {**needs, "required": []}}}
    assert sent(ask(tools=[strict, lenient]))["strict_tools"] is True
    assert dropped(ask(tools=[strict, lenient])) == ()
    assert "strict_tools" not in sent(ask(tools=[strict, optional]))
    assert dropped(ask(tools=[strict, optional])) == ("tools.strict",)
    assert dropped(ask(tools=[optional])) == ()
    assert sent(ask(tools=[optional], strict_tools=True))["strict_tools"] is True  # Cohere's own, and its business


def test_structured_output() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert sent(ask(response_format=form))["response_format"] == {"type": "json_object", "json_schema": schema}
    assert sent(ask(response_format={"type": "json_object"}))["response_format"] == {"type": "json_object"}
    assert "response_format" not in sent(ask(response_format={"type": "text"}))


@pytest.mark.parametrize(
    ("body", "thinking"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, {"type": "disabled"}),
        ({"reasoning_effort": "low"}, {"type": "enabled", "token_budget": 6400}),
        ({"reasoning_effort": "low", "max_tokens": 1000}, {"type": "enabled", "token_budget": 200}),
        ({"reasoning_effort": "max"}, {"type": "enabled"}),
        ({"reasoning": {"max_tokens": 77}}, {"type": "enabled", "token_budget": 77}),
        ({"reasoning": {"effort": "medium"}}, {"type": "enabled", "token_budget": 16000}),
        ({"reasoning": {"enabled": False}}, {"type": "disabled"}),
        ({"reasoning": {"exclude": True}}, None),
    ],
)
def test_a_model_that_thinks_is_told_how_much(body: dict[str, Any], thinking: dict[str, Any] | None) -> None:
    assert sent(ask(**body), THINKER).get("thinking") == thinking
    assert dropped(ask(**body), THINKER) == ()
    assert "thinking" not in sent(ask(**body))
    asks = thinking and thinking["type"] == "enabled"
    assert dropped(ask(**body)) == (tuple(name for name in body if name != "max_tokens") if asks else ())


def test_an_effort_that_nobody_knows_is_told() -> None:
    assert dropped(ask(reasoning_effort="some"), THINKER) == ("reasoning_effort",)


def test_embeddings_are_asked_for() -> None:
    call = Call("embeddings", {"model": "m", "input": "a", "dimensions": 256, "encoding_format": "base64", "user": "u"})
    outgoing = DIALECT.request(call, EMBEDDER, None)
    assert outgoing.url == "https://c.example/v2/embed"
    assert json.loads(outgoing.content) == {
        "model": "embed-v4.0",
        "texts": ["a"],
        "input_type": "search_document",
        "embedding_types": ["float"],
        "output_dimension": 256,
        "truncate": "NONE",
    }
    assert outgoing.dropped == ("user",)
    own = Call("embeddings", {"model": "m", "input": ["a", "b"], "input_type": "search_query", "truncate": "END"})
    assert sent(own, EMBEDDER).items() >= {"texts": ["a", "b"], "input_type": "search_query", "truncate": "END"}.items()


@pytest.mark.parametrize(
    ("given", "to", "param"), [([1, 2], EMBEDDER, "input"), ([[1]], EMBEDDER, "input"), ("a", PLAIN, "model")]
)
def test_what_cannot_be_embedded_is_refused(given: Any, to: Deployment, param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(Call("embeddings", {"model": "m", "input": given}), to)
    assert refused.value.param == param


def test_a_legacy_completion_is_one_user_message() -> None:
    call = Call("completions", {"model": "m", "prompt": ["Once"], "max_tokens": 4, "logprobs": 1})
    assert sent(call) == {
        "model": "command-a-03-2025",
        "messages": [{"role": "user", "content": "Once"}],
        "stream": False,
        "max_tokens": 4,
    }
    assert dropped(call) == ("logprobs",)
    body, _ = DIALECT.completion(call, PLAIN, whole([{"type": "text", "text": " upon"}]))
    assert body["choices"][0].items() >= {"text": " upon", "finish_reason": "stop"}.items()


# What is answered


def whole(content: Any = None, **message: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "finish_reason": "TOOL_CALL" if message.get("tool_calls") else "COMPLETE",
        "message": {"role": "assistant", "content": content, **message},
        "usage": {
            "billed_units": {"input_tokens": 11.0, "output_tokens": 40},
            "tokens": {"input_tokens": 500, "output_tokens": 60, "reasoning_tokens": 30},
            "cached_tokens": 448,
        },
    }


def test_a_whole_answer() -> None:
    citation = {"start": 0, "end": 2, "text": "It", "sources": []}
    content = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "It is 8."}]
    body, usage = DIALECT.completion(ask(), PLAIN, whole(content, citations=[citation]))
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "It is 8.",
                "reasoning_content": "Hm.",
                "extra_content": {"cohere": {"citations": [citation]}},
            },
            "finish_reason": "stop",
            "native_finish_reason": "COMPLETE",
        }
    ]
    details = {"prompt": {"tokens": 500}, "completion": {"tokens": 60}}
    assert usage == Usage(input=11, output=40, reasoning=30, details=details)
    hidden, _ = DIALECT.completion(ask(reasoning={"exclude": True}), PLAIN, whole(content))
    assert "reasoning_content" not in hidden["choices"][0]["message"]


def test_a_whole_tool_call() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    body, _ = DIALECT.completion(ask(), PLAIN, whole(tool_calls=[call], tool_plan="I look."))
    choice = body["choices"][0]
    assert (choice["finish_reason"], choice["native_finish_reason"]) == ("tool_calls", "TOOL_CALL")
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I look.",
        "tool_calls": [{**call, "function": {"name": "weather", "arguments": "{}"}}],
    }


@pytest.mark.parametrize(
    ("usage", "wanted"),
    [
        (None, None),
        ({}, None),
        ("many", None),
        ({"tokens": {"input_tokens": 5, "output_tokens": 2}}, (5, 2)),
        ({"billed_units": {"search_units": 1}}, (0, 0)),
        ({"billed_units": {"input_tokens": -1, "output_tokens": True}}, (0, 0)),
    ],
)
def test_usage_is_what_is_billed(usage: Any, wanted: tuple[int, int] | None) -> None:
    _, found = DIALECT.completion(ask(), PLAIN, {**whole([]), "usage": usage})
    assert (found and (found.input, found.output)) == wanted


@pytest.mark.parametrize("asked", ["float", "base64"])
def test_embeddings_come_as_asked_for(asked: str) -> None:
    body = {"id": "1", "embeddings": {"float": [[0.5, -1.0]]}, "meta": {"billed_units": {"input_tokens": 3}}}
    call = Call("embeddings", {"model": "m", "input": "a", "encoding_format": asked})
    made, usage = DIALECT.completion(call, EMBEDDER, body)
    vector = made["data"][0]["embedding"]
    assert vector == ([0.5, -1.0] if asked == "float" else base64.b64encode(struct.pack("<2f", 0.5, -1)).decode())
    assert usage == Usage(input=3)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"message": "internal server error"}, "error_in_200"),
        ({"id": "1", "message": "too many tokens: size limit exceeded by 3 tokens."}, "context"),
        ({**whole([]), "finish_reason": "ERROR"}, "server"),
        ({**whole([]), "finish_reason": "TIMEOUT"}, "server"),
        ({}, "protocol"),
        (whole("text"), "protocol"),
        (whole([{"type": "text", "text": 5}]), "protocol"),
        (whole(tool_calls=[{}]), "protocol"),
    ],
)
def test_what_is_no_answer_is_raised(body: dict[str, Any], fault: str) -> None:
    with pytest.raises(ProviderError) as raised:
        DIALECT.completion(ask(), PLAIN, body)
    assert raised.value.fault == fault


@pytest.mark.parametrize(
    ("status", "message", "fault"),
    [
        (401, "invalid api token", "auth"),
        (402, "Please add or update your payment method", "money"),
        (429, "You are using a Trial key, which is limited to 10 API calls / minute.", "rate_limit"),
        (498, "blocked output", "policy"),
        (400, "invalid request: temperature must be between 0 and 1.0 inclusive.", "bad_request"),
        (503, "", "overloaded"),
    ],
)
def test_a_refusal_has_its_meaning(status: int, message: str, fault: str) -> None:
    assert DIALECT.failure(status, {}, json.dumps({"message": message}).encode()).fault == fault


# Streams


LIKELY = {"text": "Hé", "token_ids": [3, 4], "logprobs": [-0.25, -0.5]}
TOLD = {"token": "Hé", "logprob": -0.75, "bytes": [72, 195, 169], "top_logprobs": []}


def test_how_likely_the_words_were() -> None:
    assert sent(ask(logprobs=True))["logprobs"] is True
    assert dropped(ask(logprobs=True, top_logprobs=2)) == ("top_logprobs",)
    assert "logprobs" not in sent(ask(logprobs=False))
    unknown = {"text": "!", "token_ids": [5], "logprobs": None}
    body = {**whole([{"type": "text", "text": "Hé!"}]), "logprobs": [LIKELY, unknown]}
    choice = DIALECT.completion(ask(logprobs=True), PLAIN, body).body["choices"][0]
    assert choice["logprobs"] == {"content": [TOLD], "refusal": None}
    (piece,) = streamed({**content(text="Hé"), "logprobs": LIKELY})
    assert piece.body["choices"][0]["logprobs"] == {"content": [TOLD], "refusal": None}


def streamed(*events: dict[str, Any], call: Call | None = None) -> list[Piece]:
    translate = DIALECT.stream(call or ask(stream=True), PLAIN)
    return [piece for event in events for piece in translate(event.get("type"), event)]


def content(**said: Any) -> dict[str, Any]:
    return {"type": "content-delta", "index": 0, "delta": {"message": {"content": said}}}


def tool_call(kind: str, index: int, **call: Any) -> dict[str, Any]:
    return {"type": f"tool-call-{kind}", "index": index, "delta": {"message": {"tool_calls": call}}}


def end(reason: str = "COMPLETE", **more: Any) -> dict[str, Any]:
    return {"type": "message-end", "delta": {"finish_reason": reason, "usage": whole()["usage"], **more}}


def deltas(pieces: list[Piece]) -> list[dict[str, Any]]:
    return [piece.body["choices"][0]["delta"] for piece in pieces if piece is not END]


def test_a_stream() -> None:
    start = {"type": "content-start", "index": 0, "delta": {"message": {"content": {"type": "text", "text": ""}}}}
    citation = {"start": 0, "end": 2, "text": "It"}
    cited = {"type": "citation-start", "index": 0, "delta": {"message": {"citations": citation}}}
    pieces = streamed(
        {"type": "message-start", "delta": {"message": {}}},
        start,
        content(thinking="Hm."),
        content(text="It"),
        cited,
        {"type": "citation-end", "index": 0},
        {"type": "content-end", "index": 0},
        {"type": "debug", "prompt": "secret"},
        end(),
    )
    assert deltas(pieces) == [
        {"reasoning_content": "Hm."},
        {"content": "It"},
        {"extra_content": {"cohere": {"citations": [citation]}}},
        {},
    ]
    assert pieces[-1] is END
    last = pieces[-2]
    assert last.body["choices"][0].items() >= {"finish_reason": "stop", "native_finish_reason": "COMPLETE"}.items()
    assert last.usage is not None
    assert (last.usage.input, last.usage.output) == (11, 40)
    both = streamed(content(thinking="Hm.", text="It"))
    assert deltas(both) == [{"content": "It", "reasoning_content": "Hm."}]
    hidden = streamed(content(thinking="Hm."), content(text="It"), call=ask(reasoning={"exclude": True}))
    assert deltas(hidden) == [{"content": "It"}]


def test_streamed_tool_calls_have_an_index_of_their_own() -> None:
    pieces = streamed(
        {"type": "tool-plan-delta", "delta": {"message": {"tool_plan": "I look."}}},
        tool_call("start", 3, id="a", type="function", function={"name": "weather", "arguments": ""}),
        tool_call("delta", 3, function={"arguments": '{"at": '}),
        tool_call("delta", 3, function={"arguments": '"Rome"}'}),
        {"type": "tool-call-end", "index": 3},
        tool_call("start", 4, id="b", type="function", function={"name": "time", "arguments": ""}),
        {"type": "tool-call-end", "index": 4},
        end("TOOL_CALL"),
    )
    said = deltas(pieces)
    assert said[0] == {"reasoning_content": "I look."}
    calls = [delta["tool_calls"][0] for delta in said[1:-1]]
    first = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}}
    assert calls == [
        {"index": 0, **first},
        {"index": 0, "function": {"arguments": '{"at": '}},
        {"index": 0, "function": {"arguments": '"Rome"}'}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "time", "arguments": ""}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]


@pytest.mark.parametrize(
    ("event", "fault"),
    [
        (end("ERROR"), "server"),
        (end("ERROR", error="too many tokens: size limit exceeded by 3 tokens."), "context"),
        ({"message": "internal server error", "id": "1"}, "error_in_200"),
        (content(text=5), "protocol"),
        ({"type": "content-delta"}, "protocol"),
        (tool_call("delta", 9, function={"arguments": "{"}), "protocol"),
    ],
)
def test_a_stream_that_breaks_off_says_so(event: dict[str, Any], fault: str) -> None:
    with pytest.raises(ProviderError) as raised:
        streamed(content(text="It"), event)
    assert raised.value.fault == fault


def test_a_streamed_legacy_completion() -> None:
    call = Call("completions", {"model": "m", "prompt": "Once", "stream": True})
    pieces = streamed(content(text=" upon"), end("MAX_TOKENS"), call=call)
    assert [piece.body["choices"][0]["text"] for piece in pieces[:-1]] == [" upon", ""]
    assert pieces[-2].body["choices"][0]["finish_reason"] == "length"
    assert pieces[-1] is END


KINDS = ["content-start", "content-delta", "tool-plan-delta", "tool-call-start", "tool-call-delta", "tool-call-end"]
KINDS += ["citation-start", "message-end", "message-start"]
NAMES = ["type", "delta", "message", "content", "text", "thinking", "tool_plan", "tool_calls", "function", "arguments"]
NAMES += ["name", "id", "index", "finish_reason", "usage", "billed_units", "tokens", "embeddings", "float", "citations"]
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["", "a", "COMPLETE", *KINDS])
GARBAGE = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
)
SHAPED = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS), "index": st.integers(0, 1) | LEAVES},
    optional={"delta": st.fixed_dictionaries({"message": GARBAGE}) | GARBAGE},
)


@settings(max_examples=300, deadline=None)
@given(st.lists(SHAPED, max_size=4), st.dictionaries(st.sampled_from(NAMES), GARBAGE, max_size=4))
def test_garbage_is_read_or_raised_as_a_provider_error(events: list[dict[str, Any]], body: dict[str, Any]) -> None:
    embedding = Call("embeddings", {"model": "m", "input": "a"})
    for read in (
        lambda: streamed(*events),
        lambda: [DIALECT.completion(ask(), PLAIN, body)],
        lambda: [DIALECT.completion(embedding, EMBEDDER, body)],
    ):
        try:
            pieces = read()
        except ProviderError:
            continue
        for piece in pieces:
            for choice in piece.body.get("choices", ()):
                said = choice.get("delta") or choice.get("message") or {}
                assert isinstance(said.get("content"), str | None)
                assert isinstance(said.get("reasoning_content"), str | None)
