"""Connections to PostgreSQL for the gateway's own tables, from a bounded pool.

They are made as the ledger's store makes its own: as the gateway's role, with the server's limits, and by asyncpg's
reading of the URL, so that several hosts, `target_session_attrs` and TLS mean the same to both.
"""

from typing import Final

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ledger.store.postgres_connection import Connection, connect, server_url
from ledger.store.protocol import SchemaMissing, StoreUnavailable

CONNECTIONS_MAX: Final = 5
"""Most connections of a process to its own tables; the ledger's store has others."""

ACQUIRE_TIMEOUT_S: Final = 8.0
"""How long to wait for one of them: that one is free, and that it is made, over all hosts of the URL."""

TRANSACTION_TIMEOUT_S: Final = 5.0
"""How long a transaction may take. Its connection is dropped then: a commit that is cancelled no longer awaits its
standby."""

# 08 connection, 28 authorisation, 40 rolled back, 53 resources, 57 shut down, 58 disk; 3D, 42P01 and 42883 not there;
# 25006 a standby, 25P03 stood still for too long, 55P03 a lock.
_UNAVAILABLE_STATES: Final = ("08", "28", "40", "3D", "53", "57", "58", "25006", "25P03", "42P01", "42883", "55P03")


def open_engine(url: str) -> AsyncEngine:
    """The pool. It connects when it is first used."""
    server = server_url(url)

    async def connected() -> Connection:
        return await connect(server)

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connected,
        pool_size=CONNECTIONS_MAX,
        max_overflow=0,
        pool_timeout=ACQUIRE_TIMEOUT_S,
        pool_use_lifo=True,
        hide_parameters=True,  # They may be anybody's data; with an error they would reach the log.
    )


def unavailable(error: BaseException) -> bool:
    """Whether the database, rather than the statement, is at fault."""
    if isinstance(error, DBAPIError):
        cause = getattr(error.orig, "driver_exception", None)
        if isinstance(cause, asyncpg.DataError):  # A value that the driver cannot send, which it calls an interface's.
            return False
        state = getattr(error.orig, "sqlstate", None)
        if state is not None:
            return str(state).startswith(_UNAVAILABLE_STATES)
        return isinstance(error, OperationalError | InterfaceError)
    return isinstance(error, PoolTimeout | OSError | StoreUnavailable | SchemaMissing)
