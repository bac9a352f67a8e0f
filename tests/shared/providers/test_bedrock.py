"""What is sent to Bedrock's Converse, and what is made of its answers."""

from __future__ import annotations

import base64
import json
import re
import tomllib
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from shared.assembly import assembled
from shared.catalog import Catalog, Deployment
from shared.config import ROWS, ConfigError, Provider
from shared.errors import ProviderError, UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.bedrock import DIALECT
from shared.providers.dialect import END, Outgoing, Piece
from shared.schema import Call, Usage
from shared.settings import Settings
from shared.sse import MAX_EVENT, TooLong
from tests.eventstream import event, exception, frame

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
SAID_HI = [{"role": "user", "content": [{"text": "Hi"}]}]
ROW = Provider.model_validate(
    {
        **tomllib.loads(ROWS.read_text())["bedrock"],
        "name": "bedrock",
        "base_url": "https://bedrock-runtime.eu-central-1.amazonaws.com",
        "region": "eu-central-1",
        "api_key": SecretStr("bedrock-key"),
    }
)


def at(model: str) -> Deployment:
    return Deployment(ROW, model)


SONNET = at("us.anthropic.claude-sonnet-4-5-20250929-v1:0")
OPUS = at("global.anthropic.claude-opus-4-6-v1")
NOVA = at("us.amazon.nova-lite-v1:0")
NOVA_2 = at("global.amazon.nova-2-lite-v1:0")
LLAMA = at("us.meta.llama3-3-70b-instruct-v1:0")
GPT = at("global.openai.gpt-6-sol")
GPT_OSS = at("openai.gpt-oss-120b-1:0")
QWEN = at("qwen.qwen3-32b-v1:0")
MISTRAL = at("mistral.mistral-large-2402-v1:0")
DEEPSEEK = at("us.deepseek.r1-v1:0")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
WEATHER_SPEC = {
    "toolSpec": {
        "name": "weather",
        "description": "The weather",
        "inputSchema": {"json": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
}


def ask(**body: Any) -> Call:
    return Call("chat", {"model": "asked", "messages": HI, **body})


@cache
def service() -> ServiceModel:
    return ServiceModel(Loader().load_service_model("bedrock-runtime", "service-2"))


BYTES = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def with_bytes(value: Any, shape: Any) -> Any:
    """What botocore would be given: blobs are bytes, where the wire has base64."""
    if shape.type_name == "blob":
        return base64.b64decode(value, validate=True)
    if shape.type_name == "structure" and not shape.is_document_type:
        return {name: with_bytes(each, shape.members[name]) for name, each in value.items()}
    if shape.type_name == "list":
        return [with_bytes(each, shape.member) for each in value]
    return value


def assert_valid(outgoing: Outgoing) -> None:
    """Against the service's own model, patterns included, which botocore itself does not look at."""
    operation = "ConverseStream" if outgoing.url.endswith("/converse-stream") else "Converse"
    shape = service().operation_model(operation).input_shape
    assert shape is not None
    body = json.loads(outgoing.content)
    assert body.keys() <= shape.members.keys()
    report = ParamValidator().validate({"modelId": "m", **with_bytes(body, shape)}, shape)
    assert not report.has_errors(), report.generate_report()
    roles = [turn["role"] for turn in body["messages"]]
    assert roles[0] == "user", roles
    assert all(a != b for a, b in pairwise(roles)), roles
    for turn in body["messages"]:
        assert turn["content"]
        kinds = {kind for block in turn["content"] for kind in block}
        assert "text" in kinds or "document" not in kinds, "A text block must be included when using documents."
        for block in turn["content"]:
            assert block.get("text", "x").strip()
            for use in (block.get("toolUse"), block.get("toolResult")):
                assert not use or re.fullmatch(r"[a-zA-Z0-9_.:-]{1,64}", use["toolUseId"])
            if document := block.get("document"):
                assert re.fullmatch(r"(?!.*  )[A-Za-z0-9 \-()\[\]]{1,200}", document["name"])


def requested(call: Call, to: Deployment = SONNET, max_tokens: int | None = None) -> Outgoing:
    outgoing = DIALECT.request(call, to, max_tokens)
    assert_valid(outgoing)
    return outgoing


def sent(call: Call, to: Deployment = SONNET, max_tokens: int | None = None) -> dict[str, Any]:
    return json.loads(requested(call, to, max_tokens).content)


def dropped(call: Call, to: Deployment = SONNET) -> tuple[str, ...]:
    return requested(call, to).dropped


def turns(*messages: dict[str, Any], to: Deployment = SONNET, **body: Any) -> list[dict[str, Any]]:
    return sent(ask(messages=list(messages), **body), to)["messages"]


def refused(call: Call, to: Deployment = SONNET) -> str | None:
    with pytest.raises(UnsupportedParameter) as caught:
        DIALECT.request(call, to, None)
    return caught.value.param


# What is sent


def test_a_plain_request() -> None:
    outgoing = requested(ask(), max_tokens=99)
    path = "/model/us.anthropic.claude-sonnet-4-5-20250929-v1%3A0/converse"
    assert outgoing.url == "https://bedrock-runtime.eu-central-1.amazonaws.com" + path
    assert outgoing.headers == {"content-type": "application/json", "authorization": "Bearer bedrock-key"}
    assert json.loads(outgoing.content) == {"messages": SAID_HI, "inferenceConfig": {"maxTokens": 99}}
    assert (outgoing.dropped, outgoing.region) == ((), None)
    assert requested(ask(stream=True, stream_options={"include_usage": True})).url.endswith("/converse-stream")
    assert sent(ask()) == {"messages": SAID_HI}


def test_a_model_is_one_segment_of_the_path() -> None:
    arn = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-lite-v1:0"
    path = "arn%3Aaws%3Abedrock%3Aus-east-1%3A123456789012%3Ainference-profile%2Fus.amazon.nova-lite-v1%3A0"
    assert requested(ask(), at(arn)).url.endswith(f".amazonaws.com/model/{path}/converse")


def test_without_a_key_it_is_to_be_signed() -> None:
    row = ROW.model_copy(update={"api_key": None})
    outgoing = requested(ask(), Deployment(row, "amazon.nova-lite-v1:0"))
    assert (outgoing.region, dict(outgoing.headers)) == ("eu-central-1", {"content-type": "application/json"})


def load(tmp_path: Any, config: str, **environ: str) -> Provider:
    path = tmp_path / "gateway.toml"
    path.write_text(config)
    settings = Settings.read({"GATEWAY_CONFIG": str(path), **environ})
    return Catalog.load(settings, PriceTable.vendored()).providers["bedrock"]


def test_what_switches_it_on_and_where_it_is(tmp_path: Any) -> None:
    off = load(tmp_path, "")
    assert (off.missing, off.base_url) == (["BEDROCK_API_KEY"], "https://bedrock-runtime.us-east-1.amazonaws.com")
    by_key = load(tmp_path, "", BEDROCK_API_KEY="k", AWS_REGION="ap-south-1")
    assert (by_key.missing, by_key.base_url) == ([], "https://bedrock-runtime.ap-south-1.amazonaws.com")
    by_role = load(tmp_path, "[providers.bedrock]\nenabled = true\nregion = 'eu-west-1'", AWS_REGION="ap-south-1")
    assert (by_role.missing, by_role.region) == ([], "eu-west-1")
    assert by_role.base_url == "https://bedrock-runtime.eu-west-1.amazonaws.com"
    elsewhere = load(tmp_path, "", BEDROCK_API_KEY="k", BEDROCK_BASE_URL="https://vpce-1.example/")
    assert elsewhere.base_url == "https://vpce-1.example"
    with pytest.raises(ConfigError, match="region"):
        load(tmp_path, "[providers.bedrock]\nregion = 'x.example/'")


def test_parameters_go_under_converses_names() -> None:
    call = ask(max_completion_tokens=5, temperature=0.2, stop=["x", "y"], top_k=7, service_tier="flex", user=None)
    assert sent(call, max_tokens=99) == {
        "messages": SAID_HI,
        "inferenceConfig": {"maxTokens": 5, "temperature": 0.2, "stopSequences": ["x", "y"]},
        "serviceTier": {"type": "flex"},
        "additionalModelRequestFields": {"top_k": 7},
    }
    assert dropped(call) == ()
    assert sent(ask(top_k=7), NOVA)["additionalModelRequestFields"] == {"inferenceConfig": {"topK": 7}}
    assert dropped(ask(top_k=7), LLAMA) == ("top_k",)
    assert sent(ask(top_p=0.5, temperature=0.5), NOVA)["inferenceConfig"] == {"temperature": 0.5, "topP": 0.5}
    assert sent(ask(stop="x"))["inferenceConfig"] == {"stopSequences": ["x"]}
    assert dropped(ask(n=1, modalities=["text"], service_tier="auto", parallel_tool_calls=True)) == ()


def test_what_converse_lacks_is_dropped_and_told() -> None:
    call = ask(seed=1, logit_bias={"1": 1}, presence_penalty=1, user="u", logprobs=True, metadata={"a": "b"})
    assert dropped(call) == ("logit_bias", "logprobs", "metadata", "presence_penalty", "seed", "user")
    assert dropped(ask(temperature=1.5)) == ("temperature",)
    assert sent(ask(temperature=1.5))["inferenceConfig"] == {"temperature": 1}
    assert dropped(ask(temperature=0.1, top_p=0.1)) == ("top_p",), "Claude takes one of them"
    assert dropped(ask(stop=["\n", "x"])) == ("stop",)
    assert dropped(ask(service_tier="scale")) == ("service_tier",)
    assert dropped(ask(temperature=1, stop="x"), GPT) == ("stop", "temperature")
    assert dropped(ask(temperature=1), at("us.anthropic.claude-opus-5")) == ("temperature",)
    with pytest.raises(UnsupportedParameter):
        DIALECT.request(ask(seed=1, strict=True), SONNET, None)


def test_converses_own_fields_pass() -> None:
    own = {
        "guardrailConfig": {"guardrailIdentifier": "abc", "guardrailVersion": "DRAFT", "trace": "enabled"},
        "performanceConfig": {"latency": "optimized"},
        "requestMetadata": {"team": "a"},
        "additionalModelRequestFields": {"thinking": {"type": "enabled", "budget_tokens": 2000}},
    }
    outgoing = requested(ask(**own))
    assert json.loads(outgoing.content) == {"messages": SAID_HI, **own}
    assert outgoing.dropped == ()
    assert dropped(ask(additionalModelRequestFields="x")) == ("additionalModelRequestFields",)
    both = ask(top_k=7, additionalModelRequestFields={"top_k": 9, "x": 1})
    assert sent(both)["additionalModelRequestFields"] == {"top_k": 9, "x": 1}


IMAGE = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [*HI, {"role": "function", "name": "f", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}, "messages"),
        *(
            ({"messages": [{"role": role, "content": [part]}]}, "messages")
            for role, part in (
                ("user", {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}),
                ("user", {"type": "image_url", "image_url": {"url": "s3://bucket/a.png"}}),
                ("user", {"type": "image_url", "image_url": {"url": "data:image/bmp;base64,AAAA"}}),
                ("user", {"type": "file", "file": {"file_id": "file-1"}}),
                ("user", {"type": "file", "file": {"file_data": "data:application/zip;base64,AAAA"}}),
                ("user", {"type": "video_url", "video_url": {"url": "x"}}),
                ("system", {"type": "image_url", "image_url": {"url": IMAGE}}),
            )
        ),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert refused(ask(**body)) == param


def test_what_a_family_lacks_is_refused() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    assert refused(ask(tools=[WEATHER], tool_choice="required"), LLAMA) == "tool_choice"
    assert refused(ask(tools=[WEATHER], tool_choice="required"), at("us.anthropic.claude-opus-5-5")) == "tool_choice"
    assert refused(ask(response_format=schema), NOVA) == "response_format"


def test_a_schema_for_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "description": "d", "schema": schema, "strict": True}}
    told = sent(ask(response_format=form))["outputConfig"]["textFormat"]
    assert (told["type"], list(told["structure"])) == ("json_schema", ["jsonSchema"])
    definition = told["structure"]["jsonSchema"]
    assert (definition["name"], definition["description"]) == ("x", "d")
    assert json.loads(definition["schema"]) == schema
    assert "outputConfig" not in sent(ask(response_format={"type": "text"}))
    form["json_schema"]["schema"] = {"type": "string", "maxLength": 9}
    told = sent(ask(response_format=form))["outputConfig"]["textFormat"]
    assert json.loads(told["structure"]["jsonSchema"]["schema"]) == {"type": "string", "description": "{maxLength: 9}"}
    assert dropped(ask(response_format=form)) == ("response_format.json_schema.maxLength",)


