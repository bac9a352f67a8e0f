"""`POST /rr-chat/stream`: typed events, one provider after the other in strict turn, and what was said before."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.errors import StoreUnavailable
from shared.store.base import Admitted, Ask, Message, Refused
from shared.store.sqlite import SQLiteStore
from tests.functions.doors import Door, opened, refusal, until
from tests.server import PROVIDER_KEY, Server
from tests.upstream import Step, Upstream, answer, chunk, chunks, close, echo, error, event, head, send, sleep

NAMES = ["mistral", "groq", "deepseek"]
SOME: dict[str, Any] = {"user_id": "user-abc", "session_id": "session-xyz", "message": "Hello"}
CLASSES = {"retryable", "non_retryable", "provider_switch", "chunk_timeout", "request_timeout", "client"}
FIELDS = {
    "provider": {"provider", "model_id"},
    "delta": {"content"},
    "usage": {"tokens", "accurate"},
    "error": {"message", "code", "class"},
    "rate_limited": {"retry_after_ms"},
    "warning": {"message"},
    "done": set[str](),
}
"""What each type of event has beside `type` and `ts`."""


@asynccontextmanager
async def three(
    folder: Path, upstream: Upstream, names: Sequence[str] = NAMES, store: Any = None, **environ: Any
) -> AsyncIterator[Door]:
    """Those providers, all of them the same fake one, told apart by their default models."""
    accounts = {"OPENAI_API_KEY": ""}
    for name in names:
        accounts |= {f"{name.upper()}_API_KEY": PROVIDER_KEY, f"{name.upper()}_BASE_URL": upstream.url}
    async with opened(folder, upstream.url, store, **accounts | environ) as door:
        yield door


@pytest.fixture
async def trio(tmp_path: Path, provider: Upstream) -> AsyncIterator[Door]:
    async with three(tmp_path, provider) as door:
        yield door


async def take_turn(door: Door, key: str, **more: Any) -> httpx.Response:
    return await door.ask("POST", "/rr-chat/stream", {**SOME, **more}, key)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """All events, each checked against the schema, and their order."""
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    lines = [line for line in response.text.split("\n\n")[:-1] if not line.startswith(":")]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    found = [json.loads(line[6:]) for line in lines]
    for each in found:
        assert each.keys() == {"type", "ts"} | FIELDS[each["type"]]
        assert abs(each["ts"] / 1000 - time.time()) < 60
        if each["type"] == "error":
            assert each["class"] in CLASSES
    kinds = [each["type"] for each in found]
    assert kinds.count("done") == 1
    assert kinds[-1] == "done"
    assert kinds.count("provider") <= 1
    if "delta" in kinds:
        assert kinds[0] == "provider"
    return found


def kinds(response: httpx.Response) -> list[str]:
    return [each["type"] for each in events(response)]


def text(response: httpx.Response) -> str:
    return "".join(each["content"] for each in events(response) if each["type"] == "delta")


def who(response: httpx.Response) -> str:
    return next(each["provider"] for each in events(response) if each["type"] == "provider")


def cut(*texts: str) -> list[Step]:
    """A stream of these texts that breaks off."""
    opened = send(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
    return [opened, *(chunk(event({"choices": [{"index": 0, "delta": {"content": each}}]})) for each in texts)]


def by_model(door: Door) -> dict[str, str]:
    return {to.model: to.provider.name for to in door.services.catalog.defaults()}


# The events --------------------------------------------------------------------------------------------------------


async def test_an_answer_is_provider_deltas_usage_done(trio: Door, provider: Upstream) -> None:
    answered = await take_turn(trio, (await trio.make())["key"])
    assert kinds(answered) == ["provider", *["delta"] * 5, "usage", "done"]
    first, *_, usage, _ = events(answered)
    assert text(answered) == "Hello"
    assert (first["provider"], first["model_id"]) == (by_model(trio)[provider.seen[0].json["model"]], first["model_id"])
    assert first["model_id"] == provider.seen[0].json["model"]
    assert usage["accurate"] is True
    assert answered.headers["x-request-id"].startswith("gen-")
    assert answered.headers["cache-control"] == "no-store"


async def test_tokens_that_nobody_counted_are_estimated_and_told_so(trio: Door, provider: Upstream) -> None:
    asked = {"model": "m", "messages": [{"role": "user", "content": "four little words here"}]}
    lines = [event(each) for each in chunks("chat/completions", asked)]
    provider.next(*cut(), *map(chunk, lines), chunk(b"data: [DONE]\n\n"), send(b"0\r\n\r\n"))
    usage = events(await take_turn(trio, (await trio.make())["key"]))[-2]
    assert (usage["type"], usage["accurate"]) == ("usage", False)
    assert 3 <= usage["tokens"] <= 40


@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_an_answer_that_is_cut_off_is_marked(trio: Door, provider: Upstream, reason: str) -> None:
    end = event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    provider.next(*cut("half"), chunk(end), chunk(b"data: [DONE]\n\n"), send(b"0\r\n\r\n"))
    answered = await take_turn(trio, (await trio.make())["key"])
    assert kinds(answered) == ["provider", "delta", "warning", "usage", "done"]


async def test_a_refusal_of_the_model_is_its_text(trio: Door, provider: Upstream) -> None:
    said = event({"choices": [{"index": 0, "delta": {"refusal": "I cannot."}, "finish_reason": "stop"}]})
    provider.next(*cut(), chunk(said), chunk(b"data: [DONE]\n\n"), send(b"0\r\n\r\n"))
    assert text(await take_turn(trio, (await trio.make())["key"])) == "I cannot."


async def test_the_provider_event_names_who_answered_not_who_was_asked_first(trio: Door, provider: Upstream) -> None:
    """The seed named the one whose turn it was."""
    turns = by_model(trio)
    first = next(model for model, name in turns.items() if name == NAMES[0])
    provider.always(first, answer(401, error("no")))
    key = (await trio.make())["key"]
    answered = [await take_turn(trio, key) for _ in range(4)]
    assert NAMES[0] not in {who(response) for response in answered}
    for response in answered:
        assert text(response) == "Hello"
        row = await trio.store.generation(response.headers["x-request-id"])
        assert row is not None
        assert row.doc["provider"] == who(response)


async def test_the_end_of_the_keys_limit_is_a_stream_of_two_events(trio: Door, provider: Upstream) -> None:
    key = (await trio.make(rpm=1))["key"]
    await take_turn(trio, key)
    refused = await take_turn(trio, key)
    [limited, _] = events(refused)
    assert kinds(refused) == ["rate_limited", "done"]
    assert 1000 <= limited["retry_after_ms"] <= 60_000
    assert limited["retry_after_ms"] == int(refused.headers["retry-after"]) * 1000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(provider.seen) == 1


async def test_so_is_that_all_providers_are_busy(trio: Door, provider: Upstream) -> None:
    for model in by_model(trio):
        provider.always(model, answer(429, error("busy"), {"retry-after": "7"}))
    made = await trio.make(balance_usd=1)
    refused = await take_turn(trio, made["key"])
    assert kinds(refused) == ["rate_limited", "done"]
    assert events(refused)[0]["retry_after_ms"] == 7000
    key = await trio.key(made["id"])
    assert (key.spent, key.open) == (0, {})


@pytest.mark.parametrize("fields", [{"role": "user", "enabled": False}, {"balance_usd": 0}, {"models": []}, {"tpm": 5}])
async def test_any_other_refusal_is_plain_json(trio: Door, provider: Upstream, fields: Any) -> None:
    refused = await take_turn(trio, (await trio.make(**fields))["key"])
    assert refused.status_code == (429 if "tpm" in fields else 403)
    refusal(refused)
    assert refusal(await take_turn(trio, "lr-nobody")) == (401, "invalid_api_key", None)
    assert provider.seen == []


CASES: dict[str, tuple[list[str], dict[str, str], list[Step], list[str], str, str | None]] = {
    # who is there, with what settings, and does what; the events; the class and the code
    "disconnected": (NAMES, {}, [*cut("Hel"), close()], ["provider", "delta"], "retryable", "upstream_unavailable"),
    "error event": (
        NAMES, {}, [*cut("Hel"), chunk(event(error("gone", code="server_error")))], ["provider", "delta"],
        "retryable", "upstream_error",
    ),
    "busy in the midst": (
        NAMES, {}, [*cut("Hel"), chunk(event({"error": {"message": "slow", "code": 429}}))], ["provider", "delta"],
        "retryable", "rate_limit_exceeded",
    ),
    "gap": (NAMES, {"GAP_TIMEOUT": "0.2"}, [*cut("Hel"), sleep(5)], ["provider", "delta"], "chunk_timeout",
            "upstream_timeout"),
    "total": (NAMES, {"TOTAL_TIMEOUT": "1"}, [*cut("Hel"), sleep(5)], ["provider", "delta"], "request_timeout",
              "upstream_timeout"),
    "silence": (["groq"], {"FIRST_CONTENT_TIMEOUT": "0.2"}, [sleep(5)], [], "request_timeout", "upstream_timeout"),
    "one of one": (["groq"], {}, [answer(500, error("oh"))], [], "retryable", "upstream_error"),
    "our key": (["groq"], {}, [answer(401, error("no"))], [], "non_retryable", "upstream_auth_error"),
    "nobody left": (NAMES, {}, [answer(500, error("oh"))], [], "provider_switch", "upstream_error"),
    "nobody left, all silent": (
        ["groq", "mistral"], {"FIRST_CONTENT_TIMEOUT": "0.1"}, [sleep(5)], [], "provider_switch", "upstream_timeout",
    ),
    "the message": (NAMES, {}, [answer(400, error("bad"))], [], "client", None),
    "too long": (["groq"], {}, [answer(400, error("long", code="context_length_exceeded"))], [], "client",
                 "context_length_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_each_class_of_error_and_then_done(tmp_path: Path, provider: Upstream, case: str) -> None:
    names, environ, script, before, kind, code = CASES[case]
    async with three(tmp_path, provider, names, **environ) as door:
        for model in by_model(door):
            provider.always(model, *script)
        made = await door.make()
        failed = await take_turn(door, made["key"])
        told = events(failed)
        assert [each["type"] for each in told] == [*before, "error", "done"]
        assert (told[-2]["class"], told[-2]["code"]) == (kind, code)
        assert PROVIDER_KEY not in failed.text
        row = await door.store.generation(failed.headers["x-request-id"])
        assert row is not None
        assert row.doc["status"] == "failed"
        assert (await door.key(made["id"])).open == {}


async def test_a_safety_check_is_the_clients_error(tmp_path: Path, provider: Upstream) -> None:
    (tmp_path / "gateway.toml").write_text('[[safety]]\nname = "words"\ncontains = ["hack"]\n')
    async with three(tmp_path, provider) as door:
        refused = await take_turn(door, (await door.make())["key"], message="how to hack")
        assert kinds(refused) == ["error", "done"]
        assert events(refused)[0]["class"] == "client"
        assert events(refused)[0]["code"] == "content_policy_violation"
    assert provider.seen == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"user_id": None}, "user_id"), ({"session_id": ""}, "session_id"), ({"session_id": "x" * 257}, "session_id"),
        ({"user_id": 5}, "user_id"), ({"message": ""}, "message"), ({"message": ["x"]}, "message"),
        ({"message": "x" * 1_000_001}, "message"),
    ],
)  # fmt: skip
async def test_a_wrong_body_is_refused_by_the_field(trio: Door, provider: Upstream, change: Any, param: str) -> None:
    key = (await trio.make())["key"]
    body = {**SOME, **change}
    assert refusal(await trio.ask("POST", "/rr-chat/stream", body, key))[::2] == (400, param)
    del body[param]
    missing = await trio.ask("POST", "/rr-chat/stream", body, key)
    assert refusal(missing) == (400, "missing_required_parameter", param)
    assert refusal(await trio.ask("POST", "/rr-chat/stream", body, None))[0] == 401
    assert provider.seen == []


# Whose turn it is --------------------------------------------------------------------------------------------------


async def test_turns_go_round_strictly_over_two_processes(tmp_path: Path, provider: Upstream) -> None:
    async with AsyncExitStack() as stack:
        doors = [await stack.enter_async_context(three(tmp_path, provider)) for _ in range(2)]
        made = await doors[0].make()
        order = [who(await take_turn(doors[n % 2], made["key"])) for n in range(9)]
        assert set(order[:3]) == set(NAMES)
        assert order == order[:3] * 3
        together = await asyncio.gather(*(take_turn(doors[n % 2], made["key"]) for n in range(30)))
        assert Counter(map(who, together)) == dict.fromkeys(NAMES, 10)


async def test_each_key_and_each_route_has_turns_of_its_own(trio: Door) -> None:
    one, other = [(await trio.make())["key"] for _ in range(2)]
    order = []
    for _ in range(3):
        order.append(who(await take_turn(trio, one)))
        await take_turn(trio, other)
        for _ in range(2):
            assert (await trio.chat(one, "auto:round-robin")).status_code == 200
    assert set(order) == set(NAMES)


async def test_a_refused_request_takes_no_turn(trio: Door) -> None:
    made = await trio.make(rpm=2)
    order = [who(await take_turn(trio, made["key"])) for _ in range(2)]
    for _ in range(4):
        assert kinds(await take_turn(trio, made["key"])) == ["rate_limited", "done"]
    await trio.ask("PATCH", f"/admin/keys/{made['id']}", {"rpm": 100})
    order.append(who(await take_turn(trio, made["key"])))
    assert set(order) == set(NAMES)


async def test_members_are_who_the_deployer_names(tmp_path: Path, provider: Upstream) -> None:
    members = "Groq/llama-3.1-8b-instant, deepseek/deepseek-reasoner,cohere/command-r"
    async with three(tmp_path, provider, ROUND_ROBIN=members) as door:  # Cohere is off
        key = (await door.make())["key"]
        models = [events(await take_turn(door, key))[0]["model_id"] for _ in range(4)]
    assert models == ["llama-3.1-8b-instant", "deepseek-reasoner"] * 2


@pytest.mark.parametrize("members", ["nobody/x", "groq", "groq/../x", "groq/a b"])
async def test_a_wrong_member_is_told_to_the_deployer_at_the_start(
    tmp_path: Path, provider: Upstream, members: str
) -> None:
    with pytest.raises(ValueError, match=r"^ROUND_ROBIN: "):
        async with three(tmp_path, provider, ROUND_ROBIN=members):
            pass


async def test_where_no_member_is_on_the_caller_is_told_what_is_missing(tmp_path: Path, provider: Upstream) -> None:
    async with three(tmp_path, provider, ROUND_ROBIN="cohere/command-r") as door:
        refused = await take_turn(door, (await door.make())["key"])
        assert refusal(refused) == (503, "no_provider", None)
        assert "COHERE_API_KEY" in refused.json()["error"]["message"]
        assert (await take_turn(door, "lr-nobody")).status_code == 401


# What was said before ----------------------------------------------------------------------------------------------


async def test_the_last_ten_messages_are_the_context(trio: Door, provider: Upstream) -> None:
    key = (await trio.make())["key"]
    for number in range(8):
        assert text(await take_turn(trio, key, message=f"message {number}")) == f"message {number}"
    last = provider.seen[-1].json["messages"]
    said = [(role, f"message {number}") for number in range(2, 7) for role in ("user", "assistant")]
    assert [(each["role"], each["content"]) for each in last] == [*said, ("user", "message 7")]
    for change in ({"session_id": "another"}, {"user_id": "another"}):
        await take_turn(trio, key, **change)
        assert len(provider.seen[-1].json["messages"]) == 1
    await take_turn(trio, (await trio.make())["key"])
    assert len(provider.seen[-1].json["messages"]) == 1


async def test_what_was_never_answered_is_no_context(trio: Door, provider: Upstream) -> None:
    """Some providers take nothing but turns: two messages of a user in a row would end the session there."""
    key = (await trio.make())["key"]
    for model in by_model(trio):
        provider.always(model, answer(400, error("bad")))
    await take_turn(trio, key, message="never answered")
    provider.by_model.clear()
    provider.next(*cut("half an ans"), close())
    await take_turn(trio, key, message="broken off")
    await take_turn(trio, key, message="again")
    asked = [(each["role"], each["content"]) for each in provider.seen[-1].json["messages"]]
    assert asked == [("user", "broken off"), ("assistant", "half an ans"), ("user", "again")]


async def test_nothing_of_ours_is_forwarded(trio: Door, provider: Upstream) -> None:
    await take_turn(trio, (await trio.make())["key"])
    assert provider.seen[0].json.keys() <= {"model", "messages", "stream", "stream_options", "user"}


class Together(SQLiteStore):
    """Reads of sessions and admissions wait for one another: who asks for one after the other waits for ever."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.calls: list[str] = []
        self.begun = {"admit": asyncio.Event(), "said": asyncio.Event()}

    async def _meet(self, name: str, other: str) -> None:
        self.calls.append(name)
        self.begun[name].set()
        async with asyncio.timeout(5):
            await self.begun[other].wait()

    async def admit(self, ask: Ask) -> Admitted | Refused:
        await self._meet("admit", "said")
        return await super().admit(ask)

    async def said(self, *args: Any, **more: Any) -> list[Message]:
        await self._meet("said", "admit")
        return await super().said(*args, **more)

    async def key(self, key_id: str) -> Any:
        self.calls.append("key")
        return await super().key(key_id)


