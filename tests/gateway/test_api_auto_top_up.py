"""Automatic top-ups: one payment for one need, whoever notices it, and whatever breaks in between."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.identity.wallets import customer_wallet
from gateway.payments.auto_top_up import KEY_LIFE_US
from gateway.payments.auto_top_up_terms import BACK_OFF_US
from gateway.payments.open_orders import PAGE_LIFE_S
from ledger.commands import Freeze
from tests.gateway.office import open_office
from tests.gateway.purses import AGREED, PUBLIC_URL, USD_10, Purses, open_purses

HOUR_S = 3600
SECOND_US = 1_000_000
PAYMENTS = "/v1/payment_intents"


@pytest.fixture
async def purses(tmp_path: Path) -> AsyncIterator[Purses]:
    async with open_purses(tmp_path) as opened:
        yield opened


# What is bought, and when.


async def test_a_wallet_below_its_threshold_is_topped_up(purses: Purses):
    alice = await purses.customer(credits=100)
    await purses.consider(alice)
    assert await purses.balance(alice) == 100 + USD_10
    (order,) = await purses.orders(alice)
    assert (order.kind, order.status, order.price_minor, order.currency) == ("auto", "paid", 1_000, "usd")
    (payment,) = purses.paid()
    assert payment["amount"] == 1_000
    assert payment["metadata"] == {
        "farebox_order": order.id,
        "farebox_tenant": purses.scope.tenant,
        "farebox_mode": "live",
    }
    (told,) = await purses.told(alice, "topup.succeeded")
    assert (told["order"], told["package"]) == (order.id, "usd-10")


async def test_once_it_is_topped_up_there_is_nothing_to_do(purses: Purses):
    alice = await purses.customer(credits=100)
    for _ in range(3):
        await purses.consider(alice)
        await purses.sweep()
    assert len(purses.paid()) == 1


@pytest.mark.parametrize(
    "differs",
    [
        {"auto_topup_enabled": False},
        {"credits": 200},
        {"card": None},
    ],
    ids=str,
)
async def test_nothing_is_bought_for(purses: Purses, differs: dict[str, Any]):
    alice = await purses.customer(**{"credits": 199, **differs})
    await purses.consider(alice)
    assert await purses.orders(alice) == []
    assert purses.stripe.all("payment_intent") == []


async def test_a_wallet_without_any_credits_is_topped_up(purses: Purses):
    alice = await purses.customer(credits=0)
    await purses.consider(alice)
    assert await purses.balance(alice) == USD_10


async def test_a_package_that_does_not_reach_the_threshold_is_followed_by_another(purses: Purses):
    alice = await purses.customer(credits=100, auto_topup_threshold=2_500_000)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid"] * 3
    assert await purses.balance(alice) == 100 + 3 * USD_10


async def test_a_wallet_that_is_frozen_is_not_topped_up(purses: Purses):
    alice = await purses.customer(credits=100)
    ledger = purses.gateway.services.ledger
    wallet = customer_wallet(*purses.scope, alice)
    await ledger.execute(Freeze(id="cmd_freeze", scope=purses.scope, wallet=wallet, frozen=True))
    await purses.consider(alice)
    assert purses.stripe.all("payment_intent") == []


async def test_many_who_notice_at_once_buy_once(purses: Purses):
    alice = await purses.customer(credits=100)
    await asyncio.gather(*(purses.consider(alice) for _ in range(50)))
    assert len(purses.stripe.all("payment_intent")) == 1
    assert await purses.balance(alice) == 100 + USD_10


# A month's cap.


def at(purses: Purses, text: str) -> None:
    """Let it be that time, UTC, by the office's clock."""
    wanted = datetime.fromisoformat(text).replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    wanted_us = (wanted.days * 86_400 + wanted.seconds) * SECOND_US + wanted.microseconds
    purses.office.clock.ahead_us += wanted_us - purses.office.clock.now_us()


async def test_a_month_costs_no_more_than_its_cap(purses: Purses):
    at(purses, "2027-01-29T12:00:00")
    alice = await purses.customer(credits=100, auto_topup_threshold=9_000_000, auto_topup_monthly_cap=2_999)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid"] * 2
    (told,) = await purses.told(alice, "topup.failed")
    assert told["reason"] == "monthly_cap"
    for day in ("2027-01-30T12:00:00", "2027-01-31T23:59:58"):
        at(purses, day)
        await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid"] * 2
    assert len(await purses.told(alice, "topup.failed")) == 1, "once a month"
    at(purses, "2027-02-01T00:00:00")
    await purses.sweep()
    assert await purses.outcomes(alice) == ["paid"] * 4, "the sweep knows when the month begins"
    at(purses, "2027-02-28T23:59:58")
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid"] * 4


