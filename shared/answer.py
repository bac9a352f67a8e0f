"""One answer on its way to the caller: whole or in chunks, always OpenAI's shape, with one honest end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from shared.assembly import assembled
from shared.cache import Kept
from shared.errors import GatewayError
from shared.exchange import Exchange, now
from shared.providers.dialect import Piece
from shared.schema import JSON, Usage
from shared.tokens import Meter

OF_THE_ANSWER = frozenset({"id", "object", "created", "model", "usage", "lightrail"})
"""Fields of a body that say which answer it is, not what it says."""
BESIDE = OF_THE_ANSWER | {"choices"}
REMEMBERED = 4 * 1024 * 1024
"""Bytes of a stream that are remembered: more than any store takes, and no provider fills the memory."""
TEXTS = ("content", "reasoning_content", "refusal")
STOP = ("stop", None)


class Answer:
    """Finish reasons are kept back until the end is certain, so that none is ever followed by an error.

    `started`: the caller was given content. `ended`: the last chunk, with usage, was given out. `length` is in
    characters."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        exchange.answer = self
        self.usage: Usage | None = None
        self._meter: Meter | None = None
        self.length = 0
        self.started = False
        self.ended = False
        self._said: list[bytes] | None = [] if exchange.remembers else None
        self._remembered = 0
        self._beside: JSON = {}
        self._body: JSON | None = None
        self._tells_usage = exchange.call.include_usage
        self._due = exchange.call.choices
        self._all = False
        self._finish: dict[int, tuple[str, str | None]] = {}
        self._seen: set[int] = set()
        chat = exchange.call.surface == "chat"
        self._head: JSON = {
            "id": exchange.id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(exchange.created),
            "model": exchange.call.model,
        }
        self._empty: JSON = {"delta": {}} if chat else {"text": ""}

    @property
    def whole(self) -> bool:
        """Every choice that was asked for has its finish reason, or the provider said that these were all."""
        return (
            bool(self._finish) and self._seen <= self._finish.keys() and (self._all or len(self._finish) >= self._due)
        )

    def all_said(self) -> None:
        """The provider said `[DONE]`: no further choice will come."""
        self._all = True

    @property
    def finish_reason(self) -> str | None:
        return self._finish[min(self._finish)][0] if self._finish else None

    @property
    def native_finish_reason(self) -> str | None:
        return self._finish[min(self._finish)][1] if self._finish else None

    def take(self, batch: list[Piece]) -> list[JSON]:
        """The chunks to pass on now; what is no content (usage, finish reasons, fillers) is noted."""
        chunks: list[JSON] = []
        for body, usage in batch:
            self.usage = usage or self.usage
            if choices := [choice for choice in body.get("choices", ()) if self._note(choice)]:
                body.pop("usage", None)
                body["choices"] = choices
                if self._said is not None:
                    self._remember(body, self._said)
                body |= self._head
                if self._tells_usage:
                    body["usage"] = None
                chunks.append(body)
        if chunks and not self.started:
            self.started = True
            self._exchange.first_content = now()
        return chunks

    def _remember(self, chunk: JSON, said: list[bytes]) -> None:
        """As bytes, a sixth of the objects' size; what stands beside the choices only where it is new."""
        beside = {name: value for name, value in chunk.items() if name not in BESIDE}
        data = orjson.dumps({**({} if beside == self._beside else beside), "choices": chunk["choices"]})
        self._beside = beside
        self._remembered += len(data)
        if self._remembered <= REMEMBERED:
            said.append(data)

    def _note(self, choice: JSON) -> bool:
        """Count a streamed choice, keep its finish reason back; False when nothing is left to show."""
        index: int = choice.setdefault("index", 0)
        reason, native = choice.get("finish_reason"), choice.pop("native_finish_reason", None)
        if reason and self._finish.get(index, STOP)[0] == "stop":  # which older Geminis say with every chunk
            self._finish[index] = (reason, native)
        choice["finish_reason"] = None
        first = index not in self._seen
        self._seen.add(index)
        delta = choice.get("delta")
        if delta is None:
            text = choice.setdefault("text", "")
            self._add(text)
            return bool(text or choice.get("logprobs"))
        if first:
            delta["role"] = "assistant"
        else:
            delta.pop("role", None)
        self._count(delta)
        return first or any(delta.values()) or bool(choice.get("logprobs"))

    def _count(self, message: JSON) -> None:
        for name in TEXTS:
            if text := message.get(name):
                self._add(text)
        for call in message.get("tool_calls") or ():
            function: JSON = call.get("function") or {}
            self._add(function.get("name") or "")
            self._add(function.get("arguments") or "")

    def _add(self, text: str) -> None:
        self.length += len(text)
        self.meter.add(text)

    @property
    def meter(self) -> Meter:
        """Made for the model that answers, which is known with its first content."""
        if self._meter is None:
            self._meter = Meter(self._exchange.deployment.model)
        return self._meter

    def cut_short(self) -> None:
        """Stop here for want of money: every choice that still ran ends with `length`."""
        self._all = True
        for index in self._seen:
            self._finish.setdefault(index, ("length", "budget"))

    def ending(self) -> list[JSON]:
        """The finish reasons, and, with the last chunk, usage, cost and who answered."""
        self.ended = True
        chunks = [
            {**self._head, "choices": [{"index": index, **self._empty, "logprobs": None, "finish_reason": reason}]}
            for index, (reason, _) in sorted(self._finish.items())
        ]
        if self._tells_usage:
            for chunk in chunks:
                chunk["usage"] = None
            chunks.append({**self._head, "choices": []})
        chunks[-1] |= {"usage": self._exchange.wire_usage(), "lightrail": self._exchange.lightrail()}
        return chunks

    @property
    def messages(self) -> list[JSON]:
        """What was said until now, by choice; needs `exchange.remembers`."""
        body = self._body or assembled(map(orjson.loads, self._said or ()))
        return [choice.get("message") or {} for choice in body.get("choices", ())]

    def kept(self) -> Kept | None:
        """What the cache may keep of a whole answer: nothing that is too long, or that this key's money cut short."""
        exchange = self._exchange
        cut = any(reason == "length" for reason, _ in self._finish.values())
        if self._remembered > REMEMBERED or (cut and exchange.key.has_money_limit and not exchange.call.max_tokens):
            return None
        kept = Kept(*exchange.answered_by, replace(exchange.usage, cost=None), exchange.dropped)
        if self._body is not None:
            body = {name: value for name, value in self._body.items() if name not in OF_THE_ANSWER}
            return replace(kept, body=body)
        finish = [
            {"index": index, **self._empty, "finish_reason": reason}
            for index, (reason, _) in sorted(self._finish.items())
        ]
        return replace(kept, chunks=[*map(orjson.loads, self._said or ()), {"choices": finish}])

    def error(self, error: GatewayError) -> JSON:
        """The error event that ends a stream instead."""
        return {**error.body(), "id": self._exchange.id, "lightrail": self._exchange.lightrail()}

    def completed(self, piece: Piece) -> JSON:
        """A whole answer's body, with OpenAI's required fields filled in."""
        body, exchange = piece.body, self._exchange
        self.usage, self.started = piece.usage, True
        exchange.first_content = now()
        for index, choice in enumerate(body.get("choices", ())):
            self._fill(index, choice)
        body |= self._head
        body["object"] = {"chat": "chat.completion", "completions": "text_completion"}.get(
            exchange.call.surface, "list"
        )
        body |= {"usage": exchange.wire_usage(), "lightrail": exchange.lightrail()}
        if self._said is not None:
            self._body = body
        return body

    def _fill(self, index: int, choice: JSON) -> None:
        index = choice.setdefault("index", index)
        reason = choice.get("finish_reason") or "stop"
        self._finish[index] = (reason, choice.pop("native_finish_reason", None))
        choice["finish_reason"] = reason
        choice.setdefault("logprobs", None)
        message: Any = choice.get("message")
        if message is None:
            self._add(choice.setdefault("text", ""))
            return
        message["role"] = "assistant"
        message.setdefault("content", None)
        message.setdefault("refusal", None)
        self._count(message)
