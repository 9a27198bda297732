"""Setting credits aside: burn order, chains of payers, minimums, limits and the line for what nobody paid."""

from ledger.model import AMOUNT_MAX
from tests.ledger.spec import check


def test_a_reservation_holds_what_others_cannot_have():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60   -> reserved reservation=r1 held=60 expires_at_us=1000000
        reserve w1 r2 50   -> insufficient_credits needed=50 available=40
        reserve w1 r2 40   -> reserved held=40
        wallet  w1 available=0 reserved=100 balance=100
        release r1
        reserve w1 r3 60   -> reserved
    """)


def test_burn_order_is_priority_then_expiry_then_age():
    check("""
        grant w1 never1 10
        grant w1 never2 10
        at 5
        grant w1 late  10 expires=200
        grant w1 soon  10 expires=100
        grant w1 first 10 expires=300 priority=1
        grant w1 last  10 expires=100 priority=-1
        reserve w1 r1 55 -> reserved
        reservation r1 slices=w1/first:10,w1/soon:10,w1/late:10,w1/never1:10,w1/never2:10,w1/last:5
    """)


def test_an_older_block_pays_before_a_newer_one_granted_at_the_same_time():
    check("""
        grant w1 z 10
        grant w1 a 10
        reserve w1 r1 15
        reservation r1 slices=w1/z:10,w1/a:5
    """)


def test_what_is_short_is_taken_down_to_the_minimum():
    check("""
        grant   w1 b1 100
        reserve w1 r1 160..100  -> reserved held=100
        reserve w1 r2 10..0     -> reserved held=0
        reserve w1 r3 10..1     -> insufficient_credits needed=1 available=0
        reserve w1 r4 0         -> reserved held=0
        commit  r4 0            -> committed charged=0+0
    """)


def test_a_first_reservation_opens_the_wallet():
    check("""
        reserve w1 r1 0  -> reserved
        wallet  w1 balance=0 version=0
    """)


def test_what_makes_no_sense_is_refused():
    check(f"""
        grant   w1 b1 100
        reserve w1 r1 -1               -> invalid_amount
        reserve w1 r1 10..11           -> invalid_amount
        reserve w1 r1 10..-1           -> invalid_amount
        reserve w1 r1 {AMOUNT_MAX + 1} -> invalid_amount
        reserve ,  r1 10               -> invalid_amount
        reserve w1 r1 10 ttl=0         -> invalid_amount
        reserve w1 r1 10 ttl=-5        -> invalid_amount
        reserve w1 r1 10 asset=gold    -> asset_mismatch
        wallet  w1 available=100 version=1
    """)


def test_a_mark_that_could_not_be_charged_is_refused_at_once():
    """Otherwise an orphan with a bad mark would be silently free."""
    check(f"""
        grant   w1 b1 100
        reserve w1 r1 10 mark=-1               -> invalid_amount
        reserve w1 r1 10 mark=5|5              -> invalid_amount
        reserve w1 r1 10 mark={AMOUNT_MAX}+1   -> invalid_amount
        reserve w1 r1 10 mark=5;cost:-1        -> invalid_amount
        reserve w1 r1 10 mark=5                -> reserved
        extend  r1 0 mark=-1                   -> invalid_amount
        extend  r1 0 mark=5|5                  -> invalid_amount
        reservation r1 mark=5+0
    """)


# Who may pay.


def test_a_restricted_block_pays_only_what_it_is_for():
    check("""
        grant   w1 app   10 app=a1 priority=1
        grant   w1 model 10 model=m1,m2
        grant   w1 metric 10 metric=chat
        grant   w1 both  10 app=a1 model=m1
        reserve w1 r1 40 app=a1 model=m1 metric=chat  -> reserved
        release r1
        reserve w1 r2 40..0 app=a1                    -> reserved held=10
        reserve w1 r3 40..0 model=m2                  -> reserved held=10
        reserve w1 r4 40..0 app=a2 metric=chat        -> reserved held=10
        reserve w1 r5 1                               -> insufficient_credits needed=1 available=0
    """)


def test_more_is_taken_only_from_blocks_that_are_for_it():
    check("""
        grant   w1 any 10 priority=1
        grant   w1 app 10 app=a1
        reserve w1 r1 10 app=a2
        commit  r1 15       -> committed charged=10+0 shortfall=5
        block   w1 app remaining=10
    """)


def test_a_chain_of_wallets_pays_in_its_order():
    check("""
        grant   w1 b1 30
        grant   w2 c1 100 priority=9
        reserve w1,w2 r1 50   -> reserved held=50
        reservation r1 slices=w1/b1:30,w2/c1:20
        commit  r1 40         -> committed charged=40+0
        wallet  w1 balance=0 reserved=0
        wallet  w2 balance=90 reserved=0
        reserve w3,w2 r2 50   -> reserved held=50
    """)


def test_a_wallet_that_is_named_twice_is_counted_once():
    check("""
        grant   w1 b1 100
        reserve w1,w1 r1 150       -> insufficient_credits needed=150 available=100
        reserve w1,w2,w1 r1 100    -> reserved held=100
        reservation r1 slices=w1/b1:100
        grant   limit l1 100
        release r1
        reserve w1 r2 60 limits=limit,limit -> reserved
        wallet  limit reserved=60
        debit   w1,w1 r3 50        -> insufficient_credits needed=50 available=40
        debit   w1,w1 r3 40        -> committed charged=40+0
    """)


def test_all_credits_of_a_chain_come_before_anybodys_overdraft():
    check("""
        grant   w1 b1 30
        grant   w2 c1 30
        overdraft w1 50
        reserve w1,w2 r1 70
        reservation r1 slices=w1/b1:30,w2/c1:30,w1/overdraft:10
        commit  r1 95           -> committed charged=95+0 shortfall=0 balance=-35
        wallet  w1 receivable=35
        wallet  w2 balance=0
        debit   w1,w2 r2 20     -> insufficient_credits needed=20 available=15
    """)


def test_a_wallet_that_is_frozen_or_owes_is_passed_over_in_a_chain():
    check("""
        grant   w1 b1 100
        grant   w2 c1 50
        freeze  w1
        reserve w1,w2 r1 50    -> reserved
        reservation r1 slices=w2/c1:50
        reserve w1,w2 r2 1     -> wallet_frozen needed=1 available=0
        unfreeze w1
        debit   w1 r3 100
        clawback w1 b1 100
        reserve w1,w2 r2 1     -> receivable_outstanding needed=1 available=0
        release r1
        reserve w1,w2 r2 1     -> reserved
    """)


def test_a_second_leg_holds_for_itself():
    check("""
        grant   w1 b1 100
        grant   dev d1 50
        reserve w1|dev r1 60|51     -> insufficient_credits needed=51 available=50
        wallet  w1 reserved=0
        reserve w1|dev r1 60|70..20 -> reserved held=60|50
        extend  r1 10               -> reserved held=70|50
        commit  r1 40+5|30          -> committed charged=40+5|30+0
        wallet  w1 balance=55 reserved=0
        wallet  dev balance=20 reserved=0
    """)


def test_two_legs_of_one_wallet_do_not_hold_the_same_credits():
    check("""
        grant   w1 b1 100
        reserve w1|w1 r1 60|60  -> insufficient_credits needed=60 available=40
        reserve w1|w1 r1 60|40  -> reserved held=60|40
        commit  r1 50|50        -> committed charged=50+0|50+0 shortfall=0
        debit   w1|w1 r2 0|1    -> insufficient_credits needed=1 available=0
    """)


def test_two_legs_do_not_hold_the_same_overdraft():
    check("""
        overdraft w1 50
        reserve w1|w1 r1 30|30  -> insufficient_credits needed=30 available=20
        reserve w1|w1 r1 30|20  -> reserved held=30|20
    """)


def test_a_receivable_within_the_overdraft_is_no_obstacle():
    check("""
        grant   w1 b1 50
        debit   w1 r1 50
        grant   w1 b2 30
        overdraft w1 50
        clawback w1 b1 50        -> revoked owed=50
        reserve w1 r2 31         -> insufficient_credits needed=31 available=30
        reserve w1 r2 30         -> reserved
        overdraft w1 49
        reserve w1 r3 0..0       -> reserved held=0
        reserve w1 r4 1          -> receivable_outstanding needed=1 available=0
    """)


# Limits.


def test_a_limit_must_afford_what_the_first_leg_holds():
    check("""
        grant   w1 b1 100
        grant   day l1 50
        grant   month l2 80
        reserve w1 r1 60 limits=day,month      -> limit_reached needed=60 available=50
        wallet  month reserved=0
        reserve w1 r1 60..20 limits=day,month  -> reserved held=50
        wallet  day reserved=50
        wallet  month reserved=50
        reserve w1 r2 10 limits=month          -> reserved
        reserve w1 r3 10 limits=day,month      -> limit_reached needed=10 available=0
        reserve w1 r3 10 limits=nobody         -> limit_reached needed=10 available=0
        reserve w1 r3 10                       -> reserved
        commit  r1 30                          -> committed
        wallet  day balance=20 reserved=0
        wallet  month balance=50 reserved=10
        account limit = 60
    """)


def test_an_extension_draws_on_the_limits_too():
    check("""
        grant   w1 b1 100
        grant   day l1 50
        reserve w1 r1 30 limits=day    -> reserved
        extend  r1 30                  -> limit_reached needed=30 available=20
        extend  r1 30..10              -> reserved held=50
        release r1
        wallet  day available=50 reserved=0
    """)


def test_a_limit_bounds_the_payer_and_not_the_developer():
    check("""
        grant   w1 b1 100
        grant   dev d1 100
        grant   day l1 50
        reserve w1|dev r1 50|100 limits=day  -> reserved held=50|100
        commit  r1 50|100                    -> committed
        wallet  day balance=0
    """)


def test_work_that_is_done_is_not_refused_for_a_limit():
    check("""
        grant   w1 b1 100
        grant   day l1 50
        reserve w1 r1 40 limits=day
        commit  r1 70        -> committed charged=70+0 shortfall=0
        wallet  day balance=0
    """)


def test_a_limit_holds_what_its_own_period_paid_for():
    """The hold was made under the first period's block; that one is drawn on, though it has run out."""
    check("""
        grant   w1 b1 100
        grant   day mon 50 expires=100
        reserve w1 r1 40 limits=day
        at 100
        expire  day
        grant   day tue 50
        commit  r1 40
        block   day mon consumed=40 expired=10
        block   day tue remaining=50
    """)


