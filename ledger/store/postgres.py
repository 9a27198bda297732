"""PostgreSQL, for production: several processes on several hosts, one ledger.

Two connections take the batches, a few others the reads; each is made again by itself after it was lost. No wait has no
limit: a server that hangs makes the store unavailable, and nobody waits for it to come back.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Final, TypeVar

from ledger.commands import AnyCommand, StoredResponse
from ledger.model import Block, Reservation, ReservationRef, Scope, WalletRef
from ledger.outcomes import Outcome, UsageRecorded
from ledger.store import postgres_reads as reads
from ledger.store.erasure import erasing
from ledger.store.postgres_batch import BATCH_S, BATCHES_AT_ONCE, Batches
from ledger.store.postgres_connection import CONNECT_ALL_S, Connection, Connections, connect, server_url, translated
from ledger.store.protocol import (
    PAGE_MAX,
    Position,
    Snapshot,
    StoreUnavailable,
    Transaction,
    WalletBlocks,
    Watcher,
)

READERS: Final = 4

READ_S: Final = 4.0
"""How long a read may take, and how long it may wait for its turn."""

CLOSE_WAIT_S: Final = CONNECT_ALL_S + 2 * BATCH_S
"""How long closing waits for the batches that are under way: as long as one may take that goes both ways."""

SNAPSHOT_ABANDONED_MS: Final = 3_600_000
"""How long a replay may think about one page."""

T = TypeVar("T")


class PostgresStore:
    """A :class:`~ledger.store.protocol.Store` on a server."""

    batches_at_once = BATCHES_AT_ONCE

    def __init__(self, url: str, *, clock: Callable[[], int] | None, watcher: Watcher | None) -> None:
        self._url = url
        self._writers = Connections(url, size=BATCHES_AT_ONCE, wait_s=BATCH_S)
        self._batches = Batches(self._writers, clock=clock, watcher=watcher)
        self._under_way: set[asyncio.Task[list[Outcome]]] = set()
        self._readers = Connections(url, size=READERS, wait_s=READ_S)
        self._closed = False

    @classmethod
    async def open(
        cls, database_url: str, *, clock: Callable[[], int] | None = None, watcher: Watcher | None = None
    ) -> "PostgresStore":
        """Connect, as the gateway's role where the login is more than that.

        Args:
            database_url: ``postgresql://…`` with all that asyncpg knows, several hosts among them.
            clock: tells the time of batches, in microseconds since the epoch; without one it is the database's.
            watcher: is told of the wallets of every batch.

        Raises:
            SchemaMissing: there is no ledger in it yet.
            StoreUnavailable: it cannot be reached.
        """
        url = server_url(database_url)
        store = cls(url, clock=clock, watcher=watcher)
        store._writers.add(await connect(url))
        return store

    async def close(self) -> None:
        """Wait for the batch under way, then let go of the database. Repeatable.

        Raises:
            StoreUnavailable: the batch does not end; it will still be committed or not, as a whole.
        """
        if self._closed:
            return
        self._closed = True
        waiting: set[asyncio.Task[list[Outcome]]] = set()
        if self._under_way:
            _, waiting = await asyncio.wait(self._under_way, timeout=CLOSE_WAIT_S)
        self._readers.close()
        self._writers.close()
        if waiting:
            raise StoreUnavailable("a batch is still under way")

    async def run_batch(self, commands: Sequence[AnyCommand]) -> list[Outcome]:
        """A caller that goes away does not end its batch: a cancelled statement could end a commit's wait."""
        if self._closed:
            raise StoreUnavailable("the store is closed")
        if not commands:
            return []
        task = asyncio.ensure_future(self._batches.run(commands))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def wallet(self, ref: WalletRef) -> WalletBlocks | None:
        return await self._read(lambda connection: reads.wallet(connection, ref))

    async def wallet_version(self, ref: WalletRef) -> int | None:
        return await self._read(lambda connection: reads.wallet_version(connection, ref))

    async def latest_plan(self, ref: WalletRef) -> Block | None:
        return await self._read(lambda connection: reads.latest_plan(connection, ref))

    async def block(self, ref: WalletRef, block_id: str) -> Block | None:
        return await self._read(lambda connection: reads.block(connection, ref, block_id))

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

    async def purge_responses(self, now_us: int, *, limit: int) -> int:
        return await self._read(lambda connection: reads.purge_responses(connection, now_us, min(limit, PAGE_MAX)))

    async def erase(self, wallet: WalletRef, *, customer_id: str, now_us: int) -> None:
        pages = erasing("postgresql", wallet, customer_id, now_us=now_us)
        with suppress(StopIteration):
            statements = next(pages)
            while True:
                edit = partial(reads.edit, scope=wallet.scope, edits=statements)
                statements = pages.send(await self._read(edit))

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        return self._snapshot()

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Snapshot]:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        connection = await connect(self._url, abandoned_ms=SNAPSHOT_ABANDONED_MS)
        try:
            with translated():
                await reads.begin_snapshot(connection)
            yield reads.PostgresSnapshot(connection)
        finally:
            connection.terminate()

    async def _read(self, query: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._readers.one(limit_s=READ_S) as connection:
            return await query(connection)
