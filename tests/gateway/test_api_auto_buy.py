"""Plans that are bought by themselves: for whom, when, and once for each cause, whoever notices it first.

Alice's own credits pay for packs alone (they are restricted to the pack's key), so that a message needs a plan.
"""

import asyncio
import random
from collections.abc import Awaitable
from typing import Any, Final

import msgspec
import pytest
from sqlalchemy import select, update
from sqlmodel import col

from gateway.app import Gateway
from gateway.billing.auto_buy import AutoBuy
from gateway.billing.charging import Spender
from gateway.billing.packs import Packs
from gateway.clock import time_text
from gateway.database import of
from gateway.events.event import StoredEvent
from gateway.identity.wallets import app_wallet, customer_wallet
from gateway.tables import Customer
from ledger.commands import AnyCommand, Debit, Expire, Purchase, ReserveLeg
from ledger.errors import InsufficientCredits, LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import Block, Charge, Funding, ReservationRef, Scope, Settlement, Tags, UsageRecord
from ledger.outcomes import Applied
from ledger.store.tables import LedgerEventRow
from pricing.money import CREDIT
from tests.conftest import Campaign
from tests.gateway.office import Office
from tests.gateway.rig import open_store
from tests.gateway.test_api_webhooks import worked_off

HOUR: Final = {"key": "hour", "name": "Hour", "price": 100_000, "credits": 200_000, "duration_seconds": 3600}
RACES_AT_ONCE: Final = 50


class Shop:
    """What a message, an expiry and a customer's agreement come to, below HTTP."""

    def __init__(self, office: Office, gateway: Gateway | None = None) -> None:
        self.office = office
        self.services = (gateway or office.gateway).services
        self.scope = Scope(office.tenant, "live")
        services = self.services
        packs = Packs(services.database, services.ledger)
        self.auto_buy = AutoBuy(services.database, services.ledger, packs)

    async def customer(self, name: str, credits: int = 1_000_000, **settings: Any) -> str:
        """A customer whose credits pay for packs alone, with an agreement unless *settings* say otherwise."""
        agreement = {"auto_buy_enabled": True, "auto_buy_pack": "hour", **settings}
        body = {"customer_id": name, "credits": credits, "metrics": ["hour"]}
        customer_id: str = (await self.office.post("/v1/topup/grant", body))["customer_id"]
        async with self.services.database.write(of(*self.scope)) as connection:
            await connection.execute(
                update(Customer)
                .where(
                    col(Customer.tenant) == self.scope.tenant,
                    col(Customer.mode) == self.scope.mode,
                    col(Customer.id) == customer_id,
                )
                .values(settings=agreement)
            )
        return customer_id

    def debit(self, customer_id: str, credits: int = 1, **more: Any) -> Debit:
        request_id = self.services.new_id("req")
        amount = credits * 10**CREDIT.scale
        leg = ReserveLeg((customer_wallet(*self.scope, customer_id),), amount, amount)
        return Debit(
            id=self.services.new_id("cmd"),
            scope=self.scope,
            reservation=ReservationRef(*self.scope, self.services.new_id("rsv")),
            asset=CREDIT.code,
            legs=more.pop("legs", (leg,)),
            tags=more.pop("tags", Tags(app=self.office.app, metric="chat_message")),
            settlement=Settlement(
                more.pop("charges", (Charge(0, amount),)), UsageRecord(request_id=request_id, customer_id=customer_id)
            ),
            **more,
        )

    async def send(self, customer_id: str, credits: int = 1, **more: Any) -> Applied:
        """A message that costs so many credits."""
        spender = Spender(app_id=self.office.app, key_id="key_1", customer_id=customer_id)
        return await self.services.charging.ask(self.debit(customer_id, credits, **more), spender)

    async def plans(self, customer_id: str) -> list[str]:
        """What was bought so far, oldest first, and why."""
        events = await self.events(customer_id, "pack.purchased")
        return [event.body["cause"] for event in events]

    async def events(self, customer_id: str, kind: str) -> list[StoredEvent]:
        query = (
            select(LedgerEventRow.__table__)  # type: ignore[attr-defined]
            .where(
                col(LedgerEventRow.tenant) == self.scope.tenant,
                col(LedgerEventRow.mode) == self.scope.mode,
                col(LedgerEventRow.wallet) == f"customer:{customer_id}",
                col(LedgerEventRow.type) == kind,
            )
            .order_by(col(LedgerEventRow.sequence))
        )
        async with self.services.database.read(of(*self.scope)) as connection:
            rows = list(await connection.execute(query))
        return [
            StoredEvent(
                tenant=row.tenant,
                mode=row.mode,
                wallet=row.wallet,
                sequence=row.sequence,
                id=row.id,
                type=row.type,
                at_us=row.at_us,
                body=msgspec.json.decode(row.body),
            )
            for row in rows
        ]

    async def tell_of_expiry(self, customer_id: str) -> None:
        """What the sweep, and then the outbox, do when a plan is over."""
        await self.services.ledger.sweep(self.office.clock.now_us())
        for event in await self.events(customer_id, "credit.expired"):
            await self.auto_buy.on_event(event)

    async def blocks(self, customer_id: str) -> tuple[Block, ...]:
        view = await self.services.ledger.wallet_view(customer_wallet(*self.scope, customer_id))
        assert view is not None
        return view.blocks

    async def own(self, customer_id: str) -> int:
        """What is left of the customer's own credits, in credits."""
        blocks = await self.blocks(customer_id)
        return sum(block.remaining for block in blocks if block.funding is not Funding.PLAN) // 10**CREDIT.scale


