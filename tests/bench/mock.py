"""A provider that costs next to nothing: answers made once, one `asyncio.Protocol`, no parsing beyond the framing.

What it does is said by the first user text: `whole`, `one` (a stream of one chunk), `burst` (a stream of `CHUNKS`
chunks, all at once) or `paced` (the same, 5 to 20 ms apart).
"""

from __future__ import annotations

import asyncio
import json
import os
import re

CHUNKS = int(os.environ.get("BENCH_CHUNKS", "200"))
PACE = (0.005, 0.010, 0.015, 0.020)
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

FRAME = {"id": "chatcmpl-bench", "created": 1700000000, "model": "gpt-4o-mini", "system_fingerprint": "fp_0123456789"}
USAGE = {"prompt_tokens": 12, "completion_tokens": CHUNKS, "total_tokens": 12 + CHUNKS}
TEXT = " and so it goes on, a sentence of usual length"


def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event(json.dumps({**FRAME, "object": "chat.completion.chunk", "choices": [choice], "usage": None}).encode())


def event(data: bytes) -> bytes:
    line = b"data: %b\n\n" % data
    return b"%x\r\n%b\r\n" % (len(line), line)


def answer(kind: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


MESSAGE = {"role": "assistant", "content": TEXT * 6, "refusal": None}
CHOICE = {"index": 0, "message": MESSAGE, "logprobs": None, "finish_reason": "stop"}
COMPLETION = {**FRAME, "object": "chat.completion", "choices": [CHOICE], "usage": USAGE}
WHOLE = answer(b"application/json", json.dumps(COMPLETION).encode())
HEALTH = answer(b"text/plain", b"ok")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST, PIECE = chunk({"role": "assistant", "content": ""}), chunk({"content": TEXT})
USAGE_CHUNK = event(
    json.dumps({**FRAME, "object": "chat.completion.chunk", "choices": [], "usage": USAGE}).encode(),
)
LAST = chunk({}, "stop")
END = event(b"[DONE]") + b"0\r\n\r\n"


class Mock(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = LENGTH.search(head)
        if len(body) < (int(length[1]) if length else 0):
            return
        self.received = b""
        last = (USAGE_CHUNK if b"include_usage" in body else b"") + END
        if b'"paced"' in body:
            self.paced(0, last)
        elif b'"burst"' in body:
            self.transport.write(HEAD + FIRST + PIECE * CHUNKS + LAST + last)
        elif b'"one"' in body:
            self.transport.write(HEAD + FIRST + PIECE + LAST + last)
        else:
            self.transport.write(HEALTH if head.startswith(b"GET") else WHOLE)

    def paced(self, sent: int, last: bytes) -> None:
        if self.transport.is_closing():
            return
        if sent == CHUNKS:
            self.transport.write(LAST + last)
            return
        self.transport.write(PIECE if sent else HEAD + FIRST + PIECE)
        asyncio.get_running_loop().call_later(PACE[sent % len(PACE)], self.paced, sent + 1, last)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Mock, os.environ["HOST"], int(os.environ["PORT"]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
