"""A customer is back from the processor's page: what has become of their order, also where its event is late."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gateway.payments.observed import facts_of
from gateway.payments.orders import Order, Orders
from gateway.payments.settling import Settler

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI

Progress = Literal["settled", "to_be_paid", "on_its_way"]
"""How far a payment is: its order says it; the processor's page is still open; it was made and has yet to arrive."""


class Returned(msgspec.Struct, frozen=True):
    order: Order
    progress: Progress


class Returns:
    """Asks the processor, and lets the news have the effect that its event would have."""

    def __init__(self, *, orders: Orders, stripe: "StripeAPI", settler: Settler) -> None:
        self._orders = orders
        self._stripe = stripe
        self._settler = settler

    async def look(self, order: Order) -> Returned:
        """*order* as it is now. Repeatable, and harmless beside the event itself.

        Raises:
            ProcessorUnavailable, ProcessorRefused
            DatabaseUnavailable, LedgerUnavailable
        """
        if order.status == "paid":
            return Returned(order, "settled")
        if order.session_id is None:
            return Returned(order, "to_be_paid" if order.status == "open" else "settled")
        session = await self._stripe.session(order.session_id)
        observed = facts_of(session)
        # A page that is still open has nothing to tell yet.
        if observed is not None and session.get("status") != "open":
            await self._settler.observe(observed)
        now = await self._orders.find(order.scope, order.id)
        assert now is not None, "an order is never deleted"
        return Returned(now, _progress(now, session))


def _progress(order: Order, session: Mapping[str, Any]) -> Progress:
    if order.status != "open":
        return "settled"
    return "to_be_paid" if session.get("status") == "open" else "on_its_way"
