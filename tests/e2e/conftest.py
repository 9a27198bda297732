"""What the end-to-end tests start: an upstream, and installations in fresh folders."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.e2e.farebox import Farebox, Upstream, installed


class Install(Protocol):
    """Makes an installation in a fresh folder, with these settings over the usual ones."""

    def __call__(self, **settings: object) -> Farebox: ...


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