def test_tools_and_which_to_choose() -> None:
    assert sent(ask(tools=[WEATHER]))["toolConfig"] == {"tools": [WEATHER_SPEC]}
    assert sent(ask(tools=[WEATHER], tool_choice="auto"), LLAMA)["toolConfig"] == {"tools": [WEATHER_SPEC]}
    assert sent(ask(tools=[WEATHER], tool_choice="required"))["toolConfig"]["toolChoice"] == {"any": {}}
    named = {"type": "function", "function": {"name": "weather"}}
    assert sent(ask(tools=[WEATHER], tool_choice=named), NOVA)["toolConfig"]["toolChoice"] == {
        "tool": {"name": "weather"}
    }
    assert sent(ask(tools=[WEATHER], tool_choice="none")) == {"messages": SAID_HI}
    assert sent(ask(tool_choice="auto", parallel_tool_calls=False)) == {"messages": SAID_HI}
    bare = {"type": "function", "function": {"name": "f", "description": " "}}
    spec = {"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}}
    assert sent(ask(tools=[bare]))["toolConfig"]["tools"] == [spec]


def test_one_tool_at_a_time_is_said_in_claudes_words() -> None:
    """Beside `toolConfig.toolChoice` it is refused: "conflicts with the existing field"."""
    for choice, said in (
        (None, {"type": "auto"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "weather"}}, {"type": "tool", "name": "weather"}),
    ):
        body = sent(ask(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False))
        assert body["toolConfig"] == {"tools": [WEATHER_SPEC]}
        assert body["additionalModelRequestFields"] == {"tool_choice": {**said, "disable_parallel_tool_use": True}}
    assert dropped(ask(tools=[WEATHER], parallel_tool_calls=False), NOVA) == ("parallel_tool_calls",)


