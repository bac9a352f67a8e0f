"""What the gateway asks of a store, in its own words; `dynamodb` and `sqlite` answer alike (tests/shared/store).

Money is integer nano-dollars, moments are epoch seconds, a minute or day is its number since the epoch (UTC). Of each
key the store holds what is left, never what was used: conditions can compare, but not compute.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

UNLIMITED = 10**18
"""A limit nobody reaches, so that "no limit" needs no second expression; fits SQLite's 64 bits."""
NEVER = 10**11
"""An expiry moment nobody reaches."""
MAX_NOTE = 350_000
"""Bytes of a note's body: DynamoDB takes items of 400 KB."""
MAX_CONTENT = 300_000
"""Bytes of a message's content that are kept, for the same reason."""

Reason = Literal["unknown", "disabled", "expired", "concurrency", "rpm", "tpm", "daily_budget", "balance"]


def is_unlimited(amount: int) -> bool:
    """True of an unlimited amount even after spending from it."""
    return amount > UNLIMITED // 2


@dataclass(frozen=True, slots=True)
class Hold:
    """What one open request has reserved. `start` is its admission, `ttl` the seconds after which it is overdue."""

    money: int
    tokens: int
    start: int
    ttl: int

    @property
    def minute(self) -> int:
        return self.start // 60

    @property
    def day(self) -> int:
        return self.start // 86400

    @property
    def deadline(self) -> int:
        return self.start + self.ttl

    def pack(self) -> int:
        """All four in one number of at most 38 digits, DynamoDB's limit: an item's size is what admission costs.

        Above a million dollars or a billion tokens, which only an unlimited key can hold, it says just that."""
        money, tokens = min(self.money, 10**15 - 1), min(self.tokens, 10**9 - 1)
        return ((money * 10**9 + tokens) * 10**10 + self.start) * 10**4 + self.ttl

    @classmethod
    def unpack(cls, packed: int) -> Hold:
        rest, ttl = divmod(packed, 10**4)
        rest, start = divmod(rest, 10**10)
        money, tokens = divmod(rest, 10**9)
        return cls(money, tokens, start, ttl)


@dataclass(frozen=True, slots=True)
class VirtualKey:
    """A caller's key as it stands. `windows` maps "r<minute>", "t<minute>", "d<day>" to what is left of rpm, tpm and
    the daily budget; a window not there is untouched. `open` maps request ids to their holds, `turns` routes to how
    many turns were taken there. Always `balance + sum(hold.money of open) + spent == credit`."""

    id: str
    hash: str
    name: str
    role: Literal["user", "admin"] = "user"
    enabled: bool = True
    expires_at: int = NEVER
    models: tuple[str, ...] | None = None
    rpm: int = UNLIMITED
    tpm: int = UNLIMITED
    concurrency: int = 100
    daily_budget: int = UNLIMITED
    balance: int = UNLIMITED
    credit: int = UNLIMITED
    spent: int = 0
    requests: int = 0
    old_hash: str | None = None
    old_until: int = 0
    created_at: int = 0
    deleted: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    windows: Mapping[str, int] = field(default_factory=dict[str, int])
    open: Mapping[str, Hold] = field(default_factory=dict[str, Hold])
    turns: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def masked(self) -> str:
        """`lr-abc***xyz`: of the public id only, so it shows nothing of the secret and survives rotation."""
        return f"lr-{self.id[:3]}***{self.id[-3:]}"

    @property
    def has_money_limit(self) -> bool:
        return not (is_unlimited(self.daily_budget) and is_unlimited(self.balance))

    @property
    def limits(self) -> Mapping[str, int]:
        """What an untouched window holds, by the first letter of its name."""
        return {"r": self.rpm, "t": self.tpm, "d": self.daily_budget}

    def left(self, kind: Literal["r", "t", "d"], window: int) -> int:
        """What is left of rpm, tpm or the daily budget in the given minute or day."""
        return self.left_in(f"{kind}{window}")

    def left_in(self, window: str) -> int:
        """The same, of a window by its name."""
        left = self.windows.get(window)
        return self.limits[window[0]] if left is None else left


