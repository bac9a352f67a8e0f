"""Server-sent events, both ways: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

BOM = b"\xef\xbb\xbf"

MAX_EVENT = 16 * 1024 * 1024
"""Bytes; tool arguments of 10 MB pass."""

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


def encode(data: Any) -> bytes:
    """One event. JSON has no raw line ends, so no text of a model can end or forge an event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class Event(NamedTuple):
    name: str | None
    data: bytes


class TooLong(Exception):
    """An event grew over `MAX_EVENT` bytes."""


class Decoder:
    """Bytes in, events out, whatever the cuts: lines end at CR, LF or CRLF only, never at U+2028 and its kin."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._held = False
        self._size = 0
        self._name: str | None = None
        self._data: list[bytes] = []
        self._begun = False

    def feed(self, piece: bytes) -> list[Event]:
        """The events that this piece completes."""
        self._size += len(piece)
        if self._size > MAX_EVENT:
            raise TooLong
        if self._begun and not self._held and b"\n" not in piece and b"\r" not in piece:
            self._line.append(piece)  # joined once, when the line ends
            return []
        text = b"".join((*self._line, piece)) if self._line else piece
        if not self._begun:
            if len(text) < len(BOM) and BOM.startswith(text):
                self._line = [text]
                return []
            self._begun, text = True, text.removeprefix(BOM)
        if b"\r" in text:
            self._held = text.endswith(b"\r")  # its LF may come with the next piece
            text = text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            text += b"\r" if self._held else b""
        *lines, rest = text.split(b"\n")
        self._line = [rest] if rest else []
        events: list[Event] = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(Event(self._name, b"\n".join(self._data)))
                self._name, self._data, self._size = None, [], len(text)
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._data.append(b"")
            elif line.startswith(b"event:"):
                self._name = line[6:].strip().decode("utf-8", "replace")
        return events
