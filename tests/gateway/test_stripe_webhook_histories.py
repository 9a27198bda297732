"""Histories of payments, told in any order, late and again, over real stores and through the real route."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.clock import now_us
from gateway.stores import open_store
from ledger.verify import verify
from tests.conftest import Campaign
from tests.gateway.payment_histories import CREDITED, LENGTH_MAX, PRICE, History, Payment, Told, deliveries, histories
from tests.gateway.till import Sale, Till, open_till

SPENT = 250_000_000


@pytest.fixture
async def till(tmp_path: Path) -> AsyncIterator[Till]:
    async with open_till(tmp_path) as opened:
        yield opened


async def test_sampled_histories_end_as_they_happened(till: Till, campaign: Campaign):
    """The longest, which contain the others; the customer spends whenever they can."""
    rng = campaign.random()
    longest = [each for each in histories() if len(each[0]) >= LENGTH_MAX - 1]
    for _ in range(campaign.rounds(short=12, long=400)):
        history, end = rng.choice(longest)
        sale = await till.sale()
        spent = await told_in_any_order(sale, history, rng)
        await check(sale, end, spent, context=history)
    store = await open_store(till.gateway.services.settings.database_url, clock=now_us)
    try:
        assert (await verify(store, operator=till.office.tenant)).violations == ()
    finally:
        await store.close()


async def told_in_any_order(sale: Sale, history: History, rng: random.Random) -> int:
    """Tell of it in one of the orders that there are; what the customer spent meanwhile."""
    events = Told(sale.till.stripe, sale.session).all(history)
    spent = 0
    for each in rng.choice(deliveries(len(events))):
        await sale.till.deliver(events[each])
        if rng.random() < 0.5:
            spent += await sale.spend(SPENT)
    return spent


async def check(sale: Sale, end: Payment, spent: int, *, context: object) -> None:
    """The wallet and the order are as the plain model says that they are."""
    left = CREDITED - CREDITED * end.taken // PRICE if end.credited else 0
    view, now = await sale.wallet(), await sale.now()
    assert now.status == ("paid" if end.credited else "failed" if end.failed else "open"), context
    if not end.credited:
        assert view is None or view.balance == 0, context
        return
    assert view is not None
    assert (view.balance, view.receivable) == (left - spent, max(0, spent - left)), context
    assert view.effective_balance == (0 if end.frozen else max(0, left - spent)), context
