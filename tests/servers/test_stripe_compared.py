"""Where somebody else has faked the same of Stripe, independently, both fakes behave alike."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import stripe as sdk

from tests.servers.localstripe import localstripe
from tests.servers.stripe import fake_stripe
from tests.servers.test_stripe import sdk_client_at

pytestmark = pytest.mark.sqlite

PRICE = 1000


@pytest.fixture(scope="module")
def localstripe_url() -> Iterator[str]:
    with localstripe() as url:
        yield url


@pytest.fixture(params=["ours", "localstripe"])
async def v1(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """The SDK's services, at either."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "ours":
            server = await stack.enter_async_context(fake_stripe())
            key, url = server.secret_key, server.url
        else:
            key, url = "sk_test_localstripe", request.getfixturevalue("localstripe_url")
        client = await stack.enter_async_context(sdk_client_at(url, key=key))
        yield client.v1


async def customer_with(v1: Any, method: str) -> tuple[str, str]:
    """A new customer, and their payment method."""
    customer = await v1.customers.create_async({"metadata": {"farebox_customer": "cus_1"}})
    attached = await v1.payment_methods.attach_async(method, {"customer": customer.id})
    return customer.id, attached.id


async def charge(v1: Any, customer: str, method: str) -> Any:
    return await v1.payment_intents.create_async(
        {
            **{"amount": PRICE, "currency": "usd", "customer": customer, "payment_method": method},
            **{"confirm": True, "off_session": True, "metadata": {"farebox_order": "ord_1"}},
        }
    )


async def test_a_customer_is_made_found_and_deleted(v1: Any) -> None:
    customer = await v1.customers.create_async({"metadata": {"farebox_customer": "cus_1"}})
    found = await v1.customers.retrieve_async(customer.id)
    assert (found.object, found.metadata["farebox_customer"]) == ("customer", "cus_1")
    assert (await v1.customers.delete_async(customer.id)).deleted
    with pytest.raises(sdk.InvalidRequestError) as refusal:
        await v1.customers.delete_async(customer.id)
    assert refusal.value.http_status == 404


async def test_a_payment_method_is_attached_or_declined(v1: Any) -> None:
    customer, method = await customer_with(v1, "pm_card_visa")
    assert method != "pm_card_visa"
    found = await v1.payment_methods.retrieve_async(method)
    assert (found.customer, found.type, found.card.last4) == (customer, "card", "4242")
    with pytest.raises(sdk.CardError) as refusal:
        await v1.payment_methods.attach_async("pm_card_visa_chargeDeclined", {"customer": customer})
    assert (refusal.value.http_status, refusal.value.code) == (402, "card_declined")


async def test_an_off_session_payment_succeeds(v1: Any) -> None:
    customer, method = await customer_with(v1, "pm_card_visa")
    payment = await charge(v1, customer, method)
    found = await v1.payment_intents.retrieve_async(payment.id, {"expand": ["latest_charge"]})
    assert (found.status, found.amount, found.currency, found.customer) == ("succeeded", PRICE, "usd", customer)
    assert found.metadata["farebox_order"] == "ord_1"
    taken = found.latest_charge
    assert (taken.status, taken.paid, taken.captured, taken.amount_refunded) == ("succeeded", True, True, 0)
    booked = await v1.balance_transactions.retrieve_async(taken.balance_transaction)
    assert (booked.type, booked.amount, booked.source) == ("charge", PRICE, taken.id)
    assert booked.net == booked.amount - booked.fee


async def test_an_off_session_payment_is_declined(v1: Any) -> None:
    customer, method = await customer_with(v1, "pm_card_chargeCustomerFail")
    with pytest.raises(sdk.CardError) as refusal:
        await charge(v1, customer, method)
    assert (refusal.value.http_status, refusal.value.code) == (402, "card_declined")


async def test_a_payment_is_refunded_in_parts(v1: Any) -> None:
    customer, method = await customer_with(v1, "pm_card_visa")
    payment = await charge(v1, customer, method)
    first = await v1.refunds.create_async({"payment_intent": payment.id, "amount": 300})
    second = await v1.refunds.create_async({"payment_intent": payment.id, "amount": 200})
    assert (first.status, first.amount) == ("succeeded", 300)
    listed = await v1.refunds.list_async({"payment_intent": payment.id})
    assert {refund.id for refund in listed.data} == {first.id, second.id}
    booked = await v1.balance_transactions.retrieve_async(first.balance_transaction)
    assert (booked.type, booked.amount, booked.source) == ("refund", -300, first.id)
    found = await v1.payment_intents.retrieve_async(payment.id, {"expand": ["latest_charge"]})
    assert (found.status, found.latest_charge.amount_refunded) == ("succeeded", 500)
    assert found.latest_charge.id == first.charge
    assert not found.latest_charge.refunded
