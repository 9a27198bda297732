"""Spend limits that are filled anew each period, by the command that reserves under them."""

import pytest

from ledger.core import decide
from ledger.model import Account, Funding
from ledger.outcomes import Applied, Reason, Rejected, WalletOpened
from tests.ledger.spec import Case, check, command, wallet_ref


def test_the_first_command_of_a_period_fills_the_limit():
    check("""
        grant   w1 b1 1000
        at 10
        reserve w1 r1 60 limits=day:100:0..50:50..90  -> reserved held=60
        block   day day_0 granted=100 reserved=60 funding=limit effective_at_us=0 expires_at_us=50
        account limit = -100
        debit   w1 r2 40 limits=day:100:0..50:50..90  -> committed
        debit   w1 r3 1 limits=day:100:0..50:50..90   -> limit_reached needed=1 available=0 limit=day
        commit  r1 50                                 -> committed
        block   day day_0 consumed=90 remaining=10
        account limit = -10
        events  day =
    """)


def test_a_period_ends_where_the_next_begins():
    case = check("""
        grant   w1 b1 1000
        at 49
        debit   w1 r1 100 limits=day:100:0..50:50..90
        debit   w1 r2 1 limits=day:100:0..50:50..90    -> limit_reached
        at 50
        debit   w1 r3 70 limits=day:100:0..50:50..90   -> committed
        block   day day_50 granted=100 consumed=70
        wallet  day available=30 blocks_opened=2
    """)
    assert set(case.state.blocks[wallet_ref("day")]) == {"day_0", "day_50"}


def test_the_clock_of_the_batch_says_which_period_it_is():
    """Who asks thinks that the next period has begun, or not yet: both are named, and the ledger knows."""
    check("""
        grant   w1 b1 1000
        at 49
        debit   w1 r1 10 limits=day:100:0..50:50..90
        block   day day_0 consumed=10
        at 50
        debit   w1 r2 10 limits=day:100:0..50:50..90
        block   day day_50 consumed=10
    """)


def test_no_period_is_nothing_to_spend():
    check("""
        grant   w1 b1 1000
        at 95
        reserve w1 r1 1 limits=day:100:0..50:50..90  -> limit_reached needed=1 available=0 limit=day
        reserve w1 r1 9..0 limits=day:100:0..50:50..90  -> reserved held=0
        debit   w1 r2 5 beyond limits=day:100:0..50   -> committed charged=5+0 shortfall=0
    """)


def test_a_limit_without_an_end_is_filled_once():
    check("""
        grant   w1 b1 1000
        debit   w1 r1 60 limits=ever:100:0..  -> committed
        at 24h
        debit   w1 r2 60 limits=ever:100:0..  -> limit_reached needed=60 available=40
    """)


def test_a_refused_hold_leaves_no_trace():
    case = check("""
        grant   w1 b1 50
        reserve w1 r1 60 limits=day:100:0..50   -> insufficient_credits needed=60 available=50
        reserve w1 r1 40 limits=day:30:0..50    -> limit_reached needed=40 available=30 limit=day
    """)
    assert wallet_ref("day") not in case.state.wallets
    assert not any(isinstance(fact, WalletOpened) and fact.wallet.ref == wallet_ref("day") for fact in case.facts)


def test_all_limits_must_afford_it_and_the_tightest_is_told():
    check("""
        grant   w1 b1 1000
        reserve w1 r1 60 limits=day:50:0..50,month:80:0..90      -> limit_reached needed=60 available=50 limit=day
        reserve w1 r1 90 limits=month:80:0..90,day:95:0..50      -> limit_reached needed=90 available=80 limit=month
        reserve w1 r1 60..20 limits=day:50:0..50,month:80:0..90  -> reserved held=50
        reserve w1 r2 1 limits=month:80:0..90                    -> reserved
        reserve w1 r3 1 limits=day:50:0..50,month:80:0..90       -> limit_reached limit=day
    """)


