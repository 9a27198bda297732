"""What an entry of the journal says of itself: its kind, time, id and result are those that its facts tell, too."""

from collections.abc import Iterator
from typing import Final

from ledger.invariants import Violation
from ledger.model import ReservationState
from ledger.outcomes import (
    BlockOpened,
    Changed,
    Expired,
    Fact,
    Granted,
    KeyTaken,
    Purchased,
    Refunded,
    ReservationChanged,
    Reserved,
    Result,
    Reversed,
    Revoked,
    Settled,
    ToppedUp,
    UsageRecorded,
    WalletChanged,
)
from ledger.store.protocol import JournalEntry

RESULTS: Final[dict[str, type[Result]]] = {
    "grant": Granted,
    "top_up": ToppedUp,
    "reverse": Reversed,
    "tell": Changed,
    "purchase": Purchased,
    "reserve": Reserved,
    "extend": Reserved,
    "commit": Settled,
    "release": Settled,
    "lapse": Settled,
    "debit": Settled,
    "refund": Refunded,
    "revoke": Revoked,
    "expire": Expired,
    "freeze": Changed,
    "set_overdraft": Changed,
    "set_limit": Changed,
}
"""What a command of each kind answers with when it has changed something."""


def check_entry(entry: JournalEntry) -> Iterator[Violation]:
    """A repetition is answered with what stands here, and a statement shows it."""
    where = {"seq": entry.seq, "command": entry.id}
    if entry.result is not None and RESULTS.get(entry.kind) is not type(entry.result):
        yield Violation("a command answers with what its kind does", {**where, "kind": entry.kind})
    for fact in entry.facts:
        if _time_of(fact) not in (None, entry.at_us):
            yield Violation("an entry's facts are of its time", {**where, "at_us": entry.at_us, "fact": fact})
        if isinstance(fact, KeyTaken) and fact.result != entry.result:
            yield Violation("a key answers with its command's result", {**where, "fact": fact})
        if isinstance(fact, ReservationChanged):
            yield from _check_reservation(entry, fact)


def _time_of(fact: Fact) -> int | None:
    match fact:
        case WalletChanged() | UsageRecorded():
            return fact.at_us
        case BlockOpened():
            return fact.block.created_at_us
        case _:
            return None


def _check_reservation(entry: JournalEntry, fact: ReservationChanged) -> Iterator[Violation]:
    where = {"seq": entry.seq, "command": entry.id}
    reservation = fact.reservation
    if (
        reservation.state is not ReservationState.OPEN
        and RESULTS.get(entry.kind) is Settled
        and (reservation.settled_by, reservation.settled_at_us) != (entry.id, entry.at_us)
    ):
        yield Violation("a reservation tells what settled it", {**where, "settled_by": reservation.settled_by})
    for transfer in entry.transfers:
        if transfer.reference != reservation.ref.reservation:
            yield Violation("a transfer refers to its reservation", {**where, "transfer": transfer})
