"""A Stripe account: its objects, what happens to them, and the events that tell of it.

How it works: `StripeAccount` keeps every object by its id, as it is now. What happens changes them, books what moves
money, and returns the events that Stripe would send, each with a copy of its object at that moment. Nothing is
delivered by itself: a test hands events over in the order that it likes. One lock makes each of these whole.
"""

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from tests.servers import stripe_movements as movements
from tests.servers import stripe_objects as objects
from tests.servers.stripe_objects import LAST4, Object, new_id

P = ParamSpec("P")
R = TypeVar("R")

Events = list[Object]

SESSION_S: Final = 24 * 3600
SESSION_LEAST_S: Final = 30 * 60


@dataclass(frozen=True)
class TestCard:
    """How one of Stripe's test payment methods behaves: on attaching, and when it is charged."""

    __test__ = False

    last4: str = LAST4
    type: str = "card"
    attaches: bool = True
    code: str | None = None
    decline_code: str | None = None


_DECLINED: Final = "card_declined"

TEST_CARDS: Final[Mapping[str, TestCard]] = {
    "pm_card_visa": TestCard(),
    "pm_card_chargeDeclined": TestCard("0002", attaches=False, code=_DECLINED, decline_code="generic_decline"),
    "pm_card_chargeDeclinedInsufficientFunds": TestCard(
        "9995", attaches=False, code=_DECLINED, decline_code="insufficient_funds"
    ),
    "pm_card_chargeDeclinedExpiredCard": TestCard("0069", attaches=False, code="expired_card"),
    "pm_card_chargeCustomerFail": TestCard("0341", code=_DECLINED, decline_code="generic_decline"),
    "pm_card_authenticationRequired": TestCard(
        "3184", code="authentication_required", decline_code="authentication_required"
    ),
    "pm_usBankAccount_success": TestCard("6789", type="us_bank_account"),
}
"""Source: docs.stripe.com/testing. Authentication is asked for only of who is not there."""

MESSAGES: Final = {
    "card_declined": "Your card was declined.",
    "expired_card": "Your card has expired.",
    "authentication_required": "Your card was declined. This transaction requires authentication.",
}


class Refused(Exception):
    """An answer of Stripe's that is an error: its status, and its object `error`."""

    def __init__(self, status: int, message: str, *, type: str = "invalid_request_error", **details: Any) -> None:
        super().__init__(message)
        self.status = status
        self.error: Object = {"message": message, "type": type, **details}


