"""A lock between processes that lets them in one after the other.

SQLite's own busy handler sleeps and tries again: under load a process can starve behind one that takes the lock back at
once. ``flock`` queues the waiters in the kernel, and the turnstile before it keeps who just left from overtaking who
waits: to leave the turnstile one must hold the lock. A process that dies lets go of both.
"""

import fcntl
import os
from types import TracebackType


class TurnLock:
    """Not to be entered twice by the same owner. Files are made beside the database and stay there, empty."""

    def __init__(self, path: str) -> None:
        self._turnstile = os.open(f"{path}-turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._turnstile)
        os.close(self._lock)
