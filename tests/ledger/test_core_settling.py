"""What a reservation comes to: less, more, in parts, released, lapsed, late; and who is paid."""

from ledger.model import AMOUNT_MAX, Settlement
from ledger.outcomes import Transfer, UsageRecorded
from tests.ledger.spec import SCOPE, check


def test_commit_frees_the_rest():
    check("""
        grant   w1 b1 100            -> granted
        reserve w1 r1  60            -> reserved
        reserve w1 r2  50            -> insufficient_credits
        commit  r1 45                -> committed charged=45+0 shortfall=0 balance=55
        commit  r1 45                -> reservation_settled
        wallet  w1 available=55 reserved=0
        account revenue = 45
        account wallet:w1 = 55
    """)


def test_committing_less_uses_up_in_burn_order_and_releases_the_tail():
    check("""
        grant   w1 b1 30 priority=2
        grant   w1 b2 30 priority=1
        grant   w1 b3 30
        reserve w1 r1 80
        commit  r1 45         -> committed
        block   w1 b1 consumed=30 reserved=0
        block   w1 b2 consumed=15 reserved=0
        block   w1 b3 consumed=0 reserved=0
    """)


def test_committing_nothing_is_a_charge_of_zero():
    check("""
        grant   w1 b1 30
        reserve w1 r1 20 key=k1
        commit  r1 0 request=q1 units=input:0  -> committed charged=0+0 shortfall=0
        wallet  w1 available=30 reserved=0
        key     reserve k1 = taken
        account revenue = 0
        events  w1 = credit.granted usage.recorded
    """)


def test_committing_more_draws_own_slices_then_free_blocks_then_the_overdraft_then_is_our_loss():
    check("""
        grant   w1 b1 50
        grant   w1 b2 50
        overdraft w1 30
        reserve w1 r1 40
        reserve w1 r2 20
        commit  r1 130+20     -> committed charged=95+15 shortfall=40 balance=-10
        block   w1 b1 consumed=40 reserved=10   # r2's ten of b1 are not touched
        block   w1 b2 consumed=40 reserved=10
        wallet  w1 receivable=30 reserved=20
        account meter_shortfall = -40
        account revenue = 135
        account tenant_margin = 15
        commit  r2 20         -> committed charged=20+0
    """)


def test_an_overdraft_is_held_before_it_is_used():
    check("""
        grant   w1 b1 50
        overdraft w1 30
        reserve w1 r1 70      -> reserved held=70
        reservation r1 slices=w1/b1:50,w1/overdraft:20
        wallet  w1 overdraft_reserved=20 receivable=0
        reserve w1 r2 11      -> insufficient_credits needed=11 available=10
        commit  r1 60         -> committed balance=-10
        wallet  w1 overdraft_reserved=0 receivable=10
        reserve w1 r2 20      -> reserved
        release r2
        wallet  w1 overdraft_reserved=0 receivable=10
    """)


def test_without_an_agreed_overdraft_the_balance_never_goes_negative():
    check("""
        grant   w1 b1 50
        reserve w1 r1 50
        commit  r1 80        -> committed charged=50+0 shortfall=30 balance=0
        reserve w1 r2 0      -> reserved
        commit  r2 5         -> committed charged=0+0 shortfall=5 balance=0
        account meter_shortfall = -35
        account revenue = 85
        wallet  w1 receivable=0
    """)


def test_what_one_leg_does_not_need_serves_the_other_before_we_bear_a_loss():
    check("""
        grant   dev d1 100
        reserve dev|dev r1 60|40
        commit  r1 50|50        -> committed charged=50+0|50+0 shortfall=0
        wallet  dev balance=0
    """)


def test_a_loss_on_the_second_leg_is_booked_though_its_wallet_is_missing():
    check("""
        grant   w1 b1 100
        reserve w1|dev r1 50|10..0
        commit  r1 50|10       -> committed charged=50+0|0+0 shortfall=10
        account meter_shortfall = -10
        account revenue = 60
    """)