def alone(
    method: Callable[Concatenate["StripeAccount", P], R],
) -> Callable[Concatenate["StripeAccount", P], R]:
    """Nothing else happens to the account meanwhile."""

    @functools.wraps(method)
    def wrapped(self: "StripeAccount", *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return wrapped


class StripeAccount:
    """*now_s* is Stripe's clock. Attributes: `events`, all that were made, the oldest first."""

    def __init__(self, *, live: bool = False, now_s: Callable[[], int] = lambda: int(time.time())) -> None:
        self.live = live
        self.now_s = now_s
        self.lock = threading.RLock()
        self.events: Events = []
        self._objects: dict[str, Object] = {}
        self._cards: dict[str, TestCard] = {}
        self._request: Object = {"id": None, "idempotency_key": None}

    # What there is

    @alone
    def get(self, id: str) -> Object:
        """A copy of the object as it is now."""
        return _public(self._objects[id])

    @alone
    def all(self, object: str, **fields: Any) -> list[Object]:
        """Copies of the objects of that kind with these values, the newest first."""
        return [
            _public(each)
            for each in reversed(self._objects.values())
            if each["object"] == object and all(each.get(name) == value for name, value in fields.items())
        ]

    def holds(self, id: str) -> bool:
        return id in self._objects

    @alone
    def line_items(self, session_id: str) -> list[Object]:
        return copy.deepcopy(self._objects[session_id]["_line_items"])

    @contextlib.contextmanager
    def asked_by(self, idempotency_key: str | None) -> Iterator[None]:
        """What happens inside was asked for by a request: its events say so."""
        with self.lock:
            before, self._request = self._request, {"id": new_id("req_")[:18], "idempotency_key": idempotency_key}
            try:
                yield
            finally:
                self._request = before

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
            raise Refused(402, **_decline(card))
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
            raise Refused(402, **payment["last_payment_error"], payment_intent=_public(payment))
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
        error = _decline(TestCard(code="payment_intent_payment_attempt_failed"))
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

    # What may become of a payment later

    @alone
    def refund(
        self,
        payment_id: str,
        amount: int | None = None,
        *,
        status: str = "succeeded",
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Events:
        """Give *amount* back, or what is left; the first event has the refund itself."""
        charge = self._objects[self._objects[payment_id]["latest_charge"]]
        amount = charge["amount"] - charge["amount_refunded"] if amount is None else amount
        refund = self._new(
            movements.refund(
                id=new_id("re_3"),
                created=self.now_s(),
                charge=charge,
                amount=amount,
                status=status,
                reason=reason,
                metadata=dict(metadata or {}),
            )
        )
        self._change_refunded(charge, amount)
        refund["balance_transaction"] = self._move("refund", -amount, refund, charge)
        return [
            self._event("refund.created", refund),
            self._event("charge.refunded", charge, previous={"amount_refunded": charge["amount_refunded"] - amount}),
        ]

    @alone
    def complete_refund(self, refund_id: str) -> Events:
        """A pending refund has reached the customer."""
        refund = self._objects[refund_id]
        before, refund["status"] = refund["status"], "succeeded"
        return [
            self._event(type, refund, previous={"status": before})
            for type in ("refund.updated", "charge.refund.updated")
        ]

    @alone
    def fail_refund(self, refund_id: str) -> Events:
        """The bank sends the refund back: the money is on Stripe's balance again."""
        refund = self._objects[refund_id]
        charge = self._objects[refund["charge"]]
        before = refund["status"]
        self._change_refunded(charge, -refund["amount"])
        refund.update(
            status="failed",
            failure_reason="lost_or_stolen_card",
            failure_balance_transaction=self._move("refund_failure", refund["amount"], refund, charge),
        )
        types = ("refund.failed", "refund.updated", "charge.refund.updated")
        return [self._event(type, refund, previous={"status": before}) for type in types]

    @alone
    def dispute(
        self,
        payment_id: str,
        amount: int | None = None,
        reason: str = "fraudulent",
        *,
        currency: str | None = None,
        inquiry: bool = False,
    ) -> Events:
        """The cardholder disputes *amount*, or all of it. Nothing is withdrawn before `withdraw`."""
        charge = self._objects[self._objects[payment_id]["latest_charge"]]
        charge["disputed"] = True
        dispute = self._new(
            movements.dispute(
                id=new_id("du_1"),
                created=self.now_s(),
                charge=charge,
                amount=charge["amount"] if amount is None else amount,
                currency=currency or charge["currency"],
                reason=reason,
                inquiry=inquiry,
            )
        )
        return [self._event("charge.dispute.created", dispute)]

    @alone
    def update_dispute(self, dispute_id: str, status: str = "under_review") -> Events:
        """Evidence was handed in, or an inquiry became a dispute."""
        dispute = self._objects[dispute_id]
        before, dispute["status"] = dispute["status"], status
        dispute["evidence_details"].update(has_evidence=True, submission_count=1)
        return [self._event("charge.dispute.updated", dispute, previous={"status": before})]

    @alone
    def withdraw(self, dispute_id: str) -> Events:
        """Stripe takes the disputed amount and its fee from the balance."""
        dispute = self._objects[dispute_id]
        self._adjust(dispute, "dispute", -dispute["amount"], fee=movements.DISPUTE_FEE_MINOR)
        return [self._event("charge.dispute.funds_withdrawn", dispute)]

    @alone
    def reinstate(self, dispute_id: str) -> Events:
        """Stripe puts the disputed amount back; its fee stays paid."""
        dispute = self._objects[dispute_id]
        self._adjust(dispute, "dispute_reversal", dispute["amount"], fee=0)
        return [self._event("charge.dispute.funds_reinstated", dispute)]

    @alone
    def close_dispute(self, dispute_id: str, status: str) -> Events:
        """*status*: won, lost or warning_closed. What moves money is for `withdraw` and `reinstate`."""
        dispute = self._objects[dispute_id]
        before, dispute["status"] = dispute["status"], status
        dispute["is_charge_refundable"] = status == "warning_closed"
        return [self._event("charge.dispute.closed", dispute, previous={"status": before})]

    # Below: what the above is made of

    def _new(self, made: Object) -> Object:
        self._objects[made["id"]] = made
        return made

    def _of(self, object: str, **fields: Any) -> list[Object]:
        return [
            each
            for each in self._objects.values()
            if each["object"] == object and all(each.get(name) == value for name, value in fields.items())
        ]

    def _event(self, type: str, subject: Object, *, previous: Object | None = None) -> Object:
        made = objects.event(
            type,
            _public(subject),
            created=self.now_s(),
            livemode=self.live,
            request=dict(self._request),
            previous=previous,
        )
        self.events.append(made)
        return copy.deepcopy(made)

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
        error = _decline(card) | {"charge": charge["id"], "payment_method": copy.deepcopy(method)}
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

    def _change_refunded(self, charge: Object, by: int) -> None:
        charge["amount_refunded"] += by
        charge["refunded"] = charge["amount_refunded"] == charge["amount"]

    def _move(self, category: str, amount: int, source: Object, charge: Object) -> str:
        """Book a movement of the charge's balance; its id."""
        made = movements.balance_transaction(
            type=_TYPES[category][charge["payment_method_details"]["type"] != "card"],
            category=category,
            amount=amount,
            fee=movements.fee_of(amount) if category == "charge" else 0,
            currency=charge["currency"],
            source=source["id"],
            created=self.now_s(),
            description=charge["description"],
        )
        id: str = self._new(made)["id"]
        return id

    def _adjust(self, dispute: Object, category: str, amount: int, *, fee: int) -> None:
        made = movements.balance_transaction(
            type="adjustment",
            category=category,
            amount=amount,
            fee=fee,
            currency=dispute["currency"],
            source=dispute["id"],
            created=self.now_s(),
            description=f"Chargeback {'withdrawal' if amount < 0 else 'reversal'} for {dispute['charge']}",
        )
        dispute["balance_transactions"].append(self._new(made))


_FROM_SESSION: Final = {"amount": "amount_total", "currency": "currency", "customer": "customer"}

_TYPES: Final = {
    "charge": ("charge", "payment"),
    "refund": ("refund", "payment_refund"),
    "refund_failure": ("refund_failure", "payment_failure_refund"),
}
"""Of a movement's category: what it is called for cards, and for all else."""


def _public(subject: Object) -> Object:
    """A copy of what Stripe shows: without what it only remembers."""
    return {name: copy.deepcopy(value) for name, value in subject.items() if not name.startswith("_")}


def _decline(card: TestCard) -> Object:
    assert card.code is not None
    decline = {} if card.decline_code is None else {"decline_code": card.decline_code}
    return {
        "type": "card_error",
        "code": card.code,
        **decline,
        "doc_url": f"https://docs.stripe.com/error-codes/{card.code.replace('_', '-')}",
        "message": MESSAGES.get(card.code, "The payment failed."),
    }