@dataclass(frozen=True, slots=True)
class Ask:
    """One request at the door: who says to call, and what it may use at most.

    `turn` names a route, of a set that does not grow, whose next turn is taken with the admission."""

    key_id: str
    key_hash: str
    request_id: str
    hold: Hold
    turn: str | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """The key as it stands after the reservation."""

    key: VirtualKey


@dataclass(frozen=True, slots=True)
class Refused:
    """Why not; `key` is the key as it stood, None for an unknown one."""

    reason: Reason
    key: VirtualKey | None


@dataclass(frozen=True, slots=True)
class KeyChange:
    """Fields to change; None leaves one alone. `balance` is what shall be left to spend, open holds included."""

    name: str | None = None
    role: Literal["user", "admin"] | None = None
    enabled: bool | None = None
    expires_at: int | None = None
    models: tuple[str, ...] | None = None
    all_models: bool = False
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    daily_budget: int | None = None
    balance: int | None = None
    metadata: Mapping[str, Any] | None = None
    hash: str | None = None
    old_hash: str | None = None
    old_until: int | None = None
    deleted: bool | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer, or failure, on record: `cost` is final, `doc` is everything else (shared/generations.py)."""

    id: str
    key_id: str
    created: int
    cost: int
    doc: Mapping[str, Any]

    @property
    def day(self) -> int:
        return self.created // 86400

    @property
    def entry(self) -> Entry:
        tokens = self.doc["tokens"]
        used = tokens["prompt_tokens"], tokens["completion_tokens"]
        return Entry(self.id, self.doc["model"], self.doc["provider"], *used, self.cost)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the books take of a row."""

    id: str
    model: str | None
    provider: str | None
    prompt_tokens: int
    completion_tokens: int
    cost: int


LAST = "~"
"""Above all ids."""


@dataclass(frozen=True, slots=True)
class Rollup:
    """The rows of one key and day with ids up to `upto` in sum, in whose place it counts.

    `groups`: `[{model, provider, requests, prompt_tokens, completion_tokens, cost}]`; `cost` is their total."""

    key_id: str
    day: int
    cost: int = 0
    requests: int = 0
    groups: tuple[Mapping[str, Any], ...] = ()
    upto: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """A small document under a name of 1 to 1024 bytes, until it expires; `version` grows with each write."""

    name: str
    body: bytes
    expires: int
    version: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a session. `id` is unique there and sorts by time; `doc` is what else is shown, and small."""

    id: str
    role: str
    content: str
    created: int
    doc: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def kept(self) -> Message:
        """As it is stored: of a long content the beginning, `doc["cut"]` the number of characters left out."""
        content = self.content.encode()[:MAX_CONTENT].decode(errors="ignore")
        missing = len(self.content) - len(content)
        return replace(self, content=content, doc={**self.doc, "cut": missing}) if missing else self


@dataclass(frozen=True, slots=True)
class Session:
    """One entry of a user's list. `updated` is the moment of its latest message, `title` how its user began."""

    id: str
    updated: int
    title: str


def title_of(messages: Iterable[Message]) -> str:
    return next((each.content[:80] for each in messages if each.role == "user" and each.content), "")


def check_size(body: bytes) -> None:
    if len(body) > MAX_NOTE:
        raise ValueError(f"A note has at most {MAX_NOTE:,} bytes; this one has {len(body):,}.")


def is_own(standing: Note, body: bytes, over: int | None) -> bool:
    """Whether what refused a write is that very write, of which only the reply was lost."""
    return standing.body == body and standing.version > (over or 0)


def refusal(key: VirtualKey | None, ask: Ask) -> Reason | None:
    """Why `ask` is refused of the key as it stands, None if it is not. The one order in which limits refuse.

    SQLite decides by it inside its transaction; DynamoDB's condition says the same, and this explains its "no".
    """
    hold = ask.hold
    if key is None or key.deleted or not knows(key, ask.key_hash, hold.start):
        return "unknown"
    checks: tuple[tuple[bool, Reason], ...] = (
        (not key.enabled, "disabled"),
        (key.expires_at <= hold.start, "expired"),
        (len(key.open) >= key.concurrency, "concurrency"),
        (key.left("r", hold.minute) < 1, "rpm"),
        (key.left("t", hold.minute) < hold.tokens, "tpm"),
        (key.left("d", hold.day) < hold.money, "daily_budget"),
        (key.balance < hold.money, "balance"),
    )
    return next((reason for refused, reason in checks if refused), None)


