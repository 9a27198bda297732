"""A payment that has come in: its block, its bonus, and what it is worth beyond the credits."""

from tests.ledger.spec import check


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


def test_an_event_can_be_raised_that_moves_no_credits():
    case = check("""
        tell   w1 topup.failed key=ord_1    -> changed
        tell   w1 topup.failed key=ord_1    -> changed replayed
        wallet w1 balance=0 events_raised=1
        tell   w1 topup.failed asset=gold   -> asset_mismatch
    """)
    assert [event.body for event in case.events] == [{"order": "ord_1"}]
