"""What is metered and for how much: billable metrics and their metering rules."""

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass
