"""Tenants and their credits, apps, keys, customers, and the answers that their idempotency keys stand for."""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    String,
    UniqueConstraint,
    text,
)
from sqlmodel import Field, SQLModel

AMOUNT_MAX = 2**62
MARKUP_BPS_MAX = 1_000_000
EXTERNAL_ID_LENGTH_MAX = 256
NAME_LENGTH_MAX = 200


def one_of(column: str, *values: str) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=f"{column}_known")


class Tenant(SQLModel, table=True):
    """Someone who bills their own users through this installation.

    `unfunded_limit`: how much base cost may be burnt from credits that the operator was not paid for, in the smallest
    unit of the tenant's asset; null is no limit, as for the installation's first tenant.
    """

    __tablename__ = "tenants"
    __table_args__ = (
        CheckConstraint(f"unfunded_limit BETWEEN 0 AND {AMOUNT_MAX}", name="unfunded_limit_range"),
        Index(
            "tenants_one_is_first",
            "is_first",
            unique=True,
            sqlite_where=text("is_first"),
            postgresql_where=text("is_first"),
        ),
    )

    id: str = Field(primary_key=True, sa_type=String)
    name: str = Field(sa_type=String)
    is_first: bool = False
    asset_code: str = Field(sa_type=String)
    unfunded_limit: int | None = Field(default=None, sa_type=BigInteger)
    settings: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    created_at_us: int = Field(sa_type=BigInteger)


class AssetVersion(SQLModel, table=True):
    """What a tenant's credit is worth from a moment on. Versions are appended; the scale never changes."""

    __tablename__ = "assets"
    __table_args__ = (
        CheckConstraint("scale BETWEEN 0 AND 9", name="scale_range"),
        CheckConstraint(f"usd_value_picos BETWEEN 1 AND {AMOUNT_MAX}", name="usd_value_range"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    code: str = Field(primary_key=True, sa_type=String)
    effective_from_us: int = Field(primary_key=True, sa_type=BigInteger)
    scale: int
    usd_value_picos: int = Field(sa_type=BigInteger)


class App(SQLModel, table=True):
    """A product of a tenant: who pays in it, and what is added to the base cost."""

    __tablename__ = "apps"
    __table_args__ = (
        one_of("billing_mode", "user_pays", "developer_pays"),
        one_of("on_disconnect", "cancel", "drain"),
        CheckConstraint(f"markup_bps BETWEEN 0 AND {MARKUP_BPS_MAX}", name="markup_range"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    name: str = Field(sa_type=String)
    billing_mode: str = Field(default="user_pays", sa_type=String)
    markup_bps: int = 0
    on_disconnect: str | None = Field(default=None, sa_type=String)
    settings: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    archived: bool = False
    created_at_us: int = Field(sa_type=BigInteger)


class ApiKey(SQLModel, table=True):
    """A key, of which only the hash is kept. An admin key belongs to the installation and to no app."""

    __tablename__ = "api_keys"
    __table_args__ = (
        one_of("mode", "live", "test", "admin"),
        CheckConstraint("(mode = 'admin') = (app_id IS NULL)", name="admin_has_no_app"),
        CheckConstraint("length(secret_hash) = 32", name="secret_hash_length"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        ForeignKeyConstraint(["tenant", "app_id"], ["apps.tenant", "apps.id"]),
        Index("api_keys_id", "id", unique=True),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    app_id: str | None = Field(default=None, sa_type=String)
    name: str = Field(default="", sa_type=String)
    secret_hash: bytes = Field(sa_type=LargeBinary)
    last4: str = Field(sa_type=String)
    scopes: list[str] = Field(sa_type=JSON)
    created_at_us: int = Field(sa_type=BigInteger)
    revoked_at_us: int | None = Field(default=None, sa_type=BigInteger)


class Customer(SQLModel, table=True):
    """A tenant's user. The tenant names it by its own id, we by ours; the wallet hangs on ours.

    `welcome` is the default grant that is still due to them; null where there is none. From `erased_at_us` on nobody
    finds them, and once all is erased `external_id` is our own id, so that their name is free. `own_alerts` tells that
    their settings have thresholds, or an agreement to be topped up: nobody else is looked up for that.
    """

    __tablename__ = "customers"
    __table_args__ = (
        one_of("mode", "live", "test"),
        CheckConstraint(f"length(external_id) BETWEEN 1 AND {EXTERNAL_ID_LENGTH_MAX}", name="external_id_length"),
        UniqueConstraint("tenant", "mode", "external_id", name="customers_external_id"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        Index(
            "customers_own_alerts",
            "tenant",
            "mode",
            sqlite_where=text("own_alerts"),
            postgresql_where=text("own_alerts"),
        ),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    external_id: str = Field(sa_type=String)
    metadata_: dict[str, Any] = Field(default_factory=dict, sa_column=Column("metadata", JSON, nullable=False))
    created_at_us: int = Field(sa_type=BigInteger)
    settings: dict[str, Any] = Field(
        default_factory=dict, sa_type=JSON, sa_column_kwargs={"server_default": text("'{}'")}
    )
    version: int = Field(default=1, sa_column_kwargs={"server_default": text("'1'")})
    welcome: dict[str, Any] | None = Field(default=None, sa_type=JSON(none_as_null=True))
    erased_at_us: int | None = Field(default=None, sa_type=BigInteger)
    own_alerts: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})


class KeptAnswer(SQLModel, table=True):
    """The answer that an idempotency key stands for, written with the effect itself. The ledger keeps its own keys."""

    __tablename__ = "kept_answers"
    __table_args__ = (
        one_of("mode", "live", "test"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    operation: str = Field(primary_key=True, sa_type=String)
    key: str = Field(primary_key=True, sa_type=String)
    digest: str = Field(sa_type=String)
    answer: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    created_at_us: int = Field(sa_type=BigInteger)
