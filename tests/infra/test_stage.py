"""Both templates put up on moto, and used there from an administrator's terminal.

moto stops short of AWS here: it makes no gateway responses, alarms, stages of an API, retries or bucket policies from a
template, and forgets its kind of endpoint, transfer mode, time limits of integrations, architecture, TTL and recovery.
test_parity.py looks at those as they are written. Nothing runs there either: the package has two bytes. So the API is
used through a stand-in that has the routes that moto holds, with functions that have the variables that moto holds.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from moto import mock_aws
from openai import AsyncOpenAI

from functions import cli, runtime, sweep
from functions.api import Handler as APIHandler
from functions.stream import prepared
from infra import stage as stages
from shared.keys import Keys
from shared.store import open_store
from shared.store.base import VirtualKey
from shared.store.dynamodb import create_table_at
from tests.apigateway import APIGateway, Route, written
from tests.infra.conftest import REGION, STAGE, done
from tests.runtime_api import RuntimeAPI
from tests.server import PROVIDER_KEY, ROOT
from tests.upstream import Upstream

JSON = dict[str, Any]
NOT_BY_MOTO = {
    "AWS::ApiGateway::GatewayResponse",
    "AWS::ApiGateway::Stage",
    "AWS::CloudWatch::Alarm",
    "AWS::Lambda::EventInvokeConfig",
    "AWS::S3::BucketPolicy",
}
PROVIDERS = {
    "OPENAI_API_KEY": "sk-of-the-tests-7Hn2Kd8W",
    "OLLAMA_BASE_URL": "http://127.0.0.1:11434/v1",
    "STRIPE_API_KEY": "no business of ours",
}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An account with nothing in it, and an administrator whose `.env` has some keys."""
    monkeypatch.chdir(tmp_path)
    for name in ("TABLE_NAME", "DATABASE_URL", "LR_KEY_PEPPER", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in PROVIDERS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with mock_aws(config={"lambda": {"use_docker": False}}):
        yield


@pytest.fixture
def deployed(aws: None, template: JSON, scratch: Path) -> JSON:
    """The template, put up as its deployer does it: the package first."""
    code = [each["Properties"]["Code"] for each in kind(template, "AWS::Lambda::Function").values()]
    assert len({each["S3Key"] for each in code}) == 1
    cloudformation, s3 = boto3.client("cloudformation"), boto3.client("s3")
    name, capabilities = f"lightrail-{STAGE}", ["CAPABILITY_NAMED_IAM"]
    if buckets := kind(template, "AWS::S3::Bucket"):  # osls: a stack of a bucket alone, then the rest around it
        cloudformation.create_stack(StackName=name, TemplateBody=json.dumps({"Resources": buckets}))
        (made,) = cloudformation.describe_stack_resources(StackName=name)["StackResources"]
        bucket, put_up = made["PhysicalResourceId"], cloudformation.update_stack
    else:  # the CDK: `cdk bootstrap` has made a bucket
        boto3.client("ssm").put_parameter(Name="/cdk-bootstrap/hnb659fds/version", Value="30", Type="String")
        bucket, put_up = f"cdk-hnb659fds-assets-123456789012-{REGION}", cloudformation.create_stack
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket=bucket, Key=code[0]["S3Key"], Body=(scratch / "dist/lightrail.zip").read_bytes())
    outputs = {key: {"Value": output["Value"]} for key, output in template["Outputs"].items()}
    body = json.dumps(template | {"Outputs": outputs})  # moto stumbles over exports that come with an update
    body = body.replace('"RetainExceptOnCreate"', '"Retain"')  # which it takes for "Delete"
    put_up(StackName=name, TemplateBody=body, Capabilities=capabilities)
    return template


