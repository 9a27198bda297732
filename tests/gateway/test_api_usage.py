"""Usage: recorded once, charged to the digit and durably, refused or owed by the metric's policy; one event or many."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlmodel import col

from gateway.app import Gateway
from gateway.database import of
from gateway.identity.wallets import customer_wallet
from ledger.commands import Freeze
from ledger.model import Scope
from ledger.store.tables import LedgerEventRow
from tests.gateway.office import Office
from tests.gateway.rig import open_store

METRICS, RULES, USAGE = "/v1/billable-metrics", "/v1/metering-rules", "/v1/usage"


async def meter(office: Office, key: str = "chat_message", *, credits: str = "1", **metric: Any) -> None:
    """A metric that costs so many credits a unit."""
    await office.post(METRICS, {"key": key, **metric})
    await office.post(RULES, {"billable_metric_key": key, "cost_type": "per_unit", "unit_cost_decimal": credits})


async def grant(office: Office, credits: int, customer: str = "alice", **more: Any) -> None:
    await office.post("/v1/topup/grant", {"customer_id": customer, "credits": credits * 1000, **more})


def event(units: Any = None, customer: str = "alice", key: str = "chat_message", **more: Any) -> dict[str, Any]:
    named = {"customer_id": customer, "billable_metric_key": key, **more}
    return named if units is None else {**named, "units": units}


async def use(office: Office, *args: Any, once: str | None = None, **more: Any) -> dict[str, Any]:
    answer = await office.ask("POST", USAGE, event(*args, **more), once=once)
    assert answer.status_code == 202, answer.text
    return answer.json()  # type: ignore[no-any-return]


async def balance(office: Office, customer: str = "alice") -> str:
    return (await office.get(f"/v1/customers/{customer}/credits"))["balance_decimal"]  # type: ignore[no-any-return]


async def raised_events(office: Office, customer: str = "alice") -> list[tuple[str, dict[str, Any]]]:
    """What the customer's wallet has raised, in order."""
    found = (await office.get(f"/v1/customers/{customer}"))["id"]
    query = (
        select(col(LedgerEventRow.type), col(LedgerEventRow.body))
        .where(col(LedgerEventRow.wallet) == customer_wallet(office.tenant, "live", found).wallet)
        .order_by(col(LedgerEventRow.sequence))
    )
    async with office.gateway.services.database.read(of(office.tenant, "live")) as connection:
        return [(kind, json.loads(body)) for kind, body in await connection.execute(query)]


# One event.


async def test_an_event_is_charged_and_the_answer_tells_what_it_cost(office: Office):
    await meter(office)
    await grant(office, 245)
    customer = await office.get("/v1/customers/alice")
    used = await use(office, 2, metadata={"conversation_id": "conv_789"})
    assert used.pop("id").startswith("req_")
    assert used == {
        "customer_id": customer["id"],
        "billable_metric_key": "chat_message",
        "units": 2,
        "credits_used": 2000,
        "credits_used_decimal": "2",
        "balance": 243_000,
        "balance_decimal": "243",
        "status": "accepted",
    }
    assert await balance(office) == "243"


async def test_units_are_one_unless_said(office: Office):
    await meter(office, credits="0.0001")
    await grant(office, 1)
    used = await use(office)
    assert (used["units"], used["credits_used"], used["credits_used_decimal"]) == (1, 0, "0.0001")
    assert (used["balance"], used["balance_decimal"]) == (999, "0.9999")
    assert (await use(office, "0.000001"))["units"] == 0.000001
    assert (await use(office, 0))["credits_used_decimal"] == "0"


@pytest.mark.parametrize("customer", ["customer_id", "end_user_id", "external_user_id"])
@pytest.mark.parametrize("metric", ["billable_metric_key", "feature_key"])
@pytest.mark.sqlite
async def test_customer_and_metric_have_synonyms(office: Office, customer: str, metric: str):
    await meter(office)
    await grant(office, 5)
    assert (await office.ask("POST", USAGE, {customer: "alice", metric: "chat_message"})).status_code == 202
    assert await balance(office) == "4"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"billable_metric_key": "chat_message"}, None),
        ({"customer_id": "a", "end_user_id": "a", "billable_metric_key": "chat_message"}, None),
        ({"customer_id": "alice"}, None),
        ({"customer_id": "alice", "billable_metric_key": "a", "feature_key": "a"}, None),
        (event(-1), "units"),
        (event("0.0000001"), "units"),
        (event(1_000_000_001), "units"),
        (event("many"), "units"),
        (event(True), "units"),
        (event(1, metadata=[]), "metadata"),
        (event(1, credits=5), "credits"),
        (event(1_000_000_000, key="dear"), "units"),
    ],
)
@pytest.mark.sqlite
async def test_events_that_are_none(office: Office, body: dict[str, Any], param: str | None):
    await meter(office)
    await meter(office, "dear", credits="1000000000")
    assert await office.refused("POST", USAGE, body) == (400, "invalid_request", param)


