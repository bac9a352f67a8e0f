"""The matrix of what each provider takes is what its code does, and the one in the documents is not stale."""

from __future__ import annotations

import json

import pytest

from shared.capabilities import MATRIX, PROBES, Capabilities, capabilities, shipped, table
from shared.catalog import Catalog
from shared.config import Provider
from shared.prices import PriceTable
from shared.schema import parse


def of(**row: object) -> Capabilities:
    lab = Provider.model_validate({"name": "lab", "requires": (), **row})
    return capabilities(Catalog([lab], PriceTable.vendored()))[0]


def test_the_table_in_the_documents_is_not_stale() -> None:
    assert MATRIX.read_text("utf-8") == table(capabilities(shipped())), "run: make matrix"


def test_what_a_row_says_shows() -> None:
    lab = of(base_url="https://lab.example/v1", drops=("seed",), refuses=("n", "json_schema"), embeddings=("e-*",))
    assert lab.on
    outcomes = {name: lab.parameters[name] for name in ("temperature", "seed", "n", "response_format: json_object")}
    assert outcomes == {
        "temperature": "passed", "seed": "dropped", "n": "refused", "response_format: json_object": "passed",
    }  # fmt: skip
    assert lab.parameters["response_format: json_schema"] == "refused"
    assert (lab.parameters["prompt"], lab.parameters["echo"]) == ("passed", "refused")
    assert lab.models == {"chat": "model", "reasoning": "model", "completions": "model", "embeddings": "e-*"}
    assert lab.parameters["dimensions"] == "passed"


def test_a_model_is_found_for_each_kind() -> None:
    models = {each.provider.name: each.models for each in capabilities(shipped())}
    assert models["openai"]["chat"] == "gpt-4o-mini"
    assert "embed" in models["openai"]["embeddings"]
    assert models["cohere"]["reasoning"].startswith("command-a-reasoning")


def test_a_provider_that_is_off_is_told_of_too() -> None:
    lab = of(requires=("base_url",))
    assert not lab.on
    assert lab.parameters["temperature"] == "passed"


def test_all_is_told_of_all() -> None:
    names = [name for probes in PROBES.values() for name in probes]
    assert len(names) == len(set(names))
    for each in capabilities(shipped()):
        assert list(each.parameters) == names, each.provider.name
        assert each.parameters["max_tokens"] == each.parameters["stream"] == "passed"


@pytest.mark.parametrize("name", PROBES["chat"])
def test_a_probe_is_what_a_caller_could_send(name: str) -> None:
    parse(
        "chat",
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **PROBES["chat"][name]}).encode(),
    )
