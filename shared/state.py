"""The one shared `STATE` item: what rests, and what an admin switched. Read when older than a few seconds, beside
admission; written on change. While the store is silent, what was known last holds."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import orjson

from shared.catalog import Deployment
from shared.config import Provider
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
TRIES, JITTER = 8, 0.02
"""How often a change is tried that others come before, and how many seconds apart at most, the first time."""


class Switch(NamedTuple):
    """What an admin says of a provider or deployment; None: as the configuration says."""

    enabled: bool | None = None
    priority: int | None = None


class Switches:
    """By provider name or deployment id; not changed, but replaced, so that what was made of it can be kept."""

    def __init__(self, named: Mapping[str, Switch]) -> None:
        self.named = named

    def on(self, row: Provider) -> bool:
        return self.named.get(row.name, NO_SWITCH).enabled is not False

    def applied(self, to: Deployment) -> Deployment:
        """As the admin wants it: on or off, and in its place; in its provider's, where it has none of its own."""
        own, whole = self.named.get(to.id, NO_SWITCH), self.named.get(to.provider.name, NO_SWITCH)
        if own is whole:  # neither is there
            return to
        enabled = whole.enabled is not False and (to.enabled if own.enabled is None else own.enabled)
        moved = whole.priority if to.priority == to.provider.priority else None
        places = (place for place in (own.priority, moved, to.priority) if place is not None)
        return replace(to, enabled=enabled, priority=next(places))


class State:
    """`health` is this process's own, to which other processes' rests are added."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.health = Health()
        self.switches = Switches({})
        self._store = store
        self._clock = clock
        self._read_at = 0.0
        self._shared: dict[str, Rest] = {}
        self._news: dict[str, Rest | None] = {}
        self._telling: dict[str, Rest | None] = {}
        self._reading: asyncio.Task[None] | None = None

    @property
    def old(self) -> bool:
        return not 0 <= self._clock() - self._read_at < FRESH  # clocks are set back, too

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
        asked = self._clock()  # not when it was answered: a frozen process hears an old answer
        note = await self._store.note(NAME)
        doc: JSON = orjson.loads(note.body) if note else {}
        if asked >= self._read_at or self.old:  # else one that was asked later has been here
            self._read_at = asked
            self._take(doc)
        return doc, note.version if note else 0

    def _take(self, doc: JSON) -> None:
        """Believe it, but for what this process knows and has not told yet."""
        now = self._clock()
        named = {name: _switch(said) for name, said in doc.get("switches", {}).items()}
        if named != self.switches.named:
            self.switches = Switches(named)
        rests = {name: Rest(*said[:2]) for name, said in doc.get("rests", {}).items()}
        gone = [name for name, rest in self._shared.items() if rest.until > now and name not in rests]
        self.health.wake(name for name in gone if name not in self._news)  # its rest was not over: it is well again
        self.health.learn({name: rest for name, rest in rests.items() if name not in self._news}, now)
        self._shared = rests

    def rest(self, name: str, rest: Rest) -> None:
        """To be shared with the next `share`."""
        if rest.until - self._clock() >= WORTH_SHARING:
            self._news[name] = rest

    def wake(self, names: Iterable[str]) -> None:
        """What was to be shared, or is, is so no more."""
        for name in names:
            self._news.pop(name, None)
            if name in self._shared or name in self._telling:
                self._news[name] = None

    async def share(self) -> None:
        """Write what is new; it may fail, for every process finds out for itself."""
        if not self._news:
            return
        news = self._telling = self._news
        self._news = {}

        def change(doc: JSON) -> None:
            rests: JSON = doc.get("rests", {})
            for name, rest in news.items():
                if rest is None:
                    rests.pop(name, None)
                elif rest.until > rests.get(name, (0.0,))[0] + WORTH_SHARING:  # else somebody has said as much
                    rests[name] = list(rest)
            now = self._clock()
            doc["rests"] = {name: rest for name, rest in rests.items() if rest[0] > now}

        try:
            await self._write(change)
        except StoreUnavailable as trouble:
            logger.warning("state.unshared", extra={"reason": str(trouble)})
        finally:
            self._telling = {}

    async def turn(self, name: str, change: Mapping[str, Any], *, wake: bool) -> Switch:
        """Change `enabled` or `priority` of a switch, everywhere within seconds; `wake` ends a rest.

        Raises StoreUnavailable."""
        switch = NO_SWITCH

        def apply(doc: JSON) -> None:
            nonlocal switch
            switches: JSON = doc.setdefault("switches", {})
            switch = _switch({**switches.get(name, {}), **change})
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
        for tried in range(TRIES):
            await asyncio.sleep(random.uniform(0, JITTER) * tried)  # noqa: S311 not a secret
            doc, version = await self._read()
            before = orjson.dumps(doc)
            change(doc)
            body = orjson.dumps(doc)
            if body == before or await self._store.write_note(NAME, body, NEVER, int(self._clock()), over=version):
                self._take(doc)
                return
        raise StoreUnavailable("The shared state changes too often to be written; please try again.")


def _switch(said: JSON) -> Switch:
    """What else a newer gateway may say of it is its own business."""
    return Switch(said.get("enabled"), said.get("priority"))


NO_SWITCH = Switch()
