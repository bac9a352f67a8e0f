"""The life of the process that streams on Lambda: init, restore, then event after event from the Lambda Runtime API.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html and, for what streams,
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-custom.html#runtimes-custom-response-streaming; what these leave
open is as in AWS's own server, internal/lambda/rapi of https://github.com/aws/aws-lambda-runtime-interface-emulator.

`functions/bootstrap` starts it in place of Python's official runtime, which cannot stream; once that can, this goes.
Only the standard library is imported here: whatever else is missing from a package can still be reported.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from functions.stream import Handler

VERSION = "/2018-06-01/runtime"
STREAMING = (
    "Content-Type: application/vnd.awslambda.http-integration-response",
    "Lambda-Runtime-Function-Response-Mode: streaming",
    "Transfer-Encoding: chunked",
    "Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body",
)
MAX_PRELUDE = 16384
"""The delimiter after the prelude must have come by then, else API Gateway answers 500 in our place.
https://docs.aws.amazon.com/apigateway/latest/developerguide/response-transfer-mode-lambda.html"""
DELIMITER = bytes(8)
UNTOLD = "The gateway failed; its log says how."


class RefusedError(Exception):
    """The Runtime API did not take what was sent, or is gone."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """One event; `deadline`, when the platform ends it, is in seconds of the wall clock."""

    id: str
    deadline: float
    trace: str | None
    event: bytes


class RuntimeAPI:
    """`address` is `host:port`. Every call has a connection of its own, as the documents ask for streamed answers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._host, _, self._port = address.rpartition(":")

    async def next(self) -> Invocation:
        """Wait for an event, however long; the environment may be frozen meanwhile."""
        headers, body = await self._call("GET", "/invocation/next")
        deadline = int(headers["lambda-runtime-deadline-ms"]) / 1000
        request_id, trace = headers["lambda-runtime-aws-request-id"], headers.get("lambda-runtime-trace-id")
        return Invocation(request_id, deadline, trace, body)

    async def restored(self) -> None:
        """Wait while the snapshot is taken; returns in an environment that was restored from it."""
        await self._call("GET", "/restore/next")

    async def failed(self, what: str, error: BaseException, message: str | None = None) -> None:
        """Report an error instead of an answer; `what` is `init`, `restore` or `invocation/<id>`."""
        body, kind = description(error, message), f"Lambda-Runtime-Function-Error-Type: {error_type(error)}"
        await self._call("POST", f"/{what}/error", (kind, "Content-Type: application/json"), body)

    async def respond(self, request_id: str, lost: asyncio.Event) -> Stream:
        """Begin a streamed answer; after this, `failed` is no longer allowed for this event.

        `lost` is set when the platform stops listening before the end."""
        reader, writer = await self._connected()
        writer.write(self._head("POST", f"/invocation/{request_id}/response", STREAMING))
        return Stream(reader, writer, lost)

    async def _call(
        self, method: str, path: str, headers: Sequence[str] = (), body: bytes = b""
    ) -> tuple[Mapping[str, str], bytes]:
        reader, writer = await self._connected()
        try:
            writer.write(self._head(method, path, [*headers, f"Content-Length: {len(body)}"] if body else headers))
            writer.write(body)
            status, found, answer = await read_answer(reader)
        except (OSError, EOFError) as gone:
            raise RefusedError(f"{method} {path}: the Runtime API is gone") from gone
        finally:
            writer.close()
        if status >= 300:
            raise RefusedError(f"{method} {path}: {status} {answer[:500].decode(errors='replace')}")
        return found, answer

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_connection(self._host, int(self._port), limit=2**20)
        except OSError as gone:
            raise RefusedError(f"the Runtime API at {self._address} cannot be reached") from gone

    def _head(self, method: str, path: str, headers: Sequence[str]) -> bytes:
        lines = (f"{method} {VERSION}{path} HTTP/1.1", f"Host: {self._address}", *headers, "", "")
        return "\r\n".join(lines).encode()


