"""How many tokens a request or a text may be, without a tokenizer: an estimate for limits, an upper bound for money.

The weights and factors were fitted on 6,701 recorded answers: 2-7 % off in the median, under 25 % at the ninetieth
percentile, on text. What a provider reports is always preferred; this serves before it can, and for broken streams.
"""

from __future__ import annotations

import base64
import re
import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from math import inf
from typing import Any, TypeAlias, cast

import orjson

from shared.config import ConfigError, imported
from shared.schema import JSON, Surface
from shared.telemetry import logger


def _class(chars: str, letter: str) -> bytes:
    """A table for `bytes.translate`: these characters as one letter, all others as a dot."""
    return bytes(ord(letter) if chr(code) in chars else ord(".") for code in range(256))


_LETTERS = _class(string.ascii_letters, "a")
_DIGITS = _class(string.digits, "0")
_MARKS = string.punctuation.encode()
_LONG = tuple((b"." + b"a" * letters, weight) for letters, weight in ((8, 2.5), (12, 4)))
_CJK = re.compile("[\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]+")
_ACCENTED = re.compile("[\u00aa\u00b5\u00ba\u00c0-\u024f\u1e00-\u1eff]+")
_SCRIPTS = re.compile("[\u0250-\u1dff\u1f00-\u1fff\ua000-\ua95f\ua980-\uabff]+")  # letters and their marks
_OTHER_THAN_ASCII = re.compile("[^\x00-\x7f]+")


def weigh(text: str) -> float:
    """Tokens of OpenAI's o200k vocabulary, estimated; a few passes in C over the bytes, 2-4 ms for 100 KB.

    An ASCII word counts 1.07, and 0.083 for each letter beyond 7 (by steps); a started group of 3 digits 1.97; a run of
    newlines or of 2 or more blanks 0.97; a punctuation mark 0.32; a CJK character 0.98; a run of accented Latin letters
    0.21; a letter of another script 0.5; another symbol 1.19."""
    plain = b"." + text.encode("ascii", "replace")  # a "?" for each other character, so that words stay apart
    letters = plain.translate(_LETTERS)
    tokens = 1.07 * letters.count(b".a")
    for word, weight in _LONG:
        if not (found := letters.count(word)):
            break
        tokens += 0.083 * weight * found
    digits = plain.translate(_DIGITS)
    if b"0" in digits:
        digits = digits.replace(b"000", b"1").replace(b"00", b"1")
        tokens += 1.97 * (digits.count(b"1") + digits.count(b"0"))
    tokens += 0.97 * (_runs(plain, b"\n") + _runs(plain.replace(b"\t", b"  "), b"  "))
    marks = len(plain) - len(plain.translate(None, _MARKS)) - 1
    if not text.isascii():
        runs = _OTHER_THAN_ASCII.findall(text)
        other = " ".join(runs)
        cjk, scripts = _letters(_CJK, other), _letters(_SCRIPTS, other)
        accented = _ACCENTED.findall(other)
        symbols = len(other) - len(runs) + 1 - cjk - scripts - sum(map(len, accented))
        tokens += 0.98 * cjk + 0.5 * scripts + 0.21 * len(accented) + 1.19 * symbols
        marks -= len(other) - len(runs) + 1
    return tokens + 0.32 * marks


def _runs(plain: bytes, blank: bytes) -> int:
    """How often one or more of it come together, after the first byte."""
    return len(list(filter(None, plain.split(blank)))) - 1 + plain.endswith(blank)


def _letters(kind: re.Pattern[str], text: str) -> int:
    return sum(map(len, kind.findall(text)))


@dataclass(frozen=True, slots=True)
class Family:
    """One tokenizer, or near enough: whose model ids, and what turns a weight into its tokens.

    `base` tokens stand before every prompt; `tool_base` and `tool_factor` are for prompts with tools instead, where a
    provider's hidden prompt rules. `image` is the likely number for one image, `image_most` the largest that the
    provider documents. `count` may be another function, a real tokenizer for example; its factors are then 1."""

    name: str
    models: str
    factor: float
    tool_base: int
    tool_factor: float
    image: int = 1000
    image_most: int = 5000
    base: int = 0
    count: Callable[[str], float] = weigh


NEWER_CLAUDE = r"claude-[a-z]+-(?:4[-.](?:[7-9]|[1-9]\d)|[5-9])(?!\d)"
"""Opus 4.7 and later, and the 5 series: their tokenizer makes a third more of the same text."""

