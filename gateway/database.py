"""The connection to the gateway's own tables: SQLite by default, PostgreSQL in production.

How it works on SQLite: one writer at a time. The ledger's processes queue for the file on `<database>-lock`, because
SQLite's own busy handler polls and would starve whoever waits; a write here takes its place in the same queue, one
write a process, and begins with BEGIN IMMEDIATE. Reads never wait for a write (WAL). `synchronous=FULL`: a customer
that was answered is on disk, since a wallet may hang on it.

How it works on PostgreSQL: each transaction first names the rows that it touches, which are all that it sees and may
write. Nothing has happened yet when that fails because the server was restarted, so another connection is tried.
"""

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Final, NamedTuple, Protocol
from weakref import WeakSet

from sqlalchemy import Connection, TextClause, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlmodel import SQLModel

from gateway.postgres import ACQUIRE_TIMEOUT_S, CONNECTIONS_MAX, TRANSACTION_TIMEOUT_S, open_engine, unavailable
from ledger.store.row_security import checked

BUSY_TIMEOUT_MS: Final = 5_000
TURN_TIMEOUT_S: Final = 10


class Rows(NamedTuple):
    """Which rows a transaction touches: those of a tenant as a whole, and its data of these modes."""

    tenant: str
    modes: tuple[str, ...]

    def cover(self, other: "Rows") -> bool:
        return self.tenant == other.tenant and set(self.modes) >= set(other.modes)


def of(tenant: str, *modes: str) -> Rows:
    """The tenant, its assets, apps and keys; and its live or test data where *modes* say so.

    Raises:
        ValueError: a name that no tenant or mode can have.
    """
    return Rows(checked(tenant), tuple(map(checked, modes)))


NOBODY: Final = Rows("", ())
"""No rows at all."""


class Transactions(Protocol):
    """Where statements run: a database, which opens a transaction for each block, or a transaction that is open."""

    def read(self, rows: Rows) -> AbstractAsyncContextManager[AsyncConnection]: ...

    def write(self, rows: Rows) -> AbstractAsyncContextManager[AsyncConnection]: ...


class DatabaseUnavailable(Exception):
    """The database cannot be reached, is locked for too long, or has not been migrated; the cause says which."""


class _Opening(NamedTuple):
    """The statement that a transaction on PostgreSQL begins with."""

    statement: TextClause
    values: Mapping[str, str]


_NAMED: Final = text(
    "SELECT set_config('farebox.scopes', :scopes, true), set_config('farebox.tenants', :tenants, true)"
)
_OF_KEY: Final = text("SELECT set_config('farebox.tenants', coalesce(farebox_tenant_of_key(:key_id), ''), true)")
_EVERY_TENANT: Final = text(
    "SELECT set_config('farebox.tenants', coalesce(string_agg(tenant, ','), ''), true) FROM farebox_tenants()"
)


