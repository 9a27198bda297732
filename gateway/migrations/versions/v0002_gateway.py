"""The gateway: tenants and their assets, apps, keys, customers, kept answers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("is_first", sa.Boolean(), nullable=False),
        sa.Column("asset_code", sa.String(), nullable=False),
        sa.Column("unfunded_limit", sa.BigInteger(), nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("unfunded_limit BETWEEN 0 AND 4611686018427387904", name="unfunded_limit_range"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "tenants_one_is_first",
        "tenants",
        ["is_first"],
        unique=True,
        sqlite_where=sa.text("is_first"),
        postgresql_where=sa.text("is_first"),
    )
    op.create_table(
        "apps",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("billing_mode", sa.String(), nullable=False),
        sa.Column("markup_bps", sa.Integer(), nullable=False),
        sa.Column("on_disconnect", sa.String(), nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("archived", sa.Boolean(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("billing_mode IN ('user_pays', 'developer_pays')", name="billing_mode_known"),
        sa.CheckConstraint("on_disconnect IN ('cancel', 'drain')", name="on_disconnect_known"),
        sa.CheckConstraint("markup_bps BETWEEN 0 AND 1000000", name="markup_range"),
        sa.ForeignKeyConstraint(
            ["tenant"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("tenant", "id"),
    )
    op.create_table(
        "assets",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("effective_from_us", sa.BigInteger(), nullable=False),
        sa.Column("scale", sa.Integer(), nullable=False),
        sa.Column("usd_value_picos", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("scale BETWEEN 0 AND 9", name="scale_range"),
        sa.CheckConstraint("usd_value_picos BETWEEN 1 AND 4611686018427387904", name="usd_value_range"),
        sa.ForeignKeyConstraint(
            ["tenant"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("tenant", "code", "effective_from_us"),
    )
    op.create_table(
        "customers",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("external_id", sa.String(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("length(external_id) BETWEEN 1 AND 256", name="external_id_length"),
        sa.ForeignKeyConstraint(
            ["tenant"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
        sa.UniqueConstraint("tenant", "mode", "external_id", name="customers_external_id"),
    )
    op.create_table(
        "api_keys",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("app_id", sa.String(), nullable=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("last4", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at_us", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(mode = 'admin') = (app_id IS NULL)", name="admin_has_no_app"),
        sa.CheckConstraint("mode IN ('live', 'test', 'admin')", name="mode_known"),
        sa.CheckConstraint("length(secret_hash) = 32", name="secret_hash_length"),
        sa.ForeignKeyConstraint(
            ["tenant", "app_id"],
            ["apps.tenant", "apps.id"],
        ),
        sa.ForeignKeyConstraint(
            ["tenant"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
    )
    op.create_index("api_keys_id", "api_keys", ["id"], unique=True)
    op.create_table(
        "kept_answers",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("operation", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=True),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.ForeignKeyConstraint(
            ["tenant"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("tenant", "mode", "operation", "key"),
    )
