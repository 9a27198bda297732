"""The chat app's walk-through, request by request: wallet, free credits, plans in two calls, messages, stacking, the
expiry's webhook, auto-buy. The bodies are the walk-through's own, but for times, which have to lie in the future."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from examples import chat_app
from tests.e2e.conftest import FreshStore, Install
from tests.e2e.farebox import ROOT, Farebox, Gateway, until
from tests.e2e.transcript import Transcript

HOUR = timedelta(hours=1)
TOLD_S = 60.0

METRICS = """
POST /v1/billable-metrics
{ "key": "chat_message", "name": "Chat Message" }
-> 201 {"key": "chat_message", "name": "Chat Message"}

POST /v1/billable-metrics
{ "key": "plan_purchase_1hr", "name": "1-Hour Plan Purchase" }
-> 201

POST /v1/billable-metrics
{ "key": "plan_purchase_weekly", "name": "Weekly Plan Purchase" }
-> 201

POST /v1/metering-rules
{
"billable_metric_key": "chat_message",
"cost_type": "per_unit",
"credit_cost": 1000,
"unit_cost": 1000
}
-> 201

POST /v1/metering-rules
{
"billable_metric_key": "plan_purchase_1hr",
"cost_type": "per_unit",
"credit_cost": 1000,
"unit_cost": 1000
}
-> 201

POST /v1/metering-rules
{
"billable_metric_key": "plan_purchase_weekly",
"cost_type": "per_unit",
"credit_cost": 1000,
"unit_cost": 1000
}
-> 201
"""

PLANS_DO_NOT_PAY_FOR_PLANS = """
PATCH /v1/billable-metrics/plan_purchase_1hr
{"priority_max": 9}
-> 200

PATCH /v1/billable-metrics/plan_purchase_weekly
{"priority_max": 9}
-> 200
"""

SIGN_UP = """
POST /v1/customers
Idempotency-Key: signup:user_12345
{
"external_id": "user_12345"
}
-> 201 {"id": "cus_...", "external_id": "user_12345"}

