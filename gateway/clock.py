"""The time of day as the whole system writes it. What needs it takes it as an argument, so that tests can set it."""

import time


def now_us() -> int:
    """Microseconds since the epoch, UTC."""
    return time.time_ns() // 1_000
