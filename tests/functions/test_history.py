"""`/history`: what was said in a session, to the key that it belongs to, and to nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from shared.errors import StoreUnavailable
from shared.store.base import Message
from shared.store.sqlite import SQLiteStore
from tests.functions.doors import Door, opened, refusal
from tests.upstream import Upstream, answer, chunk, close, error, event, head, send

IDS = {"user_id": "u-1", "session_id": "s-1"}
KEPT = {"user": "u-1", "session_id": "s-1", "store": True}


def content(*texts: str) -> list[dict[str, str]]:
    """Messages of a user's and an assistant's, in turns."""
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(texts)]


async def history(door: Door, key: str, **ids: str) -> list[Any]:
    answered = await door.ask("GET", f"/history?{urlencode({**IDS, **ids})}", key=key)
    assert answered.status_code == 200
    assert answered.json().keys() == {"history"}
    return answered.json()["history"]


def brief(messages: list[Any]) -> list[dict[str, str]]:
    return [{"role": each["role"], "content": each["content"]} for each in messages]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_with_store_and_a_session_is_kept(door: Door, provider: Upstream, stream: bool) -> None:
    key = (await door.make())["key"]
    for text in ("one", "two"):
        said = await door.chat(key, messages=content(text), stream=stream, **KEPT)
    asked, answered = (await history(door, key))[-2:]
    assert brief(await history(door, key)) == content("one", "one", "two", "two")
    assert answered["generation_id"] == said.headers["x-request-id"]
    assert (answered["provider"], answered["model"], answered["status"]) == ("openai", "gpt-4o-mini", "ok")
    assert "partial" not in answered
    assert asked.keys() == {"role", "content", "created"}
    for seen in provider.seen:
        assert not {"store", "session_id"} & seen.json.keys()
        assert len(seen.json["messages"]) == 1, "no context is added here"


async def test_without_either_of_the_two_nothing_is_kept(door: Door, provider: Upstream) -> None:
    key = (await door.make())["key"]
    await door.chat(key, session_id="s-1", user="u-1")
    await door.chat(key, store=True, user="u-1")
    await door.chat(key, session_id="s-1", user="u-1", store=False)
    assert await history(door, key) == []
    assert [seen.json.get("store") for seen in provider.seen] == [None, True, None]


@pytest.mark.parametrize("user", [None, "", "x" * 257])
async def test_a_session_needs_a_user_before_anything_is_spent(door: Door, provider: Upstream, user: Any) -> None:
    made = await door.make(rpm=5)
    refused = await door.chat(made["key"], **{**KEPT, "user": user})
    assert refusal(refused) == (400, "missing_required_parameter", "user")
    assert (provider.seen, (await door.key(made["id"])).windows) == ([], {})
    empty = await door.chat(made["key"], **{**KEPT, "session_id": ""})
    assert refusal(empty) == (400, "empty_string", "session_id")


async def test_only_chats_are_history(door: Door) -> None:
    key = (await door.make())["key"]
    for path, body in (
        ("/v1/completions", {"model": "openai/gpt-3.5-turbo-instruct", "prompt": "x"}),
        ("/v1/embeddings", {"model": "openai/text-embedding-3-small", "input": "x"}),
    ):
        assert (await door.ask("POST", path, {**body, **KEPT}, key)).status_code == 200
    assert await history(door, key) == []


async def test_the_results_and_calls_of_tools_are_no_messages(door: Door, provider: Upstream) -> None:
    key = (await door.make())["key"]
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [{"role": "user", "content": [{"type": "text", "text": "weather"}, {"type": "text", "text": "now?"}]}]
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    body = {"choices": [{"index": 0, "message": turn, "finish_reason": "tool_calls"}]}
    provider.next(answer(200, body))
    await door.chat(key, messages=asked, **KEPT)
    again = [*asked, turn, {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]
    await door.chat(key, messages=again, **KEPT)
    assert [each["role"] for each in await history(door, key)] == ["user", "assistant"]
    assert (await history(door, key))[0]["content"] == "weather\nnow?"


async def test_an_answer_that_broke_off_is_kept_and_marked(door: Door, provider: Upstream) -> None:
    key = (await door.make())["key"]
    opened_ = send(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
    provider.next(opened_, chunk(event({"choices": [{"index": 0, "delta": {"content": "half an"}}]})), close())
    await door.chat(key, messages=content("tell"), stream=True, **KEPT)
    provider.next(answer(400, error("no")))
    await door.chat(key, messages=content("again"), **KEPT)
    told, half, lonely = await history(door, key)
    assert brief([told, half, lonely]) == [*content("tell", "half an"), *content("again")]
    assert (half["status"], half["partial"]) == ("failed", True)


async def test_a_hit_in_the_cache_is_said_too(door: Door, provider: Upstream) -> None:
    key = (await door.make())["key"]
    for stream in (False, True):
        await door.chat(key, messages=content("one"), cache={}, stream=stream, **KEPT)
    assert brief(await history(door, key)) == content("one", "one", "one", "one")
    assert len(provider.seen) == 1


async def test_the_latest_fifty_come_oldest_first(door: Door) -> None:
    made = await door.make()
    said = [Message(f"m-{n:03}", "user", str(n), n) for n in range(60)]
    await door.store.say(made["id"], "u-1", "s-1", said)
    assert [each["content"] for each in await history(door, made["key"])] == [str(n) for n in range(10, 60)]


async def test_post_is_get_and_needs_the_two_ids_only(door: Door) -> None:
    """The seed's own demanded a message as well, against its documentation."""
    key = (await door.make())["key"]
    await door.chat(key, messages=content("one"), **KEPT)
    got = await history(door, key)
    for body in (IDS, {**IDS, "message": "whatever"}):
        assert (await door.ask("POST", "/history", body, key)).json() == {"history": got}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("name", IDS)
