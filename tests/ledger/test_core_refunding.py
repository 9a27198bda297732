"""A charge given back to the slices that paid it; and a charge for work that was done without asking."""

import msgspec

from ledger.commands import Refund
from ledger.outcomes import Reason, Rejected
from tests.ledger.spec import check, command

# Refunds.


def test_a_refund_reverses_the_recorded_entries_last_slice_first():
    check("""
        grant   w1 b1 30 priority=1
        grant   w1 b2 30
        reserve w1 r1 60
        commit  r1 40+10                -> committed charged=40+10
        refund  r1 25                   -> refunded amounts=25 refunded=25 balance=35
        block   w1 b1 consumed=25
        block   w1 b2 consumed=0
        account revenue = 20
        account tenant_margin = 5
        refund  r1                      -> refunded amounts=25 refunded=50 balance=60
        account revenue = 0
        account tenant_margin = 0
        account wallet:w1 = 60
        reservation r1 state=committed charged=40+10 refunded=50
        events  w1 = credit.granted credit.granted charge.refunded charge.refunded
    """)


def test_no_more_is_given_back_than_was_charged():
    check("""
        grant   w1 b1 100
        debit   w1 r1 30+5
        refund  r1 36                   -> invalid_amount
        refund  r1 -1                   -> invalid_amount
        refund  r1 5|5                  -> invalid_amount
        refund  r1 35                   -> refunded
        refund  r1 1                    -> invalid_amount
        refund  r1                      -> refunded amounts=0 refunded=35
        refund  r2                      -> not_found
        wallet  w1 available=100
    """)


def test_a_refund_has_one_effect_for_each_key():
    check("""
        grant   w1 b1 100
        debit   w1 r1 30
        refund  r1 10 key=k1            -> refunded amounts=10
        refund  r1 10 key=k1            -> refunded amounts=10 replayed
        refund  r1 20 key=k1 digest=x   -> key_reused
        wallet  w1 available=80
    """)


def test_a_refund_into_an_expired_block_lapses():
    check("""
        grant   w1 b1 30 expires=50
        grant   w1 b2 30
        debit   w1 r1 40
        at 60
        refund  r1                      -> refunded amounts=40 balance=30
        block   w1 b1 consumed=0 expired=30 remaining=0
        wallet  w1 available=30
        account breakage = 30
        account revenue = 0
    """)


def test_each_leg_is_refunded_on_its_own():
    check("""
        grant   w1 b1 50
        grant   dev d1 50
        debit   w1|dev r1 30|20
        refund  r1 10|0                 -> refunded amounts=10|0 refunded=10|0
        wallet  w1 available=30
        wallet  dev available=30
        refund  r1                      -> refunded amounts=20|20 refunded=30|20
        wallet  dev available=50
    """)


def test_a_refunded_debt_is_owed_no_more_and_one_that_was_repaid_comes_back():
    case = check("""
        grant     w1 b1 10
        overdraft w1 50
        debit     w1 r1 40              -> committed charged=40+0
        wallet    w1 receivable=30
        refund    r1 10                 -> refunded balance=-20
        wallet    w1 receivable=20
        block     w1 b1 consumed=10
    """)
    check(
        """
        grant     w1 b2 20              -> granted repaid=20
        refund    r1                    -> refunded amounts=30 balance=30
        wallet    w1 receivable=0 available=30
        block     w1 b1 consumed=0
        block     w1 blk_returns_paid granted=20 operator_paid=true
    """,
        case,
    )


def test_nobody_makes_the_operators_money_by_refunding_a_debt_that_a_gift_repaid():
    """What repaid it may have cost its giver nothing, so it does not come back as what was paid for."""
    check("""
        debit     w1 r1 0+500 overage
        wallet    w1 receivable=500
        grant     w1 b1 500 funding=external -> granted repaid=500
        refund    r1                    -> refunded amounts=500 balance=500
        block     w1 blk_returns_unpaid granted=500 operator_paid=false funding=external
        reserve   w1 r2 500 unfunded=line   -> limit_reached available=0 limit=line
        debit     w1 r3 100+400 developer=app
        account   tenant_due = 100
        account   developer_payable:app = 0
    """)


def test_markup_that_went_back_to_a_pool_comes_out_of_it_again():
    check("""
        grant   pool p 100
        grant   w1 g1 40 from=pool funding=developer_grant
        debit   w1 r1 20+10
        wallet  pool available=70
        refund  r1                      -> refunded amounts=30
        wallet  pool available=60
        wallet  w1 available=40
    """)


def test_a_pool_that_has_spent_the_markup_owes_it():
    check("""
        grant   pool p 40
        grant   w1 g1 40 from=pool funding=developer_grant
        debit   w1 r1 20+10
        debit   pool r2 10
        refund  r1                      -> refunded
        wallet  pool available=0 receivable=10
        wallet  w1 available=40
    """)


