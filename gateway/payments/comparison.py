"""What the processor has of each payment, beside what the journal has: where they differ, and how.

How it works. A payment's order says what it costs and what it brings. What it brings, spread and all, is its face. Of
the face the clearing account must have credited all once the price is paid, and had back face x taken / price, rounded
down, when so much of the price was refunded or is disputed. What was set right is no difference any more: a payment
that was refunded whole and nothing was credited for, a block that was revoked whole and should not have been there.
Everything here is pure.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec

from gateway.payments.clearing import Booked
from gateway.payments.observed import OrderRef
from gateway.payments.orders import Order
from gateway.payments.processor_transactions import Movement

DifferenceKind = Literal[
    "missing_credit",
    "doubled_credit",
    "wrong_amount",
    "missing_reversal",
    "wrong_reversal",
    "unknown_payment",
    "foreign_currency",
]

KINDS: Final[tuple[DifferenceKind, ...]] = (
    "missing_credit",
    "doubled_credit",
    "wrong_amount",
    "missing_reversal",
    "wrong_reversal",
    "unknown_payment",
    "foreign_currency",
)

MENDABLE: Final[frozenset[DifferenceKind]] = frozenset({"missing_credit", "missing_reversal", "wrong_reversal"})
"""What may only be news that never came: telling it again is safe, because it has one effect."""


class Paid(msgspec.Struct, frozen=True, kw_only=True):
    """What a payment has come to at the processor, in the minor unit of its currency.

    *gross* is what was paid, *taken* what of it went back by refunds and disputes; *order* is what it says it is for.
    """

    payment_intent: str
    order: OrderRef | None
    currency: str
    gross: int
    taken: int
    at_us: int


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Where the two sides of a payment differ. It names nobody: ids and amounts only.

    *expected* and *found* are credits on the clearing account in *asset*'s smallest unit: what went out of it for
    the payment, or for reversals what came back. *expected_minor* is what the order says, *found_minor* what the
    processor has, in *currency*.
    """

    kind: DifferenceKind
    order: OrderRef | None
    payment_intent: str | None
    currency: str | None = None
    expected_minor: int | None = None
    found_minor: int | None = None
    asset: str | None = None
    expected: int | None = None
    found: int | None = None
    at_us: int = 0

    @property
    def facts(self) -> dict[str, str | int]:
        """What there is to tell of it, flat."""
        told = msgspec.structs.asdict(self)
        del told["at_us"], told["order"]
        if self.order is not None:
            told |= {"tenant": self.order.scope.tenant, "mode": self.order.scope.mode, "order": self.order.order_id}
        return {name: value for name, value in told.items() if value is not None}


def payments_of(movements: Iterable[Movement]) -> list[Paid]:
    """What *movements*, all that there are of each payment, come to. What may yet fail is not there yet."""
    by_payment: dict[str, dict[str, Movement]] = defaultdict(dict)
    for movement in movements:
        by_payment[movement.payment_intent][movement.id] = movement
    return [_paid(payment, list(found.values())) for payment, found in sorted(by_payment.items())]


def _paid(payment_intent: str, movements: list[Movement]) -> Paid:
    charged = [movement for movement in movements if movement.kind == "charge"]
    named = [movement.order for movement in charged if movement.order is not None]
    currency = (charged or movements)[0].currency
    gross = sum(movement.amount for movement in charged if movement.final)
    back = [movement for movement in movements if movement.kind != "charge"]
    abroad = sum(movement.amount for movement in back if movement.currency != currency)
    # How much of the payment an amount in another currency is, nobody can say: the settler takes all of it.
    taken = gross if abroad < 0 else -sum(movement.amount for movement in back if movement.currency == currency)
    return Paid(
        payment_intent=payment_intent,
        order=named[0] if named else None,
        currency=currency,
        gross=gross,
        taken=taken,
        at_us=max(movement.at_us for movement in movements),
    )


