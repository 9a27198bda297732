"""What a customer is beside their name: settings, a version, the welcome grant, erasure."""

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass
