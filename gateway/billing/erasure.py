"""Forgetting a person: their name, their metadata, what was asked and answered. The journal keeps numbers.

How it works. First nobody finds the customer any more, and what the gateway's own tables say of them is gone. Then
their metadata leaves the sums of usage, the ledger erases what its rows say, and whoever takes payments forgets them.
Last their name is given back: whoever comes with it next is somebody new. Until then the row has the name, so that an
erasure that was cut short is found by it, and done again from the beginning.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import String, cast, delete, select, update
from sqlmodel import col

from gateway import errors
from gateway.billing.usage_erasure import erase_metadata
from gateway.database import Database, of
from gateway.identity.customer_rows import CUSTOMER_PREFIX
from gateway.identity.wallets import customer_wallet
from gateway.tables import Budget, Customer, KeptAnswer, PaymentOrder
from ledger.ledger import Ledger
from ledger.model import Scope


class Erasure:
    """Erases customers.

    Args:
        announce: tells all processes to look names up anew.
        forget_customer: makes whoever takes payments forget a customer, by our id; None where nobody does. Repeatable.
    """

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        *,
        now_us: Callable[[], int],
        announce: Callable[[], None],
        forget_customer: Callable[[Scope, str], Awaitable[None]] | None = None,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._now_us = now_us
        self._announce = announce
        self._forget_customer = forget_customer

    async def erase(self, tenant_id: str, mode: str, reference: str) -> None:
        """Forget the customer whom *reference* names, by our id or the tenant's. What is left of credits is frozen.

        Raises:
            ApiError: 404, also when it was done before.
            DatabaseUnavailable, LedgerUnavailable, or of whoever takes payments: some of it may still be there; do
                it again.
        """
        customer_id = await self._hide(tenant_id, mode, reference)
        self._announce()
        await erase_metadata(self._database, Scope(tenant_id, mode), customer_id)
        await self._ledger.erase(customer_wallet(tenant_id, mode, customer_id), customer_id=customer_id)
        if self._forget_customer is not None:
            await self._forget_customer(Scope(tenant_id, mode), customer_id)
        async with self._database.write(of(tenant_id, mode)) as connection:
            done = update(Customer).where(
                col(Customer.tenant) == tenant_id, col(Customer.mode) == mode, col(Customer.id) == customer_id
            )
            await connection.execute(done.values(external_id=customer_id))

    async def _hide(self, tenant_id: str, mode: str, reference: str) -> str:
        """Our id of the customer, whom nobody finds from now on."""
        if "\x00" in reference:  # PostgreSQL looks for no such text.
            raise errors.not_found("this customer")
        theirs = (col(Customer.tenant) == tenant_id, col(Customer.mode) == mode)
        by_id = reference.startswith(CUSTOMER_PREFIX)
        named = col(Customer.id) == reference if by_id else col(Customer.external_id) == reference
        async with self._database.write(of(tenant_id, mode)) as connection:
            unfinished = col(Customer.external_id) != col(Customer.id)
            query = select(col(Customer.id)).where(*theirs, named, unfinished).with_for_update()
            customer_id: str | None = (await connection.execute(query)).scalar_one_or_none()
            if customer_id is None:
                raise errors.not_found(f"customer {reference}")
            table = Customer.__table__  # type: ignore[attr-defined]
            hidden: dict[str, Any] = {"metadata": {}, "settings": {}, "welcome": None, "erased_at_us": self._now_us()}
            values = {table.c[column]: value for column, value in hidden.items()}
            await connection.execute(update(table).where(*theirs, table.c.id == customer_id).values(values))
            # A budget has a name of the tenant's, and nobody to bound any more.
            budgets = update(Budget).where(
                col(Budget.tenant) == tenant_id,
                col(Budget.mode) == mode,
                col(Budget.subject_type) == "customer",
                col(Budget.subject_id) == customer_id,
            )
            await connection.execute(budgets.values(name="", archived=True, version=col(Budget.version) + 1))
            # Where an app wanted them to go after paying may say who they are.
            orders = update(PaymentOrder).where(
                col(PaymentOrder.tenant) == tenant_id,
                col(PaymentOrder.mode) == mode,
                col(PaymentOrder.customer_id) == customer_id,
            )
            await connection.execute(orders.values(success_url=None, cancel_url=None))
            # Answers that tell of somebody name them by our id. Whoever keeps one has the customer's row first.
            kept = cast(col(KeptAnswer.answer), String).contains(customer_id, autoescape=True)
            await connection.execute(
                delete(KeptAnswer).where(col(KeptAnswer.tenant) == tenant_id, col(KeptAnswer.mode) == mode, kept)
            )
        return customer_id
