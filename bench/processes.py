"""The processes that a benchmark measures: built, started on loopback, waited for, and ended by their ids."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

HERE: Final = Path(__file__).parent
BUILD: Final = HERE.parent / "build" / "bench"
START_S_MAX: Final = 30.0
STOP_S_MAX: Final = 40.0


class Server(NamedTuple):
    """A process that listens: *headers* are what its requests need, *started_s* is how long it took to be ready."""

    name: str
    pid: int
    url: str
    headers: tuple[str, ...] = ()
    started_s: float = 0.0


def compiled(name: str) -> Path:
    """The program made of ``bench/NAME.c``."""
    BUILD.mkdir(parents=True, exist_ok=True)
    source, program = HERE / f"{name}.c", BUILD / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-w", "-o", program, source], check=True)
    return program


@contextlib.contextmanager
def mock(*options: str) -> Iterator[Server]:
    """The upstream; see ``mock_upstream.c`` for its options."""
    port = _free_port()
    with _process([str(compiled("mock_upstream")), "-p", str(port), *options]) as process:
        _wait_until(process, lambda: _listens(port))
        yield Server("mock", process.pid, f"http://127.0.0.1:{port}/v1")


@contextlib.contextmanager
def passthrough(upstream: Server) -> Iterator[Server]:
    port = _free_port()
    command = [sys.executable, "-m", "bench.passthrough", "--port", str(port), "--upstream", upstream.url]
    with _process(command) as process:
        _wait_until(process, lambda: _listens(port))
        yield Server("pass-through", process.pid, f"http://127.0.0.1:{port}/v1")


@contextlib.contextmanager
def farebox(
    upstream: Server, folder: Path, *, serving: Sequence[str] = ("gateway.cli", "serve"), **environ: str
) -> Iterator[Server]:
    """A gateway as an operator runs it: SQLite, the ledger on, a funded user.

    Args:
        serving: the module that serves, and its arguments.
        environ: further settings.
    """
    port = _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "farebox.toml"
    config.write_text(f'[[upstreams]]\nname = "mock"\nbase_url = "{upstream.url}"\n')
    command = [sys.executable, "-m", "gateway.cli"]
    environment = {
        **os.environ,
        "FAREBOX_CONFIG": str(config),
        "FAREBOX_DATABASE_URL": f"sqlite:///{folder / 'farebox.db'}",
        "FAREBOX_JOURNAL_DIR": str(folder / "journal"),
        "FAREBOX_PORT": str(port),
        "FAREBOX_RATE_LIMIT_PER_MINUTE": "0",
        "FAREBOX_MANAGEMENT_RATE_LIMIT_PER_MINUTE": "0",
        "FAREBOX_LOG_LEVEL": "error",
        **environ,
    }
    made = subprocess.run(
        [*command, "init", "--json"], env=environment, cwd=HERE.parent, check=True, stdout=subprocess.PIPE
    )
    given: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    headers = (f"Authorization: Bearer {given['live_key']}", f"X-Quota-User: {given['user']}")
    funding = [*command, "grant", given["user"], "1000000000", "--mode", "live"]
    subprocess.run(funding, env=environment, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    with _process([sys.executable, "-m", *serving], environment) as process:
        _wait_until(process, lambda: is_ready(port))
        yield Server("farebox", process.pid, f"http://127.0.0.1:{port}/v1", headers, time.monotonic() - began)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def memory_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine() -> str:
    """The machine's kind, in words."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{os.cpu_count()} cores ({model}), Linux {os.uname().release.split('-')[0]}, CPython {version}"


@contextlib.contextmanager
def _process(command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    assert shutil.which(command[0]) is not None
    process = subprocess.Popen(command, env=environment, cwd=HERE.parent)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until(process: subprocess.Popen[bytes], ready: Any) -> None:
    ends = time.monotonic() + START_S_MAX
    while not ready():
        if process.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"{process.args!r} did not start")
        time.sleep(0.01)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
