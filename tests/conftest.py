"""What every test may ask for: one event loop, a fake provider, the gateway as a process, and keys for it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest

from tests import server as processes
from tests.server import Server
from tests.upstream import Upstream

STRICT = os.environ.get("LR_NO_SKIPS") == "1"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """For the whole session, so that async fixtures may live as long."""
    return "asyncio"


@pytest.fixture(scope="session")
async def provider_for_all(anyio_backend: str) -> AsyncIterator[Upstream]:
    async with Upstream(key=processes.PROVIDER_KEY) as upstream:
        yield upstream


@pytest.fixture
def provider(provider_for_all: Upstream) -> Upstream:
    """The fake provider behind `server`, its notes and scripts empty."""
    provider_for_all.forget()
    return provider_for_all


@pytest.fixture(scope="session")
def server(provider_for_all: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The gateway as `make run` starts it, as a process; one for all tests, so make your own keys."""
    folder = tmp_path_factory.mktemp("gateway")
    with processes.gateway(folder, provider_for_all.url) as running:
        yield running


@pytest.fixture
def make_key(server: Server) -> Callable[..., dict[str, Any]]:
    """`make_key(rpm=20)` asks the admin API; the answer has `id` and `key`."""
    return server.key


def not_skipped(reason: object) -> str:
    return f"LR_NO_SKIPS=1, so what is skipped has failed. Reason given: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if STRICT and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", not_skipped(report.longrepr)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if STRICT and report.skipped:
        report.outcome, report.longrepr = "failed", not_skipped(report.longrepr)
    return report
