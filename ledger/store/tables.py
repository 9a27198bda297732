"""The ledger's tables. Tenant and mode come first in every primary key, so that rows can be spread by tenant.

How it works: ``ledger_command`` and ``ledger_transfer`` are the journal; nothing in them is ever edited or deleted,
which triggers enforce. It has no metadata: that may have to be erased (:mod:`ledger.erasable`). Every other table is a
cache of the journal's fold (wallets, blocks, reservations, keys), a record that a fact carried (usage), or an outbox
(events, stored responses). The batches of a store are raw SQL over these tables; the classes are the schema, and what
the management side reads through.
"""

from sqlalchemy import DDL, BigInteger, Boolean, CheckConstraint, Index, LargeBinary, Text, event, text
from sqlmodel import Field, SQLModel


class LedgerCommandRow(SQLModel, table=True):
    """One applied command: its id serves once. *seq* rises over the whole journal.

    *facts* are all of its facts but the transfers, of which there are *transfers*; *result* answers a repetition.
    """

    __tablename__ = "ledger_command"
    __table_args__ = (Index("ix_ledger_command_seq", "seq"),)

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    id: str = Field(primary_key=True, sa_type=Text)
    seq: int = Field(sa_type=BigInteger)
    kind: str = Field(sa_type=Text)
    at_us: int = Field(sa_type=BigInteger)
    transfers: int = Field(sa_type=BigInteger)
    facts: str = Field(sa_type=Text)
    result: str = Field(sa_type=Text)


class LedgerTransferRow(SQLModel, table=True):
    """One entry of the journal, balanced by construction."""

    __tablename__ = "ledger_transfer"
    __table_args__ = (
        CheckConstraint("amount > 0", name="ck_ledger_transfer_amount"),
        CheckConstraint("debit <> credit", name="ck_ledger_transfer_accounts"),
        Index("ix_ledger_transfer_seq", "seq", "position"),
        Index(
            "ix_ledger_transfer_debit",
            "tenant",
            "mode",
            "debit",
            "seq",
            "position",
            sqlite_where=text("debit LIKE 'wallet:%'"),
            postgresql_where=text("debit LIKE 'wallet:%'"),
        ),
        Index(
            "ix_ledger_transfer_credit",
            "tenant",
            "mode",
            "credit",
            "seq",
            "position",
            sqlite_where=text("credit LIKE 'wallet:%'"),
            postgresql_where=text("credit LIKE 'wallet:%'"),
        ),
        # Few entries are on it: what came in, and what went back. The books are compared with the processor's by them.
        Index(
            "ix_ledger_transfer_clearing_time",
            "tenant",
            "mode",
            "at_us",
            sqlite_where=text("debit = 'clearing' OR credit = 'clearing'"),
            postgresql_where=text("debit = 'clearing' OR credit = 'clearing'"),
        ),
        Index(
            "ix_ledger_transfer_clearing_payment",
            "reference",
            "tenant",
            "mode",
            sqlite_where=text("debit = 'clearing' OR credit = 'clearing'"),
            postgresql_where=text("debit = 'clearing' OR credit = 'clearing'"),
        ),
        Index(
            "ix_ledger_transfer_clearing_block",
            "block",
            "tenant",
            "mode",
            sqlite_where=text("debit = 'clearing' OR credit = 'clearing'"),
            postgresql_where=text("debit = 'clearing' OR credit = 'clearing'"),
        ),
        {"sqlite_with_rowid": False},
    )

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    seq: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    position: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    debit: str = Field(sa_type=Text)
    credit: str = Field(sa_type=Text)
    amount: int = Field(sa_type=BigInteger)
    asset: str = Field(sa_type=Text)
    block: str | None = Field(default=None, sa_type=Text)
    reference: str | None = Field(default=None, sa_type=Text)
    at_us: int = Field(sa_type=BigInteger)


