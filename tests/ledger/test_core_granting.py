"""Credits in, and back out unspent: grants, pools, expiry, revocation and claw-back, the switches of a wallet."""

import msgspec
import pytest

from ledger import granting
from ledger.model import AMOUNT_MAX, Block, Funding
from tests.ledger.spec import check, wallet_ref


def test_a_grant_opens_a_wallet_and_a_block():
    check("""
        grant   w1 b1 100            -> granted block_id=b1 amount=100 balance_before=0 balance_after=100
        grant   w1 b2 20             -> granted balance_before=100 balance_after=120
        wallet  w1 balance=120 available=120 reserved=0 receivable=0 blocks_opened=2 version=2
        block   w1 b2 sequence=2 granted=20 remaining=20 funding=paid operator_paid=true
        account clearing = -120
        account wallet:w1 = 120
    """)


@pytest.mark.parametrize(
    ("funding", "account", "operator_paid"),
    [
        ("paid", "clearing", "true"),
        ("external", "external", "false"),
        ("promotional", "promo", "true"),
        ("plan", "plan", "true"),
    ],
)
def test_each_kind_of_funding_comes_from_its_account(funding: str, account: str, operator_paid: str):
    """Credits that were paid elsewhere are never the operator's, whatever the command says: nobody mints its money."""
    check(f"""
        grant   w1 b1 100 funding={funding}
        account {account} = -100
        block   w1 b1 operator_paid={operator_paid}
        grant   w1 b2 100 funding={funding} unpaid
        block   w1 b2 operator_paid=false
    """)


def test_what_makes_no_sense_is_refused():
    check(f"""
        at 100
        grant w1 b1 0                            -> invalid_amount
        grant w1 b1 -5                           -> invalid_amount
        grant w1 b1 {AMOUNT_MAX + 1}             -> invalid_amount
        grant w1 b1 5 expires=100                -> invalid_amount
        grant w1 b1 5 effective=200 expires=200  -> invalid_amount
        grant w1 b1 5 effective=50 expires=80    -> invalid_amount
        grant w1 b1 5 expires=101                -> granted
        grant w1 b1 7                            -> already_exists
        grant w1 b2 7 asset=gold                 -> asset_mismatch
        grant w2 b1 5 funding=developer_grant    -> not_found
        grant w1 b2 5 from=w1                    -> invalid_amount
    """)


def test_a_wallet_never_holds_more_than_an_amount_can_say():
    check(f"""
        grant w1 b1 {AMOUNT_MAX - 10}  -> granted
        grant w1 b2 11                 -> invalid_amount
        grant w1 b2 10                 -> granted
        debit w1 r1 25
        grant w1 b3 25                 -> granted
    """)


def test_a_block_pays_from_its_effective_time_until_its_expiry():
    """Half-open: it pays at the first microsecond and no longer at the last."""
    check("""
        grant w1 b1 100 effective=10 expires=20
        wallet w1 balance=100 available=0
        reserve w1 r1 1 -> insufficient_credits needed=1 available=0
        at 10
        debit w1 r1 1   -> committed
        at 19
        debit w1 r2 1   -> committed
        at 20
        debit w1 r3 1   -> insufficient_credits needed=1 available=0
        wallet w1 balance=0 available=0
        block w1 b1 remaining=98
    """)


def test_the_next_grant_repays_the_receivable_first():
    check("""
        overdraft w1 100
        debit  w1 r1 70        -> committed balance=-70
        grant  w1 b1 50        -> granted balance_before=-70 balance_after=-20 repaid=50
        wallet w1 receivable=20 available=0
        block  w1 b1 granted=50 consumed=50 remaining=0
        grant  w1 b2 50        -> granted balance_after=30 repaid=20
        wallet w1 receivable=0 available=30
        account wallet:w1 = 30
    """)


# Pools: a developer's wallet fills a pool, the pool grants to users.


