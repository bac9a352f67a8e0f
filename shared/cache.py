"""Answers kept for the same request: in this process, and in the store for the others; and one call for many at once.

Exact: two requests are the same when everything is that may change the answer, and the key is the same. What is kept
are the provider's pieces, so that a replayed answer takes the same way to the caller as a live one.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import orjson

from shared.assembly import assembled, chunked
from shared.errors import StoreUnavailable, UpstreamTimeout
from shared.providers.dialect import Piece
from shared.schema import JSON, Call, Usage
from shared.store.base import MAX_NOTE, Store
from shared.telemetry import logger

TTL = 3600
"""Seconds for which an answer is kept where the request does not say."""
FRESH = 60
"""Seconds for which a process believes its own memory: what another process has asked anew is seen after that."""
MEMORY = 16 * 1024 * 1024
"""Bytes of answers that one process keeps."""
ENTRY = 500
"""Bytes that an answer takes beside its own."""
FLIGHTS = 2
"""Requests in flight that another one waits for, in turn: where two came to nothing, it goes alone."""
UNTOLD = frozenset(
    {"stream", "stream_options", "cache", "user", "metadata", "session_id", "store", "safety_identifier"}
)
"""Fields that change how an answer comes, or who is told of it, but not what it says."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One answer as its provider gave it: a `body`, or `chunks`, with choices alone; and who that was."""

    provider: str
    model: str
    usage: Usage
    dropped: tuple[str, ...] = ()
    body: JSON | None = None
    chunks: list[JSON] | None = None

    @classmethod
    def load(cls, data: bytes) -> Kept:
        doc: dict[str, Any] = orjson.loads(data)
        return cls(usage=Usage(**doc.pop("usage")), dropped=tuple(doc.pop("dropped")), **doc)

    def whole(self) -> Piece:
        return Piece(self.body if self.body is not None else assembled(self.chunks or ()), self.usage)

    def pieces(self) -> Iterator[Piece]:
        chunks = self.chunks if self.chunks is not None else [chunked(self.body or {})]
        for chunk in chunks[:-1]:
            yield Piece(chunk)
        yield Piece(chunks[-1], self.usage)


FORMAT = [each.name for kind in (Kept, Usage) for each in fields(kind)]
"""Part of each name, so that no version of the gateway reads what it does not understand."""


class Cache:
    """`lookup` for each request that wants it; everything else is the lookup's."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.clock = clock
        self.flights: dict[str, asyncio.Future[bytes | None]] = {}
        self._memory: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._size = 0

    def lookup(self, call: Call, key_id: str) -> Lookup | None:
        """None where the request does not want it."""
        wanted: JSON | None = call.body.get("cache")
        if wanted is None or wanted.get("mode") == "off":
            return None
        told = {name: value for name, value in call.body.items() if value is not None and name not in UNTOLD}
        text = orjson.dumps([FORMAT, call.surface, told], option=orjson.OPT_SORT_KEYS)
        name = f"CACHE#{key_id}#{hashlib.sha256(text).hexdigest()}"
        return Lookup(self, name, wanted.get("ttl") or TTL, anew=wanted.get("mode") == "refresh")

    def get(self, name: str) -> bytes | None:
        expires, data = self._memory.get(name, (0.0, b""))
        if expires <= self.clock():
            self._drop(name)
            return None
        self._memory.move_to_end(name)
        return data

    def put(self, name: str, data: bytes, expires: float) -> None:
        """Into memory, where the answers last used stay; one that the store would not take stays out, too."""
        self._drop(name)
        if len(data) > MAX_NOTE:
            return
        self._memory[name] = min(expires, self.clock() + FRESH), data
        self._size += len(data) + ENTRY
        while self._size > MEMORY:
            self._drop(next(iter(self._memory)))

    def _drop(self, name: str) -> None:
        if name in self._memory:
            self._size -= len(self._memory.pop(name)[1]) + ENTRY


class Lookup:
    """One request's way to a kept answer. `anew`: what is kept already is not for it."""

    def __init__(self, cache: Cache, name: str, ttl: int, *, anew: bool) -> None:
        self._cache = cache
        self._name = name
        self._ttl = ttl
        self.anew = anew
        self._found = None if anew else cache.get(name)
        self._flight: asyncio.Future[bytes | None] | None = None
        self._made: bytes | None = None

    @property
    def found(self) -> bool:
        return self._found is not None

    async def read(self) -> None:
        """Look in the store; one that fails has nothing."""
        try:
            note = await self._cache.store.note(self._name)
        except StoreUnavailable:
            return
        if note is not None:
            self._found = note.body
            self._cache.put(self._name, note.body, note.expires)

    async def reuse(self, deadline: float) -> Kept | None:
        """The kept answer, or that of the same request in flight, once it is there; None: go and get one.

        Whoever is told None leads, and others wait for its `land`; raises UpstreamTimeout at `deadline` (the loop's
        time)."""
        if self.anew:
            return None
        flights = self._cache.flights
        for _ in range(FLIGHTS):
            if found := self._found or self._cache.get(self._name):  # it may have come meanwhile
                return Kept.load(found)
            if (flight := flights.get(self._name)) is None:
                break
            try:
                async with asyncio.timeout_at(deadline):
                    landed = await asyncio.shield(flight)
            except TimeoutError:
                raise UpstreamTimeout("The same request, already on its way, was not answered in time.") from None
            if landed is not None:
                return Kept.load(landed)
        if self._name not in flights:
            flights[self._name] = self._flight = asyncio.get_running_loop().create_future()
        return None

    def land(self, kept: Kept | None) -> None:
        """The answer is whole, or will not come; only the first word counts."""
        if kept is not None:
            self._made = orjson.dumps(kept)
            self._cache.put(self._name, self._made, self._cache.clock() + self._ttl)
        flight, self._flight = self._flight, None
        if flight is not None:
            del self._cache.flights[self._name]
            flight.set_result(self._made)

    async def keep(self) -> None:
        """Keep what landed for other processes, too; it may fail, for it only saves money."""
        data, now = self._made, int(self._cache.clock())
        if data is None or len(data) > MAX_NOTE:
            return
        try:
            await self._cache.store.write_note(self._name, data, now + self._ttl, now)
        except StoreUnavailable as trouble:
            logger.warning("cache.unkept", extra={"reason": str(trouble)})
