"""Low balance: a wallet rings when its balance sinks below what it is watched for, once each time that it does."""

import msgspec
import pytest

from ledger.alerts import ALERTS_MAX, EXHAUSTED
from ledger.commands import Hold, Watch
from ledger.model import AMOUNT_MAX, Alert
from ledger.outcomes import Reason, Rejected
from tests.ledger.spec import Case, check, command, wallet_ref

WATCHED = "watch=low:50,exhausted:1"


def rings(case: Case) -> list[tuple[str, dict[str, int]]]:
    return [
        (event.type, event.body)
        for event in case.events
        if event.type in ("credit.low", "credit.exhausted", "topup.due")
    ]


def asking(line: str) -> Hold:
    asked = command(line)
    assert isinstance(asked, Hold)
    return asked


def test_the_charge_rings_and_not_the_reservation() -> None:
    case = check(f"""
        grant   w1 b1 100
        reserve w1 r1 80 {WATCHED}
        wallet  w1 balance=100 alerts=low:50,exhausted:1 rung=
        events  w1 = credit.granted
        commit  r1 60
        wallet  w1 balance=40 rung=low:50
        events  w1 = credit.granted credit.low
    """)
    assert rings(case) == [("credit.low", {"threshold": 50, "balance": 40})]


def test_a_debit_that_brings_its_alerts_rings_at_once() -> None:
    case = check(f"""
        grant w1 b1 100
        debit w1 r1 100 {WATCHED}
    """)
    assert rings(case) == [("credit.low", {"threshold": 50, "balance": 0}), ("credit.exhausted", {"balance": 0})]


def test_at_the_threshold_nothing_rings() -> None:
    check(f"""
        grant  w1 b1 100
        debit  w1 r1 50 {WATCHED}
        events w1 = credit.granted
        debit  w1 r2 1  {WATCHED}
        events w1 = credit.granted credit.low
    """)


def test_it_rings_once_for_as_long_as_the_balance_stays_below() -> None:
    check(f"""
        grant  w1 b1 100
        debit  w1 r1 60 {WATCHED}
        debit  w1 r2 10 {WATCHED}
        grant  w1 b2 5
        debit  w1 r3 10 {WATCHED}
        events w1 = credit.granted credit.low credit.granted
    """)


def test_a_top_up_arms_it_anew() -> None:
    check(f"""
        grant  w1 b1 100
        debit  w1 r1 100 {WATCHED}
        grant  w1 b2 20
        wallet w1 rung=low:50
        grant  w1 b3 30
        wallet w1 balance=50 rung=
        debit  w1 r2 50
        events w1 = credit.granted credit.low credit.exhausted credit.granted credit.granted credit.low credit.exhausted
    """)


def test_several_thresholds_that_are_crossed_at_once_ring_once_each() -> None:
    case = check("""
        grant  w1 b1 100
        debit  w1 r1 95 watch=low:10,low:50,low:5,top_up:30,exhausted:1
        wallet w1 balance=5 rung=low:10,low:50,top_up:30
        debit  w1 r2 1
    """)
    assert rings(case) == [
        ("credit.low", {"threshold": 10, "balance": 5}),
        ("credit.low", {"threshold": 50, "balance": 5}),
        ("topup.due", {"threshold": 30, "balance": 5}),
        ("credit.low", {"threshold": 5, "balance": 4}),
    ]


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("revoke w1 b2 60", "credit.clawed_back credit.low"),
        ("clawback w1 b1 60", "credit.clawed_back credit.low"),
        ("purchase w1 p1 60 20", "pack.purchased credit.low"),
        ("grant w2 g1 60 from=w1", "credit.low"),
        ("commit r1 60 beyond", "credit.low"),
        ("commit r1 60 partial", "credit.low"),
        ("at 20 \n lapse r1", "reservation.expired credit.low"),
        ("at 30 \n expire w1", "credit.expired credit.low"),
        ("at 30 \n debit w1 r2 1", "credit.low"),
        ("at 30 \n freeze w1", "credit.low"),
        ("at 30 \n unfreeze w1 b1", "credit.low"),
        ("at 30 \n overdraft w1 5", "credit.low"),
        ("at 30 \n extend r1 1", "credit.low"),
    ],
)
def test_whatever_lowers_the_balance_rings(step: str, told: str) -> None:
    """Credits that have expired ring with the first command that touches the wallet after their time."""
    check(f"""
        grant   w1 b1 70
        grant   w1 b2 60 expires=30 priority=-1
        reserve w1 r1 60 ttl=20 mark=60 watch=low:100
        wallet  w1 balance=130 rung=
        {step}
        wallet  w1 rung=low:100
        events  w1 = credit.granted credit.granted {told}
    """)


@pytest.mark.parametrize("step", ["refund r1", "grant w1 b2 60", "grant w1 b2 60 expires=9", "purchase w1 p1 0 60"])
def test_whatever_raises_it_arms_it_anew(step: str) -> None:
    check(f"""
        grant  w1 b1 100
        debit  w1 r1 60 {WATCHED}
        wallet w1 rung=low:50
        {step}
        wallet w1 rung=
        debit  w1 r2 60
        wallet w1 rung=low:50
    """)


