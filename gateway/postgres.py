"""Connections to PostgreSQL for the gateway's own tables: as its role, from a bounded pool, in bounded time.

asyncpg reads the URL itself, so that several hosts, `target_session_attrs` and TLS mean here what they mean to the
ledger's store.
"""

from typing import Final

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ledger.store.row_security import BECOME_GATEWAY, BYPASSES, GATEWAY_ROLE

CONNECTIONS_MAX: Final = 5
"""Most connections of a process to its own tables; the ledger's store has others."""

ACQUIRE_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 5.0

# 08 connection, 28 authorisation, 40 rolled back, 53 resources, 57 shut down, 58 disk; 3D, 42P01 and 42883 not there;
# 25006 a standby, 25P03 stood still for too long, 55P03 a lock.
_UNAVAILABLE_STATES: Final = ("08", "28", "40", "3D", "53", "57", "58", "25006", "25P03", "42P01", "42883", "55P03")


def open_engine(url: str) -> AsyncEngine:
    """The pool. It connects when it is first used."""

    async def connect() -> asyncpg.Connection:
        connection = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT_S, command_timeout=COMMAND_TIMEOUT_S)
        try:
            await become_gateway(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=CONNECTIONS_MAX,
        max_overflow=0,
        pool_timeout=ACQUIRE_TIMEOUT_S,
        pool_use_lifo=True,
        hide_parameters=True,  # They may be anybody's data; with an error they would reach the log.
    )


async def become_gateway(connection: asyncpg.Connection) -> None:
    """Work as a role that is held to the policies, from here on.

    Raises:
        ConnectionError: there is none that this login could become.
    """
    await connection.execute(BECOME_GATEWAY)
    if await connection.fetchval(BYPASSES):
        raise ConnectionError(
            f"this login bypasses row-level security and cannot become {GATEWAY_ROLE}: run `farebox migrate`"
        )


def unavailable(error: BaseException | None) -> bool:
    """Whether the database, rather than the statement, is at fault."""
    if isinstance(error, DBAPIError):
        cause = getattr(error.orig, "driver_exception", None)
        if isinstance(cause, asyncpg.DataError):  # A value that the driver cannot send, which it calls an interface's.
            return False
        state = getattr(error.orig, "sqlstate", None)
        if state is not None:
            return str(state).startswith(_UNAVAILABLE_STATES)
        return isinstance(error, OperationalError | InterfaceError)
    # What is not wrapped comes from connecting.
    return isinstance(error, PoolTimeout | OSError | asyncpg.PostgresError | asyncpg.InterfaceError)


def cut(error: BaseException) -> bool:
    """Whether the connection was lost, as one in the pool is when the server was restarted: another may do."""
    return unavailable(error) and not isinstance(error, TimeoutError | PoolTimeout)
