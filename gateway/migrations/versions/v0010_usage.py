"""Usage rolled up by hour and day, and a mark of what is."""

import sqlalchemy as sa
from alembic import op

from gateway.migrations.policies import look_up, protect

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_SUMS = (
    "events",
    "charged_high",
    "charged_low",
    "markup_high",
    "markup_low",
    "provider_cost_high",
    "provider_cost_low",
    "microunits_high",
    "microunits_low",
    "input_tokens",
    "output_tokens",
)
_NAMES = ("metric", "model", "action", "app")
_TABLES = {
    "usage_rollups": ("tenant", "mode", "grain", "starts_at_us", *_NAMES),
    "usage_by_customer": ("tenant", "mode", "customer", "starts_at_us", *_NAMES),
    "usage_by_metadata": ("tenant", "mode", "key", "value", "starts_at_us", *_NAMES),
}


def upgrade() -> None:
    op.add_column("ledger_usage", sa.Column("folded", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.create_index("ix_ledger_usage_time", "ledger_usage", ["tenant", "mode", "at_us"], unique=False)
    op.create_index(
        "ix_ledger_usage_unfolded",
        "ledger_usage",
        ["tenant", "mode", "at_us"],
        unique=False,
        sqlite_where=sa.text("NOT folded"),
        postgresql_where=sa.text("NOT folded"),
    )
    for table, key in _TABLES.items():
        op.create_table(
            table,
            *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _SUMS),
            *(sa.Column(name, _type(name), autoincrement=False, nullable=False) for name in key),
            sa.PrimaryKeyConstraint(*key),
            sqlite_with_rowid=False,
        )
        protect(table)
    look_up(
        "farebox_unfolded_scope(after_tenant text, after_mode text)",
        "tenant text, mode text",
        """
        SELECT u.tenant, u.mode FROM ledger_usage AS u
        WHERE NOT u.folded AND (u.tenant, u.mode) > (after_tenant, after_mode)
        ORDER BY u.tenant, u.mode LIMIT 1
        """,
    )


def _type(name: str) -> sa.BigInteger | sa.Text:
    return sa.BigInteger() if name == "starts_at_us" else sa.Text()
