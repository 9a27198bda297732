"""Everything that can happen to a payment, as Stripe tells it, and a plain account of what that comes to.

A history is what happened, in the order in which it happened; a delivery is the order in which it was told.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from gateway.payments.orders import Order
from pricing.money import CREDIT
from tests.servers.stripe import only
from tests.servers.stripe_account import StripeAccount

PRICE: Final = 1000
PART: Final = 300
CREDITED: Final = 1_000_000_007
"""Not a multiple of the price, so that rounding shows."""

LENGTH_MAX: Final = 6

Step = str
History = tuple[Step, ...]
Event = dict[str, Any]


@dataclass(frozen=True)
class Payment:
    """A payment as somebody sees it who is told everything in order, once: the plain model.

    It also says what may happen next. *bank* is how a slow method does, *dispute* None, `open`, `won` or `lost`.
    """

    bank: str | None = None
    credited: bool = False
    failed: bool = False
    told_by_intent: bool = False
    refunded: int = 0
    dispute: str | None = None
    updated: bool = False
    withdrawn: bool = False
    reinstated: bool = False
    partly: bool = False

    @property
    def taken(self) -> int:
        """In cents. A dispute is of the whole price, and of a lost one what was refunded before may come back."""
        gone = self.withdrawn and not self.reinstated and self.dispute != "won"
        return PRICE if gone else self.refunded

    @property
    def frozen(self) -> bool:
        return self.dispute == "open"

    def next(self) -> Iterator[tuple[Step, "Payment"]]:
        """What may happen next, and what it makes of the payment."""
        if not self.credited and self.bank is None:
            yield "completed", replace(self, bank="no", credited=True)
            yield "completed-unpaid", replace(self, bank="pending")
        elif self.bank == "pending" and not self.failed:
            yield "async-succeeded", replace(self, bank="arrived", credited=True)
            yield "async-failed", replace(self, failed=True)
        if not self.credited:
            return
        if not self.told_by_intent:
            yield "intent-succeeded", replace(self, told_by_intent=True)
        if self.dispute in (None, "won") and self.refunded < PRICE:
            if self.refunded + PART < PRICE:
                yield "refund-part", replace(self, refunded=self.refunded + PART)
            yield "refund-rest", replace(self, refunded=PRICE)
        if self.dispute is None:
            yield "dispute-created", replace(self, dispute="open")
        if self.dispute == "open":
            if not self.updated:
                yield "dispute-updated", replace(self, updated=True)
            if not self.withdrawn:
                yield "dispute-withdrawn", replace(self, withdrawn=True)
            yield "dispute-won", replace(self, dispute="won")
            if self.withdrawn and not self.reinstated:
                yield "dispute-lost", replace(self, dispute="lost")
        if self.withdrawn and not self.reinstated and self.dispute in ("open", "won"):
            # What was withdrawn is given back before or after the dispute is closed, to who wins it.
            yield "dispute-reinstated", replace(self, reinstated=True)
        if self.dispute == "lost" and self.refunded and not self.partly:
            # The Dashboard calls it «partially won»: https://support.stripe.com/questions/\
            # dispute-for-full-charge-amount-after-a-partial-refund-was-issued
            yield "dispute-partly-reinstated", replace(self, partly=True)


def histories() -> Iterator[tuple[History, Payment]]:
    """All of up to LENGTH_MAX steps, and what each comes to."""
    waiting: list[tuple[History, Payment]] = [((), Payment())]
    while waiting:
        history, payment = waiting.pop()
        if history:
            yield history, payment
        if len(history) < LENGTH_MAX:
            waiting += [((*history, step), after) for step, after in payment.next()]


class Told:
    """A Stripe account in which a history happens: the event that each step is told by, in full shape."""

    def __init__(self, account: StripeAccount, session_id: str) -> None:
        self._account = account
        self._session_id = session_id
        self._intent: Event | None = None

    def tell(self, step: Step) -> Event:
        return self._TOLD[step](self)

    def all(self, history: History) -> list[Event]:
        return [self.tell(step) for step in history]

    @property
    def payment_intent(self) -> str:
        return self._account.payment_of(self._session_id)

    @property
    def _dispute(self) -> str:
        dispute: str = self._account.all("dispute", payment_intent=self.payment_intent)[0]["id"]
        return dispute

    def _completed(self) -> Event:
        return self._with_intent(self._account.pay(self._session_id), "checkout.session.completed")

    def _completed_unpaid(self) -> Event:
        return only(self._account.pay_later(self._session_id), "checkout.session.completed")

    def _async_succeeded(self) -> Event:
        return self._with_intent(self._account.arrive(self.payment_intent), "checkout.session.async_payment_succeeded")

    def _async_failed(self) -> Event:
        return only(self._account.bounce(self.payment_intent), "checkout.session.async_payment_failed")

    def _with_intent(self, events: list[Event], type: str) -> Event:
        self._intent = only(events, "payment_intent.succeeded")
        return only(events, type)

    def _intent_succeeded(self) -> Event:
        assert self._intent is not None
        return self._intent

    def _reinstate_refunded(self) -> Event:
        (charge,) = self._account.all("charge", payment_intent=self.payment_intent)
        return self._account.reinstate(self._dispute, charge["amount_refunded"])[0]

    def _refund(self, amount: int | None) -> Event:
        return only(self._account.refund(self.payment_intent, amount), "charge.refunded")

    _TOLD: Final[dict[Step, Callable[["Told"], Event]]] = {
        "completed": _completed,
        "completed-unpaid": _completed_unpaid,
        "async-succeeded": _async_succeeded,
        "async-failed": _async_failed,
        "intent-succeeded": _intent_succeeded,
        "refund-part": lambda told: told._refund(PART),
        "refund-rest": lambda told: told._refund(None),
        "dispute-created": lambda told: told._account.dispute(told.payment_intent)[0],
        "dispute-updated": lambda told: told._account.update_dispute(told._dispute)[0],
        "dispute-withdrawn": lambda told: told._account.withdraw(told._dispute)[0],
        "dispute-reinstated": lambda told: told._account.reinstate(told._dispute)[0],
        "dispute-partly-reinstated": lambda told: told._reinstate_refunded(),
        "dispute-won": lambda told: told._account.close_dispute(told._dispute, "won")[0],
        "dispute-lost": lambda told: told._account.close_dispute(told._dispute, "lost")[0],
    }


def order(**fields: Any) -> Order:
    """An order of PRICE cents."""
    terms: dict[str, Any] = {
        "tenant": "ten_1",
        "mode": "live",
        "id": "ord_1",
        "kind": "checkout",
        "status": "open",
        "customer_id": "cus_1",
        "package": "usd-10",
        "price_minor": PRICE,
        "currency": "usd",
        "asset": CREDIT.code,
        "credited": CREDITED,
        "bonus": 0,
        "spread": 0,
        "created_at_us": 0,
    }
    return Order(**{**terms, **fields})


def session_for(account: StripeAccount, ordered: Order) -> str:
    """A Checkout Session for the order, made as the gateway makes it; its id."""
    metadata = {"farebox_order": ordered.id, "farebox_tenant": ordered.tenant, "farebox_mode": ordered.mode}
    price = {"currency": ordered.currency, "unit_amount": ordered.price_minor, "product_data": {"name": "Credits"}}
    made = account.create_session(
        {
            "line_items": {"0": {"price_data": price, "quantity": 1}},
            "metadata": metadata,
            "payment_intent_data": {"metadata": metadata},
            "success_url": "https://example.com/paid",
        },
        base_url="https://checkout.example.com",
    )
    session_id: str = made["id"]
    return session_id


@cache
def deliveries(events: int) -> tuple[tuple[int, ...], ...]:
    """Every order in which that many events can be told, each once or more, LENGTH_MAX together at most."""
    found: list[tuple[int, ...]] = []

    def go_on(told: tuple[int, ...], missing: frozenset[int]) -> None:
        if not missing:
            found.append(told)
        if len(told) + max(len(missing), 1) > LENGTH_MAX:
            return
        for each in range(events):
            go_on((*told, each), missing - {each})

    go_on((), frozenset(range(events)))
    return tuple(found)
