"""`farebox copy`: what arrives is what was sent, or nothing is."""

import asyncio
import json
import random
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace
from sqlalchemy import JSON, create_engine, insert
from sqlmodel import SQLModel

from gateway import copying
from gateway.billing.rollups import Rollups
from gateway.cli import main
from gateway.clock import now_us
from gateway.copying import CannotCopy, copy_installation
from gateway.database import Database
from gateway.identity.tenants import Tenants
from gateway.migrations import migrate
from gateway.payments.facts import Facts
from gateway.payments.observations import Observations
from gateway.payments.observed import Observed
from gateway.payments.operator import OperatorScope
from gateway.payments.processor_transactions import ProcessorTransactions
from gateway.payments.sweeps import Sweep, Sweeps, daily, forgetful
from ledger.model import Charge, Scope, Settlement
from ledger.store.sqlite import SqliteStore
from tests.gateway.office import open_office, paid_with
from tests.ledger.rig import SECOND_US, Clock, RandomCommands, Say, partition, usage
from tests.servers.postgres import database_of
from tests.servers.stripe import FakeStripe

LATER_US = 10**15


def quietly(source: str, target: str) -> dict[str, int]:
    return copy_installation(source, target, progress=lambda table, rows: None)


def rows_of(url: str, table: str) -> list[tuple[Any, ...]]:
    """A table's rows, by the plain means of each database: as a superuser, on PostgreSQL."""
    columns = SQLModel.metadata.tables[table].columns
    query = f"SELECT {', '.join(columns.keys())} FROM {table}"
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            found = connection.execute(query).fetchall()
        read = [json.loads if isinstance(column.type, JSON) else lambda value: value for column in columns]
        found = [
            tuple(None if value is None else of(value) for of, value in zip(read, row, strict=True)) for row in found
        ]
    else:
        with psycopg.connect(as_superuser(url)) as server:
            found = server.execute(query).fetchall()
    return sorted(found, key=lambda row: [str(int(value) if isinstance(value, bool) else value) for value in row])


def as_superuser(url: str) -> str:
    return re.sub("//[^@/]*@", "//postgres@", url)


def count(url: str, table: str) -> int:
    return len(rows_of(url, table))


async def trade(folder: Path, url: str, stripe: FakeStripe) -> None:
    """What a day at the office leaves."""
    async with open_office(folder, **paid_with(stripe)) as office:
        await office.fund_developer("500")
        for key in ("live", "test"):
            await office.post("/v1/billable-metrics", {"key": "grüße", "priority_max": 3}, key=key)
            price = {"billable_metric_key": "grüße", "cost_type": "per_unit", "unit_cost_decimal": "0.00012"}
            await office.post("/v1/metering-rules", price, key=key)
            await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 90_000}, key=key, once="top-up")
            answer = await office.ask(
                "POST",
                "/v1/chat/completions",
                {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Grüß dich! 你好 \u0000"}]},
                key=key,
                headers={"X-Quota-User": "alice"},
                once="chat",
            )
            assert answer.status_code == 200, answer.text
        await office.post("/v1/funding/pool", {"amount": 1}, once="pool")
        await office.post("/v1/packs", {"key": "hour", "name": "Hour", "price": 1, "credits": 2, "metrics": ["chat"]})
        await office.post("/v1/customers/alice/packs", {"pack": "hour"})
        everybody = {"subject": {"type": "tenant"}, "credits": 90_000, "period": {"every": "month"}, "name": "Grüße"}
        await office.post("/v1/budgets", everybody, key="owner")
        await office.post("/v1/checkout", {"customer_id": "alice", "package_id": "usd-5"})
        await office.post("/v1/webhook-endpoints", {"url": "https://receiver.invalid/"})
        seen = Observed("evt_1", "payment_intent.succeeded", "pi_1", None, Facts(amount_refunded=1))
        await Observations(office.gateway.services.database).keep(Scope(office.tenant, "test"), seen)
        await office.post("/v1/customers", {"external_id": "bob", "metadata": {"plan": ["é", 1, None]}}, once="bob")
        await office.post("/v1/topup/grant", {"customer_id": "bob", "credits": 1})
        deadline = asyncio.get_running_loop().time() + 20
        while not count(url, "webhook_lanes"):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)


