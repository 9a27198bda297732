"""Payments that are refunded or disputed: their credits follow them exactly, and come back as they were."""

import itertools

import pytest

from ledger.outcomes import Transfer
from tests.ledger.spec import Case, check

# What is taken, and from where.


def test_what_is_free_goes_first_and_what_was_spent_is_owed():
    case = check("""
        topup   w1 t1 100 payment=ord_1
        debit   w1 r1 70
        reverse w1 t1 5/10 rev=1 reference=re_1 -> reversed taken=50 given=0 taken_in_all=50 balance=-20 receivable=20
        block   w1 t1 revoked=30 clawed=20 remaining=0
        account clearing = -50
        events  w1 = credit.granted topup.succeeded credit.clawed_back
        reserve w1 r2 1                         -> receivable_outstanding
        reverse w1 t1 10/10 rev=2               -> reversed taken=50 taken_in_all=100 receivable=70
        account clearing = 0
        account wallet:w1 = -70
    """)
    told = case.events[2].body
    assert (told["payment"], told["amount"], told["owed"], told["reference"]) == ("ord_1", 50, 20, "re_1")
    assert told["block"]["id"] == "t1"


def test_a_bonus_follows_the_payment_that_it_came_with():
    check("""
        topup   w1 t1 100 bonus=30
        reverse w1 t1 5/10 rev=1        -> reversed taken=65 taken_in_all=65 balance=65
        block   w1 t1 remaining=50
        block   w1 t1_bonus remaining=15
        account clearing = -50
        account promo = -15
        events  w1 = credit.granted credit.granted topup.succeeded credit.clawed_back credit.clawed_back
    """)


def test_the_payment_is_taken_back_to_the_last_unit_whatever_the_parts_are_rounded_to():
    """Credits are rounded down, and the spread bears the rest: clearing is what the processor has."""
    case = check("topup w1 t1 850 spread=150 bonus=10")
    for revision, taken in enumerate([1, 333, 998, 999, 500, 0], start=1):
        check(f"reverse w1 t1 {taken}/999 rev={revision}", case)
        assert -case.account("clearing") == 1000 - 1000 * taken // 999
        assert case.account("wallet:w1") == 850 - 850 * taken // 999 + 10 - 10 * taken // 999
        assert case.account("package_spread") >= 0


def test_what_had_lapsed_is_paid_out_of_breakage_and_never_owed():
    check("""
        grant   w1 b1 100 expires=50
        at 60
        expire  w1                      -> expired amount=100
        reverse w1 b1 10/10 rev=1       -> reversed taken=100 balance=0 receivable=0
        account clearing = 0
        account breakage = 0
        events  w1 = credit.granted credit.expired
        reverse w1 b1 0/10 rev=2        -> reversed given=100 balance=0
        account clearing = -100
        account breakage = 100
        block   w1 b1 expired=100 revoked=0
    """)


def test_a_tenants_own_claw_back_does_not_use_up_what_a_dispute_takes():
    """Nor is it owed twice: what the tenant took has become the operator's breakage, and is paid out of that."""
    check("""
        topup    w1 t1 100
        debit    w1 r1 40
        clawback w1 t1 90               -> revoked amount=60 owed=30
        account  clearing = -100
        account  breakage = 90
        reverse  w1 t1 10/10 rev=1      -> reversed taken=100 receivable=40
        account  clearing = 0
        account  breakage = 0
        clawback w1 t1 all              -> revoked amount=0 owed=0
        reverse  w1 t1 0/10 rev=2       -> reversed given=100 receivable=30 balance=-30
        account  clearing = -100
        account  breakage = 90
    """)


def test_what_is_held_is_owed_until_it_is_free_and_never_twice():
    case = check("""
        topup   w1 t1 100
        reserve w1 r1 60
        reserve w1 r2 40
        reverse w1 t1 10/10 rev=1       -> reversed taken=100 receivable=100 balance=0
        release r2
        wallet  w1 receivable=60 balance=0
        block   w1 t1 revoked=40 clawed=60
        commit  r1 25                   -> committed balance=-25
        wallet  w1 receivable=25
        block   w1 t1 revoked=75 clawed=25 remaining=0
        account clearing = 0
    """)
    check(
        """
        reverse w1 t1 0/10 rev=2        -> reversed given=100 balance=75 receivable=0
        block   w1 t1 consumed=25 revoked=0 clawed=0 remaining=75
    """,
        case,
    )


