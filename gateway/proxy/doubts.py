"""Reservations of which nobody can tell whether they were made, and for which nothing was forwarded: to be given back.

That the ledger knows of none does not say that it never will: its transaction may still be waiting for a standby, on a
connection that is gone. So it is asked again, ever more seldom, for longer than such a reservation lives. They are on
no disk: if this process dies first, each is settled for its mark.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ledger.commands import Release
from ledger.model import ReservationRef

DOUBTS_MAX: Final = 10_000
"""Most that are remembered."""

DOUBT_S: Final = 300.0
"""How long the ledger is asked for one that it does not know."""

PAUSE_S: Final = 1.0
"""The pause before it is asked for the second time; each one after that is twice as long."""

ASKED_AT_ONCE: Final = 128
"""Doubts that the ledger is asked for together."""


class Asked(Enum):
    """What the ledger said."""

    SETTLED = "settled"
    UNKNOWN = "unknown"
    AWAY = "away"


@dataclass(slots=True)
class _Doubt:
    release: Release
    due_s: float
    until_s: float
    pause_s: float = PAUSE_S


class Doubts:
    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._doubts: dict[ReservationRef, _Doubt] = {}

    def __len__(self) -> int:
        return len(self._doubts)

    def add(self, release: Release) -> None:
        """Have the reservation given back, from now on."""
        ref = release.reservation
        if ref in self._doubts or len(self._doubts) < DOUBTS_MAX:
            now_s = self._monotonic_s()
            self._doubts[ref] = _Doubt(release, due_s=now_s, until_s=now_s + DOUBT_S)

    async def settle(self, ask: Callable[[Release], Awaitable[Asked]]) -> None:
        """Ask for all that are due; a page for which the ledger is away ends the round."""
        now_s = self._monotonic_s()
        due = [doubt for doubt in self._doubts.values() if doubt.due_s <= now_s]
        for start in range(0, len(due), ASKED_AT_ONCE):
            page = due[start : start + ASKED_AT_ONCE]
            said = await asyncio.gather(*(ask(doubt.release) for doubt in page))
            for doubt, answer in zip(page, said, strict=True):
                self._note(doubt, answer, now_s)
            if set(said) == {Asked.AWAY}:
                break

    def _note(self, doubt: _Doubt, answer: Asked, now_s: float) -> None:
        if answer is Asked.AWAY:
            return
        doubt.due_s = now_s + doubt.pause_s
        doubt.pause_s *= 2
        ref = doubt.release.reservation
        over = answer is Asked.SETTLED or doubt.due_s > doubt.until_s
        if over and self._doubts.get(ref) is doubt:  # Else it was added anew meanwhile.
            del self._doubts[ref]
