"""Token counts: near enough for limits, never too low for money."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import tokens
from shared.config import ConfigError
from shared.schema import JSON, parse
from shared.tokens import Meter, Prompt, at_most, estimate_prompt, estimate_text, family_of

WIRE = Path(__file__).parents[2].parent / "shared" / "wire"
recorded = pytest.mark.skipif(not WIRE.exists(), reason="no recordings beside the checkout")

PIXEL = "data:image/png;base64," + "iVBORw0KGgo" * 40_000
PROSE = "The quick brown fox, having jumped over 12345 lazy dogs, went home.\n\nThen it slept. "


def said(content: Any, **more: Any) -> JSON:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


# Against what providers reported


@cache
def cases() -> list[tuple[JSON, JSON, list[JSON]]]:
    """(entry, request body, reply documents) of each answered chat recording in OpenAI's shape."""
    found: list[tuple[JSON, JSON, list[JSON]]] = []
    for entry in json.loads((WIRE / "index.json").read_text())["cases"]:
        if entry["api"] == "chat" and entry["status"] == 200:
            folder = WIRE / entry["provider"] / entry["slug"]
            body = json.loads((folder / "request.json").read_text())["body"]
            reply = folder / json.loads((folder / "response.meta.json").read_text())["body_file"]
            if body and body.get("messages"):
                found.append((entry, body, list(documents(reply))))
    return found


def documents(reply: Path) -> Iterator[JSON]:
    raw = reply.read_bytes()
    if reply.suffix == ".json":
        yield json.loads(raw)
    for line in raw.splitlines() if reply.suffix == ".sse" else ():
        if line.startswith(b"data: {"):
            yield json.loads(line[5:])


def usage(replies: list[JSON]) -> tuple[int, int]:
    """The last (prompt, completion) tokens said; Cohere's billed units, which are what its answers cost."""
    for reply in reversed(replies):
        delta = reply.get("delta") if isinstance(reply.get("delta"), dict) else {}
        if told := reply.get("usage") or delta.get("usage"):
            units = told.get("billed_units", told)
            prompt, completion = (
                units.get(k, units.get(o))
                for k, o in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
            )
            if prompt:
                return int(prompt), int(completion or 0)
    return 0, 0


def answer(replies: list[JSON]) -> str:
    """The text of an answer, if it is only that."""
    texts: list[Any] = []
    for reply in replies:
        choices = reply.get("choices") or ()
        texts += [(choice.get("delta") or choice.get("message") or {}).get("content") for choice in choices]
        match reply:
            case {"type": "content-delta", "delta": {"message": {"content": {"text": text}}}}:
                texts.append(text)
            case {"message": {"content": [{"text": text}]}}:
                texts.append(text)
            case _:
                pass
    return "".join(text or "" for text in texts) if all(isinstance(text, str | None) for text in texts) else ""


def searches(entry: JSON) -> bool:
    """Left out: what the provider adds by itself is in no request. Search results (Groq's compound and OpenAI's search
    models, OpenRouter's plugin, Perplexity), and the turns of tools that it runs itself."""
    return bool({"server-tool", "citations"} & set(entry["tags"])) or bool(
        re.search("compound|search|sonar", f"{entry['id']} {entry['model']}")
    )


@recorded
def test_at_most_holds_for_every_recorded_chat():
    checked = 0
    for entry, body, replies in cases():
        prompt, _ = usage(replies)
        if prompt and not searches(entry):
            checked += 1
            assert at_most(body, "chat", entry["model"] or "") >= prompt, entry["id"]
            assert at_most(body, "chat") >= prompt, entry["id"]
    assert checked > 120


@recorded
def test_the_text_of_recorded_answers_is_estimated_as_promised():
    """Families with few recordings here are allowed 10 % in the median; the notes' 7 % stand on 6,701 recordings."""
    families: dict[str, list[float]] = defaultdict(list)
    thinks = {"reasoning", "reasoning-tokens", "reasoning-param", "tool-call", "tools"}
    for entry, _, replies in cases():
        text, (_, actual) = answer(replies), usage(replies)
        if actual >= 20 and text and not thinks & set(entry["tags"]) and not searches(entry):
            model = entry["model"] or ""
            families[family_of(model).name].append(abs(estimate_text(text, model) - actual) / actual)
    every = [error for errors in families.values() for error in errors]
    assert len(every) >= 15
    assert median(every) <= 0.07
    assert quantiles(every, n=10)[-1] <= 0.25
    assert {name: median(errors) for name, errors in families.items() if len(errors) > 2 and median(errors) > 0.1} == {}


