"""A crash wherever an event's handling waits, from its arrival to its answer: Stripe's retry completes it, once."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.gateway.dying import WAITS_MAX, dies
from tests.gateway.payment_histories import CREDITED, PRICE
from tests.gateway.till import Sale, Till, open_till, selected
from tests.servers.stripe import only
from tests.servers.stripe_objects import Object


@pytest.fixture
async def till(tmp_path: Path) -> AsyncIterator[Till]:
    async with open_till(tmp_path) as opened:
        yield opened


async def a_payment(till: Till) -> tuple[Sale, Object]:
    sale = await till.sale(bonus=10)
    return sale, only(sale.pay(), "checkout.session.completed")


async def a_refund(till: Till) -> tuple[Sale, Object]:
    """Of a payment that nobody told of yet: it has to be asked for."""
    sale = await till.sale(bonus=10)
    sale.pay()
    return sale, only(till.stripe.refund(sale.payment, 300), "refund.created")


async def a_dispute(till: Till) -> tuple[Sale, Object]:
    sale = await till.sale(bonus=10)
    await till.outcomes(sale.pay())
    (created,) = till.stripe.dispute(sale.payment)
    await till.deliver(created)
    return sale, till.stripe.withdraw(created["data"]["object"]["id"])[0]


async def a_failure(till: Till) -> tuple[Sale, Object]:
    sale = await till.sale()
    till.stripe.pay_later(sale.session)
    return sale, only(selected(till.stripe.bounce(sale.payment)), "checkout.session.async_payment_failed")


def part(taken: int) -> int:
    """What is left of the credits and the bonus: of each its part is taken, rounded down."""
    return CREDITED - CREDITED * taken // PRICE + 10 - 10 * taken // PRICE


Arranged = Callable[[Till], Awaitable[tuple[Sale, Object]]]

CASES: list[tuple[Arranged, int, dict[str, int]]] = [
    (a_payment, part(0), {"topup.succeeded": 1, "credit.granted": 2}),
    (a_refund, part(300), {"topup.succeeded": 1, "credit.clawed_back": 2}),
    (a_dispute, part(PRICE), {"topup.succeeded": 1, "credit.clawed_back": 2}),
    (a_failure, 0, {"topup.succeeded": 0, "topup.failed": 1}),
]


@pytest.mark.parametrize(("arrange", "balance", "told"), CASES)
async def test_a_crash_at_any_wait_is_repaired_by_the_retry(
    till: Till, arrange: Arranged, balance: int, told: dict[str, int]
):
    died = 0
    for at in range(1, WAITS_MAX):
        sale, event = await arrange(till)
        crashed = await dies(till.deliver(event), at=at)
        died += crashed
        assert (await till.deliver(event))["outcome"] in ("done", "duplicate")
        assert await sale.balance() == balance, at
        assert (await sale.now()).status == ("paid" if balance or told["topup.succeeded"] else "failed"), at
        events = await sale.events()
        assert {type: events.count(type) for type in told} == told, at
        assert (await till.observations())[event["id"]] == "done", at
        if not crashed:
            break
    assert died > 20, "it waits for the store again and again"
