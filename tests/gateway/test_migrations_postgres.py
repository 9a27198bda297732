"""On PostgreSQL too the migrations lead to the models' schema; and to rows that only who names their tenant can see."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import SQLModel

import gateway.tables  # noqa: F401  (fills the metadata)
import ledger.store.tables  # noqa: F401  (fills the metadata)
from gateway.migrations import HEAD, configuration, migrate, migrate_or_check, revision
from ledger.erasable import facts_to_keep
from ledger.model import Scope
from ledger.store.postgres import PostgresStore
from ledger.store.protocol import SchemaMissing, StoreUnavailable
from ledger.store.row_security import BECOME_GATEWAY, BYPASSES, GATEWAY_ROLE, naming
from ledger.store.rows import facts_from, to_json
from tests.gateway.test_migrations import OLD_BLOCK, OLD_FACTS, OLD_WALLET, PAYER, go_on, meant_for
from tests.servers.postgres import QUICK, PostgresServer, database_of

JOURNAL = ("ledger_command", "ledger_transfer")
COMMAND = "INSERT INTO ledger_command VALUES (%s, 'live', 'cmd', 1, 'grant', 1, 1, '[]', '{}')"
TRANSFER = "INSERT INTO ledger_transfer VALUES (%s, 'live', 1, 0, 'clearing', 'wallet:w', 5, 'CREDIT', '', NULL, 1)"
TENANT = "INSERT INTO tenants VALUES (%s, 'Acme', false, 'CREDIT', 0, '{}', 1)"

COLUMNS = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname <> 'alembic_version'
"""
CONSTRAINTS = """
SELECT conrelid::regclass::text, contype::text, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND conrelid <> 0 AND conrelid::regclass::text <> 'alembic_version'
"""
INDEXES = "SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
SECURED = """
SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity,
       EXISTS (SELECT FROM pg_policy AS p WHERE p.polrelid = c.oid AND p.polname = 'farebox_named'
               AND p.polqual IS NOT NULL AND p.polwithcheck IS NOT NULL AND p.polcmd = '*')
FROM pg_class AS c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
"""


def on(url: str, work: Any) -> Any:
    """What *work* makes of SQLAlchemy's connection to *url*."""

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(url)

    async def run() -> Any:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
        async with engine.begin() as connection:
            return await connection.run_sync(work)

    return asyncio.run(run())


