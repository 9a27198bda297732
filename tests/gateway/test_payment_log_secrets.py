"""Payments, walked through with everything that goes wrong: no secret, card or person is in a log line or an answer."""

import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from gateway.logs import configure_logging
from gateway.payments.nightly import Nightly
from gateway.payments.service import Payments
from ledger.model import Scope as LedgerScope
from tests.gateway.office import Office, open_office, paid_with
from tests.servers.stripe import FakeStripe, only
from tests.servers.stripe_objects import FINGERPRINT, LAST4, PERSON, Object

pytestmark = pytest.mark.sqlite

AUTOMATIC: Final = {"auto_topup_enabled": True, "auto_topup_threshold": 5_000_000, "auto_topup_package": "usd-10"}
RETURN: Final = {"success_url": "https://app.example.com/paid", "cancel_url": "https://app.example.com/"}
STRANGER: Final = {"id": "evt_stranger", "object": "event", "type": "charge.refunded", "data": {"object": PERSON}}


@pytest.fixture
def stripe() -> Iterator[FakeStripe]:
    with FakeStripe() as stripe:
        yield stripe


@pytest.fixture
async def office(tmp_path: Path, stripe: FakeStripe, log: io.StringIO) -> AsyncIterator[Office]:
    """One that logs all that it ever would, with nothing masked because the settings hold it."""
    async with open_office(tmp_path, **paid_with(stripe)) as office:
        configure_logging("debug", stream=log)
        yield office


class Walk:
    """Does what customers, Stripe and strangers do, and keeps every answer."""

    def __init__(self, office: Office, stripe: FakeStripe) -> None:
        self.office = office
        self.stripe = stripe
        self.answers: list[str] = []
        self.hidden = {stripe.secret_key, stripe.webhook_secret, FINGERPRINT, *PERSON.values()}

    @property
    def payments(self) -> Payments:
        payments = self.office.gateway.services.payments
        assert payments is not None
        return payments

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        answer = await self.office.ask(method, path, body, **options)
        self.answers.append(answer.text)
        return answer.json()

    async def checkout(self, customer: str, **fields: Any) -> Object:
        """A checkout; its session, if one was made."""
        body = {"customer_id": customer, "package_id": "usd-10", **RETURN, **fields}
        order = (await self.ask("POST", "/v1/checkout", body)).get("order_id")
        sessions = self.stripe.all("checkout.session", client_reference_id=order) if order else []
        return sessions[0] if sessions else {}

    async def send(self, body: bytes, signature: str) -> None:
        headers = {"Stripe-Signature": signature}
        answer = await self.office.ask("POST", "/stripe/webhook", key="none", content=body, headers=headers)
        self.answers.append(answer.text)
        self.hidden |= {part.partition("=")[2] for part in signature.split(",") if part.startswith("v1=")}

    async def tell(self, *events: Object) -> None:
        for event in events:
            await self.send(*self.stripe.signed(event))

    async def pay(self, customer: str, **fields: Any) -> str:
        """The payment intent of a checkout that was paid."""
        session = await self.checkout(customer, **fields)
        await self.tell(*self.stripe.pay(session["id"]))
        return self.stripe.payment_of(session["id"])

    def clean(self, text: str) -> None:
        secrets = {payment["client_secret"] for payment in self.stripe.all("payment_intent")}
        for hidden in self.hidden | secrets:
            assert hidden.lower() not in text.lower()
        assert not re.search(rf"(?<![0-9A-Za-z]){LAST4}(?![0-9A-Za-z])", text)


@pytest.fixture
def walk(office: Office, stripe: FakeStripe) -> Walk:
    return Walk(office, stripe)


