"""What becomes of orders, as automatic top-ups take it: failures in a row make the pauses longer, a payment ends them.

A failure is counted in the transaction that ends its order, which ends once; so it is counted once, whoever brings it.

What goes back to a customer makes their balance sink. To buy the same again would take from them what they have just
got back. So a reversal stops automatic top-ups, before the wallet has it, until the customer acts; and a dispute does
until it is closed, whoever acts. An automatic payment that was on its way meanwhile is nothing that they have done.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.clock import time_text_or_none
from gateway.database import Database, of
from gateway.payments.auto_top_up_terms import DISPUTED, REVERSED, next_attempt_us, reversal_of, stopped
from gateway.payments.facts import Target
from gateway.payments.links import Links
from gateway.payments.orders import Order
from gateway.payments.top_up_turns import forgive, row_of, stop
from gateway.tables import PaymentCustomer


class TopUpFailures:
    """Counts the failures of automatic orders, and says what follows from one."""

    def __init__(self, database: Database, links: Links, *, now_us: Callable[[], int]) -> None:
        self._database = database
        self._links = links
        self._now_us = now_us

    async def changed(self, connection: AsyncConnection, order: Order, goal: Target) -> None:
        """*order* has ended, or what paid it is kept for later: to be called in the transaction of that."""
        before, last_failure = await _failures(connection, order)
        if goal.at_stake or (order.kind == "auto" and stopped(before, last_failure)):
            return
        if order.status == "paid":
            await forgive(connection, order.scope, order.customer_id, now_us=self._now_us())
        elif order.kind == "auto" and order.status == "failed":
            failures = before + 1
            again_us = next_attempt_us(order.id, failures, order.failure, self._now_us())
            counted = {"failures": failures, "last_failure": order.failure, "not_before_us": again_us}
            await connection.execute(row_of(order.scope, order.customer_id).values(**counted))

    async def reversing(self, order: Order, goal: Target) -> None:
        """Money of *order* goes back, is disputed, or is there again: before the wallet has that. Repeatable."""
        scope, customer_id = order.scope, order.customer_id
        async with self._database.write(of(*scope)) as connection:
            failures, last_failure = await _failures(connection, order)
            disputed = f"{DISPUTED}:{order.id}"
            if failures and reversal_of(last_failure) == DISPUTED and last_failure != disputed:
                return  # Another order's, which holds until that is closed.
            if not goal.at_stake and last_failure != disputed:
                return
            failure = disputed if goal.frozen else f"{REVERSED}:{order.id}"
            if failure != last_failure:
                await stop(connection, scope, customer_id, failure=failure, now_us=self._now_us())

    async def told(self, order: Order, failure: str) -> Mapping[str, Any]:
        """What `topup.failed` says of *order*, which is about to fail, beside its terms and why."""
        url = self._links.url_of(order.scope, order.customer_id, package=order.package)
        if order.kind != "auto":
            return {"top_up_url": url}
        async with self._database.read(of(*order.scope)) as connection:
            before, last_failure = await _failures(connection, order)
        failures = before + 1
        again_us = None
        if not stopped(before, last_failure):
            again_us = next_attempt_us(order.id, failures, failure, self._now_us())
        return {"attempt": failures, "next_attempt_at": time_text_or_none(again_us), "top_up_url": url}


async def _failures(connection: AsyncConnection, order: Order) -> tuple[int, str | None]:
    """How many there were in a row, and the last; nobody counts another meanwhile in the same transaction."""
    query = select(col(PaymentCustomer.failures), col(PaymentCustomer.last_failure)).where(
        col(PaymentCustomer.tenant) == order.tenant,
        col(PaymentCustomer.mode) == order.mode,
        col(PaymentCustomer.customer_id) == order.customer_id,
    )
    row = (await connection.execute(query)).one_or_none()
    return (0, None) if row is None else (row.failures, row.last_failure)
