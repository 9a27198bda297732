"""Automatic top-ups against a fake of Stripe that others made: what it knows of cards comes to the same here.

localstripe refuses the parameter that leaves out what needs another page, and does not say how much was received.
"""

from pathlib import Path
from typing import Any

import pytest
from stripe import PaymentIntent, PaymentIntentService

from tests.gateway.purses import USD_10, open_purses
from tests.servers.localstripe import localstripe
from tests.servers.test_stripe import sdk_client_at

KEY = "sk_test_localstripe"


@pytest.fixture
def in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    create = PaymentIntentService.create_async

    async def created(service: PaymentIntentService, params: Any, options: Any = None) -> PaymentIntent:
        known = {name: value for name, value in params.items() if name != "automatic_payment_methods"}
        payment = await create(service, known, options)
        payment["amount_received"] = payment.amount if payment.status == "succeeded" else 0
        return payment

    monkeypatch.setattr(PaymentIntentService, "create_async", created)


@pytest.mark.usefixtures("in_its_words")
@pytest.mark.parametrize(
    ("card", "status", "balance", "failure"),
    [
        ("pm_card_visa", "paid", 100 + USD_10, None),
        ("pm_card_chargeCustomerFail", "failed", 100, "card_declined"),
    ],
)
async def test_a_card_is_charged_or_declined(tmp_path: Path, card: str, status: str, balance: int, failure: str | None):
    with localstripe() as url:
        async with (
            open_purses(tmp_path, stripe_api_base=url, stripe_secret_key=KEY) as purses,
            sdk_client_at(url, key=KEY) as client,
        ):
            alice = await purses.customer(credits=100, card=None)
            payer = (await purses.payer(alice)).processor_id
            assert payer is not None
            attached = await client.v1.payment_methods.attach_async(card, {"customer": payer})
            await purses.change_card(alice, attached.id)
            await purses.consider(alice)
            await purses.sweep()
            (order,) = await purses.orders(alice)
            assert (order.status, order.failure) == (status, failure)
            assert await purses.balance(alice) == balance
