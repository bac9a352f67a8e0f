"""A deployer's checks: what they read, what they refuse, and what a refusal says."""

from __future__ import annotations

import asyncio
import base64
import sys
from types import ModuleType
from typing import Any

import pytest

from shared.config import Check, ConfigError
from shared.errors import ContentPolicyViolation, GatewayError
from shared.safety import Safety, texts
from shared.schema import JSON, Call, Surface

SEED = (Check(name="length", max_bytes=5000), Check(name="words", contains=("hack",)))


def said(content: Any, **more: Any) -> Call:
    return Call("chat", {"model": "m", "messages": [{"role": "user", "content": content}], **more})


async def refusal(safety: Safety, call: Call) -> str | None:
    try:
        await safety.examine(call)
    except ContentPolicyViolation as refused:
        assert (refused.status, refused.code) == (400, "content_policy_violation")
        return refused.message
    return None


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the deployer's, which can be named in the file."""
    module = ModuleType("own_checks")
    monkeypatch.setitem(sys.modules, "own_checks", module)
    return module


async def test_the_seeds_limits_hold_to_the_byte_and_in_any_case() -> None:
    safety = Safety(SEED)
    assert await refusal(safety, said("x" * 5000)) is None
    assert await refusal(safety, said("é" * 2500)) is None
    assert await refusal(safety, said("é" * 2500 + "x")) == (
        "The safety check 'length' refused this request: it has 5001 bytes of text, and 5000 are allowed."
    )
    assert await refusal(safety, said("How to HaCk-proof?")) == "The safety check 'words' refused this request."


async def test_the_first_that_refuses_is_named_and_what_it_found_is_not() -> None:
    safety = Safety(
        [
            Check(name="short", max_characters=10),
            Check(name="cards", matches=(r"\b\d{16}\b",)),
            Check(name="all", contains=("4",)),
        ]
    )
    assert await refusal(safety, said("fine")) is None
    assert "'short'" in str(await refusal(safety, said("4111111111111111")))
    safety = Safety([Check(name="cards", matches=("never", r"\b\d{16}\b")), Check(name="all", contains=("4",))])
    told = await refusal(safety, said("mine: 4111111111111111"))
    assert told == "The safety check 'cards' refused this request."


CALL = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"cmd": "hack"}'}}
SCHEMA = {"type": "object", "properties": {"id": {"type": "string", "description": "hack"}}}
PLAIN = base64.b64encode(b"please hack").decode()


@pytest.mark.parametrize(
    ("surface", "body"),
    [
        ("chat", {"messages": [{"role": "system", "content": "hack"}, {"role": "user", "content": "hi"}]}),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "hack"}]}]}),
        ("chat", {"messages": [{"role": "user", "content": "hi", "name": "hack"}]}),
        ("chat", {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}),
        ("chat", {"messages": [{"role": "assistant", "content": "", "reasoning_content": "hack"}]}),
        ("chat", {"messages": [{"role": "tool", "tool_call_id": "c1", "content": "hack"}]}),
        ("chat", {"messages": [], "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]}),
        ("chat", {"messages": [], "functions": [{"name": "f", "parameters": {"properties": {"hack": {}}}}]}),
        ("chat", {"messages": [], "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        ("chat", {"messages": [], "prediction": {"type": "content", "content": "hack"}}),
        ("chat", {"messages": [], "instructions": "a field that only a provider knows: hack"}),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "own", "deep": [{"deeper": "hack"}]}]}]}),
        ("chat", {"messages": [{"content": [{"type": "file", "file": {"filename": "hack.pdf", "file_data": "x"}}]}]}),
        ("chat", {"messages": [{"content": [{"file": {"file_data": f"data:text/plain;base64,{PLAIN}"}}]}]}),
        ("chat", {"messages": [{"content": [{"file": {"file_data": f"DATA:text/plain;BASE64,{PLAIN}"}}]}]}),
        ("chat", {"messages": [{"content": [{"document": {"url": "data:text/html;charset=utf-8,%68ack"}}]}]}),
        ("chat", {"messages": [{"content": [{"document": {"url": "data:text/plain;base64,not base64: hack"}}]}]}),
        ("chat", {"messages": [{"role": "user", "content": "data:image/png;base64, so it says: hack"}]}),
        ("completions", {"prompt": "hack"}),
        ("completions", {"prompt": ["fine", "hack"]}),
        ("completions", {"prompt": "fine", "suffix": "hack"}),
        ("embeddings", {"input": ["fine", "hack"]}),
    ],
)
async def test_all_that_a_model_may_read_is_checked(surface: Surface, body: JSON) -> None:
    assert "'words'" in str(await refusal(Safety(SEED), Call(surface, {"model": "m", **body})))


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,hack" + "A" * 9000}}
SOUND = {"type": "input_audio", "input_audio": {"data": "hack" + "A" * 9000, "format": "wav"}}
SEALED = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "hack" + "A" * 9000}}