def test_what_makes_no_sense_is_refused():
    check(f"""
        grant   w1 b1 100
        commit  r1 10               -> not_found
        reserve w1 r1 60
        commit  r1 -1               -> invalid_amount
        commit  r1 5+-1             -> invalid_amount
        commit  r1 5|5              -> invalid_amount
        commit  r1 {AMOUNT_MAX}+1   -> invalid_amount
        commit  r1 5 cost=-1        -> invalid_amount
        commit  r1 {AMOUNT_MAX} partial  -> open
        commit  r1 1                -> invalid_amount
        commit  r1 0                -> committed
        debit   w1 r2 -1            -> invalid_amount
        debit   w1 r2 5|5 hold=5    -> invalid_amount
        debit   w1 r1 -1            -> invalid_amount
    """)


# Expiry while reserved.


def test_a_block_that_expires_while_reserved_still_pays_for_that_reservation():
    check("""
        grant   w1 b1 100 expires=50
        grant   w1 b2 100
        reserve w1 r1 60
        at 50
        expire  w1               -> expired amount=40
        commit  r1 70            -> committed charged=70+0
        block   w1 b1 consumed=60 expired=40
        block   w1 b2 consumed=10
    """)


def test_more_is_never_taken_from_the_free_part_of_an_expired_block():
    check("""
        grant   w1 b1 100 expires=50
        reserve w1 r1 60
        at 50
        commit  r1 70            -> committed charged=60+0 shortfall=10
        expire  w1               -> expired amount=40
    """)


def test_a_released_slice_of_an_expired_block_lapses():
    check("""
        grant   w1 b1 100 expires=50
        reserve w1 r1 60
        at 50
        expire  w1               -> expired amount=40
        commit  r1 45            -> committed balance=0
        wallet  w1 balance=0 available=0
        reserve w1 r2 1          -> insufficient_credits needed=1 available=0
        expire  w1               -> expired amount=15
        account breakage = 55
    """)


# Partial commits.


def test_partial_commits_charge_and_keep_the_rest_held():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60
        commit  r1 20+2 partial    -> open charged=20+2
        wallet  w1 reserved=38 balance=78
        commit  r1 10+1 partial    -> open charged=30+3
        commit  r1 5               -> committed charged=35+3
        reservation r1 commits=3 payments=w1/b1:35+3
        wallet  w1 reserved=0 balance=62
    """)


def test_many_partial_commits_leave_a_short_list_of_payments():
    """Each change of a reservation is written whole: a list that grows with every commit would be quadratic."""
    table = "grant w1 b1 1000\nreserve w1 r1 100\n" + "commit r1 1 partial\n" * 50
    case = check(table)
    (reservation,) = case.state.reservations.values()
    assert len(reservation.payments) == 1
    assert reservation.charged[0].base == 50


def test_a_release_after_a_partial_commit_keeps_what_was_charged():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 key=k1
        commit  r1 20 partial
        release r1                 -> released charged=20+0 balance=80
        key     reserve k1 = taken
        wallet  w1 reserved=0
    """)


def test_a_partial_commit_answers_for_the_mark():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 mark=30 ttl=50
        commit  r1 20 partial
        at 50
        lapse   r1                 -> expired charged=20+0
    """)


# Releasing and lapsing.


def test_a_release_gives_everything_back():
    check("""
        grant   w1 b1 100
        release r1                 -> not_found
        reserve w1 r1 60
        release r1                 -> released charged=0+0 balance=100
        release r1                 -> released replayed
        commit  r1 10              -> reservation_settled state=released
        wallet  w1 available=100 reserved=0
        commit  r9 1               -> not_found
    """)


def test_a_reservation_lapses_when_its_time_is_over_and_not_before():
    check("""
        grant   w1 b1 100
        lapse   r1                 -> not_found
        reserve w1 r1 60 ttl=50 request=q1
        at 49
        lapse   r1                 -> changed
        wallet  w1 reserved=60
        at 50
        lapse   r1                 -> expired charged=0+0
        wallet  w1 reserved=0 available=100
        lapse   r1                 -> changed
        release r1                 -> reservation_settled state=expired
        extend  r1 5               -> reservation_settled state=expired
        events  w1 = credit.granted reservation.expired
    """)


def test_a_reservation_whose_time_is_over_may_still_be_settled_until_it_is_swept():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 ttl=50
        at 60
        commit  r1 60             -> committed
    """)


