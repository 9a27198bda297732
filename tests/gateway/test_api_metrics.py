"""Billable metrics and metering rules: set up, listed, changed and archived, and refused where they say no price."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.api.wire import time_us
from gateway.billing.catalog import Catalog, MetricNotFound, MetricNotPriced
from tests.gateway.office import Office, open_office

RULES = "/v1/metering-rules"
METRICS = "/v1/billable-metrics"


async def metered(office: Office, key: str = "chat_message", **price: Any) -> dict[str, Any]:
    """A metric with a price: what the rule looks like."""
    await office.post(METRICS, {"key": key, "name": key})
    rule: dict[str, Any] = await office.post(
        RULES, {"billable_metric_key": key, **(price or {"cost_type": "per_unit", "unit_cost": 1000})}
    )
    return rule


async def credits_for(office: Office, units: Any, key: str = "chat_message") -> str:
    """What an event of so many units is charged, in credits."""
    answer = await office.ask("POST", "/v1/usage", {"customer_id": "alice", "billable_metric_key": key, "units": units})
    assert answer.status_code == 202, answer.text
    charged: str = answer.json()["credits_used_decimal"]
    return charged


# Metrics.


async def test_a_metric_is_found_by_its_key_and_by_our_id(office: Office):
    made = await office.post(METRICS, {"key": "chat_message", "name": "Chat Message"})
    assert made["id"].startswith("mtr_")
    expected = {
        "key": "chat_message",
        "name": "Chat Message",
        "overage_policy": "block",
        "priority_max": None,
        "archived": False,
        "version": 1,
    }
    assert expected.items() <= made.items()
    for name in ("chat_message", made["id"]):
        assert await office.get(f"{METRICS}/{name}") == made


async def test_a_key_may_hold_any_printable_character(office: Office):
    made = await office.post(METRICS, {"key": "images/generate ü"})
    assert made["name"] == "images/generate ü"
    assert (await office.get(f"{METRICS}/images/generate%20ü"))["id"] == made["id"]
    archived = await office.ask("POST", f"{METRICS}/images/generate%20ü/archive")
    assert archived.json()["archived"] is True


@pytest.mark.parametrize("key", ["", " a", "a\nb", "a\x00", "x" * 129, "mtr_mine", "cus_1"])
@pytest.mark.sqlite
async def test_keys_that_are_none(office: Office, key: str):
    assert await office.refused("POST", METRICS, {"key": key}) == (400, "invalid_request", "key")


async def test_a_key_is_taken_once_whatever_became_of_its_metric(office: Office):
    await office.post(METRICS, {"key": "chat_message"})
    assert await office.refused("POST", METRICS, {"key": "chat_message"}) == (409, "already_exists", "key")
    await office.ask("POST", f"{METRICS}/chat_message/archive")
    assert await office.refused("POST", METRICS, {"key": "chat_message"}) == (409, "already_exists", "key")
    made = await office.post(METRICS, {"key": "chat_message"}, key="test")
    assert made["id"] != (await office.get(f"{METRICS}/chat_message"))["id"]


async def test_one_idempotency_key_makes_one_metric_and_one_rule(office: Office):
    rule = {"billable_metric_key": "chat", "cost_type": "flat", "credit_cost": 4000}
    for path, body, other in (
        (METRICS, {"key": "chat"}, {"key": "chats"}),
        (RULES, rule, rule | {"credit_cost": 4001}),
    ):
        first, *again = [await office.ask("POST", path, body, once="set-up") for _ in range(3)]
        assert "x-idempotent-replayed" not in first.headers
        for answer in again:
            assert (answer.status_code, answer.json()) == (201, first.json())
            assert answer.headers["x-idempotent-replayed"] == "true"
            assert answer.headers["etag"] == first.headers["etag"] == '"1"'
        assert await office.refused("POST", path, other, once="set-up") == (422, "idempotency_key_reused", None)
        assert len((await office.get(path))["data"]) == 1


async def test_a_metric_is_changed_on_the_version_that_was_seen(office: Office):
    await office.post(METRICS, {"key": "chat", "priority_max": 3})
    seen = (await office.ask("GET", f"{METRICS}/chat")).headers["etag"]
    changed = await office.ask(
        "PATCH", f"{METRICS}/chat", {"overage_policy": "notify", "priority_max": None}, headers={"If-Match": seen}
    )
    expected = {"overage_policy": "notify", "priority_max": None, "name": "chat", "version": 2}
    assert expected.items() <= changed.json().items()
    assert changed.headers["etag"] == '"2"'
    late = await office.refused("PATCH", f"{METRICS}/chat", {"name": "Late"}, headers={"If-Match": seen})
    assert late == (412, "version_mismatch", "If-Match")
    same = await office.ask("PATCH", f"{METRICS}/chat", {"overage_policy": "notify"})
    assert same.json() == changed.json()
    assert (await office.ask("PATCH", f"{METRICS}/chat", {"name": "Chats"})).json()["version"] == 3


@pytest.mark.sqlite
async def test_what_cannot_be_changed(office: Office):
    await office.post(METRICS, {"key": "chat"})
    for body, param in (
        ({"key": "other"}, "key"),
        ({"overage_policy": "sometimes"}, "overage_policy"),
        ({"priority_max": 10**7}, "priority_max"),
        ({"name": ""}, "name"),
    ):
        assert await office.refused("PATCH", f"{METRICS}/chat", body) == (400, "invalid_request", param)
    assert (await office.refused("PATCH", f"{METRICS}/nothing", {"name": "x"}))[:2] == (404, "not_found")


async def test_metrics_are_listed_newest_first_page_by_page(office: Office):
    for number in range(5):
        await office.post(METRICS, {"key": f"metric-{number}"})
    await office.ask("POST", f"{METRICS}/metric-4/archive")
    seen, cursor = [], ""
    while cursor is not None:
        page = await office.get(f"{METRICS}?limit=2{cursor and f'&cursor={cursor}'}")
        seen += [metric["key"] for metric in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
    assert seen == [f"metric-{number}" for number in (4, 3, 2, 1, 0)]
    assert len((await office.get(f"{METRICS}?archived=false"))["data"]) == 4


async def test_what_is_archived_is_metered_no_more_until_it_is_brought_back(office: Office):
    await metered(office)
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 10_000})
    assert await credits_for(office, 1) == "1"
    for _ in range(2):
        assert (await office.ask("POST", f"{METRICS}/chat_message/archive")).json()["version"] == 2
    usage = {"customer_id": "alice", "billable_metric_key": "chat_message"}
    assert await office.refused("POST", "/v1/usage", usage) == (404, "not_found", "billable_metric_key")
    rule = {"billable_metric_key": "chat_message", "cost_type": "flat", "credit_cost": 1}
    assert (await office.refused("POST", RULES, rule))[:2] == (404, "not_found")
    await office.ask("PATCH", f"{METRICS}/chat_message", {"archived": False})
    assert await credits_for(office, 1) == "1"


async def test_archiving_takes_an_idempotency_key(office: Office):
    rule = await metered(office)
    for path in (f"{RULES}/{rule['id']}/archive", f"{METRICS}/chat_message/archive"):
        first, again = [await office.ask("POST", path, once="away") for _ in range(2)]
        assert first.json()["archived"] is True
        assert (again.json(), again.headers["x-idempotent-replayed"]) == (first.json(), "true")


# Metering rules.


async def test_the_companion_apps_rule(office: Office):
    rule = await metered(office, cost_type="per_unit", credit_cost=1000, unit_cost=1000)
    assert rule["id"].startswith("rul_")
    expected = {
        "billable_metric_key": "chat_message",
        "version": 1,
        "cost_type": "per_unit",
        "credit_cost": 1000,
        "unit_cost": 1000,
        "unit_cost_decimal": "1",
        "tiers": None,
        "archived": False,
    }
    assert expected.items() <= rule.items()
    assert await office.get(f"{RULES}/{rule['id']}") == rule


@pytest.mark.parametrize(
    ("price", "units", "charged"),
    [
        ({"cost_type": "per_unit", "unit_cost": 100}, 2000, "200"),
        ({"cost_type": "per_unit", "unit_cost": "0.12"}, 7, "0.00084"),
        ({"cost_type": "per_unit", "unit_cost": 0.12}, 7, "0.00084"),
        ({"cost_type": "per_unit", "unit_cost_decimal": "0.00012"}, 7, "0.00084"),
        ({"cost_type": "per_unit", "unit_cost_decimal": "0.00012", "credit_cost": 0.12}, 7, "0.00084"),
        ({"cost_type": "per_unit", "unit_cost": 1000}, "2.5", "2.5"),
        ({"cost_type": "flat", "credit_cost": 4000}, 17, "4"),
        ({"cost_type": "package", "package_size": 1000, "package_cost": 2000}, 1001, "4"),
        ({"cost_type": "package", "package_size": "0.5", "package_cost_decimal": "2"}, 0.6, "4"),
        (
            {
                "cost_type": "graduated",
                "tiers": [
                    {"up_to": 10, "unit_cost": 1000},
                    {"up_to": "20.5", "unit_cost": 500, "flat_cost": 3000},
                    {"up_to": None, "unit_cost_decimal": "0.1"},
                ],
            },
            30.5,
            "19.25",
        ),
        (
            {
                "cost_type": "tiered",
                "tier_mode": "volume",
                "tiers": [{"up_to": 10, "unit_cost": 1000}, {"up_to": None, "unit_cost": 500, "flat_cost": 7}],
            },
            11,
            "5.507",
        ),
    ],
)
@pytest.mark.sqlite
async def test_every_kind_of_price_to_the_digit(office: Office, price: dict[str, Any], units: Any, charged: str):
    rule = await metered(office, **price)
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1_000_000})
    assert await credits_for(office, units) == charged
    # What a rule looks like is a rule again, and of the same price.
    shown = {name: value for name, value in rule.items() if value is not None and name not in STAMPS}
    again = await office.post(RULES, {"billable_metric_key": "chat_message", **shown})
    assert {name: again[name] for name in shown} == shown
    assert await credits_for(office, units) == charged


STAMPS = ("id", "billable_metric_id", "billable_metric_key", "version", "effective_from", "archived", "created_at")


@pytest.mark.parametrize(
    ("price", "param"),
    [
        ({"cost_type": "per_unit"}, "unit_cost"),
        ({"cost_type": "per_unit", "unit_cost": 1000, "credit_cost": 999}, "unit_cost"),
        ({"cost_type": "per_unit", "unit_cost": 1000, "unit_cost_decimal": "1.001"}, "unit_cost"),
        ({"cost_type": "per_unit", "unit_cost": -1}, "unit_cost"),
        ({"cost_type": "per_unit", "unit_cost": "1e3"}, "unit_cost"),
        ({"cost_type": "per_unit", "unit_cost": "0.0000000001"}, "unit_cost"),
        ({"cost_type": "per_unit", "unit_cost": "1000000000001"}, "unit_cost"),
        ({"cost_type": "per_unit", "unit_cost": 1, "tiers": [{"up_to": None, "unit_cost": 1}]}, "tiers"),
        ({"cost_type": "flat", "credit_cost": 1, "package_size": 1}, "package_size"),
        ({"cost_type": "package", "package_size": 10}, "package_cost"),
        ({"cost_type": "package", "package_cost": 10}, "package_size"),
        ({"cost_type": "package", "package_cost": 10, "package_size": 0}, "package_size"),
        ({"cost_type": "package", "package_cost": 10, "package_size": "0.0000001"}, "package_size"),
        ({"cost_type": "volume"}, "tiers"),
        ({"cost_type": "volume", "tiers": []}, "tiers"),
        ({"cost_type": "volume", "tiers": [{"up_to": 5, "unit_cost": 1}]}, "tiers"),
        ({"cost_type": "volume", "tiers": [{"up_to": None}]}, "tiers[0]"),
        ({"cost_type": "volume", "tiers": [{"up_to": None, "unit_cost": 1}] * 101}, "tiers"),
        ({"cost_type": "volume", "tier_mode": "graduated", "tiers": [{"up_to": None, "unit_cost": 1}]}, "tier_mode"),
        ({"cost_type": "tiered", "tiers": [{"up_to": None, "unit_cost": 1}]}, "tier_mode"),
        ({"cost_type": "free"}, "cost_type"),
        ({"cost_type": "flat", "credit_cost": 1, "effective_from": "2020-01-01T00:00:00Z"}, "effective_from"),
        ({"cost_type": "flat", "credit_costs": 1}, "credit_costs"),
    ],
)
@pytest.mark.sqlite
async def test_what_says_no_price(office: Office, price: dict[str, Any], param: str):
    await office.post(METRICS, {"key": "chat"})
    refused = await office.refused("POST", RULES, {"billable_metric_key": "chat", **price})
    assert refused == (400, "invalid_request", param)


async def test_a_rule_needs_its_metric(office: Office):
    rule = {"billable_metric_key": "nothing", "cost_type": "flat", "credit_cost": 1}
    assert await office.refused("POST", RULES, rule) == (404, "not_found", "billable_metric_key")
    assert (await office.refused("GET", f"{RULES}/rul_nothing"))[:2] == (404, "not_found")
    assert (await office.refused("GET", f"{RULES}?billable_metric_key=nothing"))[:2] == (404, "not_found")


async def test_a_changed_price_is_a_further_version_and_holds_at_once(office: Office):
    first = await metered(office)
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 100_000})
    assert await credits_for(office, 1) == "1"
    second = await office.ask(
        "PATCH", f"{RULES}/{first['id']}", {"unit_cost": 1500}, headers={"If-Match": '"1"'}, once="raise"
    )
    assert second.status_code == 201
    assert second.json()["id"] != first["id"]
    assert {"version": 2, "cost_type": "per_unit", "unit_cost": 1500}.items() <= second.json().items()
    assert await credits_for(office, 1) == "1.5"
    late = await office.refused("PATCH", f"{RULES}/{first['id']}", {"unit_cost": 9}, headers={"If-Match": '"1"'})
    assert late == (412, "version_mismatch", "If-Match")
    again = await office.ask(
        "PATCH", f"{RULES}/{first['id']}", {"unit_cost": 1500}, headers={"If-Match": '"1"'}, once="raise"
    )
    assert (again.json(), again.headers["x-idempotent-replayed"]) == (second.json(), "true")
    listed = (await office.get(f"{RULES}?billable_metric_key=chat_message"))["data"]
    assert [rule["version"] for rule in listed] == [2, 1]
    assert listed[1] == first


async def test_a_scheduled_price_takes_effect_at_its_time_and_can_be_called_off(office: Office):
    await metered(office)
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 100_000})
    later = {"billable_metric_key": "chat_message", "cost_type": "per_unit", "unit_cost": 2000}
    scheduled = await office.post(RULES, later | {"effective_from": "2096-01-01T00:00:00Z"})
    assert scheduled["effective_from"] == "2096-01-01T00:00:00Z"
    assert await credits_for(office, 1) == "1"
    office.clock.pass_s(75 * 366 * 86_400)
    assert await credits_for(office, 1) == "2"
    for _ in range(2):
        assert (await office.ask("POST", f"{RULES}/{scheduled['id']}/archive")).json()["archived"] is True
    assert await credits_for(office, 1) == "1"


async def test_a_scheduled_price_is_repeated_as_it_was_when_its_time_has_come(office: Office):
    await metered(office)
    later = {"cost_type": "per_unit", "unit_cost": 2000, "effective_from": "2096-01-01T00:00:00Z"}
    made = await office.ask("POST", RULES, {"billable_metric_key": "chat_message", **later}, once="one")
    revised = await office.ask("PATCH", f"{RULES}/{made.json()['id']}", later, once="two")
    office.clock.pass_s(75 * 366 * 86_400)
    again = await office.ask("POST", RULES, {"billable_metric_key": "chat_message", **later}, once="one")
    assert (again.status_code, again.json()) == (201, made.json())
    again = await office.ask("PATCH", f"{RULES}/{made.json()['id']}", later, once="two")
    assert (again.status_code, again.json()) == (201, revised.json())
    new = {"billable_metric_key": "chat_message", **later}
    assert await office.refused("POST", RULES, new, once="three") == (400, "invalid_request", "effective_from")


async def test_a_metric_without_a_rule_in_force_is_not_metered(office: Office):
    await office.post(METRICS, {"key": "chat_message"})
    usage = {"customer_id": "alice", "billable_metric_key": "chat_message"}
    answer = await office.ask("POST", "/v1/usage", usage)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "billable_metric_key")
    assert "POST /v1/metering-rules" in answer.json()["error"]["message"]
    rule = await metered(office, "other")
    await office.ask("POST", f"{RULES}/{rule['id']}/archive")
    assert (await office.refused("POST", "/v1/usage", usage | {"billable_metric_key": "other"}))[0] == 404


async def test_versions_that_come_at_once_are_counted_without_a_gap(office: Office):
    await metered(office)
    price = {"billable_metric_key": "chat_message", "cost_type": "per_unit"}
    made = await asyncio.gather(*(office.post(RULES, {**price, "unit_cost": number}) for number in range(10)))
    assert sorted(rule["version"] for rule in made) == list(range(2, 12))


async def test_who_may_set_prices(office: Office):
    await metered(office)
    assert (await office.refused("POST", METRICS, {"key": "x"}, key="reader"))[1] == "permission_denied"
    assert (await office.refused("PATCH", f"{METRICS}/chat_message", {"name": "x"}, key="reader"))[0] == 403
    assert (await office.get(METRICS, key="reader"))["data"]
    assert (await office.get(METRICS, key="test"))["data"] == []
    assert (await office.refused("GET", f"{METRICS}/chat_message", key="other"))[0] == 404


# What processes remember.


async def test_a_price_is_asked_for_once_a_lease_and_at_once_after_a_change(tmp_path: Path):
    async with open_office(tmp_path) as office:
        await metered(office)
        services, now_s = office.gateway.services, [0.0]
        catalog = Catalog(services.database, monotonic_s=lambda: now_s[0])

        async def price() -> str:
            at_us = services.now_us()
            found = await catalog.priced(office.tenant, "live", "chat_message", at_us=at_us)
            return found.price_version

        first = await price()
        second = (await office.ask("PATCH", f"{RULES}/{first}", {"unit_cost": 1})).json()["id"]
        assert await price() == first  # Another process changed it: this one has not heard.
        now_s[0] = 1.0
        assert await price() == second
        third = (await office.ask("PATCH", f"{RULES}/{second}", {"unit_cost": 2})).json()["id"]
        catalog.invalidate()
        assert await price() == third


async def test_a_lease_ends_at_the_instant_at_which_the_next_price_takes_effect(tmp_path: Path):
    async with open_office(tmp_path) as office:
        await metered(office)
        later = {"billable_metric_key": "chat_message", "cost_type": "per_unit", "unit_cost": 2000}
        second = await office.post(RULES, later | {"effective_from": "2096-01-01T00:00:00Z"})
        catalog = Catalog(office.gateway.services.database, monotonic_s=lambda: 0.0)
        instant_us = time_us(datetime(2096, 1, 1, tzinfo=UTC))
        for at_us, expected in ((instant_us - 1, False), (instant_us, True), (instant_us - 1, False)):
            found = await catalog.priced(office.tenant, "live", "chat_message", at_us=at_us)
            assert (found.price_version == second["id"]) is expected, at_us


async def test_what_is_not_there_is_remembered_too(tmp_path: Path):
    async with open_office(tmp_path) as office:
        services, now_s = office.gateway.services, [0.0]
        catalog = Catalog(services.database, monotonic_s=lambda: now_s[0])

        async def price() -> Any:
            return await catalog.priced(office.tenant, "live", "chat_message", at_us=services.now_us())

        with pytest.raises(MetricNotFound):
            await price()
        await office.post(METRICS, {"key": "chat_message"})
        with pytest.raises(MetricNotFound):
            await price()
        now_s[0] = 1.0
        with pytest.raises(MetricNotPriced):
            await price()
