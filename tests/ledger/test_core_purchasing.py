"""Packs bought out of a wallet's own credits: what pays, when they end, and what they are when bought again."""

import pytest

from ledger.model import AMOUNT_MAX, Funding
from tests.ledger.spec import check, wallet_ref


def test_the_price_goes_and_the_credits_come_in_one_step():
    case = check("""
        at 1000
        grant    w1 b1 500
        purchase w1 p1 100 200 duration=3600s pack=hour cause=refused -> purchased price=100 amount=200 \
balance_before=500 balance_after=600 expires_at_us=3600001000 at_us=1000 block_id=p1
        block    w1 b1 consumed=100
        block    w1 p1 granted=100 funding=plan operator_paid=true priority=10 expires_at_us=3600001000
        block    w1 p1_2 granted=100 funding=plan operator_paid=false priority=10 expires_at_us=3600001000
        account  plan = -100
        account  wallet:w1 = 600
        events   w1 = credit.granted pack.purchased
    """)
    body = case.events[-1].body
    assert (body["pack"], body["price"], body["amount"], body["cause"]) == ("hour", 100, 200, "refused")
    assert body["block"]["metadata"] == {"note": "p1", "pack": "hour"}
    assert body["blocks"] == ["p1", "p1_2"]


def test_plan_credits_burn_first_and_what_is_left_of_them_lapses():
    check("""
        grant    w1 b1 500
        purchase w1 p1 100 200 duration=60
        debit    w1 r1 150
        wallet   w1 balance=450
        block    w1 b1 remaining=400
        at 60
        expire   w1                        -> expired amount=50
        wallet   w1 balance=400
    """)


@pytest.mark.parametrize(
    ("price", "amount", "paid", "unpaid"), [(100, 100, 100, 0), (100, 40, 40, 0), (150, 200, 120, 80), (0, 30, 0, 30)]
)
def test_the_operator_was_paid_for_no_more_of_a_plan_than_for_its_price(
    price: int, amount: int, paid: int, unpaid: int
):
    """120 were paid for and 80 were a gift of the tenant: credits do not become the operator's by changing hands."""
    case = check(f"""
        grant    w1 b1 120
        grant    w1 b2 80 funding=external
        purchase w1 p1 {price} {amount} -> purchased
    """)
    blocks = case.state.blocks[wallet_ref("w1")].values()
    plans = [block for block in blocks if block.funding is Funding.PLAN]
    assert sum(block.granted for block in plans if block.operator_paid) == paid
    assert sum(block.granted for block in plans if not block.operator_paid) == unpaid
    assert plans[0].id == "p1"


def test_plans_buy_no_plans_whatever_their_priority():
    check("""
        grant    w1 b1 100
        purchase w1 p1 100 1000 duration=60 priority=0
        purchase w1 p2 100 1000 duration=60 -> insufficient_credits needed=100 available=0
        wallet   w1 balance=1000
        block    w1 p1 remaining=100
    """)


def test_credits_that_burn_with_a_plan_or_before_it_are_kept_for_what_a_plan_is_for():
    """The plan of the two-call way is a grant of priority 10 like any other."""
    check("""
        grant    w1 b1 200 priority=10 funding=external expires=3600s
        grant    w1 b2 200 priority=11
        grant    w1 b3 60 priority=9
        purchase w1 p1 100 200 -> insufficient_credits needed=100 available=60
        purchase w1 p2 60 200 -> purchased
        block    w1 b3 remaining=0
        purchase w1 p3 100 200 priority=0 -> purchased
        block    w1 b2 remaining=100
    """)


def test_the_price_is_taken_in_burn_order_from_what_is_free_and_allowed():
    check("""
        grant    w1 b1 50 priority=1
        grant    w1 b2 50 expires=100
        grant    w1 b3 50
        grant    w1 b4 50 metric=hour
        grant    w1 b5 50 metric=chat
        grant    w1 b6 50 app=a1
        reserve  w1 r1 30
        purchase w1 p1 190 1 metric=hour -> insufficient_credits needed=190 available=170
        purchase w1 p2 90 1 metric=hour -> purchased
        block    w1 b1 consumed=20 reserved=30
        block    w1 b2 remaining=0
        block    w1 b3 remaining=30
        purchase w1 p3 131 1 app=a1 metric=hour -> insufficient_credits available=130
        purchase w1 p4 130 1 app=a1 metric=hour -> purchased
        block    w1 b5 remaining=50
    """)


def test_a_plan_goes_on_where_the_latest_active_one_ends():
    check("""
        grant    w1 b1 1000
        purchase w1 p1 10 50 duration=100 -> purchased expires_at_us=100
        at 40
        purchase w1 p2 10 50 duration=100 -> purchased expires_at_us=200
        purchase w1 p3 10 50 duration=1000 pack=week -> purchased expires_at_us=1200
        wallet   w1 available=1120
        purchase w1 p4 10 50 -> purchased expires_at_us=None
        purchase w1 p5 10 50 duration=100 -> purchased expires_at_us=1300
    """)


