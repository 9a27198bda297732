"""What an event of Stripe's, or an object that was asked for, says of a payment.

`SELECTED` are the events to select in Stripe. What belongs to a payment of the operator's that is none of our orders
says nothing; what belongs to one whose order it does not name is linked by its payment intent.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from gateway.payments import stripe_objects as stripe
from gateway.payments.facts import CANCELED, EXPIRED, Dispute, Facts, Money, Refund, Stage
from gateway.payments.stripe_objects import MODE, ORDER, TENANT, id_of
from ledger.model import Scope


class OrderRef(msgspec.Struct, frozen=True):
    """Which order of whom an object says that it belongs to."""

    scope: Scope
    order_id: str


class Observed(msgspec.Struct, frozen=True):
    """What was learnt at once, from an event or by asking.

    Attributes:
        id: an event's own; what was learnt by asking has one that follows from what it says.
        livemode: None where the object does not tell.
        account: the connected account that an event is of.
    """

    id: str
    kind: str
    payment_intent: str | None
    order: OrderRef | None
    facts: Facts
    livemode: bool | None = None
    account: str | None = None


class Unreadable(Exception):
    """An event or object of a kind that we know has a shape that we do not."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind


def facts_of(message: Mapping[str, Any]) -> Observed | None:
    """What an event of `SELECTED`, or a session, payment intent, charge, refund or dispute, says of a payment.

    None for an event or object of another kind, and for a payment that was not made for an order of ours.

    Raises:
        Unreadable
    """
    kind = message.get("object")
    if kind != "event":
        return _read_object(message, f"{kind}")
    if message.get("type") not in _READ_EVENTS:
        return None
    event = _convert(message, stripe.Event, "event")
    observed = _read_object(event.data.object, event.type)
    if observed is None:
        return None
    return msgspec.structs.replace(observed, id=event.id, livemode=event.livemode, account=event.account)


def _read_object(message: Mapping[str, Any], kind: str) -> Observed | None:
    shape = message.get("object")
    if not isinstance(shape, str) or shape not in _READERS:
        if kind in _READ_EVENTS:
            raise Unreadable(kind, "the object in it is of another kind")
        return None
    observed = _READERS[shape](message, kind)
    if observed is None:
        return None
    digest = hashlib.sha256(msgspec.json.encode([observed.order, observed.facts], order="deterministic")).hexdigest()
    return msgspec.structs.replace(observed, id=f"seen:{observed.id}:{digest[:32]}")


def _session(message: Mapping[str, Any], kind: str) -> Observed | None:
    session = _convert(message, stripe.Session, kind)
    order = _order_of(session.metadata)
    if order is None:
        return None
    facts = Facts(ended=frozenset(_SESSION_ENDS[kind]) if kind in _SESSION_ENDS else frozenset())
    if session.status == "expired":
        facts = facts.join(Facts(ended=frozenset({EXPIRED})))
    if session.payment_status == "paid":
        if session.amount_total is None or session.currency is None:
            raise Unreadable(kind, "it is paid, and does not say how much")
        facts = facts.join(Facts(received=frozenset({Money(session.amount_total, session.currency)})))
    if isinstance(session.payment_intent, stripe.PaymentIntent):
        facts = facts.join(_facts_of_intent(session.payment_intent))
        if session.status == "complete" and session.payment_intent.status in _BOUNCED:
            # Who has been through the page cannot pay on it again: the event of that says the same.
            facts = facts.join(Facts(ended=frozenset({_ASYNC_FAILED})))
    return Observed(session.id, kind, id_of(session.payment_intent), order, facts, session.livemode)


def _payment_intent(message: Mapping[str, Any], kind: str) -> Observed | None:
    intent = _convert(message, stripe.PaymentIntent, kind)
    order = _order_of(intent.metadata)
    if order is None:
        return None
    return Observed(intent.id, kind, intent.id, order, _facts_of_intent(intent), intent.livemode)


def _facts_of_intent(intent: stripe.PaymentIntent) -> Facts:
    if intent.status == "succeeded":
        method = id_of(intent.payment_method)
        saved = method is not None and intent.setup_future_usage == "off_session"
        return Facts(
            received=frozenset({Money(intent.amount_received, intent.currency)}),
            methods=frozenset({method} if method is not None and saved else ()),
        )
    if intent.status == "canceled":
        return Facts(ended=frozenset({CANCELED}))
    error = intent.last_payment_error
    code = None if error is None else error.decline_code or error.code
    return Facts(declined=frozenset({code} if code is not None else ()))


