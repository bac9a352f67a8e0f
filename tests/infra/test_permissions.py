"""Least privilege: what a function's role allows is what the function was seen to ask of AWS here, and nothing more."""

from __future__ import annotations

import time
from typing import Any

from functions import sweep
from functions.secrets import Secrets
from shared.settings import Settings
from shared.store.base import Admitted, Ask, Hold
from tests.infra.conftest import PATH, App, Permissions, Watch
from tests.server import ADMIN_KEY, PEPPER

JSON = dict[str, Any]
LOGS = {"logs:CreateLogStream", "logs:PutLogEvents"}
"""Lambda writes the log itself, but by the function's role."""


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
        case {"Fn::Sub": text} if text.startswith("${Table.Arn}/index/"):
            return text.removeprefix("${Table.Arn}/")
    raise AssertionError(f"{name}: {resource}: neither the table, an index of it, the secrets, nor its log")


async def test_stream(app: App, watch: Watch, resources: JSON) -> None:
    """Every outcome of a model call: answered, streamed, refused for each reason, and others' crashes mended."""
    watch.watching = True
    assert (await Secrets(PATH).current())["LR_KEY_PEPPER"] == PEPPER
    assert (await app.chat()).status_code == 200
    assert "[DONE]" in (await app.chat(stream=True)).text
    assert (
        await app.ask("POST", "/v1/embeddings", {"model": "openai/text-embedding-3-small", "input": "x"})
    ).is_success
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
    answered = (await app.chat()).json()
    watch.watching = True
    await Secrets(PATH).current()
    made = (await app.ask("POST", "/admin/keys", {"name": "bob", "rpm": 10})).json()
    key = f"/admin/keys/{made['id']}"
    asked = [
        ("GET", "/v1/models", None),
        ("GET", "/v1/key", None),
        ("GET", f"/v1/generation?id={answered['id']}", None),
        ("GET", "/admin/keys", None),
        ("GET", key, None),
        ("PATCH", key, {"rpm": 20}),
        ("POST", f"{key}/rotate", {}),
        ("DELETE", key, None),
        ("GET", "/admin/usage", None),
        ("GET", f"/admin/generations?key={app.key.id}", None),
    ]
    for method, path, body in asked:
        answer = await app.ask(method, path, body)
        assert answer.status_code == 200, (method, path, answer.text)
    assert watch.seen == allowed(resources, "api")


async def test_sweep(app: App, watch: Watch, resources: JSON) -> None:
    """A run that finds a crashed request, and days to sum up."""
    await app.crashed("crash-one")
    now = int(time.time())
    hold = Hold(10, 10, now - 3 * 86400, 600)
    assert isinstance(await app.store.admit(Ask(app.key.id, app.key.hash, "old", hold)), Admitted)
    old = sweep.books.lost(app.key.id, "old", hold, now - 3 * 86400)
    await app.store.record(old, now + 86400)
    await app.store.settle(app.key.id, "old", hold, old.cost, 10, now)
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
