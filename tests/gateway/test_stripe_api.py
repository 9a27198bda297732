"""What we ask of Stripe, as Stripe gets it, and what comes of its refusals, its silence and its noise."""

import asyncio
import hashlib
import hmac
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gateway.payments import stripe_api, stripe_http
from gateway.payments.orders import Order
from gateway.payments.processor import (
    PaymentDeclined,
    ProcessorNotFound,
    ProcessorRefused,
    ProcessorUnavailable,
    Session,
    SignatureInvalid,
)
from gateway.payments.stripe_api import API_VERSION, StripeAPI
from ledger.model import Scope
from tests.gateway.payment_histories import order as an_order
from tests.servers.stripe import FakeStripe

ACME = Scope("ten_acme", "live")
ORDER = an_order(tenant="ten_acme", price_minor=1000, credited=10)
METADATA = {"farebox_order": "ord_1", "farebox_tenant": "ten_acme", "farebox_mode": "live"}
LIFE_S = 3600

Ask = Callable[[StripeAPI], Coroutine[Any, Any, Any]]


@pytest.fixture
async def api(stripe: FakeStripe) -> AsyncIterator[StripeAPI]:
    api = StripeAPI(secret_key=stripe.secret_key, webhook_secret=stripe.webhook_secret, api_base=stripe.url)
    yield api
    await api.close()


async def begun(api: StripeAPI, order: Order = ORDER, *, processor_id: str | None = None) -> Session:
    return await api.create_session(
        order,
        processor_id=processor_id or await api.create_customer(ACME, "cus_1"),
        success_url="https://example.com/paid",
        cancel_url="https://example.com/back",
        title="1000 credits",
        expires_at_s=int(time.time()) + LIFE_S,
    )


async def with_card(api: StripeAPI, stripe: FakeStripe, card: str) -> str:
    customer = await api.create_customer(ACME, "cus_1")
    return str(stripe.attach(card, customer)["id"])


async def test_every_request_names_the_version_and_every_post_a_key_of_ours(api: StripeAPI, stripe: FakeStripe):
    customer = await api.create_customer(ACME, "cus_1")
    session = await begun(api)
    await api.session(session.id)
    await api.expire_session(session.id)
    await api.delete_customer(customer)
    assert {asked.version for asked in stripe.requests} == {API_VERSION}
    keys = [asked.idempotency_key for asked in stripe.requests if asked.method == "POST"]
    assert keys == [
        "farebox:customer:ten_acme:live:cus_1",
        "farebox:customer:ten_acme:live:cus_1",
        f"farebox:session:ord_1:{customer}",
        f"farebox:expire:{session.id}",
    ]


async def test_a_session_says_what_is_sold_to_whom_and_for_which_order(api: StripeAPI, stripe: FakeStripe):
    customer = await api.create_customer(ACME, "cus_1")
    session = await begun(api)
    found = await api.session(session.id)
    assert found["url"] == session.url
    assert found["mode"] == "payment"
    assert (found["amount_total"], found["currency"]) == (1000, "usd")
    assert (found["customer"], found["client_reference_id"]) == (customer, "ord_1")
    assert found["metadata"] == METADATA
    stripe.pay(session.id)
    paid = await api.session(session.id)
    assert type(paid) is dict
    assert paid["payment_intent"]["metadata"] == METADATA
    (asked,) = [asked for asked in stripe.requests if asked.path == "/v1/checkout/sessions"]
    assert "setup_future_usage" not in asked.params["payment_intent_data"]
    told = json.dumps(asked.params)
    assert '"name": "1000 credits"' in told


async def test_a_payment_method_is_kept_where_the_customer_agrees(api: StripeAPI, stripe: FakeStripe):
    await begun(api, replace(ORDER, save_payment_method=True))
    (asked,) = [asked for asked in stripe.requests if asked.path == "/v1/checkout/sessions"]
    assert asked.params["payment_intent_data"]["setup_future_usage"] == "off_session"


async def test_a_customer_of_stripes_has_our_ids_and_nothing_of_the_person(api: StripeAPI, stripe: FakeStripe):
    await api.create_customer(ACME, "cus_1")
    (asked,) = stripe.requests
    ours = {"farebox_customer": "cus_1", "farebox_tenant": "ten_acme", "farebox_mode": "live"}
    assert asked.params == {"metadata": ours}


