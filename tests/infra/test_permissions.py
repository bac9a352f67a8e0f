"""Least privilege: what a function's role allows is what the function was seen to ask of AWS here, and nothing more."""

from __future__ import annotations

import re
import time
from typing import Any

from fastapi.openapi.utils import get_openapi

from functions import sweep
from functions.app import assemble
from functions.secrets import Current, Secrets
from shared.keys import time_ordered
from shared.settings import Settings
from shared.store.base import Admitted, Ask, Hold
from tests.infra.conftest import HELLO, MODEL, PATH, App, Permissions, Watch
from tests.server import ADMIN_KEY, PEPPER

JSON = dict[str, Any]
LOGS = {"logs:CreateLogStream", "logs:PutLogEvents"}
"""Lambda writes the log itself, but by the function's role."""
MODELS = ("foundation-model/*", "inference-profile/*", "application-inference-profile/*")
"""Converse is allowed as InvokeModel: https://docs.aws.amazon.com/bedrock/latest/userguide/inference-profiles-prereq.html"""


def allowed(resources: JSON, name: str) -> Permissions:
    """Of a role in resources.yml, its log left out."""
    role = resources["Resources"][f"{name.capitalize()}Role"]["Properties"]
    assert not role.keys() & {"ManagedPolicyArns", "PermissionsBoundary"}
    found: Permissions = set()
    for policy in role["Policies"]:
        for statement in policy["PolicyDocument"]["Statement"]:
            assert statement["Effect"] == "Allow"
            assert not statement.keys() & {"NotAction", "NotResource"}
            targets = {target_of(each, name) for each in listed(statement["Resource"])}
            found |= {(action, target) for action in listed(statement["Action"]) for target in targets}
    logs = {(action, "log") for action in LOGS}
    assert logs <= found
    return found - logs


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def target_of(resource: JSON, name: str) -> str:
    secrets = "arn:${AWS::Partition}:ssm:${AWS::Region}:${AWS::AccountId}:parameter/lightrail/${Stage}"
    match resource:
        case {"Fn::GetAtt": ["Table", "Arn"]}:
            return "table"
        case {"Fn::GetAtt": [log, "Arn"]} if log == f"{name.capitalize()}Logs":
            return "log"
        case {"Fn::Sub": text} if text == secrets:
            return "secrets"
        case {"Fn::Sub": text} if text.startswith("arn:${AWS::Partition}:bedrock:*:"):
            assert text.rpartition(":")[2] in MODELS
            return "models"
        case {"Fn::Sub": text} if text.startswith("${Table.Arn}/index/"):
            return text.removeprefix("${Table.Arn}/")
    raise AssertionError(f"{name}: {resource}: neither the table, an index of it, the secrets, a model, nor its log")


async def test_stream(app: App, watch: Watch, resources: JSON) -> None:
    """Every outcome of a model call: answered, streamed, refused for each reason, and others' crashes mended."""
    watch.watching = True
    assert (await Secrets(PATH).current())["LR_KEY_PEPPER"] == PEPPER
    assert (await app.chat()).status_code == 200
    assert "[DONE]" in (await app.chat(stream=True)).text
    assert (
        await app.ask("POST", "/v1/embeddings", {"model": "openai/text-embedding-3-small", "input": "x"})
    ).is_success
    for stream in (False, True):  # signed, sent, and refused by the fake
        assert (await app.chat(model="bedrock/amazon.nova-lite-v1:0", stream=stream)).status_code == 400
    called: JSON = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tools = [
        HELLO,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ]
    await app.chat(model="bedrock/amazon.nova-lite-v1:0", messages=tools)  # what the client lost of it is looked up
    for _ in range(2):
        assert (await app.ask("POST", "/generate", {"prompt": "hello", "provider": "openai"})).status_code == 200
        said = {"user_id": "ada", "session_id": "s", "message": "hello"}
        assert '"done"' in (await app.ask("POST", "/rr-chat/stream", said)).text
    for model in (MODEL, "bedrock/amazon.nova-lite-v1:0"):  # the answer is kept for the like of it; a refusal is not
        body = {"model": model, "messages": [HELLO]}
        await app.client.post("/v1/chat/completions", json=body, headers={"idempotency-key": model})
    assert (await app.chat(messages="no list")).status_code == 400
    assert (await app.chat(model="nobody/nothing")).status_code == 404
    assert (await app.ask("POST", "/v1/completions", {}, key=ADMIN_KEY)).status_code == 401
    watch.watching = False
    await app.crashed("crash-one")
    await app.crashed("crash-two")
    watch.watching = True
    assert (await app.chat()).status_code == 200, "overdue requests were not swept"
    assert watch.seen == allowed(resources, "stream")


