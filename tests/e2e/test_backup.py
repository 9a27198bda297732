"""The restore drill of `docs/operations.md`: a backup that is taken under load, restored, and verified."""

import asyncio
import json
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ledger.store.row_security import GATEWAY_ROLE
from tests.e2e.books import Books
from tests.e2e.conftest import Install
from tests.e2e.farebox import Farebox, until, until_async
from tests.e2e.load import Seen, Traffic, chat
from tests.servers.postgres import DURABLE, NOBODY, PostgresServer, database_of

USERS = 3
CLIENTS = 8
BEFORE = 40
"""Answers that have come before a backup begins; as many come after it has ended."""

WITHIN_S = 60


def next_body(rng: random.Random) -> dict[str, Any]:
    """Whole answers and streams, so that reservations are open at any moment."""
    return chat("meter", stream=rng.random() < 0.5, max_tokens=rng.randint(5, 40))


def charged(seen: list[Seen]) -> set[str]:
    """Requests whose clients have a whole answer: they are charged, durably."""
    return {one.request_id for one in seen if one.complete and one.status == 200 and one.request_id}


async def backed_up_under_load(farebox: Farebox, *back_up: Callable[[], None]) -> tuple[list[set[str]], set[str]]:
    """Do each step of a backup while clients ask; what was charged before each began, and in the end."""
    gateway = farebox.serve()
    for user in range(USERS):
        farebox.top_up(gateway, f"user-{user}", millicredits=10**9)
    users = [farebox.headers(f"user-{user}") for user in range(USERS)]
    traffic = Traffic(gateway.base_url, users, next_body, random.Random(3))
    running = asyncio.create_task(traffic.run(clients=CLIENTS))

    async def more() -> None:
        wanted = len(charged(traffic.seen)) + BEFORE
        await until_async(
            lambda: running.done() or len(charged(traffic.seen)) >= wanted, within_s=WITHIN_S, what="load"
        )

    await more()
    before = []
    for step in back_up:
        before.append(charged(traffic.seen))
        await asyncio.to_thread(step)
        await more()
    traffic.stop()
    seen = await running
    assert {one.status for one in seen} == {200}
    assert gateway.stop() == 0
    return before, charged(seen)


def settled(url: str) -> set[str]:
    """Requests that are charged, as an auditor reads them."""
    query = "SELECT request_id FROM ledger_reservation WHERE state = 'committed'"
    if url.startswith("sqlite:///"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            return {request_id for (request_id,) in file.execute(query)}
    with psycopg.connect(url) as server:
        return {request_id for (request_id,) in server.execute(query)}


def whole(farebox: Farebox, url: str) -> None:
    """What was restored is a ledger in which everything holds, and which works on."""
    verified = farebox.run("verify", "--json", FAREBOX_DATABASE_URL=url)
    assert verified.code == 0, verified.out + verified.err
    assert json.loads(verified.out)["entries"] == Books(url).commands() > 0
    granted = farebox.run("grant", "user-0", "5", FAREBOX_DATABASE_URL=url)
    assert granted.code == 0, granted.err


# SQLite.


async def test_backups_of_sqlite_under_load_are_whole(install: Install, tmp_path: Path) -> None:
    """Both that read at one moment: VACUUM INTO, and SQLite's online backup in a single step."""
    farebox = install()
    vacuumed, copied = tmp_path / "vacuumed.db", tmp_path / "copied.db"

    def vacuum() -> None:
        with closing(sqlite3.connect(farebox.database, timeout=WITHIN_S)) as there:
            there.execute("VACUUM INTO ?", (str(vacuumed),))

    def copy() -> None:
        with (
            closing(sqlite3.connect(farebox.database, timeout=WITHIN_S)) as there,
            closing(sqlite3.connect(copied)) as here,
        ):
            there.backup(here)

    before, after = await backed_up_under_load(farebox, vacuum, copy)
    for answered, backup in zip(before, (vacuumed, copied), strict=True):
        url = f"sqlite:///{backup}"
        kept = settled(url)
        assert answered <= kept
        assert after - kept, "the backup was taken while requests went on"
        whole(farebox, url)


# PostgreSQL.


@pytest.fixture(scope="module")
def primary() -> Iterator[PostgresServer]:
    """A durable server that archives its log."""
    server = PostgresServer(settings=DURABLE)
    archive = server.folder / "archive"
    archive.mkdir()
    if os.geteuid() == 0:
        os.chown(archive, NOBODY, NOBODY)
    server.settings |= {"archive_mode": "on", "archive_command": f"cp %p {archive}/%f"}
    server.create().start()
    yield server
    server.close()


@pytest.fixture
def others() -> Iterator[list[PostgresServer]]:
    """Servers that backups are restored to: they have no data yet."""
    servers = [PostgresServer(settings=DURABLE) for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


async def test_backups_of_postgresql_under_load_are_whole(
    install: Install, primary: PostgresServer, others: list[PostgresServer]
) -> None:
    """A dump, a base backup by itself, and one with the archived log up to a moment that was named under load."""
    url, from_dump = primary.create_database(), primary.create_database()
    farebox = install(database_url=url)
    dump = f"--file={primary.folder / 'farebox.sql'}"
    at_its_end, at_the_moment = others

    def dump_it() -> None:
        primary.program("pg_dump", dump, url)

    def copy_its_files() -> None:
        for other in others:
            primary.program(
                "pg_basebackup",
                *("--host=127.0.0.1", f"--port={primary.port}", "--username=postgres"),
                *("--checkpoint=fast", "--wal-method=stream", f"--pgdata={other.data}"),
            )

    def name_the_moment() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SELECT pg_create_restore_point('before the mistake')")

    before, after = await backed_up_under_load(farebox, dump_it, copy_its_files, name_the_moment)

    primary.program("psql", "--quiet", "--set=ON_ERROR_STOP=1", dump, from_dump)
    at_its_end.start()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_switch_wal()")
    at_the_moment.settings |= {
        "restore_command": f"cp {primary.folder}/archive/%f %p",
        "recovery_target_name": "before the mistake",
        "recovery_target_action": "promote",
    }
    (at_the_moment.data / "recovery.signal").touch()
    at_the_moment.start()
    name = database_of(url)
    until(lambda: has_recovered(at_the_moment.url_of(name)), within_s=WITHIN_S, what="end of the recovery")

    for answered, restored in zip(
        before, (from_dump, at_its_end.url_of(name), at_the_moment.url_of(name)), strict=True
    ):
        kept = settled(restored)
        assert answered <= kept
        assert after - kept, "the backup was taken while requests went on"
        whole(farebox, restored)


def test_a_role_that_is_held_to_the_policies_cannot_dump(install: Install, primary: PostgresServer) -> None:
    """It would get an empty dump, and believe that it had a backup: PostgreSQL refuses."""
    url = primary.create_database()
    install(database_url=url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE held LOGIN IN ROLE {GATEWAY_ROLE}")
    with pytest.raises(AssertionError, match="row-level security"):
        primary.program("pg_dump", "--data-only", "--table=ledger_wallet", url.replace("//postgres@", "//held@"))


def has_recovered(url: str) -> bool:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
