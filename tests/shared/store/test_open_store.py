"""A URL or a table's name becomes a store, and nothing is opened before it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.store import open_store
from shared.store.base import VirtualKey
from shared.store.dynamodb import DynamoStore, address
from shared.store.sqlite import SQLiteStore
from tests.server import ROOT


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.db"))


async def test_three_slashes_are_relative_and_four_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    stores = [open_store(url, None) for url in ("sqlite:///relative.db", f"sqlite:///{tmp_path}/absolute.db")]
    assert files(tmp_path) == []
    for store in stores:
        assert await store.add_key(VirtualKey("k", "h", "n"))
        await store.close()
    assert files(tmp_path) == ["absolute.db", "relative.db"]


def test_a_table_name_wins():
    assert isinstance(open_store("sqlite:///lightrail.db", "table"), DynamoStore)
    assert isinstance(open_store("sqlite:///lightrail.db", None), SQLiteStore)
    assert isinstance(open_store("dynamodb://table", None), DynamoStore)


def test_a_table_is_named_with_its_region_and_endpoint():
    url = "dynamodb://My.Table_1?region=eu-central-1&endpoint=http://127.0.0.1:8000"
    assert address(url) == ("My.Table_1", "eu-central-1", "http://127.0.0.1:8000")
    assert address("dynamodb://table") == ("table", None, None)


BAD = """
lightrail.db sqlite:// sqlite:/// sqlite://// sqlite://host/x.db postgres://host/x
dynamodb:// dynamodb://?region=x dynamodb:table dynamodb://table/path dynamodb://table?zone=x
"""


@pytest.mark.parametrize("url", ["", *BAD.split()])
def test_another_url_is_refused_and_told_what_is_accepted(url: str):
    with pytest.raises(ValueError, match="dynamodb://table"):
        open_store(url, None)


def test_the_embedded_store_needs_no_boto3():
    code = "import sys; from shared.store import open_store; open_store('sqlite:///x.db', None); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert "shared.store.sqlite" in loaded
    assert "botocore" not in loaded