def verdict(key: VirtualKey | None, ask: Ask) -> Admitted | Refused | None:
    """What the key as it stands answers to `ask`; None where nothing refuses it and it is yet to be reserved."""
    reason = refusal(key, ask)
    if key is None or reason == "unknown":
        return Refused("unknown", None)
    if ask.request_id in key.open:
        return Admitted(key)
    return Refused(reason, key) if reason else None


def knows(key: VirtualKey, key_hash: str, now: int) -> bool:
    """Whether the hash is the key's own, or the one it had before a rotation whose grace period still runs."""
    return key.hash == key_hash or (key.old_hash == key_hash and key.old_until > now)


@dataclass(frozen=True, slots=True)
class Move:
    """What one step adds to a key; `windows` by name. Each move adds up to nothing with the hold it opens or closes."""

    balance: int
    windows: Mapping[str, int]
    spent: int = 0
    requests: int = 0

    @classmethod
    def admitting(cls, hold: Hold) -> Move:
        taken = {f"r{hold.minute}": -1, f"t{hold.minute}": -hold.tokens, f"d{hold.day}": -hold.money}
        return cls(-hold.money, taken)

    @classmethod
    def extending(cls, old: Hold, new: Hold) -> Move:
        return cls(old.money - new.money, {f"d{old.day}": old.money - new.money})

    @classmethod
    def settling(cls, hold: Hold, cost: int, tokens: int, now: int) -> Move:
        back = {f"t{hold.minute}": hold.tokens - tokens, f"d{hold.day}": hold.money - cost}
        return cls(hold.money - cost, current(back, now), spent=cost, requests=1)

    @classmethod
    def releasing(cls, hold: Hold, now: int) -> Move:
        back = {f"r{hold.minute}": 1, f"t{hold.minute}": hold.tokens, f"d{hold.day}": hold.money}
        return cls(hold.money, current(back, now))


SECONDS = {"r": 60, "t": 60, "d": 86400}
"""The length of a window, by the first letter of its name."""


def age(window: str, now: int) -> int:
    """How many windows of its kind ago this one was current."""
    return now // SECONDS[window[0]] - int(window[1:])


def current(windows: Mapping[str, int], now: int) -> dict[str, int]:
    """What goes back into a window that is over helps nobody."""
    return {name: amount for name, amount in windows.items() if age(name, now) == 0}


def stale(windows: Iterable[str], now: int) -> list[str]:
    """The windows that may go. Those just over stay, lest a slow clock or a late retry opens one anew."""
    return [name for name in windows if age(name, now) > (1 if name[0] == "d" else 2)]


CHANGEABLE = tuple(each.name for each in fields(KeyChange) if each.name not in ("all_models", "balance"))


def changed(key: VirtualKey, change: KeyChange, now: int) -> VirtualKey:
    """The key with the change; a new limit moves what is left in its windows by the difference."""
    given: dict[str, Any] = {name: value for name in CHANGEABLE if (value := getattr(change, name)) is not None}
    if change.all_models:
        given["models"] = None
    if change.balance is not None:
        credit = change.balance + key.spent
        given |= {"credit": credit, "balance": key.balance + credit - key.credit}
    wanted = replace(key, **given)
    more = {kind: limit - key.limits[kind] for kind, limit in wanted.limits.items() if limit != key.limits[kind]}
    moved = {*(name for name in key.windows if name[0] in more), *(f"{kind}{now // SECONDS[kind]}" for kind in more)}
    return replace(wanted, windows={**key.windows, **{name: key.left_in(name) + more[name[0]] for name in moved}})


