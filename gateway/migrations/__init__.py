"""One history for the gateway's tables and the ledger's. ``migrate`` brings a database to its end."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url

from ledger.store.sqlite import database_path

LOCK_WAIT_S = 60
"""How long to wait for another process that is migrating."""

_POSTGRESQL_LOCK = 0x66617265626F78


def migrate(database_url: str) -> None:
    """Create or upgrade the schema. Repeatable, and safe when several processes start at once.

    All of it is one transaction that holds the database's write lock: it happens as a whole or not at all.

    Raises:
        ValueError: the URL names a database in memory, which would be gone when this returns.
    """
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


def configuration() -> Config:
    """Alembic's settings: where the history is. The connection comes in its attributes."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _engine(database_url: str) -> Engine:
    if make_url(database_url).get_backend_name() != "sqlite":
        return create_engine(database_url)
    path = Path(database_path(database_url))
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": LOCK_WAIT_S, "isolation_level": None})
    event.listen(engine, "begin", _begin_immediate)
    return engine


def _begin_immediate(connection: Connection) -> None:
    """Take the write lock first: who waits for it sees what the other one did. SQLite's driver would begin too late."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