# The line for credits that the operator was not paid for.


def test_the_line_bounds_what_is_held_of_credits_that_nobody_paid_the_operator():
    check("""
        grant   w1 paid 20
        grant   w1 ext 100 funding=external
        grant   line l1 50
        reserve w1 r1 100 unfunded=line      -> limit_reached needed=100 available=70
        reserve w1 r1 100..30 unfunded=line  -> reserved held=70
        wallet  line reserved=50
        reserve w1 r2 1 unfunded=line        -> limit_reached needed=1 available=0
        reserve w1 r2 1                      -> reserved
        release r2
        commit  r1 30+10                     -> committed
        reservation r1 payments=w1/paid:15+5,w1/ext:15+5
        wallet  line balance=35 reserved=0   # base cost alone is burnt
        account revenue = 15
        account tenant_due = 15
    """)


def test_a_line_that_is_not_there_affords_nothing():
    check("""
        grant   w1 ext 100 funding=external
        reserve w1 r1 1 unfunded=line        -> limit_reached needed=1 available=0
        reserve w1 r1 1..0 unfunded=line     -> reserved held=0
    """)


def test_an_overdraft_is_credit_that_the_operator_was_not_paid_for():
    check("""
        overdraft w1 100
        grant   line l1 30
        reserve w1 r1 50 unfunded=line      -> limit_reached needed=50 available=30
        reserve w1 r1 50..1 unfunded=line   -> reserved held=30
        commit  r1 20+10                    -> committed
        wallet  line balance=10 reserved=0
        account revenue = 20
    """)