class LedgerWalletRow(SQLModel, table=True):
    """*debts*, *alerts* and *rung* are JSON, NULL where there are none."""

    __tablename__ = "ledger_wallet"
    __table_args__ = (
        CheckConstraint("overdraft_limit >= 0", name="ck_ledger_wallet_overdraft_limit"),
        CheckConstraint("receivable >= 0", name="ck_ledger_wallet_receivable"),
        CheckConstraint("overdraft_reserved >= 0", name="ck_ledger_wallet_overdraft_reserved"),
        {"sqlite_with_rowid": False},
    )

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    wallet: str = Field(primary_key=True, sa_type=Text)
    asset: str = Field(sa_type=Text)
    overdraft_limit: int = Field(sa_type=BigInteger)
    receivable: int = Field(sa_type=BigInteger)
    overdraft_reserved: int = Field(sa_type=BigInteger)
    frozen: bool = Field(sa_type=Boolean)
    version: int = Field(sa_type=BigInteger)
    last_fact_us: int = Field(sa_type=BigInteger)
    blocks_opened: int = Field(sa_type=BigInteger)
    events_raised: int = Field(sa_type=BigInteger)
    debts: str | None = Field(default=None, sa_type=Text)
    alerts: str | None = Field(default=None, sa_type=Text)
    rung: str | None = Field(default=None, sa_type=Text)


class LedgerBlockRow(SQLModel, table=True):
    """*live* tells that a command can still move the block. *restriction*, *pool*, *metadata*, *reversal* are JSON."""

    __tablename__ = "ledger_block"
    __table_args__ = (
        CheckConstraint(
            "granted >= 0 AND consumed >= 0 AND expired >= 0 AND revoked >= 0 AND clawed >= 0 AND remaining >= 0",
            name="ck_ledger_block_amounts",
        ),
        CheckConstraint("granted = consumed + expired + revoked + remaining", name="ck_ledger_block_sum"),
        CheckConstraint("reserved >= 0 AND reserved <= remaining", name="ck_ledger_block_reserved"),
        CheckConstraint("live = (remaining > 0)", name="ck_ledger_block_live"),
        Index(
            "ix_ledger_block_live",
            "tenant",
            "mode",
            "wallet",
            "id",
            sqlite_where=text("live"),
            postgresql_where=text("live"),
        ),
        Index(
            "ix_ledger_block_due",
            "expires_at_us",
            sqlite_where=text("live AND expires_at_us IS NOT NULL"),
            postgresql_where=text("live AND expires_at_us IS NOT NULL"),
        ),
        Index(
            "ix_ledger_block_plan",
            "tenant",
            "mode",
            "wallet",
            "sequence",
            sqlite_where=text("funding = 'plan'"),
            postgresql_where=text("funding = 'plan'"),
        ),
        {"sqlite_with_rowid": False},
    )

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    wallet: str = Field(primary_key=True, sa_type=Text)
    id: str = Field(primary_key=True, sa_type=Text)
    sequence: int = Field(sa_type=BigInteger)
    granted: int = Field(sa_type=BigInteger)
    consumed: int = Field(sa_type=BigInteger)
    reserved: int = Field(sa_type=BigInteger)
    expired: int = Field(sa_type=BigInteger)
    revoked: int = Field(sa_type=BigInteger)
    clawed: int = Field(sa_type=BigInteger)
    remaining: int = Field(sa_type=BigInteger)
    live: bool = Field(sa_type=Boolean)
    frozen: bool = Field(sa_type=Boolean)
    created_at_us: int = Field(sa_type=BigInteger)
    effective_at_us: int = Field(sa_type=BigInteger)
    expires_at_us: int | None = Field(default=None, sa_type=BigInteger)
    priority: int = Field(sa_type=BigInteger)
    source: str = Field(sa_type=Text)
    funding: str = Field(sa_type=Text)
    operator_paid: bool = Field(sa_type=Boolean)
    restriction: str = Field(sa_type=Text)
    pool: str | None = Field(default=None, sa_type=Text)
    payment_reference: str | None = Field(default=None, sa_type=Text)
    metadata_: str = Field(sa_type=Text, sa_column_kwargs={"name": "metadata"})
    reversal: str | None = Field(default=None, sa_type=Text)


