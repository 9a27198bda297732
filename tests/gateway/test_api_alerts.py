"""Low balance, from the charge to what a tenant is told: whose thresholds count, and each crossing told once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.office import Office, open_office
from tests.gateway.receiver import comes, receiving
from tests.gateway.test_api_usage import grant, meter, raised_events, use

CONFIG = "/v1/tenants/me/config"
THRESHOLDS = "low_balance_thresholds"


async def told(office: Office, customer: str = "alice") -> list[tuple[str, dict[str, Any]]]:
    """What the customer's wallet has rung, with the amounts as the ledger has them: nano-credits."""
    return [each for each in await raised_events(office, customer) if each[0] in ("credit.low", "credit.exhausted")]


async def words(office: Office, customer: str = "alice") -> list[str]:
    return [kind for kind, _ in await told(office, customer)]


async def set_thresholds(office: Office, *thresholds: int) -> Any:
    answer = await office.ask("PATCH", CONFIG, {THRESHOLDS: list(thresholds)}, key="owner")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def set_own(office: Office, thresholds: list[int] | None, customer: str = "alice") -> Any:
    answer = await office.ask("PATCH", f"/v1/customers/{customer}", {"settings": {THRESHOLDS: thresholds}})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
async def listening(tmp_path: Path) -> AsyncIterator[Office]:
    async with open_office(tmp_path, webhooks_allow_private=True) as opened:
        yield opened


async def test_a_balance_that_sinks_below_a_threshold_is_told_with_both(office: Office):
    await meter(office)
    assert (await set_thresholds(office, 1000, 5000))[THRESHOLDS] == [1000, 5000]
    await grant(office, 10)
    await use(office, 5)
    assert await told(office) == []
    await use(office, 1)
    (low,) = (await office.get("/v1/events?type=credit.low"))["data"]
    assert low["data"] == {
        "threshold": 5000,
        "threshold_decimal": "5",
        "balance": 4000,
        "balance_decimal": "4",
    }
    assert low["customer"]["external_id"] == "alice"
    assert low["credit_block"] is None
    await use(office, 4)
    assert await words(office) == ["credit.low", "credit.low", "credit.exhausted"]
    (exhausted,) = (await office.get("/v1/events?type=credit.exhausted"))["data"]
    assert exhausted["data"] == {"balance": 0, "balance_decimal": "0"}


async def test_that_nothing_is_left_is_told_without_any_setting(office: Office):
    await meter(office)
    await grant(office, 2)
    await use(office, 1)
    assert await words(office) == []
    await use(office, 1)
    assert await words(office) == ["credit.exhausted"]


async def test_each_crossing_is_told_once_and_a_top_up_arms_it_anew(office: Office):
    await meter(office)
    await set_thresholds(office, 3000)
    await grant(office, 5)
    for _ in range(2):
        for _ in range(4):
            await use(office, 1)
        await grant(office, 4)
    assert await words(office) == ["credit.low"] * 2


async def test_of_200_charges_at_once_each_threshold_is_told_once(office: Office):
    await meter(office, credits="0.05")
    await set_thresholds(office, 5000, 2500)
    await grant(office, 10)
    await asyncio.gather(*(use(office, 1) for _ in range(200)))
    assert await told(office) == [
        ("credit.low", {"threshold": 5_000_000_000, "balance": 4_950_000_000}),
        ("credit.low", {"threshold": 2_500_000_000, "balance": 2_450_000_000}),
        ("credit.exhausted", {"balance": 0}),
    ]


async def test_a_customers_own_thresholds_stand_for_the_tenants_until_they_are_null(office: Office):
    await meter(office)
    await set_thresholds(office, 9000)
    await grant(office, 10)
    assert (await set_own(office, []))["settings"][THRESHOLDS] == []
    await use(office, 2)
    assert await words(office) == []
    assert (await set_own(office, [7000]))["settings"][THRESHOLDS] == [7000]
    await use(office, 2)
    assert await words(office) == ["credit.low"]
    assert (await set_own(office, None))["settings"][THRESHOLDS] is None
    await grant(office, 3)
    await use(office, 1)
    assert [body.get("threshold") for _, body in await told(office)] == [7_000_000_000, 9_000_000_000]


