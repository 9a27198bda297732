"""Stripe's stand-in, judged by Stripe's own SDK."""

import contextlib
import typing
from collections.abc import AsyncIterator, Iterable
from types import UnionType
from typing import Any, Final

import httpx
import pytest
import stripe as sdk
import stripe.checkout

from tests.servers.stripe import FakeStripe, fake_stripe, only
from tests.servers.stripe_objects import API_VERSION, NOT_SENT, PAYMENT_METHOD_FIELDS, Object, declared

pytestmark = pytest.mark.sqlite

PRICE = 1000

KINDS: Final[dict[str, type]] = {
    "customer": sdk.Customer,
    "checkout.session": stripe.checkout.Session,
    "payment_intent": sdk.PaymentIntent,
    "payment_method": sdk.PaymentMethod,
    "charge": sdk.Charge,
    "refund": sdk.Refund,
    "dispute": sdk.Dispute,
    "balance_transaction": sdk.BalanceTransaction,
    "event": sdk.Event,
}

SESSION: Final[dict[str, Any]] = {
    "mode": "payment",
    "success_url": "https://app.example/done?session={CHECKOUT_SESSION_ID}",
    "cancel_url": "https://app.example/back",
    "client_reference_id": "ord_1",
    "metadata": {"farebox_order": "ord_1"},
    "line_items": [
        {
            "quantity": 1,
            "price_data": {"currency": "usd", "unit_amount": PRICE, "product_data": {"name": "1,000 credits"}},
        }
    ],
    "payment_intent_data": {"metadata": {"farebox_order": "ord_1"}, "setup_future_usage": "off_session"},
}


@pytest.fixture
async def stripe_server() -> AsyncIterator[FakeStripe]:
    async with fake_stripe() as server:
        yield server


class Client(sdk.HTTPXClient):
    """The SDK's own, which hands httpx a string in a way that httpx warns of."""

    def _get_request_args_kwargs(self, *args: Any) -> Any:
        placed, named = super()._get_request_args_kwargs(*args)
        return placed, {"content": named.pop("data") or None, **named}


@contextlib.asynccontextmanager
async def sdk_client_at(url: str, *, key: str, timeout_s: float = 5) -> AsyncIterator[sdk.StripeClient]:
    http_client = Client(timeout=timeout_s)
    try:
        yield sdk.StripeClient(
            key,
            stripe_version=API_VERSION,
            base_addresses={"api": url},
            http_client=http_client,
            max_network_retries=0,
        )
    finally:
        await http_client.close_async()


@pytest.fixture
async def client(stripe_server: FakeStripe) -> AsyncIterator[sdk.StripeClient]:
    async with sdk_client_at(stripe_server.url, key=stripe_server.secret_key) as client:
        yield client


async def paid(client: sdk.StripeClient, server: FakeStripe, **changes: Any) -> tuple[str, str, str]:
    """A customer, their session and its payment, which has succeeded."""
    customer = await client.v1.customers.create_async({"metadata": {"farebox_customer": "cus_1"}})
    session = await client.v1.checkout.sessions.create_async({**SESSION, "customer": customer.id, **changes})
    server.pay(session.id)
    return customer.id, session.id, server.payment_of(session.id)


def test_the_version_is_the_sdk_s_own() -> None:
    assert sdk.api_version == API_VERSION


# Shape


async def test_every_object_has_every_field_that_the_sdk_declares(
    client: sdk.StripeClient, stripe_server: FakeStripe
) -> None:
    """But for those that Stripe leaves out; what the SDK says is never null is not."""
    customer, _, payment = await paid(client, stripe_server)
    refund = stripe_server.refund(payment, 100)[0]["data"]["object"]["id"]
    stripe_server.fail_refund(refund)
    dispute = stripe_server.dispute(payment)[0]["data"]["object"]["id"]
    stripe_server.withdraw(dispute)
    stripe_server.close_dispute(dispute, "lost")
    stripe_server.charge_off_session(off_session_payment(stripe_server, customer)["id"], "pm_card_visa")
    for name, kind in KINDS.items():
        found = stripe_server.events if name == "event" else stripe_server.all(name)
        assert found, name
        for each in found:
            check_shape(each, kind)


def check_shape(found: Object, kind: type) -> None:
    fields = declared(kind) - NOT_SENT.get(kind, frozenset())
    if kind is sdk.PaymentMethod:
        fields = PAYMENT_METHOD_FIELDS | {found["type"]}
    assert fields <= found.keys() <= declared(kind), (kind, fields ^ found.keys())
    hints = kind.__annotations__
    for name, value in found.items():
        assert value is not None or may_be_null(hints[name]), f"{kind.__name__}.{name}"
        inner = getattr(kind, "_inner_class_types", {}).get(name)
        if inner is not None:
            for each in value if isinstance(value, list) else [value]:
                if each:
                    check_inside(each, inner)


