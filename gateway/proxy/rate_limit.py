"""How many requests a key may make in a minute, as a moving window: no burst at the turn of the minute.

`RateLimit` is the seam: `ProcessRateLimit` counts in this process, and `gateway.shared.rate_limit` counts for all. The
in-process one is ours because the one of the library `limits` starts a task and a thread for each request: 75 us of
CPU, where the whole journey may cost 150.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from gateway.lru import LRU

WINDOW_S: Final = 60.0
KEYS_MAX: Final = 10_000
"""How many keys are counted at a time. A key that was pushed out starts anew."""


class Decision(NamedTuple):
    """Whether a request may go on, and what the response's headers say.

    `reset_s` is when the oldest counted request leaves the window; `retry_after_s` is 0 for an allowed request, else
    the whole seconds after which the next one will be allowed. Both are rounded up.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_s: int
    retry_after_s: int

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What a response says about the limit; nothing where there is none."""
        if not self.limit:
            return []
        return [
            (b"x-ratelimit-limit", b"%d" % self.limit),
            (b"x-ratelimit-remaining", b"%d" % self.remaining),
            (b"x-ratelimit-reset", b"%d" % self.reset_s),
        ]


UNLIMITED: Final = Decision(allowed=True, limit=0, remaining=0, reset_s=0, retry_after_s=0)


class RateLimit(Protocol):
    async def check(self, key_id: str, limit_per_minute: int) -> Decision:
        """Count a request of *key_id*, unless it is one too many: a refused request is not counted. 0 is no limit."""
        ...

    def check_at_once(self, key_id: str, limit_per_minute: int) -> Decision | None:
        """The same without waiting; None, and nothing is counted, where others have a say."""
        ...


class MovingWindow:
    """When the requests of one key were admitted, oldest first."""

    __slots__ = ("admitted_at_s",)

    def __init__(self) -> None:
        self.admitted_at_s: deque[float] = deque()

    def forget(self, now_s: float) -> None:
        """Let go of what has left the window."""
        while self.admitted_at_s and self.admitted_at_s[0] + WINDOW_S <= now_s:
            self.admitted_at_s.popleft()

    def admits(self, limit: int) -> bool:
        return len(self.admitted_at_s) < limit

    def decision(self, allowed: bool, limit: int, now_s: float) -> Decision:
        """What to say about a request that was counted in, or refused."""
        window = self.admitted_at_s
        # After a limit was lowered, more than one request must leave before the next may come.
        retry_after_s = 0 if allowed else math.ceil(window[len(window) - limit] + WINDOW_S - now_s)
        return Decision(
            allowed=allowed,
            limit=limit,
            remaining=max(0, limit - len(window)),
            reset_s=math.ceil(window[0] + WINDOW_S - now_s),
            retry_after_s=retry_after_s,
        )


class ProcessRateLimit:
    """Counts in this process. About 2 us a request."""

    def __init__(self, *, monotonic_s: Callable[[], float] = time.monotonic, keys_max: int = KEYS_MAX) -> None:
        self._monotonic_s = monotonic_s
        self._windows: LRU[str, MovingWindow] = LRU(keys_max)

    async def check(self, key_id: str, limit_per_minute: int) -> Decision:
        return self.check_at_once(key_id, limit_per_minute)

    def check_at_once(self, key_id: str, limit_per_minute: int) -> Decision:
        if limit_per_minute <= 0:
            return UNLIMITED
        now_s = self._monotonic_s()
        window = self._windows.get(key_id)
        if window is None:
            window = MovingWindow()
            self._windows.put(key_id, window)
        window.forget(now_s)
        allowed = window.admits(limit_per_minute)
        if allowed:
            window.admitted_at_s.append(now_s)
        return window.decision(allowed, limit_per_minute, now_s)
