"""Serverless and the CDK make the same of the same facts; and the facts are what the app needs."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from functions.routes import MODEL_PATHS
from functions.secrets import is_secret
from shared.settings import Settings
from tests.infra.conftest import STAGE
from tests.server import ROOT

JSON = dict[str, Any]

OWN = {
    "osls": {"AWS::S3::Bucket", "AWS::S3::BucketPolicy"},  # where it keeps packages
    "cdk": {"AWS::ApiGateway::Stage"},  # osls has it made by the deployment
}
PLATFORM = {"AWS_LAMBDA_EXEC_WRAPPER"}
"""https://docs.aws.amazon.com/lambda/latest/dg/runtimes-modify.html"""
NAMED_BY_THE_DEPLOYER = {
    "AWS::ApiGateway::Deployment", "AWS::ApiGateway::Method", "AWS::ApiGateway::Resource", "AWS::Events::Rule",
    "AWS::Lambda::Function", "AWS::Lambda::Permission",
}  # fmt: skip


class Template:
    """A template in the words of who uses what it makes, without the names that its deployer gave to things."""

    def __init__(self, template: JSON) -> None:
        self.resources: JSON = template["Resources"]
        self.outputs: JSON = template["Outputs"]

    def of(self, *kinds: str) -> dict[str, JSON]:
        return {name: each for name, each in self.resources.items() if each["Type"] in kinds}

    def functions(self) -> dict[str, JSON]:
        """All properties, by name, but for where the package lies."""
        found: dict[str, JSON] = {}
        for each in self.of("AWS::Lambda::Function").values():
            properties = {key: each["Properties"][key] for key in each["Properties"].keys() - {"Code", "FunctionName"}}
            depends_on = {"DependsOn": set(each.get("DependsOn", ()))}
            found[each["Properties"]["FunctionName"]] = properties | depends_on
        return found

    def routes(self) -> dict[str, JSON]:
        """`ANY /v1/chat/completions` to the function, how long it may take and how it answers."""
        found: dict[str, JSON] = {}
        for method in self.of("AWS::ApiGateway::Method").values():
            properties = method["Properties"]
            integration = properties["Integration"]
            uri = joined(integration["Uri"])
            function = next(name for name in self.of("AWS::Lambda::Function") if f"<{name}.Arn>" in uri)
            assert properties["AuthorizationType"] == "NONE"
            assert (integration["Type"], integration["IntegrationHttpMethod"]) == ("AWS_PROXY", "POST")
            found[f"{properties['HttpMethod']} {self.path(properties['ResourceId'])}"] = {
                "function": self.resources[function]["Properties"]["FunctionName"],
                "uri": uri.replace(function, "function"),
                "timeout": integration["TimeoutInMillis"],
                "mode": integration.get("ResponseTransferMode", "BUFFERED"),
            }
        return found

    def path(self, resource: JSON) -> str:
        if resource == {"Fn::GetAtt": ["RestApi", "RootResourceId"]}:
            return "/"
        properties = self.resources[resource["Ref"]]["Properties"]
        return f"{self.path(properties['ParentId']).rstrip('/')}/{properties['PathPart']}"

    def schedules(self) -> list[tuple[str, str, str]]:
        rules = [each["Properties"] for each in self.of("AWS::Events::Rule").values()]
        found: list[tuple[str, str, str]] = []
        for rule in rules:
            (target,) = rule["Targets"]
            function = self.resources[target["Arn"]["Fn::GetAtt"][0]]["Properties"]["FunctionName"]
            found.append((function, rule["ScheduleExpression"], rule["State"]))
        return found

    def callers(self) -> set[tuple[str, str]]:
        """Who may call which function, and only on behalf of this stack's own API and rules."""
        found: set[tuple[str, str]] = set()
        for each in self.of("AWS::Lambda::Permission").values():
            properties = each["Properties"]
            source = joined(properties["SourceArn"])
            assert "<RestApi>" in source or any(rule in source for rule in self.of("AWS::Events::Rule")), source
            function = self.resources[properties["FunctionName"]["Fn::GetAtt"][0]]["Properties"]["FunctionName"]
            assert properties["Action"] == "lambda:InvokeFunction"
            found.add((properties["Principal"], function))
        return found


