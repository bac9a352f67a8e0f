"""The production store: one DynamoDB table, each step of a request one conditional write.

Items, by `pk` and `sk`:

`KEY#<id>` `KEY`: a virtual key. `h` HMAC of its secret, `h2` the one before, good until `h2x`; `nm` name, `ro` role,
`en` enabled, `xp` expiry, `am` models, `md` metadata (JSON), `ca` created, `gone` a tombstone; limits `rl` `tl` per
minute, `dl` per day, `cl` open requests; `bal` left, `cr` credit, `sp` spent, `n` requests settled; `p` open requests
to their packed holds; `r<minute>` `t<minute>` `d<day>` what is left of a limit in a window, made on first use;
`rr:<route>` turns taken. `kx` puts it in the index `keys`, which holds nothing else, so that an admission does not
write it again.

`KEY#<id>` `DAY#<day>`: a rollup; `c` cost, `n` requests, `doc` groups (JSON), `u` the id up to which it counts.

`GEN#<id>` `GEN`: a generation; `ca` created, `c` cost, `doc` the rest (JSON), `ttl` its expiry. `kd` "<key id>#<day>"
puts it in the index `generations`, sorted by `pk`, which holds no more than the books need: `c`, and `e`, the
model, the provider, the prompt's and the completion's tokens (JSON).

`<name>` `NOTE`: a note; `b` body, `v` version, `ttl` its expiry. The gateway's shared state is `STATE` `NOTE`.

`HISTORY#<key id>#<user>` `SAID#<session>#<message id>`: a message; `ro` role, `co` content, `ca` created, `doc` the
rest (JSON). `HISTORY#<key id>#<user>` `SESSION#<session>`: its entry in the user's list; `se` session, `up` updated,
`ti` title. In both keys user and session are digests: of one length, so that no two run into each other.

No `pk` is longer than 1024 bytes, for the indexes sort by it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import boto3  # pyright: ignore[reportMissingTypeStubs] it has no types
import orjson
from botocore.config import Config  # pyright: ignore[reportMissingTypeStubs] it has no types
from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingTypeStubs] it has no types
from botocore.parsers import ResponseParserError  # pyright: ignore[reportMissingTypeStubs] it has no types

from shared.errors import StoreUnavailable
from shared.schema import JSON
from shared.store.base import (
    LAST,
    Admitted,
    Ask,
    Entry,
    Generation,
    Hold,
    KeyChange,
    Message,
    Move,
    Note,
    Refused,
    Rollup,
    Session,
    VirtualKey,
    changed,
    check_size,
    is_own,
    stale,
    title_of,
    verdict,
)

THREADS = 32
READS, WRITES = 100, 25
"""The most items of one BatchGetItem and of one BatchWriteItem."""
PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Seconds to wait for the rest of a batch, time after time."""
TRIES = 5
"""For a write that others' writes keep overtaking."""
UNAVAILABLE = "The store cannot be reached or is busy. Please try again."

ATTRIBUTES = {
    "hash": "h", "name": "nm", "role": "ro", "enabled": "en", "expires_at": "xp", "models": "am", "rpm": "rl",
    "tpm": "tl", "concurrency": "cl", "daily_budget": "dl", "balance": "bal", "credit": "cr", "spent": "sp",
    "requests": "n", "old_hash": "h2", "old_until": "h2x", "created_at": "ca", "deleted": "gone", "metadata": "md",
}  # fmt: skip
KNOWN = "gone = :false AND (h = :h OR (h2 = :h AND h2x > :now)) AND en = :true AND xp > :now"
LIMITS_UNCHANGED = "rl = :rl AND tl = :tl AND dl = :dl AND cr = :cr"
TURN, SAID, SESSION = "rr:", "SAID#", "SESSION#"


