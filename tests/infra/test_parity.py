"""Serverless and the CDK make the same of the same facts; and the facts are what the app needs."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.openapi.utils import get_openapi

from functions.app import assemble
from functions.routes import MODEL_PATHS
from functions.secrets import Current, is_secret
from shared.metrics import EMF
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
    "AWS::Lambda::EventInvokeConfig", "AWS::Lambda::Function", "AWS::Lambda::Permission",
}  # fmt: skip
NEVER_OTHERWISE: JSON = {"ApiKeyRequired": False, "RequestParameters": {}}
"""What API Gateway takes for said where only one of the deployers says it; so are lists with nothing in them."""


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
        """`ANY /v1/chat/completions` to all properties of the method, its resource and function by their own names."""
        found: dict[str, JSON] = {}
        for method in self.of("AWS::ApiGateway::Method").values():
            properties = NEVER_OTHERWISE | {key: each for key, each in method["Properties"].items() if each != []}
            integration = dict(properties.pop("Integration"))
            uri = joined(integration["Uri"])
            function = next(name for name in self.of("AWS::Lambda::Function") if f"<{name}.Arn>" in uri)
            integration["Uri"] = uri.replace(function, self.resources[function]["Properties"]["FunctionName"])
            integration.setdefault("ResponseTransferMode", "BUFFERED")
            path = self.path(properties.pop("ResourceId"))
            found[f"{properties['HttpMethod']} {path}"] = properties | {"Integration": integration}
        return found

    def invocations(self) -> dict[str, JSON]:
        """How each function is called when nobody waits for its answer."""
        found: dict[str, JSON] = {}
        for each in self.of("AWS::Lambda::EventInvokeConfig").values():
            properties = {key: value for key, value in each["Properties"].items() if value != {}}
            function = properties.pop("FunctionName")["Ref"]
            found[self.resources[function]["Properties"]["FunctionName"]] = properties
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
        "STREAM": f"arn:{api}/2021-11-15/functions/<{{}}.Arn>/response-streaming-invocations",
        "BUFFERED": f"arn:{api}/2015-03-31/functions/<{{}}.Arn>/invocations",
    }
    wanted: dict[str, JSON] = {}
    for name, facts in functions.items():
        for event in facts["events"]:
            if http := event.get("http"):
                mode = http.get("response", {}).get("transferMode", "BUFFERED")
                method = http["method"].upper()
                wanted[f"{method} /{http['path'].strip('/')}"] = {
                    "RestApiId": {"Ref": "RestApi"},
                    "HttpMethod": method,
                    "AuthorizationType": "NONE",
                    "ApiKeyRequired": False,
                    "RequestParameters": {},
                    "Integration": {
                        "Type": "AWS_PROXY",
                        "IntegrationHttpMethod": "POST",
                        "Uri": uris[mode].format(f"lightrail-{STAGE}-{name}"),
                        "TimeoutInMillis": http["timeoutInMillis"],
                        "ResponseTransferMode": mode,
                    },
                }
    assert found == wanted


def test_both_try_a_failed_run_once(by_osls: JSON, by_cdk: JSON) -> None:
    """Lambda would run it twice more, beside the next: the schedule comes back by itself."""
    found = Template(by_osls).invocations()
    assert found == Template(by_cdk).invocations()
    assert found == {f"lightrail-{STAGE}-sweep": {"Qualifier": "$LATEST", "MaximumRetryAttempts": 0}}


def test_all_functions_have_the_same_settings(functions: JSON) -> None:
    """They are written once, and reach all; the wrapper is what only `stream` has."""
    found = [
        {name: facts["environment"][name] for name in facts["environment"].keys() - PLATFORM}
        for facts in functions.values()
    ]
    assert found[0] == found[1] == found[2]
    defaults = Settings.read({})
    for name in ("LOG_LEVEL", "GENERATION_TTL_DAYS"):
        assert str(getattr(defaults, name.lower())) == found[0][name], "the README tells the same of both"


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
    """Those of the app that asks models are explicit; the greedy rest goes to the one that does not."""
    paths = {
        name: [event["http"]["path"] for event in facts["events"] if "http" in event]
        for name, facts in functions.items()
    }
    current = Current({"DATABASE_URL": "sqlite:///never-opened.db"})
    with_models, without = (
        get_openapi(title="", version="", routes=assemble(current.settings, current, asks_models=asks).routes)["paths"]
        for asks in (True, False)
    )
    asking = with_models.keys() - without.keys()
    assert {path.removeprefix("/v1") for path in asking} == MODEL_PATHS
    assert {f"/{path}" for path in paths["stream"]} == asking | MODEL_PATHS, "`/v1` may be left out"
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
    assert (table["DeletionPolicy"], table["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")
    properties = table["Properties"]
    assert properties["SSESpecification"] == {"SSEEnabled": True}
    assert properties["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert properties["TimeToLiveSpecification"] == {"AttributeName": "ttl", "Enabled": True}
    assert properties["BillingMode"] == "PAY_PER_REQUEST"


def test_alarms_and_dashboard_are_within_what_is_free(resources: JSON) -> None:
    kinds = [each["Type"] for each in resources["Resources"].values()]
    assert kinds.count("AWS::CloudWatch::Dashboard") <= 3
    alarms = [each["Properties"] for each in resources["Resources"].values() if each["Type"].endswith("::Alarm")]
    assert sum(sum("MetricStat" in each for each in alarm.get("Metrics", ())) or 1 for alarm in alarms) <= 10
    assert all(alarm["AlarmActions"] == [{"Ref": "AlarmTopic"}] for alarm in alarms)
    body = json.loads(resources["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"])
    assert all(widget["properties"]["metrics"] for widget in body["widgets"])


def test_alarms_and_dashboard_are_of_one_stage_and_of_metrics_that_are_made(resources: JSON) -> None:
    """Two stages share an account and a namespace."""
    made = {"BooksDiffer", "KeysLeftOver"}
    for each in (each["Properties"] for each in resources["Resources"].values() if each["Type"].endswith("::Alarm")):
        metrics = [metric["MetricStat"]["Metric"] for metric in each.get("Metrics", ()) if "MetricStat" in metric]
        for metric in metrics or [each]:
            values = [dimension["Value"] for dimension in metric["Dimensions"]]
            assert any(value in ({"Ref": "Stage"}, {"Ref": "Table"}) or "${Stage}" in str(value) for value in values)
            if metric["Namespace"] == "Lightrail":
                assert {dimension["Name"] for dimension in metric["Dimensions"]} == {"service", "stage"}
                made.remove(metric["MetricName"])
    assert not made
    body = resources["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    searches = [line for line in body.splitlines() if "SEARCH(" in line]
    names = {name for line in searches for name in re.findall(r"MetricName=\W+(\w+)", line)}
    assert len(searches) == 5
    assert names == {"CostUSD", "Errors", "Latency", "Requests"} <= {name for name, _ in EMF.NAMES.values()}
    assert all('{Lightrail,provider,service,stage} stage=\\"${Stage}\\"' in line for line in searches)


def test_throttling_by_the_index_raises_the_alarm_too(resources: JSON) -> None:
    metrics = resources["Resources"]["TableThrottled"]["Properties"]["Metrics"]
    seen = {
        tuple(dimension["Name"] for dimension in each["MetricStat"]["Metric"]["Dimensions"])
        for each in metrics
        if "MetricStat" in each
    }
    assert seen == {("TableName",), ("TableName", "GlobalSecondaryIndexName")}
    table = resources["Resources"]["Table"]["Properties"]
    assert "generations" in [index["IndexName"] for index in table["GlobalSecondaryIndexes"]]


def test_linters_find_nothing(by_osls: JSON, by_cdk: JSON, scratch: Path) -> None:
    files = ["osls/cloudformation-template-update-stack.json", f"cdk/lightrail-{STAGE}.template.json"]
    command = [Path(sys.executable).with_name("cfn-lint"), "--region", "eu-central-1", "us-east-1", "--", *files]
    found = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
