"""What a customer is beside their name: settings, a version, the default grant that is due, erasure.

And the journal loses its metadata, which is in the rows of blocks, reservations and usage as well: only there can it be
erased. It is the one time that the journal is edited, so its triggers stand aside for as long as this takes.
"""

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_TRIGGER = "ledger_command_refuses_update"

_STRIP_SQLITE = """
UPDATE ledger_command SET facts = (
    SELECT json_group_array(json(json_remove(
        fact.value, '$.block.metadata', '$.reservation.metadata', '$.reservation.mark.usage.metadata',
        '$.record.metadata'
    ))) FROM json_each(facts) AS fact
) WHERE instr(facts, '"metadata":') > 0
"""

# With a space after each colon, as `jsonb` writes it, which no reader minds.
_STRIP_POSTGRESQL = """
UPDATE ledger_command SET facts = (
    SELECT jsonb_agg(CASE fact.value ->> 'type'
        WHEN 'block_opened' THEN fact.value #- '{block,metadata}'
        WHEN 'reservation_changed'
            THEN fact.value #- '{reservation,metadata}' #- '{reservation,mark,usage,metadata}'
        WHEN 'usage_recorded' THEN fact.value #- '{record,metadata}'
        ELSE fact.value
    END ORDER BY fact.number)::text
    FROM jsonb_array_elements(facts::jsonb) WITH ORDINALITY AS fact (value, number)
) WHERE strpos(facts, '"metadata":') > 0
"""


def upgrade() -> None:
    op.add_column("customers", sa.Column("settings", sa.JSON(), nullable=False, server_default=sa.text("'{}'")))
    op.add_column("customers", sa.Column("version", sa.Integer(), nullable=False, server_default=sa.text("'1'")))
    op.add_column("customers", sa.Column("welcome", sa.JSON(), nullable=True))
    op.add_column("customers", sa.Column("erased_at_us", sa.BigInteger(), nullable=True))
    for statement in _strip_journal():
        op.get_bind().exec_driver_sql(statement)
    if op.get_bind().dialect.name == "postgresql":
        op.create_index(
            "ix_ledger_reservation_payer_metadata",
            "ledger_reservation",
            [
                "tenant",
                "mode",
                sa.text("split_part(split_part(body, '\"wallets\":[[\"'::text, 2), '\"'::text, 5)"),
                "reservation",
            ],
            unique=False,
            postgresql_where=sa.text("strpos(body, '\"metadata\":'::text) > 0"),
        )
    else:
        op.create_index(
            "ix_ledger_reservation_metadata",
            "ledger_reservation",
            ["tenant", "mode", "reservation"],
            unique=False,
            sqlite_where=sa.text("instr(body, '\"metadata\":') > 0"),
        )


def _strip_journal() -> Iterator[str]:
    if op.get_bind().dialect.name == "sqlite":
        yield f"DROP TRIGGER {_TRIGGER}"
        yield _STRIP_SQLITE
        yield (
            f"CREATE TRIGGER {_TRIGGER} BEFORE UPDATE ON ledger_command "
            "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
        )
    else:
        # Its owner sees every tenant's rows only while the policies do not hold it too.
        yield "ALTER TABLE ledger_command NO FORCE ROW LEVEL SECURITY"
        yield f"ALTER TABLE ledger_command DISABLE TRIGGER {_TRIGGER}"
        yield _STRIP_POSTGRESQL
        yield f"ALTER TABLE ledger_command ENABLE TRIGGER {_TRIGGER}"
        yield "ALTER TABLE ledger_command FORCE ROW LEVEL SECURITY"
