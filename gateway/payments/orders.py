"""Orders: what a customer is to pay for, written down before the processor is asked for anything.

The terms of an order never change. An order is `open`, and ends once as `paid`, `failed` or `expired`; only `paid` is
for ever: who pays late pays all the same. Refunds and disputes are not its business: they are told by observations.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import ColumnElement, Select, func, or_, select, tuple_, update
from sqlmodel import col

from gateway.database import insert_new, of
from gateway.records import Records
from gateway.tables import PaymentOrder
from ledger.model import Scope
from pricing.periods import Period

OrderKind = Literal["checkout", "auto"]
OrderStatus = Literal["open", "paid", "failed", "expired"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of `PaymentOrder`, which says what they mean."""

    tenant: str
    mode: str
    id: str
    kind: OrderKind
    status: OrderStatus
    customer_id: str
    package: str
    price_minor: int
    currency: str
    asset: str
    credited: int
    bonus: int
    spread: int
    created_at_us: int
    save_payment_method: bool = False
    success_url: str | None = None
    cancel_url: str | None = None
    digest: str = ""
    session_id: str | None = None
    checkout_url: str | None = None
    payment_intent: str | None = None
    failure: str | None = None
    settled_at_us: int | None = None

    @property
    def scope(self) -> Scope:
        return Scope(self.tenant, self.mode)

    @property
    def block_id(self) -> str:
        """The block of what it pays for."""
        return f"blk_{self.id.removeprefix(ORDER_PREFIX)}"


ORDER_PREFIX: Final = "ord_"

_COLUMNS: Final = tuple(getattr(PaymentOrder, name) for name in Order.__struct_fields__)


class Orders(Records):
    """Orders of all tenants; each method names whose."""

    async def add(self, order: Order) -> bool:
        """Keep *order*; False where there is one with its id, or an open automatic one of its customer, already."""
        async with self._transactions.write(of(order.tenant, order.mode)) as connection:
            row = msgspec.structs.asdict(order)
            added = await connection.execute(insert_new(PaymentOrder, connection.dialect.name), row)
            return bool(added.rowcount)

    async def find(self, scope: Scope, order_id: str) -> Order | None:
        found = await self._all(_select(scope).where(col(PaymentOrder.id) == order_id), scope)
        return found[0] if found else None

    async def of_customer(self, scope: Scope, customer_id: str, *, since_us: int = 0) -> list[Order]:
        """Newest first."""
        query = _select(scope).where(
            col(PaymentOrder.customer_id) == customer_id, col(PaymentOrder.created_at_us) >= since_us
        )
        newest = (col(PaymentOrder.created_at_us).desc(), col(PaymentOrder.id).desc())
        return await self._all(query.order_by(*newest), scope)

    async def open_automatic(self, scope: Scope, customer_id: str) -> Order | None:
        """The customer's automatic order that is open; there is one at most."""
        automatic = (col(PaymentOrder.kind) == "auto", col(PaymentOrder.status) == "open")
        found = await self._all(_select(scope).where(col(PaymentOrder.customer_id) == customer_id, *automatic), scope)
        return found[0] if found else None

    async def automatic_minor(self, scope: Scope, customer_id: str, *, currency: str, month: Period) -> int:
        """What automatic orders made in *month* come to: those that are paid, and the one that may yet be."""
        query = select(func.coalesce(func.sum(col(PaymentOrder.price_minor)), 0)).where(
            col(PaymentOrder.tenant) == scope.tenant,
            col(PaymentOrder.mode) == scope.mode,
            col(PaymentOrder.customer_id) == customer_id,
            col(PaymentOrder.kind) == "auto",
            col(PaymentOrder.status).in_(("open", "paid")),
            col(PaymentOrder.currency) == currency,
            col(PaymentOrder.created_at_us) >= month.start_us,
            col(PaymentOrder.created_at_us) < month.end_us,
        )
        async with self._transactions.read(of(*scope)) as connection:
            return int((await connection.execute(query)).scalar_one())

    async def page(self, scope: Scope, customer_id: str, *, before: Order | None, limit: int) -> list[Order]:
        """Newest first, from the one that came just before *before*."""
        at_us, order_id = col(PaymentOrder.created_at_us), col(PaymentOrder.id)
        query = _select(scope).where(col(PaymentOrder.customer_id) == customer_id)
        if before is not None:
            query = query.where(tuple_(at_us, order_id) < tuple_(before.created_at_us, before.id))
        return await self._all(query.order_by(at_us.desc(), order_id.desc()).limit(limit), scope)

    async def note_session(self, order: Order, *, session_id: str, checkout_url: str | None) -> bool:
        """The processor has made a Checkout Session for it; False where it has ended meanwhile."""
        still_open = col(PaymentOrder.status) == "open"
        return bool(await self._change(order, still_open, session_id=session_id, checkout_url=checkout_url))

    async def note_payment(self, order: Order, payment_intent: str) -> bool:
        """The processor's payment for it is known; False where another one is, which stays: an order is paid once."""
        column = col(PaymentOrder.payment_intent)
        free = or_(column.is_(None), column == payment_intent)
        return bool(await self._change(order, free, payment_intent=payment_intent))

    async def paid(self, order: Order) -> bool:
        """False where it was before."""
        not_yet = col(PaymentOrder.status) != "paid"
        return bool(await self._change(order, not_yet, status="paid", failure=None, settled_at_us=self._now_us()))

    async def ended(self, order: Order, status: Literal["failed", "expired"], *, failure: str | None = None) -> bool:
        """It will not be paid, as far as one can tell; False where it had ended before."""
        still_open = col(PaymentOrder.status) == "open"
        changes = {"status": status, "failure": failure, "settled_at_us": self._now_us()}
        return bool(await self._change(order, still_open, **changes))

    async def _change(self, order: Order, *conditions: ColumnElement[bool], **values: Any) -> int:
        matches = [
            col(PaymentOrder.tenant) == order.tenant,
            col(PaymentOrder.mode) == order.mode,
            col(PaymentOrder.id) == order.id,
            *conditions,
        ]
        async with self._transactions.write(of(order.tenant, order.mode)) as connection:
            return (await connection.execute(update(PaymentOrder).where(*matches).values(**values))).rowcount

    async def _all(self, query: Select[Any], scope: Scope) -> list[Order]:
        async with self._transactions.read(of(*scope)) as connection:
            return [_order(row) for row in await connection.execute(query)]


def _select(scope: Scope) -> Select[Any]:
    return select(*_COLUMNS).where(col(PaymentOrder.tenant) == scope.tenant, col(PaymentOrder.mode) == scope.mode)


def _order(row: Sequence[Any]) -> Order:
    return Order(**dict(zip(Order.__struct_fields__, row, strict=True)))
