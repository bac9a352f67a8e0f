"""A server as a process of its own on a free port: started, watched, asked over plain sockets, ended by its id."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ADMIN_KEY = "Yw7uP2mXq9Lk4TzRb8Vn3Gd"
PEPPER = "Qk94ZsHf6Wj1Nc8Tx5Br2Mv"
PROVIDER_KEY = "sk-8Hn3Jq7Wc2Zt5Kx9Vd4Bm6"


@dataclass(frozen=True)
class Server:
    """`log` holds all that the process printed; `started` is the moment of its exec, `healthy` of its first 200."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    started: float
    healthy: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, key: str, body: Any = None) -> tuple[int, Any]:
        """One whole JSON request on a connection of its own: status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def wake(self, *providers: str) -> None:
        """End the rest of what failed, so that the next test finds it up."""
        for name in providers:
            assert self.ask("PATCH", f"/admin/providers/{name}", ADMIN_KEY, {"resting": False})[0] == 200

    def key(self, **fields: Any) -> dict[str, Any]:
        """Make a virtual key; needs a gateway that was started with `ADMIN_KEY`."""
        status, made = self.ask("POST", "/admin/keys", ADMIN_KEY, {"name": "test", **fields})
        assert status == 201, made
        return made


@contextmanager
def serving(command: list[str], environ: Mapping[str, str], folder: Path, wait: float = 20) -> Iterator[Server]:
    """Run `command` with PORT and HOST set, until /health answers 200; end it when the block ends."""
    port, log = free_port(), folder / "server.log"
    inherited = {name: value for name, value in os.environ.items() if name in INHERITED}
    variables = {**inherited, "PYTHONPATH": str(ROOT), "HOST": "127.0.0.1", "PORT": str(port), **environ}
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    server = Server(process, port, log, started)
    try:
        yield replace(server, healthy=until_healthy(server, started + wait))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV")
"""The rest of the environment stays outside: a developer's own provider keys must not switch anything on."""


def gateway(folder: Path, upstream: str, **environ: str) -> Any:
    """The gateway itself, with a fresh database in `folder` and OpenAI pointed at `upstream` (its base URL)."""
    variables = {
        "DATABASE_URL": f"sqlite:///{folder / 'lightrail.db'}",
        "LR_ADMIN_KEY": ADMIN_KEY,
        "LR_KEY_PEPPER": PEPPER,
        "OPENAI_API_KEY": PROVIDER_KEY,
        "OPENAI_BASE_URL": upstream,
        "GATEWAY_CONFIG": str(ROOT / "gateway.toml"),
        "PYTHON_DOTENV_DISABLED": "1",
        **environ,
    }
    return serving([sys.executable, "-m", "functions.local"], variables, folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def until_healthy(server: Server, deadline: float) -> float:
    """The moment of the first 200 from /health; raises with the end of the log if none comes."""
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=2) as wire:
                wire.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                if wire.recv(64).startswith(b"HTTP/1.1 200"):
                    return time.monotonic()
        except OSError:
            pass
        time.sleep(0.005)
    raise RuntimeError(f"no 200 from /health:\n{server.log.read_text(errors='replace')[-4000:]}")
