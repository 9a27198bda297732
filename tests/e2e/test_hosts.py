"""Several hosts on one database: each sees at once what the others did, and they settle what a dead one leaves."""

import asyncio
from typing import Final

import psycopg

from tests.e2e.farebox import Farebox, until_async
from tests.e2e.fleet import SETTLED_S, Fleets
from tests.e2e.load import Seen, ask, chat, session, units

ORPHANS: Final = 40
AIM_S: Final = 60.0


async def test_the_orphans_of_a_dead_host_are_settled_once_though_all_others_sweep_at_once(
    fleets: Fleets,
) -> None:
    fleet = await asyncio.to_thread(fleets.next)
    dead, others = fleet.gateways[1], fleet.gateways[0]
    assert len(others.workers) == 2, "two processes that sweep"
    body = chat("meter", simulate={"tokens": 40, "hang_after_chunks": 10}, stream=True)
    seen = [Seen(model="meter") for _ in range(ORPHANS)]
    async with session() as client:
        asks = [
            asyncio.create_task(ask(client, dead.base_url, fleet.headers[number % len(fleet.headers)], body, seen=each))
            for number, each in enumerate(seen)
        ]
        await until_async(lambda: all(each.body for each in seen), within_s=AIM_S, what="first byte of each")
        dead.kill()
        await asyncio.gather(*asks)
    lapsed_before = lapses(fleet.hosts[0])
    orphans = {each.request_id or "" for each in seen}
    assert fleet.books.open_requests() == orphans

    with fleet.hosts[0].held_up():
        # Both sweepers find the same orphans due, and wait with what they want to write about them.
        await until_async(lambda: held_up(fleet.hosts[0]) == 2, within_s=SETTLED_S, what="two sweepers that wait")
    await fleet.all_settled()
    booked = fleet.books.requests()
    assert {booked[orphan].endings for orphan in orphans} == {("died",)}
    assert all(booked[orphan].charged == booked[orphan].recorded > 0 for orphan in orphans)
    assert lapses(fleet.hosts[0]) - lapsed_before == ORPHANS
    await asyncio.to_thread(fleet.serve_again, 1)
    await fleet.audit(seen)


def held_up(farebox: Farebox) -> int:
    """How many gateways wait for a lock."""
    with psycopg.connect(farebox.database_url) as connection:
        found = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'farebox' AND wait_event_type = 'Lock'"
        ).fetchone()
    assert found is not None
    waiting: int = found[0]
    return waiting


def lapses(farebox: Farebox) -> int:
    """How many reservations were charged because their time had run out."""
    with psycopg.connect(farebox.database_url) as connection:
        found = connection.execute(
            "SELECT count(*) FROM ledger_command WHERE kind = 'lapse' AND transfers > 0"
        ).fetchone()
    assert found is not None
    count: int = found[0]
    return count


async def test_what_one_host_charged_the_other_knows_at_once(fleets: Fleets) -> None:
    fleet = await asyncio.to_thread(fleets.next)
    body = chat("meter", simulate={"tokens": 10}, max_tokens=64)
    seen = []
    async with session() as client:
        for turn in range(20):
            seen.append(await ask(client, fleet.base_urls[turn % 2], fleet.headers[0], body))
    balances = [units(each.headers["x-quota-balance"]) for each in seen]
    charged = balances[0] - balances[1]
    assert charged > 0
    assert balances == [balances[0] - turn * charged for turn in range(20)]
    await fleet.audit(seen)