def check_inside(found: Object, kind: type) -> None:
    assert found.keys() <= declared(kind), (kind, found.keys() - declared(kind))
    hints = kind.__annotations__
    for name in declared(kind):
        assert found.get(name) is not None or may_be_null(hints[name]), f"{kind.__qualname__}.{name}"


def may_be_null(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, UnionType) and type(None) in typing.get_args(hint)


async def test_the_sdk_reads_what_is_answered(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    customer, session_id, payment_id = await paid(client, stripe_server)
    v1 = client.v1
    session = await v1.checkout.sessions.retrieve_async(
        session_id, {"expand": ["payment_intent.latest_charge.balance_transaction", "line_items"]}
    )
    assert (session.status, session.payment_status, session.customer) == ("complete", "paid", customer)
    payment = session.payment_intent
    assert isinstance(payment, sdk.PaymentIntent)
    assert payment.id == payment_id
    assert payment.metadata["farebox_order"] == "ord_1"
    charge = payment.latest_charge
    assert isinstance(charge, sdk.Charge)
    booked = charge.balance_transaction
    assert isinstance(booked, sdk.BalanceTransaction)
    assert (booked.amount, booked.fee, booked.net) == (PRICE, 59, PRICE - 59)
    assert session.line_items is not None
    assert [item.amount_total for item in session.line_items.data] == [PRICE]
    methods = await v1.customers.payment_methods.list_async(customer)
    assert [method.id for method in methods.data] == [payment.payment_method]


# Idempotency


async def test_the_same_key_gives_the_same_answer(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    once: sdk.RequestOptions = {"idempotency_key": "farebox:customer:1"}
    first = await client.v1.customers.create_async({"metadata": {"a": "1"}}, once)
    second = await client.v1.customers.create_async({"metadata": {"a": "1"}}, once)
    assert first.id == second.id
    assert second.last_response is not None
    assert second.last_response.headers["Idempotent-Replayed"] == "true"
    assert len(stripe_server.all("customer")) == 1
    with pytest.raises(sdk.IdempotencyError):
        await client.v1.customers.create_async({"metadata": {"a": "2"}}, once)


async def test_a_decline_is_kept_and_a_mistake_is_not(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    customer = await client.v1.customers.create_async()
    params: Any = {"amount": PRICE, "currency": "usd", "customer": customer.id, "confirm": True, "off_session": True}
    once: sdk.RequestOptions = {"idempotency_key": "farebox:charge:1"}
    with pytest.raises(sdk.InvalidRequestError):
        await client.v1.payment_intents.create_async({**params, "amount": 1}, once)
    declined = {**params, "payment_method": "pm_card_chargeDeclined"}
    payments = set()
    for _ in range(2):
        with pytest.raises(sdk.CardError) as refusal:
            await client.v1.payment_intents.create_async(declined, once)
        assert refusal.value.error is not None
        payments.add(refusal.value.error.payment_intent.id)
    assert payments == {stripe_server.all("payment_intent")[0]["id"]}
    assert [asked.idempotency_key for asked in stripe_server.requests[1:]] == ["farebox:charge:1"] * 3


# Payments


async def test_a_payment_with_nobody_there_succeeds_is_declined_or_takes_days(
    client: sdk.StripeClient, stripe_server: FakeStripe
) -> None:
    customer = (await client.v1.customers.create_async()).id

    async def charge(method: str) -> sdk.PaymentIntent:
        attached = await client.v1.payment_methods.attach_async(method, {"customer": customer})
        return await client.v1.payment_intents.create_async(
            {
                **{"amount": PRICE, "currency": "usd", "customer": customer, "payment_method": attached.id},
                **{"confirm": True, "off_session": True},
            }
        )

    succeeded = await charge("pm_card_visa")
    assert (succeeded.status, succeeded.amount_received) == ("succeeded", PRICE)
    with pytest.raises(sdk.CardError) as refusal:
        await charge("pm_card_chargeCustomerFail")
    assert refusal.value.http_status == 402
    assert refusal.value.error is not None
    assert (refusal.value.code, refusal.value.error.decline_code) == ("card_declined", "generic_decline")
    with pytest.raises(sdk.CardError) as refusal:
        await charge("pm_card_authenticationRequired")
    assert refusal.value.code == "authentication_required"
    assert refusal.value.error is not None
    assert refusal.value.error.payment_intent.status == "requires_payment_method"
    cancelled = await client.v1.payment_intents.cancel_async(refusal.value.error.payment_intent.id)
    assert cancelled.status == "canceled"
    slow = await charge("pm_usBankAccount_success")
    assert slow.status == "processing"
    events = stripe_server.arrive(slow.id)
    assert only(events, "payment_intent.succeeded")["data"]["object"]["amount_received"] == PRICE
    listed = await client.v1.payment_intents.list_async({"customer": customer})
    assert [payment.status for payment in listed.data] == [
        "succeeded",
        "canceled",
        "requires_payment_method",
        "succeeded",
    ]


async def test_a_session_is_paid_once_paid_late_or_expires(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    async def begin() -> str:
        return (await client.v1.checkout.sessions.create_async(SESSION)).id  # type: ignore[arg-type]

    declined = await begin()
    assert types(stripe_server.pay(declined, payment_method="pm_card_chargeDeclined")) == [
        "payment_intent.created",
        "charge.failed",
        "payment_intent.payment_failed",
    ]
    assert stripe_server.get(declined)["status"] == "open"
    assert "payment_intent.created" not in types(stripe_server.pay(declined))
    late = await begin()
    completed = only(stripe_server.pay_later(late), "checkout.session.completed")
    assert completed["data"]["object"]["payment_status"] == "unpaid"
    assert types(stripe_server.arrive(stripe_server.payment_of(late)))[-1] == "checkout.session.async_payment_succeeded"
    never = await begin()
    stripe_server.pay_later(never)
    assert types(stripe_server.bounce(stripe_server.payment_of(never)))[-1] == "checkout.session.async_payment_failed"
    left = await begin()
    assert (await client.v1.checkout.sessions.expire_async(left)).status == "expired"
    with pytest.raises(sdk.InvalidRequestError):
        await client.v1.checkout.sessions.expire_async(left)


async def test_a_customer_who_was_deleted_is_gone(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    customer, _, _ = await paid(client, stripe_server)
    assert (await client.v1.customers.delete_async(customer)).deleted
    assert (await client.v1.customers.retrieve_async(customer)).deleted
    assert not stripe_server.all("payment_method", customer=customer)
    with pytest.raises(sdk.InvalidRequestError) as refusal:
        await client.v1.customers.delete_async(customer)
    assert refusal.value.code == "resource_missing"
    with pytest.raises(sdk.InvalidRequestError):
        await client.v1.checkout.sessions.create_async({**SESSION, "customer": customer})  # type: ignore[typeddict-item]


def off_session_payment(server: FakeStripe, customer: str) -> Object:
    return server.create_payment({"amount": str(PRICE), "currency": "usd", "customer": customer})


# What comes later


async def test_the_balance_says_what_moved(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    _, _, payment = await paid(client, stripe_server)
    refunded = stripe_server.refund(payment, 300)[0]["data"]["object"]["id"]
    stripe_server.fail_refund(refunded)
    await client.v1.refunds.create_async({"payment_intent": payment, "amount": 200})
    dispute = stripe_server.dispute(payment, 800)[0]["data"]["object"]["id"]
    stripe_server.withdraw(dispute)
    stripe_server.reinstate(dispute)
    closed = stripe_server.close_dispute(dispute, "won")
    assert [len(event["data"]["object"]["balance_transactions"]) for event in closed] == [2]
    rows = []
    page = await client.v1.balance_transactions.list_async({"limit": 2, "expand": ["data.source"]})
    async for row in page.auto_paging_iter():
        rows.append((row.type, row.amount, row.fee))
        assert not isinstance(row.source, str)
    assert rows[::-1] == [
        ("charge", 1000, 59),
        ("refund", -300, 0),
        ("refund_failure", 300, 0),
        ("refund", -200, 0),
        ("adjustment", -800, 1500),
        ("adjustment", 800, 0),
    ]
    with pytest.raises(sdk.InvalidRequestError):
        await client.v1.refunds.create_async({"payment_intent": payment, "amount": 801})


async def test_lists_know_times_and_kinds() -> None:
    now = 1_800_000_000
    async with fake_stripe(now_s=lambda: now) as server, sdk_client_at(server.url, key=server.secret_key) as client:
        server.create_customer({})
        payment = off_session_payment(server, server.all("customer")[0]["id"])
        server.charge_off_session(payment["id"], "pm_card_visa")
        server.refund(payment["id"])
        now += 3600
        late = off_session_payment(server, server.all("customer")[0]["id"])
        server.charge_off_session(late["id"], "pm_card_visa")
        v1 = client.v1
        found = await v1.balance_transactions.list_async({"created": {"gte": now}})
        assert [row.source for row in found.data] == [server.get(late["id"])["latest_charge"]]
        found = await v1.balance_transactions.list_async({"created": {"lt": now}})
        assert [row.type for row in found.data] == ["refund", "charge"]
        refunds = await v1.refunds.list_async({"payment_intent": payment["id"]})
        assert [refund.amount for refund in refunds.data] == [PRICE]
        assert not (await v1.disputes.list_async({"payment_intent": payment["id"]})).data
        told = await v1.events.list_async({"types": ["charge.refunded"]})
        assert [event.type for event in told.data] == ["charge.refunded"]


# Events


async def test_the_sdk_takes_the_signature(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    _, session, _ = await paid(client, stripe_server)
    completed = only(stripe_server.events, "checkout.session.completed")
    body, header = stripe_server.signed(completed)
    event = client.construct_event(body, header, stripe_server.webhook_secret)
    assert (event.type, event.api_version, event.data.object["id"]) == (completed["type"], API_VERSION, session)
    with pytest.raises(sdk.SignatureVerificationError):
        client.construct_event(body.replace(b"1000", b"9000"), header, stripe_server.webhook_secret)
    old = stripe_server.signed(completed, at=stripe_server.now_s() - 301)
    with pytest.raises(sdk.SignatureVerificationError):
        client.construct_event(*old, stripe_server.webhook_secret)
    with pytest.raises(sdk.SignatureVerificationError):
        client.construct_event(*stripe_server.signed(completed, secret="whsec_other"), stripe_server.webhook_secret)


async def test_an_event_shows_its_object_as_it_was(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    _, _, payment = await paid(client, stripe_server)
    half = only(stripe_server.refund(payment, 400), "charge.refunded")
    whole = only(stripe_server.refund(payment), "charge.refunded")
    assert [event["data"]["object"]["amount_refunded"] for event in (half, whole)] == [400, 1000]
    assert [event["data"]["object"]["refunded"] for event in (half, whole)] == [False, True]
    assert whole["data"]["previous_attributes"] == {"amount_refunded": 400}


def types(events: Iterable[Object]) -> list[str]:
    return [event["type"] for event in events]


# Faults and refusals


async def test_faults_come_when_they_are_told_to(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    create = client.v1.customers.create_async
    stripe_server.fail_next("/v1/customers", 429)
    with pytest.raises(sdk.RateLimitError):
        await create()
    stripe_server.fail_next("/v1/customers", 500, times=2)
    for _ in range(2):
        with pytest.raises(sdk.APIError):
            await create()
    stripe_server.fail_next("/v1/customers", "reset")
    with pytest.raises(sdk.APIConnectionError):
        await create()
    assert not stripe_server.all("customer")
    stripe_server.fail_next("/v1/customers", "reset-after-effect", method="POST")
    with pytest.raises(sdk.APIConnectionError):
        await create({}, {"idempotency_key": "once"})
    (customer,) = stripe_server.all("customer")
    assert (await create({}, {"idempotency_key": "once"})).id == customer["id"]


async def test_what_hangs_is_answered_when_it_is_released(stripe_server: FakeStripe) -> None:
    async with sdk_client_at(stripe_server.url, key=stripe_server.secret_key, timeout_s=0.1) as impatient:
        stripe_server.fail_next("/v1/customers", "hang")
        with pytest.raises(sdk.APIConnectionError):
            await impatient.v1.customers.create_async()
        stripe_server.heal()
        assert (await impatient.v1.customers.create_async()).id.startswith("cus_")


async def test_strangers_and_unknown_parameters_are_refused(
    client: sdk.StripeClient, stripe_server: FakeStripe
) -> None:
    async with sdk_client_at(stripe_server.url, key="sk_test_stranger") as stranger:
        with pytest.raises(sdk.AuthenticationError):
            await stranger.v1.customers.create_async()
    with pytest.raises(sdk.InvalidRequestError) as refusal:
        await client.v1.customers.create_async({"nickname": "Jen"})  # type: ignore[typeddict-unknown-key]
    assert refusal.value.code == "parameter_unknown"
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {stripe_server.secret_key}"}) as plain:
        assert (await plain.get(f"{stripe_server.url}/v1/customers/cus_x")).status_code == 400
    assert [asked.version for asked in stripe_server.requests] == [API_VERSION, API_VERSION, None]


async def test_the_page_takes_the_money_and_leads_back(client: sdk.StripeClient, stripe_server: FakeStripe) -> None:
    session = await client.v1.checkout.sessions.create_async(SESSION)  # type: ignore[arg-type]
    assert session.url is not None
    async with httpx.AsyncClient() as browser:
        assert "1000 usd" in (await browser.get(session.url)).text
        back = await browser.post(session.url)
    assert back.headers["location"] == f"https://app.example/done?session={session.id}"
    assert stripe_server.get(session.id)["payment_status"] == "paid"