POST /v1/topup/grant
Idempotency-Key: topup:pay_abc123
{
"customer_id": "cus_...",
"credits": 500000,
"metadata": {
"source": "wallet_recharge",
"payment_id": "pay_abc123",
"amount_paid": "499"
}
}
-> 200 {"balance_before": 0, "balance_after": 500000, "block": {"priority": 0, "expires_at": null}}
"""

CONVERSATION = """
POST /v1/topup/grant
Idempotency-Key: convo-grant:conv_789
{
"customer_id": "cus_...",
"credits": 50000,
"metadata": {
"source": "free_conversation",
"conversation_id": "conv_789"
}
}
-> 200 {"amount_granted": 50000, "balance_after": 550000}
"""

PLAN_PRICE = """
POST /v1/usage
Idempotency-Key: usage:plan-buy-<purchase>
{
"customer_id": "cus_...",
"billable_metric_key": "plan_purchase_1hr",
"units": 100,
"metadata": {
"companion_id": "companion_42",
"plan_type": "1hr"
}
}
-> 202 {"credits_used": 100000}
"""

PLAN_CREDITS = """
POST /v1/topup/grant
Idempotency-Key: topup:plan-grant-<purchase>
{
"customer_id": "cus_...",
"credits": 200000,
"expires_at": "<expires>",
"metadata": {
"source": "plan_1hr",
"companion_id": "companion_42",
"priority": 10
}
}
-> 200 {"amount_granted": 200000, "block": {"priority": 10, "source": "plan_1hr"}}
"""

MESSAGE = """
POST /v1/usage
Idempotency-Key: usage:msg-<message>
{
"customer_id": "cus_...",
"billable_metric_key": "chat_message",
"units": 1,
"metadata": {
"conversation_id": "conv_789",
"companion_id": "companion_42"
}
}
-> 202 {"credits_used": 1000}
"""

CREDITS = """
GET /v1/customers/cus_.../credits?include_blocks=true
-> 200
"""


@pytest.fixture
def served(install: Install, fresh_store: FreshStore) -> tuple[Farebox, Gateway]:
    farebox = install(webhooks_allow_private=True, **fresh_store())
    return farebox, farebox.serve()


@pytest.fixture
def app(served: tuple[Farebox, Gateway]) -> Iterator[Transcript]:
    farebox, gateway = served
    transcript = Transcript(gateway.base_url.removesuffix("/v1"), farebox.live_key)
    transcript.run(METRICS)
    yield transcript
    transcript.close()


def in_(duration: timedelta) -> str:
    return (datetime.now(UTC) + duration).isoformat()


def views(app: Transcript) -> dict[str, Any]:
    """What the walk-through derives from the blocks for its user, in credits."""
    blocks = app.run(CREDITS)["blocks"]
    plans = [block for block in blocks if block["priority"] == 10]
    lasting = [block for block in blocks if block["expires_at"] is None]
    return {
        "wallet": sum(b["remaining_amount"] for b in lasting if b["source"] == "wallet_recharge") // 1000,
        "plan": sum(b["remaining_amount"] for b in plans) // 1000,
        "expires": max((b["expires_at"] for b in plans), default=None),
        "free": sum(b["remaining_amount"] for b in blocks if b["source"] == "free_conversation") // 1000,
    }


def test_the_walk_through(served: tuple[Farebox, Gateway], app: Transcript) -> None:
    farebox, _ = served
    app.run(PLANS_DO_NOT_PAY_FOR_PLANS)
    app.run(SIGN_UP)
    for _ in range(2):
        app.run(CONVERSATION)
    assert views(app) == {"wallet": 500, "plan": 0, "expires": None, "free": 50}, "one grant, though sent twice"

    app.run(PLAN_PRICE, purchase="1", expires=in_(HOUR))
    assert views(app)["wallet"] == 400
    for _ in range(2):  # The second call was lost: both are repeated.
        app.run(PLAN_PRICE)
        app.run(PLAN_CREDITS)
    first = views(app)
    assert (first["wallet"], first["plan"]) == (400, 200)

    for message in range(3):
        app.run(
            'GET /v1/customers/cus_.../entitlements/chat_message?units=1\n-> 200 {"allowed": true, "cost_total": 1000}'
        )
        app.run(MESSAGE, message=str(message))
    assert views(app) == {**first, "plan": 197}, "the plan burns first"

    stacked = datetime.fromisoformat(first["expires"]) + HOUR
    app.run(PLAN_PRICE, purchase="2", expires=stacked.isoformat())
    app.run(PLAN_CREDITS)
    second = views(app)
    assert (second["wallet"], second["plan"]) == (300, 397), "the wallet paid for it, not the plan"
    assert datetime.fromisoformat(second["expires"]) == stacked

    app.run('POST /v1/usage\n{"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 502}\n-> 202')
    app.run(
        "GET /v1/customers/cus_.../entitlements/chat_message?units=1\n"
        '-> 200 {"allowed": true, "balance": 245000, "effective_balance": 245000, "cost_per_unit": 1000, '
        '"cost_total": 1000, "affordable_units": 245}'
    )
    app.run('POST /v1/usage\n{"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 245}\n-> 202')
    app.run(
        "GET /v1/customers/cus_.../entitlements/chat_message?units=1\n"
        '-> 200 {"allowed": false, "balance": 0, "affordable_units": 0}'
    )
    app.run(MESSAGE.replace("-> 202", "-> 402").replace('{"credits_used": 1000}', ""), message="dry")
    farebox.verify()


def test_the_apps_own_handler_buys_the_next_plan_when_the_webhook_comes(served: tuple[Farebox, Gateway]) -> None:
    """`examples/chat_app.py`: its receiver checks the signature; the next plan and a message follow."""
    farebox, gateway = served
    setup = Transcript(gateway.base_url.removesuffix("/v1"), farebox.live_key)
    setup.run(METRICS + PLANS_DO_NOT_PAY_FOR_PLANS)
    setup.close()
    done = subprocess.run(
        [sys.executable, "-m", "examples.chat_app"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FAREBOX_URL": gateway.base_url, "FAREBOX_KEY": farebox.live_key},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "companion_42 answers.",
        '{"wallet": 150, "plan": 200}',
        "companion_42 answers.",
        '{"wallet": 150, "plan": 199}',
    ]
    farebox.verify()


def test_the_apps_handler_buys_until_the_wallet_is_empty(served: tuple[Farebox, Gateway], app: Transcript) -> None:
    farebox, gateway = served
    app.run(PLANS_DO_NOT_PAY_FOR_PLANS + SIGN_UP)
    credits = chat_app.Credits(gateway.base_url, farebox.live_key)
    customer = app.names["cus_..."]
    with credits.http:
        app.run(
            'POST /v1/usage\n{"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 350}\n-> 202'
        )
        app.run('GET /v1/customers/cus_.../entitlements/chat_message?units=151\n-> 200 {"allowed": false}')
        assert chat_app.try_auto_buy_plan(credits, customer, "companion_42", purchase_id="msg-1")
        assert chat_app.try_auto_buy_plan(credits, customer, "companion_42", purchase_id="msg-2") is False
        assert chat_app.views(credits, customer) == {"wallet": 50, "plan": 200}
        app.run(
            'POST /v1/usage\n{"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 250}\n-> 202'
        )
        refused = chat_app.handle_send_message(credits, customer, "companion_42", "conv_789", "1")
        assert refused == "Insufficient credits. Please recharge your wallet."


PACKS = """
POST /v1/packs
{"key": "plan_1hr", "name": "1-Hour Plan", "price": 100000, "credits": 200000, "duration_seconds": 3600}
-> 201

POST /v1/packs
{"key": "plan_2s", "name": "Trial", "price": 0, "credits": 5000, "duration_seconds": 2}
-> 201

PATCH /v1/customers/cus_...
{"settings": {"auto_buy_enabled": true, "auto_buy_pack": "plan_1hr", "auto_buy_price": 120000}}
-> 200 {"settings": {"auto_buy_enabled": true}}

POST /v1/customers/cus_.../packs
{"pack": "plan_2s", "metadata": {"companion_id": "companion_42"}}
-> 200
"""

MESSAGES = """
POST /v1/usage
{"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 250}
-> 202 {"balance": 330000}

POST /v1/usage
{"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 331}
-> 202 {"balance": 79000}

POST /v1/usage
{"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 80}
-> 402
"""


def test_auto_buy_needs_no_code(served: tuple[Farebox, Gateway], app: Transcript) -> None:
    """The gateway buys the plan when one has run out of time, once; and when messages are not affordable."""
    farebox, _ = served
    app.run(SIGN_UP + PACKS)
    until(lambda: views(app)["wallet"] == 380, within_s=TOLD_S, what="plan that was bought when one had expired")
    assert views(app)["plan"] == 200
    (expired,) = app.run("GET /v1/events?type=credit.expired\n-> 200")["data"]
    assert (expired["credit_block"]["priority"], expired["data"]["amount"]) == (10, 5_000)
    assert expired["credit_block"]["metadata"]["companion_id"] == "companion_42"
    app.run(MESSAGES)
    farebox.verify()