def joined(value: Any) -> str:
    match value:
        case {"Fn::Join": [separator, parts]}:
            return separator.join(joined(part) for part in parts)
        case {"Ref": name}:
            return f"<{name}>"
        case {"Fn::GetAtt": [name, attribute]}:
            return f"<{name}.{attribute}>"
        case _:
            return value


def shared_resources(template: JSON, resources: JSON) -> JSON:
    """Of a template what resources.yml defines."""
    found = copy.deepcopy({name: template["Resources"][name] for name in resources["Resources"]})
    for each in found.values():
        each.pop("Metadata", None)  # the CDK's own notes
    return found


def test_both_have_the_resources_as_written(template: JSON, resources: JSON) -> None:
    """Table, its TTL, recovery and encryption, roles, logs, the API and its own answers, alarms, dashboard."""
    assert shared_resources(template, resources) == resources["Resources"]
    assert template["Parameters"]["Stage"]["Default"] == STAGE
    assert (
        resources["Outputs"].items()
        <= {
            name: {key: value for key, value in output.items() if key == "Value"}
            for name, output in template["Outputs"].items()
        }.items()
    )


def test_both_have_the_same_functions(by_osls: JSON, by_cdk: JSON, functions: JSON) -> None:
    found = Template(by_osls).functions()
    assert found == Template(by_cdk).functions()
    assert found == {
        f"lightrail-{STAGE}-{name}": {
            "Description": facts["description"],
            "Handler": facts["handler"],
            "Runtime": "python3.13",
            "Architectures": ["arm64"],
            "MemorySize": facts["memorySize"],
            "Timeout": facts["timeout"],
            "Role": facts["role"],
            "Environment": {"Variables": facts["environment"]},
            "DependsOn": set(facts.get("dependsOn", ())),
        }
        for name, facts in functions.items()
    }


def test_both_have_the_same_routes(by_osls: JSON, by_cdk: JSON, functions: JSON) -> None:
    found = Template(by_osls).routes()
    assert found == Template(by_cdk).routes()
    api = "<AWS::Partition>:apigateway:<AWS::Region>:lambda:path"
    uris = {
        "STREAM": f"arn:{api}/2021-11-15/functions/<function.Arn>/response-streaming-invocations",
        "BUFFERED": f"arn:{api}/2015-03-31/functions/<function.Arn>/invocations",
    }
    wanted: dict[str, JSON] = {}
    for name, facts in functions.items():
        for event in facts["events"]:
            if http := event.get("http"):
                mode = http.get("response", {}).get("transferMode", "BUFFERED")
                wanted[f"{http['method'].upper()} /{http['path'].strip('/')}"] = {
                    "function": f"lightrail-{STAGE}-{name}",
                    "uri": uris[mode],
                    "timeout": http["timeoutInMillis"],
                    "mode": mode,
                }
    assert found == wanted


def test_both_have_the_same_schedule_and_callers(by_osls: JSON, by_cdk: JSON) -> None:
    serverless, cdk = Template(by_osls), Template(by_cdk)
    assert serverless.schedules() == cdk.schedules() == [(f"lightrail-{STAGE}-sweep", "rate(10 minutes)", "ENABLED")]
    assert serverless.callers() == cdk.callers()
    assert {principal for principal, _ in serverless.callers()} == {"apigateway.amazonaws.com", "events.amazonaws.com"}


@pytest.mark.parametrize("deployer", ["osls", "cdk"])
def test_neither_adds_anything_else(request: pytest.FixtureRequest, deployer: str, resources: JSON) -> None:
    template: JSON = request.getfixturevalue(f"by_{deployer}")
    added = {each["Type"] for name, each in template["Resources"].items() if name not in resources["Resources"]}
    assert added == NAMED_BY_THE_DEPLOYER | OWN[deployer]