async def everything(walk: Walk) -> None:
    stripe = walk.stripe
    payment = await walk.pay("alice", save_payment_method=True)
    refunded = stripe.refund(payment, 300)
    await walk.tell(*refunded, *stripe.fail_refund(only(refunded, "refund.created")["data"]["object"]["id"]))
    dispute = stripe.dispute(payment)
    dispute_id = dispute[0]["data"]["object"]["id"]
    await walk.tell(*dispute, *stripe.withdraw(dispute_id), *stripe.close_dispute(dispute_id, "lost"))
    declined = await walk.checkout("bob")
    await walk.tell(*stripe.pay(declined["id"], payment_method="pm_card_chargeDeclined"))
    later = await walk.checkout("carol")
    await walk.tell(*stripe.pay_later(later["id"]), *stripe.bounce(stripe.payment_of(later["id"])))
    await refusals(walk)
    await nobody_there(walk)
    await compared(walk)


async def nobody_there(walk: Walk) -> None:
    """Automatic top-ups: from a card that is declined, and with a processor that does not answer."""
    orders: list[Object] = []
    for user, fault in (("dora", None), ("emil", 500)):
        session = await walk.checkout(user, save_payment_method=True)
        await walk.tell(*walk.stripe.pay(session["id"], payment_method="pm_card_chargeCustomerFail"))
        if fault is not None:
            walk.stripe.fail_next("/v1/payment_intents", fault, times=20)
        customer = (await walk.ask("PATCH", f"/v1/customers/{user}", {"settings": AUTOMATIC}))["id"]
        await walk.payments.auto_top_ups.consider(LedgerScope(walk.office.tenant, "live"), customer)
        walk.stripe.heal()
        orders += (await walk.ask("GET", f"/v1/customers/{user}/orders"))["data"]
        await walk.ask("GET", f"/v1/events?customer_id={user}")
    assert "generic_decline" in {order["failure"] for order in orders if order["kind"] == "auto"}


async def compared(walk: Walk) -> None:
    """What Stripe moved with what was booked: a payment is missing, of which nobody was told."""
    session = await walk.checkout("frida")
    walk.stripe.pay(session["id"])
    office = walk.office
    office.clock.pass_s(2 * 3600)
    nightly = Nightly(walk.payments.reconciler, counters=office.gateway._metrics, now_us=office.clock.now_us)
    report = await nightly.run()
    assert report.mended
    walk.answers.append(repr(report))


async def refusals(walk: Walk) -> None:
    stripe = walk.stripe
    for fault in (500, 429, 409, 400):
        stripe.fail_next("/v1/", fault, times=20)
        await walk.checkout(f"customer-{fault}")
        stripe.heal()
    await walk.checkout("alice", success_url=f"ftp://{PERSON['email']}")
    paid = next(event for event in stripe.events if event["type"] == "checkout.session.completed")
    body, signature = stripe.signed(paid)
    await walk.send(body.replace(b"1000", b"9000"), signature)
    await walk.send(body, "")
    await walk.send(f'{{"name": "{PERSON["name"]}'.encode(), signature)
    await walk.send(*stripe.signed(paid, at=stripe.now_s() - 3600))
    await walk.send(*stripe.signed(paid, secret="whsec_other"))
    unreadable = {**STRANGER, "created": stripe.now_s(), "livemode": False}
    await walk.tell(unreadable, {**unreadable, "id": "evt_other", "type": "customer.created"})
    other = json.loads(json.dumps(paid).replace("ord_", "ord_other"))
    await walk.tell({**other, "id": "evt_unknown_order"})
    await walk.tell({**paid, "id": "evt_livemode", "livemode": True})


async def test_nothing_of_it_is_logged_answered_counted_or_kept(walk: Walk, log: io.StringIO, tmp_path: Path):
    """What Stripe tells is read for what it says of money; the person in it stays there."""
    await everything(walk)
    for told in ("has not signed", "news of a payment had been missed"):
        assert told in log.getvalue()
    walk.clean(log.getvalue())
    walk.clean("\n".join(walk.answers))
    walk.clean((await walk.office.ask_plain("/metrics")).text)
    walk.clean((tmp_path / "farebox.db").read_bytes().decode("latin-1"))
