"""A Lambda event as an ASGI request: Mangum's handlers, stricter where theirs guess or lose something.

They serve `stream`, whose answers are ours, and `api`, whose answers are Mangum's too. REST events (version 1):
https://docs.aws.amazon.com/apigateway/latest/developerguide/set-up-lambda-proxy-integrations.html; function URLs':
https://docs.aws.amazon.com/lambda/latest/dg/urls-invocation.html
"""

from __future__ import annotations

import base64
from typing import Any

import orjson
from mangum.handlers import APIGateway, HTTPGateway
from mangum.types import LambdaConfig, Scope

from shared.errors import InvalidRequest
from shared.schema import JSON

CONFIG = LambdaConfig(api_gateway_base_path="/", text_mime_types=[], exclude_headers=[])
WRONG = (ValueError, KeyError, TypeError, AttributeError)
"""What an event of another shape does to code that expects this one."""


class Rest(APIGateway):
    """Mangum joins repeated headers by commas, also those that must not be, and skips what is no base64."""

    @classmethod
    def infer(cls, event: JSON, context: Any, config: LambdaConfig) -> bool:
        return is_http(event) and event.get("version") != "2.0"

    @property
    def body(self) -> bytes:
        return body_of(self.event)

    @property
    def scope(self) -> Scope:
        try:
            scope = super().scope
            if many := self.event.get("multiValueHeaders"):
                scope["headers"] = [
                    (name.lower().encode(), value.encode()) for name, values in many.items() for value in values
                ]
        except WRONG as wrong:
            raise malformed("not a REST request") from wrong
        return checked(scope)


class FunctionURL(HTTPGateway):
    @classmethod
    def infer(cls, event: JSON, context: Any, config: LambdaConfig) -> bool:
        return is_http(event) and event.get("version") == "2.0"

    @property
    def body(self) -> bytes:
        return body_of(self.event)

    @property
    def scope(self) -> Scope:
        try:
            return checked(super().scope)
        except WRONG as wrong:
            raise malformed("not a function URL's request") from wrong


def read(data: bytes) -> tuple[Scope, bytes] | None:
    """Scope and body of the request that an event is; None for one that is no request. Raises InvalidRequest."""
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError as wrong:
        raise malformed("not JSON") from wrong
    if not is_http(event):
        return None
    kind = FunctionURL if FunctionURL.infer(event, None, CONFIG) else Rest
    request: Any = kind(event, None, CONFIG)  # pyright: ignore[reportArgumentType] the context is only passed on
    return request.scope, request.body


def checked(scope: Scope) -> Scope:
    if not (isinstance(scope["method"], str) and isinstance(scope["path"], str)):
        raise malformed("its method or path is no text")
    return scope


def is_http(event: Any) -> bool:
    """Whether it comes from API Gateway or a function URL, and not from a schedule or somebody's test button."""
    return isinstance(event, dict) and "requestContext" in event


def body_of(event: JSON) -> bytes:
    try:
        text = event.get("body") or ""
        return base64.b64decode(text, validate=True) if event.get("isBase64Encoded") else text.encode()
    except WRONG as wrong:
        raise malformed("its body cannot be decoded") from wrong


def malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The event is malformed: {why}.")
