"""The migrations lead exactly to the schema that the models say, whoever runs them and however many at once."""

import asyncio
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlmodel import SQLModel

import gateway.tables  # noqa: F401  (fills the metadata)
import ledger.store.tables  # noqa: F401  (fills the metadata)
from gateway.clock import now_us
from gateway.migrations import HEAD, configuration, migrate
from ledger.commands import Reverse, TopUp
from ledger.erasable import facts_to_keep
from ledger.model import (
    Block,
    Charge,
    Debts,
    Leg,
    Reservation,
    ReservationRef,
    ReservationState,
    Settlement,
    UsageRecord,
    Wallet,
    WalletRef,
)
from ledger.outcomes import Applied, BlockOpened, Fact, ReservationChanged, UsageRecorded, WalletChanged
from ledger.store.protocol import Store, StoreUnavailable
from ledger.store.rows import block_row, facts_from, to_json, wallet_row
from ledger.store.sqlite import SqliteStore


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def schema(path: Path) -> set[tuple[str, str, frozenset[str]]]:
    """Every table, index and trigger; of a table its columns and constraints, in any order."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute(
            "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'alembic_version'"
        ).fetchall()
    connection.close()
    return {(kind, name, parts(kind, sql)) for kind, name, sql in rows}


def parts(kind: str, sql: str) -> frozenset[str]:
    sql = re.sub(r"\s+", " ", sql).replace('"', "").strip()
    if kind != "table":
        return frozenset([sql])
    inner, _, options = sql.partition("(")[2].rpartition(")")
    return frozenset([*(part.strip() for part in re.split(r",(?![^(]*\))", inner)), options.strip()])


OF_ONE_KIND = {"ix_ledger_reservation_metadata": "sqlite", "ix_ledger_reservation_payer_metadata": "postgresql"}
"""Indexes that only one kind of database has. SQLAlchemy knows that (`ddl_if`), Alembic does not."""


def meant_for(dialect: str) -> Callable[..., bool]:
    """Alembic's filter of what it compares."""
    return lambda thing, name, *rest: OF_ONE_KIND.get(name, dialect) == dialect


def test_the_migrations_lead_to_the_schema_of_the_models(tmp_path: Path) -> None:
    migrated, modelled = tmp_path / "migrated.db", tmp_path / "modelled.db"
    migrate(url_of(migrated))
    engine = create_engine(url_of(modelled))
    SQLModel.metadata.create_all(engine)
    engine.dispose()
    assert schema(migrated) == schema(modelled)
    assert any(kind == "trigger" for kind, _, _ in schema(migrated))


@pytest.mark.filterwarnings("ignore:autogenerate skipping metadata-specified expression-based index")
def test_alembic_finds_nothing_to_change(tmp_path: Path) -> None:
    migrate(url_of(tmp_path / "farebox.db"))
    engine = create_engine(url_of(tmp_path / "farebox.db"))
    with engine.connect() as connection:
        compared = MigrationContext.configure(connection, opts={"include_object": meant_for("sqlite")})
        assert compare_metadata(compared, SQLModel.metadata) == []
    engine.dispose()


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    migrate(url_of(path))
    before = schema(path)
    migrate(url_of(path))
    assert schema(path) == before


def test_processes_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    code = f"from gateway.migrations import HEAD, configuration, migrate; migrate({url_of(path)!r})"
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], stderr=subprocess.PIPE, cwd=Path.cwd())
        for _ in range(3)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    migrate(url_of(path))


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "farebox.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE tenants (unlike TEXT)")
    connection.close()
    with pytest.raises(Exception, match="tenants already exists"):
        migrate(url_of(path))
    assert {name for _, name, _ in schema(path)} == {"tenants"}


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="in memory"):
        migrate(url)


@pytest.mark.parametrize("table", ["ledger_command", "ledger_transfer"])
@pytest.mark.parametrize("verb", ["UPDATE {} SET seq = seq + 1", "DELETE FROM {}"])
def test_the_journal_refuses_edits(tmp_path: Path, table: str, verb: str) -> None:
    path = tmp_path / "farebox.db"
    migrate(url_of(path))
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO ledger_command VALUES ('ten', 'live', 'cmd', 1, 'grant', 1, 1, '[]', '{}')")
        connection.execute(
            "INSERT INTO ledger_transfer VALUES ('ten', 'live', 1, 0, 'clearing', 'wallet:w', 5, 'CREDIT', '', NULL, 1)"
        )
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(verb.format(table))
    connection.close()


