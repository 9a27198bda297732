"""SQLite, the embedded default: one writer thread, a few readers, several processes on one file.

A wait for another process that holds the write lock has no limit here: whoever waits for an answer has one
(``ledger.writer``), and a process that dies lets go.
"""

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

from sqlalchemy.engine import make_url

from ledger.commands import AnyCommand, StoredResponse
from ledger.model import Block, Reservation, ReservationRef, Scope, WalletRef
from ledger.outcomes import Outcome, UsageRecorded
from ledger.store import sqlite_reads as reads
from ledger.store.erasure import erasing
from ledger.store.protocol import (
    PAGE_MAX,
    Position,
    SchemaMissing,
    Snapshot,
    StoreUnavailable,
    Transaction,
    WalletBlocks,
)
from ledger.store.sqlite_batch import BatchConnection, VersionConflict, connect
from ledger.store.tables import TABLES

READERS = 2

CLOSE_WAIT_S = 10.0
"""How long closing waits for a batch that is under way."""

SQLITE_VERSION_MIN = (3, 35, 0)

T = TypeVar("T")


def database_path(database_url: str) -> str:
    """The file of ``sqlite:///relative.db`` or ``sqlite:////absolute.db``.

    Raises:
        ValueError: not a file. A ledger in memory would forget money, and its readers could not see it.
    """
    url = make_url(database_url)
    if url.get_backend_name() != "sqlite":
        raise ValueError(f"{url.get_backend_name()} is not SQLite: the database URL must begin with sqlite:///")
    if not url.database or url.database == ":memory:" or url.query.get("mode") == "memory":
        raise ValueError("the ledger does not run in memory: name a file, such as sqlite:///farebox.db")
    return url.database


