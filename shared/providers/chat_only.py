"""Providers without OpenAI's legacy completions: the prompt is asked as one user message, the answer told as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers.answers import text_choice
from shared.providers.dialect import Decoder, Dialect, Outgoing, Piece, Translate, guarded
from shared.providers.parameters import refuse, told, unsupported
from shared.schema import JSON, Call

LEGACY = ("prompt", "best_of", "echo", "suffix", "logprobs")


class ChatOnly:
    """A dialect that is asked for chats and, if the row says so, for embeddings only; what it reads is guarded."""

    def __init__(self, inner: Dialect) -> None:
        self._inner = inner

    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        if call.surface == "embeddings" and not to.provider.has("embeddings", to.model):
            raise unsupported(to, "model", "makes no embeddings")
        if call.surface != "completions":
            return self._inner.request(call, to, max_tokens)
        _refuse(call, to)
        outgoing = self._inner.request(_as_chat(call), to, max_tokens)
        if call.body.get("logprobs") is None:  # chat's have another shape
            return outgoing
        return outgoing._replace(dropped=(*outgoing.dropped, *told(["logprobs"], call, to)))

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        piece = guarded(self._inner.completion)(_as_chat(call), to, body)
        return _as_text([piece])[0] if call.surface == "completions" else piece

    def stream(self, call: Call, to: Deployment) -> Translate:
        translate = guarded(self._inner.stream(_as_chat(call), to))
        return (lambda event, data: _as_text(translate(event, data))) if call.surface == "completions" else translate

    def decoder(self) -> Decoder:
        return self._inner.decoder()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        return self._inner.failure(status, headers, content)


def _refuse(call: Call, to: Deployment) -> None:
    body = call.body
    prompt: str | list[Any] = body["prompt"]
    if isinstance(prompt, list):
        if not isinstance(prompt[0], str):
            raise unsupported(to, "prompt", "takes text, not token ids")
        if len(prompt) != 1:
            raise unsupported(to, "prompt", "takes one prompt at a time")
    lacking = {name for name in ("suffix", "echo") if body.get(name)}
    if (body.get("best_of") or 1) > (body.get("n") or 1):
        lacking.add("best_of")
    refuse(call, to, lacking)


def _as_chat(call: Call) -> Call:
    if call.surface != "completions":
        return call
    prompt = call.body["prompt"]
    body = {name: value for name, value in call.body.items() if name not in LEGACY}
    body["messages"] = [{"role": "user", "content": prompt if isinstance(prompt, str) else prompt[0]}]
    return Call("chat", body)


def _as_text(pieces: list[Piece]) -> list[Piece]:
    """In place: `END` stays itself."""
    for body, _ in pieces:
        if "choices" in body:
            body["choices"] = [
                text_choice(choice, (choice.get("message") or choice["delta"]).get("content"), None)
                for choice in body["choices"]
            ]
    return pieces
