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
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from shared.assembly import assembled, chunked
from shared.errors import StoreUnavailable
from shared.providers.dialect import Piece
from shared.schema import JSON, Call, Usage
from shared.store.base import MAX_NOTE, Store
from shared.telemetry import logger

TTL = 3600
"""Seconds for which an answer is kept where the request does not say."""
MEMORY = 16 * 1024 * 1024
"""Bytes of answers that one process keeps."""
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
    body: JSON | None = None
    chunks: list[JSON] | None = None

    def dump(self) -> bytes:
        return orjson.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def load(cls, data: bytes) -> Kept:
        doc: dict[str, Any] = orjson.loads(data)
        return cls(usage=Usage(**doc.pop("usage")), **doc)

    def whole(self) -> Piece:
        return Piece(self.body if self.body is not None else assembled(self.chunks or ()), self.usage)

    def pieces(self) -> Iterator[Piece]:
        chunks = self.chunks if self.chunks is not None else [chunked(self.body or {})]
        for chunk in chunks[:-1]:
            yield Piece(chunk)
        yield Piece(chunks[-1], self.usage)


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
        text = orjson.dumps([call.surface, key_id, told], option=orjson.OPT_SORT_KEYS)
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
        self._drop(name)
        self._memory[name] = expires, data
        self._size += len(data)
        while self._size > MEMORY:
            self._drop(next(iter(self._memory)))

    def _drop(self, name: str) -> None:
        self._size -= len(self._memory.pop(name, (0.0, b""))[1])


class Lookup:
    """One request's way to a kept answer. `anew`: what is kept already is not for it."""

    def __init__(self, cache: Cache, name: str, ttl: int, *, anew: bool) -> None:
        self._cache = cache
        self._name = name
        self._ttl = ttl
        self._anew = anew
        self._found: bytes | None = None
        self._flight: asyncio.Future[bytes | None] | None = None
        self._made: bytes | None = None

    async def read(self) -> None:
        """Look in memory, then in the store; a store that fails has nothing."""
        if self._anew:
            return
        self._found = self._cache.get(self._name)
        if self._found is None:
            try:
                note = await self._cache.store.note(self._name)
            except StoreUnavailable:
                return
            if note is not None:
                self._found = note.body
                self._cache.put(self._name, note.body, note.expires)

    async def reuse(self, deadline: float) -> Kept | None:
        """The kept answer, or that of the same request in flight, once it is there; None: go and get one.

        Whoever is told None leads: others wait for `land`, until `deadline` (the loop's time) at most."""
        if self._found is not None:
            return Kept.load(self._found)
        if self._anew:
            return None
        flights = self._cache.flights
        while flight := flights.get(self._name):
            try:
                async with asyncio.timeout_at(deadline):
                    landed = await asyncio.shield(flight)
            except TimeoutError:
                return None
            if landed is not None:
                return Kept.load(landed)
        flights[self._name] = self._flight = asyncio.get_running_loop().create_future()
        return None

    def land(self, kept: Kept | None) -> None:
        """The answer is whole, or will not come; only the first word counts."""
        if kept is not None:
            self._made = kept.dump()
        flight, self._flight = self._flight, None
        if flight is not None:
            del self._cache.flights[self._name]
            flight.set_result(self._made)

    async def keep(self) -> None:
        """Keep what landed, for this process and the others; it may fail, for it only saves money."""
        data, now = self._made, self._cache.clock()
        if data is None or len(data) > MAX_NOTE:
            return
        self._cache.put(self._name, data, now + self._ttl)
        try:
            await self._cache.store.write_note(self._name, data, int(now) + self._ttl, int(now))
        except StoreUnavailable as trouble:
            logger.warning("cache.unkept", extra={"reason": str(trouble)})
