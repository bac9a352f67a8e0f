"""A stage on AWS, from its administrator's terminal: where its table is, and the secrets under `/lightrail/<stage>`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

import boto3  # pyright: ignore[reportMissingTypeStubs] it has no types
from botocore.exceptions import (  # pyright: ignore[reportMissingTypeStubs] it has no types
    BotoCoreError,
    ClientError,
)

from shared.config import Provider

PEPPER = "LR_KEY_PEPPER"
OUTPUTS = {"TableName", "BaseUrl", "AlarmTopicArn"}
ELSEWHERE = ("PROXY_URL", "AI_PROXY_URL")
"""Taken along with the providers' variables."""
LOOPBACK = ("//127.", "//localhost", "//[::1]")


class StageError(ValueError):
    """Something about the stage, or the way to it, is not as it must be; the message says what to do."""


class NoStack(StageError):
    """There is no stack of this name in this region: mistyped, elsewhere, not deployed yet or removed."""


class Stage:
    """Raises StageError where AWS refuses or is not reached."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack = f"lightrail-{name}"
        self.path = f"/lightrail/{name}"
        self._region = os.environ.get("AWS_REGION")  # as for other tools; boto3 reads AWS_DEFAULT_REGION alone
        self._clients: dict[str, Any] = {}

    def described(self) -> dict[str, Any]:
        """Raises NoStack."""
        try:
            (stack,) = self.call("cloudformation", "describe_stacks", StackName=self.stack)["Stacks"]
        except StageError as error:
            if f"{self.stack} does not exist" not in str(error):
                raise
            raise NoStack(
                f"No stack {self.stack} in {self.region}. Elsewhere? Add REGION=…;"
                f" else: make deploy STAGE={self.name} REGION={self.region}"
            ) from None
        return stack

    def outputs(self) -> dict[str, str]:
        """`TableName`, `BaseUrl` and `AlarmTopicArn` of the deployed stack; raises NoStack."""
        stack = self.described()
        outputs = {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}
        if not outputs.keys() >= OUTPUTS:  # a first deployment failed: osls leaves its bucket, the CDK an empty stack
            where = f"STAGE={self.name} REGION={self.region}"
            raise StageError(
                f"{self.stack} is not complete ({stack['StackStatus']}): deploy again, or: make remove {where}"
            )
        return outputs

    def pepper(self) -> str:
        """Made at first use; one that is there is never replaced, for that would end all keys."""
        known = self.secrets()
        if PEPPER not in known:
            self.put(PEPPER, secrets.token_urlsafe(32), replace=False)
            known = self.secrets()
        return known[PEPPER]

    def secrets(self) -> dict[str, str]:
        found: dict[str, str] = {}
        more: dict[str, str] = {}
        while True:
            page = self.call("ssm", "get_parameters_by_path", Path=self.path, WithDecryption=True, **more)
            found |= {each["Name"].rpartition("/")[2]: each["Value"] for each in page["Parameters"]}
            if not page.get("NextToken"):
                return found
            more = {"NextToken": page["NextToken"]}

    def put(self, name: str, value: str, *, replace: bool = True) -> None:
        given = {"Name": f"{self.path}/{name}", "Value": value, "Type": "SecureString"}
        self.call("ssm", "put_parameter", **given, Overwrite=replace)

    def delete(self, name: str) -> None:
        self.call("ssm", "delete_parameter", Name=f"{self.path}/{name}")

    def call(self, service: str, operation: str, **arguments: Any) -> Any:
        try:
            return getattr(self.client(service), operation)(**arguments)
        except (BotoCoreError, ClientError) as error:
            raise StageError(f"AWS: {error}") from error

    def client(self, service: str) -> Any:
        if service not in self._clients:
            make: Any = boto3.client  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            try:
                self._clients[service] = make(service, region_name=self._region or None)
            except BotoCoreError as error:
                raise StageError(f"AWS: {error}") from error
        return self._clients[service]

    @property
    def region(self) -> str:
        return self.client("cloudformation").meta.region_name


def known_variables(providers: list[Provider]) -> set[str]:
    """What may be given to a stage, besides its pepper: the accounts of the providers, and proxies."""
    accounts = {provider.variable(what) for provider in providers for what in ("api_key", "base_url")}
    return accounts | set(ELSEWHERE)


def worth_giving(environ: Mapping[str, str], known: set[str]) -> dict[str, str]:
    """Of the environment what the providers need on AWS, where this machine's own servers are not reached."""
    found = {name: value for name, value in environ.items() if name in known and value}
    return {name: value for name, value in found.items() if not any(here in value for here in LOOPBACK)}