async def test_names_and_media_are_no_text() -> None:
    names = {"model": "hackathon", "user": "hack", "metadata": {"hack": "hack"}, "models": ["hack"]}
    parts = [{"type": "text", "text": "hi"}, IMAGE, SOUND, SEALED]
    call = said(parts, **names, session_id="hack", provider={"only": ["hack"]})
    assert list(texts(call)) == ["hi", "wav", "image/png"]
    assert await refusal(Safety(SEED), call) is None


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]])
async def test_token_ids_are_refused_as_nobody_here_can_read_them(ids: Any) -> None:
    for surface, field in (("completions", "prompt"), ("embeddings", "input")):
        call = Call(surface, {"model": "m", field: ids})  # type: ignore[arg-type]
        assert "token ids" in str(await refusal(Safety(SEED), call))
        assert await refusal(Safety(), call) is None


async def test_a_function_of_ones_own_is_given_the_text_and_its_reason_is_told(own: ModuleType) -> None:
    seen: list[str] = []

    async def moderate(text: str) -> str | None:
        await asyncio.sleep(0)
        seen.append(text)
        return "violence. " * 100 if "war" in text else None

    own.moderate = moderate
    own.short = lambda text: "too polite" if "please" in text else None
    safety = Safety([Check(name="tone", call="own_checks:short"), Check(name="moderation", call="own_checks:moderate")])
    assert await refusal(safety, said("a", tools=[{"type": "x", "description": "b"}])) is None
    assert seen == ["a\nb"]
    assert await refusal(safety, said("please")) == "The safety check 'tone' refused this request: too polite"
    told = await refusal(safety, said("war"))
    assert told is not None
    assert told.startswith("The safety check 'moderation' refused this request: violence.")
    assert len(told) < 400


async def test_what_cannot_be_checked_is_not_sent(own: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    def explode(text: str) -> None:
        raise ValueError(text)

    async def hang(text: str) -> None:
        await asyncio.sleep(60)

    own.explode, own.hang, own.odd = explode, hang, lambda text: True
    for name in ("explode", "hang", "odd"):
        safety = Safety([Check(name="mine", call=f"own_checks:{name}", timeout=0.05)])
        with pytest.raises(GatewayError) as caught:
            await safety.examine(said("a secret"))
        assert (caught.value.status, caught.value.code) == (500, "internal_error")
        assert caught.value.message == "The safety check 'mine' failed, so this request was not sent."
        assert caught.value.__suppress_context__
    logged = [{**record.__dict__} for record in caplog.records if record.msg == "safety.failed"]
    assert [line["error"] for line in logged] == ["ValueError", "TimeoutError", "TypeError"]
    assert logged[0]["at"].startswith("test_safety.py:")
    assert "a secret" not in str(logged)


async def test_without_checks_nothing_is_read() -> None:
    await Safety().examine(Call("chat", {"messages": None}))


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (Check(name="a"), "safety.a: checks nothing"),
        (Check(name="a", matches=("fine", "(")), r"safety.a.matches\[1\]"),
        (Check(name="a", matches=("x*",)), r"safety.a.matches\[0\]: matches every text"),
        (Check(name="a", call="nonsense"), "safety.a.call: 'nonsense' is no function"),
        (Check(name="a", call="no_such_module:check"), "safety.a.call: .* cannot be imported: ModuleNotFoundError"),
        (Check(name="a", call="shared.safety:none"), "safety.a.call: .* cannot be imported: AttributeError"),
        (Check(name="a", call="shared.safety:READ"), "safety.a.call: 'shared.safety:READ' is no function"),
    ],
)
def test_a_mistake_is_named(check: Check, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        Safety([check])


def test_names_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="two checks named 'a'"):
        Safety([Check(name="a", max_bytes=1), Check(name="a", max_bytes=2)])
