"""A Stripe account's objects, its balance and the events that were made."""

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from tests.servers import stripe_movements as movements
from tests.servers import stripe_objects as objects
from tests.servers.stripe_objects import Object, new_id

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="StripeStore")

Events = list[Object]


class Refused(Exception):
    """An answer of Stripe's that is an error: its status, and its object `error`."""

    def __init__(self, status: int, message: str, *, type: str = "invalid_request_error", **details: Any) -> None:
        super().__init__(message)
        self.status = status
        self.error: Object = {"message": message, "type": type, **details}


def alone(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Nothing else happens to the account meanwhile."""

    @functools.wraps(method)
    def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return wrapped


class StripeStore:
    """*now_s* is Stripe's clock. Attributes: `events`, all that were made, the oldest first."""

    def __init__(self, *, live: bool = False, now_s: Callable[[], int] = lambda: int(time.time())) -> None:
        self.live = live
        self.now_s = now_s
        self.lock = threading.RLock()
        self.events: Events = []
        self._objects: dict[str, Object] = {}
        self._request: Object = {"id": None, "idempotency_key": None}

    @alone
    def get(self, id: str) -> Object:
        """A copy of the object as it is now."""
        return public(self._objects[id])

    @alone
    def all(self, object: str, /, **fields: Any) -> list[Object]:
        """Copies of the objects of that kind with these values, the newest first."""
        return [
            public(each)
            for each in reversed(self._objects.values())
            if each["object"] == object and all(each.get(name) == value for name, value in fields.items())
        ]

    def holds(self, id: str) -> bool:
        return id in self._objects

    @contextlib.contextmanager
    def asked_by(self, idempotency_key: str | None) -> Iterator[None]:
        """What happens inside was asked for by a request: its events say so."""
        with self.lock:
            before, self._request = self._request, {"id": new_id("req_")[:18], "idempotency_key": idempotency_key}
            try:
                yield
            finally:
                self._request = before

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
            public(subject),
            created=self.now_s(),
            livemode=self.live,
            request=dict(self._request),
            previous=previous,
        )
        self.events.append(made)
        return copy.deepcopy(made)

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


_TYPES: Final = {
    "charge": ("charge", "payment"),
    "refund": ("refund", "payment_refund"),
    "refund_failure": ("refund_failure", "payment_failure_refund"),
}
"""Of a movement's category: what it is called for cards, and for all else."""


def public(subject: Object) -> Object:
    """A copy of what Stripe shows: without what it only remembers."""
    return {name: copy.deepcopy(value) for name, value in subject.items() if not name.startswith("_")}
