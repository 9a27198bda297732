"""Orders of which nothing was heard: after the life of their page the processor is asked what became of them.

With automatic orders their customers' turns go on, as ever; those of who was erased meanwhile have no other turn.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import text

from gateway.database import NOBODY, Database, DatabaseUnavailable
from gateway.payments.observed import facts_of
from gateway.payments.orders import Order, Orders
from gateway.payments.processor import ProcessorNotFound, ProcessorRefused, ProcessorUnavailable
from gateway.payments.settling import Settler
from gateway.payments.sweeps import Sweep, every, forgetful
from ledger.errors import LedgerUnavailable
from ledger.model import Scope

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI

PAGE_LIFE_S: Final = 25 * 3600
"""Longer than any page on which an order is paid can be open."""

PAGE: Final = 200
PAGES_MAX: Final = 50
"""One round asks after so many pages of orders, the oldest first; nearly always it is one."""

PAUSE_S: Final = 900
SECOND_US: Final = 1_000_000

UNPAID: Final = "complete"
"""Of a session that was sent off and not paid: a bank is still at it, which may take weeks."""

UNPAID_LIFE_S: Final = 60 * 24 * 3600
"""No bank takes longer. So what stays unpaid is not asked after for ever, in the place of younger orders."""

log = structlog.get_logger(__name__)

_DENIED: Final = frozenset({401, 403})
"""How Stripe refuses a key, whatever is asked."""

_OPEN_POSTGRESQL: Final = text("SELECT tenant, mode, id FROM farebox_open_orders(:after_us, :after, :before_us, :page)")
_OPEN_SQLITE: Final = text(
    "SELECT tenant, mode, id FROM payment_orders WHERE status = 'open' AND created_at_us < :before_us "
    "AND (created_at_us, id) > (:after_us, :after) ORDER BY created_at_us, id LIMIT :page"
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
        stripe: "StripeAPI",
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
        """Ask after all of them; how many have ended.

        Raises:
            DatabaseUnavailable, LedgerUnavailable, ProcessorUnavailable: the next round goes on.
        """
        ended, after_us, after = 0, 0, ""
        before_us = self._now_us() - PAGE_LIFE_S * SECOND_US
        for _ in range(PAGES_MAX):
            page = await self._page(before_us=before_us, after_us=after_us, after=after)
            for order in page:
                ended += await self._ended(order)
            if len(page) < PAGE:
                break
            after_us, after = page[-1].created_at_us, page[-1].id
        return ended

    async def _page(self, *, before_us: int, after_us: int, after: str) -> list[Order]:
        """Orders made before *before_us*, from the one that came just after *after*, made at *after_us*."""
        values = {"before_us": before_us, "after_us": after_us, "after": after, "page": PAGE}
        async with self._database.read(NOBODY) as connection:
            query = _OPEN_POSTGRESQL if connection.dialect.name == "postgresql" else _OPEN_SQLITE
            names = [(Scope(row.tenant, row.mode), row.id) for row in await connection.execute(query, values)]
        found = [await self._orders.find(scope, order_id) for scope, order_id in names]
        return [order for order in found if order is not None]

    async def _ended(self, order: Order) -> bool:
        """Ask after one; whether it has ended. One that cannot be asked after holds up no other."""
        try:
            if order.kind == "auto":
                await self._go_on(order.scope, order.customer_id)
            else:
                await self._ask_after(order)
            after = await self._orders.find(order.scope, order.id)
        except (DatabaseUnavailable, LedgerUnavailable, ProcessorUnavailable):
            raise
        except Exception:
            log.exception("an order cannot be asked after", order=order.id)
            return False
        return after is not None and after.status != "open"

    async def _ask_after(self, order: Order) -> None:
        """Let what became of *order*, which may have ended meanwhile, have its effect."""
        if order.session_id is not None:
            try:
                session = await self._stripe.session(order.session_id)
            except ProcessorNotFound:
                pass
            except ProcessorRefused as refused:
                if refused.status in _DENIED:
                    raise ProcessorUnavailable(str(refused)) from refused
                raise
            else:
                if (observed := facts_of(session)) is not None:
                    await self._settler.observe(observed)
                if session.get("status") == UNPAID and order.created_at_us > self._now_us() - UNPAID_LIFE_S * SECOND_US:
                    return
        # Nothing can be paid for it any more. If something was, the news of it credit it all the same.
        await self._orders.ended(order, "expired")
