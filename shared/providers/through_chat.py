"""Models without OpenAI's legacy completions: the prompt is asked as one user message, the answer told as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.providers.answers import text_choice
from shared.providers.dialect import Decoder, Dialect, Outgoing, Piece, Translate, guarded
from shared.providers.parameters import ours, refuse, told, unsupported
from shared.schema import JSON, Call, ChatRequest, CompletionRequest

LEGACY = frozenset({"prompt", "best_of", "echo", "suffix", "logprobs"})
CHATS = frozenset(ChatRequest.model_fields.keys() - CompletionRequest.model_fields.keys())
"""Parameters that legacy completions do not have, so that nobody has checked them."""


class ThroughChat:
    """A dialect that is asked for chats and, of the models that the row names, for embeddings and legacy completions.

    What it reads is guarded."""

    def __init__(self, inner: Dialect) -> None:
        self._inner = inner

    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        if call.surface == "embeddings" and not to.provider.has("embeddings", to.model):
            raise unsupported(to, "model", "makes no embeddings")
        if not _lacks(call, to):
            return self._inner.request(call, to, max_tokens)
        _refuse(call, to)
        outgoing = self._inner.request(_as_chat(call), to, max_tokens)
        lost = {"logprobs", *CHATS} - ours(call, to)  # chat's logprobs have another shape
        dropped = told(sorted(name for name in lost if call.body.get(name) is not None), call, to)
        return outgoing._replace(dropped=(*outgoing.dropped, *dropped))

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        read = guarded(self._inner.completion)
        return _as_text([read(_as_chat(call), to, body)])[0] if _lacks(call, to) else read(call, to, body)

    def stream(self, call: Call, to: Deployment) -> Translate:
        if not _lacks(call, to):
            return guarded(self._inner.stream(call, to))
        translate = guarded(self._inner.stream(_as_chat(call), to))
        return lambda event, data: _as_text(translate(event, data))

    def decoder(self) -> Decoder:
        return self._inner.decoder()

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        return self._inner.failure(status, headers, content)


def _lacks(call: Call, to: Deployment) -> bool:
    return call.surface == "completions" and not to.provider.has("completions", to.model)


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
    prompt = call.body["prompt"]
    body = {name: value for name, value in call.body.items() if name not in LEGACY | CHATS}
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
