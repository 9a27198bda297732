"""Webhooks: where events go, whose turn it is, and what became of each delivery.

A lane is one customer's wallet at one endpoint: within it, events are delivered in their order and one at a time.
"""

from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKeyConstraint, Index, String, text
from sqlmodel import Field, SQLModel

from gateway.tables.identity import one_of

URL_LENGTH_MAX = 2048


class WebhookEndpoint(SQLModel, table=True):
    """Where a tenant wants to be told. *types* may be `["*"]`.

    *secrets* are `{"secret", "expires_at_us"}`, the newest first: they sign, so they are kept as they are.
    """

    __tablename__ = "webhook_endpoints"
    __table_args__ = (
        one_of("mode", "live", "test"),
        one_of("status", "enabled", "disabled"),
        CheckConstraint(f"length(url) BETWEEN 1 AND {URL_LENGTH_MAX}", name="url_length"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    url: str = Field(sa_type=String)
    types: list[str] = Field(sa_type=JSON)
    secrets: list[dict[str, Any]] = Field(sa_type=JSON)
    status: str = Field(default="enabled", sa_type=String)
    disabled_reason: str | None = Field(default=None, sa_type=String)
    description: str = Field(default="", sa_type=String)
    version: int = Field(default=1, sa_type=BigInteger)
    created_at_us: int = Field(sa_type=BigInteger)


class WebhookLane(SQLModel, table=True):
    """A wallet and an endpoint with something to deliver. It is gone when nothing is left.

    *due_at_us*: from then on a process may take it. While a *holder* has it, that is the end of the holder's lease.
    """

    __tablename__ = "webhook_lanes"
    __table_args__ = (
        one_of("mode", "live", "test"),
        Index("ix_webhook_lanes_due", "tenant", "mode", "endpoint", "due_at_us"),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    endpoint: str = Field(primary_key=True, sa_type=String)
    wallet: str = Field(primary_key=True, sa_type=String)
    due_at_us: int = Field(sa_type=BigInteger)
    holder: str | None = Field(default=None, sa_type=String)


class WebhookDelivery(SQLModel, table=True):
    """One event for one endpoint.

    `pending` waits for its turn or for its next attempt, and the lane's later ones wait for it; `parked` is attempted
    beside them; `delivered` and `failed` are ends. *started_at_us* is when its schedule of attempts began.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        one_of("mode", "live", "test"),
        one_of("state", "pending", "parked", "delivered", "failed"),
        CheckConstraint("attempts >= 0", name="attempts_counted"),
        Index(
            "ix_webhook_deliveries_pending",
            "tenant",
            "mode",
            "endpoint",
            "wallet",
            "sequence",
            sqlite_where=text("state = 'pending'"),
            postgresql_where=text("state = 'pending'"),
        ),
        Index(
            "ix_webhook_deliveries_parked",
            "tenant",
            "mode",
            "endpoint",
            "wallet",
            "next_at_us",
            sqlite_where=text("state = 'parked'"),
            postgresql_where=text("state = 'parked'"),
        ),
        Index("ix_webhook_deliveries_event", "tenant", "mode", "endpoint", "event_id"),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    endpoint: str = Field(primary_key=True, sa_type=String)
    wallet: str = Field(primary_key=True, sa_type=String)
    sequence: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    event_id: str = Field(sa_type=String)
    event_type: str = Field(sa_type=String)
    state: str = Field(sa_type=String)
    attempts: int = Field(default=0, sa_type=BigInteger)
    next_at_us: int | None = Field(default=None, sa_type=BigInteger)
    started_at_us: int = Field(sa_type=BigInteger)
    last_status: int | None = Field(default=None, sa_type=BigInteger)
    last_error: str | None = Field(default=None, sa_type=String)
    delivered_at_us: int | None = Field(default=None, sa_type=BigInteger)
    created_at_us: int = Field(sa_type=BigInteger)


class OutboxLease(SQLModel, table=True):
    """Which process turns a tenant's pending events of one mode into deliveries, and until when nobody else does."""

    __tablename__ = "outbox_leases"
    __table_args__ = (one_of("mode", "live", "test"),)

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    holder: str | None = Field(default=None, sa_type=String)
    until_us: int = Field(sa_type=BigInteger)
