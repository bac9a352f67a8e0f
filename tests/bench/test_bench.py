"""The benchmark itself works; how fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.bench.__main__ import ROWS
from tests.server import ROOT


def test_a_quick_run_has_every_figure() -> None:
    command = [sys.executable, "-m", "tests.bench", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert list(figures) == list(ROWS)
    assert all({"floor", "gateway"} <= set(row) for row in figures.values())
