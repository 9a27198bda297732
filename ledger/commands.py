"""What the ledger can be asked to do, as values. Ids come from the caller, so a retry is the same command."""

from typing import Any, Literal

import msgspec

from ledger.model import (
    UNRESTRICTED,
    Alert,
    Funding,
    Payment,
    ReservationRef,
    Restriction,
    Scope,
    Settlement,
    Tags,
    WalletRef,
)


class Key(msgspec.Struct, frozen=True, gc=False):
    """An idempotency key. Its scope is tenant, mode and operation; *digest* stands for the input it came with.

    Raises:
        ValueError: it has a zero character. No database finds such a text again, so it would serve twice.
    """

    operation: str
    key: str
    digest: str

    def __post_init__(self) -> None:
        if "\x00" in self.key:
            raise ValueError("an idempotency key must not have a zero character")


class Command(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """*id* is unique and time-ordered; events derive theirs from it."""

    id: str
    scope: Scope
    key: Key | None = None


class Grant(Command, frozen=True, kw_only=True, tag="grant"):
    """Open a block. It repays the wallet's receivable first. Creates the wallet on first use.

    With *from_wallet* the credits come out of that wallet's free blocks, all or nothing, and inherit whether the
    operator was paid for them: a developer's wallet fills its pool like this, and the pool its users' wallets. What
    was paid for and what was not become two blocks, the second with the id *block_id* + ``_2``.

    *operator_paid* tells whether the operator was paid for these credits, or gives them itself. With an
    *accumulation_cap* >= *amount* the wallet's blocks of the same *source* and *funding* hold no more than that
    together, this grant included: what is free of the oldest lapses at once. What is reserved of them stays.
    """

    wallet: WalletRef
    asset: str
    block_id: str
    amount: int
    funding: Funding
    operator_paid: bool
    from_wallet: WalletRef | None = None
    priority: int = 0
    effective_at_us: int | None = None
    expires_at_us: int | None = None
    source: str = ""
    restriction: Restriction = UNRESTRICTED
    payment_reference: str | None = None
    metadata: dict[str, Any] = {}
    accumulation_cap: int | None = None


class TopUp(Command, frozen=True, kw_only=True, tag="top_up"):
    """A payment has come in: open the block of what was paid for, and one of the operator's *bonus*, in one step.

    It repays the wallet's receivable first, and creates the wallet on first use. The bonus is the block with the id
    *block_id* + ``_bonus``. *amount* + *spread* is what the payment is worth: the spread is what the operator keeps.

    Attributes:
        payment: our id of the payment, the reference of its entries and of the blocks.
        body: what the event ``topup.succeeded`` tells besides the amounts.
    """

    wallet: WalletRef
    asset: str
    block_id: str
    amount: int
    payment: str
    bonus: int = 0
    spread: int = 0
    source: str = ""
    metadata: dict[str, Any] = {}
    body: dict[str, Any] = {}


class Reverse(Command, frozen=True, kw_only=True, tag="reverse"):
    """Let what a payment bought be taken back in the part *taken* / *paid* of it: no more, and no less.

    It says how much is to be taken in all, not what is to be done now: what was taken too much is given back, exactly
    as it was taken. So it is repeatable, and of several only the one with the highest *revision* counts; an older one
    changes nothing. With *frozen* what is left of the payment's blocks pays for nothing.

    Attributes:
        block_id: that of the `TopUp`.
        taken, paid: in the currency of the payment, 0 <= taken <= paid. Credits are rounded down.
        reference: what took it, for the event.
    """

    wallet: WalletRef
    block_id: str
    taken: int
    paid: int
    frozen: bool
    revision: int
    reference: str | None = None


class Tell(Command, frozen=True, kw_only=True, tag="tell"):
    """Raise an *event* of a wallet: something happened to it, or did not, that moved no credits."""

    wallet: WalletRef
    asset: str
    event: str
    body: dict[str, Any] = {}


class Purchase(Command, frozen=True, kw_only=True, tag="purchase"):
    """Buy a pack of credits out of the wallet's own: the price goes and the credits come in one step, or neither.

    The price is taken in burn order from what is free for *tags*, never from plans, nor, where the pack has a priority
    above 0, from a block that burns with it or before it. The credits pay at once. They expire *duration_us* after the
    plan that ends last, if one is still there, else after now; None is never. What a price covers that the operator was
    paid for, and the rest, become two blocks, the second with the id *block_id* + ``_2``.

    Attributes:
        price: >= 0, in the smallest unit of the asset.
        pack: its id. The blocks' metadata and the event name it.
        unless_active: refuse where a plan still pays.
        cause: why it is bought, for the event.
    """

    wallet: WalletRef
    asset: str
    block_id: str
    price: int
    amount: int
    pack: str
    duration_us: int | None = None
    priority: int = 0
    tags: Tags = Tags()
    unless_active: bool = False
    cause: str = ""
    source: str = ""
    restriction: Restriction = UNRESTRICTED
    metadata: dict[str, Any] = {}


class ReserveLeg(msgspec.Struct, frozen=True, gc=False):
    """Set *amount* aside from *wallets* in their order; what there is, but not under *minimum*, when it is short."""

    wallets: tuple[WalletRef, ...]
    amount: int
    minimum: int


class LimitPeriod(msgspec.Struct, frozen=True, gc=False):
    """When a limit's block serves: at ``start_us <= t < end_us``, for ever without an end. The block is its own."""

    block_id: str
    start_us: int
    end_us: int | None = None


class Limit(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A spend limit: in each period *amount* may be spent under it.

    The block of the period that the command falls in is opened with *amount* by the first command that needs it. Who
    asks does not know the batch's clock, so it names the neighbouring period, too, when that is near. Without
    *periods* the wallet is as it is filled. An event tells, once a period, when what was used reaches one of
    *thresholds_bps* of the amount; those of a period are fixed when it is opened.
    """

    wallet: WalletRef
    amount: int = 0
    periods: tuple[LimitPeriod, ...] = ()
    thresholds_bps: tuple[int, ...] = ()

    @property
    def blocks(self) -> list[tuple[WalletRef, str]]:
        """The blocks that it names. They count even when nothing is left in them."""
        return [(self.wallet, period.block_id) for period in self.periods]


class Watch(msgspec.Struct, frozen=True, gc=False):
    """Watch *wallet* for these *alerts* from now on, instead of for those that it was watched for."""

    wallet: WalletRef
    alerts: tuple[Alert, ...]


class Hold(Command, frozen=True, kw_only=True):
    """What a reservation and a debit have in common.

    The first leg is the payer's, a second one bears what a product action's price leaves uncovered. Every limit
    must afford what the first leg holds. *unfunded* is the tenant's line that bounds what may be burnt from credits
    that the operator was not paid for, an agreed overdraft among them; None leaves it unbounded. *developer* names
    the account that markup is payable to. *watches* are of wallets that a leg names; a wallet that none is of goes on
    being watched as it was, and so do all when the command is refused.
    """

    reservation: ReservationRef
    asset: str
    legs: tuple[ReserveLeg, ...]
    limits: tuple[Limit, ...] = ()
    unfunded: WalletRef | None = None
    developer: str | None = None
    tags: Tags = Tags()
    watches: tuple[Watch, ...] = ()

    @property
    def wallets(self) -> list[WalletRef]:
        """Every wallet that it names."""
        named = [ref for leg in self.legs for ref in leg.wallets]
        named += [limit.wallet for limit in self.limits]
        if self.unfunded is not None:
            named.append(self.unfunded)
        return named


class Reserve(Hold, frozen=True, kw_only=True, tag="reserve"):
    """Set credits aside for work to come, over all legs and limits, all or nothing.

    The reservation's id is the caller's: a retry cannot make a second one. *mark* is what is charged if nobody
    settles within *ttl_us*. With *key_stays* a release without a charge does not free the key for another attempt:
    a repetition answers with this reservation, whatever has become of it. With *overage* what the credits lack will
    be owed: what there is of them is held, and of the limits all.
    """

    ttl_us: int
    request_id: str | None = None
    mark: Settlement | None = None
    metadata: dict[str, Any] = {}
    key_stays: bool = False
    overage: bool = False


class Extend(Command, frozen=True, kw_only=True, tag="extend"):
    """Hold more on the first leg, live longer, or both. *amount* 0 is a heartbeat.

    *amount* is in addition to what is held; less is taken, but not under *minimum*, when it is short. *limits* are
    those of the reservation, as they are by now: a new period may have begun. Others are passed over. *overage* is as
    for `Reserve`.
    """

    reservation: ReservationRef
    amount: int = 0
    minimum: int = 0
    overage: bool = False
    limits: tuple[Limit, ...] = ()
    ttl_us: int | None = None
    mark: Settlement | None = None


class StoredResponse(msgspec.Struct, frozen=True, gc=False):
    """An answer to be replayed under its idempotency key for a day."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


Beyond = Literal["shortfall", "receivable", "waive"]


class Commit(Command, frozen=True, kw_only=True, tag="commit"):
    """Settle a reservation for what the work really cost and free the rest.

    Never refused for lack of funds: the cost is already real. *final* False charges and keeps the rest held.
    *beyond* says whose what is missing is, when neither the reservation nor free blocks nor an agreed overdraft cover
    the charge: the operator's loss, a debt of each leg's first wallet, or nobody's, because who commits waives it.
    *tells_overage* raises an event where something is owed.
    """

    reservation: ReservationRef
    settlement: Settlement
    final: bool = True
    beyond: Beyond = "shortfall"
    tells_overage: bool = False
    response: StoredResponse | None = None


class Release(Command, frozen=True, kw_only=True, tag="release"):
    """Give everything back that is held. What was charged by partial commits stays charged."""

    reservation: ReservationRef


class Lapse(Command, frozen=True, kw_only=True, tag="lapse"):
    """Settle a reservation whose time has run out for its last mark; does nothing to a live one."""

    reservation: ReservationRef


class Debit(Hold, frozen=True, kw_only=True, tag="debit"):
    """Charge at once: a reservation and its commit in one step.

    With *beyond* ``refuse`` it is refused when the legs' minimums are not there. With ``receivable`` it tells of work
    that was done without asking: it is never refused for lack of funds, and what neither blocks nor an agreed overdraft
    cover is owed by each leg's first wallet. It then also settles a reservation of the same request that is there
    already, because nobody knew whether it had been made. With ``overage`` a lack of credits is owed in the same way,
    but it was asked for: a wallet that is frozen and a limit that does not afford it refuse it. *tells_overage* raises
    an event where something is owed.
    """

    settlement: Settlement
    beyond: Literal["refuse", "receivable", "overage"] = "refuse"
    tells_overage: bool = False
    response: StoredResponse | None = None


class Refund(Command, frozen=True, kw_only=True, tag="refund"):
    """Give back all or part of what was charged, to the slices that paid, the last one first.

    What goes back to a block that has expired meanwhile lapses. A debt that was charged is owed no more; if it was
    repaid, what repaid it comes back. The limits and the unfunded line that were drawn on stay drawn.

    Attributes:
        payments: as the reservation has them. They name what has to be loaded; if they are others by now, the refund
            is refused.
        amounts: one a leg; None gives back all that is left of the charge.
        reason: for the event.
        unfunded: the line of the tenant that gives it back, if it is not the operator himself. The tenant owes the
            operator the base cost that had been revenue; what credits paid of it is drawn on the line, or refused.
    """

    reservation: ReservationRef
    payments: tuple[Payment, ...]
    amounts: tuple[int, ...] | None = None
    reason: str | None = None
    unfunded: WalletRef | None = None

    @property
    def wallets(self) -> list[WalletRef]:
        """Every wallet that it touches: those that paid, the pools that markup was returned to, and the line."""
        named = [payment.wallet for payment in self.payments]
        if self.unfunded is not None:
            named.append(self.unfunded)
        named += [pool for payment in self.payments if (pool := payment.pool) is not None]
        return named


class Revoke(Command, frozen=True, kw_only=True, tag="revoke"):
    """Take credits back from one block: what is free of it; with *clawback*, what is spent becomes a receivable.

    *amount* None takes back all that was granted.
    """

    wallet: WalletRef
    block_id: str
    amount: int | None
    clawback: bool = False
    reference: str | None = None


class Expire(Command, frozen=True, kw_only=True, tag="expire"):
    """Book what has expired in a wallet: the free part of each block that is past its time lapses."""

    wallet: WalletRef


class Freeze(Command, frozen=True, kw_only=True, tag="freeze"):
    """Stop a wallet, or one block of it, from being reserved; or let it be again."""

    wallet: WalletRef
    frozen: bool
    block_id: str | None = None


class SetOverdraft(Command, frozen=True, kw_only=True, tag="set_overdraft"):
    """Agree how far a wallet may go below zero."""

    wallet: WalletRef
    asset: str
    limit: int


class SetLimit(Command, frozen=True, kw_only=True, tag="set_limit"):
    """Let the period of *limit* that is now have its amount, though never less than is used and reserved of it.

    So does a named one that is about to begin: who still has the old amount in mind may be the first to draw on it.
    """

    limit: Limit
    asset: str

    @property
    def wallet(self) -> WalletRef:
        return self.limit.wallet


AnyCommand = (
    Grant
    | TopUp
    | Reverse
    | Tell
    | Purchase
    | Reserve
    | Extend
    | Commit
    | Release
    | Lapse
    | Debit
    | Refund
    | Revoke
    | Expire
    | Freeze
    | SetOverdraft
    | SetLimit
)
