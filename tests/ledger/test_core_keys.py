"""Idempotency: one key, one effect; a repeated command, one effect."""

import pytest

from ledger.commands import Key
from tests.ledger.spec import check


def test_a_key_with_a_zero_character_is_none():
    """SQLite does not find it again, so that it would grant twice."""
    with pytest.raises(ValueError, match="zero character"):
        Key(operation="grant", key="a\0b", digest="same")


def test_the_same_key_answers_with_the_first_result():
    check("""
        grant w1 b1 100 key=k1                 -> granted balance_after=100
        grant w1 b1 100 key=k1                 -> granted replayed balance_after=100
        debit w1 r1 60
        grant w1 b2 100 key=k1                 -> granted replayed block_id=b1 balance_after=100
        wallet w1 balance=40
        grant w1 b2 50 key=k1 digest=another   -> key_reused
        grant w1 b2 50 key=k2                  -> granted
    """)


@pytest.mark.parametrize(
    ("setup", "line", "word"),
    [
        ("", "grant w1 b2 5", "granted"),
        ("", "reserve w1 r2 5", "reserved"),
        ("", "debit w1 r2 5", "committed"),
        ("reserve w1 r2 5", "extend r2 5", "reserved"),
        ("reserve w1 r2 50", "commit r2 5 partial", "open"),
        ("reserve w1 r2 5", "commit r2 5", "committed"),
        ("reserve w1 r2 5", "release r2", "released"),
        ("", "revoke w1 b1 5", "revoked"),
        ("", "clawback w1 b1 5", "revoked"),
        ("", "expire w1", "expired"),
        ("", "freeze w1", "changed"),
        ("", "overdraft w1 7", "changed"),
    ],
)
def test_every_command_takes_a_key(setup: str, line: str, word: str):
    case = check(f"grant w1 b1 100\n{setup}\n{line} key=k1 -> {word}")
    state, events = case.state, len(case.events)
    check(f"{line} key=k1 -> {word} replayed\n{line} key=k1 digest=other -> key_reused", case)
    assert case.state == state
    assert len(case.events) == events


def test_keys_belong_to_a_tenant_a_mode_and_an_operation():
    check("""
        grant w1 b1 10 key=k1
        grant w1@t2 b1 10 key=k1         -> granted
        grant w1@t1/test b1 10 key=k1    -> granted
        grant w1 b2 10 key=k1 operation=topup -> granted
        wallet w1 balance=20
    """)


def test_a_repetition_does_not_take_another_key():
    check("""
        grant   w1 b1 100
        reserve w1 r1 10 request=q1 key=k1
        reserve w1 r1 10 request=q1 key=k2  -> reserved replayed
        key     reserve k2 = free
    """)


def test_a_refusal_does_not_take_the_key():
    check("""
        reserve w1 r1 10 key=k1   -> insufficient_credits
        key     reserve k1 = free
        grant   w1 b1 10
        reserve w1 r1 10 key=k1   -> reserved
    """)


def test_a_release_without_a_charge_frees_the_key_for_another_attempt():
    check("""
        grant   w1 b1 100
        reserve w1 r1 10 key=k1
        release r1
        key     reserve k1 = free
        reserve w1 r2 10 key=k1 digest=another  -> reserved reservation=r2
        release r1                              -> released replayed
        key     reserve k1 = taken
        commit  r2 10 response                  -> committed answers=reserve,k1
        reserve w1 r3 10 key=k1 digest=another  -> reserved replayed reservation=r2
    """)


def test_a_lapse_for_nothing_frees_the_key_and_one_for_a_mark_does_not():
    check("""
        grant   w1 b1 100
        reserve w1 r1 10 key=k1 ttl=5
        reserve w1 r2 10 key=k2 ttl=5 mark=7
        at 5
        lapse   r1
        lapse   r2
        key     reserve k1 = free
        key     reserve k2 = taken
        reserve w1 r3 10 key=k1   -> reserved
        commit  r1 10 response    -> committed late answers=None
        commit  r2 10 response    -> committed late answers=reserve,k2
        key     reserve k1 = taken
    """)


def test_a_stored_answer_goes_under_the_key_of_the_reservation():
    check("""
        grant   w1 b1 100
        reserve w1 r1 10 key=k1
        reserve w1 r2 10
        reserve w1 r3 10 key=k3
        commit  r1 10 response   -> committed answers=reserve,k1
        commit  r2 10 response   -> committed answers=None
        commit  r3 10            -> committed answers=None
    """)


def test_repeating_the_command_that_settled_is_a_replay():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60
        commit  r1 45 id=cmd_x   -> committed charged=45+0 balance=55
        commit  r1 45 id=cmd_x   -> committed replayed charged=45+0 balance=55
        debit   w1 r2 5 id=cmd_y -> committed
        debit   w1 r2 5 id=cmd_y -> committed replayed charged=5+0 balance=50
        reserve w1 r3 10 ttl=5
        at 5
        lapse   r3 id=cmd_z
        commit  r3 8 id=cmd_l    -> committed late
        commit  r3 8 id=cmd_l    -> committed replayed charged=8+0
    """)


def test_a_key_that_stays_answers_with_its_reservation_whatever_has_become_of_it():
    check("""
        grant   w1 b1 100
        reserve w1 r1 60 key=k1 keystays  -> reserved reservation=r1
        release r1
        key     reserve k1 = taken
        reserve w1 r2 60 key=k1 keystays  -> reserved reservation=r1 replayed
        wallet  w1 available=100
    """)
