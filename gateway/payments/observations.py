"""What was learnt of payments, kept as it came: rows are only ever added, and marked when they have had their effect.

They stand with the operator, whose account the processor's is; the orders that they are of are any tenant's.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import or_, select, update
from sqlmodel import col

from gateway.database import insert_new, of
from gateway.payments.facts import Facts
from gateway.payments.observed import Observed, OrderRef
from gateway.records import Records
from gateway.tables import PaymentObservation
from ledger.model import Scope


class Kept(msgspec.Struct, frozen=True):
    """An observation as it is kept. *order_scope* is that of the order that it names, where it names one."""

    id: str
    payment_intent: str | None
    order_id: str | None
    order_scope: Scope | None
    facts: Facts
    done: bool

    @property
    def order(self) -> OrderRef | None:
        if self.order_id is None or self.order_scope is None:
            return None
        return OrderRef(self.order_scope, self.order_id)


class _Learnt(msgspec.Struct, frozen=True, omit_defaults=True):
    """The column `facts`."""

    facts: Facts = Facts()
    order_scope: Scope | None = None


_COLUMNS: Final = tuple(
    col(getattr(PaymentObservation, name)) for name in ("id", "payment_intent", "order_id", "facts", "done_at_us")
)


class Observations(Records):
    """*scope* is the operator's, with every method."""

    async def keep(self, scope: Scope, observed: Observed) -> bool:
        """Keep it; False where it is kept, and done, already."""
        order = observed.order
        row = {
            "tenant": scope.tenant,
            "mode": scope.mode,
            "id": observed.id,
            "kind": observed.kind,
            "payment_intent": observed.payment_intent,
            "order_id": None if order is None else order.order_id,
            "facts": msgspec.to_builtins(_Learnt(observed.facts, None if order is None else order.scope)),
            "received_at_us": self._now_us(),
        }
        async with self._transactions.write(of(*scope)) as connection:
            added = await connection.execute(insert_new(PaymentObservation, connection.dialect.name), row)
            if added.rowcount:
                return True
            query = select(col(PaymentObservation.done_at_us)).where(*_of(scope), _id() == observed.id)
            return (await connection.execute(query)).scalar_one() is None

    async def of_payment(self, scope: Scope, payment_intent: str) -> list[Kept]:
        """All that is kept of the payment, the oldest first."""
        return await self._all(scope, col(PaymentObservation.payment_intent) == payment_intent)

    async def of_order(self, scope: Scope, order: OrderRef, payments: Sequence[str]) -> list[Kept]:
        """All that is kept of the order and of these payments, the oldest first."""
        mentions = or_(
            col(PaymentObservation.order_id) == order.order_id, col(PaymentObservation.payment_intent).in_(payments)
        )
        found = await self._all(scope, mentions)
        return [each for each in found if each.order in (None, order)]

    async def done(self, scope: Scope, ids: Sequence[str], outcome: str) -> None:
        """They have had their effect, or cannot have one. What they came to first stays."""
        changes = update(PaymentObservation).where(
            *_of(scope), _id().in_(ids), col(PaymentObservation.done_at_us).is_(None)
        )
        async with self._transactions.write(of(*scope)) as connection:
            await connection.execute(changes.values(done_at_us=self._now_us(), outcome=outcome))

    async def _all(self, scope: Scope, condition: Any) -> list[Kept]:
        query = select(*_COLUMNS).where(*_of(scope), condition)
        query = query.order_by(col(PaymentObservation.received_at_us), _id())
        async with self._transactions.read(of(*scope)) as connection:
            return [_kept(*row) for row in await connection.execute(query)]


def _of(scope: Scope) -> tuple[Any, ...]:
    return (col(PaymentObservation.tenant) == scope.tenant, col(PaymentObservation.mode) == scope.mode)


def _id() -> Any:
    return col(PaymentObservation.id)


def _kept(id: str, payment_intent: str | None, order_id: str | None, facts: Any, done_at_us: int | None) -> Kept:
    learnt = msgspec.convert(facts, _Learnt)
    return Kept(id, payment_intent, order_id, learnt.order_scope, learnt.facts, done_at_us is not None)
