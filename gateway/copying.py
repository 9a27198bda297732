"""Moves an installation into another database, and proves that everything arrived: what `farebox copy` does.

How it works. The source is read at one moment, row by row as it is stored, and written to the target in pages, all in
one transaction of the target: a copy that fails, or is killed, leaves the target as empty as it was, and is started
again from the beginning. Of each table a count and a sum of digests is taken while it is read; before the target
commits, every row is read back from it, and must come to the same. Memory holds one page.

Nobody may write to the source meanwhile, or what they write would be missing in the copy. A SQLite file is opened so
that nobody else can have it open: a copy is refused while a gateway serves it, and a gateway does not start on it
before the copy has ended. A PostgreSQL source has its tables locked against writes; its gateways must be stopped by
whoever starts the copy, because those would go on with the old books afterwards.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Final

import asyncpg
from sqlalchemy import Column, LargeBinary, Row, RowMapping, Table, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import SQLModel

import gateway.tables  # noqa: F401  (fills the metadata)
import ledger.store.tables  # noqa: F401  (fills the metadata)
from gateway.migrations import CONNECT_TIMEOUT_S, HEAD, migrate, revision
from ledger.model import Scope
from ledger.store.postgres_connection import server_url
from ledger.store.row_security import naming
from ledger.store.sqlite import database_path

PAGE_ROWS: Final = 1_000
PAGE_ROWS_OF_BODIES: Final = 16
"""A page of a table that keeps whole answers, each of which may be megabytes long."""

SOURCE_WAIT_MS: Final = 500
"""How long the source may be busy with something that passes, such as a backup that ends."""

DIGEST_BYTES: Final = 16
MODES: Final = ("live", "test")

Progress = Callable[[str, int], None]
"""Is told a table's name and how many of its rows are written so far, once a page."""


class CannotCopy(Exception):
    """The message says what is in the way, and what to do. The target is as it was."""

    exit_code: ClassVar[int] = 1


@dataclass(slots=True)
class Tally:
    """What a table's rows come to, in whatever order they are seen."""

    rows: int = 0
    digests: int = 0

    def add(self, row: Row[Any]) -> None:
        digest = blake2b(repr(tuple(row)).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES)
        self.rows += 1
        self.digests += int.from_bytes(digest.digest())


def copy_installation(source_url: str, target_url: str, *, progress: Progress) -> dict[str, int]:
    """Copy every table of *source_url* into *target_url*, whose schema is made first; how many rows each has.

    Raises:
        CannotCopy: the source is in use or behind, the target is not empty, or what arrived is not what was sent.
        StoreUnavailable: the target cannot be migrated.
    """
    if _is_sqlite(source_url) and not Path(path := database_path(source_url)).exists():
        raise CannotCopy(f"There is no file {path} to copy.")
    if source_url == target_url:
        raise CannotCopy("The source and the target are the same database.")
    found = revision(source_url)
    if found != HEAD:
        raise CannotCopy(
            f"The source's schema is {found or 'not there'}, and this Farebox's is {HEAD}: "
            "run `farebox migrate` on it first."
        )
    migrate(target_url)
    return asyncio.run(_copied(source_url, target_url, progress))


async def _copied(source_url: str, target_url: str, progress: Progress) -> dict[str, int]:
    async with _reading(source_url) as source, _writing(target_url) as target:
        if await _scopes(target):
            raise CannotCopy("The target has tenants or a ledger in it already: copy into an empty database.")
        await _name(source, await _scopes(source))
        sent = {table.name: await _send(table, source, target, progress) for table in _tables()}
        await _name(target, await _scopes(target))
        await _continue_numbers(target)
        for table in _tables():
            arrived = await _tally(table, target)
            if arrived != sent[table.name]:
                raise CannotCopy(
                    f"{table.name} did not arrive as it was sent: {sent[table.name].rows} rows were read, "
                    f"{arrived.rows} are there, and they are not the same. Nothing was kept of the copy."
                )
    return {name: tally.rows for name, tally in sent.items()}


def _tables() -> list[Table]:
    """All tables, what is referred to before what refers to it."""
    return SQLModel.metadata.sorted_tables


@asynccontextmanager
async def _reading(url: str) -> AsyncIterator[AsyncConnection]:
    """The source at one moment, with nobody else who writes to it.

    Raises:
        CannotCopy: it is in use.
    """
    try:
        async with _connected(url, "BEGIN") as connection:
            if connection.dialect.name == "postgresql":
                names = ", ".join(table.name for table in _tables())
                await connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                await connection.exec_driver_sql(f"LOCK TABLE {names} IN SHARE MODE")
            else:
                await connection.exec_driver_sql("SELECT version_num FROM alembic_version")
            yield connection
    except (DBAPIError, OSError) as error:
        if "database is locked" in _said(error):
            raise CannotCopy("The source is in use: stop the gateways that serve it, then copy again.") from None
        raise CannotCopy(f"The source cannot be read: {_said(error)}.") from None


