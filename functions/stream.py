"""Lambda, streamed answers: the runtime loop, for neither Python's official runtime nor Mangum can stream.

`functions/bootstrap` starts this in place of the managed runtime. One event loop lives as long as the process, so that
connections to providers stay warm; the next event is asked for when all work on the last one is done, lest the platform
freezes it half-done. Should Python's own runtime learn to stream, this file and `runtime.py` can go.
"""

from __future__ import annotations

import asyncio
import gc
import io
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from functions.runtime import MAX_PRELUDE, Invocation, RefusedError, RuntimeAPI, Stream, prelude

if TYPE_CHECKING:  # at run time only once errors can be reported
    from starlette.types import ASGIApp, Message

    from functions.secrets import Current
    from shared.errors import GatewayError

MARGIN = 3.0
"""Seconds before the platform's deadline at which an answer ends, so that its record can still be written."""
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
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._stream and not self._ended:
            if body := message.get("body"):
                self._last = body
                self._stream.write(body)
            if not message.get("more_body"):
                self._end()
            elif asyncio.get_running_loop().time() < self._patience:
                await self._stream.drain()

    async def _begin(self, message: Message) -> None:
        from shared.errors import GatewayError

        head = prelude(message["status"], message["headers"])
        if len(head) > MAX_PRELUDE:
            raise GatewayError("The headers of the answer are larger than the platform allows.")
        self._events = any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
        )
        self._stream = await self._api.respond(self._id, self._lost)
        self._stream.write(head)

    def _end(self, error: BaseException | None = None) -> None:
        assert self._stream is not None
        self._ended = True
        self._stream.end(error)

    async def fail(self, error: BaseException, told: GatewayError | None = None) -> None:
        """End in the one way that is left: an error to the platform or `told` to the caller; a last event, a trailer."""
        from functions.responses import JSONBytes
        from shared import sse
        from shared.errors import GatewayError

        if self._stream is None and told is None:
            await self._api.failed(f"invocation/{self._id}", error)
        elif self._stream is None and told is not None:
            refusal = JSONBytes(told.body(), status_code=told.status, headers=told.headers)
            await refusal({"type": "http"}, self.receive, self.send)
        elif self._stream and not self._ended:
            if self._events and not self._last.endswith(sse.DONE):  # nobody behind API Gateway sees a trailer
                self._stream.write(sse.encode((told or GatewayError("The gateway failed to go on.")).body()))
            self._end(error)

    async def closed(self) -> None:
        """Wait until the platform has it all; only then may the next event be asked for."""
        from shared.telemetry import logger

        if self._stream and (trouble := await self._stream.taken()):
            logger.error("answer.not_taken", extra={"invocation": self._id, "reason": trouble})


class Runtime:
    """`clock` is the wall's: the event loop's may stand still while the process is frozen."""

    def __init__(
        self,
        api: RuntimeAPI,
        app: ASGIApp,
        current: Current,
        *,
        parallel: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._app = app
        self._current = current
        self._parallel = parallel
        self._clock = clock
        self._busy = 0
        self._rested = clock()

    async def serve(self) -> None:
        """Forever; raises RefusedError when the platform is gone. Several events at a time where it hands them out:
        https://docs.aws.amazon.com/lambda/latest/dg/runtimes-custom.html#runtimes-custom-managed-instances"""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._parallel):
                group.create_task(self._one_after_the_other())

    async def restored(self) -> None:
        """In an environment made from a snapshot, as many others were: nothing random or connected may be shared."""
        random.seed()
        await self._current.forget_connections()

    async def _one_after_the_other(self) -> None:
        while True:
            invocation = await self._api.next()
            if self._busy == 0:
                await self._wake()
            self._busy += 1
            try:
                await self._handle(invocation)
            finally:
                self._busy -= 1
                self._rested = self._clock()

    async def _wake(self) -> None:
        """After a rest, connections to providers may be dead without our having seen it."""
        from shared.upstream import IDLE_SECONDS

        if not 0 <= self._clock() - self._rested <= IDLE_SECONDS:
            await self._current.forget_connections()

    async def _handle(self, invocation: Invocation) -> None:
        from functions import events
        from functions.responses import JSONBytes
        from shared.errors import GatewayError, UpstreamTimeout
        from shared.telemetry import logger

        if self._parallel == 1:  # a process has one environment: with several events there is no telling whose it is
            os.environ["_X_AMZN_TRACE_ID"] = invocation.trace or ""
        now = asyncio.get_running_loop().time()
        deadline = now + invocation.deadline - time.time()
        app, scope, body = self._app, {"type": "http"}, b""
        try:
            if request := events.read(invocation.event):
                scope, body = request
                streamed, whole = deadline - MARGIN, min(deadline - MARGIN, now + SILENCE)
                scope["state"] = {"deadlines": {True: streamed, False: whole}}
            else:
                app = JSONBytes({})  # a schedule that keeps us warm, a test button: nothing to do, and no error
        except GatewayError as refused:
            app = JSONBytes(refused.body(), status_code=refused.status)
        answer = Answer(self._api, invocation.id, body, deadline - LAST_MOMENT)
        try:
            async with asyncio.timeout_at(deadline - LAST_MOMENT):
                await app(scope, answer.receive, answer.send)
        except RefusedError:
            raise
        except GatewayError as refused:
            await answer.fail(refused, refused)
        except TimeoutError as late:
            await answer.fail(late, UpstreamTimeout("The answer took longer than the platform allows."))
        except Exception as crash:
            logger.exception("crash", extra={"invocation": invocation.id})
            await answer.fail(crash)
        await answer.closed()


def prepared(api: RuntimeAPI, environ: Mapping[str, str]) -> Runtime:
    """What every event needs; nothing is connected to, and no secret read, before the first one."""
    from functions.app import assemble
    from functions.secrets import Current

    current = Current(environ)
    parallel = int(environ.get("AWS_LAMBDA_MAX_CONCURRENCY") or 1)
    return Runtime(api, assemble(current.settings, current), current, parallel=parallel)


async def run(api: RuntimeAPI, environ: Mapping[str, str]) -> int:
    """Init, restore where this environment will be a snapshot, then events. Returns only if init or restore failed."""
    what = "init"
    try:
        runtime = prepared(api, environ)
        gc.enable()
        gc.freeze()  # all this is here to stay
        if environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start":
            what = "restore"
            await api.restored()
            await runtime.restored()
    except Exception as error:  # noqa: BLE001 whatever it is, the platform is told
        traceback.print_exc()
        await api.failed(what, error, str(error) if isinstance(error, ValueError | ImportError) else None)
        return 1
    await runtime.serve()
    return 0


def main() -> int:
    gc.disable()  # until all is there: what imports make is no garbage, and looking for some is a tenth of the start
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a metric that is not out by the next event may be frozen in
    return asyncio.run(run(RuntimeAPI(os.environ["AWS_LAMBDA_RUNTIME_API"]), os.environ))


if __name__ == "__main__":
    sys.exit(main())
