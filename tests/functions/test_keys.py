"""The whole life of a virtual key over `/admin/keys`, and who may do what with it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from shared.keys import mint
from tests.functions.doors import Door, opened, refusal
from tests.server import ADMIN_KEY
from tests.upstream import Upstream, answer

OTHER_ADMIN_KEY = "Zt6Wd1Xk8Qp3Nv5Rb0Hs7Jm"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
COST = 1000 * 150 + 100 * 600  # gpt-4o-mini: $0.15 and $0.60 per million tokens, in nano-dollars
SAID = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
EVERYTHING = {
    "name": 'Ada\'s "key"; DROP TABLE keys --',
    "role": "user",
    "enabled": True,
    "expires_at": 1_900_000_000,
    "models": ["openai/gpt-4o-mini", "fast"],
    "rpm": 60,
    "tpm": 100_000,
    "concurrency": 7,
    "daily_budget_usd": 0.000000001,
    "balance_usd": 12345.678901234,
    "metadata": {"team": {"name": "analytics", "floor": 3}},
}
NO_LIMITS = {
    "role": "user",
    "enabled": True,
    "expires_at": None,
    "models": None,
    "rpm": None,
    "tpm": None,
    "concurrency": 100,
    "daily_budget_usd": None,
    "balance_usd": None,
    "metadata": {},
}


async def works(door: Door, key: str) -> bool:
    """Whether the key is let in; a refusal must be the 401 of an unknown key."""
    answer = await door.ask("GET", "/v1/key", key=key)
    assert answer.status_code == 200 or refusal(answer) == (401, "invalid_api_key", None)
    return answer.status_code == 200


async def test_a_key_is_made_with_every_field_and_shown_once(door: Door) -> None:
    answer = await door.ask("POST", "/admin/keys", EVERYTHING)
    made = answer.json()
    assert answer.status_code == 201
    assert made["key"].startswith(f"lr-{made['id']}")
    assert made["masked"] == f"lr-{made['id'][:3]}***{made['id'][-3:]}"
    assert {name: made[name] for name in EVERYTHING} == EVERYTHING
    assert (made["object"], made["spend_usd"], made["requests"], made["open_requests"]) == ("key", 0, 0, 0)
    assert abs(made["created_at"] - time.time()) < 5
    del made["key"]
    shown = (await door.ask("GET", f"/admin/keys/{made['id']}")).json()
    assert shown == made
    assert (await door.ask("GET", "/admin/keys")).json()["data"][0] == shown
    kept = await door.key(made["id"])
    assert (kept.daily_budget, kept.balance, kept.credit) == (1, 12_345_678_901_234, 12_345_678_901_234)


async def test_a_name_is_all_a_key_needs(door: Door) -> None:
    made = (await door.ask("POST", "/admin/keys", {"name": "plain"})).json()
    assert {name: made[name] for name in NO_LIMITS} == NO_LIMITS
    assert made["remaining"] == {
        "requests": None,
        "tokens": None,
        "daily_budget_usd": None,
        "balance_usd": None,
        "concurrency": 100,
    }
    assert (await door.chat(made["key"])).status_code == 200


async def test_null_is_no_limit_when_a_key_is_made(door: Door) -> None:
    limits = ("expires_at", "models", "rpm", "tpm", "daily_budget_usd", "balance_usd")
    made = await door.make(**dict.fromkeys(limits))
    assert {name: made[name] for name in limits} == dict.fromkeys(limits)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"models": None}, 200),
        ({"models": []}, 403),
        ({"models": ["openai/gpt-4o-mini"]}, 200),
        ({"models": ["openai/*"]}, 200),
        ({"models": ["openai/gpt-4o"]}, 403),
    ],
)
async def test_no_models_means_all_and_an_empty_list_none(door: Door, fields: dict[str, Any], status: int) -> None:
    key = (await door.make(**fields))["key"]
    assert (await door.chat(key)).status_code == status
    listed = {model["id"] for model in (await door.ask("GET", "/v1/models", key=key)).json()["data"]}
    assert ("openai/gpt-4o-mini" in listed) is (status == 200)
    assert (listed == set()) is (fields == {"models": []})


@pytest.mark.parametrize("name", ["Robert'); DROP TABLE keys;--", '"\\" \'', "名前 🚂", "<b>&amp;", " spaced "])
async def test_any_name_comes_back_as_it_was_given(door: Door, name: str) -> None:
    made = await door.make(name=name, metadata={name: name})
    listed = {key["id"]: key for key in (await door.ask("GET", "/admin/keys")).json()["data"]}
    assert listed[made["id"]]["name"] == name
    assert listed[made["id"]]["metadata"] == {name: name}
    assert (await door.ask("PATCH", f"/admin/keys/{made['id']}", {"name": name * 2})).json()["name"] == name * 2


async def test_keys_are_listed_by_name(door: Door) -> None:
    for name in ("b", "c", "a"):
        await door.make(name=name)
    names = [key["name"] for key in (await door.ask("GET", "/admin/keys")).json()["data"]]
    assert names == ["LR_ADMIN_KEY", "a", "b", "c"]


BAD = [
    ({"name": None}, "name", "invalid_type"),
    ({"name": ""}, "name", "empty_string"),
    ({"name": "x" * 201}, "name", "string_above_max_length"),
    ({"name": 5}, "name", "invalid_type"),
    ({"role": "root"}, "role", "invalid_value"),
    ({"enabled": 1}, "enabled", "invalid_type"),
    ({"enabled": None}, "enabled", "invalid_type"),
    ({"expires_at": "tomorrow"}, "expires_at", "invalid_value"),
    ({"expires_at": "2030-01-31T12:00:00"}, "expires_at", "invalid_value"),
    ({"expires_at": -1}, "expires_at", "integer_below_min_value"),
    ({"expires_at": 1.5}, "expires_at", "invalid_type"),
    ({"models": "openai/*"}, "models", "invalid_type"),
    ({"models": ["a", 5]}, "models[1]", "invalid_type"),
    ({"models": [""]}, "models[0]", "empty_string"),
    ({"rpm": -1}, "rpm", "integer_below_min_value"),
    ({"rpm": "60"}, "rpm", "invalid_type"),
    ({"rpm": True}, "rpm", "invalid_type"),
    ({"rpm": 1.5}, "rpm", "invalid_type"),
    ({"tpm": 10**13}, "tpm", "integer_above_max_value"),
    ({"concurrency": 0}, "concurrency", "integer_below_min_value"),
    ({"concurrency": None}, "concurrency", "invalid_type"),
    ({"concurrency": 1001}, "concurrency", "integer_above_max_value"),
    ({"daily_budget_usd": "5"}, "daily_budget_usd", "invalid_value"),
    ({"daily_budget_usd": True}, "daily_budget_usd", "invalid_value"),
    ({"balance_usd": -0.01}, "balance_usd", "invalid_value"),
    ({"balance_usd": 1e300}, "balance_usd", "invalid_value"),
    ({"metadata": []}, "metadata", "invalid_type"),
    ({"metadata": None}, "metadata", "invalid_type"),
    ({"budget": 5}, "budget", "unknown_parameter"),
    ({"spent": 0}, "spent", "unknown_parameter"),
    ({"id": "admin"}, "id", "unknown_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD)
async def test_a_wrong_or_unknown_field_is_named_and_nothing_changes(
    door: Door, fields: dict[str, Any], param: str, code: str
) -> None:
    made = await door.make(name="as it was")
    before = await door.key(made["id"])
    assert refusal(await door.ask("POST", "/admin/keys", {"name": "new", **fields})) == (400, code, param)
    assert refusal(await door.ask("PATCH", f"/admin/keys/{made['id']}", fields)) == (400, code, param)
    assert await door.key(made["id"]) == before
    assert len((await door.ask("GET", "/admin/keys")).json()["data"]) == 2


async def test_a_key_needs_a_name_and_a_change_a_field(door: Door) -> None:
    made = await door.make()
    assert refusal(await door.ask("POST", "/admin/keys", {})) == (400, "missing_required_parameter", "name")
    assert refusal(await door.ask("PATCH", f"/admin/keys/{made['id']}", {}))[0] == 400
    assert refusal(await door.ask("PATCH", f"/admin/keys/{made['id']}", ["name"]))[0] == 400


async def test_an_id_that_is_not_there_is_404(door: Door) -> None:
    for method, path, body in (
        ("GET", "/admin/keys/nobody", None),
        ("PATCH", "/admin/keys/nobody", {"rpm": 1}),
        ("DELETE", "/admin/keys/nobody", None),
        ("POST", "/admin/keys/nobody/rotate", None),
    ):
        assert refusal(await door.ask(method, path, body)) == (404, "not_found", None), (method, path)


@pytest.mark.parametrize("change", [{name: value} for name, value in EVERYTHING.items()] + [{"role": "admin"}])
async def test_a_change_touches_the_named_field_and_no_other(door: Door, change: dict[str, Any]) -> None:
    made = await door.make(name="before")
    answer = await door.ask("PATCH", f"/admin/keys/{made['id']}", change)
    still = {name: value for name, value in made.items() if name not in ("key", "remaining", *change)}
    assert answer.status_code == 200
    assert answer.json().items() >= {**still, **change}.items()


async def test_an_expiry_may_be_a_time_with_its_zone(door: Door) -> None:
    made = await door.make(expires_at="2030-01-31T12:00:00+02:00")
    assert made["expires_at"] == 1_896_084_000


async def test_null_lifts_a_limit(door: Door) -> None:
    made = await door.make(**{name: value for name, value in EVERYTHING.items() if name != "role"})
    assert refusal(await door.chat(made["key"]))[:2] == (403, "insufficient_quota")
    lifted = dict.fromkeys(("expires_at", "models", "rpm", "tpm", "daily_budget_usd", "balance_usd"))
    changed = (await door.ask("PATCH", f"/admin/keys/{made['id']}", lifted)).json()
    assert {name: changed[name] for name in lifted} == lifted
    answer = await door.chat(made["key"])
    assert answer.status_code == 200
    assert not any(name.startswith("x-ratelimit") for name in answer.headers)


async def test_limits_change_by_difference_under_an_open_request_and_todays_use(door: Door, provider: Upstream) -> None:
    made = await door.make(rpm=10, tpm=100_000, daily_budget_usd=1, balance_usd=1)
    now = int(time.time())
    if now % 60 > 55 or now % 86400 > 86395:
        await asyncio.sleep(61 - now % 60)  # one minute, and one day, for the whole test
        now = int(time.time())
    provider.next(answer(200, SAID))
    assert (await door.chat(made["key"])).status_code == 200
    hold = await door.open_request(made["id"], 250_000_000, 3_000, now)
    new = {"rpm": 20, "tpm": 50_000, "daily_budget_usd": 0.5, "balance_usd": 2, "concurrency": 3}
    changed = (await door.ask("PATCH", f"/admin/keys/{made['id']}", new)).json()
    assert changed.items() >= new.items()
    assert changed["remaining"] == {
        "requests": 20 - 2,
        "tokens": 50_000 - 1_100 - 3_000,
        "daily_budget_usd": (500_000_000 - COST - 250_000_000) / 10**9,
        "balance_usd": (2_000_000_000 - 250_000_000) / 10**9,
        "concurrency": 2,
    }
    assert await door.store.settle(made["id"], "open-0001", hold, 50_000_000, 1_000, now)
    after = (await door.ask("GET", f"/admin/keys/{made['id']}")).json()
    assert after["remaining"]["tokens"] == 50_000 - 1_100 - 1_000
    assert after["remaining"]["daily_budget_usd"] == (500_000_000 - COST - 50_000_000) / 10**9
    assert after["balance_usd"] == after["remaining"]["balance_usd"] == 1.95
    assert after["spend_usd"] == (COST + 50_000_000) / 10**9


async def test_a_budget_below_todays_use_refuses_and_shows_nothing_left(door: Door, provider: Upstream) -> None:
    made = await door.make(daily_budget_usd=1)
    provider.next(answer(200, SAID))
    assert (await door.chat(made["key"])).status_code == 200
    changed = (await door.ask("PATCH", f"/admin/keys/{made['id']}", {"daily_budget_usd": 0.0001})).json()
    assert changed["remaining"]["daily_budget_usd"] == 0
    assert refusal(await door.chat(made["key"]))[:2] == (403, "insufficient_quota")


async def test_a_rotated_key_has_a_new_secret_and_the_old_one_a_day(door: Door) -> None:
    made = await door.make(name="kept", rpm=60)
    answer = await door.ask("POST", f"/admin/keys/{made['id']}/rotate")
    rotated = answer.json()
    assert answer.status_code == 200
    assert rotated["key"] != made["key"]
    assert (rotated["id"], rotated["name"], rotated["rpm"]) == (made["id"], "kept", 60)
    assert await works(door, made["key"])
    assert await works(door, rotated["key"])
    assert abs((await door.key(made["id"])).old_until - time.time() - 86400) < 5


async def test_without_grace_the_old_secret_is_refused_at_once(door: Door) -> None:
    made = await door.make()
    rotated = (await door.ask("POST", f"/admin/keys/{made['id']}/rotate", {"grace_seconds": 0})).json()
    assert not await works(door, made["key"])
    assert refusal(await door.chat(made["key"])) == (401, "invalid_api_key", None)
    assert (await door.chat(rotated["key"])).status_code == 200


async def test_a_grace_period_ends(door: Door) -> None:
    made = await door.make()
    rotated = (await door.ask("POST", f"/admin/keys/{made['id']}/rotate", {"grace_seconds": 1})).json()
    assert (await door.chat(made["key"])).status_code == 200
    await asyncio.sleep(1.1)
    assert refusal(await door.chat(made["key"])) == (401, "invalid_api_key", None)
    assert await works(door, rotated["key"])


@pytest.mark.parametrize("grace", [-1, 1.5, "60", True, None, 2_592_001])
async def test_a_grace_period_is_whole_seconds_of_a_month_at_most(door: Door, grace: Any) -> None:
    made = await door.make()
    answer = await door.ask("POST", f"/admin/keys/{made['id']}/rotate", {"grace_seconds": grace})
    assert refusal(answer) == (400, "invalid_value", "grace_seconds")
    assert await works(door, made["key"])


async def test_rotation_takes_nothing_but_a_grace_period(door: Door) -> None:
    made = await door.make()
    answer = await door.ask("POST", f"/admin/keys/{made['id']}/rotate", {"grace": 5})
    assert refusal(answer) == (400, "unknown_parameter", "grace")


@pytest.mark.parametrize(
    ("change", "code"), [({"enabled": False}, "key_disabled"), ({"expires_at": 1_700_000_000}, "key_expired")]
)
async def test_a_disabled_or_expired_key_is_told_so_until_it_is_changed_back(
    door: Door, provider: Upstream, change: dict[str, Any], code: str
) -> None:
    made = await door.make()
    await door.ask("PATCH", f"/admin/keys/{made['id']}", change)
    for refused in (
        await door.chat(made["key"]),
        await door.ask("GET", "/v1/key", key=made["key"]),
        await door.ask("GET", "/v1/models", key=made["key"]),
        await door.ask("GET", "/v1/generation?id=gen-x", key=made["key"]),
    ):
        assert refusal(refused) == (403, code, None)
    assert provider.seen == []
    await door.ask("PATCH", f"/admin/keys/{made['id']}", {"enabled": True, "expires_at": None})
    assert (await door.chat(made["key"])).status_code == 200


async def test_a_key_may_be_made_disabled_and_may_expire_by_itself(door: Door) -> None:
    assert refusal(await door.chat((await door.make(enabled=False))["key"])) == (403, "key_disabled", None)
    short = await door.make(expires_at=int(time.time()) + 1)
    await asyncio.sleep(1.1)
    assert refusal(await door.chat(short["key"])) == (403, "key_expired", None)


async def test_a_deleted_key_is_401_from_the_next_request_and_its_spend_stays(door: Door, provider: Upstream) -> None:
    made = await door.make(name="short-lived")
    provider.next(answer(200, SAID))
    spent = (await door.chat(made["key"])).json()
    rotated = (await door.ask("POST", f"/admin/keys/{made['id']}/rotate")).json()
    answered = await door.ask("DELETE", f"/admin/keys/{made['id']}")
    assert (answered.status_code, answered.json()) == (200, {"id": made["id"], "object": "key", "deleted": True})
    for secret in (made["key"], rotated["key"]):
        for refused in (await door.chat(secret), await door.ask("GET", "/v1/models", key=secret)):
            assert refusal(refused) == (401, "invalid_api_key", None)
    for method in ("GET", "DELETE"):
        assert refusal(await door.ask(method, f"/admin/keys/{made['id']}")) == (404, "not_found", None)
    assert refusal(await door.ask("PATCH", f"/admin/keys/{made['id']}", {"enabled": True}))[0] == 404
    assert refusal(await door.ask("POST", f"/admin/keys/{made['id']}/rotate"))[0] == 404
    assert made["id"] not in [key["id"] for key in (await door.ask("GET", "/admin/keys")).json()["data"]]
    usage = (await door.ask("GET", f"/admin/usage?key={made['id']}")).json()
    assert usage["data"][0].items() >= {"key": made["id"], "name": "short-lived", "cost_usd": COST / 10**9}.items()
    assert (await door.ask("GET", f"/v1/generation?id={spent['id']}")).json()["cost"]["total_cost"] == COST / 10**9


async def test_a_request_that_was_open_when_its_key_was_deleted_is_still_charged(door: Door) -> None:
    made, now = await door.make(balance_usd=1), int(time.time())
    hold = await door.open_request(made["id"], 250_000_000, 3_000, now)
    await door.ask("DELETE", f"/admin/keys/{made['id']}")
    assert await door.store.settle(made["id"], "open-0001", hold, 40_000_000, 1_000, now)
    kept = await door.key(made["id"])
    assert (kept.spent, kept.balance, dict(kept.open)) == (40_000_000, 960_000_000, {})


def all_routes(door: Door) -> list[tuple[str, str]]:
    """Every (method, path) that the app answers, path parameters filled in."""
    found: list[tuple[str, str]] = []
    for router in door.app.routes:
        contexts = router.effective_route_contexts() if hasattr(router, "effective_route_contexts") else [router]
        for route in contexts:
            path = route.path.replace("{name:path}", "openai/gpt-4o-mini").replace("{key_id}", "some-key")
            found += [(method, path) for method in sorted(route.methods)]
    return found


OPEN = {("GET", "/"), ("GET", "/health"), ("GET", "/openapi.json"), ("HEAD", "/openapi.json")}


async def test_no_route_but_the_open_ones_answers_without_a_good_key(door: Door, provider: Upstream) -> None:
    made = await door.make()
    deleted = await door.make()
    await door.ask("DELETE", f"/admin/keys/{deleted['id']}")
    someone_elses = made["key"][:15] + mint()[1][15:]  # a good id, another's secret, a wrong checksum
    bad = [None, "", "nonsense", mint()[1], mint(made["id"])[1], deleted["key"], someone_elses, ADMIN_KEY[:-1]]
    routes = all_routes(door)
    assert len(routes) >= 25
    for method, path in routes:
        body = None if method in ("GET", "HEAD", "DELETE") else {"name": "x"}
        for key in bad:
            refused = await door.ask(method, path, body, key)
            if (method, path) in OPEN:
                assert refused.status_code == 200
            else:
                assert refusal(refused) == (401, "invalid_api_key", None), (method, path, key)
    assert {route for route in routes if route in OPEN} == OPEN
    assert provider.seen == []
    assert {key["id"] for key in (await door.ask("GET", "/admin/keys")).json()["data"]} == {"admin", made["id"]}


async def test_a_user_key_is_403_on_every_admin_route_and_changes_nothing(door: Door) -> None:
    user, other = await door.make(name="user"), await door.make(name="other", rpm=5)
    before = [key async for key in door.store.keys()]
    admin_routes = [route for route in all_routes(door) if route[1].startswith("/admin/")]
    assert len(admin_routes) == 12
    for method, path in admin_routes:
        body = (
            {"enabled": False} if method == "PATCH" else {"name": "mine", "role": "admin"} if "POST" in method else None
        )
        for target in (user["id"], other["id"]):
            refused = await door.ask(method, path.replace("some-key", target), body, user["key"])
            assert refusal(refused) == (403, "admin_required", None), (method, path)
    assert [key async for key in door.store.keys()] == before


async def test_an_admin_key_from_the_api_administers_until_it_is_no_admin(door: Door) -> None:
    made = await door.make(role="admin")
    assert (await door.ask("POST", "/admin/keys", {"name": "by the second"}, made["key"])).status_code == 201
    await door.ask("PATCH", f"/admin/keys/{made['id']}", {"role": "user"})
    assert refusal(await door.ask("GET", "/admin/keys", key=made["key"])) == (403, "admin_required", None)


async def test_what_the_environments_admin_key_spends_is_recorded_also_after_it_was_changed(
    tmp_path: Path, provider: Upstream
) -> None:
    for number, key in enumerate((ADMIN_KEY, OTHER_ADMIN_KEY), 1):
        provider.next(answer(200, SAID))
        async with opened(tmp_path, provider.url, LR_ADMIN_KEY=key) as door:
            answered = (await door.chat(key)).json()
            record = (await door.ask("GET", f"/v1/generation?id={answered['id']}", key=key)).json()
            assert record["cost"]["total_cost"] == COST / 10**9
            own = (await door.ask("GET", "/v1/key", key=key)).json()
            assert own.items() >= {"id": "admin", "role": "admin", "requests": number, "balance_usd": None}.items()
            assert own["spend_usd"] == number * COST / 10**9
            usage = (await door.ask("GET", "/admin/usage", key=key)).json()
            assert usage["total"]["cost_usd"] == own["spend_usd"]
            wrong = OTHER_ADMIN_KEY if key == ADMIN_KEY else ADMIN_KEY
            assert refusal(await door.ask("GET", "/admin/keys", key=wrong)) == (401, "invalid_api_key", None)


async def test_the_environments_admin_key_is_changed_in_the_environment_only(door: Door) -> None:
    assert refusal(await door.ask("POST", "/admin/keys/admin/rotate", {"grace_seconds": 0}))[0] == 400
    assert refusal(await door.ask("DELETE", "/admin/keys/admin"))[0] == 400
    assert (await door.ask("GET", "/admin/keys")).status_code == 200
