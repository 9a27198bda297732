"""The values that the ledger is made of: frozen, compared by value, serialisable as JSON.

Amounts are ``int`` in the smallest unit of the wallet's asset (1e-9 credits for the default credit),
times are ``int`` microseconds since the epoch, UTC. Intervals are half-open: a block pays at ``t`` when
``effective_at_us <= t < expires_at_us``.

A value cannot contain itself, so the cycle collector need not look at it (``gc=False``): a batch makes thousands.
"""

from enum import StrEnum
from typing import Any, Literal, NamedTuple

import msgspec

AMOUNT_MAX = 2**62
"""Largest amount of one field. It leaves a bit of int64 for a sum of two."""

PRIORITY_MAX = 10**6
"""Of a block, up and down."""


class Scope(NamedTuple):
    """Whose data, and which: nothing crosses from one scope to another."""

    tenant: str
    mode: str


class WalletRef(NamedTuple):
    """Names a wallet. The id derives from its owner (``customer:cus_…``), so nobody has to look it up."""

    tenant: str
    mode: str
    wallet: str

    @property
    def scope(self) -> Scope:
        return Scope(self.tenant, self.mode)


class ReservationRef(NamedTuple):
    tenant: str
    mode: str
    reservation: str

    @property
    def scope(self) -> Scope:
        return Scope(self.tenant, self.mode)


WALLET_PREFIX = "wallet:"
"""What an account of the journal begins with that is a wallet."""


class Account:
    """The accounts of the journal that are not wallets: append-only, never a locked row."""

    CLEARING = "clearing"
    PACKAGE_SPREAD = "package_spread"
    EXTERNAL = "external"
    PROMO = "promo"
    PLAN = "plan"
    REVENUE = "revenue"
    TENANT_DUE = "tenant_due"
    TENANT_MARGIN = "tenant_margin"
    DEVELOPER_PAYABLE = "developer_payable"
    BREAKAGE = "breakage"
    METER_SHORTFALL = "meter_shortfall"
    LIMIT = "limit"
    PROVIDER_COST = "provider_cost"
    PROVIDER_PAYABLE = "provider_payable"


USD_ASSET = "USD"
"""Provider cost is booked in nano-dollars under this asset."""


class Funding(StrEnum):
    """What stands behind a block. Derived from the operation that made it, never a request field."""

    PAID = "paid"
    EXTERNAL = "external"
    PROMOTIONAL = "promotional"
    DEVELOPER_GRANT = "developer_grant"
    PLAN = "plan"
    LIMIT = "limit"
    """Not credits: what may be spent under a limit in one of its periods."""


