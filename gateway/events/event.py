"""An event of the ledger's outbox, as it was written in the transaction of what it tells."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import msgspec

from ledger.model import WalletRef

USAGE_RECORDED: Final = "usage.recorded"

EVENT_TYPES: Final = frozenset(
    {
        "budget.threshold",
        "charge.refunded",
        "credit.clawed_back",
        "credit.exhausted",
        "credit.expired",
        "credit.granted",
        "credit.low",
        "credit.restored",
        "pack.purchased",
        "reservation.expired",
        "topup.due",
        "topup.failed",
        "topup.succeeded",
        "usage.overage",
        USAGE_RECORDED,
    }
)
"""What an endpoint can ask for."""

ALL_TYPES: Final = "*"

TOLD_WALLETS: Final = ("customer:", "app:", "pool:")
"""Whose credits a tenant is told of. The rest is our own bookkeeping: lines, spend limits."""

CUSTOMER_WALLET: Final = "customer:"
LIMIT_WALLET: Final = "limit:"


class StoredEvent(msgspec.Struct, frozen=True):
    """*sequence* counts the events of *wallet* without gaps; *body* has amounts in the asset's smallest unit."""

    tenant: str
    mode: str
    wallet: str
    sequence: int
    id: str
    type: str
    at_us: int
    body: dict[str, Any]

    @property
    def ref(self) -> WalletRef:
        return WalletRef(self.tenant, self.mode, self.wallet)


class Reaction(NamedTuple):
    """What we do ourselves when an event of these types has happened.

    *act* is called at least once for each, in order for each wallet, before the event counts as told: it has to be
    repeatable. What it raises makes it come again, a bounded number of times.
    """

    types: frozenset[str]
    act: Callable[[StoredEvent], Awaitable[None]]


def customer_of(wallet: str) -> str | None:
    """The customer whose wallet this is."""
    return wallet.removeprefix(CUSTOMER_WALLET) if wallet.startswith(CUSTOMER_WALLET) else None


def is_told(wallet: str, kind: str) -> bool:
    """Whether a tenant is told of it at all: spend limits are refilled in silence, and tell of their thresholds."""
    return wallet.startswith(TOLD_WALLETS) or not kind.startswith("credit.")
