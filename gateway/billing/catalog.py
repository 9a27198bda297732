"""What a metric costs now: the answer to every metered request, from a cache with a short lease.

An answer is trusted for `lease_s` from the moment its rows were read, and never across the time at which the next price
takes effect, so a price that was scheduled holds from its very microsecond. That a key has no metric is remembered in
the same way. However many ask when a lease has run out, the database is asked once.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import msgspec
from sqlalchemy import Select, func, select
from sqlmodel import col

from gateway.database import Database, DatabaseUnavailable, of, within
from gateway.lru import LRU
from gateway.tables import BillableMetric, MeteringRule
from ledger.model import Tags
from pricing.metering import Rule, rule_from

LEASE_S: Final = 1.0
OUTAGE_LEASE_S: Final = 600.0
"""How long beyond its lease a price is used while the database cannot be asked, by tenants that chose to be served."""

LOOK_UP_S: Final = 5.0
"""How long a look-up may take before the database is taken for away."""

OUTAGE_WAIT_S: Final = 0.25
"""How long those wait who may go on with a price that they know: the database may hang."""

LOOK_UPS_MAX: Final = 1_000
"""Look-ups under way at once. More are refused: an outage must not fill the memory."""

METRICS_MAX: Final = 20_000
"""Keys that a process remembers, those without a metric among them."""

OveragePolicy = Literal["block", "allow", "notify"]


class MetricNotFound(Exception):
    """The tenant has no metric of this key in this mode, or has archived it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"there is no metric {key[:64]!r}")
        self.key = key


class MetricNotPriced(Exception):
    """No metering rule of the metric is in force."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the metric {key[:64]!r} has no metering rule in force")
        self.key = key


class Metric(msgspec.Struct, frozen=True):
    """Something that a tenant meters.

    Attributes:
        key: the tenant's own name for it.
        overage_policy: what becomes of usage that the wallet cannot pay: it is refused, or owed, or owed and told of.
        priority_max: only blocks of this priority or a lower one pay for it; None is all.
        version: rises with every change.
    """

    id: str
    key: str
    name: str
    overage_policy: OveragePolicy
    priority_max: int | None
    archived: bool
    version: int
    created_at_us: int


class PricedMetric(msgspec.Struct, frozen=True):
    """A metric and what it costs at a time. *price_version* is the id of the metering rule."""

    metric: Metric
    rule: Rule
    price_version: str

    def tags(self, app_id: str | None) -> Tags:
        """What a charge for it is for: blocks can be restricted to its key, and it to blocks."""
        return Tags(app=app_id, metric=self.metric.key, priority_max=self.metric.priority_max)


class MetricName(NamedTuple):
    """Which metric, in the tenant's own words."""

    tenant: str
    mode: str
    key: str


class _Found(NamedTuple):
    """A metric and its rule at every time from *from_us*, before *until_us*."""

    metric: Metric
    rule: Rule | None
    price_version: str | None
    from_us: int
    until_us: int | None

    def holds_at(self, at_us: int) -> bool:
        return self.from_us <= at_us and (self.until_us is None or at_us < self.until_us)


class _Known(NamedTuple):
    """What was found of a key, or that there is nothing, and how long that is trusted."""

    found: _Found | None
    until_s: float

    def holds_at(self, at_us: int) -> bool:
        return self.found is None or self.found.holds_at(at_us)