def kind(template: JSON, wanted: str) -> JSON:
    return {name: each for name, each in template["Resources"].items() if each["Type"] == wanted}


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What the command line answers for this stage."""
    assert cli.main(["--stage", STAGE, *arguments]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse .* but it's not supported by moto")


def test_everything_is_put_up(deployed: JSON) -> None:
    cloudformation = boto3.client("cloudformation")
    (stack,) = cloudformation.describe_stacks(StackName=f"lightrail-{STAGE}")["Stacks"]
    assert stack["StackStatus"] in ("CREATE_COMPLETE", "UPDATE_COMPLETE")
    made = cloudformation.describe_stack_resources(StackName=f"lightrail-{STAGE}")["StackResources"]
    left_out = deployed["Resources"].keys() - {each.get("LogicalResourceId") for each in made}
    assert {deployed["Resources"][name]["Type"] for name in left_out} <= NOT_BY_MOTO

    (api,) = boto3.client("apigateway").get_rest_apis()["items"]
    wanted = [replace(each, function=f"lightrail-{STAGE}-{each.function}") for each in written()]
    assert sorted(held_routes(), key=str) == sorted(wanted, key=str)

    functions = {each["FunctionName"]: each for each in boto3.client("lambda").list_functions()["Functions"]}
    assert functions.keys() == {f"lightrail-{STAGE}-{name}" for name in ("stream", "api", "sweep")}
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    environment = functions[f"lightrail-{STAGE}-stream"]["Environment"]["Variables"]
    assert (environment["TABLE_NAME"], environment["SECRETS_PATH"]) == (outputs["TableName"], f"/lightrail/{STAGE}")
    assert outputs["BaseUrl"] == f"https://{api['id']}.execute-api.{REGION}.amazonaws.com/{STAGE}/v1"
    (rule,) = boto3.client("events").list_rules()["Rules"]
    assert rule["ScheduleExpression"] == "rate(10 minutes)"
    logs = boto3.client("logs").describe_log_groups()["logGroups"]
    assert {each["logGroupName"]: each["retentionInDays"] for each in logs} == {
        f"/aws/lambda/{name}": 30 for name in functions
    }


def held_routes() -> list[Route]:
    """The routes of the API that moto holds; which of them streams is told by what they call."""
    apis = boto3.client("apigateway")
    (api,) = apis.get_rest_apis()["items"]
    found: list[Route] = []
    for resource in apis.get_resources(restApiId=api["id"], limit=500)["items"]:
        for method in resource.get("resourceMethods", ()):
            at = {"restApiId": api["id"], "resourceId": resource["id"], "httpMethod": method}
            uri = apis.get_integration(**at)["uri"]
            called = re.fullmatch(r"arn:.*/functions/(arn:[^/]+)/(response-streaming-)?invocations", uri)
            assert called, uri
            name = boto3.client("lambda").get_function(FunctionName=called[1])["Configuration"]["FunctionName"]
            found.append(Route(method, resource["path"], name, called[2] is not None))
    return found


def held_variables(name: str) -> dict[str, str]:
    """What Lambda would give the function."""
    held = boto3.client("lambda").get_function_configuration(FunctionName=f"lightrail-{STAGE}-{name}")
    return {**held["Environment"]["Variables"], "AWS_LAMBDA_FUNCTION_NAME": held["FunctionName"]}


async def test_the_api_is_used(
    deployed: JSON, capsys: pytest.CaptureFixture[str], provider: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key, a stream, its record, its money, and the sweep: by the routes, variables, secrets and table put up."""
    secret = {"Name": f"/lightrail/{STAGE}/OPENAI_BASE_URL", "Value": provider.url, "Type": "SecureString"}
    boto3.client("ssm").put_parameter(**secret)
    monkeypatch.setenv("OPENAI_API_KEY", PROVIDER_KEY)
    assert await asyncio.to_thread(stages.main, ["show", STAGE]) == 0
    capsys.readouterr()
    await asyncio.to_thread(asked, capsys, "secrets", "push")
    key = (await asyncio.to_thread(asked, capsys, "keys", "create", "--name", "ada", "--role", "admin"))["key"]
    async with RuntimeAPI() as platform:
        events = runtime.RuntimeAPI(platform.address)
        streaming = asyncio.ensure_future(runtime.serve(events, prepared(events, held_variables("stream"), 1), 1))
        api = await asyncio.to_thread(APIHandler, held_variables("api"))
        async with (
            APIGateway(platform, api, routes=held_routes()) as gateway,
            AsyncOpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0) as client,
        ):
            hello: Any = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
            stream = await client.chat.completions.create(**hello, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello"
            assert (await client.chat.completions.create(**hello)).choices[0].message.content == "hello"
            assert "openai/gpt-4o-mini" in [model.id async for model in client.models.list()]
            told = await client.get("/generation", cast_to=httpx.Response, options={"params": {"id": chunks[0].id}})
            assert told.json()["status"] == "ok"
            async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as anybody:
                anybody.headers["authorization"] = f"Bearer {key}"
                used = (await anybody.get("/admin/usage")).json()["total"]
                statuses = [
                    (await anybody.request(method, path)).status_code
                    for method, path in (("GET", "/health"), ("HEAD", "/"), ("GET", "/v1/nothing"), ("PUT", "/v1/key"))
                ]
                assert statuses == [200, 200, 404, 405]
                assert (await anybody.get(f"{gateway.url}d/health")).json()["error"]["code"] == "unknown_url"
        assert not platform.violations
        streaming.cancel()
        await asyncio.wait([streaming])
    assert used["requests"] == 2
    assert used["cost_usd"] > 0
    for name, value in held_variables("sweep").items():
        monkeypatch.setenv(name, value)
    swept = await asyncio.to_thread(sweep.handler, {"source": "aws.events"}, Context())
    assert (swept["keys"], swept["differing"], swept["failed"], swept["left_over"]) == (1, 0, 0, 0)


class Context:
    def get_remaining_time_in_millis(self) -> int:
        return 540_000


def test_tests_and_laptops_have_the_same_table(deployed: JSON) -> None:
    """`create_table_at`, which `make run`'s engines and the tests use, reads the deployers' file."""
    assert create_table_at(f"dynamodb://local?region={REGION}", ROOT / "infra/resources.yml")
    client = boto3.client("dynamodb")
    ours, theirs = (client.describe_table(TableName=name)["Table"] for name in client.list_tables()["TableNames"])
    for fact in ("AttributeDefinitions", "KeySchema", "BillingModeSummary"):
        assert ours[fact] == theirs[fact]
    indexes = [
        {each["IndexName"]: (each["KeySchema"], each["Projection"]) for each in table["GlobalSecondaryIndexes"]}
        for table in (ours, theirs)
    ]
    assert indexes[0] == indexes[1]


def test_from_deployed_to_a_first_key_and_away(deployed: JSON, capsys: pytest.CaptureFixture[str]) -> None:
    assert stages.main(["show", STAGE]) == 0
    said = capsys.readouterr().out
    assert f"/{STAGE}/v1" in said
    assert f"make secrets STAGE={STAGE}" in said
    assert boto3.client("ssm").get_parameter(Name=f"/lightrail/{STAGE}/LR_KEY_PEPPER"), "the stage answers from now on"

    assert asked(capsys, "secrets", "push")["given"] == ["OPENAI_API_KEY"]
    ssm = boto3.client("ssm")
    given = ssm.get_parameters_by_path(Path=f"/lightrail/{STAGE}", WithDecryption=True)["Parameters"]
    assert {each["Type"] for each in given} == {"SecureString"}
    values = {each["Name"].rpartition("/")[2]: each["Value"] for each in given}
    assert values.pop("OPENAI_API_KEY") == PROVIDERS["OPENAI_API_KEY"]
    assert list(values) == ["LR_KEY_PEPPER"]

    admin = asked(capsys, "keys", "create", "--name", "admin", "--role", "admin")
    (table,) = boto3.client("dynamodb").list_tables()["TableNames"]
    assert identified(table, values["LR_KEY_PEPPER"], admin["key"]).role == "admin"
    assert [key["name"] for key in asked(capsys, "keys", "list")] == ["admin"]

    assert asked(capsys, "secrets", "push")["secrets"] == ["LR_KEY_PEPPER", "OPENAI_API_KEY"]
    assert (
        ssm.get_parameter(Name=f"/lightrail/{STAGE}/LR_KEY_PEPPER", WithDecryption=True)["Parameter"]["Value"]
        == (values["LR_KEY_PEPPER"])
    ), "every key would have become void"

    assert stages.main(["remove", STAGE]) == 0
    assert table in capsys.readouterr().out
    assert boto3.client("dynamodb").list_tables()["TableNames"] == [table]
    assert boto3.client("lambda").list_functions()["Functions"] == []
    assert identified(table, values["LR_KEY_PEPPER"], admin["key"]).name == "admin"
    assert stages.main(["remove", STAGE, "--everything"]) == 0, "what the first removal kept goes with the second"
    said = capsys.readouterr().out
    assert f"No stack lightrail-{STAGE} in {REGION}; deleted 2 secrets" in said
    assert "a kept table, if any, stays" in said
    assert given_secrets() == []
    assert boto3.client("dynamodb").list_tables()["TableNames"] == [table]


def given_secrets() -> list[str]:
    found = boto3.client("ssm").get_parameters_by_path(Path=f"/lightrail/{STAGE}")["Parameters"]
    return sorted(each["Name"].rpartition("/")[2] for each in found)


def identified(table: str, pepper: str, key: str) -> VirtualKey:
    async def ask() -> VirtualKey:
        store = open_store("", table)
        try:
            keys = Keys(store, pepper, None)
            return await keys.identify(keys.credential(f"Bearer {key}"))
        finally:
            await store.close()

    return asyncio.run(ask())


def test_everything_goes_where_asked(deployed: JSON, capsys: pytest.CaptureFixture[str]) -> None:
    asked(capsys, "secrets", "push")
    assert stages.main(["remove", STAGE, "--everything"]) == 0
    assert f"lightrail-{STAGE} is gone" in capsys.readouterr().out
    assert boto3.client("dynamodb").list_tables()["TableNames"] == []
    assert given_secrets() == []


def test_what_cannot_be_looked_at_is_not_taken_for_gone(
    deployed: JSON, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(capsys, "secrets", "push")
    call = BaseClient._make_api_call

    def refusing(client: Any, operation: str, arguments: JSON) -> Any:
        if operation == "DescribeStacks":
            message = "User is not authorized to perform: cloudformation:DescribeStacks"
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": message}}, operation)
        return call(client, operation, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", refusing)
        assert stages.main(["remove", STAGE, "--everything"]) == 1
    assert "not authorized" in capsys.readouterr().err
    assert given_secrets() == ["LR_KEY_PEPPER", "OPENAI_API_KEY"], "its keys are still good"


@pytest.mark.parametrize("arguments", [["show"], ["remove"], ["remove", "--everything"]])
def test_a_stage_that_is_not_there_is_not_said_to_be_gone(
    aws: None, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    verb, *options = arguments
    assert stages.main([verb, "dve", *options]) == 1
    assert f"No stack lightrail-dve in {REGION}. Elsewhere? Add REGION=…" in capsys.readouterr().err


@pytest.mark.parametrize("everything", [[], ["--everything"]])
def test_a_first_deployment_that_failed_is_told_and_taken_down(
    aws: None, capsys: pytest.CaptureFixture[str], everything: list[str]
) -> None:
    cloudformation, name = boto3.client("cloudformation"), f"lightrail-{STAGE}"
    bucket = {"Resources": {"Bucket": {"Type": "AWS::S3::Bucket"}}}  # what osls leaves
    cloudformation.create_stack(StackName=name, TemplateBody=json.dumps(bucket))
    boto3.client("ssm").put_parameter(Name=f"/lightrail/{STAGE}/OPENAI_API_KEY", Value="x", Type="SecureString")
    told = f"{name} is not complete (CREATE_COMPLETE): deploy again, or: make remove STAGE={STAGE} REGION={REGION}"
    assert stages.main(["show", STAGE]) == 1
    assert told in capsys.readouterr().err
    assert cli.main(["--stage", STAGE, "keys", "create", "--name", "admin"]) == 1
    assert told in capsys.readouterr().err

    assert stages.main(["remove", STAGE, *everything]) == 0
    assert "is gone" in capsys.readouterr().out
    assert given_secrets() == ([] if everything else ["OPENAI_API_KEY"])
    assert cloudformation.describe_stacks()["Stacks"] == []


def test_one_secret_is_read_from_standard_input(
    deployed: JSON, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("gsk-of-the-tests\n"))
    answer = asked(capsys, "secrets", "put", "GROQ_API_KEY")
    assert answer == {"stage": STAGE, "region": REGION, "given": ["GROQ_API_KEY"], "secrets": ["GROQ_API_KEY"]}
    assert asked(capsys, "secrets", "delete", "GROQ_API_KEY")["secrets"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", STAGE, "keys", "list"], f"make deploy STAGE={STAGE} REGION={REGION}"),
        (["--stage", STAGE, "secrets", "put", "STRIPE_API_KEY"], "no provider asks for it"),
        (["--stage", STAGE, "secrets", "delete", "LR_KEY_PEPPER"], "every virtual key depends on it"),
        (["secrets", "list"], "--stage dev"),
    ],
)
def test_a_slip_is_told(aws: None, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(arguments) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["push"], ["put", "GROQ_API_KEY"]])
def test_secrets_are_given_to_no_stage_that_is_not_there(
    deployed: JSON, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("gsk-of-the-tests\n"))
    for stage, region in (("dve", REGION), (STAGE, "us-east-1")):
        monkeypatch.setenv("AWS_REGION", region)
        assert cli.main(["--stage", stage, "secrets", *arguments]) == 1
        assert f"No stack lightrail-{stage} in {region}. Elsewhere?" in capsys.readouterr().err
        parameters = boto3.client("ssm", region_name=region).describe_parameters()["Parameters"]
        assert not [each["Name"] for each in parameters if each["Name"].startswith("/lightrail/")]


def test_the_region_is_aws_region_before_botos_own_variable(
    deployed: JSON, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", REGION)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert asked(capsys, "secrets", "list")["region"] == REGION
    assert asked(capsys, "keys", "create", "--name", "ada")["name"] == "ada"
    assert [key["name"] for key in asked(capsys, "keys", "list")] == ["ada"]
    assert stages.main(["remove", STAGE]) == 0
    assert f"--region {REGION}" in capsys.readouterr().out


MAKE = pytest.mark.skipif(not shutil.which("make"), reason="no make")


@MAKE
@pytest.mark.parametrize(
    ("environ", "given", "region"),
    [
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, [], "eu-west-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-2"}, [], "eu-west-2"),
        ({"AWS_PROFILE": "work"}, [], "eu-west-3"),
        ({"AWS_PROFILE": "work"}, ["REGION=eu-north-1"], "eu-north-1"),
        ({}, [], "us-east-1"),
    ],
)
def test_make_takes_the_region_that_is_said_or_else_the_profiles(
    environ: dict[str, str], given: list[str], region: str, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("[profile work]\nregion = eu-west-3\n")
    python = Path(sys.executable).parent
    config = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_EC2_METADATA_DISABLED": "true"}
    said = done(["make", "--dry-run", "admin-key", f"BIN={python}", *given], ROOT, **config, **environ)
    assert f"AWS_REGION={region} AWS_DEFAULT_REGION={region} " in said


def test_a_table_on_aws_never_gets_this_machines_pepper(
    aws: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TABLE_NAME", "lightrail")
    assert cli.main(["keys", "create", "--name", "ada"]) == 1
    assert "LR_KEY_PEPPER" in capsys.readouterr().err
