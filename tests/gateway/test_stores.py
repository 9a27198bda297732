"""Where the books are, as `farebox serve` says it."""

import psycopg
import pytest

from gateway.migrations import migrate
from gateway.stores import open_store, whereabouts
from ledger.commands import Grant
from ledger.model import Funding, Scope, WalletRef
from ledger.store.protocol import SchemaMissing, StoreUnavailable
from ledger.store.row_security import GATEWAY_ROLE
from tests.servers.postgres import PostgresServer, database_of

PASSWORD = "hunter2"


async def test_a_file_is_named() -> None:
    assert await whereabouts("sqlite:////data/farebox.db") == "SQLite, /data/farebox.db"


@pytest.fixture
def migrated(postgres_url: str) -> str:
    migrate(postgres_url)
    return postgres_url


async def test_whoever_could_see_everything_works_as_the_gateways_role(
    migrated: str, postgres_server: PostgresServer
) -> None:
    said = await whereabouts(migrated.replace("postgres@", f"postgres:{PASSWORD}@"))
    assert said.startswith("PostgreSQL ")
    place = f"{database_of(migrated)} on 127.0.0.1:{postgres_server.port}"
    assert said.endswith(f"{place}, as {GATEWAY_ROLE}, logged in as postgres")
    assert PASSWORD not in said


async def test_a_login_of_its_own_stays_what_it_is(migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS app_of_whereabouts")
        connection.execute(f"CREATE ROLE app_of_whereabouts LOGIN IN ROLE {GATEWAY_ROLE}")
    said = await whereabouts(migrated.replace("//postgres@", "//app_of_whereabouts@"))
    assert said.endswith("as app_of_whereabouts")


async def test_on_a_server_no_hosts_clock_is_asked(migrated: str) -> None:
    """Hosts differ, and the ledger of all has one time. A file has no other clock than its host's."""

    def clock() -> int:
        raise AssertionError("the host's clock was asked")

    wallet = WalletRef("ten_1", "live", "customer:cus_1")
    grant = Grant(
        id="cmd_1",
        scope=Scope("ten_1", "live"),
        wallet=wallet,
        asset="credit",
        block_id="blk_1",
        amount=1,
        funding=Funding.PROMOTIONAL,
        operator_paid=True,
    )
    store = await open_store(migrated, clock=clock)
    try:
        await store.run_batch([grant])
    finally:
        await store.close()


async def test_what_is_not_there_is_said_as_the_store_says_it(postgres_url: str) -> None:
    with pytest.raises(SchemaMissing):
        await whereabouts(postgres_url)
    with pytest.raises(StoreUnavailable):
        await whereabouts("postgresql://nobody@127.0.0.1:1/farebox")
