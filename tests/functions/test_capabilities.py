"""`GET /v1/capabilities`: what can be asked of whom."""

from __future__ import annotations

from tests.functions.doors import Door, refusal


async def test_providers_that_are_on_tell_what_they_take(door: Door) -> None:
    key = (await door.make())["key"]
    answer = await door.ask("GET", "/v1/capabilities", key=key)
    assert answer.status_code == 200
    (openai,) = answer.json()["data"]
    assert (openai["provider"], openai["title"], openai["on"]) == ("openai", "OpenAI", True)
    assert openai["models"]["chat"] == "gpt-4o-mini"
    assert openai["parameters"]["temperature"] == "passed"
    assert set(openai["parameters"].values()) <= {"passed", "dropped", "refused"}


async def test_all_that_are_known_are_told_of_if_asked_for(door: Door) -> None:
    found = (await door.ask("GET", "/v1/capabilities?all=true")).json()["data"]
    on = {each["provider"]: each["on"] for each in found}
    assert on["openai"]
    assert not on["cohere"]
    assert next(each for each in found if each["provider"] == "cohere")["parameters"]["n"] == "refused"


async def test_it_takes_a_key_and_no_nonsense(door: Door) -> None:
    assert refusal(await door.ask("GET", "/v1/capabilities", key=None))[0] == 401
    assert refusal(await door.ask("GET", "/v1/capabilities?all=some")) == (400, "invalid_value", "all")
