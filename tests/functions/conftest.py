"""The app in this process, with a database of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.functions.doors import Door, opened
from tests.upstream import Upstream


@pytest.fixture
async def door(tmp_path: Path, provider: Upstream) -> AsyncIterator[Door]:
    async with opened(tmp_path, provider.url) as door:
        yield door