@asynccontextmanager
async def _writing(url: str) -> AsyncIterator[AsyncConnection]:
    """One transaction of the target, which nobody else can write to: it commits at the end of the block, or is gone."""
    try:
        async with _connected(url, "BEGIN IMMEDIATE") as connection:
            if connection.dialect.name == "postgresql":
                await connection.exec_driver_sql("LOCK TABLE tenants IN SHARE ROW EXCLUSIVE MODE")
            yield connection
            try:
                await connection.commit()
            except (DBAPIError, OSError) as error:
                raise CannotCopy(
                    f"The target was lost at the very end: {_said(error)}. It has all of the copy or nothing: "
                    "`farebox verify` tells."
                ) from None
    except (DBAPIError, OSError) as error:
        raise CannotCopy(f"The copy failed, and nothing was kept of it: {_said(error)}.") from None


@asynccontextmanager
async def _connected(url: str, begin: str) -> AsyncIterator[AsyncConnection]:
    engine = _engine(url, begin)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


def _engine(url: str, begin: str) -> AsyncEngine:
    if not _is_sqlite(url):

        async def connect() -> asyncpg.Connection:
            return await asyncpg.connect(server_url(url), timeout=CONNECT_TIMEOUT_S)

        return create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    engine = create_async_engine(f"sqlite+aiosqlite:///{database_path(url)}", poolclass=NullPool)
    event.listen(engine.sync_engine, "connect", _have_alone)
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def _is_sqlite(url: str) -> bool:
    return url.startswith("sqlite:")


def _have_alone(connection: Any, _record: object) -> None:
    """Have the SQLite file to ourselves from the first read on: SQLite refuses that while anybody has it open."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={SOURCE_WAIT_MS}")
    cursor.execute("PRAGMA locking_mode=EXCLUSIVE")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


async def _scopes(connection: AsyncConnection) -> list[Scope]:
    """Every scope that may have rows. PostgreSQL shows no row before it is named, so it is asked by functions."""
    if connection.dialect.name == "postgresql":
        tenants, scopes = "SELECT tenant FROM farebox_tenants()", "SELECT tenant, mode FROM farebox_ledger_scopes()"
    else:
        tables = [table.name for table in _tables() if {"tenant", "mode"} <= set(table.columns.keys())]
        tenants = "SELECT id FROM tenants"
        scopes = " UNION ".join(f"SELECT tenant, mode FROM {table}" for table in tables)  # noqa: S608 - our own names
    found = {Scope(*row) for row in await connection.execute(text(scopes))}
    return sorted(found | {Scope(row[0], mode) for row in await connection.execute(text(tenants)) for mode in MODES})


async def _name(connection: AsyncConnection, scopes: Iterable[Scope]) -> None:
    if connection.dialect.name == "postgresql":
        await connection.exec_driver_sql(naming(scopes))


async def _send(table: Table, source: AsyncConnection, target: AsyncConnection, progress: Progress) -> Tally:
    tally = Tally()
    async for page in _pages(table, source):
        for row in page:
            tally.add(row)
        await _name(target, {_scope_of(row._mapping) for row in page})
        await target.execute(insert(table), [dict(row._mapping) for row in page])
        progress(table.name, tally.rows)
    return tally


async def _tally(table: Table, connection: AsyncConnection) -> Tally:
    tally = Tally()
    async for page in _pages(table, connection):
        for row in page:
            tally.add(row)
    return tally


async def _pages(table: Table, connection: AsyncConnection) -> AsyncIterator[list[Row[Any]]]:
    """All rows as the database has them at hand: an order would cost a sort and is not needed."""
    rows = PAGE_ROWS_OF_BODIES if any(map(_may_be_long, table.columns)) else PAGE_ROWS
    async with connection.stream(select(table), execution_options={"yield_per": rows}) as result:
        async for page in result.partitions():
            yield list(page)


def _may_be_long(column: Column[Any]) -> bool:
    return isinstance(column.type, LargeBinary) and column.name == "body"


def _scope_of(row: RowMapping) -> Scope:
    """What a row belongs to. A table without a mode belongs to all of its tenant's, so any will do."""
    tenant = row["tenant"] if "tenant" in row else row["id"]
    return Scope(tenant, row.get("mode", MODES[0]))


async def _continue_numbers(connection: AsyncConnection) -> None:
    """Let the journal's numbers go on behind those that were copied. SQLite's store looks for the last one itself."""
    if connection.dialect.name == "postgresql":
        await connection.exec_driver_sql(
            "SELECT setval('farebox_journal', coalesce(max(seq), 1), max(seq) IS NOT NULL) FROM ledger_command"
        )


def _said(error: DBAPIError | OSError) -> str:
    """The driver's sentence, without the statement and its values, which may be anybody's."""
    return str(error.orig if isinstance(error, DBAPIError) else error).partition("\n")[0]
