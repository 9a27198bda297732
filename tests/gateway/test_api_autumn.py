"""Autumn's dialect: its paths and words, onto what the native endpoints do."""

import json
from decimal import Decimal
from typing import Any

import pytest

from tests.gateway.office import Office

FEATURES = {"small-model-tokens": 100, "medium-model-tokens": 1000, "large-model-tokens": 5000}
"""Millicredits a token."""

ANN = {"customer_id": "ann", "feature_id": "small-model-tokens"}


@pytest.fixture
async def chatbot(office: Office) -> Office:
    """Three models at a tenth of a credit, one and five a token; and 500 credits for every new customer."""
    await office.ask("PATCH", "/v1/tenants/me/config", {"default_grant": {"credits": 500_000}}, key="owner")
    for key, millis in FEATURES.items():
        await office.post("/v1/billable-metrics", {"key": key})
        rule = {"billable_metric_key": key, "cost_type": "per_unit", "unit_cost": millis}
        await office.post("/v1/metering-rules", rule)
    return office


async def say(office: Office, verb: str, body: dict[str, Any], **options: Any) -> Any:
    """The answer, its numbers as they stand in the text."""
    answer = await office.ask("POST", f"/autumn/v1/{verb}", body, **options)
    assert answer.is_success, answer.text
    return json.loads(answer.text, parse_float=Decimal)


async def balance(office: Office, user: str = "ann") -> int:
    credits = await office.get(f"/v1/customers/{user}/credits")
    assert isinstance(credits["balance"], int)
    return credits["balance"]


async def test_a_customer_is_created_by_their_first_check_and_has_the_default_grant(chatbot: Office):
    assert await say(chatbot, "check", ANN) == {
        "allowed": True,
        "code": "feature_found",
        "customer_id": "ann",
        "feature_id": "small-model-tokens",
        "required_balance": 1,
        "balance": 500,
        "unlimited": False,
        "overage_allowed": False,
    }
    assert (await chatbot.get("/v1/customers/ann"))["external_id"] == "ann"


async def test_tokens_use_up_the_credits_to_the_digit_and_then_nothing_is_allowed(chatbot: Office):
    assert (await say(chatbot, "entitled", ANN))["allowed"]
    small = await say(chatbot, "track", {**ANN, "value": 2000})
    assert (small["credits_used"], small["balance"]) == (200, 300)
    large = await say(chatbot, "events", {"customer_id": "ann", "event_name": "large-model-tokens", "value": 60})
    assert (large["credits_used"], large["balance"]) == (300, 0)
    for feature, cost in (("small-model-tokens", Decimal("0.1")), ("large-model-tokens", 5)):
        answer = await say(chatbot, "entitled", {"customer_id": "ann", "feature_id": feature})
        assert answer == {
            "allowed": False,
            "balances": [
                {"feature_id": feature, "required": cost, "balance": 0, "unlimited": False, "usage_allowed": False}
            ],
        }
    assert (await chatbot.refused("POST", "/autumn/v1/track", ANN))[:2] == (402, "insufficient_credits")


async def test_amounts_are_exact_numbers(chatbot: Office):
    """A double has no 499.9999999 and 10^9 as well: the digits of the text count."""
    tracked = await chatbot.ask("POST", "/autumn/v1/track", {**ANN, "value": 0.000001})
    assert '"credits_used":1E-7' in tracked.text
    assert '"balance":499.9999999' in tracked.text


async def test_one_required_balance_more_than_there_is_is_not_allowed(chatbot: Office):
    assert (await say(chatbot, "balances.check", {**ANN, "required_balance": 5000}))["allowed"]
    assert not (await say(chatbot, "balances.check", {**ANN, "required_balance": 5001}))["allowed"]
    assert not (await say(chatbot, "entitled", {**ANN, "required_quantity": 5001}))["allowed"]


async def test_with_overage_everything_is_allowed_and_the_balance_goes_below_nothing(chatbot: Office):
    await chatbot.ask("PATCH", "/v1/billable-metrics/small-model-tokens", {"overage_policy": "allow"})
    chatbot.clock.pass_s(2)
    assert (await say(chatbot, "track", {**ANN, "value": 15_000}))["balance"] == -1000
    answer = await say(chatbot, "check", ANN)
    assert (answer["allowed"], answer["overage_allowed"], answer["balance"]) == (True, True, -1000)