async def test_what_nobody_set_up_is_not_found(office: Office):
    assert await office.refused("POST", USAGE, event()) == (404, "not_found", "billable_metric_key")
    assert (await office.refused("POST", USAGE, event(customer="cus_nobody")))[:2] == (404, "not_found")


async def test_an_event_is_in_the_usage_table_and_has_a_receipt(office: Office):
    await meter(office)
    await grant(office, 5)
    rule = (await office.get(RULES))["data"][0]
    customer = (await office.get("/v1/customers/alice"))["id"]
    used = await use(office, "2.5", metadata={"conversation_id": "conv_789"})
    services = office.gateway.services
    found = await services.ledger.receipt(office.tenant, "live", used["id"])
    assert found is not None
    (row,) = found.usage
    record = row.record
    assert (record.metric, record.units, record.price_version) == (
        "chat_message",
        {"microunits": 2_500_000},
        rule["id"],
    )
    assert (record.customer_id, record.app_id, record.metadata) == (
        customer,
        office.app,
        {"conversation_id": "conv_789"},
    )
    assert record.key_id == f"key_{office.keys['live'].split('_')[2]}"
    assert (row.charges[0].base, row.charges[0].markup) == (0, 2_500_000_000)
    receipt = await office.get(f"/v1/requests/{used['id']}")
    assert {"status": "charged", "charged_decimal": "2.5", "usage_source": "reported"}.items() <= receipt.items()
    assert len(receipt["payments"]) == 1


async def test_the_statement_shows_it_and_blocks_burn_in_their_order(office: Office):
    await meter(office)
    await grant(office, 10, source="wallet")
    await grant(office, 3, source="plan", priority=10)
    await use(office, 5)
    shown = await office.get("/v1/customers/alice/credits?include_blocks=true")
    assert {block["source"]: block["remaining_amount"] for block in shown["blocks"]} == {"wallet": 8000}
    entries = (await office.get("/v1/customers/alice/transactions"))["data"]
    assert entries[0]["amount"] == -5000


async def test_a_block_for_another_metric_does_not_pay(office: Office):
    await meter(office)
    await meter(office, "plan_purchase")
    await grant(office, 10, metrics=["plan_purchase"])
    assert (await office.ask("POST", USAGE, event())).status_code == 402
    assert (await use(office, 4, key="plan_purchase"))["balance_decimal"] == "6"


# Idempotency.


async def test_one_key_is_one_event(office: Office):
    await meter(office)
    await grant(office, 10)
    first = await office.ask("POST", USAGE, event(3), once="usage:msg-1")
    assert "x-idempotent-replayed" not in first.headers
    await use(office, 1)
    in_body = event(3) | {"idempotency_key": "usage:msg-1"}
    for again in (
        await office.ask("POST", USAGE, event(3), once="usage:msg-1"),
        await office.ask("POST", USAGE, event("3.0"), once="usage:msg-1"),
        await office.ask("POST", USAGE, in_body),
    ):
        assert (again.status_code, again.json()) == (202, first.json())
        assert again.headers["x-idempotent-replayed"] == "true"
    assert await balance(office) == "6"
    other = await office.refused("POST", USAGE, event(4), once="usage:msg-1")
    assert other == (422, "idempotency_key_reused", None)


async def test_fifty_at_once_with_one_key_are_one_event(office: Office):
    await meter(office)
    await grant(office, 10)
    answers = await asyncio.gather(*(office.ask("POST", USAGE, event(3), once="one") for _ in range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.text for answer in answers}) == 1
    assert sum("x-idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert await balance(office) == "7"


async def test_a_refusal_is_not_kept_under_the_key(office: Office):
    await meter(office)
    assert (await office.refused("POST", USAGE, event(3), once="one"))[0] == 402
    await grant(office, 10)
    assert (await use(office, 3, once="one"))["balance_decimal"] == "7"


@pytest.mark.parametrize("change", ["dearer", "too dear", "archived", "unpriced"])
async def test_a_replay_is_the_first_answer_whatever_it_would_cost_by_now(office: Office, change: str):
    await meter(office)
    await grant(office, 10)
    first = await use(office, 5, once="one")
    (rule,) = (await office.get(RULES))["data"]
    if change in ("dearer", "too dear"):
        await office.ask("PATCH", f"{RULES}/{rule['id']}", {"unit_cost": 10**12 if change == "too dear" else 100_000})
        status = 400 if change == "too dear" else 402
        assert (await office.refused("POST", USAGE, event(5), once="another"))[0] == status
    else:
        await office.ask(
            "POST", f"{METRICS}/chat_message/archive" if change == "archived" else f"{RULES}/{rule['id']}/archive"
        )
        assert (await office.refused("POST", USAGE, event(5), once="another"))[0] == 404
        assert (await office.refused("POST", USAGE, event(4), once="one"))[0] == 422
    assert await use(office, 5, once="one") == first
    assert await balance(office) == "5"


async def test_a_replay_by_another_process(office: Office):
    await meter(office)
    await grant(office, 10)
    first = await use(office, 3, once="one")
    another = Gateway(office.gateway.services.settings, open_store=open_store)
    await another.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=another), base_url="http://farebox") as client:
            there = replace(office, gateway=another, client=client)
            assert await use(there, 3, once="one") == first
            assert await balance(there) == "7"
    finally:
        await another.stop()


