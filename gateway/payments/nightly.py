"""The nightly reconciliation: what the journal missed is told again, and what differs is told to whoever runs this.

How it works. A night looks at what was moved or booked since the last night that came to an end, and at the payments
that differed then. Both are kept with the sweep. So a difference is told of until it is mended, however old it is, and
every process knows of it, whichever of them found it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import msgspec
import structlog

from gateway.payments.comparison import KINDS, Difference
from gateway.payments.processor_transactions import SECOND_US
from gateway.payments.reconciliation import Reconciler, Report
from gateway.payments.sweeps import DAY_US, Kept, Sweep, daily

LOOK_BACK_DAYS_LEAST: Final = 3
"""Longer than the processor's events are late. It also covers what was under way in the last night."""

LOOK_BACK_DAYS_MOST: Final = 35
"""How far back a night looks after a long time without one, and the first one. The command looks further."""

OVERLAP_DAYS: Final = 1
"""What the last night saw of its last day may have been under way."""

DIFFERENCES_MAX: Final = 200
"""How many are kept for the next night; each costs some requests to the processor."""

HOUR: Final = 3
LEASE_S: Final = 3_600.0

log = structlog.get_logger(__name__)


class ReconciliationCounters(Protocol):
    """What is counted of it: a part of `Metrics`."""

    def note_reconciled(self, differences: Mapping[str, int], at_s: int) -> None: ...


class LastNight(msgspec.Struct, frozen=True, kw_only=True):
    """Until when the books were compared, and where they differed then: *differences* are the first of *found*."""

    until_us: int
    found: dict[str, int]
    differences: tuple[Difference, ...]


class Nightly:
    """Reconciles what is new and what differed, once a night over all processes."""

    def __init__(self, reconciler: Reconciler, *, counters: ReconciliationCounters, now_us: Callable[[], int]) -> None:
        self._reconciler = reconciler
        self._counters = counters
        self._now_us = now_us

    @property
    def sweep(self) -> Sweep:
        return Sweep(name="reconciliation", schedule=daily(HOUR), work=self._work, look=self._look, lease_s=LEASE_S)

    async def run(self, last: LastNight | None = None) -> Report:
        """Compare, mend what can be mended, and say what is left: an error each, by ids.

        Raises:
            ProcessorUnavailable, ProcessorRefused, DatabaseUnavailable, NoOperator
        """
        now_us = self._now_us()
        again = () if last is None else last.differences
        report = await self._reconciler.run(look_back(last, now_us), now_us, repair=True, again=again)
        for difference in report.differences:
            log.error("the journal and the payment processor differ", **difference.facts)
        for difference in report.mended:
            log.warning("news of a payment had been missed", **difference.facts)
        log.info(
            "reconciled",
            movements=report.movements,
            payments=report.payments,
            differences=len(report.differences),
            mended=len(report.mended),
            in_flight=report.in_flight,
        )
        return report

    async def _work(self, kept: Kept) -> Kept:
        report = await self.run(msgspec.convert(kept, LastNight) if kept else None)
        found = Counter[str](difference.kind for difference in report.differences)
        differences = report.differences[:DIFFERENCES_MAX]
        night = LastNight(until_us=report.until_us, found={**found}, differences=differences)
        told: Kept = msgspec.to_builtins(night)
        return told

    def _look(self, kept: Kept) -> None:
        """Let this process tell what the last night found, whoever did it."""
        if kept:
            last = msgspec.convert(kept, LastNight)
            found = {str(kind): last.found.get(kind, 0) for kind in KINDS}
            self._counters.note_reconciled(found, last.until_us // SECOND_US)


def look_back(last: LastNight | None, now_us: int) -> int:
    """Since when a night looks: since the *last* one, within bounds."""
    earliest_us = now_us - LOOK_BACK_DAYS_MOST * DAY_US
    if last is None:
        return earliest_us
    return max(earliest_us, min(now_us - LOOK_BACK_DAYS_LEAST * DAY_US, last.until_us - OVERLAP_DAYS * DAY_US))
