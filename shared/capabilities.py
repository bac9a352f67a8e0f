"""Which parameter each provider takes: asked of the code that builds its requests, so that the two cannot disagree.

`python -m shared.capabilities` writes the same as a table for people, shared/providers/MATRIX.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from shared import config
from shared.catalog import Catalog, Deployment
from shared.config import Provider
from shared.errors import UnsupportedParameter
from shared.prices import PriceTable
from shared.schema import JSON, Call
from shared.upstream import dialect_of

Outcome: TypeAlias = Literal["passed", "dropped", "refused"]
"""Sent in the provider's own words; left out and told; a 400 `unsupported_parameter`."""
Kind: TypeAlias = Literal["chat", "reasoning", "completions", "embeddings"]
"""Of the model that is probed: one that thinks takes other parameters."""

HI: list[JSON] = [{"role": "user", "content": "Hi"}]
SURFACES: Mapping[Kind, tuple[Literal["chat", "completions", "embeddings"], JSON]] = {
    "chat": ("chat", {"messages": HI}),
    "reasoning": ("chat", {"messages": HI}),
    "completions": ("completions", {"prompt": "Hi"}),
    "embeddings": ("embeddings", {"input": "Hi"}),
}
SCHEMA: JSON = {
    "type": "object",
    "properties": {"at": {"type": "string"}},
    "required": ["at"],
    "additionalProperties": False,
}
FUNCTION: JSON = {"name": "look", "description": "Look there", "parameters": SCHEMA}
TOOLS: JSON = {"tools": [{"type": "function", "function": FUNCTION}]}
NAMED: JSON = {"type": "function", "function": {"name": "look"}}
PNG = "data:image/png;base64,iVBORw0KGgo="
PDF = "data:application/pdf;base64,JVBERi0="


def _part(kind: str, **said: Any) -> JSON:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": kind, kind: said}]}]}


