"""The faults that other tests inject happen where they say."""

import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import asyncpg
import psycopg
import pytest
import redis

from tests.servers.postgres import PostgresServer
from tests.servers.postgres_proxy import PostgresProxy, Spot
from tests.servers.proxy import Proxy
from tests.servers.standby import Pair
from tests.servers.valkey import ValkeyServer

COMMITTED: Final = {Spot.BEFORE_STATEMENT: 0, Spot.BEFORE_COMMIT: 0, Spot.AFTER_COMMIT: 1}
"""Rows that a transaction leaves behind that was cut there."""

LOST: Final = (ConnectionError, asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError)


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[PostgresProxy]:
    proxy = PostgresProxy(postgres_server.port).start()
    yield proxy
    proxy.close()


@pytest.fixture
def url(postgres_url: str) -> str:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE counted (number int)")
    return postgres_url


def rows(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT count(*) FROM counted").fetchone()
    assert found is not None
    count: int = found[0]
    return count


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


async def insert(connection: asyncpg.Connection, *, explicit: bool) -> None:
    if not explicit:
        # Not read to its end: one row is all that is wanted.
        await connection.fetchval("INSERT INTO counted VALUES ($1) RETURNING number", 1)
        return
    async with connection.transaction():
        await connection.execute("SELECT set_config('a.b', $1, true)", "c")
        await connection.execute("INSERT INTO counted VALUES ($1)", 1)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("spot", list(Spot))
async def test_a_transaction_is_cut_where_it_was_wanted(
    proxy: PostgresProxy, url: str, spot: Spot, explicit: bool
) -> None:
    async with connected(proxy.url_of(url)) as connection:
        await insert(connection, explicit=explicit)
        proxy.cut_at(spot, every=2)
        await insert(connection, explicit=explicit)
        with pytest.raises(LOST):
            await insert(connection, explicit=explicit)
    assert proxy.cuts == 1
    assert rows(url) == 2 + COMMITTED[spot]

    async with connected(proxy.url_of(url)) as connection:
        await insert(connection, explicit=explicit)
    assert rows(url) == 3 + COMMITTED[spot], "cut once, as often as was said"


@pytest.mark.parametrize("spot", list(Spot))
def test_it_reads_simple_queries_too(proxy: PostgresProxy, url: str, spot: Spot) -> None:
    def insert_and_commit() -> None:
        with psycopg.connect(proxy.url_of(url)) as connection:
            connection.execute("INSERT INTO counted VALUES (1)")

    proxy.cut_at(spot)
    with pytest.raises(psycopg.OperationalError):
        insert_and_commit()
    assert proxy.cuts == 1
    assert rows(url) == COMMITTED[spot]


def test_a_read_is_no_transaction_to_cut(proxy: PostgresProxy, url: str) -> None:
    proxy.cut_at(Spot.BEFORE_COMMIT)
    with psycopg.connect(proxy.url_of(url)) as connection:
        assert connection.execute("SELECT count(*) FROM counted").fetchone() == (0,)
    assert (proxy.cuts, proxy.transactions) == (0, 0)


def test_a_proxy_hangs_for_as_long_as_it_was_told(proxy: PostgresProxy, url: str) -> None:
    with psycopg.connect(proxy.url_of(url), autocommit=True) as connection:
        began = time.monotonic()
        proxy.hang(for_s=0.3)
        assert proxy.hanging
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert time.monotonic() - began >= 0.3
        assert not proxy.hanging


def test_a_proxy_delays_and_cuts(valkey_server: ValkeyServer) -> None:
    proxy = Proxy(valkey_server.port).start()
    try:
        with redis.Redis(port=proxy.port) as client:
            assert client.ping()
            proxy.slow(by_s=0.1)
            began = time.monotonic()
            assert client.ping()
            assert time.monotonic() - began >= 0.2
            proxy.slow(by_s=0)
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(100) == b"+PONG\r\n"
            proxy.cut()
            assert client.recv(100) == b""
    finally:
        proxy.close()


def test_a_connection_to_a_server_that_is_gone_is_closed() -> None:
    proxy = Proxy(1).start()
    try:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client, suppress(ConnectionResetError):
            assert client.recv(1) == b""
    finally:
        proxy.close()


def test_what_a_primary_confirmed_its_promoted_standby_has() -> None:
    pair = Pair().start()
    try:
        with psycopg.connect(pair.url_of("postgres"), autocommit=True) as connection:
            connection.execute("CREATE TABLE counted (number int)")
            connection.execute("INSERT INTO counted VALUES (1)")
        with (
            psycopg.connect(pair.standby.url, autocommit=True) as connection,
            pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
        ):
            connection.execute("INSERT INTO counted VALUES (2)")
        pair.primary.kill()
        pair.promote()
        with psycopg.connect(pair.url_of("postgres"), autocommit=True) as connection:
            connection.execute("INSERT INTO counted VALUES (3)")
            assert connection.execute("SELECT number FROM counted ORDER BY 1").fetchall() == [(1,), (3,)]
    finally:
        pair.close()
