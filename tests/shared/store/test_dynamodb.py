"""What only DynamoDB can do to us: dead endpoints, throttling, engines that say less."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from botocore.exceptions import BotoCoreError, ClientError

from shared.errors import StoreUnavailable
from shared.store.base import Admitted, Message, Refused, Store, VirtualKey
from shared.store.dynamodb import (
    PAUSES,
    DynamoStore,
    address,
    connect,
    create_table_at,
    item_of,
    message_item,
    note_at,
)
from tests.server import free_port
from tests.shared.store.callers import KEPT, NOW, ask, hold, new_key, row
from tests.shared.store.conftest import REGION, RESOURCES

KEY = VirtualKey("k", "h", "n", rpm=1)
SAID = Message("m", "user", "hello", NOW)
FAILED = 400, {"__type": "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException"}


class Endpoint:
    """Answers each operation by `replies[operation]`, status and body, or a list of them; keeps what it is asked."""

    def __init__(self) -> None:
        self.replies: dict[str, tuple[int, Any] | list[tuple[int, Any]]] = {}
        self.asked: Counter[str] = Counter()
        self.bodies: list[Any] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                operation = self.headers["x-amz-target"].partition(".")[2]
                endpoint.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                endpoint.asked[operation] += 1
                reply = endpoint.replies[operation]
                status, body = reply.pop(0) if isinstance(reply, list) else reply
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/x-amz-json-1.0")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    thread.join()
    endpoint.server.server_close()


@pytest.fixture
async def spoken_for(endpoint: Endpoint):
    """A store at that endpoint."""
    store = DynamoStore("lightrail", REGION, endpoint.url)
    yield store
    await store.close()


EVERY_STEP: list[Callable[[Store], Any]] = [
    lambda store: store.key(KEY.id),
    lambda store: store.admit(ask(KEY)),
    lambda store: store.settle(KEY.id, "r", hold(), 1, 1, NOW),
    lambda store: store.record(row(ask(KEY), 1), NOW),
    lambda store: store.generations(KEY.id, 1),
    lambda store: store.note("n"),
    lambda store: store.notes(["n"]),
    lambda store: store.write_note("n", b"", NOW, NOW),
    lambda store: store.drop_note("n"),
    lambda store: store.say(KEY.id, "u", "s", [SAID]),
    lambda store: store.said(KEY.id, "u", "s"),
    lambda store: store.forget(KEY.id, "u"),
]


@pytest.mark.parametrize("step", EVERY_STEP[:2])
async def test_a_dead_endpoint_is_a_store_fault_never_an_unknown_key(step: Callable[[Store], Any]):
    store = DynamoStore("lightrail", REGION, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreUnavailable) as caught:
        await step(store)
    assert isinstance(caught.value.__cause__, BotoCoreError)
    await store.close()


@pytest.mark.parametrize("step", EVERY_STEP)
async def test_a_missing_table_is_a_store_fault(engine: str, step: Callable[[Store], Any]):
    store = DynamoStore("no-such-table", REGION, engine)
    with pytest.raises(StoreUnavailable) as caught:
        await step(store)
    assert isinstance(caught.value.__cause__, ClientError)
    await store.close()


@pytest.mark.parametrize(("status", "error"), [(400, "ThrottlingException"), (500, "InternalServerError")])
async def test_throttling_and_faults_are_tried_three_times(
    endpoint: Endpoint, spoken_for: Store, status: int, error: str
):
    endpoint.replies["UpdateItem"] = status, {"__type": f"com.amazonaws.dynamodb.v20120810#{error}", "message": "no"}
    with pytest.raises(StoreUnavailable):
        await spoken_for.admit(ask(KEY))
    assert endpoint.asked == {"UpdateItem": 3}


async def test_a_silent_engine_is_asked_why_it_refused(endpoint: Endpoint, spoken_for: Store):
    taken = VirtualKey("k", "h", "n", rpm=1, windows={f"r{NOW // 60}": 0})
    endpoint.replies = {"UpdateItem": FAILED, "GetItem": (200, {"Item": item_of(taken)})}
    assert await spoken_for.admit(ask(KEY)) == Refused("rpm", taken)
    endpoint.replies["GetItem"] = 200, {}
    assert await spoken_for.admit(ask(KEY)) == Refused("unknown", None)
    assert endpoint.asked == {"UpdateItem": 2, "GetItem": 2}


async def test_a_silent_engine_that_lost_a_reply_has_admitted(endpoint: Endpoint, spoken_for: Store):
    asked = ask(KEY)
    mine = VirtualKey("k", "h", "n", windows={f"r{NOW // 60}": 0}, open={asked.request_id: asked.hold})
    endpoint.replies = {"UpdateItem": FAILED, "GetItem": (200, {"Item": item_of(mine)})}
    assert await spoken_for.admit(asked) == Admitted(mine)


async def test_a_refusal_that_nothing_explains_is_tried_once_more_and_then_a_store_fault(
    endpoint: Endpoint, spoken_for: Store
):
    endpoint.replies = {"UpdateItem": FAILED, "GetItem": (200, {"Item": item_of(KEY)})}
    with pytest.raises(StoreUnavailable):
        await spoken_for.admit(ask(KEY))
    assert endpoint.asked == {"UpdateItem": 2, "GetItem": 2}


async def test_an_unexplained_settle_gives_up(endpoint: Endpoint, spoken_for: Store):
    stubborn = VirtualKey("k", "h", "n", open={"r": hold(5)})
    endpoint.replies = {"UpdateItem": FAILED, "GetItem": (200, {"Item": item_of(stubborn)})}
    with pytest.raises(StoreUnavailable):
        await spoken_for.settle("k", "r", hold(5), 1, 1, NOW)


async def test_a_turn_is_taken_in_the_write_that_admits_and_costs_nothing_where_there_is_none(
    endpoint: Endpoint, spoken_for: Store
):
    endpoint.replies["UpdateItem"] = 200, {"Attributes": item_of(KEY)}
    asked = ask(KEY)
    await spoken_for.admit(asked)
    await spoken_for.admit(replace(asked, turn="auto"))
    without, with_turn = endpoint.bodies
    assert without["ExpressionAttributeNames"] == {"#id": asked.request_id}
    with_turn["UpdateExpression"] = with_turn["UpdateExpression"].removesuffix(" ADD #turn :one")
    assert with_turn["ExpressionAttributeNames"].pop("#turn") == "rr:auto"
    assert with_turn == without


@pytest.mark.parametrize(("body", "written"), [(b"mine", True), (b"another's", False)])
async def test_a_silent_engine_is_asked_which_note_stands(
    endpoint: Endpoint, spoken_for: Store, body: bytes, written: bool
):
    stands = note_at("n") | {"b": {"B": b64encode(b"mine").decode()}, "ttl": {"N": str(NOW)}, "v": {"N": "1"}}
    endpoint.replies = {"UpdateItem": FAILED, "GetItem": (200, {"Item": stands})}
    assert await spoken_for.write_note("n", body, NOW, NOW, 0) == written
    endpoint.replies["GetItem"] = 200, {}
    assert not await spoken_for.write_note("n", body, NOW, NOW, 0)


async def test_notes_that_a_busy_engine_left_over_are_asked_for_again(endpoint: Endpoint, spoken_for: Store):
    def reply(name: str, *rest: str) -> tuple[int, Any]:
        item = note_at(name) | {"b": {"B": ""}, "ttl": {"N": str(KEPT)}, "v": {"N": "1"}}
        left = {"lightrail": {"Keys": [note_at(name) for name in rest], "ConsistentRead": True}}
        return 200, {"Responses": {"lightrail": [item]}, "UnprocessedKeys": left if rest else {}}

    endpoint.replies["BatchGetItem"] = [reply("a", "b"), reply("b")]
    assert [note.name for note in await spoken_for.notes(["a", "b"])] == ["a", "b"]
    asked = [body["RequestItems"]["lightrail"] for body in endpoint.bodies]
    assert [each["Keys"] for each in asked] == [[note_at("a"), note_at("b")], [note_at("b")]]
    assert all(each["ConsistentRead"] for each in asked)


async def test_messages_that_a_busy_engine_left_over_are_put_again(endpoint: Endpoint, spoken_for: Store):
    put = {"PutRequest": {"Item": message_item("k", "u", "s", SAID)}}
    endpoint.replies["BatchWriteItem"] = [(200, {"UnprocessedItems": {"lightrail": [put]}}), (200, {})]
    endpoint.replies["UpdateItem"] = 200, {}
    await spoken_for.say("k", "u", "s", [SAID, replace(SAID, id="n")])
    puts = [body["RequestItems"]["lightrail"] for body in endpoint.bodies if "RequestItems" in body]
    assert [len(each) for each in puts] == [2, 1]
    assert puts[1] == [put]


async def test_an_engine_that_stays_busy_is_a_store_fault(endpoint: Endpoint, spoken_for: Store):
    left = {"lightrail": {"Keys": [note_at("a")]}}
    endpoint.replies["BatchGetItem"] = 200, {"Responses": {"lightrail": []}, "UnprocessedKeys": left}
    with pytest.raises(StoreUnavailable):
        await spoken_for.notes(["a"])
    assert endpoint.asked == {"BatchGetItem": len(PAUSES)}


async def test_a_key_with_16_open_requests_costs_one_write_unit(moto_table: str):
    store = DynamoStore(*address(moto_table))
    key = await new_key(store, rpm=1000, tpm=10**6, daily_budget=10**12, balance=10**12)
    for _ in range(16):
        await store.admit(replace(ask(key, money=10**9, tokens=4096), turn="auto:round-robin"))
    item = item_of(await store.key(key.id) or KEY)
    assert size(item) <= 1024
    await store.close()


def size(item: dict[str, Any]) -> int:
    """DynamoDB's own count of an item's bytes."""

    def of(attribute: dict[str, Any]) -> int:
        ((kind, value),) = attribute.items()
        match kind:
            case "N":
                return (len(value.strip("0")) + 1) // 2 + 1
            case "M":
                return 3 + sum(len(name) + of(each) + 1 for name, each in value.items())
            case "S":
                return len(value.encode())
            case _:
                return 1

    return sum(len(name) + of(each) for name, each in item.items())


def test_the_table_is_made_once_and_expires_records(engine_table: str):
    assert not create_table_at(engine_table, RESOURCES)
    table, region, endpoint = address(engine_table)
    found = connect(region, endpoint).describe_time_to_live(TableName=table)["TimeToLiveDescription"]
    assert (found["TimeToLiveStatus"], found["AttributeName"]) == ("ENABLED", "ttl")


def test_a_table_that_cannot_be_made_is_a_store_fault():
    with pytest.raises(StoreUnavailable):
        create_table_at(f"dynamodb://lightrail?region={REGION}&endpoint=http://127.0.0.1:{free_port()}", RESOURCES)


def test_the_table_outlives_its_stack_and_costs_nothing_idle():
    table = yaml.safe_load(RESOURCES.read_text())["Resources"]["Table"]
    assert (table["DeletionPolicy"], table["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")
    properties = table["Properties"]
    assert properties["BillingMode"] == "PAY_PER_REQUEST"
    assert properties["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert properties["SSESpecification"] == {"SSEEnabled": True}
    keys = next(index for index in properties["GlobalSecondaryIndexes"] if index["IndexName"] == "keys")
    assert keys["Projection"] == {"ProjectionType": "KEYS_ONLY"}  # else every admission writes it too
