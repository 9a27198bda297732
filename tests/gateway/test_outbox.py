"""The outbox by itself: which events become deliveries, in which order, and that none is lost on the way."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text, update
from sqlmodel import col

from gateway.database import Database, of
from gateway.events import outbox as outbox_module
from gateway.events.endpoints import Endpoint, Endpoints
from gateway.events.event import Reaction, StoredEvent
from gateway.events.outbox import Outbox
from gateway.ids import new_id
from gateway.tables import Tenant, WebhookDelivery, WebhookEndpoint
from ledger.model import Scope
from ledger.store.tables import LedgerEventRow

A, B = Scope("ten_a", "live"), Scope("ten_b", "live")
SECOND_US = 1_000_000


@pytest.fixture
async def tenants(database: Database) -> Database:
    await make_tenants(database)
    return database


@pytest.fixture
async def served(gateway_url: str) -> AsyncIterator[Database]:
    """On a server, where others write while somebody reads."""
    database = Database(gateway_url)
    await make_tenants(database)
    yield database
    await database.close()


async def make_tenants(database: Database) -> None:
    for scope in (A, B):
        async with database.write(of(*scope)) as connection:
            row = {"id": scope.tenant, "name": scope.tenant, "asset_code": "CREDIT", "created_at_us": 1}
            await connection.execute(insert(Tenant).values(**row))


async def happens(database: Database, *events: tuple[str, int, str], scope: Scope = A) -> None:
    """Events by wallet, number and type, each a microsecond after the one before."""
    rows = [
        {
            "tenant": scope.tenant,
            "mode": scope.mode,
            "wallet": f"customer:{wallet}",
            "sequence": sequence,
            "id": new_id("evt"),
            "type": kind,
            "at_us": at_us,
            "body": json.dumps({"amount": 1}),
        }
        for at_us, (wallet, sequence, kind) in enumerate(events, start=1)
    ]
    async with database.write(of(*scope)) as connection:
        await connection.execute(insert(LedgerEventRow), rows)


async def subscribe(database: Database, *types: str, scope: Scope = A) -> Endpoint:
    endpoints = Endpoints(database, now_us=lambda: 1, new_id=new_id)
    return await endpoints.create(scope, url="https://example.com/", types=types, description="")


async def told(database: Database, scope: Scope = A) -> list[tuple[str, int]]:
    """What became deliveries."""
    query = select(col(WebhookDelivery.wallet), col(WebhookDelivery.sequence)).order_by(
        col(WebhookDelivery.wallet), col(WebhookDelivery.sequence)
    )
    async with database.read(of(*scope)) as connection:
        rows = await connection.execute(query.where(col(WebhookDelivery.tenant) == scope.tenant))
        return [(wallet.removeprefix("customer:"), sequence) for wallet, sequence in rows]


async def pending(database: Database, scope: Scope = A) -> int:
    query = select(func.count()).where(
        col(LedgerEventRow.tenant) == scope.tenant, col(LedgerEventRow.delivered_at_us).is_(None)
    )
    async with database.read(of(*scope)) as connection:
        found = await connection.scalar(query)
    assert found is not None
    return found


def working(database: Database, *reactions: Reaction, clock: list[int] | None = None) -> Outbox:
    now = clock or [1]
    return Outbox(database, holder=new_id("run"), reactions=reactions, now_us=lambda: now[0])


async def test_what_nobody_asks_for_is_skipped_in_bulk_and_holds_up_nothing(
    tenants: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outbox_module, "BULK_PAGE", 10)
    monkeypatch.setattr(outbox_module, "PAGE", 3)
    await subscribe(tenants, "credit.granted")
    flood = [("flood", sequence, "usage.recorded") for sequence in range(1, 26)]
    await happens(tenants, *flood, ("alice", 1, "usage.recorded"), ("alice", 2, "credit.granted"))
    outbox = working(tenants)
    first = await outbox.round()
    assert (await told(tenants), await pending(tenants)) == ([("alice", 2)], 16)
    assert first.more
    assert first.asked
    rounds = [await outbox.round() for _ in range(2)]
    assert [worked.more for worked in rounds] == [True, False]
    assert not any(worked.asked for worked in rounds)
    assert (await told(tenants), await pending(tenants)) == ([("alice", 2)], 0)


async def test_what_somebody_asks_for_is_told_in_order_around_what_nobody_does(tenants: Database):
    await subscribe(tenants, "credit.granted")
    await subscribe(tenants, "credit.expired")
    kinds = ("credit.granted", "usage.recorded", "credit.expired", "usage.recorded", "credit.granted")
    await happens(tenants, *(("alice", sequence, kind) for sequence, kind in enumerate(kinds, start=1)))
    await working(tenants).round()
    assert (await told(tenants), await pending(tenants)) == ([("alice", 1), ("alice", 3), ("alice", 5)], 0)


async def test_what_is_told_marks_nothing_that_lies_between(tenants: Database, monkeypatch: pytest.MonkeyPatch):
    """It was left for the next round; by then somebody may have asked for it."""
    monkeypatch.setattr(outbox_module, "BULK_PAGE", 1)
    await subscribe(tenants, "credit.granted")
    kinds = ("credit.granted", "usage.recorded", "credit.granted")
    await happens(
        tenants,
        ("bob", 1, "usage.recorded"),
        *(("alice", sequence, kind) for sequence, kind in enumerate(kinds, start=1)),
    )
    await working(tenants).round()
    assert (await told(tenants), await pending(tenants)) == ([("alice", 1), ("alice", 3)], 1)


async def test_who_asks_for_everything_is_told_everything(tenants: Database):
    await subscribe(tenants, "*")
    await happens(tenants, ("alice", 1, "usage.recorded"), ("bob", 1, "credit.granted"), ("alice", 2, "usage.recorded"))
    await working(tenants).round()
    assert (await told(tenants), await pending(tenants)) == ([("alice", 1), ("alice", 2), ("bob", 1)], 0)


Meanwhile = Callable[[Database], Awaitable[None]]


async def a_first_endpoint(database: Database) -> None:
    await subscribe(database, "usage.recorded")


async def another_type(database: Database) -> None:
    async with database.write(of(*A)) as connection:
        changed = update(WebhookEndpoint).values(types=["credit.granted", "usage.recorded"], version=2)
        await connection.execute(changed)


@pytest.mark.parametrize("meanwhile", [a_first_endpoint, another_type])
async def test_who_subscribes_while_a_page_is_read_misses_nothing_that_comes_after(
    served: Database, monkeypatch: pytest.MonkeyPatch, meanwhile: Meanwhile
):
    """The endpoints were read; then one came, and its owner was answered; then something happened; then it is read."""
    if meanwhile is another_type:
        await subscribe(served, "credit.granted")
    await happens(served, ("bob", 1, "usage.recorded"))
    read = outbox_module.enabled_endpoints
    times = []

    async def read_and_then(*arguments: Any) -> list[Endpoint]:
        found = await read(*arguments)
        times.append(len(found))
        if len(times) == 1:
            await meanwhile(served)
            await happens(served, ("alice", 1, "usage.recorded"))
        return found

    monkeypatch.setattr(outbox_module, "enabled_endpoints", read_and_then)
    outbox = working(served)
    while (await outbox.round()).more:
        pass
    assert ("alice", 1) in await told(served)
    assert await pending(served) == 0


async def test_a_tenant_whose_events_cannot_be_told_holds_up_nobody_else(tenants: Database):
    for scope in (A, B):
        await subscribe(tenants, "*", scope=scope)
        await happens(tenants, ("alice", 1, "credit.granted"), scope=scope)
    async with tenants.write(of(*A)) as connection:
        await connection.execute(text("UPDATE webhook_endpoints SET types = '5' WHERE tenant = 'ten_a'"))
    await working(tenants).round()
    assert (await pending(tenants, A), await pending(tenants, B)) == (1, 0)


async def test_a_wallet_whose_reaction_failed_here_and_went_well_elsewhere_is_held_back_no_more(tenants: Database):
    fails, now = [True], [SECOND_US]

    async def react(event: StoredEvent) -> None:
        if fails[0]:
            raise ValueError("the test wants it to fail")

    reaction = Reaction(frozenset({"credit.expired"}), react)
    here, elsewhere = working(tenants, reaction, clock=now), working(tenants, reaction, clock=now)
    await subscribe(tenants, "*")
    await happens(tenants, ("alice", 1, "credit.expired"))
    await here.round()
    assert await told(tenants) == []
    fails[0] = False
    await elsewhere.round()
    now[0] += 5 * SECOND_US
    await happens(tenants, ("alice", 2, "credit.granted"), ("bob", 1, "credit.expired"))
    await here.round()
    assert (await told(tenants), await pending(tenants)) == ([("alice", 1), ("alice", 2), ("bob", 1)], 0)
