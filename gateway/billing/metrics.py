"""Metrics and their metering rules as their tenant sets them up: made, listed, changed, archived.

A rule is a version: it is appended and never edited, so that the price of every charge stays explained. Changing a
price is a further version. Archiving a version takes it out of force, for what is charged from then on, and the one
before it holds again: so a price that was scheduled is called off.
"""

from typing import Any, Final

import msgspec
from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway import errors
from gateway.billing.catalog import Metric, MetricNotFound, OveragePolicy, metric_from, metrics_of
from gateway.database import of
from gateway.ids import reserved_prefix
from gateway.records import Records
from gateway.tables import METRIC_KEY_LENGTH_MAX, BillableMetric, MeteringRule
from pricing.metering import Rule, rule_as_dict, rule_from

METRIC_PREFIX: Final = "mtr_"


class RuleVersion(msgspec.Struct, frozen=True):
    """A version of what a metric costs. *version* counts those of the metric; *effective_from_us* is when it began."""

    id: str
    metric_id: str
    metric_key: str
    version: int
    effective_from_us: int
    rule: Rule
    archived: bool
    created_at_us: int


class MetricChange(msgspec.Struct, frozen=True):
    """What to change; UNSET stays. *priority_max* None lets all blocks pay."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    overage_policy: OveragePolicy | msgspec.UnsetType = msgspec.UNSET
    priority_max: int | msgspec.UnsetType | None = msgspec.UNSET
    archived: bool | msgspec.UnsetType = msgspec.UNSET


class BillableMetrics(Records):
    """Every method is one transaction, or a part of the one that was given."""

    async def create(
        self,
        tenant: str,
        mode: str,
        *,
        key: str,
        name: str,
        overage_policy: OveragePolicy = "block",
        priority_max: int | None = None,
    ) -> Metric:
        """A new metric.

        Raises:
            ApiError: 400 for a key that no metric can have, 409 where there is one of this key, maybe archived.
        """
        metric = Metric(
            id=self._new_id("mtr"),
            key=_checked_key(key),
            name=name,
            overage_policy=overage_policy,
            priority_max=priority_max,
            archived=False,
            version=1,
            created_at_us=self._now_us(),
        )
        values = {"tenant": tenant, "mode": mode, **msgspec.structs.asdict(metric)}
        try:
            async with self._transactions.write(of(tenant, mode)) as connection:
                await connection.execute(insert(BillableMetric).values(**values))
        except IntegrityError:
            raise errors.already_exists(f"metric with the key {key}", param="key") from None
        return metric

    async def find(self, tenant: str, mode: str, reference: str) -> Metric:
        """The metric that *reference* names, by our id or the tenant's key, archived or not.

        Raises:
            MetricNotFound
        """
        async with self._transactions.read(of(tenant, mode)) as connection:
            return await _metric(connection, tenant, mode, reference)

    async def page(
        self, tenant: str, mode: str, *, before: str | None, limit: int, archived: bool | None = None
    ) -> list[Metric]:
        """Metrics, newest first, from the one that came just before the id *before*."""
        query = metrics_of(tenant, mode).order_by(col(BillableMetric.id).desc()).limit(limit)
        if before is not None:
            query = query.where(col(BillableMetric.id) < before)
        if archived is not None:
            query = query.where(col(BillableMetric.archived).is_(archived))
        async with self._transactions.read(of(tenant, mode)) as connection:
            return [metric_from(row) for row in await connection.execute(query)]

    async def change(
        self, tenant: str, mode: str, reference: str, change: MetricChange, *, expected: int | None = None
    ) -> Metric:
        """Change what *change* names; what is as it should be already changes no version.

        Raises:
            MetricNotFound
            ApiError: 412 when the metric's version is not *expected*.
        """
        async with self._transactions.write(of(tenant, mode)) as connection:
            metric = await _metric(connection, tenant, mode, reference, lock=True)
            if expected not in (None, metric.version):
                raise errors.version_mismatch(metric.version)
            asked = {
                name: value for name, value in msgspec.structs.asdict(change).items() if value is not msgspec.UNSET
            }
            changed = msgspec.structs.replace(metric, **asked)
            if changed == metric:
                return metric
            changed = msgspec.structs.replace(changed, version=metric.version + 1)
            mine = (
                col(BillableMetric.tenant) == tenant,
                col(BillableMetric.mode) == mode,
                col(BillableMetric.id) == metric.id,
            )
            values = {**asked, "version": changed.version}
            await connection.execute(update(BillableMetric).where(*mine).values(**values))
        return changed

    async def price(
        self, tenant: str, mode: str, reference: str, rule: Rule, *, effective_from_us: int | None = None
    ) -> RuleVersion:
        """Append a version of what a metric costs, from now on unless it says from when.

        Raises:
            MetricNotFound: also where it is archived.
        """
        async with self._transactions.write(of(tenant, mode)) as connection:
            metric = await _metric(connection, tenant, mode, reference, lock=True)
            if metric.archived:
                raise MetricNotFound(reference)
            return await self._append(
                connection, metric, rule, tenant=tenant, mode=mode, effective_from_us=effective_from_us
            )

    async def revise(
        self,
        tenant: str,
        mode: str,
        rule_id: str,
        rule: Rule,
        *,
        effective_from_us: int | None = None,
        expected: int | None = None,
    ) -> RuleVersion:
        """Append a version in the place of *rule_id*, which stays as it is.

        Raises:
            ApiError: 404; 412 when the metric's newest version is not *expected*.
        """
        async with self._transactions.write(of(tenant, mode)) as connection:
            known = await _rule(connection, tenant, mode, rule_id)
            metric = await _metric(connection, tenant, mode, known.metric_id, lock=True)
            newest = await _newest(connection, tenant, mode, metric.id)
            if expected not in (None, newest):
                raise errors.version_mismatch(newest)
            return await self._append(
                connection, metric, rule, tenant=tenant, mode=mode, effective_from_us=effective_from_us
            )

    async def rule(self, tenant: str, mode: str, rule_id: str) -> RuleVersion:
        """Raises ApiError 404, also for another tenant's rule."""
        async with self._transactions.read(of(tenant, mode)) as connection:
            return await _rule(connection, tenant, mode, rule_id)

    async def rules(
        self, tenant: str, mode: str, *, before: str | None, limit: int, metric: str | None = None
    ) -> list[RuleVersion]:
        """Rules, newest first, from the one that came just before the id *before*; of one *metric*, or all.

        Raises:
            MetricNotFound
        """
        query = _rules_of(tenant, mode).order_by(col(MeteringRule.id).desc()).limit(limit)
        if before is not None:
            query = query.where(col(MeteringRule.id) < before)
        async with self._transactions.read(of(tenant, mode)) as connection:
            if metric is not None:
                named = await _metric(connection, tenant, mode, metric)
                query = query.where(col(MeteringRule.metric_id) == named.id)
            return [_rule_from(row) for row in await connection.execute(query)]

    async def archive_rule(self, tenant: str, mode: str, rule_id: str) -> RuleVersion:
        """Take a version out of force. Repeating it changes nothing.

        Raises:
            ApiError: 404.
        """
        mine = (
            col(MeteringRule.tenant) == tenant,
            col(MeteringRule.mode) == mode,
            col(MeteringRule.id) == rule_id,
        )
        async with self._transactions.write(of(tenant, mode)) as connection:
            await _rule(connection, tenant, mode, rule_id)
            await connection.execute(update(MeteringRule).where(*mine).values(archived=True))
            return await _rule(connection, tenant, mode, rule_id)

    async def _append(
        self,
        connection: AsyncConnection,
        metric: Metric,
        rule: Rule,
        *,
        tenant: str,
        mode: str,
        effective_from_us: int | None,
    ) -> RuleVersion:
        """Another version of a *metric* whose row is locked."""
        at_us = self._now_us()
        version = RuleVersion(
            id=self._new_id("rul"),
            metric_id=metric.id,
            metric_key=metric.key,
            version=await _newest(connection, tenant, mode, metric.id) + 1,
            effective_from_us=at_us if effective_from_us is None else effective_from_us,
            rule=rule,
            archived=False,
            created_at_us=at_us,
        )
        await connection.execute(
            insert(MeteringRule).values(
                tenant=tenant,
                mode=mode,
                id=version.id,
                metric_id=metric.id,
                rule_version=version.version,
                effective_from_us=version.effective_from_us,
                rule=rule_as_dict(rule),
                archived=False,
                created_at_us=at_us,
            )
        )
        return version


