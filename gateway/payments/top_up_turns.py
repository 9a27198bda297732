"""Whose wallet is to be looked at, when, and by whom: the turns of automatic top-ups.

How it works. A customer's row in `payment_customers` says when they are to be looked at. Whoever has news of them sets
that to now; who looks sets it ahead by a lease, so that nobody else does meanwhile, and in the end to when to look
again. News that comes meanwhile changes it, too, so that the end, which is conditional, does not cover them up. After a
failure it is when to try again, and news do not hasten that. So it is all in one row: who dies loses nothing, because
the lease runs out.
"""

from typing import Any, Final

import msgspec
from sqlalchemy import Update, and_, case, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.database import NOBODY, insert_new, of
from gateway.payments.auto_top_up_terms import DISPUTED, SECOND_US
from gateway.records import Records
from gateway.tables import PaymentCustomer
from ledger.model import Scope

LEASE_S: Final = 120
"""Longer than a look with all that it asks of the processor. What a process had when it died waits so long."""

_mark: Final = col(PaymentCustomer.not_before_us)

_DUE_POSTGRESQL: Final = text("SELECT tenant, mode, customer_id FROM farebox_due_top_ups(:now_us, :page)")
_DUE_SQLITE: Final = text(
    "SELECT tenant, mode, customer_id FROM payment_customers WHERE not_before_us <= :now_us "
    "ORDER BY not_before_us LIMIT :page"
)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A customer whom we look at now, and how it went with them before. *until_us* is the lease, and names the turn."""

    scope: Scope
    customer_id: str
    until_us: int
    processor_id: str | None
    payment_method: str | None
    failures: int
    last_failure: str | None

    @property
    def has_method(self) -> bool:
        """Whether there is something to pay with."""
        return self.processor_id is not None and self.payment_method is not None


class Turns(Records):
    """The turns of all tenants' customers."""

    async def news(self, scope: Scope, customer_id: str, *, forgiven: bool = False) -> None:
        """Have the customer looked at soon; with *forgiven* as if nothing had ever failed."""
        now_us = self._now_us()
        async with self._transactions.write(of(*scope)) as connection:
            row = {"tenant": scope.tenant, "mode": scope.mode, "customer_id": customer_id}
            more = {"failures": 0, "not_before_us": None, "created_at_us": now_us}
            await connection.execute(insert_new(PaymentCustomer, connection.dialect.name), row | more)
            if forgiven:
                await forgive(connection, scope, customer_id, now_us=now_us)
            else:
                await connection.execute(row_of(scope, customer_id).values(not_before_us=_not_before_pauses(now_us)))

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
            taken = row_of(scope, customer_id).where(_mark <= now_us).values(not_before_us=until_us)
            if not (await connection.execute(taken)).rowcount:
                return None
            names = ("processor_id", "payment_method", "failures", "last_failure")
            query = select(*(getattr(PaymentCustomer, name) for name in names)).where(*_is(scope, customer_id))
            row = (await connection.execute(query)).one()
        return Turn(scope=scope, customer_id=customer_id, until_us=until_us, **row._mapping)

    async def holds(self, turn: Turn) -> bool:
        """Whether there are no news since the turn began, and will be none before the transaction ends."""
        query = select(_mark).where(*_is(turn.scope, turn.customer_id)).with_for_update()
        async with self._transactions.write(of(*turn.scope)) as connection:
            return (await connection.execute(query)).scalar_one_or_none() == turn.until_us

    async def end(self, turn: Turn, look_at_us: int | None) -> bool:
        """Look again at *look_at_us*, if ever; False where there are news, and another turn is due for these."""
        async with self._transactions.write(of(*turn.scope)) as connection:
            ended = row_of(turn.scope, turn.customer_id).where(_mark == turn.until_us)
            return bool((await connection.execute(ended.values(not_before_us=look_at_us))).rowcount)


async def forgive(connection: AsyncConnection, scope: Scope, customer_id: str, *, now_us: int) -> None:
    """The customer has paid, or changed something: nothing that failed before counts, but a dispute that is open; and
    they are looked at.
    """
    failures, last_failure = col(PaymentCustomer.failures), col(PaymentCustomer.last_failure)
    disputes = and_(failures > 0, last_failure.startswith(f"{DISPUTED}:", autoescape=True))
    forgiven = {
        "failures": case((disputes, failures), else_=0),
        "last_failure": case((disputes, last_failure), else_=None),
    }
    await connection.execute(row_of(scope, customer_id).values(not_before_us=_at(now_us), **forgiven))


async def stop(connection: AsyncConnection, scope: Scope, customer_id: str, *, failure: str, now_us: int) -> None:
    """Let nothing be tried because of *failure*; what is under way notices."""
    stopped = {"failures": case((col(PaymentCustomer.failures) > 0, col(PaymentCustomer.failures)), else_=1)}
    row = row_of(scope, customer_id)
    await connection.execute(row.values(last_failure=failure, not_before_us=_at(now_us), **stopped))


def row_of(scope: Scope, customer_id: str) -> Update:
    """An UPDATE of the customer's row."""
    return update(PaymentCustomer).where(*_is(scope, customer_id))


def _at(now_us: int) -> Any:
    """Now, but never what it was before: so a turn that is under way notices."""
    return case((_mark == now_us, _mark + 1), else_=now_us)


def _not_before_pauses(now_us: int) -> Any:
    """The same; in a pause after a failure, or in the turn that ends it, when that ends."""
    waits = (_mark > now_us) & (col(PaymentCustomer.failures) > 0)
    return case((waits | (_mark == now_us), _mark + 1), else_=now_us)


def _is(scope: Scope, customer_id: str) -> tuple[Any, ...]:
    return (
        col(PaymentCustomer.tenant) == scope.tenant,
        col(PaymentCustomer.mode) == scope.mode,
        col(PaymentCustomer.customer_id) == customer_id,
    )
