"""Payments: what customers ordered, what the processor said of it, and what it says that it moved.

An order belongs to the tenant whose customer pays. The processor's account is the operator's: what it tells is kept
with the installation's first tenant, `live` or `test` as the processor has it.
"""

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, CheckConstraint, ForeignKeyConstraint, Index, String, text
from sqlmodel import Field, SQLModel

from gateway.tables.identity import one_of

REDIRECT_LENGTH_MAX = 2048


class PaymentOrder(SQLModel, table=True):
    """A package that a customer is about to pay for, or has: its terms are fixed when it is made.

    `price_minor` is in the currency's minor unit. `credited` is what is paid for, `bonus` what the operator adds and
    `spread` what it keeps, in the asset's smallest unit: `credited` + `spread` is what the price is worth. A customer
    has one open automatic order at most.
    """

    __tablename__ = "payment_orders"
    __table_args__ = (
        one_of("mode", "live", "test"),
        one_of("kind", "checkout", "auto"),
        one_of("status", "open", "paid", "failed", "expired"),
        CheckConstraint("price_minor > 0", name="price_positive"),
        CheckConstraint("credited > 0 AND bonus >= 0 AND spread >= 0", name="amounts_range"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        Index(
            "payment_orders_one_auto",
            "tenant",
            "mode",
            "customer_id",
            unique=True,
            sqlite_where=text("kind = 'auto' AND status = 'open'"),
            postgresql_where=text("kind = 'auto' AND status = 'open'"),
        ),
        Index(
            "payment_orders_open",
            "tenant",
            "mode",
            "created_at_us",
            sqlite_where=text("status = 'open'"),
            postgresql_where=text("status = 'open'"),
        ),
        Index("payment_orders_customer", "tenant", "mode", "customer_id", "created_at_us"),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    kind: str = Field(sa_type=String)
    status: str = Field(sa_type=String)
    customer_id: str = Field(sa_type=String)
    package: str = Field(sa_type=String)
    price_minor: int = Field(sa_type=BigInteger)
    currency: str = Field(sa_type=String)
    asset: str = Field(sa_type=String)
    credited: int = Field(sa_type=BigInteger)
    bonus: int = Field(sa_type=BigInteger)
    spread: int = Field(sa_type=BigInteger)
    save_payment_method: bool = Field(default=False, sa_type=Boolean)
    success_url: str | None = Field(default=None, sa_type=String)
    cancel_url: str | None = Field(default=None, sa_type=String)
    digest: str = Field(default="", sa_type=String)
    session_id: str | None = Field(default=None, sa_type=String)
    checkout_url: str | None = Field(default=None, sa_type=String)
    payment_intent: str | None = Field(default=None, sa_type=String)
    failure: str | None = Field(default=None, sa_type=String)
    created_at_us: int = Field(sa_type=BigInteger)
    settled_at_us: int | None = Field(default=None, sa_type=BigInteger)


class PaymentCustomer(SQLModel, table=True):
    """A customer as the processor knows them, and how automatic top-ups went: after a failure not before a time."""

    __tablename__ = "payment_customers"
    __table_args__ = (
        one_of("mode", "live", "test"),
        CheckConstraint("failures >= 0", name="failures_counted"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        Index(
            "payment_customers_due",
            "tenant",
            "mode",
            "not_before_us",
            sqlite_where=text("not_before_us IS NOT NULL"),
            postgresql_where=text("not_before_us IS NOT NULL"),
        ),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    customer_id: str = Field(primary_key=True, sa_type=String)
    processor_id: str | None = Field(default=None, sa_type=String)
    payment_method: str | None = Field(default=None, sa_type=String)
    failures: int = Field(default=0, sa_type=BigInteger)
    not_before_us: int | None = Field(default=None, sa_type=BigInteger)
    last_failure: str | None = Field(default=None, sa_type=String)
    created_at_us: int = Field(sa_type=BigInteger)


class PaymentObservation(SQLModel, table=True):
    """What was once learnt of a payment, from an event (its id) or by asking; rows are only ever added.

    What a payment has come to is the join of all its observations, in whatever order they came.
    """

    __tablename__ = "payment_observations"
    __table_args__ = (
        one_of("mode", "live", "test"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        Index("payment_observations_payment", "tenant", "mode", "payment_intent"),
        Index("payment_observations_order", "tenant", "mode", "order_id"),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    kind: str = Field(sa_type=String)
    payment_intent: str | None = Field(default=None, sa_type=String)
    order_id: str | None = Field(default=None, sa_type=String)
    facts: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    received_at_us: int = Field(sa_type=BigInteger)
    done_at_us: int | None = Field(default=None, sa_type=BigInteger)
    outcome: str | None = Field(default=None, sa_type=String)


class ProcessorTransaction(SQLModel, table=True):
    """A movement on the processor's balance, as it reports it. Amounts are in *currency*'s minor unit, signed."""

    __tablename__ = "processor_transactions"
    __table_args__ = (
        one_of("mode", "live", "test"),
        ForeignKeyConstraint(["tenant"], ["tenants.id"]),
        Index("processor_transactions_time", "tenant", "mode", "created_at_us"),
    )

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    id: str = Field(primary_key=True, sa_type=String)
    type: str = Field(sa_type=String)
    amount: int = Field(sa_type=BigInteger)
    fee: int = Field(sa_type=BigInteger)
    net: int = Field(sa_type=BigInteger)
    currency: str = Field(sa_type=String)
    source: str | None = Field(default=None, sa_type=String)
    payment_intent: str | None = Field(default=None, sa_type=String)
    created_at_us: int = Field(sa_type=BigInteger)


class PaymentSweep(SQLModel, table=True):
    """When a periodic work is due next; whoever moves that on does it. `kept` is what it keeps for the next time."""

    __tablename__ = "payment_sweeps"
    __table_args__ = (one_of("mode", "live", "test"), ForeignKeyConstraint(["tenant"], ["tenants.id"]))

    tenant: str = Field(primary_key=True, sa_type=String)
    mode: str = Field(primary_key=True, sa_type=String)
    name: str = Field(primary_key=True, sa_type=String)
    due_at_us: int = Field(sa_type=BigInteger)
    kept: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
