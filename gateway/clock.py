"""The time of day as the whole system counts and writes it. Who needs it takes it as an argument, for tests to set."""

import time
from datetime import UTC, datetime, timedelta
from typing import Final

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)


def now_us() -> int:
    """Microseconds since the epoch, UTC."""
    return time.time_ns() // 1_000


def time_text(at_us: int) -> str:
    """RFC 3339 in UTC, exact to the microsecond."""
    return (EPOCH + at_us * MICROSECOND).isoformat().replace("+00:00", "Z")


def time_text_or_none(at_us: int | None) -> str | None:
    return None if at_us is None else time_text(at_us)