async def test_a_customer_who_is_created_again_with_thresholds_has_them_at_once(office: Office):
    await meter(office)
    await grant(office, 10)
    await use(office, 1)
    await office.post("/v1/customers", {"external_id": "alice", "settings": {THRESHOLDS: [9000]}})
    await grant(office, 1)
    await use(office, 2)
    assert await words(office) == ["credit.low"]


async def test_a_threshold_that_is_raised_above_the_balance_is_told_at_the_next_crossing(office: Office):
    await meter(office)
    await grant(office, 10)
    await use(office, 1)
    await set_thresholds(office, 20_000)
    await use(office, 1)
    assert await words(office) == []
    await grant(office, 20)
    await use(office, 10)
    assert await words(office) == ["credit.low"]


async def test_a_reservation_is_not_told_and_its_charge_is(office: Office):
    await set_thresholds(office, 1000)
    await grant(office, 1)
    reserved = await office.post("/v1/reservations", {"customer_id": "alice", "credits": 900}, once="task")
    assert await words(office) == []
    await office.post(f"/v1/reservations/{reserved['id']}/commit", {"credits": 100})
    assert await words(office) == ["credit.low"]


async def test_a_proxied_request_that_crosses_is_told(office: Office):
    await set_thresholds(office, 5000)
    await grant(office, 5)
    assert (await office.chat()).status_code == 200
    assert await words(office) == ["credit.low"]


async def test_a_developers_own_wallet_is_watched_too(office: Office):
    await set_thresholds(office, 5000)
    await office.fund_developer("5")
    assert (await office.chat(user=None)).status_code == 200
    (low,) = (await office.get("/v1/events?type=credit.low"))["data"]
    assert (low["customer"], low["data"]["wallet"]) == (None, f"app:{office.app}")


async def test_modes_are_apart_and_tenants_have_their_own(office: Office):
    await set_thresholds(office, 5000)
    assert (await office.get(CONFIG, key="other"))[THRESHOLDS] == []
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 5000}, key="test")
    assert (await office.chat(key="test")).status_code == 200
    assert len((await office.get("/v1/events?type=credit.low", key="test"))["data"]) == 1
    assert (await office.get("/v1/events?type=credit.low"))["data"] == []


@pytest.mark.parametrize(
    "thresholds",
    [[1, 2, 3, 4, 5, 6], [0], [-5], [1.5], ["5000"], [5000, 5000], [2**63], 5000, [True]],
    ids=str,
)
async def test_thresholds_that_make_no_sense_are_refused(office: Office, thresholds: Any):
    await office.post("/v1/customers", {"external_id": "alice"})
    status, code, param = await office.refused("PATCH", CONFIG, {THRESHOLDS: thresholds}, key="owner")
    assert (status, code) == (400, "invalid_request")
    assert param is not None
    assert param.startswith(THRESHOLDS)
    of_customer = {"settings": {THRESHOLDS: thresholds}}
    status, code, param = await office.refused("PATCH", "/v1/customers/alice", of_customer)
    assert (status, code) == (400, "invalid_request")
    assert param is not None
    assert param.startswith(f"settings.{THRESHOLDS}")


async def test_the_other_settings_of_a_tenant_leave_them_alone(office: Office):
    await set_thresholds(office, 5000)
    answer = await office.ask("PATCH", CONFIG, {"open_allowance": 1000}, key="owner")
    assert answer.json()[THRESHOLDS] == [5000]
    assert (await set_thresholds(office))[THRESHOLDS] == []
    assert (await office.get(CONFIG, key="owner"))[THRESHOLDS] == []


async def test_a_webhook_tells_of_it_signed(listening: Office):
    await meter(listening)
    await set_thresholds(listening, 5000)
    await grant(listening, 10)
    async with receiving() as receiver:
        body = {"url": receiver.url, "event_types": ["credit.low", "credit.exhausted"]}
        endpoint = await listening.post("/v1/webhook-endpoints", body)
        await asyncio.gather(*(use(listening, 1) for _ in range(10)))
        await comes(lambda: len(receiver.received) == 2)
        events = [each.verified(endpoint["secret"]) for each in receiver.received]
    assert [(each["type"], each["data"]["balance"]) for each in events] == [
        ("credit.low", 4000),
        ("credit.exhausted", 0),
    ]
    assert receiver.received[0].customer == "alice"
