"""Reservations for tasks outside the proxy: held, extended, committed in parts, released, abandoned."""

import asyncio
from typing import Any

import pytest

from gateway.clock import time_text
from ledger.model import ReservationRef, ReservationState
from tests.gateway.office import Office

IMAGE = {"billable_metric_key": "image", "estimated_units": 4}
"""At a credit an image."""


async def metric(office: Office, key: str = "image", **fields: Any) -> None:
    await office.post("/v1/billable-metrics", {"key": key, "name": key, **fields})
    await price(office, 1000, key)


async def price(office: Office, unit_cost: int, key: str = "image") -> None:
    rule = {"billable_metric_key": key, "cost_type": "per_unit", "unit_cost": unit_cost, "credit_cost": unit_cost}
    await office.post("/v1/metering-rules", rule)


async def grant(office: Office, credits: int, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = await office.post("/v1/topup/grant", {"customer_id": "ann", "credits": credits, **fields})
    return made


async def reserve(office: Office, once: str | None = None, **fields: Any) -> dict[str, Any]:
    body = {"customer_id": "ann", **(fields or IMAGE)}
    made: dict[str, Any] = await office.post("/v1/reservations", body, once=once)
    return made


async def credits(office: Office) -> tuple[int, int, int]:
    """Balance, what could be had now, and what is reserved."""
    view = await office.get("/v1/customers/ann/credits")
    return view["balance"], view["effective_balance"], view["reserved"]


def path(made: dict[str, Any], verb: str = "") -> str:
    return f"/v1/reservations/{made['id']}{verb and '/' + verb}"


async def test_an_estimate_is_held_and_what_the_task_took_is_charged(office: Office):
    await metric(office)
    await grant(office, 10_000)

    made = await reserve(office, metadata={"job": "j1"}, **IMAGE)

    assert made["id"].startswith("rsv_")
    assert (made["status"], made["reserved_amount"], made["reserved_amount_decimal"]) == ("active", 4000, "4")
    assert (made["billable_metric_key"], made["estimated_units"]) == ("image", 4)
    assert await credits(office) == (10_000, 6000, 4000)
    assert await office.get(path(made)) == made

    done = await office.post(path(made, "commit"), {"units": 2.5})

    assert (done["status"], done["charged_amount"], done["reserved_amount"]) == ("committed", 2500, 0)
    assert (done["uncovered_amount"], done["balance"], done["late"]) == (0, 7500, False)
    assert await credits(office) == (7500, 7500, 0)
    now = await office.get(path(made))
    assert (now["status"], now["charged_amount"], now["reserved_amount"]) == ("committed", 2500, 0)
    assert now["settled_at"] is not None


async def test_the_receipt_and_the_statement_tell_of_the_task(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office, metadata={"job": "j1"}, **IMAGE)
    assert (await office.get(f"/v1/requests/{made['request_id']}"))["status"] == "in_progress"
    done = await office.post(path(made, "commit"), {"units": 2.5})

    receipt = await office.get(f"/v1/requests/{done['request_id']}")

    assert (receipt["status"], receipt["metric"], receipt["units"]) == ("charged", "image", "2.5")
    assert (receipt["charged"], receipt["reserved_decimal"], receipt["usage"]) == (2500, "4", {})
    assert receipt["customer_id"] == made["customer_id"]
    charged = (await office.get("/v1/customers/ann/transactions"))["data"][0]
    assert (charged["type"], charged["amount"], charged["metric"]) == ("charge", -2500, "image")
    assert (charged["request_id"], charged["reference"]) == (made["request_id"], made["id"])
    refund = await office.post(f"/v1/requests/{made['request_id']}/refund", {"credits": 500})
    assert (refund["refunded"], refund["balance"]) == (500, 8000)


async def test_credits_can_be_held_without_a_metric_and_are_committed_in_credits(office: Office):
    await grant(office, 10_000)
    made = await office.post("/v1/reserve", {"end_user_id": "ann", "credits": 2500})
    assert (made["billable_metric_key"], made["estimated_units"]) == (None, None)
    assert await office.refused("POST", path(made, "commit"), {"units": 1}) == (400, "invalid_request", "units")
    assert await office.refused("POST", path(made, "extend"), {"units": 1}) == (400, "invalid_request", "units")
    done = await office.post(path(made, "commit"), {"credits": 300})
    assert (done["charged_amount"], done["balance"]) == (300, 9700)


async def test_what_cannot_be_held_is_refused_and_nothing_is_held(office: Office):
    await metric(office)
    await grant(office, 3999)
    answer = await office.ask("POST", "/v1/reservations", {"customer_id": "ann", **IMAGE})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (402, "insufficient_credits")
    assert (error["needed"], error["available"]) == (4000, 3999)
    assert await credits(office) == (3999, 3999, 0)


async def test_partial_commits_add_up_and_the_last_one_frees_the_rest(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office)
    first = await office.post(path(made, "commit"), {"units": 1, "final": False})
    second = await office.post(path(made, "commit"), {"credits": 500, "final": False})
    assert [(part["status"], part["charged_amount"], part["reserved_amount"]) for part in (first, second)] == [
        ("active", 1000, 3000),
        ("active", 1500, 2500),
    ]
    assert await credits(office) == (8500, 6000, 2500)
    last = await office.post(path(made, "commit"), {"units": 1})
    assert (last["status"], last["charged_amount"], last["reserved_amount"]) == ("committed", 2500, 0)
    assert await credits(office) == (7500, 7500, 0)
    assert (await office.get(f"/v1/requests/{made['request_id']}"))["units"] == "2"


async def test_a_released_reservation_charges_nothing_more(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office)
    await office.post(path(made, "commit"), {"units": 1, "final": False})
    released = await office.post(path(made, "release"))
    assert (released["status"], released["charged_amount"], released["balance"]) == ("released", 1000, 9000)
    assert await office.post(path(made, "release")) == released
    assert await credits(office) == (9000, 9000, 0)
    for verb, body in (("commit", {"units": 1}), ("extend", {"ttl_seconds": 60})):
        answer = await office.ask("POST", path(made, verb), body)
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "reservation_settled"
        assert answer.json()["error"]["state"] == "released"
    assert (await office.get(f"/v1/requests/{made['request_id']}"))["status"] == "charged"


async def test_more_than_was_held_draws_on_what_is_free_and_never_on_anothers_hold(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made, other = await reserve(office), await reserve(office)
    done = await office.post(path(made, "commit"), {"units": 5})
    assert (done["charged_amount"], done["uncovered_amount"], done["balance"]) == (5000, 0, 5000)
    assert await credits(office) == (5000, 1000, 4000)
    assert (await office.post(path(other, "commit"), {"units": 4}))["charged_amount"] == 4000


async def test_what_nobody_can_pay_is_neither_owed_nor_the_operators_loss(office: Office):
    await metric(office)
    await grant(office, 5000)
    made = await reserve(office)
    done = await office.post(path(made, "commit"), {"units": 7})
    assert (done["status"], done["charged_amount"], done["uncovered_amount"]) == ("committed", 5000, 2000)
    assert done["balance"] == 0
    assert (await office.get("/v1/customers/ann/credits"))["receivable"] == 0
    receipt = await office.get(f"/v1/requests/{made['request_id']}", key="owner")
    assert receipt["margin"]["shortfall_decimal"] == "0"
    assert receipt["units"] == "7"
    await grant(office, 1000)
    assert (await credits(office))[0] == 1000


@pytest.mark.parametrize("policy", ["allow", "notify"])
async def test_a_metric_that_lets_the_wallet_owe_holds_what_there_is_and_owes_the_rest(office: Office, policy: str):
    await metric(office, overage_policy=policy)
    await grant(office, 1500)
    made = await reserve(office)
    assert made["reserved_amount"] == 1500
    done = await office.post(path(made, "commit"), {"units": 4})
    assert (done["charged_amount"], done["uncovered_amount"], done["balance"]) == (4000, 0, -2500)
    assert (await office.get("/v1/customers/ann/credits"))["receivable"] == 2500


async def test_the_rule_of_the_beginning_prices_the_commit(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office)
    await price(office, 2000)
    assert (await office.post(path(made, "commit"), {"units": 4}))["charged_amount"] == 4000
    later = await reserve(office, billable_metric_key="image", estimated_units=1)
    assert later["reserved_amount"] == 2000


async def test_an_extension_holds_more_and_longer_and_never_shorter(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office, ttl_seconds=100, **IMAGE)
    longer = await office.post(path(made, "extend"), {"ttl_seconds": 1000})
    assert longer["reserved_amount"] == 4000
    assert longer["expires_at"] > made["expires_at"]
    more = await office.post(path(made, "extend"), {"units": 2, "ttl_seconds": 1})
    assert (more["reserved_amount"], more["expires_at"]) == (6000, longer["expires_at"])
    assert await credits(office) == (10_000, 4000, 6000)
    refused = await office.refused("POST", path(made, "extend"), {"credits": 4001})
    assert refused == (402, "insufficient_credits", None)
    assert (await office.get(path(made)))["reserved_amount"] == 6000


async def test_an_abandoned_reservation_gives_everything_back_by_itself(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office, ttl_seconds=60, **IMAGE)
    office.clock.pass_s(61)
    await sweep(office)
    assert await credits(office) == (10_000, 10_000, 0)
    now = await office.get(path(made))
    assert (now["status"], now["charged_amount"], now["reserved_amount"]) == ("expired", 0, 0)
    assert (await office.get(f"/v1/requests/{made['request_id']}"))["status"] == "released"
    assert await office.refused("POST", path(made, "release")) == (409, "reservation_settled", None)


async def sweep(office: Office) -> None:
    swept = await office.gateway.services.ledger.sweep(office.clock.now_us())
    assert swept.failures == ()


async def test_a_commit_after_the_time_has_run_out_takes_what_is_free_once(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office, ttl_seconds=60, **IMAGE)
    office.clock.pass_s(61)
    await sweep(office)
    other = await reserve(office, billable_metric_key="image", estimated_units=7)
    late = await office.post(path(made, "commit"), {"units": 4, "final": False})
    assert (late["status"], late["charged_amount"], late["uncovered_amount"]) == ("committed", 3000, 1000)
    assert late["late"] is True
    assert await office.refused("POST", path(made, "commit"), {"units": 1}) == (409, "reservation_settled", None)
    assert (await office.post(path(other, "commit"), {"units": 7}))["charged_amount"] == 7000


async def test_until_it_is_swept_an_expired_reservation_holds_its_credits_for_its_own_commit(office: Office):
    """Nobody else gets them before the books say that they are free, and its own commit has them still."""
    await metric(office)
    await grant(office, 4000)
    made = await reserve(office, ttl_seconds=60, **IMAGE)
    office.clock.pass_s(3600)
    assert await credits(office) == (4000, 0, 4000)
    refused = await office.refused("POST", "/v1/reservations", {"customer_id": "ann", "credits": 1})
    assert refused == (402, "insufficient_credits", None)
    assert (await office.post(path(made, "commit"), {"units": 4}))["charged_amount"] == 4000


async def test_a_block_that_expires_while_it_is_held_pays_for_its_reservation_alone(office: Office):
    await metric(office)
    expires_us = office.clock.now_us() + 30_000_000
    await grant(office, 5000, expires_at=time_text(expires_us))
    made = await reserve(office)
    office.clock.pass_s(31)
    assert (await credits(office))[1] == 0
    await sweep(office)
    done = await office.post(path(made, "commit"), {"units": 3})
    assert (done["charged_amount"], done["balance"]) == (3000, 0)
    await sweep(office)
    assert await credits(office) == (0, 0, 0)


# Keys.


async def test_a_creation_is_repeated_as_it_was_whatever_has_become_of_it(office: Office):
    await metric(office)
    await grant(office, 10_000)
    first = await reserve(office, once="job-1")
    await office.post(path(first, "extend"), {"units": 1, "ttl_seconds": 5000})
    assert await reserve(office, once="job-1") == first
    await office.post(path(first, "release"))
    again = await office.ask("POST", "/v1/reservations", {"customer_id": "ann", **IMAGE}, once="job-1")
    assert again.json() == first
    assert again.headers["x-idempotent-replayed"] == "true"
    assert await credits(office) == (10_000, 10_000, 0)
    refused = await office.refused("POST", "/v1/reservations", {"customer_id": "ann", "credits": 1}, once="job-1")
    assert refused == (422, "idempotency_key_reused", None)


@pytest.mark.parametrize(("change", "status"), [("too dear", 400), ("archived", 404)])
async def test_a_creation_is_repeated_though_it_could_not_be_asked_for_now(office: Office, change: str, status: int):
    await metric(office)
    await grant(office, 10_000)
    five = {"billable_metric_key": "image", "estimated_units": 5}
    first = await reserve(office, once="job-1", **five)
    if change == "archived":
        await office.post("/v1/billable-metrics/image/archive")
    else:
        await price(office, 10**12)
    asked = {"customer_id": "ann", **five}
    assert (await office.refused("POST", "/v1/reservations", asked, once="job-2"))[0] == status
    assert await reserve(office, once="job-1", **five) == first
    assert await credits(office) == (10_000, 5000, 5000)


@pytest.mark.parametrize(("verb", "body"), [("release", None), ("extend", {"ttl_seconds": 60})])
async def test_a_key_is_of_one_reservation(office: Office, verb: str, body: dict[str, Any] | None):
    await metric(office)
    await grant(office, 10_000)
    one, other = await reserve(office), await reserve(office)
    await office.post(path(one, verb), body, once="key")
    assert (await office.refused("POST", path(other, verb), body, once="key"))[0] == 422


async def test_a_partial_commit_is_repeated_as_it_was(office: Office):
    await metric(office)
    await grant(office, 10_000)
    made = await reserve(office)
    part = {"units": 1, "final": False}
    first = await office.ask("POST", path(made, "commit"), part, once="step-1")
    await office.post(path(made, "commit"), part, once="step-2")
    again = await office.ask("POST", path(made, "commit"), part, once="step-1")
    assert again.content == first.content
    assert again.headers["x-idempotent-replayed"] == "true"
    assert (await office.get(path(made)))["charged_amount"] == 2000
    other = await reserve(office)
    assert (await office.refused("POST", path(other, "commit"), part, once="step-1"))[0] == 422


# Races.


async def test_of_commits_and_releases_at_once_one_settles_it(office: Office):
    await metric(office)
    await grant(office, 10_000)
    for _ in range(5):
        made = await reserve(office)
        before = (await credits(office))[0]
        commits = [office.ask("POST", path(made, "commit"), {"units": 1}) for _ in range(5)]
        releases = [office.ask("POST", path(made, "release")) for _ in range(5)]
        answers = await asyncio.gather(*(each for pair in zip(commits, releases, strict=True) for each in pair))
        now = await office.get(path(made))
        committed = now["status"] == "committed"
        won = [answer for answer in answers if answer.status_code == 200]
        assert len(won) == (1 if committed else 5), "a release may be repeated"
        assert {answer.status_code for answer in answers} == {200, 409}
        balance, available, reserved = await credits(office)
        assert (balance, reserved) == (before - (1000 if committed else 0), 0)
        assert available == balance


async def test_partial_commits_and_extensions_at_once_add_up(office: Office):
    await metric(office)
    await grant(office, 100_000)
    made = await reserve(office)
    parts = [office.post(path(made, "commit"), {"units": 1, "final": False}) for _ in range(20)]
    more = [office.post(path(made, "extend"), {"units": 2}) for _ in range(10)]
    await asyncio.gather(*parts, *more)
    now = await office.get(path(made))
    assert now["charged_amount"] == 20_000
    balance, available, reserved = await credits(office)
    assert (balance, available + reserved) == (80_000, 80_000)
    assert reserved == now["reserved_amount"]
    await office.post(path(made, "release"))
    assert await credits(office) == (80_000, 80_000, 0)


async def test_the_sweep_and_a_commit_at_once_charge_once(office: Office):
    await metric(office)
    await grant(office, 100_000)
    for number in range(1, 6):
        made = await reserve(office, ttl_seconds=1, **IMAGE)
        office.clock.pass_s(2)
        await asyncio.gather(sweep(office), office.post(path(made, "commit"), {"units": 4}), sweep(office))
        assert await credits(office) == (100_000 - number * 4000, 100_000 - number * 4000, 0)


async def test_reservations_at_once_never_hold_more_than_there_is(office: Office):
    await metric(office)
    await grant(office, 10_000)
    answers = await asyncio.gather(
        *(office.ask("POST", "/v1/reservations", {"customer_id": "ann", **IMAGE}) for _ in range(20))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 201] + [402] * 18
    assert await credits(office) == (10_000, 2000, 8000)


# What is not one.


async def test_a_completions_reservation_and_another_apps_are_not_found(office: Office):
    await metric(office)
    await grant(office, 10_000)
    answer = await office.chat("ann")
    completion = f"rsv_{answer.headers['x-request-id'].partition('_')[2]}"
    scope = (office.tenant, "live")
    kept = await office.gateway.services.ledger.reservation(ReservationRef(*scope, completion))
    assert kept is not None
    assert kept.state is ReservationState.COMMITTED
    made = await reserve(office)
    tenants = office.gateway.services.tenants
    app = await tenants.create_app(office.tenant, "Second")
    office.keys["second"] = (await tenants.create_key(office.tenant, "live", app_id=app.id)).token
    for reservation, key in (
        (completion, "live"),
        ("rsv_nobodys", "live"),
        (made["id"], "second"),
        (made["id"], "test"),
    ):
        about = f"/v1/reservations/{reservation}"
        assert await office.refused("GET", about, key=key) == (404, "not_found", None)
        for verb, body in (("commit", {"units": 1}), ("release", None), ("extend", {"ttl_seconds": 9})):
            assert (await office.refused("POST", f"{about}/{verb}", body, key=key))[:2] == (404, "not_found")
    assert (await office.get(path(made), key="owner"))["status"] == "active"
    assert (await office.refused("POST", path(made, "commit"), {"units": 1}, key="reader"))[0] == 403


NOT_RESERVATIONS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"estimated_units": 1}, None),
    ({"credits": 1, "billable_metric_key": "image", "estimated_units": 1}, None),
    ({"billable_metric_key": "image", "feature_key": "image", "estimated_units": 1}, None),
    ({"billable_metric_key": "none", "estimated_units": 1}, "billable_metric_key"),
    ({"billable_metric_key": "image", "estimated_units": -1}, "estimated_units"),
    ({"billable_metric_key": "image", "estimated_units": 10**10}, "estimated_units"),
    ({"billable_metric_key": "image", "estimated_units": "1e-9"}, "estimated_units"),
    ({"credits": -1}, "credits"),
    ({"credits": 1.5}, "credits"),
    ({"credits": 10**30}, "credits"),
    ({"credits": 1, "ttl_seconds": 0}, "ttl_seconds"),
    ({"credits": 1, "ttl_seconds": 86_401}, "ttl_seconds"),
    ({"credits": 1, "ttl_seconds": "60"}, "ttl_seconds"),
    ({"credits": 1, "ttl": 60}, "ttl"),
    ({"credits": 1, "metadata": 1}, "metadata"),
]


async def test_a_reservation_that_is_not_right_is_refused_with_its_place(office: Office):
    await metric(office)
    await grant(office, 10_000)
    for body, param in NOT_RESERVATIONS:
        status, _, where = await office.refused("POST", "/v1/reservations", {"customer_id": "ann", **body})
        assert (status in (400, 404), where) == (True, param), body
    made = await reserve(office)
    for verb, body in (
        ("commit", {}),
        ("commit", {"units": 1, "credits": 1}),
        ("commit", {"units": 1, "final": "no"}),
        ("extend", {}),
        ("extend", {"units": 1, "credits": 1}),
        ("extend", {"ttl_seconds": 10**6}),
    ):
        assert (await office.refused("POST", path(made, verb), body))[0] == 400, (verb, body)
    assert await credits(office) == (10_000, 6000, 4000)
