"""A budget admits exactly what it affords, however many ask at once, of however many processes."""

from collections import Counter
from typing import Any, Final

import pytest

from tests.e2e.conftest import Install
from tests.e2e.farebox import Farebox, Gateway
from tests.e2e.fleet import Fleets
from tests.e2e.load import chat
from tests.e2e.test_overspend import PRICE, REFUSE, REQUESTS, SERVED, TOKENS, all_at_once

BUDGET_MILLICREDITS: Final = 2_668
"""SERVED times the price, and half of it again: it is not the wallet that is short."""

FUNDS_MILLICREDITS: Final = 100_000


@pytest.fixture(params=["sqlite", "postgresql"])
def served(request: pytest.FixtureRequest, install: Install) -> tuple[Farebox, list[Gateway]]:
    """Two processes: workers of one host on SQLite, two hosts on PostgreSQL."""
    if request.param == "sqlite":
        farebox = install()
        return farebox, [farebox.serve("--workers", "2")]
    fleets: Fleets = request.getfixturevalue("fleets")
    farebox = install(database_url=fleets.servers.postgres.create_database())
    return farebox, [farebox.serve(), farebox.serve()]


async def test_exactly_those_are_served_whom_the_budget_affords(served: tuple[Farebox, list[Gateway]]) -> None:
    """The first of the requests opens the period, whichever of the processes it comes to."""
    farebox, gateways = served
    farebox.top_up(gateways[0], "alice", millicredits=FUNDS_MILLICREDITS)
    made = budget(farebox, gateways[0], {"type": "customer", "id": "alice"})
    budget(farebox, gateways[0], {"type": "app"}, credits=FUNDS_MILLICREDITS)
    body = chat("output-only", simulate={"tokens": TOKENS + 1, "first_byte_delay_ms": 300}, max_tokens=TOKENS)
    seen = await all_at_once(farebox, gateways, "alice", [body] * REQUESTS, [REFUSE] * REQUESTS)

    assert Counter(each.status for each in seen) == {200: SERVED, 402: REQUESTS - SERVED}
    assert all(each.complete for each in seen)
    for each in seen:
        if each.status == 402:
            error = each.json["error"]
            assert (error["code"], error["budget"], error["needed_decimal"]) == ("budget_exceeded", made["id"], PRICE)
            assert error["resets_at"] == made["period"]["ends_at"]
        else:
            assert each.headers["x-quota-cost"] == PRICE
    after = gateways[0].get(f"/budgets/{made['id']}", farebox.live_key).json()
    assert (after["spent"], after["remaining_decimal"], after["reserved"]) == (2_664, "0.004", 0)
    assert farebox.books.open_requests() == set()
    assert farebox.books.reserved() == 0
    farebox.verify()


def budget(
    farebox: Farebox, gateway: Gateway, subject: dict[str, str], credits: int = BUDGET_MILLICREDITS
) -> dict[str, Any]:
    period = {"every": "month", "anchor_day": 31, "time_zone": "Europe/Berlin"}
    body = {"subject": subject, "credits": credits, "period": period, "thresholds": [80, 100]}
    answer = gateway.post("/budgets", farebox.live_key, body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made
