"""The servers that other tests rely on do what those rely on."""

import psycopg

from tests.servers.postgres import DURABLE, PostgresServer
from tests.servers.valkey import ValkeyServer


def test_each_test_has_a_database_of_its_own(postgres_server: PostgresServer, postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
    with psycopg.connect(postgres_server.url) as connection:
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)


def test_a_durable_server_that_is_killed_keeps_what_it_committed() -> None:
    server = PostgresServer(settings=DURABLE).create().start()
    try:
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
        server.kill()
        server.start()
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT one FROM kept").fetchone() == (1,)
            assert connection.execute("SHOW fsync").fetchone() == ("on",)
    finally:
        server.close()


def test_a_valkey_that_is_killed_forgets(redis_url: str) -> None:
    server = ValkeyServer().start()
    try:
        with server.client() as client:
            client.set("kept", 1)
        server.kill()
        server.start()
        with server.client() as client:
            assert client.get("kept") is None
    finally:
        server.close()
