"""The figures in CAPACITY.md are the script's, and the script's sizes are the store's."""

from __future__ import annotations

import boto3
import pytest

from infra import capacity
from infra.capacity import Load
from shared.store.dynamodb import item_of
from tests.infra.conftest import App
from tests.server import ROOT


def test_the_document_has_the_scripts_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main(["--table"]) == 0
    assert capsys.readouterr().out in (ROOT / "infra/CAPACITY.md").read_text()


def test_a_load_is_told_with_the_limits_it_is_above(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main(["--rate", "50", "--seconds", "10", "--keys", "10"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert not [line for line in said if "this load is above" in line]
    assert capacity.main(["--rate", "120", "--seconds", "10", "--keys", "10"]) == 0
    above = [line for line in capsys.readouterr().out.splitlines() if "this load is above" in line]
    assert len(above) == 2
    assert "open calls of a key" in above[0] + above[1]
    assert "environments" in above[0] + above[1]


async def test_a_record_is_as_large_as_it_says(app: App) -> None:
    answered = (await app.chat()).json()
    key = {"pk": {"S": f"GEN#{answered['id']}"}, "sk": {"S": "GEN"}}
    row = boto3.client("dynamodb").get_item(TableName="lightrail", Key=key)["Item"]
    size = sum(len(name) + capacity.value_bytes(value) for name, value in row.items())
    assert 0.75 < size / capacity.ROW_BYTES < 1.25
    assert capacity.units(size) == capacity.units(capacity.ROW_BYTES)


async def test_an_open_call_adds_to_its_key_what_it_says(app: App) -> None:
    async def size() -> int:
        key = await app.store.key(app.key.id)
        assert key is not None
        return sum(len(name) + capacity.value_bytes(value) for name, value in item_of(key).items())

    before = await size()
    await app.crashed("0" * len(capacity.time_ordered(0)))
    windows = 3 * 20  # the three that an admission makes
    assert 0 < await size() - before - (capacity.key_bytes(2) - capacity.key_bytes(1)) < windows


def test_longer_calls_leave_a_key_fewer() -> None:
    ceilings = [capacity.key_ceiling(seconds) for seconds in (0.1, 1, 10, 60, 600)]
    assert ceilings == sorted(ceilings, reverse=True)
    for seconds in (1, 10, 60):
        most = capacity.key_ceiling(seconds)
        assert most * Load(most, seconds).units <= 1000 < (most + 1) * Load(most + 1, seconds).units


def test_what_a_new_table_takes_does_not_depend_on_the_rate_that_is_asked_about() -> None:
    loads = [Load(rate, 10, keys=10) for rate in (0.1, 1, 100, 1000)]
    assert len({load.table_ceiling() for load in loads}) == 1
    ceiling = loads[0].table_ceiling()
    assert ceiling * Load(ceiling, 10, keys=10).written <= 4000 < (ceiling + 1) * Load(ceiling + 1, 10, keys=10).written


def test_the_document_says_how_much_the_sweep_keeps_up_with() -> None:
    told = f"about {capacity.books_rate() // 100 * 100:,.0f} calls a second, of all keys together"
    assert told in (ROOT / "infra/CAPACITY.md").read_text()
    assert capacity.READS == 8, "as the document says"


def test_a_burst_reads_secrets_page_by_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert [capacity.starts(secrets) for secrets in (1, 10, 11, 30)] == [40, 40, 20, pytest.approx(40 / 3)]
    assert capacity.main(["--secrets", "11"]) == 0
    assert "20.0  40 reads of secrets a second" in capsys.readouterr().out
    assert "**Secrets: 40 new environments a second,** 20 where" in (ROOT / "infra/CAPACITY.md").read_text()


def test_nobody_calling_costs_storage_and_cents() -> None:
    assert sum(capacity.idle(stored=0).values()) < 0.10


def test_what_watches_an_idle_stage_is_told_with_what_it_costs_beyond_the_free_tier(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert capacity.main([]) == 0
    idle = capsys.readouterr().out.partition("Idle, ")[2]
    free = idle.partition(
        "free within the account's free tier of ten alarms, ten metrics and three dashboards, else\n"
    )[2]
    assert [line.split()[0] for line in free.splitlines()] == ["0.9000", "0.9000", "3.0000"]
    assert list(capacity.watching().values()) == [pytest.approx(0.9), pytest.approx(0.9), 3.0]
