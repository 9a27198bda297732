"""Which store keeps the ledger, by the database's URL: the seam for another one."""

from collections.abc import Callable
from typing import ClassVar, Final, Protocol

from ledger.store.postgres import PostgresStore
from ledger.store.postgres_connection import connect, translated
from ledger.store.protocol import Store, Watcher
from ledger.store.sqlite import SqliteStore, database_path

SQLITE: Final = "sqlite:"
POSTGRES: Final = ("postgresql:", "postgres:", "postgresql+asyncpg:")


class OpenStore(Protocol):
    """What opens the store behind a URL, as `open_store` does."""

    async def __call__(
        self, database_url: str, *, clock: Callable[[], int], watcher: Watcher | None = None
    ) -> Store: ...


class StoreUnsupported(Exception):
    """No store of this version can keep a ledger there."""

    exit_code: ClassVar[int] = 2


def require_supported(database_url: str) -> None:
    """Raises StoreUnsupported."""
    if not database_url.startswith((SQLITE, *POSTGRES)):
        kind = database_url.partition(":")[0]
        raise StoreUnsupported(
            f"Farebox keeps its books in SQLite or PostgreSQL: database_url must begin with sqlite:/// or "
            f"postgresql://, not {kind}:."
        )


async def open_store(database_url: str, *, clock: Callable[[], int], watcher: Watcher | None = None) -> Store:
    """The store behind *database_url*, open.

    Args:
        clock: tells the time of batches where the database is a file. A server has one, the same for all hosts.
        watcher: is told of the wallets of every batch, where several processes can share the database's server.

    Raises:
        StoreUnsupported: there is none for this kind of database.
        SchemaMissing: it has no ledger in it yet. StoreUnavailable: it cannot be reached.
    """
    require_supported(database_url)
    if database_url.startswith(SQLITE):
        return await SqliteStore.open(database_url, clock=clock)
    return await PostgresStore.open(database_url, watcher=watcher)


async def whereabouts(database_url: str) -> str:
    """Where the books are kept, and as whom we work on them, in words for people and without a secret.

    Raises:
        SchemaMissing: it has no ledger in it yet. StoreUnavailable: it cannot be reached, or would show us everything.
    """
    if database_url.startswith(SQLITE):
        return f"SQLite, {database_path(database_url)}"
    connection = await connect(database_url)
    try:
        with translated():
            database, role, login, host, port, version = await connection.fetchrow(_WHEREABOUTS)  # type: ignore[misc]
    finally:
        connection.terminate()
    place = f" on {host}:{port}" if host else ""
    return f"PostgreSQL {version}, {database}{place}, as {role}" + (f", logged in as {login}" if login != role else "")


_WHEREABOUTS: Final = (
    "SELECT current_database()::text, current_user::text, session_user::text, host(inet_server_addr()),"
    " inet_server_port(), split_part(current_setting('server_version'), ' ', 1)"
)
