"""Measure the gateway beside the mock alone and the bare pass-through, and write the table.

    python -m bench                 about five minutes; prints the tables
    python -m bench --write         ... and puts them into docs/benchmarks.md
    python -m bench --quick         one short round, to see that it runs
    python -m bench --only JSON     some of the loads alone
    python -m bench --only postgres the ledger on PostgreSQL alone
    python -m bench --only usage    questions about the usage of ten million charges
    python -m bench --only entitlements  entitlement checks alone

How it works. The systems take turns, round after round, so that a machine that slows down slows all of them; each
figure is the median of its rounds. CPU is that of the measured process and its children, by the kernel's account.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import uvloop

from bench import entitlements, pairs, processes, usage
from bench.bodies import BODIES
from bench.processes import Server
from ledger.writer import BATCH_MAX

PAGE: Final = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
OPEN_STREAMS: Final = 1000


class Load(NamedTuple):
    """A workload: a body, how many connections, and the pause between the mock's chunks in microseconds."""

    body: str
    connections: int
    pause_us: int = 0

    @property
    def name(self) -> str:
        kind = {"json": "JSON", "stream20": "stream of 20, in a burst", "stream200": "stream of 200, paced 2 ms"}
        return f"{kind[self.body]}, {self.connections} connections"


LOADS: Final = (
    Load("json", 1),
    Load("json", 10),
    Load("json", 64),
    Load("json", 100),
    Load("stream20", 1),
    Load("stream20", 10),
    Load("stream20", 100),
    Load("stream200", 32, pause_us=2000),
)


def load(server: Server, work: Load, *, seconds: float) -> dict[str, Any]:
    """What the load generator measured of *server*."""
    body = processes.BUILD / f"{work.body}.json"
    body.write_bytes(BODIES[work.body])
    command = [str(processes.compiled("loadgen")), "-u", f"{server.url}/chat/completions", "-b", str(body)]
    command += ["-c", str(work.connections), "-d", str(seconds), "-w", "1", "-P", str(server.pid)]
    for header in server.headers:
        command += ["-H", header]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    figures: dict[str, Any] = json.loads(made.stdout)
    if figures["non2xx"] or figures["incomplete"] or figures["err"] or not figures["ok"]:
        raise RuntimeError(f"{server.name} failed under {work.name}: {figures}")
    return figures


def measure_loads(works: Sequence[Load], *, rounds: int, seconds: float) -> list[str]:
    """A row for each load and system: the medians over the rounds."""
    rows = ["| load | system | requests/s | p50 us | p99 us | first byte p50 us | CPU us/request | CPU ratio |"]
    rows.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for pause_us in sorted({work.pause_us for work in works}):
        with _systems("-i", str(pause_us)) as servers:
            for work in works:
                if work.pause_us != pause_us:
                    continue
                rows += _rows(work, servers, rounds=rounds, seconds=seconds)
    return rows


@contextlib.contextmanager
def _systems(*mock_options: str) -> Iterator[tuple[Server, Server, Server]]:
    """The mock alone, the bare pass-through before it, and the gateway before it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        processes.mock(*mock_options) as upstream,
        processes.passthrough(upstream) as bare,
        processes.farebox(upstream, Path(folder)) as metered,
    ):
        yield upstream, bare, metered


def _rows(work: Load, servers: Iterable[Server], *, rounds: int, seconds: float) -> Iterable[str]:
    taken: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for server in servers:
            taken.setdefault(server.name, []).append(load(server, work, seconds=seconds))

    def median(name: str, figure: str) -> float:
        return float(statistics.median(figures[figure] for figures in taken[name]))

    for name in taken:
        cpu_us = median(name, "cpu_us_per_req")
        ratio = "" if name == "mock" else f"{cpu_us / median('pass-through', 'cpu_us_per_req'):.2f}"
        yield (
            f"| {work.name} | {name} | {median(name, 'rps'):,.0f} | {median(name, 'p50'):,.0f} "
            f"| {median(name, 'p99'):,.0f} | {median(name, 'ttfb_p50'):,.0f} | {cpu_us:,.0f} | {ratio} |"
        )


def measure_memory() -> list[str]:
    """Resident memory with many slow streams open, and what one of them costs."""
    rows = ["| system | at rest MB | with 1,000 open streams MB | KB a stream |", "|---|--:|--:|--:|"]
    with _systems("-i", "50000") as (_, *servers):
        for server in servers:
            load(server, Load("stream20", 10), seconds=1)
            rest_mb = processes.memory_mb(server.pid)
            client = threading.Thread(target=_held_open, args=(server, Load("stream200", OPEN_STREAMS)))
            client.start()
            seen_mb = rest_mb
            while client.is_alive():
                seen_mb = max(seen_mb, processes.memory_mb(server.pid))
                time.sleep(0.1)
            each_kb = (seen_mb - rest_mb) * 1024 / OPEN_STREAMS
            rows.append(f"| {server.name} | {rest_mb:.0f} | {seen_mb:.0f} | {each_kb:.0f} |")
    return rows


def _held_open(server: Server, work: Load) -> None:
    load(server, work, seconds=20)


def measure_start(*, rounds: int) -> list[str]:
    """From the start of the process until it says that it is ready."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder, processes.mock() as upstream:
        for number in range(rounds):
            with processes.farebox(upstream, Path(folder) / str(number)) as server:
                seconds.append(server.started_s)
    return [f"Start-up until ready, median of {rounds}: {statistics.median(seconds):.2f} s."]


