"""A stand-in for API Gateway's REST front, with the routes of infra/functions.yml: clients to it, events from it.

    async with APIGateway(runtime_api, api_handler) as gateway:
        OpenAI(base_url=f"{gateway.url}/v1", ...)          # gateway.url ends in the stage

STREAM routes become events of the Lambda Runtime API, whose answers leave chunk by chunk; the rest goes to a handler
that answers whole. What API Gateway would not take from a function is a 502, as there. Shapes:
https://docs.aws.amazon.com/apigateway/latest/developerguide/set-up-lambda-proxy-integrations.html and
https://docs.aws.amazon.com/apigateway/latest/developerguide/response-transfer-mode-lambda.html
"""

from __future__ import annotations

import asyncio
import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml

from functions.api import Handler
from tests.runtime_api import RuntimeAPI
from tests.server import ROOT

STAGE = "prod"
MAX_EVENT = 6 * 1024 * 1024
FAILED = {"error": {"message": "Internal server error", "type": "internal_error", "param": None, "code": None}}
Head = tuple[str, str, list[tuple[str, str]]]


class APIGateway:
    """`seconds` is the streaming function's timeout. `api` is closed in the end."""

    def __init__(self, runtime: RuntimeAPI, api: Handler | None = None, seconds: float = 900.0) -> None:
        functions = yaml.safe_load((ROOT / "infra/functions.yml").read_text())
        routes = [event["http"] for event in functions["stream"]["events"] if "http" in event]
        self.streamed = {route["path"] for route in routes if route["response"]["transferMode"] == "STREAM"}
        self.runtime = runtime
        self.api = api
        self.seconds = seconds
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(1)  # one environment: one event at a time

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/{STAGE}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        if self.api:
            await asyncio.get_running_loop().run_in_executor(self._threads, self.api.close)
        self._threads.shutdown()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            while head := await _head(reader):
                length = next((int(value) for name, value in head[2] if name.lower() == "content-length"), 0)
                await self._answer(head, await reader.readexactly(length), writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client hung up, of which nobody tells the function; or all is over
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, head: Head, body: bytes, writer: asyncio.StreamWriter) -> None:
        event = rest_event(*head, body)
        if len(json.dumps(event)) > MAX_EVENT:
            writer.write(whole(413, [], json.dumps({"message": "Request Too Long"}).encode()))
        elif event["path"].strip("/") in self.streamed:
            await self._stream(event, writer)
        else:
            assert self.api, f"{event['path']} is no route of the streaming function"
            loop = asyncio.get_running_loop()
            said = await loop.run_in_executor(self._threads, self.api, event, None)
            writer.write(buffered(said))
        await writer.drain()

    async def _stream(self, request: Any, writer: asyncio.StreamWriter) -> None:
        event = self.runtime.invoke(request, self.seconds)
        begun, length = False, False
        async for piece in event.pieces():
            if not begun:
                begun = True
                headers = headers_of(event.prelude)
                length = any(name.lower() == "content-length" for name, _ in headers)
                framing = [] if length else [("Transfer-Encoding", "chunked")]
                writer.write(opening(event.prelude.get("statusCode", 200), [*headers, *framing]))
            if piece:
                writer.write(piece if length else b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        if not begun:
            writer.write(whole(502, [], json.dumps(FAILED).encode()))
        elif event.truncated:
            writer.transport.abort()
        elif not length:
            writer.write(b"0\r\n\r\n")  # error trailers stay with the platform


async def _head(reader: asyncio.StreamReader) -> Head | None:
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    except asyncio.IncompleteReadError:
        return None
    pairs = (line.partition(":") for line in lines)
    method, target, _ = first.split(" ")
    return method, target, [(name, value.strip()) for name, _, value in pairs]


def rest_event(method: str, target: str, headers: list[tuple[str, str]], body: bytes = b"") -> dict[str, Any]:
    """A request as REST APIs hand it to functions: version 1, text as it is, all else in base64."""
    parts = urlsplit(target)
    path = parts.path.removeprefix(f"/{STAGE}") or "/"
    query = parse_qsl(parts.query, keep_blank_values=True)
    try:
        text, encoded = body.decode(), False
    except UnicodeDecodeError:
        text, encoded = base64.b64encode(body).decode(), True
    return {
        "resource": "/{proxy+}",
        "path": unquote(path),
        "httpMethod": method,
        "headers": dict(headers),
        "multiValueHeaders": several(headers),
        "queryStringParameters": dict(query) or None,
        "multiValueQueryStringParameters": several(query) or None,
        "pathParameters": {"proxy": path.strip("/")},
        "stageVariables": None,
        "requestContext": {
            "resourcePath": "/{proxy+}",
            "httpMethod": method,
            "path": parts.path,
            "stage": STAGE,
            "protocol": "HTTP/1.1",
            "identity": {"sourceIp": "127.0.0.1", "userAgent": dict(headers).get("user-agent")},
            "requestId": "c6af9ac6-7b61-11e6-9a41-93e8deadbeef",
        },
        "body": text or None,
        "isBase64Encoded": encoded,
    }


def url_event(
    method: str, target: str, headers: list[tuple[str, str]], body: bytes = b"", cookies: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A request as function URLs hand it over: version 2.0, repeated headers joined, cookies apart, always base64."""
    parts = urlsplit(target)
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": parts.path,
        "rawQueryString": parts.query,
        "cookies": list(cookies),
        "headers": {name.lower(): ",".join(values) for name, values in several(headers).items()},
        "requestContext": {
            "http": {"method": method, "path": parts.path, "protocol": "HTTP/1.1", "sourceIp": "127.0.0.1"},
            "domainName": "abc.lambda-url.us-east-1.on.aws",
            "requestId": "c6af9ac6-7b61-11e6-9a41-93e8deadbeef",
            "stage": "$default",
        },
        "body": base64.b64encode(body).decode(),
        "isBase64Encoded": True,
    }


def several(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return found


def headers_of(answer: Any) -> list[tuple[str, str]]:
    """Headers from a prelude or from a whole answer; a name in both maps counts in `multiValueHeaders`."""
    repeated = answer.get("multiValueHeaders") or {}
    single = [(name, value) for name, value in (answer.get("headers") or {}).items() if name not in repeated]
    many = [(name, value) for name, values in repeated.items() for value in values]
    return [*single, *many, *(("set-cookie", value) for value in answer.get("cookies") or ())]


def buffered(answer: Any) -> bytes:
    """A whole answer; what is not in API Gateway's shape is a 502."""
    fits = isinstance(answer, dict) and isinstance(answer.get("statusCode"), int)
    if not fits or not all(isinstance(value, str) for _, value in headers_of(answer)):
        return whole(502, [], json.dumps(FAILED).encode())
    text = answer.get("body") or ""
    body = base64.b64decode(text, validate=True) if answer.get("isBase64Encoded") else text.encode()
    headers = [(name, value) for name, value in headers_of(answer) if name.lower() != "content-length"]
    return whole(answer["statusCode"], headers, body)


def whole(status: int, headers: list[tuple[str, str]], body: bytes) -> bytes:
    return opening(status, [*headers, ("Content-Length", str(len(body)))]) + body


def opening(status: int, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")
