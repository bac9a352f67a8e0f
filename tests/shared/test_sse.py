"""Server-sent events as the standard says, whatever the cuts."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import sse
from shared.sse import MAX_EVENT, Decoder, Event, TooLong


def read(*pieces: bytes) -> list[Event]:
    decoder = Decoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


STREAM = (
    b"\xef\xbb\xbf: a comment\r\n"
    b"data: one\r\n\r\n"
    b"event: error\ndata:two\ndata: more\n\n"
    b"data\n\nid: 7\nretry: 5\n\n"
    b"data: \xe2\x80\xa8 line separators \xc2\x85 and \xf0\x9f\x98\x80\r\r"
    b"data: [DONE]\n\n"
)
EVENTS = [
    Event(None, b"one"),
    Event("error", b"two\nmore"),
    Event(None, b""),
    Event(None, "\u2028 line separators \u0085 and \U0001f600".encode()),
    Event(None, b"[DONE]"),
]


def test_line_ends_comments_names_and_joined_lines() -> None:
    assert read(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_cuts_change_nothing(cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), len(STREAM)]
    assert read(*(STREAM[a:b] for a, b in pairwise(borders))) == EVENTS


def test_one_byte_at_a_time() -> None:
    assert read(*(bytes([byte]) for byte in STREAM)) == EVENTS


def test_an_event_that_is_not_ended_is_not_told() -> None:
    assert read(b"data: half") == []
    assert read(b"data: half\n") == []


def test_an_endless_event_is_refused() -> None:
    decoder = Decoder()
    with pytest.raises(TooLong):
        for _ in range(MAX_EVENT // 65536 + 1):
            decoder.feed(b"data: " + b"x" * 65536)


def test_a_long_stream_of_short_events_is_not_too_long() -> None:
    decoder = Decoder()
    piece = b"data: " + b"x" * 65536 + b"\n\n"
    assert sum(len(decoder.feed(piece)) for _ in range(300)) == 300


@given(st.text())
def test_no_text_can_end_or_forge_an_event(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    [event] = read(sse.encode({"content": text}))
    assert orjson.loads(event.data) == {"content": text}
