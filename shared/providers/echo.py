"""The labelled `demo/echo` model: OpenAI's wire format from within the process, for a first run without any key."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import httpx
import orjson

from shared import sse
from shared.schema import JSON

PACE = 0.02
"""Seconds between words: slow enough to be seen streaming."""
LABEL = "[demo/echo: no provider key is set] You said: "


class EchoTransport(httpx.AsyncBaseTransport):
    """Answers `POST demo://echo/chat/completions` with the last user message, word by word when streamed."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body: JSON = orjson.loads(await request.aread())
        if not request.url.path.endswith("/chat/completions"):
            error = {"error": {"message": "demo/echo only chats.", "type": "invalid_request_error", "code": None}}
            return httpx.Response(400, stream=httpx.ByteStream(orjson.dumps(error)))
        words = re.findall(r"\S+\s*", LABEL + _last_user_text(body))
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        if body.get("stream"):
            stream = _Words(words, usage)
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=stream)
        message = {"role": "assistant", "content": "".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = orjson.dumps({"model": "echo", "choices": [choice], "usage": usage})
        return httpx.Response(200, headers={"content-type": "application/json"}, stream=httpx.ByteStream(whole))


class _Words(httpx.AsyncByteStream):
    def __init__(self, words: list[str], usage: JSON) -> None:
        self._words = words
        self._usage = usage

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for word in self._words:
            yield sse.encode({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            await asyncio.sleep(PACE)
        finish: JSON = {"index": 0, "delta": {}, "finish_reason": "stop"}
        yield sse.encode({"choices": [finish], "usage": self._usage}) + sse.DONE


def _last_user_text(body: JSON) -> str:
    content = next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", f"[{part['type']}]") for part in content)
