"""Lambda, whole answers: the same app, by Mangum. `handler` is what the managed runtime calls.

Model routes are not here, however their paths are spelt: Mangum can neither stream nor end before the platform does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import orjson
from mangum import Mangum

from functions.app import assemble
from functions.events import FunctionURL, Rest, is_http
from functions.secrets import Current
from shared.errors import InvalidRequest
from shared.schema import JSON


class Handler:
    """One event loop for the life of the process, so that what is connected stays so."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._current = Current(environ)
        self._app = assemble(self._current.settings, self._current, asks_models=False)
        self._runner = asyncio.Runner()
        self._mangum: Mangum | None = None

    def __call__(self, event: Any, context: Any) -> JSON:
        """Events of API Gateway's are answered in its shape; others, such as a schedule's, by nothing."""
        if not is_http(event):
            return {}
        asyncio.set_event_loop(self._runner.get_loop())  # Mangum runs on the thread's own
        if self._mangum is None:
            handlers: list[Any] = [Rest, FunctionURL]  # they fit Mangum's protocol, though not its types
            self._mangum = Mangum(self._app, lifespan="off", custom_handlers=handlers)
        try:
            return self._mangum(event, context)
        except InvalidRequest as refused:
            body = orjson.dumps(refused.body()).decode()
            headers = {"content-type": "application/json", "cache-control": "no-store"}
            return {"statusCode": refused.status, "headers": headers, "body": body, "isBase64Encoded": False}

    def close(self) -> None:
        """Lambda just ends; elsewhere, connections and the event loop do."""
        self._runner.run(self._current.close())
        self._runner.close()


handler = Handler(os.environ)
