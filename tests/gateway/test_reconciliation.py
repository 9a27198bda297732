"""Every payment at the processor is in the journal, once and in full, and nothing else; or reconciliation says what."""

import io
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlmodel import col

from gateway.database import of
from gateway.identity.wallets import customer_wallet
from gateway.payments.clearing import Clearing
from gateway.payments.comparison import MENDABLE
from gateway.payments.nightly import LastNight, Nightly, look_back
from gateway.payments.observed import OrderRef
from gateway.payments.processor import ProcessorUnavailable
from gateway.payments.reconciliation import GRACE_S, Report
from gateway.payments.sweeps import DAY_US
from gateway.tables import ProcessorTransaction
from ledger.commands import Grant, Key, Revoke, TopUp
from ledger.model import Funding, Scope, WalletRef
from tests.gateway.payment_histories import CREDITED, PRICE
from tests.gateway.till import Sale, Till, open_till, selected
from tests.servers.stripe_objects import Object

TERMS: dict[str, Any] = {"bonus": 70, "spread": 31}
"""Not to be divided evenly."""

FACE = CREDITED + 31


@dataclass
class Counted:
    differences: Mapping[str, int] | None = None
    at_s: int = 0

    def note_reconciled(self, differences: Mapping[str, int], at_s: int) -> None:
        self.differences, self.at_s = differences, at_s


@dataclass
class Books:
    """A till, and what is done to its books behind the settler's back."""

    till: Till

    async def paid(self, **fields: Any) -> Sale:
        """A sale that was paid, and whose events came."""
        sale = await self.till.sale(**{**TERMS, **fields})
        await self.hear(sale.pay())
        return sale

    async def hear(self, events: list[Object]) -> None:
        await self.till.outcomes(selected(events))

    async def reconcile(
        self, *, days: int = 3, repair: bool = False, late_s: int = GRACE_S + 60, grace_s: int = GRACE_S
    ) -> Report:
        """When the news has had its time."""
        self.till.office.clock.pass_s(late_s)
        now_us = self.till.office.clock.now_us()
        return await self.till.payments.reconciler.run(now_us - days * DAY_US, now_us, repair=repair, grace_s=grace_s)

    async def credit(self, sale: Sale, amount: int, block: str, *, payment: str | None = None) -> None:
        """A top-up under a key of its own."""
        new_id = self.till.gateway.services.new_id
        await self.till.gateway.services.ledger.execute(
            TopUp(
                id=new_id("cmd"),
                scope=sale.order.scope,
                key=Key("planted", block, ""),
                wallet=wallet_of(sale),
                asset=sale.order.asset,
                block_id=block,
                amount=amount,
                spread=sale.order.spread,
                payment=payment or sale.order.id,
            )
        )

    async def revoke(self, sale: Sale, block: str) -> None:
        services = self.till.gateway.services
        await services.ledger.execute(
            Revoke(
                id=services.new_id("cmd"), scope=sale.order.scope, wallet=wallet_of(sale), block_id=block, amount=None
            )
        )

    async def grant(self, sale: Sale, amount: int, block: str, payment: str | None) -> None:
        """Credits that are booked as paid for."""
        await self.till.gateway.services.ledger.execute(
            Grant(
                id=self.till.gateway.services.new_id("cmd"),
                scope=sale.order.scope,
                wallet=wallet_of(sale),
                asset=sale.order.asset,
                block_id=block,
                amount=amount,
                funding=Funding.PAID,
                operator_paid=True,
                payment_reference=payment,
            )
        )