@pytest.mark.parametrize(
    ("model", "held"),
    [
        ("us.anthropic.claude-haiku-4-5-20251001-v1:0", True),
        ("global.anthropic.claude-sonnet-4-6", True),
        ("us.anthropic.claude-opus-4-6-v1", True),
        ("us.anthropic.claude-opus-4-7", False),
        ("us.anthropic.claude-opus-4-8", False),
        ("us.anthropic.claude-sonnet-4-20250514-v1:0", False),
        ("global.anthropic.claude-sonnet-5", False),
        ("global.anthropic.claude-opus-5", False),
        ("us.anthropic.claude-fable-5-1", False),
    ],
)
def test_which_claude_can_be_held_to_a_schema(model: str, held: bool) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert ("tools.strict" not in dropped(ask(tools=[strict]), at(model))) is held
    schema = {"type": "object", "properties": {"at": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert ("json_schema" not in at(model).provider.refused(model)) is held
    if held:
        assert sent(ask(response_format=form), at(model))["outputConfig"]
    else:
        assert refused(ask(response_format=form), at(model)) == "response_format"


def test_strict_tools() -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert sent(ask(tools=[strict]))["toolConfig"]["tools"][0]["toolSpec"]["strict"] is True
    assert "strict" not in sent(ask(tools=[strict]), NOVA)["toolConfig"]["tools"][0]["toolSpec"]
    assert dropped(ask(tools=[strict]), NOVA) == ("tools.strict",)
    strict["function"]["parameters"] = {"properties": {"at": {"type": "string", "minLength": 1}}}
    assert dropped(ask(tools=[strict])) == ("tools.parameters.minLength",)
    del strict["function"]["parameters"]
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert sent(ask(tools=[strict]))["toolConfig"]["tools"][0]["toolSpec"]["inputSchema"] == {"json": nothing}
    scores = {"type": "object", "additionalProperties": {"type": "number"}}
    strict["function"]["parameters"] = {"properties": {"scores": scores}}
    assert refused(ask(tools=[strict])) == "tools"
    with pytest.raises(UnsupportedParameter):
        DIALECT.request(ask(tools=[strict], strict=True), NOVA, None)


def call(call_id: str, arguments: str = '{"at": "Oslo"}', **more: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


CALLED: list[dict[str, Any]] = [
    *HI,
    {"role": "assistant", "content": None, "tool_calls": [call("c1"), call("c2", "")]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "sun"}]},
]


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"toolResult": {"toolUseId": call_id, "content": [{"text": text}]}}


def test_results_of_tools_are_one_turn_and_come_first() -> None:
    use = {"toolUseId": "c1", "name": "weather", "input": {"at": "Oslo"}}
    assert turns(*CALLED, {"role": "user", "content": "And?"}, tools=[WEATHER])[1:] == [
        {"role": "assistant", "content": [{"toolUse": use}, {"toolUse": {**use, "toolUseId": "c2", "input": {}}}]},
        {"role": "user", "content": [result("c1", "rain"), result("c2", "sun"), {"text": "And?"}]},
    ]
    picture = {"role": "tool", "tool_call_id": "c2", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}
    (*_, last) = turns(*CALLED[:3], picture, tools=[WEATHER])
    image = {"image": {"format": "png", "source": {"bytes": "iVBORw0KGgo="}}}
    assert last["content"][1]["toolResult"]["content"] == [image]
    silent = {"role": "tool", "tool_call_id": "c2", "content": ""}
    assert turns(*CALLED[:3], silent, tools=[WEATHER])[2]["content"][1]["toolResult"]["content"] == []