# What the wallet cannot pay.


async def test_what_is_not_affordable_is_refused_and_nothing_is_recorded(office: Office):
    await meter(office)
    await grant(office, 2)
    answer = await office.ask("POST", USAGE, event("2.5"))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (402, "insufficient_credits")
    assert (error["needed"], error["needed_decimal"], error["available"]) == (2500, "2.5", 2000)
    assert await balance(office) == "2"
    assert len((await office.get("/v1/customers/alice/transactions"))["data"]) == 1


@pytest.mark.parametrize("policy", ["allow", "notify"])
async def test_an_overage_that_is_agreed_is_owed(office: Office, policy: str):
    await meter(office, overage_policy=policy)
    await grant(office, 2)
    assert (await use(office, 1))["balance_decimal"] == "1"
    assert (await use(office, 4))["balance_decimal"] == "-3"
    assert (await use(office, 1, once="more"))["balance"] == -4000
    assert (await use(office, 1, once="more"))["balance"] == -4000
    shown = await office.get("/v1/customers/alice/credits")
    assert (shown["balance_decimal"], shown["receivable_decimal"]) == ("-4", "4")
    await grant(office, 10)
    assert await balance(office) == "6"


@pytest.mark.parametrize(("policy", "told"), [("allow", []), ("notify", [3_000_000_000, 1_000_000_000])])
async def test_only_notify_tells_of_an_overage(office: Office, policy: str, told: list[int]):
    await meter(office, overage_policy=policy)
    await grant(office, 2)
    used = [await use(office, units) for units in (1, 4, 1)]
    raised = await raised_events(office)
    owed = [body for kind, body in raised if kind == "usage.overage"]
    assert [body["owed"] for body in owed] == told
    assert [body["request_id"] for body in owed] == [answer["id"] for answer in used[1:]][: len(told)]
    assert [kind for kind, _ in raised].count("usage.recorded") == 3


async def test_a_frozen_wallet_refuses_an_overage_too(office: Office):
    await meter(office, overage_policy="allow")
    await grant(office, 2)
    customer = (await office.get("/v1/customers/alice"))["id"]
    services = office.gateway.services
    ref = customer_wallet(office.tenant, "live", customer)
    await services.ledger.execute(
        Freeze(id=services.new_id("cmd"), scope=Scope(office.tenant, "live"), wallet=ref, frozen=True)
    )
    assert (await office.refused("POST", USAGE, event(3)))[:2] == (403, "permission_denied")


# The walk-throughs' arithmetic.


async def test_2000_small_and_60_large_tokens_use_up_500_credits(office: Office):
    for key, credits in (("small", "0.1"), ("medium", "1"), ("large", "5")):
        await meter(office, key, credits=credits)
    await grant(office, 500)
    assert (await use(office, 2000, key="small"))["credits_used"] == 200_000
    used = await use(office, 60, key="large")
    assert (used["credits_used"], used["balance"]) == (300_000, 0)
    for key in ("small", "medium", "large"):
        assert (await office.refused("POST", USAGE, event(1, key=key)))[:2] == (402, "insufficient_credits")
    assert await balance(office) == "0"


async def test_one_reply_is_four_credits(office: Office):
    await office.post(METRICS, {"key": "chat.reply", "name": "Chat reply"})
    await office.post(RULES, {"billable_metric_key": "chat.reply", "cost_type": "flat", "credit_cost": 4000})
    await grant(office, 10)
    assert (await use(office, 1, key="chat.reply"))["credits_used"] == 4000
    assert (await use(office, 9, key="chat.reply"))["balance"] == 2000


async def test_fifty_free_calls(office: Office):
    await meter(office, "call")
    await grant(office, 50, source="free")
    answers = await asyncio.gather(*(office.ask("POST", USAGE, event(key="call")) for _ in range(60)))
    assert sorted(answer.status_code for answer in answers) == [202] * 50 + [402] * 10