class LedgerReservationRow(SQLModel, table=True):
    """*body* is the whole reservation as JSON; the other columns are what is searched by."""

    __tablename__ = "ledger_reservation"
    __table_args__ = (
        CheckConstraint(
            "state IN ('open', 'committed', 'released', 'expired')",
            name="ck_ledger_reservation_state",
        ),
        Index(
            "ix_ledger_reservation_due",
            "expires_at_us",
            sqlite_where=text("state = 'open'"),
            postgresql_where=text("state = 'open'"),
        ),
        Index(
            "ix_ledger_reservation_request",
            "tenant",
            "mode",
            "request_id",
            sqlite_where=text("request_id IS NOT NULL"),
            postgresql_where=text("request_id IS NOT NULL"),
        ),
        # Whose metadata an erasure looks for: those that the wallet, the first payer, pays for.
        Index(
            "ix_ledger_reservation_metadata",
            "tenant",
            "mode",
            "reservation",
            sqlite_where=text("instr(body, '\"metadata\":') > 0"),
        ).ddl_if(dialect="sqlite"),
        Index(
            "ix_ledger_reservation_payer_metadata",
            "tenant",
            "mode",
            text("split_part(split_part(body, '\"wallets\":[[\"'::text, 2), '\"'::text, 5)"),
            "reservation",
            postgresql_where=text("strpos(body, '\"metadata\":'::text) > 0"),
        ).ddl_if(dialect="postgresql"),
    )

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    reservation: str = Field(primary_key=True, sa_type=Text)
    state: str = Field(sa_type=Text)
    expires_at_us: int = Field(sa_type=BigInteger)
    request_id: str | None = Field(default=None, sa_type=Text)
    body: str = Field(sa_type=Text)


class LedgerKeyRow(SQLModel, table=True):
    """A taken idempotency key: *result* is what it answers with for ever."""

    __tablename__ = "ledger_key"
    __table_args__ = ({"sqlite_with_rowid": False},)

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    operation: str = Field(primary_key=True, sa_type=Text)
    key: str = Field(primary_key=True, sa_type=Text)
    digest: str = Field(sa_type=Text)
    result: str = Field(sa_type=Text)


class LedgerResponseRow(SQLModel, table=True):
    """An answer that is replayed under its key until *expires_at_us*."""

    __tablename__ = "ledger_response"
    __table_args__ = (Index("ix_ledger_response_expiry", "expires_at_us"),)

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    operation: str = Field(primary_key=True, sa_type=Text)
    key: str = Field(primary_key=True, sa_type=Text)
    status: int = Field(sa_type=BigInteger)
    headers: str = Field(sa_type=Text)
    body: bytes = Field(sa_type=LargeBinary)
    expires_at_us: int = Field(sa_type=BigInteger)


class LedgerEventRow(SQLModel, table=True):
    """The outbox: *sequence* counts a wallet's events without gaps. Without *delivered_at_us* it is yet to be told."""

    __tablename__ = "ledger_event"
    __table_args__ = (
        Index(
            "ix_ledger_event_pending",
            "tenant",
            "mode",
            "at_us",
            sqlite_where=text("delivered_at_us IS NULL"),
            postgresql_where=text("delivered_at_us IS NULL"),
        ),
        Index("ix_ledger_event_id", "tenant", "mode", "id"),
        Index(
            "ix_ledger_event_rare",
            "tenant",
            "mode",
            "id",
            sqlite_where=text("type <> 'usage.recorded'"),
            postgresql_where=text("type <> 'usage.recorded'"),
        ),
    )

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    wallet: str = Field(primary_key=True, sa_type=Text)
    sequence: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    id: str = Field(sa_type=Text)
    type: str = Field(sa_type=Text)
    at_us: int = Field(sa_type=BigInteger)
    body: str = Field(sa_type=Text)
    delivered_at_us: int | None = Field(default=None, sa_type=BigInteger)


