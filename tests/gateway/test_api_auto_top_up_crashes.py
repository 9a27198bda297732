"""Automatic top-ups when the process dies at any moment, and when several processes notice the same crossing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import pytest

from gateway.app import Gateway
from gateway.billing.spender import Spender
from gateway.identity.wallets import customer_wallet
from gateway.payments.auto_top_up import PAGE
from gateway.payments.top_up_turns import LEASE_S
from ledger.commands import Debit, ReserveLeg
from ledger.model import Charge, ReservationRef, Settlement, UsageRecord
from pricing.money import CREDIT
from tests.gateway.dying import WAITS_MAX, dies
from tests.gateway.purses import USD_10, Purses, open_purses
from tests.gateway.rig import open_store

CHARGES: Final = 200
COMES_S: Final = 30.0
WAITS_LEAST: Final = 40


@pytest.fixture
async def purses(tmp_path: Path) -> AsyncIterator[Purses]:
    async with open_purses(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("card", ["pm_card_visa", "pm_card_chargeCustomerFail"])
async def test_whoever_dies_at_any_wait_is_followed_by_who_ends_it(purses: Purses, card: str):
    """One payment, or one failure that is counted and told once."""
    customers = []
    for at in range(1, WAITS_MAX):
        customer = await purses.customer(f"customer-{at}", credits=100, card=card)
        customers.append(customer)
        if not await dies(purses.payments.auto_top_ups.consider(purses.scope, customer), at=at):
            break
    assert len(customers) > WAITS_LEAST, "it has asked the database, the ledger and the processor"
    for _ in range(2):
        purses.office.clock.pass_s(LEASE_S + 61)
        while await purses.payments.auto_top_ups.round() == PAGE:
            pass
    for at, customer in enumerate(customers, start=1):
        statuses = await purses.outcomes(customer)
        if card == "pm_card_visa":
            assert statuses == ["paid"], at
            assert await purses.balance(customer) == 100 + USD_10, at
            payments = [each for each in purses.stripe.all("payment_intent") if _of(each, purses, customer)]
            assert len(payments) == 1, at
        else:
            assert statuses == ["failed"], at
            assert (await purses.payer(customer)).failures == 1, at
            assert len(await purses.told(customer, "topup.failed")) == 1, at


def _of(payment: dict[str, Any], purses: Purses, customer: str) -> bool:
    return bool(payment["customer"] == purses.stripe_customer(customer))


@contextlib.asynccontextmanager
async def another_process(purses: Purses, folder: Path) -> AsyncIterator[Gateway]:
    """A second gateway on the same database."""
    settings = purses.gateway.services.settings.model_copy(update={"journal_dir": folder / "another"})
    gateway = Gateway(settings, now_us=purses.office.clock.now_us, open_store=open_store)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


async def spend(gateway: Gateway, purses: Purses, customer: str) -> None:
    """One credit, as a request does it."""
    services = gateway.services
    amount = 10**CREDIT.scale
    wallet = customer_wallet(*purses.scope, customer)
    debit = Debit(
        id=services.new_id("cmd"),
        scope=purses.scope,
        reservation=ReservationRef(*purses.scope, services.new_id("rsv")),
        asset=CREDIT.code,
        legs=(ReserveLeg((wallet,), amount, amount),),
        settlement=Settlement(
            (Charge(0, amount),), UsageRecord(request_id=services.new_id("req"), customer_id=customer)
        ),
    )
    spender = Spender(app_id=purses.office.app, key_id="key_1", customer_id=customer)
    await services.charging.ask(debit, spender)


async def comes(holds: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async with asyncio.timeout(COMES_S):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_many_charges_that_cross_the_threshold_are_one_payment(tmp_path: Path):
    """From the charge to the credits, through two processes that both work by themselves."""
    async with open_purses(tmp_path, by_itself=True) as purses, another_process(purses, tmp_path) as second:
        customer = await purses.customer(credits=300)
        gateways = (purses.gateway, second)
        await asyncio.gather(*(spend(gateways[number % 2], purses, customer) for number in range(CHARGES)))

        async def topped_up() -> bool:
            return await purses.balance(customer) == 300 - CHARGES + USD_10

        await comes(topped_up)
        assert len(purses.stripe.all("payment_intent")) == 1
        assert await purses.outcomes(customer) == ["paid"]
        assert len(await purses.told(customer, "topup.due")) == 1
        assert len(await purses.told(customer, "topup.succeeded")) == 1


async def test_several_processes_that_look_at_once_buy_once(purses: Purses, tmp_path: Path):
    async with another_process(purses, tmp_path) as second:
        assert second.services.payments is not None
        await second.services.payments.auto_top_ups.stop()
        for number in range(5):
            customer = await purses.customer(f"customer-{number}", credits=100)
            both = (purses.payments.auto_top_ups, second.services.payments.auto_top_ups)
            await asyncio.gather(*(both[each % 2].consider(purses.scope, customer) for each in range(10)))
            assert await purses.outcomes(customer) == ["paid"]
        assert len(purses.stripe.all("payment_intent")) == 5