class Stream:
    """A streamed answer under way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        self._writer = writer
        self._lost = lost
        self._ended = False
        self._reply = asyncio.ensure_future(self._listen(reader))

    def write(self, data: bytes) -> None:
        """One chunk, at once. An empty one would end the body."""
        if data and not self._lost.is_set():
            self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def drain(self) -> None:
        """Wait until a slow reader has caught up."""
        with suppress(ConnectionError):  # `lost` tells
            await self._writer.drain()

    def end(self, error: BaseException | None = None) -> None:
        """The last chunk; an error, which only the platform sees, goes into the trailers."""
        self._ended = True
        trailers = ""
        if error:
            told = base64.b64encode(description(error)).decode()
            trailers = (
                f"Lambda-Runtime-Function-Error-Type: {error_type(error)}\r\n"
                f"Lambda-Runtime-Function-Error-Body: {told}\r\n"
            )
        if not self._lost.is_set():
            self._writer.write(f"0\r\n{trailers}\r\n".encode())

    async def taken(self) -> str | None:
        """Wait until the platform has read it all; returns what it says against it, None being nothing."""
        try:
            status, _, body = await self._reply
        except (OSError, EOFError):
            return "the Runtime API closed the connection"
        finally:
            self._writer.close()
        return None if status == 202 else f"{status} {body[:500].decode(errors='replace')}"

    async def _listen(self, reader: asyncio.StreamReader) -> tuple[int, Mapping[str, str], bytes]:
        try:
            return await read_answer(reader)
        finally:
            if not self._ended:
                self._lost.set()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by their names in lower case, and body; raises EOFError for one that was cut."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.splitlines()[:-1]
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return int(first.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", "0")))
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return int(first.split()[1]), headers, bytes(body)


def prelude(status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """What API Gateway and function URLs make status and headers of, delimiter included.

    A header that repeats is one with commas, which means the same: function URLs know no `multiValueHeaders`. Cookies,
    which must not be joined, go by themselves."""
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    cookies = values.pop("set-cookie", [])
    told = {"statusCode": status, "headers": {name: ", ".join(given) for name, given in values.items()}}
    return json.dumps(told | {"cookies": cookies} if cookies else told, separators=(",", ":")).encode() + DELIMITER


def error_type(error: BaseException) -> str:
    return f"Runtime.{type(error).__name__}"


def description(error: BaseException, message: str | None = None) -> bytes:
    """`{errorType, errorMessage, stackTrace}`. An error's own words may quote what nobody should see: they go to the
    log, which leaves that out, and here only where the caller says so."""
    trace = [line.rstrip() for line in traceback.format_tb(error.__traceback__)]
    told = {"errorType": error_type(error), "errorMessage": message or UNTOLD, "stackTrace": trace}
    return json.dumps(told).encode()


async def serve(api: RuntimeAPI, handler: Handler, parallel: int) -> None:
    """Forever; raises RefusedError when the platform is gone. An event is asked for when all work on the last one is
    done, lest the platform freezes it half-done; several at a time where the platform hands them out so:
    https://docs.aws.amazon.com/lambda/latest/dg/runtimes-custom.html#runtimes-custom-managed-instances"""

    async def one_after_the_other() -> None:
        while True:
            answering = asyncio.ensure_future(handler(await api.next()))
            try:
                await asyncio.shield(answering)
            except asyncio.CancelledError:  # another one was refused an event: this ends what it is at
                await answering
                raise

    async with asyncio.TaskGroup() as group:
        for _ in range(parallel):
            group.create_task(one_after_the_other())


async def run(api: RuntimeAPI, environ: Mapping[str, str]) -> int:
    """Init, then restore where this environment becomes a snapshot, then events; returns only where that failed.

    One event loop for all, so that connections to providers stay warm."""
    what = "init"
    try:
        from functions.stream import prepared

        parallel = int(environ.get("AWS_LAMBDA_MAX_CONCURRENCY") or 1)
        handler = prepared(api, environ, parallel)
        gc.enable()
        gc.freeze()  # all this is here to stay
        if environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start":
            what = "restore"
            await api.restored()
            await handler.restored()
    except Exception as error:  # noqa: BLE001 whatever it is, the platform is told
        traceback.print_exc()
        await api.failed(what, error, str(error) if isinstance(error, ValueError | ImportError) else None)
        return 1
    await serve(api, handler, parallel)
    return 0


def main() -> None:
    gc.disable()  # what imports make is no garbage, and to look for some takes a tenth of the start
    sys.exit(asyncio.run(run(RuntimeAPI(os.environ["AWS_LAMBDA_RUNTIME_API"]), os.environ)))