class Store(Protocol):
    """Every method may raise `errors.StoreUnavailable`, nothing else unless it says so; each is safe to send twice."""

    async def add_key(self, key: VirtualKey) -> bool:
        """Put a new key; False when the id is taken, though not by this very key: that is a lost reply."""
        ...

    async def key(self, key_id: str) -> VirtualKey | None:
        """Read one key, tombstones too, consistently."""
        ...

    def keys(self) -> AsyncIterator[VirtualKey]:
        """All keys, tombstones too; may lag behind by a moment."""
        ...

    async def change_key(self, key_id: str, change: KeyChange, now: int) -> VirtualKey | None:
        """Change a key, limits by difference, so that open holds and this minute's and day's use stay right.

        None when there is no such key. `now` says which windows are current."""
        ...

    async def admit(self, ask: Ask) -> Admitted | Refused:
        """Check, reserve and take the turn in one atomic write; n admissions take n successive turns, a refusal none.

        A request id that is already open is its own lost reply: admitted, with the key as it stands, whose turn may
        by now be another's."""
        ...

    async def extend(self, key_id: str, request_id: str, old: Hold, new: Hold) -> bool:
        """Raise an open hold's money, and that alone, if balance and budget allow; True also where that was done."""
        ...

    async def settle(self, key_id: str, request_id: str, hold: Hold, cost: int, tokens: int, now: int) -> bool:
        """Charge `cost`, give the rest back (tokens and budget only within their own window), close the hold.

        What stands in the store is closed, should `hold` no longer be that. False when it is not open, which is
        success: somebody settled it already."""
        ...

    async def release(self, key_id: str, request_id: str, hold: Hold, now: int) -> bool:
        """Undo an admission: everything but the turn back, the request not counted. False when it is not open."""
        ...

    async def record(self, row: Generation, expires: int) -> Generation:
        """Put a row once; returns the row that stands, which is the earlier one if the id was taken."""
        ...

    async def generation(self, generation_id: str) -> Generation | None:
        """Read one row consistently; an expired one is not there."""
        ...

    async def generations(self, key_id: str, day: int, after: str = "", limit: int = 100) -> list[Generation]:
        """The rows of one key and day with ids above `after`, in order of id; may lag a moment.

        `limit` of them, or fewer where those are the last. Expired ones too, until they are summed up."""
        ...

    async def entries(self, key_id: str, day: int, after: str, upto: str, limit: int) -> list[Entry]:
        """The same in little, for the books: ids above `after`, up to `upto`."""
        ...

    async def roll_up(self, rollup: Rollup, after: str) -> bool:
        """Put a rollup in place of the one up to `after`, or, `after=""`, of none; False where that does not stand."""
        ...

    async def rollups(self, key_id: str, first_day: int, last_day: int) -> list[Rollup]:
        """The rollups of one key, by day, both ends included."""
        ...

    async def note(self, name: str) -> Note | None:
        """Read one note consistently; an expired one is not there."""
        ...

    async def notes(self, names: Sequence[str]) -> list[Note]:
        """Those of the names that are there, in any order, read consistently; up to 100 in one round trip."""
        ...

    async def write_note(self, name: str, body: bytes, expires: int, now: int, over: int | None = None) -> bool:
        """Write over whatever stands; or only over that version; or, `over=0`, over nothing, which an expired one is.

        False where something else stands. The same body, written since, is one's own lost reply, and true: whoever
        must know which of two wrote it makes bodies unique. A name that was dropped or has long expired begins again
        at version 1. Raises ValueError for a body above `MAX_NOTE`."""
        ...

    async def drop_note(self, name: str) -> None:
        """Remove a note, whichever stands."""
        ...

    async def say(self, key_id: str, user: str, session: str, messages: Sequence[Message]) -> None:
        """Put messages, as `kept`, into a session, and it into its user's list, in two writes side by side.

        Here and below `user` and `session` are any strings of up to 256 characters. A crash between the two writes
        may leave messages of a session that is not listed, though `said` and `forget` see them."""
        ...

    async def said(self, key_id: str, user: str, session: str, limit: int = 50) -> list[Message]:
        """The newest messages of a session, in order of id, read consistently."""
        ...

    async def sessions(self, key_id: str, user: str, limit: int = 100) -> list[Session]:
        """The user's latest sessions, newest first, read consistently. It costs a look at the whole list."""
        ...

    async def forget(self, key_id: str, user: str, session: str | None = None) -> int:
        """Remove a session, or all that the user has; returns how many messages are gone.

        The list goes last: while it names a session, there may be something left of it. What is said meanwhile may
        stay."""
        ...

    async def close(self) -> None:
        """Let go of threads and files; the next call opens them again."""
        ...
