"""What the wallets that pay are watched for: what each request for credits says of it to the ledger.

How it works. That nothing is left is always watched for. Besides, a tenant names thresholds, for its customers and its
developers' own wallets, and a customer may have others, or an agreement to be topped up below one. What is looked up is
the tenant's, and in the same step whether any customer has their own: only then are customers looked up, one by one. An
answer is trusted for `lease_s`; a change that was answered is known at once in this process.

The wallet remembers what it is watched for (`ledger/alerts.py`). So a look-up that fails stops no request: that one
says what was known before, or nothing, and then the wallet is watched as it was.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from sqlalchemy import Select, and_, exists, select
from sqlmodel import col

from gateway.database import Database, DatabaseUnavailable, of, within
from gateway.events.event import TOLD_WALLETS, customer_of
from gateway.identity.thresholds import THRESHOLDS_MAX, thresholds_of
from gateway.lru import LRU
from gateway.tables import AssetVersion, Customer, Tenant
from ledger.alerts import EXHAUSTED
from ledger.commands import Debit, Reserve, Watch
from ledger.model import Alert, Scope, WalletRef
from pricing.money import Asset

LEASE_S: Final = 1.0
LOOK_UP_S: Final = 2.0
"""How long a request waits for a look-up before it goes without. The ledger is asked in the same database."""

OUTAGE_LEASE_S: Final = 600.0
"""How long beyond its lease an answer is used while the database cannot be asked."""

OUTAGE_WAIT_S: Final = 0.25
"""How long a request waits that may go on with an answer from before."""

AWAY_S: Final = 1.0
"""How long nobody looks anything up after a look-up has failed."""

LOOK_UPS_MAX: Final = 1_000
"""Look-ups under way at once. Requests beyond them go without."""

KEPT_MAX: Final = 100_000
"""Customers, and tenants, whose alerts a process remembers."""


class _Name(NamedTuple):
    """Whose alerts: a customer's, or without one those of everybody else of the scope."""

    scope: Scope
    customer_id: str | None


class _Lease(NamedTuple):
    """*of_customers*: whether any customer of the scope may have their own."""

    alerts: tuple[Alert, ...]
    of_customers: bool
    until_s: float


class Alerts:
    """The alerts of wallets, from memory where it can.

    Args:
        lease_s: how long an answer is used before it is asked for again.
        monotonic_s: the clock of the leases.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float = LEASE_S,
        monotonic_s: Callable[[], float] = time.monotonic,
        kept_max: int = KEPT_MAX,
    ) -> None:
        self._database = database
        self._lease_s = lease_s
        self._monotonic_s = monotonic_s
        self._known: LRU[_Name, _Lease] = LRU(kept_max)
        self._under_way: dict[_Name, asyncio.Task[_Lease]] = {}
        self._away_until_s = float("-inf")

    async def watches(self, command: Reserve | Debit) -> tuple[Watch, ...]:
        """What the wallets that may pay for *command* are watched for: the tenant's own that it is told of."""
        watches = []
        for leg in command.legs:
            for ref in leg.wallets:
                if ref[:2] == command.scope and ref.wallet.startswith(TOLD_WALLETS):
                    alerts = await self._alerts(ref)
                    if alerts is not None:
                        watches.append(Watch(ref, alerts))
        return tuple(watches)

    def invalidate(self) -> None:
        """Forget everything: the next request asks, whatever is being looked up now."""
        self._known.clear()
        self._under_way.clear()

    def forget(self, scope: Scope, customer_id: str) -> None:
        """Forget what this customer is watched for, and whether any customer has alerts of their own."""
        for name in (_Name(scope, None), _Name(scope, customer_id)):
            self._known.discard(name)
            self._under_way.pop(name, None)

    async def _alerts(self, ref: WalletRef) -> tuple[Alert, ...] | None:
        """None where nobody can say."""
        shared = await self._lease(_Name(ref.scope, None))
        customer_id = customer_of(ref.wallet)
        if shared is None or customer_id is None or not shared.of_customers:
            return None if shared is None else shared.alerts
        own = await self._lease(_Name(ref.scope, customer_id))
        return None if own is None else own.alerts

    async def _lease(self, name: _Name) -> _Lease | None:
        known = self._known.get(name)
        now_s = self._monotonic_s()
        if known is not None and now_s < known.until_s:
            return known
        stale = known if known is not None and now_s < known.until_s + OUTAGE_LEASE_S else None
        if now_s < self._away_until_s:
            return stale
        task = self._under_way.get(name)
        if task is None:
            if len(self._under_way) >= LOOK_UPS_MAX:
                return stale
            task = asyncio.create_task(self._look_up(name))
            self._under_way[name] = task
            task.add_done_callback(lambda done: self._landed(name, done))
        try:
            # All who ask for the same while it is looked up get one answer; one who goes away does not stop the others.
            async with within(LOOK_UP_S if stale is None else OUTAGE_WAIT_S):
                return await asyncio.shield(task)
        except DatabaseUnavailable:
            self._away_until_s = self._monotonic_s() + AWAY_S
            return stale

    def _landed(self, name: _Name, task: "asyncio.Task[_Lease]") -> None:
        if self._under_way.get(name) is task:
            del self._under_way[name]
        if not task.cancelled():
            task.exception()  # Seen here, in case all who waited have gone.

    async def _look_up(self, name: _Name) -> _Lease:
        # The lease begins before the rows are read: what changes while we read is noticed a lease later at most.
        until_s = self._monotonic_s() + self._lease_s
        query = _of_tenant(name.scope) if name.customer_id is None else _of_customer(name.scope, name.customer_id)
        async with self._database.read(of(*name.scope)) as connection:
            row = (await connection.execute(query)).one_or_none()
        # A customer who is not there, or is erased, is watched for what nobody has to say.
        lease = _Lease((EXHAUSTED,) if row is None else _alerts_of(row), row is not None and row.of_customers, until_s)
        if self._under_way.get(name) is asyncio.current_task():  # Otherwise it was forgotten while we read.
            self._known.put(name, lease)
        return lease


