"""What answers about money hold: packages, checkouts, orders. A price is money; what it brings is credits."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from farebox.credits import Credits


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """Credits that can be bought with money.

    Attributes:
        price: in `currency`; `price_minor` is the same in its minor unit, cents.
        credits: what the price buys; `bonus_credits` come on top of it.
        credits_usd: what `credits` are worth in dollars.
        purchasable: False where no payments are set up, and in test mode where payments are live.
    """

    id: str
    price: Decimal
    price_minor: int
    currency: str
    credits: Credits
    credits_usd: Decimal
    bonus_credits: Credits
    purchasable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sold:
    customer_id: str
    status: str
    package_id: str
    price: Decimal
    price_minor: int
    currency: str
    credits: Credits
    bonus_credits: Credits
    checkout_url: str | None
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkout(_Sold):
    """A sale that has begun: send the customer to `checkout_url`, where they pay until `expires_at`."""

    order_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order(_Sold):
    """What has become of a sale: `status` is `open`, `paid`, `failed` or `expired`; who pays late has paid.

    Attributes:
        kind: `checkout`, or `auto` for an automatic top-up.
        block_id: the block of credits that it brings.
        failure: why it failed: `card_declined`, for example.
    """

    id: str
    kind: str
    block_id: str
    failure: str | None
    created_at: datetime
    settled_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderStanding(Order):
    """An order, and what has become of the payment since.

    Attributes:
        returned: how much of the price has gone back to who paid it, by refunds and lost disputes.
        disputed: a dispute is open; what is left of the credits pays for nothing until it ends.
    """

    returned: Decimal
    returned_minor: int
    disputed: bool