def test_a_history_with_calls_needs_tools() -> None:
    """ "The toolConfig field must be defined when using toolUse and toolResult content blocks." """
    named = {"toolSpec": {"name": "weather", "inputSchema": {"json": {"type": "object"}}}}
    none = {"tool_choice": {"type": "none"}}
    told = sent(ask(messages=CALLED))
    assert (told["toolConfig"], told["additionalModelRequestFields"]) == ({"tools": [named]}, none)
    told = sent(ask(messages=CALLED, tools=[WEATHER], tool_choice="none"))
    assert (told["toolConfig"], told["additionalModelRequestFields"]) == ({"tools": [WEATHER_SPEC]}, none)
    told = sent(ask(messages=CALLED), NOVA)
    assert (told["toolConfig"], "additionalModelRequestFields" in told) == ({"tools": [named]}, False)
    assert refused(ask(messages=CALLED, tools=[WEATHER], tool_choice="none"), NOVA) == "tool_choice"


@pytest.mark.parametrize(
    ("to", "call_id", "kept"),
    [
        (SONNET, "tooluse_K1lsjy-Ekuj5", True),
        (SONNET, "functions.weather:0", False),
        (SONNET, "c" * 65, False),
        (at("moonshotai.kimi-k2-thinking"), "functions.weather:0", True),
        (NOVA, "вызов", False),
        (MISTRAL, "D681PevKs", True),
        (MISTRAL, "call_123", False),
    ],
)
def test_foreign_call_ids(to: Deployment, call_id: str, kept: bool) -> None:
    said = {"role": "assistant", "tool_calls": [call(call_id)]}
    answered = {"role": "tool", "tool_call_id": call_id, "content": "rain"}
    _, made, results = turns(*HI, said, answered, to=to, tools=[WEATHER])
    use, used = made["content"][0]["toolUse"]["toolUseId"], results["content"][0]["toolResult"]["toolUseId"]
    assert use == used
    assert (use == call_id) is kept
    assert kept or re.fullmatch("[a-zA-Z0-9]{9}", use)


@pytest.mark.parametrize("arguments", ["{", "[]", "1", '"x"'])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    assert refused(ask(messages=[*HI, {"role": "assistant", "tool_calls": [call("c", arguments)]}])) == "messages"


def test_what_the_system_says_comes_first_wherever_it_stands() -> None:
    body = sent(
        ask(
            messages=[
                {"role": "system", "content": "A"},
                *HI,
                {"role": "developer", "content": [{"type": "text", "text": "B"}, {"type": "text", "text": ""}]},
                {"role": "user", "content": "there"},
            ]
        )
    )
    assert body["system"] == [{"text": "A"}, {"text": "B"}]
    assert body["messages"] == [{"role": "user", "content": [{"text": "Hi"}, {"text": "there"}]}]
    assert sent(ask(messages=[{"role": "system", "content": "A"}])) == {
        "messages": [{"role": "user", "content": [{"text": "A"}]}]
    }


def test_who_is_greeted_is_said_to_have_begun() -> None:
    """ "A conversation must start with a user message." """
    greeting = [{"role": "assistant", "content": "Hello!"}, *HI]
    begun = [{"role": "user", "content": [{"text": "."}]}, {"role": "assistant", "content": [{"text": "Hello!"}]}]
    for before in ([], [{"role": "system", "content": "A"}], [{"role": "user", "content": ""}]):
        call = ask(messages=[*before, *greeting])
        assert sent(call)["messages"] == [*begun, *SAID_HI]
        assert dropped(call) == ("messages.role",)
    assert refused(ask(messages=greeting, strict=True)) == "messages.role"
    assert dropped(ask(messages=[*HI, *greeting])) == ()


def test_empty_answers_in_the_history_are_left_out() -> None:
    for empty in ("", None, " \n", [{"type": "text", "text": ""}]):
        said = turns(
            *HI, {"role": "assistant", "content": empty, "refusal": None}, {"role": "user", "content": "Well?"}
        )
        assert said == [{"role": "user", "content": [{"text": "Hi"}, {"text": "Well?"}]}]
    assert turns(*HI, {"role": "assistant", "content": None, "refusal": "No."})[1]["content"] == [{"text": "No."}]
    assert turns(*HI, {"role": "assistant", "content": "Once \n"})[1]["content"] == [{"text": "Once"}]


def test_pictures_sound_and_documents() -> None:
    pdf = {
        "type": "file",
        "file": {"filename": "../Bilan_2024 (é).pdf", "file_data": "data:application/pdf;base64,JVBE"},
    }
    text = {"type": "file", "file": {"file_data": "data:text/plain;charset=utf-8;base64,SGk="}}
    parts = [
        {"type": "text", "text": "See"},
        {"type": "image_url", "image_url": {"url": IMAGE.replace("png", "JPG"), "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        pdf,
        pdf,
        text,
    ]
    (turn,) = turns({"role": "user", "content": parts})
    see, image, audio, *documents = turn["content"]
    assert see == {"text": "See"}
    assert image == {"image": {"format": "jpeg", "source": {"bytes": "iVBORw0KGgo="}}}
    assert audio == {"audio": {"format": "wav", "source": {"bytes": "UklGRg=="}}}
    assert [block["document"]["name"] for block in documents] == ["Bilan 2024 ( )", "Bilan 2024 ( ) 2", "document"]
    assert [block["document"]["format"] for block in documents] == ["pdf", "pdf", "txt"]
    assert documents[0]["document"]["source"] == {"bytes": "JVBE"}


def test_documents_that_nobody_says_a_word_about_are_named() -> None:
    """ "A text block must be included when using documents." """
    data = "data:application/pdf;base64,JVBE"
    one, two = ({"type": "file", "file": {"file_data": data, "filename": each}} for each in ("a.pdf", "b.pdf"))
    (turn,) = turns({"role": "user", "content": [one, two]})
    assert [list(block) for block in turn["content"]] == [["text"], ["document"], ["document"]]
    assert turn["content"][0] == {"text": "a, b"}
    (*_, after) = turns(*CALLED, {"role": "user", "content": [one]}, tools=[WEATHER])
    assert [list(block) for block in after["content"]] == [["toolResult"], ["toolResult"], ["text"], ["document"]]
    (merged,) = turns({"role": "user", "content": [one, {"type": "text", "text": " "}]}, *HI)
    assert [list(block) for block in merged["content"]] == [["document"], ["text"]], "a word in the turn is enough"
    first, second = (turns({"role": "user", "content": [one]}, *more)[0] for more in ([], [CALLED[1], *CALLED[2:]]))
    assert first == second, "in every turn that follows, too"


POINT = {"cachePoint": {"type": "default"}}
HOUR = {"cachePoint": {"type": "default", "ttl": "1h"}}
CACHED = {"cache_control": {"type": "ephemeral"}}


def test_cache_control_becomes_a_cache_point() -> None:
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "A", **hour}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi", **CACHED}, {"type": "text", "text": "", **CACHED}]},
        {"role": "assistant", "content": "Ho", "tool_calls": [call("c1")], **CACHED},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain", **CACHED}]},
    ]
    asked = ask(messages=messages, tools=[{**WEATHER, **CACHED}])
    body = sent(asked)
    assert body["system"] == [{"text": "A"}, HOUR]
    assert body["toolConfig"]["tools"] == [WEATHER_SPEC, POINT]
    assert [turn["content"][-1] for turn in body["messages"]] == [POINT, POINT, POINT]
    assert [len(turn["content"]) for turn in body["messages"]] == [2, 3, 2]
    assert dropped(asked) == ()
    nova = sent(asked, NOVA)
    assert nova["system"] == [{"text": "A"}, POINT], "an hour is Claude's only"
    assert nova["toolConfig"]["tools"] == [WEATHER_SPEC], '"extraneous key [cachePoint] is not permitted"'
    assert "cachePoint" not in json.dumps(sent(asked, LLAMA))
    assert dropped(asked, LLAMA) == ()