def measure_pairs(*, rounds: int, seconds: float) -> list[str]:
    """Reservations made and committed, durably, on SQLite."""
    rows = ["| in flight | wallets | batch | pairs/s | reserve p50 ms | reserve p99 ms |", "|--:|---|---|--:|--:|--:|"]
    cases = ((64, False, 1), (64, False, BATCH_MAX), (64, True, BATCH_MAX), (8, False, BATCH_MAX))
    taken: dict[tuple[int, bool, int], list[pairs.Pairs]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            in_flight, one_wallet, batch_max = case
            with pairs.sqlite() as url:
                work = pairs.measure(
                    url, in_flight=in_flight, seconds=seconds, batch_max=batch_max, one_wallet=one_wallet
                )
                taken[case].append(asyncio.run(work))
    for (in_flight, one_wallet, batch_max), found in taken.items():
        rate = statistics.median(run.a_second for run in found)
        p50, p99 = (statistics.median(getattr(run, name) for run in found) / 1000 for name in LATENCIES)
        batch = "one command a transaction" if batch_max == 1 else "group commit"
        wallets = "one" if one_wallet else "one each"
        rows.append(f"| {in_flight} | {wallets} | {batch} | {rate:,.0f} | {p50:.1f} | {p99:.1f} |")
    return rows


def measure_postgres(*, rounds: int, seconds: float) -> list[str]:
    """The same on a durable PostgreSQL, each run after one of pgbench on the same server."""
    rows = [
        "| in flight | wallets | pairs/s | of pgbench | reserve p50 ms | reserve p99 ms |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    cases = ((8, False), (32, False), (256, False), (256, True))
    taken: dict[tuple[int, bool], list[pairs.Pairs]] = {case: [] for case in cases}
    ratios: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    rates: list[float] = []
    with pairs.postgres_server() as server:
        for _ in range(rounds):
            for case in cases:
                in_flight, one_wallet = case
                rates.append(pairs.pgbench(server, seconds=seconds))
                with pairs.postgres(server) as url:
                    work = pairs.measure(url, in_flight=in_flight, seconds=seconds, one_wallet=one_wallet)
                    taken[case].append(uvloop.run(work))
                ratios[case].append(taken[case][-1].a_second / rates[-1])
    for case, found in taken.items():
        rate = statistics.median(run.a_second for run in found)
        p50, p99 = (statistics.median(getattr(run, name) for run in found) / 1000 for name in LATENCIES)
        wallets = "one" if case[1] else "one each"
        rows.append(
            f"| {case[0]} | {wallets} | {rate:,.0f} | {statistics.median(ratios[case]):.2f} | {p50:.1f} | {p99:.1f} |"
        )
    rows.append(
        f"\n`pgbench -N`, {pairs.PGBENCH_CLIENTS} clients: {statistics.median(rates):,.0f} transactions a second."
    )
    return rows


LATENCIES: Final = ("reserve_p50_us", "reserve_p99_us")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument(
        "--only",
        metavar="LOAD",
        help="measure only the loads whose name begins so, `postgres`, `usage` or `entitlements`",
    )
    options = parser.parse_args()
    rounds, seconds = (1, 1.0) if options.quick else (3, 2.0)
    if options.only == "postgres":
        print("\n".join(measure_postgres(rounds=rounds, seconds=seconds)))
        return
    if options.only == "usage":
        print("\n".join(usage.measure(rows=usage.ROWS_QUICK if options.quick else usage.ROWS)))
    if options.only == "entitlements":
        print("\n".join(entitlements.measure(rounds=rounds, seconds=seconds)))
        return
    if options.only is not None:
        works = [work for work in LOADS if work.name.startswith(options.only)]
        print("\n".join(measure_loads(works, rounds=rounds, seconds=seconds)))
        return
    sections = [
        "## Requests",
        *measure_loads(LOADS, rounds=rounds, seconds=seconds),
        "\n## Memory",
        *measure_memory(),
        "\n## Start-up",
        *measure_start(rounds=rounds),
        "\n## The ledger on SQLite",
        *measure_pairs(rounds=rounds, seconds=seconds),
        "\n## The ledger on PostgreSQL",
        *measure_postgres(rounds=rounds, seconds=seconds),
        "\n## Entitlement checks",
        *entitlements.measure(rounds=rounds, seconds=seconds),
    ]
    head = f"Measured on {datetime.date.today().isoformat()} on {processes.machine()}, with `make bench`."
    text = "\n".join([head, "", *sections])
    print(text)
    if options.write:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
