"""A database of the gateway's own tables, and clocks that a test sets."""

import io
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from gateway.database import Database
from gateway.logs import configure_logging
from tests.gateway.office import Office, open_office, paid_with
from tests.gateway.rig import empty_database, name_database
from tests.servers.stripe import FakeStripe

STORES = ("sqlite", "postgresql")
ON_EVERY_STORE = (
    *("test_journey_", "test_api_", "test_isolation", "test_idempotency", "test_readiness", "test_metrics"),
    "test_stripe_webhook",
    "test_reconciliation",
    "test_accounting",
)


@dataclass
class Clock:
    """Stands still until a test moves it."""

    us: int = 1_700_000_000_000_000

    def now_us(self) -> int:
        return self.us

    def monotonic_s(self) -> float:
        return self.us / 1_000_000

    def pass_s(self, seconds: float) -> None:
        self.us += round(seconds * 1_000_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database with all tables, of each kind that there is."""
    if request.param == "sqlite":
        (tmp_path / "farebox.db").write_bytes(empty_database())
        return f"sqlite:///{tmp_path / 'farebox.db'}"
    url: str = request.getfixturevalue("gateway_url")
    return url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture(autouse=True)
def store(request: pytest.FixtureRequest) -> None:
    """The kind of database that the gateways of this test have: that of its folder."""
    if getattr(request, "param", "sqlite") == "postgresql":
        name_database(request.getfixturevalue("tmp_path"), request.getfixturevalue("gateway_url"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever a gateway does that a user can see, it does on every kind of database: all journeys and the API."""
    everywhere = metafunc.module.__name__.rpartition(".")[2].startswith(ON_EVERY_STORE)
    alone = any(mark.name == "sqlite" for mark in metafunc.definition.iter_markers())
    if everywhere and not alone and "tmp_path" in metafunc.fixturenames:
        metafunc.parametrize("store", STORES, indirect=True)


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    async with open_office(tmp_path) as opened:
        yield opened


@pytest.fixture
def stripe() -> Iterator[FakeStripe]:
    with FakeStripe() as stripe:
        yield stripe


@pytest.fixture
async def till(tmp_path: Path, stripe: FakeStripe) -> AsyncIterator[Office]:
    """An office that takes payments."""
    async with open_office(tmp_path, **paid_with(stripe)) as opened:
        yield opened


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged, as JSON lines."""
    root, written = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers, root.level
    configure_logging("info", stream=written)
    yield written
    structlog.reset_defaults()
    root.handlers = handlers
    root.setLevel(level)
