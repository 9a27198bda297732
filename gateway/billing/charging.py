"""The one place where a payer's credits are asked for, whoever asks: the proxy, metered usage or a reservation."""

from typing import TypeVar

import msgspec

from gateway.billing.budgets import Budgets
from gateway.billing.spender import Spender
from ledger.commands import Debit, Extend, Reserve
from ledger.errors import LimitReached
from ledger.ledger import Ledger
from ledger.outcomes import Applied

__all__ = ["Charging", "Spender"]

Asked = TypeVar("Asked", bound=Reserve | Debit | Extend)


class Charging:
    """Puts a hold or a debit to the ledger, under the budgets of who spends."""

    def __init__(self, ledger: Ledger, *, budgets: Budgets) -> None:
        self._ledger = ledger
        self._budgets = budgets

    async def ask(self, command: Reserve | Debit | Extend, spender: Spender) -> Applied:
        """What the ledger makes of *command*.

        Raises:
            LedgerError: as `Ledger.execute`.
            BudgetExceeded
            LedgerUnavailable
        """
        limited = await self.limited(command, spender)
        try:
            return await self._ledger.execute(limited)
        except LimitReached as refused:
            raise self._budgets.exceeded(refused, limited.limits) from None

    async def limited(self, command: Asked, spender: Spender) -> Asked:
        """*command* under the limits of *spender*: for who has to keep it. `ask` does this by itself.

        Raises:
            LedgerUnavailable: nobody can say which there are.
        """
        limits = await self._budgets.limits(command.scope, spender)
        return msgspec.structs.replace(command, limits=limits) if limits else command
