"""Every way a request can fail: status, type and code are the class, the message is for the caller."""

from __future__ import annotations

from math import ceil
from typing import Any, Literal, NamedTuple


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
    def retries(self) -> Again:
        """Whether the same deployment may be asked again, before any other is."""
        return FAULTS[self.fault].retries

    @property
    def falls_back(self) -> bool:
        """Whether the next deployment may be asked: no, where it would be refused for the same reason."""
        return FAULTS[self.fault].falls_back

    @property
    def wait(self) -> int:
        """Whole seconds, as a caller is told them."""
        return max(1, min(60, ceil(self.retry_after or 1)))

    def answer(self) -> GatewayError:
        """What the caller is told when this was the last attempt."""
        kind = FAULTS[self.fault].answer
        if issubclass(kind, RateLimited | Overloaded):
            return kind(self.message, retry_after=self.wait)
        if issubclass(kind, InvalidRequest):
            return kind(self.message, param=self.param, code=kind.code or self.code)
        return kind(self.message, headers={"x-should-retry": "false"} if self.fault in IN_VAIN else None)


Again = Literal["no", "once", "wait"]
"""`once`: after a moment; `wait`: once, after the `retry_after` that the provider named, should it be short."""


class Fault(NamedTuple):
    """Whether the same deployment may be asked again, whether the next may, and what the caller sees if none is left.

    A second try is for what certainly did no work, and for an error that a server calls its own."""

    retries: Again
    falls_back: bool
    answer: type[GatewayError]


IN_VAIN = frozenset({"too_large", "total_timeout"})
"""The same request would cost the same again, and come to the same end."""
FAULTS = {
    "connect": Fault("once", True, UpstreamUnavailable),
    "dns": Fault("no", True, UpstreamUnavailable),
    "tls": Fault("no", True, UpstreamUnavailable),
    "connect_timeout": Fault("no", True, UpstreamTimeout),
    "pool_timeout": Fault("no", True, Overloaded),
    "closed_before_headers": Fault("no", True, UpstreamUnavailable),
    "disconnected": Fault("no", True, UpstreamUnavailable),
    "first_content_timeout": Fault("no", True, UpstreamTimeout),
    "gap_timeout": Fault("no", True, UpstreamTimeout),
    "total_timeout": Fault("no", False, UpstreamTimeout),
    "protocol": Fault("no", True, UpstreamProtocolError),
    "redirect": Fault("no", True, UpstreamProtocolError),
    "content_type": Fault("no", True, UpstreamProtocolError),
    "decode": Fault("no", True, UpstreamProtocolError),
    "empty": Fault("no", True, UpstreamProtocolError),
    "too_large": Fault("no", False, UpstreamProtocolError),
    "bad_request": Fault("no", False, InvalidRequest),
    "body_too_large": Fault("no", False, BodyTooLarge),
    "context": Fault("no", True, ContextLengthExceeded),
    "policy": Fault("no", False, ContentPolicyViolation),
    "auth": Fault("no", True, UpstreamAuthError),
    "money": Fault("no", True, UpstreamAuthError),
    "model_gone": Fault("no", True, ModelNotFound),
    "rate_limit": Fault("wait", True, RateLimited),
    "overloaded": Fault("wait", True, Overloaded),
    "not_now": Fault("once", True, Overloaded),
    "server": Fault("once", True, UpstreamError),
    "error_in_200": Fault("once", True, UpstreamError),
}
