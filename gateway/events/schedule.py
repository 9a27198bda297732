"""When a delivery is attempted again, and what becomes of those behind it. Pure.

How it works. Ten attempts over about three days, with the pauses of `DELAYS_S`, each up to a fifth shorter or longer so
that what failed together does not come back together. A `pending` delivery holds up its customer's later ones at that
endpoint. Once its next attempt lies more than an hour after its first one was due, it is `parked`: they go on, and it
is attempted beside them to the end of its schedule. Then it has `failed`, until somebody asks for it again.

Source: the retry schedule that Standard Webhooks recommends.
"""

from typing import Final, NamedTuple

SECOND_US: Final = 1_000_000
MINUTE_S: Final = 60
HOUR_S: Final = 60 * MINUTE_S

DELAYS_S: Final = (
    5,
    5 * MINUTE_S,
    30 * MINUTE_S,
    2 * HOUR_S,
    5 * HOUR_S,
    10 * HOUR_S,
    14 * HOUR_S,
    20 * HOUR_S,
    24 * HOUR_S,
)
ATTEMPTS_MAX: Final = len(DELAYS_S) + 1

JITTER_PERCENT: Final = 20

HOLDS_UP_S: Final = HOUR_S
"""How long a delivery that fails may hold up those behind it."""

PENDING: Final = "pending"
PARKED: Final = "parked"
DELIVERED: Final = "delivered"
FAILED: Final = "failed"


class Next(NamedTuple):
    """*at_us* is None where no attempt follows."""

    state: str
    at_us: int | None


def after_failure(*, state: str, attempts: int, started_at_us: int, now_us: int, jitter: int) -> Next:
    """What follows an attempt that failed.

    Args:
        state: `pending` or `parked`.
        attempts: made so far, this one too.
        started_at_us: when the first one was due.
        jitter: random, from -`JITTER_PERCENT` to `JITTER_PERCENT`.
    """
    if attempts >= ATTEMPTS_MAX:
        return Next(FAILED, None)
    at_us = now_us + DELAYS_S[attempts - 1] * SECOND_US * (100 + jitter) // 100
    if state == PENDING and at_us > started_at_us + HOLDS_UP_S * SECOND_US:
        return Next(PARKED, at_us)
    return Next(state, at_us)
