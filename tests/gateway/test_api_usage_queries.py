"""What was used, as a tenant's server asks for it."""

import asyncio
import functools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.billing.rollups import Rollups
from gateway.billing.usage_facts import DAY_US, HOUR_US
from ledger.model import Scope
from tests.gateway.office import Office, open_office
from tests.gateway.usage_events import MONDAY_US, commit, plain, waiting

MONDAY = "2023-11-13"
PERIOD = f"from={MONDAY}&to=2023-11-16"
"""The three days from MONDAY_US on."""


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The office's gateway adds nothing up by itself before these tests are over."""
    monkeypatch.setattr("gateway.app.Rollups", functools.partial(Rollups, pause_s=3600))


@pytest.fixture
async def office(by_hand: None, tmp_path: Path) -> AsyncIterator[Office]:
    async with open_office(tmp_path) as opened:
        yield opened


async def used(office: Office, query: str, **options: Any) -> list[dict[str, Any]]:
    """All pages."""
    rows: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await office.get(f"/v1/usage?{query}{cursor}", **options)
        rows += page["data"]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if not page["has_more"]:
            return rows
        cursor = f"&cursor={page['next_cursor']}"


async def charge(office: Office, *fields: dict[str, Any], mode: str = "live") -> None:
    scope = Scope(office.tenant, mode)
    await commit(office.gateway.services.database, *(plain(n, scope=scope, **each) for n, each in enumerate(fields)))


async def fold(office: Office) -> None:
    rollups = Rollups(office.gateway.services.database)
    while await rollups.fold():
        pass


async def test_a_charge_is_in_the_answer_as_soon_as_it_is_made(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 5_000_000})
    answer = await office.chat()
    receipt = await office.get(f"/v1/requests/{answer.headers['x-request-id']}")
    (row,) = await used(office, "group_by=day,model,customer")
    customer = (await office.get("/v1/customers?external_id=alice"))["data"][0]["id"]
    today = datetime.now(UTC).date()
    assert row["group"].pop("day") in (str(today), str(today - timedelta(days=1)))
    assert row == {
        "group": {"model": "gpt-4o-mini", "customer": customer},
        "events": 1,
        "units": 0,
        "units_decimal": "0",
        "credits_used": receipt["charged"],
        "credits_used_decimal": receipt["charged_decimal"],
        "input_tokens": receipt["usage"]["input"],
        "output_tokens": receipt["usage"]["output"],
    }
    before = await used(office, "group_by=model")
    await fold(office)
    assert await used(office, "group_by=model") == before


async def test_groups_filters_and_their_synonyms(office: Office):
    await charge(
        office,
        {"customer": "cus_a", "metric": "chat", "metadata": {"companion": "c42"}},
        {"customer": "cus_a", "metric": "chat", "at_us": MONDAY_US + DAY_US, "units": {"microunits": 500_000}},
        {"customer": None, "metric": "image", "metadata": {"companion": "c42"}},
    )
    for _ in range(2):
        by_day = await used(office, f"group_by=day,metric&{PERIOD}")
        assert [(row["group"], row["events"], row["units"], row["units_decimal"]) for row in by_day] == [
            ({"day": MONDAY, "metric": "chat"}, 1, 1, "1"),
            ({"day": MONDAY, "metric": "image"}, 1, 1, "1"),
            ({"day": "2023-11-14", "metric": "chat"}, 1, 0.5, "0.5"),
        ]
        by_customer = await used(office, f"group_by=customer&{PERIOD}")
        assert [(row["group"]["customer"], row["credits_used"]) for row in by_customer] == [
            (None, 1000),
            ("cus_a", 2000),
        ]
        by_key = await used(office, f"group_by=metadata.companion&{PERIOD}")
        assert [(row["group"], row["events"]) for row in by_key] == [({"metadata.companion": "c42"}, 2)]
        both = await used(office, f"group_by=customer,metadata.companion&{PERIOD}")
        assert [row["group"]["customer"] for row in both] == [None, "cus_a"]
        for synonym in ("billable_metric_key", "feature_key"):
            assert [row["group"]["day"] for row in await used(office, f"{synonym}=image&{PERIOD}")] == [MONDAY]
        await fold(office)


async def test_a_customer_is_named_by_either_id(office: Office):
    made = await office.post("/v1/customers", {"external_id": "alice"})
    await charge(office, {"customer": made["id"]}, {"customer": "cus_other"})
    for name in (f"customer_id={made['id']}", "customer_id=alice", "end_user_id=alice", "external_user_id=alice"):
        (row,) = await used(office, f"{name}&{PERIOD}")
        assert row["events"] == 1
    assert await office.refused("GET", f"/v1/usage?customer_id=nobody&{PERIOD}") == (404, "not_found", None)
    assert (await office.get("/v1/customers?external_id=nobody"))["data"] == [], "asking makes no customer"


