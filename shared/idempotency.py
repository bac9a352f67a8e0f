"""`Idempotency-Key`: who sends a request again gets the first one's answer, and pays once.

One conditional put before admission marks the request as running; the answer, as it was sent, takes the mark's place. A
request that did not end well leaves nothing: it may be tried again. The mark is named by the caller's whole key, so
that nobody else can find or block it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import orjson

from shared.errors import GatewayError, InvalidRequest, StoreUnavailable
from shared.generations import PREFIX
from shared.keys import Credential
from shared.schema import JSON
from shared.store.base import Store
from shared.telemetry import logger

MOST = 300_000
"""Bytes of an answer that are kept."""
KEEP = 86400
"""Seconds."""
MAX_KEY = 255
TRIES = 3


class InProgress(GatewayError):
    """The first request with this key is still running, or its answer was too long to keep."""

    status, type, code = 409, "invalid_request_error", "idempotency_in_progress"


class Replay(NamedTuple):
    """The first request's answer: its status, headers and bytes."""

    request_id: str
    status: int
    headers: Mapping[str, str]
    body: bytes


class Ticket:
    """A running request's right to be the first. What it answers is noted down until it is `kept`."""

    def __init__(self, store: Store, name: str, mark: JSON, clock: Callable[[], float]) -> None:
        self._store = store
        self._name = name
        self._mark = mark
        self._clock = clock
        self._body = bytearray()
        self._status = 200
        self._headers: Mapping[str, str] = {}

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status, self._headers = status, dict(headers)

    def add(self, data: bytes) -> None:
        if len(self._body) <= MOST:
            self._body += data

    async def keep(self) -> None:
        """The answer is whole: it stands for a day. An answer too long is not kept, but not made again either."""
        fits = len(self._body) <= MOST
        done = {**self._mark, "state": "done" if fits else "long", "status": self._status, "headers": self._headers}
        now = int(self._clock())
        body = orjson.dumps(done) + b"\n" + (self._body if fits else b"")
        try:
            await self._store.write_note(self._name, body, now + KEEP, now)
        except StoreUnavailable as trouble:
            logger.error("idempotency.unkept", extra={"id": self._mark["id"], "reason": str(trouble)})

    async def drop(self) -> None:
        """It came to nothing: the next one with the same key is the first again."""
        try:
            await self._store.drop_note(self._name)
        except StoreUnavailable as trouble:  # the mark expires by itself
            logger.warning("idempotency.undropped", extra={"id": self._mark["id"], "reason": str(trouble)})


class Idempotency:
    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def begin(
        self, given: str, credential: Credential, path: str, raw: bytes, request_id: str, seconds: float
    ) -> Ticket | Replay:
        """Be the first, or get the first's answer. `seconds`: how long the request may run at most.

        Raises InProgress, InvalidRequest where the same key came with another request, or StoreUnavailable."""
        if not (0 < len(given) <= MAX_KEY and given.isascii() and given.isprintable()):
            message = f"An Idempotency-Key is 1 to {MAX_KEY} printable ASCII characters."
            raise InvalidRequest(message, param="Idempotency-Key", code="invalid_value")
        whose = f"{credential.key_id}\n{credential.key_hash}\n{given}"
        name = f"IDEM#{credential.key_id}#{hashlib.sha256(whose.encode()).hexdigest()}"
        mark = {"id": request_id, "of": hashlib.sha256(f"{path}\n".encode() + raw).hexdigest(), "state": "running"}
        for _ in range(TRIES):
            now = int(self._clock())
            if await self._store.write_note(name, orjson.dumps(mark) + b"\n", now + int(seconds), now, over=0):
                return Ticket(self._store, name, mark, self._clock)
            if note := await self._store.note(name):
                return _first(note.body, mark)
        raise StoreUnavailable("The store cannot say whether this request was made before; please try again.")


def _first(note: bytes, mark: JSON) -> Replay:
    head, _, body = note.partition(b"\n")
    first: JSON = orjson.loads(head)
    if first["of"] != mark["of"]:
        message = "This Idempotency-Key was used with another request."
        raise InvalidRequest(message, param="Idempotency-Key", code="idempotency_mismatch")
    match first["state"]:
        case "running":
            message = "A request with this Idempotency-Key is still running."
            raise InProgress(message, headers={"retry-after": "1"})
        case "long":
            message = f"A request with this Idempotency-Key was answered, too long to be kept: {PREFIX}{first['id']}."
            raise InProgress(message, headers={"x-should-retry": "false"})
        case _:
            return Replay(first["id"], first["status"], first["headers"], body)
