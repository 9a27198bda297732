"""Connections to PostgreSQL: as the gateway's role, with a limit to every wait, and none used again after a failure.

How it works. A statement's limit is a timer that drops the connection. asyncpg would send a cancel request instead, and
that ends a commit's wait for its synchronous standby: others would see, and be told of, what no standby has yet. The
server has limits of its own for what a client leaves behind.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

import asyncpg

from ledger.store.protocol import SchemaMissing, StoreUnavailable
from ledger.store.row_security import BECOME_GATEWAY, BYPASSES

CONNECT_S: Final = 2.0
"""How long one host may take to let us in; the next host of the URL is tried then."""

CONNECT_ALL_S: Final = 6.0
"""How long all hosts of the URL may take together."""

STATEMENT_MS: Final = 8_000
"""How long the server works on one statement at most."""

ABANDONED_MS: Final = 10_000
"""How long the server keeps a transaction, and its locks, whose client says nothing more."""

FUNCTION: Final = "farebox_apply_v3"
"""Made by the last migration that this store needs."""

_SET_UP: Final = (
    f"SET statement_timeout = {STATEMENT_MS}; SET idle_in_transaction_session_timeout = {ABANDONED_MS}; "
    "SET client_min_messages = warning; SET jit = off"
)

_VALUE_AT_FAULT: Final = ("21", "22", "23", "44", "54")
"""The classes of SQLSTATE that tell of a value: trying again will not help, and another command is not to blame."""

_SCHEMA_AT_FAULT: Final = ("42P01", "42883", "42703", "3F000")

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection


def server_url(database_url: str) -> str:
    """The URL as asyncpg wants it: without the name of a driver."""
    return re.sub(r"^postgres(ql)?(\+\w+)?:", "postgresql:", database_url)


@contextmanager
def translated() -> Iterator[None]:
    """What is the database's trouble, and not a value's, is the store being unavailable."""
    try:
        yield
    except asyncpg.DataError:
        raise
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        if state[:2] in _VALUE_AT_FAULT:
            raise
        advice = ": run `farebox migrate`" if state in _SCHEMA_AT_FAULT else ""
        raise StoreUnavailable(f"{type(error).__name__}: {error}{advice}") from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
        # TimeoutError is an OSError too.
        raise StoreUnavailable(f"{type(error).__name__}: {error}") from error


@contextmanager
def dropped_after(connection: Connection, seconds: float) -> Iterator[None]:
    """Whoever waits for *connection* after *seconds* is told that it is gone."""
    timer = asyncio.get_running_loop().call_later(seconds, connection.terminate)
    try:
        yield
    finally:
        timer.cancel()


async def connect(url: str, *, abandoned_ms: int = ABANDONED_MS) -> Connection:
    """A connection of the gateway's role, which cannot bypass the policies.

    Raises:
        StoreUnavailable: no host of *url* lets us in, or we would see all tenants.
        SchemaMissing: there is no ledger in the database, or not all of it.
    """
    with translated():
        async with asyncio.timeout(CONNECT_ALL_S):
            connection: Connection = await asyncpg.connect(
                url, timeout=CONNECT_S, server_settings={"application_name": "farebox"}
            )
    try:
        with translated(), dropped_after(connection, CONNECT_ALL_S):
            await connection.execute(_SET_UP)
            if abandoned_ms != ABANDONED_MS:
                await connection.execute(f"SET idle_in_transaction_session_timeout = {abandoned_ms}")
            await connection.execute(BECOME_GATEWAY)
            bypasses, there = await connection.fetchrow(f"{BYPASSES}, to_regproc('{FUNCTION}') IS NOT NULL") or (0, 0)
        if not there:
            raise SchemaMissing("the database has no ledger, or that of an older Farebox: run `farebox migrate`")
        if bypasses:
            raise StoreUnavailable(
                "the database's user bypasses row-level security, and there is no role farebox_gateway to become: "
                "run `farebox migrate` as a user who may create roles"
            )
    except BaseException:
        connection.terminate()
        raise
    return connection


class Connections:
    """A few connections to *url*, made when they are needed and kept for the next one.

    Where the ledger was once, it may be missing only for a while, as while a server is replaced: that is unavailable.
    """

    def __init__(self, url: str, *, size: int, wait_s: float) -> None:
        self._url = url
        self._wait_s = wait_s
        self._free = asyncio.Semaphore(size)
        self._idle: list[Connection] = []
        self._taken: set[Connection] = set()
        self._closed = False

    @asynccontextmanager
    async def one(self, *, limit_s: float) -> AsyncIterator[Connection]:
        """A connection of one's own for at most *limit_s*. One that failed is not used again.

        Raises:
            StoreUnavailable: all are taken for too long, or there is none to be had, or it failed.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"no connection was free for {self._wait_s} s") from None
        try:
            connection = await self._take()
            self._taken.add(connection)
            try:
                with translated(), dropped_after(connection, limit_s):
                    yield connection
            except BaseException as error:
                # What was wrong with a value leaves the connection whole.
                if not isinstance(error, Exception) or isinstance(error, StoreUnavailable):
                    connection.terminate()
                raise
            finally:
                self._taken.discard(connection)
                self._put_back(connection)
        finally:
            self._free.release()

    def _put_back(self, connection: Connection) -> None:
        if connection.is_closed():
            return
        if self._closed or connection.is_in_transaction():
            connection.terminate()
        else:
            self._idle.append(connection)

    async def _take(self) -> Connection:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        try:
            return await connect(self._url)
        except SchemaMissing as error:
            raise StoreUnavailable(str(error)) from error

    def add(self, connection: Connection) -> None:
        """One that is open already."""
        self._idle.append(connection)

    def close(self) -> None:
        """Drop all; who still waits for an answer is told."""
        self._closed = True
        for connection in [*self._idle, *self._taken]:
            connection.terminate()
        self._idle.clear()
