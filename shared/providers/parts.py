"""Pictures and files in the parts of a message."""

from __future__ import annotations

import re

DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[^;,]*)*;base64,(.*)", re.DOTALL | re.IGNORECASE)
"""https://datatracker.ietf.org/doc/html/rfc2397, of which nobody sends what is not base64."""


def data_uri(url: str) -> tuple[str, str] | None:
    """The media type, in lower case, and the base64 of a data URI; None for any other URL."""
    found = DATA_URI.fullmatch(url)
    return (found[1].lower(), found[2]) if found else None
