"""Telling the ledger how a request ended when it was not there, or had settled for us: now, or out of the journal."""

import msgspec

from ledger.commands import Commit, Debit, Refund, Release
from ledger.errors import KeyReused, LedgerUnavailable, NotFound, ReservationSettled
from ledger.ledger import Ledger
from ledger.model import ReservationRef, ReservationState
from ledger.outcomes import Reserved, Result, Settled

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
        await _only_the_cost(ledger, command, (await ledger.execute(command)).result)


async def _only_the_cost(ledger: Ledger, command: Commit | Debit, result: Result | None) -> None:
    """Give back what a mark took beyond what the work cost: the sweeper came first, and the client knows the cost."""
    if not isinstance(result, Settled) or result.reservation != command.reservation.reservation:
        return
    paid = [0] * len(command.settlement.charges)
    for payment in result.payments:
        paid[payment.leg] += payment.total
    costs = (charge.total for charge in command.settlement.charges)
    excess = tuple(max(0, taken - cost) for taken, cost in zip(paid, costs, strict=True))
    if any(excess):
        refund = Refund(
            id=f"{command.id}r",
            scope=command.scope,
            reservation=command.reservation,
            payments=result.payments,
            amounts=excess,
        )
        await ledger.execute(refund)


async def give_back(ledger: Ledger, release: Release) -> bool:
    """Release a reservation; what was charged for it because its time had run out is refunded.

    False where there is none: nobody knew whether it was made.

    Raises:
        LedgerUnavailable: try again.
    """
    try:
        await ledger.execute(release)
    except NotFound:
        return False
    except ReservationSettled as error:
        if error.state is ReservationState.EXPIRED and isinstance(error.result, Settled) and error.result.payments:
            refund = Refund(
                id=f"{release.id}r",
                scope=release.scope,
                reservation=release.reservation,
                payments=error.result.payments,
            )
            await ledger.execute(refund)
    return True


async def _charge_afterwards(ledger: Ledger, debit: Debit) -> None:
    """Charge for what was served. A key that stands for another request by now protects nothing: the work was done.

    Where it stands for the same request, served a second time, that one is charged instead, as soon as it has ended:
    if it fails, its key is free again and this one is.
    """
    try:
        result = (await ledger.execute(debit)).result
    except KeyReused:
        debit = msgspec.structs.replace(debit, key=None, response=None)
        result = (await ledger.execute(debit)).result
    if isinstance(result, Reserved) and result.reservation != debit.reservation.reservation:
        other = await ledger.reservation(ReservationRef(*debit.scope, result.reservation))
        if other is not None and other.state is ReservationState.OPEN:
            raise LedgerUnavailable("whether the key's other request will be charged is not known yet")
    await _only_the_cost(ledger, debit, result)