class DynamoStore:
    """One round trip per step; the client blocks, so it runs in threads of its own."""

    def __init__(self, table: str, region: str | None = None, endpoint: str | None = None) -> None:
        self._table = table
        self._connect = partial(connect, region, endpoint)
        self._connecting = Lock()
        self._client: Any = None
        self._threads = ThreadPoolExecutor(THREADS, "dynamodb")
        self._seen: dict[str, Sequence[str]] = {}  # the windows of a key at its last admission, for `stale`

    async def add_key(self, key: VirtualKey) -> bool:
        try:
            await self._put(item_of(key))
        except ConditionFailedError as failed:
            return key == await self._standing(key.id, failed)
        return True

    async def key(self, key_id: str) -> VirtualKey | None:
        item = await self._get(key_at(key_id))
        return key_of(item) if item else None

    async def keys(self) -> AsyncIterator[VirtualKey]:
        ids = [
            {"pk": item["pk"], "sk": item["sk"]}
            async for item in self._query("kx = :kx", {":kx": {"S": "KEY"}}, IndexName="keys")
        ]
        async for item in self._read(ids, consistent=False):
            yield key_of(item)

    async def change_key(self, key_id: str, change: KeyChange, now: int) -> VirtualKey | None:
        for _ in range(TRIES):
            key = await self.key(key_id)
            if key is None or (wanted := changed(key, change, now)) == key:
                return key
            old, new = item_of(key), item_of(wanted)
            differing = [name for name in ATTRIBUTES.values() if name != "bal" and old.get(name) != new.get(name)]
            windows = {name: left - key.left_in(name) for name, left in wanted.windows.items()}
            values = {f":{name}": old[name] for name in ("rl", "tl", "dl", "cr")}
            write = update(
                Move(wanted.balance - key.balance, windows),
                LIMITS_UNCHANGED,
                values | {f":new_{name}": new[name] for name in differing if name in new},
                sets=[f"{name} = :new_{name}" for name in differing if name in new],
                removes=[name for name in differing if name not in new],
            )
            with suppress(ConditionFailedError):
                return key_of((await self._update(key_at(key_id), write, ReturnValues="ALL_NEW"))["Attributes"])
        raise StoreUnavailable(UNAVAILABLE)

    async def admit(self, ask: Ask) -> Admitted | Refused:
        hold = ask.hold
        condition = (
            f"{KNOWN} AND attribute_not_exists(p.#id) AND size(p) < cl AND bal >= :money"
            f" AND {room(f'r{hold.minute}', ':one')}"
            f" AND {room(f't{hold.minute}', ':tokens')}"
            f" AND {room(f'd{hold.day}', ':money')}"
        )
        values = {
            ":h": ask.key_hash, ":now": hold.start, ":true": True, ":false": False,
            ":one": 1, ":tokens": hold.tokens, ":money": hold.money, ":hold": hold.pack(),
        }  # fmt: skip
        values = {name: typed(value) for name, value in values.items()}
        write = update(Move.admitting(hold), condition, values, request_id=ask.request_id, sets=["p.#id = :hold"])
        if ask.turn is not None:
            write["UpdateExpression"] += " ADD #turn :one"
            write["ExpressionAttributeNames"]["#turn"] = TURN + ask.turn
        for _ in range(2):
            try:
                key = key_of((await self._update(key_at(ask.key_id), write, ReturnValues="ALL_NEW"))["Attributes"])
            except ConditionFailedError as failed:
                if said := verdict(await self._standing(ask.key_id, failed), ask):
                    return said  # else what refused has changed since, on an engine that does not return the item
            else:
                self._seen[key.id] = tuple(key.windows)
                return Admitted(key)
        raise StoreUnavailable(UNAVAILABLE)

    async def extend(self, key_id: str, request_id: str, old: Hold, new: Hold) -> bool:
        condition = f"p.#id = :old AND bal >= :more AND {room(f'd{old.day}', ':more')}"
        values = {":old": typed(old.pack()), ":new": typed(new.pack()), ":more": typed(new.money - old.money)}
        move = Move.extending(old, new)
        try:
            write = update(move, condition, values, request_id=request_id, sets=["p.#id = :new"])
            await self._update(key_at(key_id), write)
        except ConditionFailedError as failed:
            key = await self._standing(key_id, failed)
            return key is not None and key.open.get(request_id) == new
        return True

    async def settle(self, key_id: str, request_id: str, hold: Hold, cost: int, tokens: int, now: int) -> bool:
        return await self._close(key_id, request_id, hold, now, lambda hold: Move.settling(hold, cost, tokens, now))

    async def release(self, key_id: str, request_id: str, hold: Hold, now: int) -> bool:
        return await self._close(key_id, request_id, hold, now, lambda hold: Move.releasing(hold, now))

    async def _close(self, key_id: str, request_id: str, hold: Hold, now: int, closing: Callable[[Hold], Move]) -> bool:
        removes = ["p.#id", *stale(self._seen.pop(key_id, ()), now)]
        for _ in range(TRIES):
            values = {":hold": typed(hold.pack())}
            write = update(closing(hold), "p.#id = :hold", values, request_id=request_id, removes=removes)
            try:
                await self._update(key_at(key_id), write)
            except ConditionFailedError as failed:
                key = await self._standing(key_id, failed)
                if key is None or request_id not in key.open:
                    return False
                hold = key.open[request_id]  # extended, by a reply that was lost
            else:
                return True
        raise StoreUnavailable(UNAVAILABLE)

    async def record(self, row: Generation, expires: int) -> Generation:
        item = gen_at(row.id) | {
            "kd": typed(f"{row.key_id}#{row.day}"), "ca": typed(row.created), "c": typed(row.cost),
            "e": document(astuple(row.entry)[1:-1]), "doc": document(row.doc), "ttl": typed(expires),
        }  # fmt: skip
        try:
            await self._put(item)
        except ConditionFailedError as failed:
            standing = failed.item or await self._get(gen_at(row.id))
            return generation_of(standing) if standing else row
        return row

    async def generation(self, generation_id: str) -> Generation | None:
        item = await self._get(gen_at(generation_id))
        return generation_of(item) if item and lives(item) else None

    async def generations(self, key_id: str, day: int, after: str = "", limit: int = 100) -> list[Generation]:
        wanted = [gen_at(entry.id) for entry in await self.entries(key_id, day, after, LAST, limit)]
        rows = [generation_of(item) async for item in self._read(wanted, consistent=True)]
        return sorted(rows, key=lambda row: row.id)

    async def entries(self, key_id: str, day: int, after: str, upto: str, limit: int) -> list[Entry]:
        values = {":kd": typed(f"{key_id}#{day}"), ":after": typed(f"GEN#{after}"), ":upto": typed(f"GEN#{upto}")}
        more = {"IndexName": "generations", "ProjectionExpression": "pk, c, e", "Limit": limit + 1}
        found: list[Entry] = []
        async for item in self._query("kd = :kd AND pk BETWEEN :after AND :upto", values, **more):
            if (entry := entry_of(item)).id != after:
                found.append(entry)
            if len(found) == limit:
                break
        return found

    async def roll_up(self, rollup: Rollup, after: str) -> bool:
        values = {
            "c": typed(rollup.cost), "n": typed(rollup.requests), "doc": document(rollup.groups),
            "u": typed(rollup.upto),
        }  # fmt: skip
        try:
            await self._put(key_at(rollup.key_id, f"DAY#{rollup.day:05}") | values, after)
        except ConditionFailedError:
            return False
        return True

    async def rollups(self, key_id: str, first_day: int, last_day: int) -> list[Rollup]:
        values = {":pk": typed(f"KEY#{key_id}")}
        values |= {":first": typed(f"DAY#{first_day:05}"), ":last": typed(f"DAY#{last_day:05}")}
        found = self._query("pk = :pk AND sk BETWEEN :first AND :last", values)
        return [rollup_of(key_id, item) async for item in found]

    async def note(self, name: str) -> Note | None:
        item = await self._get(note_at(name))
        return note_of(item) if item and lives(item) else None

    async def notes(self, names: Sequence[str]) -> list[Note]:
        asked = [note_at(name) for name in dict.fromkeys(names)]
        return [note_of(item) async for item in self._read(asked, consistent=True) if lives(item)]

    async def write_note(self, name: str, body: bytes, expires: int, now: int, over: int | None = None) -> bool:
        check_size(body)
        values: dict[str, Any] = {":b": body, ":ttl": expires, ":one": 1}
        condition: JSON = {}
        if over is not None:
            nothing, that_version = "attribute_not_exists(pk) OR #ttl <= :now", "v = :over AND #ttl > :now"
            condition = only_if(that_version if over else nothing)
            values |= {":now": now, ":over": over} if over else {":now": now}
        write = condition | {
            "UpdateExpression": "SET b = :b, #ttl = :ttl ADD v :one",
            "ExpressionAttributeNames": {"#ttl": "ttl"},  # a reserved word
            "ExpressionAttributeValues": {name: typed(value) for name, value in values.items()},
        }
        try:
            await self._update(note_at(name), write)
        except ConditionFailedError as failed:
            standing = failed.item or await self._get(note_at(name))
            return standing is not None and is_own(note_of(standing), body, over)
        return True

    async def drop_note(self, name: str) -> None:
        await self._call("delete_item", TableName=self._table, Key=note_at(name))

    async def say(self, key_id: str, user: str, session: str, messages: Sequence[Message]) -> None:
        if not messages:
            return
        values = {":se": session, ":up": max(each.created for each in messages)}
        sets = ["se = :se", "up = :up"]
        if title := title_of(messages):
            values[":ti"] = title
            sets.append("ti = if_not_exists(ti, :ti)")
        entry = {
            "UpdateExpression": f"SET {', '.join(sets)}",
            "ExpressionAttributeValues": {name: typed(value) for name, value in values.items()},
        }
        items = {each.id: message_item(key_id, user, session, each.kept) for each in messages}
        puts = [{"PutRequest": {"Item": item}} for item in items.values()]
        at = history_at(key_id, user, session_sort(session))
        await asyncio.gather(self._write(puts), self._update(at, entry))

    async def said(self, key_id: str, user: str, session: str, limit: int = 50) -> list[Message]:
        newest: list[Message] = []
        backwards = self._history(key_id, user, said_sort(session), Limit=limit, ScanIndexForward=False)
        async for item in backwards:
            newest.append(message_of(item))
            if len(newest) == limit:
                break
        return newest[::-1]

    async def sessions(self, key_id: str, user: str, limit: int = 100) -> list[Session]:
        found = [session_of(item) async for item in self._history(key_id, user, SESSION)]
        return sorted(found, key=lambda entry: (-entry.updated, entry.id))[:limit]

    async def forget(self, key_id: str, user: str, session: str | None = None) -> int:
        parts = (SAID, SESSION) if session is None else (said_sort(session), session_sort(session))
        sorts = [
            item["sk"]["S"]
            for part in parts
            async for item in self._history(key_id, user, part, ProjectionExpression="sk")
        ]
        await self._write([{"DeleteRequest": {"Key": history_at(key_id, user, sort)}} for sort in sorts])
        return sum(sort.startswith(SAID) for sort in sorts)

    async def close(self) -> None:
        threads, self._threads = self._threads, ThreadPoolExecutor(THREADS, "dynamodb")
        client, self._client = self._client, None
        await asyncio.to_thread(threads.shutdown)
        if client is not None:
            client.close()

    async def _standing(self, key_id: str, failed: ConditionFailedError) -> VirtualKey | None:
        """The key that refused a write, as the engine returned it or, from one that returns none, as it is now."""
        return key_of(failed.item) if failed.item else await self.key(key_id)

    async def _get(self, key: JSON) -> JSON | None:
        return (await self._call("get_item", TableName=self._table, Key=key, ConsistentRead=True)).get("Item")

    async def _put(self, item: JSON, over: str = "") -> None:
        """Put an item once, or over the one with that `u`; raises ConditionFailedError where it is not so."""
        write = only_if("u = :over") | {"ExpressionAttributeValues": {":over": typed(over)}} if over else NEW
        await self._call("put_item", TableName=self._table, Item=item, **write)

    async def _update(self, at: JSON, write: JSON, **more: Any) -> JSON:
        """Raises ConditionFailedError where the condition did not hold."""
        return await self._call("update_item", TableName=self._table, Key=at, **write, **more)

    async def _query(self, condition: str, values: JSON, **more: Any) -> AsyncIterator[JSON]:
        while True:
            reply = await self._call(
                "query",
                TableName=self._table,
                KeyConditionExpression=condition,
                ExpressionAttributeValues=values,
                **more,
            )
            for item in reply["Items"]:
                yield item
            if "LastEvaluatedKey" not in reply:
                return
            more["ExclusiveStartKey"] = reply["LastEvaluatedKey"]

    def _history(self, key_id: str, user: str, sort: str, **more: Any) -> AsyncIterator[JSON]:
        """The items of a user's history whose `sk` begins so."""
        values = {":pk": history_at(key_id, user, sort)["pk"], ":sort": typed(sort)}
        return self._query("pk = :pk AND begins_with(sk, :sort)", values, ConsistentRead=True, **more)

    async def _read(self, keys: Sequence[JSON], *, consistent: bool) -> AsyncIterator[JSON]:
        """The items that are there, in any order."""
        batches = ({"Keys": keys[at : at + READS], "ConsistentRead": consistent} for at in range(0, len(keys), READS))
        async for reply in self._in_batches("batch_get_item", batches, "UnprocessedKeys"):
            for item in reply["Responses"][self._table]:
                yield item

    async def _write(self, requests: Sequence[JSON]) -> None:
        """Puts and deletes, without conditions."""
        batches = (requests[at : at + WRITES] for at in range(0, len(requests), WRITES))
        async for _ in self._in_batches("batch_write_item", batches, "UnprocessedItems"):
            pass

    async def _in_batches(self, operation: str, batches: Iterable[Any], rest: str) -> AsyncIterator[JSON]:
        """The replies. What an engine left over, for it was busy or the reply full, it is asked for again."""
        for batch in batches:
            asked = {self._table: batch}
            for pause in PAUSES:
                reply = await self._call(operation, RequestItems=asked)
                yield reply
                if not (asked := reply.get(rest)):
                    break
                await asyncio.sleep(pause)
            else:
                raise StoreUnavailable(UNAVAILABLE)

    async def _call(self, operation: str, **arguments: Any) -> JSON:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._send, operation, arguments)

    def _send(self, operation: str, arguments: JSON) -> JSON:
        try:
            with self._connecting:
                self._client = self._client or self._connect()
            return getattr(self._client, operation)(**arguments)
        except ClientError as error:
            said: JSON = error.response
            if said["Error"]["Code"] == "ConditionalCheckFailedException":
                raise ConditionFailedError(said.get("Item")) from error
            raise StoreUnavailable(UNAVAILABLE) from error
        except (BotoCoreError, ResponseParserError) as error:
            raise StoreUnavailable(UNAVAILABLE) from error


