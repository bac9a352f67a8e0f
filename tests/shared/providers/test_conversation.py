"""A history that any providers may have made, as the next one takes it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from shared.catalog import Catalog, Deployment
from shared.config import Provider
from shared.errors import UnsupportedParameter
from shared.prices import PriceTable
from shared.providers.conversation import CallIds, function_of, in_turns
from shared.providers.dialect import Outgoing
from shared.schema import Call
from shared.settings import Settings
from shared.upstream import dialect_of

TO = Deployment(Provider(name="p", base_url="https://p.example"), "m")
FORM = "[A-Za-z0-9]{9}"


def test_ids_of_the_form_stay_and_others_become_one_of_it() -> None:
    ids = CallIds(FORM)
    assert ids.of_call("aB3dE6gH9") == ids.of_result("aB3dE6gH9") == "aB3dE6gH9"
    for call_id in ("", "call_1", "ünï", "\ud800", "a" * 300):
        made = ids.of_call(call_id)
        assert re.fullmatch(FORM, made)
        assert ids.of_result(call_id) == made


def test_calls_of_one_id_are_told_apart_in_a_turn_and_between_turns() -> None:
    ids = CallIds(".+")
    first, second = ids.of_call("search:0"), ids.of_call("search:0")
    assert [ids.of_result("search:0"), ids.of_result("search:0")] == [first, second]
    third = ids.of_call("search:0")
    assert ids.of_result("search:0") == third
    assert first == "search:0"
    assert len({first, second, third}) == 3


def test_the_same_history_is_told_the_same_way_each_time() -> None:
    """Else what the provider keeps of a prompt would be lost."""
    once, again = CallIds(FORM), CallIds(FORM)
    given = ["a", "a", "b"]
    assert [once.of_call(call_id) for call_id in given] == [again.of_call(call_id) for call_id in given]


def test_turns() -> None:
    said = [
        ("system", [1]),
        ("user", [2]),
        ("user", [3]),
        ("model", []),
        ("user", [4]),
        ("system", [5]),
        ("model", [6]),
    ]
    system, turns = in_turns([(role, [{"n": n} for n in blocks]) for role, blocks in said], TO, "parts")
    assert [block["n"] for block in system] == [1, 5]
    assert [(turn["role"], [part["n"] for part in turn["parts"]]) for turn in turns] == [
        ("user", [2, 3, 4]),
        ("model", [6]),
    ]
    assert in_turns([("system", [{"n": 1}])], TO) == ([], [{"role": "user", "content": [{"n": 1}]}])
    with pytest.raises(UnsupportedParameter, match="something to be said"):
        in_turns([("user", [])], TO)


def test_the_function_of_a_call() -> None:
    assert function_of({"function": {"name": "f", "arguments": ' {"b": 1.0} '}}, TO) == ("f", '{"b": 1.0}', {"b": 1.0})
    assert function_of({"function": {"name": "f", "arguments": " "}}, TO) == ("f", "{}", {})
    for arguments in ("[1]", '{"a":', "1", '{"a":' * 100 + "1" + "}" * 100):
        with pytest.raises(UnsupportedParameter, match="not a JSON object"):
            function_of({"function": {"name": "f", "arguments": arguments}}, TO)
    with pytest.raises(UnsupportedParameter, match="functions"):
        function_of({"type": "custom", "custom": {"name": "x"}}, TO)


KEYS = {f"{name}_API_KEY": "k" * 20 for name in ("ANTHROPIC", "BEDROCK", "COHERE", "GEMINI")}
CATALOG = Catalog.load(
    Settings.read({**KEYS, "AWS_REGION": "eu-central-1", "GATEWAY_CONFIG": "none"}), PriceTable.vendored()
)
MODELS = (
    "anthropic/claude-sonnet-4-5",
    "bedrock/us.amazon.nova-lite-v1:0",
    "cohere/command-a-vision-07-2025",
    "gemini/gemini-2.5-flash",
)
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def requested(model: str, *messages: dict[str, Any], **asked: Any) -> Outgoing:
    (to,) = CATALOG.resolve(model).deployments
    return dialect_of(to).request(Call("chat", {"model": model, "messages": list(messages), **asked}), to, None)


def picture(detail: str | None) -> dict[str, Any]:
    image = {"url": "data:image/png;base64,AAAA", "detail": detail}
    return {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": image}]}


@pytest.mark.parametrize("model", MODELS)
def test_who_of_several_said_it_is_told_as_lost(model: str) -> None:
    for role in ("system", "user", "assistant"):
        assert requested(model, *HI, {"role": role, "name": "Ada", "content": "x"}, *HI).dropped == ("messages.name",)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "a", "name": "f", "content": "x"}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    assert requested(model, *HI, called, result).dropped == (), "which its call says"
    with pytest.raises(UnsupportedParameter, match=r"messages\.name"):
        requested(model, {**HI[0], "name": "Ada"}, strict=True)


@pytest.mark.parametrize("model", MODELS)
def test_a_detail_that_asks_for_more_is_told_as_lost(model: str) -> None:
    for detail in (None, "auto", "low"):
        assert requested(model, picture(detail)).dropped == ()
    lost = () if model.startswith("cohere/") else ("messages.image_url.detail",)
    for detail in ("high", "original"):
        outgoing = requested(model, picture(detail))
        assert outgoing.dropped == lost
        assert lost or f'"detail":"{detail}"'.encode() in outgoing.content


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_that_was_only_spoken_is_refused(model: str) -> None:
    spoken = {"role": "assistant", "content": None, "audio": {"id": "audio_1"}}
    with pytest.raises(UnsupportedParameter) as refused:
        requested(model, *HI, spoken, *HI)
    assert refused.value.param == "messages"
    assert requested(model, *HI, {**spoken, "content": "Ho"}, *HI).dropped == ("messages.audio",)
    assert requested(model, *HI, {**spoken, "content": "Ho", "audio": None}, *HI).dropped == ()
