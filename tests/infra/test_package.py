"""What `make package` makes: the bytes, and that they work where nothing else is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from infra import package
from shared.store.dynamodb import create_table_at
from tests.infra.conftest import Packages
from tests.shared.store.conftest import ENGINE, RESOURCES, free_port, wait_for

MAGIC_313 = struct.pack("<H", 3571) + b"\r\n"
UNCHECKED = struct.pack("<I", 1)
ARM64 = 183
"""`e_machine` in the header of an ELF file."""


@pytest.fixture
def files(packages: Packages) -> dict[str, bytes]:
    with zipfile.ZipFile(packages.arm64) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_two_builds_are_the_same_bytes(packages: Packages) -> None:
    assert packages.arm64.read_bytes() == packages.twin.read_bytes()


def test_it_says_what_its_bytes_depend_on(packages: Packages) -> None:
    """The Python that compiled it also packed it, whichever ran the script."""
    ask = [packages.python, "-c", "import platform, zlib; print(platform.python_version(), zlib.ZLIB_RUNTIME_VERSION)"]
    version, zlib = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    assert version.startswith("3.13.")
    assert f"by Python {version} and zlib {zlib}, for arm64" in packages.said
    assert f"sha256 {hashlib.sha256(packages.arm64.read_bytes()).hexdigest()}" in packages.said


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One of git's, with what belongs there."""
    if not shutil.which("git"):
        pytest.skip("no git")
    for name in ("functions/app.py", "functions/cli.py", "functions/ui/page.js", "shared/books.py", "shared/READ.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / ".gitignore").write_text("*.db\n.env\n")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


OURS = ["functions/app.py", "functions/ui/page.js", "shared/books.py"]


def test_what_git_ignores_or_is_for_laptops_is_not_packed(checkout: Path) -> None:
    for name in ("functions/lightrail.db", "shared/.env"):
        (checkout / name).write_text("secret")
    assert sorted(package.ours(checkout)) == OURS


def test_what_git_was_not_told_of_stops_the_build(checkout: Path) -> None:
    (checkout / "shared/new.py").write_text("")
    with pytest.raises(SystemExit, match=r"git does not know shared/new\.py: `git add`"):
        package.ours(checkout)
    subprocess.run(["git", "-C", checkout, "add", "."], check=True)
    assert "shared/new.py" in package.ours(checkout)
    (checkout / "shared/new.py").unlink()  # and not yet told to git
    assert sorted(package.ours(checkout)) == OURS


def test_without_git_all_is_packed(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    (checkout / "functions/__pycache__").mkdir()
    (checkout / "functions/__pycache__/app.pyc").write_text("")
    assert sorted(package.ours(checkout)) == OURS


def test_it_is_small(packages: Packages) -> None:
    assert packages.arm64.stat().st_size <= 11_000_000


def test_nothing_in_it_tells_when_or_where_it_was_made(packages: Packages) -> None:
    with zipfile.ZipFile(packages.arm64) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {entry.date_time for entry in entries} == {package.EPOCH}
    executable = {entry.filename for entry in entries if entry.external_attr >> 16 == 0o100755}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644, 0o100755}
    assert "functions/bootstrap" in executable


def test_all_of_it_is_compiled_and_never_checked(files: dict[str, bytes]) -> None:
    sources = {name for name in files if name.endswith(".py")}
    compiled = {
        importlib.util.cache_from_source(name).replace(sys.implementation.cache_tag, "cpython-313") for name in sources
    }
    assert compiled == {name for name in files if name.endswith(".pyc")}
    assert {files[name][:8] for name in compiled} == {MAGIC_313 + UNCHECKED}
    assert b"/var/task/functions/app.py" in files["functions/__pycache__/app.cpython-313.pyc"]


def test_machine_code_is_for_arm64(files: dict[str, bytes]) -> None:
    libraries = {name: content for name, content in files.items() if ".so" in name}
    assert libraries
    assert {struct.unpack_from("<H", content, 18)[0] for content in libraries.values()} == {ARM64}


def test_our_code_is_as_in_the_checkout_and_nobody_elses(packages: Packages, files: dict[str, bytes]) -> None:
    ours = {
        path.relative_to(packages.checkout).as_posix(): path.read_bytes()
        for folder in package.OURS
        for path in (packages.checkout / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    ours = {name: content for name, content in ours.items() if name not in package.ON_LAPTOPS}
    packed = {name: content for name, content in files.items() if name.split("/")[0] in package.OURS}
    assert {name: content for name, content in packed.items() if not name.endswith(".pyc")} == ours
    assert files["gateway.toml"] == (packages.checkout / "gateway.toml").read_bytes()


def test_what_no_request_reads_is_left_out(files: dict[str, bytes]) -> None:
    services = {name.split("/")[2] for name in files if name.startswith("botocore/data/") and name.count("/") > 2}
    assert services == {"dynamodb", "ssm"}
    folders = {part for name in files for part in name.split("/")[:-1]}
    assert not folders & {"tests", "bin", "modal", "uvicorn", "pip", "moto"}
    assert not [name for name in files if name.endswith((".pth", ".pyi", ".c", "RECORD"))]


def test_botocore_knows_what_the_functions_may_ask_for_and_no_more(files: dict[str, bytes], resources: Any) -> None:
    roles = (each["Properties"] for each in resources["Resources"].values() if each["Type"] == "AWS::IAM::Role")
    allowed = {action for role in roles for action in re.findall(r"'(\w+:\w+)'", str(role["Policies"]))}
    for service in ("dynamodb", "ssm"):
        ((model),) = (json.loads(files[name]) for name in files if re.search(rf"/{service}/.*/service-2.json", name))
        assert {f"{service}:{name}" for name in model["operations"]} == {
            action for action in allowed if action.startswith(f"{service}:")
        }
        text = json.dumps(model)
        assert "documentation" not in text
        assert set(re.findall(r'"shape": "(\w+)"', text)) == model["shapes"].keys()


def test_without_python_313_it_says_what_to_install(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert package.main(["--output", str(tmp_path / "no.zip")], find=lambda: None) == 1
    said = capsys.readouterr().err
    assert "python3.13" in said
    assert "uv " in said
    assert not (tmp_path / "no.zip").exists()


def test_a_dependency_that_ships_our_names_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task/shared").mkdir(parents=True)
    nothing = tmp_path / "nothing.txt"
    nothing.write_text("")
    monkeypatch.setattr(package, "LOCK", nothing)
    with pytest.raises(SystemExit, match="ships a top-level shared"):
        package.install(None, sys.executable, tmp_path / "task", "aarch64")


WITH_NOTHING_ELSE = """
import asyncio, importlib, os, pkgutil, sys
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
sys.path.insert(0, os.getcwd())

import boto3, functions, httpx, shared
from functions.app import create_app
from functions.deps import build
from shared.settings import Settings
from shared.store.base import VirtualKey

for root in (functions, shared):
    for module in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if module.name != "functions.api":  # reads the environment of Lambda as it is imported
            importlib.import_module(module.name)

async def main():
    settings = Settings.read(os.environ)
    app = create_app(settings, demo=True)
    _, key = await app.state.services.keys.create(VirtualKey("", "", "ada"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gw") as client:
        client.headers["authorization"] = "Bearer " + key
        body = {"model": "demo/echo", "messages": [{"role": "user", "content": "Hello!"}]}
        answer = await client.post("/v1/chat/completions", json=body)
        print(answer.status_code, answer.json()["choices"][0]["finish_reason"])
    assert boto3.client("ssm").get_paginator("get_parameters_by_path")
    foreign = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    print(sorted(path for path in foreign if path and "site-packages" in path))

asyncio.run(main())
"""


def test_it_answers_where_nothing_else_is_installed(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same package for this machine's processor: unpacked, by Python 3.13, with a real engine behind botocore."""
    if packages.here is None:
        pytest.skip("not a Linux x86-64: what is packed for it cannot run here")
    if not ENGINE.exists():
        pytest.skip("no local DynamoDB engine: `npm ci --prefix tests/engines` installs one, on Linux x64")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    task = tmp_path / "task"
    with zipfile.ZipFile(packages.here) as archive:
        archive.extractall(task)
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as output, subprocess.Popen([ENGINE, "--port", str(port)], stdout=output, stderr=output) as it:
        try:
            wait_for(port, log)
            url = f"dynamodb://packed?region=us-east-1&endpoint=http://127.0.0.1:{port}"
            assert create_table_at(url, RESOURCES)
            environ = {"DATABASE_URL": url, "LR_KEY_PEPPER": "of-the-tests-Qk94Zs", "AWS_DEFAULT_REGION": "us-east-1"}
            environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
            command = [packages.python, "-s", "-W", "error::ImportWarning", "-c", WITH_NOTHING_ELSE]
            ran = subprocess.run(command, cwd=task, env=environ, capture_output=True, text=True, check=False)
        finally:
            it.terminate()
    assert ran.stdout.splitlines() == ["200 stop", "[]"], ran.stderr