def test_an_orphan_is_charged_for_its_last_mark():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 ttl=50 mark=10+1
        extend  r1 20 mark=35+4;cost:9;output:20
        at 50
        lapse   r1                -> expired charged=35+4 balance=61
        reservation r1 mark=35+4 held=0
        account provider_cost USD = -9
        events  w1 = credit.granted usage.recorded reservation.expired
    """)


# Late commits.


def test_a_late_commit_debits_what_is_missing():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 ttl=50 mark=30+3
        at 60
        lapse   r1                -> expired charged=30+3
        commit  r1 50+5           -> committed late charged=50+5 balance=45
        commit  r1 50+5           -> reservation_settled state=committed
    """)


def test_a_late_commit_gives_nothing_back():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 ttl=50 mark=30+3
        at 60
        lapse   r1
        commit  r1 10+1           -> committed late charged=30+3 balance=67
    """)


def test_a_late_commit_after_a_lapse_for_nothing_charges_all():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 ttl=50
        at 60
        lapse   r1
        commit  r1 50 partial    -> committed late charged=50+0
    """)


def test_a_late_commit_draws_on_limits_only_for_what_is_missing():
    check("""
        grant   w1 b1 100
        grant   day l1 100
        reserve w1 r1 60 ttl=50 mark=30 limits=day
        at 60
        lapse   r1
        wallet  day balance=70
        commit  r1 50            -> committed late
        wallet  day balance=50
    """)


def test_a_late_commit_knows_each_legs_written_off_part():
    """The developer's wallet was dry: that is our loss, neither the user's discount nor charged again."""
    check("""
        grant   w1 b1 100
        reserve w1|dev r1 60|50..0 ttl=50 mark=10|50
        at 60
        lapse   r1               -> expired charged=10+0|0+0 shortfall=50
        grant   dev d1 200
        commit  r1 60|70         -> committed late charged=60+0|20+0 shortfall=50
        wallet  w1 balance=40
        wallet  dev balance=180
        account revenue = 130
        account meter_shortfall = -50
    """)


def test_a_late_commit_after_partial_ones_compares_with_the_lapse_alone():
    check("""
        grant   w1 b1 200
        reserve w1 r1 100 ttl=50
        commit  r1 30 partial
        extend  r1 0 mark=20
        at 60
        lapse   r1             -> expired charged=50+0
        commit  r1 40          -> committed late charged=70+0
    """)


def test_the_usage_rows_of_a_late_commit_add_up_to_the_usage():
    case = check("""
        grant   w1 b1 200
        reserve w1 r1 100 ttl=50 mark=20;cost:11;input:5;output:7
        at 60
        lapse   r1
        commit  r1 50 cost=30 units=input:5,output:12,reasoning:3  -> committed late
        account provider_cost USD = -30
    """)
    rows = [fact for fact in case.facts if isinstance(fact, UsageRecorded)]
    assert [row.part for row in rows] == [1, 2]
    assert [row.record.units for row in rows] == [{"input": 5, "output": 7}, {"output": 5, "reasoning": 3}]
    assert [row.charges[0].base for row in rows] == [20, 30]
    assert [row.record.provider_cost_nanos for row in rows] == [11, 19]


# Who is paid.


def test_base_and_markup_of_each_kind_of_credits():
    check("""
        grant   pool p1 10
        grant   u1 dg 10 from=pool funding=developer_grant priority=9
        grant   u1 paid 10 priority=8
        grant   u1 ext 10 funding=external priority=7
        grant   u1 promo 10 funding=promotional priority=6
        grant   u1 plan 10 funding=plan unpaid priority=5
        overdraft u1 10
        reserve u1 r1 60 developer=dev
        commit  r1 48+12        -> committed charged=48+12
        reservation r1 payments=u1/dg:8+2,u1/paid:8+2,u1/ext:8+2,u1/promo:8+2,u1/plan:8+2,u1/overdraft:8+2
        account revenue = 32                # dg, paid, promo and the overdraft
        account tenant_due = 16             # ext and plan: the operator was not paid for them
        account developer_payable:dev = 2   # paid
        account tenant_margin = 8           # ext, promo, plan and the overdraft
        wallet  pool balance=2              # dg
        block   pool blk_returns_paid granted=2
    """)


