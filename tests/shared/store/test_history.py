"""What was said in a session is there, in order, for its key and user alone, until it is forgotten."""

from __future__ import annotations

from functools import partial

from shared.store.base import MAX_CONTENT, Message, Session, Store
from tests.shared.store.callers import NOW, Forgetful, at_once, new_key


def message(number: int, content: str = "hello", role: str = "user", created: int = NOW) -> Message:
    return Message(f"gen-{number:06}-0", role, content, created)


async def test_what_was_said_is_read_in_order(store: Store):
    key = await new_key(store)
    said = [
        Message("gen-1-0", "user", "why?\n\0\N{SNOWMAN}", NOW, {}),
        Message("gen-1-1", "assistant", "", NOW + 1, {"model": "m", "partial": True, "cost": [0.5, None]}),
        Message("gen-2#0", "user", "oh", NOW + 2),
    ]
    await store.say(key.id, "u", "s", said[2:])
    await store.say(key.id, "u", "s", said[:2])
    assert await store.said(key.id, "u", "s") == said


async def test_the_newest_are_told_oldest_first(store: Store):
    key = await new_key(store)
    await store.say(key.id, "u", "s", [message(number) for number in range(60)])
    assert [each.id for each in await store.said(key.id, "u", "s")] == [message(n).id for n in range(10, 60)]
    assert await store.said(key.id, "u", "s", 2) == [message(58), message(59)]


async def test_saying_it_again_changes_nothing(store: Store):
    key = await new_key(store)
    for _ in range(2):
        await store.say(key.id, "u", "s", [message(1), message(2), message(1)])
    await store.say(key.id, "u", "s", [])
    assert await store.said(key.id, "u", "s") == [message(1), message(2)]
    assert await store.sessions(key.id, "u") == [Session("s", NOW, "hello")]
    await store.say(key.id, "nobody", "s", [])
    assert await store.sessions(key.id, "nobody") == []


NAMES = ["", "a", "a#b", "b", "b#c", "c", "a\n/\0", "\N{GRINNING FACE}" * 256]


async def test_no_two_sessions_run_into_each_other(store: Store):
    key, other = await new_key(store), await new_key(store)
    places = [(key.id, user, session) for user in NAMES for session in NAMES] + [(other.id, "a", "b#c")]
    await at_once(partial(store.say, *place, [message(1, repr(place))]) for place in places)
    assert all([await store.said(*place) == [message(1, repr(place))] for place in places])
    assert [entry.id for entry in await store.sessions(key.id, "a#b")] == sorted(NAMES)
    assert await store.forget(key.id, "a", "b#c") == 1
    assert await store.forget(key.id, "a#b") == len(NAMES)
    left = [place for place in places if await store.said(*place)]
    assert left == [place for place in places if place[:2] != (key.id, "a#b") and place != (key.id, "a", "b#c")]


async def test_the_list_has_the_newest_first_and_how_the_user_began(store: Store):
    key = await new_key(store)
    await store.say(key.id, "u", "silent", [message(1, "system", "system", NOW)])
    await store.say(key.id, "u", "long", [message(1, "", created=NOW + 2), message(2, "x" * 100, created=NOW + 1)])
    await store.say(key.id, "u", "again", [message(1, "I am a bot", "assistant", NOW)])
    await store.say(key.id, "u", "again", [message(2, "first", created=NOW + 3)])
    await store.say(key.id, "u", "again", [message(3, "second", created=NOW + 4)])
    expected = [Session("again", NOW + 4, "first"), Session("long", NOW + 2, "x" * 80), Session("silent", NOW, "")]
    assert await store.sessions(key.id, "u") == expected
    assert await store.sessions(key.id, "u", 1) == expected[:1]
    assert await store.sessions(key.id, "another") == []


async def test_of_a_long_message_the_beginning_is_kept(store: Store):
    key = await new_key(store)
    for number, letter in enumerate(["x", "\N{SNOWMAN}", "\N{GRINNING FACE}", "\0", '"']):
        await store.say(key.id, "u", letter, [Message(f"m{number}", "user", "." + letter * 400_000, NOW, {"a": 1})])
        (kept,) = await store.said(key.id, "u", letter)
        assert "." + letter * 400_000 == kept.content + letter * kept.doc["cut"]
        assert MAX_CONTENT - 4 < len(kept.content.encode()) <= MAX_CONTENT
        assert kept.doc["a"] == 1
    await store.say(key.id, "u", "fits", [message(1, "x" * MAX_CONTENT)])
    assert await store.said(key.id, "u", "fits") == [message(1, "x" * MAX_CONTENT)]


async def test_everything_is_forgotten_however_much_it_is(store: Store):
    key = await new_key(store)
    many = [message(number) for number in range(1500)]
    long = [message(number, "x" * 200_000) for number in range(12)]
    for user, session, messages in (
        ("u", "many", many),
        ("u", "long", long),
        ("u", "kept", many[:3]),
        ("v", "x", many[:4]),
    ):
        await store.say(key.id, user, session, messages)
    assert len(await store.said(key.id, "u", "long")) == 12  # pages of 1 MB
    assert await store.forget(key.id, "u", "many") == 1500
    assert await store.said(key.id, "u", "many") == []
    assert {entry.id for entry in await store.sessions(key.id, "u")} == {"kept", "long"}
    assert await store.forget(key.id, "u") == 15
    assert await store.forget(key.id, "u") == 0
    assert await store.sessions(key.id, "u") == []
    assert await store.said(key.id, "v", "x") == many[:4]


async def test_64_speakers_who_lose_replies_are_all_heard_once(store: Store, other: Store):
    key, doors = await new_key(store), [Forgetful(store, 1), Forgetful(other, 2)]

    async def speak(number: int) -> None:
        await doors[number % 2].say(key.id, "u", f"s{number % 3}", [message(number), message(number + 500)])

    await at_once(partial(speak, number) for number in range(90))
    for session in range(3):
        numbers = range(session, 90, 3)
        expected = [message(number).id for number in (*numbers, *(number + 500 for number in numbers))]
        assert [each.id for each in await other.said(key.id, "u", f"s{session}", 1000)] == expected
    assert len(await store.sessions(key.id, "u")) == 3