def test_the_line_bounds_the_second_leg_as_well():
    check("""
        grant   w1 ext 30 funding=external
        grant   dev d1 30 funding=external
        grant   line l1 50
        reserve w1|dev r1 30|30 unfunded=line      -> limit_reached needed=30 available=20
        reserve w1|dev r1 30|30..10 unfunded=line  -> reserved held=30|20
        commit  r1 30|30                           -> committed
        wallet  line balance=0
    """)


def test_limits_and_lines_are_in_the_payers_asset():
    check("""
        grant   w1 b1 100
        grant   day l1 100 asset=gold
        reserve w1 r1 10 limits=day     -> asset_mismatch
        reserve w1 r1 10 unfunded=day   -> asset_mismatch
        reserve w1|day r1 10|10..0      -> asset_mismatch
        reserve w1,day r1 10            -> asset_mismatch
        debit   w1 r1 10 limits=day     -> asset_mismatch
    """)


# Extending, and time.


def test_an_extension_holds_more_and_lives_longer():
    check("""
        grant   w1 b1 50
        grant   w1 b2 50
        reserve w1 r1 30 ttl=100
        extend  r1 40               -> reserved held=70 expires_at_us=100
        reservation r1 slices=w1/b1:50,w1/b2:20
        extend  r1 40               -> insufficient_credits needed=40 available=30
        extend  r1 40..5 ttl=300    -> reserved held=100 expires_at_us=300
        at 50
        heartbeat r1 ttl=100        -> reserved expires_at_us=300
        heartbeat r1 ttl=500        -> reserved expires_at_us=550
        reservation r1 slices=w1/b1:50,w1/b2:50
    """)