def test_markup_comes_out_of_the_like_of_what_it_was():
    check("""
        grant   pool u 40 unpaid
        grant   w1 g2 40 from=pool funding=developer_grant
        grant   pool p 40
        grant   w2 g1 40 from=pool funding=developer_grant
        debit   w1 r2 0+20
        debit   w2 r1 0+20
        block   pool blk_returns_unpaid free=20
        block   pool blk_returns_paid free=20
        refund  r1 5                     -> refunded
        block   pool blk_returns_paid free=15
        refund  r2 5                     -> refunded
        block   pool blk_returns_unpaid free=15
    """)


def test_markup_that_was_spent_is_not_the_operators_money_twice():
    """The pool has passed it on, so what its giver lends it instead does not come back as what was paid for."""
    check("""
        grant   pool p 40
        grant   w1 g1 40 from=pool funding=developer_grant
        debit   w1 r1 0+40
        grant   w2 g2 40 from=pool funding=developer_grant
        grant   pool u 30 unpaid funding=external
        refund  r1                      -> refunded amounts=40 balance=40
        wallet  pool available=0 receivable=10
        block   w1 g1 consumed=40
        block   w1 blk_returns_unpaid free=40 operator_paid=false
        block   w2 g2 free=40 operator_paid=true
        reserve w1 r2 1 unfunded=line   -> limit_reached
    """)


def test_markup_that_was_spent_lapses_with_the_block_that_paid_it():
    check("""
        grant   pool p 40
        grant   w1 g1 40 from=pool funding=developer_grant expires=50
        debit   w1 r1 0+40
        debit   pool r2 40
        at 50
        refund  r1                      -> refunded amounts=40 balance=0
        wallet  pool receivable=40
        block   w1 g1 expired=40
    """)


def test_what_was_clawed_back_is_taken_when_it_is_given_back():
    check("""
        grant    w1 b1 50
        debit    w1 r1 40
        clawback w1 b1 50               -> revoked amount=10 owed=40
        refund   r1 30                  -> refunded balance=-10
        block    w1 b1 revoked=40 clawed=10 remaining=0
        wallet   w1 receivable=10
    """)


def test_a_lapsed_charge_that_was_given_back_is_not_charged_again():
    check("""
        grant   w1 b1 50
        reserve w1 r1 40 mark=30 ttl=10 key=k1 request=q1
        at 20
        lapse   r1                      -> expired charged=30+0
        refund  r1                      -> refunded amounts=30 balance=50
        commit  r1 35                   -> reservation_settled
        debit   w1 r1 35 beyond request=q1  -> reservation_settled
        reservation r1 state=expired refunded=30
        wallet  w1 available=50
    """)


def test_a_refund_of_payments_that_are_others_by_now_is_refused():
    case = check("""
        grant   w1 b1 50
        debit   w1 r1 20
    """)
    stale = command("refund r1 5")
    assert isinstance(stale, Refund)
    refused = case.run(stale)
    assert isinstance(refused, Rejected)
    assert refused.reason is Reason.INVALID_AMOUNT
    current = case.complete(stale)
    assert msgspec.structs.replace(current, payments=()) == stale
    assert not isinstance(case.run(current), Rejected)


# Work that was done without asking.


def test_what_nothing_covers_is_owed():
    check("""
        grant     w1 b1 30 priority=1
        grant     w1 b2 30
        debit     w1 r1 80+20 beyond cost=7   -> committed charged=80+20 shortfall=0 balance=-40
        block     w1 b1 consumed=30
        block     w1 b2 consumed=30
        wallet    w1 available=0 receivable=40
        reservation r1 owed=40 payments=w1/b1:24+6,w1/b2:24+6,w1/overdraft:32+8
        account   revenue = 80
        account   meter_shortfall = 0
        reserve   w1 r2 1                     -> receivable_outstanding
        grant     w1 b3 100                   -> granted repaid=40
        wallet    w1 available=60 receivable=0
    """)


def test_it_is_owed_by_a_wallet_that_nobody_knew_and_by_each_legs_first():
    check("""
        grant     dev d1 5
        debit     new,w2|dev,w2 r1 10|20 beyond   -> committed charged=10+0|20+0
        wallet    new receivable=10
        wallet    dev receivable=15 available=0
        reservation r1 owed=10|15
    """)


def test_an_agreed_overdraft_is_used_first_and_a_frozen_wallet_pays_too():
    check("""
        grant     w1 b1 10
        overdraft w1 20
        freeze    w1
        debit     w1 r1 50 beyond       -> committed balance=-40
        wallet    w1 receivable=40
        reservation r1 owed=20
    """)


def test_blocks_that_others_hold_or_that_are_for_others_do_not_pay():
    check("""
        grant     w1 b1 30
        grant     w1 b2 30 app=a2
        reserve   w1 r1 20
        debit     w1 r2 25 beyond app=a1  -> committed
        block     w1 b1 consumed=10 reserved=20
        block     w1 b2 consumed=0
        wallet    w1 receivable=15
    """)


