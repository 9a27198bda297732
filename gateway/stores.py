"""Which store keeps the ledger, by the database's URL: the seam for another one."""

from collections.abc import Callable
from typing import ClassVar, Final

from ledger.store.protocol import Store, Watcher
from ledger.store.sqlite import SqliteStore

SQLITE: Final = "sqlite:"


class StoreUnsupported(Exception):
    """No store of this version can keep a ledger there."""

    exit_code: ClassVar[int] = 2


def require_supported(database_url: str) -> None:
    """Raises StoreUnsupported."""
    if not database_url.startswith(SQLITE):
        kind = database_url.partition(":")[0]
        raise StoreUnsupported(
            f"This version keeps its books in SQLite: database_url must begin with sqlite:///, not {kind}:."
        )


async def open_store(database_url: str, *, clock: Callable[[], int], watcher: Watcher | None = None) -> Store:
    """The store behind *database_url*, open. SQLite tells no *watcher*: what is cached of it asks for the version.

    Raises:
        StoreUnsupported: there is none for this kind of database.
        SchemaMissing: it has no ledger in it yet. StoreUnavailable: it cannot be reached.
    """
    require_supported(database_url)
    return await SqliteStore.open(database_url, clock=clock)
