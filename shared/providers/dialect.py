"""What a wire dialect is: pure translation between OpenAI's shapes and a provider's, without I/O.

`upstream` sends, times out, reads and parses for all dialects alike; a provider that speaks a dialect we have is a row
of data (providers.toml), a new dialect is one file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar

from shared.catalog import Deployment
from shared.errors import ProviderError
from shared.schema import JSON, Call, Usage


class Outgoing(NamedTuple):
    """A request to a provider. `dropped` names the caller's parameters that it cannot take.

    `region`: the AWS region for which the sender signs it, with the process's own role."""

    url: str
    headers: Mapping[str, str]
    content: bytes
    dropped: tuple[str, ...] = ()
    region: str | None = None


class Piece(NamedTuple):
    """A whole answer or one streamed chunk in OpenAI's shape, and the usage that came with it.

    Finish reasons are OpenAI's words; the provider's own stands in the choice as `native_finish_reason` where it
    differs. Reasoning text is `reasoning_content`. `id`, `created`, `object`, `model` are the gateway's to set."""

    body: JSON
    usage: Usage | None = None


Translate: TypeAlias = Callable[[str | None, JSON], list[Piece]]
"""One event of a stream (its SSE `event` name, its data) to the chunks it means; keeps the state of its one stream.

Raises ProviderError where the event is an error. `END` as its last piece says that the answer is complete, as OpenAI's
`[DONE]` does."""

END = Piece({})

P = ParamSpec("P")
T = TypeVar("T")


def guarded(read: Callable[P, T]) -> Callable[P, T]:
    """The same, but a body with a string where an object should be, and the like, raises ProviderError."""

    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (AttributeError, LookupError, TypeError, ValueError) as wrong:
            message = "The provider's answer is not in its documented shape."
            raise ProviderError("protocol", message, ambiguous=True) from wrong

    return reading


class Decoder(Protocol):
    """The framing of a stream: bytes in, events (name, data) out, whatever the cuts."""

    def feed(self, piece: bytes, /) -> Sequence[tuple[str | None, bytes]]:
        """The events that this piece completes; raises `sse.TooLong` or ProviderError."""
        ...


class Dialect(Protocol):
    def request(self, call: Call, to: Deployment, max_tokens: int | None) -> Outgoing:
        """Build the request; `max_tokens` is the gateway's own bound where the caller set none.

        Raises UnsupportedParameter for what changes the meaning and cannot be said to this provider."""
        ...

    def completion(self, call: Call, to: Deployment, body: JSON) -> Piece:
        """A whole answer in OpenAI's shape of the call's surface; raises ProviderError where it is none."""
        ...

    def stream(self, call: Call, to: Deployment) -> Translate:
        """A fresh translator for one stream."""
        ...

    def decoder(self) -> Decoder:
        """A fresh reader of the stream's framing."""
        ...

    def failure(self, status: int, headers: Mapping[str, str], content: bytes) -> ProviderError:
        """What a refusal means; its message is cleaned of keys, hosts and account ids, 500 characters at most."""
        ...