def test_the_line_is_told_where_no_limit_is_short():
    check("""
        grant   w1 b1 1000 unpaid
        grant   line l1 10
        reserve w1 r1 60 limits=day:100:0..50 unfunded=line  -> limit_reached needed=60 available=10 limit=line
    """)


def test_an_extension_after_the_periods_end_draws_on_the_next():
    check("""
        grant   w1 b1 1000
        at 40
        reserve w1 r1 80 limits=day:100:0..50:50..90
        at 60
        extend  r1 30                                 -> limit_reached needed=30 available=0 limit=day
        extend  r1 30 limits=day:100:0..50:50..90     -> reserved held=110
        block   day day_0 reserved=80
        block   day day_50 reserved=30
        extend  r1 80..10 limits=day:100:0..50:50..90 -> reserved held=180
        commit  r1 100                                -> committed
        block   day day_0 consumed=80
        block   day day_50 consumed=20 reserved=0
    """)


def test_an_extension_opens_no_limit_that_its_reservation_has_not():
    case = check("""
        grant   w1 b1 1000
        reserve w1 r1 10
        extend  r1 10 limits=day:5:0..50  -> reserved held=20
    """)
    assert wallet_ref("day") not in case.state.wallets


def test_what_was_not_spent_goes_back_to_where_it_came_from():
    """A limit is no credit: nobody is told that it expired, and it is no breakage."""
    check("""
        grant   w1 b1 1000
        reserve w1 r1 60 limits=day:100:0..50
        at 50
        expire  day           -> expired amount=40
        release r1
        expire  day           -> expired amount=60
        account limit = 0
        account breakage = 0
        events  day =
    """)


def test_work_that_was_done_without_asking_draws_as_far_as_it_goes():
    check("""
        grant   w1 b1 1000
        debit   w1 r1 150 beyond limits=day:100:0..50  -> committed charged=150+0
        block   day day_0 consumed=100 live=false
        debit   w1 r2 1 limits=day:100:0..50           -> limit_reached
    """)


# Thresholds.


def test_each_threshold_is_told_once_a_period():
    case = check("""
        grant   w1 b1 1000
        debit   w1 r1 79 limits=day:100:0..50:50..90 thresholds=8000,10000
        events  day =
        debit   w1 r2 1 limits=day:100:0..50:50..90 thresholds=8000,10000
        events  day = budget.threshold
        debit   w1 r3 10 limits=day:100:0..50:50..90 thresholds=8000,10000
        events  day = budget.threshold
        debit   w1 r4 10 limits=day:100:0..50:50..90 thresholds=8000,10000
        events  day = budget.threshold budget.threshold
        at 50
        debit   w1 r5 100 limits=day:100:0..50:50..90 thresholds=8000,10000
        events  day = budget.threshold budget.threshold budget.threshold budget.threshold
    """)
    told = [event.body for event in case.events if event.type == "budget.threshold"]
    assert [(body["block"]["id"], body["threshold_bps"], body["block"]["consumed"]) for body in told] == [
        ("day_0", 8000, 80),
        ("day_0", 10000, 100),
        ("day_50", 8000, 100),
        ("day_50", 10000, 100),
    ]


def test_what_is_only_reserved_reaches_no_threshold():
    check("""
        grant   w1 b1 1000
        reserve w1 r1 90 limits=day:100:0..50 thresholds=8000
        release r1
        events  day =
        reserve w1 r2 90 limits=day:100:0..50 thresholds=8000
        commit  r2 80
        events  day = budget.threshold
    """)


# Changing the amount.


