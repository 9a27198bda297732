"""The settlement table: what is charged for each way in which a request can end."""

import itertools

import pytest

from gateway.proxy.settlement import TABLE, Action, Ending, Settlement, UsageSource, settle
from pricing.usage import Usage

REPORTED = Usage(input=10, cached_input=5, output=7, reasoning=3)
COUNTED = Usage(input=16, output=6)

RELEASED = Settlement(Action.RELEASE, Usage(), None)


def charged(usage: Usage, source: UsageSource) -> Settlement:
    return Settlement(Action.CHARGE, usage, source)


ROWS = [
    # ending, usage reported?, anything delivered? -> what is charged
    (Ending.FINISHED, True, True, charged(REPORTED, UsageSource.PROVIDER)),
    (Ending.FINISHED, True, False, charged(REPORTED, UsageSource.PROVIDER)),
    (Ending.FINISHED, False, True, charged(COUNTED, UsageSource.COUNTED)),
    (Ending.FINISHED, False, False, charged(COUNTED, UsageSource.COUNTED)),
    (Ending.REFUSED, True, True, RELEASED),
    (Ending.REFUSED, True, False, RELEASED),
    (Ending.REFUSED, False, True, RELEASED),
    (Ending.REFUSED, False, False, RELEASED),
    (Ending.BROKEN, True, True, charged(REPORTED, UsageSource.PARTIAL)),
    (Ending.BROKEN, False, True, charged(COUNTED, UsageSource.PARTIAL)),
    (Ending.BROKEN, True, False, RELEASED),
    (Ending.BROKEN, False, False, RELEASED),
    (Ending.CLIENT_LEFT, True, True, charged(REPORTED, UsageSource.PROVIDER)),
    (Ending.CLIENT_LEFT, True, False, charged(REPORTED, UsageSource.PROVIDER)),
    (Ending.CLIENT_LEFT, False, True, charged(COUNTED, UsageSource.PARTIAL)),
    (Ending.CLIENT_LEFT, False, False, charged(COUNTED, UsageSource.PARTIAL)),
    (Ending.DRY, True, True, charged(COUNTED, UsageSource.COUNTED)),
    (Ending.DRY, True, False, charged(COUNTED, UsageSource.COUNTED)),
    (Ending.DRY, False, True, charged(COUNTED, UsageSource.COUNTED)),
    (Ending.DRY, False, False, charged(COUNTED, UsageSource.COUNTED)),
    (Ending.DIED, True, True, charged(COUNTED, UsageSource.PARTIAL)),
    (Ending.DIED, True, False, charged(COUNTED, UsageSource.PARTIAL)),
    (Ending.DIED, False, True, charged(COUNTED, UsageSource.PARTIAL)),
    (Ending.DIED, False, False, charged(COUNTED, UsageSource.PARTIAL)),
]


@pytest.mark.parametrize(("ending", "reported", "delivered", "settlement"), ROWS)
def test_row(ending: Ending, reported: bool, delivered: bool, settlement: Settlement) -> None:
    usage = REPORTED if reported else None
    assert settle(ending=ending, reported=usage, counted=COUNTED, delivered=delivered) == settlement


def test_a_reported_zero_is_a_zero() -> None:
    settlement = settle(ending=Ending.FINISHED, reported=Usage(), counted=COUNTED, delivered=True)
    assert settlement == charged(Usage(), UsageSource.PROVIDER)


def test_every_combination_meets_exactly_one_row() -> None:
    for ending, reported, delivered in itertools.product(Ending, (True, False), (True, False)):
        rows = [
            row
            for row in TABLE
            if row.ending is ending and row.reported in (None, reported) and row.delivered in (None, delivered)
        ]
        assert len(rows) == 1, (ending, reported, delivered)
    assert len({row[:3] for row in ROWS}) == len(Ending) * 4
