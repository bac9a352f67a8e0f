"""Cold starts, from exec to the first answer, and warm calls after it, in CPU time: beside `hello`, interleaved.

`hello` is FastAPI's hello world behind Mangum with a boto3 client; `health` is the gateway's least answer, secrets
read; `chat` is a whole stream: secrets from SSM, a key admitted in DynamoDB, a provider asked, all of them on loopback.
All three run from what is deployed: the package, made for this machine's processor, by the Python 3.13 that made it.

    python -m tests.bench.cold     # a table, and the figures as JSON
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import DEVNULL, Popen

import psutil

from infra import package
from shared.keys import Keys
from shared.store import open_store
from shared.store.base import VirtualKey
from shared.store.dynamodb import create_table_at
from tests.apigateway import rest_event
from tests.runtime_api import RuntimeAPI
from tests.server import PEPPER, PROVIDER_KEY, ROOT, free_port
from tests.upstream import Upstream

ENGINE = ROOT / "tests/engines/node_modules/@dynoxide/linux-x64/dynoxide"
BAR = 1.6
"""The most that a first answer may cost, in hello worlds."""
TARGETS = ("hello", "health", "chat")

STARTS, WARM_STARTS, WARM = 15, 3, 100
"""So many starts of each; after the last ones so many more calls, for CPU time comes in ticks of 10 ms."""

Figures = dict[str, dict[str, list[float]]]
"""`cpu_ms` and `wall_ms` of the first answer and `warm_ms` of CPU for each after it, by target, one value a start."""
NAMES = ("cpu_ms", "wall_ms", "warm_ms")


def measure(starts: int = STARTS) -> Figures:
    """After one start of each that does not count; with SQLite in DynamoDB's place where there is no engine."""
    figures: Figures = {name: {target: [] for target in TARGETS} for name in NAMES}
    with tempfile.TemporaryDirectory() as scratch, table(Path(scratch)) as (url, environ), parameters() as ssm:
        python, task = deployed(Path(scratch))
        environ |= {"AWS_ENDPOINT_URL_SSM": ssm, "SECRETS_PATH": "/lightrail/bench", "LAMBDA_TASK_ROOT": str(task)}
        asyncio.run(rounds(starts, python, url, environ, figures))
    return figures


def deployed(scratch: Path) -> tuple[str, Path]:
    """A Python and where our code is: the package unpacked, or, where none can be made to run here, the checkout."""
    machine = {"x86_64": "x86_64", "aarch64": "arm64"}.get(platform.machine())
    python, file = package.python313(), scratch / "task.zip"
    if python is None or machine is None or platform.system() != "Linux":
        return sys.executable, ROOT
    if package.main(["--output", str(file), "--platform", machine]):
        raise SystemExit("The package could not be made.")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(scratch / "task")
    (scratch / "task/functions/bootstrap").chmod(0o755)  # zipfile forgets modes
    return python, scratch / "task"


async def rounds(starts: int, python: str, url: str, environ: dict[str, str], figures: Figures) -> None:
    store = open_store(url, None)
    _, key = await Keys(store, PEPPER).create(VirtualKey("", "", "bench", daily_budget=10**12))
    await store.close()
    async with Upstream(key=PROVIDER_KEY) as provider:
        environ |= {"OPENAI_BASE_URL": provider.url}
        for turn in range(starts + 1):
            for target in TARGETS[:: -1 if turn % 2 else 1]:
                seconds = await one_start(target, python, key, environ, WARM if turn > starts - WARM_STARTS else 0)
                for name, value in zip(NAMES, seconds, strict=False) if turn else ():
                    figures[name][target].append(value * 1e3)


