"""What must always hold, written a second time and from the outside: it trusts the facts and nothing of the core.

It shares no arithmetic with ``ledger``: the properties of a block are computed here from its fields, and the balances
of the journal from its entries alone.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from ledger.commands import AnyCommand, Hold, Refund
from ledger.model import Alert, Reservation, ReservationState, Scope, WalletRef
from ledger.outcomes import (
    Applied,
    BlockChanged,
    BlockOpened,
    Fact,
    KeyFreed,
    KeyTaken,
    ReservationChanged,
    Transfer,
    UsageRecorded,
    WalletChanged,
    WalletOpened,
)
from ledger.state import State, evolve

AccountRef = tuple[Scope, str, str]
"""Scope, account, asset."""

FINAL = (ReservationState.COMMITTED, ReservationState.RELEASED)


def account_balances(facts: Iterable[Fact]) -> dict[AccountRef, int]:
    """What has arrived at each account less what has left it."""
    balances: dict[AccountRef, int] = defaultdict(int)
    for fact in facts:
        if isinstance(fact, Transfer):
            balances[fact.scope, fact.debit, fact.asset] -= fact.amount
            balances[fact.scope, fact.credit, fact.asset] += fact.amount
    return balances


def replayed(facts: Iterable[Fact]) -> State:
    state = State()
    for fact in facts:
        evolve(state, fact)
    return state


def check_state(state: State, balances: dict[AccountRef, int]) -> None:
    """The invariants of one moment: blocks, wallets against the journal, reservations against what they hold."""
    _check_blocks(state)
    _check_wallets(state, balances)
    _check_slices(state)
    for reservation in state.reservations.values():
        _check_reservation(reservation)


def _check_blocks(state: State) -> None:
    for blocks in state.blocks.values():
        sequences = sorted(block.sequence for block in blocks.values())
        assert sequences == list(range(1, len(blocks) + 1)), "each block of a wallet has a number of its own"
        for block in blocks.values():
            parts = (block.granted, block.consumed, block.reserved, block.expired, block.revoked, block.clawed)
            assert min(parts) >= 0, block
            remaining = block.granted - block.consumed - block.expired - block.revoked
            assert 0 <= block.reserved <= remaining, block
            assert block.remaining == remaining
            assert block.free == remaining - block.reserved
            assert block.clawed <= block.consumed + block.reserved, "who owes credits spent them, or holds them"
            gone = block.reversal
            assert min(gone.free, gone.owed, gone.clawed, gone.lapsed, gone.spread_taken) >= 0, block
            assert gone.free <= block.revoked, block
            assert gone.owed + gone.clawed <= block.clawed, block
            assert gone.lapsed <= block.expired + block.revoked - gone.free, block
            assert gone.spread_taken <= gone.spread, block
            assert block.pool is None or block.clawed == 0, block


def _check_wallets(state: State, balances: dict[AccountRef, int]) -> None:
    for ref, wallet in state.wallets.items():
        assert wallet.ref == ref
        assert wallet.receivable >= 0, wallet
        assert wallet.overdraft_reserved >= 0, wallet
        assert 0 <= wallet.debts.reversed <= wallet.receivable, wallet
        debts = wallet.debts
        assert min(debts.reversed_paid, debts.repaid_paid, debts.repaid_due) >= 0, wallet
        blocks = state.blocks.get(ref, {}).values()
        of_reversed = sum(block.reversal.owed + block.reversal.clawed for block in blocks)
        assert debts.reversed + debts.reversed_paid + debts.repaid_due == of_reversed, "each debt is owed or repaid"
        assert wallet.blocks_opened == len(blocks), wallet
        remainders = sum(block.granted - block.consumed - block.expired - block.revoked for block in blocks)
        account = balances.get((Scope(ref.tenant, ref.mode), f"wallet:{ref.wallet}", wallet.asset), 0)
        assert account == remainders - wallet.receivable, f"the journal says {account} of {wallet}"
    known = {(Scope(ref.tenant, ref.mode), f"wallet:{ref.wallet}") for ref in state.wallets}
    booked = {(scope, account) for scope, account, _ in balances if account.startswith("wallet:")}
    assert booked <= known, "every wallet of the journal is there"


def _check_slices(state: State) -> None:
    held: dict[object, int] = defaultdict(int)
    for reservation in state.reservations.values():
        for part in reservation.slices:
            assert part.amount > 0, part
            held[part.wallet, part.block] += part.amount
    for ref, blocks in state.blocks.items():
        for block in blocks.values():
            assert block.reserved == held.pop((ref, block.id), 0), block
    for ref, wallet in state.wallets.items():
        assert wallet.overdraft_reserved == held.pop((ref, None), 0), wallet
    assert not held, "nothing is held of what is not there"


def _check_reservation(reservation: Reservation) -> None:
    if reservation.state is not ReservationState.OPEN:
        assert reservation.slices == (), reservation
        assert reservation.settled_at_us is not None
    assert reservation.expires_at_us - reservation.created_at_us <= 24 * 3600 * 1_000_000
    assert len(reservation.charged) == len(reservation.legs)
    for leg, charged in enumerate(reservation.charged):
        paid = [payment for payment in reservation.payments if payment.leg == leg]
        assert all(payment.base >= 0 and payment.markup >= 0 for payment in paid), reservation
        assert sum(payment.base for payment in paid) == charged.base
        assert sum(payment.markup for payment in paid) == charged.markup
        assert all(payment.wallet in reservation.legs[leg].wallets for payment in paid)


def check_step(state: State, command: AnyCommand, outcome: Applied, now_us: int) -> None:
    """What the facts of one command may say, given the *state* before them."""
    allowed = {command.scope}
    if isinstance(command, Hold):
        allowed |= {Scope(ref.tenant, ref.mode) for leg in command.legs for ref in leg.wallets}
        allowed |= {
            Scope(ref.tenant, ref.mode)
            for ref in (*[limit.wallet for limit in command.limits], *filter(None, [command.unfunded]))
        }
    reservation = getattr(command, "reservation", None)
    known = state.reservations.get(reservation) if reservation is not None else None
    if isinstance(command, Refund):
        assert not any(isinstance(fact, KeyFreed | UsageRecorded) for fact in outcome.facts), "a refund only gives back"
    if known is not None:
        refs = [ref for leg in known.legs for ref in leg.wallets] + [*known.limits, *filter(None, [known.unfunded])]
        allowed |= {Scope(ref.tenant, ref.mode) for ref in refs}
    assert {scope.mode for scope in allowed} == {command.scope.mode}, "test data and live data never meet"
    for fact in outcome.facts:
        assert _scope(fact) in allowed, f"{fact} crosses a border"
        if isinstance(fact, Transfer):
            assert fact.amount > 0
            assert fact.debit != fact.credit
        if isinstance(fact, ReservationChanged):
            before = state.reservations.get(fact.reservation.ref)
            if isinstance(command, Refund):
                _check_refund(before, fact.reservation)
            else:
                _check_change(before, fact.reservation)
    versions = [fact.wallet for fact in outcome.facts if isinstance(fact, WalletChanged)]
    assert len(versions) == len(set(versions)), "a command raises a wallet's version once"
    moved = {fact.wallet for fact in outcome.facts if isinstance(fact, BlockChanged)}
    assert moved <= set(versions), "whoever changes a block raises its wallet's version"
    numbers: dict[object, list[int]] = defaultdict(list)
    for event in outcome.events:
        assert event.at_us == now_us
        numbers[event.wallet].append(event.sequence)
    for ref, raised in numbers.items():
        before = state.wallets[ref].events_raised if ref in state.wallets else 0
        assert raised == list(range(before + 1, before + len(raised) + 1)), "events are numbered without a gap"
    assert len({event.id for event in outcome.events}) == len(outcome.events)


class Watched(NamedTuple):
    """A wallet at a moment: what it is watched for, what of that has rung, and its balance."""

    alerts: tuple[Alert, ...] = ()
    rung: tuple[Alert, ...] = ()
    balance: int = 0


def watched(state: State, now_us: int) -> dict[WalletRef, Watched]:
    found = {}
    for ref, wallet in state.wallets.items():
        blocks = state.blocks.get(ref, {}).values()
        there = [block for block in blocks if block.expires_at_us is None or now_us < block.expires_at_us]
        left = sum(block.granted - block.consumed - block.expired - block.revoked for block in there)
        found[ref] = Watched(wallet.alerts, wallet.rung, left - wallet.receivable)
    return found


TOLD = {"low": "credit.low", "exhausted": "credit.exhausted", "top_up": "topup.due"}


def check_alerts(
    before: dict[WalletRef, Watched], after: dict[WalletRef, Watched], command: AnyCommand, outcome: Applied
) -> None:
    """One command at one time: each wallet that it touched rings what its balance has sunk below of, and no other."""
    news = {watch.wallet: watch.alerts for watch in command.watches} if isinstance(command, Hold) else {}
    touched = {fact.wallet for fact in outcome.facts if isinstance(fact, WalletChanged)}
    for ref, now in after.items():
        was = before.get(ref, Watched())
        if ref not in touched:
            assert now == was, f"{ref} changes without a fact of its own"
            continue
        assert now.alerts == news.get(ref, was.alerts), ref
        assert now.rung == tuple(alert for alert in now.alerts if now.balance < alert.below), ref
        silent = {alert for alert in now.alerts if alert not in was.alerts and was.balance < alert.below}
        rings = [alert for alert in now.rung if alert not in was.rung and alert not in silent]
        told = [event for event in outcome.events if event.wallet == ref and event.type in TOLD.values()]
        assert [event.type for event in told] == [TOLD[alert.kind] for alert in rings], ref
        for event, alert in zip(told, rings, strict=True):
            threshold = {} if alert.kind == "exhausted" else {"threshold": alert.below}
            assert event.body == {**threshold, "balance": now.balance}


def _check_change(before: Reservation | None, after: Reservation) -> None:
    if before is None:
        return
    assert before.state not in FINAL, "what is settled stays settled"
    assert before.state is ReservationState.OPEN or not before.refunds, "what was given back is not charged again"
    if before.state is ReservationState.EXPIRED:
        assert after.state is ReservationState.COMMITTED, "only a late commit changes what has expired"
    assert after.expires_at_us >= before.expires_at_us
    for was, now in zip(before.charged, after.charged, strict=True):
        assert now.base >= was.base, "what was charged stays charged"
        assert now.markup >= was.markup


def _check_refund(before: Reservation | None, after: Reservation) -> None:
    assert before is not None
    assert msgspec.structs.replace(after, refunds=before.refunds) == before, "a refund changes nothing else"
    given = {payment.name: payment for payment in after.refunds}
    assert len(given) == len(after.refunds)
    for was in before.refunds:
        assert given[was.name].base >= was.base, "what was given back stays given back"
        assert given[was.name].markup >= was.markup
    paid = {payment.name: payment for payment in after.payments}
    for name, payment in given.items():
        assert 0 <= payment.base <= paid[name].base, "no more is given back than was paid"
        assert 0 <= payment.markup <= paid[name].markup


def _scope(fact: Fact) -> Scope:
    match fact:
        case Transfer() | KeyTaken() | KeyFreed():
            return fact.scope
        case WalletOpened():
            return fact.wallet.ref.scope
        case WalletChanged() | BlockChanged():
            return fact.wallet.scope
        case BlockOpened():
            return fact.block.wallet.scope
        case ReservationChanged():
            return fact.reservation.ref.scope
        case UsageRecorded():
            return fact.reservation.scope
