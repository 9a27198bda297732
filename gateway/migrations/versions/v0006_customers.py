"""What a customer is beside their name: settings, a version, the welcome grant, erasure."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("customers", sa.Column("settings", sa.JSON(), nullable=False, server_default=sa.text("'{}'")))
