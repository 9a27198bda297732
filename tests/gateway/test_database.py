"""The database's promises: durable, whole or not at all, for who names the rows, and no hang when it is away."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import ProgrammingError
from sqlmodel import col

from gateway.database import Database, DatabaseUnavailable, Joined, of
from gateway.migrations import migrate
from gateway.postgres import CONNECTIONS_MAX
from gateway.tables import Tenant
from tests.gateway.rig import empty_database
from tests.servers.postgres import QUICK, PostgresServer, database_of

TEN_1: Final = of("ten_1")


def tenant(tenant_id: str) -> dict[str, object]:
    return {"id": tenant_id, "name": "One", "asset_code": "credit", "settings": {}, "created_at_us": 1}


async def names(database: Database) -> list[str]:
    async with database.read_every_tenant() as connection:
        return list(await connection.scalars(select(col(Tenant.id)).order_by(col(Tenant.id))))


async def write(database: Database, tenant_id: str = "ten_1") -> None:
    async with database.write(of(tenant_id)) as connection:
        await connection.execute(insert(Tenant).values(**tenant(tenant_id)))


async def test_a_block_that_fails_leaves_nothing(database: Database):
    async def fail_half_way() -> None:
        async with database.write(TEN_1) as connection:
            await connection.execute(insert(Tenant).values(**tenant("ten_1")))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_half_way()
    assert await names(database) == []


async def test_what_was_written_is_seen_by_another_process(database: Database, database_url: str):
    await write(database)
    other = Database(database_url)
    assert await names(other) == ["ten_1"]
    await other.close()


async def test_many_writers_all_get_their_turn(database: Database, database_url: str):
    others = [Database(database_url) for _ in range(3)]
    expected = [f"ten_{n:02}" for n in range(24)]
    await asyncio.gather(*(write(others[n % 3], name) for n, name in enumerate(expected)))
    assert await names(database) == expected
    for other in others:
        await other.close()


async def test_a_part_of_a_transaction_stays_within_its_rows(database: Database):
    async with database.write(of("ten_1", "live")) as connection:
        part = Joined(connection, of("ten_1", "live"))
        async with part.write(TEN_1) as same:
            assert same is connection
        for beyond in (of("ten_2"), of("ten_1", "test")):
            with pytest.raises(AssertionError, match="does not name"):
                part.read(beyond)


@pytest.mark.parametrize("name", ["", "*", "ten_1,ten_2", "ten_1'", "ten 1"])
def test_a_name_that_could_be_read_as_another_is_none(name: str):
    with pytest.raises(ValueError, match="no name"):
        of(name)
    with pytest.raises(ValueError, match="no name"):
        of("ten_1", name)


class TestSqlite:
    @pytest.fixture
    def database_url(self, tmp_path: Path) -> str:
        (tmp_path / "farebox.db").write_bytes(empty_database())
        return f"sqlite:///{tmp_path / 'farebox.db'}"

    @pytest.fixture
    def turn(self, tmp_path: Path, database: Database) -> Iterator[int]:
        """The turn to write, which somebody else has; closing the descriptor gives it up."""
        holder = os.open(tmp_path / "farebox.db-lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(holder, fcntl.LOCK_EX)
        yield holder
        with contextlib.suppress(OSError):
            os.close(holder)

    async def test_it_is_set_up_to_keep_what_it_was_given(self, database: Database):
        async with database.read(TEN_1) as connection:
            found = [
                (await connection.execute(text(f"PRAGMA {pragma}"))).scalar_one()
                for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            ]
        assert found == ["wal", 2, 1, 5000]

    async def test_a_writer_waits_for_whoever_holds_the_files_turn(self, database: Database, turn: int):
        waiting = asyncio.create_task(write(database))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        assert await names(database) == []
        os.close(turn)
        await waiting
        assert await names(database) == ["ten_1"]

    async def test_one_who_stops_waiting_gives_the_turn_back(self, database: Database, turn: int):
        gone = asyncio.create_task(write(database))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(gone), 0.05)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        os.close(turn)
        await write(database)
        assert await names(database) == ["ten_1"]

    async def test_a_database_that_is_not_there_is_named(self, tmp_path: Path):
        database = Database(f"sqlite:///{tmp_path / 'no-folder' / 'farebox.db'}")
        for attempt in (database.read, database.write):
            with pytest.raises(DatabaseUnavailable):
                async with attempt(TEN_1):
                    pass
        await database.close()

    async def test_a_database_without_its_tables_is_named(self, tmp_path: Path):
        database = Database(f"sqlite:///{tmp_path / 'other.db'}")
        with pytest.raises(DatabaseUnavailable, match="no such table: tenants"):
            await names(database)
        await database.close()

    async def test_a_turn_that_never_comes_is_an_outage(
        self, database: Database, turn: int, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("gateway.database.TURN_TIMEOUT_S", 0.05)
        with pytest.raises(DatabaseUnavailable):
            await write(database)
        os.close(turn)
        await write(database)
        assert await names(database) == ["ten_1"]


class TestPostgres:
    @pytest.fixture
    def database_url(self, gateway_url: str) -> str:
        return gateway_url

    async def test_only_the_rows_that_are_named_are_seen_or_written(self, database: Database):
        await write(database, "ten_1")
        await write(database, "ten_2")
        async with database.read(of("ten_2")) as connection:
            assert list(await connection.scalars(select(col(Tenant.id)))) == ["ten_2"]
        with pytest.raises(ProgrammingError, match="row-level security"):
            async with database.write(of("ten_1")) as connection:
                await connection.execute(insert(Tenant).values(**tenant("ten_3")))
        assert await names(database) == ["ten_1", "ten_2"]

    async def test_a_name_does_not_outlive_its_transaction(self, database: Database):
        await write(database)
        assert database.engine.pool.size() == CONNECTIONS_MAX  # type: ignore[attr-defined]
        async with database.read(TEN_1), database.engine.connect() as other:
            assert (await other.scalars(select(col(Tenant.id)))).all() == []
        async with database.engine.connect() as same:
            assert (await same.scalars(select(col(Tenant.id)))).all() == []

    async def test_an_owner_becomes_the_gateways_role(self, postgres_server: PostgresServer, gateway_url: str):
        for user in ("postgres", "farebox_owner"):
            database = Database(postgres_server.url_of(database_of(gateway_url), user=user))
            async with database.read(TEN_1) as connection:
                assert await connection.scalar(text("SELECT current_user")) == "farebox_gateway"
            await database.close()

    async def test_a_database_without_its_tables_is_named(self, postgres_url: str):
        database = Database(postgres_url)
        for asked in (names(database), database.check()):
            with pytest.raises(DatabaseUnavailable, match="run `farebox migrate`"):
                await asked
        await database.close()

    async def test_a_server_that_is_not_there_is_named(self):
        database = Database("postgresql://postgres@127.0.0.1:1/farebox")
        for attempt in (database.read, database.write):
            with pytest.raises(DatabaseUnavailable, match=r"refused|Connect call failed"):
                async with attempt(TEN_1):
                    pass
        await database.close()

    async def test_the_first_of_several_hosts_that_may_be_written_serves(self, gateway_url: str):
        head, _, rest = gateway_url.partition("127.0.0.1")
        database = Database(f"{head}127.0.0.1:1,127.0.0.1{rest}?target_session_attrs=read-write")
        await write(database)
        assert await names(database) == ["ten_1"]
        await database.close()

    async def test_connections_that_were_cut_are_replaced_unseen(
        self, database: Database, postgres_server: PostgresServer
    ):
        async with contextlib.AsyncExitStack() as all_of_them:
            for _ in range(CONNECTIONS_MAX):
                await all_of_them.enter_async_context(database.read(TEN_1))
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'farebox_login'"
            assert connection.execute(cut).fetchone() == (CONNECTIONS_MAX,)
        await write(database)
        await asyncio.gather(*(names(database) for _ in range(CONNECTIONS_MAX)))

    async def test_more_who_ask_than_connections_wait_for_one(self, database: Database):
        await write(database)
        found = await asyncio.gather(*(names(database) for _ in range(10 * CONNECTIONS_MAX)))
        assert found == [["ten_1"]] * 10 * CONNECTIONS_MAX

    async def test_waiting_for_a_connection_has_an_end(self, gateway_url: str, monkeypatch: pytest.MonkeyPatch):
        database = Database(gateway_url)
        async with contextlib.AsyncExitStack() as all_of_them:
            for _ in range(CONNECTIONS_MAX):
                await all_of_them.enter_async_context(database.read(TEN_1))
            monkeypatch.setattr("gateway.database.ACQUIRE_TIMEOUT_S", 0.05)
            with pytest.raises(DatabaseUnavailable, match="in time"):
                await names(database)
        monkeypatch.undo()
        assert await names(database) == []
        await database.close()


class TestPostgresThatHangs:
    """A server of its own, since the others would hang too."""

    @pytest.fixture
    def server(self) -> Iterator[PostgresServer]:
        server = PostgresServer(settings={**QUICK, "synchronous_commit": "on"}).create().start()
        migrate(server.url)
        yield server
        server.resume()
        server.close()

    @pytest.fixture
    async def database(self, server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
        for limit in ("ACQUIRE_TIMEOUT_S", "TRANSACTION_TIMEOUT_S"):
            monkeypatch.setattr(f"gateway.database.{limit}", 1.0)
        database = Database(server.url)
        yield database
        await database.close()

    async def test_who_asks_is_told_in_time_and_it_works_again_by_itself(
        self, server: PostgresServer, database: Database
    ):
        await write(database)
        server.pause()
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(write(database, "ten_2"), 5)  # A connection that is open, then new ones.
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(names(database), 5)
        server.resume()
        assert await names(database) == ["ten_1"]
        server.kill()
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(names(database), 5)
        server.start()
        await write(database, "ten_3")
        assert await names(database) == ["ten_1", "ten_3"]

    async def test_a_server_that_hangs_at_the_end_of_a_transaction_keeps_no_connection(
        self, server: PostgresServer, database: Database
    ):
        async def hung(ready: asyncio.Event) -> None:
            async with database.read(TEN_1) as connection:
                await connection.execute(text("SELECT 1"))
                ready.set()
                await paused.wait()

        paused = asyncio.Event()
        readers = [(ready, asyncio.create_task(hung(ready))) for ready in (asyncio.Event() for _ in range(5))]
        for ready, _ in readers:
            await ready.wait()
        server.pause()
        paused.set()
        done, waiting = await asyncio.wait([reader for _, reader in readers], timeout=5)
        assert (len(done), waiting) == (5, set())
        await asyncio.gather(*done, return_exceptions=True)
        server.resume()
        assert await names(database) == []
