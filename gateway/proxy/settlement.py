"""What is charged for a request: a table from how it ended, and what usage is known, to a charge or a release.

The table is the whole truth. Every combination meets exactly one of its rows; each row has a line in the tests.
"""

from enum import StrEnum
from typing import Final, Literal

import msgspec

from pricing.usage import Usage


class Ending(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    """`[DONE]` came, or the whole body."""
    REFUSED = "refused"
    """An error status or no answer at all, before the first byte of one."""
    BROKEN = "broken"
    """The upstream cut or stalled after its answer had begun, or sent what cannot be read."""
    CLIENT_LEFT = "client_left"
    DRY = "dry"
    """We stopped it: the wallet affords no more."""
    DIED = "died"
    """Our process did; the sweeper settles from the last durable mark."""


class UsageSource(StrEnum):
    """Where the usage of a charge comes from."""

    PROVIDER = "provider"
    COUNTED = "counted"
    PARTIAL = "partial"


class Action(StrEnum):
    """What the ledger is told."""

    CHARGE = "charge"
    RELEASE = "release"


class Settlement(msgspec.Struct, frozen=True):
    """What to do with a reservation.

    Attributes:
        usage: what to charge for; nothing if it is released.
        source: None if it is released.
    """

    action: Action
    usage: Usage
    source: UsageSource | None


class Row(msgspec.Struct, frozen=True):
    """One row of the table. A condition that is None does not matter.

    Attributes:
        reported: the provider's usage is known.
        delivered: the client got something of the answer.
        charged: which usage is charged; None releases.
    """

    ending: Ending
    reported: bool | None
    delivered: bool | None
    charged: Literal["reported", "counted"] | None
    source: UsageSource | None


TABLE: Final = (
    Row(Ending.FINISHED, True, None, "reported", UsageSource.PROVIDER),
    Row(Ending.FINISHED, False, None, "counted", UsageSource.COUNTED),
    Row(Ending.REFUSED, None, None, None, None),
    # Of a body that broke off before anything of it went to the client, the client gets an error and may try again.
    Row(Ending.BROKEN, None, False, None, None),
    Row(Ending.BROKEN, True, True, "reported", UsageSource.PARTIAL),
    Row(Ending.BROKEN, False, True, "counted", UsageSource.PARTIAL),
    # Whether or not a byte reached it: if leaving early were free, everybody would leave early.
    Row(Ending.CLIENT_LEFT, True, None, "reported", UsageSource.PROVIDER),
    Row(Ending.CLIENT_LEFT, False, None, "counted", UsageSource.PARTIAL),
    # What the upstream reports may include what was not delivered because nothing covered it.
    Row(Ending.DRY, None, None, "counted", UsageSource.COUNTED),
    Row(Ending.DIED, None, None, "counted", UsageSource.PARTIAL),
)


def settle(*, ending: Ending, reported: Usage | None, counted: Usage, delivered: bool) -> Settlement:
    """Look the ending up in the table.

    Args:
        reported: the provider's usage, if it covers all that came; a report that content came after is not one. A
            reported zero is a zero.
        counted: our own: the prompt and what was delivered; after a crash, the last durable mark.
        delivered: at least one byte of the answer's body went to the client.
    """
    conditions = (reported is not None, delivered)
    for row in TABLE:
        if row.ending is ending and all(
            wanted is None or wanted is actual
            for wanted, actual in zip((row.reported, row.delivered), conditions, strict=True)
        ):
            break
    else:
        raise AssertionError(f"no row for {ending}, {conditions}")
    if row.charged is None:
        return Settlement(Action.RELEASE, Usage(), None)
    usage = reported if row.charged == "reported" else counted
    assert usage is not None
    return Settlement(Action.CHARGE, usage, row.source)
