"""The ledger: an append-only journal, and the caches of what it adds up to."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_APPEND_ONLY = ("ledger_command", "ledger_transfer")


def upgrade() -> None:
    op.create_table(
        "ledger_block",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("wallet", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("granted", sa.BigInteger(), nullable=False),
        sa.Column("consumed", sa.BigInteger(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), nullable=False),
        sa.Column("expired", sa.BigInteger(), nullable=False),
        sa.Column("revoked", sa.BigInteger(), nullable=False),
        sa.Column("clawed", sa.BigInteger(), nullable=False),
        sa.Column("remaining", sa.BigInteger(), nullable=False),
        sa.Column("live", sa.Boolean(), nullable=False),
        sa.Column("frozen", sa.Boolean(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("effective_at_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_us", sa.BigInteger(), nullable=True),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("funding", sa.Text(), nullable=False),
        sa.Column("operator_paid", sa.Boolean(), nullable=False),
        sa.Column("restriction", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=True),
        sa.Column("payment_reference", sa.Text(), nullable=True),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.CheckConstraint("granted = consumed + expired + revoked + remaining", name="ck_ledger_block_sum"),
        sa.CheckConstraint(
            "granted >= 0 AND consumed >= 0 AND expired >= 0 AND revoked >= 0 AND clawed >= 0 AND remaining >= 0",
            name="ck_ledger_block_amounts",
        ),
        sa.CheckConstraint("live = (remaining > 0)", name="ck_ledger_block_live"),
        sa.CheckConstraint("reserved >= 0 AND reserved <= remaining", name="ck_ledger_block_reserved"),
        sa.PrimaryKeyConstraint("tenant", "mode", "wallet", "id"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_ledger_block_due",
        "ledger_block",
        ["expires_at_us"],
        unique=False,
        sqlite_where=sa.text("live AND expires_at_us IS NOT NULL"),
        postgresql_where=sa.text("live AND expires_at_us IS NOT NULL"),
    )
    op.create_index(
        "ix_ledger_block_live",
        "ledger_block",
        ["tenant", "mode", "wallet", "id"],
        unique=False,
        sqlite_where=sa.text("live"),
        postgresql_where=sa.text("live"),
    )
    op.create_table(
        "ledger_command",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("transfers", sa.BigInteger(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "mode", "id"),
    )
    op.create_index("ix_ledger_command_seq", "ledger_command", ["seq"], unique=False)
    op.create_table(
        "ledger_event",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("wallet", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "mode", "wallet", "sequence"),
    )
    op.create_index("ix_ledger_event_id", "ledger_event", ["tenant", "mode", "id"], unique=False)
    op.create_table(
        "ledger_key",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "mode", "operation", "key"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "ledger_reservation",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("reservation", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("expires_at_us", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("body", sa.Text(), nullable=False),
        sa.CheckConstraint("state IN ('open', 'committed', 'released', 'expired')", name="ck_ledger_reservation_state"),
        sa.PrimaryKeyConstraint("tenant", "mode", "reservation"),
    )
    op.create_index(
        "ix_ledger_reservation_due",
        "ledger_reservation",
        ["expires_at_us"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "ix_ledger_reservation_request",
        "ledger_reservation",
        ["tenant", "mode", "request_id"],
        unique=False,
        sqlite_where=sa.text("request_id IS NOT NULL"),
        postgresql_where=sa.text("request_id IS NOT NULL"),
    )
    op.create_table(
        "ledger_response",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("headers", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("expires_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "mode", "operation", "key"),
    )
    op.create_index("ix_ledger_response_expiry", "ledger_response", ["expires_at_us"], unique=False)
    op.create_table(
        "ledger_transfer",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("debit", sa.Text(), nullable=False),
        sa.Column("credit", sa.Text(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("block", sa.Text(), nullable=True),
        sa.Column("reference", sa.Text(), nullable=True),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount > 0", name="ck_ledger_transfer_amount"),
        sa.CheckConstraint("debit <> credit", name="ck_ledger_transfer_accounts"),
        sa.PrimaryKeyConstraint("tenant", "mode", "seq", "position"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_ledger_transfer_credit",
        "ledger_transfer",
        ["tenant", "mode", "credit", "seq", "position"],
        unique=False,
        sqlite_where=sa.text("credit LIKE 'wallet:%'"),
        postgresql_where=sa.text("credit LIKE 'wallet:%'"),
    )
    op.create_index(
        "ix_ledger_transfer_debit",
        "ledger_transfer",
        ["tenant", "mode", "debit", "seq", "position"],
        unique=False,
        sqlite_where=sa.text("debit LIKE 'wallet:%'"),
        postgresql_where=sa.text("debit LIKE 'wallet:%'"),
    )
    op.create_index("ix_ledger_transfer_seq", "ledger_transfer", ["seq", "position"], unique=False)
    op.create_table(
        "ledger_usage",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("reservation", sa.Text(), nullable=False),
        sa.Column("part", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=True),
        sa.Column("app_id", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("action", sa.Text(), nullable=True),
        sa.Column("metric", sa.Text(), nullable=True),
        sa.Column("units", sa.Text(), nullable=False),
        sa.Column("provider_cost_nanos", sa.BigInteger(), nullable=False),
        sa.Column("base", sa.BigInteger(), nullable=False),
        sa.Column("markup", sa.BigInteger(), nullable=False),
        sa.Column("charged", sa.BigInteger(), nullable=False),
        sa.Column("shortfall", sa.BigInteger(), nullable=False),
        sa.Column("charges", sa.Text(), nullable=False),
        sa.Column("price_version", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("ending", sa.Text(), nullable=False),
        sa.Column("upstream", sa.Text(), nullable=True),
        sa.Column("started_at_us", sa.BigInteger(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.CheckConstraint("charged = base + markup", name="ck_ledger_usage_charged"),
        sa.CheckConstraint("provider_cost_nanos >= 0", name="ck_ledger_usage_provider_cost"),
        sa.PrimaryKeyConstraint("tenant", "mode", "reservation", "part"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_ledger_usage_customer", "ledger_usage", ["tenant", "mode", "customer_id", "at_us"], unique=False
    )
    op.create_index("ix_ledger_usage_request", "ledger_usage", ["tenant", "mode", "request_id"], unique=False)
    op.create_table(
        "ledger_wallet",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("wallet", sa.Text(), nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("overdraft_limit", sa.BigInteger(), nullable=False),
        sa.Column("receivable", sa.BigInteger(), nullable=False),
        sa.Column("overdraft_reserved", sa.BigInteger(), nullable=False),
        sa.Column("frozen", sa.Boolean(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("last_fact_us", sa.BigInteger(), nullable=False),
        sa.Column("blocks_opened", sa.BigInteger(), nullable=False),
        sa.Column("events_raised", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("overdraft_limit >= 0", name="ck_ledger_wallet_overdraft_limit"),
        sa.CheckConstraint("overdraft_reserved >= 0", name="ck_ledger_wallet_overdraft_reserved"),
        sa.CheckConstraint("receivable >= 0", name="ck_ledger_wallet_receivable"),
        sa.PrimaryKeyConstraint("tenant", "mode", "wallet"),
        sqlite_with_rowid=False,
    )
    if op.get_bind().dialect.name == "sqlite":
        for table in _APPEND_ONLY:
            for verb in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_refuses_{verb.lower()} BEFORE {verb} ON {table} "
                    "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
                )