@recorded
def test_the_prompts_of_recorded_openai_chats_are_estimated_as_promised():
    errors: list[float] = []
    for entry, body, replies in cases():
        actual, model = usage(replies)[0], entry["model"] or ""
        plain = not {"tools", "vision", "document", "json_schema"} & set(entry["tags"]) and not searches(entry)
        if actual and plain and family_of(model).name in ("openai", "openai cl100k", "openai 4o-mini", "gpt-oss"):
            errors.append(abs(estimate_prompt(body, "chat", model) - actual) / actual)
    assert len(errors) >= 15
    assert median(errors) <= 0.07


# By themselves


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("gpt-4o", "openai"),
        ("gpt-4o-mini-2024-07-18", "openai 4o-mini"),
        ("gpt-4-turbo", "openai cl100k"),
        ("gpt-3.5-turbo", "openai cl100k"),
        ("gpt-4.1", "openai"),
        ("openai/o3", "openai"),
        ("gpt-oss-120b", "gpt-oss"),
        ("claude-3-5-sonnet-20241022", "claude to 4.6"),
        ("claude-opus-4-20250514", "claude to 4.6"),
        ("claude-sonnet-4-6", "claude to 4.6"),
        ("anthropic/claude-opus-4.7", "claude"),
        ("us.anthropic.claude-opus-4-7-v1:0", "claude"),
        ("claude-sonnet-5", "claude"),
        ("claude-haiku-5-5-20260901", "claude"),
        ("models/gemini-2.5-pro", "gemini"),
        ("mixtral-8x7b", "mistral"),
        ("llama-3.3-70b-versatile", "llama"),
        ("amazon.nova-lite-v1:0", "nova"),
        ("command-r-08-2024", "cohere"),
        ("my-own-model", "other"),
        ("", "other"),
    ],
)
def test_the_family_is_found_by_the_models_id(model: str, family: str):
    assert family_of(model).name == family


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of the deployer's, `own_tokens`; afterwards all models are counted as before."""
    module = ModuleType("own_tokens")
    monkeypatch.setitem(sys.modules, "own_tokens", module)
    yield module
    tokens.use({})


def test_a_deployer_chooses_how_a_model_is_counted(own: ModuleType):
    own.letters = len
    tokens.use({"Mine-*": "own_tokens:letters", "mine-7b": "simple", "our-*": "claude", "gpt-4o-*": "simple"})
    assert estimate_text("four", "mine-7b") == 4, "the first that fits"
    assert estimate_text("four", "not-mine-7b") == 1
    assert estimate_text("four", "mine") == 1
    assert family_of("our-finetune").name == "claude"
    assert estimate_text("internationally", "our-finetune") == estimate_text("internationally", "claude-opus-4-7")
    assert estimate_text("12345678", "gpt-4o-mini") == 2
    assert family_of("gpt-4o-mini").image_most == 48_200, "only its text is counted otherwise"
    said = {"messages": [{"role": "user", "content": "12345678"}], "tools": [{"type": "x"}]}
    assert 2 < estimate_prompt(said, "chat", "gpt-4o-mini") < 30
    tokens.use({})
    assert estimate_text("four", "mine-7b") == 1


@pytest.mark.parametrize(
    ("text", "number"), [("", 0), ("abc", 1), ("abcd", 1), ("abcde", 2), ("你好", 2), ("ab你cde好", 4), ("é" * 5, 5)]
)
def test_the_simple_estimate_is_the_seeds(text: str, number: int):
    assert tokens.simple(text) == number


def test_an_estimator_that_fails_on_a_text_is_replaced_for_it(own: ModuleType, caplog: pytest.LogCaptureFixture):
    def fragile(text: str) -> float:
        if "?" in text:
            raise ValueError(text)
        return -1 if "!" in text else 7

    own.fragile = fragile
    tokens.use({"mine-*": "own_tokens:fragile"})
    assert estimate_text("fine", "mine-7b") == 7
    assert estimate_text("a secret?", "mine-7b") == round(tokens.weigh("a secret?"))
    assert estimate_text("no!", "mine-7b") == round(tokens.weigh("no!"))
    assert [record.msg for record in caplog.records] == ["estimator.failed"] * 2
    assert "a secret" not in str([record.__dict__ for record in caplog.records])


