"""What a streamed chunk costs to read and translate, by dialect: CPU beside that of OpenAI's own, in one process.

The same text in each provider's own frames, one a read, as they come where a model is slower than we are."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from shared import upstream
from shared.catalog import Deployment
from shared.config import Provider
from shared.schema import Call
from tests.eventstream import event

WORDS = [f" word{number % 97} and so on" for number in range(400)]
CALL = Call("chat", {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True})


def sse(data: Any, name: str | None = None) -> bytes:
    line = f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
    return (f"event: {name}\n{line}" if name else line).encode()


def openai(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    frame = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1700000000, "model": "gpt-4o-mini"}
    return sse({**frame, "service_tier": "default", "system_fingerprint": "fp_0123456789", "choices": [choice]})


def anthropic(text: str) -> bytes:
    delta = {"type": "text_delta", "text": text}
    return sse({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")


def gemini(text: str) -> bytes:
    usage = {"promptTokenCount": 12, "candidatesTokenCount": 5, "totalTokenCount": 17}
    usage |= {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": 12}]}
    said = {"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}
    return sse({"candidates": [said], "usageMetadata": usage, "modelVersion": "gemini-2.5-flash", "responseId": "r-1"})


def bedrock(text: str) -> bytes:
    return event("contentBlockDelta", contentBlockIndex=0, delta={"text": text}, p="abcdefghijklm")


def cohere(text: str) -> bytes:
    delta = {"message": {"content": {"text": text}}}
    return sse({"type": "content-delta", "index": 0, "delta": delta}, "content-delta")


STREAMS: Mapping[str, tuple[bytes, Callable[[str], bytes]]] = {
    "openai": (b"", openai),
    "anthropic": (
        sse({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        anthropic,
    ),
    "gemini": (b"", gemini),
    "bedrock": (event("messageStart", role="assistant"), bedrock),
    "cohere": (b"", cohere),
}
"""By dialect, what comes before the text, and a piece of text in its frame."""


def measure(rounds: int) -> dict[str, list[float]]:
    """CPU microseconds a chunk, by dialect, one value a round; the rounds are interleaved."""
    frames = {name: (start, [frame(text) for text in WORDS]) for name, (start, frame) in STREAMS.items()}
    found: dict[str, list[float]] = {name: [] for name in STREAMS}
    for turn in range(rounds + 1):
        for name, (start, pieces) in frames.items():
            to = Deployment(Provider(name=name, dialect=name, base_url="https://x"), "m")  # type: ignore[arg-type]
            reader = upstream._Reader(CALL, to, upstream.Notes())
            reader.feed(start)
            before = time.process_time()
            said = [reader.feed(piece) for piece in pieces]
            spent = time.process_time() - before
            assert ["".join(c["delta"]["content"] for p in each for c in p.body["choices"]) for each in said] == WORDS
            if turn:
                found[name].append(spent * 1e6 / len(pieces))
    return found


def report(found: Mapping[str, list[float]]) -> str:
    """A line a dialect; the ratio is the median of the rounds' own."""
    lines = [f"{'CPU us to read and translate a chunk':44}{'us (min..max)':>24}{'of OpenAI':>12}", "-" * 80]
    for name, values in found.items():
        ratio = statistics.median(ours / base for ours, base in zip(values, found["openai"], strict=True))
        cell = f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"
        lines.append(f"{name:44}{cell:>24}{ratio:>12.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(measure(15)))
