"""A stand-in for API Gateway's REST front, as strict as AWS: clients to it, events from it.

    async with APIGateway(runtime_api, api_handler) as gateway:
        OpenAI(base_url=f"{gateway.url}/v1", ...)          # gateway.url ends in the stage

Its routes are those of infra/functions.yml, or any others, such as those of an API that was deployed. STREAM routes
become events of the Lambda Runtime API, whose answers leave chunk by chunk; the rest goes to a handler that answers
whole. What API Gateway would not take from a function is a 502, as there. Shapes:
https://docs.aws.amazon.com/apigateway/latest/developerguide/set-up-lambda-proxy-integrations.html and
https://docs.aws.amazon.com/apigateway/latest/developerguide/response-transfer-mode-lambda.html
Headers: https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-known-issues.html. Paths arrive as
they were sent, escapes and a slash at the end included, which counts for nothing where a route is looked for.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import yaml

from functions.api import Handler
from tests.runtime_api import RuntimeAPI
from tests.server import ROOT

STAGE = "prod"
MAX_EVENT = 6 * 1024 * 1024
Head = tuple[str, str, list[tuple[str, str]]]
KEPT_BACK = {"connection", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
REMAPPED = {"authorization", "connection", "content-md5", "date", "server", "user-agent", "www-authenticate"}
DROPPED = {"host", "proxy-authenticate", "te", "trailer", "transfer-encoding", "upgrade"}
"""Headers of requests that functions do not see; of answers, those that leave as `x-amzn-Remapped-…`, or not at all."""
ANSWER = {"statusCode", "headers", "multiValueHeaders", "body", "isBase64Encoded"}
RESOURCES: dict[str, Any] = yaml.safe_load((ROOT / "infra/resources.yml").read_text())["Resources"]
BINARY = "*/*" in RESOURCES["RestApi"]["Properties"].get("BinaryMediaTypes", ())
"""Whether bodies go through as they are; else they are text, whatever they were before."""


@dataclass(frozen=True)
class Route:
    """`path` as resources have it, such as `/v1/{proxy+}`; `method` may be ANY."""

    method: str
    path: str
    function: str
    streamed: bool

    def takes(self, method: str, path: str) -> dict[str, str] | None:
        """The path's parameters; None where it is another's."""
        if self.method not in (method, "ANY"):
            return None
        fixed, greedy, _ = self.path.partition("{proxy+}")
        if not greedy:
            return {} if path == self.path else None
        return {"proxy": path.removeprefix(fixed)} if path.startswith(fixed) and path != fixed else None


def written() -> list[Route]:
    """The routes of infra/functions.yml."""
    functions = yaml.safe_load((ROOT / "infra/functions.yml").read_text())
    return [
        Route(http["method"].upper(), f"/{http['path'].strip('/')}", name, "response" in http)
        for name, facts in functions.items()
        for event in facts["events"]
        if (http := event.get("http"))
    ]


def routed(routes: Sequence[Route], method: str, path: str) -> tuple[Route, dict[str, str]] | None:
    """The route that says most of the path."""
    path = path.rstrip("/") or "/"
    found = [(route, taken) for route in routes if (taken := route.takes(method, path)) is not None]
    return max(found, key=lambda each: ("{" not in each[0].path, len(each[0].path)), default=None)


def refusal(name: str, status: int | None = None) -> bytes:
    """What the platform answers by itself, by the GatewayResponse of that name in infra/resources.yml."""
    facts = RESOURCES[name]["Properties"]
    ((media, template),) = facts["ResponseTemplates"].items()
    headers = [(each.rpartition(".")[2], value.strip("'")) for each, value in facts["ResponseParameters"].items()]
    body = template.replace("$context.error.messageString", '"Bad Request"').encode()
    return whole(status or int(facts["StatusCode"]), [("Content-Type", media), *headers], body)


class APIGateway:
    """`seconds` is the streaming function's timeout. `api` is closed in the end."""

    def __init__(
        self,
        runtime: RuntimeAPI,
        api: Handler | None = None,
        seconds: float = 900.0,
        routes: Sequence[Route] | None = None,
    ) -> None:
        self.routes = written() if routes is None else routes
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
        method, target, _ = head
        stage, _, path = urlsplit(target).path.removeprefix("/").partition("/")
        found = routed(self.routes, method, f"/{path}") if stage == STAGE else None
        if found is None:
            writer.write(bodiless(method, refusal("UnknownUrl")))
        elif len(json.dumps(event := rest_event(*head, body, self.routes))) > MAX_EVENT:
            writer.write(bodiless(method, refusal("RequestTooLarge")))
        elif found[0].streamed:
            await self._stream(method, event, writer)
        else:
            assert self.api, f"{path} is no route of the streaming function"
            loop = asyncio.get_running_loop()
            said = await loop.run_in_executor(self._threads, self.api, event, None)
            writer.write(bodiless(method, buffered(said)))
        await writer.drain()

    async def _stream(self, method: str, request: Any, writer: asyncio.StreamWriter) -> None:
        event = self.runtime.invoke(request, self.seconds)
        begun, silent, length = False, method == "HEAD", False
        async for piece in event.pieces():
            if not begun:
                begun = True
                headers = headers_of(event.prelude)
                length = any(name.lower() == "content-length" for name, _ in headers)
                framing = [] if length else [("Transfer-Encoding", "chunked")]
                writer.write(opening(event.prelude.get("statusCode", 200), [*headers, *framing]))
            if piece and not silent:
                writer.write(piece if length else b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        if not begun:
            writer.write(bodiless(method, refusal("IntegrationFailure")))
        elif event.truncated:
            writer.transport.abort()
        elif not length and not silent:
            writer.write(b"0\r\n\r\n")  # error trailers stay with the platform


async def _head(reader: asyncio.StreamReader) -> Head | None:
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    except asyncio.IncompleteReadError:
        return None
    pairs = (line.partition(":") for line in lines)
    method, target, _ = first.split(" ")
    return method, target, [(name, value.strip()) for name, _, value in pairs]


def rest_event(
    method: str,
    target: str,
    headers: list[tuple[str, str]],
    body: bytes = b"",
    routes: Sequence[Route] | None = None,
) -> dict[str, Any]:
    """A request as REST APIs hand it to functions: version 1. `target` may have the stage before it."""
    parts = urlsplit(target)
    path = parts.path.removeprefix(f"/{STAGE}") or "/"
    found = routed(written() if routes is None else routes, method, path)
    assert found, f"no route takes {method} {path}"
    route, parameters = found
    query = parse_qsl(parts.query, keep_blank_values=True)  # decoded, other than the path
    seen = [(name, value) for name, value in headers if name.lower() not in KEPT_BACK]
    seen += [("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Port", "443"), ("X-Forwarded-Proto", "https")]
    text = base64.b64encode(body).decode() if BINARY else body.decode(errors="replace")
    return {
        "resource": route.path,
        "path": path,
        "httpMethod": method,
        "headers": dict(seen),
        "multiValueHeaders": several(seen),
        "queryStringParameters": dict(query) or None,
        "multiValueQueryStringParameters": several(query) or None,
        "pathParameters": parameters or None,
        "stageVariables": None,
        "requestContext": {
            "resourcePath": route.path,
            "httpMethod": method,
            "path": f"/{STAGE}{path}",
            "stage": STAGE,
            "protocol": "HTTP/1.1",
            "identity": {"sourceIp": "127.0.0.1", "userAgent": dict(headers).get("user-agent")},
            "requestId": "c6af9ac6-7b61-11e6-9a41-93e8deadbeef",
        },
        "body": text or None,
        "isBase64Encoded": bool(body) and BINARY,
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
    """Headers from a prelude or from a whole answer, as they leave; a name in both maps counts in the second."""
    repeated = answer.get("multiValueHeaders") or {}
    single = [(name, value) for name, value in (answer.get("headers") or {}).items() if name not in repeated]
    many = [(name, value) for name, values in repeated.items() for value in values]
    cookies = [("set-cookie", value) for value in answer.get("cookies") or ()]
    return [
        (f"x-amzn-Remapped-{name}" if name.lower() in REMAPPED else name, value)
        for name, value in (*single, *many, *cookies)
        if name.lower() not in DROPPED
    ]


def buffered(answer: Any) -> bytes:
    """A whole answer; what is not in API Gateway's shape, or too large, is a 502."""
    fits = isinstance(answer, dict) and answer.keys() <= ANSWER and isinstance(answer.get("statusCode"), int)
    fits = fits and isinstance(answer.get("body") or "", str) and len(json.dumps(answer)) <= MAX_EVENT
    if not fits or not all(isinstance(value, str) for _, value in headers_of(answer)):
        return refusal("Default5xx", 502)
    body = (answer.get("body") or "").encode()
    if answer.get("isBase64Encoded") and BINARY:
        try:
            body = base64.b64decode(body, validate=True)
        except binascii.Error:
            return refusal("Default5xx", 502)
    headers = [(name, value) for name, value in headers_of(answer) if name.lower() != "content-length"]
    return whole(answer["statusCode"], headers, body)


def bodiless(method: str, answer: bytes) -> bytes:
    """The answer, of which HEAD has the head alone."""
    head, end, body = answer.partition(b"\r\n\r\n")
    return head + end + (b"" if method == "HEAD" else body)


def whole(status: int, headers: list[tuple[str, str]], body: bytes) -> bytes:
    return opening(status, [*headers, ("Content-Length", str(len(body)))]) + body


def opening(status: int, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")
