"""Every reason to refuse, the order in which reasons are given, and that a refusal changes nothing."""

import copy

import pytest

from ledger import granting, purchasing
from ledger.core import decide
from ledger.outcomes import Reason, Rejected, Settled
from tests.ledger.spec import Case, check, command

SETUP = """
    grant   w1 b1 100
    grant   rich b1 1000
    grant   day d1 10
    grant   gold g1 10 asset=gold
    reserve w1 open 10 key=k1 request=q1
    reserve w1 done 10
    commit  done 10
    grant   owing o1 10
    debit   owing spent 10
    clawback owing o1 10
    grant   cold c1 10
    freeze  cold
    grant   full f1 10 funding=external
    grant   full f2 10
    grant   full f3 10
    grant   plan p1 10 funding=plan
"""


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granting, "BLOCKS_LIVE_MAX", 3)
    monkeypatch.setattr(purchasing, "BLOCKS_LIVE_MAX", 3)


REFUSALS = {
    Reason.KEY_REUSED: "reserve w1 r1 10 key=k1 digest=other",
    Reason.INVALID_AMOUNT: "reserve w1 r1 -1",
    Reason.NOT_FOUND: "commit nowhere 5",
    Reason.ALREADY_EXISTS: "reserve w1 done 10",
    Reason.ASSET_MISMATCH: "reserve w1 r1 10 asset=gold",
    Reason.PLAN_ACTIVE: "purchase plan p2 5 5 unless_active",
    Reason.TOO_MANY_BLOCKS: "grant full f4 10 funding=external",
    Reason.RESERVATION_SETTLED: "commit done 5",
    Reason.WALLET_FROZEN: "reserve cold r1 5",
    Reason.RECEIVABLE_OUTSTANDING: "reserve owing r1 5",
    Reason.INSUFFICIENT_CREDITS: "reserve w1 r1 1000",
    Reason.LIMIT_REACHED: "reserve w1 r1 20 limits=day",
}

BOTH_APPLY = [
    (Reason.KEY_REUSED, "reserve w1 r1 -1 key=k1 digest=other"),
    (Reason.INVALID_AMOUNT, "extend nowhere -1"),
    (Reason.INVALID_AMOUNT, "revoke nobody b1 0"),
    (Reason.INVALID_AMOUNT, "reserve w1 done -1"),
    (Reason.INVALID_AMOUNT, "reserve w1 done 5 mark=-1"),
    (Reason.INVALID_AMOUNT, "debit w1 done -1"),
    (Reason.INVALID_AMOUNT, "debit w1 r1 5 hold=-5 asset=gold"),
    (Reason.INVALID_AMOUNT, "extend done -1"),
    (Reason.INVALID_AMOUNT, "commit done -1"),
    (Reason.INVALID_AMOUNT, "grant w1 b1 0 asset=gold"),
    (Reason.NOT_FOUND, "grant w1 b1 5 funding=developer_grant"),
    (Reason.ALREADY_EXISTS, "grant w1 b1 5 asset=gold"),
    (Reason.ALREADY_EXISTS, "reserve w1 done 10 asset=gold"),
    (Reason.ASSET_MISMATCH, "reserve cold r1 5 asset=gold"),
    (Reason.ASSET_MISMATCH, "grant w1 b9 500 from=gold"),
    (Reason.ASSET_MISMATCH, "grant full f4 10 funding=external asset=gold"),
    (Reason.INVALID_AMOUNT, "purchase plan p1 -5 5"),
    (Reason.ALREADY_EXISTS, "purchase plan p1 5 5 asset=gold"),
    (Reason.ASSET_MISMATCH, "purchase plan p2 5 5 unless_active asset=gold"),
    (Reason.PLAN_ACTIVE, "purchase plan p2 500 5 unless_active"),
    (Reason.TOO_MANY_BLOCKS, "purchase full p2 500 5"),
    (Reason.WALLET_FROZEN, "purchase cold p2 500 5"),
    (Reason.RECEIVABLE_OUTSTANDING, "purchase owing p2 500 5"),
    (Reason.TOO_MANY_BLOCKS, "grant full f4 10 from=cold"),
    (Reason.WALLET_FROZEN, "reserve cold,owing r1 5 limits=day"),
    (Reason.WALLET_FROZEN, "grant w1 b9 500 from=cold"),
    (Reason.RECEIVABLE_OUTSTANDING, "reserve owing,w1 r1 500"),
    (Reason.INSUFFICIENT_CREDITS, "reserve w1 r1 500 limits=day"),
    (Reason.WALLET_FROZEN, "reserve cold r1 500 limits=day"),
]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_its_case(reason: Reason):
    case = check(SETUP)
    check(f"{REFUSALS[reason]} -> {reason}", case)