def test_what_is_owed_is_below_nothing() -> None:
    case = check(f"""
        grant     w1 b1 100
        debit     w1 r1 70  {WATCHED}
        overdraft w1 50
        debit     w1 r2 60
        wallet    w1 balance=-30
    """)
    assert rings(case)[1:] == [("credit.exhausted", {"balance": -30})]


def test_a_threshold_that_is_raised_above_the_balance_does_not_ring() -> None:
    """Nothing was crossed: it rings when the balance has been at it, and sinks below again."""
    check("""
        grant  w1 b1 100
        debit  w1 r1 40 watch=low:50
        debit  w1 r2 5  watch=low:80
        wallet w1 balance=55 alerts=low:80 rung=low:80
        grant  w1 b2 25
        wallet w1 balance=80 rung=
        debit  w1 r3 1
        events w1 = credit.granted credit.granted credit.low
    """)


def test_new_alerts_leave_those_that_stay_as_they_were() -> None:
    check("""
        grant  w1 b1 100
        debit  w1 r1 60 watch=low:50
        debit  w1 r2 1  watch=low:20,low:50
        wallet w1 alerts=low:20,low:50 rung=low:50
        debit  w1 r3 20 watch=low:20,low:50
        wallet w1 rung=low:20,low:50
        events w1 = credit.granted credit.low credit.low
        debit  w1 r4 1 watch=
        wallet w1 alerts= rung=
        debit  w1 r5 1
        events w1 = credit.granted credit.low credit.low
    """)


def test_news_of_one_alert_do_not_silence_another_whose_credits_have_expired_meanwhile() -> None:
    """That one was known, and nobody has told of it yet."""
    case = check("""
        grant  w1 b1 70
        grant  w1 b2 60 expires=30
        debit  w1 r1 1 watch=low:100
        at 30
        debit  w1 r2 1 watch=low:100,low:90,low:20
        wallet w1 rung=low:100,low:90
    """)
    assert rings(case) == [("credit.low", {"threshold": 100, "balance": 69})]


def test_the_charge_that_brings_a_threshold_rings_it_if_it_crosses_it() -> None:
    check("""
        grant  w1 b1 100
        debit  w1 r1 60 watch=low:50
        debit  w1 r2 60 watch=low:50 -> insufficient_credits
        wallet w1 rung=low:50
        grant  w1 b2 100
        debit  w1 r3 60 watch=low:90
        events w1 = credit.granted credit.low credit.granted credit.low
    """)


def test_a_wallet_that_begins_empty_is_not_told_of() -> None:
    """Nothing was ever there to run out."""
    check(f"""
        debit  w1 r1 0 {WATCHED}
        wallet w1 rung=low:50,exhausted:1
        debit  w1 r2 5 overage {WATCHED}
        events w1 =
    """)


def test_a_refused_command_changes_nothing_of_it() -> None:
    check(f"""
        grant   w1 b1 10
        reserve w1 r1 60 {WATCHED} -> insufficient_credits
        wallet  w1 alerts= rung= version=1
    """)


def test_alerts_that_are_no_news_cost_nothing() -> None:
    check(f"""
        grant   w1 b1 100
        reserve w1 r1 10 {WATCHED}
        wallet  w1 version=2
        reserve w1 r2 10 {WATCHED}
        wallet  w1 version=3
    """)


def test_a_repetition_rings_nothing() -> None:
    check(f"""
        grant   w1 b1 100
        debit   w1 r1 60 {WATCHED} key=k1 -> committed
        debit   w1 r9 60 {WATCHED} key=k1 -> committed replayed
        events  w1 = credit.granted credit.low
    """)


def test_each_payer_is_watched_by_itself() -> None:
    case = check("grant w1 b1 100 \n grant dev b2 100")
    asked = asking("debit w1|dev r1 60|60")
    watches = (Watch(wallet_ref("w1"), (Alert("low", 50),)), Watch(wallet_ref("dev"), (Alert("low", 30), EXHAUSTED)))
    case.run(msgspec.structs.replace(asked, watches=watches))
    check(
        "events w1 = credit.granted credit.low \n events dev = credit.granted \n wallet dev alerts=low:30,exhausted:1",
        case,
    )


@pytest.mark.parametrize(
    "watch",
    [
        Watch(wallet_ref("w1"), tuple(Alert("low", number) for number in range(1, ALERTS_MAX + 2))),
        Watch(wallet_ref("w1"), (Alert("low", 5), Alert("low", 5))),
        Watch(wallet_ref("w1"), (Alert("low", 0),)),
        Watch(wallet_ref("w1"), (Alert("low", AMOUNT_MAX + 1),)),
        Watch(wallet_ref("w2"), (Alert("low", 5),)),
    ],
    ids=["too many", "twice the same", "of nothing", "of more than there can be", "of who does not pay"],
)
@pytest.mark.parametrize("line", ["reserve w1 r1 10", "debit w1 r1 10"])
def test_alerts_that_make_no_sense_are_refused(line: str, watch: Watch) -> None:
    case = check("grant w1 b1 100")
    asked = asking(line)
    outcome = case.run(msgspec.structs.replace(asked, watches=(watch,)))
    assert isinstance(outcome, Rejected)
    assert outcome.reason is Reason.INVALID_AMOUNT
    check("wallet w1 alerts=", case)
