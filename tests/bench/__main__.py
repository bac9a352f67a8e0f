"""`make bench`: what the gateway costs beside the bare provider and the least pass-through, in one run.

Rounds are interleaved, so that a busy machine slows all alike; CPU time is what to trust, and the ratio to the floor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench import cold, routing, translate
from tests.bench.load import Connection, Target, many
from tests.server import PROVIDER_KEY, ROOT, Server, gateway, serving

ZIP = ROOT / "dist/lightrail.zip"

KEY = {"rpm": 10_000_000, "tpm": 10_000_000_000, "daily_budget_usd": 10_000, "models": ["openai/gpt-4o-mini"]}
"""Every limit is set, and none is reached."""


@dataclass(frozen=True)
class Plan:
    rounds: int
    starts: int
    requests: int
    streams: int
    paced: int
    firsts: int
    chunks: int


FULL = Plan(rounds=7, starts=5, requests=250, streams=40, paced=16, firsts=20, chunks=200)
QUICK = Plan(rounds=1, starts=1, requests=20, streams=4, paced=4, firsts=3, chunks=20)

Figures = dict[str, dict[str, list[float]]]
"""By figure and name of the target, one value a round."""

ROWS = {
    "cpu_ms_c1": "CPU ms a whole request, 1 at a time",
    "cpu_ms_c16": "CPU ms a whole request, 16 at a time",
    "cpu_ms_miss": "CPU ms a whole request, cache on, a miss",
    "cpu_ms_hit": "CPU ms a whole request, cache on, a hit",
    "wall_ms_c1": "wall ms a whole request, 1 at a time (p50)",
    "cpu_us_burst": "CPU us a chunk, burst",
    "cpu_us_paced": "CPU us a chunk, 5 to 20 ms apart",
    "ttft_ms": "ms to the first token (p50)",
    "added_ttft_ms": "ms added to the first token (p50)",
    "start_wall_ms": "exec to first 200, wall ms",
    "start_cpu_ms": "exec to first 200, CPU ms",
    "rss_start_mb": "RSS MB at the first 200",
    "rss_end_mb": "RSS MB after all requests",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every figure once, in seconds: a smoke test")
    plan = QUICK if parser.parse_args().quick else FULL
    began = time.monotonic()
    progress("dialects")
    print(f"{translate.report(translate.measure(plan.rounds))}\n")
    progress("routes")
    print(f"{routing.report(routing.measure(plan.rounds))}\n")
    figures = asyncio.run(measured(plan))
    print(table(figures))
    print(
        f"\n{time.monotonic() - began:.0f} s, {requests_each(plan)} requests to each; median (min..max) of the rounds"
    )
    print(f"a hit of the cache costs 1/{saved(figures):.2f} of the CPU of a miss; the bar is 1/2")
    print(json.dumps({name: {who: summary(values) for who, values in row.items()} for name, row in figures.items()}))
    if plan is FULL:
        progress("cold starts on Lambda")
        first_answers = cold.measure()
        print(f"\n{cold.report(first_answers)}")
        print(json.dumps(first_answers))
        if ZIP.exists():
            print(f"\n{ZIP.name}: {ZIP.stat().st_size / 1e6:.2f} MB")


async def measured(plan: Plan) -> Figures:
    figures: Figures = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folders = numbered(Path(scratch))
        provider = stack.enter_context(
            serving([sys.executable, "-m", "tests.bench.mock"], {"BENCH_CHUNKS": str(plan.chunks)}, next(folders))
        )
        starts: dict[str, Callable[[], AbstractContextManager[Server]]] = {
            "floor": lambda: floor(next(folders), f"{provider.url}/v1"),
            "gateway": lambda: gateway(next(folders), f"{provider.url}/v1"),
        }
        servers = {"direct": provider}
        for turn in range(plan.starts):
            progress(f"start {turn + 1}/{plan.starts}")
            for who, start in starts.items():
                with ExitStack() as brief:
                    kept = stack if turn == plan.starts - 1 else brief
                    servers[who] = kept.enter_context(start())
                    note_start(figures, who, servers[who])
        keys = dict.fromkeys(servers, PROVIDER_KEY) | {"gateway": servers["gateway"].key(**KEY)["key"]}
        for turn in range(plan.rounds + 1):
            for who, server in list(servers.items())[:: -1 if turn % 2 else 1]:
                progress(f"round {turn}/{plan.rounds} {who}" if turn else f"warming up {who}")
                noted = await one_round(plan if turn else QUICK, Target(server.port, keys[who]), server)
                for name, value in noted.items() if turn else ():
                    figures[name][who].append(value)
        for who, server in servers.items():
            figures["rss_end_mb"][who].append(rss(server))
    for who, values in figures["ttft_ms"].items():
        pairs = zip(values, figures["ttft_ms"]["direct"], strict=True)
        figures["added_ttft_ms"][who] = [value - direct for value, direct in pairs]
    progress("")
    return {name: figures[name] for name in ROWS}


async def one_round(plan: Plan, target: Target, server: Server) -> dict[str, float]:
    """Every figure that a running server has, once."""
    noted: dict[str, float] = {}
    with cpu(server) as spent:
        took = await many(target, plan.requests, 1, Connection.whole)
    noted["cpu_ms_c1"] = spent[0] * 1e3 / plan.requests
    noted["wall_ms_c1"] = statistics.median(took) * 1e3
    with cpu(server) as spent:
        await many(target, plan.requests, 16, Connection.whole)
    noted["cpu_ms_c16"] = spent[0] * 1e3 / plan.requests
    for what in ("miss", "hit"):
        with cpu(server) as spent:
            await many(target, plan.requests, 1, lambda connection, what=what: connection.whole(what))
        noted[f"cpu_ms_{what}"] = spent[0] * 1e3 / plan.requests
    with cpu(server) as spent:
        await many(target, plan.streams, 8, lambda connection: connection.stream("burst"))
    noted["cpu_us_burst"] = spent[0] * 1e6 / (plan.streams * plan.chunks)
    with cpu(server) as spent:
        await many(target, plan.paced, 16, lambda connection: connection.stream("paced"))
    noted["cpu_us_paced"] = spent[0] * 1e6 / (plan.paced * plan.chunks)
    took = await many(target, plan.firsts, 1, lambda connection: connection.stream("one"))
    noted["ttft_ms"] = statistics.median(took) * 1e3
    return noted


def requests_each(plan: Plan) -> int:
    return plan.rounds * (4 * plan.requests + plan.streams + plan.paced + plan.firsts)


@contextmanager
def cpu(server: Server) -> Iterator[list[float]]:
    """User and system seconds of the process within the block, what it does just after its last answer included."""
    process, spent = psutil.Process(server.process.pid), [0.0]
    before = process.cpu_times()
    yield spent
    time.sleep(0.05)
    after = process.cpu_times()
    spent[0] = max(0.0, after.user + after.system - before.user - before.system)


def note_start(figures: Figures, who: str, server: Server) -> None:
    figures["start_wall_ms"][who].append((server.healthy - server.started) * 1e3)
    times = psutil.Process(server.process.pid).cpu_times()
    figures["start_cpu_ms"][who].append((times.user + times.system) * 1e3)
    figures["rss_start_mb"][who].append(rss(server))


def rss(server: Server) -> float:
    return psutil.Process(server.process.pid).memory_info().rss / 2**20


def floor(folder: Path, upstream: str) -> AbstractContextManager[Server]:
    variables = {"OPENAI_BASE_URL": upstream, "OPENAI_API_KEY": PROVIDER_KEY}
    return serving([sys.executable, "-m", "tests.bench.floor"], variables, folder)


def numbered(scratch: Path) -> Iterator[Path]:
    """A new folder each time, so that no run finds another's database."""
    for number in range(10_000):
        folder = scratch / str(number)
        folder.mkdir()
        yield folder


def progress(text: str) -> None:
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)
    sys.stderr.flush()


def saved(figures: Figures) -> float:
    """How many hits cost the CPU of one miss, at the gateway."""
    pairs = zip(figures["cpu_ms_miss"]["gateway"], figures["cpu_ms_hit"]["gateway"], strict=True)
    return statistics.median(miss / hit if hit else float("nan") for miss, hit in pairs)


def summary(values: list[float]) -> dict[str, float]:
    return {name: round(of(values), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def table(figures: Figures) -> str:
    """One row a figure; the last column is the median of the rounds' ratios, gateway to floor."""
    lines = [f"{'':44}{'direct':>24}{'floor':>24}{'gateway':>24}{'gateway/floor':>16}", "-" * 132]
    for name, title in ROWS.items():
        row = figures[name]
        cells = [cell(row[who]) if row.get(who) else "-" for who in ("direct", "floor", "gateway")]
        pairs = zip(row["gateway"], row["floor"], strict=True)
        ratio = statistics.median(ours / theirs if theirs else float("nan") for ours, theirs in pairs)
        lines.append(f"{title:44}{cells[0]:>24}{cells[1]:>24}{cells[2]:>24}{ratio:>16.2f}")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    digits = 2 if statistics.median(values) < 10 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