# How much to think


def test_claude_thinks_by_a_budget_or_as_it_likes() -> None:
    body = sent(ask(reasoning_effort="high", max_tokens=10_000, temperature=0.5))
    assert body["additionalModelRequestFields"] == {"thinking": {"type": "enabled", "budget_tokens": 8000}}
    assert body["inferenceConfig"] == {"maxTokens": 10_000}
    assert dropped(ask(reasoning_effort="high", temperature=0.5)) == ("temperature",)
    unbounded = sent(ask(reasoning={"max_tokens": 2000}))
    assert unbounded["additionalModelRequestFields"]["thinking"]["budget_tokens"] == 2000
    assert unbounded["inferenceConfig"]["maxTokens"] > 2000
    adaptive = sent(ask(reasoning_effort="xhigh"), OPUS)
    assert adaptive["additionalModelRequestFields"] == {"thinking": {"type": "adaptive", "display": "summarized"}}
    assert adaptive["outputConfig"] == {"effort": "high"}
    assert "inferenceConfig" not in adaptive
    off = sent(ask(reasoning_effort="none"), at("us.anthropic.claude-opus-5"))
    assert off["additionalModelRequestFields"] == {"thinking": {"type": "disabled"}}


def test_a_budget_that_cannot_be_is_told() -> None:
    """ "Thinking may not be enabled when tool_choice forces tool use"; nor without the thoughts of this very turn."""
    assert dropped(ask(reasoning_effort="low", tools=[WEATHER], tool_choice="required")) == ("reasoning_effort",)
    one = ask(reasoning_effort="low", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    assert dropped(one) == ("reasoning_effort",)
    assert dropped(ask(reasoning_effort="low", messages=CALLED, tools=[WEATHER])) == ("reasoning_effort",)
    assert dropped(ask(reasoning_effort="low", max_tokens=500)) == ("reasoning_effort",)
    assert dropped(ask(reasoning_effort="low"), at("anthropic.claude-3-haiku-20240307-v1:0")) == ("reasoning_effort",)


@pytest.mark.parametrize(
    ("to", "effort", "fields"),
    [
        (GPT, "minimal", {"reasoning": {"effort": "low"}}),
        (GPT, "max", {"reasoning": {"effort": "max"}}),
        (GPT, "none", {"reasoning": {"effort": "none"}}),
        (GPT_OSS, "max", {"reasoning_effort": "high"}),
        (NOVA_2, "medium", {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "medium"}}),
        (NOVA_2, "none", None),
        (QWEN, "high", {"reasoning_config": "high"}),
    ],
)
def test_others_have_words_of_their_own(to: Deployment, effort: str, fields: Any) -> None:
    asked = ask(reasoning_effort=effort)
    assert sent(asked, to).get("additionalModelRequestFields") == fields
    assert dropped(asked, to) == ()


def test_nova_thinks_hard_only_without_a_bound() -> None:
    hard = ask(reasoning_effort="high", temperature=0.5)
    told = sent(hard, NOVA_2)
    assert told == {
        "messages": SAID_HI,
        "additionalModelRequestFields": {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "high"}},
    }
    assert dropped(hard, NOVA_2) == ("temperature",)
    bound = requested(hard, NOVA_2, 500)
    assert (
        json.loads(bound.content)["additionalModelRequestFields"]["reasoningConfig"]["maxReasoningEffort"] == "medium"
    )
    assert json.loads(bound.content)["inferenceConfig"] == {"maxTokens": 500, "temperature": 0.5}
    assert bound.dropped == ("reasoning_effort",)


@pytest.mark.parametrize("to", [NOVA, LLAMA, DEEPSEEK, MISTRAL])
def test_who_does_not_take_effort_is_not_sent_it(to: Deployment) -> None:
    assert dropped(ask(reasoning_effort="low"), to) == ("reasoning_effort",)
    assert sent(ask(reasoning_effort="low"), to) == {"messages": SAID_HI}
    assert dropped(ask(reasoning={"max_tokens": 2000}), GPT_OSS) == ("reasoning",)


THOUGHT = {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "c2ln"}}}
HIDDEN = {"reasoningContent": {"redactedContent": "cnNu"}}
UNSIGNED = {"reasoningContent": {"reasoningText": {"text": "Hm."}}}


def thinking(model: str, *blocks: Any, key: str = "bedrock") -> dict[str, Any]:
    kept = {key: {"model": model, "thinking": list(blocks)}}
    return {"role": "assistant", "tool_calls": [call("c1")], "reasoning_content": "Hm.", "extra_content": kept}


