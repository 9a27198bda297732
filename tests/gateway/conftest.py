"""A database of the gateway's own tables, and clocks that a test sets."""

import io
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog
from sqlmodel import SQLModel

from gateway.database import Database
from gateway.logs import configure_logging
from gateway.tables import ApiKey, App, AssetVersion, Customer, Tenant
from tests.gateway.office import Office, open_office

OURS = [table.__table__ for table in (Tenant, AssetVersion, App, ApiKey, Customer)]  # type: ignore[attr-defined]


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


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'farebox.db'}"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty SQLite file with the gateway's tables."""
    database = Database(database_url)
    async with database.write() as connection:
        await connection.run_sync(SQLModel.metadata.create_all, tables=OURS)
    yield database
    await database.close()


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    async with open_office(tmp_path) as opened:
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
