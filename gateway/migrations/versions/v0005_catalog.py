"""What is metered and for how much: billable metrics and their metering rules."""

import sqlalchemy as sa
from alembic import op

from gateway.migrations.policies import protect

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "billable_metrics",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("overage_policy", sa.String(), nullable=False),
        sa.Column("priority_max", sa.Integer(), nullable=True),
        sa.Column("archived", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("overage_policy IN ('block', 'allow', 'notify')", name="overage_policy_known"),
        sa.CheckConstraint("length(key) BETWEEN 1 AND 128", name="key_length"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
        sa.UniqueConstraint("tenant", "mode", "key", name="billable_metrics_key"),
    )
    op.create_table(
        "metering_rules",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("metric_id", sa.String(), nullable=False),
        sa.Column("rule_version", sa.Integer(), nullable=False),
        sa.Column("effective_from_us", sa.BigInteger(), nullable=False),
        sa.Column("rule", sa.JSON(), nullable=False),
        sa.Column("archived", sa.Boolean(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.ForeignKeyConstraint(
            ["tenant", "mode", "metric_id"], ["billable_metrics.tenant", "billable_metrics.mode", "billable_metrics.id"]
        ),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
        sa.UniqueConstraint("tenant", "mode", "metric_id", "rule_version", name="metering_rules_version"),
    )
    op.create_index(
        "metering_rules_in_force",
        "metering_rules",
        ["tenant", "mode", "metric_id", "effective_from_us", "rule_version"],
    )
    for table in ("billable_metrics", "metering_rules"):
        protect(table)