def test_an_estimator_that_is_none_is_named(own: ModuleType):
    own.text = lambda text: text
    own.broken = lambda: 1
    for name, wrong in (
        ("lama", "estimators.mine-\\*: there is no 'lama': name simple, .*llama"),
        ("no_such_module:count", "cannot be imported: ModuleNotFoundError"),
        ("own_tokens:text", "it returned str, not a number of tokens"),
        ("own_tokens:broken", "estimators.mine-\\*: TypeError"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            tokens.use({"mine-*": name})


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("", 0),
        ("hello", 1.07),
        ("internationally", 2),
        ("1234567", 5.91),
        ("你好", 1.96),
        ("a\n\nb", 3.11),
        ("Привет", 3),
    ],
)
def test_the_weights_are_those_of_the_notes(text: str, about: float):
    assert tokens.weigh(text) == pytest.approx(about, abs=0.5)


@given(st.text(), st.text())
def test_a_text_with_more_words_is_never_less(text: str, more: str):
    assert tokens.weigh(f"{text} and {more}") + 1e-9 >= tokens.weigh(text)
    assert at_most(said(text + more), "chat") >= at_most(said(text), "chat")


def test_estimates_grow_in_proportion():
    once, often = (estimate_text(PROSE * n, "gpt-4o") for n in (10, 1000))
    assert often == pytest.approx(100 * once, rel=0.02)
    assert at_most(said(PROSE * 1000), "chat") - at_most(said(""), "chat") == len(PROSE) * 1000


def test_token_ids_are_counted_exactly():
    assert estimate_prompt({"model": "m", "input": [1, 2, 3]}, "embeddings", "m") == 3
    assert at_most({"model": "m", "input": [[1, 2, 3], [4]]}, "embeddings") == 4
    assert estimate_prompt({"model": "m", "prompt": [[1, 2], [3]]}, "completions", "m") == 3


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4o-mini", "claude-opus-4-7", "my-own-model"])
def test_an_image_is_a_number_whatever_its_bytes(model: str):
    part = {"type": "image_url", "image_url": {"url": PIXEL}}
    other = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    assert at_most(said([part]), "chat", model) == at_most(said([other]), "chat", model)
    assert at_most(said([part]), "chat", model) - at_most(said([]), "chat", model) == family_of(model).image_most
    assert estimate_prompt(said([part]), "chat", model) < family_of(model).image_most
    tiles = 2_833 + 8 * 5_667 if model == "gpt-4o-mini" else 85 + 8 * 170
    assert family_of(model).image_most >= tiles, "OpenAI's high detail, 768 by 2,048"


def test_text_that_looks_like_an_image_is_text():
    assert at_most(said([{"type": "text", "text": PIXEL}]), "chat") > len(PIXEL)
    assert at_most(said(PIXEL), "chat") > len(PIXEL)
    assert at_most(
        said("", tools=[{"type": "function", "function": {"name": "f", "description": PIXEL}}]), "chat"
    ) > len(PIXEL)


def pdf(*objects: bytes) -> str:
    return base64.b64encode(b"%PDF-1.7\n" + b"\n".join(objects) + b"\n" + b"%" * 100_000).decode()


