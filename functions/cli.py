"""The administrator's terminal: `python -m functions.cli keys create --name ada --rpm 60`; see `--help`.

`--stage dev` before the rest means the one on AWS, with the credentials that the AWS command line would use.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dotenv import load_dotenv

from functions import keyform, local
from shared import config
from shared.errors import GatewayError
from shared.keys import Keys
from shared.schema import JSON
from shared.settings import Settings
from shared.store import open_store
from shared.store.base import Store

LIMITS = {
    "role": "user or admin",
    "expires-at": "a time such as 2030-01-31T12:00:00Z",
    "models": "comma list: aliases, models, provider/model, provider/*; '' for none",
    "rpm": "requests per minute",
    "tpm": "tokens per minute",
    "concurrency": "open requests at a time",
    "daily-budget-usd": "US dollars per UTC day",
    "balance-usd": "US dollars left to spend",
    "metadata": "a JSON object",
}
NONE = "none"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m functions.cli", description=(__doc__ or "").partition("\n")[0])
    root.add_argument("--stage", help="a stage that is deployed on AWS, such as dev; else what the environment names")
    nouns = root.add_subparsers(dest="noun", required=True)
    keys = nouns.add_parser("keys", help="virtual keys").add_subparsers(dest="verb", required=True)
    create = keys.add_parser("create", help="make a key; it is shown this once")
    create.add_argument("--name", required=True)
    change = keys.add_parser("change", help=f"change fields of a key; '{NONE}' lifts a limit")
    change.add_argument("id")
    change.add_argument("--name")
    for form in (create, change):
        for name, what in LIMITS.items():
            form.add_argument(f"--{name}", help=what)
    keys.add_parser("list", help="all keys")
    for verb, what in (
        ("show", "one key"),
        ("enable", "let it call again"),
        ("disable", "refuse it from the next request on"),
        ("delete", "refuse it for good"),
    ):
        keys.add_parser(verb, help=what).add_argument("id")
    rotate = keys.add_parser("rotate", help="a new secret, shown this once")
    rotate.add_argument("id")
    rotate.add_argument(
        "--grace-seconds", type=int, default=keyform.GRACE, help="how long the old secret is still good"
    )
    secrets = nouns.add_parser("secrets", help="provider keys of a stage").add_subparsers(dest="verb", required=True)
    secrets.add_parser("push", help="give it what the environment and .env have for known providers")
    secrets.add_parser("list", help="their names")
    for verb, what in (("put", "give it one, asked for or read from standard input"), ("delete", "take one away")):
        secrets.add_parser(verb, help=what).add_argument("name")
    table = nouns.add_parser("table", help="the DynamoDB table").add_subparsers(dest="verb", required=True)
    table.add_parser("create", help="make it on the endpoint that DATABASE_URL names (local engines)")
    return root


def fields(given: argparse.Namespace) -> JSON:
    """The options as the JSON body that `/admin/keys` takes."""
    body: JSON = {}
    for name in ("name", *LIMITS):
        value: str | None = getattr(given, field := name.replace("-", "_"))
        if value is None:
            continue
        if value == NONE:
            body[field] = None
        elif field == "models":
            body[field] = [model.strip() for model in value.split(",") if model.strip()]
        elif field in ("name", "role") or (field == "expires_at" and not value.isdecimal()):
            body[field] = value
        else:
            body[field] = parsed(name, value)
    return body


def parsed(option: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        wanted = "a JSON object" if option == "metadata" else f"a number, or '{NONE}'"
        raise ValueError(f"--{option} takes {wanted}") from None


async def run(given: argparse.Namespace, keys: Keys, store: Store) -> Any:
    now = int(time.time())
    match given.verb:
        case "create":
            made, key = await keys.create(keyform.wanted(keyform.read(keyform.KeyRequest, fields(given))))
            return {"key": key, **keyform.shown(made, now)}
        case "list":
            found = [key async for key in store.keys() if not key.deleted]
            return [keyform.shown(key, now) for key in sorted(found, key=lambda key: (key.name, key.id))]
        case "show":
            return keyform.shown(await keys.get(given.id), now)
        case "enable" | "disable":
            form = keyform.read(keyform.KeyPatch, {"enabled": given.verb == "enable"})
            return keyform.shown(await keys.change(given.id, keyform.change(form)), now)
        case "change":
            form = keyform.read(keyform.KeyPatch, fields(given))
            return keyform.shown(await keys.change(given.id, keyform.change(form)), now)
        case "rotate":
            changed, key = await keys.rotate(given.id, keyform.grace(given.grace_seconds))
            return {"key": key, **keyform.shown(changed, now)}
        case _:
            await keys.delete(given.id)
            return {"id": given.id, "deleted": True}


def create_table(settings: Settings) -> JSON:
    from shared.store.dynamodb import create_table_at  # boto3 only where it is needed

    if not settings.database_url.startswith("dynamodb://"):
        raise ValueError("DATABASE_URL must name the engine: dynamodb://<table>?endpoint=http://127.0.0.1:8000")
    return {"created": create_table_at(settings.database_url, Path(__file__).parents[1] / "infra/resources.yml")}


def run_secrets(given: argparse.Namespace, settings: Settings) -> JSON:
    """What the stage has afterwards, by name; the functions see a change within five minutes.

    Nothing is put where there is no stack, be it for a slip in the name or the region."""
    from functions.stage import PEPPER, Stage, known_variables, worth_giving  # boto3 only where it is needed

    if given.stage is None:
        raise ValueError("Whose secrets? Name the stage: python -m functions.cli --stage dev secrets …")
    stage, known = Stage(given.stage), known_variables(config.read(Path(settings.gateway_config))[0])
    pushed: dict[str, str] = {}
    if given.verb == "push":
        pushed = worth_giving(os.environ, known)
        if not pushed:
            raise ValueError("No provider's key is set: put them into .env, or use: secrets put OPENAI_API_KEY")
        stage.described()
        stage.pepper()
    elif given.verb == "put":
        if given.name not in known:
            raise ValueError(f"{given.name}: no provider asks for it; gateway.toml may add one. Known: {sorted(known)}")
        stage.described()
        secret = getpass.getpass(f"{given.name}: ") if sys.stdin.isatty() else sys.stdin.readline()
        if not secret.strip():
            raise ValueError(f"{given.name}: nothing was given.")
        pushed = {given.name: secret.strip()}
    elif given.verb == "delete":
        if given.name == PEPPER:
            raise ValueError(f"{PEPPER}: every virtual key depends on it.")
        stage.delete(given.name)
    for name, value in pushed.items():
        stage.put(name, value)
    where = {"stage": stage.name, "region": stage.region}
    return {**where, "given": sorted(pushed), "secrets": sorted(stage.secrets())}


def staged(settings: Settings, stage: str | None) -> Settings:
    """With the table and the pepper of a stage on AWS, or of this checkout."""
    if stage:
        from functions.stage import Stage

        there = Stage(stage)
        table = f"dynamodb://{there.outputs()['TableName']}?region={there.region}"
        return settings.model_copy(update={"database_url": table, "table_name": None, "lr_key_pepper": there.pepper()})
    if settings.lr_key_pepper is None and settings.table_name:
        raise ValueError("LR_KEY_PEPPER: a table on AWS has its own; name its stage: python -m functions.cli --stage …")
    return settings.model_copy(update={"lr_key_pepper": settings.lr_key_pepper or local.pepper()})


def main(arguments: list[str] | None = None) -> int:
    load_dotenv(".env")
    given = parser().parse_args(arguments)
    try:
        settings = Settings.read(os.environ)
        if given.noun == "table":
            answer = create_table(settings)
        elif given.noun == "secrets":
            answer = run_secrets(given, settings)
        else:
            settings = staged(settings, given.stage)
            pepper = settings.lr_key_pepper or ""
            answer = asyncio.run(with_store(settings, lambda store: run(given, Keys(store, pepper), store)))
    except (GatewayError, ValueError) as error:
        print(f"error: {local.told(error) if isinstance(error, ValueError) else error.message}", file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=2))
    return 0


async def with_store(settings: Settings, work: Callable[[Store], Awaitable[Any]]) -> Any:
    store = open_store(settings.database_url, settings.table_name)
    try:
        return await work(store)
    finally:
        await store.close()


if __name__ == "__main__":
    sys.exit(main())
