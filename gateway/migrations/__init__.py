"""One history for the gateway's tables and the ledger's. ``migrate`` brings a database to its end."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ledger.store.lock import ProcessLock
from ledger.store.postgres_connection import server_url
from ledger.store.protocol import SchemaMissing, StoreUnavailable
from ledger.store.sqlite import database_path

if TYPE_CHECKING:
    from alembic.config import Config

LOCK_WAIT_S = 60
"""How long to wait for another process that is migrating."""

CONNECT_TIMEOUT_S = 10.0
"""How long to wait for a PostgreSQL server to answer."""

_POSTGRESQL_LOCK: Final = 0x66617265626F78

HEAD: Final = max(path.stem[1:5] for path in (Path(__file__).parent / "versions").glob("v*.py"))
"""The revision that this code is written for."""


def migrate(database_url: str) -> None:
    """Create or upgrade the schema. Repeatable, and safe when several processes start at once.

    All of it is one transaction that holds the database's write lock, or a lock of its own on PostgreSQL: it happens as
    a whole or not at all. It may not be called while an event loop runs.

    Raises:
        ValueError: the URL names a database in memory, which would be gone when this returns.
        StoreUnavailable: the database cannot be made or used, or a newer Farebox has migrated it.
    """
    try:
        found = revision(database_url)
        _refuse_newer(found)
        if not _is_sqlite(database_url):
            # At the end of the history too: the gateway's role may have been lost, as by a restore on a new server.
            asyncio.run(_upgrade_postgresql(database_url))
        elif found != HEAD:
            _upgrade_sqlite(database_url)
    except (OSError, sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StoreUnavailable(str(error) or type(error).__name__) from error
    except OperationalError as error:
        raise StoreUnavailable(str(error.orig)) from error
    except DBAPIError as error:
        if isinstance(cause := error.driver_exception, asyncpg.PostgresError):
            raise StoreUnavailable(str(cause)) from error
        raise


def migrate_or_check(database_url: str) -> None:
    """What serving begins with: a file is migrated, a server must have been: `farebox migrate` does it as its owner.

    Raises:
        SchemaMissing: there is nothing in it yet.
        StoreUnavailable: as `migrate`; or the schema is behind.
    """
    if _is_sqlite(database_url):
        migrate(database_url)
        return
    found = revision(database_url)
    if found is None:
        raise SchemaMissing
    _refuse_newer(found)
    if found != HEAD:
        raise StoreUnavailable(f"its schema is at {found} and this Farebox needs {HEAD}: run `farebox migrate`")


def revision(database_url: str) -> str | None:
    """How far a database has been migrated; None where it has not.

    Raises:
        StoreUnavailable: it cannot be asked.
    """
    if _is_sqlite(database_url):
        return _revision_of_file(database_url)
    try:
        return asyncio.run(_revision_of_server(database_url))
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StoreUnavailable(str(error) or type(error).__name__) from error


def _is_sqlite(database_url: str) -> bool:
    return database_url.startswith("sqlite:")


def _refuse_newer(found: str | None) -> None:
    if found is not None and found > HEAD:
        raise StoreUnavailable(
            f"a newer Farebox has migrated it to {found}, and this one knows {HEAD}: use the newer one"
        )


def _upgrade_sqlite(database_url: str) -> None:
    _use_write_ahead_log(Path(database_path(database_url)))
    engine = _engine(database_url)
    try:
        with engine.begin() as connection:
            _upgrade(connection)
    finally:
        engine.dispose()


async def _upgrade_postgresql(database_url: str) -> None:
    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(server_url(database_url), timeout=CONNECT_TIMEOUT_S)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'")
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})")
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    # Alembic takes a third of a second to import, which a start on a current schema need not wait for.
    from alembic import command  # noqa: PLC0415

    config = configuration()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _use_write_ahead_log(path: Path) -> None:
    """Make the file one with a write-ahead log, for good: before anybody else opens it, and one process at a time.

    SQLite answers «locked» at once, rather than wait, where two connections switch the mode together.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = ProcessLock(str(path))
    try:
        with lock, closing(sqlite3.connect(path, timeout=LOCK_WAIT_S)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    finally:
        lock.close()


def _revision_of_file(database_url: str) -> str | None:
    path = Path(database_path(database_url))
    if not path.exists():
        return None
    with closing(sqlite3.connect(path, timeout=LOCK_WAIT_S)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").fetchone():
            return None
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if found is None else str(found[0])


async def _revision_of_server(database_url: str) -> str | None:
    connection = await asyncpg.connect(server_url(database_url), timeout=CONNECT_TIMEOUT_S)
    try:
        found = await connection.fetchval("SELECT version_num FROM alembic_version", timeout=CONNECT_TIMEOUT_S)
    except asyncpg.UndefinedTableError:
        return None
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)
    return None if found is None else str(found)


def configuration() -> "Config":
    """Alembic's settings: where the history is. The connection comes in its attributes."""
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _engine(database_url: str) -> Engine:
    path = database_path(database_url)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": LOCK_WAIT_S, "isolation_level": None})
    event.listen(engine, "begin", _begin_immediate)
    return engine


def _begin_immediate(connection: Connection) -> None:
    """Take the write lock first: who waits for it sees what the other one did. SQLite's driver would begin too late."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