class ConditionFailedError(Exception):
    """A write that did not happen; `item` as it stands, None where there is none or the engine does not return it."""

    def __init__(self, item: JSON | None) -> None:
        super().__init__()
        self.item = item


def connect(region: str | None, endpoint: str | None) -> Any:
    config = Config(
        connect_timeout=1,
        read_timeout=1.5,
        retries={"mode": "standard", "total_max_attempts": 3},  # safe: every write of ours may be sent twice
        max_pool_connections=THREADS,
        parameter_validation=False,  # the engine validates too
    )
    client: Any = boto3.client  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return client("dynamodb", region_name=region, endpoint_url=endpoint, config=config)


def room(window: str, amount: str) -> str:
    """The condition that a window has so much left; one that is not there has its whole limit, `rl`, `tl` or `dl`."""
    return f"((attribute_not_exists({window}) AND {window[0]}l >= {amount}) OR {window} >= {amount})"


def only_if(condition: str) -> JSON:
    return {"ConditionExpression": condition, "ReturnValuesOnConditionCheckFailure": "ALL_OLD"}


NEW = only_if("attribute_not_exists(pk)")


def update(
    move: Move,
    condition: str,
    values: JSON,
    *,
    request_id: str | None = None,
    sets: Sequence[str] = (),
    removes: Sequence[str] = (),
) -> JSON:
    """UpdateItem's expressions for a move, and what else is set and removed. `#id` is the request's."""
    amounts = {"bal": move.balance, "sp": move.spent, "n": move.requests, **move.windows}
    added = {name: amount for name, amount in amounts.items() if amount}
    moves = [
        f"{name} = if_not_exists({name}, {name[0]}l) + :{name}"
        if name in move.windows
        else f"{name} = {name} + :{name}"
        for name in added
    ]
    clauses = {"SET": [*moves, *sets], "REMOVE": removes}
    write = only_if(condition) | {
        "UpdateExpression": " ".join(f"{verb} {', '.join(parts)}" for verb, parts in clauses.items() if parts),
        "ExpressionAttributeValues": values | {f":{name}": typed(amount) for name, amount in added.items()},
    }
    return write | {"ExpressionAttributeNames": {"#id": request_id}} if request_id else write