@pytest.fixture
async def shop(office: Office) -> Shop:
    await office.post("/v1/packs", HOUR)
    return Shop(office)


async def refused(asking: Awaitable[Any]) -> InsufficientCredits:
    with pytest.raises(InsufficientCredits) as caught:
        await asking
    return caught.value


async def test_a_message_that_is_not_affordable_buys_the_preferred_plan(shop: Shop):
    alice = await shop.customer("alice")
    await shop.send(alice)
    assert await shop.plans(alice) == ["refused"]
    assert await shop.own(alice) == 900
    for _ in range(3):
        await shop.send(alice)
    assert await shop.plans(alice) == ["refused"], "the plan is there"
    await shop.send(alice, 196)
    await shop.send(alice)
    assert await shop.plans(alice) == ["refused", "refused"], "it was used up"


async def test_a_plan_that_expires_is_followed_by_the_next(shop: Shop):
    alice = await shop.customer("alice")
    await shop.send(alice)
    shop.office.clock.pass_s(3600)
    await shop.tell_of_expiry(alice)
    assert await shop.plans(alice) == ["refused", "expired"]
    for _ in range(3):
        await shop.tell_of_expiry(alice)
    assert await shop.plans(alice) == ["refused", "expired"], "an event comes at least once"
    assert await shop.own(alice) == 800


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_buy_enabled": False},
        {"auto_buy_pack": None},
        {"auto_buy_pack": "no_such_pack"},
        {"auto_buy_pack": "week"},
    ],
)
async def test_nothing_is_bought_for_who_has_not_agreed_or_whose_pack_is_not_sold(shop: Shop, settings: dict[str, Any]):
    await shop.office.post("/v1/packs", {**HOUR, "key": "week"})
    await shop.office.post("/v1/packs/week/archive")
    alice = await shop.customer("alice", **settings)
    await refused(shop.send(alice))
    await shop.office.post("/v1/customers/alice/packs", {"pack": "hour"})
    shop.office.clock.pass_s(3600)
    await shop.tell_of_expiry(alice)
    await refused(shop.send(alice))
    assert await shop.plans(alice) == ["bought"]
    assert await shop.own(alice) == 900


async def test_who_cannot_pay_is_denied_and_charged_nothing(shop: Shop):
    alice = await shop.customer("alice", credits=150_000)
    await shop.send(alice, 200)
    error = await refused(shop.send(alice))
    assert (error.needed, error.available) == (10**CREDIT.scale, 0)
    shop.office.clock.pass_s(3600)
    await shop.tell_of_expiry(alice)
    assert await shop.plans(alice) == ["refused"]
    assert await shop.own(alice) == 50
    await shop.office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 50_000, "metrics": ["hour"]})
    await shop.send(alice)
    assert await shop.plans(alice) == ["refused", "refused"], "a cause that could not be paid is not used up"


