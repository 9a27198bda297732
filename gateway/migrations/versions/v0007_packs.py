"""Plan packs that are bought from a wallet, and the way to a wallet's latest plan."""

import sqlalchemy as sa
from alembic import op

from gateway.migrations.policies import protect

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

PLANS = sa.text("funding = 'plan'")


def upgrade() -> None:
    op.create_table(
        "packs",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=False),
        sa.Column("credits", sa.BigInteger(), nullable=False),
        sa.Column("duration_s", sa.BigInteger(), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("restrictions", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("archived", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("price BETWEEN 0 AND 4611686018427387904", name="price_range"),
        sa.CheckConstraint("credits BETWEEN 1 AND 4611686018427387904", name="credits_range"),
        sa.CheckConstraint("duration_s BETWEEN 1 AND 3153600000", name="duration_range"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
        sa.UniqueConstraint("tenant", "mode", "key", name="packs_key"),
    )
    protect("packs")
    op.create_index(
        "ix_ledger_block_plan",
        "ledger_block",
        ["tenant", "mode", "wallet", "sequence"],
        sqlite_where=PLANS,
        postgresql_where=PLANS,
    )
