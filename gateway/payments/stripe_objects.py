"""Stripe's objects, as far as we read them: full ones have many more fields, which are passed over.

Whatever Stripe may leave out, or send as null, has a default. What we cannot do without has none, and is missed in
one place: a message of another shape than these is not understood.
Source: the reference of Stripe's API, for the version that `stripe_api` pins.
"""

from typing import Any, Final

import msgspec

ORDER: Final = "farebox_order"
TENANT: Final = "farebox_tenant"
MODE: Final = "farebox_mode"
"""The keys of the metadata that say which order of whom an object belongs to."""

Metadata = dict[str, Any]


class Referred(msgspec.Struct, frozen=True):
    """An object of which we need to know only which it is."""

    id: str


class Decline(msgspec.Struct, frozen=True):
    code: str | None = None
    decline_code: str | None = None


class PaymentIntent(msgspec.Struct, frozen=True):
    id: str
    status: str
    currency: str
    livemode: bool
    amount_received: int = 0
    metadata: Metadata | None = None
    payment_method: str | Referred | None = None
    setup_future_usage: str | None = None
    last_payment_error: Decline | None = None


class Session(msgspec.Struct, frozen=True):
    id: str
    livemode: bool
    payment_status: str
    status: str | None = None
    amount_total: int | None = None
    currency: str | None = None
    payment_intent: str | PaymentIntent | None = None
    metadata: Metadata | None = None


class Charge(msgspec.Struct, frozen=True):
    id: str
    livemode: bool
    currency: str
    status: str
    captured: bool = False
    amount_captured: int = 0
    amount_refunded: int = 0
    payment_intent: str | Referred | None = None
    metadata: Metadata | None = None


class Refund(msgspec.Struct, frozen=True):
    id: str
    amount: int
    status: str | None = None
    payment_intent: str | Referred | None = None


class Movement(msgspec.Struct, frozen=True):
    """A balance transaction: what a dispute took is negative, what it gave back positive, both without its fee."""

    id: str
    amount: int


class Dispute(msgspec.Struct, frozen=True):
    id: str
    amount: int
    currency: str
    status: str
    livemode: bool
    payment_intent: str | Referred | None = None
    balance_transactions: list[Movement] | None = None


class EventData(msgspec.Struct, frozen=True):
    object: dict[str, Any]


class Event(msgspec.Struct, frozen=True):
    id: str
    type: str
    livemode: bool
    data: EventData
    account: str | None = None


def id_of(reference: "str | Referred | PaymentIntent | None") -> str | None:
    """Stripe sends an id, or the object itself where it was asked to expand it."""
    return reference if reference is None or isinstance(reference, str) else reference.id