class SqliteStore:
    """A :class:`~ledger.store.protocol.Store` in a file."""

    batches_at_once = 1

    def __init__(self, path: str, batches: BatchConnection, writer: "_Worker") -> None:
        self._path = path
        self._batches = batches
        self._writer = writer
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ledger-reader")
        self._connections: list[sqlite3.Connection] = []
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._prompt: sqlite3.Connection | None = None
        self._closed = False

    @classmethod
    async def open(cls, database_url: str, *, clock: Callable[[], int]) -> "SqliteStore":
        """*clock* tells the time of batches, in microseconds since the epoch.

        Raises:
            ValueError: the URL names no file.
            SchemaMissing: there is no ledger in it yet.
            StoreUnavailable: the file cannot be opened.
        """
        if sqlite3.sqlite_version_info < SQLITE_VERSION_MIN:
            raise StoreUnavailable(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 is needed")
        path = database_path(database_url)
        writer = _Worker()
        try:
            batches = await writer.run(lambda: _open(path, clock))
        except BaseException:
            writer.stop()
            raise
        return cls(path, batches, writer)

    async def close(self) -> None:
        """Wait for the batch under way, then let go of the file. Repeatable.

        Raises:
            StoreUnavailable: another process holds the batch up; it will still be committed or not, as a whole.
        """
        if self._closed:
            return
        self._closed = True
        closing = self._writer.run(self._batches.close)
        self._writer.stop()
        await asyncio.to_thread(self._readers.shutdown)  # It waits for reads that are under way.
        for connection in self._connections:
            connection.close()
        if self._prompt is not None:
            self._prompt.close()
        try:
            await asyncio.wait_for(closing, CLOSE_WAIT_S)
        except TimeoutError:
            raise StoreUnavailable("a batch is still waiting for another process") from None

    async def run_batch(self, commands: Sequence[AnyCommand]) -> list[Outcome]:
        return await self._writer.run(lambda: self._batches.run(commands))

    async def purge_responses(self, now_us: int, *, limit: int) -> int:
        return await self._writer.run(lambda: self._batches.purge_responses(now_us, limit))

    async def wallet(self, ref: WalletRef) -> WalletBlocks | None:
        return await self._read(lambda connection: reads.wallet(connection, ref))

    async def wallet_version(self, ref: WalletRef) -> int | None:
        return await self._read(lambda connection: reads.wallet_version(connection, ref))

    async def latest_plan(self, ref: WalletRef) -> Block | None:
        return await self._read(lambda connection: reads.latest_plan(connection, ref))

    async def block(self, ref: WalletRef, block_id: str) -> Block | None:
        return await self._read(lambda connection: reads.block(connection, ref, block_id))

    def wallet_version_at_once(self, ref: WalletRef) -> int | None:
        """The same on the thread that asks, in about four microseconds: a row that was read lately is in memory, and no
        writer is waited for.
        """
        return self._read_at_once(lambda connection: reads.wallet_version(connection, ref))

    def wallet_at_once(self, ref: WalletRef) -> WalletBlocks | None:
        return self._read_at_once(lambda connection: _at_one_moment(connection, lambda: reads.wallet(connection, ref)))

    async def reservation(self, ref: ReservationRef) -> Reservation | None:
        return await self._read(lambda connection: reads.reservation(connection, ref))

    async def reservation_of_request(self, scope: Scope, request_id: str) -> Reservation | None:
        return await self._read(lambda connection: reads.reservation_of_request(connection, scope, request_id))

    async def usage_of_request(self, scope: Scope, request_id: str) -> tuple[UsageRecorded, ...]:
        return await self._read(lambda connection: reads.usage_of_request(connection, scope, request_id))

    async def response(self, scope: Scope, operation: str, key: str, *, now_us: int) -> StoredResponse | None:
        return await self._read(lambda connection: reads.response(connection, scope, operation, key, now_us))

    async def transactions(self, ref: WalletRef, *, before: Position | None, limit: int) -> list[Transaction]:
        page = min(limit, PAGE_MAX)
        return await self._read(lambda connection: reads.transactions(connection, ref, before, page))

    async def due_reservations(self, now_us: int, *, limit: int) -> list[ReservationRef]:
        return await self._read(lambda connection: reads.due_reservations(connection, now_us, min(limit, PAGE_MAX)))

    async def due_wallets(self, now_us: int, *, limit: int) -> list[WalletRef]:
        return await self._read(lambda connection: reads.due_wallets(connection, now_us, min(limit, PAGE_MAX)))

    async def erase(self, wallet: WalletRef, *, customer_id: str, now_us: int) -> None:
        pages = erasing("sqlite", wallet, customer_id, now_us=now_us)
        with suppress(StopIteration):
            statements = next(pages)
            while True:
                statements = pages.send(await self._writer.run(partial(self._batches.edit, statements)))

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        return self._snapshot()

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Snapshot]:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        reader = _Worker()  # Of its own: a read goes on when it is cancelled, and only then comes the closing.
        try:
            connection = await reader.run(lambda: connect(self._path))
            try:
                await reader.run(lambda: _begin_now(connection))
                yield reads.SqliteSnapshot(connection, reader.run)
            finally:
                await reader.run(connection.close)
        finally:
            reader.stop()

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        return await self._in_reader(lambda: self._in_transaction(query))

    async def _in_reader(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: _translated(work))

    def _read_at_once(self, query: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise StoreUnavailable("the store is closed")

        def read() -> T:
            if self._prompt is None:
                self._prompt = connect(self._path, timeout_s=0)
            return query(self._prompt)

        return _translated(read)

    def _in_transaction(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Read at one moment. There are as many connections as threads, so one is always free."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = connect(self._path)
            self._connections.append(connection)
        try:
            return _at_one_moment(connection, lambda: query(connection))
        finally:
            self._idle.put(connection)


def _at_one_moment(connection: sqlite3.Connection, work: Callable[[], T]) -> T:
    connection.execute("BEGIN")
    try:
        return work()
    finally:
        connection.execute("ROLLBACK")


def _open(path: str, clock: Callable[[], int]) -> BatchConnection:
    if not os.path.exists(path):
        raise SchemaMissing(f"{path} does not exist: run `farebox migrate` first")
    batches = BatchConnection(path, clock)
    missing = {table.name for table in TABLES} - batches.tables()
    if missing:
        batches.close()
        raise SchemaMissing(f"{path} has no table {min(missing)}: run `farebox migrate` first")
    return batches


def _begin_now(connection: sqlite3.Connection) -> None:
    """A transaction reads the moment of its first read: make that one now."""
    connection.execute("BEGIN")
    connection.execute("SELECT max(seq) FROM ledger_command").fetchone()


def _translated(work: Callable[[], T]) -> T:
    """What is the database's trouble, and not the command's, is the store being unavailable."""
    try:
        return work()
    except (sqlite3.OperationalError, OSError, VersionConflict) as error:
        raise StoreUnavailable(f"{type(error).__name__}: {error}") from error
    except sqlite3.DatabaseError as error:
        if type(error) is sqlite3.DatabaseError:  # Its subclasses tell of a wrong statement or value.
            raise StoreUnavailable(f"the database file is damaged: {error}") from error
        raise


class _Worker:
    """One thread that does one thing after the other. It is a daemon: a stuck lock does not keep the process alive."""

    def __init__(self) -> None:
        self._stopped = False
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="ledger-writer", daemon=True).start()

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        if self._stopped:
            raise StoreUnavailable("the store is closed")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def resolve(result: T | None, error: BaseException | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def turn() -> None:
            result: T | None = None
            failure: BaseException | None = None
            try:
                result = _translated(work)
            except BaseException as error:
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(resolve, result, failure)

        self._work.put(turn)
        return done

    def stop(self) -> None:
        """After what was asked for before."""
        self._stopped = True
        self._work.put(None)

    def _serve(self) -> None:
        while (turn := self._work.get()) is not None:
            turn()