async def test_both_ids_are_required(door: Door, method: str, name: str) -> None:
    key = (await door.make())["key"]

    async def ask(ids: dict[str, str]) -> Any:
        return await door.ask(method, f"/history?{urlencode(ids)}", ids if method == "POST" else None, key)

    ids = {**IDS}
    del ids[name]
    assert refusal(await ask(ids)) == (400, "missing_required_parameter", name)
    assert refusal(await ask({**IDS, name: ""})) == (400, "empty_string", name)
    assert refusal(await ask({**IDS, name: "x" * 257})) == (400, "string_above_max_length", name)


async def test_another_keys_ids_are_simply_not_there(door: Door, provider: Upstream) -> None:
    """The seed gave any session to whoever guessed its id."""
    mine, yours = [(await door.make())["key"] for _ in range(2)]
    await door.chat(mine, messages=content("a secret"), **KEPT)
    await door.ask("POST", "/rr-chat/stream", {**IDS, "message": "another secret"}, mine)
    assert await history(door, yours) == []
    assert (await door.ask("POST", "/history", IDS, yours)).json() == {"history": []}
    assert (await door.ask("GET", "/history/sessions?user_id=u-1", key=yours)).json()["sessions"] == []
    assert (await door.ask("DELETE", f"/history?{urlencode(IDS)}", key=yours)).json() == {"deleted": 0}
    await door.ask("POST", "/rr-chat/stream", {**IDS, "message": "mine"}, yours)
    assert "secret" not in provider.seen[-1].body.decode()
    assert len(await history(door, mine)) == 4
    admin = await door.ask("GET", f"/history?{urlencode(IDS)}")
    assert admin.json() == {"history": []}, "an administrator's history is his own, too"


