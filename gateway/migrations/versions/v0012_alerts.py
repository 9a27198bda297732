"""What a wallet's balance is watched for, and which customers have a say in it.

Most batches change nothing of that, and go on calling the functions as they are. The two new ones call them, then write
what wallets are watched for. An older release beside this one leaves these columns alone.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_WRITES = {
    "wallets_opened": "farebox_wallet_row_v2[]",
    "wallets_changed": "farebox_wallet_change_v2[]",
    "keys_freed": "farebox_key_name_v1[]",
    "keys_taken": "farebox_key_row_v1[]",
    "commands": "farebox_command_row_v1[]",
    "transfers": "farebox_transfer_row_v1[]",
    "blocks_opened": "farebox_block_row_v2[]",
    "blocks_changed": "farebox_block_change_v2[]",
    "reservations_opened": "farebox_reservation_row_v1[]",
    "reservations_changed": "farebox_reservation_row_v1[]",
    "responses": "farebox_response_row_v1[]",
    "events": "farebox_event_row_v1[]",
    "usage": "farebox_usage_row_v1[]",
}
_APPLIES = {
    "scopes": "text",
    "tenants": "text",
    "lock_timeout_ms": "bigint",
    "server": "text",
    "time_us": "bigint",
    "skew_us_max": "bigint",
    "wallets_kept": "farebox_kept_wallet_v1[]",
    "reservations_kept": "farebox_kept_reservation_v1[]",
    "wallets_absent": "text",
    "blocks_absent": "text",
    "reservations_absent": "text",
    "keys_absent": "text",
    "commands_absent": "text",
    **_WRITES,
}
_WATCHED = {"wallets_watched": "farebox_wallet_watch_v1[]"}

# After the first ones: the wallets are there and locked, and their versions were as the batch had loaded them.
_WATCH = """UPDATE ledger_wallet AS w SET alerts = n.alerts, rung = n.rung
    FROM unnest(wallets_watched) AS n WHERE w.tenant = n.tenant AND w.mode = n.mode AND w.wallet = n.wallet"""


def upgrade() -> None:
    for name in ("alerts", "rung"):
        op.add_column("ledger_wallet", sa.Column(name, sa.Text(), nullable=True))
    op.add_column("customers", sa.Column("own_alerts", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.create_index(
        "customers_own_alerts",
        "customers",
        ["tenant", "mode"],
        sqlite_where=sa.text("own_alerts"),
        postgresql_where=sa.text("own_alerts"),
    )
    if op.get_bind().dialect.name == "postgresql":
        connection = op.get_bind()
        connection.exec_driver_sql(
            "CREATE TYPE farebox_wallet_watch_v1 AS (tenant text, mode text, wallet text, alerts text, rung text)"
        )
        connection.exec_driver_sql(f"""
            CREATE FUNCTION farebox_write_v3({_declared({**_WRITES, **_WATCHED})}) RETURNS void LANGUAGE plpgsql
            SET enable_seqscan = off AS $$
            BEGIN
                PERFORM farebox_write_v2({", ".join(_WRITES)});
                {_WATCH};
            END $$
        """)
        connection.exec_driver_sql(f"""
            CREATE FUNCTION farebox_apply_v3({_declared({**_APPLIES, **_WATCHED})}) RETURNS text LANGUAGE plpgsql
            SET enable_seqscan = off AS $$
            DECLARE
                answer text;
            BEGIN
                answer := farebox_apply_v2({", ".join(_APPLIES)});
                IF answer::json -> 'moved' IS NULL THEN
                    {_WATCH};
                END IF;
                RETURN answer;
            END $$
        """)


def _declared(parameters: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in parameters.items())
