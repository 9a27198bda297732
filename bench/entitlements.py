"""How long an entitlement check takes: inside the server, and for its client; with and without changes meanwhile."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench import processes
from bench.processes import Server
from tests.servers.postgres import DURABLE, PostgresServer
from tests.servers.valkey import ValkeyServer

CUSTOMERS: Final = 100
"""Those who are checked, one after the other."""

WRITES_A_SECOND: Final = 100
"""Usage that is recorded meanwhile, of the same customers."""

METRIC: Final = "chat_message"
WRITTEN_S_MAX: Final = 10.0


class Case(NamedTuple):
    connections: int
    written: bool

    @property
    def name(self) -> str:
        return f"{self.connections}, {WRITES_A_SECOND} debits a second" if self.written else str(self.connections)


CASES: Final = (Case(1, False), Case(50, False), Case(1, True), Case(50, True))


class Checked(NamedTuple):
    """Checks a second, and microseconds: inside the server, and for the client."""

    a_second: float
    server_p50_us: float
    server_p99_us: float
    client_p50_us: float
    client_p99_us: float


def measure(*, rounds: int, seconds: float) -> list[str]:
    """A row for each store and case: the medians over the rounds."""
    rows = [
        "| store | connections | checks/s | server p50 us | server p99 us | client p50 us | client p99 us |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for store, opened in (("SQLite", _on_sqlite), ("PostgreSQL, Valkey", _on_servers)):
        with opened() as (server, samples):
            _set_up(server)
            for case in CASES:
                taken = [_checked(server, samples, case, seconds=seconds) for _ in range(rounds)]
                figures = [statistics.median(figure) for figure in zip(*taken, strict=True)]
                rows.append(f"| {store} | {case.name} | " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |")
    return rows


@contextlib.contextmanager
def _on_sqlite() -> Iterator[tuple[Server, Path]]:
    with tempfile.TemporaryDirectory() as folder, processes.mock() as upstream:
        samples = Path(folder) / "samples.json"
        with processes.farebox(upstream, Path(folder), serving=("bench.timed", str(samples))) as server:
            yield server, samples


@contextlib.contextmanager
def _on_servers() -> Iterator[tuple[Server, Path]]:
    postgres, valkey = PostgresServer(settings=DURABLE).create().start(), ValkeyServer().start()
    try:
        with tempfile.TemporaryDirectory() as folder, processes.mock() as upstream:
            samples = Path(folder) / "samples.json"
            settings = {"FAREBOX_DATABASE_URL": postgres.create_database(), "FAREBOX_REDIS_URL": valkey.url}
            serving = ("bench.timed", str(samples))
            with processes.farebox(upstream, Path(folder), serving=serving, **settings) as server:
                yield server, samples
    finally:
        valkey.close()
        postgres.close()


def _set_up(server: Server) -> None:
    """A metric at one credit, and customers with plenty."""
    _post(server, "billable-metrics", {"key": METRIC})
    _post(server, "metering-rules", {"billable_metric_key": METRIC, "cost_type": "per_unit", "unit_cost": 1000})
    for number in range(CUSTOMERS):
        _post(server, "topup/grant", {"customer_id": f"user-{number:04d}", "credits": 10**12})


def _post(server: Server, path: str, body: dict[str, Any]) -> None:
    headers = dict(header.split(": ", 1) for header in server.headers)
    request = urllib.request.Request(f"{server.url}/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request):
        return


def _checked(server: Server, samples: Path, case: Case, *, seconds: float) -> Checked:
    client = [str(processes.compiled("loadgen")), "-M", str(CUSTOMERS), "-w", "1"]
    for header in server.headers:
        client += ["-H", header]
    checks = ["-u", f"{server.url}/customer-by-external-id/user-@@@@/entitlements/{METRIC}", "-d", str(seconds)]
    usage = processes.BUILD / "usage.json"
    usage.write_text(json.dumps({"customer_id": "user-@@@@", "billable_metric_key": METRIC}))
    writes = ["-u", f"{server.url}/usage", "-b", str(usage), "-R", str(WRITES_A_SECOND), "-c", "10"]
    _noted(server, samples)
    with contextlib.ExitStack() as stack:
        if case.written:
            writer = [*client, *writes, "-d", str(seconds + 5)]
            process = stack.enter_context(subprocess.Popen(writer, stdout=subprocess.DEVNULL))
            stack.callback(process.terminate)
        made = subprocess.run([*client, *checks, "-c", str(case.connections)], check=True, stdout=subprocess.PIPE)
    figures: dict[str, Any] = json.loads(made.stdout)
    if figures["non2xx"] or figures["err"] or not figures["ok"]:
        raise RuntimeError(f"the checks failed: {figures}")
    noted = _noted(server, samples)
    warm = noted[-figures["ok"] :]
    quantiles = statistics.quantiles(warm, n=100)
    return Checked(figures["rps"], quantiles[49], quantiles[98], figures["p50"], figures["p99"])


def _noted(server: Server, samples: Path) -> list[float]:
    """What the server has noted since it was last asked, in the order of its answers."""
    samples.unlink(missing_ok=True)
    os.kill(server.pid, signal.SIGUSR2)
    ends = time.monotonic() + WRITTEN_S_MAX
    while not samples.exists():
        if time.monotonic() > ends:
            raise RuntimeError("the server wrote no samples")
        time.sleep(0.01)
    noted: list[float] = json.loads(samples.read_text())
    return noted
