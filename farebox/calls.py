"""What can be asked of Farebox about customers and their credits: one function for each call, which both clients share.

Amounts are credits: an int, a str or a Decimal, never a float; `millicredits` where you count in those. A customer is
named by your own id of them, or by ours. A call that changes something takes an `idempotency_key`, by which it is done
once however often it is repeated; without one it gets one of its own, which protects its retries.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Final
from urllib.parse import quote

from farebox.call import PAGE_SIZE, Call, Pages, change, get, listed
from farebox.credits import Amount, one_of, text
from farebox.errors import FareboxError, refusal
from farebox.reading import reader
from farebox.values import (
    Balance,
    Customer,
    Entitlement,
    Event,
    Extended,
    Granted,
    Purchase,
    Refund,
    ReservationState,
    Revoked,
    Settled,
    Transaction,
    Usage,
    UsageEvent,
    UsageSum,
)

BATCH_ACCEPTED: Final = "accepted"


@dataclass(frozen=True, slots=True)
class UsageBatch:
    """What became of each event, in their order: what was recorded, or why it was refused."""

    data: tuple[Usage | FareboxError, ...]

    @property
    def refused(self) -> tuple[FareboxError, ...]:
        return tuple(each for each in self.data if isinstance(each, FareboxError))


# Customers.


def create_customer(
    external_id: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[Customer]:
    """Create a customer, or find the one with this `external_id`."""
    body = {"external_id": external_id, "metadata": metadata, "settings": settings}
    return change("POST", "customers", reader(Customer), body, key=idempotency_key)


def get_customer(customer: str) -> Call[Customer]:
    """One customer."""
    if "/" in customer:  # In a path `a/credits` are the credits of `a`. An id of ours has none.
        return Call("GET", "customers", lambda answer: _only(customer, answer), {"external_id": customer})
    return get(customer_path(customer), Customer)


def customers(*, external_id: str | None = None, page_size: int = PAGE_SIZE) -> Pages[Customer]:
    """All customers, newest first, or the one with *external_id*."""
    return listed("customers", Customer, {"external_id": external_id}, page_size=page_size)


def update_customer(
    customer: str,
    *,
    external_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    version: int | None = None,
    idempotency_key: str | None = None,
) -> Call[Customer]:
    """Change a customer; with *version*, only if nobody has changed them since. Amounts in *settings* are millicredits,
    as in the API."""
    body = {"external_id": external_id, "metadata": metadata, "settings": settings}
    return change("PATCH", customer_path(customer), reader(Customer), body, key=idempotency_key, version=version)


def delete_customer(customer: str) -> Call[None]:
    """Erase all that is known of a customer. The journal keeps numbers that name nobody."""
    return change("DELETE", customer_path(customer), _nothing, key=None)


# Credits.


def grant(
    customer: str,
    *,
    credits: Amount | None = None,
    millicredits: int | None = None,
    expires_at: datetime | None = None,
    priority: int | None = None,
    source: str | None = None,
    accumulation_cap: Amount | None = None,
    apps: Iterable[str] = (),
    metrics: Iterable[str] = (),
    models: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[Granted]:
    """Give a customer credits that were paid for elsewhere. Derive the idempotency key from the payment."""
    body = {
        "customer_id": customer,
        "credits": _needed(one_of(credits, millicredits)),
        "expires_at": None if expires_at is None else _time(expires_at, name="expires_at"),
        "priority": priority,
        "source": source,
        "accumulation_cap": one_of(accumulation_cap, None),
        "apps": list(apps) or None,
        "metrics": list(metrics) or None,
        "models": list(models) or None,
        "metadata": metadata,
    }
    return change("POST", "topup/grant", reader(Granted), body, key=idempotency_key)


def credits(customer: str, *, metric: str | None = None, model: str | None = None) -> Call[Balance]:
    """The balance and the blocks that it is made of; *metric* and *model* say what `effective_balance` is for."""
    query = {"include_blocks": "true", "metric": metric, "model": model}
    return get(f"{customer_path(customer)}/credits", Balance, query)


def transactions(customer: str, *, page_size: int = PAGE_SIZE) -> Pages[Transaction]:
    """The statement, newest first."""
    return listed(f"{customer_path(customer)}/transactions", Transaction, page_size=page_size)


def revoke(
    customer: str,
    block_id: str,
    *,
    credits: Amount | None = None,
    millicredits: int | None = None,
    clawback: bool = False,
    reason: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Revoked]:
    """Take credits of one block back: what is free of them, or with *clawback* what was granted, spent or not."""
    path = f"{customer_path(customer)}/credits/{segment(block_id)}/revoke"
    body = {"credits": one_of(credits, millicredits), "clawback": clawback or None, "reason": reason}
    return change("POST", path, reader(Revoked), body, key=idempotency_key)


def refund(
    request_id: str,
    *,
    credits: Amount | None = None,
    millicredits: int | None = None,
    reason: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Refund]:
    """Give back what a request, a usage event or a reservation was charged, all that is left of it or a part."""
    exact = None if credits is None else text(credits, name="credits")
    if exact is not None and millicredits is not None:
        raise ValueError("give the amount once: credits or millicredits")
    body = {"amount_decimal": exact, "credits": one_of(None, millicredits), "reason": reason}
    return change("POST", f"requests/{segment(request_id)}/refund", reader(Refund), body, key=idempotency_key)


def buy_pack(
    customer: str,
    pack: str,
    *,
    price: Amount | None = None,
    credits: Amount | None = None,
    metadata: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[Purchase]:
    """Buy a pack out of the customer's own credits, at a price of its own if you give one."""
    body = {"pack": pack, "price": one_of(price, None), "credits": one_of(credits, None), "metadata": metadata}
    return change("POST", f"{customer_path(customer)}/packs", reader(Purchase), body, key=idempotency_key)


