"""Every hostile case over real sockets: its own expectations, and what must hold after any request at all.

The format is that of `../shared/hostile/README.md`; `own.jsonl` keeps the suite standing without that corpus.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.wire import Answer, ask, request, shout
from tests.hostile.world import World, populated
from tests.server import PROVIDER_KEY, ROOT, Server
from tests.upstream import Seen, Upstream

CORPUS = ROOT.parent / "shared" / "hostile" / "requests.jsonl"
OWN = Path(__file__).parent / "own.jsonl"
BACKSTAGE = re.compile(
    rb"Traceback|File \"|site-packages|\.py\b|/home/|/usr/|/tmp/"
    rb"|NoneType|\bdict\b|\bNone\b|\b[A-Z]?[a-z]+Error\b|Exception"
    rb"|\b(?:python|uvicorn|httptools|h11|fastapi|starlette|pydantic|httpx|httpcore|orjson|asyncio|anyio)\b"
    rb"|\b(?:boto|sqlite)\w*|" + re.escape(str(ROOT)).encode()
)
"""Traces, paths, libraries and Python's type names."""
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


def cases(path: Path) -> list[Any]:
    if not path.exists():
        return [
            pytest.param(None, id=path.parent.name, marks=pytest.mark.skip(reason=f"the corpus {path} is not here"))
        ]
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [pytest.param(case, id=case["id"]) for case in lines]


@pytest.fixture(scope="module")
async def world(server: Server, provider_for_all: Upstream) -> AsyncIterator[World]:
    provider_for_all.forget()
    async with populated(server, provider_for_all, server.log.parent / "lightrail.db") as made:
        yield made


@dataclass
class Outcome:
    """What one case brought about."""

    world: World
    case: dict[str, Any]
    sent: bytes
    answers: list[Answer]
    closed: bool
    seen: list[Seen]
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def answer(self) -> Answer:
        return self.answers[0]

    @property
    def error(self) -> dict[str, Any]:
        return self.answer.json["error"]

    @property
    def asked(self) -> Any:
        return json.loads(self.sent)

    @property
    def text(self) -> str:
        """What the caller was told, whole or in pieces."""
        if (self.answer.header("content-type") or "").startswith("text/event-stream"):
            pieces = [
                choice.get("delta", {}).get("content") for each in self.answer.events for choice in each["choices"]
            ]
            return "".join(piece for piece in pieces if piece)
        return self.answer.json["choices"][0]["message"]["content"]


@pytest.mark.parametrize("case", [*cases(CORPUS), *cases(OWN)])
async def test_a_hostile_request_is_answered_safely(world: World, case: dict[str, Any]) -> None:
    outcome = await (burst(world, case) if "burst" in case else single(world, case))
    for answer in outcome.answers:
        check_always(outcome, answer)
    assert outcome.answer.status in case["expect"]["status"], outcome.answer
    for name, expected in case["expect"].items():
        if name != "status":
            CHECKS[name](outcome, expected)
    await check_still_serving(world)


async def test_nothing_kept_holds_a_secret(world: World) -> None:
    """Last in this file, so the database and the whole log have seen every case."""
    assert not world.leaks(world.kept())
    assert not world.leaks(world.server.log.read_bytes())


async def single(world: World, case: dict[str, Any]) -> Outcome:
    world.upstream.forget()
    world.canary_hits.clear()
    before = snapshot(world)
    raw, body = filled(world, case)
    if case["method"] == "RAW":
        answers, closed = await shout(world.server.port, raw)
        assert answers, "no answer"
    else:
        answers, closed = [await ask(world.server.port, raw, case["method"])], False
    seen = list(world.upstream.seen)
    return Outcome(world, case, body, answers, closed, seen, before, await settled(world))


