"""Packages, checkouts and orders, at a gateway that takes payments."""

from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Final

import httpx
import pytest

import farebox
from farebox import AsyncClient, Client, Retries
from tests.client.conftest import NOBODY
from tests.e2e.farebox import Farebox, installed
from tests.servers.stripe import FakeStripe, fake_stripe
from tests.servers.stripe_objects import Object

RETURN: Final = {"success_url": "https://app.example.com/paid", "cancel_url": "https://app.example.com/"}


@pytest.fixture(scope="module")
def stripe() -> Iterator[FakeStripe]:
    with fake_stripe() as stripe:
        yield stripe


@pytest.fixture(scope="module")
def installation(stripe: FakeStripe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farebox]:
    """One that takes payments; its books are right in the end."""
    settings = {
        "stripe_secret_key": stripe.secret_key,
        "stripe_webhook_secret": stripe.webhook_secret,
        "stripe_api_base": stripe.url,
    }
    with installed(tmp_path_factory.mktemp("payments"), NOBODY, settings=settings) as farebox:
        farebox.serve()
        yield farebox
        farebox.verify()


def post(stripe: FakeStripe, base_url: str, events: Iterable[Object]) -> None:
    """Stripe tells."""
    for event in events:
        body, signature = stripe.signed(event)
        url = base_url.removesuffix("/v1") + "/stripe/webhook"
        assert httpx.post(url, content=body, headers={"Stripe-Signature": signature}).status_code == 200


def test_packages_have_prices_in_money_and_credits(client: Client):
    packages = {package.id: package for package in client.packages()}
    assert [*packages] == ["usd-5", "usd-10", "usd-25", "usd-50"]
    ten = packages["usd-10"]
    assert (ten.price, ten.price_minor, ten.currency) == (Decimal("10.00"), 1000, "usd")
    assert (ten.credits, ten.bonus_credits, ten.credits_usd) == (1000, 0, 10)
    assert ten.purchasable


def test_a_checkout_is_paid(client: Client, stripe: FakeStripe, base_url: str):
    checkout = client.create_checkout("payer", "usd-10", **RETURN, idempotency_key="checkout-1")
    again = client.create_checkout("payer", "usd-10", **RETURN, idempotency_key="checkout-1")
    assert again == checkout
    assert (checkout.status, checkout.price, checkout.credits) == ("open", 10, 1000)
    (session,) = stripe.all("checkout.session", client_reference_id=checkout.order_id)
    assert checkout.checkout_url == session["url"]
    assert client.get_order(checkout.order_id).settled_at is None
    post(stripe, base_url, stripe.pay(session["id"]))
    order = client.get_order(checkout.order_id)
    assert (order.status, order.kind, order.failure, order.customer_id) == (
        "paid",
        "checkout",
        None,
        checkout.customer_id,
    )
    assert order.settled_at is not None
    balance = client.credits("payer")
    assert balance.balance == 1000
    assert [block.id for block in balance.blocks] == [order.block_id]
    refund = stripe.refund(stripe.payment_of(session["id"]), 250)
    post(stripe, base_url, refund)
    standing = client.get_order(checkout.order_id)
    assert (standing.status, standing.returned, standing.returned_minor) == ("paid", Decimal("2.50"), 250)
    assert not standing.disputed
    assert client.credits("payer").balance == 750
    client.create_checkout("payer", "usd-5", **RETURN)
    assert [each.status for each in client.orders("payer", page_size=1)] == ["open", "paid"]


def test_an_order_that_is_not_there(client: Client):
    with pytest.raises(farebox.NotFound):
        client.get_order("ord_none")


def test_a_processor_that_does_not_answer(installation: Farebox, base_url: str, stripe: FakeStripe):
    stripe.fail_next("/v1/", 503, times=100)
    with (
        Client(base_url, installation.live_key, retries=Retries(attempts_max=1)) as client,
        pytest.raises(farebox.PaymentsUnavailable) as refused,
    ):
        client.create_checkout("waiting", "usd-5", **RETURN)
    stripe.heal()
    assert refused.value.status == 503


async def test_the_same_awaited(installation: Farebox, base_url: str):
    async with AsyncClient(base_url, installation.live_key) as client:
        assert [package.price_minor async for package in client.packages()] == [500, 1000, 2500, 5000]
        checkout = await client.create_checkout("awaited", "usd-5", **RETURN, save_payment_method=True)
        assert (await client.get_order(checkout.order_id)).status == "open"
        assert [order.id async for order in client.orders("awaited")] == [checkout.order_id]
