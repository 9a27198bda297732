"""Orders: what a customer is to pay for, written down before the processor is asked for anything.

The terms of an order never change. An order is `open`, and ends once as `paid`, `failed` or `expired`; only `paid` is
for ever: who pays late pays all the same. Refunds and disputes are not its business: they are told by observations.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import Select, func, select, update
from sqlmodel import col

from gateway.database import insert_new, of
from gateway.payments.top_up_turns import count_failure, forgive, lock
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
        return await self._all(query.order_by(col(PaymentOrder.created_at_us).desc()), scope)

    async def open_automatic(self, scope: Scope, customer_id: str) -> Order | None:
        """The customer's automatic order that is open; there is one at most."""
        automatic = (col(PaymentOrder.kind) == "auto", col(PaymentOrder.status) == "open")
        query = _select(scope).where(col(PaymentOrder.customer_id) == customer_id, *automatic)
        found = await self._all(query, scope)
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

    async def note_session(self, order: Order, *, session_id: str, checkout_url: str) -> None:
        """The processor has made a Checkout Session for it."""
        await self._change(order, session_id=session_id, checkout_url=checkout_url)

    async def note_payment(self, order: Order, payment_intent: str) -> None:
        """The processor's payment for it is known."""
        await self._change(order, payment_intent=payment_intent)

    async def paid(self, order: Order) -> bool:
        """It is paid, whatever was thought of it before; False where it was known. Failures before it count no more."""
        values = {"status": "paid", "failure": None, "settled_at_us": self._now_us()}
        async with self._transactions.write(of(*order.scope)) as connection:
            await lock(connection, order.scope, order.customer_id)
            unpaid = update(PaymentOrder).where(*_is(order), col(PaymentOrder.status) != "paid")
            if not (await connection.execute(unpaid.values(**values))).rowcount:
                return False
            await forgive(connection, order.scope, order.customer_id, now_us=self._now_us())
            return True

    async def ended(self, order: Order, status: Literal["failed", "expired"], *, failure: str | None = None) -> bool:
        """It will not be paid, as far as one can tell; False where it had ended before.

        An automatic one that failed counts as a failure of its customer's.
        """
        now_us = self._now_us()
        async with self._transactions.write(of(*order.scope)) as connection:
            await lock(connection, order.scope, order.customer_id)
            still_open = update(PaymentOrder).where(*_is(order), col(PaymentOrder.status) == "open")
            values = {"status": status, "failure": failure, "settled_at_us": now_us}
            if not (await connection.execute(still_open.values(**values))).rowcount:
                return False
            if order.kind == "auto" and status == "failed":
                await count_failure(
                    connection, order.scope, order.customer_id, order_id=order.id, failure=failure, now_us=now_us
                )
            return True

    async def _change(self, order: Order, **values: Any) -> None:
        async with self._transactions.write(of(*order.scope)) as connection:
            await connection.execute(update(PaymentOrder).where(*_is(order)).values(**values))

    async def _all(self, query: Select[Any], scope: Scope) -> list[Order]:
        async with self._transactions.read(of(*scope)) as connection:
            return [_order(row) for row in await connection.execute(query)]


def _select(scope: Scope) -> Select[Any]:
    return select(*_COLUMNS).where(col(PaymentOrder.tenant) == scope.tenant, col(PaymentOrder.mode) == scope.mode)


def _is(order: Order) -> tuple[Any, ...]:
    return (
        col(PaymentOrder.tenant) == order.tenant,
        col(PaymentOrder.mode) == order.mode,
        col(PaymentOrder.id) == order.id,
    )


def _order(row: Sequence[Any]) -> Order:
    return Order(**dict(zip(Order.__struct_fields__, row, strict=True)))
