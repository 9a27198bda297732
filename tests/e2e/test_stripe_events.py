"""Stripe's events at several processes at once: a payment is credited once, whoever is told of it."""

import asyncio
from typing import Any

import httpx
import pytest

from gateway.clock import now_us
from gateway.database import Database
from gateway.ids import new_id
from gateway.payments.orders import Orders
from tests.e2e.conftest import FreshStore, Install
from tests.e2e.farebox import Farebox, Gateway
from tests.e2e.fleet import UNITS_OF_MILLICREDIT
from tests.gateway.payment_histories import CREDITED, PRICE, order, session_for
from tests.gateway.till import WEBHOOK, selected
from tests.servers.stripe import FakeStripe
from tests.servers.stripe_objects import Object

AT_ONCE = 50
ANSWER_S = 60.0
GIVEN = 1000


@pytest.fixture
def stripe() -> Any:
    with FakeStripe() as stripe:
        yield stripe


async def test_fifty_deliveries_at_once_to_two_processes_are_one_credit(
    install: Install, fresh_store: FreshStore, stripe: FakeStripe
):
    settings = {
        "stripe_secret_key": stripe.secret_key,
        "stripe_webhook_secret": stripe.webhook_secret,
        "stripe_api_base": stripe.url,
    }
    farebox = await asyncio.to_thread(install, **fresh_store(), **settings)
    gateways = [await asyncio.to_thread(farebox.serve) for _ in range(2)]
    session = await an_order(farebox, gateways[0], stripe)
    events = selected(stripe.pay(session)) + selected(stripe.refund(stripe.payment_of(session), 300))
    deliveries = [(gateways[number % 2], events[number // 2 % len(events)]) for number in range(AT_ONCE * len(events))]
    async with httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as client:
        while deliveries:
            # Stripe sends again what was not answered with 200.
            answers = await asyncio.gather(*(deliver(client, stripe, *each) for each in deliveries))
            assert 200 in answers, answers
            deliveries = [each for each, status in zip(deliveries, answers, strict=True) if status != 200]
    wallet = gateways[1].get("/customers/ann/credits", farebox.live_key).json()
    left = CREDITED - CREDITED * 300 // PRICE
    assert wallet["balance"] == GIVEN + left // UNITS_OF_MILLICREDIT
    farebox.verify()


async def deliver(client: httpx.AsyncClient, stripe: FakeStripe, gateway: Gateway, event: Object) -> int:
    body, signature = stripe.signed(event)
    url = gateway.base_url.removesuffix("/v1") + WEBHOOK
    return (await client.post(url, content=body, headers={"Stripe-Signature": signature})).status_code


async def an_order(farebox: Farebox, gateway: Gateway, stripe: FakeStripe) -> str:
    """Ann is about to pay; the session on which she does."""
    farebox.top_up(gateway, "ann", millicredits=GIVEN)
    customer_id = gateway.get("/customers/ann", farebox.live_key).json()["id"]
    ordered = order(id=new_id("ord"), tenant=farebox.tenant_id, customer_id=customer_id, created_at_us=now_us())
    database = Database(farebox.database_url)
    try:
        assert await Orders(database).add(ordered)
    finally:
        await database.close()
    return session_for(stripe, ordered)