def test_the_amount_of_a_running_period_is_changed():
    check("""
        grant   w1 b1 1000
        debit   w1 r1 40 limits=day:100:0..50
        reserve w1 r2 20 limits=day:100:0..50
        limit   day:150:0..50   -> changed
        block   day day_0 granted=150 consumed=40 reserved=20
        account limit = -110
        limit   day:80:0..50    -> changed
        block   day day_0 granted=80 free=20
        limit   day:10:0..50    -> changed
        block   day day_0 granted=60 free=0
        reserve w1 r3 1 limits=day:10:0..50  -> limit_reached
        release r2
        limit   day:10:0..50    -> changed
        block   day day_0 granted=40 remaining=0
    """)


def test_a_period_that_nobody_has_drawn_on_is_opened_with_its_new_amount():
    """So that who still has the old amount in mind does not open it with that."""
    check("""
        grant   w1 b1 1000
        limit   day:70:0..50:50..90           -> changed
        debit   w1 r1 71 limits=day:100:0..50 -> limit_reached needed=71 available=70
        at 90
        limit   day:70:0..50:50..90           -> not_found
    """)


def test_a_period_that_is_about_to_begin_has_the_new_amount_too():
    """Who still has the old one in mind may be the first to draw on it, and it would stand for all of the period."""
    check("""
        grant   w1 b1 1000
        at 40
        debit   w1 r1 50 limits=day:100:0..50:50..90
        limit   day:70:0..50:50..90            -> changed
        block   day day_50 granted=70 effective_at_us=50
        wallet  day available=20
        limit   day:60:0..50:50..90            -> changed
        account limit = -70
        at 50
        debit   w1 r2 61 limits=day:100:0..50:50..90  -> limit_reached needed=61 available=60
        limit   day:80:0..50:50..90            -> changed
        block   day day_0 granted=60
        block   day day_50 granted=80
    """)


def test_a_lower_amount_may_reach_a_threshold():
    check("""
        grant   w1 b1 1000
        debit   w1 r1 50 limits=day:100:0..50 thresholds=8000
        limit   day:60:0..50
        events  day = budget.threshold
        limit   day:60:0..50
        events  day = budget.threshold
    """)


@pytest.mark.parametrize("words", ["day:-1:0..50", "day:100:50..50", "day:100:60..50"])
def test_amounts_and_periods_make_sense(words: str):
    check(f"""
        grant   w1 b1 1000
        reserve w1 r1 1
        limit   {words}              -> invalid_amount
        reserve w1 r2 1 limits={words} -> invalid_amount
        debit   w1 r2 1 limits={words} -> invalid_amount
        extend  r1 1 limits={words}  -> invalid_amount
    """)


def test_a_limit_is_in_the_payers_asset():
    check("""
        grant   w1 b1 1000
        limit   day:100:0..50 asset=gold
        reserve w1 r1 1 limits=day:100:0..50  -> asset_mismatch
        limit   day:100:0..50                 -> asset_mismatch
    """)


def test_nobody_grants_what_is_a_limits():
    case = Case()
    refused = case.run(command("grant day b1 100 funding=limit"))
    assert refused == Rejected(Reason.NOT_FOUND)


def test_a_limits_credits_are_booked_from_its_account_in_its_scope():
    case = check("grant w1 b1 10")
    outcome = decide(case.state, command("reserve w1 r1 5 limits=day:100:0..50"), 0)
    assert isinstance(outcome, Applied)
    (filled,) = [fact for fact in outcome.facts if getattr(fact, "debit", None) == Account.LIMIT]
    assert (filled.credit, filled.amount, filled.block, filled.reference) == ("wallet:day", 100, "day_0", "r1")
    assert case.state.wallets.keys() == {wallet_ref("w1")}
    assert Funding.LIMIT == "limit"


def test_an_overage_is_owed_within_the_limit_alone():
    check("""
        grant   w1 b1 10
        debit   w1 r1 60 overage limits=day:50:0..90  -> limit_reached needed=60 available=50 limit=day
        debit   w1 r1 40 overage limits=day:50:0..90  -> committed
        block   day day_0 consumed=40
        wallet  w1 receivable=30
    """)
