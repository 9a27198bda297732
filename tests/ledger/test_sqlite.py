"""What is SQLite's own: the file, the plans of the statements, and writers beside the ledger."""

import asyncio
import re
import sqlite3
import threading
from pathlib import Path

import pytest

from ledger.store import sqlite_batch, sqlite_reads
from ledger.store.protocol import SchemaMissing, StoreUnavailable
from ledger.store.sqlite import SqliteStore
from ledger.store.statements import BULK_ROWS, Bulk
from tests.ledger.rig import Clock, Say, wallet

SOON_S = 5.0


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
async def test_a_ledger_in_memory_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="does not run in memory"):
        await SqliteStore.open(url, clock=Clock())


async def test_another_database_is_refused() -> None:
    with pytest.raises(ValueError, match="postgresql is not SQLite"):
        await SqliteStore.open("postgresql://localhost/farebox", clock=Clock())


async def test_a_file_without_a_ledger_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SchemaMissing, match="farebox migrate"):
        await SqliteStore.open(f"sqlite:///{tmp_path / 'none.db'}", clock=Clock())
    assert not (tmp_path / "none.db").exists()
    sqlite3.connect(tmp_path / "empty.db").close()
    (tmp_path / "empty.db").touch()
    with pytest.raises(SchemaMissing, match="has no table"):
        await SqliteStore.open(f"sqlite:///{tmp_path / 'empty.db'}", clock=Clock())


async def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database " * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        await SqliteStore.open(f"sqlite:///{tmp_path / 'text.db'}", clock=Clock())


async def test_a_driver_in_the_url_does_not_matter(database_path: Path) -> None:
    store = await SqliteStore.open(f"sqlite+aiosqlite:///{database_path}", clock=Clock())
    await store.close()


async def test_commits_are_durable_and_readers_do_not_wait(sqlite_store: SqliteStore, database_path: Path) -> None:
    connection = sqlite_batch.connect(str(database_path))
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    connection.close()


class Held:
    """A read that takes until it is let go on."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.over = threading.Event(), threading.Event(), threading.Event()
        self.found: object = None

    def __call__(self, connection: sqlite3.Connection) -> None:
        self.begun.set()
        self.go_on.wait(SOON_S)
        try:
            self.found = connection.execute("SELECT 1").fetchall()
        except sqlite3.Error as error:
            self.found = error
        self.over.set()


async def test_a_snapshot_is_closed_after_a_read_that_was_cancelled(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the middle of it, from another thread."""
    held = Held()
    monkeypatch.setattr(sqlite_reads.SqliteSnapshot, "_journal_page", lambda self, after: held(self._connection))

    async def read() -> None:
        async with sqlite_store.snapshot() as snapshot:
            await anext(snapshot.journal())

    reading = asyncio.create_task(read())
    assert await asyncio.to_thread(held.begun.wait, SOON_S)
    reading.cancel()
    done, _ = await asyncio.wait((reading,), timeout=0.05)
    assert not done, "it waits for its connection"
    held.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert held.found == [(1,)]


async def test_who_closes_lets_others_go_on_while_a_read_ends(database_path: Path) -> None:
    store = await SqliteStore.open(f"sqlite:///{database_path}", clock=Clock())
    held = Held()
    reading = asyncio.create_task(store._read(held))
    assert await asyncio.to_thread(held.begun.wait, SOON_S)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    assert not held.over.is_set(), "the loop was not held up until the read was over"
    held.go_on.set()
    await closing
    await reading
    assert held.found == [(1,)]