async def fill(url: str, seed: random.Random) -> None:
    """A row at least in every table, and a ledger with a past."""
    folder = Path(url.removeprefix("sqlite:///")).parent
    with FakeStripe() as stripe:
        await trade(folder, url, stripe)
    clock = Clock(us=now_us() + LATER_US)
    store = await SqliteStore.open(url, clock=clock)
    source = RandomCommands(seed)
    for _ in range(3):
        clock.us += 15 * SECOND_US
        for batch in partition(source.take(100, clock.us), seed, 64):
            await store.run_batch(batch)
    say, noted = Say(Scope("ten_noted", "live")), Settlement((Charge(5),), usage("noted", metadata={"note": "é"}))
    await store.run_batch([say.grant("noted", "noted", 5), replace(say.debit("noted", "noted", 5), settlement=noted)])
    await store.close()
    database = Database(url)
    while await Rollups(database).fold():
        pass
    await keep_books(database)
    await database.close()


async def keep_books(database: Database) -> None:
    """What a night of comparing with the payment processor leaves."""
    operator = OperatorScope(Tenants(database), "test")
    movement = {"id": "txn_1", "type": "payout", "amount": -5, "fee": 0, "net": -5, "currency": "usd", "created": 7}
    await ProcessorTransactions(database).keep(await operator(), [movement])
    sweep = Sweep(name="nightly", schedule=daily(3), work=forgetful(operator))
    assert not await Sweeps(database, operator, now_us=Clock(us=LATER_US)).run_if_due(sweep)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of an installation with something of everything in it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('full') / 'farebox.db'}"
    migrate(url)
    asyncio.run(fill(url, random.Random(7)))
    empty = [table for table in SQLModel.metadata.tables if not count(url, table)]
    assert empty == [], "the test says nothing of a table that is empty"
    return url


@pytest.fixture
def source(full: str, tmp_path: Path) -> str:
    """A copy of it for a test that changes it."""
    path = tmp_path / "source.db"
    with closing(sqlite3.connect(full.removeprefix("sqlite:///"))) as there, closing(sqlite3.connect(path)) as here:
        there.backup(here)
    return f"sqlite:///{path}"


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A target, where it does not matter which."""
    return f"sqlite:///{tmp_path / 'target.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'target.db'}"
    return owned(request.getfixturevalue("postgres_url"))


def owned(url: str) -> str:
    """The URL of the same database for a role that owns it and may do nothing else: policies hold it."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DO $$ BEGIN CREATE ROLE copies LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        connection.execute(f'ALTER DATABASE "{database_of(url)}" OWNER TO copies')
        connection.execute("ALTER SCHEMA public OWNER TO copies")
    return url.replace("//postgres@", "//copies@")


def test_every_row_of_every_table_arrives(source: str, target: str) -> None:
    told: dict[str, int] = {}
    rows = copy_installation(source, target, progress=told.__setitem__)
    assert rows == {table: count(source, table) for table in SQLModel.metadata.tables} == told
    for table in SQLModel.metadata.tables:
        assert rows_of(target, table) == rows_of(source, table), table


def test_a_superuser_copies_the_same(source: str, postgres_url: str) -> None:
    assert quietly(source, postgres_url) == {table: count(source, table) for table in SQLModel.metadata.tables}
    assert rows_of(postgres_url, "ledger_transfer") == rows_of(source, "ledger_transfer")


def test_a_copy_can_come_back(source: str, target: str, tmp_path: Path) -> None:
    """From PostgreSQL into a file, too: what comes back is what left."""
    quietly(source, target)
    again = f"sqlite:///{tmp_path / 'again.db'}"
    quietly(target, again)
    for table in SQLModel.metadata.tables:
        assert rows_of(again, table) == rows_of(source, table), table


