"""What can be bought from a wallet's own credits."""

from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Column, ForeignKeyConstraint, String, UniqueConstraint
from sqlmodel import Field, SQLModel

from gateway.tables.identity import AMOUNT_MAX, one_of

PACK_DURATION_S_MAX = 100 * 365 * 24 * 3600
"""A hundred years: a sum of many of them is still a time."""


class Pack(SQLModel, table=True):
    """A bundle of credits for a price, both in the smallest unit of the tenant's asset.

    `duration_s` is how long its credits pay, null for ever. `restrictions` has the names of apps, metrics and models.
    `key` is the tenant's own name for it. What was bought of it keeps what it was bought with.
    """

    __tablename__ = "packs"
    __table_args__ = (
        one_of("mode", "live", "test"),
        CheckConstraint(f"price BETWEEN 0 AND {AMOUNT_MAX}", name="price_range"),
        CheckConstraint(f"credits BETWEEN 1 AND {AMOUNT_MAX}", name="credits_range"),
        CheckConstraint(f"duration_s BETWEEN 1 AND {PACK_DURATION_S_MAX}", name="duration_range"),
        UniqueConstraint("tenant", "mode", "key", name="packs_key"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    key: str = Field(sa_type=String)
    name: str = Field(sa_type=String)
    price: int = Field(sa_type=BigInteger)
    credits: int = Field(sa_type=BigInteger)
    duration_s: int | None = Field(default=None, sa_type=BigInteger)
    priority: int = 10
    restrictions: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    metadata_: dict[str, Any] = Field(default_factory=dict, sa_column=Column("metadata", JSON, nullable=False))
    archived: bool = False
    version: int = 1
    created_at_us: int = Field(sa_type=BigInteger)
