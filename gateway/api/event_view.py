"""An event as a tenant reads it, in a webhook and in `GET /v1/events`.

`data` has the facts of its type in the words of the API. What is not named here stays inside: what a provider costs and
what the tenant earns are nobody's but the tenant's, and a receiver may be anybody's.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import select
from sqlmodel import col

from gateway.api.credits import block_view
from gateway.api.customers import customer_view
from gateway.api.wire import amounts
from gateway.clock import time_text
from gateway.database import Database, of
from gateway.errors import ApiError
from gateway.events.event import CUSTOMER_WALLET, LIMIT_WALLET, StoredEvent, customer_of
from gateway.identity.customers import Customers
from gateway.lru import LRU
from gateway.tables import AssetVersion, Tenant
from ledger.model import Block
from pricing.money import Asset

ASSETS_MAX: Final = 1_000
"""Tenants whose asset a process remembers."""

NAMES: Final[Mapping[str, str]] = {
    "reservation": "reservation_id",
    "request_id": "request_id",
    "reference": "reference",
    "reason": "reason",
    "cause": "cause",
    "pack": "pack",
    "order": "order_id",
    "package": "package",
    "price": "price",
    "currency": "currency",
    "metric": "billable_metric_key",
    "action": "action",
    "model": "model",
    "threshold_bps": "threshold_bps",
}
"""What we call a fact, by what the ledger calls it. Those of other types than a text or a number are not told."""

AMOUNTS: Final[Mapping[str, str]] = {
    "amount": "amount",
    "charged": "charged",
    "refunded": "refunded",
    "price": "price",
    "bonus": "bonus",
    "owed": "owed",
    "threshold": "threshold",
    "balance": "balance",
}

CustomerObject = Callable[[str, str, str], Awaitable[dict[str, Any] | None]]
"""A customer as `GET /v1/customers/{id}` shows them, by tenant, mode and our id; None where there is none."""


class Rendering:
    """Writes events. What it shows of a customer is how they are now."""

    def __init__(self, database: Database, *, customer: CustomerObject) -> None:
        self._database = database
        self._customer = customer
        self._assets: LRU[str, Asset] = LRU(ASSETS_MAX)

    async def text(self, event: StoredEvent) -> str:
        """The body of a webhook."""
        return msgspec.json.encode(await self.view(event)).decode()

    async def view(self, event: StoredEvent) -> dict[str, Any]:
        """The event as JSON has it."""
        asset = await self._asset(event.tenant)
        customer_id = customer_of(event.wallet)
        customer = None if customer_id is None else await self._customer(event.tenant, event.mode, customer_id)
        block = event.body.get("block")
        shown = None
        if isinstance(block, dict):
            shown = block_view(msgspec.convert(block, Block), customer_id or event.wallet, asset).model_dump(
                mode="json"
            )
        return {
            "id": event.id,
            "type": event.type,
            "timestamp": time_text(event.at_us),
            "livemode": event.mode == "live",
            "sequence": event.sequence,
            "customer_id": customer_id,
            "customer": customer,
            "credit_block": shown,
            "data": _data(event, asset),
        }

    async def _asset(self, tenant: str) -> Asset:
        """The tenant's credits. Their scale never changes, and nothing else of them is shown here."""
        known = self._assets.get(tenant)
        if known is None:
            query = (
                select(col(AssetVersion.code), col(AssetVersion.scale), col(AssetVersion.usd_value_picos))
                .join(Tenant, col(Tenant.id) == col(AssetVersion.tenant))
                .where(col(AssetVersion.tenant) == tenant, col(AssetVersion.code) == col(Tenant.asset_code))
                .order_by(col(AssetVersion.effective_from_us))
                .limit(1)
            )
            async with self._database.read(of(tenant)) as connection:
                code, scale, usd_value_picos = (await connection.execute(query)).one()
            known = Asset(code=code, scale=scale, usd_value_picos=usd_value_picos)
            self._assets.put(tenant, known)
        return known


def customer_object(customers: Customers) -> CustomerObject:
    """Customers, read as they are now."""

    async def shown(tenant: str, mode: str, customer_id: str) -> dict[str, Any] | None:
        try:
            found = await customers.get(tenant, mode, customer_id)
        except ApiError:
            return None
        return customer_view(found, mode=mode).model_dump(mode="json")

    return shown


def _data(event: StoredEvent, asset: Asset) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if event.wallet.startswith(LIMIT_WALLET):
        data["budget_id"] = event.wallet.removeprefix(LIMIT_WALLET)
    elif not event.wallet.startswith(CUSTOMER_WALLET):
        data["wallet"] = event.wallet
    for name, value in event.body.items():
        if isinstance(value, int) and not isinstance(value, bool) and name in AMOUNTS:
            data |= amounts(asset, **{AMOUNTS[name]: value})
        elif name in NAMES and (value is None or isinstance(value, str | int)):
            data[NAMES[name]] = value
    return data