async def test_a_period_begins_with_its_first_moment_and_ends_before_its_last(office: Office):
    await charge(office, *({"at_us": MONDAY_US + offset} for offset in (0, HOUR_US, HOUR_US + 1, DAY_US)))
    for _ in range(2):
        for period, events in (
            (f"from={MONDAY}&to=2023-11-14", 3),
            (f"from={MONDAY}T01:00:00Z&to=2023-11-14T00:00:00.000001Z", 3),
            (f"from={MONDAY}T01:00:00Z&to={MONDAY}T01:00:00.000001Z", 1),
            (f"from={MONDAY}T02:00:00%2B01:00&to={MONDAY}T02:00:00+00:00", 2),
            (f"from={MONDAY}", 4),
            ("to=2023-11-14", 3),
            ("", 0),
        ):
            assert sum(row["events"] for row in await used(office, f"group_by=app&{period}")) == events, period
        await fold(office)


async def test_pages_have_every_group_once(office: Office):
    await charge(
        office,
        *(
            {"customer": f"cus_{n % 7}", "metadata": {"k": f"v{n % 5}"}, "at_us": MONDAY_US + n * HOUR_US}
            for n in range(60)
        ),
    )
    for _ in range(2):
        for groups in ("customer", "metadata.k", "day,customer", "day,metadata.k", "day"):
            whole = await used(office, f"group_by={groups}&{PERIOD}&limit=200")
            for limit in (1, 2, 3):
                assert await used(office, f"group_by={groups}&{PERIOD}&limit={limit}") == whole
            assert sum(row["events"] for row in whole) == 60
        await fold(office)


async def test_only_admin_sees_cost_margin_and_the_usage_of_other_apps(office: Office):
    fields = {"charged": 3 * 10**9, "markup": 10**9, "provider_cost_nanos": 1_500}
    await charge(office, {"app": office.app, **fields}, {"app": "app_another", **fields}, {"app": None, **fields})
    plainly = await used(office, f"group_by=app&{PERIOD}")
    assert [row["group"]["app"] for row in plainly] == [None, office.app]
    assert not any("margin" in row for row in plainly)
    fully = await used(office, f"group_by=app&{PERIOD}", key="owner")
    assert {row["group"]["app"] for row in fully} == {None, office.app, "app_another"}
    assert fully[0]["margin"] == {"provider_cost_usd": "0.0000015", "base_decimal": "2", "markup_decimal": "1"}
    assert fully[0]["credits_used_decimal"] == "3"


async def test_a_key_sees_its_own_mode_and_tenant(office: Office):
    await charge(office, {}, {})
    await charge(office, {}, mode="test")
    for key, events in (("live", [2]), ("test", [1]), ("reader", [2]), ("admin", [2]), ("other", [])):
        assert [row["events"] for row in await used(office, PERIOD, key=key)] == events, key
    assert [row["events"] for row in await used(office, f"{PERIOD}&mode=test", key="admin")] == [1]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=week", "group_by"),
        ("group_by=", "group_by"),
        ("group_by=day,day", "group_by"),
        ("group_by=day,metric,model,app", "group_by"),
        ("group_by=metadata.", "group_by"),
        ("group_by=metadata.a,metadata.b", "group_by"),
        (f"group_by=metadata.{'k' * 129}", "group_by"),
        ("from=yesterday", "from"),
        ("from=2023-11-13T00:00:00", "from"),
        ("from=1700000000", "from"),
        ("from=2023-11-14&to=2023-11-14", "from"),
        ("to=9999-01-01", "to"),
        ("limit=0", "limit"),
        ("cursor=!", "cursor"),
        ("cursor=W10", "cursor"),
        ("cursor=WyJhIl0", "cursor"),
        ("group_by=metric&cursor=WyJhXHUwMDAwIl0", "cursor"),
        ("cursor=WzE4NDQ2NzQ0MDczNzA5NTUxNjE2XQ", "cursor"),
        ("customer_id=a&end_user_id=a", "end_user_id"),
        ("billable_metric_key=a&feature_key=a", "feature_key"),
    ],
)
async def test_what_cannot_be_asked_is_refused_with_its_place(office: Office, query: str, param: str):
    assert await office.refused("GET", f"/v1/usage?{query}") == (400, "invalid_request", param)


async def test_what_is_too_much_for_one_question_is_said_with_what_to_do(
    office: Office, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gateway.billing.usage_statement.RAW_ROWS_MAX", 1)
    monkeypatch.setattr("gateway.billing.usage_queries.RAW_ROWS_MAX", 1)
    await charge(office, {}, {}, {})
    behind = await office.ask("GET", f"/v1/usage?{PERIOD}")
    assert (behind.status_code, behind.headers["retry-after"]) == (503, "5")
    await fold(office)
    assert await office.refused("GET", f"/v1/usage?from={MONDAY}T00:00:00.000001Z") == (400, "invalid_request", "from")
    (row,) = await used(office, PERIOD)
    assert row["events"] == 3


async def test_a_gateway_adds_up_what_it_charges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gateway.app.Rollups", functools.partial(Rollups, pause_s=0.01))
    async with open_office(tmp_path) as office:
        await charge(office, {}, {})
        async with asyncio.timeout(20):
            while True:
                if not await waiting(office.gateway.services.database, Scope(office.tenant, "live")):
                    break
                await asyncio.sleep(0.01)
        (row,) = await used(office, PERIOD)
        assert row["events"] == 2
