"""Our customers as the payment processor knows them: by an id of its own, and by no personal data of ours.

How it works. A customer of the processor is made when somebody is first about to pay. Who ask for the same one at once
get the same one, because they ask with the same idempotency key. Its id is kept only while our customer is not being
erased, so that an erasure finds every id that was kept; what came too late is deleted again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import select, update
from sqlmodel import col

from gateway.database import Database, insert_new, of
from gateway.identity.customer_rows import of_all
from gateway.tables import Customer, PaymentCustomer
from ledger.model import Scope

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI


class CustomerErased(Exception):
    """The customer is being erased, or was: nobody pays for them any more."""


class ProcessorCustomer(msgspec.Struct, frozen=True):
    """The columns of `PaymentCustomer`, which says what they mean."""

    customer_id: str
    processor_id: str | None
    payment_method: str | None
    failures: int
    not_before_us: int | None
    last_failure: str | None
    created_at_us: int


_COLUMNS = tuple(getattr(PaymentCustomer, name) for name in ProcessorCustomer.__struct_fields__)


class ProcessorCustomers:
    def __init__(self, database: Database, stripe: "StripeAPI", *, now_us: Callable[[], int]) -> None:
        self._database = database
        self._stripe = stripe
        self._now_us = now_us

    async def find(self, scope: Scope, customer_id: str) -> ProcessorCustomer | None:
        """What is kept of the customer; None of one who was never about to pay."""
        query = select(*_COLUMNS).where(*_named(scope, customer_id))
        async with self._database.read(of(*scope)) as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else ProcessorCustomer(*row)

    async def processor_id(self, scope: Scope, customer_id: str) -> str:
        """The processor's id of the customer, whom it gets to know now if it did not before.

        Raises:
            CustomerErased, ProcessorUnavailable, ProcessorRefused
        """
        known = await self.find(scope, customer_id)
        if known is not None and known.processor_id is not None:
            return known.processor_id
        return await self._keep(scope, customer_id, await self._stripe.create_customer(scope, customer_id))

    async def replaced(self, scope: Scope, customer_id: str, *, gone: str) -> str:
        """Another id for a customer whose id *gone* the processor does not know, or no more.

        That is so when the operator's key is of another account than before, or somebody deleted the customer there.

        Raises:
            CustomerErased, ProcessorUnavailable, ProcessorRefused
        """
        made = await self._stripe.create_customer(scope, customer_id, instead_of=gone)
        return await self._keep(scope, customer_id, made, instead_of=gone)

    async def erase(self, scope: Scope, customer_id: str) -> None:
        """Let the processor forget the customer, with all cards. Repeatable.

        Raises:
            ProcessorUnavailable, ProcessorRefused: it has not; do it again.
        """
        known = await self.find(scope, customer_id)
        if known is None:
            return
        if known.processor_id is not None:
            await self._stripe.delete_customer(known.processor_id)
        nothing: dict[str, Any] = dict.fromkeys(("processor_id", "payment_method", "not_before_us", "last_failure"))
        async with self._database.write(of(*scope)) as connection:
            await connection.execute(update(PaymentCustomer).where(*_named(scope, customer_id)).values(**nothing))

    async def _keep(self, scope: Scope, customer_id: str, processor_id: str, *, instead_of: str | None = None) -> str:
        """Keep *processor_id* where there is none, or *instead_of*; the one that is there then."""
        kept = col(PaymentCustomer.processor_id)
        new = {
            "tenant": scope.tenant,
            "mode": scope.mode,
            "customer_id": customer_id,
            "failures": 0,
            "created_at_us": self._now_us(),
        }
        async with self._database.write(of(*scope)) as connection:
            # Locked: an erasure comes wholly before or wholly after.
            theirs = select(col(Customer.id)).where(*of_all(*scope), col(Customer.id) == customer_id).with_for_update()
            found = (await connection.execute(theirs)).one_or_none()
            if found is not None:
                await connection.execute(insert_new(PaymentCustomer, connection.dialect.name), new)
                change = update(PaymentCustomer).where(
                    *_named(scope, customer_id), kept.is_not_distinct_from(instead_of)
                )
                # A method of payment belongs to the customer of the processor that it was kept with.
                await connection.execute(change.values(processor_id=processor_id, payment_method=None))
                query = select(kept).where(*_named(scope, customer_id))
                known = (await connection.execute(query)).scalar_one()
                assert known is not None, "an id that was kept is not there"
                return known
        await self._stripe.delete_customer(processor_id)
        raise CustomerErased


def _named(scope: Scope, customer_id: str) -> tuple[Any, ...]:
    return (
        col(PaymentCustomer.tenant) == scope.tenant,
        col(PaymentCustomer.mode) == scope.mode,
        col(PaymentCustomer.customer_id) == customer_id,
    )
