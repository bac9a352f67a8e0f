"""Lambda, whole answers: the same app, by Mangum. `handler` is what the managed runtime calls."""

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
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)  # Mangum runs on the thread's own, and would make one where there is none
        current = Current(environ)
        app = assemble(current.settings, current)
        handlers: list[Any] = [Rest, FunctionURL]  # which Mangum's protocol takes at run time, not in its types
        self._mangum = Mangum(app, lifespan="off", custom_handlers=handlers)

    def __call__(self, event: Any, context: Any) -> JSON:
        """Events of API Gateway's are answered in its shape; others, such as a schedule's, by nothing."""
        if not is_http(event):
            return {}
        asyncio.set_event_loop(self._loop)
        try:
            return self._mangum(event, context)
        except InvalidRequest as refused:
            body = orjson.dumps(refused.body()).decode()
            headers = {"content-type": "application/json", "cache-control": "no-store"}
            return {"statusCode": refused.status, "headers": headers, "body": body, "isBase64Encoded": False}


handler = Handler(os.environ)
