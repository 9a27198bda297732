"""The one place where a payer's credits are asked for, whoever asks: the proxy, metered usage or a reservation."""

from typing import TypeVar

import msgspec

from gateway.billing.alerts import Alerts
from gateway.billing.auto_buy import AutoBuy
from gateway.billing.budgets import Budgets
from gateway.billing.spender import Spender
from ledger.commands import Debit, Extend, Reserve
from ledger.errors import InsufficientCredits, LimitReached
from ledger.ledger import Ledger
from ledger.outcomes import Applied

__all__ = ["Charging", "Spender"]

Asked = TypeVar("Asked", bound=Reserve | Debit | Extend)


class Charging:
    """Puts a hold or a debit to the ledger, under the budgets of who spends, and with what its payers are watched for.

    A plan that has run out is followed by the next, if its customer agreed.
    """

    def __init__(self, ledger: Ledger, *, budgets: Budgets, alerts: Alerts, auto_buy: AutoBuy) -> None:
        self._ledger = ledger
        self._budgets = budgets
        self._alerts = alerts
        self._auto_buy = auto_buy

    async def ask(self, command: Reserve | Debit | Extend, spender: Spender) -> Applied:
        """What the ledger makes of *command*.

        Raises:
            LedgerError: as `Ledger.execute`.
            BudgetExceeded
            LedgerUnavailable
        """
        limited = await self.limited(command, spender)
        if not isinstance(limited, Extend):  # Whoever extends has been watched since the reservation.
            limited = msgspec.structs.replace(limited, watches=await self._alerts.watches(limited))
        try:
            return await self._asked(limited, spender)
        except LimitReached as refused:
            raise self._budgets.exceeded(refused, limited.limits) from None

    async def _asked(self, command: Reserve | Debit | Extend, spender: Spender) -> Applied:
        try:
            return await self._ledger.execute(command)
        except InsufficientCredits as refused:
            if spender.customer_id is None or isinstance(command, Extend):
                raise
            return await self._auto_buy.try_again(
                command, refused, customer_id=spender.customer_id, app_id=spender.app_id
            )

    async def limited(self, command: Asked, spender: Spender) -> Asked:
        """*command* under the limits of *spender*: for who has to keep it. `ask` does this by itself.

        Raises:
            LedgerUnavailable: nobody can say which there are.
        """
        limits = await self._budgets.limits(command.scope, spender)
        return msgspec.structs.replace(command, limits=limits) if limits else command
