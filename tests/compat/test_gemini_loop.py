"""An agent's loop through the stock OpenAI client, before a Gemini that refuses what Google's would refuse."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from openai import OpenAI

from tests import server as processes
from tests.server import Server

KEY = "AIzaLoop0123456789"
MODEL = "gemini/gemini-3.5-flash"
DUMMY = "skip_thought_signature_validator"
PATH = re.compile(r"/v1beta/models/gemini-3\.5-flash:(generateContent|streamGenerateContent\?alt=sse)")
FIELDS = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig"}
PARTS = ("text", "functionCall", "functionResponse")


def call(name: str, signature: str | None = None, **args: Any) -> dict[str, Any]:
    signed = {"thoughtSignature": signature} if signature else {}
    return {"functionCall": {"name": name, "args": args}, **signed}


TURNS: list[list[dict[str, Any]]] = [
    [
        {"text": "I shall look.", "thought": True},
        call("weather", "c2lnLW9uZQ==", at="Oslo"),
        call("weather", at="Rome"),
    ],
    [call("clothes", "c2lnLXR3bw==", warmth=3)],
    [{"text": "Wear a coat.", "thoughtSignature": "c2lnLXRleHQ="}],
]
"""What it answers to the first, second and third request: by how many of its own turns the history has."""
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("weather", "clothes")
]
START: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What shall I wear?"}]


class RefusedError(Exception):
    """What Google answers with INVALID_ARGUMENT."""


def require(good: object, message: str) -> None:
    if not good:
        raise RefusedError(message)


def check(body: dict[str, Any]) -> None:
    require(body.keys() <= FIELDS, f"Unknown name in {sorted(body)}")
    require("role" not in body["systemInstruction"] or body["systemInstruction"]["role"] == "user", "system role")
    turns = body["contents"]
    require(turns and turns[0]["role"] == "user", "Please ensure that the first turn is the user's")
    for before, turn in zip([None, *turns], turns, strict=False):
        require(turn.keys() == {"role", "parts"}, f"Unknown name in {sorted(turn)}")
        require(turn["role"] in ("user", "model"), "Please use a valid role: user, model.")
        require(turn["parts"], "must include at least one parts field")
        kinds = [kind for part in turn["parts"] for kind in PARTS if kind in part]
        require(len(kinds) == len(turn["parts"]), "Unknown name at parts")
        calls = [part for part in turn["parts"] if "functionCall" in part]
        for part in calls:
            require(turn["role"] == "model", "function call in a turn of the user")
            require(part["functionCall"].keys() == {"id", "name", "args"}, "Unknown name at function_call")
            require(isinstance(part["functionCall"]["args"], dict), "args is not a struct")
        if calls:
            signed = calls[0].get("thoughtSignature")
            require(signed, "Function call is missing a thought_signature in functionCall parts.")
            own = [part.get("thoughtSignature") for said in TURNS for part in said]
            require(signed == DUMMY or signed in own, "Corrupted thought signature.")
        results = [part["functionResponse"] for part in turn["parts"] if "functionResponse" in part]
        asked = [part["functionCall"] for part in (before or {"parts": []})["parts"] if "functionCall" in part]
        require(len(results) == len(asked), "the number of function response parts is not that of function calls")
        for result, made in zip(results, asked, strict=True):
            require((result["id"], result["name"]) == (made["id"], made["name"]), "a response to another call")
            require(isinstance(result["response"], dict), "response is not a struct")


class Gemini(BaseHTTPRequestHandler):
    """`seen` keeps what was asked; `refused` what was wrong with it."""

    seen: list[dict[str, Any]]
    refused: list[str]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        try:
            require(PATH.fullmatch(self.path), f"no such path: {self.path}")
            require(self.headers["x-goog-api-key"] == KEY, "API key not valid. Please pass a valid API key.")
            require("authorization" not in self.headers, "Expected no OAuth 2 access token")
            check(body)
        except RefusedError as refused:
            self.refused.append(str(refused))
            self.answer(400, {"error": {"code": 400, "message": str(refused), "status": "INVALID_ARGUMENT"}})
            return
        self.seen.append(body)
        parts = TURNS[sum(turn["role"] == "model" for turn in body["contents"])]
        usage = {"promptTokenCount": 20, "candidatesTokenCount": 5, "thoughtsTokenCount": 7, "totalTokenCount": 32}
        if "stream" not in self.path:
            said = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "index": 0}
            self.answer(200, {"candidates": [said], "usageMetadata": usage})
            return
        events = [{"candidates": [{"content": {"role": "model", "parts": [part]}, "index": 0}]} for part in parts]
        last = {"content": {"role": "model", "parts": [{"text": ""}]}, "finishReason": "STOP", "index": 0}
        events.append({"candidates": [last], "usageMetadata": usage})
        self.send(200, "text/event-stream", "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events))

    def answer(self, status: int, body: Any) -> None:
        self.send(status, "application/json; charset=UTF-8", json.dumps(body))

    def send(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def google() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Gemini) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def gateway(google: ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {"GEMINI_API_KEY": KEY, "GEMINI_BASE_URL": f"http://127.0.0.1:{google.server_port}"}
    with processes.gateway(tmp_path_factory.mktemp("loop"), "http://127.0.0.1:9/v1", **variables) as running:
        yield running


@pytest.fixture
def client(gateway: Server) -> Iterator[OpenAI]:
    Gemini.seen, Gemini.refused = [], []
    with OpenAI(api_key=gateway.key()["key"], base_url=f"{gateway.url}/v1", max_retries=0) as client:
        yield client


def results(calls: list[Any]) -> list[Any]:
    return [{"role": "tool", "tool_call_id": call["id"], "content": "7 degrees"} for call in calls]


def signatures() -> list[Any]:
    """Of the calls in the last request, in order."""
    parts = [part for turn in Gemini.seen[-1]["contents"] for part in turn["parts"] if "functionCall" in part]
    return [part.get("thoughtSignature") for part in parts]


def test_a_loop_of_whole_answers(client: OpenAI) -> None:
    history = list(START)
    for turn in range(3):
        said = client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS, reasoning_effort="low")
        choice = said.choices[0]
        history.append(choice.message)
        assert said.usage
        assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (20, 12)
        if choice.message.tool_calls:
            assert choice.finish_reason == "tool_calls"
            history += results([call.model_dump() for call in choice.message.tool_calls])
        assert len(choice.message.tool_calls or ()) == (2, 1, 0)[turn]
    assert choice.finish_reason == "stop"
    assert choice.message.content == "Wear a coat."
    assert Gemini.refused == []
    assert signatures() == ["c2lnLW9uZQ==", None, "c2lnLXR3bw=="]
    assert Gemini.seen[0]["generationConfig"] == {"thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True}}


@pytest.mark.parametrize("careful", [True, False], ids=["all kept", "extra_content thrown away"])
def test_a_loop_of_streams(client: OpenAI, careful: bool) -> None:
    """Most clients keep of a streamed call only what OpenAI documents."""
    history = list(START)
    for _ in range(3):
        with client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS, stream=True) as stream:
            text, calls, finish = "", dict[int, Any](), None
            for chunk in stream:
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    finish = choice.finish_reason or finish
                    for piece in choice.delta.tool_calls or ():
                        assert piece.function
                        function = {"name": piece.function.name, "arguments": ""}
                        made = calls.setdefault(piece.index, {"id": piece.id, "type": "function", "function": function})
                        made["function"]["arguments"] += piece.function.arguments or ""
                        if careful and (extra := (piece.model_extra or {}).get("extra_content")):
                            made["extra_content"] = extra
        if not calls:
            break
        assert finish == "tool_calls"
        made = [calls[index] for index in sorted(calls)]
        history += [{"role": "assistant", "content": None, "tool_calls": made}, *results(made)]
    assert (text, finish) == ("Wear a coat.", "stop")
    assert Gemini.refused == []
    assert len(Gemini.seen) == 3
    first, second, third = signatures()
    assert second is None
    if careful:
        assert (first, third) == ("c2lnLW9uZQ==", "c2lnLXR3bw==")


def test_a_history_made_elsewhere(client: OpenAI) -> None:
    made = [
        {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        for call_id in ("toolu_01A", "call_x|y")
    ]
    history = [*START, {"role": "assistant", "content": None, "tool_calls": made}, *results(made)]
    said = client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
    assert said.choices[0].message.tool_calls
    assert Gemini.refused == []
    assert signatures() == [DUMMY, None]


def test_what_it_refuses_is_told(client: OpenAI) -> None:
    import openai

    unanswered = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history: Any = [*START, {"role": "assistant", "content": None, "tool_calls": [unanswered]}, START[1]]
    with pytest.raises(openai.BadRequestError, match="number of function response parts"):
        client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