def typed(value: Any) -> JSON:
    match value:
        case bool():
            return {"BOOL": value}
        case int():
            return {"N": str(value)}
        case str():
            return {"S": value}
        case bytes():
            return {"B": value}
        case _:
            return {"L": [typed(each) for each in value]}


def plain(attribute: JSON) -> Any:
    ((kind, value),) = attribute.items()
    match kind:
        case "N":
            return int(value)
        case "L":
            return tuple(plain(each) for each in value)
        case _:
            return value


def document(value: Any) -> JSON:
    return {"S": orjson.dumps(value).decode()}


def key_at(key_id: str, sort: str = "KEY") -> JSON:
    return {"pk": {"S": f"KEY#{key_id}"}, "sk": {"S": sort}}


def gen_at(generation_id: str) -> JSON:
    return {"pk": {"S": f"GEN#{generation_id}"}, "sk": {"S": "GEN"}}


def note_at(name: str) -> JSON:
    return {"pk": {"S": name}, "sk": {"S": "NOTE"}}


def history_at(key_id: str, user: str, sort: str) -> JSON:
    return {"pk": {"S": f"HISTORY#{key_id}#{digest(user)}"}, "sk": {"S": sort}}


def said_sort(session: str, message_id: str = "") -> str:
    return f"{SAID}{digest(session)}#{message_id}"