# Usage.


def check_entitlement(customer: str, metric: str, units: Amount = 1) -> Call[Entitlement]:
    """Whether the customer may use so many units now, and what they cost. The answer is true where they may."""
    path = f"{customer_path(customer)}/entitlements/{segment(metric)}"
    return get(path, Entitlement, {"units": text(units, name="units")})


def record_usage(
    customer: str,
    metric: str,
    units: Amount = 1,
    *,
    metadata: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[Usage]:
    """Charge one event by its metric's price. Derive the idempotency key from what happened."""
    body = _event(UsageEvent(customer, metric, units, metadata or {}))
    return change("POST", "usage", reader(Usage), body, key=idempotency_key)


def record_usage_batch(events: Iterable[UsageEvent], *, idempotency_key: str | None = None) -> Call[UsageBatch]:
    """Charge up to 1000 events, each by itself: one that is refused stops no other, and raises nothing."""
    body = {"events": [_event(event) for event in events]}
    return change("POST", "usage/batch", _batch, body, key=idempotency_key)


def usage(
    group_by: str | Iterable[str] = "day",
    *,
    start: datetime | date | None = None,
    end: datetime | date | None = None,
    customer: str | None = None,
    metric: str | None = None,
    page_size: int = PAGE_SIZE,
) -> Pages[UsageSum]:
    """What was charged, summed up by up to three of `day`, `metric`, `customer`, `model`, `action`, `app` and one
    `metadata.KEY`; for 30 days up to now, unless you say otherwise. *end* is the first moment that does not count."""
    query = {
        "group_by": group_by if isinstance(group_by, str) else ",".join(group_by),
        "from": None if start is None else _time(start, name="start"),
        "to": None if end is None else _time(end, name="end"),
        "customer_id": customer,
        "billable_metric_key": metric,
    }
    return listed("usage", UsageSum, query, page_size=page_size)


# Reservations.


def reserve(
    customer: str,
    metric: str | None = None,
    units: Amount | None = None,
    *,
    credits: Amount | None = None,
    millicredits: int | None = None,
    ttl_seconds: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[ReservationState]:
    """Hold credits for a task to come: so many units of a metric, or an amount.

    Use it with `with`: a task that ends without a commit, or with an exception, is released.
    """
    body = {
        "customer_id": customer,
        "billable_metric_key": metric,
        "estimated_units": None if units is None else text(units, name="units"),
        "credits": one_of(credits, millicredits),
        "ttl_seconds": ttl_seconds,
        "metadata": metadata,
    }
    return change("POST", "reservations", reader(ReservationState), body, key=idempotency_key)


def get_reservation(reservation_id: str) -> Call[ReservationState]:
    """A reservation as it is now."""
    return get(_reservation(reservation_id), ReservationState)


def commit(
    reservation_id: str,
    units: Amount | None = None,
    *,
    credits: Amount | None = None,
    millicredits: int | None = None,
    final: bool = True,
    idempotency_key: str | None = None,
) -> Call[Settled]:
    """Charge what the work came to, and free the rest; with `final=False` charge a part, and keep the rest held."""
    body = {
        "units": None if units is None else text(units, name="units"),
        "credits": one_of(credits, millicredits),
        "final": final,
    }
    return change("POST", f"{_reservation(reservation_id)}/commit", reader(Settled), body, key=idempotency_key)


def release(reservation_id: str, *, idempotency_key: str | None = None) -> Call[Settled]:
    """Give everything back that is held. What partial commits charged stays charged."""
    return change("POST", f"{_reservation(reservation_id)}/release", reader(Settled), key=idempotency_key)


def extend(
    reservation_id: str,
    *,
    ttl_seconds: int | None = None,
    units: Amount | None = None,
    credits: Amount | None = None,
    millicredits: int | None = None,
    idempotency_key: str | None = None,
) -> Call[Extended]:
    """Hold it for longer (from now on), or hold more, all of it or nothing."""
    body = {
        "ttl_seconds": ttl_seconds,
        "units": None if units is None else text(units, name="units"),
        "credits": one_of(credits, millicredits),
    }
    return change("POST", f"{_reservation(reservation_id)}/extend", reader(Extended), body, key=idempotency_key)


# Events.


def events(*, type: str | None = None, customer: str | None = None, page_size: int = PAGE_SIZE) -> Pages[Event]:
    """What happened in the last 30 days, newest first."""
    return listed("events", Event, {"type": type, "customer_id": customer}, page_size=page_size)


def get_event(event_id: str) -> Call[Event]:
    """One event."""
    return get(f"events/{segment(event_id)}", Event)


def redeliver_event(
    event_id: str, *, endpoint: str | None = None, idempotency_key: str | None = None
) -> Call[tuple[str, ...]]:
    """Deliver an event again. Returns the endpoints that get it."""
    path, body = f"events/{segment(event_id)}/redeliver", {"endpoint": endpoint}
    return change("POST", path, lambda answer: tuple(answer["endpoints"]), body, key=idempotency_key)


# Parts of calls.


def segment(name: str) -> str:
    """*name* as one part of a path.

    Raises:
        ValueError: for no name at all, which would be another path.
    """
    if not name or name in (".", ".."):
        raise ValueError(f"{name!r} names nothing")
    return quote(name, safe="")


def customer_path(customer: str) -> str:
    return f"customers/{segment(customer)}"


def _reservation(reservation_id: str) -> str:
    return f"reservations/{segment(reservation_id)}"


def _needed(millicredits: int | None) -> int:
    if millicredits is None:
        raise ValueError("give the amount: credits or millicredits")
    return millicredits


def _time(at: datetime | date, *, name: str) -> str:
    if isinstance(at, datetime) and at.tzinfo is None:
        raise ValueError(f"{name} must have a time zone: datetime(…, tzinfo=UTC)")
    return at.isoformat()


def _event(event: UsageEvent) -> dict[str, Any]:
    body: dict[str, Any] = {
        "customer_id": event.customer,
        "billable_metric_key": event.metric,
        "units": text(event.units, name="units"),
        "metadata": dict(event.metadata),
    }
    return body if event.idempotency_key is None else {**body, "idempotency_key": event.idempotency_key}


def _batch(answer: Any) -> UsageBatch:
    read = reader(Usage)
    return UsageBatch(
        tuple(
            read(each) if each["status"] == BATCH_ACCEPTED else refusal(None, each["error"]) for each in answer["data"]
        )
    )


def _only(customer: str, answer: Any) -> Customer:
    if not answer["data"]:
        raise refusal(404, {"message": f"There is no customer {customer}.", "code": "not_found"})
    (found,) = answer["data"]
    return reader(Customer)(found)


def _nothing(_: Any) -> None:
    return None