class LedgerUsageRow(SQLModel, table=True):
    """The usage behind one commit; *part* counts the commits of a reservation.

    ``base``, ``markup`` and ``charged`` are sums over the legs, ``charges`` has them one by one. ``folded`` is the mark
    of whoever adds usage up beside the ledger, which itself neither writes nor reads it.
    """

    __tablename__ = "ledger_usage"
    __table_args__ = (
        CheckConstraint("charged = base + markup", name="ck_ledger_usage_charged"),
        CheckConstraint("provider_cost_nanos >= 0", name="ck_ledger_usage_provider_cost"),
        Index("ix_ledger_usage_request", "tenant", "mode", "request_id"),
        Index("ix_ledger_usage_customer", "tenant", "mode", "customer_id", "at_us"),
        Index("ix_ledger_usage_time", "tenant", "mode", "at_us"),
        Index(
            "ix_ledger_usage_unfolded",
            "tenant",
            "mode",
            "at_us",
            sqlite_where=text("NOT folded"),
            postgresql_where=text("NOT folded"),
        ),
        {"sqlite_with_rowid": False},
    )

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    reservation: str = Field(primary_key=True, sa_type=Text)
    part: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    request_id: str = Field(sa_type=Text)
    customer_id: str | None = Field(default=None, sa_type=Text)
    app_id: str | None = Field(default=None, sa_type=Text)
    key_id: str | None = Field(default=None, sa_type=Text)
    model: str | None = Field(default=None, sa_type=Text)
    action: str | None = Field(default=None, sa_type=Text)
    metric: str | None = Field(default=None, sa_type=Text)
    units: str = Field(sa_type=Text)
    provider_cost_nanos: int = Field(sa_type=BigInteger)
    base: int = Field(sa_type=BigInteger)
    markup: int = Field(sa_type=BigInteger)
    charged: int = Field(sa_type=BigInteger)
    shortfall: int = Field(sa_type=BigInteger)
    charges: str = Field(sa_type=Text)
    price_version: str | None = Field(default=None, sa_type=Text)
    source: str = Field(sa_type=Text)
    ending: str = Field(sa_type=Text)
    upstream: str | None = Field(default=None, sa_type=Text)
    started_at_us: int = Field(sa_type=BigInteger)
    at_us: int = Field(sa_type=BigInteger)
    metadata_: str = Field(sa_type=Text, sa_column_kwargs={"name": "metadata"})
    folded: bool = Field(default=False, sa_type=Boolean, sa_column_kwargs={"server_default": text("false")})


def row_columns(table: str) -> tuple[str, ...]:
    """The columns of a row of :mod:`ledger.store.rows`, in its order: all but those that the database fills in."""
    return tuple(column.name for column in SQLModel.metadata.tables[table].columns if column.server_default is None)


TABLES = tuple(
    SQLModel.metadata.tables[name]
    for name in (
        "ledger_command",
        "ledger_transfer",
        "ledger_wallet",
        "ledger_block",
        "ledger_reservation",
        "ledger_key",
        "ledger_response",
        "ledger_event",
        "ledger_usage",
    )
)

JOURNAL_TABLES = ("ledger_command", "ledger_transfer")

SQLITE_TRIGGERS = tuple(
    f"CREATE TRIGGER {table}_refuses_{verb.lower()} BEFORE {verb} ON {table} "
    "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
    for table in JOURNAL_TABLES
    for verb in ("UPDATE", "DELETE")
)
"""What keeps the journal append-only on SQLite. A migration has its own copy: history does not follow the models."""

for _trigger in SQLITE_TRIGGERS:
    _table = SQLModel.metadata.tables[_trigger.split(" ON ")[1].split(" ")[0]]
    event.listen(_table, "after_create", DDL(_trigger).execute_if(dialect="sqlite"))  # type: ignore[no-untyped-call]