# Images, documented: OpenAI counts 85 + 170 for each of up to 8 tiles (1,445), gpt-4o-mini 2,833 + 5,667 (48,169),
# newer models up to 2,500 patches at up to 2.46 (https://developers.openai.com/api/docs/guides/images-vision);
# Anthropic 1,600, since Opus 4.7 4,784 (https://platform.claude.com/docs/en/build-with-claude/vision); Gemini 258 a
# tile or 2,240 at the highest resolution (https://ai.google.dev/gemini-api/docs/media-resolution); Pixtral 4,160;
# Qwen-VL 16,384.
_ROWS = (
    Family("openai 4o-mini", r"gpt-4o-mini", 1.00, 0, 0.85, 25_500, 48_200),
    Family("gpt-oss", r"gpt-oss", 1.00, 140, 0.90, base=65),  # the harmony format opens with a page of its own
    Family("openai cl100k", r"gpt-3\.5|gpt-35|gpt-4(?![.\do])|embedding-(?:3|ada)", 1.02, 0, 0.90, 765),
    Family("openai", r"gpt|chatgpt|(?<![a-z0-9])o[1-9](?![a-z0-9])|codex", 1.00, 0, 0.85, 765, 6_200),
    Family("claude", NEWER_CLAUDE, 1.58, 580, 1.70, 2_500),
    Family("claude to 4.6", r"claude", 1.15, 500, 1.35, 1_500),
    Family("gemini", r"gemini|gemma|learnlm", 1.06, 0, 0.75, 1_100),
    Family("mistral", r"mi[sx]tral|ministral|magistral|codestral|devstral|pixtral|voxtral", 1.12, 0, 1.25, 1_500),
    Family("deepseek", r"deepseek", 1.07, 220, 1.05),
    Family("qwen", r"qwen|qwq", 1.05, 100, 1.00, 1_300, 16_400),
    Family("llama", r"llama", 1.07, 600, 1.05),
    Family("grok", r"grok", 1.06, 80, 1.25, 1_000),
    Family("cohere", r"cohere|command|c4ai|aya", 1.08, 680, 2.05),
    Family("nova", r"nova", 1.02, 680, 0.75),
)
OTHER = Family("other", r"", 1.08, 350, 1.05, 1_000, 48_200)
"""A model that no row knows, or no model named: the middle of the rows, and the largest image."""


