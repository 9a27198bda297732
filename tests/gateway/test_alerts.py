"""What wallets are watched for: how rarely the database is asked, how soon a change holds, what an outage does."""

import asyncio
import inspect
from typing import Any

import pytest

from gateway.billing.alerts import AWAY_S, LEASE_S, OUTAGE_LEASE_S, OUTAGE_WAIT_S, Alerts
from gateway.database import Database
from gateway.identity.customer_rows import CustomerChange
from gateway.identity.customers import Customers
from gateway.identity.tenants import Tenants
from gateway.identity.wallets import app_wallet, customer_wallet, limit_wallet, pool_wallet
from ledger.alerts import EXHAUSTED
from ledger.commands import Reserve, ReserveLeg, Watch
from ledger.model import Alert, ReservationRef, Scope, WalletRef
from pricing.money import CREDIT
from tests.gateway.conftest import Clock
from tests.gateway.test_budgets import CountedDatabase, counted

__all__ = ["counted"]

OTHERS = Scope("ten_other", "live")


@pytest.fixture
def alerts(counted: CountedDatabase, clock: Clock) -> Alerts:
    return Alerts(counted, monotonic_s=clock.monotonic_s)


@pytest.fixture
def tenants(database: Database) -> Tenants:
    return Tenants(database)


@pytest.fixture
async def scope(tenants: Tenants) -> Scope:
    return Scope((await tenants.create_tenant("One")).id, "live")


async def customer(database: Database, scope: Scope, name: str, **settings: Any) -> WalletRef:
    change = CustomerChange(settings=settings)
    known, _ = await Customers(database).put(*scope, name, change, transactions=database)
    return customer_wallet(*scope, known.id)


def asked(scope: Scope, *wallets: WalletRef) -> Reserve:
    reservation = ReservationRef(*scope, "rsv_1")
    leg = ReserveLeg(wallets, 1, 1)
    return Reserve(id="cmd_1", scope=scope, reservation=reservation, asset="CREDIT", legs=(leg,), ttl_us=1)


def low(*millis: int) -> tuple[Alert, ...]:
    return (*(Alert("low", CREDIT.from_millis(each)) for each in millis), EXHAUSTED)


async def watched(alerts: Alerts, scope: Scope, *wallets: WalletRef) -> list[tuple[Alert, ...]]:
    watches = await alerts.watches(asked(scope, *wallets))
    assert [watch.wallet for watch in watches] == list(wallets)
    return [watch.alerts for watch in watches]


async def test_the_tenants_thresholds_are_its_customers_and_its_developers(
    alerts: Alerts, tenants: Tenants, database: Database, scope: Scope
) -> None:
    alice = await customer(database, scope, "alice")
    wallets = (alice, app_wallet(*scope, "app_1"), pool_wallet(*scope, "app_1"))
    assert await watched(alerts, scope, *wallets) == [(EXHAUSTED,)] * 3
    await tenants.change_tenant(scope.tenant, low_balance_thresholds=(1000, 5000))
    alerts.invalidate()
    assert await watched(alerts, scope, *wallets) == [low(5000, 1000)] * 3


async def test_of_wallets_that_nobody_is_told_of_and_of_other_tenants_nothing_is_said(
    alerts: Alerts, scope: Scope
) -> None:
    wallets = (
        limit_wallet(*scope, "bud_1"),
        customer_wallet(*OTHERS, "cus_1"),
        customer_wallet(scope.tenant, "test", "c"),
    )
    assert await alerts.watches(asked(scope, *wallets)) == ()


async def test_a_customers_own_thresholds_stand_for_the_tenants(
    alerts: Alerts, tenants: Tenants, database: Database, scope: Scope
) -> None:
    await tenants.change_tenant(scope.tenant, low_balance_thresholds=(5000,))
    alice = await customer(database, scope, "alice", low_balance_thresholds=[7000, 2000])
    bob = await customer(database, scope, "bob", low_balance_thresholds=[])
    carol = await customer(database, scope, "carol", low_balance_thresholds=None)
    assert await watched(alerts, scope, alice, bob, carol) == [low(7000, 2000), low(), low(5000)]


async def test_who_agreed_to_be_topped_up_is_watched_for_that(
    alerts: Alerts, tenants: Tenants, database: Database, scope: Scope
) -> None:
    await tenants.change_tenant(scope.tenant, low_balance_thresholds=(5000,))
    due = Alert("top_up", CREDIT.from_millis(3000))
    alice = await customer(database, scope, "alice", auto_topup_enabled=True, auto_topup_threshold=3000)
    bob = await customer(database, scope, "bob", auto_topup_enabled=False, auto_topup_threshold=3000)
    carol = await customer(database, scope, "carol", auto_topup_enabled=True)
    assert await watched(alerts, scope, alice, bob, carol) == [(*low(5000)[:-1], due, EXHAUSTED), low(5000), low(5000)]


async def test_settings_that_nobody_can_read_say_nothing(alerts: Alerts, database: Database, scope: Scope) -> None:
    alice = await customer(database, scope, "alice", low_balance_thresholds="5000", auto_topup_enabled="yes")
    assert await watched(alerts, scope, alice) == [(EXHAUSTED,)]