def test_of_what_is_given_back_only_that_is_taken_which_was_owed_and_is_spent_no_more():
    """What is still spent of the block covers the debt, until the last of it comes back."""
    check("""
        topup   w1 t1 100
        debit   w1 r1 60
        reverse w1 t1 5/10 rev=1        -> reversed taken=50 receivable=10
        refund  r1 30                   -> refunded balance=20
        block   w1 t1 consumed=30 remaining=30 clawed=10 revoked=40
        refund  r1 25                   -> refunded balance=45
        block   w1 t1 consumed=5 remaining=50 clawed=5 revoked=45
        wallet  w1 receivable=5
        refund  r1                      -> refunded balance=50
        block   w1 t1 consumed=0 remaining=50 clawed=0 revoked=50
        wallet  w1 receivable=0
    """)


def test_a_frozen_payment_pays_for_nothing_and_a_dispute_that_is_won_frees_it():
    check("""
        topup    w1 t1 100 bonus=10
        reserve  w1 r1 20
        reverse  w1 t1 0/10 rev=1 frozen -> reversed taken=0
        wallet   w1 balance=110 available=0
        debit    w1 r2 1                 -> insufficient_credits available=0
        commit   r1 20
        reverse  w1 t1 0/10 rev=2
        wallet   w1 available=90
    """)


def test_winning_a_dispute_does_not_unfreeze_what_somebody_else_has_frozen():
    check("""
        topup    w1 t1 100
        freeze   w1 t1
        reverse  w1 t1 0/10 rev=1 frozen
        reverse  w1 t1 0/10 rev=2
        wallet   w1 available=0
        unfreeze w1 t1
        wallet   w1 available=100
        reverse  w1 t1 0/10 rev=3 frozen
        unfreeze w1 t1
        wallet   w1 available=0
    """)


def test_every_entry_of_a_reversal_names_what_took_it_and_its_block():
    case = check("""
        topup    w1 t1 850 bonus=100 spread=150
        debit    w1 r1 300
        revoke   w1 t1 100
        reverse  w1 t1 10/10 rev=1 reference=re_1
        reverse  w1 t1 0/10 rev=2 reference=dp_1
    """)
    entries = [fact for fact in case.facts if isinstance(fact, Transfer) and fact.reference in ("re_1", "dp_1")]
    assert [(entry.debit, entry.credit, entry.amount, entry.block, entry.reference) for entry in entries] == [
        ("wallet:w1", "clearing", 750, "t1", "re_1"),
        ("breakage", "clearing", 100, "t1", "re_1"),
        ("wallet:w1", "promo", 100, "t1_bonus", "re_1"),
        ("package_spread", "clearing", 150, "t1", "re_1"),
        ("clearing", "wallet:w1", 750, "t1", "dp_1"),
        ("clearing", "breakage", 100, "t1", "dp_1"),
        ("promo", "wallet:w1", 100, "t1_bonus", "dp_1"),
        ("clearing", "package_spread", 150, "t1", "dp_1"),
    ]


# What comes back.


@pytest.mark.parametrize("spent", [0, 30, 100])
@pytest.mark.parametrize("held", [0, 25])
def test_a_dispute_that_is_won_leaves_no_trace(spent: int, held: int):
    case = check(f"topup w1 t1 150 bonus=20 spread=7 \n debit w1 r1 {spent} \n reserve w1 r2 {held} \n freeze w1")
    before = case.state.blocks, [case.account(name) for name in ACCOUNTS], case.state.balance(*_w1(case))
    taken = check("reverse w1 t1 3/10 rev=1 frozen \n reverse w1 t1 10/10 rev=2 \n reverse w1 t1 0/10 rev=3", case)
    for blocks in before[0].values():
        for block in blocks.values():
            now = taken.state.blocks[block.wallet][block.id]
            assert (now.remaining, now.reserved, now.consumed, now.clawed, now.reversal.taken) == (
                *(block.remaining, block.reserved, block.consumed),
                *(0, 0),
            )
    assert [case.account(name) for name in ACCOUNTS] == before[1]
    assert case.state.balance(*_w1(case)) == before[2]