async def test_api(app: App, watch: Watch, resources: JSON) -> None:
    """Every route but the model routes."""
    answered = (await app.chat(store=True, user="ada", session_id="s")).json()
    watch.watching = True
    await Secrets(PATH).current()
    made = (await app.ask("POST", "/admin/keys", {"name": "bob", "rpm": 10})).json()
    session = "user_id=ada&session_id=s"
    asked: dict[str, tuple[str, JSON | None]] = {
        "GET /": ("", None),
        "GET /health": ("", None),
        "GET /metrics": ("", None),
        "GET /v1/models": ("", None),
        "GET /v1/models/{name}": (MODEL, None),
        "GET /v1/capabilities": ("", None),
        "POST /v1/route": ("", {"model": MODEL, "messages": [HELLO]}),
        "GET /v1/generation": (f"?id={answered['id']}", None),
        "GET /v1/key": ("", None),
        "GET /history": (f"?{session}", None),
        "POST /history": ("", {"user_id": "ada", "session_id": "s"}),
        "GET /history/sessions": ("?user_id=ada", None),
        "DELETE /history": (f"?{session}", None),
        "GET /admin/keys": ("", None),
        "GET /admin/keys/{key_id}": (made["id"], None),
        "PATCH /admin/keys/{key_id}": (made["id"], {"rpm": 20}),
        "POST /admin/keys/{key_id}/rotate": (made["id"], {}),
        "DELETE /admin/keys/{key_id}": (made["id"], None),
        "GET /admin/usage": ("", None),
        "GET /admin/generations": (f"?key={app.key.id}", None),
        "GET /admin/providers": ("", None),
        "PATCH /admin/providers/{name}": ("openai", {"enabled": True}),
        "GET /admin/models": ("", None),
        "PATCH /admin/models/{name}": (MODEL, {"priority": 1}),
    }
    for route, (rest, body) in asked.items():
        method, path = route.split()
        path = re.sub(r"{\w+}", rest, path) if "{" in path else path + rest
        answer = await app.ask(method, path, body)
        assert answer.status_code == 200, (method, path, answer.text)
    current = Current({"DATABASE_URL": "sqlite:///never-opened.db"})
    routes = get_openapi(title="", version="", routes=assemble(current.settings, current, asks_models=False).routes)
    known = {f"{method.upper()} {path}" for path, methods in routes["paths"].items() for method in methods}
    assert known == asked.keys() | {"POST /admin/keys"}
    assert watch.seen == allowed(resources, "api")


async def test_sweep(app: App, watch: Watch, resources: JSON) -> None:
    """A run that finds a crashed request, and days to sum up."""
    await app.crashed("crash-one")
    now = int(time.time())
    hold = Hold(10, 10, now - 3 * 86400, 600)
    request_id = time_ordered(hold.start)
    assert isinstance(await app.store.admit(Ask(app.key.id, app.key.hash, request_id, hold)), Admitted)
    old = sweep.books.lost(app.key.id, request_id, hold, hold.start)
    await app.store.record(old, now + 86400)
    await app.store.settle(app.key.id, request_id, hold, old.cost, 10, now)
    watch.watching = True
    settings = Settings.read({"TABLE_NAME": "lightrail"})
    told = await sweep.run(settings, sweep.Memory(), lambda: 800.0)
    assert (told["settled"], told["differing"], told["failed"]) == (1, 0, 0)
    assert watch.seen == allowed(resources, "sweep")


def test_nobody_but_lambda_takes_a_role(resources: JSON) -> None:
    roles = [each["Properties"] for each in resources["Resources"].values() if each["Type"] == "AWS::IAM::Role"]
    assert len(roles) == 3
    for role in roles:
        (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert statement["Principal"] == {"Service": "lambda.amazonaws.com"}