def test_a_deployment_comes_after_what_the_platform_itself_answers(template: JSON, resources: JSON) -> None:
    """It is a picture of the API: what is made later would not be in it before the next one."""
    answers = {name for name, each in resources["Resources"].items() if each["Type"].endswith("GatewayResponse")}
    read = Template(template)
    (deployment,) = read.of("AWS::ApiGateway::Deployment").values()
    assert set(deployment["DependsOn"]) == set(read.of("AWS::ApiGateway::Method"))
    for name, function in read.functions().items():
        assert function["DependsOn"] == (set() if name.endswith("sweep") else answers)


def test_the_stage_is_where_the_base_url_says(by_osls: JSON, by_cdk: JSON) -> None:
    (deployment,) = Template(by_osls).of("AWS::ApiGateway::Deployment").values()
    (stage,) = Template(by_cdk).of("AWS::ApiGateway::Stage").values()
    assert deployment["Properties"]["StageName"] == stage["Properties"]["StageName"] == STAGE


def test_every_model_route_streams_and_no_other(functions: JSON) -> None:
    paths = {
        name: [event["http"]["path"] for event in facts["events"] if "http" in event]
        for name, facts in functions.items()
    }
    assert sorted(paths["stream"]) == sorted(f"{root}{path}".strip("/") for path in MODEL_PATHS for root in ("/v1", ""))
    assert sorted(paths["api"]) == ["/", "v1", "v1/{proxy+}", "{proxy+}"]


def test_functions_start_what_is_there(functions: JSON) -> None:
    for facts in functions.values():
        module, _, name = facts["handler"].rpartition(".")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        if wrapper := facts["environment"].get("AWS_LAMBDA_EXEC_WRAPPER"):
            assert (ROOT / Path(wrapper).relative_to("/var/task")).stat().st_mode & 0o111
        else:
            assert name in {made for node in tree.body for made in names(node)}


def names(node: ast.stmt) -> list[str | None]:
    """What a statement at the top of a module defines."""
    targets = node.targets if isinstance(node, ast.Assign) else [node]
    return [getattr(target, "id", None) or getattr(target, "name", None) for target in targets]


def test_variables_are_settings_and_no_secrets(functions: JSON) -> None:
    for facts in functions.values():
        names = facts["environment"].keys()
        assert {name.lower() for name in names - PLATFORM} <= Settings.model_fields.keys()
        assert not [name for name in names if is_secret(name)]
    literal = {k: v for facts in functions.values() for k, v in facts["environment"].items() if isinstance(v, str)}
    assert Settings.read(literal).max_body_bytes < 6 * 2**20 / 1.34  # as base64 an event must still hold it


def test_the_table_outlives_the_stack(resources: JSON) -> None:
    table = resources["Resources"]["Table"]
    assert (table["DeletionPolicy"], table["UpdateReplacePolicy"]) == ("Retain", "Retain")
    properties = table["Properties"]
    assert properties["SSESpecification"] == {"SSEEnabled": True}
    assert properties["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert properties["TimeToLiveSpecification"] == {"AttributeName": "ttl", "Enabled": True}
    assert properties["BillingMode"] == "PAY_PER_REQUEST"


def test_alarms_and_dashboard_are_within_what_is_free(resources: JSON) -> None:
    kinds = [each["Type"] for each in resources["Resources"].values()]
    assert kinds.count("AWS::CloudWatch::Alarm") <= 10
    assert kinds.count("AWS::CloudWatch::Dashboard") <= 3
    for each in resources["Resources"].values():
        if each["Type"] == "AWS::CloudWatch::Alarm":
            assert each["Properties"]["AlarmActions"] == [{"Ref": "AlarmTopic"}]
    body = json.loads(resources["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"])
    assert all(widget["properties"]["metrics"] for widget in body["widgets"])


def test_linters_find_nothing(by_osls: JSON, by_cdk: JSON, scratch: Path) -> None:
    files = ["osls/cloudformation-template-update-stack.json", f"cdk/lightrail-{STAGE}.template.json"]
    command = [Path(sys.executable).with_name("cfn-lint"), "--region", "eu-central-1", "us-east-1", "--", *files]
    found = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
