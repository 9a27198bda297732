"""The one place where a payer's credits are asked for, whoever asks: the proxy, metered usage or a reservation."""

import msgspec

from ledger.commands import Debit, Reserve
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
    """Puts a hold or a debit to the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def ask(self, command: Reserve | Debit, spender: Spender) -> Applied:
        """What the ledger makes of *command*.

        Raises:
            LedgerError: as `Ledger.execute`.
            LedgerUnavailable
        """
        return await self._ledger.execute(command)