def _checked_key(key: str) -> str:
    if not 1 <= len(key) <= METRIC_KEY_LENGTH_MAX or not key.isprintable():
        message = f"A metric's key has 1 to {METRIC_KEY_LENGTH_MAX} printable characters."
    elif key != key.strip():
        message = "A metric's key neither begins nor ends with a space."
    elif reserved_prefix(key):
        message = f"A metric's key may not begin with {key.partition('_')[0]}_, which our own ids begin with."
    else:
        return key
    raise errors.invalid_request(message, param="key")


async def _metric(connection: AsyncConnection, tenant: str, mode: str, reference: str, *, lock: bool = False) -> Metric:
    if "\x00" in reference:  # PostgreSQL keeps no such text, nor looks for it.
        raise MetricNotFound(reference)
    column = col(BillableMetric.id) if reference.startswith(METRIC_PREFIX) else col(BillableMetric.key)
    query = metrics_of(tenant, mode).where(column == reference)
    row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
    if row is None:
        raise MetricNotFound(reference)
    return metric_from(row)


async def _newest(connection: AsyncConnection, tenant: str, mode: str, metric_id: str) -> int:
    """The newest version of a metric's rules; 0 when it has none."""
    query = select(func.max(col(MeteringRule.rule_version))).where(
        col(MeteringRule.tenant) == tenant, col(MeteringRule.mode) == mode, col(MeteringRule.metric_id) == metric_id
    )
    return (await connection.execute(query)).scalar() or 0


def _rules_of(tenant: str, mode: str) -> Select[Any]:
    """The columns of `RuleVersion`."""
    return (
        select(
            col(MeteringRule.id),
            col(MeteringRule.metric_id),
            col(BillableMetric.key),
            col(MeteringRule.rule_version),
            col(MeteringRule.effective_from_us),
            col(MeteringRule.rule),
            col(MeteringRule.archived),
            col(MeteringRule.created_at_us),
        )
        .join(
            BillableMetric,
            (col(BillableMetric.tenant) == col(MeteringRule.tenant))
            & (col(BillableMetric.mode) == col(MeteringRule.mode))
            & (col(BillableMetric.id) == col(MeteringRule.metric_id)),
        )
        .where(col(MeteringRule.tenant) == tenant, col(MeteringRule.mode) == mode)
    )


async def _rule(connection: AsyncConnection, tenant: str, mode: str, rule_id: str) -> RuleVersion:
    query = _rules_of(tenant, mode).where(col(MeteringRule.id) == rule_id)
    row = None if "\x00" in rule_id else (await connection.execute(query)).one_or_none()
    if row is None:
        raise errors.not_found(f"metering rule {rule_id[:64]}")
    return _rule_from(row)


def _rule_from(row: Any) -> RuleVersion:
    version = RuleVersion(*row)
    return msgspec.structs.replace(version, rule=rule_from(version.rule))
