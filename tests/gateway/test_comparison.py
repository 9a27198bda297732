"""What the processor has of a payment beside what the journal has: a table of how they can differ."""

from typing import Any

import pytest

from gateway.payments.clearing import Booked, BookedBlock
from gateway.payments.comparison import Difference, Paid, compare, payments_of
from gateway.payments.observed import OrderRef
from gateway.payments.orders import Order
from gateway.payments.processor_transactions import Movement, movement_of
from ledger.model import Scope
from tests.gateway.payment_histories import order as an_order

LIVE = Scope("ten_a", "live")
REF = OrderRef(LIVE, "ord_1")
ORDER = an_order(tenant="ten_a", status="paid", price_minor=1_000, credited=850, bonus=100, spread=151)
FACE = 1_001


def paid(gross: int = 1_000, taken: int = 0, **more: Any) -> Paid:
    facts: dict[str, Any] = {"payment_intent": "pi_1", "order": REF, "currency": "usd", "at_us": 5}
    return Paid(gross=gross, taken=taken, **{**facts, **more})


def booked(credited: int = FACE, returned: int = 0, *others: BookedBlock, **more: Any) -> Booked:
    """The order's own block, and others."""
    facts: dict[str, Any] = {"order": REF, "asset": "credit", "at_us": 6}
    own = block(ORDER.block_id, credited, returned, withdrawn=more.pop("withdrawn", False))
    return Booked(blocks=(own, *others), **{**facts, **more})


def block(id: str, credited: int, returned: int = 0, *, withdrawn: bool = False) -> BookedBlock:
    return BookedBlock(id=id, credited=credited, returned=returned, withdrawn=withdrawn)


SECOND, REVOKED = block("blk_2", FACE), block("blk_2", FACE, withdrawn=True)


def found(payments: list[Paid], journal: list[Booked], *, order: Order | None = ORDER) -> list[tuple[Any, ...]]:
    differences, _ = compare({} if order is None else {REF: order}, payments, journal)
    return [(each.kind, each.expected, each.found) for each in differences]


@pytest.mark.parametrize(
    ("payments", "journal", "differences"),
    [
        ([paid()], [booked()], []),
        ([paid()], [], [("missing_credit", FACE, 0)]),
        ([], [booked()], [("doubled_credit", 0, FACE)]),
        ([paid(0)], [booked()], [("doubled_credit", 0, FACE)]),
        ([paid()], [booked(FACE, 0, SECOND)], [("doubled_credit", FACE, 2 * FACE)]),
        ([paid()], [booked(FACE + 1)], [("wrong_amount", FACE, FACE + 1)]),
        ([paid()], [booked(FACE - 1)], [("wrong_amount", FACE, FACE - 1)]),
        ([paid()], [booked(asset="other")], [("wrong_amount", FACE, FACE)]),
        ([paid(999)], [], [("wrong_amount", FACE, 0)]),
        ([paid(999)], [booked()], [("wrong_amount", FACE, FACE)]),
        ([paid(), paid(payment_intent="pi_2")], [booked()], [("wrong_amount", FACE, FACE)]),
        ([paid(currency="eur")], [], [("foreign_currency", 0, 0)]),
        ([paid(currency="eur")], [booked()], [("foreign_currency", 0, FACE)]),
        # Refunds and disputes: the part of the face is rounded down.
        ([paid(taken=333)], [booked(FACE, 333)], []),
        ([paid(taken=333)], [booked()], [("missing_reversal", 333, 0)]),
        ([paid(taken=333)], [booked(FACE, 334)], [("wrong_reversal", 333, 334)]),
        ([paid(taken=1_000)], [booked(FACE, FACE)], []),
        ([paid(taken=1_400)], [booked(FACE, FACE)], []),
        ([paid(taken=0)], [booked(FACE, FACE)], [("wrong_reversal", 0, FACE)]),
        ([paid(taken=-100)], [booked()], []),
        # What was set right: a block that is revoked, a payment that is given back and that nothing was credited for.
        ([paid()], [booked(FACE, 0, REVOKED)], []),
        ([paid()], [booked(withdrawn=True)], []),
        ([], [booked(withdrawn=True)], []),
        ([paid(999, 999)], [], []),
        ([paid(999, 998)], [], [("wrong_amount", FACE, 0)]),
        ([paid(taken=1_000)], [], []),
        ([paid(currency="eur", taken=1_000)], [], []),
        ([paid(currency="eur", taken=999)], [], [("foreign_currency", 0, 0)]),
        ([paid(), paid(taken=1_000, payment_intent="pi_2")], [booked()], []),
        # An order that has not been paid, and what is on its way.
        ([], [], []),
        ([paid(0)], [], []),
    ],
)
def test_how_a_payment_can_differ(
    payments: list[Paid], journal: list[Booked], differences: list[tuple[Any, ...]]
) -> None:
    assert found(payments, journal) == differences