async def test_a_foreign_writer_makes_the_store_unavailable_for_as_long_as_it_writes(
    database_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_batch, "BUSY_TIMEOUT_S", 0.0)
    store = await SqliteStore.open(f"sqlite:///{database_path}", clock=Clock())
    await store.run_batch([say.grant("a", "1", 100)])
    foreign = sqlite3.connect(database_path, isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.run_batch([say.grant("a", "2", 100)])
    found = await store.wallet(wallet("a"))
    assert found is not None, "readers go on"
    foreign.execute("ROLLBACK")
    foreign.close()
    await store.run_batch([say.grant("a", "3", 100)])
    await store.close()


async def test_an_edit_from_outside_is_seen_by_the_next_batch(
    sqlite_store: SqliteStore, database_path: Path, say: Say
) -> None:
    """What is kept from the last batches is good only while nobody else writes."""
    await sqlite_store.run_batch([say.grant("a", "1", 100)])
    with sqlite3.connect(database_path) as connection:
        connection.execute("UPDATE ledger_wallet SET frozen = 1")
    connection.close()
    (outcome,) = await sqlite_store.run_batch([say.reserve("a", "1", 1)])
    assert outcome.reason == "wallet_frozen"  # type: ignore[union-attr]


async def test_what_is_kept_has_a_bound(sqlite_store: SqliteStore, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_batch, "WALLETS_KEPT_MAX", 5)
    for number in range(20):
        await sqlite_store.run_batch(
            [say.grant(f"w{number}", f"{number}", 10), say.reserve(f"w{number}", f"{number}", 1)]
        )
        assert len(sqlite_store._batches._state.wallets) <= 5
    outcomes = await sqlite_store.run_batch([say.commit(f"{number}", 1) for number in range(20)])
    assert [outcome.result.balance for outcome in outcomes] == [9] * 20  # type: ignore[union-attr]


async def test_the_blocks_that_are_kept_have_a_bound(
    sqlite_store: SqliteStore, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few wallets may have very many."""
    monkeypatch.setattr(sqlite_batch, "BLOCKS_KEPT_MAX", 5)
    for number in range(20):
        await sqlite_store.run_batch([say.grant("a", f"{number}", 10)])
        assert len(sqlite_store._batches._state.blocks.get(wallet("a"), {})) <= 5
    (outcome,) = await sqlite_store.run_batch([say.debit("a", "1", 195)])
    assert outcome.result.balance == 5  # type: ignore[union-attr]


async def test_a_batch_whose_caller_has_gone_is_committed_all_the_same(sqlite_store: SqliteStore, say: Say) -> None:
    task = asyncio.ensure_future(sqlite_store.run_batch([say.grant("a", "1", 100)]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    await sqlite_store.run_batch([])
    assert await sqlite_store.wallet(wallet("a")) is not None


async def test_a_closed_store_says_so_and_may_be_closed_again(sqlite_store: SqliteStore, say: Say) -> None:
    batch = asyncio.ensure_future(sqlite_store.run_batch([say.grant("a", "1", 100)]))
    await asyncio.sleep(0)
    await sqlite_store.close()
    assert len(await batch) == 1, "closing waits for the batch under way"
    await sqlite_store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await sqlite_store.run_batch([say.grant("a", "2", 100)])
    with pytest.raises(StoreUnavailable, match="closed"):
        await sqlite_store.wallet(wallet("a"))


# Plans. A scan of a table that grows for ever would be seen only in a year.

_SCAN = re.compile(r"^SCAN (t|p|ledger_\w+)\b(?!.*USING (COVERING )?INDEX)")


def bulk_statements() -> list[tuple[str, Bulk]]:
    return [(name, value) for name, value in vars(sqlite_batch).items() if isinstance(value, Bulk)]


def text_statements() -> list[tuple[str, str]]:
    return [
        (name, value)
        for module in (sqlite_batch, sqlite_reads)
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, str) and "SELECT" in value and "{" not in value
    ]


def plan(connection: sqlite3.Connection, sql: str) -> list[str]:
    values: object = dict.fromkeys(re.findall(r":(\w+)", sql), 1) or ["[]"] * sql.count("?")
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "bulk"), bulk_statements())
def test_no_statement_of_a_batch_scans_a_table(database_path: Path, name: str, bulk: Bulk) -> None:
    connection = sqlite3.connect(database_path)
    for size in BULK_ROWS:
        scans = [step for step in plan(connection, bulk.sql[size]) if _SCAN.match(step)]
        assert scans == []
    connection.close()


@pytest.mark.parametrize(("name", "sql"), text_statements())
def test_no_query_scans_a_table(database_path: Path, name: str, sql: str) -> None:
    connection = sqlite3.connect(database_path)
    steps = plan(connection, sql)
    assert steps
    assert [step for step in steps if _SCAN.match(step)] == []
    connection.close()


def test_the_plans_are_looked_at() -> None:
    assert len(bulk_statements()) >= 13
    assert len(text_statements()) >= 12
    assert _SCAN.match("SCAN ledger_key")
    assert _SCAN.match("SCAN t")
