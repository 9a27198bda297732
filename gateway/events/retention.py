"""Old events go: a month after they were told, in pages, with what became of their deliveries."""

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import delete, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.database import Database, of
from gateway.events.schedule import DELIVERED, FAILED
from gateway.ids import RANDOM_BITS, encode
from gateway.tables import Tenant, WebhookDelivery, WebhookEndpoint
from ledger.model import Scope
from ledger.store.tables import LedgerEventRow

RETENTION_S: Final = 30 * 24 * 3600
"""Longer than any schedule of attempts."""

PAGE: Final = 500
PAGES_MAX: Final = 100
"""Of each kind and scope in a round; the next round goes on."""

MODES: Final = ("live", "test")


class Retention:
    """Deletes what is older than `RETENTION_S`. Repeatable, and safe in every process at once."""

    def __init__(self, database: Database, *, now_us: Callable[[], int], retention_s: int = RETENTION_S) -> None:
        self._database = database
        self._now_us = now_us
        self._retention_us = retention_s * 1_000_000

    async def round(self) -> int:
        """How many rows went.

        Raises:
            DatabaseUnavailable
        """
        async with self._database.read_every_tenant() as connection:
            tenants = (await connection.execute(select(col(Tenant.id)))).scalars().all()
        gone = 0
        for tenant in tenants:
            for mode in MODES:
                gone += await self._of_scope(Scope(tenant, mode))
        return gone

    async def _of_scope(self, scope: Scope) -> int:
        # Ids sort by time, and have an index: whatever is older than the first id of that millisecond goes.
        before = f"evt_{encode(((self._now_us() - self._retention_us) // 1000) << RANDOM_BITS)}"
        gone = 0
        for delete_page in (_deliveries, _orphans, _events):
            for _ in range(PAGES_MAX):
                async with self._database.write(of(*scope)) as connection:
                    count = await delete_page(connection, scope, before)
                gone += count
                if count < PAGE:
                    break
        return gone


async def _deliveries(connection: AsyncConnection, scope: Scope, before: str) -> int:
    """Deliveries that have ended, of events that go."""
    ended = (col(WebhookDelivery.event_id) < before, col(WebhookDelivery.state).in_((DELIVERED, FAILED)))
    count = 0
    for endpoint in (await connection.execute(_endpoints(scope))).scalars().all():
        count += await _delete_deliveries(connection, scope, *ended, col(WebhookDelivery.endpoint) == endpoint)
    return count


async def _orphans(connection: AsyncConnection, scope: Scope, _before: str) -> int:
    """Deliveries to endpoints that are gone."""
    return await _delete_deliveries(connection, scope, col(WebhookDelivery.endpoint).not_in(_endpoints(scope)))


async def _delete_deliveries(connection: AsyncConnection, scope: Scope, *which: Any) -> int:
    key = (col(WebhookDelivery.endpoint), col(WebhookDelivery.wallet), col(WebhookDelivery.sequence))
    here = (col(WebhookDelivery.tenant) == scope.tenant, col(WebhookDelivery.mode) == scope.mode)
    page = select(*key).where(*here, *which).limit(PAGE)
    gone = await connection.execute(delete(WebhookDelivery).where(*here, tuple_(*key).in_(page)))
    return gone.rowcount


async def _events(connection: AsyncConnection, scope: Scope, before: str) -> int:
    """Events that were told."""
    key = (col(LedgerEventRow.wallet), col(LedgerEventRow.sequence))
    here = (col(LedgerEventRow.tenant) == scope.tenant, col(LedgerEventRow.mode) == scope.mode)
    told = (col(LedgerEventRow.id) < before, col(LedgerEventRow.delivered_at_us).is_not(None))
    page = select(*key).where(*here, *told).order_by(col(LedgerEventRow.id)).limit(PAGE)
    return (await connection.execute(delete(LedgerEventRow).where(*here, tuple_(*key).in_(page)))).rowcount


def _endpoints(scope: Scope) -> Any:
    return select(col(WebhookEndpoint.id)).where(
        col(WebhookEndpoint.tenant) == scope.tenant, col(WebhookEndpoint.mode) == scope.mode
    )
