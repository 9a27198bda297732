"""What all tests share: the length and the seed of the randomised campaigns, and the real servers."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import psycopg
import pytest

from gateway.migrations import migrate
from tests.servers.postgres import QUICK, PostgresServer, database_of
from tests.servers.valkey import ValkeyServer


@dataclass(frozen=True, slots=True)
class Campaign:
    """How long a randomised campaign runs, and the seed that repeats it."""

    seed: int
    long: bool

    def rounds(self, *, short: int, long: int) -> int:
        """*short* in `make check`, *long* in `make soak`."""
        return long if self.long else short

    def random(self) -> random.Random:
        """A fresh generator; every test that takes one starts from the same seed."""
        return random.Random(self.seed)


CAMPAIGN = Campaign(
    seed=int(os.environ.get("FAREBOX_TEST_SEED", "20250115")),
    long=os.environ.get("FAREBOX_TEST_CAMPAIGN") == "long",
)

# What a check tries must not change from run to run: one that is red is red for everybody. A soak tries new examples.
# How slow or how picky the making of examples is says nothing about the product, and hangs on the machine.
hypothesis.settings.register_profile(
    "check",
    derandomize=not CAMPAIGN.long,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
)
hypothesis.settings.load_profile("check")


def pytest_report_header() -> str:
    return f"campaigns: {'long' if CAMPAIGN.long else 'short'}, FAREBOX_TEST_SEED={CAMPAIGN.seed}"


@pytest.fixture(scope="session")
def campaign() -> Campaign:
    return CAMPAIGN


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A quick PostgreSQL for the whole session; it is not durable."""
    server = PostgresServer(settings=QUICK).create().start()
    yield server
    server.close()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database of the test's own, as the superuser."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


# As a superuser for whom no trigger fires: the journal would refuse.
EMPTY_DATABASE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid();
SET session_replication_role = replica;
DO $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT oid::regclass::text FROM pg_class WHERE relrowsecurity LOOP
        EXECUTE 'DELETE FROM ' || name;
    END LOOP;
    FOR name IN SELECT seqrelid::regclass::text FROM pg_sequence LOOP
        EXECUTE 'ALTER SEQUENCE ' || name || ' RESTART';
    END LOOP;
END $$
"""


@pytest.fixture(scope="session")
def migrated_database(postgres_server: PostgresServer) -> Iterator[psycopg.Connection]:
    """A migrated database, as the superuser. Its owner, `farebox_owner`, is none.

    Who a gateway logs in as is `farebox_login`: it owns nothing and may only work as the gateway's role.
    """
    url = postgres_server.create_database()
    name = database_of(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE farebox_owner LOGIN CREATEROLE")
        connection.execute(f"ALTER DATABASE {name} OWNER TO farebox_owner")
        migrate(postgres_server.url_of(name, user="farebox_owner"))
        connection.execute("CREATE ROLE farebox_login LOGIN IN ROLE farebox_gateway")
        # Another test's migration may have made the role before: then its owner had to be let in by hand.
        connection.execute("GRANT farebox_gateway TO farebox_owner")
        yield connection


@pytest.fixture
def gateway_url(postgres_server: PostgresServer, migrated_database: psycopg.Connection) -> str:
    """That database, emptied, as a gateway that is held to its policies.

    One for all tests, because emptying it takes milliseconds, and copying a fresh one a quarter of a second.
    """
    migrated_database.execute(EMPTY_DATABASE)
    return postgres_server.url_of(migrated_database.info.dbname, user="farebox_login")


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """A Redis-protocol server for the whole session."""
    server = ValkeyServer().start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[ValkeyServer]:
    """A cluster of one node for the whole session."""
    server = ValkeyServer(cluster=True).start()
    yield server
    server.close()


@pytest.fixture
def redis_cluster_url(valkey_cluster: ValkeyServer) -> str:
    """That cluster, emptied."""
    with valkey_cluster.client() as client:
        client.flushall()
    return valkey_cluster.url


@pytest.fixture
def redis_url(valkey_server: ValkeyServer) -> str:
    """That server, emptied."""
    with valkey_server.client() as client:
        client.flushall()
    return valkey_server.url
