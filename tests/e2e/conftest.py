"""What the end-to-end tests start: an upstream, and installations in fresh folders."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.e2e.farebox import Farebox, Upstream, installed
from tests.e2e.fleet import Fleets, running_servers


class Install(Protocol):
    """Makes an installation in a fresh folder, with these settings over the usual ones."""

    def __call__(self, **settings: object) -> Farebox: ...


FreshStore = Callable[[], dict[str, object]]
"""Makes settings that name a database of its own each time."""


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Upstream]:
    with Upstream(tmp_path) as upstream:
        yield upstream


@pytest.fixture
def install(tmp_path: Path, upstream: Upstream) -> Iterator[Install]:
    count = 0
    with ExitStack() as stack:

        def make(**settings: object) -> Farebox:
            nonlocal count
            count += 1
            return stack.enter_context(installed(tmp_path / f"installation-{count}", upstream.url, settings=settings))

        yield make


@pytest.fixture(scope="session")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleets]:
    """One for all modules: it takes ten seconds to start."""
    with running_servers() as servers:
        fleets = Fleets(tmp_path_factory.mktemp("fleets"), servers)
        yield fleets
        fleets.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh_store(request: pytest.FixtureRequest) -> FreshStore:
    """Either store; PostgreSQL is durable."""
    if request.param == "sqlite":
        return dict
    servers = request.getfixturevalue("fleets").servers
    return lambda: {"database_url": servers.postgres.create_database()}