def session_sort(session: str) -> str:
    return SESSION + digest(session)


def digest(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:32]


def item_of(key: VirtualKey) -> JSON:
    values = {name: getattr(key, field) for field, name in ATTRIBUTES.items()}
    item = {name: typed(value) for name, value in values.items() if name != "md" and value is not None}
    windows = {name: typed(left) for name, left in key.windows.items()}
    holds = {request_id: typed(hold.pack()) for request_id, hold in key.open.items()}
    turns = {TURN + route: typed(turn) for route, turn in key.turns.items()}
    rest = windows | turns | {"md": document(key.metadata), "p": {"M": holds}}
    return key_at(key.id) | {"kx": {"S": "KEY"}} | item | rest


def key_of(item: JSON) -> VirtualKey:
    values = {field: plain(item[name]) for field, name in ATTRIBUTES.items() if name in item}
    return VirtualKey(
        item["pk"]["S"].removeprefix("KEY#"),
        **values | {"metadata": orjson.loads(values["metadata"])},
        windows={name: int(item[name]["N"]) for name in item if name[0] in "rtd" and name[1:].isdigit()},
        open={request_id: Hold.unpack(int(hold["N"])) for request_id, hold in item["p"]["M"].items()},
        turns={name.removeprefix(TURN): int(item[name]["N"]) for name in item if name.startswith(TURN)},
    )


