"""May this customer do that now? The same answer in order and at once, and the same refusals as everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.api.entitlements import Answer
from gateway.identity.keys import KeyScope
from gateway.identity.wallets import customer_wallet
from gateway.ids import new_id
from ledger.commands import Freeze
from ledger.model import Scope
from tests.gateway.office import Office, open_office


async def price(office: Office, key: str = "chat_message", *, policy: str = "block", **rule: Any) -> None:
    """A metric, at one credit a unit unless a test says otherwise."""
    await office.post("/v1/billable-metrics", {"key": key, "overage_policy": policy}, key="owner")
    rule = rule or {"cost_type": "per_unit", "unit_cost": 1000}
    await office.post("/v1/metering-rules", {"billable_metric_key": key, **rule}, key="owner")


async def grant(office: Office, credits: int, customer: str = "alice", **fields: Any) -> str:
    """Returns our id of the customer."""
    granted = await office.post("/v1/topup/grant", {"customer_id": customer, "credits": credits, **fields})
    customer_id: str = granted["customer_id"]
    return customer_id


async def spend(office: Office, customer: str, units: str, metric: str = "chat_message") -> None:
    body = {"customer_id": customer, "billable_metric_key": metric, "units": units}
    assert (await office.ask("POST", "/v1/usage", body)).status_code == 202


def at_once(office: Office, path: str, *, key: str = "live") -> Answer | None:
    """What the server would answer while it reads the request."""
    where, _, query = path.partition("?")
    headers = [(b"authorization", f"Bearer {office.keys[key]}".encode())]
    scope = {"type": "http", "method": "GET", "path": where, "query_string": query.encode(), "headers": headers}
    return office.gateway.answer_at_once(scope)


async def test_what_a_customer_can_afford_to_the_digit(office: Office):
    await price(office)
    customer_id = await grant(office, 245_000)
    found = await office.get(f"/v1/customers/{customer_id}/entitlements/chat_message?units=1")
    assert found == {
        "allowed": True,
        "customer_id": customer_id,
        "billable_metric_key": "chat_message",
        "balance": 245000,
        "balance_decimal": "245",
        "effective_balance": 245000,
        "effective_balance_decimal": "245",
        "cost_per_unit": 1000,
        "cost_per_unit_decimal": "1",
        "cost_total": 1000,
        "cost_total_decimal": "1",
        "affordable_units": 245,
    }
    for way in (
        f"/v1/customers/{customer_id}/entitlements/chat_message",
        "/v1/customers/alice/entitlements/chat_message",
        "/v1/customer-by-external-id/alice/entitlements/chat_message",
        "/v1/entitlements/check?end_user_id=alice&feature_key=chat_message",
        f"/v1/entitlements/check?customer_id={customer_id}&billable_metric_key=chat_message&units=1.0",
        "/v1/entitlements/check?external_user_id=alice&billable_metric_key=chat_message",
    ):
        assert await office.get(way) == found, way


@pytest.mark.parametrize(("units", "allowed", "cost"), [("245", True, 245000), ("245.000001", False, 245000)])
async def test_it_is_decided_in_the_smallest_unit(office: Office, units: str, allowed: bool, cost: int):
    await price(office)
    await grant(office, 245_000)
    found = await office.get(f"/v1/customers/alice/entitlements/chat_message?units={units}")
    assert (found["allowed"], found["cost_total"], found["affordable_units"]) == (allowed, cost, 245)


async def test_it_follows_every_change(office: Office):
    await price(office)
    path = "/v1/customers/alice/entitlements/chat_message?units=3"
    for do, allowed, balance in (
        (grant(office, 4000), True, 4000),
        (spend(office, "alice", "1.5"), False, 2500),
        (grant(office, 500), True, 3000),
        (spend(office, "alice", "3"), False, 0),
    ):
        await do
        for _ in range(2):
            found = await office.get(path)
            assert (found["allowed"], found["balance"], found["effective_balance"]) == (allowed, balance, balance)
            prompt = at_once(office, path)
            assert prompt is None or json.loads(prompt.body) == found


async def test_an_expired_block_pays_no_more_from_its_instant_on(office: Office):
    await price(office)
    await grant(office, 5000, expires_at="2036-04-13T11:00:00Z")
    path = "/v1/customers/alice/entitlements/chat_message"
    assert (await office.get(path))["allowed"]
    office.clock.pass_s(30 * 365 * 86_400)
    found = await office.get(path)
    assert (found["allowed"], found["balance"], found["affordable_units"]) == (False, 0, 0)


async def test_what_is_restricted_to_another_metric_does_not_count(office: Office):
    await price(office)
    await grant(office, 5000, metrics=["image"])
    found = await office.get("/v1/customers/alice/entitlements/chat_message")
    assert (found["allowed"], found["balance"], found["effective_balance"]) == (False, 5000, 0)


@pytest.mark.parametrize("policy", ["allow", "notify"])
async def test_a_metric_that_may_be_owed_is_always_allowed(office: Office, policy: str):
    await price(office, policy=policy)
    for _ in range(2):
        found = await office.get("/v1/customers/alice/entitlements/chat_message?units=10")
        assert found["allowed"]
        assert found["affordable_units"] == 0
        await spend(office, "alice", "10")


async def test_who_owes_is_refused_what_may_not_be_owed(office: Office):
    await price(office)
    await price(office, "owed", policy="allow")
    await spend(office, "alice", "2", "owed")
    found = await office.get("/v1/customers/alice/entitlements/chat_message")
    assert (found["allowed"], found["balance"], found["effective_balance"]) == (False, -2000, 0)


async def test_a_frozen_wallet_is_refused_everything(office: Office):
    await price(office, policy="allow")
    customer_id = await grant(office, 5000)
    scope = Scope(office.tenant, "live")
    await office.gateway.services.ledger.execute(
        Freeze(id=new_id("cmd"), scope=scope, wallet=customer_wallet(*scope, customer_id), frozen=True)
    )
    assert not (await office.get("/v1/customers/alice/entitlements/chat_message"))["allowed"]


async def test_what_costs_nothing_is_not_bounded(office: Office):
    await price(office, cost_type="flat", credit_cost=0)
    found = await office.get("/v1/customers/alice/entitlements/chat_message")
    assert (found["allowed"], found["cost_total"], found["affordable_units"]) == (True, 0, None)


async def test_a_cost_finer_than_a_millicredit(office: Office):
    await price(office, cost_type="per_unit", unit_cost_decimal="0.00012")
    await grant(office, 1)
    found = await office.get("/v1/customers/alice/entitlements/chat_message?units=8")
    assert (found["allowed"], found["cost_total"], found["cost_total_decimal"]) == (True, 0, "0.00096")
    assert (found["cost_per_unit_decimal"], found["affordable_units"]) == ("0.00012", 8)


async def test_a_customer_is_created_on_the_first_check(office: Office):
    await price(office)
    found = await office.get("/v1/entitlements/check?end_user_id=newcomer&feature_key=chat_message")
    assert (found["allowed"], found["balance"]) == (False, 0)
    assert (await office.get(f"/v1/customers/{found['customer_id']}"))["external_id"] == "newcomer"


@pytest.mark.sqlite
async def test_at_once_when_everything_is_at_hand(office: Office):
    await price(office)
    customer_id = await grant(office, 5000)
    path = f"/v1/customers/{customer_id}/entitlements/chat_message?units=2"
    assert at_once(office, path) is None
    found = await office.get(path)
    for _ in range(2):
        answer = at_once(office, path)
        assert answer is not None
        assert json.loads(answer.body) == found
        assert dict(answer.headers)[b"x-request-id"].startswith(b"req_")
    await spend(office, "alice", "4")
    answer = at_once(office, path)
    assert answer is not None
    assert json.loads(answer.body)["balance"] == 1000
    assert at_once(office, path, key="test") is None
    assert at_once(office, path, key="other") is None
    assert at_once(office, f"{path}&mode=test") is None
    assert at_once(office, path.replace("units=2", "units=x")) is None
    assert at_once(office, path.replace("customers", "customer-by-external-id")) is None


@pytest.mark.sqlite
async def test_at_once_is_counted_and_limited_like_any_other(tmp_path: Path):
    async with open_office(tmp_path, management_rate_limit_per_minute=8) as office:
        await price(office)
        await grant(office, 5000)
        path = "/v1/customers/alice/entitlements/chat_message"
        left = int((await office.ask("GET", path)).headers["x-ratelimit-remaining"])
        for remaining in reversed(range(left)):
            answer = at_once(office, path)
            assert answer is not None
            assert dict(answer.headers)[b"x-ratelimit-remaining"] == b"%d" % remaining
        assert at_once(office, path) is None
        refused = await office.ask("GET", path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"]


@pytest.mark.sqlite
async def test_where_only_the_rate_limit_is_asked_for_the_rest_is_at_hand(
    office: Office, monkeypatch: pytest.MonkeyPatch
):
    await price(office)
    path = f"/v1/customers/{await grant(office, 5000)}/entitlements/chat_message"
    found = await office.get(path)
    monkeypatch.setattr(office.gateway.services.entitlements, "check", None)
    assert await office.get(path) == found


async def test_what_is_refused(office: Office):
    await price(office)
    await office.post("/v1/billable-metrics", {"key": "unpriced"}, key="owner")
    made = await office.gateway.services.tenants.create_key(
        office.tenant, "live", app_id=office.app, scopes=[KeyScope.CREDITS_WRITE]
    )
    office.keys["writer"] = made.token
    good = "/v1/customers/alice/entitlements/chat_message"
    check, external = "/v1/entitlements/check", "/v1/customer-by-external-id"
    for path, status, code, param in (
        ("/v1/customers/alice/entitlements/none", 404, "not_found", "billable_metric_key"),
        ("/v1/customers/alice/entitlements/unpriced", 404, "not_found", "billable_metric_key"),
        (f"/v1/customers/{new_id('cus')}/entitlements/chat_message", 404, "not_found", None),
        (f"{external}/{new_id('cus')}/entitlements/chat_message", 400, "invalid_request", "external_id"),
        ("/v1/customers/%20alice/entitlements/chat_message", 400, "invalid_request", "customer"),
        ("/v1/customers/%00/entitlements/chat_message", 400, "invalid_request", None),
        (f"{good}?units=-1", 400, "invalid_request", "units"),
        (f"{good}?units=1e3", 400, "invalid_request", "units"),
        (f"{good}?units=", 400, "invalid_request", "units"),
        (f"{good}?units=0.0000001", 400, "invalid_request", "units"),
        (f"{good}?units=1000000001", 400, "invalid_request", "units"),
        (f"{good}?mode=both", 400, "invalid_request", "mode"),
        (f"{good}?mode=test", 403, "permission_denied", None),
        (check, 400, "invalid_request", "customer_id"),
        (f"{check}?customer_id=alice", 400, "invalid_request", "billable_metric_key"),
        (f"{check}?customer_id=a&end_user_id=b&feature_key=chat_message", 400, "invalid_request", "customer_id"),
        (f"{check}?end_user_id=&feature_key=chat_message", 400, "invalid_request", "end_user_id"),
    ):
        assert await office.refused("GET", path) == (status, code, param), path
    assert await office.refused("GET", good, key="writer") == (403, "permission_denied", None)
    assert await office.refused("GET", good, key="nobody") == (401, "invalid_api_key", None)
    assert await office.refused("POST", good, {}) == (405, "method_not_allowed", None)


async def test_a_test_key_sees_test_credits(office: Office):
    await price(office)
    await grant(office, 5000)
    path = "/v1/customers/alice/entitlements/chat_message"
    assert (await office.get(path))["balance"] == 5000
    assert (await office.refused("GET", path, key="test"))[0] == 404