class Tags(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a charge is for; blocks can be restricted by each. Only blocks of at most *priority_max* may pay for it."""

    app: str | None = None
    metric: str | None = None
    model: str | None = None
    priority_max: int | None = None


class Restriction(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Where a block may pay. An empty tuple allows everything."""

    apps: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    def allows(self, tags: Tags) -> bool:
        return self is UNRESTRICTED or (
            (not self.apps or tags.app in self.apps)
            and (not self.metrics or tags.metric in self.metrics)
            and (not self.models or tags.model in self.models)
        )


UNRESTRICTED = Restriction()

AlertKind = Literal["low", "exhausted", "top_up"]


class Alert(msgspec.Struct, frozen=True, gc=False):
    """A wallet is watched for its balance to sink *below* this."""

    kind: AlertKind
    below: int


class Debts(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a wallet's receivable comes from, and what has repaid it.

    Attributes:
        reversed: the part of the receivable that is owed because payments were taken back.
        reversed_paid: what credits that the operator was paid for have repaid of reversed payments, less what came back
            of it.
        repaid_due: what other credits have repaid of reversed payments, less what came back: the tenant owes it.
        repaid_paid: what credits that the operator was paid for have repaid of other debts, less what came back.
    """

    reversed: int = 0
    reversed_paid: int = 0
    repaid_paid: int = 0
    repaid_due: int = 0


NO_DEBTS = Debts()


class Wallet(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A stack of blocks in one asset, and what it owes.

    ``receivable`` is what was used beyond the blocks under an agreed overdraft or after a claw-back; the next grant
    repays it first. ``overdraft_reserved`` is the part of the overdraft that open reservations hold. ``version``
    rises with every command that touches the wallet. ``rung`` are those of its ``alerts`` that the balance was below of
    with the last command that touched the wallet; in the order of ``alerts``.
    """

    ref: WalletRef
    asset: str
    overdraft_limit: int = 0
    receivable: int = 0
    overdraft_reserved: int = 0
    frozen: bool = False
    version: int = 0
    last_fact_us: int = 0
    blocks_opened: int = 0
    events_raised: int = 0
    debts: Debts = NO_DEBTS
    alerts: tuple[Alert, ...] = ()
    rung: tuple[Alert, ...] = ()

    @property
    def account(self) -> str:
        return f"{WALLET_PREFIX}{self.ref.wallet}"


class Reversal(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What refunds and disputes of its payment have taken of a block, apart from what a tenant has taken back.

    Attributes:
        free: the part of what the block has as revoked; ``owed`` of what it has as clawed.
        clawed: what the tenant had clawed back already: its debt is now owed for the payment.
        lapsed: what was not there to be taken any more, because it had lapsed or the tenant had taken it back.
        spread: what the payment was worth beyond the credits of the block; ``spread_taken`` was given back of it.
        revision: of the last `Reverse` that had a say. Of a payment's blocks the first has it.
        frozen: what is left pays for nothing, whatever the block's own switch says.
    """

    free: int = 0
    owed: int = 0
    clawed: int = 0
    lapsed: int = 0
    spread: int = 0
    spread_taken: int = 0
    revision: int = 0
    frozen: bool = False

    @property
    def taken(self) -> int:
        """What was taken of the block's credits in all."""
        return self.free + self.owed + self.clawed + self.lapsed


NOT_REVERSED = Reversal()


class Block(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Credits that came in together and are spent, expire or are taken back together.

    ``granted = consumed + expired + revoked + remaining`` and ``0 <= reserved <= remaining``.

    ``operator_paid`` tells whether the operator was paid for these credits or gave them itself; base cost that is
    burnt from others is due from the tenant. ``pool`` is the wallet that the credits came out of: what is revoked of
    them, and the markup on a developer's grant, goes back there. ``revoked`` is what was taken back before its time, or
    lapsed because a later grant of the same source came with a cap. ``clawed`` is what was taken back of the block
    after it was spent: the wallet owes it, or has repaid it. ``reversal`` tells what of both a reversed payment took.
    """

    wallet: WalletRef
    id: str
    sequence: int
    granted: int
    created_at_us: int
    effective_at_us: int
    expires_at_us: int | None = None
    priority: int = 0
    consumed: int = 0
    reserved: int = 0
    expired: int = 0
    revoked: int = 0
    clawed: int = 0
    source: str = ""
    funding: Funding = Funding.PAID
    operator_paid: bool = True
    frozen: bool = False
    restriction: Restriction = UNRESTRICTED
    pool: WalletRef | None = None
    payment_reference: str | None = None
    metadata: dict[str, Any] = {}
    reversal: Reversal = NOT_REVERSED

    @property
    def remaining(self) -> int:
        return self.granted - self.consumed - self.expired - self.revoked

    @property
    def free(self) -> int:
        return self.granted - self.consumed - self.expired - self.revoked - self.reserved

    @property
    def live(self) -> bool:
        """Whether any command can still move this block: a dead one need not be loaded."""
        return self.remaining > 0

    def expired_at(self, now_us: int) -> bool:
        return self.expires_at_us is not None and self.expires_at_us <= now_us

    def pays_at(self, now_us: int) -> bool:
        return (
            not (self.frozen or self.reversal.frozen) and self.effective_at_us <= now_us and not self.expired_at(now_us)
        )


class ReservationState(StrEnum):
    OPEN = "open"
    COMMITTED = "committed"
    RELEASED = "released"
    EXPIRED = "expired"
    """Its time ran out and it was settled for its last durable mark. A late commit may still debit what is missing."""


class Charge(msgspec.Struct, frozen=True, gc=False):
    """What one leg pays: the base cost and the developer's markup on it."""

    base: int = 0
    markup: int = 0

    @property
    def total(self) -> int:
        return self.base + self.markup


class UsageRecord(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The facts behind a charge, written in its transaction.

    ``units`` maps a unit to a quantity, ``provider_cost_nanos`` is in nano-dollars, ``source`` is how the units are
    known: ``provider``, ``counted`` or ``partial``, or ``reported`` where the tenant's app says so.
    """

    request_id: str
    units: dict[str, int] = {}
    provider_cost_nanos: int = 0
    price_version: str | None = None
    source: str = ""
    ending: str = ""
    app_id: str | None = None
    key_id: str | None = None
    customer_id: str | None = None
    model: str | None = None
    upstream: str | None = None
    action: str | None = None
    metric: str | None = None
    started_at_us: int = 0
    metadata: dict[str, Any] = {}


class Settlement(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One charge a leg, and the usage that explains it."""

    charges: tuple[Charge, ...]
    usage: UsageRecord | None = None


class Slice(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A part of a block that a reservation holds, or of the wallet's overdraft when *block* is None."""

    leg: int
    wallet: WalletRef
    block: str | None
    amount: int


LIMIT_LEG = -1
"""The leg of slices that hold a spend limit."""

UNFUNDED_LEG = -2
"""The leg of slices that hold the tenant's line for credits that the operator was not paid for."""


class Payment(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a block paid of a charge: the line of a receipt, and what a refund reverses."""

    leg: int
    wallet: WalletRef
    block: str | None
    base: int
    markup: int
    base_account: str
    markup_account: str

    @property
    def total(self) -> int:
        return self.base + self.markup

    @property
    def name(self) -> tuple[object, ...]:
        """What two payments have in common that can be told as one."""
        return (self.leg, self.wallet, self.block, self.base_account, self.markup_account)

    @property
    def pool(self) -> WalletRef | None:
        """The wallet that the markup was returned to."""
        if not self.markup_account.startswith(WALLET_PREFIX):
            return None
        return WalletRef(self.wallet.tenant, self.wallet.mode, self.markup_account.removeprefix(WALLET_PREFIX))


class Leg(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Who pays one part of a charge: the wallets in the order in which they pay."""

    wallets: tuple[WalletRef, ...]


class Reservation(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Credits set aside for work under way.

    No wallet stands twice in a leg, nor twice among the limits. ``mark`` is what is charged if nobody settles before
    ``expires_at_us``: None releases everything. A commit answers for it and clears it; an expired reservation keeps
    it, because a late commit debits only what is missing. ``charged`` is what was charged so far, a leg each.
    ``reserved`` is the most that the paying legs held, ``balance`` that of the first leg's first wallet when it was
    last charged or settled. ``settled_by`` is the command that settled it: repeating that one is a replay. ``key``
    names the idempotency key that a release frees again. ``owed`` is what each leg's first wallet was left owing
    beyond an agreed overdraft, for work that was done while the ledger was away or for an overage. ``refunds`` is what
    was given back of ``payments`` since, under the same names; ``charged`` and ``payments`` stay what they were.
    ``waived`` is what commits asked for beyond ``charged`` and nobody paid, by their own choice: it is in no entry.
    """

    ref: ReservationRef
    state: ReservationState
    asset: str
    created_at_us: int
    expires_at_us: int
    legs: tuple[Leg, ...]
    slices: tuple[Slice, ...] = ()
    reserved: int = 0
    limits: tuple[WalletRef, ...] = ()
    unfunded: WalletRef | None = None
    developer: str | None = None
    tags: Tags = Tags()
    request_id: str | None = None
    mark: Settlement | None = None
    charged: tuple[Charge, ...] = ()
    shortfall: int = 0
    payments: tuple[Payment, ...] = ()
    commits: int = 0
    balance: int = 0
    settled_at_us: int | None = None
    settled_by: str | None = None
    key: tuple[str, str] | None = None
    metadata: dict[str, Any] = {}
    owed: tuple[int, ...] = ()
    refunds: tuple[Payment, ...] = ()
    waived: int = 0

    @property
    def refunded(self) -> tuple[int, ...]:
        """What was given back to each leg."""
        given = [0] * len(self.legs)
        for payment in self.refunds:
            given[payment.leg] += payment.total
        return tuple(given)

    @property
    def held(self) -> int:
        """What the paying legs hold together."""
        return sum(self.held_by_leg)

    @property
    def held_by_leg(self) -> tuple[int, ...]:
        """What each paying leg holds."""
        held = [0] * len(self.legs)
        for part in self.slices:
            if part.leg >= 0:
                held[part.leg] += part.amount
        return tuple(held)