async def burst(world: World, case: dict[str, Any]) -> Outcome:
    """All requests within one minute, as limits are per minute of the clock; a fresh key has the limits of `setup`."""
    plan = case["burst"]
    limits = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", plan["setup"])}
    whole = {name: int(value) if value == int(value) else value for name, value in limits.items()}
    key = world.key(case["id"], **whole)["key"]
    raw, body = filled(world, case, KEY=key)
    if (second := time.time() % 60) > 45:
        await asyncio.sleep(60.2 - second)
    world.upstream.forget()
    before = snapshot(world)
    gate = asyncio.Semaphore(plan["concurrency"])

    async def one() -> Answer:
        async with gate:
            return await ask(world.server.port, raw, case["method"])

    answers = await asyncio.gather(*(one() for _ in range(plan["total"])))
    counts = Counter(answer.status for answer in answers)
    for statuses, expected in plan["expect_counts"].items():
        assert sum(counts[int(status)] for status in statuses.split("|")) == expected, counts
    assert {answer.status for answer in answers} <= set(case["expect"]["status"])
    seen = list(world.upstream.seen)
    assert len(seen) == counts[200]
    return Outcome(
        world, case, body, sorted(answers, key=lambda each: -each.status), False, seen, before, await settled(world)
    )


def filled(world: World, case: dict[str, Any], **words: str) -> tuple[bytes, bytes]:
    """The whole request, and its body alone, placeholders replaced."""
    kept, world.words = world.words, {**world.words, **words}
    try:

        def fill(data: bytes) -> bytes:
            return world.fill(data.decode("latin-1")).encode("latin-1")  # every byte survives latin-1

        body: bytes | None = None
        for name in ("body", "body_b64", "body_parts", "raw_b64", "raw_parts"):
            if name in case:
                body = fill(joined(name, case[name]))
        if case["method"] == "RAW":
            return body or b"", body or b""
        headers = [(name, fill(value.encode())) for name, value in case["headers"]]
        target = fill(case["path"].encode())
        return request(case["method"], target, headers, body, f"127.0.0.1:{world.server.port}"), body or b""
    finally:
        world.words = kept


def joined(name: str, given: Any) -> bytes:
    if name.endswith("_b64"):
        return base64.b64decode(given)
    if name.endswith("_parts"):
        return b"".join(text.encode() * times for text, times in given)
    return given.encode()


# State -------------------------------------------------------------------------------------------------------------


def snapshot(world: World) -> dict[str, Any]:
    """What can be seen of the state, by name; what is left of a minute is left out, as minutes pass by themselves."""

    def shown(key: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in key.items() if name != "remaining"}

    ask = world.server.ask
    keys = ask("GET", "/admin/keys", world.words["ADMIN"])[1]["data"]
    conversation = f"/history?user_id={world.words['USER_B']}&session_id={world.words['CONV_ID_OF_B']}"
    return {
        "A": shown(ask("GET", "/v1/key", world.words["KEY"])[1]),
        "B": shown(ask("GET", "/v1/key", world.words["KEY_B"])[1]),
        "keys": [shown(key) for key in keys],
        "history of B": ask("GET", conversation, world.words["KEY_B"]),
    }


async def settled(world: World) -> dict[str, Any]:
    """The state once nothing is open any more: settling may come after the caller's last byte, within 2 s."""
    for _ in range(40):
        state = snapshot(world)
        if not any(key["open_requests"] for key in state["keys"]):
            return state
        await asyncio.sleep(0.05)
    raise AssertionError(f"a reservation stays open: {[key for key in state['keys'] if key['open_requests']]}")


async def check_still_serving(world: World) -> None:
    plain = {"model": world.words["MODEL"], "messages": [{"role": "user", "content": "still there?"}]}
    headers = [("authorization", f"Bearer {world.words['KEY']}".encode()), ("content-type", b"application/json")]
    raw = request("POST", b"/v1/chat/completions", headers, json.dumps(plain).encode(), "localhost")
    answer = await ask(world.server.port, raw, "POST")
    assert answer.status == 200
    assert answer.json["choices"][0]["message"]["content"] == "still there?"
    await settled(world)


# Always ------------------------------------------------------------------------------------------------------------


