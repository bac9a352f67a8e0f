"""A light load generator: keep-alive connections, hand-written HTTP/1.1, answers checked only for being complete."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Self

END = b"0\r\n\r\n"
NUMBERS = count()


@dataclass(frozen=True)
class Target:
    """Where to send a load, and the bearer to send it with."""

    port: int
    key: str

    def request(self, what: str) -> bytes:
        """A chat request that tells the mock what to do; a `hit` is always the same, a `miss` never."""
        text = f"{what} {next(NUMBERS)}" if what == "miss" else what
        asked = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], "max_tokens": 300}
        if what in ("hit", "miss"):
            asked["cache"] = {"mode": "on"}
        elif what != "whole":
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Connection:
    """One keep-alive connection."""

    def __init__(self, target: Target) -> None:
        self.target = target

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.target.port, limit=2**22)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def whole(self, what: str = "whole") -> float:
        """Seconds to the whole answer; for a `hit` or a `miss` the gateway's cache is on."""
        sent = time.perf_counter()
        self.writer.write(self.target.request(what))
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        body = await self.reader.readexactly(int(length))
        if not head.startswith(b"HTTP/1.1 200 ") or b'"stop"' not in body:
            raise RuntimeError(f"not a completion: {head.decode()}{body.decode()[:500]}")
        return time.perf_counter() - sent

    async def stream(self, what: str) -> float:
        """Seconds to the first token; reads on to the end."""
        sent = time.perf_counter()
        self.writer.write(self.target.request(what))
        head = await self.reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 ") or b"chunked" not in head.lower():
            raise RuntimeError(f"not a stream: {head.decode()}")
        tail, first = b"", 0.0
        while not tail.endswith(END):
            piece = await self.reader.read(65536)
            if not piece:
                raise RuntimeError("a stream was cut")
            tail += piece
            if not first and b" and so it goes" in tail:
                first = time.perf_counter() - sent
            if first:
                tail = tail[-64:]
        if b"[DONE]" not in tail or not first:
            raise RuntimeError(f"a stream without its end: {tail!r}")
        return first


async def many(
    target: Target, total: int, concurrency: int, once: Callable[[Connection], Awaitable[float]]
) -> list[float]:
    """`total` exchanges over `concurrency` connections; what each `once` returned."""
    left = iter(range(total))
    took: list[float] = []

    async def one() -> None:
        async with Connection(target) as connection:
            took.extend([await once(connection) for _ in left])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, total)):
            group.create_task(one())
    return took
