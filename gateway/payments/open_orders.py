"""Orders of which nothing was heard: after the life of their page the processor is asked what became of them.

With automatic orders their customers' turns go on, as ever; those of who was erased meanwhile have no other turn.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from sqlalchemy import text

from gateway.database import NOBODY, Database, DatabaseUnavailable
from gateway.payments.observed import facts_of
from gateway.payments.orders import Order, Orders
from gateway.payments.settling import Settler
from gateway.payments.stripe_api import ProcessorNotFound, ProcessorRefused, ProcessorUnavailable, StripeAPI
from gateway.payments.sweeps import Sweep, every, forgetful
from ledger.errors import LedgerUnavailable
from ledger.model import Scope

PAGE_LIFE_S: Final = 25 * 3600
"""Longer than any page on which an order is paid can be open."""

PAGE: Final = 200
"""Orders that one round asks after, the oldest first."""

PAUSE_S: Final = 900
SECOND_US: Final = 1_000_000

UNPAID: Final = "complete"
"""Of a session that was sent off and not paid: a bank is still at it, which may take weeks."""

UNPAID_LIFE_S: Final = 60 * 24 * 3600
"""No bank takes longer. So what stays unpaid is not asked after for ever, in the place of younger orders."""

log = structlog.get_logger(__name__)

_OPEN_POSTGRESQL: Final = text("SELECT tenant, mode, id FROM farebox_open_orders(:before_us, :page)")
_OPEN_SQLITE: Final = text(
    "SELECT tenant, mode, id FROM payment_orders WHERE status = 'open' AND created_at_us < :before_us "
    "ORDER BY created_at_us LIMIT :page"
)


class OpenOrders:
    """Ends orders that should have ended, in one process at a time.

    Args:
        go_on: with a customer's automatic order.
    """

    def __init__(
        self,
        database: Database,
        *,
        orders: Orders,
        stripe: StripeAPI,
        settler: Settler,
        go_on: Callable[[Scope, str], Awaitable[None]],
        now_us: Callable[[], int],
    ) -> None:
        self._database = database
        self._orders = orders
        self._stripe = stripe
        self._settler = settler
        self._go_on = go_on
        self._now_us = now_us
        self.sweep = Sweep(name="open orders", schedule=every(PAUSE_S), work=forgetful(self.round))

    async def round(self) -> int:
        """Ask after a page of orders; how many have ended.

        Raises:
            DatabaseUnavailable, LedgerUnavailable, ProcessorUnavailable: the next round goes on.
        """
        values = {"before_us": self._now_us() - PAGE_LIFE_S * SECOND_US, "page": PAGE}
        async with self._database.read(NOBODY) as connection:
            query = _OPEN_POSTGRESQL if connection.dialect.name == "postgresql" else _OPEN_SQLITE
            found = [(Scope(row.tenant, row.mode), row.id) for row in await connection.execute(query, values)]
        ended = 0
        for scope, order_id in found:
            order = await self._orders.find(scope, order_id)
            if order is None or order.status != "open":
                continue
            try:
                if order.kind == "auto":
                    await self._go_on(scope, order.customer_id)
                else:
                    await self._ask_after(order)
                after = await self._orders.find(scope, order_id)
                ended += after is not None and after.status != "open"
            except (DatabaseUnavailable, LedgerUnavailable, ProcessorUnavailable):
                raise
            except Exception:
                log.exception("an order cannot be asked after", order=order.id)  # The others can.
        return ended

    async def _ask_after(self, order: Order) -> None:
        """Let what became of *order* have its effect."""
        if order.session_id is not None:
            try:
                session = await self._stripe.session(order.session_id)
            except ProcessorNotFound:
                pass
            except ProcessorRefused as refused:
                raise ProcessorUnavailable(str(refused)) from refused
            else:
                if (observed := facts_of(session)) is not None:
                    await self._settler.observe(observed)
                if session.get("status") == UNPAID and order.created_at_us > self._now_us() - UNPAID_LIFE_S * SECOND_US:
                    return
        # Nothing can be paid for it any more. If something was, the news of it credit it all the same.
        await self._orders.ended(order, "expired")
