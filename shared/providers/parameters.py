"""What a caller asks for that a provider may not be able to do: taken, dropped and told, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from shared.catalog import Deployment
from shared.errors import UnsupportedParameter
from shared.schema import FORMAT_AND_TOOLS, JSON, OURS, Call

PARAMETERS: Mapping[str, str] = {
    "json_object": "response_format",
    "json_schema": "response_format",
    FORMAT_AND_TOOLS: "response_format",
}
"""Which parameter a feature is, where it has another name; what is no parameter is a part of a message."""


EFFORTS = {"none": 0.0, "minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95, "max": 1.0}
"""The share of the output that an effort may think: https://openrouter.ai/docs/use-cases/reasoning-tokens"""


NEUTRAL: JSON = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "store": False,
    "parallel_tool_calls": True, "n": 1,
}  # fmt: skip
"""What asks for nothing, so that nothing is lost where it is dropped."""


SAID_OTHERWISE = frozenset({
    "messages", "model", "max_tokens", "max_completion_tokens", "modalities", "stream", "stream_options",
})  # fmt: skip
"""What every dialect sends by other means, or what says no more than is so."""


class Reasoning(NamedTuple):
    """How much shall be thought, one of two ways: `effort` is one of `EFFORTS`, `budget` in tokens."""

    effort: str | None = None
    budget: int | None = None


class Parameters:
    """The caller's parameters, each taken once by a dialect that is not OpenAI's; what nobody took was dropped.

    Nulls, our own extensions and what the row `drops` cannot be taken."""

    def __init__(self, call: Call, to: Deployment) -> None:
        drops = to.provider.dropped(to.model)
        self._call = call
        self._to = to
        kept = ours(call, to) | SAID_OTHERWISE
        self._left = {name: value for name, value in call.body.items() if value is not None and name not in kept}
        self._kept_back = {name: self._left.pop(name) for name in drops if name in self._left}

    def take(self, name: str) -> Any:
        """The value, or None where the caller gave none."""
        return self._left.pop(name, None)

    def stops(self, *, blank: bool = True) -> list[str]:
        """`stop`, as a list; without those that are nothing but whitespace, where such are not taken."""
        stop: str | list[str] = self.take("stop") or []
        given = [stop] if isinstance(stop, str) else stop
        taken = [sequence for sequence in given if blank or sequence.strip()]
        if len(taken) < len(given):
            self.keep_back("stop")
        return taken

    def schema(self, to: Deployment) -> JSON | None:
        """The `json_schema` of `response_format`, which is taken; raises UnsupportedParameter for one without any."""
        form: JSON = self.take("response_format") or {}
        if form.get("type") != "json_schema":
            return None
        if not form["json_schema"].get("schema"):
            raise unsupported(to, "response_format", "takes no 'json_schema' without a schema")
        return form["json_schema"]

    def within(self, name: str, least: float, most: float) -> float | None:
        """The value, or the nearest one that the provider takes: that it is another is told, as of a dropped one."""
        value: float | None = self.take(name)
        if value is None or least <= value <= most:
            return value
        self._kept_back[name] = value
        return max(least, min(most, value))

    def reasoning(self) -> Reasoning:
        """`reasoning_effort`, or OpenRouter's `reasoning`: {effort, max_tokens, enabled, exclude}, all optional.

        What is neither's is not taken."""
        match self._left.get("reasoning_effort") or self._left.get("reasoning"):
            case {"max_tokens": int(budget)} if budget > 0:
                found = Reasoning(budget=budget)
            case str(effort) | {"effort": str(effort)} if effort in EFFORTS:
                found = Reasoning(effort)
            case {"enabled": bool(on)}:
                found = Reasoning("medium" if on else "none")
            case {"exclude": bool()}:
                found = Reasoning()
            case _:
                return Reasoning()
        self.take("reasoning_effort")
        self.take("reasoning")
        return found

    def keep_back(self, *names: str) -> None:
        """Tell these as dropped after all, of what the caller gave."""
        self._kept_back |= {name: value for name in names if (value := self._call.body.get(name)) is not None}

    def tell(self, name: str) -> None:
        """Tell this as dropped, which is part of a parameter: `tools.strict`."""
        self._kept_back[name] = True

    def dropped(self) -> tuple[str, ...]:
        """The names of what was not taken, to be told; with `strict`, raises UnsupportedParameter for it instead."""
        given = {**self._left, **self._kept_back}
        names = sorted(name for name, value in given.items() if NEUTRAL.get(name) != value)
        return told(names, self._call, self._to)


def ours(call: Call, to: Deployment) -> frozenset[str]:
    """What is never forwarded: our extensions, and `store` where it means our own history."""
    return OURS.difference(to.provider.keeps) | (STORED if call.body.get("session_id") else NONE)


STORED = frozenset({"store"})
NONE = frozenset[str]()


def hides_reasoning(call: Call) -> bool:
    """OpenRouter's `reasoning.exclude`: to think, and not to show it."""
    asked = call.body.get("reasoning")
    return isinstance(asked, dict) and cast("JSON", asked).get("exclude") is True


def told(dropped: list[str], call: Call, to: Deployment) -> tuple[str, ...]:
    if dropped and call.body.get("strict"):
        raise unsupported(to, dropped[0], f"does not support '{dropped[0]}'")
    return tuple(dropped)


def refuse(call: Call, to: Deployment, also: set[str] | frozenset[str] = NONE) -> None:
    """Raise UnsupportedParameter for a feature in use that the row `refuses`, or that is among `also`.

    But not for a pair of which it takes either: who has nobody else to ask is told so by the provider."""
    if lacking := call.features.intersection(to.provider.refused(to.model)) - {FORMAT_AND_TOOLS} | also:
        feature = min(lacking)
        param = PARAMETERS.get(feature) or (feature if feature in call.body else "messages")
        raise unsupported(to, param, f"does not support '{feature}'")


def unsupported(to: Deployment, param: str, lacks: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"The model '{to.id}' {lacks}.", param=param)
