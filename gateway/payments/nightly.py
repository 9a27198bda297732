"""The nightly reconciliation: what the journal missed is told again, and what differs is told to whoever runs this."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import structlog

from gateway.payments.comparison import KINDS
from gateway.payments.processor_transactions import SECOND_US
from gateway.payments.reconciliation import Reconciler, Report
from gateway.payments.sweeps import DAY_US, Sweep, daily

LOOK_BACK_DAYS: Final = 3
"""Longer than the processor's events are late, and than a gateway is down over a weekend."""

HOUR: Final = 3
LEASE_S: Final = 3_600.0

log = structlog.get_logger(__name__)


class ReconciliationCounters(Protocol):
    """What is counted of it: a part of `Metrics`."""

    def note_reconciled(self, differences: Mapping[str, int], at_s: int) -> None: ...


class Nightly:
    """Reconciles the last days, once a night over all processes."""

    def __init__(self, reconciler: Reconciler, *, counters: ReconciliationCounters, now_us: Callable[[], int]) -> None:
        self._reconciler = reconciler
        self._counters = counters
        self._now_us = now_us

    @property
    def sweep(self) -> Sweep:
        return Sweep(name="reconciliation", schedule=daily(HOUR), work=self.run, lease_s=LEASE_S)

    async def run(self) -> Report:
        """Compare, mend what can be mended, and say what is left: an error each, by ids.

        Raises:
            ProcessorUnavailable, ProcessorRefused, DatabaseUnavailable, NoOperator
        """
        now_us = self._now_us()
        report = await self._reconciler.run(now_us - LOOK_BACK_DAYS * DAY_US, now_us, repair=True)
        for difference in report.differences:
            log.error("the journal and the payment processor differ", **difference.facts)
        for difference in report.mended:
            log.warning("news of a payment had been missed", **difference.facts)
        found = Counter(difference.kind for difference in report.differences)
        self._counters.note_reconciled({kind: found[kind] for kind in KINDS}, now_us // SECOND_US)
        log.info(
            "reconciled",
            movements=report.movements,
            payments=report.payments,
            differences=len(report.differences),
            mended=len(report.mended),
            in_flight=report.in_flight,
        )
        return report