def test_the_pages_of_a_file_are_counted():
    page = b"<< /Type /Page /Parent 1 0 R >>"
    packed = b"<< /Type /ObjStm /N 3 >>\nstream\n" + zlib.compress(page * 3) + b"\nendstream"
    assert tokens.pages(pdf(page, page, b"<< /Type /Pages >>")) == 2
    assert tokens.pages(pdf(packed, packed, page)) == 7
    assert tokens.pages(pdf(b"nothing to see")) == tokens.PAGES_MOST
    assert tokens.pages(pdf(packed[:45])) >= tokens.PAGES_MOST
    assert tokens.pages("no base64, at all!") == tokens.PAGES_MOST
    file = {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{pdf(page)}"}}
    assert at_most(said([file]), "chat", "gpt-4o") - at_most(said([]), "chat", "gpt-4o") == 10_200


def test_audio_counts_by_its_length():
    def sound(seconds: int) -> JSON:
        data = base64.b64encode(bytes(seconds * 8_000)).decode()  # 64 kbit/s
        return said([{"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}])

    for seconds in (1, 60):
        assert at_most(sound(seconds), "chat") >= 32 * seconds, "Gemini's rate"
    assert estimate_prompt(sound(60), "chat", "gpt-4o") == pytest.approx(600, rel=0.1), "OpenAI's rate"


def test_all_that_a_model_may_read_is_in_the_bound():
    secret = "x" * 5_000
    plain = at_most(said("hi"), "chat")
    call = {"id": secret, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"description": secret}}}
    for body in (
        said("hi", tools=[{"type": "function", "function": {"name": "f", "parameters": {"description": secret}}}]),
        said("hi", functions=[{"name": secret}]),
        said("hi", response_format=schema),
        {"messages": [{"role": "user", "content": "hi", "name": secret}]},
        {"messages": [{"role": "assistant", "content": "hi", "reasoning_content": secret}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "tool", "content": [{"type": "text", "text": secret}], "tool_call_id": "1"}]},
        said([{"type": "thinking", "thinking": [{"type": "text", "text": secret}]}]),
        said([{"type": "document", "document": {"data": {"deep": [secret]}}}]),
    ):
        assert at_most(body, "chat") >= plain + 4_900


def test_the_bound_counts_bytes_and_what_providers_say_about_tools():
    assert at_most(said("né你🎉"), "chat") - at_most(said(""), "chat") == 1 + 2 + 3 + 4
    tool = {"type": "function", "function": {"name": "f"}}
    assert at_most(said("", tools=[tool]), "chat") - at_most(said(""), "chat") >= 1_000, (
        "Cohere's, the longest recorded"
    )


WORDS = st.text(max_size=20)
PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | WORDS
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=8
)
EXTRA = st.dictionaries(st.sampled_from(["url", "data", "thinking", "source", "id", "x"]), ANY, max_size=3)
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, WORDS),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, WORDS),
    st.builds(lambda data: {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, WORDS),
    st.builds(lambda data: {"type": "file", "file": {"file_data": data}}, st.none() | WORDS),
    st.builds(lambda kind, extra: {"type": f"own-{kind}", **extra}, WORDS, EXTRA),
)
CONTENT = WORDS | st.lists(PARTS, min_size=1, max_size=3)
CALLS = st.builds(
    lambda name, said: [{"id": "1", "function": {"name": name, "arguments": said}}, {"id": "2", "type": "custom"}],
    WORDS,
    WORDS,
)
RESULTS = [{"role": "tool", "tool_call_id": call_id, "content": "x"} for call_id in ("2", "1")]
MESSAGES = st.one_of(
    st.builds(lambda content, extra: {**extra, "role": "user", "content": content}, CONTENT, EXTRA),
    st.builds(lambda content: {"role": "system", "content": content, "name": None}, CONTENT),
    st.just({"role": "assistant", "tool_calls": None, "function_call": None}),
    st.builds(lambda text: {"role": "assistant", "function_call": {"name": text, "arguments": text}}, WORDS),
    st.builds(lambda text: {"role": "function", "content": text, "name": "f"}, st.none() | WORDS),
)
CALLING = st.builds(lambda calls: [{"role": "assistant", "tool_calls": calls}, *RESULTS], CALLS)
TURNS = st.lists(st.builds(lambda message: [message], MESSAGES) | CALLING, min_size=1, max_size=4)
TOOLS = st.builds(
    lambda schema: [{"type": "function", "function": {"name": "f", "parameters": schema}}, {"type": "own"}], EXTRA
)
CHATS = st.builds(
    lambda messages, tools, form: {"model": "m", "messages": messages, "tools": tools, "response_format": form},
    st.builds(lambda turns: [message for turn in turns for message in turn], TURNS),
    st.none() | TOOLS,
    st.none() | st.just({"type": "json_object"}),
)


@settings(max_examples=200)
@given(CHATS, st.sampled_from(["", "gpt-4o", "claude-opus-4-7"]))
def test_nothing_that_the_schema_lets_through_raises(body: JSON, model: str):
    body = parse("chat", orjson.dumps(body)).body
    prompt = Prompt.read(body, "chat")
    assert prompt.extra >= 0
    assert prompt.estimate(model) >= 0
    assert prompt.at_most(model) > 0


@given(st.lists(st.text(max_size=50), max_size=30), st.integers(1, 40))
def test_a_meter_counts_about_as_the_whole_text(pieces: list[str], times: int):
    text = "".join(pieces) * times
    meter = Meter("gpt-4o")
    for piece in pieces * times:
        meter.add(piece)
    assert meter.tokens == pytest.approx(estimate_text(text, "gpt-4o"), rel=0.1, abs=3)


def test_a_meter_takes_words_in_pieces():
    meter = Meter("gpt-4o")
    for letter in PROSE * 100:
        meter.add(letter)
    assert meter.tokens == pytest.approx(estimate_text(PROSE * 100, "gpt-4o"), rel=0.02)
    assert Meter("gpt-4o").tokens == 0
