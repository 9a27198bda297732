"""What becomes of orders, as automatic top-ups take it: failures in a row make the pauses longer, a payment ends them.

A failure is counted in the transaction that ends its order, which ends once; so it is counted once, whoever brings it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.clock import time_text_or_none
from gateway.database import Database, of
from gateway.payments.auto_top_up_terms import next_attempt_us
from gateway.payments.links import Links
from gateway.payments.orders import Order
from gateway.payments.top_up_turns import forgive, row_of
from gateway.tables import PaymentCustomer


class TopUpFailures:
    """Counts the failures of automatic orders, and says what follows from one."""

    def __init__(self, database: Database, links: Links, *, now_us: Callable[[], int]) -> None:
        self._database = database
        self._links = links
        self._now_us = now_us

    async def changed(self, connection: AsyncConnection, order: Order) -> None:
        """*order* has ended, or what paid it is kept for later: to be called in the transaction of that."""
        if order.status == "paid":
            await forgive(connection, order.scope, order.customer_id, now_us=self._now_us())
        elif order.kind == "auto" and order.status == "failed":
            failures = await _failures(connection, order) + 1
            again_us = next_attempt_us(order.id, failures, order.failure, self._now_us())
            counted = {"failures": failures, "last_failure": order.failure, "not_before_us": again_us}
            await connection.execute(row_of(order.scope, order.customer_id).values(**counted))

    async def told(self, order: Order, failure: str) -> Mapping[str, Any]:
        """What `topup.failed` says of *order*, which is about to fail, beside its terms and why."""
        url = self._links.url_of(order.scope, order.customer_id, package=order.package)
        if order.kind != "auto":
            return {"top_up_url": url}
        async with self._database.read(of(*order.scope)) as connection:
            failures = await _failures(connection, order) + 1
        again_us = next_attempt_us(order.id, failures, failure, self._now_us())
        return {"attempt": failures, "next_attempt_at": time_text_or_none(again_us), "top_up_url": url}


async def _failures(connection: AsyncConnection, order: Order) -> int:
    query = select(col(PaymentCustomer.failures)).where(
        col(PaymentCustomer.tenant) == order.tenant,
        col(PaymentCustomer.mode) == order.mode,
        col(PaymentCustomer.customer_id) == order.customer_id,
    )
    return (await connection.execute(query)).scalar_one_or_none() or 0