ACCOUNTS = ("clearing", "promo", "package_spread", "breakage", "revenue", "tenant_due", "wallet:w1")


def _w1(case: Case):
    (ref,) = case.state.wallets
    return ref, case.now_us


def test_a_debt_that_was_repaid_with_paid_credits_comes_back_as_paid_credits():
    check("""
        topup   w1 t1 100
        debit   w1 r1 100
        reverse w1 t1 10/10 rev=1       -> reversed receivable=100
        topup   w1 t2 60                -> topped_up repaid=60 balance_after=-40
        reverse w1 t1 0/10 rev=2        -> reversed given=100 balance=60 receivable=0
        block   w1 blk_returns_paid granted=60 operator_paid=true
        block   w1 t1 consumed=100 clawed=0
        account clearing = -160
        events  w1 = credit.granted topup.succeeded credit.clawed_back credit.granted topup.succeeded credit.restored
    """)


def test_what_comes_back_into_a_block_that_has_expired_lapses_at_once():
    check("""
        grant   w1 b1 100 expires=50
        reverse w1 b1 10/10 rev=1       -> reversed taken=100
        at 60
        reverse w1 b1 0/10 rev=2        -> reversed given=100 balance=0
        block   w1 b1 revoked=0 expired=100
        account breakage = 100
        account clearing = -100
        events  w1 = credit.granted credit.clawed_back
    """)


# News in any order.


def test_of_several_the_one_with_the_highest_revision_counts():
    check("""
        topup   w1 t1 100
        reverse w1 t1 6/10 rev=3        -> reversed taken=60 taken_in_all=60
        reverse w1 t1 10/10 rev=2       -> reversed taken=0 given=0 taken_in_all=60 balance=40
        reverse w1 t1 0/10 rev=3 frozen -> reversed taken=0 taken_in_all=60
        wallet  w1 available=40
        reverse w1 t1 6/10 rev=4        -> reversed taken=0 taken_in_all=60
        reverse w1 t1 6/10 rev=5 key=k1 -> reversed taken=0
        reverse w1 t1 6/10 rev=5 key=k1 -> reversed replayed
    """)


def test_every_path_to_the_same_part_ends_in_the_same_place():
    ends = set()
    for path in itertools.permutations([0, 3, 7, 10]):
        case = check("topup w1 t1 333 bonus=17 spread=40 \n debit w1 r1 111")
        for revision, taken in enumerate([*path, 5], start=1):
            check(f"reverse w1 t1 {taken}/10 rev={revision}", case)
        block, bonus = (case.state.blocks[_w1(case)[0]][name] for name in ("t1", "t1_bonus"))
        ends.add((block.remaining, block.clawed, bonus.remaining, *map(case.account, ACCOUNTS)))
    assert len(ends) == 1


def test_only_what_was_paid_for_is_taken_back_and_only_what_was_paid():
    check("""
        grant   pool p1 100
        grant   w1 d1 10 from=pool
        grant   w1 g1 10 funding=external
        topup   w1 t1 100
        reverse w1 t2 1/10 rev=1        -> not_found
        reverse w2 t1 1/10 rev=1        -> not_found
        reverse w1 d1 1/10 rev=1        -> not_found
        reverse w1 g1 1/10 rev=1        -> not_found
        reverse w1 t1_bonus 1/10 rev=1  -> not_found
        reverse w1 t1 11/10 rev=1       -> invalid_amount
        reverse w1 t1 -1/10 rev=1       -> invalid_amount
        reverse w1 t1 0/0 rev=1         -> invalid_amount
    """)


# Whose money repays, and whose work it was.


