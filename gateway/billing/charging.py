"""The one place where a payer's credits are asked for, whoever asks: the proxy, metered usage or a reservation."""

import msgspec

from gateway.billing.auto_buy import AutoBuy
from ledger.commands import Debit, Reserve
from ledger.errors import InsufficientCredits
from ledger.ledger import Ledger
from ledger.outcomes import Applied


class Spender(msgspec.Struct, frozen=True):
    """On whose account something is asked for; the command's scope has the tenant and the mode.

    `customer_id` is the user whom the request names, whoever pays.
    """

    app_id: str | None
    key_id: str
    customer_id: str | None


class Charging:
    """Puts a hold or a debit to the ledger. A plan that has run out is followed by the next, if its customer agreed."""

    def __init__(self, ledger: Ledger, *, auto_buy: AutoBuy) -> None:
        self._ledger = ledger
        self._auto_buy = auto_buy

    async def ask(self, command: Reserve | Debit, spender: Spender) -> Applied:
        """What the ledger makes of *command*.

        Raises:
            LedgerError: as `Ledger.execute`.
            LedgerUnavailable
        """
        try:
            return await self._ledger.execute(command)
        except InsufficientCredits as refused:
            if spender.customer_id is None:
                raise
            return await self._auto_buy.try_again(
                command, refused, customer_id=spender.customer_id, app_id=spender.app_id
            )
