"""What must hold of the books after whatever happened, told by witnesses that are not the gateway.

They are the clients, the upstream's log and the tables.
"""

import asyncio
from collections.abc import Collection, Iterable
from typing import Final

import aiohttp

from tests.e2e.books import Booked, Books
from tests.e2e.farebox import UNITS_OF_INPUT, UNITS_OF_OUTPUT, Farebox, Gateway, Upstream
from tests.e2e.load import Seen, session, units

PAID_IN_FULL: Final = {("finished",), ("died", "finished")}
"""The sweeper may have settled a request before its own commit came, which then charges what is missing."""

RECEIPTS_AT_ONCE: Final = 32


def assert_charged_once(seen: Seen, booked: Booked) -> None:
    """What was paid is what the answer says, and what its tokens cost; the sweeper may have taken more before.

    What it took more than an answer said that was given without the ledger, it has given back.
    """
    assert booked.state == "committed", (seen, booked)
    assert booked.endings in PAID_IN_FULL, (seen, booked)
    assert booked.charged == booked.recorded, (seen, booked)
    paid = booked.charged - booked.refunded
    usage = seen.usage
    if usage is None:
        assert booked.refunded == 0 or booked.endings != ("finished",), (seen, booked)
        return
    assert paid == units(usage["cost"]), (seen, booked)
    cost = usage["prompt_tokens"] * UNITS_OF_INPUT + usage["completion_tokens"] * UNITS_OF_OUTPUT
    if booked.endings == ("finished",):
        assert booked.charged == cost, (seen, booked)
        assert booked.refunded == 0, (seen, booked)
    elif booked.refunded:
        assert paid == cost, (seen, booked)
    else:
        assert paid >= cost, (seen, booked)


def assert_each_paid_once(books: Books, upstream: Upstream, seen: Iterable[Seen]) -> int:
    """Every answer that a client saw whole is charged once, and no work is free; how many answers there were.

    The requests are of the model "meter". One that was not answered, or refused with a 5xx, may have been charged for
    the work that was done, and never more than once.
    """
    booked = books.requests()
    whole = 0
    for each in seen:
        if each.complete and each.status == 200:
            assert each.request_id in booked, f"an answer without a reservation: {each}"
            assert_charged_once(each, booked[each.request_id])
            whole += 1
        elif each.request_id in booked:
            entry = booked[each.request_id]
            assert entry.charged == entry.recorded, (each, entry)
            assert len(entry.endings) <= 2, (each, entry)
    for request_id in upstream.received & booked.keys():
        entry = booked[request_id]
        assert entry.charged > entry.refunded, f"{request_id} reached the upstream for free: {entry}"
    unknown = upstream.received - booked.keys()
    assert not unknown, f"the upstream was asked without a reservation: {unknown}"
    return whole


def assert_nothing_made_or_lost(books: Books, *, given: dict[str, int]) -> None:
    """Of what each customer was *given*, by external id, all that is missing was charged for a request.

    For an installation whose customers alone pay, and whose credits do not expire.
    """
    wallets = books.wallets()
    for name, totals in wallets.items():
        assert totals.journalled == totals.remaining - totals.receivable, (name, totals)
        assert totals.reserved == 0, (name, totals)
    spent = sum(units_ - books.remaining(user) for user, units_ in given.items())
    charged = sum(entry.charged - entry.refunded for entry in books.requests().values())
    assert spent == charged, f"{spent} left the wallets, and {charged} was charged"
    assert min(books.lowest_balances().values()) == 0, "no wallet was ever below zero, entry by entry"


async def assert_receipts(
    farebox: Farebox, gateway: Gateway, seen: Collection[Seen], booked: dict[str, Booked]
) -> None:
    """The receipt of each whole answer says what the books say."""
    turns = asyncio.Semaphore(RECEIPTS_AT_ONCE)

    async def look(client: aiohttp.ClientSession, each: Seen) -> None:
        url = f"{gateway.base_url}/requests/{each.request_id}"
        async with turns, client.get(url, headers={"Authorization": f"Bearer {farebox.live_key}"}) as answer:
            assert answer.status == 200, await answer.text()
            receipt = await answer.json()
        assert receipt["status"] == ("charged" if each.status == 200 else "released")
        assert units(receipt["charged_decimal"]) == booked[each.request_id or ""].charged

    async with session() as client:
        await asyncio.gather(*(look(client, each) for each in seen))
