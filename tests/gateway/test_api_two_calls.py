"""A plan in two calls, as the chat app's walk-through buys it: a usage event is the price, a grant brings the credits.

Through a metric like any other the plan's own credits, of priority 10, would pay for the next plan. The metric of a
plan's price says `priority_max`, and nothing else of the walk-through changes.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.gateway.office import Office

HOUR = timedelta(hours=1)


async def set_up(office: Office) -> str:
    """The walk-through's metrics and rules, and a customer with a wallet of 500 credits."""
    metrics: list[dict[str, Any]] = [
        {"key": "chat_message", "name": "Chat Message"},
        {"key": "plan_purchase_1hr", "name": "1-Hour Plan Purchase", "priority_max": 0},
    ]
    for metric in metrics:
        await office.post("/v1/billable-metrics", metric)
        rule = {"billable_metric_key": metric["key"], "cost_type": "per_unit", "credit_cost": 1000, "unit_cost": 1000}
        await office.post("/v1/metering-rules", rule)
    customer = await office.post("/v1/customers", {"external_id": "user_12345"}, once="signup:user_12345")
    grant = {"customer_id": customer["id"], "credits": 500_000, "metadata": {"source": "wallet_recharge"}}
    await office.post("/v1/topup/grant", grant, once="topup:pay_abc123")
    return str(customer["id"])


async def use(office: Office, customer: str, metric: str, units: int, *, once: str) -> int:
    body = {"customer_id": customer, "billable_metric_key": metric, "units": units}
    return (await office.ask("POST", "/v1/usage", body, once=once)).status_code


async def buy(office: Office, customer: str, purchase_id: str) -> int:
    """Both calls, under keys of one purchase; what the first one came to."""
    status = await use(office, customer, "plan_purchase_1hr", 100, once=f"usage:plan-buy-{purchase_id}")
    if status == 202:
        view = await office.get(f"/v1/customers/{customer}/credits?include_blocks=true")
        plans = [block for block in view["blocks"] if block["priority"] == 10 and block["expires_at"]]
        latest = max((datetime.fromisoformat(block["expires_at"]) for block in plans), default=datetime.now(UTC))
        body = {
            "customer_id": customer,
            "credits": 200_000,
            "expires_at": (latest + HOUR).isoformat(),
            "metadata": {"source": "plan_1hr", "companion_id": "companion_42", "priority": 10},
        }
        await office.post("/v1/topup/grant", body, once=f"topup:plan-grant-{purchase_id}")
    return status


async def sums(office: Office, customer: str) -> tuple[int, int]:
    """What is left in the wallet, and of plans."""
    view = await office.get(f"/v1/customers/{customer}/credits?include_blocks=true")
    wallet = sum(block["remaining_amount"] for block in view["blocks"] if block["source"] == "wallet_recharge")
    plans = sum(block["remaining_amount"] for block in view["blocks"] if block["priority"] == 10)
    return wallet, plans


async def test_plans_do_not_pay_for_plans(office: Office):
    customer = await set_up(office)
    assert await buy(office, customer, "1") == 202
    assert await sums(office, customer) == (400_000, 200_000)
    assert await buy(office, customer, "2") == 202
    assert await sums(office, customer) == (300_000, 400_000), "the wallet paid, not the first plan"
    assert await use(office, customer, "chat_message", 3, once="usage:msg-1") == 202
    assert await sums(office, customer) == (300_000, 397_000), "messages are what plans are for"
    for number in range(3, 6):
        assert await buy(office, customer, str(number)) == 202
    assert await buy(office, customer, "6") == 402, "the wallet is empty, whatever the plans have"
    assert await sums(office, customer) == (0, 997_000)


async def test_a_purchase_whose_second_call_was_lost_is_repeated_with_its_keys(office: Office):
    customer = await set_up(office)
    assert await use(office, customer, "plan_purchase_1hr", 100, once="usage:plan-buy-1") == 202
    assert await sums(office, customer) == (400_000, 0)
    assert await buy(office, customer, "1") == 202
    assert await buy(office, customer, "2") == 202
    assert await sums(office, customer) == (300_000, 400_000)


@pytest.mark.sqlite
async def test_a_metric_that_says_nothing_is_paid_by_plans_too(office: Office):
    """What the field is for: without it the first plan would pay for the second."""
    customer = await set_up(office)
    assert (await office.ask("PATCH", "/v1/billable-metrics/plan_purchase_1hr", {"priority_max": None})).is_success
    office.clock.pass_s(2)
    assert await buy(office, customer, "1") == 202
    assert await buy(office, customer, "2") == 202
    assert await sums(office, customer) == (400_000, 300_000)
