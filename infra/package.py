"""`make package`: dist/lightrail.zip, what Lambda runs: our code, locked wheels, and the bytecode of Python 3.13.

/var/task cannot be written to, so a package without bytecode compiles all of itself at every cold start. The same
checkout, lock, patch release of Python 3.13 and zlib make the same bytes on any machine: files sorted, times and modes
fixed, hashes unseeded. The Python that compiles packs, too, and what was made says which both were.
"""

# ruff: noqa: S603, T201 - it starts pip and Python by paths that it found, and its answer is what it prints

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "infra/locks/runtime.txt"
OURS = ("functions", "shared")
ON_LAPTOPS = tuple(f"functions/{name}.py" for name in ("cli", "local", "server", "stage"))
"""These need uvicorn, dotenv, or more of AWS than is in the package."""
SERVICES = {
    "dynamodb": "BatchGetItem BatchWriteItem DeleteItem GetItem PutItem Query UpdateItem",
    "ssm": "GetParametersByPath",
}
"""The operations that are left in botocore's data, which it reads whole for the first client. They are those that the
functions' roles allow. Credentials come from the environment, so no STS."""
PLATFORMS = {"arm64": "aarch64", "x86_64": "x86_64"}
"""Lambda's is arm64; the other is there to try a package on the machine that made it."""
UNUSED = ("*.pyi", "*.pyx", "*.pxd", "*.c", "*.h", "*.pth", ".lock", "examples-1.json", "botocore/cacert.pem")
"""botocore trusts certifi's authorities where certifi is."""
UNUSED_FOLDERS = (
    *("bin", "*/tests", "boto3/examples", "dateutil/zoneinfo/*.tar.gz"),
    *("aws_lambda_powertools/event_handler", "aws_lambda_powertools/utilities/[!_j]*"),  # all but jmespath_utils
)
MOST_BYTES = 11_000_000
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The first moment that a zip can name."""
NO_PYTHON = """\
`make package` needs Python 3.13, whose bytecode Lambda runs, and found none. Install one of
  python3.13   from your system's packages, python.org or pyenv
  uv           https://docs.astral.sh/uv/, which then fetches a Python 3.13 by itself
and run it again."""


def main(arguments: list[str] | None = None, find: Callable[[], str | None] | None = None) -> int:
    """0: made; 1: not, or too large. `find`: whoever knows where Python 3.13 is."""
    options = argparse.ArgumentParser(prog="python infra/package.py", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--output", type=Path, default=ROOT / "dist/lightrail.zip")
    options.add_argument("--platform", choices=PLATFORMS, default="arm64", help="x86_64: to try it here")
    options.add_argument(
        "--pip", action="store_true", help="install by pip even where uv is, which takes a tenth of it"
    )
    options.add_argument("--pack", type=Path, help=argparse.SUPPRESS)  # what it asks of the Python that it has found
    given = options.parse_args(arguments)
    if given.pack:
        write_zip(given.pack, given.output)
        return 0
    python = (find or python313)()
    if python is None:
        print(NO_PYTHON, file=sys.stderr)
        return 1
    output: Path = given.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "task"
        install(None if given.pip else uv(), python, folder, PLATFORMS[given.platform])
        trim(folder)
        add_ours(folder)
        compile_all(python, folder)
        pack = [python, "-P", __file__, "--pack", str(folder), "--output", str(output)]
        packed = subprocess.run(pack, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    size, digest = output.stat().st_size, hashlib.sha256(output.read_bytes()).hexdigest()
    print(f"{os.path.relpath(output)}: {size / 1e6:.2f} MB, {packed}, for {given.platform}")
    print(f"sha256 {digest}")
    if size > MOST_BYTES:
        print(f"That is more than the {MOST_BYTES / 1e6:.0f} MB that a cold start may fetch.", file=sys.stderr)
        return 1
    return 0


def python313() -> str | None:
    """A CPython 3.13 that starts: this one, one on the path, pyenv's, or uv's, which may fetch it."""
    return next((python for python in candidates() if is_313(python)), None)


def candidates() -> Iterator[str]:
    yield sys.executable
    for folder in os.get_exec_path():
        if found := shutil.which("python3.13", path=folder):
            yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob("versions/3.13.*/bin/python3.13"), reverse=True))
    if tool := uv():
        find = [tool, "python", "find", "--managed-python", "3.13"]
        found = subprocess.run(find, capture_output=True, text=True, check=False)
        if found.returncode and not subprocess.run([tool, "python", "install", "3.13"], check=False).returncode:
            found = subprocess.run(find, capture_output=True, text=True, check=False)
        if path := found.stdout.strip():
            yield path


def uv() -> str | None:
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def is_313(python: str) -> bool:
    """pyenv's shims are on the path whether or not there is a Python behind them, so it is asked."""
    ask = "import sys; print(sys.implementation.name, *sys.version_info[:2], sys.version_info.releaselevel)"
    try:
        said = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return said.stdout.split() == ["cpython", "3", "13", "final"]


