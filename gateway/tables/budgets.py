"""Spend limits: who may spend how much in each period."""

from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKeyConstraint, Index, String
from sqlmodel import Field, SQLModel

from gateway.tables.identity import AMOUNT_MAX, NAME_LENGTH_MAX, one_of


class Budget(SQLModel, table=True):
    """A limit on what its subject spends. What was spent of it is the ledger's: the wallet `limit:` and its id.

    `subject_id` is our id of the app, key or customer, and the tenant's own for the tenant. `amount` is in the asset's
    smallest unit. `recurrence` is a `pricing.periods.Recurrence`, and never changes.
    """

    __tablename__ = "budgets"
    __table_args__ = (
        one_of("mode", "live", "test"),
        one_of("subject_type", "tenant", "app", "key", "customer"),
        CheckConstraint(f"amount BETWEEN 0 AND {AMOUNT_MAX}", name="amount_range"),
        CheckConstraint(f"length(name) <= {NAME_LENGTH_MAX}", name="name_length"),
        CheckConstraint("version >= 1", name="version_range"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        Index("budgets_subject", "tenant", "mode", "subject_type", "subject_id"),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    name: str = Field(default="", sa_type=String)
    subject_type: str = Field(sa_type=String)
    subject_id: str = Field(sa_type=String)
    amount: int = Field(sa_type=BigInteger)
    recurrence: dict[str, Any] = Field(sa_type=JSON)
    thresholds_bps: list[int] = Field(sa_type=JSON)
    archived: bool = False
    version: int = 1
    created_at_us: int = Field(sa_type=BigInteger)
