"""The default grant: given to each new customer once, whatever happens in between."""

from collections.abc import Callable
from typing import Final

from gateway.identity.default_grant import Welcome
from gateway.identity.wallets import customer_wallet
from ledger.commands import Grant, Key
from ledger.ledger import Ledger
from ledger.model import Funding, Restriction, Scope

OPERATION: Final = "customer.default"
"""The scope of the idempotency keys, which are the customers' ids."""

DIGEST: Final = "welcome"
"""A customer is welcomed once, whatever the terms."""

SECOND_US: Final = 1_000_000


class Welcomes:
    """Gives welcomes out of the ledger."""

    def __init__(self, ledger: Ledger, *, now_us: Callable[[], int], new_id: Callable[[str], str]) -> None:
        self._ledger = ledger
        self._now_us = now_us
        self._new_id = new_id

    async def give(self, tenant_id: str, mode: str, customer_id: str, welcome: Welcome) -> None:
        """Grant what is due. The operator was not paid for it: it is the tenant's gift.

        Raises:
            LedgerUnavailable: it may have been granted; give it again.
        """
        grant = welcome.grant
        expires_at_us = None
        if grant.expires_after_s is not None:
            expires_at_us = self._now_us() + grant.expires_after_s * SECOND_US
        await self._ledger.execute(
            Grant(
                id=self._new_id("cmd"),
                scope=Scope(tenant_id, mode),
                key=Key(OPERATION, customer_id, DIGEST),
                wallet=customer_wallet(tenant_id, mode, customer_id),
                asset=welcome.asset,
                block_id=self._new_id("blk"),
                amount=grant.amount,
                funding=Funding.EXTERNAL,
                operator_paid=False,
                priority=grant.priority,
                expires_at_us=expires_at_us,
                source=grant.source,
                restriction=Restriction(apps=grant.apps, metrics=grant.metrics, models=grant.models),
                metadata=grant.metadata,
            )
        )