def test_a_plan_that_is_used_up_frozen_or_over_delays_none():
    check("""
        grant    w1 b1 1000
        purchase w1 p1 10 50 duration=100 -> purchased expires_at_us=100
        debit    w1 r1 50
        purchase w1 p2 10 50 duration=100 -> purchased expires_at_us=100
        freeze   w1 p2
        freeze   w1 p2_2
        purchase w1 p3 10 50 duration=100 -> purchased expires_at_us=100
        at 100
        purchase w1 p4 10 50 duration=100 -> purchased expires_at_us=200
    """)


def test_a_plan_that_is_held_is_active_still_but_pays_no_more():
    check("""
        grant    w1 b1 20
        purchase w1 p1 20 50 duration=100
        reserve  w1 r1 50
        grant    w1 b2 20
        purchase w1 p2 10 50 duration=100 unless_active -> purchased expires_at_us=200
    """)


def test_none_is_bought_while_one_pays_where_that_is_asked():
    check("""
        grant    w1 b1 100
        purchase w1 p1 10 50 duration=100 unless_active key=k1 -> purchased
        purchase w1 p2 10 50 duration=100 unless_active key=k2 -> plan_active
        key      purchase k2 = free
        purchase w1 p3 10 50 duration=100 unless_active key=k1 -> purchased replayed block_id=p1
        wallet   w1 balance=140
        at 100
        purchase w1 p2 10 50 duration=100 unless_active key=k2 -> purchased expires_at_us=200
    """)


def test_what_makes_no_sense_is_refused():
    check(f"""
        purchase w1 p1 0 5                       -> purchased
        purchase w1 p1 0 5                       -> already_exists
        purchase w1 p2 -1 5                      -> invalid_amount
        purchase w1 p2 0 0                       -> invalid_amount
        purchase w1 p2 0 {AMOUNT_MAX}            -> invalid_amount
        purchase w1 p2 {AMOUNT_MAX + 1} 1        -> invalid_amount
        purchase w1 p2 0 5 duration=0            -> invalid_amount
        purchase w1 p2 0 5 duration={AMOUNT_MAX + 1} -> invalid_amount
        purchase w1 p2 0 5 asset=gold            -> asset_mismatch
        purchase w2 p2 1 5                       -> insufficient_credits needed=1 available=0
        purchase w1 p2 0 5 scope=t2              -> not_found
    """)


def test_a_wallet_that_is_frozen_or_owes_buys_nothing():
    """It would be a way around the debt: the plan pays for what the wallet may not."""
    check("""
        overdraft w1 50
        grant     w1 b1 10
        debit     w1 r1 20
        purchase  w1 p1 0 5          -> receivable_outstanding
        grant     w1 b2 100
        purchase  w1 p1 5 5          -> purchased
        freeze    w1
        purchase  w1 p2 0 5          -> wallet_frozen
    """)


def test_an_overdraft_buys_nothing():
    check("""
        overdraft w1 50
        grant     w1 b1 10
        purchase  w1 p1 20 5         -> insufficient_credits needed=20 available=10
    """)


def test_a_wallet_full_of_blocks_gets_no_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ledger.purchasing.BLOCKS_LIVE_MAX", 2)
    check("""
        grant    w1 b1 100
        purchase w1 p1 1 1           -> purchased
        purchase w1 p2 1 1           -> too_many_blocks
    """)


def test_a_pack_pays_only_where_it_says():
    check("""
        grant    w1 b1 100
        purchase w1 p1 50 200 pays-metric=chat
        debit    w1 r1 60 metric=other -> insufficient_credits needed=60 available=50
        debit    w1 r2 60 metric=chat  -> committed
        block    w1 b1 remaining=50
    """)


def test_a_charge_can_be_kept_from_plans():
    """The way of two calls: the metric of a plan's price is paid by nothing above priority 0."""
    check("""
        grant    w1 wallet 300 funding=external
        grant    w1 plan 200 priority=10 expires=3600s funding=external
        debit    w1 r1 100 metric=plan_purchase_1hr max=0 -> committed
        block    w1 plan remaining=200
        block    w1 wallet remaining=200
        debit    w1 r2 201 metric=plan_purchase_1hr max=0 -> insufficient_credits needed=201 available=200
        reserve  w1 r3 50 max=0
        commit   r3 201                                  -> committed shortfall=1
        block    w1 plan remaining=200
    """)


def test_what_a_plan_bought_is_owed_when_its_payment_is_taken_back():
    check("""
        grant    w1 b1 100
        purchase w1 p1 100 300 duration=60
        clawback w1 b1 100           -> revoked amount=0 receivable=100
        wallet   w1 balance=200
        account  plan = -200
    """)