@dataclass
class Night:
    """The nightly sweep, as a process has it."""

    till: Till
    counted: Counted = field(default_factory=Counted)

    def __post_init__(self) -> None:
        now_us = self.till.office.clock.now_us
        self._sweep = Nightly(self.till.payments.reconciler, counters=self.counted, now_us=now_us).sweep

    async def looks(self) -> bool:
        return await self.till.payments.sweeps.run_if_due(self._sweep)

    async def comes(self) -> None:
        """It is three o'clock."""
        await self.looks()
        now_us = self.till.office.clock.now_us()
        self.till.office.clock.pass_s((self._sweep.schedule(now_us) - now_us) // 1_000_000 + 1)
        assert await self.looks()

    @property
    def found(self) -> dict[str, int]:
        """What the gauge says, of kinds of which there are some."""
        assert self.counted.differences is not None
        return {kind: count for kind, count in self.counted.differences.items() if count}


def wallet_of(sale: Sale) -> WalletRef:
    return customer_wallet(*sale.order.scope, sale.order.customer_id)


def ref_of(sale: Sale) -> OrderRef:
    return OrderRef(sale.order.scope, sale.order.id)


def listed(report: Report) -> list[tuple[Any, ...]]:
    return [(each.kind, each.order, each.payment_intent, each.expected, each.found) for each in report.differences]


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    async with open_till(tmp_path) as till:
        till.stripe.now_s = lambda: till.office.clock.now_us() // 1_000_000
        yield Books(till)


async def test_a_busy_week_agrees_to_the_last_credit(books: Books) -> None:
    till, stripe = books.till, books.till.stripe
    await books.paid()
    await books.paid(mode="test")
    await books.paid(spread=0, bonus=0)
    refunded = await books.paid()
    for amount in (333, 1, None):
        await books.hear(stripe.refund(refunded.payment, amount))
    failed = await books.paid()
    told = stripe.refund(failed.payment, 400)
    await books.hear(told)
    await books.hear(stripe.fail_refund(told[0]["data"]["object"]["id"]))
    spent = await books.paid()
    await spent.spend(CREDITED // 2)
    await books.hear(stripe.refund(spent.payment))
    for ending in ("won", "lost", "open"):
        disputed = await books.paid()
        told = stripe.dispute(disputed.payment)
        dispute = told[0]["data"]["object"]["id"]
        await books.hear([*told, *stripe.withdraw(dispute)])
        if ending == "won":
            await books.hear([*stripe.close_dispute(dispute, "won"), *stripe.reinstate(dispute)])
        elif ending == "lost":
            await books.hear(stripe.close_dispute(dispute, "lost"))
    both = await books.paid()
    await books.hear(stripe.refund(both.payment, 600))
    told = stripe.dispute(both.payment, 400)
    await books.hear([*told, *stripe.withdraw(told[0]["data"]["object"]["id"])])
    inquired = await books.paid()
    await books.hear(stripe.dispute(inquired.payment, inquiry=True))
    for ending in ("arrives", "bounces", "waits"):
        slow = await till.sale(**TERMS)
        await books.hear(stripe.pay_later(slow.session))
        if ending != "waits":
            await books.hear(stripe.arrive(slow.payment) if ending == "arrives" else stripe.bounce(slow.payment))
    await till.sale()
    expired = await till.sale()
    await books.hear(stripe.expire(expired.session))
    report = await books.reconcile()
    assert (report.differences, report.mended, report.in_flight, report.others) == ((), (), 0, 0)
    assert report.payments == 12
    assert report.entries > 30


@pytest.mark.parametrize("days", [3, 60], ids=["began before", "whole"])
async def test_a_dispute_in_another_currency_agrees_however_it_ends(books: Books, days: int) -> None:
    """How much of the payment it is, nobody can say: all of it while the money is away, and nothing otherwise."""
    stripe = books.till.stripe
    for ending in ("won", "lost", "nothing withdrawn"):
        sale = await books.paid()
        books.till.office.clock.pass_s(40 * 86_400)
        told = stripe.dispute(sale.payment, 777, currency="eur")
        dispute = told[0]["data"]["object"]["id"]
        await books.hear(told)
        if ending == "nothing withdrawn":
            await books.hear(stripe.refund(sale.payment, 1))
        else:
            await books.hear(stripe.withdraw(dispute))
        if ending == "won":
            await books.hear([*stripe.close_dispute(dispute, "won"), *stripe.reinstate(dispute)])
        report = await books.reconcile(days=days)
        assert (ending, listed(report)) == (ending, [])


async def test_what_was_paid_twice_is_found_until_it_has_gone_back(books: Books) -> None:
    sale = await books.paid()
    order = sale.order
    metadata = {"farebox_order": order.id, "farebox_tenant": order.tenant, "farebox_mode": order.mode}
    again = books.till.stripe.create_payment({"amount": f"{PRICE}", "currency": "usd", "metadata": metadata})
    await books.hear(books.till.stripe.charge_off_session(again["id"], "pm_card_visa"))
    await books.hear(books.till.stripe.refund(again["id"], 1))
    (difference,) = (await books.reconcile()).differences
    assert (difference.kind, difference.expected_minor, difference.found_minor) == ("wrong_amount", PRICE, 2 * PRICE)
    await books.hear(books.till.stripe.refund(again["id"]))
    assert listed(await books.reconcile(repair=True)) == []
    assert await sale.balance() == CREDITED + 70


async def test_an_automatic_payment_agrees_and_others_on_the_account_are_none_of_ours(books: Books) -> None:
    till, stripe = books.till, books.till.stripe
    automatic = await till.sale(kind="auto", **TERMS)
    customer = await till.payments.stripe.create_customer(automatic.order.scope, automatic.order.customer_id)
    await till.payments.stripe.charge_off_session(automatic.order, processor_id=customer, payment_method="pm_card_visa")
    await books.hear([event for event in stripe.events if event["type"].startswith("payment_intent.")])
    assert await automatic.balance() == CREDITED + 70
    other = stripe.create_payment({"amount": "500", "currency": "usd", "metadata": {}})
    stripe.charge_off_session(other["id"], "pm_card_visa")
    report = await books.reconcile()
    assert (listed(report), report.others) == ([], 1)


async def test_a_payment_without_its_credit_is_found_and_mended(books: Books) -> None:
    sale = await books.till.sale(**TERMS)
    sale.pay()
    expected = ("missing_credit", ref_of(sale), sale.payment, FACE, 0)
    report = await books.reconcile()
    assert listed(report) == [expected]
    (difference,) = report.differences
    assert (difference.currency, difference.expected_minor, difference.found_minor) == ("usd", PRICE, PRICE)
    mended = await books.reconcile(repair=True)
    assert [each.kind for each in mended.mended] == ["missing_credit"]
    assert mended.differences == ()
    assert await sale.balance() == CREDITED + 70
    assert (await sale.now()).status == "paid"
    await books.hear(books.till.stripe.events)
    assert await sale.balance() == CREDITED + 70, "the late event has no second effect"
    assert (await books.reconcile(repair=True)).mended == ()


async def test_a_second_credit_for_one_payment_is_found(books: Books) -> None:
    sale, fine = await books.paid(), await books.paid()
    await books.credit(sale, CREDITED, "blk_again")
    assert listed(await books.reconcile()) == [("doubled_credit", ref_of(sale), sale.payment, FACE, 2 * FACE)]
    report = await books.reconcile(repair=True)
    assert listed(report) == [("doubled_credit", ref_of(sale), sale.payment, FACE, 2 * FACE)]
    assert await fine.balance() == CREDITED + 70


async def test_a_second_credit_is_found_although_the_first_is_older_than_what_is_looked_at(books: Books) -> None:
    sale = await books.paid()
    books.till.office.clock.pass_s(40 * 86_400)
    await books.credit(sale, CREDITED, "blk_again")
    assert listed(await books.reconcile()) == [("doubled_credit", ref_of(sale), sale.payment, FACE, 2 * FACE)]


async def test_a_grant_that_says_it_was_paid_is_a_credit_too(books: Books) -> None:
    sale = await books.paid()
    await books.grant(sale, 5, "blk_again", sale.order.id)
    assert listed(await books.reconcile()) == [("doubled_credit", ref_of(sale), sale.payment, FACE, FACE + 5)]


async def test_a_credit_without_a_payment_is_found(books: Books) -> None:
    unpaid = await books.till.sale(**TERMS)
    await books.credit(unpaid, CREDITED, "blk_unpaid")
    await books.credit(unpaid, 7, "blk_nobody", payment="ord_nobody")
    await books.grant(unpaid, 9, "blk_for_nothing", None)
    scope = unpaid.order.scope
    assert sorted(listed(await books.reconcile()), key=lambda found: found[-1]) == [
        ("doubled_credit", OrderRef(scope, "block blk_for_nothing"), None, 0, 9),
        ("doubled_credit", OrderRef(scope, "ord_nobody"), None, 0, 7 + 31),
        ("doubled_credit", ref_of(unpaid), None, 0, FACE),
    ]


async def test_a_credit_of_another_amount_is_found(books: Books) -> None:
    less, more = await books.till.sale(**TERMS), await books.till.sale(**TERMS)
    for sale, amount in ((less, CREDITED - 1), (more, CREDITED + 1)):
        sale.pay()
        await books.credit(sale, amount, sale.order.block_id)
    found = {each[1]: each for each in listed(await books.reconcile())}
    assert found == {
        ref_of(less): ("wrong_amount", ref_of(less), less.payment, FACE, FACE - 1),
        ref_of(more): ("wrong_amount", ref_of(more), more.payment, FACE, FACE + 1),
    }


async def test_a_refund_that_was_not_told_is_found_and_mended(books: Books) -> None:
    sale = await books.paid()
    stripe = books.till.stripe
    stripe.refund(sale.payment, 300)
    part = FACE * 300 // PRICE
    assert listed(await books.reconcile()) == [("missing_reversal", ref_of(sale), sale.payment, part, 0)]
    assert (await books.reconcile(repair=True)).differences == ()
    assert await sale.balance() == CREDITED - CREDITED * 300 // PRICE + 70 - 70 * 300 // PRICE
    stripe.refund(sale.payment, 500)
    (difference,) = (await books.reconcile()).differences
    assert (difference.kind, difference.expected, difference.found) == ("wrong_reversal", FACE * 800 // PRICE, part)
    assert [each.kind for each in (await books.reconcile(repair=True)).mended] == ["wrong_reversal"]


async def test_a_payment_that_began_before_is_looked_at_as_a_whole(books: Books) -> None:
    """Only its refund was moved since; the charge, and an earlier refund, are older than what is listed."""
    stripe = books.till.stripe
    sale, disputed = await books.paid(), await books.paid()
    await books.hear(stripe.refund(sale.payment, 100))
    books.till.office.clock.pass_s(40 * 86_400)
    await books.hear(stripe.refund(sale.payment, 200))
    opened = stripe.dispute(disputed.payment)
    await books.hear([*opened, *stripe.withdraw(opened[0]["data"]["object"]["id"])])
    report = await books.reconcile()
    assert (listed(report), report.payments) == ([], 2)
    stripe.refund(sale.payment, 50)
    (difference,) = (await books.reconcile()).differences
    assert (difference.kind, difference.expected) == ("wrong_reversal", FACE * 350 // PRICE)


async def test_news_has_an_hour_to_come_or_what_it_is_given(books: Books) -> None:
    sale = await books.till.sale(**TERMS)
    sale.pay()
    report = await books.reconcile(late_s=GRACE_S - 60)
    assert (listed(report), report.in_flight) == ([], 1)
    at_once = await books.reconcile(late_s=1, grace_s=0)
    assert ([each[0] for each in listed(at_once)], at_once.in_flight) == (["missing_credit"], 0)
    assert [each[0] for each in listed(await books.reconcile())] == ["missing_credit"]


async def test_money_that_names_an_order_of_ours_that_is_not_there_is_found(books: Books) -> None:
    stripe = books.till.stripe
    metadata = {"farebox_order": "ord_gone", "farebox_tenant": books.till.office.tenant, "farebox_mode": "live"}
    strange = {**metadata, "farebox_tenant": "not/a tenant"}
    for each in (metadata, strange):
        made = stripe.create_payment({"amount": "500", "currency": "usd", "metadata": each})
        stripe.charge_off_session(made["id"], "pm_card_visa")
    assert sorted(each.kind for each in (await books.reconcile()).differences) == ["unknown_payment"] * 2


async def test_other_money_than_was_ordered_is_found_and_stays(books: Books) -> None:
    less = await books.till.sale(**TERMS)
    order = less.order
    metadata = {"farebox_order": order.id, "farebox_tenant": order.tenant, "farebox_mode": order.mode}
    for currency in ("usd", "eur"):
        made = books.till.stripe.create_payment({"amount": "999", "currency": currency, "metadata": metadata})
        books.till.stripe.charge_off_session(made["id"], "pm_card_visa")
        (difference,) = (await books.reconcile(repair=True)).differences
        assert difference.kind == ("wrong_amount" if currency == "usd" else "foreign_currency")
    assert await less.balance() == 0


async def test_the_journals_of_all_tenants_are_looked_at(books: Books) -> None:
    tenants = books.till.gateway.services.tenants
    (other,) = [each.id for each in await tenants.list_tenants() if each.id != books.till.office.tenant]
    sale = await books.till.sale(tenant=other, **TERMS)
    sale.pay()
    assert listed(await books.reconcile()) == [("missing_credit", ref_of(sale), sale.payment, FACE, 0)]
    await books.reconcile(repair=True)
    assert await sale.balance() == CREDITED + 70


async def test_movements_are_kept_once(books: Books) -> None:
    sale = await books.paid()
    await books.hear(books.till.stripe.refund(sale.payment, 100))
    for _ in range(2):
        assert (await books.reconcile()).movements == 2
    operator = await books.till.payments.operator()
    assert operator == Scope(books.till.office.tenant, "test")
    async with books.till.gateway.services.database.read(of(*operator)) as connection:
        columns = [col(getattr(ProcessorTransaction, name)) for name in ("type", "amount", "payment_intent")]
        rows = [tuple(row) for row in await connection.execute(select(*columns).order_by("amount"))]
    assert rows == [("refund", -100, sale.payment), ("charge", PRICE, sale.payment)]


async def test_at_night_what_was_missed_is_mended_and_the_rest_is_told(books: Books, log: io.StringIO) -> None:
    till = books.till
    missed, doubled = await till.sale(**TERMS), await books.paid()
    missed.pay()
    await books.credit(doubled, CREDITED, "blk_again")
    till.office.clock.pass_s(GRACE_S + 60)
    night = Night(till)
    await night.comes()
    counted = night.counted
    assert counted.differences is not None
    assert {kind for kind, count in counted.differences.items() if count} == {"doubled_credit"}
    assert counted.differences.keys() > MENDABLE
    assert await missed.balance() == CREDITED + 70
    told = log.getvalue()
    assert doubled.order.id in told
    assert missed.order.id in told
    assert doubled.order.customer_id not in told


async def test_what_differs_is_told_of_until_it_is_set_right_however_old_it_is(books: Books) -> None:
    """And by every process: also by one that has not compared anything itself."""
    till, stripe = books.till, books.till.stripe
    doubled, foreign, unpaid = await books.paid(), await till.sale(**TERMS), await till.sale(**TERMS)
    await books.credit(doubled, CREDITED, "blk_again")
    await books.grant(unpaid, 9, "blk_for_nothing", None)
    order = foreign.order
    metadata = {"farebox_order": order.id, "farebox_tenant": order.tenant, "farebox_mode": order.mode}
    abroad = stripe.create_payment({"amount": "999", "currency": "eur", "metadata": metadata})
    unknown = stripe.create_payment(
        {"amount": "5", "currency": "usd", "metadata": {**metadata, "farebox_order": "ord_x"}}
    )
    for made in (abroad, unknown):
        stripe.charge_off_session(made["id"], "pm_card_visa")
    all_of_them = {"doubled_credit": 2, "foreign_currency": 1, "unknown_payment": 1}
    night, other = Night(till), Night(till)
    for _ in range(3):
        await night.comes()
        assert night.found == all_of_them
        till.office.clock.pass_s(50 * 86_400)
    assert not await other.looks() or other.found == all_of_them
    for made in (abroad, unknown):
        stripe.refund(made["id"])
    await night.comes()
    assert night.found == {"doubled_credit": 2}
    for block, sale in (("blk_again", doubled), ("blk_for_nothing", unpaid)):
        await books.revoke(sale, block)
    await night.comes()
    assert night.found == {}
    assert await other.looks() is False
    assert other.found == {}


async def test_a_webhook_that_was_down_for_ten_days_leaves_nobody_without_credits(books: Books) -> None:
    """Neither while gateways run, nor when they were away as long. The processor's own retries have ended."""
    night, missed = Night(books.till), list[Sale]()
    for day in range(10):
        sale = await books.till.sale(**TERMS)
        sale.pay()
        missed.append(sale)
        if day < 5:
            await night.comes()
        else:
            books.till.office.clock.pass_s(86_400)
    await night.comes()
    assert night.found == {}
    assert [await sale.balance() for sale in missed] == [CREDITED + 70] * 10
    assert {(await sale.now()).status for sale in missed} == {"paid"}


async def test_an_order_that_nobody_told_of_is_asked_for_by_itself(books: Books) -> None:
    """Without the nightly comparison, however long it was."""
    sale = await books.till.sale(**TERMS)
    assert await books.till.payments.orders.note_session(sale.order, session_id=sale.session, checkout_url=None)
    sale.pay()
    books.till.office.clock.pass_s(40 * 86_400)
    assert await books.till.payments.open_orders.round() == 1
    assert await sale.balance() == CREDITED + 70


async def test_a_payment_that_came_after_its_order_was_given_up_is_credited(books: Books) -> None:
    sale = await books.till.sale(**TERMS)
    await books.till.payments.orders.ended(sale.order, "expired")
    sale.pay()
    night = Night(books.till)
    await night.comes()
    assert (night.found, await sale.balance()) == ({}, CREDITED + 70)


async def test_a_dispute_long_after_the_payment_is_found_without_its_events(books: Books) -> None:
    night, sale = Night(books.till), await books.paid()
    await night.comes()
    books.till.office.clock.pass_s(60 * 86_400)
    dispute = books.till.stripe.dispute(sale.payment)[0]["data"]["object"]["id"]
    books.till.stripe.withdraw(dispute)
    books.till.office.clock.pass_s(9 * 86_400)
    await night.comes()
    assert (night.found, await sale.balance()) == ({}, 0)
    books.till.stripe.close_dispute(dispute, "won")
    books.till.stripe.reinstate(dispute)
    await night.comes()
    assert (night.found, await sale.balance()) == ({}, CREDITED + 70)


@pytest.mark.parametrize(
    ("last_days", "days"),
    [(None, 35), (0, 3), (1, 3), (2, 3), (3, 4), (10, 11), (34, 35), (35, 35), (400, 35)],
)
def test_a_night_looks_back_to_the_last_one_within_bounds(last_days: int | None, days: int) -> None:
    now_us = 1_000 * DAY_US
    last = None
    if last_days is not None:
        last = LastNight(until_us=now_us - last_days * DAY_US, found={}, differences=())
    assert now_us - look_back(last, now_us) == days * DAY_US


async def test_a_night_that_failed_is_made_up_for(books: Books) -> None:
    night, sale = Night(books.till), await books.till.sale(**TERMS)
    await night.comes()
    sale.pay()
    for _ in range(6):
        books.till.stripe.fail_next("/v1/balance_transactions", 500, 9)
        with pytest.raises(ProcessorUnavailable):
            await night.comes()
    books.till.stripe.heal()
    await night.comes()
    assert (night.found, await sale.balance()) == ({}, CREDITED + 70)


async def test_a_second_payment_of_an_order_that_was_given_back_is_no_difference(books: Books) -> None:
    """It was paid twice, and the second one refunded: the first one's credits stay, whole."""
    sale = await books.paid()
    order, stripe = sale.order, books.till.stripe
    metadata = {"farebox_order": order.id, "farebox_tenant": order.tenant, "farebox_mode": order.mode}
    second = stripe.create_payment({"amount": str(PRICE), "currency": "usd", "metadata": metadata})
    stripe.charge_off_session(second["id"], "pm_card_visa")
    assert [each[0] for each in listed(await books.reconcile())] == ["wrong_amount"]
    stripe.refund(second["id"], 10)
    assert [each[0] for each in listed(await books.reconcile(repair=True))] == ["wrong_amount"]
    stripe.refund(second["id"])
    assert listed(await books.reconcile(repair=True)) == []
    assert await sale.balance() == CREDITED + 70


@pytest.mark.sqlite
async def test_the_clearing_account_is_read_without_looking_through_the_journal(books: Books) -> None:
    """SQLite takes the primary key where it can, whose order is the journal's: months of charges."""
    sale = await books.paid()
    database, asked = books.till.gateway.services.database, list[tuple[str, Any]]()

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    clearing, scope = Clearing(database), sale.order.scope
    entries = await clearing.whole(scope, await clearing.since(scope, 0), ["ord_other"])
    event.remove(engine, "before_cursor_execute", note)
    assert len(entries) == 2
    queries = [each for each in asked if "clearing" in each[0]]
    assert len(queries) == 4
    async with database.read(of(*scope)) as connection:
        for statement, parameters in queries:
            plan = (await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", tuple(parameters))).all()
            assert "INDEX ix_ledger_transfer_clearing_" in plan[0][-1], plan
            assert "ix_ledger_command_seq" in plan[1][-1], plan


async def test_without_an_answer_of_the_processor_nothing_is_said(books: Books) -> None:
    await books.paid()
    books.till.stripe.fail_next("/v1/balance_transactions", 500, 9)
    with pytest.raises(ProcessorUnavailable):
        await books.reconcile()


async def test_a_live_account_has_nothing_to_do_with_the_sandbox(tmp_path: Path) -> None:
    async with open_till(tmp_path, live=True) as till:
        books = Books(till)
        await books.paid()
        sandbox = await till.sale(mode="test")
        await books.credit(sandbox, CREDITED, "blk_sandbox")
        assert listed(await books.reconcile()) == []