def install(uv: str | None, python: str, folder: Path, machine: str) -> None:
    """The locked wheels, for Lambda's Linux (Amazon Linux 2023: glibc 2.34) whatever this machine is."""
    if uv:
        installer = [uv, "pip", "install", "--python", python, "--python-platform", f"{machine}-manylinux_2_28"]
    else:
        installer = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install"]
        installer += [part for glibc in ("2014", "_2_28") for part in ("--platform", f"manylinux{glibc}_{machine}")]
        installer += ["--implementation=cp", "--no-compile", "--root-user-action=ignore"]
    which = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--python-version=3.13"]
    where = ["--quiet", "--target", str(folder), "--requirement", str(LOCK)]
    subprocess.run([*installer, *which, *where], check=True)
    if taken := [name for name in OURS if (folder / name).exists() or (folder / f"{name}.py").exists()]:
        raise SystemExit(
            f"A dependency ships a top-level {' and '.join(taken)}: our own package would be mixed with it."
        )


def trim(folder: Path) -> None:
    """Takes away what no request ever reads."""
    doomed = {path for pattern in UNUSED for path in folder.rglob(pattern)}
    doomed |= {path for pattern in UNUSED_FOLDERS for path in folder.glob(pattern)}
    doomed |= {path for path in folder.glob("*.dist-info/**/*") if path.is_file() and not is_read(path)}
    for service in (path for path in (folder / "botocore/data").iterdir() if path.is_dir()):
        *old, _ = sorted(service.iterdir())  # versions are dates
        doomed |= set(old) if service.name in SERVICES else {service}
    for path in doomed:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name, operations in SERVICES.items():
        (file,) = folder.glob(f"botocore/data/{name}/*/service-2.json.gz")
        model = cut(json.loads(gzip.decompress(file.read_bytes())), operations.split())
        file.with_suffix("").write_text(json.dumps(model), "utf-8")
        file.unlink()
    endpoints = folder / "botocore/data/endpoints.json"  # read whole for the first client
    known = json.loads(endpoints.read_text("utf-8"))
    for partition in known["partitions"]:
        partition["services"] = {
            name: partition["services"][name] for name in SERVICES if name in partition["services"]
        }
    endpoints.write_text(json.dumps(known), "utf-8")


def cut(model: Any, operations: list[str]) -> Any:
    """A service's model with these operations, the shapes that they use, and no documentation."""
    model["operations"] = {name: model["operations"][name] for name in operations}
    known, shapes = model.pop("shapes"), dict[str, Any]()
    waiting = [model]
    while waiting:
        match waiting.pop():
            case dict() as each:
                if isinstance(each.get("documentation"), str):  # else it is a member of that name
                    del each["documentation"]
                if isinstance(name := each.get("shape"), str) and name not in shapes:
                    shapes[name] = known[name]
                    waiting.append(known[name])
                waiting += each.values()
            case list() as each:
                waiting += each
    model["shapes"] = shapes
    return model


def is_read(path: Path) -> bool:
    """Of a `dist-info` only entry points are looked up as the program runs, with the metadata that name their owner."""
    points = path.with_name("entry_points.txt")
    if path.name not in ("METADATA", points.name) or not points.exists():
        return False
    groups = ConfigParser(delimiters=("=",), strict=False)
    groups.read(points, "utf-8")
    return not {"console_scripts", "gui_scripts"}.issuperset(groups.sections())


def add_ours(folder: Path) -> None:
    for name in (*ours(ROOT), "gateway.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def ours(root: Path) -> list[str]:
    """Our own files, as paths from the root. In git's checkout those that git knows: what it is told to ignore stays
    out, and what it was told nothing of, such as a module that somebody forgot to add, stops the build. Elsewhere all.
    """
    if (root / ".git").exists() and (git := shutil.which("git")):
        ask = [git, "-C", str(root), "ls-files", "-z"]
        known, strangers = (
            subprocess.run([*ask, *which, "--", *OURS], check=True, stdout=subprocess.PIPE, text=True).stdout.split(
                "\0"
            )
            for which in (["--cached"], ["--others", "--exclude-standard"])
        )
        if strangers := list(filter(None, strangers)):
            told = "`git add` what belongs to the gateway, and take away what does not."
            raise SystemExit(f"git does not know {', '.join(strangers)}: {told}")
    else:
        known = [path.relative_to(root).as_posix() for name in OURS for path in (root / name).rglob("*")]
    return [name for name in known if (root / name).is_file() and is_packed(PurePosixPath(name))]


def is_packed(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return not hidden and path.suffix != ".md" and str(path) not in ON_LAPTOPS


def compile_all(python: str, folder: Path) -> None:
    """One process, in order: what else it has interned would show in the bytes. The sources are never looked at."""
    paths = ["-s", str(folder), "-p", "/var/task", str(folder)]  # as tracebacks show them
    command = [python, "-P", "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", *paths]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "0"})


def write_zip(folder: Path, output: Path) -> None:
    total = 0
    with zipfile.ZipFile(output, "w") as archive:
        for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
            content = (folder / name).read_bytes()
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3  # Unix, so that the mode counts
            entry.external_attr = (0o100755 if content.startswith(b"#!/bin/") else 0o100644) << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
            total += len(content)
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"{total / 1e6:.1f} MB unpacked, by Python {version} and zlib {zlib.ZLIB_RUNTIME_VERSION}")


if __name__ == "__main__":
    sys.exit(main())
