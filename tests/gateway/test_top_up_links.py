"""Whoever is refused for lack of their own credits is told where to add some; nobody else is, nor without payments."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.payments.links import TopUpLink
from gateway.settings import ActionSettings, ModelSettings, PriceSettings
from ledger.model import Scope
from tests.gateway.office import Office, open_office

pytestmark = pytest.mark.sqlite

PUBLIC_URL = "https://pay.example"
STRIPE = {
    "stripe_secret_key": "sk_test_51Nothing",
    "stripe_webhook_secret": "whsec_nothing",
    "public_url": PUBLIC_URL,
}
DEAR = ModelSettings(name="dear", upstream="simulated", price=PriceSettings(input="600", output="600"))


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    async with open_office(tmp_path, **STRIPE) as office:
        yield office


async def image_metric(office: Office) -> None:
    await office.post("/v1/billable-metrics", {"key": "image", "name": "image"})
    rule = {"billable_metric_key": "image", "cost_type": "per_unit", "unit_cost": 1000, "credit_cost": 1000}
    await office.post("/v1/metering-rules", rule)


async def grant(office: Office, user: str, credits: int) -> None:
    await office.post("/v1/topup/grant", {"customer_id": user, "credits": credits})


async def bound(office: Office, user: str, credits: int) -> None:
    """A budget for a month."""
    subject = {"type": "customer", "id": user}
    await office.post(
        "/v1/budgets", {"subject": subject, "credits": credits, "period": {"every": "month"}}, key="owner"
    )


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 402, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


async def leads_to(office: Office, url: str) -> TopUpLink:
    """What the page will be for, behind *url*."""
    assert url.startswith(f"{PUBLIC_URL}/topup/")
    payments = office.gateway.services.payments
    assert payments is not None
    return payments.links.opened(url.removeprefix(f"{PUBLIC_URL}/topup/"))


async def is_for(office: Office, url: str, user: str, mode: str = "live") -> None:
    customer = await office.gateway.services.customers.find(office.tenant, mode, user)
    link = await leads_to(office, url)
    assert (link.scope, link.customer_id) == (Scope(office.tenant, mode), customer.id)


async def test_a_completion_that_the_wallet_cannot_pay(office: Office):
    await is_for(office, error_of(await office.chat("alice"))["top_up_url"], "alice")


async def test_the_sandboxs_users_have_their_own_page(office: Office):
    await is_for(office, error_of(await office.chat("alice", key="test"))["top_up_url"], "alice", "test")


async def test_usage_alone_and_in_a_batch(office: Office):
    await image_metric(office)
    event = {"customer_id": "alice", "billable_metric_key": "image", "units": 1}
    await is_for(office, error_of(await office.ask("POST", "/v1/usage", event))["top_up_url"], "alice")
    batch = (await office.ask("POST", "/v1/usage/batch", {"events": [event]})).json()
    await is_for(office, batch["data"][0]["error"]["top_up_url"], "alice")


async def test_a_reservation_and_its_extension(office: Office):
    await image_metric(office)
    asked = {"customer_id": "alice", "billable_metric_key": "image", "estimated_units": 2}
    await is_for(office, error_of(await office.ask("POST", "/v1/reservations", asked))["top_up_url"], "alice")
    await grant(office, "alice", 2000)
    made = await office.post("/v1/reservations", asked)
    more = await office.ask("POST", f"/v1/reservations/{made['id']}/extend", {"units": 1})
    await is_for(office, error_of(more)["top_up_url"], "alice")


async def test_a_pack(office: Office):
    await office.post(
        "/v1/packs", {"key": "hour", "name": "Hour", "price": 1000, "credits": 2000, "duration_seconds": 3600}
    )
    refused = await office.ask("POST", "/v1/customers/alice/packs", {"pack": "hour"})
    await is_for(office, error_of(refused)["top_up_url"], "alice")


async def test_the_dialects(office: Office):
    await image_metric(office)
    metered = await office.ask("POST", "/chargly/v1/meter", {"event": "image", "customerId": "alice"})
    await is_for(office, error_of(metered)["top_up_url"], "alice")
    tracked = await office.ask("POST", "/autumn/v1/track", {"customer_id": "alice", "feature_id": "image", "value": 1})
    await is_for(office, error_of(tracked)["top_up_url"], "alice")


async def test_an_entitlement_check_says_it_where_credits_are_what_lacks(office: Office):
    await image_metric(office)
    path = "/v1/customers/alice/entitlements/image"
    for _ in range(2):  # The second is answered from what is at hand.
        denied = await office.get(path)
        assert denied["allowed"] is False
        await is_for(office, denied["top_up_url"], "alice")
    await grant(office, "alice", 1000)
    assert "top_up_url" not in await office.get(path)
    await bound(office, "alice", 500)
    bounded = await office.get(path)
    assert bounded["allowed"] is False
    assert "top_up_url" not in bounded


async def test_a_stream_that_ran_dry_says_it_in_its_last_chunk(tmp_path: Path):
    async with open_office(tmp_path, **STRIPE, models=(DEAR,)) as office:
        await grant(office, "alice", 6000)
        headers = {"X-Quota-User": "alice"}
        asked = {"model": "dear", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        said = {"text": "The meter counts every token as it passes. " * 50, "usage": None}
        streamed = await office.ask("POST", "/v1/chat/completions", {**asked, "simulate": said}, headers=headers)
        assert streamed.status_code == 200, streamed.text
        (last,) = [line for line in streamed.text.splitlines() if "top_up_url" in line]
        await is_for(office, _found(json.loads(last.removeprefix("data: ")), "top_up_url"), "alice")


async def test_a_user_who_owes_is_led_there_too(office: Office):
    await office.post("/v1/billable-metrics", {"key": "image", "name": "image", "overage_policy": "allow"})
    rule = {"billable_metric_key": "image", "cost_type": "per_unit", "unit_cost": 1000, "credit_cost": 1000}
    await office.post("/v1/metering-rules", rule)
    await office.ask("POST", "/v1/usage", {"customer_id": "alice", "billable_metric_key": "image", "units": 1})
    await is_for(office, error_of(await office.chat("alice"))["top_up_url"], "alice")


async def test_the_developers_wallet_has_no_such_page(office: Office):
    assert "top_up_url" not in error_of(await office.chat(None))
    pool = await office.ask("POST", "/v1/funding/pool", {"credits": 1000})
    assert "top_up_url" not in error_of(pool)
    granted = await office.ask("POST", "/v1/funding/grant", {"customer_id": "alice", "amount": 1})
    assert "top_up_url" not in error_of(granted)


async def test_nor_has_a_user_whose_developer_pays(office: Office):
    changed = await office.ask("PATCH", f"/v1/apps/{office.app}", {"billing_mode": "developer_pays"}, key="owner")
    assert changed.status_code == 200
    office.gateway.services.principals.invalidate()
    assert "top_up_url" not in error_of(await office.chat("alice"))


async def test_what_the_developer_would_have_to_add_to_an_action_is_no_users_matter(tmp_path: Path):
    reply = ActionSettings(key="reply", credits="0.01")
    async with open_office(tmp_path, **STRIPE, models=(DEAR,), actions=(reply,)) as office:
        await grant(office, "alice", 10_000)
        asked = {"model": "dear", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1000}
        headers = {"X-Quota-User": "alice", "X-Quota-Action": "reply"}
        refused = await office.ask("POST", "/v1/chat/completions", asked, headers=headers)
        assert "top_up_url" not in error_of(refused)


async def test_a_budget_is_raised_not_topped_up(office: Office):
    await grant(office, "alice", 100_000)
    await bound(office, "alice", 0)
    error = error_of(await office.chat("alice"))
    assert (error["code"], "top_up_url" in error) == ("budget_exceeded", False)


async def test_real_money_pays_for_nothing_in_the_sandbox(tmp_path: Path):
    async with open_office(tmp_path, **{**STRIPE, "stripe_secret_key": "sk_live_51Nothing"}) as office:
        assert "top_up_url" in error_of(await office.chat("alice"))
        assert "top_up_url" not in error_of(await office.chat("alice", key="test"))


@pytest.mark.parametrize("settings", [{"public_url": PUBLIC_URL}, {**STRIPE, "public_url": None}])
async def test_without_payments_or_an_address_there_is_no_link(tmp_path: Path, settings: dict[str, Any]):
    async with open_office(tmp_path, **settings) as office:
        await image_metric(office)
        assert "top_up_url" not in error_of(await office.chat("alice"))
        assert "top_up_url" not in await office.get("/v1/customers/alice/entitlements/image")


def _found(value: Any, name: str) -> Any:
    """The member *name*, however deep."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for each in value if (found := _found(each, name)) is not None), None)
    return None