def test_thoughts_go_back_to_whom_thought_them() -> None:
    asked: dict[str, Any] = {"tools": [WEATHER], "reasoning_effort": "low"}
    answer = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    own = turns(*HI, thinking(SONNET.model, THOUGHT, HIDDEN, UNSIGNED, 7), answer, **asked)
    assert own[1]["content"][:2] == [THOUGHT, HIDDEN]
    assert list(own[1]["content"][2]) == ["toolUse"]
    for foreign in (
        thinking(OPUS.model, THOUGHT),
        thinking(SONNET.model, THOUGHT, key="anthropic"),
        thinking(SONNET.model, UNSIGNED),
        {**thinking(SONNET.model), "extra_content": "x"},
    ):
        assert "reasoningContent" not in json.dumps(turns(*HI, foreign, answer, **asked))
    quiet = turns(*HI, thinking(SONNET.model, THOUGHT), answer, tools=[WEATHER])
    assert "reasoningContent" not in json.dumps(quiet), "where it does not think, it is not reminded"


def test_a_loop_of_tools_goes_on_thinking_where_its_start_was_thought_over() -> None:
    def answer(call_id: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": call_id, "content": "rain"}

    later = [{"role": "assistant", "tool_calls": [call("c2")]}, answer("c2")]
    own = ask(messages=[*HI, thinking(SONNET.model, THOUGHT), answer("c1"), *later], reasoning_effort="low")
    assert dropped(own) == ()
    assert sent(own)["messages"][1]["content"][0] == THOUGHT
    foreign = [*HI, thinking(OPUS.model, THOUGHT), answer("c1"), *later]
    assert dropped(ask(messages=foreign, reasoning_effort="low")) == ("reasoning_effort",)


def test_encrypted_thoughts_of_gpt_go_back() -> None:
    answer = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    own = turns(*HI, thinking(GPT.model, HIDDEN), answer, to=GPT, tools=[WEATHER])
    assert own[1]["content"][0] == HIDDEN


# Other surfaces


def test_a_completion_is_a_chat_of_one_message() -> None:
    legacy = Call("completions", {"model": "asked", "prompt": "Hi", "max_tokens": 7, "logprobs": 1})
    outgoing = requested(legacy)
    assert json.loads(outgoing.content) == {"messages": SAID_HI, "inferenceConfig": {"maxTokens": 7}}
    assert outgoing.dropped == ("logprobs",)
    body, usage = DIALECT.completion(legacy, SONNET, whole([{"text": "Ho"}]))
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("Ho", "stop")
    assert usage == Usage(input=5, output=3)


def test_it_makes_no_embeddings() -> None:
    assert refused(Call("embeddings", {"model": "asked", "input": "x"})) == "model"


# What is answered


def whole(content: list[Any], stop: str = "end_turn", **usage: Any) -> dict[str, Any]:
    counts = {"inputTokens": 5, "outputTokens": 3, "totalTokens": 8, **usage}
    return {"output": {"message": {"role": "assistant", "content": content}}, "stopReason": stop, "usage": counts}


def answered(body: Any, to: Deployment = SONNET, **asked: Any) -> dict[str, Any]:
    return DIALECT.completion(ask(**asked), to, body).body["choices"][0]


def use(call_id: str = "c1", **more: Any) -> dict[str, Any]:
    return {"toolUse": {"toolUseId": call_id, "name": "weather", "input": {}, **more}}


def test_a_whole_answer() -> None:
    blocks = [THOUGHT, HIDDEN, {"text": "So "}, use(), {"text": "it is."}, use("c2", input={"at": 1.0})]
    choice = answered(whole(blocks, "tool_use"))
    assert choice["finish_reason"] == "tool_calls"
    assert choice["native_finish_reason"] == "tool_use"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("So it is.", "Hm.")
    assert [each["function"]["arguments"] for each in message["tool_calls"]] == ["{}", '{"at":1.0}']
    assert message["extra_content"] == {"bedrock": {"model": SONNET.model, "thinking": [THOUGHT, HIDDEN]}}
    assert answered(whole([use()]))["message"]["content"] is None
    assert answered(whole([{"text": ""}]))["message"] == {"role": "assistant", "content": ""}
    assert "extra_content" not in answered(whole([UNSIGNED]))["message"]
    assert "reasoning_content" not in answered(whole([THOUGHT]), reasoning={"exclude": True})["message"]


def test_what_was_thought_in_between_goes_back_to_its_place() -> None:
    """ "`thinking` blocks in the latest assistant message cannot be modified": their order counts, too."""
    one, two = ({"reasoningContent": {"reasoningText": {"text": each, "signature": "c2ln"}}} for each in ("1", "2"))
    cited = {"citationsContent": {"content": [{"text": "I look."}]}}
    blocks = [cited, one, use(), two, HIDDEN, {"text": "More."}, use("c2")]
    said = answered(whole([UNSIGNED, *blocks], "tool_use"), OPUS)["message"]
    results = [{"role": "tool", "tool_call_id": each, "content": "rain"} for each in ("c1", "c2")]
    history = turns(*HI, said, *results, to=OPUS, tools=[WEATHER], reasoning_effort="low")
    assert history[1]["content"] == [{"text": "I look."}, *blocks[1:]]
    changed = turns(*HI, {**said, "content": "Hm."}, *results, to=OPUS, tools=[WEATHER], reasoning_effort="low")
    assert changed[1]["content"] == [one, two, HIDDEN, {"text": "Hm."}, use(), use("c2")]
    frames = [
        delta(0, text="I look."), stop(0),
        delta(1, reasoningContent={"text": "1"}), delta(1, reasoningContent={"signature": "c2ln"}), stop(1),
        start(2, toolUse=use()["toolUse"]), stop(2),
        delta(3, reasoningContent={"text": "2"}), delta(3, reasoningContent={"signature": "c2ln"}), stop(3),
        delta(4, reasoningContent=HIDDEN["reasoningContent"]), stop(4),
        delta(5, text="More."), stop(5),
        start(6, toolUse=use("c2")["toolUse"]), stop(6),
    ]  # fmt: skip
    streamed = [piece.body for piece in translated(*frames, TOOL_USE, USAGE, to=OPUS)]
    (kept,) = (c["delta"] for body in streamed for c in body.get("choices", ()) if "extra_content" in c["delta"])
    assert kept == {"extra_content": said["extra_content"]}


def test_what_bedrocks_own_tools_did_is_not_the_callers() -> None:
    own = use("s1", name="nova_code_interpreter", type="server_tool_use")
    ran = {"toolResult": {"toolUseId": "s1", "content": [{"json": {"stdOut": "7"}}]}}
    cited = {"citationsContent": {"content": [{"text": "B"}], "citations": [{"title": "facts"}]}}
    message = answered(whole([own, ran, {"text": "A"}, cited, {"text": "C"}, use("c1", type="tool_use")]))["message"]
    assert ([each["id"] for each in message["tool_calls"]], message["content"]) == (["c1"], "ABC")


@pytest.mark.parametrize(
    ("word", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
    ],
)
def test_finish_reasons(word: str, finish: str) -> None:
    choice = answered(whole([{"text": "x"}], word))
    assert (choice["finish_reason"], choice["native_finish_reason"]) == (finish, word)


@pytest.mark.parametrize("word", ["malformed_model_output", "malformed_tool_use"])
def test_an_answer_that_broke_off_is_none(word: str) -> None:
    with pytest.raises(ProviderError) as caught:
        answered(whole([{"text": "x"}], word))
    assert caught.value.fault == "server"
    with pytest.raises(ProviderError):
        translated(event("messageStop", stopReason=word))


def test_five_kinds_of_token() -> None:
    counts = {"cacheReadInputTokens": 7, "cacheWriteInputTokens": 9}
    details = {"cacheDetails": [{"ttl": "1h", "inputTokens": 4}, {"ttl": "5m", "inputTokens": 5}]}
    assert DIALECT.completion(ask(), SONNET, whole([], **counts, **details)).usage == Usage(
        input=5, cache_read=7, cache_write=5, cache_write_1h=4, output=3
    )
    assert DIALECT.completion(ask(), SONNET, whole([], **counts)).usage == Usage(
        input=5, cache_read=7, cache_write=9, output=3
    )
    without = whole([{"text": ""}])
    del without["usage"]
    assert DIALECT.completion(ask(), SONNET, without).usage is None


# Streams


def translated(*frames: bytes, to: Deployment = SONNET, **asked: Any) -> list[Piece]:
    decoder, translate = DIALECT.decoder(), DIALECT.stream(ask(stream=True, **asked), to)
    return [
        piece for frame in frames for name, data in decoder.feed(frame) for piece in translate(name, json.loads(data))
    ]


def delta(index: int, **said: Any) -> bytes:
    return event("contentBlockDelta", contentBlockIndex=index, delta=said)


def stop(index: int) -> bytes:
    return event("contentBlockStop", contentBlockIndex=index)


def start(index: int, **said: Any) -> bytes:
    return event("contentBlockStart", contentBlockIndex=index, start=said)


USAGE = event("metadata", usage={"inputTokens": 5, "outputTokens": 3, "totalTokens": 8}, metrics={"latencyMs": 1})
END_TURN = event("messageStop", stopReason="end_turn")
TOOL_USE = event("messageStop", stopReason="tool_use")
STREAM = (
    event("messageStart", role="assistant"),
    delta(0, reasoningContent={"text": "H"}),
    delta(0, reasoningContent={"text": "m."}),
    delta(0, reasoningContent={"signature": "c2ln"}),
    stop(0),
    delta(1, reasoningContent={"redactedContent": "cn=="}),
    delta(1, reasoningContent={"redactedContent": "c24="}),
    stop(1),
    delta(2, text="So "),
    delta(2, text=""),
    delta(2, text="it is."),
    stop(2),
    start(3, toolUse={"toolUseId": "c1", "name": "weather"}),
    delta(3, toolUse={"input": ""}),
    stop(3),
    start(4, toolUse={"toolUseId": "s1", "name": "nova_grounding", "type": "server_tool_use"}),
    delta(4, toolUse={"input": "{}"}),
    stop(4),
    start(5, toolResult={"toolUseId": "s1", "status": "success"}),
    delta(5, toolResult=[{"json": {}}]),
    stop(5),
    start(6, toolUse={"toolUseId": "c2", "name": "weather"}),
    delta(6, toolUse={"input": '{"at":'}),
    delta(6, toolUse={"input": "1.0}"}),
    stop(6),
    event("somethingNew", x=1),
    TOOL_USE,
    USAGE,
)


def test_a_stream_adds_up_to_the_whole_answer() -> None:
    pieces = translated(*STREAM)
    assert pieces.pop() is END
    assert [piece.usage for piece in pieces if piece.usage] == [Usage(input=5, output=3)]
    assert [index for piece in pieces for index in [c["index"] for c in piece.body["choices"]]] == [0] * (
        len(pieces) - 1
    )
    kept = [p for p in pieces if any("extra_content" in c.get("delta", {}) for c in p.body["choices"])]
    assert len(kept) == 1, "clients would join what came twice"
    made = assembled(piece.body for piece in pieces)["choices"][0]
    hidden = {"reasoningContent": {"redactedContent": base64.b64encode(b"rsn").decode()}}
    blocks = [THOUGHT, hidden, {"text": "So it is."}, use(), use("c2", input={"at": 1.0})]
    wanted = answered(whole(blocks, "tool_use"))
    assert made["message"].pop("refusal") is None
    assert made == wanted
    first = next(c for p in pieces for c in p.body["choices"][0]["delta"].get("tool_calls", []))
    assert first == {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    silent = assembled(piece.body for piece in translated(*STREAM, reasoning={"exclude": True})[:-1])["choices"][0]
    assert "reasoning_content" not in silent["message"]
    assert silent["message"]["extra_content"] == wanted["message"]["extra_content"]


def test_the_end_is_when_all_was_said() -> None:
    assert END not in translated(delta(0, text="x"), END_TURN)
    assert END not in translated(delta(0, text="x"), USAGE)
    assert translated(USAGE, END_TURN)[-1] is END, "in whichever order"


def test_frames_cut_anywhere_are_the_same_events() -> None:
    raw = b"".join(STREAM)
    wanted = [(name, data) for name, data in DIALECT.decoder().feed(raw)]
    assert [name for name, _ in wanted][:2] == ["messageStart", "contentBlockDelta"]
    for size in (1, 7, 61, 200):
        decoder = DIALECT.decoder()
        assert [each for i in range(0, len(raw), size) for each in decoder.feed(raw[i : i + size])] == wanted


def test_a_garbled_frame_is_no_answer() -> None:
    good = delta(0, text="x")
    for place in (0, 5, 9, 20, len(good) - 20, len(good) - 1):
        garbled = bytearray(good)
        garbled[place] ^= 0x40
        with pytest.raises((ProviderError, TooLong)) as caught:
            translated(good, bytes(garbled), *[bytes(1 << 20)] * 20)
        if isinstance(caught.value, ProviderError):
            assert (caught.value.fault, caught.value.ambiguous) == ("protocol", True)


def test_a_frame_without_end_is_too_long() -> None:
    decoder = DIALECT.decoder()
    assert not decoder.feed(frame({":event-type": "x"}, bytes(MAX_EVENT + 100))[:100])
    with pytest.raises(TooLong):
        decoder.feed(bytes(MAX_EVENT))
    fresh = DIALECT.decoder()
    for _ in range(40):
        assert len(fresh.feed(delta(0, text="x" * (1 << 19)))) == 1, "what was read does not count for what comes"


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (exception("throttlingException", message="Too many tokens, please wait before trying again."), "rate_limit"),
        (exception("validationException", message="Input is too long for requested model."), "context"),
        (exception("validationException", message="Malformed input request"), "bad_request"),
        (exception("serviceUnavailableException", message="Bedrock is unable"), "overloaded"),
        (exception("internalServerException", message="The system encountered an error"), "server"),
        (exception("modelStreamErrorException", message="x", originalMessage="y", originalStatusCode=500), "server"),
        (frame({":message-type": "exception", ":exception-type": "internalServerException"}, b"no JSON"), "server"),
        (frame({":message-type": "exception", ":exception-type": "internalServerException"}, b"[]"), "server"),
        (frame({":message-type": "error", ":error-code": "InternalError", ":error-message": "An error"}), "server"),
        (frame({":message-type": "error"}), "server"),
    ],
)
def test_an_exception_inside_a_stream(raw: bytes, fault: str) -> None:
    with pytest.raises(ProviderError) as caught:
        translated(delta(0, text="x"), raw)
    assert caught.value.fault == fault
    assert caught.value.message