PROBES: Mapping[Kind, Mapping[str, JSON]] = {
    "chat": {
        "temperature": {"temperature": 0.5},
        "top_p": {"top_p": 0.5},
        "max_tokens": {"max_tokens": 16},
        "max_completion_tokens": {"max_completion_tokens": 16},
        "stop": {"stop": ["END"]},
        "seed": {"seed": 1},
        "n": {"n": 2},
        "presence_penalty": {"presence_penalty": 0.5},
        "frequency_penalty": {"frequency_penalty": 0.5},
        "logit_bias": {"logit_bias": {"50256": -100}},
        "logprobs": {"logprobs": True},
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
        "stream": {"stream": True},
        "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
        "tools": TOOLS,
        "tools, strict": {"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]},
        "tool_choice: none": {**TOOLS, "tool_choice": "none"},
        "tool_choice: required": {**TOOLS, "tool_choice": "required"},
        "tool_choice: named": {**TOOLS, "tool_choice": NAMED},
        "parallel_tool_calls: false": {**TOOLS, "parallel_tool_calls": False},
        "functions (deprecated)": {"functions": [FUNCTION]},
        "response_format: json_object": {"response_format": {"type": "json_object"}},
        "response_format: json_schema": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
        },
        "image_url: data URI": _part("image_url", url=PNG),
        "image_url: URL": _part("image_url", url="https://example.com/a.png"),
        "input_audio": _part("input_audio", data="UklGRg==", format="wav"),
        "file: PDF": _part("file", file_data=PDF, filename="a.pdf"),
        "file: id": _part("file", file_id="file-1"),
        "modalities, audio": {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        "developer message": {"messages": [{"role": "developer", "content": "Be brief."}, *HI]},
        "prediction": {"prediction": {"type": "content", "content": "Hi"}},
        "verbosity": {"verbosity": "low"},
        "service_tier": {"service_tier": "auto"},
        "prompt_cache_key": {"prompt_cache_key": "a"},
        "user": {"user": "a"},
        "safety_identifier": {"safety_identifier": "a"},
        "metadata": {"metadata": {"a": "b"}},
        "store": {"store": True},
    },
    "reasoning": {
        "reasoning_effort": {"reasoning_effort": "low"},
        "reasoning_effort: none": {"reasoning_effort": "none"},
    },
    "completions": {
        "prompt": {},
        "prompt: several": {"prompt": ["Hi", "Ho"]},
        "prompt: token ids": {"prompt": [1, 2]},
        "suffix": {"suffix": "."},
        "echo": {"echo": True},
        "best_of": {"best_of": 2},
        "logprobs (completions)": {"logprobs": 1},
    },
    "embeddings": {
        "input": {},
        "input: several": {"input": ["Hi", "Ho"]},
        "input: token ids": {"input": [1, 2]},
        "dimensions": {"dimensions": 256},
        "encoding_format: base64": {"encoding_format": "base64"},
    },
}


class Capabilities(NamedTuple):
    """What a provider takes, and which of its models that was asked of. `on`: it can be called."""

    provider: Provider
    on: bool
    models: Mapping[Kind, str]
    parameters: Mapping[str, Outcome]


@lru_cache(maxsize=2)
def capabilities(catalog: Catalog) -> tuple[Capabilities, ...]:
    """Of every provider that is known, by priority."""
    return tuple(_of(catalog, row) for row in catalog.providers.values())


def _of(catalog: Catalog, row: Provider) -> Capabilities:
    models = _samples(catalog, row)
    reachable = row if row.base_url else row.model_copy(update={"base_url": "https://provider.example"})
    found: Mapping[str, Outcome] = {
        name: _outcome(kind, body, Deployment(reachable, models[kind]))
        for kind, probes in PROBES.items()
        for name, body in probes.items()
    }
    return Capabilities(row, not row.missing, models, found)


def _samples(catalog: Catalog, row: Provider) -> Mapping[Kind, str]:
    """The default model, or the first that is listed; for what that one is not made for, the first that is.

    Where none is listed a pattern of the row's stands for one: it fits itself."""
    listed = catalog.listed(row)
    chats = [to.model for to in listed if "chat" in to.capabilities]
    embedders = [to.model for to in listed if "embeddings" in to.capabilities]
    chat = row.default_model or next(iter(chats), "model")
    models = [chat, *(to.model for to in listed)]
    return {
        "chat": chat,
        "reasoning": next(filter(row.reasons, [*models, *row.slow]), chat),
        "completions": next((model for model in [*models, *row.completions] if row.has("completions", model)), chat),
        "embeddings": next(
            (model for model in [*embedders, chat, *row.embeddings] if row.has("embeddings", model)), chat
        ),
    }


def _outcome(kind: Kind, body: JSON, to: Deployment) -> Outcome:
    surface, needed = SURFACES[kind]
    try:
        outgoing = dialect_of(to).request(Call(surface, {"model": to.model, **needed, **body}), to, None)
    except UnsupportedParameter:
        return "refused"
    return "dropped" if outgoing.dropped else "passed"


MATRIX = Path(__file__).with_name("providers") / "MATRIX.md"
SIGNS: Mapping[Outcome, str] = {"passed": "✓", "dropped": "○", "refused": "✗"}
TITLES: Mapping[Kind, str] = {
    "chat": "Chat",
    "reasoning": "Reasoning, of a model that can",
    "completions": "Legacy completions",
    "embeddings": "Embeddings",
}
HEAD = """# What each provider takes

Made by `make matrix` from the code that builds the requests; a test fails where this is stale. `GET /v1/capabilities`
says the same of a running gateway, with the providers of its own.

✓ sent to the provider, in its own words where they differ; whether each of its models heeds it is the provider's to say
· ○ left out, and told in `lightrail.dropped` (with `strict: true`, refused)
· ✗ refused: 400 `unsupported_parameter`; a route asks another provider instead
"""


def table(found: Iterable[Capabilities]) -> str:
    """MATRIX.md: a section per surface, a line per parameter, a column per provider."""
    shown = list(found)
    text = HEAD
    for kind, probes in PROBES.items():
        text += f"\n## {TITLES[kind]}\n\n| | {' | '.join(each.provider.title for each in shown)} |\n"
        text += "|---|" + ":-:|" * len(shown) + "\n"
        for name in probes:
            text += f"| {name} | {' | '.join(SIGNS[each.parameters[name]] for each in shown)} |\n"
    models = [f"{each.provider.title} {_told(each.models)}" for each in shown]
    return text + "\nAsked of: " + "; ".join(models) + ".\n"


def _told(models: Mapping[Kind, str]) -> str:
    return ", ".join(f"`{model}`" for model in dict.fromkeys(models.values()))


def shipped() -> Catalog:
    """The providers as they come, whatever the environment and `gateway.toml` say."""
    rows, _ = config.read(Path("none"))
    return Catalog([row for row in rows if row.enabled is not False], PriceTable.vendored())


if __name__ == "__main__":
    MATRIX.write_text(table(capabilities(shipped())), "utf-8")
