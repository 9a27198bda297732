"""`POST /stripe/webhook`: what is credited, once, and what is refused, with signed events over real stores."""

import asyncio
import copy
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.payments import intake
from gateway.payments.facts import Target
from gateway.payments.observed import Observed, facts_of
from gateway.payments.orders import Order
from gateway.payments.settling import Settler
from gateway.tables import PaymentOrder
from ledger.commands import Reverse, TopUp
from tests.gateway.office import Office
from tests.gateway.payment_histories import CREDITED, PRICE
from tests.gateway.till import WEBHOOK, Sale, Till, open_till, selected
from tests.servers.stripe import only
from tests.servers.stripe_objects import LAST4, PERSON, Object

AT_ONCE = 50


@pytest.fixture
async def till(tmp_path: Path) -> AsyncIterator[Till]:
    async with open_till(tmp_path) as opened:
        yield opened


def news(message: Mapping[str, Any]) -> Observed:
    found = facts_of(message)
    assert found is not None
    return found


async def test_a_paid_session_is_credited_once_whatever_tells_of_it(till: Till):
    sale = await till.sale(bonus=5, spread=7)
    events = sale.pay()
    assert {event["type"] for event in events} == {"payment_intent.succeeded", "checkout.session.completed"}
    assert await till.outcomes(events) == ["done", "done"]
    assert await sale.balance() == CREDITED + 5
    paid = await sale.now()
    assert (paid.status, paid.payment_intent) == ("paid", sale.payment)
    assert len(await sale.told("topup.succeeded")) == 1
    assert await till.outcomes(events) == ["duplicate", "duplicate"]
    assert await sale.balance() == CREDITED + 5


async def test_asking_brings_the_same_news(till: Till):
    """What the page learns to which Stripe sends the payer back, before any event has come."""
    sale = await till.sale()
    events = sale.pay()
    settler = till.payments.settler
    seen = news(await till.payments.stripe.session(sale.session))
    outcome = await settler.observe(seen)
    assert (outcome.result, outcome.order and outcome.order.status) == ("done", "paid")
    assert (await settler.observe(seen)).result == "duplicate"
    assert await till.outcomes(events) == ["done", "done"]
    assert await sale.balance() == CREDITED


async def test_a_slow_payment_is_credited_when_it_arrives(till: Till):
    sale = await till.sale()
    unpaid = selected(till.stripe.pay_later(sale.session))
    assert await till.deliver(only(unpaid, "checkout.session.completed")) == {
        "received": True,
        "outcome": "refused",
        "reason": "unpaid",
    }
    assert (await sale.balance(), (await sale.now()).status) == (0, "open")
    arrived = only(till.stripe.arrive(sale.payment), "checkout.session.async_payment_succeeded")
    assert (await till.deliver(arrived))["outcome"] == "done"
    assert (await sale.balance(), (await sale.now()).status) == (CREDITED, "paid")


async def test_a_payment_that_bounces_is_told_once_and_credited_never(till: Till):
    sale = await till.sale()
    till.stripe.pay_later(sale.session)
    bounced = selected(till.stripe.bounce(sale.payment))
    for event in (*bounced, *bounced):
        await till.deliver(event)
    failed = await sale.now()
    assert (failed.status, failed.failure) == ("failed", "async_payment_failed")
    (told,) = await sale.told("topup.failed")
    assert told["reason"] == "async_payment_failed"
    assert await sale.balance() == 0


async def test_who_pays_after_all_is_credited(till: Till):
    sale = await till.sale()
    events = sale.pay()
    expired = copy.deepcopy(only(events, "checkout.session.completed"))
    expired |= {"id": "evt_expired", "type": "checkout.session.expired"}
    expired["data"]["object"].update(status="expired", payment_status="unpaid", payment_intent=None)
    assert (await till.deliver(expired))["outcome"] == "done"
    assert (await sale.now()).status == "expired"
    assert await sale.told("topup.failed") == []
    await till.outcomes(events)
    assert (await sale.balance(), (await sale.now()).status) == (CREDITED, "paid")