async def test_a_check_can_track_at_once_if_it_is_allowed(chatbot: Office):
    asked = {**ANN, "required_balance": 4000, "send_event": True}
    first = await say(chatbot, "check", asked, once="msg-1")
    assert (first["allowed"], first["balance"]) == (True, 100)
    assert (await say(chatbot, "check", asked, once="msg-1"))["allowed"], "the key has had its effect"
    second = await say(chatbot, "check", asked, once="msg-2")
    assert (second["allowed"], second["balance"]) == (False, 100)


async def test_a_lock_holds_until_it_is_confirmed_for_what_was_used(chatbot: Office):
    asked = {**ANN, "required_balance": 4000, "lock": {"lock_id": "job-1"}}
    for _ in range(2):
        assert (await say(chatbot, "check", asked))["allowed"], "saying it again holds nothing more"
    assert not (await say(chatbot, "check", {**ANN, "required_balance": 1001}))["allowed"]
    other = {**ANN, "required_balance": 4000, "lock": {"lock_id": "job-2"}}
    assert not (await say(chatbot, "check", other))["allowed"]
    finished = {"lock_id": "job-1", "action": "confirm", "override_value": 1500}
    for _ in range(2):
        done = await say(chatbot, "balances.finalize", finished, once="done-1")
        assert done == {"success": True, "lock_id": "job-1", "credits_used": 150, "balance": 350}
    late = {"lock_id": "job-1", "action": "release"}
    assert (await chatbot.refused("POST", "/autumn/v1/balances.finalize", late))[:2] == (409, "reservation_settled")
    assert (await say(chatbot, "check", {**other, "required_balance": 3500}))["allowed"]


async def test_a_lock_is_confirmed_for_what_was_asked_unless_told_otherwise(chatbot: Office):
    await say(chatbot, "check", {**ANN, "required_balance": 4000, "lock": {"lock_id": "job-1"}})
    assert (await say(chatbot, "balances.finalize", {"lock_id": "job-1", "action": "confirm"}))["credits_used"] == 400


async def test_a_released_lock_gives_everything_back(chatbot: Office):
    await say(chatbot, "check", {**ANN, "required_balance": 4000, "lock": {"lock_id": "job-1"}})
    for _ in range(2):
        released = await say(chatbot, "balances.finalize", {"lock_id": "job-1", "action": "release"})
        assert (released["credits_used"], released["balance"]) == (0, 500)


async def test_a_lock_ends_when_it_says(chatbot: Office):
    ends_ms = chatbot.clock.now_us() // 1000 + 60_000
    asked = {**ANN, "required_balance": 5000, "lock": {"lock_id": "job-1", "expires_at": ends_ms}}
    assert (await say(chatbot, "check", asked))["allowed"]
    assert not (await say(chatbot, "check", ANN))["allowed"]
    chatbot.clock.pass_s(61)
    await chatbot.gateway.services.ledger.sweep(chatbot.clock.now_us())
    assert (await say(chatbot, "check", ANN))["allowed"]
    past = {**asked, "lock": {"lock_id": "job-2", "expires_at": 1}}
    assert (await chatbot.refused("POST", "/autumn/v1/check", past))[:2] == (400, "invalid_request")


async def test_a_lock_is_its_apps_own_and_one_name_is_one_lock(chatbot: Office):
    asked = {**ANN, "required_balance": 100, "lock": {"lock_id": "job-1"}}
    await say(chatbot, "check", asked)
    another = {**asked, "required_balance": 200}
    assert (await chatbot.refused("POST", "/autumn/v1/check", another))[:2] == (422, "idempotency_key_reused")
    unknown = {"lock_id": "job-9", "action": "confirm"}
    assert (await chatbot.refused("POST", "/autumn/v1/balances.finalize", unknown))[:2] == (404, "not_found")
    finish = {"lock_id": "job-1", "action": "confirm"}
    for key in ("other", "test", "admin"):
        assert (await chatbot.refused("POST", "/autumn/v1/balances.finalize", finish, key=key))[0] == 404