def compare(
    orders: Mapping[OrderRef, Order], paid: Iterable[Paid], booked: Iterable[Booked]
) -> tuple[list[Difference], list[Paid]]:
    """The differences, and those payments that are none of ours: they name no order.

    Args:
        paid: every payment in question, whole.
        booked: every payment in question, whole; one that is not in *paid* has not been paid.
    """
    by_order: dict[OrderRef, list[Paid]] = defaultdict(list)
    foreign = []
    for payment in paid:
        if payment.order is None:
            foreign.append(payment)
        else:
            by_order[payment.order].append(payment)
    in_journal = {each.order: each for each in booked}
    differences: list[Difference] = []
    for ref in sorted({*by_order, *in_journal}, key=lambda ref: (ref.scope, ref.order_id)):
        differences += _of_order(ref, orders.get(ref), by_order.get(ref, []), in_journal.get(ref))
    return differences, foreign


def _of_order(ref: OrderRef, order: Order | None, payments: list[Paid], journal: Booked | None) -> Iterable[Difference]:
    at_us = max([*(each.at_us for each in payments), *([] if journal is None else [journal.at_us])])
    if order is None:
        left = [each for each in payments if each.taken < each.gross]
        yield from _without_order(ref, left, None if journal is None else journal.standing(), at_us)
        return
    good = _standing(order, payments, journal)
    if journal is not None:
        journal = journal.standing(order.block_id if good else None)
    face = order.credited + order.spread
    credited = 0 if journal is None else journal.credited
    gross = sum(each.gross for each in good)
    facts = Difference(
        kind="wrong_amount",
        order=ref,
        payment_intent=good[0].payment_intent if good else order.payment_intent,
        currency=order.currency,
        expected_minor=order.price_minor,
        found_minor=gross,
        asset=order.asset,
        expected=face,
        found=credited,
        at_us=at_us,
    )
    abroad = [each for each in good if each.currency != order.currency]
    if abroad:
        found = msgspec.structs.replace(facts, currency=abroad[0].currency, found_minor=abroad[0].gross)
        yield msgspec.structs.replace(found, kind="foreign_currency", expected=0)
        return
    if not good:
        if credited != 0:
            yield msgspec.structs.replace(facts, kind="doubled_credit", expected=0)
        return
    if journal is not None and sum(block.credited > 0 for block in journal.blocks) > 1:
        yield msgspec.structs.replace(facts, kind="doubled_credit")
    elif credited == 0:
        yield msgspec.structs.replace(facts, kind="missing_credit" if gross == order.price_minor else "wrong_amount")
        return
    elif gross != order.price_minor or credited != face or (journal is not None and journal.asset != order.asset):
        yield facts
    own = [each for each in good if each.payment_intent == order.payment_intent] or good
    yield from _reversal(facts, order, taken=sum(each.taken for each in own), journal=journal)


def _standing(order: Order, payments: list[Paid], journal: Booked | None) -> list[Paid]:
    """The payments that have to agree: not those that were given back whole, unless it was them that were credited."""
    good = [each for each in payments if each.gross != 0]
    credited = journal is not None and journal.credited != 0
    own = order.payment_intent if credited else None
    standing = [each for each in good if each.taken < each.gross or each.payment_intent == own]
    return standing or (good if credited else [])


def _reversal(facts: Difference, order: Order, *, taken: int, journal: Booked | None) -> Iterable[Difference]:
    """Whether the part of the face is back that was taken: never more than was paid, whatever refunds and disputes
    come to together.
    """
    taken = min(max(taken, 0), order.price_minor)
    expected = (order.credited + order.spread) * taken // order.price_minor
    returned = 0 if journal is None else journal.returned
    if returned != expected:
        yield msgspec.structs.replace(
            facts,
            kind="missing_reversal" if returned == 0 else "wrong_reversal",
            expected_minor=None,
            found_minor=taken,
            expected=expected,
            found=returned,
        )


def _without_order(ref: OrderRef, payments: list[Paid], journal: Booked | None, at_us: int) -> Iterable[Difference]:
    """It says that it is for an order, and there is none: money that nobody got credits for, or the reverse."""
    for payment in payments:
        yield Difference(
            kind="unknown_payment",
            order=ref,
            payment_intent=payment.payment_intent,
            currency=payment.currency,
            expected_minor=0,
            found_minor=payment.gross,
            at_us=at_us,
        )
    if journal is not None and (journal.credited != 0 or journal.returned != 0):
        yield Difference(
            kind="doubled_credit",
            order=ref,
            payment_intent=None,
            asset=journal.asset,
            expected=0,
            found=journal.credited,
            at_us=at_us,
        )