async def test_the_context_is_read_beside_the_admission(tmp_path: Path, provider: Upstream) -> None:
    store = Together(str(tmp_path / "lightrail.db"))
    async with three(tmp_path, provider, store=store) as door:
        made = await door.make()
        store.calls.clear()
        assert text(await take_turn(door, made["key"])) == "Hello"
        assert sorted(store.calls) == ["admit", "said"]


async def test_without_the_history_there_is_still_an_answer(tmp_path: Path, provider: Upstream) -> None:
    class Forgetful(SQLiteStore):
        async def said(self, *args: Any, **more: Any) -> list[Message]:
            raise StoreUnavailable("no history")

        async def say(self, *args: Any, **more: Any) -> None:
            raise StoreUnavailable("no history")

    async with three(tmp_path, provider, store=Forgetful(str(tmp_path / "lightrail.db"))) as door:
        made = await door.make(balance_usd=1)
        assert text(await take_turn(door, made["key"])) == "Hello"
        assert (await door.key(made["id"])).open == {}


async def test_the_context_is_held_too(trio: Door, provider: Upstream) -> None:
    """What a long session costs is known before it is sent: a budget that cannot bear it is not overspent."""
    made = await trio.make(balance_usd=0.02)
    long = [Message(f"m-{n}", role, "word " * 20_000, 1, {}) for n, role in enumerate(["user", "assistant"] * 5)]
    assert text(await take_turn(trio, made["key"], session_id="short")) == "Hello"
    await trio.store.say(made["id"], SOME["user_id"], SOME["session_id"], long)
    seen, before = len(provider.seen), await trio.key(made["id"])
    refused = await take_turn(trio, made["key"])
    assert refusal(refused)[:2] == (403, "insufficient_quota")
    after = await trio.key(made["id"])
    assert (len(provider.seen), after.balance, after.open) == (seen, before.balance, {})


# Who hangs up ------------------------------------------------------------------------------------------------------


async def test_what_was_said_until_the_caller_left_is_kept_and_marked(server: Server, provider: Upstream) -> None:
    made = await asyncio.to_thread(server.key)
    provider.next(echo(pace=0.05))
    data = json.dumps({**SOME, "message": "a story without an end"}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /rr-chat/stream HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer %b\r\ncontent-length: %d\r\n\r\n" % (made["key"].encode(), len(data)) + data
    )
    await reader.readuntil(b'"delta"')
    writer.close()
    await writer.wait_closed()
    await until(lambda: provider.seen[0].closed_after is not None)
    path = f"/history?user_id={SOME['user_id']}&session_id={SOME['session_id']}"
    history: list[Any] = []
    async with asyncio.timeout(5):
        while not history:
            history = (await asyncio.to_thread(server.ask, "GET", path, made["key"]))[1]["history"]
    asked, said = history
    assert (asked["role"], asked["content"]) == ("user", "a story without an end")
    assert (said["role"], said["status"], said["partial"]) == ("assistant", "cancelled", True)
    assert "a story without an end".startswith(said["content"])
    assert said["content"]