# Batches.


async def test_a_batch_is_answered_event_by_event(office: Office):
    await meter(office)
    await grant(office, 5)
    await grant(office, 1, "bob")
    answer = await office.ask(
        "POST",
        f"{USAGE}/batch",
        {
            "events": [
                event(3),
                event(2, "bob"),
                event(1, key="unknown"),
                event(3),
                event(2),
                event(1, "bob"),
                event(1, "cus_nobody"),
            ]
        },
    )
    assert answer.status_code == 202
    told = answer.json()
    assert (told["accepted"], told["refused"]) == (3, 4)
    assert [item["index"] for item in told["data"]] == list(range(7))
    assert [item["status"] for item in told["data"]] == [
        "accepted",
        "refused",
        "refused",
        "refused",  # Alice's are charged in their order: three are left of two.
        "accepted",
        "accepted",
        "refused",
    ]
    assert [item["balance_decimal"] for item in told["data"] if item["status"] == "accepted"] == ["2", "0", "0"]
    errors = [item["error"] for item in told["data"] if item["status"] == "refused"]
    assert [error["code"] for error in errors] == [
        "insufficient_credits",
        "not_found",
        "insufficient_credits",
        "not_found",
    ]
    assert (errors[0]["needed_decimal"], errors[0]["available_decimal"]) == ("2", "1")


async def test_an_event_of_a_batch_that_is_none_refuses_the_batch(office: Office):
    await meter(office)
    await grant(office, 5)
    for events_sent, param in (
        ([event(1), event(-1)], "events[1].units"),
        ([event(1), {"customer_id": "alice"}], "events[1]"),
        ([], "events"),
        ([event(0)] * 1001, "events"),
    ):
        refused = await office.refused("POST", f"{USAGE}/batch", {"events": events_sent})
        assert refused == (400, "invalid_request", param)
    assert await balance(office) == "5"


async def test_a_batch_that_is_sent_again_charges_nothing_more(office: Office):
    await meter(office)
    await grant(office, 100)
    body = {"events": [event(1), event(2, idempotency_key="mine"), event(3), event(1000)]}
    first = await office.ask("POST", f"{USAGE}/batch", body, once="batch-1")
    again = await office.ask("POST", f"{USAGE}/batch", body, once="batch-1")
    assert (again.status_code, again.json()) == (202, first.json())
    assert "x-idempotent-replayed" not in first.headers
    assert again.headers["x-idempotent-replayed"] == "true"
    alone = await office.ask("POST", USAGE, event(2), once="mine")
    assert alone.json()["id"] == first.json()["data"][1]["id"]
    assert await balance(office) == "94"
    other = {"events": [*body["events"], event(5)]}
    assert await office.refused("POST", f"{USAGE}/batch", other, once="batch-1") == (
        422,
        "idempotency_key_reused",
        None,
    )
    assert await balance(office) == "94"


async def test_nothing_is_recorded_of_a_batch_that_reuses_a_key_though_its_first_event_has_its_own(office: Office):
    await meter(office)
    await grant(office, 100)
    await office.ask("POST", f"{USAGE}/batch", {"events": [event(1, idempotency_key="a"), event(2)]}, once="batch-1")
    other = {"events": [event(3, idempotency_key="b"), event(4), event(5)]}
    refused = await office.refused("POST", f"{USAGE}/batch", other, once="batch-1")
    assert refused == (422, "idempotency_key_reused", None)
    assert await balance(office) == "97"


async def test_what_was_refused_of_a_batch_is_charged_when_it_is_sent_again(office: Office):
    await meter(office)
    await grant(office, 2)
    body = {"events": [event(1), event(5), event(1)]}
    first = await office.ask("POST", f"{USAGE}/batch", body, once="batch-1")
    assert (first.json()["accepted"], first.json()["refused"]) == (2, 1)
    await grant(office, 5)
    again = await office.ask("POST", f"{USAGE}/batch", body, once="batch-1")
    assert (again.json()["accepted"], again.json()["refused"]) == (3, 0)
    assert await balance(office) == "0"


async def test_a_large_batch_is_charged_as_its_events_would_be(office: Office):
    await meter(office)
    for customer in range(20):
        await grant(office, 7, f"user-{customer}")
    body = {"events": [event(1, f"user-{number % 20}") for number in range(200)]}
    told = (await office.ask("POST", f"{USAGE}/batch", body)).json()
    assert (told["accepted"], told["refused"]) == (140, 60)
    assert all(item["status"] == ("accepted" if item["index"] < 140 else "refused") for item in told["data"])