# Refusals


def failed(status: int, kind: str, message: str) -> ProviderError:
    headers = {"x-amzn-errortype": f"{kind}:http://internal.amazon.com/coral/com.amazon.bedrock/"} if kind else {}
    return DIALECT.failure(status, headers, json.dumps({"message": message}).encode())


@pytest.mark.parametrize(
    ("status", "kind", "message", "fault"),
    [
        (429, "ThrottlingException", "Too many tokens, please wait before trying again.", "rate_limit"),
        (429, "ThrottlingException", "Too many tokens per day, please wait before trying again.", "rate_limit"),
        (400, "ServiceQuotaExceededException", "Quota exceeded", "rate_limit"),
        (429, "ModelNotReadyException", "The model is not ready", "overloaded"),
        (503, "ServiceUnavailableException", "Too many connections", "overloaded"),
        (408, "ModelTimeoutException", "took too long", "not_now"),
        (424, "ModelErrorException", "The model failed", "server"),
        (500, "InternalServerException", "x", "server"),
        (403, "AccessDeniedException", "User: x is not authorized to perform: bedrock:InvokeModel", "auth"),
        (403, "AccessDeniedException", "You don't have access to the model with the specified model ID.", "model_gone"),
        (403, "UnrecognizedClientException", "The security token included in the request is invalid.", "auth"),
        (403, "ExpiredTokenException", "The security token included in the request is expired", "auth"),
        (404, "ResourceNotFoundException", "This model version has reached the end of its life.", "model_gone"),
        (400, "ValidationException", "The provided model identifier is invalid.", "model_gone"),
        (
            400,
            "ValidationException",
            "Invocation of model ID x with on-demand throughput isn\u2019t supported.",
            "model_gone",
        ),
        (400, "ValidationException", "Input is too long for requested model.", "context"),
        (400, "ValidationException", "input length and `max_tokens` exceed context limit: 1 + 2 > 2", "context"),
        (400, "ValidationException", "Malformed input request: x", "bad_request"),
        (400, "", "prompt is too long: 210000 tokens > 200000 maximum", "context"),
    ],
)
def test_what_a_refusal_means(status: int, kind: str, message: str, fault: str) -> None:
    refusal = failed(status, kind, message)
    assert (refusal.fault, refusal.status) == (fault, status)


