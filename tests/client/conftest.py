"""A gateway, and clients of it."""

from collections.abc import Iterator

import pytest

from farebox import Client
from tests.e2e.farebox import Farebox, installed

NOBODY = "http://127.0.0.1:9/v1"
"""The upstream: nothing here asks a model."""


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farebox]:
    """One that is served; its books are right in the end."""
    with installed(tmp_path_factory.mktemp("client"), NOBODY) as farebox:
        farebox.serve()
        yield farebox
        farebox.verify()


@pytest.fixture
def base_url(installation: Farebox) -> str:
    return installation.gateways[0].base_url


@pytest.fixture
def client(installation: Farebox, base_url: str) -> Iterator[Client]:
    with Client(base_url, installation.live_key) as client:
        yield client


@pytest.fixture
def metric(client: Client) -> str:
    """One whose unit costs half a credit."""
    client.create_metric("image", name="Image", idempotency_key="metric")
    client.create_rule("image", credits="0.5", idempotency_key="rule")
    return "image"
