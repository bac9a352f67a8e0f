"""The three stores that the contract is asked of: SQLite, moto, and a DynamoDB engine of its own process."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto import mock_aws
from moto.core.botocore_stubber import BotocoreStubber

from shared.store import open_store
from shared.store.base import Store
from shared.store.dynamodb import create_table_at
from shared.store.sqlite import SQLiteStore
from tests.server import ROOT, free_port

ENGINE = ROOT / "tests/engines/node_modules/@dynoxide/linux-x64/dynoxide"
RESOURCES = ROOT / "infra/resources.yml"
REGION = "us-east-1"


@pytest.fixture(scope="session", autouse=True)
def some_credentials() -> Iterator[None]:
    """No engine here checks them, but the client wants some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        yield


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a local DynamoDB engine, which needs no lock around it to be atomic."""
    if not ENGINE.exists():
        pytest.skip("no local DynamoDB engine: `npm ci --prefix tests/engines` installs one, on Linux x64")
    port, log = free_port(), tmp_path_factory.mktemp("engine") / "log"
    with log.open("wb") as output, subprocess.Popen([ENGINE, "--port", str(port)], stdout=output, stderr=output) as it:
        try:
            wait_for(port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            it.terminate()


def wait_for(port: int, log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="session")
def engine_table(engine: str) -> str:
    """A table on the engine, as a `DATABASE_URL`."""
    url = f"dynamodb://lightrail?region={REGION}&endpoint={engine}"
    assert create_table_at(url, RESOURCES)
    return url


@pytest.fixture
def moto_table() -> Iterator[str]:
    """moto reads, changes and writes without a lock, so it gets one: it tests what is asked, not isolation."""
    answer, lock = BotocoreStubber.__call__, threading.Lock()

    def one_at_a_time(self: BotocoreStubber, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return answer(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setattr(BotocoreStubber, "__call__", one_at_a_time)
        url = f"dynamodb://lightrail?region={REGION}"
        assert create_table_at(url, RESOURCES)
        yield url


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Store]:
    store = SQLiteStore(str(tmp_path / "store.db"))
    yield store
    await store.close()


@pytest.fixture(params=["sqlite", "moto_table", "engine_table"], ids=["sqlite", "moto", "engine"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each of the three. Keys are the test's own, for one engine serves all tests."""
    return f"sqlite:///{tmp_path}/store.db" if request.param == "sqlite" else request.getfixturevalue(request.param)


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = open_store(url, None)
    yield store
    await store.close()


@pytest.fixture
async def other(url: str) -> AsyncIterator[Store]:
    """The same table or file, as another process has it open."""
    other = open_store(url, None)
    yield other
    await other.close()
