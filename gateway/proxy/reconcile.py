"""Telling the ledger how a request ended when it was not there, or had settled for us: now, or out of the journal."""

import msgspec

from ledger.commands import Commit, Debit, Refund, Release
from ledger.errors import KeyReused, NotFound, ReservationSettled
from ledger.ledger import Ledger
from ledger.model import ReservationState
from ledger.outcomes import Settled

Kept = Commit | Release | Debit
"""What a settlement can be. A debit is that of a request which was served while the ledger was away."""


async def tell(ledger: Ledger, command: Kept) -> None:
    """Do what *command* says, whatever has happened to its reservation since. Repeatable.

    Raises:
        LedgerError: it is refused for good.
        LedgerUnavailable: try again.
    """
    if isinstance(command, Release):
        await give_back(ledger, command)
    elif isinstance(command, Debit):
        await _charge_afterwards(ledger, command)
    else:
        await ledger.execute(command)


async def give_back(ledger: Ledger, release: Release) -> None:
    """Release a reservation; what was charged for it because its time had run out is refunded.

    Raises:
        LedgerUnavailable: try again.
    """
    try:
        await ledger.execute(release)
    except NotFound:
        return  # It was never made: nobody knew.
    except ReservationSettled as error:
        if error.state is ReservationState.EXPIRED and isinstance(error.result, Settled) and error.result.payments:
            refund = Refund(
                id=f"{release.id}r",
                scope=release.scope,
                reservation=release.reservation,
                payments=error.result.payments,
            )
            await ledger.execute(refund)


async def _charge_afterwards(ledger: Ledger, debit: Debit) -> None:
    """Charge for what was served. A key that stands for another request by now protects nothing: the work was done."""
    try:
        await ledger.execute(debit)
    except KeyReused:
        await ledger.execute(msgspec.structs.replace(debit, key=None, response=None))
