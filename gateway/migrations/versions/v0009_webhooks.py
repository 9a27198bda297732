"""Webhook endpoints, and what is delivered to them."""

import sqlalchemy as sa
from alembic import op

from gateway.migrations.policies import look_up, protect

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# Both walk an index from one scope, or endpoint, to the next: however much one of them has to do, all are seen. Of the
# lanes each tenant has its first, then each its second, and so on: who has many that are due does not hide the others.
_PENDING = """
    SELECT walk.tenant, walk.mode FROM (
        WITH RECURSIVE scope AS (
            (SELECT e.tenant, e.mode FROM ledger_event AS e WHERE e.delivered_at_us IS NULL
             ORDER BY e.tenant, e.mode LIMIT 1)
            UNION ALL
            SELECT next.tenant, next.mode FROM scope CROSS JOIN LATERAL (
                SELECT e.tenant, e.mode FROM ledger_event AS e
                WHERE e.delivered_at_us IS NULL AND (e.tenant, e.mode) > (scope.tenant, scope.mode)
                ORDER BY e.tenant, e.mode LIMIT 1
            ) AS next
        )
        SELECT scope.tenant, scope.mode FROM scope
    ) AS walk
"""

_DUE = """
    SELECT due.tenant::text, due.mode::text, due.endpoint::text, due.wallet::text FROM (
        WITH RECURSIVE place AS (
            (SELECT l.tenant, l.mode, l.endpoint FROM webhook_lanes AS l
             ORDER BY l.tenant, l.mode, l.endpoint LIMIT 1)
            UNION ALL
            SELECT next.tenant, next.mode, next.endpoint FROM place CROSS JOIN LATERAL (
                SELECT l.tenant, l.mode, l.endpoint FROM webhook_lanes AS l
                WHERE (l.tenant, l.mode, l.endpoint) > (place.tenant, place.mode, place.endpoint)
                ORDER BY l.tenant, l.mode, l.endpoint LIMIT 1
            ) AS next
        )
        SELECT lane.* FROM place CROSS JOIN LATERAL (
            SELECT l.tenant, l.mode, l.endpoint, l.wallet, l.due_at_us FROM webhook_lanes AS l
            WHERE l.tenant = place.tenant AND l.mode = place.mode AND l.endpoint = place.endpoint
                  AND l.due_at_us <= now_us
            ORDER BY l.due_at_us LIMIT of_each
        ) AS lane
    ) AS due
    ORDER BY row_number() OVER (PARTITION BY due.tenant ORDER BY due.due_at_us), due.due_at_us LIMIT page
"""


def upgrade() -> None:
    _endpoints()
    _lanes()
    _deliveries()
    _outbox()
    for table in ("webhook_endpoints", "webhook_lanes", "webhook_deliveries", "outbox_leases"):
        protect(table)
    look_up("farebox_pending_events()", "tenant text, mode text", _PENDING)
    look_up(
        "farebox_due_lanes(now_us bigint, of_each bigint, page bigint)",
        "tenant text, mode text, endpoint text, wallet text",
        _DUE,
    )


def _endpoints() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("types", sa.JSON(), nullable=False),
        sa.Column("secrets", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("disabled_reason", sa.String(), nullable=True),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("status IN ('enabled', 'disabled')", name="status_known"),
        sa.CheckConstraint("length(url) BETWEEN 1 AND 2048", name="url_length"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
    )


def _lanes() -> None:
    op.create_table(
        "webhook_lanes",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("wallet", sa.String(), nullable=False),
        sa.Column("due_at_us", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.String(), nullable=True),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.PrimaryKeyConstraint("tenant", "mode", "endpoint", "wallet"),
    )
    op.create_index("ix_webhook_lanes_due", "webhook_lanes", ["tenant", "mode", "endpoint", "due_at_us"])


def _deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("wallet", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("event_id", sa.String(), nullable=False),
        sa.Column("event_type", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("next_at_us", sa.BigInteger(), nullable=True),
        sa.Column("started_at_us", sa.BigInteger(), nullable=False),
        sa.Column("last_status", sa.BigInteger(), nullable=True),
        sa.Column("last_error", sa.String(), nullable=True),
        sa.Column("delivered_at_us", sa.BigInteger(), nullable=True),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.CheckConstraint("state IN ('pending', 'parked', 'delivered', 'failed')", name="state_known"),
        sa.CheckConstraint("attempts >= 0", name="attempts_counted"),
        sa.PrimaryKeyConstraint("tenant", "mode", "endpoint", "wallet", "sequence"),
    )
    op.create_index(
        "ix_webhook_deliveries_pending",
        "webhook_deliveries",
        ["tenant", "mode", "endpoint", "wallet", "sequence"],
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "ix_webhook_deliveries_parked",
        "webhook_deliveries",
        ["tenant", "mode", "endpoint", "wallet", "next_at_us"],
        sqlite_where=sa.text("state = 'parked'"),
        postgresql_where=sa.text("state = 'parked'"),
    )
    op.create_index("ix_webhook_deliveries_event", "webhook_deliveries", ["tenant", "mode", "endpoint", "event_id"])


def _outbox() -> None:
    op.create_table(
        "outbox_leases",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=True),
        sa.Column("until_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('live', 'test')", name="mode_known"),
        sa.PrimaryKeyConstraint("tenant", "mode"),
    )
    # By scope first: a scope is worked off by itself, and the look-up steps from one to the next.
    op.drop_index("ix_ledger_event_pending", table_name="ledger_event")
    op.create_index(
        "ix_ledger_event_pending",
        "ledger_event",
        ["tenant", "mode", "at_us"],
        sqlite_where=sa.text("delivered_at_us IS NULL"),
        postgresql_where=sa.text("delivered_at_us IS NULL"),
    )
    op.create_index("ix_ledger_event_id", "ledger_event", ["tenant", "mode", "id"])
    # Charges raise nearly all events: whoever looks for another kind need not step over them.
    op.create_index(
        "ix_ledger_event_rare",
        "ledger_event",
        ["tenant", "mode", "id"],
        sqlite_where=sa.text("type <> 'usage.recorded'"),
        postgresql_where=sa.text("type <> 'usage.recorded'"),
    )