def test_a_grant_out_of_a_wallet_is_all_or_nothing():
    check("""
        grant dev  d1 100
        grant pool p1 60 from=dev   -> granted
        grant pool p2 41 from=dev   -> insufficient_credits needed=41 available=40
        grant u1   g1 10 from=pool funding=developer_grant -> granted
        grant u1   g2 51 from=pool funding=developer_grant -> insufficient_credits needed=51 available=50
        grant u1   g2 1  from=none  -> insufficient_credits needed=1 available=0
        wallet dev available=40
        wallet pool available=50
        wallet u1 available=10
        account wallet:pool = 50
        account clearing = -100
    """)


def test_what_the_operator_was_paid_for_stays_apart_from_what_not():
    check("""
        grant pool p1 30 priority=1
        grant pool p2 50 funding=external
        grant u1 g1 70 from=pool funding=developer_grant -> granted
        block u1 g1 granted=30 operator_paid=true funding=developer_grant pool=pool
        block u1 g1_2 granted=40 operator_paid=false funding=developer_grant pool=pool
        events u1 = credit.granted credit.granted
        grant u1 g1 1    -> already_exists
        grant u1 g2 5
        grant u1 g2_2 5
        grant u2 g3_2 5
        grant u2 g3 5 from=pool  -> already_exists
    """)


def test_only_unrestricted_free_credits_of_a_sound_wallet_fill_another():
    check("""
        grant pool p1 30 app=a1
        grant pool p2 30 expires=10
        grant pool p3 30
        at 10
        reserve pool r1 20
        grant u1 g1 11 from=pool -> insufficient_credits needed=11 available=10
        freeze pool
        grant u1 g1 10 from=pool -> wallet_frozen
        unfreeze pool
        overdraft pool 50
        release r1
        debit pool r2 40
        overdraft pool 0
        grant pool p4 5
        grant u1 g1 5 from=pool  -> receivable_outstanding needed=5 available=0
        grant u1 g1 5 from=pool asset=gold -> asset_mismatch
    """)


def test_revoked_credits_go_back_to_the_wallet_that_they_came_out_of():
    check("""
        grant dev d1 100
        grant pool p1 80 from=dev
        grant u1 g1 50 from=pool funding=developer_grant
        revoke u1 g1 20      -> revoked amount=20 owed=0 balance=30
        wallet pool available=50
        block pool blk_returns_paid granted=20 source=returned
        revoke pool p1 30    -> revoked amount=30
        wallet dev available=50
        account clearing = -100
    """)


def test_a_pool_cannot_claw_back_what_its_user_has_spent():
    """It would have the credits again, to be spent once more, and a stranger would owe them for ever."""
    check("""
        grant pool p1 100
        grant u1 g1 100 from=pool funding=developer_grant
        debit u1 r1 90
        clawback u1 g1 100   -> revoked amount=10 owed=0 receivable=0
        wallet pool available=10
        clawback u1 g1 100   -> revoked amount=0 owed=0
        wallet pool available=10
    """)


# Expiry.


def test_expiry_books_the_free_part_and_says_so_once():
    case = check("""
        grant  w1 b1 100 expires=50 priority=10
        grant  w1 b2 20
        reserve w1 r1 60
        expire w1        -> expired blocks= amount=0
        at 50
        expire w1        -> expired blocks=b1 amount=40
        block  w1 b1 expired=40 remaining=60 reserved=60
        expire w1        -> expired amount=0
        release r1
        wallet w1 balance=20 available=20
        expire w1        -> expired blocks=b1 amount=60
        block  w1 b1 expired=100 remaining=0 live=false
        account breakage = 100
        events w1 = credit.granted credit.granted credit.expired
        expire w9        -> not_found
    """)
    assert case.events[-1].body["amount"] == 40


def test_a_block_that_was_used_up_does_not_expire():
    check("""
        grant  w1 b1 100 expires=50
        debit  w1 r1 100
        at 60
        expire w1   -> expired blocks= amount=0
        events w1 = credit.granted
    """)