ABOUT: dict[str, Any] = {"note": 'Ünï "metadata": [1]', "n": 1.5}
SPOKEN = UsageRecord(request_id="req_1", units={"input": 7}, customer_id="cus_a", metadata=ABOUT)
PAYER = WalletRef("ten_a", "live", "customer:cus_a")
HELD = Reservation(
    ref=ReservationRef("ten_a", "live", "rsv_1"),
    state=ReservationState.OPEN,
    asset="CREDIT",
    created_at_us=2**61 + 1,
    expires_at_us=2**61 + 2,
    legs=(Leg((PAYER,)),),
    mark=Settlement((Charge(3),), SPOKEN),
    metadata=ABOUT,
)
OLD_FACTS: tuple[Fact, ...] = (
    BlockOpened(Block(PAYER, "blk_1", 1, granted=2**62, created_at_us=1, effective_at_us=1, metadata=ABOUT)),
    WalletChanged(PAYER, 1, blocks_opened=1),
    ReservationChanged(HELD),
    UsageRecorded(HELD.ref, 1, SPOKEN, (Charge(3),), 0, 5),
)
"""As the journal had them while metadata was written into it."""


def test_the_journal_of_an_older_release_loses_its_metadata_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    engine = create_engine(url_of(path))
    with engine.begin() as upgrading:
        config = configuration()
        config.attributes["connection"] = upgrading
        command.upgrade(config, "0005")
    engine.dispose()
    insert = "INSERT INTO ledger_command VALUES ('ten_a', 'live', ?, ?, 'grant', 1, 1, ?, '{}')"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(insert, ("cmd_1", 1, to_json(OLD_FACTS)))
        connection.execute(insert, ("cmd_2", 2, to_json(OLD_FACTS[1:2])))
    migrate(url_of(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (first,), (second,) = connection.execute("SELECT facts FROM ledger_command ORDER BY seq").fetchall()
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute("UPDATE ledger_command SET facts = '[]'")
    assert "metadata" not in first
    assert list(facts_from(first)) == facts_to_keep(OLD_FACTS)
    assert second == to_json(OLD_FACTS[1:2])


OLD_WALLET = wallet_row(Wallet(PAYER, "CREDIT", receivable=5, version=2, last_fact_us=1, blocks_opened=1))[:12]
OLD_BLOCK = block_row(Block(PAYER, "blk_1", 1, granted=100, created_at_us=1, effective_at_us=1, consumed=30))[:25]
"""Rows as they were before payments could be taken back."""


async def go_on(store: Store) -> None:
    """What is there of an older release can be added to, and taken back."""
    taken_back = Reverse(
        id="cmd_2", scope=PAYER.scope, wallet=PAYER, block_id="blk_1", taken=1, paid=2, frozen=True, revision=1
    )
    paid = TopUp(
        id="cmd_1", scope=PAYER.scope, wallet=PAYER, asset="CREDIT", block_id="blk_2", amount=50, payment="ord_1"
    )
    for command_ in (paid, taken_back):
        (outcome,) = await store.run_batch([command_])
        assert isinstance(outcome, Applied), outcome
    found = await store.wallet(PAYER)
    await store.close()
    assert found is not None
    assert (found.wallet.receivable, found.wallet.debts) == (0, Debts(repaid_paid=5))
    left = {block.id: (block.remaining, block.reversal.taken, block.reversal.frozen) for block in found.blocks}
    assert left == {"blk_1": (20, 50, True), "blk_2": (45, 0, False)}


def test_a_ledger_of_an_older_release_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    engine = create_engine(url_of(path))
    with engine.begin() as upgrading:
        config = configuration()
        config.attributes["connection"] = upgrading
        command.upgrade(config, "0010")
    engine.dispose()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for table, row in (("ledger_wallet", OLD_WALLET), ("ledger_block", OLD_BLOCK)):
            connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    migrate(url_of(path))

    async def run() -> None:
        await go_on(await SqliteStore.open(url_of(path), clock=now_us))

    asyncio.run(run())


def test_the_schema_that_the_code_is_written_for_is_the_end_of_the_history() -> None:
    assert ScriptDirectory.from_config(configuration()).get_current_head() == HEAD


def test_a_file_that_cannot_be_used_is_said_to_be_so(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("Not a database. " * 100)
    for path, reason in ((note, "not a database"), (note / "farebox.db", "exists"), (tmp_path, "unable")):
        with pytest.raises(StoreUnavailable, match=reason):
            migrate(url_of(path))
    assert note.read_text() == "Not a database. " * 100


def test_a_database_of_a_newer_farebox_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    migrate(url_of(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreUnavailable, match="newer"):
        migrate(url_of(path))


def test_a_migrated_file_has_its_write_ahead_log_before_anybody_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    migrate(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
