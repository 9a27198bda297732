"""What a tenant meters, and the versions of what it costs."""

from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKeyConstraint, Index, String, UniqueConstraint
from sqlmodel import Field, SQLModel

from gateway.tables.identity import one_of

METRIC_KEY_LENGTH_MAX = 128


class BillableMetric(SQLModel, table=True):
    """Something that a tenant's app does and charges for, under the tenant's own key for it.

    `overage_policy`: whether what the wallet cannot pay is refused, or owed. `priority_max`: only blocks with this
    priority or a lower one pay for it; null is all.
    """

    __tablename__ = "billable_metrics"
    __table_args__ = (
        one_of("mode", "live", "test"),
        one_of("overage_policy", "block", "allow", "notify"),
        CheckConstraint(f"length(key) BETWEEN 1 AND {METRIC_KEY_LENGTH_MAX}", name="key_length"),
        UniqueConstraint("tenant", "mode", "key", name="billable_metrics_key"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    key: str = Field(sa_type=String)
    name: str = Field(sa_type=String)
    overage_policy: str = Field(default="block", sa_type=String)
    priority_max: int | None = None
    archived: bool = False
    version: int = 1
    created_at_us: int = Field(sa_type=BigInteger)


class MeteringRule(SQLModel, table=True):
    """A version of what a metric costs. Appended, never edited: only that it is archived can change.

    In force at a time is, of those not archived, the one that took effect last; of several at once, the highest
    version.
    """

    __tablename__ = "metering_rules"
    __table_args__ = (
        one_of("mode", "live", "test"),
        UniqueConstraint("tenant", "mode", "metric_id", "rule_version", name="metering_rules_version"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        ForeignKeyConstraint(
            ["tenant", "mode", "metric_id"], ["billable_metrics.tenant", "billable_metrics.mode", "billable_metrics.id"]
        ),
        Index("metering_rules_in_force", "tenant", "mode", "metric_id", "effective_from_us", "rule_version"),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    metric_id: str = Field(sa_type=String)
    rule_version: int
    effective_from_us: int = Field(sa_type=BigInteger)
    rule: dict[str, Any] = Field(sa_type=JSON)
    archived: bool = False
    created_at_us: int = Field(sa_type=BigInteger)
