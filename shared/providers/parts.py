"""The parts of a message, and the pictures and files in them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shared.catalog import Deployment
from shared.providers.parameters import unsupported
from shared.schema import JSON

DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[^;,]*)*;base64,(.*)", re.DOTALL | re.IGNORECASE)
"""https://datatracker.ietf.org/doc/html/rfc2397, of which nobody sends what is not base64."""


def data_uri(url: str) -> tuple[str, str] | None:
    """The media type, in lower case, and the base64 of a data URI; None for any other URL."""
    found = DATA_URI.fullmatch(url)
    return (found[1].lower(), found[2]) if found else None


def kind_of(part: JSON, role: str, takes: Mapping[str, set[str]], to: Deployment) -> str:
    """The type of a part; raises UnsupportedParameter for one that the provider does not take from this role."""
    kind: str = part["type"]
    if kind not in takes[role]:
        raise unsupported(to, "messages", f"does not support '{kind}' in what the {role} says")
    return kind
