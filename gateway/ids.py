"""Ids of everything that we name: a prefix that says what it is, then 26 characters that sort by time.

How it works: 48 bits of milliseconds and 80 random bits, in Crockford's base 32 (lower case), which sorts as the number
does. Within one millisecond, or when the clock steps back, the next id is the last one plus a random step, so ids of
one source rise strictly; the step is random so that a forked process goes another way. About 1.5 us an id.

Source: ULID (https://github.com/ulid/spec), TypeID for the prefix.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from typing import Final

PREFIXES: Final = frozenset(
    {"app", "blk", "bud", "cus", "evt", "key", "mtr", "ord", "pck", "req", "rsv", "rul", "sub", "ten", "wal", "whk"}
)
"""What our ids begin with, and therefore no tenant's external id may."""

ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
BODY_LENGTH: Final = 26
TIME_BITS: Final = 48
RANDOM_BITS: Final = 80
STEP_BITS: Final = 40

_PAIRS: Final = tuple(high + low for high in ALPHABET for low in ALPHABET)
_RESERVED: Final = tuple(f"{prefix}_" for prefix in sorted(PREFIXES))


def reserved_prefix(external_id: str) -> bool:
    """Whether *external_id* could be taken for one of our own ids."""
    return external_id.startswith(_RESERVED)


class IdSource:
    """Makes ids that rise strictly within this source, also from several threads.

    Args:
        clock_ns: nanoseconds since the epoch.
        entropy: as many random bytes as asked for.
    """

    __slots__ = ("_clock_ns", "_entropy", "_last", "_lock")

    def __init__(
        self, clock_ns: Callable[[], int] = time.time_ns, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._clock_ns = clock_ns
        self._entropy = entropy
        self._last = 0
        self._lock = threading.Lock()

    def new(self, prefix: str) -> str:
        """A new id, `cus_01j…` for the prefix `cus`."""
        milliseconds = self._clock_ns() // 1_000_000
        random = int.from_bytes(self._entropy(RANDOM_BITS // 8), "big")
        value = milliseconds << RANDOM_BITS | random
        with self._lock:
            last = self._last
            if value >> RANDOM_BITS <= last >> RANDOM_BITS:
                value = last + 1 + (random & (1 << STEP_BITS) - 1)
            self._last = value
        return f"{prefix}_{encode(value)}"


def derived_id(prefix: str, *names: str) -> str:
    """The id that these names always have. It lies somewhere in time."""
    digest = hashlib.sha256("\x00".join(names).encode()).digest()
    return f"{prefix}_{encode(int.from_bytes(digest[:16], 'big'))}"


def encode(value: int) -> str:
    """128 bits as 26 characters; the first one bears three bits."""
    pairs = _PAIRS
    return (
        pairs[value >> 120 & 1023]
        + pairs[value >> 110 & 1023]
        + pairs[value >> 100 & 1023]
        + pairs[value >> 90 & 1023]
        + pairs[value >> 80 & 1023]
        + pairs[value >> 70 & 1023]
        + pairs[value >> 60 & 1023]
        + pairs[value >> 50 & 1023]
        + pairs[value >> 40 & 1023]
        + pairs[value >> 30 & 1023]
        + pairs[value >> 20 & 1023]
        + pairs[value >> 10 & 1023]
        + pairs[value & 1023]
    )


# One source for the process, as `random` has one hidden generator: ids only rise strictly if all come from one place.
new_id = IdSource().new
