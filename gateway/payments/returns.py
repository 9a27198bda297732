"""A customer is back from the processor's page: what has become of their order, also where its event is late."""

import msgspec

from gateway.payments.observed import facts_of
from gateway.payments.orders import Order, Orders
from gateway.payments.settling import Settler
from gateway.payments.stripe_api import StripeAPI


class Returned(msgspec.Struct, frozen=True):
    """*customer_has_yet_to_pay* on the processor's page, which is still open."""

    order: Order
    customer_has_yet_to_pay: bool = False


class Returns:
    """Asks the processor, and lets the news have the effect that its event would have."""

    def __init__(self, *, orders: Orders, stripe: StripeAPI, settler: Settler) -> None:
        self._orders = orders
        self._stripe = stripe
        self._settler = settler

    async def look(self, order: Order) -> Returned:
        """*order* as it is now. Repeatable, and harmless beside the event itself.

        Raises:
            ProcessorUnavailable, ProcessorRefused
            DatabaseUnavailable, LedgerUnavailable
        """
        if order.status == "paid" or order.session_id is None:
            return Returned(order)
        session = await self._stripe.session(order.session_id)
        observed = facts_of(session)
        if observed is not None:
            await self._settler.observe(observed)
        now = await self._orders.find(order.scope, order.id)
        return Returned(order if now is None else now, customer_has_yet_to_pay=session.get("status") == "open")
