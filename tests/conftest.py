"""What all tests share: the length and the seed of the randomised campaigns, and the real servers."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest

from tests.servers.postgres import QUICK, PostgresServer
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
