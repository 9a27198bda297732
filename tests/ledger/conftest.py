"""The ledger on each store, with a clock that a test sets."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from gateway.migrations import migrate
from ledger.ledger import Ledger
from ledger.store.postgres import PostgresStore
from ledger.store.protocol import Store
from ledger.store.sqlite import SqliteStore
from tests.ledger.rig import Clock, Database, PostgresDatabase, Say, SqliteDatabase, create_sqlite
from tests.servers.postgres import PostgresServer, database_of

NewDatabase = Callable[[], Database]

STORES = ("sqlite", "postgres")
"""Every store does all that the tests say which take ``new_database``, ``database``, ``store`` or ``ledger``."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def say() -> Say:
    return Say()


@pytest.fixture(scope="session")
def postgres_template(postgres_server: PostgresServer) -> Iterator[str]:
    """The name of a database that is migrated once; a test gets a copy of it."""
    url = postgres_server.create_database()
    migrate(url)
    yield database_of(url)
    postgres_server.drop_database(url)


@pytest.fixture
def new_sqlite(tmp_path: Path) -> NewDatabase:
    made: list[Database] = []

    def new() -> Database:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(SqliteDatabase(folder / "ledger.db"))
        return made[-1]

    return new


@pytest.fixture
def new_postgres(postgres_server: PostgresServer, postgres_template: str) -> Iterator[NewDatabase]:
    made: list[str] = []

    def new() -> Database:
        made.append(postgres_server.create_database(template=postgres_template))
        return PostgresDatabase(made[-1])

    yield new
    for url in made:
        postgres_server.drop_database(url)


@pytest.fixture(params=STORES)
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    made: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    return made


@pytest.fixture
def database(new_database: NewDatabase) -> Database:
    return new_database()


@pytest.fixture
async def store(database: Database, clock: Clock) -> AsyncIterator[Store]:
    opened = await database.open(clock)
    yield opened
    await opened.close()


@pytest.fixture
async def ledger(store: Store, clock: Clock, say: Say) -> Ledger:
    return await Ledger.open(store, clock=clock, new_command_id=say.id)


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
def postgres_database(new_postgres: NewDatabase) -> PostgresDatabase:
    made = new_postgres()
    assert isinstance(made, PostgresDatabase)
    return made


@pytest.fixture
async def postgres_store(postgres_database: PostgresDatabase, clock: Clock) -> AsyncIterator[PostgresStore]:
    store = await PostgresStore.open(postgres_database.url, clock=clock)
    yield store
    await store.close()