async def test_without_a_good_key_there_is_no_history(door: Door) -> None:
    made = await door.make(enabled=False)
    paths = [("GET", "/history"), ("POST", "/history"), ("GET", "/history/sessions"), ("DELETE", "/history")]
    for method, path in paths:
        body = IDS if method == "POST" else None
        assert refusal(await door.ask(method, f"{path}?{urlencode(IDS)}", body, None))[0] == 401
        assert refusal(await door.ask(method, f"{path}?{urlencode(IDS)}", body, made["key"]))[1] == "key_disabled"


async def test_sessions_are_listed_latest_first(door: Door) -> None:
    made = await door.make()
    for at, session in enumerate(["a", "b", "a"]):
        message = Message(f"m-{at}", "user", f"about {session}, {at}", 1000 + at)
        await door.store.say(made["id"], "u-1", session, [message])
    listed = await door.ask("GET", "/history/sessions?user_id=u-1", key=made["key"])
    assert listed.json()["sessions"] == [
        {"session_id": "a", "title": "about a, 0", "updated": 1002},
        {"session_id": "b", "title": "about b, 1", "updated": 1001},
    ]
    assert refusal(await door.ask("GET", "/history/sessions", key=made["key"]))[2] == "user_id"


async def test_one_session_is_forgotten_or_all_of_a_user(door: Door) -> None:
    key = (await door.make())["key"]
    for user, session in (("u-1", "s-1"), ("u-1", "s-2"), ("u-1", "s-3"), ("u-2", "s-1")):
        await door.chat(key, messages=content("x"), user=user, session_id=session, store=True)
    for path, status, deleted in (
        ("/history?user_id=u-1&session_id=s-1", 200, 2),
        ("/history?user_id=u-1&session_id=s-1", 200, 0),
        ("/history?user_id=u-1&session_id=", 400, None),
        ("/history?user_id=u-1&sesion_id=s-2", 400, None),
        ("/history?session_id=s-2", 400, None),
        ("/history?user_id=u-1", 200, 4),
    ):
        answered = await door.ask("DELETE", path, key=key)
        assert (answered.status_code, answered.json().get("deleted")) == (status, deleted)
        assert len(await history(door, key, session_id="s-2")) == (0 if deleted == 4 else 2)
    assert len(await history(door, key, user_id="u-2")) == 2


@pytest.mark.parametrize("strange", ["\u2028 #/?&", "a#b", "\U0001f600", "' OR 1=1 --", "\x00", "..", "x" * 256])
async def test_ids_are_just_names(door: Door, strange: str) -> None:
    key = (await door.make())["key"]
    await door.chat(key, messages=content("x"), user=strange, session_id=strange, store=True)
    assert len(await history(door, key, user_id=strange, session_id=strange)) == 2
    assert (await door.ask("GET", f"/history/sessions?{urlencode({'user_id': strange})}", key=key)).json()["sessions"][
        0
    ]["session_id"] == strange


async def test_a_history_that_cannot_be_written_costs_no_answer(tmp_path: Path, provider: Upstream) -> None:
    class Forgetful(SQLiteStore):
        async def say(self, *args: Any, **more: Any) -> None:
            raise StoreUnavailable("no history")

    async with opened(tmp_path, provider.url, Forgetful(str(tmp_path / "lightrail.db"))) as door:
        made = await door.make(balance_usd=1)
        said = await door.chat(made["key"], messages=content("one"), **KEPT)
        assert said.json()["choices"][0]["message"]["content"] == "one"
        row = await door.store.generation(said.json()["id"])
        assert row is not None
        assert (row.doc["status"], (await door.key(made["id"])).open) == ("ok", {})


async def test_a_long_message_is_cut_and_says_so(door: Door, provider: Upstream) -> None:
    key = (await door.make())["key"]
    await door.chat(key, messages=content("x" * 310_000), **KEPT)
    asked, said = await history(door, key)
    assert (len(asked["content"]), asked["cut"], len(said["content"]), said["cut"]) == (300_000, 10_000) * 2
    assert len(provider.seen) == 1
