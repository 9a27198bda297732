"""Orders, what the payment processor said of them, and what it says that it moved."""

import sqlalchemy as sa
from alembic import op

from gateway.migrations.policies import look_up, protect

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _orders()
    _customers()
    _observations()
    _processor()
    _clearing()
    for table in (
        "payment_orders",
        "payment_customers",
        "payment_observations",
        "processor_transactions",
        "payment_sweeps",
    ):
        protect(table)
    look_up(
        "farebox_open_orders(after_us bigint, after text, before_us bigint, page bigint)",
        "tenant text, mode text, id text",
        """
        SELECT o.tenant::text, o.mode::text, o.id::text FROM payment_orders AS o
        WHERE o.status = 'open' AND o.created_at_us < before_us AND (o.created_at_us, o.id) > (after_us, after)
        ORDER BY o.created_at_us, o.id LIMIT page
        """,
    )
    look_up(
        "farebox_due_top_ups(now_us bigint, page bigint)",
        "tenant text, mode text, customer_id text",
        """
        SELECT c.tenant::text, c.mode::text, c.customer_id::text FROM payment_customers AS c
        WHERE c.not_before_us <= now_us ORDER BY c.not_before_us LIMIT page
        """,
    )


def _orders() -> None:
    op.create_table(
        "payment_orders",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("customer_id", sa.String(), nullable=False),
        sa.Column("package", sa.String(), nullable=False),
        sa.Column("price_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("asset", sa.String(), nullable=False),
        sa.Column("credited", sa.BigInteger(), nullable=False),
        sa.Column("bonus", sa.BigInteger(), nullable=False),
        sa.Column("spread", sa.BigInteger(), nullable=False),
        sa.Column("save_payment_method", sa.Boolean(), nullable=False),
        sa.Column("success_url", sa.String(), nullable=True),
        sa.Column("cancel_url", sa.String(), nullable=True),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=True),
        sa.Column("checkout_url", sa.String(), nullable=True),
        sa.Column("payment_intent", sa.String(), nullable=True),
        sa.Column("failure", sa.String(), nullable=True),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("settled_at_us", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("kind IN ('checkout', 'auto')", name="kind_known"),
        sa.CheckConstraint("status IN ('open', 'paid', 'failed', 'expired')", name="status_known"),
        sa.CheckConstraint("price_minor > 0", name="price_positive"),
        sa.CheckConstraint("credited > 0 AND bonus >= 0 AND spread >= 0", name="amounts_range"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
    )
    op.create_index(
        "payment_orders_one_auto",
        "payment_orders",
        ["tenant", "mode", "customer_id"],
        unique=True,
        sqlite_where=sa.text("kind = 'auto' AND status = 'open'"),
        postgresql_where=sa.text("kind = 'auto' AND status = 'open'"),
    )
    op.create_index(
        "payment_orders_open",
        "payment_orders",
        ["tenant", "mode", "created_at_us"],
        sqlite_where=sa.text("status = 'open'"),
        postgresql_where=sa.text("status = 'open'"),
    )
    op.create_index(
        "payment_orders_customer",
        "payment_orders",
        ["tenant", "mode", "customer_id", "created_at_us"],
    )


def _customers() -> None:
    op.create_table(
        "payment_customers",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("customer_id", sa.String(), nullable=False),
        sa.Column("processor_id", sa.String(), nullable=True),
        sa.Column("payment_method", sa.String(), nullable=True),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("not_before_us", sa.BigInteger(), nullable=True),
        sa.Column("last_failure", sa.String(), nullable=True),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("failures >= 0", name="failures_counted"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "customer_id"),
    )
    op.create_index(
        "payment_customers_due",
        "payment_customers",
        ["tenant", "mode", "not_before_us"],
        sqlite_where=sa.text("not_before_us IS NOT NULL"),
        postgresql_where=sa.text("not_before_us IS NOT NULL"),
    )


def _observations() -> None:
    op.create_table(
        "payment_observations",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("payment_intent", sa.String(), nullable=True),
        sa.Column("order_id", sa.String(), nullable=True),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("received_at_us", sa.BigInteger(), nullable=False),
        sa.Column("done_at_us", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
    )
    op.create_index(
        "payment_observations_payment",
        "payment_observations",
        ["tenant", "mode", "payment_intent"],
    )
    op.create_index(
        "payment_observations_order",
        "payment_observations",
        ["tenant", "mode", "order_id"],
    )


def _processor() -> None:
    op.create_table(
        "processor_transactions",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("fee", sa.BigInteger(), nullable=False),
        sa.Column("net", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=True),
        sa.Column("payment_intent", sa.String(), nullable=True),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
    )
    op.create_index(
        "processor_transactions_time",
        "processor_transactions",
        ["tenant", "mode", "created_at_us"],
    )
    op.create_table(
        "payment_sweeps",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("due_at_us", sa.BigInteger(), nullable=False),
        sa.Column("kept", sa.JSON(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "name"),
    )


def _clearing() -> None:
    """By time, payment and block: the account's entries are few among all."""
    on_account = sa.text("debit = 'clearing' OR credit = 'clearing'")
    for name, columns in (
        ("ix_ledger_transfer_clearing_time", ["tenant", "mode", "at_us"]),
        # What is looked for comes first: SQLite passes over a list in a third column.
        ("ix_ledger_transfer_clearing_payment", ["reference", "tenant", "mode"]),
        ("ix_ledger_transfer_clearing_block", ["block", "tenant", "mode"]),
    ):
        op.create_index(
            name,
            "ledger_transfer",
            columns,
            sqlite_where=on_account,
            postgresql_where=on_account,
        )
