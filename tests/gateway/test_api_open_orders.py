"""Checkout orders of which nothing was heard: asked after once their page is over."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.payments import open_orders
from gateway.payments.open_orders import PAGE_LIFE_S, UNPAID_LIFE_S
from gateway.payments.orders import Order
from tests.gateway.purses import USD_10, Purses, open_purses


@pytest.fixture
async def purses(tmp_path: Path) -> AsyncIterator[Purses]:
    async with open_purses(tmp_path) as opened:
        yield opened


async def ordered(purses: Purses, *, page: bool = True) -> Order:
    """An order of a customer's, with a page on which it can be paid."""
    customer = await purses.customer(credits=0, auto_topup_enabled=False)
    order = Order(
        tenant=purses.scope.tenant,
        mode="live",
        id=purses.gateway.services.new_id("ord"),
        kind="checkout",
        status="open",
        customer_id=customer,
        package="usd-10",
        price_minor=1_000,
        currency="usd",
        asset="credit",
        credited=USD_10 * 10**9,
        bonus=0,
        spread=0,
        created_at_us=purses.office.clock.now_us(),
    )
    assert await purses.payments.orders.add(order)
    if page:
        session = await purses.payments.stripe.create_session(
            order,
            processor_id=purses.stripe_customer(customer),
            success_url="https://app.example/paid",
            cancel_url="https://app.example/",
            title="1000 credits",
            expires_at_s=purses.office.clock.now_us() // 1_000_000 + 3600,
        )
        await purses.payments.orders.note_session(order, session_id=session.id, checkout_url=session.url)
        order = msgspec.structs.replace(order, session_id=session.id)
    return order


def bounced(stripe: Any, session: str) -> None:
    stripe.pay_later(session)
    stripe.bounce(stripe.payment_of(session))


def nothing(stripe: Any, session: str) -> None:
    pass


@pytest.mark.parametrize(
    ("happens", "status", "balance"),
    [
        (lambda stripe, session: stripe.pay(session), "paid", USD_10),
        (lambda stripe, session: stripe.expire(session), "expired", 0),
        (lambda stripe, session: stripe.pay_later(session), "open", 0),
        (bounced, "failed", 0),
        (nothing, "expired", 0),
    ],
    ids=["paid", "expired", "a bank is at it", "a bank said no", "nothing"],
)
async def test_what_became_of_it_is_asked(purses: Purses, happens: Any, status: str, balance: int):
    order = await ordered(purses)
    assert order.session_id is not None
    happens(purses.stripe, order.session_id)
    await purses.payments.open_orders.round()
    assert await purses.outcomes(order.customer_id) == ["open"], "its page is not over yet"
    purses.office.clock.pass_s(PAGE_LIFE_S + 60)
    for _ in range(2):
        await purses.payments.open_orders.round()
        assert await purses.outcomes(order.customer_id) == [status]
        assert await purses.balance(order.customer_id) == balance


async def test_one_that_never_had_a_page_has_expired(purses: Purses):
    order = await ordered(purses, page=False)
    purses.office.clock.pass_s(PAGE_LIFE_S + 60)
    await purses.payments.open_orders.round()
    assert await purses.outcomes(order.customer_id) == ["expired"]


async def test_one_that_stripe_refuses_does_not_hold_up_the_others(purses: Purses):
    refused, asked = await ordered(purses), await ordered(purses)
    purses.office.clock.pass_s(PAGE_LIFE_S + 60)
    purses.stripe.fail_next(f"/v1/checkout/sessions/{refused.session_id}", 400)
    assert await purses.payments.open_orders.round() == 1
    assert await purses.outcomes(asked.customer_id) == ["open", "expired"]


async def test_many_that_a_bank_is_at_do_not_hide_a_younger_one(purses: Purses, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_orders, "PAGE", 2)
    for _ in range(4):
        slow = await ordered(purses)
        assert slow.session_id is not None
        purses.stripe.pay_later(slow.session_id)
    paid = await ordered(purses)
    assert paid.session_id is not None
    purses.stripe.pay(paid.session_id)
    purses.office.clock.pass_s(PAGE_LIFE_S + 60)
    assert await purses.payments.open_orders.round() == 1
    assert await purses.outcomes(paid.customer_id) == ["open"] * 4 + ["paid"]


async def test_a_bank_is_not_waited_for_for_ever(purses: Purses):
    order = await ordered(purses)
    assert order.session_id is not None
    purses.stripe.pay_later(order.session_id)
    purses.office.clock.pass_s(UNPAID_LIFE_S - 60)
    await purses.payments.open_orders.round()
    assert await purses.outcomes(order.customer_id) == ["open"]
    purses.office.clock.pass_s(120)
    await purses.payments.open_orders.round()
    assert await purses.outcomes(order.customer_id) == ["expired"]


async def test_one_that_cannot_be_read_does_not_hold_up_the_others(purses: Purses):
    unreadable, readable = await ordered(purses), await ordered(purses)
    assert unreadable.session_id is not None
    purses.stripe._objects[unreadable.session_id].update(payment_status="paid", amount_total=None)
    purses.office.clock.pass_s(PAGE_LIFE_S + 60)
    assert await purses.payments.open_orders.round() == 1
    assert await purses.outcomes(readable.customer_id) == ["open", "expired"]
