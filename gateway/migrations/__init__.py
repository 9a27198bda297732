"""One history for the gateway's tables and the ledger's. ``migrate`` brings a database to its end."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from ledger.store.lock import ProcessLock
from ledger.store.protocol import StoreUnavailable
from ledger.store.sqlite import database_path

if TYPE_CHECKING:
    from alembic.config import Config

LOCK_WAIT_S = 60
"""How long to wait for another process that is migrating."""

_POSTGRESQL_LOCK = 0x66617265626F78

HEAD: Final = max(path.stem[1:5] for path in (Path(__file__).parent / "versions").glob("v*.py"))
"""The revision that this code is written for."""


def migrate(database_url: str) -> None:
    """Create or upgrade the schema. Repeatable, and safe when several processes start at once.

    All of it is one transaction that holds the database's write lock: it happens as a whole or not at all.

    Raises:
        ValueError: the URL names a database in memory, which would be gone when this returns.
        StoreUnavailable: the file cannot be made or used, or a newer Farebox has migrated it.
    """
    try:
        revision = _revision(database_url)
        if revision is not None and revision > HEAD:
            raise StoreUnavailable(f"a newer Farebox has migrated it to {revision}, and this one knows {HEAD}")
        if revision != HEAD:
            _upgrade(database_url)
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailable(str(error)) from error
    except OperationalError as error:
        raise StoreUnavailable(str(error.orig)) from error


def _upgrade(database_url: str) -> None:
    # Alembic takes a third of a second to import, which a start on a current schema need not wait for.
    from alembic import command  # noqa: PLC0415

    if make_url(database_url).get_backend_name() == "sqlite":
        _use_write_ahead_log(Path(database_path(database_url)))
    engine = _engine(database_url)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _POSTGRESQL_LOCK})
            config = configuration()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


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


def _revision(database_url: str) -> str | None:
    """How far a SQLite file has been migrated; None where it has not, or where it is not SQLite."""
    if make_url(database_url).get_backend_name() != "sqlite":
        return None
    path = Path(database_path(database_url))
    if not path.exists():
        return None
    with closing(sqlite3.connect(path, timeout=LOCK_WAIT_S)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").fetchone():
            return None
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if found is None else str(found[0])


def configuration() -> "Config":
    """Alembic's settings: where the history is. The connection comes in its attributes."""
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _engine(database_url: str) -> Engine:
    if make_url(database_url).get_backend_name() != "sqlite":
        return create_engine(database_url)
    path = database_path(database_url)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": LOCK_WAIT_S, "isolation_level": None})
    event.listen(engine, "begin", _begin_immediate)
    return engine


def _begin_immediate(connection: Connection) -> None:
    """Take the write lock first: who waits for it sees what the other one did. SQLite's driver would begin too late."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
