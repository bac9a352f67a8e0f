"""AWS's binary frames, written from their description: https://smithy.io/2.0/aws/amazon-eventstream.html."""

from __future__ import annotations

import json
from struct import pack
from typing import Any
from zlib import crc32


def frame(headers: dict[str, str], payload: bytes = b"") -> bytes:
    """One frame; all headers are strings."""
    named = b"".join(
        pack("!B", len(name)) + name.encode() + b"\x07" + pack("!H", len(value.encode())) + value.encode()
        for name, value in headers.items()
    )
    lengths = pack("!II", 16 + len(named) + len(payload), len(named))
    message = lengths + pack("!I", crc32(lengths)) + named + payload
    return message + pack("!I", crc32(message))


def event(name: str, **data: Any) -> bytes:
    """As Bedrock sends them, padding included."""
    headers = {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
    return frame(headers, json.dumps({**data, "p": "abcdefghijkl"}).encode())


def exception(name: str, **data: Any) -> bytes:
    headers = {":exception-type": name, ":content-type": "application/json", ":message-type": "exception"}
    return frame(headers, json.dumps(data).encode())
