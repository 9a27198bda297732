"""Giving back what a request was charged: all of it or a part, to the blocks that paid."""

from collections.abc import Callable
from typing import Final

from ledger.commands import Key, Refund
from ledger.errors import InvalidAmount, LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import Reservation, WalletRef
from ledger.outcomes import Applied

TRIES_MAX: Final = 8
"""Partial commits may charge more while a refund is under way; then it is decided anew."""


class RefundTooLarge(Exception):
    """More was asked back than is left of the charge. Amounts are in the asset's smallest unit."""

    def __init__(self, *, asked: int, refundable: int) -> None:
        super().__init__(f"{asked} asked back of {refundable}")
        self.asked = asked
        self.refundable = refundable


class NothingCharged(Exception):
    """The request was not charged, or not yet."""


class Refunds:
    def __init__(self, ledger: Ledger, *, new_id: Callable[[str], str]) -> None:
        self._ledger = ledger
        self._new_id = new_id

    async def refund(
        self,
        reservation: Reservation,
        amount: int | None,
        *,
        unfunded: WalletRef | None,
        key: Key | None,
        reason: str | None,
    ) -> Applied:
        """Give back *amount* of what the payer was charged for *reservation*; None gives all of it back, to everybody.

        Repeatable, also without a key when it is all: the second time there is nothing left to give.

        Args:
            amount: > 0, in the asset's smallest unit. It comes out of the payer's part alone, not of what the developer
                bore of an action.
            unfunded: the line of the tenant that gives it back, as in `Refund`.

        Raises:
            RefundTooLarge, NothingCharged
            LimitReached: the tenant's line does not afford the base cost that the operator was paid for.
            LedgerError: as `Ledger.execute`.
        """
        for _ in range(TRIES_MAX):
            if not reservation.payments:
                raise NothingCharged
            command = Refund(
                id=self._new_id("cmd"),
                scope=reservation.ref.scope,
                key=key,
                reservation=reservation.ref,
                payments=reservation.payments,
                amounts=None if amount is None else (amount, *[0] * (len(reservation.legs) - 1)),
                reason=reason,
                unfunded=unfunded,
            )
            try:
                return await self._ledger.execute(command)
            except InvalidAmount:
                now = await self._ledger.reservation(reservation.ref)
                assert now is not None, "a reservation is there for ever"
                if now.payments == reservation.payments:
                    refundable = now.charged[0].total - now.refunded[0]
                    raise RefundTooLarge(asked=amount or 0, refundable=refundable) from None
                reservation = now
        raise LedgerUnavailable("the request is being charged at this moment, again and again")