def simple(text: str) -> float:
    """A quarter of a token for each character of a run of ASCII, rounded up by run; one for any other character."""
    other = len(text) - sum(map(len, runs := _ASCII.findall(text)))
    return other + sum(-(-len(run) // 4) for run in runs)


_ASCII = re.compile("[\x00-\x7f]+")
Count: TypeAlias = Callable[[str], float]
_own: list[tuple[str, Family | Count]] = []


def use(estimators: Mapping[str, str]) -> None:
    """Count tokens as `gateway.toml` says: by a pattern of model ids the name of a row, `simple`, or a deployer's own
    `package.module:function`, which makes a number of a text. The first that fits. Raises ConfigError."""
    _own[:] = [(pattern.lower(), _estimator(name, f"estimators.{pattern}")) for pattern, name in estimators.items()]
    family_of.cache_clear()


def _estimator(name: str, where: str) -> Family | Count:
    rows = {row.name: row for row in (*_ROWS, OTHER)}
    if name in rows:
        return rows[name]
    if name == "simple":
        return simple
    if ":" not in name:
        raise ConfigError(
            f"{where}: there is no '{name}': name simple, {', '.join(rows)}, or \"package.module:function\""
        )
    return _checked(imported(name, where), where)


def _checked(count: Callable[[str], Any], where: str) -> Count:
    """The same function; for a text that it fails on, `weigh`. Raises ConfigError where it fails on any."""

    def number(text: str) -> float:
        counted = count(text)
        if not (isinstance(counted, int | float) and 0 <= counted < inf):
            raise ValueError(f"it returned {type(counted).__name__}, not a number of tokens")
        return counted

    def counted(text: str) -> float:
        try:
            return number(text)
        except Exception as wrong:  # noqa: BLE001 it is a stranger's, and an estimate is better than no answer
            logger.warning("estimator.failed", extra={"at": where, "reason": type(wrong).__name__})
            return weigh(text)

    try:
        number("Hello, 世界.")
    except Exception as wrong:
        raise ConfigError(f"{where}: {type(wrong).__name__}: {wrong}") from wrong
    return counted


@lru_cache(1024)
def family_of(model: str) -> Family:
    """What the deployer chose, else the first row whose `models`, a regular expression, is found in the model's id.

    A count of the deployer's own is one of text: images stay as they are."""
    name = model.lower()
    shipped = next((family for family in _ROWS if re.search(family.models, name)), OTHER)
    own = next((own for pattern, own in _own if fnmatchcase(name, pattern)), shipped)
    if isinstance(own, Family):
        return own
    return replace(shipped, factor=1.0, tool_base=0, tool_factor=1.0, base=0, count=own)


MESSAGE = 4
"""Tokens around each message in the common chat templates, and 3 to open the answer."""
MESSAGE_MOST = 16
"""With a name, an end-of-turn marker and a header of its own, no template needs more."""
HIDDEN_MOST = 800
"""What a provider puts before the first message: a date, a knowledge cutoff, the rules of a reasoning model. Recorded:
up to 720 (xAI, Cohere, Llama and Nova on Bedrock)."""
TOOLS_MOST = 1500
"""What tells a model how to call tools, beside the schemas: 290-800 at Anthropic, about 1,000 at Cohere."""
PAGE, PAGE_TEXT_MOST = 2000, 4000
"""A page of a PDF is its text and an image of it: 1,500-3,000 tokens of text at Anthropic
(https://platform.claude.com/docs/en/build-with-claude/pdf-support); in the estimate both together."""
PAGES_MOST = 100
"""Taken for a file that cannot be looked into; the most that Anthropic (to 200K context) accepts."""
AUDIO_BYTES, AUDIO_BYTES_MOST = 800, 16
"""Bytes of audio or video for a token. Likely: MP3 at 64 kbit/s, 10 tokens a second (OpenAI). At most: 32 a second
(Gemini, https://ai.google.dev/gemini-api/docs/audio) of speech at 6 kbit/s."""


@dataclass(slots=True)
class Prompt:
    """What of a body a model reads, taken apart in one walk; `read` makes it, the two methods count it.

    `extra` are bytes that providers may or may not show to the model (ids, fields of their own): only `at_most` counts
    them. `ids` are tokens that the caller counted out himself."""

    texts: list[str] = field(default_factory=list[str])
    tools: str = ""
    extra: int = 0
    messages: int = 0
    ids: int = 0
    images: int = 0
    pages: int = 0
    sound: int = 0

    @classmethod
    def read(cls, body: JSON, surface: Surface) -> Prompt:
        prompt = cls()
        if surface == "chat":
            prompt._chat(body)
        else:
            prompt._inputs(body["input" if surface == "embeddings" else "prompt"])
            if suffix := body.get("suffix"):
                prompt.texts.append(suffix)
            if surface == "completions":
                prompt.extra = HIDDEN_MOST  # it may be answered as a chat
        return prompt

    def estimate(self, model: str) -> int:
        """The likely number of tokens for this model."""
        family = family_of(model)
        tokens = family.count("\n".join((*self.texts, self.tools)) if self.tools else "\n".join(self.texts))
        if self.tools:
            tokens = family.tool_base + family.tool_factor * tokens
        else:
            tokens = family.base * (self.messages > 0) + family.factor * tokens
        tokens += MESSAGE * self.messages + 3 * (self.messages > 0) + self.ids
        return round(tokens + family.image * self.images + PAGE * self.pages + self.sound / AUDIO_BYTES)

    def at_most(self, model: str = "") -> int:
        """Tokens that the prompt does not exceed: byte-level vocabularies never make more tokens than bytes.

        What a provider adds by itself (search results, its own tools' turns) is not in the body and not in here."""
        tokens = sum(map(_bytes, self.texts)) + 2 * len(self.texts) + self.extra + self.ids  # 2: begin, end
        if self.messages:
            tokens += MESSAGE_MOST * self.messages + HIDDEN_MOST
        if self.tools:
            tokens += _bytes(self.tools) + TOOLS_MOST
        image = family_of(model).image_most
        return tokens + image * self.images + (image + PAGE_TEXT_MOST) * self.pages + self.sound // AUDIO_BYTES_MOST

    def _chat(self, body: JSON) -> None:
        for message in body["messages"]:
            self.messages += 1
            for name, value in message.items():
                if name == "content":
                    self._content(value)
                elif name in ("name", "refusal") and isinstance(value, str):
                    self.texts.append(value)
                elif name in ("tool_calls", "function_call") and value:
                    self._calls(cast("list[JSON]", value if isinstance(value, list) else [value]))
                elif name != "role" and value:
                    self.extra += len(orjson.dumps(value))
        tools = [tool for tool in (body.get("tools"), body.get("functions")) if tool]
        self.tools = orjson.dumps(tools).decode() if tools else ""
        for name in ("response_format", "prediction", "tool_choice"):
            if isinstance(value := body.get(name), dict):
                self.texts.append(orjson.dumps(value).decode())

    def _content(self, value: Any) -> None:
        if isinstance(value, str):
            self.texts.append(value)
        elif isinstance(value, list):
            for part in cast("list[Any]", value):
                self._part(part)
        elif value is not None:
            self._part(value)

    def _calls(self, calls: list[JSON]) -> None:
        """The name and arguments of each call; its id and whatever a provider hung on it (signatures) as extra."""
        for call in calls:
            function: JSON = call.get("function") or call
            said = [text for key in ("name", "arguments") if isinstance(text := function.get(key), str)]
            self.texts += said
            self.extra += len(orjson.dumps(call)) - sum(map(_bytes, said))  # never below 0: JSON only makes text longer

    def _part(self, part: Any) -> None:
        """A part of a message: text, image, sound, file, or a provider's own, whose strings are text."""
        match part:
            case {"type": "text", "text": str(text)}:
                self.texts.append(text)
            case {"type": "image_url" | "image" | "input_image"}:
                self.images += 1
            case {"type": "input_audio", "input_audio": {"data": str(data)}}:
                self.sound += len(data) * 3 // 4
            case {"type": "file", "file": {"file_data": str(data)}}:
                self._data(data)
            case {"type": "file"}:
                self.pages += PAGES_MOST
            case dict():
                for name, value in cast("JSON", part).items():
                    if (
                        name.endswith(_LINKS)
                        and isinstance(value, str)
                        and value.startswith(("data:", "http:", "https:"))
                    ):
                        self._data(value)
                    elif name in _OPAQUE:
                        self.extra += len(orjson.dumps(value))
                    else:
                        self._part(value)
            case list():
                for inner in cast("list[Any]", part):
                    self._part(inner)
            case str():
                self.texts.append(part)
            case _:
                self.extra += 24  # a number, or true, false, null

    def _data(self, value: str) -> None:
        """A data URI, an address, or a file's bare base64."""
        head, comma, data = value.partition(",")
        if head.startswith("data:image/"):
            self.images += 1
        elif head.startswith(("data:audio/", "data:video/")):
            self.sound += len(data) * 3 // 4
        elif head.startswith("data:text/"):
            self.extra += len(data)
        else:
            self.pages += PAGES_MOST if value.startswith("http") else pages(data if comma else value)

    def _inputs(self, value: Any) -> None:
        """A text, texts, token ids, or lists of token ids."""
        if isinstance(value, str):
            self.texts.append(value)
        elif isinstance(value, list) and value:
            inputs = cast("list[Any]", value)
            if isinstance(inputs[0], str):
                self.texts += inputs
            elif isinstance(inputs[0], list):
                self.ids += sum(map(len, inputs))
            else:
                self.ids += len(inputs)


_OPAQUE = frozenset({"type", "id", "signature", "data", "cache_control"})
"""Seldom shown to a model, and no words: they are in the upper bound alone."""
_LINKS = ("url", "uri", "data")
"""How the names of fields end that hold an address or a data URI."""
_PAGE = re.compile(rb"/Type\s*/Page(?![A-Za-z])")
_PACKED = re.compile(rb"/ObjStm.{0,400}?stream\r?\n", re.DOTALL)


def pages(data: str) -> int:
    """The pages of a PDF in base64, also of one that packs its page objects; `PAGES_MOST` more where it hides some."""
    try:
        raw = base64.b64decode(data)
    except ValueError:
        return PAGES_MOST
    found = len(_PAGE.findall(raw))
    for number, packed in enumerate(_PACKED.finditer(raw)):
        inflater = zlib.decompressobj()
        try:  # small bounds: an object stream is a few kilobytes, and this is nobody's way to burn our time
            found += len(_PAGE.findall(inflater.decompress(raw[packed.end() : packed.end() + 65_536], 262_144)))
        except zlib.error:
            return found + PAGES_MOST
        if not inflater.eof or number == 256:
            return found + PAGES_MOST
    return found or PAGES_MOST


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def estimate_text(text: str, model: str) -> int:
    """The likely number of tokens that this model makes of a text."""
    family = family_of(model)
    return round(family.factor * family.count(text))


def estimate_prompt(body: JSON, surface: Surface, model: str) -> int:
    """The likely number of prompt tokens of a checked body; for limits by the minute, and where no usage comes."""
    return Prompt.read(body, surface).estimate(model)


def at_most(body: JSON, surface: Surface, model: str = "") -> int:
    """A number that the prompt tokens of a checked body do not exceed; given a model, its own bound for images."""
    return Prompt.read(body, surface).at_most(model)


class Meter:
    """Counts a stream's text as it comes: pieces are joined to words before they are weighed, each byte once."""

    def __init__(self, model: str) -> None:
        self._family = family_of(model)
        self._weighed = 0.0
        self._rest = ""

    def add(self, text: str) -> None:
        self._rest += text
        if len(self._rest) > 1024:
            whole, blank, rest = self._rest.rpartition(" ")
            self._weighed += self._family.count(whole if blank else rest)
            self._rest = blank + rest if blank else ""

    @property
    def tokens(self) -> int:
        """So far; 0 only if nothing came."""
        return round(self._family.factor * (self._weighed + self._family.count(self._rest)))