def test_a_page_is_all_that_memory_holds(source: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PAGE_ROWS", 10)
    pages: list[int] = []
    copy_installation(
        source, target, progress=lambda table, rows: pages.append(rows) if table == "ledger_key" else None
    )
    assert pages == [min(done, count(source, "ledger_key")) for done in range(10, count(source, "ledger_key") + 10, 10)]
    assert rows_of(target, "ledger_command") == rows_of(source, "ledger_command")


def test_the_copy_is_served_like_the_original(
    source: str, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command copies and verifies; the journal's numbers go on behind those that came along."""
    assert command(source, target, monkeypatch, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["entries"] == count(source, "ledger_command") == report["rows"]["ledger_command"]
    monkeypatch.setenv("FAREBOX_DATABASE_URL", target)
    assert run(monkeypatch, "grant", "alice", "5") == 0
    assert run(monkeypatch, "verify") == 0
    assert count(target, "ledger_command") == count(source, "ledger_command") + 1


def test_a_copy_into_what_is_not_empty_is_refused(source: str, target: str) -> None:
    quietly(source, target)
    before = {table: rows_of(target, table) for table in SQLModel.metadata.tables}
    with pytest.raises(CannotCopy, match="empty database"):
        quietly(source, target)
    assert {table: rows_of(target, table) for table in SQLModel.metadata.tables} == before


def test_a_ledger_alone_makes_a_target_not_empty(source: str, target: str) -> None:
    migrate(target)
    row = {"tenant": "ten_x", "mode": "live", "operation": "chat", "key": "k", "digest": "d", "result": "{}"}
    engine = create_engine(as_superuser(target).replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(insert(SQLModel.metadata.tables["ledger_key"]), row)
    engine.dispose()
    with pytest.raises(CannotCopy, match="empty database"):
        quietly(source, target)


def test_a_copy_that_fails_leaves_the_target_empty_and_can_be_made_again(source: str, target: str) -> None:
    """A customer without a tenant cannot arrive, and comes late: much was written before."""
    with closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as connection:
        connection.execute("UPDATE customers SET tenant = 'ten_gone' WHERE rowid = (SELECT min(rowid) FROM customers)")
        connection.commit()
    with pytest.raises(CannotCopy, match=r"nothing was kept of it: .*(?i:foreign key)"):
        quietly(source, target)
    assert {table: count(target, table) for table in SQLModel.metadata.tables if count(target, table)} == {}
    with closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as connection:
        connection.execute("DELETE FROM customers WHERE tenant = 'ten_gone'")
        connection.commit()
    assert quietly(source, target)["customers"] == count(source, "customers")


def test_a_connection_that_is_cut_leaves_the_target_empty(source: str, postgres_url: str) -> None:
    def cut(table: str, rows: int) -> None:
        if table == "ledger_wallet":
            with psycopg.connect(postgres_url, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )

    with pytest.raises(CannotCopy, match="nothing was kept of it"):
        copy_installation(source, postgres_url, progress=cut)
    assert count(postgres_url, "ledger_command") == 0
    assert quietly(source, postgres_url)["ledger_command"] == count(source, "ledger_command")


def test_a_copy_that_arrives_otherwise_is_not_kept(source: str, file: str) -> None:
    """As if the target had stored a number otherwise than it was told to."""
    migrate(file)
    with closing(sqlite3.connect(file.removeprefix("sqlite:///"))) as connection:
        connection.execute(
            "CREATE TRIGGER changes AFTER INSERT ON ledger_wallet"
            " BEGIN UPDATE ledger_wallet SET receivable = receivable + 1 WHERE wallet = NEW.wallet; END"
        )
        connection.commit()
    with pytest.raises(CannotCopy, match="ledger_wallet did not arrive as it was sent"):
        quietly(source, file)
    assert count(file, "ledger_wallet") == count(file, "tenants") == 0


async def test_an_installation_in_use_is_not_copied(source: str, file: str) -> None:
    """A store that has the file open, as a gateway has, is enough, whether it writes or not."""
    store = await SqliteStore.open(source, clock=Clock())
    with pytest.raises(CannotCopy, match="stop the gateways"):
        await asyncio.to_thread(quietly, source, file)
    await store.close()
    assert (await asyncio.to_thread(quietly, source, file))["tenants"] == 2


def test_nobody_opens_the_source_while_it_is_copied(source: str, file: str) -> None:
    refused: list[str] = []

    def open_it(table: str, rows: int) -> None:
        with closing(sqlite3.connect(source.removeprefix("sqlite:///"), timeout=0)) as connection:
            try:
                connection.execute("SELECT 1 FROM tenants").fetchone()
            except sqlite3.OperationalError as error:
                refused.append(str(error))

    copy_installation(source, file, progress=open_it)
    assert set(refused) == {"database is locked"}
    assert len(refused) >= len(SQLModel.metadata.tables)


def test_a_source_of_another_schema_is_refused(source: str, file: str) -> None:
    with closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
        connection.commit()
    with pytest.raises(CannotCopy, match="run `farebox migrate` on it first"):
        quietly(source, file)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("sqlite:///nothing.db", "sqlite:///target.db", "There is no file nothing.db"),
        ("sqlite:///same.db", "sqlite:///same.db", "same database"),
    ],
)
def test_what_cannot_be_copied_is_said_before_anything_is_made(
    source: str, target: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "same" in source:
        migrate(source)
    before = set(tmp_path.iterdir())
    with pytest.raises(CannotCopy, match=said):
        quietly(source, target)
    assert set(tmp_path.iterdir()) == before


def test_a_target_that_is_no_database_is_a_usage_error(
    source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(source, "mysql://root:hunter2@db/x", monkeypatch) == 2
    said = capsys.readouterr().err
    assert "--to" in said
    assert "hunter2" not in said


def command(source: str, target: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    monkeypatch.setenv("FAREBOX_DATABASE_URL", source)
    return run(monkeypatch, "copy", "--to", target, *options)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr("sys.argv", ["farebox", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0