def schema(url: str) -> set[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return {row for query in (COLUMNS, CONSTRAINTS, INDEXES) for row in connection.execute(query)}


def migrate_to(url: str, revision: str) -> None:
    """As far as *revision*, as an older Farebox did."""

    def upgrade(connection: Connection) -> None:
        config = configuration()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    on(url, upgrade)


@pytest.fixture
def owner_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database whose owner may make roles, but is no superuser."""
    url = postgres_server.create_database()
    owner = f"owner_of_{database_of(url)}"
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {owner} LOGIN CREATEROLE")
        connection.execute(f"ALTER DATABASE {database_of(url)} OWNER TO {owner}")
    yield postgres_server.url_of(database_of(url), user=owner)
    postgres_server.drop_database(url)
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"DROP ROLE {owner}")


def test_the_migrations_lead_to_the_schema_of_the_models(postgres_url: str, owner_url: str) -> None:
    migrate(postgres_url)
    on(owner_url, SQLModel.metadata.create_all)
    assert schema(postgres_url) == schema(owner_url)
    assert schema(postgres_url)


def test_alembic_finds_nothing_to_change(postgres_url: str) -> None:
    migrate(postgres_url)
    opts = {"include_object": meant_for("postgresql")}
    found = on(
        postgres_url,
        lambda made: compare_metadata(MigrationContext.configure(made, opts=opts), SQLModel.metadata),
    )
    assert found == []


def test_every_table_has_a_policy_that_holds_its_owner_too(postgres_url: str) -> None:
    migrate(postgres_url)
    with psycopg.connect(postgres_url) as connection:
        found = {row[0]: row[1:] for row in connection.execute(SECURED)}
    del found["alembic_version"]
    assert found.keys() == SQLModel.metadata.tables.keys()
    assert {table for table, secured in found.items() if secured != (True, True, True)} == set()


def test_migrating_again_changes_nothing(postgres_url: str) -> None:
    migrate(postgres_url)
    before = schema(postgres_url)
    migrate(postgres_url)
    migrate_or_check(postgres_url)
    assert schema(postgres_url) == before


def test_rows_of_the_first_release_are_there_afterwards_and_only_for_who_names_them(owner_url: str) -> None:
    migrate_to(owner_url, "0002")
    with psycopg.connect(owner_url) as connection:
        for tenant in ("ten_a", "ten_b"):
            for insert in (TENANT, COMMAND, TRANSFER):
                connection.execute(insert, (tenant,))
    migrate(owner_url)
    with psycopg.connect(owner_url) as connection:
        tables = ("tenants", *JOURNAL)
        for table in tables:
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        connection.execute(naming([Scope("ten_a", "live")]))
        for table in tables:
            rows = connection.execute(f"SELECT * FROM {table}").fetchall()
            assert [row[0] for row in rows] == ["ten_a"], table
        scopes = connection.execute("SELECT * FROM farebox_ledger_scopes()").fetchall()
        assert sorted(scopes) == [("ten_a", "live"), ("ten_b", "live")]
        assert connection.execute("SELECT nextval('farebox_journal')").fetchone() == (2,), "one is taken"
        # What the caller had named is as it was.
        assert connection.execute("SELECT id FROM tenants").fetchall() == [("ten_a",)]


def test_the_journal_of_an_older_release_loses_its_metadata_and_nothing_else(owner_url: str) -> None:
    migrate_to(owner_url, "0005")
    insert = "INSERT INTO ledger_command VALUES (%s, 'live', 'cmd', 1, 'grant', 1, 1, %s, '{}')"
    with psycopg.connect(owner_url) as connection:
        connection.execute(naming([Scope("ten_a", "live"), Scope("ten_b", "live")]))
        for tenant, facts in (("ten_a", OLD_FACTS), ("ten_b", OLD_FACTS[1:2])):
            connection.execute(insert, (tenant, to_json(facts)))
    migrate(owner_url)
    with psycopg.connect(owner_url) as connection:
        connection.execute(naming([Scope("ten_a", "live"), Scope("ten_b", "live")]))
        found = dict(connection.execute("SELECT tenant, facts FROM ledger_command").fetchall())
        assert list(facts_from(found["ten_a"])) == facts_to_keep(OLD_FACTS)
        assert found["ten_b"] == to_json(OLD_FACTS[1:2])
        with pytest.raises(psycopg.errors.IntegrityError, match="append-only"):
            connection.execute("UPDATE ledger_command SET facts = '[]'")


def test_a_ledger_of_an_older_release_goes_on(owner_url: str) -> None:
    migrate_to(owner_url, "0010")
    with psycopg.connect(owner_url) as connection:
        connection.execute(naming([PAYER.scope]))
        for table, row in (("ledger_wallet", OLD_WALLET), ("ledger_block", OLD_BLOCK)):
            connection.execute(f"INSERT INTO {table} VALUES ({', '.join(['%s'] * len(row))})", row)
    migrate(owner_url)

    async def run() -> None:
        await go_on(await PostgresStore.open(owner_url, clock=None))

    asyncio.run(run())


def test_processes_that_start_at_once_migrate_once(postgres_server: PostgresServer) -> None:
    # Roles are the cluster's: two databases that are migrated at once want to make the same one.
    urls = [postgres_server.create_database() for _ in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", f"from gateway.migrations import migrate; migrate({url!r})"],
            stderr=subprocess.PIPE,
            cwd=Path.cwd(),
        )
        for url in urls * 2
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    for url in urls:
        assert revision(url) == HEAD
        postgres_server.drop_database(url)


def test_an_owner_makes_the_role_and_works_as_it() -> None:
    server = PostgresServer(settings=QUICK).create().start()
    try:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE ROLE owner LOGIN CREATEROLE")
            connection.execute("CREATE DATABASE farebox OWNER owner")
        url = server.url_of("farebox", user="owner")
        migrate(url)
        with psycopg.connect(url) as connection:
            assert connection.execute(BECOME_GATEWAY).fetchall() == [(GATEWAY_ROLE,)]
            assert connection.execute("SELECT current_user").fetchone() == (GATEWAY_ROLE,)
            assert connection.execute(BYPASSES).fetchone() == (False,)
            kind = connection.execute(
                "SELECT rolsuper, rolbypassrls, rolcanlogin FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
            assert kind == (False, False, False)
            for table in JOURNAL:
                for verb, allowed in (("SELECT", True), ("INSERT", True), ("UPDATE", False), ("DELETE", False)):
                    may = connection.execute("SELECT has_table_privilege(%s, %s)", (table, verb)).fetchone()
                    assert may == (allowed,), (table, verb)
            assert connection.execute("SELECT * FROM farebox_tenants()").fetchall() == []
        with psycopg.connect(server.url_of("farebox")) as connection:
            assert connection.execute(BYPASSES).fetchone() == (True,)
            assert connection.execute(BECOME_GATEWAY).fetchall() == [(GATEWAY_ROLE,)]
            assert connection.execute(BYPASSES).fetchone() == (False,)
    finally:
        server.close()


def test_an_owner_who_may_make_no_role_works_under_the_policies_itself(postgres_server: PostgresServer) -> None:
    url = postgres_server.create_database()
    name = database_of(url)
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE plain_{name} LOGIN")
        connection.execute(f"ALTER DATABASE {name} OWNER TO plain_{name}")
    plain = postgres_server.url_of(name, user=f"plain_{name}")
    migrate(plain)
    with psycopg.connect(plain) as connection:
        assert connection.execute(BECOME_GATEWAY).fetchall() == []
        assert connection.execute(BYPASSES).fetchone() == (False,)
        connection.execute(naming([Scope("ten_a", "live")]))
        connection.execute(TENANT, ("ten_a",))
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            connection.execute(TENANT, ("ten_b",))
    postgres_server.drop_database(url)


@pytest.mark.parametrize("table", JOURNAL)
@pytest.mark.parametrize("verb", ["UPDATE {} SET seq = seq + 1", "DELETE FROM {}", "TRUNCATE {}"])
def test_the_journal_refuses_edits_even_a_superusers(postgres_url: str, table: str, verb: str) -> None:
    migrate(postgres_url)
    with psycopg.connect(postgres_url) as connection:
        connection.execute(COMMAND, ("ten_a",))
        connection.execute(TRANSFER, ("ten_a",))
        with pytest.raises(psycopg.errors.IntegrityError, match="append-only"):
            connection.execute(verb.format(table))


def test_a_migration_that_fails_leaves_nothing(postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE tenants (unlike TEXT)")
    with pytest.raises(StoreUnavailable, match='"tenants" already exists'):
        migrate(postgres_url)
    assert {row[0] for row in schema(postgres_url)} == {"tenants"}


def test_serving_says_what_to_do_about_a_schema_that_is_not_ours(postgres_url: str) -> None:
    with pytest.raises(SchemaMissing):
        migrate_or_check(postgres_url)
    migrate_to(postgres_url, "0002")
    with pytest.raises(StoreUnavailable, match="run `farebox migrate`"):
        migrate_or_check(postgres_url)
    migrate(postgres_url)
    with psycopg.connect(postgres_url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    for refused in (migrate, migrate_or_check):
        with pytest.raises(StoreUnavailable, match="newer Farebox"):
            refused(postgres_url)


def test_a_server_that_is_not_there_is_named(postgres_server: PostgresServer) -> None:
    for url in ("postgresql://postgres@127.0.0.1:1/farebox", postgres_server.url_of("no_such_database")):
        for attempt in (migrate, migrate_or_check):
            with pytest.raises(StoreUnavailable, match=r"refused|does not exist|Connect call failed"):
                attempt(url)