async def one_start(target: str, python: str, key: str, environ: dict[str, str], more: int) -> list[float]:
    """CPU and wall seconds of a process from its exec until its first answer is whole; CPU of each of so many more."""
    async with RuntimeAPI(whole=target == "hello") as api:
        if target == "chat":
            asked = {"model": "openai/gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
            headers = [("Authorization", f"Bearer {key}"), ("Content-Type", "application/json"), ("Host", "gw")]
            call = rest_event("POST", "/v1/chat/completions", headers, json.dumps(asked).encode())
        else:
            call = rest_event("GET", "/health", [("Host", "gw")])
        event = api.invoke(call)
        variables = {**environ, "AWS_LAMBDA_RUNTIME_API": api.address}
        began = time.perf_counter()
        process = started(target, python, variables)
        try:
            async with asyncio.timeout(60):
                await event.over.wait()
            wall, spent = time.perf_counter() - began, cpu(process)
            for _ in range(more):
                async with asyncio.timeout(60):
                    await api.invoke(call).over.wait()
            warm = [(cpu(process) - spent) / more] if more else []
        finally:
            process.kill()
            process.wait()
    if api.violations or not (b'"ok"' in event.body or event.body.endswith(b"[DONE]\n\n") or b"200" in event.body):
        raise RuntimeError(f"{target}: {api.violations} {event.error} {event.body!r}")
    return [spent, wall, *warm]


def cpu(process: Popen[bytes]) -> float:
    """User and system seconds until now."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def started(target: str, python: str, variables: dict[str, str]) -> Popen[bytes]:
    task = variables["LAMBDA_TASK_ROOT"]
    if target == "hello":
        command, variables = [python, str(ROOT / "tests/bench/hello.py")], {**variables, "PYTHONPATH": task}
    else:
        command = [f"{task}/functions/bootstrap", python, "/var/runtime/bootstrap.py"]
    return Popen(command, env=variables, cwd=task, stdout=DEVNULL, stderr=DEVNULL)


@contextmanager
def table(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A table as a `DATABASE_URL`, and the environment in which a function finds it."""
    environ = {
        "PATH": os.environ["PATH"],
        "AWS_LAMBDA_FUNCTION_NAME": "lightrail-bench-stream",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
    }
    if not ENGINE.exists():
        url = f"sqlite:///{folder}/lightrail.db"
        yield url, {**environ, "DATABASE_URL": url}
        return
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    url = f"dynamodb://lightrail?region=us-east-1&endpoint={endpoint}"
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "any")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "any")
    with Popen([ENGINE, "--port", str(port)], stdout=DEVNULL, stderr=DEVNULL) as engine:
        try:
            create_table_at(url, ROOT / "infra/resources.yml")
            yield url, {**environ, "TABLE_NAME": "lightrail", "AWS_ENDPOINT_URL_DYNAMODB": endpoint}
        finally:
            engine.terminate()


class Parameters(BaseHTTPRequestHandler):
    """As much of SSM as a start needs; `asked` counts."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        Parameters.asked += 1
        self.rfile.read(int(self.headers["content-length"]))
        secrets = {"LR_KEY_PEPPER": PEPPER, "OPENAI_API_KEY": PROVIDER_KEY}
        found = [{"Name": f"/lightrail/bench/{name}", "Value": value} for name, value in secrets.items()]
        body = json.dumps({"Parameters": found}).encode()
        known = self.headers["x-amz-target"] == "AmazonSSM.GetParametersByPath"
        self.send_response(200 if known else 400)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the library's name
        pass


@contextmanager
def parameters() -> Iterator[str]:
    Parameters.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Parameters) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def report(figures: Figures) -> str:
    """One row a target; the ratio is the median of those to the hello world of the same turn, which was as busy."""
    titles = f"{'CPU ms':>20}{'CPU / hello':>14}{'wall ms':>20}{'CPU ms a warm call':>24}"
    head = f"{'on Lambda: exec to first answer':32}{titles}"
    lines = [head, "-" * len(head)]
    for target in TARGETS:
        first, wall, warm = (
            spread(figures[name][target], digits) for name, digits in zip(NAMES, (0, 0, 2), strict=True)
        )
        lines.append(f"{target:32}{first:>20}{ratio(figures, target):>14.2f}{wall:>20}{warm:>24}")
    return "\n".join(lines)


def ratio(figures: Figures, target: str) -> float:
    pairs = zip(figures["cpu_ms"][target], figures["cpu_ms"]["hello"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


if __name__ == "__main__":
    measured = measure()
    print(report(measured))
    print(json.dumps(measured))
