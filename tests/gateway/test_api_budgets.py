"""Budgets over the API: who may set them, whom they stop, what they show, and when they are filled again."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gateway.billing.charging import Spender
from gateway.identity.wallets import limit_wallet
from ledger.model import Scope
from pricing.money import CREDIT
from tests.gateway.office import Office

MONTH = {"every": "month"}
DAY_S = 24 * 3600


async def budget(office: Office, subject: dict[str, Any], credits: int = 1, **more: Any) -> Any:
    """A new one of so many millicredits. A question to the simulated upstream costs less than one."""
    key = more.pop("key", "owner")
    return await office.post("/v1/budgets", {"subject": subject, "credits": credits, "period": MONTH, **more}, key=key)


async def shown(office: Office, made: Any, **options: Any) -> Any:
    return await office.get(f"/v1/budgets/{made['id']}", **options)


@pytest.fixture
async def funded(office: Office) -> Office:
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 5_000_000})
    await office.post("/v1/topup/grant", {"customer_id": "bob", "credits": 5_000_000})
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 5_000_000}, key="test")
    await office.fund_developer("5000")
    return office


async def key_id_of(office: Office, mode: str = "live") -> str:
    keys = await office.get("/v1/keys", key="owner")
    return str(next(key["id"] for key in keys["data"] if key["mode"] == mode and "admin" not in key["scopes"]))


# What a budget stops.


@pytest.mark.parametrize("kind", ["tenant", "app", "key", "customer"])
async def test_nothing_is_spent_beyond_a_budget_on(funded: Office, kind: str):
    subjects: dict[str, dict[str, Any]] = {
        "tenant": {"type": "tenant"},
        "app": {"type": "app", "id": funded.app},
        "key": {"type": "key", "id": await key_id_of(funded)},
        "customer": {"type": "customer", "id": "alice"},
    }
    assert (await funded.chat()).status_code == 200
    made = await budget(funded, subjects[kind], 0)
    refused = await funded.chat()
    assert refused.status_code == 402
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("budget_exceeded", "insufficient_quota")
    assert (error["budget"], error["available"], error["available_decimal"]) == (made["id"], 0, "0")
    assert error["needed_decimal"] != "0"
    assert error["resets_at"] == made["period"]["ends_at"]
    await funded.post(f"/v1/budgets/{made['id']}/archive", key="owner")
    assert (await funded.chat()).status_code == 200


async def test_a_budget_stops_no_one_else(funded: Office):
    await budget(funded, {"type": "customer", "id": "alice"}, 0)
    sandbox = await funded.post(
        "/v1/budgets", {"subject": {"type": "tenant"}, "credits": 0, "period": MONTH}, key="sandbox-owner"
    )
    await budget(funded, {"type": "key", "id": await key_id_of(funded, "live")}, 5_000_000)
    assert (await funded.chat("alice")).status_code == 402
    assert (await funded.chat("bob")).status_code == 200
    assert (await funded.chat("alice", key="test")).status_code == 402
    assert (await funded.chat("bob", key="owner")).status_code == 200
    assert (await funded.get(f"/v1/budgets/{sandbox['id']}", key="test"))["subject"]["type"] == "tenant"


async def test_a_user_is_bounded_whoever_pays(funded: Office):
    """In a developer-pays app the budget is the user's share of the developer's credits."""
    await budget(funded, {"type": "customer", "id": "alice"}, 0)
    await funded.ask("PATCH", f"/v1/apps/{funded.app}", {"billing_mode": "developer_pays"}, key="owner")
    assert (await funded.chat("alice")).status_code == 402
    assert (await funded.chat("bob")).status_code == 200


async def test_what_was_spent_is_shown(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 5_000, thresholds=[100, 80, 80], name="Fair share")
    assert made["id"].startswith("bud_")
    assert (made["credits"], made["remaining"], made["spent"], made["reserved"]) == (5_000, 5_000, 0, 0)
    assert (made["thresholds"], made["name"], made["version"], made["archived"]) == ([80, 100], "Fair share", 1, False)
    cost = (await funded.chat()).headers["x-quota-cost"]
    after = await shown(funded, made, key="reader")
    assert after["spent_decimal"] == cost
    assert CREDIT.parse(after["remaining_decimal"]) == CREDIT.parse("5") - CREDIT.parse(cost)
    assert after["subject"]["id"].startswith("cus_")
    assert (await funded.get("/v1/budgets", key="reader"))["data"] == [after]


async def test_an_answer_is_clamped_to_what_a_budget_leaves(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 10)
    answer = await funded.chat("alice", max_tokens=16_000)
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["x-quota-clamped-max-tokens"]) < 200
    assert (await shown(funded, made))["reserved"] == 0


async def test_a_stream_ends_where_the_budget_does(funded: Office):
    await budget(funded, {"type": "customer", "id": "alice"}, 40)
    stream = await funded.chat("alice", stream=True, simulate={"tokens": 2_000})
    assert stream.status_code == 200, stream.text
    assert '"code":"budget_exceeded"' in stream.text.replace(" ", "")
    assert '"finish_reason":"length"' in stream.text.replace(" ", "")


async def test_all_budgets_on_one_subject_hold(funded: Office):
    alice = {"type": "customer", "id": "alice"}
    await budget(funded, alice, 5_000_000)
    tight = await budget(funded, alice, 0, period={"every": "day"})
    refused = await funded.chat()
    assert refused.json()["error"]["budget"] == tight["id"]


# When it is filled again.


async def test_the_next_period_begins_with_all_of_it(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 10, period={"every": "day"})
    while (await funded.chat()).status_code == 200:
        pass
    used = await shown(funded, made)
    assert used["spent"] > used["remaining"]
    ends_at = datetime.fromisoformat(used["period"]["ends_at"])
    now = datetime.now(UTC) + timedelta(microseconds=funded.clock.ahead_us)
    funded.clock.ahead_us += (ends_at - now) // timedelta(microseconds=1) + 1
    fresh = await shown(funded, made)
    assert (fresh["spent"], fresh["remaining"]) == (0, 10)
    assert fresh["period"]["starts_at"] == used["period"]["ends_at"]
    assert (await funded.chat()).status_code == 200


@pytest.mark.parametrize(
    ("period", "now", "starts_at", "ends_at"),
    [
        (
            {"every": "month", "anchor_day": 31, "time_zone": "Europe/Berlin"},
            "2031-03-15T12:00:00Z",
            "2031-02-27T23:00:00Z",
            "2031-03-30T22:00:00Z",
        ),
        (
            {"every": "month", "anchor_day": 29, "time_zone": "America/St_Johns"},
            "2031-03-01T12:00:00Z",
            "2031-02-28T03:30:00Z",
            "2031-03-29T02:30:00Z",
        ),
        (
            {"every": "month", "time_zone": "America/St_Johns"},
            "2031-11-15T12:00:00Z",
            "2031-11-01T02:30:00Z",
            "2031-12-01T03:30:00Z",
        ),
        (
            {"every": "day", "time_zone": "Europe/Berlin"},
            "2031-10-26T12:00:00Z",
            "2031-10-25T22:00:00Z",
            "2031-10-26T23:00:00Z",
        ),
    ],
)
async def test_periods_follow_the_calendar(
    funded: Office, period: dict[str, Any], now: str, starts_at: str, ends_at: str
):
    """Spent to the end in the last second of a period, and there again in the first of the next."""
    moment = datetime.fromisoformat(now)
    _move(funded, moment)
    made = await budget(funded, {"type": "customer", "id": "alice"}, 20, period=period)
    assert (made["period"]["starts_at"], made["period"]["ends_at"]) == (starts_at, ends_at)
    end = datetime.fromisoformat(ends_at)
    _move(funded, end - timedelta(seconds=60))
    assert (await funded.chat(max_tokens=100)).status_code == 200
    assert (await shown(funded, made))["spent_decimal"] != "0"
    _move(funded, end)
    after = await shown(funded, made)
    assert (after["spent_decimal"], after["period"]["starts_at"]) == ("0", ends_at)


def _move(office: Office, to: datetime) -> None:
    office.clock.ahead_us = (to - datetime.now(UTC)) // timedelta(microseconds=1)


async def test_a_budget_that_never_resets(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 0, period={"every": "never"})
    assert (made["period"]["starts_at"], made["period"]["ends_at"]) == (None, None)
    assert (await funded.chat()).json()["error"]["resets_at"] is None
    funded.clock.pass_s(400 * DAY_S)
    assert (await funded.chat()).status_code == 402


# Changing it.


async def test_a_change_of_the_amount_holds_at_once(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 5_000)
    await funded.chat()
    spent = (await shown(funded, made))["spent_decimal"]
    path = f"/v1/budgets/{made['id']}"
    lowered = await funded.ask("PATCH", path, {"credits": 0}, key="owner")
    assert lowered.status_code == 200, lowered.text
    assert (lowered.json()["credits"], lowered.json()["spent_decimal"]) == (0, spent)
    assert lowered.json()["remaining"] == 0
    assert (await funded.chat()).status_code == 402
    raised = await funded.ask("PATCH", path, {"credits": 9_000, "name": "More"}, key="owner")
    assert (raised.json()["credits"], raised.json()["name"]) == (9_000, "More")
    assert (await funded.chat()).status_code == 200


async def test_a_change_of_another_version_is_refused(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 5_000)
    path = f"/v1/budgets/{made['id']}"
    read = await funded.ask("GET", path)
    assert read.headers["etag"] == '"1"'
    first = await funded.ask("PATCH", path, {"credits": 1}, key="owner", headers={"If-Match": '"1"'})
    assert (first.status_code, first.headers["etag"], first.json()["version"]) == (200, '"2"', 2)
    again = await funded.ask("PATCH", path, {"credits": 2}, key="owner", headers={"If-Match": '"1"'})
    assert (again.status_code, again.json()["error"]["code"]) == (412, "version_mismatch")
    assert (await shown(funded, made))["credits"] == 1


async def test_an_archived_budget_stays_archived(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 0)
    for once in ("a", "a", "b", None):
        ended = await funded.post(f"/v1/budgets/{made['id']}/archive", key="owner", once=once)
        assert (ended["archived"], ended["version"]) == (True, 2)
    assert (await funded.chat()).status_code == 200


async def test_one_key_makes_one_budget(funded: Office):
    body = {"subject": {"type": "customer", "id": "alice"}, "credits": 1_000, "period": MONTH}
    made = await funded.post("/v1/budgets", body, once="k")
    assert await funded.post("/v1/budgets", body, once="k") == made
    assert await funded.refused("POST", "/v1/budgets", {**body, "credits": 2}, once="k") == (
        422,
        "idempotency_key_reused",
        None,
    )
    assert len((await funded.get("/v1/budgets"))["data"]) == 1


async def test_budgets_are_listed_newest_first(funded: Office):
    made = [await budget(funded, {"type": "customer", "id": "alice"}, number) for number in range(3)]
    page = await funded.get("/v1/budgets?limit=2")
    assert [each["id"] for each in page["data"]] == [made[2]["id"], made[1]["id"]]
    rest = await funded.get(f"/v1/budgets?limit=2&cursor={page['next_cursor']}")
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([made[0]["id"]], False)


# Thresholds.


async def test_a_threshold_raises_an_event_once(funded: Office):
    made = await budget(funded, {"type": "customer", "id": "alice"}, 20, thresholds=[1])
    for _ in range(2):
        assert (await funded.chat(max_tokens=50)).status_code == 200
    services = funded.gateway.services
    view = await services.ledger.wallet_view(limit_wallet(funded.tenant, "live", made["id"]))
    assert view is not None
    assert view.wallet.events_raised == 1


# Who may.


@pytest.mark.parametrize(
    ("subject", "key", "status"),
    [
        ({"type": "customer", "id": "alice"}, "live", 201),
        ({"type": "app"}, "live", 201),
        ({"type": "key"}, "live", 201),
        ({"type": "tenant"}, "live", 403),
        ({"type": "tenant"}, "owner", 201),
        ({"type": "tenant"}, "admin", 201),
        ({"type": "customer", "id": "alice"}, "reader", 403),
        ({"type": "app"}, "admin", 400),
        ({"type": "key"}, "admin", 400),
        ({"type": "customer"}, "live", 400),
        ({"type": "key", "id": "key_nobody"}, "live", 404),
        ({"type": "app", "id": "app_nobody"}, "live", 403),
        ({"type": "app", "id": "app_nobody"}, "owner", 404),
        ({"type": "app", "id": "\0"}, "owner", 404),
        ({"type": "customer", "id": "cus_nobody"}, "live", 404),
        ({"type": "tenant", "id": "ten_nobody"}, "owner", 400),
    ],
)
async def test_who_may_bound_whom(office: Office, subject: dict[str, Any], key: str, status: int):
    answer = await office.ask("POST", "/v1/budgets", {"subject": subject, "credits": 1, "period": MONTH}, key=key)
    assert answer.status_code == status, answer.text


async def test_another_apps_budgets_are_the_tenants(funded: Office):
    other = await funded.post("/v1/apps", {"name": "Other"}, key="owner")
    key = await funded.post("/v1/keys", {"app_id": other["id"]}, key="owner")
    for subject in ({"type": "app", "id": other["id"]}, {"type": "key", "id": key["id"]}):
        body = {"subject": subject, "credits": 1, "period": MONTH}
        assert (await funded.refused("POST", "/v1/budgets", body))[:2] == (403, "permission_denied")
        made = await funded.post("/v1/budgets", body, key="owner")
        path = f"/v1/budgets/{made['id']}"
        assert (await funded.refused("PATCH", path, {"credits": 2}))[:2] == (403, "permission_denied")
        assert (await funded.refused("POST", f"{path}/archive"))[:2] == (403, "permission_denied")
        assert (await funded.refused("GET", path, key="other"))[:2] == (404, "not_found")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"credits": -1}, "credits"),
        ({"credits": 1.5}, "credits"),
        ({"credits": 2**62}, "credits"),
        ({"period": {"every": "decade"}}, "period.every"),
        ({"period": {"every": "month", "anchor_day": 32}}, "period.anchor_day"),
        ({"period": {"every": "day", "anchor_day": 3}}, "period"),
        ({"period": {"every": "month", "anchor_weekday": 3}}, "period"),
        ({"period": {"every": "month", "time_zone": "Berlin"}}, "period"),
        ({"thresholds": [0]}, "thresholds[0]"),
        ({"thresholds": [101]}, "thresholds[0]"),
        ({"subject": {"type": "team"}}, "subject.type"),
        ({"surplus": 1}, "surplus"),
    ],
)
async def test_what_no_budget_is(office: Office, change: dict[str, Any], param: str):
    body = {"subject": {"type": "customer", "id": "alice"}, "credits": 1, "period": MONTH, **change}
    assert await office.refused("POST", "/v1/budgets", body) == (400, "invalid_request", param)


async def test_a_subject_has_only_so_many(office: Office):
    for _ in range(10):
        await budget(office, {"type": "customer", "id": "alice"}, 1)
    body = {"subject": {"type": "customer", "id": "alice"}, "credits": 1, "period": MONTH}
    assert await office.refused("POST", "/v1/budgets", body) == (400, "invalid_request", "subject")


async def test_a_subject_has_only_so_many_however_many_are_made_at_once(office: Office):
    await office.post("/v1/customers", {"external_id": "alice"})
    body = {"subject": {"type": "customer", "id": "alice"}, "credits": 1, "period": MONTH}
    answers = await asyncio.gather(*(office.ask("POST", "/v1/budgets", body) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [201] * 10 + [400] * 10


# What others ask of it.


async def test_the_least_that_is_left_is_told(funded: Office):
    services = funded.gateway.services
    alice = (await funded.get("/v1/customers/alice"))["id"]
    scope, spender = Scope(funded.tenant, "live"), Spender(funded.app, await key_id_of(funded), alice)
    assert await services.budgets.remaining(scope, spender) is None
    await budget(funded, {"type": "tenant"}, 3_000)
    await budget(funded, {"type": "customer", "id": "alice"}, 1_000)
    assert await services.budgets.remaining(scope, spender) == CREDIT.parse("1")
    cost = CREDIT.parse((await funded.chat()).headers["x-quota-cost"])
    assert await services.budgets.remaining(scope, spender) == CREDIT.parse("1") - cost


async def test_it_is_told_also_when_nothing_is_left(funded: Office):
    """A period that is used up is not one that nobody has drawn on."""
    made = await budget(funded, {"type": "customer", "id": "alice"}, 5_000)
    services = funded.gateway.services
    alice = (await funded.get("/v1/customers/alice"))["id"]
    scope, spender = Scope(funded.tenant, "live"), Spender(funded.app, await key_id_of(funded), alice)
    await funded.chat()
    await funded.ask("PATCH", f"/v1/budgets/{made['id']}", {"credits": 0}, key="owner")
    for _ in range(2):
        assert await services.budgets.remaining(scope, spender) == 0
    assert (await shown(funded, made))["spent_decimal"] != "0"


async def test_metered_usage_and_tasks_are_under_it_too(funded: Office):
    await funded.post("/v1/billable-metrics", {"key": "page"})
    price = {"billable_metric_key": "page", "cost_type": "per_unit", "unit_cost": 1_000}
    await funded.post("/v1/metering-rules", price)
    made = await budget(funded, {"type": "customer", "id": "alice"}, 5_000)
    event = {"customer_id": "alice", "billable_metric_key": "page"}
    task = {"customer_id": "alice", "billable_metric_key": "page", "estimated_units": 3}
    assert (await funded.ask("POST", "/v1/usage", {**event, "units": 2})).status_code == 202
    held = await funded.post("/v1/reservations", task)
    for path, body in (("/v1/usage", {**event, "units": 1}), ("/v1/reservations", task)):
        refused = await funded.ask("POST", path, body)
        assert refused.status_code == 402, refused.text
        error = refused.json()["error"]
        assert (error["code"], error["budget"], error["available"]) == ("budget_exceeded", made["id"], 0)
    now = await shown(funded, made)
    assert (now["spent"], now["reserved"], now["remaining"]) == (2_000, 3_000, 0)
    await funded.post(f"/v1/reservations/{held['id']}/release")
    assert (await shown(funded, made))["remaining"] == 3_000


async def test_what_a_task_will_owe_is_under_it_too(office: Office):
    """Nobody's wallet is drawn on for what is owed, so nothing but the budget bounds it."""
    await office.post("/v1/billable-metrics", {"key": "page", "overage_policy": "allow"})
    price = {"billable_metric_key": "page", "cost_type": "per_unit", "unit_cost": 1_000}
    await office.post("/v1/metering-rules", price)
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 500})
    made = await budget(office, {"type": "customer", "id": "alice"}, 5_000)
    task = {"customer_id": "alice", "billable_metric_key": "page", "estimated_units": 3}
    held = await office.post("/v1/reservations", task)
    assert held["reserved_amount"] == 500
    assert (await shown(office, made))["remaining"] == 2_000
    for path, body in (
        ("/v1/reservations", task),
        (f"/v1/reservations/{held['id']}/extend", {"units": 3}),
        ("/v1/usage", {"customer_id": "alice", "billable_metric_key": "page", "units": 3}),
    ):
        refused = (await office.ask("POST", path, body)).json()["error"]
        assert (refused["code"], refused["needed"], refused["available"]) == ("budget_exceeded", 3_000, 2_000), path
    await office.post(f"/v1/reservations/{held['id']}/extend", {"units": 2})
    assert (await shown(office, made))["remaining"] == 0
    done = await office.post(f"/v1/reservations/{held['id']}/commit", {"units": 5})
    assert (done["charged_amount"], done["balance"]) == (5_000, -4_500)
    now = await shown(office, made)
    assert (now["spent"], now["reserved"], now["remaining"]) == (5_000, 0, 0)


async def test_a_check_counts_what_a_budget_leaves(office: Office) -> None:
    await office.post("/v1/billable-metrics", {"key": "call", "name": "Call"})
    await office.post("/v1/metering-rules", {"billable_metric_key": "call", "cost_type": "per_unit", "unit_cost": 1000})
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 100_000})
    assert (await office.get("/v1/customers/alice/entitlements/call"))["affordable_units"] == 100

    own = {"subject": {"type": "customer", "id": "alice"}, "credits": 30_000, "period": {"every": "month"}}
    await office.post("/v1/budgets", own)
    checked = await office.get("/v1/customers/alice/entitlements/call?units=31")
    assert (checked["allowed"], checked["effective_balance"], checked["affordable_units"]) == (False, 30_000, 30)
    assert (checked["balance"]) == 100_000
    assert (await office.get("/v1/customers/alice/entitlements/call?units=30"))["allowed"]
