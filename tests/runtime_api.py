"""The Lambda Runtime API on loopback, as strict as AWS: what it would refuse is refused, and kept in `violations`.

    async with RuntimeAPI() as api, process(api, environ, log):
        event = api.invoke({"httpMethod": "GET", ...})     # handed out to whoever asks for the next event
        async for piece in event.pieces(): ...             # the body as it comes; event.prelude is there by then
        await event.over.wait()                            # answered, failed or cut
        assert not api.violations

Rules: https://docs.aws.amazon.com/lambda/latest/dg/runtimes-custom.html#runtimes-custom-response-streaming, and
internal/lambda/rapi of https://github.com/aws/aws-lambda-runtime-interface-emulator.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.server import ROOT

PREFIX = "/2018-06-01/runtime"
MAX_PRELUDE = 16384
DELIMITER = bytes(8)
PRELUDE = {"statusCode": int, "headers": dict, "multiValueHeaders": dict, "cookies": list}
ERROR_TYPE, ERROR_BODY = "lambda-runtime-function-error-type", "lambda-runtime-function-error-body"
ARN = "arn:aws:lambda:us-east-1:123456789012:function:lightrail-test-stream"
REQUEST = re.compile(r"(GET|POST) (/\S+) HTTP/1\.1")
FORBIDDEN = re.compile(r"[\r\n\0]")  # in no header: https://www.rfc-editor.org/rfc/rfc9110#section-5.5
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}\r\n")


class RefusedError(Exception):
    """What AWS would answer with this status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(f"{status} {why}")
        self.status = status
        self.why = why


@dataclass
class Event:
    """One invocation. `chunks` are the body's, prelude aside, with the moment of each; `error` was posted instead.

    While `reading` is not set, nobody reads the answer, as if its caller had fallen asleep."""

    id: str
    payload: bytes
    deadline: float
    trace: str
    prelude: Any = None
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    trailers: dict[str, str] = field(default_factory=dict)
    error: Any = None
    begun: bool = False
    truncated: bool = False
    taken_at: float = 0.0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    writer: asyncio.StreamWriter | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.chunks)

    @property
    def fault(self) -> Any:
        """What the error trailer says."""
        return json.loads(base64.b64decode(self.trailers[ERROR_BODY])) if ERROR_BODY in self.trailers else None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body's chunks as they come; an empty one first, when the prelude has."""
        told, seen = False, 0
        while not self.over.is_set() or self.prelude is not None:
            if self.prelude is not None and not told:
                told = True
                yield b""
            for _, data in self.chunks[seen:]:
                seen += 1
                yield data
            if self.over.is_set() and seen == len(self.chunks):
                return
            self._news.clear()
            await self._news.wait()

    def tell(self) -> None:
        self._news.set()

    def end(self) -> None:
        self.over.set()
        self.tell()