async def test_what_is_asked_again_is_made_once(api: StripeAPI, stripe: FakeStripe):
    first, again = await begun(api), await begun(api)
    assert first == again
    assert len(stripe.all("checkout.session")) == 1
    customer = await api.create_customer(ACME, "cus_1")
    another = await api.create_customer(ACME, "cus_1", instead_of=customer)
    assert {each["id"] for each in stripe.all("customer")} == {customer, another}
    assert another != customer


async def test_a_page_for_another_customer_of_stripes_is_no_repetition(api: StripeAPI, stripe: FakeStripe):
    """Stripe answers a repeated key with what it answered first, or refuses one that comes with other words."""
    customer = await api.create_customer(ACME, "cus_1")
    first = await begun(api, processor_id=customer)
    another = await api.create_customer(ACME, "cus_1", instead_of=customer)
    assert (await begun(api, processor_id=another)).id != first.id


@pytest.mark.parametrize("fault", ["reset", "reset-after-effect", 500, 503, 409])
async def test_what_breaks_on_the_way_is_tried_again_and_made_once(api: StripeAPI, stripe: FakeStripe, fault: Any):
    customer = await api.create_customer(ACME, "cus_1")
    stripe.fail_next("/v1/checkout/sessions", fault)
    await begun(api, processor_id=customer)
    assert len(stripe.all("checkout.session")) == 1
    assert sum(asked.path == "/v1/checkout/sessions" for asked in stripe.requests) == 2


@pytest.mark.parametrize("fault", ["reset", 500, 429, 409])
async def test_stripe_that_does_not_answer_is_away(api: StripeAPI, stripe: FakeStripe, fault: Any):
    stripe.fail_next("/v1/customers", fault, times=stripe_api.RETRIES + 1)
    with pytest.raises(ProcessorUnavailable):
        await api.create_customer(ACME, "cus_1")


async def test_an_answer_that_takes_too_long_is_none(
    api: StripeAPI, stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stripe_http, "ATTEMPT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(stripe_api, "TIMEOUT_S", 0.2)
    stripe.fail_next("/v1/customers", "hang", times=10)
    with pytest.raises(ProcessorUnavailable):
        await api.create_customer(ACME, "cus_1")
    stripe.heal()


async def test_an_answer_that_is_too_long_is_none(api: StripeAPI, stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stripe_http, "ANSWER_BYTES_MAX", 10)
    monkeypatch.setattr(stripe_api, "TIMEOUT_S", 0.2)
    with pytest.raises(ProcessorUnavailable):
        await api.create_customer(ACME, "cus_1")


async def test_a_wrong_key_is_refused_and_not_tried_again(stripe: FakeStripe):
    api = StripeAPI(secret_key="sk_test_wrong", webhook_secret="whsec_wrong", api_base=stripe.url)
    with pytest.raises(ProcessorRefused) as caught:
        await api.create_customer(ACME, "cus_1")
    await api.close()
    assert (caught.value.status, caught.value.code) == (401, "authentication_error")
    assert len(stripe.requests) == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda api: api.session("cs_none"),
        lambda api: api.payment_intent("pi_none"),
        lambda api: api.expire_session("cs_none"),
    ],
)
async def test_what_is_not_there_is_not_found(api: StripeAPI, ask: Ask):
    with pytest.raises(ProcessorNotFound):
        await ask(api)


async def test_a_customer_can_be_deleted_twice(api: StripeAPI):
    customer = await api.create_customer(ACME, "cus_1")
    await api.delete_customer(customer)
    await api.delete_customer(customer)
    with pytest.raises(ProcessorRefused) as caught:
        await begun(api, processor_id=customer)
    assert (caught.value.code, caught.value.param) == ("resource_missing", "customer")


async def test_a_kept_card_is_charged_once(api: StripeAPI, stripe: FakeStripe):
    card = await with_card(api, stripe, "pm_card_visa")
    customer = await api.create_customer(ACME, "cus_1")
    first = await api.charge_off_session(ORDER, processor_id=customer, payment_method=card)
    again = await api.charge_off_session(ORDER, processor_id=customer, payment_method=card)
    assert (first["id"], first["status"], first["metadata"]) == (again["id"], "succeeded", METADATA)
    assert (await api.payment_intent(first["id"]))["amount_received"] == 1000
    assert [found["id"] for found in await api.payment_intents_of(customer, 0)] == [first["id"]]
    assert await api.payment_intents_of(customer, int(time.time()) + LIFE_S) == []


