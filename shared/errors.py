"""Every way a request can fail: status, type and code are the class, the message is for the caller."""

from __future__ import annotations

from typing import Any


class GatewayError(Exception):
    """The root; a message here reaches the caller, so nothing secret goes in."""

    status = 500
    type = "internal_error"
    code: str | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`: OpenAI's schema requires all four."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(GatewayError):
    """The request itself is wrong; `param` is OpenAI's path of the field, `code` OpenAI's own where it has one."""

    status, type, code = 400, "invalid_request_error", None


class UnsupportedParameter(InvalidRequest):
    """The deployment cannot do what the parameter means."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ContentPolicyViolation(InvalidRequest):
    code = "content_policy_violation"


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"


class BodyTooLarge(InvalidRequest):
    status, code = 413, "body_too_large"


class UnsupportedContentType(InvalidRequest):
    status, code = 415, "unsupported_content_type"


class InvalidKey(GatewayError):
    """Missing, malformed, unknown or deleted: the caller is not told which."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(GatewayError):
    """`code` says why: key_disabled, key_expired, insufficient_quota, model_not_allowed, model_not_priced, …"""

    status, type, code = 403, "permission_error", "permission_denied"


class NotFound(GatewayError):
    status, type, code = 404, "not_found_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class RateLimited(GatewayError):
    """A limit per minute or the number of open requests is used up; `retry_after` is in whole seconds."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, headers={"retry-after": str(retry_after), **(headers or {})})


class TooLargeForLimit(GatewayError):
    """This request could never pass the key's limit, so SDKs are told not to try again."""

    status, type, code = 429, "rate_limit_error", "request_too_large_for_limit"

    def __init__(self, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, headers={"x-should-retry": "false", **(headers or {})})


class UpstreamError(GatewayError):
    """A provider failed in a way that is not the caller's fault."""

    status, type, code = 502, "provider_error", "upstream_error"


class UpstreamUnavailable(UpstreamError):
    code = "upstream_unavailable"


class UpstreamProtocolError(UpstreamError):
    code = "upstream_protocol_error"


class UpstreamAuthError(UpstreamError):
    """The provider refused our own credential or account: never shown as the caller's 401, 402 or 403."""

    code = "upstream_auth_error"


class UpstreamTimeout(GatewayError):
    status, type, code = 504, "timeout_error", "upstream_timeout"


class Overloaded(GatewayError):
    status, type, code = 503, "overloaded_error", "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1, **more: Any) -> None:
        super().__init__(message, **more)
        self.headers.setdefault("retry-after", str(retry_after))


class StoreUnavailable(Overloaded):
    """Identity, permission and money fail closed, but a store fault is never shown as a bad key."""

    code = "store_unavailable"


class NoProvider(Overloaded):
    code = "no_provider"


class ProviderError(Exception):
    """One attempt at one deployment failed: `fault` names the row of `FAULTS`, `message` is cleaned for the caller.

    `retry_after` (seconds) is the provider's own wish, if it had one. `ambiguous`: the provider may have done, and
    billed, the work. `param` and `code` are the provider's, for refusals that are the caller's own fault.
    """

    def __init__(
        self,
        fault: str,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        ambiguous: bool = False,
    ) -> None:
        super().__init__(f"{fault}: {message}")
        self.fault = fault
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.ambiguous = ambiguous

    @property
    def falls_back(self) -> bool:
        """Whether the next deployment may be asked: no, where it would be refused for the same reason."""
        return FAULTS[self.fault][0]

    def answer(self) -> GatewayError:
        """What the caller is told when this was the last attempt."""
        kind = FAULTS[self.fault][1]
        if kind is RateLimited:
            return RateLimited(self.message, retry_after=max(1, min(60, round(self.retry_after or 1))))
        if issubclass(kind, InvalidRequest):
            return kind(self.message, param=self.param, code=kind.code or self.code)
        return kind(self.message)


FAULTS: dict[str, tuple[bool, type[GatewayError]]] = {
    # fault: (may the next deployment be asked, what the caller sees if none is left)
    "connect": (True, UpstreamUnavailable),
    "connect_timeout": (True, UpstreamTimeout),
    "pool_timeout": (True, Overloaded),
    "closed_before_headers": (True, UpstreamUnavailable),
    "disconnected": (True, UpstreamUnavailable),
    "first_content_timeout": (True, UpstreamTimeout),
    "gap_timeout": (True, UpstreamTimeout),
    "total_timeout": (False, UpstreamTimeout),
    "protocol": (True, UpstreamProtocolError),
    "redirect": (True, UpstreamProtocolError),
    "content_type": (True, UpstreamProtocolError),
    "decode": (True, UpstreamProtocolError),
    "empty": (True, UpstreamProtocolError),
    "too_large": (False, UpstreamProtocolError),
    "bad_request": (False, InvalidRequest),
    "body_too_large": (False, BodyTooLarge),
    "context": (True, ContextLengthExceeded),
    "policy": (False, ContentPolicyViolation),
    "auth": (True, UpstreamAuthError),
    "money": (True, UpstreamAuthError),
    "model_gone": (True, ModelNotFound),
    "rate_limit": (True, RateLimited),
    "overloaded": (True, Overloaded),
    "server": (True, UpstreamError),
    "error_in_200": (True, UpstreamError),
}
