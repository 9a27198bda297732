"""Spend limits."""

import sqlalchemy as sa
from alembic import op

from gateway.migrations.policies import protect

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "budgets",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("subject_type", sa.String(), nullable=False),
        sa.Column("subject_id", sa.String(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("recurrence", sa.JSON(), nullable=False),
        sa.Column("thresholds_bps", sa.JSON(), nullable=False),
        sa.Column("archived", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("subject_type IN ('tenant', 'app', 'key', 'customer')", name="subject_type_known"),
        sa.CheckConstraint("amount BETWEEN 0 AND 4611686018427387904", name="amount_range"),
        sa.CheckConstraint("length(name) <= 200", name="name_length"),
        sa.CheckConstraint("version >= 1", name="version_range"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
    )
    op.create_index("budgets_subject", "budgets", ["tenant", "mode", "subject_type", "subject_id"])
    protect("budgets")