def _of_tenant(scope: Scope) -> Select[Any]:
    """A tenant's settings, and whether a customer has their own alerts."""
    of_customers = exists().where(
        col(Customer.tenant) == scope.tenant, col(Customer.mode) == scope.mode, col(Customer.own_alerts)
    )
    return _settings(of_customers.label("of_customers")).where(col(Tenant.id) == scope.tenant)


def _of_customer(scope: Scope, customer_id: str) -> Select[Any]:
    """A customer's settings and their tenant's."""
    this = and_(
        col(Customer.tenant) == col(Tenant.id), col(Customer.mode) == scope.mode, col(Customer.id) == customer_id
    )
    query = _settings(
        col(Customer.own_alerts).label("of_customers"), col(Customer.settings).label("own_settings")
    ).join(Customer, this)
    return query.where(col(Tenant.id) == scope.tenant, col(Customer.erased_at_us).is_(None))


def _settings(*columns: Any) -> Select[Any]:
    """The tenant's settings and credit, and *columns*."""
    credit = and_(col(AssetVersion.tenant) == col(Tenant.id), col(AssetVersion.code) == col(Tenant.asset_code))
    return (
        select(
            col(Tenant.settings),
            col(AssetVersion.code),
            col(AssetVersion.scale),
            col(AssetVersion.usd_value_picos),
            *columns,
        )
        .join(AssetVersion, credit)
        .limit(1)  # Any version: what is asked for here, the scale, never changes.
    )


def _alerts_of(row: Any) -> tuple[Alert, ...]:
    """The highest threshold first, so that of several that are crossed at once it is told first."""
    asset = Asset(code=row.code, scale=row.scale, usd_value_picos=row.usd_value_picos)
    tenants, own = thresholds_of(row.settings), thresholds_of(getattr(row, "own_settings", {}))
    low = tenants.low_balance_thresholds if own.low_balance_thresholds is None else own.low_balance_thresholds
    amounts = sorted({asset.from_millis(millis) for millis in low or ()}, reverse=True)[:THRESHOLDS_MAX]
    alerts = [Alert("low", amount) for amount in amounts if amount > 0]
    if own.top_up:
        alerts.append(Alert("top_up", asset.from_millis(own.top_up)))
    return (*alerts, EXHAUSTED)