def test_markup_of_credits_that_nobody_paid_the_operator_for_is_not_paid_out():
    check("""
        grant   pool p1 10 funding=external
        grant   u1 g1 10 from=pool
        debit   u1 r1 8+2 developer=dev
        account tenant_due = 8
        account tenant_margin = 2
        account developer_payable:dev = 0
    """)


def test_markup_without_a_developer_is_the_tenants_own():
    check("""
        grant   w1 b1 10
        debit   w1 r1 8+2
        account tenant_margin = 2
    """)


def test_markup_is_shared_pro_rata_and_adds_up_exactly():
    check("""
        grant   w1 b1 1
        grant   w1 b2 1
        grant   w1 b3 1
        debit   w1 r1 2+1   -> committed
        reservation r1 payments=w1/b1:0+1,w1/b2:1+0,w1/b3:1+0
        account revenue = 2
        account tenant_margin = 1
    """)


def test_markup_of_a_grant_from_unpaid_credits_returns_as_unpaid():
    check("""
        grant   pool p1 10 funding=external
        grant   u1 g1 10 from=pool funding=developer_grant
        debit   u1 r1 5+1
        debit   u1 r2 3+1
        block   pool blk_returns_unpaid granted=2 operator_paid=false funding=external
        wallet  pool balance=2 blocks_opened=2
        grant   u1 g2 2 from=pool funding=developer_grant
        debit   u1 r3 1+1
        block   pool blk_returns_unpaid granted=3 remaining=1
        account tenant_due = 9
    """)


def test_markup_returns_into_a_pool_that_pays_itself():
    """The pool is in the chain of its own grants: nothing is lost, and nothing doubled."""
    check("""
        grant   pool p1 100
        grant   u1 g1 50 from=pool funding=developer_grant
        reserve u1,pool r1 80
        commit  r1 60+40   -> committed charged=60+40 shortfall=0
        wallet  pool balance=20
        account revenue = 60
        account tenant_margin = 20
    """)


def test_what_a_charge_returns_to_a_pool_does_not_pay_for_the_same_charge():
    check("""
        grant   pool p1 40
        grant   u1 g1 40 from=pool funding=developer_grant
        debit   u1,pool|u1,pool r1 20+20|20 hold=0|0  -> committed charged=20+20|0+0 shortfall=20
        debit   u1,pool|u1,pool r2 10|15 hold=0|0     -> committed charged=10+0|10+0 shortfall=5
    """)


def test_the_operators_wallet_pays_in_its_own_scope():
    """A universal wallet in a tenant's chain: each wallet's entries stand in its own scope, and each balances."""
    case = check("""
        grant   u1@t1 b1 30
        grant   uni@op c1 100
        reserve u1@t1,uni@op r1@t1 80 developer=dev
        commit  r1@t1 80+20 request=q1 cost=5   -> committed charged=80+20 balance=0
        account revenue = 24
        account revenue@op = 56
        account developer_payable:dev = 6
        account developer_payable:dev@op = 14
        account wallet:uni@op = 30
        account provider_cost USD = -5
        events  uni@op = credit.granted
    """)
    entries = [fact for fact in case.facts if isinstance(fact, Transfer) and fact.reference == "r1"]
    assert {entry.scope.tenant for entry in entries} == {"t1", "op"}
    assert all(entry.scope == SCOPE for entry in entries if entry.asset == "USD")


def test_a_loss_is_booked_where_the_reservation_is():
    check("""
        grant   uni@op c1 10
        reserve uni@op r1@t1 10
        commit  r1@t1 15
        account meter_shortfall = -5
        account meter_shortfall@op = 0
        account revenue = 5
        account revenue@op = 10
    """)


# Debits.


def test_a_debit_charges_at_once_or_refuses():
    case = check("""
        grant   w1 b1 100
        grant   day l1 50
        debit   w1 r1 60 limits=day  -> limit_reached needed=60 available=50
        debit   w1 r1 101            -> insufficient_credits needed=101 available=100
        debit   w1 r1 40+5 limits=day request=q1 cost=3  -> committed charged=40+5 balance=55
        debit   w1 r1 40+5           -> already_exists state=committed
        wallet  day balance=5 reserved=0
        reservation r1 request_id=q1 commits=1 held=0
        events  w1 = credit.granted usage.recorded
    """)
    assert len([fact for fact in case.facts if isinstance(fact, UsageRecorded)]) == 1


