"""A conversation in which the provider changes from turn to turn: each refuses what the real one would refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import pytest
from openai import AsyncOpenAI

from tests.server import PROVIDER_KEY
from tests.strict import anthropic, bedrock, cohere, gemini, openai
from tests.strict.loop import ANSWER, START, TURNS, client_of_gateway, kept, made, results, said
from tests.upstream import Step, Upstream, answer, error


class Fake(NamedTuple):
    """`names_model`: in the body of a request."""

    model: str
    step: Step
    base_url: str
    header: str = "authorization"
    names_model: bool = True


FAKES = {
    "openai": Fake(openai.OPENAI.model, openai.speaking(openai.OPENAI), "http://{host}/v1"),
    "deepseek": Fake(openai.DEEPSEEK.model, openai.speaking(openai.DEEPSEEK), "http://{host}"),
    "mistral": Fake(openai.MISTRAL.model, openai.speaking(openai.MISTRAL), "http://{host}/v1"),
    "openrouter": Fake(openai.OPENROUTER.model, openai.speaking(openai.OPENROUTER), "http://{host}/api/v1"),
    "anthropic": Fake(anthropic.MODELS[0], anthropic.anthropic, "http://{host}/v1", "x-api-key"),
    "gemini": Fake(gemini.MODEL, gemini.gemini, "http://{host}/v1beta", "x-goog-api-key", names_model=False),
    "bedrock": Fake(bedrock.MODEL, bedrock.bedrock, "http://{host}", names_model=False),
    "cohere": Fake(cohere.MODEL, cohere.cohere, "http://{host}/v2"),
}
PAIRS = list(permutations(FAKES, 2))
BUSY = answer(503, error("Try later", kind="overloaded_error"))
"""A failure after which, if it comes alone, nobody rests: the tests do not disturb each other."""


def deployment(name: str) -> str:
    return f"{name}/{FAKES[name].model}"


@pytest.fixture(scope="module")
async def fakes(anyio_backend: str) -> AsyncIterator[Mapping[str, Upstream]]:
    async with AsyncExitStack() as stack:
        found: dict[str, Upstream] = {}
        for name, fake in FAKES.items():
            found[name] = await stack.enter_async_context(Upstream(key=PROVIDER_KEY, header=fake.header))
        yield found


@pytest.fixture(scope="module")
async def client(fakes: Mapping[str, Upstream], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    folder = tmp_path_factory.mktemp("changing")
    variables = {"GATEWAY_CONFIG": str(with_aliases(folder))}
    for name, fake in FAKES.items():
        variables |= {
            f"{name.upper()}_API_KEY": PROVIDER_KEY,
            f"{name.upper()}_BASE_URL": fake.base_url.format(host=fakes[name].host),
        }
    async with client_of_gateway(folder, **variables) as client:
        yield client


def with_aliases(folder: Path) -> Path:
    """One for each pair: the first, then the second."""
    config = folder / "gateway.toml"
    lines = [
        f'{first}-{second} = [{{ provider = "{first}", model = "{FAKES[first].model}" }}, '
        f'{{ provider = "{second}", model = "{FAKES[second].model}", priority = 1 }}]'
        for first, second in PAIRS
    ]
    config.write_text("\n".join(["[aliases]", *lines]))
    return config


@pytest.fixture(autouse=True)
def well(fakes: Mapping[str, Upstream]) -> Mapping[str, Upstream]:
    """Everybody answers, and has refused nothing yet."""
    for name, fake in FAKES.items():
        fakes[name].forget()
        fakes[name].always(fake.model if fake.names_model else None, fake.step)
    return fakes


async def converse(
    client: AsyncOpenAI,
    models: list[str],
    *,
    streams: bool,
    whole: bool,
    before: Callable[[int], None] = lambda turn: None,
) -> None:
    """The loop and more questions, each turn asked of the next of these models; `before` is told its number."""
    messages = list(START)
    for turn, model in enumerate(models):
        before(turn)
        completion = await said(client, model, messages, streams=streams, reasoning_effort="medium")
        choice, calls = completion.choices[0], TURNS[turn][1] if turn < len(TURNS) else []
        message = choice.message.model_dump()
        assert made(message) == calls
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        assert (message["content"] or "") in (("", anthropic.LOOK) if calls else (ANSWER,))
        messages += [kept(completion, whole=whole), *results(message)]
        if not calls:
            messages.append({"role": "user", "content": "Sure?"})


def asked(fakes: Mapping[str, Upstream]) -> list[str]:
    """Who was asked, in order; nobody found anything amiss."""
    assert {name: fake.malformed for name, fake in fakes.items() if fake.malformed} == {}
    return [name for _, name in sorted((seen.at, name) for name, fake in fakes.items() for seen in fake.seen)]


@pytest.mark.parametrize("whole", [True, False], ids=["the client keeps all", "the client keeps little"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=map("-".join, PAIRS))
async def test_a_tool_loop_of_two_providers(
    client: AsyncOpenAI, fakes: Mapping[str, Upstream], first: str, second: str, streams: bool, whole: bool
) -> None:
    turns = [first, second, first, second]
    await converse(client, list(map(deployment, turns)), streams=streams, whole=whole)
    assert asked(fakes) == turns


@pytest.mark.parametrize("whole", [True, False], ids=["the client keeps all", "the client keeps little"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_what_a_provider_signed_comes_back_to_it_alone(
    client: AsyncOpenAI, fakes: Mapping[str, Upstream], streams: bool, whole: bool
) -> None:
    claude = anthropic.MODELS[1]  # which always thinks
    fakes["anthropic"].always(claude, anthropic.anthropic)
    turns = [deployment("gemini"), f"anthropic/{claude}", deployment("gemini"), f"anthropic/{claude}"]
    await converse(client, turns, streams=streams, whole=whole)
    assert asked(fakes) == ["gemini", "anthropic"] * 2
    assert gemini.signatures(fakes["gemini"].seen[-1].json) == [gemini.OWN[0], None, gemini.DUMMY]
    spoken = [turn["content"] for turn in fakes["anthropic"].seen[-1].json["messages"] if turn["role"] == "assistant"]
    assert [[block["type"] for block in content] for content in spoken] == [
        ["tool_use", "tool_use"],
        ["text", "thinking", "tool_use"],
        ["text"],
    ]


@pytest.mark.parametrize("whole", [True, False], ids=["the client keeps all", "the client keeps little"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_openrouter_gets_its_reasoning_details_back(
    client: AsyncOpenAI, fakes: Mapping[str, Upstream], streams: bool, whole: bool
) -> None:
    await converse(client, [deployment("openrouter")] * 4, streams=streams, whole=whole)
    assert asked(fakes) == ["openrouter"] * 4


@pytest.mark.parametrize("second", [name for name in FAKES if name != "openai"])
async def test_two_turns_of_the_same_ids_are_taken_over(
    client: AsyncOpenAI, fakes: Mapping[str, Upstream], second: str
) -> None:
    turns = ["openai", "openai", second, "openai"]
    await converse(client, list(map(deployment, turns)), streams=False, whole=False)
    assert asked(fakes) == turns


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=map("-".join, PAIRS))
async def test_a_fallback_takes_over_and_gives_back(
    client: AsyncOpenAI, fakes: Mapping[str, Upstream], first: str, second: str, streams: bool
) -> None:
    fake, named = FAKES[first], FAKES[first].model if FAKES[first].names_model else None

    def before(turn: int) -> None:
        fakes[first].always(named, BUSY if turn == 1 else fake.step)

    await converse(client, [f"{first}-{second}"] * 4, streams=streams, whole=False, before=before)
    assert asked(fakes) == [first, first, second, first, first]
