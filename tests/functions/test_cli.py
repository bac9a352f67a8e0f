"""Keys from a terminal: the same deeds as `/admin/keys`, on the same store, with or without a gateway beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from functions import cli
from tests.functions.doors import DAY
from tests.server import ADMIN_KEY, INHERITED, PEPPER, ROOT, free_port, gateway

ENGINE = ROOT / "tests/engines/node_modules/@dynoxide/linux-x64/dynoxide"
Run: TypeAlias = Callable[..., Any]


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A terminal in an empty folder, with nothing set but the database."""
    inherited = {name: value for name, value in os.environ.items() if name in INHERITED}
    set_here = {**inherited, "DATABASE_URL": f"sqlite:///{tmp_path / 'lightrail.db'}", "LR_KEY_PEPPER": PEPPER}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", set_here)
    return set_here


@pytest.fixture
def run(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Run:
    """What a command prints, which must be JSON, and its only words."""

    def run(*arguments: str) -> Any:
        code, printed = cli.main(list(arguments)), capsys.readouterr()
        assert (code, printed.err) == (0, ""), printed.err
        return json.loads(printed.out)

    return run


@pytest.fixture
def fail(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command complains of, on stderr, with exit code 1."""

    def fail(*arguments: str) -> str:
        code, printed = cli.main(list(arguments)), capsys.readouterr()
        assert (code, printed.out) == (1, "")
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return fail


def test_a_key_lives_its_life_from_the_terminal(run: Run) -> None:
    made = run("keys", "create", "--name", 'ada\'s "key"')
    assert made["key"].startswith(f"lr-{made['id']}")
    assert (made["name"], made["rpm"], made["models"], made["enabled"]) == ('ada\'s "key"', None, None, True)
    shown = run("keys", "show", made["id"])
    assert shown == {name: value for name, value in made.items() if name != "key"}
    assert run("keys", "list") == [shown]
    assert run("keys", "change", made["id"], "--rpm", "5", "--name", "ada")["rpm"] == 5
    assert run("keys", "show", made["id"])["name"] == "ada"
    assert run("keys", "disable", made["id"])["enabled"] is False
    assert run("keys", "enable", made["id"])["enabled"] is True
    rotated = run("keys", "rotate", made["id"])
    assert rotated["key"] not in (made["key"], "")
    assert rotated["id"] == made["id"]
    assert run("keys", "delete", made["id"]) == {"id": made["id"], "deleted": True}
    assert run("keys", "list") == []


LIMITS = [
    ("--role", "admin", "role", "admin"),
    ("--models", "openai/*, fast", "models", ["openai/*", "fast"]),
    ("--models", "", "models", []),
    ("--rpm", "60", "rpm", 60),
    ("--tpm", "100000", "tpm", 100_000),
    ("--concurrency", "7", "concurrency", 7),
    ("--daily-budget-usd", "0.000000001", "daily_budget_usd", 1e-09),
    ("--balance-usd", "12.5", "balance_usd", 12.5),
    ("--expires-at", "2030-01-31T12:00:00Z", "expires_at", 1_896_091_200),
    ("--expires-at", "1896091200", "expires_at", 1_896_091_200),
    ("--metadata", '{"team": "a"}', "metadata", {"team": "a"}),
]


@pytest.mark.parametrize(("option", "value", "field", "expected"), LIMITS)
def test_every_field_is_an_option(run: Run, option: str, value: str, field: str, expected: Any) -> None:
    made = run("keys", "create", "--name", "made so", option, value)
    changed = run("keys", "change", run("keys", "create", "--name", "changed so")["id"], option, value)
    assert made[field] == changed[field] == expected


@pytest.mark.parametrize("option", ["models", "rpm", "tpm", "daily-budget-usd", "balance-usd", "expires-at"])
def test_none_lifts_a_limit(run: Run, option: str) -> None:
    value = next(given for name, given, _, _ in LIMITS if name == f"--{option}")
    made = run("keys", "create", "--name", "limited", f"--{option}", value)
    assert made[option.replace("-", "_")] is not None
    assert run("keys", "change", made["id"], f"--{option}", "none")[option.replace("-", "_")] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "--name", ""], "'name'"),
        (["create", "--name", "x", "--rpm", "many"], "--rpm takes a number, or 'none'"),
        (["create", "--name", "x", "--rpm", "-1"], "'rpm'"),
        (["create", "--name", "x", "--rpm", "NaN"], "'rpm'"),
        (["create", "--name", "x", "--balance-usd", "five"], "--balance-usd takes a number"),
        (["create", "--name", "x", "--balance-usd", "-5"], "'balance_usd'"),
        (["create", "--name", "x", "--metadata", "{"], "--metadata takes a JSON object"),
        (["create", "--name", "x", "--metadata", "[]"], "'metadata'"),
        (["create", "--name", "x", "--expires-at", "tomorrow"], "'expires_at'"),
        (["create", "--name", "x", "--role", "root"], "'root'"),
        (["show", "nobody"], "No key with id 'nobody'"),
        (["change", "nobody", "--rpm", "5"], "No key with id 'nobody'"),
        (["delete", "nobody"], "No key with id 'nobody'"),
        (["rotate", "nobody"], "No key with id 'nobody'"),
        (["disable", "nobody"], "No key with id 'nobody'"),
    ],
)
def test_what_is_wrong_is_said_on_stderr(fail: Callable[..., str], arguments: list[str], words: str) -> None:
    assert words in fail("keys", *arguments)


def test_a_change_must_change_something_and_a_grace_period_be_sensible(run: Run, fail: Callable[..., str]) -> None:
    made = run("keys", "create", "--name", "x")
    assert "at least one field" in fail("keys", "change", made["id"])
    assert "grace_seconds" in fail("keys", "rotate", made["id"], "--grace-seconds", "-1")
    assert "grace_seconds" in fail("keys", "rotate", made["id"], "--grace-seconds", "99999999999")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DATABASE_URL", "sqlite:////nowhere/at/all.db", "store"),
        ("DATABASE_URL", "mysql://canary", "DATABASE_URL"),
        ("LR_KEY_PEPPER", "canary", "LR_KEY_PEPPER"),
    ],
)
def test_wrong_settings_are_told_by_name(
    environ: dict[str, str], fail: Callable[..., str], variable: str, value: str, words: str
) -> None:
    environ[variable] = value
    said = fail("keys", "list")
    assert words in said
    assert "canary" not in said


def test_what_no_command_is_ends_with_the_usage(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["keys"], ["keys", "create"], ["keys", "show"], ["keys", "burn", "x"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert "usage: python -m functions.cli" in capsys.readouterr().err


def test_without_a_pepper_it_keeps_one_where_the_gateway_will_look(
    run: Run, environ: dict[str, str], tmp_path: Path
) -> None:
    del environ["LR_KEY_PEPPER"]
    run("keys", "create", "--name", "x")
    pepper = (tmp_path / ".lightrail/pepper").read_text()
    assert len(pepper) > 30
    run("keys", "list")
    assert (tmp_path / ".lightrail/pepper").read_text() == pepper


def test_keys_are_made_and_taken_while_a_gateway_serves_from_the_same_file(run: Run, tmp_path: Path) -> None:
    with gateway(tmp_path, "http://127.0.0.1:9/v1") as server:

        def status(key: str) -> int:
            return server.ask("GET", "/v1/key", key)[0]

        made = run("keys", "create", "--name", "by hand", "--rpm", "60", "--models", "openai/*")
        assert status(made["key"]) == 200
        assert run("keys", "change", made["id"], "--rpm", "7")["rpm"] == 7
        assert server.ask("GET", "/v1/key", made["key"])[1]["rpm"] == 7
        run("keys", "disable", made["id"])
        assert status(made["key"]) == 403
        run("keys", "enable", made["id"])
        rotated = run("keys", "rotate", made["id"], "--grace-seconds", "0")
        assert (status(made["key"]), status(rotated["key"])) == (401, 200)
        by_api = server.key(name="by API")
        assert [key["name"] for key in run("keys", "list")] == ["LR_ADMIN_KEY", "by API", "by hand", "first user key"]
        run("keys", "delete", by_api["id"])
        assert status(by_api["key"]) == 401
        admin = run("keys", "create", "--name", "admin", "--role", "admin")
        assert server.ask("GET", "/admin/keys", admin["key"])[0] == 200
        assert server.ask("GET", f"/admin/keys/{by_api['id']}", ADMIN_KEY)[0] == 404


def test_as_a_process_it_prints_json_and_exits_as_it_went(environ: dict[str, str], tmp_path: Path) -> None:
    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "functions.cli", *arguments]
        variables = {**environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
        )

    good, bad = ran("keys", "create", "--name", "x"), ran("keys", "show", "nobody")
    assert (good.returncode, good.stderr, json.loads(good.stdout)["name"]) == (0, "", "x")
    assert (bad.returncode, bad.stdout, bad.stderr) == (1, "", "error: No key with id 'nobody'.\n")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[str]:
    if not ENGINE.exists():
        pytest.skip("no local DynamoDB engine: `npm ci --prefix tests/engines` installs one, on Linux x64")
    port = free_port()
    with (tmp_path / "engine.log").open("wb") as log:
        process = subprocess.Popen([ENGINE, "--port", str(port)], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_the_table_is_made_on_a_local_engine_and_holds_keys(
    engine: str, environ: dict[str, str], run: Run, fail: Callable[..., str]
) -> None:
    environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    assert "DATABASE_URL" in fail("table", "create")  # SQLite needs none
    environ["DATABASE_URL"] = f"dynamodb://trains?region=us-east-1&endpoint={engine}"
    assert run("table", "create") == {"created": True}
    assert run("table", "create") == {"created": False}
    made = run("keys", "create", "--name", "ada", "--balance-usd", "5", "--expires-at", str(DAY * 30_000))
    assert run("keys", "show", made["id"])["balance_usd"] == 5
    assert [key["name"] for key in run("keys", "list")] == ["ada"]
    run("keys", "delete", made["id"])
    assert "No key" in fail("keys", "show", made["id"])
