"""Whose wallet is to be looked at, when, and by whom: the turns of automatic top-ups.

How it works. A customer's row in `payment_customers` says when they are to be looked at. Whoever has news of them sets
that to now; who looks sets it ahead by a lease, so that nobody else does meanwhile, and in the end to when to look
again. News that comes meanwhile changes it, too, so that the end, which is conditional, does not cover them up. After a
failure it is when to try again, and news do not hasten that. So it is all in one row: who dies loses nothing, because
the lease runs out.
"""

from typing import Any, Final

import msgspec
from sqlalchemy import Update, case, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.database import NOBODY, insert_new, of
from gateway.payments.auto_top_up_terms import SECOND_US, next_attempt_us
from gateway.records import Records
from gateway.tables import PaymentCustomer
from ledger.model import Scope

LEASE_S: Final = 120
"""Longer than a look with all that it asks of the processor. What a process had when it died waits so long."""

_mark: Final = col(PaymentCustomer.not_before_us)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A customer whom we look at now, and how it went with them before. *until_us* is the lease, and names the turn."""

    scope: Scope
    customer_id: str
    until_us: int
    processor_id: str | None
    payment_method: str | None
    failures: int
    last_failure: str | None


class Turns(Records):
    """The turns of all tenants' customers."""

    async def news(self, scope: Scope, customer_id: str, *, forgiven: bool = False) -> None:
        """Have the customer looked at soon; with *forgiven* as if nothing had ever failed."""
        async with self._transactions.write(of(*scope)) as connection:
            row = {"tenant": scope.tenant, "mode": scope.mode, "customer_id": customer_id}
            more = {"failures": 0, "not_before_us": None, "created_at_us": self._now_us()}
            await connection.execute(insert_new(PaymentCustomer, connection.dialect.name), row | more)
            if forgiven:
                await forgive(connection, scope, customer_id, now_us=self._now_us())
            else:
                await connection.execute(_update(scope, customer_id).values(not_before_us=_sooner(self._now_us())))

    async def due(self, *, page: int) -> list[tuple[Scope, str]]:
        """Customers who are to be looked at by now, of all tenants: candidates."""
        values = {"now_us": self._now_us(), "page": page}
        async with self._database.read(NOBODY) as connection:
            query = _DUE_POSTGRESQL if connection.dialect.name == "postgresql" else _DUE_SQLITE
            return [(Scope(row.tenant, row.mode), row.customer_id) for row in await connection.execute(query, values)]

    async def take(self, scope: Scope, customer_id: str) -> Turn | None:
        """Begin a turn; None where the customer need not be looked at yet, or another is at it."""
        now_us = self._now_us()
        until_us = now_us + LEASE_S * SECOND_US
        async with self._transactions.write(of(*scope)) as connection:
            taken = _update(scope, customer_id).where(_mark <= now_us).values(not_before_us=until_us)
            if not (await connection.execute(taken)).rowcount:
                return None
            names = ("processor_id", "payment_method", "failures", "last_failure")
            query = select(*(getattr(PaymentCustomer, name) for name in names)).where(*_is(scope, customer_id))
            row = (await connection.execute(query)).one()
        return Turn(scope=scope, customer_id=customer_id, until_us=until_us, **row._mapping)

    async def holds(self, turn: Turn) -> bool:
        """Whether there are no news since the turn began. The row is locked to the end of the transaction."""
        async with self._transactions.write(of(*turn.scope)) as connection:
            return await lock(connection, turn.scope, turn.customer_id) == turn.until_us

    async def end(self, turn: Turn, look_at_us: int | None) -> bool:
        """Look again at *look_at_us*, if ever; False where there are news, and another turn is due for these."""
        async with self._transactions.write(of(*turn.scope)) as connection:
            ended = _update(turn.scope, turn.customer_id).where(_mark == turn.until_us)
            return bool((await connection.execute(ended.values(not_before_us=look_at_us))).rowcount)


async def lock(connection: AsyncConnection, scope: Scope, customer_id: str) -> int | None:
    """Let nobody else look at the customer, or end an order of theirs, before the transaction does: the mark.

    Who makes or ends orders takes this lock first, so that two who do wait for each other in no ring.
    """
    query = select(_mark).where(*_is(scope, customer_id)).with_for_update()
    at_us: int | None = (await connection.execute(query)).scalar_one_or_none()
    return at_us


async def forgive(connection: AsyncConnection, scope: Scope, customer_id: str, *, now_us: int) -> None:
    """The customer has paid, or changed something: nothing that failed before counts, and they are looked at."""
    await connection.execute(
        _update(scope, customer_id).values(failures=0, last_failure=None, not_before_us=_sooner(now_us, always=True))
    )


async def count_failure(
    connection: AsyncConnection, scope: Scope, customer_id: str, *, order_id: str, failure: str | None, now_us: int
) -> None:
    """An automatic order has failed: to be called once for each, in the transaction that ends it."""
    query = select(col(PaymentCustomer.failures)).where(*_is(scope, customer_id))
    before = (await connection.execute(query)).scalar_one_or_none()
    if before is None:
        return
    failures = before + 1
    again_us = next_attempt_us(order_id, failures, failure, now_us)
    await connection.execute(
        _update(scope, customer_id).values(failures=failures, last_failure=failure, not_before_us=again_us)
    )


_DUE_POSTGRESQL: Final = text("SELECT tenant, mode, customer_id FROM farebox_due_top_ups(:now_us, :page)")
_DUE_SQLITE: Final = text(
    "SELECT tenant, mode, customer_id FROM payment_customers WHERE not_before_us <= :now_us "
    "ORDER BY not_before_us LIMIT :page"
)


def _sooner(now_us: int, *, always: bool = False) -> Any:
    """Now; or in a pause after a failure, when it ends. Never what it was before, so that a turn notices."""
    later = _mark + 1
    if always:
        return case((_mark == now_us, later), else_=now_us)
    return case(((_mark > now_us) & (col(PaymentCustomer.failures) > 0), later), (_mark == now_us, later), else_=now_us)


def _is(scope: Scope, customer_id: str) -> tuple[Any, ...]:
    return (
        col(PaymentCustomer.tenant) == scope.tenant,
        col(PaymentCustomer.mode) == scope.mode,
        col(PaymentCustomer.customer_id) == customer_id,
    )


def _update(scope: Scope, customer_id: str) -> Update:
    return update(PaymentCustomer).where(*_is(scope, customer_id))
