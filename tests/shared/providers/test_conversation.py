"""A history that any providers may have made, as the next one takes it."""

from __future__ import annotations

import re

import pytest

from shared.catalog import Deployment
from shared.config import Provider
from shared.errors import UnsupportedParameter
from shared.providers.conversation import CallIds, function_of, in_turns

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