def lives(item: JSON) -> bool:
    """TTL takes an expired item within days; until then it is only not shown."""
    return plain(item["ttl"]) > time.time()


def generation_of(item: JSON) -> Generation:
    key_id = item["kd"]["S"].rpartition("#")[0]
    doc = orjson.loads(item["doc"]["S"])
    return Generation(item["pk"]["S"].removeprefix("GEN#"), key_id, plain(item["ca"]), plain(item["c"]), doc)


def entry_of(item: JSON) -> Entry:
    model, provider, prompt_tokens, completion_tokens = orjson.loads(item["e"]["S"])
    name, cost = item["pk"]["S"].removeprefix("GEN#"), plain(item["c"])
    return Entry(name, model, provider, prompt_tokens, completion_tokens, cost)


def rollup_of(key_id: str, item: JSON) -> Rollup:
    day, groups = int(item["sk"]["S"].removeprefix("DAY#")), orjson.loads(item["doc"]["S"])
    return Rollup(key_id, day, plain(item["c"]), plain(item["n"]), tuple(groups), plain(item["u"]))


def note_of(item: JSON) -> Note:
    return Note(item["pk"]["S"], plain(item["b"]), plain(item["ttl"]), plain(item["v"]))


def message_item(key_id: str, user: str, session: str, message: Message) -> JSON:
    values = {
        "ro": typed(message.role), "co": typed(message.content), "ca": typed(message.created),
        "doc": document(message.doc),
    }  # fmt: skip
    return history_at(key_id, user, said_sort(session, message.id)) | values


