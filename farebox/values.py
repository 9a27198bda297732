"""What answers hold. Amounts are exact credits, times have their zone, and nothing can be changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from farebox.credits import Amount, Credits


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomerSettings:
    """What a customer has agreed to, and what is told of them."""

    auto_buy_enabled: bool = False
    auto_buy_pack: str | None = None
    auto_buy_price: int | None = None
    """Millicredits, instead of the pack's price."""
    auto_buy_credits: int | None = None
    """Millicredits, instead of the pack's credits."""
    low_balance_thresholds: tuple[int, ...] | None = None
    """Millicredits below which `credit.low` tells; None takes the tenant's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Customer:
    id: str
    external_id: str
    livemode: bool
    metadata: Mapping[str, Any]
    settings: CustomerSettings
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Restrictions:
    """Where a block may pay; an empty tuple allows everything."""

    apps: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Credits that came in together."""

    id: str
    customer_id: str
    granted_amount: Credits
    remaining_amount: Credits
    reserved_amount: Credits | None = None
    consumed_amount: Credits | None = None
    priority: int
    source: str
    funding: str
    created_at: datetime
    effective_at: datetime | None = None
    expires_at: datetime | None
    frozen: bool = False
    restrictions: Restrictions
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What a customer has.

    Attributes:
        effective_balance: what this app (and the metric or model that was asked for) could spend now.
        receivable: what the wallet owes.
        blocks: in the order in which they are spent.
    """

    customer_id: str
    balance: Credits
    effective_balance: Credits
    reserved: Credits
    receivable: Credits
    blocks: tuple[Block, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """Attributes:
    lapsed_amount: what `accumulation_cap` took of older blocks.
    """

    customer_id: str
    amount_granted: Credits
    lapsed_amount: Credits
    balance_before: Credits
    balance: Credits
    block: Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """Attributes:
    revoked_amount: was unspent, and is gone.
    owed_amount: was spent, and is owed now.
    """

    customer_id: str
    block_id: str
    revoked_amount: Credits
    owed_amount: Credits
    receivable: Credits
    balance: Credits


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A block's part in a transaction."""

    block_id: str | None
    amount: Credits


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """A line of the statement: a negative amount left the wallet."""

    id: str
    type: str
    amount: Credits
    reference: str | None
    request_id: str | None
    metric: str | None
    action: str | None
    model: str | None
    parts: tuple[Part, ...]
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Entitlement:
    """Whether a customer may do something now. It is true where they may: `if client.check_entitlement(…):`."""

    allowed: bool
    customer_id: str
    billable_metric_key: str
    balance: Credits
    effective_balance: Credits
    cost_per_unit: Credits
    cost_total: Credits
    affordable_units: int | None
    """How many whole units the credits pay for; None where nothing bounds them."""

    def __bool__(self) -> bool:
        return self.allowed


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One event of a batch."""

    customer: str
    metric: str
    units: Amount = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """An event that was recorded; `id` names its receipt and its refund."""

    id: str
    customer_id: str
    billable_metric_key: str
    units: Decimal
    credits_used: Credits
    balance: Credits


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSum:
    """What the charges of one group come to: `group` has the keys that were asked for."""

    group: Mapping[str, str | None]
    events: int
    units_decimal: Decimal
    credits_used: Credits
    input_tokens: int
    output_tokens: int

    @property
    def units(self) -> Decimal:
        return self.units_decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationState:
    """A reservation as it was when Farebox answered. `status`: active, committed, released or expired."""

    id: str
    status: str
    customer_id: str
    billable_metric_key: str | None
    estimated_units: Decimal | None
    reserved_amount: Credits
    charged_amount: Credits
    uncovered_amount: Credits
    request_id: str | None
    created_at: datetime
    expires_at: datetime
    settled_at: datetime | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a commit or a release came to.

    Attributes:
        charged_amount: by all commits.
        uncovered_amount: what the commits asked for and nobody could pay.
        reserved_amount: what it still holds.
        late: its time had run out before: the commit took what was free.
    """

    id: str
    status: str
    request_id: str | None
    charged_amount: Credits
    uncovered_amount: Credits
    reserved_amount: Credits
    balance: Credits
    late: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    id: str
    status: str
    reserved_amount: Credits
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """Attributes:
    amount: given back now.
    refunded: given back in all.
    """

    request_id: str
    amount: Credits
    refunded: Credits
    balance: Credits


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchase:
    """A pack that was bought."""

    customer_id: str
    pack_id: str
    block_id: str
    price: Credits
    credits: Credits
    balance_before: Credits
    balance: Credits
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, as webhooks tell it. `sequence` counts the customer's events, without gaps."""

    id: str
    type: str
    timestamp: datetime
    livemode: bool
    sequence: int
    customer_id: str | None
    customer: Customer | None
    credit_block: Block | None
    data: Mapping[str, Any]
