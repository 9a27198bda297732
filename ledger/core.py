"""The ledger's decisions, pure: what a command comes to, given the state and the time.

How it works. ``decide`` looks a command's key up, then hands it to the function of its kind. That function gathers
its changes in a :class:`~ledger.draft.Draft` and answers with facts, or refuses with a reason and changes nothing.
``evolve`` (in ``ledger.state``) folds the facts. A reservation pins slices of blocks in burn order; a commit consumes
its own slices, then what else is free, then an agreed overdraft, and what is left is the operator's loss.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from ledger.commands import (
    AnyCommand,
    Commit,
    Debit,
    Expire,
    Extend,
    Freeze,
    Grant,
    Hold,
    Lapse,
    Purchase,
    Refund,
    Release,
    Reserve,
    Reverse,
    Revoke,
    SetLimit,
    SetOverdraft,
    Tell,
    TopUp,
)
from ledger.granting import expire, freeze, grant, revoke, set_overdraft, tell
from ledger.limits import set_limit
from ledger.model import ReservationRef, WalletRef
from ledger.outcomes import (
    Applied,
    KeyTaken,
    Outcome,
    Reason,
    Rejected,
    Reserved,
)
from ledger.purchasing import purchase
from ledger.refunding import refund
from ledger.reserving import extend, reserve
from ledger.reversing import reverse
from ledger.settling import commit, debit, lapse, release
from ledger.state import State
from ledger.topping_up import top_up


def decide(state: State, command: AnyCommand, now_us: int) -> Outcome:
    """What *command* comes to at *now_us*. Changes nothing: fold the facts with ``evolve``."""
    taken = None
    if command.key is not None:
        taken = state.keys.get((command.scope, command.key.operation, command.key.key))
        if taken is not None and taken.digest != command.key.digest:
            return Rejected(Reason.KEY_REUSED)
        if taken is not None and not _settles_own(command, taken):
            return Applied(result=taken.result, replayed=True)
    if _subject(command)[:2] != command.scope:
        return Rejected(Reason.NOT_FOUND)
    outcome = _DECISIONS[type(command)](state, command, now_us)
    if command.key is None or taken is not None or isinstance(outcome, Rejected) or outcome.replayed:
        return outcome
    taken = KeyTaken(
        scope=command.scope,
        operation=command.key.operation,
        key=command.key.key,
        digest=command.key.digest,
        result=outcome.result,
    )
    return msgspec.structs.replace(outcome, facts=(*outcome.facts, taken))


def _settles_own(command: AnyCommand, taken: KeyTaken) -> bool:
    """Whether a debit's key was taken by the reservation of its own request, which it is there to settle."""
    return (
        isinstance(command, Debit)
        and isinstance(taken.result, Reserved)
        and taken.result.reservation == command.reservation.reservation
    )


def _subject(command: AnyCommand) -> ReservationRef | WalletRef:
    """What a command is about. What belongs to another tenant or mode is not found."""
    return command.reservation if isinstance(command, _ON_RESERVATIONS) else command.wallet


_ON_RESERVATIONS = (Hold, Extend, Commit, Release, Lapse, Refund)

_DECISIONS: dict[type[AnyCommand], Callable[[State, Any, int], Outcome]] = {
    Grant: grant,
    TopUp: top_up,
    Reverse: reverse,
    Tell: tell,
    Purchase: purchase,
    Reserve: reserve,
    Extend: extend,
    Commit: commit,
    Release: release,
    Lapse: lapse,
    Debit: debit,
    Refund: refund,
    Revoke: revoke,
    Expire: expire,
    Freeze: freeze,
    SetOverdraft: set_overdraft,
    SetLimit: set_limit,
}
