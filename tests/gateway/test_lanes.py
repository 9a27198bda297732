"""Lanes by themselves: whose turn it is, and that nobody waits for another in a ring."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import insert, select, text, update
from sqlmodel import col

from gateway.database import Database, of
from gateway.events.delivery import AT_ONCE_OF_TENANT_MAX, Dispatcher
from gateway.events.endpoints import Endpoints
from gateway.events.event import StoredEvent
from gateway.events.lanes import Attempted, Job, LaneRef, Lanes, NewDelivery, enqueue
from gateway.events.post import Answer, Outcome, Poster
from gateway.ids import new_id
from gateway.tables import Tenant, WebhookDelivery, WebhookLane
from ledger.model import Scope
from ledger.store.tables import LedgerEventRow

A, B = Scope("ten_a", "live"), Scope("ten_b", "live")
NOW_US = 1_000_000
WITHIN_S = 20


def lanes_of(database: Database, *, now_us: int = NOW_US) -> Lanes:
    return Lanes(database, holder=new_id("run"), now_us=lambda: now_us, jitter=lambda: 0)


async def delivery(database: Database, scope: Scope = A) -> LaneRef:
    """A tenant with an endpoint, and one event that is due there."""
    async with database.write(of(*scope)) as connection:
        tenant = {"id": scope.tenant, "name": "t", "asset_code": "CREDIT", "created_at_us": 1}
        await connection.execute(insert(Tenant).values(**tenant))
    endpoints = Endpoints(database, now_us=lambda: NOW_US, new_id=new_id)
    endpoint = await endpoints.create(scope, url="https://example.com/", types=("*",), description="")
    lane = LaneRef(*scope, endpoint.id, "customer:alice")
    event = {"wallet": lane.wallet, "sequence": 1, "id": "evt_1", "type": "credit.granted", "at_us": 1}
    async with database.write(of(*scope)) as connection:
        await connection.execute(insert(LedgerEventRow).values(**scope._asdict(), **event, body=json.dumps({})))
    await add(database, lane)
    return lane


async def add(database: Database, lane: LaneRef, *, now_us: int = NOW_US, aside: bool = False) -> None:
    new = NewDelivery(lane.endpoint, lane.wallet, 1, "evt_1", "credit.granted")
    async with database.write(of(*lane.scope)) as connection:
        await enqueue(connection, lane.scope, [new], now_us=now_us, aside=aside)


async def many(database: Database, scope: Scope, *, endpoints: int, wallets: int, due_at_us: int) -> None:
    rows = [
        {**scope._asdict(), "endpoint": f"whk_{endpoint}", "wallet": f"customer:{wallet}", "due_at_us": due_at_us}
        for endpoint in range(endpoints)
        for wallet in range(wallets)
    ]
    async with database.write(of(*scope)) as connection:
        await connection.execute(insert(WebhookLane), rows)


async def test_who_has_many_that_are_due_does_not_hide_the_others(database: Database):
    await many(database, A, endpoints=20, wallets=20, due_at_us=1)
    await many(database, B, endpoints=1, wallets=2, due_at_us=NOW_US)
    due = await lanes_of(database).due(of_each=16, page=10)
    assert [lane.tenant for lane in due[:4]] == ["ten_a", "ten_b", "ten_a", "ten_b"]
    assert {lane.tenant for lane in due[4:]} == {"ten_a"}
    assert len(due) == 10
    assert await lanes_of(database, now_us=0).due(of_each=16, page=10) == []


async def test_a_tenant_has_a_part_of_the_attempts_however_many_endpoints_hang(database: Database):
    await many(database, A, endpoints=20, wallets=2, due_at_us=1)
    await many(database, B, endpoints=1, wallets=1, due_at_us=NOW_US)

    class Hanging(Lanes):
        async def take(self, lane: LaneRef) -> Job | None:
            await asyncio.Event().wait()
            return None

    async def render(event: StoredEvent) -> str:
        return "{}"

    async def resolve(host: str, port: int) -> list[str]:
        return []

    lanes = Hanging(database, holder="run_1", now_us=lambda: NOW_US, jitter=lambda: 0)
    poster = Poster(resolve, allow_private=True)
    dispatcher = Dispatcher(lanes, poster, render=render, now_us=lambda: NOW_US)
    for _ in range(2):
        await dispatcher.round()
    assert dispatcher.under_way == AT_ONCE_OF_TENANT_MAX + 1
    visits = [task for task in asyncio.all_tasks() if task.get_name() == "webhook-visit"]
    for visit in visits:
        visit.cancel()
    await asyncio.gather(*visits, return_exceptions=True)
    await poster.close()


async def test_what_is_asked_for_again_while_it_is_attempted_is_attempted_again(database: Database):
    lane = await delivery(database)
    lanes = lanes_of(database, now_us=NOW_US + 5)
    job = await lanes.take(lane)
    assert job is not None
    await add(database, lane, now_us=NOW_US + 1, aside=True)
    again = await lanes.record(job, Attempted(delivered=True, status=200, error=None), more=True)
    assert again is not None
    assert (again.event.id, again.attempts) == ("evt_1", 0)
    assert await lanes.record(again, Attempted(delivered=True, status=200, error=None), more=True) is None
    async with database.read(of(*A)) as connection:
        states = (await connection.execute(select(col(WebhookDelivery.state), col(WebhookDelivery.attempts)))).all()
    assert [tuple(row) for row in states] == [("delivered", 1)]


async def test_what_breaks_in_an_unknown_way_is_an_attempt_like_any_other(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    lane = await delivery(database)

    async def render(event: StoredEvent) -> str:
        return "{}"

    async def resolve(host: str, port: int) -> list[str]:
        return []

    async def breaks(*arguments: object) -> Answer:
        raise ValueError("the test wants it to break")

    outcomes: list[str] = []
    poster = Poster(resolve, allow_private=True)
    monkeypatch.setattr(poster, "post", breaks)
    lanes = lanes_of(database)
    dispatcher = Dispatcher(lanes, poster, render=render, now_us=lambda: NOW_US, counted=outcomes.append)
    await dispatcher.round()
    deadline = time.monotonic() + WITHIN_S
    while dispatcher.under_way:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    await poster.close()
    assert outcomes == [Outcome.BROKEN]
    assert await lanes_of(database, now_us=NOW_US + 6 * 1_000_000).take(lane) is not None


@pytest.fixture
async def served(gateway_url: str) -> AsyncIterator[Database]:
    database = Database(gateway_url)
    yield database
    await database.close()


async def test_asking_again_and_recording_do_not_wait_for_each_other_in_a_ring(served: Database):
    """Whoever records has the lane and then the delivery: who asks again must not have the delivery meanwhile."""
    lane = await delivery(served)
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    async with served.write(of(*A)) as recording:
        await recording.execute(update(WebhookLane).values(holder="run_1"))
        asking = asyncio.create_task(add(served, lane, aside=True))
        deadline = time.monotonic() + WITHIN_S
        while not await recording.scalar(waiting):
            assert time.monotonic() < deadline
        await recording.execute(update(WebhookDelivery).values(attempts=1))
    await asking
