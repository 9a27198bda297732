"""Which budgets a request is under: how rarely the database is asked, how soon a change holds, what an outage does."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.budget_book import BudgetBook, Subject
from gateway.billing.budgets import LEASE_S, OUTAGE_LEASE_S, OUTAGE_LOOK_S, Budgets
from gateway.billing.charging import Charging, Spender
from gateway.database import Database, DatabaseUnavailable, Rows
from gateway.identity.tenants import Tenants
from ledger.commands import Limit
from ledger.errors import LedgerUnavailable
from ledger.model import Scope
from pricing.periods import Recurrence
from tests.gateway.conftest import Clock

HOUR_US = 3600 * 1_000_000
MONTHLY = Recurrence(unit="month", time_zone="Europe/Berlin")
ALICE = Spender(app_id="app_1", key_id="key_1", customer_id="cus_alice")
BOB = Spender(app_id="app_1", key_id="key_1", customer_id="cus_bob")
NOBODY = Spender(app_id=None, key_id="key_1", customer_id=None)


class CountedDatabase(Database):
    """Counts reads, and lets a test hold them or make them fail."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads = 0
        self.away = False
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.reading = asyncio.Event()

    @asynccontextmanager
    async def read(self, rows: Rows) -> AsyncIterator[AsyncConnection]:
        self.reads += 1
        if self.away:
            raise DatabaseUnavailable("away")
        async with super().read(rows) as connection:
            yield connection
            self.reading.set()
            await self.go_on.wait()


@pytest.fixture
async def counted(database: Database, database_url: str) -> AsyncIterator[CountedDatabase]:
    counted = CountedDatabase(database_url)
    yield counted
    await counted.close()


class NoLedger:
    """Nobody asks it here."""


@pytest.fixture
def budgets(counted: CountedDatabase, clock: Clock) -> Budgets:
    ledger: Any = NoLedger()
    return Budgets(BudgetBook(counted), ledger, now_us=clock.now_us, monotonic_s=clock.monotonic_s)


@pytest.fixture
async def scope(database: Database) -> Scope:
    return Scope((await Tenants(database).create_tenant("One")).id, "live")


@pytest.fixture
def book(database: Database) -> BudgetBook:
    return BudgetBook(database)


async def new(book: BudgetBook, scope: Scope, type: Any, id: str, **more: Any) -> str:
    facts = {"amount": 100, "recurrence": MONTHLY, "thresholds_bps": (), "name": ""} | more
    return (await book.create(scope, Subject(type, id), **facts)).id


def ids(limits: tuple[Limit, ...]) -> list[str]:
    return [limit.wallet.wallet.removeprefix("limit:") for limit in limits]


async def test_a_spender_is_under_all_that_name_it_and_no_others(budgets: Budgets, book: BudgetBook, scope: Scope):
    tenant = await new(book, scope, "tenant", scope.tenant)
    app = await new(book, scope, "app", "app_1")
    key = await new(book, scope, "key", "key_1")
    daily = await new(book, scope, "customer", "cus_alice", recurrence=Recurrence(unit="day"))
    alice = await new(book, scope, "customer", "cus_alice")
    await new(book, scope, "app", "app_2")
    await new(book, scope, "key", "key_2")
    await new(book, Scope(scope.tenant, "test"), "tenant", scope.tenant)
    ended = await new(book, scope, "tenant", scope.tenant)
    await book.change(scope, ended, archived=True)
    assert sorted(ids(await budgets.limits(scope, ALICE))) == sorted([tenant, app, key, daily, alice])
    assert sorted(ids(await budgets.limits(scope, BOB))) == sorted([tenant, app, key])
    assert sorted(ids(await budgets.limits(scope, NOBODY))) == sorted([tenant, key])


async def test_who_has_no_budgets_is_looked_up_once_a_lease_and_else_not_waited_for(
    budgets: Budgets, counted: CountedDatabase, clock: Clock, scope: Scope
):
    assert await budgets.limits(scope, ALICE) == ()
    assert counted.reads == 1
    for spender in (ALICE, BOB, NOBODY):
        asked = budgets.limits(scope, spender)
        with pytest.raises(StopIteration) as answered:
            asked.send(None)  # It answers without giving way to anybody.
        assert answered.value.value == ()
        assert inspect.getcoroutinestate(asked) == inspect.CORO_CLOSED
    assert counted.reads == 1
    clock.pass_s(LEASE_S)
    await budgets.limits(scope, ALICE)
    assert counted.reads == 2


async def test_that_there_are_none_is_looked_up_again_before_its_lease_ends(
    budgets: Budgets, counted: CountedDatabase, book: BudgetBook, clock: Clock, scope: Scope
):
    assert not budgets.known_to_be_none(scope)
    await budgets.limits(scope, ALICE)
    assert budgets.known_to_be_none(scope)
    assert counted.reads == 1
    clock.pass_s(0.6 * LEASE_S)
    counted.reading.clear()
    counted.go_on.clear()
    assert budgets.known_to_be_none(scope)
    assert budgets.known_to_be_none(scope), "nobody waits for the look"
    await counted.reading.wait()
    assert counted.reads == 2, "it is one for all"
    counted.go_on.set()
    await budgets._under_way.popitem()[1]
    clock.pass_s(LEASE_S)
    assert not budgets.known_to_be_none(scope)


