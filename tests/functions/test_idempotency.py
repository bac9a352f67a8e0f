"""`Idempotency-Key`: a request sent again is answered as the first one was, and paid once."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.errors import StoreUnavailable
from shared.idempotency import Idempotency, InProgress, Replay, Ticket
from shared.keys import Credential
from shared.store.base import Generation
from shared.store.sqlite import SQLiteStore
from tests.functions.doors import MODEL, Door, opened, refusal, until
from tests.server import ADMIN_KEY, Server
from tests.upstream import Step, Upstream, answer, chunk, close, echo, error, event, head, send, sleep

HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT = {"model": MODEL, "messages": HELLO}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "stream": ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    "completions": ("/v1/completions", {"model": "openai/gpt-3.5-turbo-instruct", "prompt": "hello"}),
    "embeddings": ("/v1/embeddings", {"model": "openai/text-embedding-3-small", "input": "hello"}),
    "generate": ("/generate", {"prompt": "hello", "cache": {"mode": "off"}}),
    "typed": ("/rr-chat/stream", {"user_id": "u", "session_id": "s", "message": "hello"}),
}


async def send_it(door: Door, key: str, body: Any = None, given: str = "k-1", path: str = "") -> httpx.Response:
    return await door.ask("POST", path or "/v1/chat/completions", body or CHAT, key, Idempotency_Key=given)


async def rows(door: Door, key_id: str) -> list[Generation]:
    return await door.store.generations(key_id, int(time.time()) // 86400)


def told(response: httpx.Response) -> Any:
    """What must be the same in a retry: all but what is about this very exchange."""
    own = ("server-timing", "idempotent-replayed")
    return response.status_code, response.content, {k: v for k, v in response.headers.items() if k not in own}


@pytest.mark.parametrize("kind", ASKED)
async def test_a_retry_gets_the_first_answer_byte_for_byte_and_one_bill(
    door: Door, provider: Upstream, kind: str
) -> None:
    path, body = ASKED[kind]
    made = await door.make(rpm=100, tpm=100_000, balance_usd=1)
    first = await send_it(door, made["key"], body, path=path)
    key = await door.key(made["id"])
    again = [await send_it(door, made["key"], body, path=path) for _ in range(3)]
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    for response in again:
        assert told(response)[:2] == told(first)[:2]
        assert response.headers["idempotent-replayed"] == "true"
        assert response.headers["content-type"] == first.headers["content-type"]
        assert response.headers["x-request-id"] == first.headers["x-request-id"]
        assert response.headers["cache-control"] == "no-store"
    assert len(provider.seen) == 1
    [row] = await rows(door, made["id"])
    assert row.id == first.headers["x-request-id"]
    assert await door.key(made["id"]) == key
    assert key.spent == row.cost > 0


@pytest.mark.parametrize("kind", ["chat", "stream"])
async def test_of_fifty_at_once_one_is_made(door: Door, provider: Upstream, kind: str) -> None:
    path, body = ASKED[kind]
    made = await door.make()
    provider.next(sleep(0.3), echo())
    answers = await asyncio.gather(*(send_it(door, made["key"], body, path=path) for _ in range(50)))
    counts = Counter(response.status_code for response in answers)
    assert counts.keys() <= {200, 409}
    assert counts[200] >= 1
    assert len({response.content for response in answers if response.status_code == 200}) == 1
    for response in answers:
        if response.status_code == 409:
            assert refusal(response) == (409, "idempotency_in_progress", None)
            assert response.headers["retry-after"] == "1"
    assert (len(provider.seen), len(await rows(door, made["id"]))) == (1, 1)
    assert (await send_it(door, made["key"], body, path=path)).headers["idempotent-replayed"] == "true"


async def test_the_same_name_for_another_request_is_refused(door: Door, provider: Upstream) -> None:
    made = await door.make()
    await send_it(door, made["key"])
    for path, body in (("", {**CHAT, "seed": 1}), ("", {**CHAT, "stream": True}), ("/chat/completions", CHAT)):
        refused = await send_it(door, made["key"], body, path=path)
        assert refusal(refused) == (400, "idempotency_mismatch", "Idempotency-Key")
    assert len(provider.seen) == 1


async def test_another_keys_name_is_another_name(door: Door, provider: Upstream) -> None:
    answers = [await send_it(door, (await door.make())["key"]) for _ in range(2)]
    assert len({response.headers["x-request-id"] for response in answers}) == 2
    assert len(provider.seen) == 2


@pytest.mark.parametrize(
    ("limits", "more", "refused", "cure"),
    [
        ({"rpm": 1}, {}, (429, "rate_limit_exceeded"), {"rpm": 9}),
        ({"tpm": 50}, {"max_tokens": 90}, (429, "request_too_large_for_limit"), {"tpm": 900}),
        ({"balance_usd": 0.0000001}, {}, (403, "insufficient_quota"), {"balance_usd": 1}),
        ({"models": ["groq/*"]}, {}, (403, "model_not_allowed"), {"models": None}),
    ],
)
async def test_who_was_not_let_in_may_try_again_under_the_same_name(
    door: Door, provider: Upstream, limits: Any, more: Any, refused: Any, cure: Any
) -> None:
    made = await door.make(**limits)
    if "rpm" in limits:
        await door.chat(made["key"])
    provider.seen.clear()
    assert refusal(await send_it(door, made["key"], {**CHAT, **more}))[:2] == refused
    assert provider.seen == []
    assert (await door.ask("PATCH", f"/admin/keys/{made['id']}", cure)).status_code == 200
    again = await send_it(door, made["key"], {**CHAT, **more})
    assert (again.status_code, "idempotent-replayed" in again.headers, len(provider.seen)) == (200, False, 1)


FAILURES: dict[str, tuple[str, list[Step]]] = {
    "refused": ("chat", [answer(400, error("bad"))]),
    "failed": ("chat", [answer(200, b"{}")]),
    "failed before content": ("stream", [answer(500, error("bad"))]),
    "an error event": (
        "stream",
        [send(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})),
         chunk(event({"choices": [{"index": 0, "delta": {"content": "po"}}]})), close()],
    ),
    "an error event, typed": (
        "typed",
        [send(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})),
         chunk(event({"choices": [{"index": 0, "delta": {"content": "po"}}]})), close()],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
async def test_what_came_to_nothing_may_be_tried_again(door: Door, provider: Upstream, kind: str) -> None:
    """Also where the failure came as an event, within a 200."""
    (path, body), script = ASKED[FAILURES[kind][0]], FAILURES[kind][1]
    made = await door.make()
    provider.next(*script)
    provider.next(*script)  # for the second try of the gateway's own
    failed = await send_it(door, made["key"], body, path=path)
    assert failed.status_code >= 400 or b'"error"' in failed.content
    provider.queue.clear()
    again = await send_it(door, made["key"], body, path=path)
    assert (again.status_code, "idempotent-replayed" in again.headers) == (200, False)
    assert b'"error"' not in again.content
    assert (await send_it(door, made["key"], body, path=path)).content == again.content


async def test_what_was_never_valid_leaves_no_mark(door: Door) -> None:
    made = await door.make()
    assert refusal(await send_it(door, made["key"], {**CHAT, "temperature": 3}))[0] == 400
    assert refusal(await send_it(door, made["key"], {**CHAT, "model": "nobody/knows"}))[0] == 404
    assert (await send_it(door, made["key"])).status_code == 200


async def test_a_key_that_is_no_longer_good_gets_nothing_again(door: Door) -> None:
    made = await door.make()
    assert (await send_it(door, made["key"])).status_code == 200
    await door.ask("PATCH", f"/admin/keys/{made['id']}", {"enabled": False})
    other = {**CHAT, "seed": 1}
    for body in (CHAT, other):
        assert refusal(await send_it(door, made["key"], body)) == (403, "key_disabled", None)
    await door.ask("DELETE", f"/admin/keys/{made['id']}")
    for body in (CHAT, other):
        assert refusal(await send_it(door, made["key"], body)) == (401, "invalid_api_key", None)


@pytest.mark.parametrize("given", ["", "x" * 256, "caf\u00e9", "a\tb"])
async def test_a_malformed_name_is_refused_by_name(door: Door, provider: Upstream, given: str) -> None:
    made = await door.make()
    named = {"authorization": f"Bearer {made['key']}", "idempotency-key": given.encode("latin-1")}
    for bearer, status in ((made["key"], 400), (made["key"][:-6] + "000000", 401)):
        refused = await door.client.post(
            "/v1/chat/completions", json=CHAT, headers={**named, "authorization": f"Bearer {bearer}"}
        )
        assert refused.status_code == status
        assert status == 401 or refusal(refused) == (400, "invalid_value", "Idempotency-Key")
    assert provider.seen == []


async def test_a_name_given_twice_is_one_name(door: Door, provider: Upstream) -> None:
    made = await door.make()
    bearer = ("authorization", f"Bearer {made['key']}")
    for names in (("a", "b"), ("a",), ("b",), ("a", "b")):
        headers = [bearer, *(("idempotency-key", name) for name in names)]
        assert (await door.client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
    assert len(provider.seen) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_too_long_to_keep_is_not_made_again(door: Door, provider: Upstream, stream: bool) -> None:
    made = await door.make()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * (310_000 if not stream else 3_000)}]}
    first = await send_it(door, made["key"], {**body, "stream": stream})
    assert len(first.content) > 300_000
    again = await send_it(door, made["key"], {**body, "stream": stream})
    assert refusal(again) == (409, "idempotency_in_progress", None)
    assert again.headers["x-should-retry"] == "false"
    assert first.headers["x-request-id"] in again.json()["error"]["message"]
    assert len(provider.seen) == 1


async def test_up_to_300_kilobytes_are_kept(door: Door, provider: Upstream) -> None:
    made = await door.make()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 299_000}]}
    first, again = [await send_it(door, made["key"], body) for _ in range(2)]
    assert 299_000 < len(first.content) <= 300_000
    assert (first.content, len(provider.seen)) == (again.content, 1)


class NoMarks(SQLiteStore):
    down = False

    async def write_note(self, *args: Any, **more: Any) -> bool:
        if self.down:
            raise StoreUnavailable("The store cannot be reached.")
        return await super().write_note(*args, **more)


async def test_without_the_store_nothing_is_made(tmp_path: Path, provider: Upstream) -> None:
    store = NoMarks(str(tmp_path / "lightrail.db"))
    async with opened(tmp_path, provider.url, store) as door:
        made = await door.make()
        store.down = True
        assert refusal(await send_it(door, made["key"])) == (503, "store_unavailable", None)
        assert provider.seen == []
        assert (await door.key(made["id"])).open == {}
        store.down = False
        assert (await send_it(door, made["key"])).status_code == 200


async def test_an_answer_that_could_not_be_kept_is_not_made_twice(tmp_path: Path, provider: Upstream) -> None:
    """The mark of the first stands until it may have died: so long its retries are told that it is running."""
    store = NoMarks(str(tmp_path / "lightrail.db"))
    async with opened(tmp_path, provider.url, store) as door:
        made = await door.make()
        provider.next(sleep(0.1), echo())
        first = asyncio.ensure_future(send_it(door, made["key"]))
        await until(lambda: len(provider.seen) == 1)
        store.down = True
        assert (await first).status_code == 200
        store.down = False
        assert refusal(await send_it(door, made["key"]))[:2] == (409, "idempotency_in_progress")
        assert len(provider.seen) == 1


async def test_a_hit_in_the_cache_is_kept_under_its_name_as_any_answer(door: Door, provider: Upstream) -> None:
    made = await door.make()
    await door.chat(made["key"], cache={})
    first, again = [await send_it(door, made["key"], {**CHAT, "cache": {}}) for _ in range(2)]
    assert first.headers["x-lightrail-cache"] == "hit"
    assert told(first)[:2] == told(again)[:2]
    assert len(provider.seen) == 1


# The mark itself ---------------------------------------------------------------------------------------------------

WHO = Credential("key000000001", "its hash")


async def begin(store: Any, clock: Any = time.time, request_id: str = "r1", who: Credential = WHO) -> Ticket | Replay:
    return await Idempotency(store, clock).begin("k-1", who, "/v1", b"{}", request_id, 60)


@pytest.fixture
async def store(tmp_path: Path) -> Any:
    store = SQLiteStore(str(tmp_path / "marks.db"))
    yield store
    await store.close()


async def test_who_crashed_is_waited_for_no_longer_than_a_request_may_take(store: SQLiteStore) -> None:
    long_ago = time.time() - 61
    assert isinstance(await begin(store, lambda: long_ago), Ticket)
    assert isinstance(await begin(store, request_id="r2"), Ticket)
    with pytest.raises(InProgress):
        await begin(store, request_id="r3")


async def test_a_lost_reply_to_the_mark_is_no_other_request(tmp_path: Path) -> None:
    class LosesReplies(SQLiteStore):
        async def write_note(self, *args: Any, **more: Any) -> bool:
            await super().write_note(*args, **more)
            return await super().write_note(*args, **more)

    store = LosesReplies(str(tmp_path / "marks.db"))
    assert isinstance(await begin(store), Ticket)
    with pytest.raises(InProgress):
        await begin(store, request_id="r2")
    await store.close()


async def test_a_new_secret_is_another_caller(store: SQLiteStore) -> None:
    """Who holds the old one of a rotated key is not shown what the new one was told, nor can he block it."""
    assert isinstance(await begin(store), Ticket)
    assert isinstance(await begin(store, request_id="r2", who=Credential(WHO.key_id, "another hash")), Ticket)


# Over real sockets -------------------------------------------------------------------------------------------------


async def hang_up(server: Server, body: Any, key: str, provider: Upstream) -> None:
    """Ask, and leave while the answer is being made."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"idempotency-key: k-1\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
        % (key.encode(), len(data))
        + data
    )
    await until(lambda: len(provider.seen) == 1)
    if body.get("stream"):
        assert b"200" in await reader.readline()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_who_hung_up_gets_the_whole_answer_when_he_comes_back(
    server: Server, provider: Upstream, stream: bool
) -> None:
    made = await asyncio.to_thread(server.key, balance_usd=1)
    body = {**CHAT, "messages": [{"role": "user", "content": "a long story"}], "stream": stream}
    provider.next(echo(pace=0.03) if stream else sleep(0.3), *([] if stream else [echo()]))
    await hang_up(server, body, made["key"], provider)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        bearer = {"authorization": f"Bearer {made['key']}"}
        headers = {**bearer, "idempotency-key": "k-1", "content-type": "application/json"}

        async def again() -> httpx.Response:
            return await client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)

        early = await again()
        assert (early.status_code, early.headers["retry-after"]) == (409, "1")
        async with asyncio.timeout(5):
            while (late := await again()).status_code == 409:  # noqa: ASYNC110 what is waited for happens elsewhere
                await asyncio.sleep(0.05)
    assert late.headers["idempotent-replayed"] == "true"
    if stream:
        assert late.text.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in late.text.split("\n\n")[:-2]]
        deltas = [choice["delta"].get("content", "") for each in events for choice in each["choices"]]
        assert "".join(deltas) == "a long story"
    else:
        assert late.json()["choices"][0]["message"]["content"] == "a long story"
    assert [seen.closed_after for seen in provider.seen] == [None]
    listed = await asyncio.to_thread(server.ask, "GET", f"/admin/generations?key={made['id']}", ADMIN_KEY)
    [row] = listed[1]["data"]
    assert (row["status"], row["id"]) == ("ok", late.headers["x-request-id"])
    key = (await asyncio.to_thread(server.ask, "GET", f"/admin/keys/{made['id']}", ADMIN_KEY))[1]
    assert (key["spend_usd"], key["open_requests"]) == (row["cost"]["total_cost"], 0)
