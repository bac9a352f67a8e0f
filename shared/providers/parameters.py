"""What a caller asks for that a provider may not be able to do: taken, dropped and told, or refused by name."""

from __future__ import annotations

from typing import Any

from shared.catalog import Deployment
from shared.errors import UnsupportedParameter
from shared.schema import OURS, Call

PARAMETERS = {"json_object": "response_format", "json_schema": "response_format"}
"""Which parameter a feature is, where it has another name; what is no parameter is a part of a message."""


class Parameters:
    """The caller's parameters, each taken once by a dialect that is not OpenAI's; what nobody took was dropped.

    Nulls, our own extensions and what the row `drops` cannot be taken."""

    def __init__(self, call: Call, to: Deployment) -> None:
        drops = to.provider.dropped(to.model)
        self._call = call
        self._to = to
        self._left = {
            name: value for name, value in call.body.items() if value is not None and name not in ours(call, to)
        }
        self._kept_back = {name: self._left.pop(name) for name in drops if name in self._left}

    def take(self, name: str) -> Any:
        """The value, or None where the caller gave none."""
        return self._left.pop(name, None)

    def dropped(self) -> tuple[str, ...]:
        """The names of what was not taken, to be told; with `strict`, raises UnsupportedParameter for it instead."""
        names = sorted((*self._left, *self._kept_back))
        return told(names, self._call, self._to)


def ours(call: Call, to: Deployment) -> frozenset[str]:
    """What is never forwarded: our extensions, and `store` where it means our own history."""
    return OURS.difference(to.provider.keeps) | (STORED if call.body.get("session_id") else NONE)


STORED = frozenset({"store"})
NONE = frozenset[str]()


def told(dropped: list[str], call: Call, to: Deployment) -> tuple[str, ...]:
    if dropped and call.body.get("strict"):
        raise unsupported(to, dropped[0], f"does not support '{dropped[0]}'")
    return tuple(dropped)


def refuse(call: Call, to: Deployment, also: set[str] | frozenset[str] = NONE) -> None:
    """Raise UnsupportedParameter for a feature in use that the row `refuses`, or that is among `also`."""
    if lacking := call.features.intersection(to.provider.refuses) | also:
        feature = min(lacking)
        param = PARAMETERS.get(feature) or (feature if feature in call.body else "messages")
        raise unsupported(to, param, f"does not support '{feature}'")


def unsupported(to: Deployment, param: str, lacks: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"The model '{to.id}' {lacks}.", param=param)