async def test_who_has_nothing_of_their_own_is_not_looked_up(
    alerts: Alerts, counted: CountedDatabase, database: Database, clock: Clock, scope: Scope
) -> None:
    wallets = [await customer(database, scope, name) for name in ("alice", "bob", "carol")]
    await watched(alerts, scope, wallets[0])
    assert counted.reads == 1
    for wallet in wallets:
        asking = alerts.watches(asked(scope, wallet))
        with pytest.raises(StopIteration) as answered:
            asking.send(None)  # It answers without giving way to anybody.
        assert answered.value.value == (Watch(wallet, (EXHAUSTED,)),)
        assert inspect.getcoroutinestate(asking) == inspect.CORO_CLOSED
    assert counted.reads == 1
    clock.pass_s(LEASE_S)
    await watched(alerts, scope, wallets[0])
    assert counted.reads == 2


async def test_once_one_has_each_customer_is_looked_up_once_a_lease(
    alerts: Alerts, counted: CountedDatabase, database: Database, scope: Scope
) -> None:
    alice = await customer(database, scope, "alice", low_balance_thresholds=[1000])
    bob = await customer(database, scope, "bob")
    for _ in range(3):
        assert await watched(alerts, scope, alice, bob) == [low(1000), low()]
    assert counted.reads == 3


async def test_all_who_ask_at_once_are_answered_by_one_look_up(
    alerts: Alerts, counted: CountedDatabase, database: Database, scope: Scope
) -> None:
    alice = await customer(database, scope, "alice")
    found = await asyncio.gather(*(watched(alerts, scope, alice) for _ in range(50)))
    assert found == [[(EXHAUSTED,)]] * 50
    assert counted.reads == 1


async def test_a_change_of_another_process_holds_within_a_lease(
    alerts: Alerts, tenants: Tenants, database: Database, clock: Clock, scope: Scope
) -> None:
    alice = await customer(database, scope, "alice")
    assert await watched(alerts, scope, alice) == [low()]
    await customer(database, scope, "alice", low_balance_thresholds=[1000])
    clock.pass_s(LEASE_S)
    assert await watched(alerts, scope, alice) == [low(1000)]
    await tenants.change_tenant(scope.tenant, low_balance_thresholds=(9000,))
    await customer(database, scope, "alice", low_balance_thresholds=None)
    clock.pass_s(LEASE_S)
    assert await watched(alerts, scope, alice) == [low(9000)]


async def test_who_is_forgotten_is_looked_up_again_and_not_answered_by_what_was_being_read(
    alerts: Alerts, counted: CountedDatabase, database: Database, scope: Scope
) -> None:
    alice = await customer(database, scope, "alice")
    counted.go_on.clear()
    early = asyncio.create_task(watched(alerts, scope, alice))
    await counted.reading.wait()
    await customer(database, scope, "alice", low_balance_thresholds=[1000])
    alerts.forget(scope, alice.wallet.partition(":")[2])
    counted.go_on.set()
    assert await early == [low()], "it asked before the change was answered"
    assert await watched(alerts, scope, alice) == [low(1000)]


async def test_while_the_database_is_away_nothing_is_said_and_nobody_stopped(
    alerts: Alerts, counted: CountedDatabase, clock: Clock, scope: Scope
) -> None:
    alice = customer_wallet(*scope, "cus_alice")
    counted.away = True
    for _ in range(10):
        assert await alerts.watches(asked(scope, alice)) == ()
    assert counted.reads == 1, "it is let be for a while"
    counted.away = False
    assert await alerts.watches(asked(scope, alice)) == ()
    clock.pass_s(AWAY_S)
    assert await watched(alerts, scope, alice) == [low()]


async def test_what_was_known_before_serves_while_the_database_is_away_and_not_for_ever(
    alerts: Alerts, tenants: Tenants, counted: CountedDatabase, clock: Clock, scope: Scope
) -> None:
    alice = customer_wallet(*scope, "cus_alice")
    await tenants.change_tenant(scope.tenant, low_balance_thresholds=(1000,))
    assert await watched(alerts, scope, alice) == [low(1000)]
    counted.away = True
    clock.pass_s(LEASE_S)
    for _ in range(10):
        assert await watched(alerts, scope, alice) == [low(1000)]
    assert counted.reads == 2
    clock.pass_s(OUTAGE_LEASE_S)
    assert await alerts.watches(asked(scope, alice)) == ()


async def test_a_database_that_hangs_is_waited_for_once_and_shortly(
    alerts: Alerts, counted: CountedDatabase, clock: Clock, scope: Scope
) -> None:
    alice = customer_wallet(*scope, "cus_alice")
    await watched(alerts, scope, alice)
    clock.pass_s(LEASE_S)
    counted.go_on.clear()
    began_s = asyncio.get_running_loop().time()
    found = await asyncio.gather(*(watched(alerts, scope, alice) for _ in range(20)))
    assert found == [[low()]] * 20
    assert await watched(alerts, scope, alice) == [low()]
    assert asyncio.get_running_loop().time() - began_s < 20 * OUTAGE_WAIT_S
    assert counted.reads == 2
    counted.go_on.set()
    clock.pass_s(AWAY_S)
    assert await watched(alerts, scope, alice) == [low()], "what was begun is waited for"