def test_limits_and_the_line_are_drawn_on_as_far_as_they_go():
    check("""
        grant     w1 b1 5
        grant     day l1 20
        grant     line u1 8
        debit     w1 r1 25 beyond limits=day unfunded=line  -> committed charged=25+0
        wallet    day available=0
        wallet    line available=0
        wallet    w1 receivable=20
    """)


def test_it_settles_a_reservation_that_nobody_knew_to_be_there():
    check("""
        grant     w1 b1 30
        reserve   w1 r1 20 key=k1 operation=chat request=q1 mark=5
        debit     w1 r1 50 beyond request=q1 key=k1 operation=chat response -> committed charged=50+0 answers=chat,k1
        wallet    w1 available=0 reserved=0 receivable=20
        reserve   w1 r2 20 key=k1 operation=chat request=q2  -> reserved reservation=r1 replayed
    """)


def test_it_adds_what_is_missing_to_a_reservation_that_has_lapsed():
    check("""
        grant     w1 b1 30
        reserve   w1 r1 20 key=k1 operation=chat request=q1 mark=5 ttl=10
        at 20
        lapse     r1                                          -> expired charged=5+0
        debit     w1 r1 40 beyond request=q1 key=k1 operation=chat -> committed late charged=40+0
        wallet    w1 receivable=10
        key       chat k1 = taken
    """)


def test_it_touches_no_other_requests_reservation_and_none_that_is_settled():
    check("""
        grant     w1 b1 50
        reserve   w1 r1 20 request=q1
        debit     w1 r1 10 beyond request=q2  -> already_exists
        release   r1
        debit     w1 r1 10 beyond request=q1  -> reservation_settled
        debit     w1 r2 10 beyond request=q1
        reserve   w1 r2 10 request=q1         -> already_exists
    """)


def test_a_key_that_served_another_request_charges_nothing():
    check("""
        grant     w1 b1 50
        debit     w1 r1 10 beyond request=q1 key=k1   -> committed
        debit     w1 r2 15 beyond request=q2 key=k1   -> committed reservation=r1 replayed
        wallet    w1 available=40
        refund    r1                                  -> refunded
    """)


def test_repeating_it_is_one_charge():
    check("""
        grant     w1 b1 50
        debit     w1 r1 10 beyond request=q1 id=cmd_a   -> committed
        debit     w1 r1 10 beyond request=q1 id=cmd_a   -> committed replayed
        debit     w1 r1 99 beyond request=q1            -> reservation_settled
        wallet    w1 available=40
    """)


# Overage: work that was asked for, and may be owed.


def test_an_overage_takes_what_there_is_and_owes_the_rest():
    check("""
        grant     w1 b1 30
        overdraft w1 5
        debit     w1 r1 50 overage tells request=q1  -> committed charged=50+0 shortfall=0 balance=-20
        reservation r1 owed=15 payments=w1/b1:30+0,w1/overdraft:20+0
        events    w1 = credit.granted usage.recorded usage.overage
        debit     w1 r2 10 overage tells request=q2  -> committed balance=-30
        reservation r2 owed=10
        debit     new r3 7 overage              -> committed balance=-7
        grant     w1 b2 100                     -> granted repaid=30
    """)


def test_an_overage_that_is_covered_is_a_charge_like_another():
    check("""
        grant     w1 b1 30
        debit     w1 r1 30 overage tells  -> committed balance=0
        reservation r1 payments=w1/b1:30+0
        events    w1 = credit.granted
    """)


def test_an_overage_is_refused_by_a_frozen_wallet_and_by_a_limit():
    check("""
        grant     w1 b1 30
        grant     day l1 40
        debit     w1 r1 41 overage limits=day  -> limit_reached needed=41 available=40
        debit     w1 r1 40 overage limits=day  -> committed balance=-10
        wallet    day available=0
        debit     w1 r2 1 overage limits=day   -> limit_reached needed=1 available=0
        freeze    w1
        debit     w1 r2 1 overage              -> wallet_frozen
        wallet    w1 receivable=10
    """)


def test_an_overage_touches_no_reservation_that_is_there():
    check("""
        grant     w1 b1 30
        reserve   w1 r1 20 request=q1
        debit     w1 r1 10 overage request=q1  -> already_exists
        reservation r1 state=open
    """)


def test_markup_on_credits_that_nobody_paid_for_goes_back_to_its_block_even_when_the_pool_has_spent_it():
    """The pool owes it. The block is where it was: with its expiry, its apps, and the pool behind it."""
    check("""
        grant  pool p1 100 funding=external
        grant  u1 g1 100 from=pool funding=developer_grant
        debit  u1 r1 40+60
        block  pool blk_returns_unpaid granted=60
        grant  u2 g2 60 from=pool funding=developer_grant
        refund r1                   -> refunded balance=100
        block  u1 g1 consumed=0 remaining=100
        wallet u1 blocks_opened=1
        wallet pool receivable=60
    """)
