"""What was spent, by whom and on what: `/admin/usage`, `/admin/generations`, `/v1/generation`, `/v1/key`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from shared import books
from shared.keys import time_ordered
from shared.store.base import Generation
from tests.functions.doors import DAY, MODEL, Door, refusal, until
from tests.server import ADMIN_KEY
from tests.upstream import Upstream, answer, error, sleep

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
TODAY = int(time.time()) // DAY
SEED_FIELDS = {
    "id",
    "model",
    "provider",
    "created",
    "finish_reason",
    "tokens",
    "cost",
    "latency_ms",
    "api_key_id",
    "stream",
}
"""Of the seed web-server-guide.md, as are the inner ones below."""
SEED_TOKENS = {"prompt_tokens", "completion_tokens", "total_tokens"}
SEED_COST = {"prompt_cost", "completion_cost", "total_cost", "currency"}
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
SAID = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": USAGE,
}


def row(name: str, key_id: str, day: int, model: str, cost: int, prompt: int = 10, completion: int = 5) -> Generation:
    provider, _, model = model.partition("/")
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    doc = {"model": model, "provider": provider, "status": "ok", "tokens": tokens}
    return Generation(f"gen-{name}", key_id, day * DAY + 43_200, cost, doc)


def dated(row: Generation) -> Generation:
    """With an id as of its time, as sums go by."""
    return replace(row, id=f"gen-{time_ordered(row.created)}")


def date(day: int) -> str:
    return datetime.fromtimestamp(day * DAY, UTC).strftime("%Y-%m-%d")


async def usage(door: Door, **query: Any) -> Any:
    answered = await door.client.get("/admin/usage", params=query, headers=ADMIN)
    assert answered.status_code == 200, answered.text
    return answered.json()


@pytest.fixture
async def spent(door: Door) -> dict[str, str]:
    """Ada's and Bo's key ids, after four days of calls in which a dollar and a nano-dollar went."""
    ada, bo = (await door.make(name="ada"))["id"], (await door.make(name="bo", balance_usd=5))["id"]
    for each in (
        row("a1", ada, TODAY - 3, "openai/gpt-4o", 100_000_000, 100, 10),
        row("a2", ada, TODAY - 3, "groq/llama-3.3-70b-versatile", 20_000_000),
        row("a3", ada, TODAY - 2, "openai/gpt-4o", 300_000_000),
        row("a4", ada, TODAY, "openai/gpt-4o-mini", 1),
        row("b1", bo, TODAY - 3, "openai/gpt-4o", 80_000_000),
        row("b2", bo, TODAY - 1, "groq/gpt-4o", 500_000_000),
    ):
        await door.settled(each.key_id, dated(each))
    return {"ada": ada, "bo": bo}


BY_KEY = [("bo", 2, 0.58), ("ada", 4, 0.420000001)]
GROUPS = [
    ("model", [("gpt-4o", 4, 0.98), ("llama-3.3-70b-versatile", 1, 0.02), ("gpt-4o-mini", 1, 1e-09)]),
    ("provider", [("groq", 2, 0.52), ("openai", 4, 0.480000001)]),
    (
        "day",
        [
            (date(TODAY - 3), 3, 0.2),
            (date(TODAY - 2), 1, 0.3),
            (date(TODAY - 1), 1, 0.5),
            (date(TODAY), 1, 1e-09),
        ],
    ),
]


@pytest.mark.parametrize("rolled_up", [False, True], ids=["live", "rolled up"])
async def test_usage_is_the_same_whether_rows_are_live_or_rolled_up(
    door: Door, spent: dict[str, str], rolled_up: bool
) -> None:
    if rolled_up:
        for key_id in spent.values():
            key = await door.store.key(key_id)
            assert key
            await books.roll_up(door.store, key, int(time.time()))
        assert len(await door.store.rollups(spent["ada"], 0, TODAY)) >= 2
    by_key = await usage(door, group_by="key")
    assert by_key == await usage(door)
    assert [(entry["name"], entry["requests"], entry["cost_usd"]) for entry in by_key["data"]] == BY_KEY
    for group, expected in GROUPS:
        told = await usage(door, group_by=group)
        assert [(entry[group], entry["requests"], entry["cost_usd"]) for entry in told["data"]] == expected
        assert told["total"] == {
            "requests": 6,
            "prompt_tokens": 150,
            "completion_tokens": 35,
            "cost_usd": 1.000000001,
        }
        assert (told["object"], told["group_by"], told["from"], told["to"]) == (
            "list",
            group,
            date(TODAY - 29),
            date(TODAY),
        )
    keys = {key["id"]: key["spend_usd"] for key in (await door.ask("GET", "/admin/keys")).json()["data"]}
    assert {entry["key"]: entry["cost_usd"] for entry in by_key["data"]}.items() <= keys.items()
    assert sum(keys.values()) == by_key["total"]["cost_usd"]


async def test_usage_of_one_key_and_of_some_days(door: Door, spent: dict[str, str]) -> None:
    assert (await usage(door, key=spent["ada"], group_by="model"))["total"]["cost_usd"] == 0.420000001
    middle = await usage(door, group_by="day", **{"from": date(TODAY - 2), "to": date(TODAY - 1)})
    assert [entry["day"] for entry in middle["data"]] == [date(TODAY - 2), date(TODAY - 1)]
    one = await usage(door, **{"from": date(TODAY - 1), "to": date(TODAY - 1), "key": spent["bo"]})
    assert one["data"] == [
        {
            "key": spent["bo"],
            "name": "bo",
            "requests": 1,
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "cost_usd": 0.5,
        }
    ]
    nothing = await usage(door, **{"from": "2020-01-01", "to": "2020-12-31"})
    assert (nothing["data"], nothing["total"]["requests"]) == ([], 0)


async def test_sums_older_than_any_row_are_still_told(door: Door) -> None:
    made = (await door.make(name="old"))["id"]
    await door.settled(made, dated(row("old", made, TODAY - 5, "openai/gpt-4o", 7)))
    key = await door.store.key(made)
    assert key
    await books.roll_up(door.store, key, (TODAY - 2) * DAY)  # its day is summed up; now months go by
    assert (await usage(door, key=made))["total"]["cost_usd"] == 7e-09
    assert (await usage(door, key=made, **{"from": date(TODAY - 300)}))["total"]["cost_usd"] == 7e-09


async def test_a_failure_counts_as_a_request_without_cost(door: Door, provider: Upstream) -> None:
    made = await door.make(name="unlucky")
    provider.always("gpt-4o-mini", answer(500, error("no")))
    assert (await door.chat(made["key"])).status_code == 502
    total = (await usage(door, key=made["id"]))["total"]
    assert (total["requests"], total["cost_usd"]) == (1, 0)


BAD_QUERIES = [
    ("usage?group_by=user", "group_by", "invalid_value"),
    ("usage?group_by=", "group_by", "invalid_value"),
    ("usage?from=yesterday", "from", "invalid_value"),
    ("usage?to=2024-02-30", "to", "invalid_value"),
    ("usage?to=", "to", "invalid_value"),
    ("usage?to=0001-01-01", "to", "invalid_value"),
    ("usage?from=1969-12-31&to=1970-01-01", "from", "invalid_value"),
    ("usage?from=2024-01-02&to=2024-01-01", "from", "invalid_value"),
    ("usage?from=2024-01-01&to=2025-01-02", "from", "invalid_value"),
    ("usage?from=9999-12-31", "from", "invalid_value"),
    ("usage?key=nobody", "key", "invalid_value"),
    ("usage?key=", "key", "invalid_value"),
    ("usage?since=2024-01-01", "since", "unknown_parameter"),
    ("generations", "key", "missing_required_parameter"),
    ("generations?key=nobody", "key", "invalid_value"),
    ("generations?key=admin&day=today", "day", "invalid_value"),
    ("generations?key=admin&limit=0", "limit", "invalid_value"),
    ("generations?key=admin&limit=101", "limit", "invalid_value"),
    ("generations?key=admin&limit=-5", "limit", "invalid_value"),
    ("generations?key=admin&limit=%C2%B2", "limit", "invalid_value"),
    ("generations?key=admin&page=2", "page", "unknown_parameter"),
]


@pytest.mark.parametrize(("query", "param", "code"), BAD_QUERIES)
async def test_a_query_that_makes_no_sense_is_refused_by_name(door: Door, query: str, param: str, code: str) -> None:
    assert refusal(await door.ask("GET", f"/admin/{query}")) == (400, code, param)


@pytest.mark.parametrize("query", ["usage?to=1970-01-01", "usage?from=2024-01-01&to=2024-12-31", "usage?to=9999-12-31"])
async def test_the_widest_ranges_are_answered(door: Door, query: str) -> None:
    assert (await door.ask("GET", f"/admin/{query}")).status_code == 200


async def test_records_come_in_pages_oldest_first(door: Door) -> None:
    made = await door.make(name="busy")
    for number in range(5):
        await door.settled(made["id"], row(f"{number}", made["id"], TODAY - 1, "openai/gpt-4o", 1))
    await door.settled(made["id"], row("9", made["id"], TODAY, "openai/gpt-4o", 1))
    query, pages = f"/admin/generations?key={made['id']}&day={date(TODAY - 1)}&limit=2", list[list[str]]()
    page = (await door.ask("GET", query)).json()
    while True:
        pages.append([each["id"] for each in page["data"]])
        if not page["has_more"]:
            break
        page = (await door.ask("GET", f"{query}&after={pages[-1][-1]}")).json()
    assert pages == [["gen-0", "gen-1"], ["gen-2", "gen-3"], ["gen-4"]]
    today = (await door.ask("GET", f"/admin/generations?key={made['id']}")).json()
    assert [each["id"] for each in today["data"]] == ["gen-9"]
    assert today["data"][0]["api_key_id"] == made["masked"]


async def test_a_full_page_that_is_the_last_says_so(door: Door) -> None:
    made = await door.make()
    for number in range(2):
        await door.settled(made["id"], row(f"{number}", made["id"], TODAY, "openai/gpt-4o", 1))
    page = (await door.ask("GET", f"/admin/generations?key={made['id']}&limit=2")).json()
    assert (len(page["data"]), page["has_more"]) == (2, False)


async def record(door: Door, generation_id: str, key: str) -> Any:
    answered = await door.ask("GET", f"/v1/generation?id={generation_id}", key=key)
    assert answered.status_code == 200, answered.text
    return answered.json()


def looks_like_the_seed(told: Any) -> None:
    assert set(told) >= SEED_FIELDS
    assert set(told["tokens"]) >= SEED_TOKENS
    assert set(told["cost"]) >= SEED_COST


async def test_the_record_of_an_answer_tells_all(door: Door, provider: Upstream) -> None:
    made = await door.make(name="ada")
    provider.next(answer(200, SAID))
    answered = (await door.chat(made["key"], user="user-7", logit_bias={"1": 1})).json()
    told = await record(door, answered["id"], made["key"])
    looks_like_the_seed(told)
    assert (
        told.items()
        >= {
            "id": answered["id"],
            "model": "gpt-4o-mini",
            "model_requested": MODEL,
            "provider": "openai",
            "created": answered["created"],
            "finish_reason": "stop",
            "native_finish_reason": None,
            "api_key_id": f"lr-{made['id'][:3]}***{made['id'][-3:]}",
            "user": "user-7",
            "stream": False,
            "status": "ok",
            "provider_health": "healthy",
            "cached": False,
            "dropped": [],
            "error": None,
        }.items()
    )
    assert told["tokens"].items() >= {**USAGE, "source": "provider"}.items()
    assert told["cost"] == {
        "prompt_cost": 0.00015,
        "completion_cost": 0.00006,
        "total_cost": 0.00021,
        "currency": "USD",
        "source": "computed",
    }
    assert 0 < told["time_to_first_token_ms"] <= told["latency_ms"] < 10_000
    [attempt] = told["attempts"]
    assert attempt.items() >= {"provider": "openai", "model": "gpt-4o-mini", "error": None, "status": 200}.items()


async def test_a_streams_record_says_so_and_estimates_say_so(door: Door, provider: Upstream) -> None:
    made = await door.make()
    provider.next(answer(200, {"choices": SAID["choices"]}))
    answered = await door.chat(made["key"], stream=True)
    told = await record(door, answered.headers["x-request-id"], made["key"])
    looks_like_the_seed(told)
    assert (told["stream"], told["tokens"]["source"], told["cost"]["source"]) == (True, "estimated", "estimated")
    assert told["cost"]["total_cost"] > 0


async def test_anothers_record_is_simply_not_there_but_for_an_administrator(door: Door) -> None:
    ada, bo, admin = await door.make(), await door.make(), await door.make(role="admin")
    answered = (await door.chat(ada["key"])).json()
    others = await door.ask("GET", f"/v1/generation?id={answered['id']}", key=bo["key"])
    unknown = await door.ask("GET", "/v1/generation?id=gen-0000000000000000", key=bo["key"])
    assert refusal(others) == refusal(unknown) == (404, "not_found", "id")
    assert others.content == unknown.content
    assert (await record(door, answered["id"], admin["key"]))["api_key_id"] == ada["masked"]
    assert (await record(door, answered["id"], ADMIN_KEY))["api_key_id"] == ada["masked"]


@pytest.mark.parametrize("query", ["", "?id=", "?id=abc", "?id=chatcmpl-1", "?id=gen-a&id=gen-b", "?ids=gen-a"])
async def test_a_record_is_asked_for_by_one_id(door: Door, query: str) -> None:
    assert refusal(await door.ask("GET", f"/v1/generation{query}")) == (400, "invalid_value", "id")


async def test_a_failure_has_its_record(door: Door, provider: Upstream) -> None:
    made = await door.make()
    provider.always("gpt-4o-mini", answer(503, error("come back later")))
    answered = await door.chat(made["key"])
    assert answered.status_code == 503
    told = await record(door, answered.headers["x-request-id"], made["key"])
    looks_like_the_seed(told)
    assert (told["status"], told["provider_health"], told["finish_reason"]) == ("failed", "unhealthy", None)
    assert told["error"] == {"code": "overloaded", "message": "come back later"}
    assert [(each["error"], each["status"]) for each in told["attempts"]] == [("overloaded", 503)] * 2
    assert told["cost"]["total_cost"] == 0


async def test_a_cancelled_request_has_its_record(door: Door, provider: Upstream) -> None:
    made = await door.make()
    provider.next(sleep(5), answer(200, SAID))
    asking = asyncio.ensure_future(door.chat(made["key"]))
    await until(lambda: bool(provider.seen))
    await asyncio.sleep(0.1)
    asking.cancel()  # in this process the server's own end is what can be staged; sockets are in test_local.py
    assert (await asking).status_code == 503
    page = (await door.ask("GET", f"/admin/generations?key={made['id']}")).json()
    [cancelled] = page["data"]
    looks_like_the_seed(cancelled)
    assert (cancelled["status"], cancelled["tokens"]["source"]) == ("cancelled", "estimated")
    assert cancelled["cost"]["total_cost"] > 0
    assert not (await door.key(made["id"])).open


async def lose(door: Door, key_id: str) -> None:
    """A request of ten minutes ago that died with its process, found by the sweep."""
    then = int(time.time()) - 1000
    await door.open_request(key_id, 250_000_000, 3_000, then, "lost-0001")
    assert await books.sweep(door.store, await door.key(key_id), int(time.time()), 7 * DAY) == 1


async def test_a_lost_request_has_its_record_and_is_charged_what_it_held(door: Door) -> None:
    made = await door.make(name="ada", balance_usd=1)
    await lose(door, made["id"])
    told = await record(door, "gen-lost-0001", made["key"])
    assert (told["status"], told["api_key_id"], told["tokens"]["total_tokens"]) == ("lost", made["masked"], 3_000)
    assert (await usage(door, key=made["id"], group_by="model"))["data"][0] == {
        "model": "unknown",
        "requests": 1,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cost_usd": 0.25,
    }
    own = (await door.ask("GET", "/v1/key", key=made["key"])).json()
    assert (own["balance_usd"], own["spend_usd"], own["open_requests"]) == (0.75, 0.25, 0)


async def test_a_lost_record_has_the_fields_that_all_have(door: Door) -> None:
    made = await door.make(balance_usd=1)
    await lose(door, made["id"])
    told = await record(door, "gen-lost-0001", made["key"])
    looks_like_the_seed(told)
    assert (told["cost"]["total_cost"], told["cost"]["source"]) == (0.25, "estimated")


async def test_a_record_on_its_way_is_waited_for(door: Door) -> None:
    made, now = await door.make(), int(time.time())
    await door.open_request(made["id"], 0, 10, now)
    waiting = asyncio.ensure_future(record(door, "gen-open-0001", made["key"]))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await door.store.record(row("open-0001", made["id"], TODAY, MODEL, 5), now + DAY)
    async with asyncio.timeout(1):
        assert (await waiting)["status"] == "ok"


async def test_a_record_that_does_not_come_is_waited_for_two_seconds(door: Door) -> None:
    made = await door.make()
    await door.open_request(made["id"], 0, 10, int(time.time()))
    began = time.monotonic()
    answered = await door.ask("GET", "/v1/generation?id=gen-open-0001", key=made["key"])
    assert refusal(answered) == (404, "not_found", "id")
    assert 1.9 < time.monotonic() - began < 4


async def test_a_key_reads_its_own_limits_and_what_is_left(door: Door, provider: Upstream) -> None:
    limits = {"rpm": 60, "tpm": 100_000, "daily_budget_usd": 1, "balance_usd": 2, "concurrency": 5}
    made = await door.make(name="ada", metadata={"team": "a"}, **limits)
    own = await door.ask("GET", "/v1/key", key=made["key"])
    assert own.json() == {name: value for name, value in made.items() if name != "key"}
    now = int(time.time())
    if now % 60 > 57:
        await asyncio.sleep(61 - now % 60)
    provider.next(answer(200, SAID))
    assert (await door.chat(made["key"])).status_code == 200
    used = (await door.ask("GET", "/v1/key", key=made["key"])).json()
    assert used.items() >= {**limits, "balance_usd": 1.99979, "spend_usd": 0.00021, "requests": 1}.items()
    assert used["remaining"] == {
        "requests": 59,
        "tokens": 98_900,
        "daily_budget_usd": 0.99979,
        "balance_usd": 1.99979,
        "concurrency": 5,
    }
    assert "hash" not in used