def check_always(outcome: Outcome, answer: Answer) -> None:
    world, case = outcome.world, outcome.case
    assert answer.status < 500, answer
    assert not BACKSTAGE.search(answer.bytes), answer
    if answer.status >= 400 and case["method"] != "HEAD":
        check_error(answer)
    if answer.status == 201:
        world.watch(answer.json["key"].removeprefix("lr-").removeprefix(answer.json["id"]))
    else:
        assert not world.leaks(answer.bytes), "a secret in the answer"
    assert not world.leaks(world.new_log()), "a secret in the log"
    assert not world.upstream.malformed
    for seen in outcome.seen:
        assert seen.headers["authorization"] == f"Bearer {PROVIDER_KEY}"
        others = {name: value for name, value in seen.headers.items() if name != "authorization"}
        assert not world.leaks(json.dumps(others).encode() + seen.path.encode() + seen.body), "a secret went upstream"
    if answer.status >= 400 and not outcome.seen:
        spends = [{key["id"]: key["spend_usd"] for key in state["keys"]} for state in (outcome.before, outcome.after)]
        assert spends[0].items() <= spends[1].items()


def check_error(answer: Answer) -> None:
    """OpenAI's error body, typed as the contract's table says, with the request's id beside it."""
    assert (answer.header("content-type") or "").partition(";")[0] == "application/json", answer
    assert set(answer.json) == {"error"}
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == TYPES[answer.status]
    assert isinstance(error["param"], str | None)
    assert isinstance(error["code"], str | None)
    assert answer.header("x-request-id")


# Expectations, by the name of the field ----------------------------------------------------------------------------

Check = Callable[[Outcome, Any], None]


def error_field(name: str) -> Check:
    def check(outcome: Outcome, allowed: list[Any]) -> None:
        if outcome.answer.status >= 400:
            assert outcome.error[name] in allowed, outcome.error

    return check


def upstream_calls(outcome: Outcome, calls: int) -> None:
    if outcome.answer.status < 400:
        assert len(outcome.seen) == calls
    else:
        assert len(outcome.seen) <= calls


def max_ms(outcome: Outcome, limit: float) -> None:
    assert outcome.answer.ms <= limit


def max_body_bytes(outcome: Outcome, limit: int) -> None:
    assert len(outcome.answer.body) <= limit


def lacks(part: Callable[[Outcome], bytes]) -> Check:
    def check(outcome: Outcome, texts: list[str]) -> None:
        for text in texts:
            assert outcome.world.fill(text).encode() not in part(outcome)

    return check


def upstream_model_never(outcome: Outcome, models: str | list[str]) -> None:
    never = [outcome.world.fill(model) for model in ([models] if isinstance(models, str) else models)]
    for seen in outcome.seen:
        assert seen.json["model"] not in [*never, *(model.partition("/")[2] for model in never if "/" in model)]


def upstream_hosts_only(outcome: Outcome, _: bool) -> None:
    assert outcome.world.hosts_called() <= {outcome.world.upstream.port}


def upstream_body_equals_checked(outcome: Outcome, _: bool) -> None:
    """The last of equal names wins, as in every common JSON reader; the model is renamed by design."""
    for seen in outcome.seen:
        sent = {name: value for name, value in outcome.asked.items() if name != "model"}
        assert {name: seen.json.get(name) for name in sent} == sent


def hits(outcome: Outcome, allowed: int) -> None:
    assert len(outcome.world.canary_hits) <= allowed, outcome.world.canary_hits


def content_roundtrip(outcome: Outcome, _: bool) -> None:
    assert outcome.text == outcome.asked["messages"][-1]["content"]


def sse_wellformed(outcome: Outcome, expected: bool) -> None:
    kind = (outcome.answer.header("content-type") or "").partition(";")[0]
    if not expected:
        assert kind == "application/json"
        return
    assert kind == "text/event-stream"
    assert outcome.answer.body.endswith(b"\n\n")
    for line in re.split(rb"\r\n|\r|\n", outcome.answer.body):
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            json.loads(line.removeprefix(b"data: "))
        else:
            assert line in (b"", b"data: [DONE]") or line.startswith(b":"), line


def done_count(outcome: Outcome, count: int) -> None:
    assert outcome.answer.body.split(b"\n").count(b"data: [DONE]") == count


def no_5xx(outcome: Outcome, _: bool) -> None:
    assert all(answer.status < 500 for answer in outcome.answers)