async def test_a_plan_is_bought_at_the_customers_own_price(shop: Shop):
    alice = await shop.customer("alice", auto_buy_price=120_000, auto_buy_credits=130_000)
    await shop.send(alice, 130)
    assert await shop.own(alice) == 880
    assert (await refused(shop.send(alice, 131))).available == 0


async def test_none_is_bought_that_would_not_help(shop: Shop):
    """Else a customer would buy a plan with every refusal."""
    alice = await shop.customer("alice")
    await refused(shop.send(alice, 201))
    await refused(shop.send(alice, tags=Tags(metric="plan_purchase_1hr", priority_max=0)))
    await shop.office.ask("PATCH", "/v1/packs/hour", {"metrics": ["chat_message"]})
    await refused(shop.send(alice, tags=Tags(metric="other")))
    assert await shop.plans(alice) == []
    await shop.send(alice)
    assert await shop.plans(alice) == ["refused"]


async def test_none_is_bought_that_costs_what_it_brings(shop: Shop):
    """The price comes out of the very credits that were too few: each refusal would turn more of them into a plan."""
    alice = await shop.customer("alice", credits=1000)
    await shop.office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 500_000})
    for _ in range(2):
        await refused(shop.send(alice, 602))
    assert await shop.plans(alice) == []
    await shop.send(alice, 601)
    assert await shop.plans(alice) == ["refused"], "1 and 500 less the price, and 200 of the plan"


async def test_a_plan_that_is_active_but_too_small_is_followed_by_another(shop: Shop):
    """What it has left, and the next, pay together."""
    alice = await shop.customer("alice")
    await shop.send(alice, 150)
    await shop.send(alice, 100)
    assert await shop.plans(alice) == ["refused", "refused"]
    ends = {block.expires_at_us for block in await shop.blocks(alice) if block.funding is Funding.PLAN}
    assert len(ends) == 1, "the first is used up; the second ends an hour after it would have"


async def test_while_a_stacked_plan_is_active_an_expiry_buys_none(shop: Shop):
    alice = await shop.customer("alice")
    for _ in range(2):
        await shop.office.post("/v1/customers/alice/packs", {"pack": "hour"})
    shop.office.clock.pass_s(3600)
    await shop.tell_of_expiry(alice)
    assert await shop.plans(alice) == ["bought", "bought"]
    shop.office.clock.pass_s(3600)
    await shop.tell_of_expiry(alice)
    assert await shop.plans(alice) == ["bought", "bought", "expired"]


async def test_a_plan_that_was_used_up_and_followed_does_not_buy_another_when_its_end_is_booked_late(shop: Shop):
    """The message came between the end of the first plan and the sweep that booked it, and used the next one up."""
    alice = await shop.customer("alice")
    await shop.send(alice)
    shop.office.clock.pass_s(3600)
    await shop.send(alice, 200)
    shop.office.clock.pass_s(5)
    await shop.tell_of_expiry(alice)
    assert await shop.plans(alice) == ["refused", "refused"]


async def test_only_a_plans_end_is_followed(shop: Shop):
    """The plan of the two-call way is a grant: whoever made it listens to its end."""
    alice = await shop.customer("alice")
    await shop.send(alice, 200)
    ends = time_text(shop.office.clock.now_us() + 60 * 1_000_000)
    grant = {"customer_id": "alice", "credits": 1000, "priority": 10, "expires_at": ends}
    await shop.office.post("/v1/topup/grant", grant)
    shop.office.clock.pass_s(60)
    await shop.tell_of_expiry(alice)
    assert len(await shop.events(alice, "credit.expired")) == 1
    assert await shop.plans(alice) == ["refused"]


