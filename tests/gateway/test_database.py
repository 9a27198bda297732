"""The database's promises: durable, whole or not at all, one writer at a time, and no hang when it is away."""

import asyncio
import fcntl
import os
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text
from sqlmodel import col

from gateway.database import Database, DatabaseUnavailable
from gateway.tables import Tenant


def tenant(tenant_id: str) -> dict[str, object]:
    return {"id": tenant_id, "name": "One", "asset_code": "credit", "settings": {}, "created_at_us": 1}


async def names(database: Database) -> list[str]:
    async with database.read() as connection:
        return list(await connection.scalars(select(col(Tenant.id)).order_by(col(Tenant.id))))


async def test_sqlite_is_set_up_to_keep_what_it_was_given(database: Database):
    async with database.read() as connection:
        found = [
            (await connection.execute(text(f"PRAGMA {pragma}"))).scalar_one()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert found == ["wal", 2, 1, 5000]


async def test_a_block_that_fails_leaves_nothing(database: Database):
    async def fail_half_way() -> None:
        async with database.write() as connection:
            await connection.execute(insert(Tenant).values(**tenant("ten_1")))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_half_way()
    assert await names(database) == []


async def test_what_was_written_is_seen_by_another_process(database: Database, database_url: str):
    async with database.write() as connection:
        await connection.execute(insert(Tenant).values(**tenant("ten_1")))
    other = Database(database_url)
    assert await names(other) == ["ten_1"]
    await other.close()


async def test_many_writers_on_one_file_all_get_their_turn(database: Database, database_url: str):
    others = [Database(database_url) for _ in range(3)]

    async def write(through: Database, tenant_id: str) -> None:
        async with through.write() as connection:
            await connection.execute(insert(Tenant).values(**tenant(tenant_id)))

    expected = [f"ten_{n:02}" for n in range(24)]
    await asyncio.gather(*(write(others[n % 3], name) for n, name in enumerate(expected)))
    assert await names(database) == expected
    for other in others:
        await other.close()


async def test_a_writer_waits_for_whoever_holds_the_files_turn(database: Database, tmp_path: Path):
    holder = os.open(tmp_path / "farebox.db-lock", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    entered = asyncio.Event()

    async def write() -> None:
        async with database.write() as connection:
            entered.set()
            await connection.execute(insert(Tenant).values(**tenant("ten_1")))

    waiting = asyncio.create_task(write())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(entered.wait(), 0.05)
    os.close(holder)
    await waiting
    assert await names(database) == ["ten_1"]


async def test_one_who_stops_waiting_gives_the_turn_back(database: Database, tmp_path: Path):
    holder = os.open(tmp_path / "farebox.db-lock", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)

    async def write() -> None:
        async with database.write() as connection:
            await connection.execute(insert(Tenant).values(**tenant("ten_1")))

    gone = asyncio.create_task(write())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(gone), 0.05)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    os.close(holder)
    await write()
    assert await names(database) == ["ten_1"]


async def test_a_database_that_is_not_there_is_named(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'no-folder' / 'farebox.db'}")
    for attempt in (database.read, database.write):
        with pytest.raises(DatabaseUnavailable):
            async with attempt():
                pass
    await database.close()


async def test_a_database_without_its_tables_is_named(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'farebox.db'}")
    with pytest.raises(DatabaseUnavailable, match="no such table: tenants"):
        await names(database)
    await database.close()


async def test_a_turn_that_never_comes_is_an_outage(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gateway.database.TURN_TIMEOUT_S", 0.05)
    holder = os.open(tmp_path / "farebox.db-lock", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(DatabaseUnavailable):
            async with database.write():
                pass
    finally:
        os.close(holder)
    async with database.write() as connection:
        await connection.execute(insert(Tenant).values(**tenant("ten_1")))
    assert await names(database) == ["ten_1"]