def test_what_names_an_order_that_there_is_not() -> None:
    assert found([paid()], [], order=None) == [("unknown_payment", None, None)]
    assert found([], [booked()], order=None) == [("doubled_credit", 0, FACE)]
    assert found([paid(taken=1_000)], [booked(withdrawn=True)], order=None) == []


def test_what_names_no_order_is_none_of_our_business() -> None:
    other = paid(order=None)
    assert compare({REF: ORDER}, [other], []) == ([], [other])


def test_a_difference_tells_both_sides_in_money_and_in_credits() -> None:
    differences, _ = compare({REF: ORDER}, [paid(taken=500)], [booked()])
    assert differences == [
        Difference(
            kind="missing_reversal",
            order=REF,
            payment_intent="pi_1",
            currency="usd",
            expected_minor=None,
            found_minor=500,
            asset="credit",
            expected=500,
            found=0,
            at_us=6,
        )
    ]


def transaction(amount: int, source: dict[str, Any], currency: str = "usd") -> dict[str, Any]:
    return {
        "id": f"txn_{source['id']}_{amount}",
        "amount": amount,
        "currency": currency,
        "created": 7,
        "source": source,
    }


METADATA = {"farebox_order": "ord_1", "farebox_tenant": "ten_a", "farebox_mode": "live"}
CHARGE = {
    "id": "ch_1",
    "object": "charge",
    "payment_intent": "pi_1",
    "amount": 1_000,
    "currency": "usd",
    "status": "succeeded",
    "metadata": METADATA,
}
REFUND = {"id": "re_1", "object": "refund", "payment_intent": "pi_1", "amount": 300, "currency": "usd"}
DISPUTE = {"id": "dp_1", "object": "dispute", "payment_intent": "pi_1", "amount": 700, "currency": "usd"}


def total(*transactions: dict[str, Any]) -> list[Paid]:
    return payments_of([each for each in map(movement_of, transactions) if each is not None])


def test_a_payment_is_the_sum_of_its_movements() -> None:
    assert total(
        transaction(-300, REFUND),
        transaction(1_000, CHARGE),
        transaction(-700, DISPUTE),
        transaction(700, DISPUTE),
    ) == [paid(taken=300, at_us=7_000_000)]


def test_a_movement_that_is_listed_twice_counts_once() -> None:
    assert total(transaction(1_000, CHARGE), transaction(1_000, CHARGE)) == [paid(at_us=7_000_000)]


def test_a_refund_that_failed_took_nothing() -> None:
    assert total(transaction(1_000, CHARGE), transaction(-300, REFUND), transaction(300, REFUND))[0].taken == 0


def test_what_may_yet_fail_was_not_paid() -> None:
    assert total(transaction(1_000, {**CHARGE, "status": "pending"}))[0].gross == 0


def test_a_balance_in_another_currency_is_told_in_that_of_the_payment() -> None:
    """A payment of $10.00 came to €9.20 on the balance, and a refund of $3.00 took €2.80."""
    (payment,) = total(transaction(920, CHARGE, "eur"), transaction(-280, REFUND, "eur"))
    assert (payment.gross, payment.taken, payment.currency) == (1_000, 300, "usd")


@pytest.mark.parametrize(
    "source",
    [None, "po_1", {"id": "po_1", "object": "payout", "amount": 5, "currency": "usd"}],
)
def test_what_is_of_no_payment_is_no_movement_of_one(source: Any) -> None:
    assert movement_of({"id": "txn_1", "amount": -5, "currency": "usd", "created": 7, "source": source}) is None


@pytest.mark.parametrize("missing", sorted(METADATA))
def test_half_a_name_names_no_order(missing: str) -> None:
    metadata = {name: value for name, value in METADATA.items() if name != missing}
    movement = movement_of(transaction(1_000, {**CHARGE, "metadata": metadata}))
    assert isinstance(movement, Movement)
    assert movement.order is None
