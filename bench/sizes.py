"""How many bytes a metered request leaves in the database, and how many it writes to the log on the way.

python -m bench.sizes                         on SQLite
python -m bench.sizes --postgres              on a PostgreSQL that is started for it, durable

The requests go through the whole gateway, to the simulated upstream, so the rows are those of production. Half of them
carry an idempotency key, whose answer is kept for a day.
"""

import argparse
import asyncio
import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import httpx
import psycopg

from gateway.app import Gateway
from gateway.installation import install
from gateway.migrations import migrate
from gateway.settings import SIMULATED, Settings
from tests.servers.postgres import DURABLE, PostgresServer

IN_FLIGHT: Final = 32
USERS: Final = 50
WARM_UP: Final = 200
"""Requests before the first measurement: customers, first pages and plans are made by then."""

BODY: Final = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "What is a farebox, in one line?"}]}


class Sizes(NamedTuple):
    """Bytes by table with its indexes (one entry for a whole SQLite file), bytes of the log, and commits so far."""

    tables: dict[str, int]
    log: int
    commits: int


class Measured(Protocol):
    """A database whose sizes can be read."""

    url: str

    def sizes(self) -> Sizes: ...


class SqliteFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = f"sqlite:///{path}"

    def sizes(self) -> Sizes:
        with closing(sqlite3.connect(self._path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            (size,) = connection.execute("PRAGMA page_size").fetchone()
        return Sizes({"the file": pages * size}, 0, 0)


class PostgresDatabase:
    def __init__(self, server: PostgresServer) -> None:
        self.url = server.create_database()

    def sizes(self) -> Sizes:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SELECT pg_stat_force_next_flush()")
            tables = connection.execute(
                "SELECT relname, pg_total_relation_size(oid) FROM pg_class WHERE relkind = 'r'"
                " AND relnamespace = 'public'::regnamespace"
            ).fetchall()
            row = connection.execute(
                "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, xact_commit"
                " FROM pg_stat_database WHERE datname = current_database()"
            ).fetchone()
        assert row is not None
        return Sizes(dict(tables), int(row[0]), int(row[1]))


@contextlib.contextmanager
def database(*, postgres: bool, folder: Path) -> Iterator[Measured]:
    if not postgres:
        yield SqliteFile(folder / "farebox.db")
        return
    server = PostgresServer(settings=DURABLE).create().start()
    try:
        yield PostgresDatabase(server)
    finally:
        server.close()


async def fill(settings: Settings, measured: Measured, requests: int) -> tuple[Sizes, Sizes]:
    """The sizes before and after *requests* of chat completions."""
    installed = await install(settings, base_url="http://farebox/v1")
    gateway = Gateway(settings)
    await gateway.start()
    transport = httpx.ASGITransport(app=gateway)
    authorization = {"Authorization": f"Bearer {installed.live_key}"}
    try:
        async with httpx.AsyncClient(transport=transport, base_url=installed.base_url, headers=authorization) as client:
            for user in range(USERS):
                grant = {"customer_id": f"user-{user}", "credits": 10**9}
                (await client.post("topup/grant", json=grant)).raise_for_status()
            await _send(client, range(WARM_UP))
            before = measured.sizes()
            await _send(client, range(WARM_UP, WARM_UP + requests))
            return before, measured.sizes()
    finally:
        await gateway.stop()


async def _send(client: httpx.AsyncClient, numbers: range) -> None:
    waiting = iter(numbers)

    async def work() -> None:
        for number in waiting:
            headers = {"X-Quota-User": f"user-{number % USERS}"}
            if number % 2:
                headers["Idempotency-Key"] = f"request-{number}"
            (await client.post("chat/completions", json=BODY, headers=headers)).raise_for_status()

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def report(before: Sizes, after: Sizes, requests: int) -> str:
    """A table of bytes a request, the largest first."""
    grown = {name: size - before.tables.get(name, 0) for name, size in after.tables.items()}
    rows = [(name, size / requests) for name, size in grown.items() if size]
    rows.append(("all tables", sum(grown.values()) / requests))
    if after.log:
        rows.append(("write-ahead log", (after.log - before.log) / requests))
    lines = ["| what | bytes a request |", "|---|--:|"]
    lines += [f"| {name} | {size:,.0f} |" for name, size in sorted(rows, key=lambda row: row[1])]
    if after.commits:
        lines.append(f"\n{requests / (after.commits - before.commits):.1f} requests a transaction")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--postgres", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with database(postgres=options.postgres, folder=folder) as measured:
            migrate(measured.url)
            settings = Settings(
                database_url=measured.url,
                journal_dir=folder / "journal",
                default_upstream=SIMULATED,
                rate_limit_per_minute=0,
                management_rate_limit_per_minute=0,
            )
            before, after = asyncio.run(fill(settings, measured, options.requests))
    print(report(before, after, options.requests))


if __name__ == "__main__":
    main()
