"""The connection to the gateway's own tables: SQLite by default, PostgreSQL in production.

How it works on SQLite: one writer at a time. The ledger's processes queue for the file on `<database>-lock`, because
SQLite's own busy handler polls and would starve whoever waits; a write here takes its place in the same queue, one
write a process, and begins with BEGIN IMMEDIATE. Reads never wait for a write (WAL). `synchronous=FULL`: a customer
that was answered is on disk, since a wallet may hang on it.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Final, Protocol

from sqlalchemy import Connection, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlmodel import SQLModel

BUSY_TIMEOUT_MS: Final = 5_000
TURN_TIMEOUT_S: Final = 10
DRIVERS: Final = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}


class Transactions(Protocol):
    """Where statements run: a database, which opens a transaction for each block, or a transaction that is open."""

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]: ...

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]: ...


class DatabaseUnavailable(Exception):
    """The database cannot be reached, is locked for too long, or has not been migrated; the cause says which."""


class Database:
    """Reads and writes of the gateway's own tables.

    Args:
        url: `sqlite:///path` or `postgresql://…`, as in the settings.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        dialect = parsed.get_backend_name()
        self.engine: AsyncEngine = create_async_engine(
            # What a failed statement carried may be anybody's data; it must not reach the log with the error.
            parsed.set(drivername=DRIVERS[dialect]),
            hide_parameters=True,
        )
        self._writing = asyncio.Lock()
        self._path: str | None = None
        self._lock_path: str | None = None
        self._file: tuple[int, int] | None = None
        if dialect == "sqlite":
            self._path = parsed.database
            self._lock_path = f"{parsed.database}-lock"
            event.listen(self.engine.sync_engine, "connect", self._connected)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)
        self._writer = self.engine.execution_options(farebox_writes=True)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction of its own, for reading.

        Raises:
            DatabaseUnavailable
        """
        with _unavailable():
            async with self.engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction that commits at the end of the block, durably, or not at all.

        Raises:
            DatabaseUnavailable
        """
        with _unavailable():
            async with self._turn(), self._writer.begin() as connection:
                yield connection

    async def check(self) -> None:
        """Whether it answers, and a SQLite file is still the one that was opened: what is written to one that was
        removed or replaced is gone with the process.

        Raises:
            DatabaseUnavailable
        """
        async with self.read() as connection:
            await connection.execute(text("SELECT 1 FROM tenants LIMIT 1"))
        if self._path is not None and _file_at(self._path) != self._file:
            raise DatabaseUnavailable(f"{self._path} is no longer the file that was opened; restart")

    async def close(self) -> None:
        await self.engine.dispose()

    def _connected(self, connection: Any, _record: object) -> None:
        _set_up_sqlite(connection)
        if self._path is not None and self._file is None:
            self._file = _file_at(self._path)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The turn to write: in this process, then among all writers of the SQLite file."""
        async with asyncio.timeout(TURN_TIMEOUT_S):
            await self._writing.acquire()
        try:
            descriptor = await _locked_soon(self._lock_path) if self._lock_path else None
            try:
                yield
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        finally:
            self._writing.release()


class Joined:
    """Transactions that are part of one that is open already: they commit, or not, with it."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        return nullcontext(self._connection)

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        return nullcontext(self._connection)


def insert_new(table: type[SQLModel], dialect: str) -> Any:
    """An INSERT that leaves a row that is there already as it is, in the words of the database."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(table).on_conflict_do_nothing()


class _unavailable:  # noqa: N801 - reads as a statement
    """Turns a driver's infrastructure errors into ours; an integrity error stays what it is."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OperationalError | InterfaceError | PoolTimeout | OSError):
            raise DatabaseUnavailable(str(error.__cause__ or error)) from error


def _set_up_sqlite(connection: Any) -> None:
    # The driver must not begin transactions by itself: it would begin them as readers, which then fail as writers.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.close()


def _file_at(path: str) -> tuple[int, int] | None:
    """Which file *path* names now; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("farebox_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


async def _locked_soon(path: str) -> int:
    """As `_locked`, off the event loop, for TURN_TIMEOUT_S at most."""
    waiting = asyncio.ensure_future(asyncio.to_thread(_locked, path))
    try:
        return await asyncio.wait_for(asyncio.shield(waiting), TURN_TIMEOUT_S)
    except (asyncio.CancelledError, TimeoutError):
        # The thread cannot be stopped: it gets its turn later, and gives it back at once.
        waiting.add_done_callback(lambda late: None if late.exception() else os.close(late.result()))
        raise


def _locked(path: str) -> int:
    """A descriptor that holds the lock on *path*; closing it gives the lock back."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
