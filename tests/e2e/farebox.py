"""Real processes: an installation in a folder, the gateways that serve it, and an upstream beside them.

Nothing here sleeps to wait: each wait polls a condition until its deadline, and says what did not come.
"""

import asyncio
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import httpx
import psycopg

from tests.e2e.books import Books

ROOT: Final = Path(__file__).parents[2]
START_S: Final = 60.0
"""Two busy cores: generous, because only a failure waits for it."""

STOP_S: Final = 60.0
COMMAND_S: Final = 120.0
POLL_S: Final = 0.005

# The prices of every model here are whole numbers of the credit's smallest unit for each token.
UNITS_OF_INPUT: Final = 100_000
UNITS_OF_OUTPUT: Final = 200_000
CREDIT_UNITS: Final = 10**9

MODELS: Final = """
[[models]]
name = "meter"
upstream = "upstream"
price = { input = "1", output = "2" }

[[models]]
name = "output-only"
upstream = "upstream"
price = { input = "0", output = "2" }

[[models]]
name = "unreachable"
upstream = "closed"
price = { input = "1", output = "2" }

[[models]]
name = "gpt-4o-mini"
upstream = "upstream"

[[actions]]
key = "reply"
credits = "0.02"
"""


def until(condition: Callable[[], object], *, within_s: float, what: str) -> None:
    """Poll *condition* until it holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"within {within_s} s there was no {what}")
        time.sleep(POLL_S)


async def until_async(condition: Callable[[], object], *, within_s: float, what: str, poll_s: float = POLL_S) -> None:
    """The same, while the loop's other tasks go on."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"within {within_s} s there was no {what}")
        await asyncio.sleep(poll_s)


def environment(**more: str) -> dict[str, str]:
    """Ours, without what would change the settings."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("FAREBOX_", "OPENAI_"))}
    return {**ours, "PYTHONPATH": str(ROOT), **more}


class Process:
    """A process that we started. Its output goes to files."""

    def __init__(self, *arguments: str, log: Path, cwd: Path, **environ: str) -> None:
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            # By way of a pipe, so that a limit on the files that the process may write does not stop its log.
            self._copies = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=err)
            assert self._copies.stdin is not None
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=out,
                stderr=self._copies.stdin,
                cwd=cwd,
                env=environment(**environ),
            )
            self._copies.stdin.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def workers(self) -> list[int]:
        """The ids of its live children."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(child) for child in children.read_text().split() if _state_of(int(child)) not in ("Z", "")]

    @property
    def resident_bytes(self) -> int:
        """The memory that it and its children have."""
        return sum(_resident_bytes(pid) for pid in (self.pid, *self.workers))

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def line_with(self, text: str, *, of: Callable[[], str]) -> str:
        """The first line that has *text* in it, as soon as it is there."""

        def found() -> list[str]:
            assert self.running, f"it ended with {self._popen.returncode}:\n{self.err}"
            return [line for line in of().splitlines(keepends=True) if text in line and line.endswith("\n")]

        until(found, within_s=START_S, what=f"line with {text!r}")
        return found()[0]

    def kill(self) -> None:
        """SIGKILL to it and its children, also to those that are paused; they are gone when this returns."""
        workers = self.workers
        self._popen.kill()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self._popen.wait(STOP_S)
        until(lambda: all(_state_of(worker) in ("Z", "") for worker in workers), within_s=STOP_S, what="end of workers")
        self._copies.wait(STOP_S)

    def pause(self) -> None:
        """SIGSTOP; it stands still when this returns."""
        self._popen.send_signal(signal.SIGSTOP)
        until(lambda: _state_of(self.pid) == "T", within_s=STOP_S, what="process that stands still")

    def resume(self) -> None:
        self._popen.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        self._popen.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        code = self._popen.wait(STOP_S)
        self._copies.wait(STOP_S)
        return code

    def stop(self) -> int:
        """SIGTERM, and the exit code. Nothing happens to one that has ended."""
        if self.running:
            self.terminate()
        return self.ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.kill()
        self._copies.wait(STOP_S)


def _state_of(pid: int) -> str:
    """The letter of /proc; empty when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[0]


def _resident_bytes(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * mmap.PAGESIZE


class Clock:
    """The time of day of the processes that are served with it; it steps for all of them at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(bytes(8))

    def step(self, *, by_s: float) -> None:
        """Go so far off from the machine's clock."""
        with self.file.open("r+b") as file:
            file.write(int(by_s * 10**9).to_bytes(8, "little", signed=True))


