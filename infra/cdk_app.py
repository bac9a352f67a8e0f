"""`make deploy-cdk`: the same stack by the CDK, from the same facts: `resources.yml` whole, `functions.yml` by a loop.

Synthesises with `python infra/cdk_app.py` too (Node must be there). Context: `stage` (dev).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import aws_cdk as cdk
import yaml
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from aws_cdk.cloudformation_include import CfnInclude

INFRA = Path(__file__).parent
PACKAGE = INFRA.parent / "dist/lightrail.zip"
RUNTIMES = {"python3.13": lambda_.Runtime.PYTHON_3_13}
ARCHITECTURES = {"arm64": lambda_.Architecture.ARM_64}

Facts = dict[str, Any]
"""A mapping of a YAML file."""


class Lightrail(cdk.Stack):
    """Raises KeyError or ValueError for what this reader of `functions.yml` does not know, lest it be left out."""

    def __init__(self, scope: cdk.App, stage: str) -> None:
        super().__init__(scope, f"lightrail-{stage}", description="Lightrail")
        self._stage = stage
        self._functions: Facts = yaml.safe_load((INFRA / "functions.yml").read_text("utf-8"))
        self._resources = CfnInclude(self, "Resources", template_file=str(INFRA / "resources.yml"))
        self._resources.get_parameter("Stage").default = stage
        rest_api = self._resources.get_resource("RestApi")
        self._api = apigateway.RestApi.from_rest_api_attributes(
            self,
            "Routes",
            rest_api_id=rest_api.ref,
            root_resource_id=cdk.Token.as_string(rest_api.get_att("RootResourceId")),
        )
        self._code = lambda_.Code.from_asset(str(PACKAGE))
        self._methods: list[apigateway.Method] = []
        for name, facts in self._functions.items():
            self._function(name, dict(facts))
        self._deploy()

    def _function(self, name: str, facts: Facts) -> None:
        routes, depends_on = facts.pop("events"), facts.pop("dependsOn", [])
        facts.pop("disableLogs")
        role = iam.Role.from_role_arn(self, f"{name}-role", intrinsic(facts.pop("role")), mutable=False)
        function = lambda_.Function(
            self,
            name,
            function_name=f"lightrail-{self._stage}-{name}",
            description=facts.pop("description"),
            code=self._code,
            handler=facts.pop("handler"),
            runtime=RUNTIMES[facts.pop("runtime")],
            architecture=ARCHITECTURES[facts.pop("architecture")],
            memory_size=facts.pop("memorySize"),
            timeout=cdk.Duration.seconds(facts.pop("timeout")),
            environment={key: intrinsic(value) for key, value in facts.pop("environment").items()},
            retry_attempts=facts.pop("maximumRetryAttempts", None),
            role=role,
        )
        if facts:
            raise ValueError(f"functions.yml: {name}: {', '.join(facts)} unknown to cdk_app.py")
        for logical_id in depends_on:
            function.node.add_dependency(self._resources.get_resource(logical_id))
        for event in routes:
            ((kind, told),) = event.items()
            {"http": self._route, "schedule": self._schedule}[kind](function, **told)

    def _route(
        self,
        function: lambda_.Function,
        path: str,
        method: str,
        timeoutInMillis: int,  # noqa: N803 - Serverless's name
        response: Facts | None = None,
    ) -> None:
        mode = apigateway.ResponseTransferMode[(response or {"transferMode": "BUFFERED"})["transferMode"]]
        integration = apigateway.LambdaIntegration(
            function,  # pyright: ignore[reportArgumentType] jsii's protocols
            scope_permission_to_method=False,
            timeout=cdk.Duration.millis(timeoutInMillis),
            response_transfer_mode=mode,
        )
        resource = self._api.root.resource_for_path(path) if path != "/" else self._api.root
        self._methods.append(resource.add_method(method.upper(), integration))

    def _schedule(self, function: lambda_.Function, rate: list[str]) -> None:
        for expression in rate:
            events.Rule(
                self,
                f"{function.node.id}-{expression}",
                schedule=events.Schedule.expression(expression),
                targets=[targets.LambdaFunction(function)],  # pyright: ignore[reportArgumentType] jsii's protocols
            )

    def _deploy(self) -> None:
        """A deployment is a picture of the API: a new one, by its name, whenever the facts have changed."""
        facts = b"".join((INFRA / name).read_bytes() for name in ("functions.yml", "resources.yml"))
        name = f"Deployment{hashlib.sha256(facts).hexdigest()[:16]}"
        deployment = apigateway.CfnDeployment(self, name, rest_api_id=self._api.rest_api_id)
        for method in self._methods:
            deployment.node.add_dependency(method)
        apigateway.CfnStage(
            self, "ApiStage", rest_api_id=self._api.rest_api_id, stage_name=self._stage, deployment_id=deployment.ref
        )


def intrinsic(value: str | Facts) -> str:
    """A literal, or CloudFormation's `{Ref: …}` and the like as it stands."""
    return value if isinstance(value, str) else cdk.Token.as_string(value)


def main() -> None:
    app = cdk.App()
    if not PACKAGE.exists():
        raise SystemExit("dist/lightrail.zip is not there: `make package` first.")
    Lightrail(app, app.node.try_get_context("stage") or "dev")
    app.synth()


if __name__ == "__main__":
    main()