def test_a_block_that_is_wholly_reserved_expires_when_it_is_released():
    check("""
        grant  w1 b1 100 expires=50
        reserve w1 r1 100
        at 60
        expire w1   -> expired amount=0
        release r1
        events w1 = credit.granted
        expire w1   -> expired amount=100
        events w1 = credit.granted credit.expired
    """)


def test_several_blocks_expire_with_an_event_each():
    case = check("""
        grant  w1 b1 10 expires=50
        grant  w1 b2 20 expires=51
        grant  w1 b3 30 expires=52
        freeze w1 b1
        freeze w1
        at 51
        expire w1   -> expired blocks=b1,b2 amount=30
    """)
    expired = [event.body["block"]["id"] for event in case.events if event.type == "credit.expired"]
    assert expired == ["b1", "b2"]


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ("", "credit.granted"),
        ("at 50 \n expire w1", "credit.expired"),
        ("clawback w1 b1 70", "credit.clawed_back"),
    ],
)
def test_events_of_a_block_carry_all_of_it_as_it_is_afterwards(steps: str, kind: str):
    """A webhook needs the customer, the priority and the metadata: it has the wallet and the whole block."""
    case = check(f"grant w1 b1 100 priority=10 expires=50 app=a1 payment=pi_1 source=pack\n{steps}")
    (event,) = [event for event in case.events if event.type == kind]
    told = msgspec.json.decode(msgspec.json.encode(event.body))["block"]
    block = case.state.blocks[wallet_ref("w1")]["b1"]
    assert msgspec.convert(told, Block) == block
    assert block.priority == 10
    assert block.metadata == {"note": "b1"}
    assert event.wallet == block.wallet


# Revocation and claw-back.


def test_revoking_takes_only_what_is_free():
    check("""
        grant  w1 b1 100
        reserve w1 r1 30
        debit  w1 r2 20
        revoke w1 b1 60    -> revoked amount=50 owed=0 receivable=0 balance=30
        revoke w1 b1 60    -> revoked amount=0
        wallet w1 available=0 reserved=30
        account clearing = -100
        account breakage = 50
        events w1 = credit.granted credit.clawed_back
    """)