class Database:
    """Reads and writes of the gateway's own tables.

    Args:
        url: `sqlite:///path` or `postgresql://…`, as in the settings.
    """

    def __init__(self, url: str) -> None:
        self._writing = asyncio.Lock()
        self._path: str | None = None
        self._file: tuple[int, int] | None = None
        if url.startswith("sqlite:"):
            parsed = make_url(url)
            self._path = parsed.database
            self.engine: AsyncEngine = create_async_engine(
                parsed.set(drivername="sqlite+aiosqlite"),
                connect_args={"factory": _SqliteConnection},
                hide_parameters=True,  # They may be anybody's data; with an error they would reach the log.
            )
            event.listen(self.engine.sync_engine, "connect", self._connected)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)
        else:
            self.engine = open_engine(url)
        self._writer = self.engine.execution_options(farebox_writes=True)

    @asynccontextmanager
    async def read(self, rows: Rows) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction of its own, for reading *rows*.

        Raises:
            DatabaseUnavailable
        """
        async with self._reading(_naming(rows)) as connection:
            yield connection

    @asynccontextmanager
    async def read_of_key(self, key_id: str) -> AsyncIterator[AsyncConnection]:
        """As `read`, for the tenant whose API key this is; for nobody's rows when there is no such key."""
        async with self._reading(_Opening(_OF_KEY, {"key_id": key_id})) as connection:
            yield connection

    @asynccontextmanager
    async def read_every_tenant(self) -> AsyncIterator[AsyncConnection]:
        """As `read`, for all tenants with their assets, apps and keys: for what the installation asks, seldom."""
        async with self._reading(_Opening(_EVERY_TENANT, {})) as connection:
            yield connection

    @asynccontextmanager
    async def write(self, rows: Rows) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction that commits at the end of the block, durably, or not at all.

        Raises:
            DatabaseUnavailable
        """
        with _unavailable():
            if self._path is None:
                async with self._transaction(_naming(rows)) as connection:
                    yield connection
                    await connection.commit()
            else:
                async with self._turn(), self._writer.begin() as connection:
                    yield connection

    @asynccontextmanager
    async def _reading(self, opening: _Opening) -> AsyncIterator[AsyncConnection]:
        with _unavailable():
            async with self.engine.connect() if self._path else self._transaction(opening) as connection:
                yield connection

    @asynccontextmanager
    async def _transaction(self, opening: _Opening) -> AsyncIterator[AsyncConnection]:
        """A transaction on PostgreSQL that has begun. A connection that may be of no use any more is thrown away."""
        connection, timer = await self._opened(opening)
        try:
            yield connection
        except BaseException as error:
            if unavailable(error):
                await connection.invalidate()
            raise
        finally:
            await asyncio.shield(_closed(connection, timer))

    async def _opened(self, opening: _Opening) -> tuple[AsyncConnection, asyncio.TimerHandle]:
        """A connection that has named its rows, and the timer that will drop it."""
        # As often as there may be connections in the pool that the server knows nothing of.
        for left in reversed(range(CONNECTIONS_MAX + 1)):
            async with asyncio.timeout(ACQUIRE_TIMEOUT_S):
                connection = await self.engine.connect()
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            loop = asyncio.get_running_loop()
            timer = loop.call_later(TRANSACTION_TIMEOUT_S, driver.terminate)
            try:
                await connection.execute(*opening)
            except BaseException as error:
                try:
                    if unavailable(error):
                        await connection.invalidate()
                finally:
                    await asyncio.shield(_closed(connection, timer))
                if not left or not unavailable(error) or loop.time() >= timer.when():
                    raise
            else:
                return connection, timer
        raise AssertionError("unreachable")

    async def check(self) -> None:
        """Whether it answers, and a SQLite file is still the one that was opened: what is written to one that was
        removed or replaced is gone with the process.

        Raises:
            DatabaseUnavailable
        """
        async with self.read(NOBODY) as connection:
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
            descriptor = await _locked_soon(f"{self._path}-lock")
            try:
                yield
            finally:
                os.close(descriptor)
        finally:
            self._writing.release()


class Joined:
    """Transactions that are part of one that is open already, on *rows*: they commit, or not, with it."""

    def __init__(self, connection: AsyncConnection, rows: Rows) -> None:
        self._connection = connection
        self._rows = rows

    def read(self, rows: Rows) -> AbstractAsyncContextManager[AsyncConnection]:
        assert self._rows.cover(rows), "a part of a transaction touches rows that the whole does not name"
        return nullcontext(self._connection)

    def write(self, rows: Rows) -> AbstractAsyncContextManager[AsyncConnection]:
        return self.read(rows)


async def _closed(connection: AsyncConnection, timer: asyncio.TimerHandle) -> None:
    """Give *connection* back. The server is asked to roll back what is open: *timer* ends that wait too."""
    try:
        await connection.close()
    finally:
        timer.cancel()


def insert_new(table: type[SQLModel], dialect: str) -> Any:
    """An INSERT that leaves a row that is there already as it is, in the words of the database."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(table).on_conflict_do_nothing()


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Take a database for away that does not answer the block within *seconds*.

    Raises:
        DatabaseUnavailable
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DatabaseUnavailable(f"no answer within {seconds} s") from None


class _unavailable:  # noqa: N801 - reads as a statement
    """Turns a driver's infrastructure errors into ours; an integrity error stays what it is."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and unavailable(error):
            late = isinstance(error, TimeoutError)
            raise DatabaseUnavailable("no answer in time" if late else str(error.__cause__ or error)) from error


def _naming(rows: Rows) -> _Opening:
    scopes = ",".join(f"{rows.tenant}/{mode}" for mode in rows.modes)
    return _Opening(_NAMED, {"scopes": scopes, "tenants": rows.tenant})


class _SqliteConnection(sqlite3.Connection):
    """Lets go of the file when it is closed.

    Whoever is cancelled between a query and its rows leaves the query open, and the traceback keeps it. SQLite would
    close the connection only after that, and until then its transaction would keep all other writers out.
    https://www.sqlite.org/c3ref/close.html
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cursors: WeakSet[sqlite3.Cursor] = WeakSet()

    def cursor(self, *args: Any, **options: Any) -> Any:
        cursor = super().cursor(*args, **options)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        for cursor in tuple(self._cursors):
            cursor.close()
        self._cursors.clear()  # It may be closed again, when its cursors could not be.
        super().close()


def _set_up_sqlite(connection: Any) -> None:
    # The driver must not begin transactions by itself: it would begin them as readers, which then fail as writers.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA temp_store=MEMORY")
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
        # Not `wait_for`, which may take a cancellation for its own and go on.
        done, _ = await asyncio.wait((waiting,), timeout=TURN_TIMEOUT_S)
    except asyncio.CancelledError:
        waiting.add_done_callback(_given_back)
        raise
    if not done:
        waiting.add_done_callback(_given_back)
        raise TimeoutError
    return waiting.result()


def _given_back(late: "asyncio.Future[int]") -> None:
    """The thread cannot be stopped: it gets its turn later, and gives it back at once."""
    if not late.cancelled() and late.exception() is None:
        os.close(late.result())


def _locked(path: str) -> int:
    """A descriptor that holds the lock on *path*; closing it gives the lock back."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
