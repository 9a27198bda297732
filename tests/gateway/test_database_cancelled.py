"""Whoever is cancelled at the database, wherever they wait for it, keeps nobody else out of it."""

import asyncio
import gc
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.pool import QueuePool
from sqlmodel import col

from gateway.database import Database, of
from gateway.tables import Tenant
from tests.gateway.dying import WAITS_MAX, Moment, dies

TEN_1: Final = of("ten_1")
TENANTS: Final = select(col(Tenant.id), col(Tenant.name))

SOON_S: Final = 4.0
"""A busy machine takes so long at most; who is kept out waits longer (`BUSY_TIMEOUT_MS`)."""


@pytest.fixture(autouse=True)
def nothing_is_tidied_up() -> Iterator[None]:
    """The garbage collector would let go of what is left behind; not soon enough, but perhaps within a test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """One whose connections are open already: the first is opened in the test."""
    database = Database(database_url)
    await add(database)
    yield database
    await database.close()


async def add(database: Database) -> None:
    """What a decision and its record are: queries and changes in one transaction."""
    async with database.write(TEN_1) as connection:
        found = (await connection.execute(TENANTS)).all()
        if not found:
            row = {"id": "ten_1", "name": "", "asset_code": "credit", "settings": {}, "created_at_us": 1}
            await connection.execute(insert(Tenant).values(**row))
        await connection.execute(text("UPDATE tenants SET name = name || 'a'"))
        await connection.execute(TENANTS)


async def look(database: Database) -> None:
    async with database.read(TEN_1) as connection:
        await connection.execute(TENANTS)
        await connection.execute(TENANTS)


Work = Callable[[Database], Awaitable[None]]


async def is_open_to_others(database: Database, url: str) -> None:
    """A write has its turn; all connections are back; and no snapshot is held, which would let the log grow."""
    async with asyncio.timeout(SOON_S):
        await add(database)
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    assert pool.checkedout() == 0
    if url.startswith("sqlite"):
        other = sqlite3.connect(url.removeprefix("sqlite:///"))
        (held, *_) = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        other.close()
        assert not held


@pytest.mark.parametrize("moment", ["at once", "as the answer comes", "again and again"])
@pytest.mark.parametrize("work", [add, look])
async def test_at_any_wait(database: Database, database_url: str, work: Work, moment: Moment):
    for at in range(1, WAITS_MAX):
        died = await dies(work(database), at=at, moment=moment)
        await is_open_to_others(database, database_url)
        if not died:
            break
    assert at > 4, "it waits for each statement"


@pytest.mark.parametrize("work", [add, look])
async def test_while_the_first_connection_is_made(database_url: str, work: Work):
    for at in range(1, WAITS_MAX):
        database = Database(database_url)
        died = await dies(work(database), at=at)
        await is_open_to_others(database, database_url)
        await database.close()
        if not died:
            break
    assert at > 8, "it waits for the connection, too"