@pytest.mark.parametrize(("reason", "line"), BOTH_APPLY)
def test_the_first_reason_in_order_of_precedence_is_given(reason: Reason, line: str):
    check(f"{line} -> {reason}", check(SETUP))


@pytest.mark.parametrize("line", [*REFUSALS.values(), *(line for _, line in BOTH_APPLY)])
def test_a_refusal_changes_nothing(line: str):
    case = check(SETUP)
    before = copy.deepcopy(case.state)
    check(f"{line} -> {_reason(case, line)}", case)
    assert case.state == before


def _reason(case: Case, line: str) -> str:
    outcome = decide(case.state, command(line), case.now_us)
    assert isinstance(outcome, Rejected)
    return outcome.reason


def test_a_settled_reservation_tells_what_it_came_to():
    case = check(SETUP)
    outcome = decide(case.state, command("commit done 10"), case.now_us)
    assert isinstance(outcome, Rejected)
    assert isinstance(outcome.result, Settled)
    assert outcome.result.charged[0].total == 10
    assert outcome.result.balance == 90


# Nothing crosses tenants or modes.


@pytest.mark.parametrize(
    "line",
    [
        "grant   w1@t2 b1 5 scope=t1",
        "grant   w1@t1/test b1 5 scope=t1",
        "grant   w2 b1 5 from=w1@t2",
        "grant   w2 b1 5 from=w1@t1/test",
        "reserve w1 r9@t2 5 scope=t1",
        "reserve w1@t1/test r9 5",
        "reserve w1,w1@t2/test r9 5",
        "reserve w1 r9 5 limits=w1@t1/test",
        "reserve w1 r9 5 unfunded=w1@t1/test",
        "debit   w1@t1/test r9 5",
        "debit   w1 r9@t2 5 scope=t1",
        "extend  r1@t2 5 scope=t1",
        "commit  r1@t2 5 scope=t1",
        "release r1@t2 scope=t1",
        "lapse   r1@t2 scope=t1",
        "revoke  w1@t2 b1 5 scope=t1",
        "clawback w1@t2 b1 5 scope=t1",
        "expire  w1@t2 scope=t1",
        "freeze  w1@t2 scope=t1",
        "overdraft w1@t2 50 scope=t1",
    ],
)
def test_what_belongs_to_another_is_not_found(line: str):
    check(f"""
        grant w1 b1 100
        grant w1@t2 b1 100
        grant w1@t1/test b1 100
        grant w1@t2/test b1 100
        reserve w1@t2 r1@t2 10
        {line} -> not_found
    """)


def test_the_same_names_are_others_in_another_scope():
    check("""
        grant   w1 b1 100
        grant   w1@t2 b1 50
        grant   w1@t1/test b1 20
        reserve w1 r1 10 key=k1
        reserve w1@t2 r1@t2 10 key=k1
        reserve w1@t1/test r1@t1/test 10 key=k1
        commit  r1@t1/test 10
        wallet  w1 balance=100
        wallet  w1@t2 balance=50
        wallet  w1@t1/test balance=10
        account revenue = 0
        account revenue@t1/test = 10
    """)
