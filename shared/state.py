"""The one shared `STATE` item: what rests, and what an admin switched. Read when older than a few seconds, beside
admission; written on change. While the store is silent, what was known last holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import orjson

from shared.catalog import Deployment
from shared.errors import StoreUnavailable
from shared.health import Health, Rest
from shared.schema import JSON
from shared.store.base import NEVER, Store
from shared.telemetry import logger

NAME = "STATE"
FRESH = 3.0
"""Seconds for which it is not read again."""
PATIENCE = 0.25
"""Seconds that a request waits for it at most, once it is admitted."""
WORTH_SHARING = 3.0
"""Seconds; a shorter rest is over before others have read of it."""
TRIES = 8


class Switch(NamedTuple):
    """What an admin says of a provider or deployment; None: as the configuration says."""

    enabled: bool | None = None
    priority: int | None = None


class State:
    """`health` is this process's own, to which other processes' rests are added."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.health = Health()
        self._store = store
        self._clock = clock
        self._read_at = 0.0
        self._switches: Mapping[str, Switch] = {}
        self._shared: set[str] = set()
        self._news: dict[str, Rest | None] = {}
        self._reading: asyncio.Task[None] | None = None

    @property
    def switches(self) -> Mapping[str, Switch]:
        """By provider name or deployment id."""
        return self._switches

    def switched(self, to: Deployment) -> Deployment:
        """As the admin wants it: on or off, and in its place; in its provider's, where it has none of its own."""
        if not self._switches:
            return to
        own, whole = self._switches.get(to.id, NO_SWITCH), self._switches.get(to.provider.name, NO_SWITCH)
        enabled = whole.enabled is not False and (to.enabled if own.enabled is None else own.enabled)
        moved = whole.priority if to.priority == to.provider.priority else None
        places = (place for place in (own.priority, moved, to.priority) if place is not None)
        return replace(to, enabled=enabled, priority=next(places))

    @property
    def old(self) -> bool:
        return self._clock() - self._read_at >= FRESH

    async def read(self) -> None:
        """Read it anew; a slow or failing store changes nothing, and holds nobody up for long."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(self._read_quietly())
        await asyncio.wait((self._reading,), timeout=PATIENCE)

    async def _read_quietly(self) -> None:
        try:
            await self._read()
        except StoreUnavailable as trouble:
            self._read_at = self._clock()  # not again with every request
            logger.warning("state.unread", extra={"reason": str(trouble)})

    async def _read(self) -> tuple[JSON, int]:
        note, now = await self._store.note(NAME), self._clock()
        doc: JSON = orjson.loads(note.body) if note else {}
        self._read_at = now
        self._switches = {name: Switch(**given) for name, given in doc.get("switches", {}).items()}
        rests = {name: Rest(*given) for name, given in doc.get("rests", {}).items()}
        self.health.wake(self._shared - rests.keys() - self._news.keys())  # who rested is well again
        self.health.learn({name: rest for name, rest in rests.items() if name not in self._news}, now)
        self._shared = set(rests)
        return doc, note.version if note else 0

    def rest(self, name: str, rest: Rest) -> None:
        """To be shared with the next `share`."""
        if rest.until - self._clock() >= WORTH_SHARING:
            self._news[name] = rest

    def wake(self, names: list[str]) -> None:
        self._news |= {name: None for name in names if name in self._shared}

    async def share(self) -> None:
        """Write what is new; it may fail, for every process finds out for itself."""
        if not self._news:
            return
        news, self._news = self._news, {}

        def change(doc: JSON) -> None:
            now, rests = self._clock(), {**doc.get("rests", {}), **news}
            doc["rests"] = {name: list(rest) for name, rest in rests.items() if rest and rest[0] > now}

        try:
            await self._write(change)
        except StoreUnavailable as trouble:
            logger.warning("state.unshared", extra={"reason": str(trouble)})

    async def turn(self, name: str, change: Mapping[str, Any], *, wake: bool) -> Switch:
        """Change `enabled` or `priority` of a switch, everywhere within seconds; `wake` ends a rest.

        Raises StoreUnavailable."""
        switch = NO_SWITCH

        def apply(doc: JSON) -> None:
            nonlocal switch
            switches: JSON = doc.setdefault("switches", {})
            switch = Switch(**{**switches.get(name, {}), **change})
            switches[name] = switch._asdict()
            if switch == NO_SWITCH:
                del switches[name]
            if wake:
                doc.setdefault("rests", {}).pop(name, None)

        if wake:
            self.health.wake((name,))
            self._news.pop(name, None)
        await self._write(apply)
        return switch

    async def _write(self, change: Callable[[JSON], None]) -> None:
        for _ in range(TRIES):
            doc, version = await self._read()
            before = orjson.dumps(doc)
            change(doc)
            body = orjson.dumps(doc)
            if body == before or await self._store.write_note(NAME, body, NEVER, int(self._clock()), over=version):
                await self._read()
                return
        raise StoreUnavailable("The shared state changes too often to be written; please try again.")


NO_SWITCH = Switch()
