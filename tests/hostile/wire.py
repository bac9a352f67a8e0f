"""An HTTP/1.1 client that sends exactly the bytes it is given, and reads the answers strictly (h11)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import h11


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    ms: float = 0.0

    def header(self, name: str) -> str | None:
        values = [value for given, value in self.headers if given == name]
        assert len(values) <= 1, f"{name} twice: {values}"
        return values[0] if values else None

    @property
    def bytes(self) -> bytes:
        """All of it, to search in."""
        return "\n".join(f"{name}: {value}" for name, value in self.headers).encode() + b"\n\n" + self.body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of each `data:` line but `[DONE]`."""
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]


def request(method: str, target: bytes, headers: list[tuple[str, bytes]], body: bytes | None, host: str) -> bytes:
    """The request as bytes: Host first and Content-Length last, unless `headers` bring their own Host."""
    lines = [method.encode() + b" " + target + b" HTTP/1.1"]
    if not any(name.lower() == "host" for name, _ in headers):
        lines.append(b"Host: " + host.encode())
    lines += [name.encode() + b": " + value for name, value in headers]
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


async def ask(port: int, data: bytes, method: str = "GET", wait: float = 20.0) -> Answer:
    """Send one request and read its one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = time.perf_counter()
    try:
        writing = asyncio.create_task(write(writer, data))
        parser = parser_for(method)
        async with asyncio.timeout(wait):
            answer = await read_answer(parser, reader)
        assert answer, "the connection was closed without an answer"
        answer.ms = (time.perf_counter() - sent) * 1000
        writing.cancel()
        return answer
    finally:
        writer.close()


async def shout(port: int, data: bytes, wait: float = 5.0, quiet: float = 1.0) -> tuple[list[Answer], bool]:
    """Send raw bytes; the answers until the peer closes or stays `quiet` (seconds), and whether it closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received, closed = b"", False
    try:
        await write(writer, data)
        async with asyncio.timeout(wait):
            while not closed:
                piece = await asyncio.wait_for(reader.read(65536), quiet if received else wait)
                received, closed = received + piece, not piece
    except TimeoutError:
        pass
    except ConnectionError:
        closed = True
    finally:
        writer.close()
    return [answer async for answer in split(received)], closed


async def split(received: bytes) -> AsyncIterator[Answer]:
    """Every answer in what a connection brought."""
    over = asyncio.StreamReader()
    over.feed_eof()
    while received:
        parser = parser_for("GET")
        parser.receive_data(received)
        if answer := await read_answer(parser, over):
            yield answer
        received = parser.trailing_data[0]


async def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """A server may refuse and close before it has read all: its answer counts."""
    try:
        writer.write(data)
        await writer.drain()
    except ConnectionError:
        pass


def parser_for(method: str) -> h11.Connection:
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("host", "localhost")]))
    parser.send(h11.EndOfMessage())
    return parser


async def read_answer(parser: h11.Connection, reader: asyncio.StreamReader) -> Answer | None:
    """The next final answer, None at the end of the file; raises `h11.RemoteProtocolError` for a broken one."""
    answer: Answer | None = None
    while True:
        match parser.next_event():
            case h11.Response() as response:
                headers = [(name.decode(), value.decode("latin-1")) for name, value in response.headers]
                answer = Answer(response.status_code, headers, b"")
            case h11.Data() as data:
                assert answer
                answer.body += data.data
            case h11.EndOfMessage():
                return answer
            case h11.NEED_DATA:
                parser.receive_data(await receive(reader))
            case h11.ConnectionClosed() | h11.PAUSED:
                return None


async def receive(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(65536)
    except ConnectionError:
        return b""
