"""How an account is paid: customers, their payment methods, Checkout Sessions and payment intents."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from tests.servers import stripe_movements as movements
from tests.servers import stripe_objects as objects
from tests.servers.stripe_cards import TEST_CARDS, TestCard, decline
from tests.servers.stripe_objects import Object, new_id
from tests.servers.stripe_store import Events, Refused, StripeStore, alone, public

SESSION_S: Final = 24 * 3600
SESSION_LEAST_S: Final = 30 * 60


class StripePayments(StripeStore):
    """*now_s* is Stripe's clock."""

    def __init__(self, *, live: bool = False, now_s: Callable[[], int] = lambda: int(time.time())) -> None:
        super().__init__(live=live, now_s=now_s)
        self._cards: dict[str, TestCard] = {}

    @alone
    def line_items(self, session_id: str) -> list[Object]:
        return copy.deepcopy(list(self._objects[session_id]["_line_items"]))

    def payment_of(self, session_id: str) -> str:
        """The id of the session's payment intent."""
        payment: str = self.get(session_id)["payment_intent"]
        return payment

    # Customers and their payment methods

    @alone
    def create_customer(self, params: Mapping[str, Any]) -> Object:
        return self._new(
            objects.customer(
                id=new_id("cus_")[:18],
                created=self.now_s(),
                livemode=self.live,
                metadata=dict(params.get("metadata", {})),
                email=params.get("email"),
                name=params.get("name"),
            )
        )

    @alone
    def delete_customer(self, id: str) -> Events:
        for method in self._of("payment_method", customer=id):
            method["customer"] = None
        customer = self._objects[id]
        self._objects[id] = objects.deleted("customer", id)
        return [self._event("customer.deleted", customer)]

    @alone
    def attach(self, payment_method: str, customer: str) -> Object:
        """A test payment method becomes one of the customer's own; one that exists is theirs from now on.

        Raises:
            Refused: the bank declines it.
        """
        if payment_method not in TEST_CARDS:
            method = self._objects[payment_method]
            method["customer"] = customer
            return method
        card = TEST_CARDS[payment_method]
        if not card.attaches:
            raise Refused(402, **decline(card))
        return self._method(payment_method, customer)

    # Checkout

    @alone
    def create_session(self, params: Mapping[str, Any], *, base_url: str) -> Object:
        items = list(params["line_items"].values())
        price = items[0]["price_data"]
        amounts = [int(item["price_data"]["unit_amount"]) * int(item.get("quantity", 1)) for item in items]
        now = self.now_s()
        id = new_id("cs_live_a1" if self.live else "cs_test_a1")
        session = objects.session(
            id=id,
            created=now,
            livemode=self.live,
            amount=sum(amounts),
            currency=price["currency"],
            customer=params.get("customer"),
            params=params,
            url=f"{base_url}/c/pay/{id}",
            expires_at=int(params.get("expires_at", now + SESSION_S)),
        )
        session["_payment_intent_data"] = dict(params.get("payment_intent_data", {}))
        session["_line_items"] = [
            objects.line_item(
                session_id=id,
                name=item["price_data"]["product_data"]["name"],
                unit_amount=int(item["price_data"]["unit_amount"]),
                quantity=int(item.get("quantity", 1)),
                currency=price["currency"],
                created=now,
            )
            for item in items
        ]
        return self._new(session)

    @alone
    def pay(self, session_id: str, *, payment_method: str = "pm_card_visa", saved: bool | None = None) -> Events:
        """The user pays the open session, and is there to authenticate. A card that is declined leaves it open.

        Args:
            saved: attached to the customer for later; by default if the session asks for that.
        """
        session, payment, events = self._begun(session_id)
        keeps = payment["setup_future_usage"] is not None if saved is None else saved
        card = TEST_CARDS[payment_method]
        method = self._method(payment_method, session["customer"] if keeps and card.attaches else None)
        if not card.attaches:
            return [*events, *self._declined(payment, method, card)]
        session["payment_intent"] = payment["id"]
        if method["customer"]:
            events.append(self._event("payment_method.attached", method))
        charge = self._charged(payment, method, "succeeded")
        events += [self._event("charge.succeeded", charge), self._event("payment_intent.succeeded", payment)]
        session.update(status="complete", payment_status="paid", url=None)
        events.append(self._event("checkout.session.completed", session))
        return [*events, *self._booked(charge)]

    @alone
    def pay_later(self, session_id: str, *, payment_method: str = "pm_usBankAccount_success") -> Events:
        """The user pays with a method that takes days: complete and unpaid, until `arrive` or `bounce`."""
        session, payment, events = self._begun(session_id)
        keeps = payment["setup_future_usage"] is not None
        method = self._method(payment_method, session["customer"] if keeps else None)
        charge = self._charged(payment, method, "pending")
        session.update(status="complete", payment_status="unpaid", url=None, payment_intent=payment["id"])
        return [
            *events,
            self._event("charge.pending", charge),
            self._event("payment_intent.processing", payment),
            self._event("checkout.session.completed", session),
        ]

    @alone
    def expire(self, session_id: str) -> Events:
        """The time of the open session is over."""
        session = self._objects[session_id]
        assert session["status"] == "open", session["status"]
        session.update(status="expired", url=None)
        return [self._event("checkout.session.expired", session)]

    # Payments

    @alone
    def create_payment(self, params: Mapping[str, Any]) -> Object:
        return self._new(
            objects.payment_intent(
                id=new_id("pi_3"),
                created=self.now_s(),
                livemode=self.live,
                amount=int(params["amount"]),
                currency=params["currency"],
                customer=params.get("customer"),
                metadata=dict(params.get("metadata", {})),
                description=params.get("description"),
                setup_future_usage=params.get("setup_future_usage"),
            )
        )

    @alone
    def charge_off_session(self, payment_id: str, payment_method: str) -> Events:
        """Confirm it with nobody there: it succeeds, is processed for days, or is declined.

        Raises:
            Refused: declined. The payment waits for another method, and the events are among `events` all the same.
        """
        payment = self._objects[payment_id]
        method = self._objects.get(payment_method) or self._method(payment_method, payment["customer"])
        card = self._cards[method["id"]]
        events = [self._event("payment_intent.created", payment)]
        if card.code is not None:
            self._declined(payment, method, card)
            raise Refused(402, **payment["last_payment_error"], payment_intent=public(payment))
        if method["type"] != "card":
            charge = self._charged(payment, method, "pending")
            events.append(self._event("charge.pending", charge))
            return [*events, self._event("payment_intent.processing", payment)]
        charge = self._charged(payment, method, "succeeded")
        events += [self._event("charge.succeeded", charge), self._event("payment_intent.succeeded", payment)]
        return [*events, *self._booked(charge)]

    @alone
    def arrive(self, payment_id: str) -> Events:
        """The payment that is being processed succeeds."""
        payment, charge = self._processed(payment_id)
        payment.update(status="succeeded", amount_received=payment["amount"])
        charge.update(status="succeeded", paid=True, captured=True, amount_captured=charge["amount"])
        events = self._booked(charge, told=False)
        events += [self._event("charge.succeeded", charge), self._event("payment_intent.succeeded", payment)]
        for session in self._of("checkout.session", payment_intent=payment_id):
            session["payment_status"] = "paid"
            events.append(self._event("checkout.session.async_payment_succeeded", session))
        return events

    @alone
    def bounce(self, payment_id: str) -> Events:
        """The payment that is being processed fails after all."""
        payment, charge = self._processed(payment_id)
        error = decline(TestCard(code="payment_intent_payment_attempt_failed"))
        payment.update(status="requires_payment_method", payment_method=None, last_payment_error=error)
        charge.update(status="failed", paid=False, failure_code="insufficient_funds")
        events = [self._event("charge.failed", charge), self._event("payment_intent.payment_failed", payment)]
        events += [
            self._event("checkout.session.async_payment_failed", session)
            for session in self._of("checkout.session", payment_intent=payment_id)
        ]
        return events

    @alone
    def cancel(self, payment_id: str, reason: str | None = None) -> Events:
        payment = self._objects[payment_id]
        payment.update(status="canceled", canceled_at=self.now_s(), cancellation_reason=reason)
        return [self._event("payment_intent.canceled", payment)]

    # Below: what the above is made of

    def _method(self, name: str, customer: str | None) -> Object:
        card = TEST_CARDS[name]
        method = self._new(
            objects.payment_method(
                id=new_id("pm_1"),
                created=self.now_s(),
                livemode=self.live,
                customer=customer,
                type=card.type,
                last4=card.last4,
            )
        )
        self._cards[method["id"]] = card
        return method

    def _begun(self, session_id: str) -> tuple[Object, Object, Events]:
        """The open session, and the payment that Stripe makes for it when the user tries to pay for the first time."""
        session = self._objects[session_id]
        assert session["status"] == "open", session["status"]
        if "_payment" in session:
            return session, self._objects[session["_payment"]], []
        data = session["_payment_intent_data"]
        payment = self.create_payment(
            {
                **{name: session[field] for name, field in _FROM_SESSION.items()},
                **{name: data[name] for name in ("metadata", "description", "setup_future_usage") if name in data},
            }
        )
        details = session["customer_details"]
        details.update(address=objects.address(), name=objects.PERSON["name"], email=objects.PERSON["email"])
        session["_payment"] = payment["id"]
        return session, payment, [self._event("payment_intent.created", payment)]

    def _declined(self, payment: Object, method: Object, card: TestCard) -> Events:
        charge = self._charged(payment, method, "failed")
        error = decline(card) | {"charge": charge["id"], "payment_method": copy.deepcopy(method)}
        charge.update(failure_code=card.code, failure_message=error["message"])
        payment.update(status="requires_payment_method", payment_method=None, last_payment_error=error)
        return [self._event("charge.failed", charge), self._event("payment_intent.payment_failed", payment)]

    def _charged(self, payment: Object, method: Object, status: str) -> Object:
        charge = self._new(
            movements.charge(
                id=new_id("ch_3" if method["type"] == "card" else "py_3"),
                created=self.now_s(),
                payment_intent=payment,
                payment_method=method,
                status=status,
            )
        )
        payment.update(latest_charge=charge["id"], payment_method=method["id"], payment_method_types=[method["type"]])
        if status == "succeeded":
            payment.update(status="succeeded", amount_received=payment["amount"])
        elif status == "pending":
            payment["status"] = "processing"
        return charge

    def _processed(self, payment_id: str) -> tuple[Object, Object]:
        payment = self._objects[payment_id]
        assert payment["status"] == "processing", payment["status"]
        return payment, self._objects[payment["latest_charge"]]

    def _booked(self, charge: Object, *, told: bool = True) -> Events:
        """The charge's own movement; Stripe knows it a moment after the charge."""
        charge["balance_transaction"] = self._move("charge", charge["amount"], charge, charge)
        if not told:
            return []
        return [self._event("charge.updated", charge, previous={"balance_transaction": None})]


_FROM_SESSION: Final = {"amount": "amount_total", "currency": "currency", "customer": "customer"}
