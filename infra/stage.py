"""A stage on AWS, whichever deployer put it up: `show` says how to use it, `remove` takes it down (`make remove`)."""

# ruff: noqa: T201 - its answer is what it prints

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import boto3  # pyright: ignore[reportMissingTypeStubs] it has no types
from botocore.exceptions import (  # pyright: ignore[reportMissingTypeStubs] it has no types
    BotoCoreError,
    ClientError,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere

from functions.stage import PEPPER, NoStack, Stage, StageError


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python infra/stage.py", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("verb", choices=("show", "remove"))
    options.add_argument("name", help="such as dev")
    options.add_argument("--everything", action="store_true", help="remove the table, too, with all keys and records")
    given = options.parse_args(arguments)
    stage = Stage(given.name)
    try:
        print(shown(stage) if given.verb == "show" else removed(stage, everything=given.everything))
    except (StageError, BotoCoreError, ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def shown(stage: Stage) -> str:
    outputs, make = stage.outputs(), f"STAGE={stage.name} REGION={stage.region}"
    stage.pepper()  # without one the stage answers nothing, not even /health
    lines = [f"{stage.stack} is up in {stage.region}.", f"  {outputs['BaseUrl']}   base URL for OpenAI clients"]
    if stage.secrets().keys() <= {PEPPER}:
        lines.append(f"  make secrets {make}   next: gives it the provider keys that .env has")
    lines += [
        f"  make admin-key {make}   makes an admin key, shown once",
        "  To hear its alarms:",
        f"    aws sns subscribe --region {stage.region} --topic-arn {outputs['AlarmTopicArn']} --protocol email"
        " --notification-endpoint …",
    ]
    return "\n".join(lines)


def removed(stage: Stage, *, everything: bool) -> str:
    try:
        stage.described()
    except NoStack:
        if not everything or not (deleted := delete_secrets(stage)):
            raise
        return f"No stack {stage.stack} in {stage.region}; deleted {deleted} secrets; a kept table, if any, stays."
    table = take_down(stage)
    if everything:
        if table:
            stage.call("dynamodb", "delete_table", TableName=table)
        deleted = f"{'its table and ' if table else ''}{delete_secrets(stage)} secrets"
        return f"{stage.stack} is gone, and so are {deleted}."
    if table is None:
        return f"{stage.stack}, which had no table, is gone. Kept: the secrets under {stage.path}."
    return (
        f"{stage.stack} is gone. Kept, and billed for storage alone: its table {table}, and the secrets under"
        f" {stage.path}, without which its keys are void. A new deployment makes a new table.\n"
        f"To delete the old one: aws dynamodb delete-table --table-name {table} --region {stage.region}"
    )


def delete_secrets(stage: Stage) -> int:
    names = stage.secrets()
    for name in names:
        stage.delete(name)
    return len(names)


def take_down(stage: Stage) -> str | None:
    """However far its deployment came. Returns the table, which outlives the stack, if it got one.

    CloudFormation deletes no bucket with something in it: osls has one for its packages."""
    s3: Any = boto3.resource  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    pages = stage.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=stage.stack)
    found: dict[str, list[str]] = {}
    for each in (each for page in pages for each in page["StackResourceSummaries"]):
        if each["ResourceStatus"] != "DELETE_COMPLETE":
            found.setdefault(each["ResourceType"], []).append(each.get("PhysicalResourceId", ""))
    for bucket in found.get("AWS::S3::Bucket", ()):
        s3("s3", region_name=stage.region).Bucket(bucket).object_versions.delete()
    stage.call("cloudformation", "delete_stack", StackName=stage.stack)
    stage.client("cloudformation").get_waiter("stack_delete_complete").wait(StackName=stage.stack)
    return next(iter(found.get("AWS::DynamoDB::Table", ())), None)


if __name__ == "__main__":
    sys.exit(main())
