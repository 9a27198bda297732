"""Payments taken back, and given back again: what of a block they took, and what a wallet's debts come from.

The functions of batches are those of revision 0004 with the two columns more. Its own stay for an older release beside
this one, which leaves the columns as they are.
"""

import sqlalchemy as sa
from alembic import op

from gateway.migrations.versions import v0004_batches as before

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_TYPES = {
    "farebox_wallet_row": ("events_raised bigint", "events_raised bigint, debts text"),
    "farebox_wallet_change": ("events_raised bigint", "events_raised bigint, debts text"),
    "farebox_block_row": ("metadata text", "metadata text, reversal text"),
    "farebox_block_change": ("frozen boolean", "frozen boolean, reversal text"),
}
"""The composite types that get a column more, and where."""

_COLUMNS = (
    ("blocks_opened, events_raised)", "blocks_opened, events_raised, debts)"),
    ("n.blocks_opened, n.events_raised\n", "n.blocks_opened, n.events_raised, n.debts\n"),
    ("events_raised = n.events_raised\n", "events_raised = n.events_raised, debts = n.debts\n"),
    (" restriction, pool,", " restriction, reversal, pool,"),
    ("n.restriction, n.pool,", "n.restriction, n.reversal, n.pool,"),
    ("live = n.live, frozen = n.frozen\n", "live = n.live, frozen = n.frozen, reversal = n.reversal\n"),
)
"""Every place of a statement that names the columns, and how it does now."""


def upgrade() -> None:
    op.add_column("ledger_wallet", sa.Column("debts", sa.Text(), nullable=True))
    op.add_column("ledger_block", sa.Column("reversal", sa.Text(), nullable=True))
    if op.get_bind().dialect.name != "postgresql":
        return
    connection = op.get_bind()
    names = [(f"{name}_v1", f"{name}_v2") for name in (*_TYPES, "farebox_write", "farebox_apply")]
    for name, column in _TYPES.items():
        fields = _replaced(before._TYPES[f"{name}_v1"], (column,))
        connection.exec_driver_sql(f"CREATE TYPE {name}_v2 AS ({fields})")
    for function in (before._WRITE, before._APPLY):
        text = _replaced(function, _COLUMNS)
        for old, new in names:
            text = text.replace(old, new)
        connection.exec_driver_sql(text)


def _replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """*text* with each pair's first, which is there once, become its second."""
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
