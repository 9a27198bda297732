"""Customers: one name is one customer, whoever sees it first and however many do at once."""

import asyncio
from typing import Any

import pytest

from gateway.database import Database
from gateway.errors import ApiError
from gateway.identity.customers import CustomerInfo, Customers
from gateway.identity.tenants import Tenants
from tests.gateway.conftest import Clock


@pytest.fixture
def customers(database: Database, clock: Clock) -> Customers:
    return Customers(database, now_us=clock.now_us)


@pytest.fixture
async def tenant_id(database: Database) -> str:
    return (await Tenants(database).create_tenant("One")).id


async def test_a_customer_is_created_on_first_sight_and_found_after(
    customers: Customers, database: Database, tenant_id: str, clock: Clock
):
    customer_id = await customers.resolve(tenant_id, "live", "alice")
    assert customer_id.startswith("cus_")
    assert await customers.resolve(tenant_id, "live", "alice") == customer_id
    assert await Customers(database).resolve(tenant_id, "live", "alice") == customer_id
    assert await customers.get(tenant_id, "live", customer_id) == CustomerInfo(customer_id, "alice", {}, clock.us)


async def test_tenants_and_modes_do_not_share_customers(customers: Customers, database: Database, tenant_id: str):
    other_id = (await Tenants(database).create_tenant("Other")).id
    found = {
        await customers.resolve(tenant, mode, "alice") for tenant in (tenant_id, other_id) for mode in ("live", "test")
    }
    assert len(found) == 4


async def test_all_who_see_a_name_first_see_one_customer(database: Database, database_url: str, tenant_id: str):
    processes = [Database(database_url) for _ in range(3)]
    resolvers = [Customers(process) for process in processes for _ in range(2)]
    found = await asyncio.gather(
        *(resolver.resolve(tenant_id, "live", "alice") for resolver in resolvers for _ in range(5))
    )
    assert len(set(found)) == 1
    for process in processes:
        await process.close()


async def test_a_known_customer_costs_no_query(customers: Customers, tenant_id: str, monkeypatch: pytest.MonkeyPatch):
    customer_id = await customers.resolve(tenant_id, "live", "alice")
    monkeypatch.delattr(Database, "read")
    monkeypatch.delattr(Database, "write")
    assert await customers.resolve(tenant_id, "live", "alice") == customer_id
    with pytest.raises(AttributeError):
        await customers.resolve(tenant_id, "live", "bob")


async def test_what_is_remembered_is_bounded(database: Database, tenant_id: str):
    customers = Customers(database, customers_max=2)
    first = [await customers.resolve(tenant_id, "live", name) for name in ("a", "b", "c")]
    assert [await customers.resolve(tenant_id, "live", name) for name in ("a", "b", "c")] == first


@pytest.mark.parametrize(
    ("external_id", "said"),
    [
        ("", "1 to 256 characters"),
        ("a" * 257, "1 to 256 characters"),
        ("a\nb", "control"),
        ("a\x00b", "control"),
        ("a\x7f", "control"),
        ("a\x85b", "control"),
        ("a\u2028b", "control"),
        ("a\ud800b", "control"),
        (" alice", "space"),
        ("alice ", "space"),
        ("cus_1", "may not begin with cus_"),
        ("req_1", "may not begin with req_"),
    ],
)
async def test_a_name_that_cannot_be_is_refused_before_it_is_stored(
    customers: Customers, tenant_id: str, external_id: str, said: str
):
    with pytest.raises(ApiError, match=said) as caught:
        await customers.resolve(tenant_id, "live", external_id, param="X-Quota-User")
    assert (caught.value.status, caught.value.param) == (400, "X-Quota-User")


@pytest.mark.parametrize(
    "external_id", ["1", "a" * 256, "user@example.com", "Ünï / cødé", "客户", "👩‍🚀", "customer_1"]
)
async def test_any_other_name_is_taken_as_it_comes(customers: Customers, tenant_id: str, external_id: str):
    customer_id = await customers.resolve(tenant_id, "live", external_id)
    assert (await customers.get(tenant_id, "live", customer_id)).external_id == external_id


async def test_spelling_tells_customers_apart(customers: Customers, tenant_id: str):
    assert await customers.resolve(tenant_id, "live", "Alice") != await customers.resolve(tenant_id, "live", "alice")


async def test_management_names_a_customer_by_either_id(customers: Customers, tenant_id: str):
    customer_id = await customers.resolve(tenant_id, "live", "alice")
    assert await customers.named(tenant_id, "live", customer_id) == customer_id
    assert await customers.named(tenant_id, "live", "alice") == customer_id
    assert await customers.named(tenant_id, "live", "bob") != customer_id


async def test_our_id_reaches_only_its_own_tenant_and_mode(customers: Customers, database: Database, tenant_id: str):
    customer_id = await customers.resolve(tenant_id, "live", "alice")
    other_id = (await Tenants(database).create_tenant("Other")).id
    for tenant, mode in ((tenant_id, "test"), (other_id, "live")):
        with pytest.raises(ApiError) as caught:
            await customers.named(tenant, mode, customer_id)
        assert caught.value.status == 404


async def test_who_is_read_while_all_is_forgotten_is_not_remembered(
    customers: Customers, tenant_id: str, monkeypatch: pytest.MonkeyPatch
):
    """They may have been erased since the row was read."""
    alice = await customers.resolve(tenant_id, "live", "alice")
    customers.forget()
    read = Customers._row

    async def reading(*args: Any) -> Any:
        row = await read(*args)
        customers.forget()
        return row

    with monkeypatch.context() as patched:
        patched.setattr(Customers, "_row", reading)
        await customers.named(tenant_id, "live", alice)
    assert customers.known(tenant_id, "live", alice) is None
    await customers.named(tenant_id, "live", alice)
    assert customers.known(tenant_id, "live", alice) == alice


async def test_one_who_leaves_does_not_stop_the_others(customers: Customers, tenant_id: str):
    leaving = asyncio.create_task(customers.resolve(tenant_id, "live", "alice"))
    staying = asyncio.create_task(customers.resolve(tenant_id, "live", "alice"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).startswith("cus_")
    with pytest.raises(asyncio.CancelledError):
        await leaving