def test_a_debit_may_take_what_there_is():
    check("""
        grant   w1 b1 100
        debit   w1 r1 130 hold=130..0  -> committed charged=100+0 shortfall=30
    """)


def test_a_debit_of_nothing_changes_no_balance():
    check("""
        grant   w1 b1 100
        debit   w1 r1 0   -> committed charged=0+0
        wallet  w1 balance=100
    """)


# Refunds to come: what they need is recorded.


def test_payments_say_what_each_block_bore_in_the_order_in_which_it_was_used():
    """A refund reverses them from the last: each names its wallet, its block, and the accounts that it went to."""
    case = check("""
        grant   pool p1 10
        grant   w1 dg 10 from=pool funding=developer_grant priority=1
        grant   w1 b1 20
        grant   w2 c1 50
        reserve w1,w2|dev r1 60|5..0 developer=d
        commit  r1 40+10|5
    """)
    (reservation,) = case.state.reservations.values()
    entries = [
        (fact.debit, fact.credit, fact.amount)
        for fact in case.facts
        if isinstance(fact, Transfer) and fact.reference == "r1" and fact.debit != "meter_shortfall"
    ]
    told = []
    for paid in reservation.payments:
        account = f"wallet:{paid.wallet.wallet}"
        told += [(account, paid.base_account, paid.base), (account, paid.markup_account, paid.markup)]
    assert entries == told
    assert [paid.block for paid in reversed(reservation.payments)] == ["c1", "b1", "dg"]
    assert reservation.shortfall == 5


def test_a_settlement_with_usage_writes_it_beside_the_charge():
    case = check("""
        grant   w1 b1 100
        reserve w1 r1 60 request=q1
        commit  r1 40+4 request=q1 units=input:3,output:5 cost=7
    """)
    (row,) = [fact for fact in case.facts if isinstance(fact, UsageRecorded)]
    (event,) = [event for event in case.events if event.type == "usage.recorded"]
    assert row.record.units == {"input": 3, "output": 5}
    assert row.charges == Settlement(charges=row.charges).charges
    assert event.body == {"reservation": "r1", "request_id": "q1", "charged": 44}


# Whose loss it is, when a commit asks for more than there is: who commits may waive it, or have it owed.


def test_what_is_waived_is_in_no_entry_and_nobody_owes_it():
    check("""
        grant   w1 b1 100 funding=external
        reserve w1 r1 60
        commit  r1 0+130 waive request=q    -> committed charged=0+100 waived=30 shortfall=0 balance=0
        account meter_shortfall = 0
        account revenue = 0
        account tenant_margin = 100
        wallet  w1 receivable=0
    """)


def test_what_is_waived_adds_up_over_partial_commits():
    check("""
        grant   w1 b1 100 funding=external
        reserve w1 r1 60
        commit  r1 0+90 partial waive       -> open charged=0+90 held=0 waived=0
        commit  r1 0+15 partial waive       -> open charged=0+100 waived=5
        commit  r1 0+15 waive               -> committed charged=0+100 waived=20
    """)


def test_a_commit_may_leave_what_is_missing_as_a_debt():
    check("""
        grant   w1 b1 100 funding=external
        reserve w1 r1 60
        commit  r1 0+130 beyond             -> committed charged=0+130 shortfall=0 waived=0 balance=-30
        wallet  w1 receivable=30
    """)


def test_a_partial_commit_tells_what_is_still_held():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60
        commit  r1 25 partial   -> open held=35
        commit  r1 10           -> committed held=0
    """)


def test_what_was_waived_counts_towards_the_most_that_can_be_charged():
    check("""
        grant   w1 b1 10
        reserve w1 r1 10
        commit  r1 4611686018427387900 partial waive  -> open charged=10+0
        commit  r1 4 partial waive                    -> open
        commit  r1 1                                  -> invalid_amount
    """)


def test_each_commit_tells_of_what_it_left_owing_itself():
    case = check("""
        grant   w1 b1 10
        reserve w1 r1 10
        commit  r1 15 partial beyond tells
        commit  r1 7 beyond tells          -> committed
        events  w1 = credit.granted usage.overage usage.overage
    """)
    assert [event.body["owed"] for event in case.events if event.type == "usage.overage"] == [5, 7]
