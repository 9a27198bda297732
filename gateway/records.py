"""What has charge of some of the gateway's own tables has in common: where its statements run, the time, and ids."""

from collections.abc import Callable
from typing import Self

from gateway.clock import now_us
from gateway.database import Database, Transactions
from gateway.ids import new_id


class Records:
    """Each method of a subclass is one transaction, or a part of the one that was given."""

    def __init__(
        self,
        database: Database,
        *,
        transactions: Transactions | None = None,
        now_us: Callable[[], int] = now_us,
        new_id: Callable[[str], str] = new_id,
    ) -> None:
        self._database = database
        self._transactions = transactions or database
        self._now_us = now_us
        self._new_id = new_id

    def within(self, transactions: Transactions) -> Self:
        """The same, as a part of other work that commits as one."""
        return type(self)(self._database, transactions=transactions, now_us=self._now_us, new_id=self._new_id)