async def test_a_leap_day_belongs_to_february(purses: Purses):
    at(purses, "2028-02-28T12:00:00")
    alice = await purses.customer(credits=100, auto_topup_threshold=9_000_000, auto_topup_monthly_cap=1_000)
    await purses.consider(alice)
    at(purses, "2028-02-29T23:59:58")
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid"]
    at(purses, "2028-03-01T00:00:00")
    await purses.sweep()
    assert await purses.outcomes(alice) == ["paid"] * 2


async def test_what_is_pending_over_the_end_of_a_month_counts_in_the_month_it_was_made(purses: Purses):
    at(purses, "2027-01-31T23:59:50")
    alice = await purses.customer(credits=100, card="pm_usBankAccount_success", auto_topup_monthly_cap=1_000)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["open"]
    at(purses, "2027-02-02T12:00:00")
    (payment,) = purses.stripe.all("payment_intent", status="processing")
    purses.stripe.arrive(payment["id"])
    await purses.sweep()
    assert await purses.balance(alice) == 100 + USD_10
    await purses.spend(alice, 1_000)
    await purses.keep_card(alice, "pm_card_visa")
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["paid", "paid"], "February has its own"


async def test_what_failed_does_not_count(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_card_chargeCustomerFail", auto_topup_monthly_cap=1_000)
    await purses.consider(alice)
    await purses.keep_card(alice, "pm_card_visa")
    await purses.agree(alice, auto_topup_threshold=300_000)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["failed", "paid"]


# One at a time.


async def test_a_payment_that_is_under_way_is_waited_for(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_usBankAccount_success")
    for _ in range(3):
        await purses.consider(alice)
        purses.office.clock.pass_s(HOUR_S)
        await purses.sweep()
    assert await purses.outcomes(alice) == ["open"]
    (payment,) = purses.stripe.all("payment_intent")
    purses.stripe.arrive(payment["id"])
    purses.office.clock.pass_s(6 * HOUR_S)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["paid"]
    assert await purses.balance(alice) == 100 + USD_10


async def test_a_payment_that_bounces_in_the_end_is_a_failure(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_usBankAccount_success")
    await purses.consider(alice)
    (payment,) = purses.stripe.all("payment_intent")
    purses.stripe.bounce(payment["id"])
    purses.office.clock.pass_s(HOUR_S)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["failed"]
    assert (await purses.payer(alice)).failures == 1


# Declined.


async def test_declines_back_off_and_end(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_card_chargeCustomerFail")
    await purses.consider(alice)
    for failures, pause_us in enumerate(BACK_OFF_US, 1):
        assert await purses.outcomes(alice) == ["failed"] * failures
        payer = await purses.payer(alice)
        assert (payer.failures, payer.last_failure) == (failures, "generic_decline")
        purses.office.clock.pass_s(pause_us * 89 // 100 // SECOND_US)
        await purses.consider(alice)
        await purses.sweep()
        assert await purses.outcomes(alice) == ["failed"] * failures, "news do not hasten it"
        purses.office.clock.pass_s(pause_us * 22 // 100 // SECOND_US)
        await purses.sweep()
    assert await purses.outcomes(alice) == ["failed"] * 5
    purses.office.clock.pass_s(365 * 24 * HOUR_S)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["failed"] * 5, "it is switched off"
    told = await purses.told(alice, "topup.failed")
    assert [event["attempt"] for event in told] == [1, 2, 3, 4, 5]
    assert [event["next_attempt_at"] is None for event in told] == [False] * 4 + [True]
    assert {event["reason"] for event in told} == {"generic_decline"}
    assert purses.stripe.all("payment_intent", status="requires_payment_method") == [], "nobody is to pay those"


async def test_a_decline_that_is_told_by_an_event_counts_the_same(purses: Purses):
    """The answer is lost, and the webhook comes first: once it is counted, and once it is told."""
    alice = await purses.customer(credits=100, card="pm_card_chargeCustomerFail")
    purses.stripe.fail_next(PAYMENTS, "reset-after-effect", times=3)
    await purses.consider(alice)
    for event in [each for each in purses.stripe.events if each["type"] == "payment_intent.payment_failed"] * 2:
        await purses.payments.intake.receive(*purses.stripe.signed(event))
    assert await purses.outcomes(alice) == ["failed"]
    purses.office.clock.pass_s(300)
    await purses.consider(alice)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["failed"], "there is a pause"
    assert (await purses.payer(alice)).failures == 1
    page = await purses.office.get(f"/v1/events?type=topup.failed&customer_id={alice}")
    ((data,)) = [event["data"] for event in page["data"]]
    (order,) = await purses.orders(alice)
    assert (data["order_id"], data["package"], data["price"], data["currency"]) == (order.id, "usd-10", "10.00", "usd")
    assert (data["reason"], data["attempt"]) == ("generic_decline", 1)
    assert data["next_attempt_at"].endswith("Z")
    assert data["top_up_url"].startswith(PUBLIC_URL)


async def test_a_change_of_the_settings_begins_anew(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_card_chargeCustomerFail")
    await purses.consider(alice)
    await purses.keep_card(alice, "pm_card_visa")
    await purses.agree(alice, auto_topup_threshold=300_000)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["failed", "paid"]
    assert (await purses.payer(alice)).failures == 0


async def test_settings_that_are_sent_again_and_are_the_same_begin_nothing_anew(purses: Purses):
    """As by who sends a customer with all settings at each log-in."""
    alice = await purses.customer(credits=100, card="pm_card_chargeCustomerFail")
    await purses.consider(alice)
    told = len(await purses.told(alice, "topup.failed"))
    for _ in range(3):
        await purses.agree(alice, **AGREED)
        await purses.office.post("/v1/customers", {"external_id": "alice", "settings": AGREED})
        await purses.sweep()
    assert await purses.outcomes(alice) == ["failed"]
    assert len(await purses.told(alice, "topup.failed")) == told
    await purses.agree(alice, auto_topup_monthly_cap=5_000)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["failed"] * 2


async def test_a_payment_that_goes_through_forgives_what_failed_before(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_card_chargeCustomerFail")
    await purses.consider(alice)
    await purses.keep_card(alice, "pm_card_visa")
    purses.office.clock.pass_s(2 * HOUR_S)
    await purses.sweep()
    payer = await purses.payer(alice)
    assert (payer.failures, payer.last_failure) == (0, None)


async def test_what_the_bank_asks_of_the_customer_is_told_with_a_link(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_card_authenticationRequired")
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["failed"]
    (told,) = await purses.told(alice, "topup.failed")
    assert (told["reason"], told["next_attempt_at"]) == ("authentication_required", None)
    link = purses.payments.links.opened(told["top_up_url"].rpartition("/")[2])
    assert (link.scope, link.customer_id, link.package) == (purses.scope, alice, "usd-10")
    (payment,) = purses.stripe.all("payment_intent")
    assert payment["status"] == "canceled"
    purses.office.clock.pass_s(30 * 24 * HOUR_S)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["failed"], "the customer has to act"


async def test_who_has_kept_no_card_is_told_once_for_each_cause(purses: Purses):
    alice = await purses.customer(credits=100, card=None)
    top_ups = purses.payments.auto_top_ups
    for cause in ("evt_1", "evt_1", "evt_2"):
        await top_ups.tell_if_no_method(purses.scope, alice, cause=cause)
    told = await purses.told(alice, "topup.failed")
    assert [event["reason"] for event in told] == ["no_payment_method"] * 3, "and when they agreed"
    assert all(purses.payments.links.opened(event["top_up_url"].rpartition("/")[2]) for event in told)


# The processor.


async def test_an_answer_that_was_lost_is_no_second_payment(purses: Purses):
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, "reset-after-effect", times=3)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["open"]
    purses.office.clock.pass_s(61)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["paid"]
    assert len(purses.stripe.all("payment_intent")) == 1
    assert await purses.balance(alice) == 100 + USD_10


async def test_a_processor_that_is_away_is_asked_again_for_the_same_payment(purses: Purses):
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, 500, times=3)
    await purses.consider(alice)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["open"]
    purses.office.clock.pass_s(61)
    await purses.sweep()
    assert await purses.outcomes(alice) == ["paid"]
    keys = {asked.idempotency_key for asked in purses.stripe.requests if asked.path == PAYMENTS}
    (order,) = await purses.orders(alice)
    assert keys == {f"farebox:charge:{order.id}"}


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made"])
async def test_when_the_key_is_forgotten_the_payment_is_looked_for(purses: Purses, made: bool):
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, "reset-after-effect" if made else 500, times=3)
    await purses.consider(alice)
    purses.office.clock.pass_s(KEY_LIFE_US // SECOND_US + HOUR_S)
    await purses.sweep()
    assert len(purses.paid()) == 1
    assert await purses.outcomes(alice) == (["paid"] if made else ["expired", "paid"])


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made"])
async def test_another_card_meanwhile_is_no_second_payment(purses: Purses, made: bool):
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, "reset-after-effect" if made else 500, times=3)
    await purses.consider(alice)
    await purses.keep_card(alice, "pm_card_chargeCustomerFail")
    purses.office.clock.pass_s(61)
    await purses.sweep()
    assert len(purses.stripe.all("payment_intent")) == 1
    assert await purses.outcomes(alice) == (["paid"] if made else ["failed"])


async def test_a_card_that_the_processor_does_not_know_is_a_failure(purses: Purses):
    alice = await purses.customer(credits=100, card="pm_that_is_gone")
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["failed"]
    assert (await purses.told(alice, "topup.failed"))[0]["reason"] == "resource_missing"


async def test_a_key_of_ours_that_is_no_good_is_nobody_elses_failure(purses: Purses):
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, 401, times=3)
    await purses.consider(alice)
    assert await purses.outcomes(alice) == ["open"]
    assert (await purses.payer(alice)).failures == 0


# Changes meanwhile.


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made"])
async def test_switched_off_meanwhile(purses: Purses, made: bool):
    """What was paid is credited; what was not is not asked for again."""
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, "reset-after-effect" if made else 500, times=3)
    await purses.consider(alice)
    await purses.agree(alice, auto_topup_enabled=False)
    purses.office.clock.pass_s(61)
    await purses.sweep()
    assert await purses.outcomes(alice) == (["paid"] if made else ["expired"])
    assert len(purses.paid()) == made
    assert await purses.balance(alice) == 100 + USD_10 * made


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made"])
async def test_erased_meanwhile(purses: Purses, made: bool):
    """Nothing more is asked for. What was paid is in the books; who was erased spends nothing of it."""
    alice = await purses.customer(credits=100)
    purses.stripe.fail_next(PAYMENTS, "reset-after-effect" if made else 500, times=3)
    await purses.consider(alice)
    answer = await purses.office.ask("DELETE", f"/v1/customers/{alice}")
    assert answer.status_code == 204
    for event in [each for each in purses.stripe.events if each["type"] == "payment_intent.succeeded"]:
        await purses.payments.intake.receive(*purses.stripe.signed(event))
    purses.office.clock.pass_s(PAGE_LIFE_S + 60)
    await purses.sweep()
    await purses.payments.open_orders.round()
    assert await purses.outcomes(alice) == (["paid"] if made else ["expired"])
    assert len(purses.paid()) == made
    assert await purses.balance(alice) == 100 + USD_10 * made


# In the sandbox, and without a processor.


async def test_a_processor_for_real_money_does_not_serve_the_sandbox(tmp_path: Path):
    async with open_purses(tmp_path, live=True) as purses:
        await purses.office.post("/v1/customers", {"external_id": "alice"}, key="test")
        status, _, param = await purses.office.refused("PATCH", "/v1/customers/alice", {"settings": AGREED}, key="test")
        assert (status, param) == (400, "settings.auto_topup_enabled")


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"auto_topup_enabled": True}, "auto_topup_threshold"),
        ({"auto_topup_enabled": True, "auto_topup_threshold": 5}, "auto_topup_package"),
        ({**AGREED, "auto_topup_package": "usd-11"}, "auto_topup_package"),
        ({**AGREED, "auto_topup_monthly_cap": 999}, "auto_topup_monthly_cap"),
        ({**AGREED, "auto_topup_threshold": 0}, "auto_topup_threshold"),
        ({**AGREED, "auto_topup_threshold": 1.5}, "auto_topup_threshold"),
        ({**AGREED, "auto_topup_monthly_cap": -1}, "auto_topup_monthly_cap"),
    ],
    ids=str,
)
async def test_settings_that_do_not_go_together(purses: Purses, settings: dict[str, Any], param: str):
    await purses.office.post("/v1/customers", {"external_id": "alice"})
    for method, path, body in (
        ("PATCH", "/v1/customers/alice", {"settings": settings}),
        ("POST", "/v1/customers", {"external_id": "alice", "settings": settings}),
        ("POST", "/v1/customers", {"external_id": "bob", "settings": settings}),
    ):
        status, _, refused = await purses.office.refused(method, path, body)
        assert (status, refused) == (400, f"settings.{param}")
    assert (await purses.office.get("/v1/customers/alice"))["settings"]["auto_topup_enabled"] is False


async def test_half_of_an_agreement_cannot_be_taken_back(purses: Purses):
    alice = await purses.customer(credits=500)
    for name in ("auto_topup_threshold", "auto_topup_package"):
        refused = await purses.office.refused("PATCH", f"/v1/customers/{alice}", {"settings": {name: None}})
        assert refused == (400, "invalid_request", f"settings.{name}")
    await purses.agree(alice, auto_topup_enabled=False, auto_topup_package=None)


async def test_without_a_processor_nothing_can_be_agreed_to(tmp_path: Path):
    async with open_office(tmp_path) as office:
        await office.post("/v1/customers", {"external_id": "alice"})
        status, _, param = await office.refused("PATCH", "/v1/customers/alice", {"settings": AGREED})
        assert (status, param) == (400, "settings.auto_topup_enabled")
        answer = await office.ask("PATCH", "/v1/customers/alice", {"settings": {"auto_topup_enabled": False}})
        assert answer.status_code == 200
