"""What both deployers make of the facts in infra/, offline; packages, built once; the app on a table, and watched."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import botocore.auth
import botocore.client
import httpx
import pytest
import yaml
from moto import mock_aws

from functions.app import create_app
from infra.package import OURS, python313
from shared.settings import Settings
from shared.store import open_store
from shared.store.base import Admitted, Ask, Hold, Store, VirtualKey
from shared.store.dynamodb import create_table_at
from tests.server import PEPPER, PROVIDER_KEY, ROOT
from tests.upstream import Upstream

STAGE, REGION = "test", "eu-central-1"
DEPLOYERS = ROOT / "infra/node_modules/.bin"
NO_DEPLOYERS = "no deployers: `make infra/node_modules/.installed` installs them, with Node.js and npm"
NO_CDK = "no CDK: `make .venv/.cdk` installs it; it needs Node.js, too"
NO_PYTHON = "no Python 3.13, nor uv that could fetch it: infra/package.py says what to install"

JSON = dict[str, Any]
Permissions = set[tuple[str, str]]
"""`("dynamodb:Query", "index/keys")`; the table itself is `table`."""

MODEL = "openai/gpt-4o-mini"
HELLO = {"role": "user", "content": "hello"}
PATH = f"/lightrail/{STAGE}"


@pytest.fixture(scope="session")
def functions() -> JSON:
    return yaml.safe_load((ROOT / "infra/functions.yml").read_text())


@pytest.fixture(scope="session")
def resources() -> JSON:
    return yaml.safe_load((ROOT / "infra/resources.yml").read_text())


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of what deployers read, with a package of two bytes: no template looks into it."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "infra").mkdir()
    shutil.copy(ROOT / "serverless.yml", folder)
    for name in ("functions.yml", "resources.yml", "cdk_app.py"):
        shutil.copy(ROOT / "infra" / name, folder / "infra")
    (folder / "dist").mkdir()
    with zipfile.ZipFile(folder / "dist/lightrail.zip", "w") as archive:
        archive.writestr("functions/api.py", "handler = print")
    return folder


def done(command: list[str], folder: Path, **environ: str) -> str:
    """Runs it to its end, without anybody's AWS account; returns all it said."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    ran = subprocess.run(
        command,
        cwd=folder,
        env=bare | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.fixture(scope="session")
def by_osls(scratch: Path) -> JSON:
    """The CloudFormation template that `make deploy` would send."""
    if not (DEPLOYERS / "osls").exists() or not shutil.which("node"):
        pytest.skip(NO_DEPLOYERS)
    done([str(DEPLOYERS / "osls"), "package", "--package", "osls", "--stage", STAGE, "--region", REGION], scratch)
    return json.loads((scratch / "osls/cloudformation-template-update-stack.json").read_text())


@pytest.fixture(scope="session")
def by_cdk(scratch: Path) -> JSON:
    """The one that `make deploy-cdk` would."""
    if not find_spec("aws_cdk") or not shutil.which("node"):
        pytest.skip(NO_CDK)
    done(
        [sys.executable, "infra/cdk_app.py"],
        scratch,
        CDK_CONTEXT_JSON=json.dumps({"stage": STAGE}),
        CDK_OUTDIR=str(scratch / "cdk"),
        CDK_VALIDATION="false",  # 20 seconds; cfn-lint reads the template, too
        JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION="1",
    )
    return json.loads((scratch / f"cdk/lightrail-{STAGE}.template.json").read_text())


@pytest.fixture(scope="session", params=["osls", "cdk"])
def template(request: pytest.FixtureRequest) -> JSON:
    return request.getfixturevalue(f"by_{request.param}")


