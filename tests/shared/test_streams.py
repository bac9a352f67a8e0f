"""A stream ends in exactly one honest way, wherever it is cut: whole, or with one error; and the record says which."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.errors import GatewayError
from shared.providers.bedrock import EventStream
from shared.sse import Decoder
from shared.store.base import VirtualKey
from shared.store.sqlite import SQLiteStore
from tests import eventstream
from tests.kit import Kit, Outcome, streamed, whole

WIRE = Path(__file__).parents[3] / "shared" / "wire"
RECORDED = ["openai", "azure", "groq", "mistral", "deepseek", "xai", "openrouter", "together", "cerebras", "perplexity"]
RECORDED += ["anthropic", "bedrock", "cohere", "gemini"]
APIS = ("chat", "messages", "generateContent", "converse")
ALL_ON = {f"{name.upper()}_API_KEY": "sk-test-provider-key" for name in RECORDED} | {
    "AZURE_BASE_URL": "https://unit.openai.azure.com/openai/v1",
    "OLLAMA_BASE_URL": "http://127.0.0.1:1/v1",
}


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    store = SQLiteStore(str(tmp_path / "test.db"))
    yield Kit(store, lambda _: whole({}), ALL_ON)
    await store.close()


@pytest.fixture
async def key(kit: Kit) -> str:
    return (await kit.keys.create(VirtualKey("", "", "test")))[1]


def event(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def delta(text: str, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish}


SHORT = (
    event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]),
    event(choices=[delta("Hel")]),
    b": comment\n\n",
    event(choices=[delta("lo ✓")]),
    event(choices=[delta("", "stop")]),
    event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}),
    b"data: [DONE]\n\n",
)
ASK = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def judge(outcome: Outcome) -> bool:
    """Check the one honest end; True where it was a whole one."""
    errors = [chunk for chunk in outcome.chunks if "error" in chunk]
    finishes = [choice["finish_reason"] for chunk in outcome.chunks for choice in chunk.get("choices", ())]
    finished = [reason for reason in finishes if reason]
    failed = bool(errors) or outcome.error is not None
    assert failed != bool(finished), "finish reasons or an error: never both, never neither"
    assert not (errors and outcome.error), "told once"
    assert outcome.row.doc["status"] == ("failed" if failed else "ok")
    assert outcome.key.open == {}
    assert outcome.spent == outcome.row.cost
    if errors:
        assert errors == outcome.chunks[-1:], "the error is the last word"
        assert "choices" not in errors[0]
    elif finished:
        assert outcome.chunks[-1]["usage"]["total_tokens"] == outcome.row.doc["tokens"]["total_tokens"]
        assert outcome.chunks[-1]["lightrail"]["attempts"] == 1
    if outcome.error:
        assert isinstance(outcome.error, GatewayError)
        assert outcome.text == "", "an error with a status only before any content"
    return not failed


async def test_a_whole_stream(kit: Kit, key: str) -> None:
    kit.reply = lambda _: streamed(*SHORT)
    outcome = await kit.ask(key, ASK)
    assert judge(outcome)
    assert outcome.text == "Hello ✓"
    assert outcome.chunks[-1]["usage"]["completion_tokens"] == 3
    assert outcome.row.doc["tokens"]["source"] == "provider"


@pytest.mark.parametrize("broken", [False, True], ids=["clean end", "broken connection"])
async def test_a_short_stream_cut_at_every_byte(kit: Kit, key: str, broken: bool) -> None:
    data = b"".join(SHORT)
    whole_from = data.index(b'"finish_reason": "stop"')
    error = httpx.ReadError("reset") if broken else None
    for cut in range(len(data) + 1):
        kit.reply = lambda _, cut=cut: streamed(data[:cut], error=error)
        outcome = await kit.ask(key, ASK)
        is_whole = judge(outcome)
        assert is_whole == (cut > whole_from + data[whole_from:].index(b"\n\n") + 1), cut
        assert "Hello ✓".startswith(outcome.text)
        if outcome.text and not is_whole:
            assert outcome.row.doc["tokens"]["source"] == "estimated"
            assert outcome.row.cost > 0, "what was made is charged"


def recordings() -> Iterable[Any]:
    index = WIRE / "index.json"
    if not index.exists():
        yield pytest.param(None, marks=pytest.mark.skip(reason="no recordings beside this checkout"))
        return
    for case in json.loads(index.read_text())["cases"]:
        if case["framing"] not in ("sse", "eventstream") or case["status"] != 200:
            continue
        if case["provider"] in RECORDED and case["api"] in APIS:
            yield pytest.param(WIRE / case["id"], id=case["id"])


def borders(data: bytes, decoder: Any) -> list[int]:
    """Each length at which one more event is complete, and one byte before it.

    A cut anywhere between two of them leaves the same events, whose decoding is tested byte by byte in test_sse.py; so
    these stand for every byte."""
    ends = [at + 1 for at in range(len(data)) if decoder.feed(data[at : at + 1])]
    return sorted({0, len(data), *ends, *(end - 1 for end in ends)})


@pytest.mark.parametrize("case", list(recordings()))
async def test_a_recorded_stream_cut_at_every_byte(kit: Kit, key: str, case: Path) -> None:
    provider, (path,) = case.parent.name, [*case.glob("response.sse"), *case.glob("response.eventstream")]
    data, decoder = path.read_bytes(), EventStream() if path.suffix == ".eventstream" else Decoder()
    ask = {**ASK, "model": f"{provider}/some-model"}
    kit.reply = lambda _: streamed(data)
    full = await kit.ask(key, ask)
    was_whole = judge(full)
    turned_whole = False
    for cut in borders(data, decoder):
        kit.reply = lambda _, cut=cut: streamed(data[:cut])
        outcome = await kit.ask(key, ask)
        is_whole = judge(outcome)
        assert is_whole >= turned_whole, "once enough was read for a whole answer, more does not unmake it"
        turned_whole = is_whole
        assert full.text.startswith(outcome.text)
        if is_whole:
            assert was_whole
            assert outcome.text == full.text, "a whole ending only where nothing is missing"


async def test_a_frame_whose_checksum_is_wrong_ends_in_an_error(kit: Kit, key: str) -> None:
    """Unless it was only the usage, after the finish reason, that was lost."""
    frames = [
        eventstream.event("contentBlockDelta", contentBlockIndex=0, delta={"text": "Hel"}),
        eventstream.event("contentBlockDelta", contentBlockIndex=0, delta={"text": "lo"}),
        eventstream.event("messageStop", stopReason="end_turn"),
        eventstream.event("metadata", usage={"inputTokens": 5, "outputTokens": 3, "totalTokens": 8}),
    ]
    ask = {**ASK, "model": "bedrock/amazon.nova-lite-v1:0"}
    for place, frame in enumerate(frames):
        garbled = [*frames[:place], frame[:-5] + b"~" + frame[-4:]]
        kit.reply = lambda _, garbled=garbled: streamed(*garbled)
        outcome = await kit.ask(key, ask)
        assert judge(outcome) is (place == 3)
        assert "Hello".startswith(outcome.text)
