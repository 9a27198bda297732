"""A payment that has come in: its block, its bonus, and what it is worth beyond the credits."""

import msgspec

from ledger.commands import TopUp
from ledger.outcomes import Transfer
from tests.ledger.spec import Case, check, command


def test_a_payment_opens_a_block_and_its_bonus_another():
    case = check("""
        topup   w1 t1 850 bonus=50 spread=150 payment=ord_1 -> topped_up amount=850 bonus=50 balance_before=0 balance_after=900
        block   w1 t1 granted=850 funding=paid operator_paid=true payment_reference=ord_1
        block   w1 t1_bonus granted=50 funding=promotional operator_paid=true payment_reference=ord_1
        wallet  w1 balance=900 available=900
        account clearing = -1000
        account package_spread = 150
        account promo = -50
        events  w1 = credit.granted credit.granted topup.succeeded
    """)  # noqa: E501
    assert case.events[-1].body == {
        "package": "usd-10",
        "payment": "ord_1",
        "amount": 850,
        "bonus": 50,
        "balance": 900,
    }


def test_it_repays_what_the_wallet_owes_first():
    check("""
        debit   w1 r1 120 overage
        topup   w1 t1 100 bonus=50      -> topped_up repaid=120 balance_before=-120 balance_after=30
        block   w1 t1 consumed=100 remaining=0
        block   w1 t1_bonus consumed=20 remaining=30
        wallet  w1 receivable=0
    """)


def test_a_payment_comes_in_once():
    check("""
        topup   w1 t1 100 key=ord_1     -> topped_up
        topup   w1 t1 100 key=ord_1     -> topped_up replayed
        topup   w1 t1 100               -> already_exists
        topup   w1 t1 200 key=ord_1 digest=other -> key_reused
        account clearing = -100
    """)


def test_a_payment_of_nothing_is_refused():
    check("""
        topup w1 t1 0                   -> invalid_amount
        topup w1 t1 -1                  -> invalid_amount
        topup w1 t1 10 bonus=-1         -> invalid_amount
        topup w1 t1 10 spread=-1        -> invalid_amount
        topup w1 t1 10
        topup w1 t2 10 asset=gold       -> asset_mismatch
    """)


def test_what_a_payment_brings_stays_within_the_bounds_of_an_amount():
    """A wallet's blocks together, their bonus too; and a payment's worth, its spread too."""
    most = 2**62
    check(f"""
        topup w1 t1 {most} bonus=1      -> invalid_amount
        topup w1 t1 {most} spread=1     -> invalid_amount
        topup w1 t1 {most - 1} bonus=1 spread=1 -> topped_up
        topup w1 t2 1                   -> invalid_amount
        debit w1 r1 2
        topup w1 t2 1 bonus=1 spread=5  -> topped_up
    """)


def test_the_amounts_of_the_event_are_the_ledgers_own():
    """What the caller tells besides cannot say otherwise."""
    asked = command("topup w1 t1 100 payment=ord_1")
    assert isinstance(asked, TopUp)
    case = Case()
    case.run(msgspec.structs.replace(asked, body={"amount": 7, "payment": "other", "package": "usd-10"}))
    told = {"package": "usd-10", "payment": "ord_1", "amount": 100, "bonus": 0, "balance": 100}
    assert case.events[-1].body == told


def test_every_entry_of_a_payment_names_it_and_its_blocks_say_what_they_are_for():
    """The books are compared with the processor's by these references."""
    case = check("topup w1 t1 850 bonus=50 spread=150 payment=ord_1")
    entries = [fact for fact in case.facts if isinstance(fact, Transfer)]
    assert [(entry.debit, entry.credit, entry.block, entry.reference) for entry in entries] == [
        ("clearing", "wallet:w1", "t1", "ord_1"),
        ("clearing", "package_spread", "t1", "ord_1"),
        ("promo", "wallet:w1", "t1_bonus", "ord_1"),
    ]
    (blocks,) = case.state.blocks.values()
    assert [block.metadata for block in blocks.values()] == [{"note": "t1"}] * 2


def test_an_event_can_be_raised_that_moves_no_credits():
    case = check("""
        tell   w1 topup.failed key=ord_1    -> changed
        tell   w1 topup.failed key=ord_1    -> changed replayed
        wallet w1 balance=0 events_raised=1
        tell   w1 topup.failed asset=gold   -> asset_mismatch
    """)
    assert [event.body for event in case.events] == [{"order": "ord_1"}]