def allow_header(outcome: Outcome, expected: bool | str | list[str]) -> None:
    methods = {method.strip() for method in (outcome.answer.header("allow") or "").split(",")} - {""}
    wanted = {expected} if isinstance(expected, str) else set(expected) if isinstance(expected, list) else set()
    assert methods
    assert wanted <= methods


def cache_control(outcome: Outcome, expected: bool | str | list[str]) -> None:
    value = outcome.answer.header("cache-control") or ""
    wanted = [expected] if isinstance(expected, str) else expected if isinstance(expected, list) else ["no-store"]
    assert any(each in value for each in wanted), value


def acao_not(outcome: Outcome, origins: str | list[str]) -> None:
    refused = [origins] if isinstance(origins, str) else origins
    assert outcome.answer.header("access-control-allow-origin") not in [outcome.world.fill(each) for each in refused]


def acac_absent(outcome: Outcome, _: bool) -> None:
    assert outcome.answer.header("access-control-allow-credentials") is None


def headers_on_429(outcome: Outcome, names: list[str]) -> None:
    for answer in outcome.answers:
        if answer.status == 429:
            assert not [name for name in names if not answer.header(name)]
            assert int(answer.header("retry-after") or 0) in range(1, 61)


def store_unchanged(outcome: Outcome, _: bool) -> None:
    assert outcome.after == outcome.before


def b_unchanged(outcome: Outcome, _: bool) -> None:
    for name in ("B", "history of B"):
        assert outcome.after[name] == outcome.before[name]


def key_created(outcome: Outcome, expected: bool) -> None:
    assert len(outcome.after["keys"]) - len(outcome.before["keys"]) == int(expected)


def fields_ignored_or_refused(outcome: Outcome, names: bool | list[str]) -> None:
    """A created object takes over none of the named fields (all those sent, if none is named)."""
    if outcome.answer.status < 300:
        sent = {name: value for name, value in outcome.asked.items() if names is True or name in names}
        assert not [name for name, value in sent.items() if name != "name" and outcome.answer.json.get(name) == value]


def reservation_covers_usage(outcome: Outcome, _: bool) -> None:
    """Money is never overdrawn."""
    for key in outcome.after["keys"]:
        assert key["balance_usd"] is None or key["balance_usd"] >= 0
        assert key["daily_budget_usd"] is None or key["spend_usd"] <= key["daily_budget_usd"]


def responses_max(outcome: Outcome, count: int) -> None:
    assert len(outcome.answers) <= count
    assert outcome.closed, "the connection stays open"


def no_smuggled_request(outcome: Outcome, _: bool) -> None:
    assert len(outcome.answers) == 1
    assert not outcome.seen


CHECKS: dict[str, Check] = {
    "type": error_field("type"),
    "param": error_field("param"),
    "code": error_field("code"),
    "upstream_calls": upstream_calls,
    "max_ms": max_ms,
    "max_body_bytes": max_body_bytes,
    "body_lacks": lacks(lambda outcome: outcome.answer.body),
    "header_lacks": lacks(lambda outcome: outcome.answer.bytes.partition(b"\n\n")[0]),
    "upstream_body_lacks": lacks(lambda outcome: b"".join(seen.body for seen in outcome.seen)),
    "upstream_header_lacks": lacks(lambda outcome: repr([seen.headers for seen in outcome.seen]).encode()),
    "upstream_model_never": upstream_model_never,
    "upstream_hosts_only": upstream_hosts_only,
    "upstream_body_equals_checked": upstream_body_equals_checked,
    "canary_hits": hits,
    "canary_hits_from_gateway": hits,
    "internal_fetches": hits,
    "content_roundtrip": content_roundtrip,
    "sse_wellformed": sse_wellformed,
    "done_count": done_count,
    "no_5xx": no_5xx,
    "allow_header": allow_header,
    "cache_control": cache_control,
    "acao_not": acao_not,
    "acac_absent": acac_absent,
    "headers_on_429": headers_on_429,
    "store_unchanged": store_unchanged,
    "b_unchanged": b_unchanged,
    "key_created": key_created,
    "fields_ignored_or_refused": fields_ignored_or_refused,
    "reservation_covers_usage": reservation_covers_usage,
    "responses_max": responses_max,
    "no_smuggled_request": no_smuggled_request,
}