def test_nobody_makes_free_credits_paid_ones_by_a_claw_back_a_gift_and_a_refund():
    """What comes back is of the kind that repaid, whatever had been spent."""
    check("""
        topup    w1 t1 100
        debit    w1 r1 100
        clawback w1 t1 100                      -> revoked owed=100
        grant    w1 g1 100 funding=external     -> granted repaid=100
        refund   r1                             -> refunded balance=100
        block    w1 t1 remaining=0
        block    w1 blk_returns_unpaid granted=100 operator_paid=false
        reserve  w1 r2 1 unfunded=line          -> limit_reached
    """)


def test_what_repaid_a_claw_back_comes_back_as_paid_at_most_as_far_as_it_was():
    check("""
        topup    w1 t1 100
        debit    w1 r1 100
        clawback w1 t1 100                      -> revoked owed=100
        topup    w1 t2 30                       -> topped_up repaid=30
        grant    w1 g1 70 funding=external      -> granted repaid=70
        refund   r1 50                          -> refunded balance=50
        block    w1 blk_returns_paid granted=30
        block    w1 blk_returns_unpaid granted=20
        refund   r1                             -> refunded balance=100
        block    w1 blk_returns_unpaid granted=70
    """)


def test_a_gift_that_makes_a_reversed_payment_good_is_due_from_its_giver():
    """The operator did the work and lost the payment: free credits must not pay for it."""
    case = check("""
        topup   w1 t1 100
        debit   w1 r1 100
        reverse w1 t1 10/10 rev=1               -> reversed receivable=100
        account revenue = 100
        grant   w1 g1 130 funding=external      -> granted repaid=100 balance_after=30
        account revenue = 0
        account tenant_due = 100
    """)
    check(
        """
        reverse w1 t1 0/10 rev=2                -> reversed given=100 balance=130
        account revenue = 100
        account tenant_due = 0
        account clearing = -100
        block   w1 blk_returns_unpaid granted=100
    """,
        case,
    )


def test_what_was_due_for_a_charge_is_not_when_the_charge_is_given_back():
    check("""
        topup   w1 t1 100
        debit   w1 r1 100
        reverse w1 t1 10/10 rev=1
        grant   w1 g1 100 funding=external      -> granted repaid=100
        refund  r1                              -> refunded balance=100
        account revenue = 0
        account tenant_due = 0
        debit   w1 r2 100
        account tenant_due = 100
    """)


def test_a_debt_of_another_kind_is_not_made_due():
    check("""
        overdraft w1 50
        debit   w1 r1 50
        topup   w1 t1 100                       -> topped_up repaid=50
        debit   w1 r2 50
        reverse w1 t1 5/10 rev=1                -> reversed receivable=50
        debit   w1 r3 20 beyond
        wallet  w1 receivable=70
        grant   w1 g1 70 funding=external       -> granted repaid=70
        account tenant_due = 50
        account revenue = 70
    """)


# A tenant gives back what the operator was paid for.


def test_what_a_tenant_gives_back_of_the_operators_revenue_it_owes():
    """Or else one payment could be burnt, given back and burnt for ever."""
    check("""
        topup   w1 t1 100
        grant   line l1 150 funding=promotional
        debit   w1 r1 80+20
        refund  r1 unfunded=line        -> refunded amounts=100 balance=100
        account revenue = 0
        account tenant_due = 80
        wallet  line available=70
        debit   w1 r2 80+20
        refund  r2 unfunded=line        -> limit_reached needed=80 available=70
        refund  r2 50 unfunded=line     -> refunded balance=50
        account tenant_due = 120
        wallet  line available=30
        refund  r2                      -> refunded balance=100
        account tenant_due = 120
    """)


def test_what_the_tenants_own_credits_paid_draws_on_no_line_when_it_is_given_back():
    check("""
        grant   w1 g1 100 funding=external
        debit   w1 r1 100
        account tenant_due = 100
        refund  r1 unfunded=line        -> refunded balance=100
        account tenant_due = 0
    """)


def test_a_debt_that_a_tenant_forgives_is_its_own_but_was_drawn_on_the_line_before():
    check("""
        grant     line l1 100 funding=promotional
        overdraft w1 100
        debit     w1 r1 60 unfunded=line
        wallet    line available=40
        refund    r1 unfunded=line      -> refunded balance=0
        wallet    line available=40
        account   tenant_due = 60
        account   revenue = 0
    """)