async def test_customers_are_looked_up_one_by_one_where_any_has_a_budget(
    budgets: Budgets, counted: CountedDatabase, book: BudgetBook, scope: Scope
):
    await new(book, scope, "customer", "cus_alice")
    for spender in (ALICE, BOB, ALICE, BOB, NOBODY):
        await budgets.limits(scope, spender)
    assert counted.reads == 3, "the tenant's, Alice's and Bob's"


async def test_all_who_ask_at_once_ask_once(budgets: Budgets, counted: CountedDatabase, scope: Scope):
    counted.go_on.clear()
    asking = [asyncio.create_task(budgets.limits(scope, ALICE)) for _ in range(50)]
    await counted.reading.wait()
    asking[0].cancel()
    counted.go_on.set()
    assert await asyncio.gather(*asking[1:]) == [()] * 49
    assert counted.reads == 1


async def test_a_change_is_known_at_once(budgets: Budgets, book: BudgetBook, scope: Scope):
    assert await budgets.limits(scope, ALICE) == ()
    made = await new(book, scope, "app", "app_1")
    assert await budgets.limits(scope, ALICE) == (), "within the lease nobody else knows"
    budgets.invalidate()
    assert ids(await budgets.limits(scope, ALICE)) == [made]


async def test_what_is_read_while_it_changes_is_not_kept(
    budgets: Budgets, counted: CountedDatabase, book: BudgetBook, scope: Scope
):
    counted.go_on.clear()
    early = asyncio.create_task(budgets.limits(scope, ALICE))
    await counted.reading.wait()
    made = await new(book, scope, "app", "app_1")
    budgets.invalidate()
    counted.go_on.set()
    assert await early == ()
    assert ids(await budgets.limits(scope, ALICE)) == [made]


# An outage.


async def test_what_was_known_goes_on_while_the_database_is_away(
    budgets: Budgets, counted: CountedDatabase, book: BudgetBook, clock: Clock, scope: Scope
):
    made = await new(book, scope, "app", "app_1")
    await budgets.limits(scope, ALICE)
    counted.away = True
    clock.pass_s(LEASE_S)
    asked = counted.reads
    for _ in range(5):
        assert ids(await budgets.limits(scope, ALICE)) == [made]
    assert counted.reads == asked + 1, "it is asked now and then"
    clock.pass_s(OUTAGE_LOOK_S)
    await budgets.limits(scope, ALICE)
    assert counted.reads == asked + 2
    clock.pass_s(OUTAGE_LEASE_S)
    with pytest.raises(LedgerUnavailable):
        await budgets.limits(scope, ALICE)
    counted.away = False
    assert ids(await budgets.limits(scope, ALICE)) == [made]


async def test_nothing_is_asked_of_the_ledger_where_nobody_knows_the_limits(
    budgets: Budgets, counted: CountedDatabase, scope: Scope
):
    counted.away = True
    ledger: Any = NoLedger()
    nobody: Any = None
    command: Any = type("Asked", (), {"scope": scope})()
    with pytest.raises(LedgerUnavailable) as away:
        await Charging(ledger, budgets=budgets, alerts=nobody, auto_buy=nobody).ask(command, ALICE)
    assert not away.value.in_doubt


# What a command is told of a budget.


@pytest.mark.parametrize(
    ("at", "months"),
    [
        (-HOUR_US - 1, [-1]),
        (-HOUR_US, [-1, 0]),
        (-1, [-1, 0]),
        (HOUR_US - 1, [-1, 0]),
        (HOUR_US, [0]),
        (30 * 24 * HOUR_US - 1, [0]),
    ],
)
async def test_the_neighbour_is_named_near_a_periods_end(
    budgets: Budgets, book: BudgetBook, clock: Clock, scope: Scope, *, at: int, months: list[int]
):
    """December 2023 begins in Berlin an hour before it does in Greenwich. Clocks may be an hour apart."""
    begins_us = 1_701_385_200_000_000
    made = await new(book, scope, "app", "app_1")
    starts = {-1: 1_698_793_200_000_000, 0: begins_us}
    clock.us = begins_us + at
    (limit,) = await budgets.limits(scope, ALICE)
    assert [period.start_us for period in limit.periods] == [starts[month] for month in months]
    assert [period.block_id for period in limit.periods] == [f"{made}_{starts[month]}" for month in months]


async def test_a_limit_changes_with_the_clock_within_one_lease(
    counted: CountedDatabase, book: BudgetBook, clock: Clock, scope: Scope
):
    """Whatever the lease: what is kept of a budget is which one it is, not which of its periods is now."""
    ledger: Any = NoLedger()
    budgets = Budgets(BudgetBook(counted), ledger, now_us=clock.now_us, lease_s=10**9, monotonic_s=clock.monotonic_s)
    await new(book, scope, "app", "app_1", recurrence=Recurrence(unit="day"))
    found = (await book.in_force(scope, None))[0][0]
    for _ in range(500):
        clock.us += 7 * 60 * 1_000_000
        (limit,) = await budgets.limits(scope, ALICE)
        assert limit == found.limit(clock.us)
    assert counted.reads == 1