def test_a_wallet_has_a_bounded_number_of_blocks_but_what_was_paid_for_comes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every charge looks at every block that has something left, and all wallets share the batches."""
    monkeypatch.setattr(granting, "BLOCKS_LIVE_MAX", 3)
    check("""
        grant pool p1 100
        grant w1 b1 10 funding=external priority=1
        grant w1 b2 10 funding=external
        grant w1 b3 10 funding=external
        grant w1 b4 10 funding=external                    -> too_many_blocks
        grant w1 b4 10 funding=promotional                 -> too_many_blocks
        grant w1 b4 10 funding=developer_grant from=pool   -> too_many_blocks
        grant w1 b4 10 from=pool                           -> too_many_blocks
        grant w1 b4 10                                     -> granted balance_after=40
        debit w1 r1 10
        grant w1 b5 10 funding=external                    -> too_many_blocks
        debit w1 r2 10
        grant w1 b5 10 funding=external                    -> granted
    """)


# Accumulation caps: a recurring grant carries over what is unused up to a cap.


def test_beyond_a_cap_the_oldest_credits_of_the_source_lapse():
    check("""
        grant w1 b1 100 source=monthly funding=plan cap=150  -> granted lapsed=0
        grant w1 c1 70  source=gift    funding=plan          -> granted lapsed=0
        grant w1 b2 100 source=monthly funding=plan cap=150  -> granted lapsed=50 balance_before=170 balance_after=220
        block w1 b1 granted=100 revoked=50 remaining=50
        block w1 b2 remaining=100
        grant w1 b3 150 source=monthly funding=plan cap=150  -> granted lapsed=150
        block w1 b1 remaining=0
        block w1 b2 remaining=0
        block w1 c1 remaining=70
        account breakage = 200
        wallet w1 balance=220 available=220
    """)


def test_a_cap_takes_neither_what_is_reserved_nor_what_was_paid_for():
    check("""
        grant   w1 b1 100 source=monthly funding=plan
        grant   w1 p1 100 source=monthly funding=paid
        reserve w1 r1 80
        grant   w1 b2 50 source=monthly funding=plan cap=60  -> granted lapsed=20
        block   w1 b1 reserved=80 remaining=80
        block   w1 p1 remaining=100
        release r1
        grant   w1 b3 10 source=monthly funding=plan cap=60  -> granted lapsed=80
        wallet  w1 balance=160
    """)


def test_what_has_expired_is_under_no_cap_whether_it_is_booked_or_not():
    check("""
        grant  w1 b1 100 source=monthly expires=50
        at 50
        grant  w1 b2 100 source=monthly cap=150  -> granted lapsed=0
        expire w1                                -> expired amount=100
        events w1 = credit.granted credit.granted credit.expired
    """)


def test_a_cap_tells_of_each_block_that_it_takes_from_and_leaves_the_expiry_its_own_event():
    case = check("""
        grant w1 b1 100 source=monthly expires=50
        grant w1 b2 100 source=monthly cap=120  -> granted lapsed=80
        at 50
        expire w1                               -> expired amount=20
        events w1 = credit.granted credit.granted credit.expired credit.expired
        account breakage = 100
    """)
    capped, expired = case.events[2:]
    assert (capped.body["amount"], capped.body["cause"]) == (80, "accumulation_cap")
    assert (expired.body["amount"], expired.body.get("cause")) == (20, None)
    assert capped.body["block"]["id"] == expired.body["block"]["id"] == "b1"


def test_what_has_expired_does_not_count_towards_a_cap_nor_does_the_part_that_repaid_a_debt():
    check("""
        overdraft w1 50
        grant w1 b1 100 source=monthly expires=10
        debit w1 r1 130                          -> committed balance=-30
        at 10
        grant w1 b2 100 source=monthly cap=100   -> granted repaid=30 lapsed=0 balance_after=70
        grant w1 b3 40  source=monthly cap=100   -> granted lapsed=10
    """)


def test_a_grant_beyond_its_own_cap_is_refused():
    check("""
        grant w1 b1 101 source=monthly cap=100  -> invalid_amount
        grant w1 b1 100 source=monthly cap=100  -> granted
    """)


def test_all_of_a_block_can_be_revoked_without_knowing_how_much_that_is():
    check("""
        grant    w1 b1 100
        debit    w1 r1 30
        revoke   w1 b1 all  -> revoked amount=70 owed=0
        clawback w1 b1 all  -> revoked amount=0 owed=30 receivable=30
        clawback w1 b1 all  -> revoked amount=0 owed=0
    """)


def test_a_clawback_takes_what_is_free_and_the_spent_part_is_owed():
    check("""
        grant  w1 b1 100
        debit  w1 r1 70
        clawback w1 b1 90 reference=re_1  -> revoked amount=30 owed=60 receivable=60 balance=-60
        block  w1 b1 revoked=30 clawed=60 consumed=70 remaining=0
        account clearing = -100
        account breakage = 90
        reserve w1 r2 1     -> receivable_outstanding needed=1 available=0
        grant  w1 b2 100    -> granted balance_after=40
    """)


def test_no_more_is_clawed_back_than_was_granted():
    """A partial refund, then a dispute about the whole: the second takes the difference."""
    check("""
        grant  w1 b1 100
        debit  w1 r1 70
        clawback w1 b1 50   -> revoked amount=30 owed=20
        clawback w1 b1 100  -> revoked amount=0 owed=50 receivable=70
        clawback w1 b1 100  -> revoked amount=0 owed=0 receivable=70
        account clearing = -100
        account breakage = 100
        clawback w1 b1 101  -> invalid_amount
    """)


def test_what_is_reserved_is_clawed_back_as_if_it_were_spent():
    check("""
        grant  w1 b1 100
        reserve w1 r1 60
        clawback w1 b1 100  -> revoked amount=40 owed=60 balance=0
        commit r1 60        -> committed balance=-60
        wallet w1 receivable=60
    """)


def test_what_was_clawed_back_while_it_was_reserved_is_not_taken_again_when_it_is_released():
    check("""
        grant    w1 b1 100
        reserve  w1 r1 50
        clawback w1 b1 100  -> revoked amount=50 owed=50 receivable=50
        release  r1
        clawback w1 b1 60   -> revoked amount=0 owed=0 receivable=0 balance=0
        revoke   w1 b1 60   -> revoked amount=0 owed=0
        block    w1 b1 revoked=100 clawed=0 remaining=0
        account  clearing = -100
        account  breakage = 100
    """)


def test_what_was_clawed_back_while_it_was_reserved_is_taken_when_it_is_released():
    """Or else who never used it would owe for what has lapsed."""
    check("""
        grant    w1 b1 100 expires=50
        reserve  w1 r1 50
        clawback w1 b1 100
        commit   r1 20      -> committed balance=-20
        wallet   w1 receivable=20
        at 50
        expire   w1         -> expired amount=0
        grant    w1 b2 20   -> granted balance_after=0
    """)


def test_a_debt_that_was_repaid_meanwhile_is_not_collected_again():
    check("""
        grant    w1 b1 100
        reserve  w1 r1 50
        clawback w1 b1 100
        grant    w1 b2 50   -> granted repaid=50
        release  r1
        wallet   w1 balance=50 available=50 receivable=0
        clawback w1 b1 100  -> revoked amount=0 owed=0
    """)


def test_what_has_lapsed_is_not_owed():
    check("""
        grant  w1 b1 100 expires=50
        debit  w1 r1 30
        at 50
        expire w1
        clawback w1 b1 100  -> revoked amount=0 owed=30 receivable=30
    """)


def test_revoking_what_is_not_there():
    check("""
        revoke w1 b1 10    -> not_found
        grant  w1 b1 100
        revoke w1 b2 10    -> not_found
        revoke w1 b1 0     -> invalid_amount
        revoke w1 b1 -1    -> invalid_amount
        revoke w1 b1 101   -> invalid_amount
    """)


# The switches of a wallet.


def test_a_frozen_wallet_reserves_nothing_and_a_frozen_block_pays_nothing():
    check("""
        grant  w1 b1 100
        grant  w1 b2 50
        freeze w1 b1
        reserve w1 r1 51   -> insufficient_credits needed=51 available=50
        unfreeze w1 b1
        reserve w1 r1 51   -> reserved
        freeze w1
        reserve w1 r2 1    -> wallet_frozen needed=1 available=0
        extend  r1 1       -> wallet_frozen
        commit  r1 51      -> committed
        unfreeze w1
        reserve w1 r2 1    -> reserved
        freeze w9          -> not_found
        freeze w1 b9       -> not_found
    """)


def test_an_overdraft_is_agreed_for_a_wallet():
    check("""
        overdraft w1 -1               -> invalid_amount
        overdraft w1 50               -> changed
        overdraft w1 50 asset=gold    -> asset_mismatch
        reserve w1 r1 51              -> insufficient_credits needed=51 available=50
        reserve w1 r1 50              -> reserved
        wallet  w1 overdraft_reserved=50 receivable=0
        overdraft w1 10
        commit  r1 50                 -> committed balance=-50
        reserve w1 r2 1               -> receivable_outstanding needed=1 available=0
        overdraft w1 60
        reserve w1 r2 10              -> reserved
    """)


def test_every_kind_of_funding_is_known():
    """A new kind needs its account, and a word on whether the operator was paid."""
    for funding in set(Funding) - {Funding.DEVELOPER_GRANT, Funding.LIMIT}:
        check(f"grant w1 b1 1 funding={funding} -> granted")