# One sort of debt never stands in for the other.


def test_a_top_up_that_made_a_payment_good_does_not_come_back_for_another_debt():
    """A gift repaid that one, so a gift comes back: or else the operator would have worked twice for one payment."""
    check("""
        grant    line l1 500 funding=promotional
        topup    w1 t1 100
        debit    w1 r1 100 unfunded=line
        reverse  w1 t1 10/10 rev=1              -> reversed receivable=100
        topup    w1 t2 100                      -> topped_up repaid=100
        debit    w1 r2 100 overage unfunded=line
        grant    w1 g1 100 funding=external     -> granted repaid=100
        refund   r2 unfunded=line               -> refunded balance=100
        block    w1 blk_returns_unpaid granted=100
        reverse  w1 t1 0/10 rev=2               -> reversed balance=200
        block    w1 blk_returns_paid granted=100
    """)


def test_a_refund_of_another_debt_does_not_strike_out_what_a_reversed_payment_has_left():
    """What had repaid that one comes back, and now repays the payment: its giver owes it."""
    check("""
        grant    line l1 500 funding=promotional
        topup    w1 t1 100
        debit    w1 r1 100 unfunded=line
        debit    w1 r2 100 overage unfunded=line
        grant    w1 g1 100 funding=external     -> granted repaid=100
        reverse  w1 t1 10/10 rev=1              -> reversed receivable=100
        account  tenant_due = 0
        refund   r2 unfunded=line               -> refunded balance=0
        wallet   w1 receivable=0
        account  tenant_due = 200
        reverse  w1 t1 0/10 rev=2               -> reversed balance=100
        block    w1 blk_returns_unpaid granted=100
        account  tenant_due = 100
    """)


def test_who_claws_back_before_a_dispute_owes_for_the_payment_all_the_same():
    check("""
        topup    w1 t1 100
        debit    w1 r1 100
        clawback w1 t1 70                       -> revoked owed=70
        reverse  w1 t1 10/10 rev=1              -> reversed taken=100 receivable=100
        account  breakage = 0
        grant    w1 g1 100 funding=external     -> granted repaid=100
        account  tenant_due = 100
        reverse  w1 t1 0/10 rev=2               -> reversed given=100 balance=30
        account  tenant_due = 0
        account  breakage = 70
    """)


def test_what_has_repaid_a_claw_back_counts_for_the_payment_when_that_is_reversed_too():
    """Gifts that had repaid it become due, paid credits do not; as soon as the payment is back, neither is."""
    check("""
        topup    w1 t1 100
        debit    w1 r1 100
        clawback w1 t1 100                      -> revoked owed=100
        topup    w1 t2 30                       -> topped_up repaid=30
        grant    w1 g1 50 funding=external      -> granted repaid=50
        account  tenant_due = 0
        reverse  w1 t1 10/10 rev=1              -> reversed taken=100 receivable=20
        account  tenant_due = 50
        account  clearing = -30
        reverse  w1 t1 5/10 rev=2               -> reversed given=50 receivable=20
        account  tenant_due = 50
        reverse  w1 t1 0/10 rev=3               -> reversed given=50 receivable=20
        account  tenant_due = 0
        refund   r1                             -> refunded balance=80
        block    w1 blk_returns_paid granted=30
        block    w1 blk_returns_unpaid granted=50
    """)


def test_what_was_clawed_back_and_reversed_is_owed_no_more_when_its_charge_is_given_back():
    check("""
        topup    w1 t1 100
        debit    w1 r1 100
        clawback w1 t1 100
        reverse  w1 t1 10/10 rev=1              -> reversed receivable=100
        refund   r1 60                          -> refunded balance=-40
        grant    w1 g1 40 funding=external      -> granted repaid=40
        account  tenant_due = 40
        reverse  w1 t1 0/10 rev=2               -> reversed given=100 balance=0 receivable=0
        account  tenant_due = 0
        account  clearing = -100
        account  breakage = 100
    """)
