"""The ledger in a file, with a clock that a test sets."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ledger.ledger import Ledger
from ledger.store.sqlite import SqliteStore
from tests.ledger.rig import Clock, Say, create_sqlite


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def say() -> Say:
    return Say()


@pytest.fixture
def database_path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    create_sqlite(path)
    return path


@pytest.fixture
async def sqlite_store(database_path: Path, clock: Clock) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(f"sqlite:///{database_path}", clock=clock)
    yield store
    await store.close()


@pytest.fixture
async def ledger(sqlite_store: SqliteStore, clock: Clock, say: Say) -> Ledger:
    return await Ledger.open(sqlite_store, clock=clock, new_command_id=say.id)
