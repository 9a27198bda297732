"""What is known of a payment, as facts that only ever grow, and what has to be true of the credits it bought.

How it works. Stripe's events come in any order, late and more than once. Each says something that stays true: so much
was received, a refund was made, a dispute was opened, or won. `Facts.join` puts two such sets together; it is
commutative, associative and idempotent, so neither order nor duplicates can matter. `target` reads off what an order
has come to. Where two truths contradict each other in time, one of them is the later one by its nature: a refund that
failed has been made before, a dispute that was won may have been lost before its appeal.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Final, TypeVar

import msgspec

from gateway.payments.orders import Order


class Money(msgspec.Struct, frozen=True, order=True):
    """In *currency*'s minor unit."""

    amount: int
    currency: str


class Refund(msgspec.Struct, frozen=True):
    """One refund: *undone* when it failed after all, or was canceled."""

    amount: int
    undone: bool = False

    def join(self, other: "Refund") -> "Refund":
        return Refund(max(self.amount, other.amount), self.undone or other.undone)


class Stage(IntEnum):
    """How far a dispute has come. An inquiry may end there, or become a dispute even after it was closed."""

    INQUIRY = 0
    INQUIRY_CLOSED = 1
    OPEN = 2
    CLOSED = 3


class Dispute(msgspec.Struct, frozen=True):
    """One dispute.

    Attributes:
        moved: what it took of our balance, below zero, and what it gave back, by the movement's id: in the currency of
            the balance, which need not be the dispute's.
        withdrawn, reinstated: that it did, as far as that was told without the movement itself.
        won, lost: how it was decided.
    """

    amount: int
    currency: str
    stage: Stage
    moved: dict[str, int] = {}
    withdrawn: bool = False
    reinstated: bool = False
    won: bool = False
    lost: bool = False

    @property
    def open(self) -> bool:
        return self.stage in (Stage.INQUIRY, Stage.OPEN)

    @property
    def taken(self) -> int:
        """How much of *amount* is gone, 0 <= taken <= amount.

        Of one that is won it is nothing, though the money may yet be on its way back; unless it came back, and was
        withdrawn once more. One that is lost may give back a part: what was refunded before.
        """
        withdrawn = [-each for each in self.moved.values() if each < 0]
        reinstated = [each for each in self.moved.values() if each > 0]
        if self.won:
            return self.amount if reinstated and len(withdrawn) > len(reinstated) else 0
        if not withdrawn:
            return self.amount if (self.withdrawn or self.lost) and not (self.reinstated or reinstated) else 0
        if self.reinstated and not reinstated:
            return 0
        gone = max(0, sum(withdrawn) - sum(reinstated))
        return self.amount * gone // sum(withdrawn)

    def join(self, other: "Dispute") -> "Dispute":
        return Dispute(
            max(self.amount, other.amount),
            max(self.currency, other.currency),
            max(self.stage, other.stage),
            _largest(self.moved, other.moved),
            self.withdrawn or other.withdrawn,
            self.reinstated or other.reinstated,
            self.won or other.won,
            self.lost or other.lost,
        )


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of one payment.

    Attributes:
        received: what Stripe says was paid. More than one amount contradicts itself: none but the order's counts.
        ended: why it will not be paid, unless it is paid all the same.
        declined: why an attempt to pay failed; another may follow.
        methods: payment methods that may be charged again without the customer.
        amount_refunded: the most that Stripe said was refunded in all.
        refunds, disputes: by their ids.
    """

    received: frozenset[Money] = frozenset()
    ended: frozenset[str] = frozenset()
    declined: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()
    amount_refunded: int = 0
    refunds: dict[str, Refund] = {}
    disputes: dict[str, Dispute] = {}

    def join(self, other: "Facts") -> "Facts":
        """All that either says. Commutative, associative, idempotent; `NOTHING` adds nothing."""
        return Facts(
            received=self.received | other.received,
            ended=self.ended | other.ended,
            declined=self.declined | other.declined,
            methods=self.methods | other.methods,
            amount_refunded=max(self.amount_refunded, other.amount_refunded),
            refunds=_joined(self.refunds, other.refunds),
            disputes=_joined(self.disputes, other.disputes),
        )

    @property
    def refunded(self) -> int:
        """Never more than was refunded in the end, and exact where every refund is known.

        Of the most that was ever refunded at a time, what is undone by now may have been a part.
        """
        undone = sum(refund.amount for refund in self.refunds.values() if refund.undone)
        good = sum(refund.amount for refund in self.refunds.values() if not refund.undone)
        return max(good, self.amount_refunded - undone)

    @property
    def refund_undone(self) -> bool:
        return any(refund.undone for refund in self.refunds.values())


NOTHING: Final = Facts()

EXPIRED: Final = "expired"
CANCELED: Final = "canceled"
QUIET: Final = frozenset({EXPIRED, CANCELED})
"""Ends of which nobody need be told: nobody tried to pay, or not any more."""


class Target(msgspec.Struct, frozen=True):
    """What has to be true, once everything that is known has had its effect.

    Attributes:
        credited: the order is paid.
        taken_minor: how much of the price has gone back to the payer, 0 <= taken_minor <= the order's price.
        touched: something was refunded or disputed at some time.
        frozen: a dispute is open.
        failed: why it will not be paid, as far as one can tell; `EXPIRED` where nobody tried to.
    """

    credited: bool
    taken_minor: int = 0
    touched: bool = False
    frozen: bool = False
    failed: str | None = None

    @property
    def at_stake(self) -> bool:
        """Whether the payer has some of the price back, or wants it back."""
        return self.frozen or self.taken_minor > 0


def target(order: Order, facts: Facts) -> Target:
    """What *order* has come to, by what is known of its payment."""
    if Money(order.price_minor, order.currency) not in facts.received:
        # Another amount was paid than was ordered: nothing follows from that by itself.
        return Target(credited=False, failed=None if facts.received else _failure(order, facts))
    disputes = facts.disputes.values()
    # How much of the price an amount in another currency is, nobody can say: all of it is at stake.
    disputed = sum(
        each.taken if each.currency == order.currency else order.price_minor for each in disputes if each.taken
    )
    return Target(
        credited=True,
        taken_minor=min(order.price_minor, facts.refunded + disputed),
        touched=bool(facts.amount_refunded or facts.refunds or facts.disputes),
        frozen=any(each.open for each in disputes),
    )


def _failure(order: Order, facts: Facts) -> str | None:
    """The same of several reasons whatever came first, and one that says more than that time ran out."""
    # With nobody there to try another card, one refusal is the end.
    reasons = facts.ended | facts.declined if order.kind == "auto" else facts.ended
    return min(reasons - QUIET, default=None) or (EXPIRED if reasons else None)


def _largest(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {**first, **{key: max(value, first.get(key, value)) for key, value in second.items()}}


Part = TypeVar("Part", Refund, Dispute)


def _joined(first: Mapping[str, Part], second: Mapping[str, Part]) -> dict[str, Part]:
    return {**first, **{key: part.join(first[key]) if key in first else part for key, part in second.items()}}
