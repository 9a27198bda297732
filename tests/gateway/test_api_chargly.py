"""Chargly's dialect: one event, so many credits, whatever the tokens; and the caller is told how many."""

import json
from decimal import Decimal
from typing import Any

import pytest

from tests.gateway.office import Office

REPLY = {"event": "chat.reply", "customerId": "ann"}


@pytest.fixture
async def product(office: Office) -> Office:
    """A chat reply costs four credits; Ann has a hundred."""
    await office.post("/v1/billable-metrics", {"key": "chat.reply"})
    rule = {"billable_metric_key": "chat.reply", "cost_type": "flat", "credit_cost": 4000}
    await office.post("/v1/metering-rules", rule)
    await office.post("/v1/topup/grant", {"customer_id": "ann", "credits": 100_000})
    return office


async def meter(office: Office, **fields: Any) -> Any:
    answer = await office.ask("POST", "/chargly/v1/meter", {**REPLY, **fields})
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_float=Decimal)


async def test_a_chat_reply_costs_four_credits_and_says_so(product: Office):
    answer = await meter(product)
    request_id = answer.pop("id")
    assert answer == {
        "event": "chat.reply",
        "customerId": "ann",
        "creditsUsed": 4,
        "balance": 96,
        "message": "4 credits used",
    }
    receipt = await product.get(f"/v1/requests/{request_id}")
    assert receipt["charged_decimal"] == "4"
    assert await product.get("/chargly/v1/wallet?customerId=ann") == {
        "customerId": "ann",
        "balance": 96,
        "available": 96,
        "reserved": 0,
    }


async def test_an_event_can_say_itself_what_it_costs(product: Office):
    assert (await meter(product, credits=12.5))["message"] == "12.5 credits used"
    assert (await meter(product, credits=1))["message"] == "1 credit used"
    exact = await meter(product, credits=0.000000001)
    assert (exact["creditsUsed"], exact["balance"]) == (Decimal("1E-9"), Decimal("86.499999999"))
    for credits in (0, -1, 1e-10, 1e300, "many"):
        refused = await product.refused("POST", "/chargly/v1/meter", {**REPLY, "credits": credits})
        assert refused == (400, "invalid_request", "credits")


async def test_a_repeated_key_is_charged_once(product: Office):
    first = await meter(product, idempotency_key="reply-1")
    again = await product.ask("POST", "/chargly/v1/meter", REPLY, once="reply-1")
    assert (again.json(), again.headers["x-idempotent-replayed"]) == (first, "true")
    other = {**REPLY, "credits": 5}
    assert (await product.refused("POST", "/chargly/v1/meter", other, once="reply-1"))[0] == 422


async def test_what_the_wallet_cannot_pay_is_refused(product: Office):
    assert (await product.refused("POST", "/chargly/v1/meter", {**REPLY, "credits": 101}))[:2] == (
        402,
        "insufficient_credits",
    )
    assert (await meter(product, credits=100))["balance"] == 0


async def test_an_event_that_nobody_has_priced_is_not_found(product: Office):
    for credits in ({}, {"credits": 1}):
        refused = await product.refused("POST", "/chargly/v1/meter", {**REPLY, **credits, "event": "no.such"})
        assert refused[:2] == (404, "not_found")


async def test_a_wallet_that_nobody_has_is_not_found(product: Office):
    assert (await product.refused("GET", "/chargly/v1/wallet?customerId=nobody"))[:2] == (404, "not_found")
    assert (await product.refused("GET", "/chargly/v1/wallet"))[0] == 400
