"""Orders: terms that never change, an end that comes once, and one automatic order at a time."""

import asyncio

import pytest
from msgspec.structs import replace

from gateway.database import Database
from gateway.identity.tenants import Tenants
from gateway.payments.operator import NoOperator, OperatorScope
from gateway.payments.orders import Order, Orders
from ledger.model import Scope
from tests.gateway.conftest import Clock
from tests.gateway.payment_histories import order as an_order

TERMS = an_order(tenant="", price_minor=1000, credited=10, bonus=1, spread=2, created_at_us=1)


@pytest.fixture
async def order(database: Database) -> Order:
    tenant = await Tenants(database).create_tenant("Acme", first=True)
    return replace(TERMS, tenant=tenant.id)


@pytest.fixture
def orders(database: Database, clock: Clock) -> Orders:
    return Orders(database, now_us=clock.now_us)


async def test_an_order_is_found_as_it_was_added_by_its_own_tenant_and_mode(orders: Orders, order: Order):
    assert await orders.add(order)
    assert await orders.find(order.scope, "ord_1") == order
    assert await orders.find(Scope(order.tenant, "test"), "ord_1") is None
    assert await orders.find(Scope("ten_other", "live"), "ord_1") is None
    assert order.block_id == "blk_1"


async def test_of_several_who_add_one_order_one_does(orders: Orders, order: Order):
    added = await asyncio.gather(*(orders.add(replace(order, price_minor=1000 + n)) for n in range(5)))
    assert added.count(True) == 1
    kept = await orders.find(order.scope, "ord_1")
    assert kept == replace(order, price_minor=1000 + added.index(True))


async def test_a_customer_has_one_open_automatic_order(orders: Orders, order: Order):
    first = replace(order, kind="auto")
    assert await orders.add(first)
    assert not await orders.add(replace(first, id="ord_2"))
    assert await orders.add(replace(first, id="ord_3", customer_id="cus_2"))
    assert await orders.add(replace(first, id="ord_4", mode="test"))
    assert await orders.add(replace(order, id="ord_5"))
    assert await orders.ended(first, "failed", failure="card_declined")
    assert await orders.add(replace(first, id="ord_6"))


async def test_an_order_ends_once_and_who_pays_late_has_paid(orders: Orders, order: Order, clock: Clock):
    await orders.add(order)
    assert await orders.ended(order, "expired")
    assert not await orders.ended(order, "failed", failure="card_declined")
    await orders.paid(order)
    assert not await orders.ended(order, "expired")
    found = await orders.find(order.scope, order.id)
    assert found == replace(order, status="paid", settled_at_us=clock.now_us())


async def test_orders_come_newest_first_page_by_page(orders: Orders, order: Order):
    # Several at once: then the id decides.
    made = [replace(order, id=f"ord_{n}", created_at_us=n // 2) for n in range(6)]
    for each in made:
        await orders.add(each)
    await orders.add(replace(order, id="ord_theirs", customer_id="cus_2"))
    walked: list[Order] = []
    while page := await orders.page(order.scope, "cus_1", before=walked[-1] if walked else None, limit=2):
        walked += page
    assert walked == made[::-1]
    assert await orders.of_customer(order.scope, "cus_1", since_us=2) == made[:3:-1]


async def test_what_the_processor_tells_is_kept_with_the_first_tenant(database: Database):
    tenants = Tenants(database)
    operator = OperatorScope(tenants, "test")
    with pytest.raises(NoOperator):
        await operator()
    first = await tenants.create_tenant("Acme", first=True)
    await tenants.create_tenant("Beta")
    assert await operator() == Scope(first.id, "test")
    await database.close()
    assert await operator() == Scope(first.id, "test")