class RuntimeAPI:
    """`parallel` events at a time. With `snapshot`, `restore` must be called before events are handed out. `whole`
    takes answers in one piece too, as Lambda does of functions that nobody asked to stream."""

    def __init__(self, parallel: int = 1, *, snapshot: bool = False, whole: bool = False) -> None:
        self.parallel = parallel
        self.whole = whole
        self.snapshot = snapshot
        self.violations: list[str] = []
        self.init_error: Any = None
        self.restore_error: Any = None
        self.events: dict[str, Event] = {}
        self.asked = 0
        self.waiting = 0
        self._snapshot_taken = asyncio.Event()
        self._restored = asyncio.Event()
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def invoke(
        self, event: Any, seconds: float = 900.0, trace: str = "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700"
    ) -> Event:
        """Queue an event, as it is if it is bytes; the platform ends it after so many `seconds`."""
        number = len(self.events) + 1
        payload = event if isinstance(event, bytes) else json.dumps(event).encode()
        made = Event(f"00000000-0000-4000-8000-{number:012}", payload, seconds, trace)
        made.reading.set()
        self.events[made.id] = made
        self._queue.put_nowait(made)
        return made

    def refuse(self) -> None:
        """Refuse whoever waits for an event, as in a bad moment; it is among the `violations`, too."""
        self._queue.put_nowait(None)

    async def snapshot_taken(self) -> None:
        await self._snapshot_taken.wait()

    def restore(self) -> None:
        """A new environment out of the snapshot."""
        self._restored.set()

    def hang_up(self, event: Event) -> None:
        """Stop listening to an answer under way, as at a deadline."""
        assert event.writer
        event.writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            while head := await _head(reader):
                try:
                    status, headers, body = await self._answer(head, reader, writer)
                except RefusedError as refused:
                    self.violations.append(str(refused))
                    said = {"errorType": "Refused", "errorMessage": refused.why}
                    status, headers, body = refused.status, {"Connection": "close"}, json.dumps(said).encode()
                lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json"]
                lines += [f"{name}: {value}" for name, value in headers.items()]
                if len(body) > 2048:  # as Go's server does it where no length was said
                    framed = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (2048, body[:2048], len(body) - 2048, body[2048:])
                    writer.write("\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode() + framed)
                else:
                    writer.write("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
                await writer.drain()
                if headers.get("Connection"):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the runtime has ended, or hung up, which `Event.truncated` tells; or all is over
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(
        self, head: tuple[str, str, dict[str, str]], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[int, dict[str, str], bytes]:
        method, path, headers = head
        if headers.get("host") != self.address or not path.startswith(PREFIX):
            raise RefusedError(404, f"not this API's: {path} of {headers.get('host')}")
        match method, path.removeprefix(PREFIX).split("/")[1:]:
            case "GET", ["invocation", "next"]:
                return await self._next(reader)
            case "GET", ["restore", "next"]:
                return await self._restore()
            case "POST", [("init" | "restore") as what, "error"]:
                error = await _error(headers, reader)
                if self.asked or (what == "restore" and not self.snapshot):
                    raise RefusedError(403, f"{what} error once events are asked for")
                setattr(self, f"{what}_error", error)
                return 202, {}, b'{"status":"OK"}'
            case "POST", ["invocation", request_id, "error"]:
                event = self._running(request_id)
                event.error = await _error(headers, reader)
                event.end()
                return 202, {}, b'{"status":"OK"}'
            case "POST", ["invocation", request_id, "response"]:
                event = self._running(request_id)
                event.begun, event.writer = True, writer
                try:
                    if self.whole and "lambda-runtime-function-response-mode" not in headers:
                        body = await reader.readexactly(int(headers["content-length"]))
                        event.chunks.append((time.monotonic(), body))
                    else:
                        await _stream(event, headers, reader)
                except asyncio.IncompleteReadError:
                    event.truncated = True
                    raise
                finally:
                    event.end()
                return 202, {"Connection": "close"}, b'{"status":"OK"}'
            case _:
                raise RefusedError(404, f"unknown: {method} {path}")

    async def _next(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
        if self.snapshot and not self._restored.is_set():
            raise RefusedError(403, "events are asked for before the snapshot is taken")
        unanswered = [event for event in self.events.values() if event.taken_at and not event.over.is_set()]
        self.asked += 1
        self.waiting += 1
        if len(unanswered) + self.waiting > self.parallel:
            self.waiting -= 1
            raise RefusedError(403, f"one more event is asked for while {len(unanswered)} are not answered")
        try:
            event = await self._queue.get()
        finally:
            self.waiting -= 1
        if event is None:
            raise RefusedError(500, "the platform has a bad moment")
        event.taken_at = time.monotonic()
        headers = {
            "Lambda-Runtime-Aws-Request-Id": event.id,
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + event.deadline) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": ARN,
            "Lambda-Runtime-Trace-Id": event.trace,
        }
        return 200, headers, event.payload

    async def _restore(self) -> tuple[int, dict[str, str], bytes]:
        if not self.snapshot or self.asked:
            raise RefusedError(403, "there is no snapshot to be restored from")
        self._snapshot_taken.set()
        await self._restored.wait()
        return 200, {}, b""

    def _running(self, request_id: str) -> Event:
        event = self.events.get(request_id)
        if event is None or not event.taken_at:
            raise RefusedError(400, f"unknown request id {request_id}")
        if event.begun or event.over.is_set():
            raise RefusedError(403, f"{request_id} is answered, or being answered, already")
        return event


@contextmanager
def process(
    api: RuntimeAPI, environ: Mapping[str, str], log: Path, root: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """The streaming function as Lambda starts it: by its exec wrapper, given the managed runtime's own command."""
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONWARNINGS": "error",
        "AWS_LAMBDA_RUNTIME_API": api.address,
        "AWS_LAMBDA_FUNCTION_NAME": "lightrail-test-stream",
        "LAMBDA_TASK_ROOT": str(root),
        **environ,
    }
    command = [ROOT / "functions/bootstrap", sys.executable, "/var/runtime/bootstrap.py"]
    with log.open("ab") as output:
        started = subprocess.Popen(command, env=variables, cwd="/", stdout=output, stderr=subprocess.STDOUT)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


async def _head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]] | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.split("\r\n")[:-2]
    if not (request := REQUEST.fullmatch(first)):
        raise RefusedError(400, f"request line {first!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(": ")
        if not colon or name.lower() in headers:
            raise RefusedError(400, f"header line {line!r}")
        headers[name.lower()] = value
    return request[1], request[2], headers


async def _error(headers: dict[str, str], reader: asyncio.StreamReader) -> Any:
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return checked_error(headers.get(ERROR_TYPE), body)


def checked_error(error_type: str | None, body: bytes) -> Any:
    """`{errorType, errorMessage, stackTrace}`, its type also in the header or trailer."""
    try:
        error = json.loads(body)
        fits = error["errorType"] == error_type and isinstance(error["errorMessage"], str)
        fits = fits and all(isinstance(line, str) for line in error["stackTrace"])
    except (ValueError, KeyError, TypeError):
        fits, error = False, None
    if not fits or not re.fullmatch(r"[A-Z]\w*\.[A-Z]\w*", error_type or ""):
        raise RefusedError(400, f"no error report: {error_type} {body!r}")
    return error


async def _stream(event: Event, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
    """Read a streamed answer to its end; raises RefusedError as soon as one rule is broken."""
    wanted = {
        "content-type": "application/vnd.awslambda.http-integration-response",
        "lambda-runtime-function-response-mode": "streaming",
        "transfer-encoding": "chunked",
    }
    for name, value in wanted.items():
        if headers.get(name) != value:
            raise RefusedError(400, f"{name}: {headers.get(name)!r}, not {value!r}")
    if "content-length" in headers:
        raise RefusedError(400, "a length, although it is chunked")
    declared = {name.strip().lower() for name in headers.get("trailer", "").split(",")}
    opening = b""
    while size := await _chunk_size(reader):
        await event.reading.wait()
        data = await reader.readexactly(size + 2)
        if data[-2:] != b"\r\n":
            raise RefusedError(400, "a chunk longer than it said")
        now, data = time.monotonic(), data[:-2]
        if event.prelude is None:
            opening += data
            end = opening.find(DELIMITER)
            if (end < 0 and len(opening) > MAX_PRELUDE) or end + len(DELIMITER) > MAX_PRELUDE:
                raise RefusedError(400, f"no delimiter within {MAX_PRELUDE} bytes")
            if end < 0:
                continue
            event.prelude, data = checked_prelude(opening[:end]), opening[end + len(DELIMITER) :]
        if data:
            event.chunks.append((now, data))
        event.tell()
    if event.prelude is None:
        raise RefusedError(400, "it ended before the delimiter")
    trailers: dict[str, str] = {}
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        name, _, value = line.decode("ascii").strip().partition(": ")
        trailers[name.lower()] = value
    if (trailers and set(trailers) != {ERROR_TYPE, ERROR_BODY}) or not set(trailers) <= declared:
        raise RefusedError(400, f"trailers {sorted(trailers)}, of which {sorted(declared)} are declared")
    if trailers:
        checked_error(trailers[ERROR_TYPE], base64.b64decode(trailers[ERROR_BODY], validate=True))
    event.trailers = trailers


async def _chunk_size(reader: asyncio.StreamReader) -> int:
    line = await reader.readuntil(b"\r\n")
    if not CHUNK_SIZE.fullmatch(line):
        raise RefusedError(400, f"chunk size {line!r}")
    return int(line, 16)


def checked_prelude(text: bytes) -> Any:
    """`{statusCode, headers, multiValueHeaders, cookies}`, each optional, and nothing else."""
    try:
        prelude = json.loads(text)
        fits = isinstance(prelude, dict) and all(isinstance(value, PRELUDE[name]) for name, value in prelude.items())
        strings = [*prelude.get("headers", {}).values(), *prelude.get("cookies", ())]
        strings += [value for values in prelude.get("multiValueHeaders", {}).values() for value in values]
    except (ValueError, KeyError, AttributeError):
        fits, prelude, strings = False, None, []
    if not fits or not all(isinstance(value, str) and not FORBIDDEN.search(value) for value in strings):
        raise RefusedError(400, f"prelude {text!r}")
    return prelude
