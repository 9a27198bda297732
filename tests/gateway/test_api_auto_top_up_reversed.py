"""Money that goes back to a customer, or that they want back, is not taken again by itself."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gateway.payments.orders import Order
from tests.gateway.purses import PUBLIC_URL, USD_10, Purses, open_purses
from tests.gateway.till import selected
from tests.servers.stripe_objects import Object

HOUR_S = 3600
Makes = Callable[[Purses, Order], list[Object]]
PAYMENTS = "/v1/payment_intents"


@pytest.fixture
async def purses(tmp_path: Path) -> AsyncIterator[Purses]:
    async with open_purses(tmp_path) as opened:
        yield opened


async def topped_up(purses: Purses) -> tuple[str, Order]:
    """A customer whose wallet has just been topped up, and the order."""
    alice = await purses.customer(credits=100)
    await purses.consider(alice)
    (order,) = await purses.orders(alice)
    assert order.payment_intent is not None
    return alice, order


async def hear(purses: Purses, events: list[Object]) -> None:
    for event in selected(events):
        await purses.payments.intake.receive(*purses.stripe.signed(event))


async def time_passes(purses: Purses, alice: str) -> None:
    """The crossing is told, and the wallet is looked at for a while."""
    for _ in range(3):
        await purses.consider(alice)
        purses.office.clock.pass_s(2 * HOUR_S)
        await purses.sweep()


def refunded(purses: Purses, order: Order) -> list[Object]:
    return purses.stripe.refund(str(order.payment_intent))


def withdrawn(purses: Purses, order: Order) -> list[Object]:
    events = purses.stripe.dispute(str(order.payment_intent))
    return [*events, *purses.stripe.withdraw(events[0]["data"]["object"]["id"])]


async def test_what_is_refunded_is_not_bought_again(purses: Purses):
    alice, order = await topped_up(purses)
    await hear(purses, refunded(purses, order))
    assert await purses.balance(alice) == 100
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid"]
    assert len(purses.stripe.all("payment_intent")) == 1
    (told,) = await purses.told(alice, "topup.failed")
    assert told["reason"] == "payment_reversed"
    assert told["top_up_url"].startswith(PUBLIC_URL)


async def test_who_disputes_a_payment_is_not_charged_again(purses: Purses):
    alice, order = await topped_up(purses)
    await hear(purses, withdrawn(purses, order))
    assert await purses.balance(alice) == 100
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid"]
    (told,) = await purses.told(alice, "topup.failed")
    assert told["reason"] == "payment_disputed"


async def test_a_dispute_of_which_nothing_is_withdrawn_yet_is_one(purses: Purses):
    """What is left of the payment is frozen, and counts: it is a higher threshold that the wallet is below of."""
    alice, order = await topped_up(purses)
    await hear(purses, purses.stripe.dispute(str(order.payment_intent)))
    await purses.agree(alice, auto_topup_threshold=5_000_000)
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid"]


async def test_while_a_dispute_is_open_not_even_new_settings_begin_anew(purses: Purses):
    alice, order = await topped_up(purses)
    events = withdrawn(purses, order)
    await hear(purses, events)
    await purses.agree(alice, auto_topup_threshold=300_000)
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid"]
    await hear(purses, purses.stripe.close_dispute(events[0]["data"]["object"]["id"], "lost"))
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid"], "lost: the customer has their money"
    await purses.agree(alice, auto_topup_threshold=200_000)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["paid", "paid"]


async def test_after_a_refund_new_settings_begin_anew(purses: Purses):
    alice, order = await topped_up(purses)
    await hear(purses, refunded(purses, order))
    await purses.agree(alice, auto_topup_threshold=300_000)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["paid", "paid"]
    assert await purses.balance(alice) == 100 + USD_10


@pytest.mark.parametrize("makes", [refunded, withdrawn])
async def test_news_that_comes_before_the_payment_s_own_stop_it_too(purses: Purses, makes: Makes):
    """The payment's answer is lost, and what became of it is told in the wrong order."""
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, "reset-after-effect", times=3)
    await purses.consider(alice)
    (payment,) = purses.paid()
    paid = [each for each in purses.stripe.events if each["type"] == "payment_intent.succeeded"]
    events = purses.stripe.refund(payment["id"]) if makes is refunded else purses.stripe.dispute(payment["id"])
    if makes is withdrawn:
        events += purses.stripe.withdraw(events[0]["data"]["object"]["id"])
    await hear(purses, events + paid)
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid"]
    assert len(purses.paid()) == 1


async def test_what_is_on_its_way_meanwhile_ends_and_nothing_follows(purses: Purses):
    alice, first = await topped_up(purses)
    await purses.spend(alice, 1_000)
    await purses.change_card(alice, "pm_usBankAccount_success")
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid", "open"]
    await hear(purses, refunded(purses, first))
    (payment,) = purses.stripe.all("payment_intent", status="processing")
    await hear(purses, purses.stripe.arrive(payment["id"]))
    assert await purses.balance(alice) == 100
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid", "paid"]


async def test_a_payment_that_was_not_made_yet_is_not_asked_for_any_more(purses: Purses):
    alice, first = await topped_up(purses)
    await purses.spend(alice, 1_000)
    purses.stripe.fail_next(PAYMENTS, 500, times=3, method="POST")
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid", "open"]
    await hear(purses, refunded(purses, first))
    await time_passes(purses, alice)
    assert await purses.outcomes(alice) == ["paid", "expired"]
    assert len(purses.paid()) == 1