class Upstream(Process):
    """The simulated upstream as a process of its own, which notes what it received and what it sent in full."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "upstream.log"
        self._log.touch()
        self._read = 0
        self._rest = ""
        self._noted: dict[str, set[str]] = {"received": set(), "sent": set()}
        super().__init__("gateway.proxy.simulated", "--log", str(self._log), log=folder / "upstream", cwd=folder)
        self.url = self.line_with("http://", of=lambda: self.out).strip()

    @property
    def received(self) -> set[str]:
        """The ids of all requests that have come."""
        return self._notes()["received"]

    @property
    def sent(self) -> set[str]:
        """The ids of those whose whole answer has left."""
        return self._notes()["sent"]

    def _notes(self) -> dict[str, set[str]]:
        with self._log.open() as log:
            log.seek(self._read)
            new = log.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            event, _, request_id = line.partition(" ")
            self._noted[event].add(request_id)
        return self._noted


class Gateway(Process):
    """`farebox serve`, ready."""

    def __init__(self, *arguments: str, log: Path, cwd: Path, clock: Clock | None = None, **environ: str) -> None:
        program = ("gateway.cli",) if clock is None else ("tests.e2e.clocked", str(clock.file))
        super().__init__(*program, "serve", *_port(arguments), *arguments, log=log, cwd=cwd, **environ)
        self.base_url = self.line_with("Farebox serves", of=lambda: self.err).split()[-1]

    def get(self, path: str, key: str) -> httpx.Response:
        return httpx.get(f"{self.base_url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def post(self, path: str, key: str, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.base_url}{path}", headers=headers, json=body, timeout=30)


def _port(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """A free port, unless one is named."""
    return () if "--port" in arguments else ("--port", "0")


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


@dataclass(slots=True)
class Farebox:
    """An installation on one host: a folder with a configuration and a journal, a database, the first tenant's keys.

    Attributes:
        database_url: as an auditor reaches it: directly, and as the superuser.
    """

    folder: Path
    config: Path
    database_url: str
    live_key: str = ""
    test_key: str = ""
    admin_key: str = ""
    user: str = ""
    tenant_id: str = ""
    gateways: list[Gateway] = field(default_factory=list)

    @property
    def database(self) -> Path:
        return self.folder / "farebox.db"

    @property
    def write_lock(self) -> Path:
        """What a process holds while it writes to a ledger on SQLite."""
        return self.folder / "farebox.db-lock"

    @property
    def on_sqlite(self) -> bool:
        return self.database_url.startswith("sqlite:")

    @property
    def books(self) -> Books:
        return Books(self.database_url)

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Keep every process from writing to the ledger."""
        if self.on_sqlite:
            with self.write_lock.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        else:
            with psycopg.connect(self.database_url) as connection:
                connection.execute("LOCK TABLE ledger_command IN EXCLUSIVE MODE")
                yield

    def beside(self, folder: Path, **settings: object) -> "Farebox":
        """The same installation on another host: a journal of its own, the same database. Its user closes it."""
        folder.mkdir(parents=True)
        given = {"journal_dir": str(folder / "kept"), **settings}
        lines = self.config.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.partition(" = ")[0] not in given]
        config = folder / "farebox.toml"
        config.write_text(_toml(given) + "".join(kept))
        return replace(self, folder=folder, config=config, gateways=[])

    def run(self, *arguments: str, **environ: str) -> Done:
        """Run `farebox …` to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "gateway.cli", *arguments],
            cwd=self.folder,
            env=environment(FAREBOX_CONFIG=str(self.config), **environ),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def serve(self, *arguments: str, clock: Clock | None = None, **environ: str) -> Gateway:
        """A gateway more on the same database."""
        log = self.folder / f"gateway-{len(self.gateways)}"
        gateway = Gateway(*arguments, log=log, cwd=self.folder, clock=clock, FAREBOX_CONFIG=str(self.config), **environ)
        self.gateways.append(gateway)
        return gateway

    def verify(self) -> None:
        """`farebox verify`, which must look at the whole journal and find nothing wrong with it."""
        commands = self.books.commands()
        done = self.run("verify", "--json")
        assert done.code == 0, done.out + done.err
        said = json.loads(done.out)
        assert said["violations"] == []
        assert said["entries"] >= commands

    def statement(self, user: str) -> dict[str, Any]:
        """`farebox statement USER --json`."""
        done = self.run("statement", user, "--json")
        assert done.code == 0, done.err
        statement: dict[str, Any] = json.loads(done.out)
        return statement

    def top_up(self, gateway: Gateway, user: str, *, millicredits: int) -> None:
        body = {"customer_id": user, "credits": millicredits}
        answer = gateway.post("/topup/grant", self.live_key, body)
        assert answer.status_code in (200, 201), answer.text

    def headers(self, user: str | None) -> dict[str, str]:
        """What a chat request of *user* carries."""
        named = {} if user is None else {"X-Quota-User": user}
        return {"Authorization": f"Bearer {self.live_key}", **named}

    def close(self) -> None:
        for gateway in self.gateways:
            gateway.__exit__()


def _toml(settings: Mapping[str, object]) -> str:
    """Plain settings, a line each."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


@contextmanager
def installed(
    folder: Path,
    upstream_url: str,
    *,
    models: str = MODELS,
    settings: Mapping[str, object] | None = None,
    audited_url: str | None = None,
) -> Iterator[Farebox]:
    """Make an installation whose live traffic goes to *upstream_url*; its gateways are ended with the block.

    The books are read at *audited_url* where the gateways' way to the database is another.
    The upstream "closed" is a port that nobody listens on, asked again and again for a second or two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        given = {
            "database_url": f"sqlite:///{folder / 'farebox.db'}",
            "journal_dir": str(folder / "kept"),
            "rate_limit_per_minute": 0,
            "management_rate_limit_per_minute": 0,
            **(settings or {}),
        }
        lines = []
        closed_url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        for name, url, retries in (("upstream", upstream_url, 1), ("closed", closed_url, 5)):
            lines += ["[[upstreams]]", f'name = "{name}"', f'base_url = "{url}"', f"retries = {retries}"]
        config = folder / "farebox.toml"
        config.write_text(_toml(given) + "\n".join(lines) + models)
        farebox = Farebox(folder=folder, config=config, database_url=audited_url or str(given["database_url"]))
        done = farebox.run("init", "--json")
        assert done.code == 0, done.err
        (line,) = done.out.splitlines()
        keys = json.loads(line)
        farebox.live_key, farebox.test_key, farebox.admin_key = keys["live_key"], keys["test_key"], keys["admin_key"]
        farebox.user, farebox.tenant_id = keys["user"], keys["tenant_id"]
        try:
            yield farebox
        finally:
            farebox.close()