@dataclass(frozen=True)
class Packages:
    """Of `checkout`, a copy that nobody changes meanwhile, and not git's. `twin` was built beside `arm64`, but by pip;
    `here` is for this machine, if it is a Linux x86-64. `said` is what the building of `arm64` told."""

    python: str
    checkout: Path
    said: str
    arm64: Path
    twin: Path
    here: Path | None


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    python = python313()
    if python is None:
        pytest.skip(NO_PYTHON)
    folder, checkout = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("checkout-to-pack")
    for name in (*OURS, "infra"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(ROOT / "gateway.toml", checkout)
    wanted = {"arm64": ["arm64"], "twin": ["arm64", "--pip"]}
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        wanted["here"] = ["x86_64"]
    building, told = dict[str, subprocess.Popen[str]](), dict[str, str]()
    for name, kind in wanted.items():
        command = [sys.executable, "infra/package.py", "--output", str(folder / f"{name}.zip"), "--platform", *kind]
        building[name] = subprocess.Popen(
            command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for name, process in building.items():
        told[name], _ = process.communicate()
        assert process.returncode == 0, f"{name}: {told[name]}"
    zips = {name: folder / f"{name}.zip" for name in wanted}
    return Packages(python, checkout, told["arm64"], zips["arm64"], zips["twin"], zips.get("here"))


@dataclass
class Watch:
    """All calls to AWS while it is open."""

    seen: Permissions = field(default_factory=set)
    watching: bool = False

    def note(self, service: str, operation: str, arguments: JSON) -> None:
        if not self.watching:
            return
        target = "secrets" if service == "ssm" else "table"
        if index := arguments.get("IndexName"):
            target = f"index/{index}"
        self.seen.add((f"{service}:{operation}", target))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch, call = Watch(), botocore.client.BaseClient._make_api_call

    def noted(client: Any, operation: str, arguments: JSON) -> Any:
        watch.note(client.meta.service_model.service_name, operation, arguments)
        return call(client, operation, arguments)

    sign = botocore.auth.SigV4Auth.add_auth

    def signed(signer: Any, request: Any) -> None:  # what is asked of Bedrock goes past botocore's clients
        if watch.watching and signer._service_name == "bedrock":
            streams = request.url.endswith("/converse-stream")
            watch.seen.add((f"bedrock:InvokeModel{'WithResponseStream' if streams else ''}", "models"))
        sign(signer, request)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", noted)
    monkeypatch.setattr(botocore.auth.SigV4Auth, "add_auth", signed)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws():
        assert create_table_at(f"dynamodb://lightrail?region={REGION}", ROOT / "infra/resources.yml")
        boto3.client("ssm").put_parameter(Name=f"{PATH}/LR_KEY_PEPPER", Value=PEPPER, Type="SecureString")
        yield watch


@pytest.fixture
async def store(watch: Watch) -> AsyncIterator[Store]:
    store = open_store("", "lightrail")
    yield store
    await store.close()


@dataclass
class App:
    """The app on the table, asked with a key of its own."""

    client: httpx.AsyncClient
    store: Store
    key: VirtualKey

    async def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.request(method, path, json=body, headers=headers)

    async def chat(self, **more: Any) -> httpx.Response:
        return await self.ask("POST", "/v1/chat/completions", {"model": MODEL, "messages": [HELLO], **more})

    async def crashed(self, request_id: str) -> None:
        """A request that was admitted long ago and never settled."""
        hold = Hold(10, 10, int(time.time()) - 4000, 60)
        assert isinstance(await self.store.admit(Ask(self.key.id, self.key.hash, request_id, hold)), Admitted)


@pytest.fixture
async def app(watch: Watch, store: Store, provider: Upstream, tmp_path: Path) -> AsyncIterator[App]:
    config = tmp_path / "gateway.toml"
    config.write_text("[providers.bedrock]\nenabled = true\n")
    settings = Settings.read(
        {
            "TABLE_NAME": "lightrail",
            "LR_KEY_PEPPER": PEPPER,
            "OPENAI_API_KEY": PROVIDER_KEY,
            "OPENAI_BASE_URL": provider.url,
            "BEDROCK_BASE_URL": provider.url,
            "GATEWAY_CONFIG": str(config),
        }
    )
    made = create_app(settings, store)
    services = made.state.services
    wanted = VirtualKey("", "", "ada", role="admin", concurrency=2, daily_budget=10**12, balance=10**12, credit=10**12)
    key, secret = await services.keys.create(wanted)
    headers = {"authorization": f"Bearer {secret}"}
    transport = httpx.ASGITransport(made)
    async with httpx.AsyncClient(transport=transport, base_url="http://gw", headers=headers, trust_env=False) as client:
        yield App(client, store, key)
    await services.upstream.close()
