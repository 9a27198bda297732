"""The movements of the processor's balance: what it says that came in, went back, and what it kept for itself.

A movement is told in the currency of the balance, its source (a charge, a refund, a dispute) in that of the payment.
Which payment it belongs to, and how much of it moved, is in the payment's currency here.

Source: https://docs.stripe.com/reports/balance-transaction-types.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import func, select
from sqlmodel import col

from gateway.database import insert_new, of
from gateway.payments.observed import OrderRef
from gateway.payments.stripe_objects import MODE, ORDER, TENANT
from gateway.records import Records
from gateway.tables import ProcessorTransaction
from ledger.model import Scope

SECOND_US: Final = 1_000_000

PAGE_ROWS: Final = 200
"""How many movements one statement writes."""

MovementKind = Literal["charge", "refund", "dispute"]

KINDS: Final[Mapping[str, MovementKind]] = {"charge": "charge", "refund": "refund", "dispute": "dispute"}
"""What a movement's source can be that belongs to a payment."""


class Movement(msgspec.Struct, frozen=True, kw_only=True):
    """A part of what a payment has come to: *amount* is signed, in the minor unit of *currency*, the payment's.

    *final* tells that it will not turn out otherwise: a charge may be on its way yet.
    """

    id: str
    kind: MovementKind
    payment_intent: str
    amount: int
    currency: str
    at_us: int
    order: OrderRef | None = None
    final: bool = True


class MovementSum(msgspec.Struct, frozen=True):
    """What movements of a kind come to, in the currency of the balance: *net* = *amount* - *fee*."""

    type: str
    currency: str
    amount: int
    fee: int
    net: int
    movements: int


def movement_of(transaction: Mapping[str, Any]) -> Movement | None:
    """What *transaction*, with its source in it, says of a payment; None where it is of none, like a payout."""
    source = transaction.get("source")
    if not isinstance(source, Mapping):
        return None
    kind = KINDS.get(source.get("object", ""))
    payment = source.get("payment_intent") or (source.get("id") if kind == "charge" else source.get("charge"))
    if kind is None or not payment:
        return None
    amount = int(transaction["amount"])
    if transaction["currency"] != source["currency"]:
        amount = int(source["amount"]) * (1 if amount > 0 else -1)
    return Movement(
        id=transaction["id"],
        kind=kind,
        payment_intent=_id(payment),
        amount=amount,
        currency=source["currency"],
        at_us=int(transaction["created"]) * SECOND_US,
        order=order_of(source),
        final=kind != "charge" or source.get("status") == "succeeded",
    )


def order_of(source: Mapping[str, Any]) -> OrderRef | None:
    """The order that an object of the processor is for, as its metadata says."""
    metadata = source.get("metadata") or {}
    tenant, mode, order_id = (metadata.get(name) for name in (TENANT, MODE, ORDER))
    if not (isinstance(tenant, str) and isinstance(mode, str) and isinstance(order_id, str)):
        return None
    return OrderRef(Scope(tenant, mode), order_id)


class ProcessorTransactions(Records):
    """The movements that are known, in the operator's scope. They never change, so each is kept once."""

    async def keep(self, scope: Scope, transactions: Iterable[Mapping[str, Any]]) -> None:
        """Keep what is not kept yet, as the processor tells it."""
        rows = [{"tenant": scope.tenant, "mode": scope.mode, **_row(each)} for each in transactions]
        for first in range(0, len(rows), PAGE_ROWS):
            async with self._transactions.write(of(*scope)) as connection:
                page = rows[first : first + PAGE_ROWS]
                await connection.execute(insert_new(ProcessorTransaction, connection.dialect.name), page)

    async def sums(self, scope: Scope, since_us: int, until_us: int) -> Sequence[MovementSum]:
        """What the movements from *since_us* on and before *until_us* come to, by their type and currency."""
        table = ProcessorTransaction
        amounts = [func.sum(col(each)) for each in (table.amount, table.fee, table.net)]
        query = (
            select(col(table.type), col(table.currency), *amounts, func.count())
            .where(
                col(table.tenant) == scope.tenant,
                col(table.mode) == scope.mode,
                col(table.created_at_us) >= since_us,
                col(table.created_at_us) < until_us,
            )
            .group_by(col(table.type), col(table.currency))
            .order_by(col(table.currency), col(table.type))
        )
        async with self._transactions.read(of(*scope)) as connection:
            rows = (await connection.execute(query)).all()
        return [MovementSum(kind, currency, *map(int, numbers)) for kind, currency, *numbers in rows]


def _row(transaction: Mapping[str, Any]) -> dict[str, Any]:
    source = transaction.get("source")
    movement = movement_of(transaction)
    return {
        "id": transaction["id"],
        "type": transaction["type"],
        "amount": int(transaction["amount"]),
        "fee": int(transaction["fee"]),
        "net": int(transaction["net"]),
        "currency": transaction["currency"],
        "source": None if source is None else _id(source),
        "payment_intent": None if movement is None else movement.payment_intent,
        "created_at_us": int(transaction["created"]) * SECOND_US,
    }


def _id(named: Any) -> str:
    """Of an object, or of its id alone, as it comes without being expanded."""
    return str(named["id"] if isinstance(named, Mapping) else named)
