"""What a command comes to: applied, with facts and a result, or rejected with a reason. All are values."""

from enum import StrEnum
from typing import Any

import msgspec

from ledger.model import (
    Alert,
    Block,
    Charge,
    Debts,
    Payment,
    Reservation,
    ReservationRef,
    ReservationState,
    Reversal,
    Scope,
    UsageRecord,
    Wallet,
    WalletRef,
)


class Reason(StrEnum):
    """Why a command was refused, in order of precedence: the first that applies is given."""

    KEY_REUSED = "key_reused"
    INVALID_AMOUNT = "invalid_amount"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    ASSET_MISMATCH = "asset_mismatch"
    PLAN_ACTIVE = "plan_active"
    TOO_MANY_BLOCKS = "too_many_blocks"
    RESERVATION_SETTLED = "reservation_settled"
    WALLET_FROZEN = "wallet_frozen"
    RECEIVABLE_OUTSTANDING = "receivable_outstanding"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    LIMIT_REACHED = "limit_reached"


class Granted(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="granted"):
    """*repaid* is the part of *amount* that went to what the wallet owed; *at_us* is when the block was opened.

    *lapsed* is what an accumulation cap took of older blocks.
    """

    block_id: str
    amount: int
    balance_before: int
    balance_after: int
    repaid: int = 0
    at_us: int = 0
    lapsed: int = 0


class ToppedUp(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="topped_up"):
    """*amount* was paid for and *bonus* given; *repaid* is the part of both that went to what the wallet owed."""

    block_id: str
    amount: int
    bonus: int
    balance_before: int
    balance_after: int
    repaid: int
    at_us: int


class Reversed(msgspec.Struct, frozen=True, gc=False, tag="reversed"):
    """*taken* and *given* back now, and *taken_in_all* of the payment's credits; *receivable* is all that is owed."""

    taken: int
    given: int
    taken_in_all: int
    balance: int
    receivable: int


class Purchased(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="purchased"):
    """*block_id* is the first of the blocks that came; *at_us* is when, and *expires_at_us* until when they pay."""

    block_id: str
    price: int
    amount: int
    balance_before: int
    balance_after: int
    at_us: int
    expires_at_us: int | None = None


class Reserved(msgspec.Struct, frozen=True, gc=False, tag="reserved"):
    """*held* is what each leg holds now; *expires_at_us* is when it lapses unless extended."""

    reservation: str
    held: tuple[int, ...]
    expires_at_us: int


class Settled(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="settled"):
    """*charged* is the sum of all commits, a leg each; *balance* is that of the first leg's first wallet.

    *late* tells that the reservation had been settled without the caller, and only the missing part was debited.
    *held* is what the legs still hold together, after a commit that was not the last. *waived* as in
    :class:`~ledger.model.Reservation`.
    """

    reservation: str
    state: ReservationState
    charged: tuple[Charge, ...]
    shortfall: int
    balance: int
    payments: tuple[Payment, ...] = ()
    late: bool = False
    held: int = 0
    waived: int = 0


class Refunded(msgspec.Struct, frozen=True, gc=False, tag="refunded"):
    """*amounts* was given back now and *refunded* in all, a leg each; *balance* as in :class:`Settled`."""

    reservation: str
    amounts: tuple[int, ...]
    refunded: tuple[int, ...]
    balance: int


class Revoked(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="revoked"):
    """*amount* was unspent and is gone; *owed* was spent and joined *receivable*, all that the wallet owes."""

    amount: int
    receivable: int
    balance: int
    owed: int = 0


class Expired(msgspec.Struct, frozen=True, gc=False, tag="expired"):
    blocks: tuple[str, ...]
    amount: int


class Changed(msgspec.Struct, frozen=True, gc=False, tag="changed"):
    """The command had nothing more to tell."""


Result = Granted | ToppedUp | Reversed | Purchased | Reserved | Settled | Refunded | Revoked | Expired | Changed


class Transfer(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="transfer"):
    """One entry of the journal: *amount* > 0 leaves *debit* and arrives at *credit*."""

    scope: Scope
    debit: str
    credit: str
    amount: int
    asset: str
    block: str | None = None
    reference: str | None = None


class WalletOpened(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="wallet_opened"):
    wallet: Wallet


class WalletChanged(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="wallet_changed"):
    """What a command did to a wallet, as differences; every one raises the wallet's version by one."""

    wallet: WalletRef
    at_us: int
    receivable: int = 0
    overdraft_reserved: int = 0
    blocks_opened: int = 0
    events_raised: int = 0
    frozen: bool | None = None
    overdraft_limit: int | None = None
    debts: Debts | None = None
    """As they are now, where they have changed."""
    alerts: tuple[Alert, ...] | None = None
    rung: tuple[Alert, ...] | None = None


class BlockOpened(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="block_opened"):
    block: Block


class BlockChanged(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="block_changed"):
    """What a command did to a block, as differences."""

    wallet: WalletRef
    block: str
    granted: int = 0
    consumed: int = 0
    reserved: int = 0
    expired: int = 0
    revoked: int = 0
    clawed: int = 0
    frozen: bool | None = None
    reversal: Reversal | None = None
    """As it is now, where it has changed."""


class ReservationChanged(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="reservation_changed"):
    reservation: Reservation


class KeyFreed(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="key_freed"):
    """A release without a charge lets its idempotency key serve another attempt."""

    scope: Scope
    operation: str
    key: str


class KeyTaken(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="key_taken"):
    """From now on the key answers with this result."""

    scope: Scope
    operation: str
    key: str
    digest: str
    result: Result


class UsageRecorded(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="usage_recorded"):
    """The usage behind a commit. *charges* is what this commit charged, a leg each; *part* counts the commits."""

    reservation: ReservationRef
    part: int
    record: UsageRecord
    charges: tuple[Charge, ...]
    shortfall: int
    at_us: int


Fact = (
    Transfer
    | WalletOpened
    | WalletChanged
    | BlockOpened
    | BlockChanged
    | ReservationChanged
    | KeyTaken
    | KeyFreed
    | UsageRecorded
)


class Event(msgspec.Struct, frozen=True, gc=False):
    """An outbox row: written in the transaction of what it tells, in sequence for each wallet."""

    id: str
    wallet: WalletRef
    sequence: int
    type: str
    at_us: int
    body: dict[str, Any]


class Applied(msgspec.Struct, frozen=True, gc=False):
    """*replayed* tells that nothing was done again: this is the first attempt's result.

    *answers* names the idempotency key (operation, key) under which a response that the command brought is kept.
    """

    result: Result
    facts: tuple[Fact, ...] = ()
    events: tuple[Event, ...] = ()
    replayed: bool = False
    answers: tuple[str, str] | None = None


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """*needed* and *available* are in the asset's smallest unit, where the reason is a lack of credits.

    *state* is that of the reservation, where the reason is that it is settled or exists already. *limit* is the
    wallet of the limit, or of the tenant's line, that was reached.
    """

    reason: Reason
    needed: int = 0
    available: int = 0
    state: ReservationState | None = None
    result: Result | None = None
    limit: WalletRef | None = None


Outcome = Applied | Rejected
