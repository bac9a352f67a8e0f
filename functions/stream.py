"""Lambda, streamed answers: an event in, its answer out as it comes, by the same app; Mangum can only answer whole.

`runtime.py` asks for the events and `events.py` makes requests of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message

from functions import events
from functions.app import assemble
from functions.responses import JSONBytes
from functions.runtime import MAX_PRELUDE, Invocation, RefusedError, RuntimeAPI, Stream, prelude
from functions.secrets import Current
from shared import sse
from shared.errors import GatewayError, UpstreamTimeout
from shared.telemetry import logger

MARGIN = 3.0
"""Seconds before the platform's deadline at which an answer ends: its record can then still be written, and its money
settled, should the store have a bad moment."""
LAST_MOMENT = 2.0
"""Seconds before it at which what is still going on, such as waiting for a caller who does not read, is cut."""
SILENCE = 290.0
"""Seconds that a whole answer may take: API Gateway gives up after 300 without a byte.
https://docs.aws.amazon.com/apigateway/latest/developerguide/response-transfer-mode.html"""


class Answer:
    """The ASGI side of one event: what the app receives, and sends. `patience` is when a slow reader is waited for no
    more, in the event loop's time."""

    def __init__(self, api: RuntimeAPI, request_id: str, body: bytes, patience: float) -> None:
        self._api = api
        self._id = request_id
        self._body: bytes | None = body
        self._patience = patience
        self._lost = asyncio.Event()
        self._stream: Stream | None = None
        self._events = False
        self._last = b""
        self._ended = False

    async def receive(self) -> Message:
        """The body; then nothing: a caller who hangs up is not told of, only the platform's own end.

        https://docs.aws.amazon.com/lambda/latest/dg/configuration-response-streaming.html"""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._lost.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._ended:
            return
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._stream:
            if body := message.get("body"):
                self._last = body
                self._stream.write(body)
            if not message.get("more_body"):
                self._end(self._stream)
            elif asyncio.get_running_loop().time() < self._patience:
                await self._stream.drain()

    async def _begin(self, message: Message) -> None:
        head = prelude(message["status"], message["headers"])
        if len(head) > MAX_PRELUDE:
            logger.error("answer.headers_too_large", extra={"invocation": self._id, "bytes": len(head)})
            await self._refuse(GatewayError("The headers of this answer are larger than the platform allows."))
            self._lost.set()  # to the app it is as if the caller had hung up
            return
        self._events = any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
        )
        self._stream = await self._api.respond(self._id, self._lost)
        self._stream.write(head)

    def _end(self, stream: Stream, error: BaseException | None = None) -> None:
        self._ended = True
        stream.end(error)

    async def _refuse(self, error: GatewayError) -> None:
        refusal = JSONBytes(error.body(), status_code=error.status, headers=error.headers)
        await refusal({"type": "http"}, self.receive, self.send)

    async def fail(self, error: BaseException, told: GatewayError | None = None) -> None:
        """End, unless it has ended, in what way is left: as an answer of its own, `told` to the caller or an error to
        the platform; else by one last event, and a trailer."""
        if self._ended:
            return
        if self._stream:
            if self._events and not self._last.endswith(sse.DONE):  # nobody behind API Gateway sees a trailer
                self._stream.write(sse.encode((told or GatewayError("The gateway failed to go on.")).body()))
            self._end(self._stream, error)
        elif told:
            await self._refuse(told)
        else:
            await self._api.failed(f"invocation/{self._id}", error)

    async def closed(self) -> None:
        """Wait until the platform has it all; only then may the next event be asked for."""
        if self._stream and (trouble := await self._stream.taken()):
            logger.error("answer.not_taken", extra={"invocation": self._id, "reason": trouble})


class Handler:
    """`alone`: it is given one event at a time."""

    def __init__(self, api: RuntimeAPI, app: ASGIApp, current: Current, *, alone: bool = True) -> None:
        self._api = api
        self._app = app
        self._current = current
        self._alone = alone

    async def __call__(self, invocation: Invocation) -> None:
        """Answer one event, and do all the work that it brings; never raises, for the next one is no worse."""
        if self._alone:  # there is one environment: of several events, nobody could say whose trace this is
            os.environ["_X_AMZN_TRACE_ID"] = invocation.trace or ""
        try:
            await self._answer(invocation)
        except RefusedError as refused:
            logger.error("answer.not_taken", extra={"invocation": invocation.id, "reason": str(refused)})

    async def restored(self) -> None:
        """In an environment made from a snapshot, as others were too: nothing random or connected may be shared."""
        random.seed()
        await self._current.forget_connections()

    async def _answer(self, invocation: Invocation) -> None:
        now = asyncio.get_running_loop().time()
        deadline = now + invocation.deadline - time.time()
        app, scope, body = self._app, {"type": "http"}, b""
        try:
            if request := events.read(invocation.event):
                scope, body = request
                streamed = deadline - MARGIN
                scope["state"] = {"deadlines": {True: streamed, False: min(streamed, now + SILENCE)}}
            else:
                app = JSONBytes({})  # a schedule that keeps us warm, a test button: nothing to do, and no error
        except GatewayError as refused:
            app = JSONBytes(refused.body(), status_code=refused.status)
        answer = Answer(self._api, invocation.id, body, deadline - LAST_MOMENT)
        try:
            async with asyncio.timeout_at(deadline - LAST_MOMENT):
                await app(scope, answer.receive, answer.send)
            await answer.fail(RuntimeError("the app did not finish its answer"))
        except TimeoutError as late:
            await answer.fail(late, UpstreamTimeout("The answer took longer than the platform allows."))
        except RefusedError:
            raise
        except Exception as crash:  # noqa: BLE001 it is logged; the next event is no worse
            logger.exception("crash", extra={"invocation": invocation.id})
            await answer.fail(crash)
        await answer.closed()


def prepared(api: RuntimeAPI, environ: Mapping[str, str], parallel: int) -> Handler:
    """All that an event needs but connections and secrets. Raises ValueError where the settings are wrong."""
    current = Current(environ)
    return Handler(api, assemble(current.settings, current), current, alone=parallel == 1)