def _charge(message: Mapping[str, Any], kind: str) -> Observed | None:
    charge = _convert(message, stripe.Charge, kind)
    paid = charge.status == "succeeded" and charge.captured
    facts = Facts(
        received=frozenset({Money(charge.amount_captured, charge.currency)} if paid else ()),
        amount_refunded=charge.amount_refunded,
    )
    order = _order_of(charge.metadata)
    return _of_payment(charge.id, kind, charge.payment_intent, facts, order=order, livemode=charge.livemode)


def _refund(message: Mapping[str, Any], kind: str) -> Observed | None:
    refund = _convert(message, stripe.Refund, kind)
    known = Refund(refund.amount, undone=refund.status in _REFUND_UNDONE)
    return _of_payment(refund.id, kind, refund.payment_intent, Facts(refunds={refund.id: known}))


def _dispute(message: Mapping[str, Any], kind: str) -> Observed | None:
    dispute = _convert(message, stripe.Dispute, kind)
    closed = kind == "charge.dispute.closed"
    known = Dispute(
        dispute.amount,
        dispute.currency,
        # A status that is new to us is an open dispute, until it is said to be closed.
        _STAGES.get(dispute.status, Stage.CLOSED if closed else Stage.OPEN),
        moved={movement.id: movement.amount for movement in dispute.balance_transactions or ()},
        withdrawn=kind == "charge.dispute.funds_withdrawn",
        reinstated=kind == "charge.dispute.funds_reinstated",
        won=dispute.status == "won",
        lost=dispute.status in _LOST,
    )
    facts = Facts(disputes={dispute.id: known})
    return _of_payment(dispute.id, kind, dispute.payment_intent, facts, livemode=dispute.livemode)


def _of_payment(
    object_id: str,
    kind: str,
    payment_intent: str | stripe.Referred | None,
    facts: Facts,
    *,
    order: OrderRef | None = None,
    livemode: bool | None = None,
) -> Observed | None:
    """None for what belongs to a charge that was made without a payment intent: ours never are."""
    intent_id = id_of(payment_intent)
    return None if intent_id is None else Observed(object_id, kind, intent_id, order, facts, livemode)


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any], str], Observed | None]]] = {
    "checkout.session": _session,
    "payment_intent": _payment_intent,
    "charge": _charge,
    "refund": _refund,
    "dispute": _dispute,
}

_ASYNC_FAILED: Final = "async_payment_failed"

_BOUNCED: Final = ("requires_payment_method", "canceled")
"""What a payment intent is after a payment that took days has failed."""

_SESSION_ENDS: Final = {
    "checkout.session.async_payment_failed": (_ASYNC_FAILED,),
    "checkout.session.expired": (EXPIRED,),
}

_REFUND_UNDONE: Final = ("failed", "canceled")

_LOST: Final = ("lost", "appeal_needs_response", "appeal_under_review")
"""Only who has lost can appeal, and what was lost stays away until the appeal is won."""

_STAGES: Final = {
    "warning_needs_response": Stage.INQUIRY,
    "warning_under_review": Stage.INQUIRY,
    "warning_closed": Stage.INQUIRY_CLOSED,
    "needs_response": Stage.OPEN,
    "under_review": Stage.OPEN,
    "won": Stage.CLOSED,
    "prevented": Stage.CLOSED,
    **dict.fromkeys(_LOST, Stage.CLOSED),
}

SELECTED: Final = (
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.async_payment_failed",
    "checkout.session.expired",
    "payment_intent.succeeded",
    "payment_intent.payment_failed",
    "payment_intent.canceled",
    "charge.refunded",
    "refund.created",
    "refund.updated",
    "refund.failed",
    "charge.dispute.created",
    "charge.dispute.updated",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.funds_reinstated",
    "charge.dispute.closed",
)
"""The events to select in Stripe."""

_READ_EVENTS: Final = frozenset({*SELECTED, "charge.succeeded", "charge.updated", "charge.refund.updated"})
"""Those, and what says the same again: who has selected it all the same is not to be told that it is unknown."""


def _order_of(metadata: Mapping[str, Any] | None) -> OrderRef | None:
    """By the metadata, which only the operator's key can write: a `client_reference_id` comes from anybody's link."""
    order_id, tenant, mode = ((metadata or {}).get(name) for name in (ORDER, TENANT, MODE))
    if not (isinstance(order_id, str) and isinstance(tenant, str) and isinstance(mode, str)):
        return None
    return OrderRef(Scope(tenant, mode), order_id)


Shape = TypeVar("Shape")


def _convert(message: Mapping[str, Any], shape: type[Shape], kind: str) -> Shape:
    try:
        return msgspec.convert(message, shape)
    except msgspec.ValidationError as error:
        raise Unreadable(kind, str(error)) from None