def message_of(item: JSON) -> Message:
    message_id = item["sk"]["S"].split("#", 2)[2]
    return Message(message_id, plain(item["ro"]), plain(item["co"]), plain(item["ca"]), orjson.loads(item["doc"]["S"]))


def session_of(item: JSON) -> Session:
    return Session(plain(item["se"]), plain(item["up"]), plain(item["ti"]) if "ti" in item else "")


def address(url: str) -> tuple[str, str | None, str | None]:
    """Table, region and endpoint of `dynamodb://table?region=…&endpoint=…`; raises ValueError."""
    parts, options = urlsplit(url), dict(parse_qsl(urlsplit(url).query))
    if parts.scheme != "dynamodb" or not parts.netloc or parts.path or not options.keys() <= {"region", "endpoint"}:
        raise ValueError("A DynamoDB table is named as dynamodb://table?region=…&endpoint=…, the options if needed.")
    return parts.netloc, options.get("region"), options.get("endpoint")


def create_table_at(url: str, resources: Path) -> bool:
    """Make the table that `url` names as the CloudFormation file describes it; False where it is there already."""
    import yaml  # only here, and not on Lambda

    table, region, endpoint = address(url)
    facts = yaml.safe_load(resources.read_text())["Resources"]["Table"]["Properties"]
    schema = ("AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes", "BillingMode")
    try:
        client = connect(region, endpoint)
        client.create_table(TableName=table, **{name: facts[name] for name in schema})
        client.get_waiter("table_exists").wait(TableName=table)
        client.update_time_to_live(TableName=table, TimeToLiveSpecification=facts["TimeToLiveSpecification"])
    except ClientError as error:
        if error.response["Error"]["Code"] == "ResourceInUseException":
            return False
        raise StoreUnavailable(UNAVAILABLE) from error
    except BotoCoreError as error:
        raise StoreUnavailable(UNAVAILABLE) from error
    return True