async def test_many_events_are_tracked_each_by_itself(chatbot: Office):
    events = [{**ANN, "value": 1000}, {**ANN, "feature_id": "no-such"}, {**ANN, "value": 9000}, {**ANN, "value": 4000}]
    for _ in range(2):
        answers = (await say(chatbot, "balances.batch_track", {"events": events}, once="batch-1"))["list"]
        assert [answer["code"] for answer in answers] == [
            "event_received",
            "not_found",
            "insufficient_credits",
            "event_received",
        ]
        assert (answers[0]["credits_used"], answers[3]["balance"]) == (100, 0)


async def test_a_repeated_key_is_replayed(chatbot: Office):
    asked = {**ANN, "value": 100, "idempotency_key": "msg-1", "async": True, "properties": {"chat": "c1"}}
    first = await say(chatbot, "track", asked)
    answer = await chatbot.ask("POST", "/autumn/v1/track", asked)
    assert (answer.json(), answer.headers["x-idempotent-replayed"]) == (first, "true")
    changed = {**asked, "value": 101}
    assert (await chatbot.refused("POST", "/autumn/v1/track", changed))[:2] == (422, "idempotency_key_reused")
    assert await balance(chatbot) == 490_000


async def test_a_feature_that_nobody_has_priced_is_not_found(chatbot: Office):
    for verb in ("check", "entitled", "track"):
        refused = await chatbot.refused("POST", f"/autumn/v1/{verb}", {**ANN, "feature_id": "no-such"})
        assert refused[:2] == (404, "not_found")


async def test_a_refusal_says_its_code_where_autumns_clients_look(chatbot: Office):
    for body, key in (({}, "live"), (ANN, "nobody"), ({**ANN, "feature_id": "no-such"}, "live")):
        answer = (await chatbot.ask("POST", "/autumn/v1/track", body, key=key)).json()
        assert (answer["code"], answer["message"]) == (answer["error"]["code"], answer["error"]["message"])
    native = (await chatbot.ask("POST", "/v1/usage", {})).json()
    assert native.keys() == {"error"}


async def test_what_is_not_offered_is_refused_and_not_ignored(chatbot: Office):
    for field, value in (("entity_id", "seat-1"), ("value", -1), ("overage_behavior", "cap")):
        assert (await chatbot.refused("POST", "/autumn/v1/track", {**ANN, field: value}))[0] == 400
    both = {**ANN, "send_event": True, "lock": {"lock_id": "job-1"}}
    assert (await chatbot.refused("POST", "/autumn/v1/check", both))[0] == 400
    for path in ("attach", "usage"):
        assert (await chatbot.refused("POST", f"/autumn/v1/{path}", {}))[0] == 404


async def test_who_may_only_read_checks_and_takes_nothing(chatbot: Office):
    assert (await say(chatbot, "check", ANN, key="reader"))["allowed"]
    for taking in ({"send_event": True}, {"lock": {"lock_id": "job-1"}}):
        assert (await chatbot.refused("POST", "/autumn/v1/check", {**ANN, **taking}, key="reader"))[0] == 403
    assert await balance(chatbot) == 500_000


async def test_customers_are_named_as_the_tenant_names_them(chatbot: Office):
    asked = {"id": "bob", "name": "Bob", "email": "bob@example.com", "metadata": {"plan": "free"}}
    made = await chatbot.ask("POST", "/autumn/v1/customers", asked)
    assert made.status_code == 201
    again = await chatbot.ask("POST", "/autumn/v1/customers", {"id": "bob"})
    assert (again.status_code, again.json()) == (200, made.json())
    assert made.json() == {
        "id": "bob",
        "internal_id": made.json()["internal_id"],
        "name": "Bob",
        "email": "bob@example.com",
        "metadata": {"plan": "free", "name": "Bob", "email": "bob@example.com"},
        "env": "live",
        "created_at": made.json()["created_at"],
    }
    assert await chatbot.get("/autumn/v1/customers/bob") == {**made.json(), "balance": 500}
    assert await chatbot.get("/autumn/v1/customers?limit=1") == {
        "list": [made.json()],
        "has_more": False,
        "next_cursor": None,
    }
    assert (await chatbot.refused("GET", "/autumn/v1/customers/nobody"))[:2] == (404, "not_found")


@pytest.mark.sqlite
async def test_metadata_that_are_too_large_with_the_name_are_refused(chatbot: Office):
    large = {"id": "bob", "name": "B" * 400, "metadata": {"note": "x" * (16 * 1024 - 100)}}
    assert (await chatbot.refused("POST", "/autumn/v1/customers", large))[:2] == (400, "invalid_request")