async def test_the_customer_buys_nothing_where_the_developer_is_short(shop: Shop):
    """The price of a product action is the customer's, what it leaves uncovered the developer's."""
    alice = await shop.customer("alice")
    await shop.office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000})
    amount = 10**CREDIT.scale
    legs = tuple(
        ReserveLeg((wallet,), amount, amount)
        for wallet in (customer_wallet(*shop.scope, alice), app_wallet(*shop.scope, shop.office.app))
    )
    await refused(shop.send(alice, legs=legs, charges=(Charge(0, amount), Charge(0, amount))))
    await refused(shop.send(alice, legs=legs[1:]))
    assert await shop.plans(alice) == []


async def test_a_proxied_message_buys_a_plan_too(shop: Shop):
    alice = await shop.customer("alice")
    assert (await shop.office.chat("alice")).status_code == 200
    assert await shop.plans(alice) == ["refused"]
    bob = await shop.customer("bob", auto_buy_enabled=False)
    assert (await shop.office.chat("bob")).status_code == 402
    assert await shop.plans(bob) == []


async def test_what_was_bought_is_there_when_the_message_was_lost_after_it(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    alice = await shop.customer("alice")
    execute = Ledger.execute

    async def dying(ledger: Ledger, command: AnyCommand) -> Applied:
        applied = await execute(ledger, command)
        if isinstance(command, Purchase):
            raise LedgerUnavailable("the process died here", in_doubt=True)
        return applied

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "execute", dying)
        with pytest.raises(LedgerUnavailable):
            await shop.send(alice)
    assert await shop.plans(alice) == ["refused"]
    await shop.send(alice)
    assert await shop.plans(alice) == ["refused"]


async def test_messages_that_are_refused_together_buy_one_plan(shop: Shop):
    for number in range(20):
        alice = await shop.customer(f"alice{number}")
        await asyncio.gather(*(shop.send(alice) for _ in range(10)))
        assert await shop.plans(alice) == ["refused"]


async def race(first: Shop, second: Shop, customer_id: str, seed: random.Random) -> None:
    """A plan has just ended: messages come, and its end is booked and told twice, all at once and in both processes."""

    async def end_is_told(shop: Shop) -> None:
        expire = Expire(
            id=shop.services.new_id("cmd"), scope=shop.scope, wallet=customer_wallet(*shop.scope, customer_id)
        )
        await shop.services.ledger.execute(expire)
        for event in await shop.events(customer_id, "credit.expired"):
            await shop.auto_buy.on_event(event)

    work = [
        lambda: first.send(customer_id),
        lambda: second.send(customer_id),
        lambda: end_is_told(first),
        lambda: end_is_told(second),
    ]
    seed.shuffle(work)
    await asyncio.gather(*(each() for each in work))


async def races(first: Shop, second: Shop, seed: random.Random, *, rounds: int) -> None:
    for begun in range(0, rounds, RACES_AT_ONCE):
        names = [f"user{number}" for number in range(begun, min(begun + RACES_AT_ONCE, rounds))]
        customers = await asyncio.gather(*(first.customer(name) for name in names))
        await asyncio.gather(*(first.send(customer) for customer in customers))
        first.office.clock.pass_s(3600)
        await asyncio.gather(*(race(first, second, customer, seed) for customer in customers))
        await worked_off(first.office)  # The gateways' own outboxes react to the same ends meanwhile.
        for customer in customers:
            assert len(await first.plans(customer)) == 2, await first.plans(customer)
            assert await first.own(customer) == 800


@pytest.mark.campaign
async def test_the_end_of_a_plan_buys_one_whoever_notices_it(shop: Shop, campaign: Campaign):
    await races(shop, shop, campaign.random(), rounds=campaign.rounds(short=200, long=1_000))


@pytest.mark.campaign
async def test_the_end_of_a_plan_buys_one_whichever_process_notices_it(shop: Shop, campaign: Campaign):
    """Two gateways on one database, each with what it has kept of it: only the database is between them."""
    services = shop.services
    gateway = Gateway(services.settings, now_us=shop.office.clock.now_us, open_store=open_store)
    await gateway.start()
    try:
        other = Shop(shop.office, gateway)
        await races(shop, other, campaign.random(), rounds=campaign.rounds(short=100, long=1_000))
    finally:
        await gateway.stop()