def test_a_refusal_names_nobodys_account() -> None:
    arn = "arn:aws:sts::123456789012:assumed-role/lightrail/x"
    said = failed(400, "ValidationException", f"{arn} may not, key AKIAIOSFODNN7EXAMPLE").message
    assert not re.search(r"\d{12}|AKIA|arn:", said)


WORDS = ["output", "message", "content", "text", "toolUse", "input", "name", "toolUseId", "type", "reasoningContent"]
WORDS += ["reasoningText", "signature", "redactedContent", "stopReason", "usage", "inputTokens", "outputTokens"]
WORDS += ["cacheDetails", "delta", "start", "contentBlockIndex", "citationsContent"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(WORDS),
                inner,
                max_size=4,
            )
        ),
        max_leaves=20,
    ),
    st.sampled_from(["messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop"]),
)
@settings(max_examples=300, deadline=None)
def test_what_makes_no_sense_is_never_a_crash(body: Any, name: str) -> None:
    body = body if isinstance(body, dict) else {"output": body}
    translate = DIALECT.stream(ask(stream=True), SONNET)
    for read in (
        lambda: DIALECT.completion(ask(), SONNET, json.loads(json.dumps(body))),
        lambda: translate(name, json.loads(json.dumps(body))),
        lambda: translate("metadata", json.loads(json.dumps(body))),
    ):
        try:
            read()
        except ProviderError as wrong:
            assert wrong.fault in ("protocol", "server")
