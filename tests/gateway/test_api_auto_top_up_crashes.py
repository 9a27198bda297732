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
from gateway.payments.top_up_turns import LEASE_S
from ledger.commands import Debit, ReserveLeg
from ledger.model import Charge, ReservationRef, Settlement, UsageRecord
from pricing.money import CREDIT
from tests.gateway.purses import USD_10, Purses, open_purses
from tests.gateway.rig import open_store

CHARGES: Final = 200
COMES_S: Final = 30.0
STEPS_LEAST: Final = 30
STEPS_MAX: Final = 200
"""More than there are: the test must end."""


class Died(BaseException):
    """The process is no more."""


class Mortal:
    """Lets what a task does end before or after any step that others can see: a transaction, a command, a call."""

    def __init__(self, purses: Purses, monkeypatch: pytest.MonkeyPatch) -> None:
        self._at = self._steps = 0
        self._task: asyncio.Task[Any] | None = None
        services = purses.gateway.services
        for name in ("read", "write"):
            monkeypatch.setattr(services.database, name, self._opening(getattr(services.database, name)))
        for asked, names in (
            (services.ledger, ("execute", "wallet_view")),
            (purses.payments.stripe, ("charge_off_session", "payment_intent", "cancel_payment_intent")),
        ):
            for name in names:
                monkeypatch.setattr(asked, name, self._calling(getattr(asked, name)))

    async def dies(self, work: Coroutine[Any, Any, None], at: int) -> bool:
        """Do *work* up to that step; whether it came so far."""
        self._at, self._steps, self._task = at, 0, asyncio.current_task()
        try:
            await work
        except Died:
            return True
        else:
            return False
        finally:
            self._task = None

    def _step(self) -> None:
        if asyncio.current_task() is self._task:
            self._steps += 1
            if self._steps == self._at:
                raise Died

    def _opening(self, opens: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.asynccontextmanager
        async def opening(*args: Any) -> AsyncIterator[Any]:
            self._step()
            async with opens(*args) as opened:
                yield opened
            self._step()

        return opening

    def _calling(self, calls: Callable[..., Any]) -> Callable[..., Any]:
        async def calling(*args: Any, **options: Any) -> Any:
            self._step()
            answer = await calls(*args, **options)
            self._step()
            return answer

        return calling


@pytest.fixture
async def purses(tmp_path: Path) -> AsyncIterator[Purses]:
    async with open_purses(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("card", ["pm_card_visa", "pm_card_chargeCustomerFail"])
async def test_whoever_dies_at_any_step_is_followed_by_who_ends_it(
    purses: Purses, card: str, monkeypatch: pytest.MonkeyPatch
):
    """One payment, or one failure that is counted and told once."""
    mortal = Mortal(purses, monkeypatch)
    for at in range(1, STEPS_MAX):
        customer = await purses.customer(f"customer-{at}", credits=100, card=card)
        died = await mortal.dies(purses.payments.auto_top_ups.consider(purses.scope, customer), at)
        for _ in range(2):
            purses.office.clock.pass_s(LEASE_S + 61)
            await purses.sweep()
        statuses = await purses.outcomes(customer)
        payments = [each for each in purses.stripe.all("payment_intent") if _of(each, purses, customer)]
        if card == "pm_card_visa":
            assert statuses == ["paid"], at
            assert await purses.balance(customer) == 100 + USD_10, at
            assert len(payments) == 1, at
        else:
            assert statuses == ["failed"], at
            assert (await purses.payer(customer)).failures == 1, at
            assert len(await purses.told(customer, "topup.failed")) == 1, at
        await purses.agree(customer, auto_topup_enabled=False)
        if not died:
            assert at > STEPS_LEAST, "it has asked the database, the ledger and the processor"
            return
    raise AssertionError("it never ended")


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