@pytest.mark.parametrize(
    ("card", "code"),
    [
        ("pm_card_chargeCustomerFail", "card_declined"),
        ("pm_card_authenticationRequired", "authentication_required"),
    ],
)
async def test_a_declined_card_says_why_and_which_payment(api: StripeAPI, stripe: FakeStripe, card: str, code: str):
    kept = await with_card(api, stripe, card)
    customer = await api.create_customer(ACME, "cus_1")
    with pytest.raises(PaymentDeclined) as caught:
        await api.charge_off_session(ORDER, processor_id=customer, payment_method=kept)
    assert caught.value.code == code
    assert caught.value.payment_intent is not None
    cancelled = await api.cancel_payment_intent(caught.value.payment_intent["id"])
    assert cancelled["status"] == "canceled"


async def test_refunds_disputes_and_movements_of_a_payment(
    api: StripeAPI, stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stripe_api, "PAGE", 2)
    session = await begun(api)
    stripe.pay(session.id)
    payment = stripe.payment_of(session.id)
    for _ in range(5):
        stripe.refund(payment, 100)
    refunds = await api.refunds_of(payment)
    assert [refund["amount"] for refund in refunds] == [100] * 5
    assert len({refund["id"] for refund in refunds}) == 5
    stripe.dispute(payment)
    (dispute,) = await api.disputes_of(payment)
    assert dispute["payment_intent"] == payment
    now_s = int(time.time())
    movements = [each async for each in api.balance_transactions(now_s - LIFE_S, now_s + LIFE_S)]
    assert len({each["id"] for each in movements}) == len(movements) >= 6
    assert all(each["source"]["payment_intent"] == payment for each in movements)
    assert [each async for each in api.balance_transactions(0, 1)] == []


async def test_only_what_stripe_has_signed_just_now_is_an_event(api: StripeAPI, stripe: FakeStripe):
    session = await begun(api)
    event = stripe.pay(session.id)[0]
    body, signature = stripe.signed(event)
    assert api.verified(body, signature)["id"] == event["id"]
    old = int(time.time()) - stripe_api.SIGNATURE_LIFE_S - 5
    for sent, signed in (
        stripe.signed(event, secret="whsec_other"),
        stripe.signed(event, at=old),
        (body.replace(b"1000", b"9000"), signature),
        (body, ""),
        (body, "t=now,v1=\u00fc"),
        (b"\xff", signature),
    ):
        with pytest.raises(SignatureInvalid):
            api.verified(sent, signed)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"[" * 5000, b"\xff"])
async def test_what_is_signed_and_yet_no_object_is_no_event(api: StripeAPI, stripe: FakeStripe, body: bytes):
    at = int(time.time())
    signature = hmac.new(stripe.webhook_secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    with pytest.raises(SignatureInvalid):
        api.verified(body, f"t={at},v1={signature}")


async def test_nothing_of_it_is_logged_at_any_level_of_ours(
    api: StripeAPI, stripe: FakeStripe, log: io.StringIO, tmp_path: Path
):
    logging.getLogger().setLevel(logging.DEBUG)
    card = await with_card(api, stripe, "pm_card_chargeCustomerFail")
    customer = await api.create_customer(ACME, "cus_1")
    with pytest.raises(PaymentDeclined) as declined:
        await api.charge_off_session(ORDER, processor_id=customer, payment_method=card)
    stripe.fail_next("/v1/customers", "reset", times=stripe_api.RETRIES + 1)
    with pytest.raises(ProcessorUnavailable) as away:
        await api.create_customer(ACME, "cus_2")
    assert log.getvalue() == ""
    for error in (declined.value, away.value):
        told = repr(error) + str(error.__cause__) + str(error.__context__ if not error.__suppress_context__ else "")
        assert not any(said in told for said in (customer, card, stripe.secret_key, stripe.url))


async def test_calls_at_once_share_the_connections(api: StripeAPI, stripe: FakeStripe):
    made = await asyncio.gather(*(api.create_customer(ACME, f"cus_{n}") for n in range(60)))
    assert len(set(made)) == 60