def test_what_was_pinned_first_is_used_first():
    """Lapse order is collection order: an extension does not reorder what is held already."""
    check("""
        grant   w1 old 50
        reserve w1 r1 30
        grant   w1 new 20 priority=1
        extend  r1 30
        reservation r1 slices=w1/old:40,w1/new:20
        commit  r1 45
        reservation r1 payments=w1/old:40+0,w1/new:5+0
    """)


def test_a_reservation_remembers_the_most_that_it_held():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60
        reservation r1 reserved=60
        commit  r1 50 partial
        extend  r1 20
        reservation r1 reserved=60 held=30
        extend  r1 20..0
        extend  r1 100..0
        reservation r1 reserved=60 held=50
        commit  r1 50
        reservation r1 reserved=60 balance=0
    """)


def test_a_wallets_last_fact_is_never_earlier_than_the_one_before():
    check("""
        at 50
        grant   w1 b1 100
        at 40
        grant   w1 b2 100
        wallet  w1 last_fact_us=50
        at 60
        grant   w1 b3 100
        wallet  w1 last_fact_us=60
    """)


def test_a_heartbeat_touches_no_wallet():
    check("""
        grant   w1 b1 50
        reserve w1 r1 30
        wallet  w1 version=2
        heartbeat r1 ttl=2000000 mark=7
        wallet  w1 version=2
        reservation r1 mark=7+0
        heartbeat r1
        reservation r1 mark=7+0
    """)


def test_no_reservation_outlives_a_day():
    check("""
        grant   w1 b1 50
        reserve w1 r1 30 ttl=25h    -> reserved expires_at_us=86400000000
        reserve w1 r2 10 ttl=1h     -> reserved expires_at_us=3600000000
        at 1h
        heartbeat r2 ttl=24h        -> reserved expires_at_us=86400000000
    """)


def test_extending_what_cannot_be_extended():
    check(f"""
        grant   w1 b1 50
        extend  r1 1                 -> not_found
        reserve w1 r1 10
        extend  r1 -1                -> invalid_amount
        extend  r1 5..6              -> invalid_amount
        extend  r1 {AMOUNT_MAX + 1}  -> invalid_amount
        commit  r1 10
        extend  r1 1                 -> reservation_settled state=committed
        heartbeat r1                 -> reservation_settled state=committed
    """)


def test_a_second_reservation_of_one_id_is_the_first():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 request=q1  -> reserved held=60
        reserve w1 r1 60 request=q1  -> reserved replayed held=60
        wallet  w1 reserved=60
        reserve w1 r1 60 request=q2  -> already_exists state=open
        commit  r1 60
        reserve w1 r1 60 request=q1  -> already_exists state=committed
        debit   w1 r1 10             -> already_exists state=committed
    """)