class Catalog:
    """Prices by metric.

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
        metrics_max: int = METRICS_MAX,
    ) -> None:
        self._database = database
        self._lease_s = lease_s
        self._monotonic_s = monotonic_s
        self._known: LRU[MetricName, _Known] = LRU(metrics_max)
        self._under_way: dict[MetricName, asyncio.Task[_Known]] = {}

    async def priced(
        self, tenant: str, mode: str, key: str, *, at_us: int, through_outage: bool = False
    ) -> PricedMetric:
        """What the metric *key* costs at *at_us*.

        Args:
            through_outage: where the database cannot be asked, go on with what was last known.

        Raises:
            MetricNotFound, MetricNotPriced, DatabaseUnavailable
        """
        name = MetricName(tenant, mode, key)
        found = (await self._answer(name, at_us, through_outage=through_outage)).found
        if found is None or found.metric.archived:
            raise MetricNotFound(key)
        if found.rule is None or found.price_version is None:
            raise MetricNotPriced(key)
        return PricedMetric(found.metric, found.rule, found.price_version)

    def known(self, tenant: str, mode: str, key: str, *, at_us: int) -> PricedMetric | None:
        """What `priced` would answer without asking anybody; None also where it would raise.

        A lease that is half over is renewed meanwhile, so that a metric in steady use is never waited for.
        """
        name = MetricName(tenant, mode, key)
        known = self._known.get(name)
        left_s = 0.0 if known is None else known.until_s - self._monotonic_s()
        if known is None or known.found is None or left_s <= 0 or not known.holds_at(at_us):
            return None
        if left_s < self._lease_s / 2 and len(self._under_way) < LOOK_UPS_MAX:
            self._begin_look_up(name, at_us)
        metric, rule, price_version = known.found.metric, known.found.rule, known.found.price_version
        if metric.archived or rule is None or price_version is None:
            return None
        return PricedMetric(metric, rule, price_version)

    def invalidate(self) -> None:
        """Forget everything, whatever is being looked up now."""
        self._known.clear()
        self._under_way.clear()

    async def _answer(self, name: MetricName, at_us: int, *, through_outage: bool) -> _Known:
        known = self._known.get(name)
        now_s = self._monotonic_s()
        if known is not None and now_s < known.until_s and known.holds_at(at_us):
            return known
        usable = through_outage and known is not None and now_s < known.until_s + OUTAGE_LEASE_S
        try:
            async with within(OUTAGE_WAIT_S if usable else LOOK_UP_S):
                fresh = await self._look_up_once(name, at_us)
                # Whoever came just before a price took effect has looked up the price before.
                return fresh if fresh.holds_at(at_us) else await self._look_up(name, at_us)
        except DatabaseUnavailable:
            if known is None or not usable:
                raise
            return known

    async def _look_up_once(self, name: MetricName, at_us: int) -> _Known:
        """All who ask for a key while it is looked up get one answer; one who goes away does not stop the others."""
        if name not in self._under_way and len(self._under_way) >= LOOK_UPS_MAX:
            raise DatabaseUnavailable(f"{LOOK_UPS_MAX} look-ups are under way already")
        return await asyncio.shield(self._begin_look_up(name, at_us))

    def _begin_look_up(self, name: MetricName, at_us: int) -> "asyncio.Task[_Known]":
        """The look-up of a key that is under way, begun now if there is none."""
        task = self._under_way.get(name)
        if task is None:
            task = asyncio.create_task(self._kept(name, at_us))
            self._under_way[name] = task
            task.add_done_callback(lambda done: self._landed(name, done))
        return task

    def _landed(self, name: MetricName, task: asyncio.Task[_Known]) -> None:
        if self._under_way.get(name) is task:
            del self._under_way[name]
        if not task.cancelled():
            task.exception()  # Seen here, in case all who waited have gone.

    async def _kept(self, name: MetricName, at_us: int) -> _Known:
        async with within(LOOK_UP_S):
            known = await self._look_up(name, at_us)
        if self._under_way.get(name) is asyncio.current_task():  # Otherwise it was invalidated while we read.
            self._known.put(name, known)
        return known

    async def _look_up(self, name: MetricName, at_us: int) -> _Known:
        # The lease begins before the rows are read: what changes meanwhile is noticed a lease later at most.
        until_s = self._monotonic_s() + self._lease_s
        if "\x00" in name.key:  # PostgreSQL keeps no such text, nor looks for it.
            return _Known(None, until_s)
        async with self._database.read(of(name.tenant, name.mode)) as connection:
            query = metrics_of(name.tenant, name.mode).where(col(BillableMetric.key) == name.key)
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                return _Known(None, until_s)
            metric = metric_from(row)
            effective = col(MeteringRule.effective_from_us)
            mine = (
                col(MeteringRule.tenant) == name.tenant,
                col(MeteringRule.mode) == name.mode,
                col(MeteringRule.metric_id) == metric.id,
                col(MeteringRule.archived).is_(False),
            )
            in_force = (
                select(col(MeteringRule.id), col(MeteringRule.rule), effective)
                .where(*mine, effective <= at_us)
                .order_by(effective.desc(), col(MeteringRule.rule_version).desc())
                .limit(1)
            )
            rule = (await connection.execute(in_force)).one_or_none()
            next_us = (await connection.execute(select(func.min(effective)).where(*mine, effective > at_us))).scalar()
        if rule is None:
            return _Known(_Found(metric, None, None, 0, next_us), until_s)
        return _Known(_Found(metric, rule_from(rule.rule), rule.id, rule.effective_from_us, next_us), until_s)


def metrics_of(tenant: str, mode: str) -> Select[Any]:
    """The columns of `Metric`."""
    columns = (getattr(BillableMetric, field) for field in Metric.__struct_fields__)
    return select(*columns).where(col(BillableMetric.tenant) == tenant, col(BillableMetric.mode) == mode)


def metric_from(row: Any) -> Metric:
    """A row of `metrics_of`; the table holds no other policies than these."""
    return Metric(*row)