async def test_a_payment_of_who_was_erased_is_no_secret(till: Till, log: io.StringIO):
    """The books agree with Stripe's, and the operator learns which payment to refund."""
    sale = await till.sale()
    events = sale.pay()
    assert (await till.office.ask("DELETE", f"/v1/customers/{sale.order.customer_id}")).status_code == 204
    assert await till.outcomes([*events, *events]) == ["done", "done", "duplicate", "duplicate"]
    assert (await sale.balance(), (await sale.now()).status) == (CREDITED, "paid")
    (line,) = [json.loads(each) for each in log.getvalue().splitlines() if "who was erased has paid" in each]
    assert (line["level"], line["order"], line["payment_intent"]) == ("warning", sale.order.id, sale.payment)
    await till.outcomes(selected(till.stripe.refund(sale.payment)))
    assert await sale.balance() == 0


async def test_a_refund_takes_its_part_and_a_won_dispute_gives_all_of_it_back(till: Till):
    sale = await till.sale()
    await till.outcomes(sale.pay())
    await till.outcomes(selected(till.stripe.refund(sale.payment, 300)))
    left = CREDITED - CREDITED * 300 // PRICE
    assert await sale.balance() == left
    assert await sale.spend(left // 2) == left // 2
    (created,) = till.stripe.dispute(sale.payment)
    dispute = created["data"]["object"]["id"]
    await till.deliver(created)
    assert await sale.spend(1) == 0, "frozen"
    assert await sale.balance() == left - left // 2
    await till.outcomes(till.stripe.withdraw(dispute))
    assert await sale.balance() == left - left // 2 - left
    await till.outcomes(till.stripe.close_dispute(dispute, "won"))
    assert await sale.balance() == left - left // 2
    assert await sale.spend(1) == 1
    await till.outcomes(till.stripe.reinstate(dispute))
    assert await sale.balance() == left - left // 2 - 1
    assert await sale.told("credit.clawed_back")
    assert await sale.told("credit.restored")
    assert till.stripe.requests == [], "the payment is known already, so nobody need be asked whose it is"


async def test_refunds_are_asked_for_when_one_has_failed_after_all(till: Till):
    """Of the first refund only the highest amount was told, of the last one nothing but that: together they mislead."""
    sale = await till.sale()
    await till.outcomes(sale.pay())
    first = till.stripe.refund(sale.payment, 500)
    await till.deliver(only(first, "charge.refunded"))
    failed = till.stripe.fail_refund(only(first, "refund.created")["data"]["object"]["id"])
    await till.deliver(only(failed, "refund.failed"))
    assert await sale.balance() == CREDITED
    await till.deliver(only(till.stripe.refund(sale.payment, 400), "charge.refunded"))
    assert await sale.balance() == CREDITED - CREDITED * 400 // PRICE


async def test_who_wants_to_know_is_told_of_an_order_in_the_transaction_that_ends_it(till: Till):
    sale, told = await till.sale(save_payment_method=True), list[tuple[str, str | None]]()

    async def changed(connection: AsyncConnection, order: Order, goal: Target) -> None:
        assert not goal.at_stake
        query = select(PaymentOrder.status).where(PaymentOrder.id == order.id)
        told.append((order.status, await connection.scalar(query)))

    services, payments = till.gateway.services, till.payments
    parts: dict[str, Any] = {"orders": payments.orders, "stripe": payments.stripe, "operator": payments.operator}
    settler = Settler(services.database, services.ledger, **parts, changed=(changed,))
    for event in (*(events := sale.pay()), *events):
        await settler.observe(news(event))
    assert told == [("paid", "paid")]
    agreed = changed_in(only(events, "payment_intent.succeeded"), event__id="evt_2", setup_future_usage="off_session")
    await settler.observe(news(agreed))
    assert told == [("paid", "paid")] * 2, "and when what was paid with is kept for later"


async def test_fifty_deliveries_at_once_are_one_credit(till: Till):
    sale = await till.sale()
    events = sale.pay()
    each = [event for event in events for _ in range(AT_ONCE // 2)]
    answers = await asyncio.gather(*(till.deliver(event) for event in each))
    assert {answer["outcome"] for answer in answers} <= {"done", "duplicate"}
    assert await sale.balance() == CREDITED
    assert len(await sale.told("topup.succeeded")) == 1


async def test_news_from_everywhere_at_once_end_as_they_happened(till: Till):
    sale = await till.sale()
    events = sale.pay()
    events += selected(till.stripe.refund(sale.payment, 300))
    (created,) = till.stripe.dispute(sale.payment)
    dispute = created["data"]["object"]["id"]
    events += [created, *till.stripe.withdraw(dispute), *till.stripe.close_dispute(dispute, "won")]
    events += till.stripe.reinstate(dispute)
    await asyncio.gather(*(till.deliver(event) for event in (*events, *events)))
    assert await sale.balance() == CREDITED - CREDITED * 300 // PRICE
    assert await sale.spend(1) == 1


# Refused


async def test_what_stripe_has_not_signed_is_refused_unread(till: Till, log: io.StringIO):
    sale = await till.sale()
    event = only(sale.pay(), "checkout.session.completed")
    body, signature = till.stripe.signed(event)
    old = till.stripe.signed(event, at=till.stripe.now_s() - 301)
    for wrong in (
        (body.replace(b"1000", b"9999"), signature),
        (body, None),
        (body, ""),
        (body, "t=1,v1=00"),
        (body, signature.replace("v1=", "v0=")),
        (body, "\u00e9"),
        till.stripe.signed(event, secret="whsec_of_another_endpoint"),
        (body[:-1], signature),
        (b"", signature),
        old,
    ):
        assert await till.refused(*wrong) == (400, "invalid_request")
    assert await sale.balance() == 0
    assert await till.observations() == {}
    logged = log.getvalue()
    assert logged.count("not signed") + logged.count("too old") >= 10
    assert sale.order.id not in logged
    assert (await till.send(body, signature)).status_code == 200
    assert await sale.balance() == CREDITED


def changed_in(event: Object, **fields: Any) -> Object:
    """The event with other values in its object; *event__…* ones in itself."""
    made = copy.deepcopy(event)
    for name, value in fields.items():
        where = made if name.startswith("event__") else made["data"]["object"]
        where[name.removeprefix("event__")] = value
    return made


def metadata(sale: Sale, **fields: str) -> dict[str, str]:
    named = {"order": sale.order.id, "tenant": sale.order.tenant, "mode": sale.order.mode, **fields}
    return {f"farebox_{name}": value for name, value in named.items()}


REFUSED: dict[str, Callable[[Sale], dict[str, Any]]] = {
    "other_account": lambda sale: {"event__account": "acct_of_somebody"},
    "other_livemode": lambda sale: {"event__livemode": True},
    "other_amount": lambda sale: {"amount_total": PRICE - 1},
    "other_amount more": lambda sale: {"amount_total": PRICE + 1},
    "other_amount in another currency": lambda sale: {"currency": "eur"},
    "unpaid": lambda sale: {"payment_status": "unpaid"},
    "unpaid for nothing": lambda sale: {"payment_status": "no_payment_required"},
    "unknown_order": lambda sale: {"metadata": metadata(sale, order="ord_nobodys")},
    "unknown_order of another mode": lambda sale: {"metadata": metadata(sale, mode="test")},
    "unknown_order of nobody": lambda sale: {"metadata": metadata(sale, tenant="ten_nobody")},
    "unknown_order of no name": lambda sale: {"metadata": metadata(sale, tenant="a/b,c")},
}


@pytest.mark.parametrize("why", REFUSED)
async def test_what_is_not_the_payment_that_was_ordered_credits_nothing(till: Till, log: io.StringIO, why: str):
    sale = await till.sale()
    event = changed_in(only(sale.pay(), "checkout.session.completed"), **REFUSED[why](sale))
    reason = why.partition(" ")[0]
    assert await till.deliver(event) == {"received": True, "outcome": "refused", "reason": reason}
    assert await sale.balance() == 0
    assert (await sale.now()).status == "open"
    assert await till.observations() == {event["id"]: f"refused:{reason}"}
    line = next(json.loads(each) for each in log.getvalue().splitlines() if "refused" in each)
    assert (line["reason"], line["observation"]) == (reason, event["id"])
    assert (await till.deliver(event))["outcome"] == "duplicate"


async def test_a_second_payment_for_an_order_is_refused(till: Till):
    sale = await till.sale()
    event = only(sale.pay(), "payment_intent.succeeded")
    second = changed_in(event, event__id="evt_second", id="pi_second")
    assert await till.outcomes([event, second]) == ["done", "refused"]
    assert await sale.balance() == CREDITED
    refunded = changed_in(only(till.stripe.refund(sale.payment), "charge.refunded"), payment_intent="pi_second")
    assert (await till.deliver(refunded))["reason"] == "other_payment"
    assert await sale.balance() == CREDITED


async def test_a_payment_pays_for_one_order_whatever_it_is_said_to_be_for_later(till: Till):
    """As where somebody changes the metadata in the Dashboard."""
    sale, other = await till.sale(), await till.sale()
    event = only(sale.pay(), "payment_intent.succeeded")
    again = changed_in(event, event__id="evt_again", metadata=metadata(other))
    assert await till.outcomes([event, again]) == ["done", "refused"]
    assert ((await sale.balance()), (await other.balance())) == (CREDITED, 0)
    assert (await till.payments.settler.settle(other.order)).status == "open"
    assert await till.outcomes(other.pay()) == ["done", "done"]
    assert await till.outcomes(selected(till.stripe.refund(sale.payment, 300))) == ["done", "done"]
    assert ((await sale.balance()), (await other.balance())) == (CREDITED - CREDITED * 300 // PRICE, CREDITED)


async def test_real_money_pays_for_nothing_in_the_sandbox(tmp_path: Path):
    async with open_till(tmp_path, live=True) as till:
        sandbox, live = await till.sale(mode="test"), await till.sale()
        assert (await till.deliver(only(sandbox.pay(), "payment_intent.succeeded")))["reason"] == "other_mode"
        assert await till.outcomes(live.pay()) == ["done", "done"]
        assert (await sandbox.balance(), await live.balance()) == (0, CREDITED)


async def test_a_test_key_serves_both_modes(till: Till):
    sandbox = await till.sale(mode="test")
    assert await till.outcomes(sandbox.pay()) == ["done", "done"]
    assert await sandbox.balance() == CREDITED


async def test_nothing_of_who_pays_is_logged_or_kept(till: Till, log: io.StringIO):
    sale = await till.sale()
    events = sale.pay() + selected(till.stripe.refund(sale.payment))
    await till.outcomes([*events, changed_in(events[0], event__id="evt_other", event__livemode=True)])
    kept = repr(await till.observations())
    for secret in (*PERSON.values(), LAST4, till.stripe.webhook_secret, till.stripe.secret_key):
        assert secret not in log.getvalue()
        assert secret not in kept


# Passed over, or kept until more is known


async def test_events_that_we_did_not_ask_for_are_passed_over(till: Till):
    sale = await till.sale()
    for event in till.stripe.pay(sale.session):
        if event["type"] in ("payment_intent.created", "charge.updated"):
            await till.deliver(event)
    thin = {"object": "v2.core.event", "id": "evt_thin", "type": "v1.billing.meter.error_report_triggered"}
    assert (await till.deliver(thin))["outcome"] == "ignored"
    assert (await till.deliver({"object": "event", "id": "evt_x", "type": "invoice.paid"}))["outcome"] == "ignored"


async def test_the_operators_other_payments_are_none_of_ours(till: Till):
    sale = await till.sale()
    foreign = till.stripe.create_payment({"amount": "700", "currency": "usd"})["id"]
    events = selected(till.stripe.charge_off_session(foreign, "pm_card_visa"))
    events += selected(till.stripe.refund(foreign)) + till.stripe.dispute(foreign)
    assert set(await till.outcomes(events)) == {"ignored"}
    assert await sale.balance() == 0


async def test_a_dispute_that_is_told_before_its_payment_waits_for_it(till: Till):
    """Stripe is asked whose it is; and where Stripe does not know the payment yet, the payment's own news tell."""
    for knows in (True, False):
        sale = await till.sale()
        paid = only(sale.pay(), "checkout.session.completed")
        (created,) = till.stripe.dispute(sale.payment)
        if not knows:
            till.stripe.fail_next(f"/v1/payment_intents/{sale.payment}", 404)
        assert await till.deliver(created) == {"received": True, "outcome": "kept", "reason": "no_payment_yet"} or knows
        if knows:
            assert await sale.balance() == CREDITED, "the payment itself says that it was made"
        else:
            assert (await till.observations())[created["id"]] is None
            assert await sale.balance() == 0
        assert (await till.deliver(paid))["outcome"] == "done"
        assert await sale.balance() == CREDITED
        assert await sale.spend(1) == 0, "frozen"
        assert (await till.observations())[created["id"]] == "done"


async def test_when_stripe_cannot_be_asked_the_event_comes_again(till: Till, log: io.StringIO):
    sale = await till.sale()
    sale.pay()
    (refunded,) = [each for each in till.stripe.refund(sale.payment) if each["type"] == "refund.created"]
    till.stripe.fail_next("/v1/payment_intents", 500, 10)
    assert (await till.send(*till.stripe.signed(refunded))).status_code >= 500
    assert await sale.balance() == 0
    till.stripe.heal()
    assert (await till.deliver(refunded))["outcome"] == "done"
    assert (await sale.balance(), (await sale.now()).status) == (0, "paid")


async def test_an_event_of_a_shape_that_cannot_be_read_is_sent_again(till: Till, log: io.StringIO):
    sale = await till.sale()
    event = only(sale.pay(), "checkout.session.completed")
    odd = changed_in(event, amount_total="a thousand")
    assert await till.refused(*till.stripe.signed(odd)) == (500, "internal_error")
    assert "a thousand" not in log.getvalue()
    assert (await till.deliver(event))["outcome"] == "done"


# What holds it up


async def test_an_event_that_has_had_no_effect_yet_is_not_done(
    till: Till, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
):
    sale = await till.sale()
    events = sale.pay()
    ledger = till.gateway.services.ledger
    execute = ledger.execute

    async def fails(command: Any) -> Any:
        if isinstance(command, TopUp | Reverse):
            raise RuntimeError("the test breaks it")
        return await execute(command)

    monkeypatch.setattr(ledger, "execute", fails)
    assert [await till.refused(*till.stripe.signed(event)) for event in events] == [(500, "internal_error")] * 2
    assert set((await till.observations()).values()) == {None}
    monkeypatch.undo()
    assert (await till.outcomes(events)) == ["done", "duplicate"], "the first brings both to their end"
    assert await sale.balance() == CREDITED


async def test_too_many_at_once_are_sent_again_later(till: Till, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "UNDER_WAY_MAX", 2)
    sales = [await till.sale() for _ in range(6)]
    sent = [till.send(*till.stripe.signed(only(sale.pay(), "checkout.session.completed"))) for sale in sales]
    answers = await asyncio.gather(*sent)
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"]
    assert sum([await sale.balance() for sale in sales]) == CREDITED * sum(each.status_code == 200 for each in answers)


async def test_a_body_is_bounded(till: Till):
    assert await till.refused(b" " * (2**20 + 1), "t=1,v1=00") == (413, "request_too_large")


async def test_a_secret_is_replaced_without_losing_an_event(tmp_path: Path):
    async with open_till(tmp_path, stripe_webhook_secret="whsec_new, whsec_FakeFareboxWebhookSecret") as till:
        sale = await till.sale()
        first, second = sale.pay()
        assert (await till.send(*till.stripe.signed(first))).status_code == 200
        assert (await till.send(*till.stripe.signed(second, secret="whsec_new"))).status_code == 200
        assert await till.refused(*till.stripe.signed(second, secret="whsec_other")) == (400, "invalid_request")


async def test_without_stripe_there_is_no_webhook(office: Office):
    assert (await office.client.post(WEBHOOK, content=b"{}")).status_code == 404


# What is kept for later


async def test_a_payment_method_is_kept_where_the_payer_agreed(till: Till):
    agreed, other = await till.sale(save_payment_method=True), await till.sale()
    for sale in (agreed, other):
        await till.known_to_stripe(sale)
        event = changed_in(only(sale.pay(), "payment_intent.succeeded"), setup_future_usage="off_session")
        await till.deliver(event)
        method = event["data"]["object"]["payment_method"]
        kept = await till.method_kept(sale.order.scope, sale.order.customer_id)
        assert kept == (method if sale is agreed else None)


async def test_who_was_erased_keeps_no_payment_method(till: Till):
    """What Stripe tells late brings back nothing that was forgotten."""
    sale = await till.sale(save_payment_method=True)
    made = till.stripe.create_customer({})["id"]
    await till.known_to_stripe(sale, made)
    event = changed_in(only(sale.pay(), "payment_intent.succeeded"), setup_future_usage="off_session")
    assert (await till.office.ask("DELETE", f"/v1/customers/{sale.order.customer_id}")).status_code == 204
    assert (await till.deliver(event))["outcome"] == "done"
    assert await till.method_kept(sale.order.scope, sale.order.customer_id) is None
