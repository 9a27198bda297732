"""A database that is gone for longer, and one that never comes back: its standby takes over."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from gateway.identity.principals import LEASE_S
from tests.conftest import Campaign
from tests.e2e.farebox import Farebox, until_async
from tests.e2e.fleet import (
    LEDGER_TIMEOUT_S,
    MARGIN_S,
    SLOWEST_S,
    TRAFFIC_S,
    Fleet,
    Fleets,
    running_fleet,
    running_replicated_servers,
    served_again,
)
from tests.e2e.load import Load, Seen

CLIENTS: Final = 24
FLOOD_CLIENTS: Final = 200
SAMPLE_S: Final = 0.25
ALLOWANCE: Final = "10000"
GROWTH_BYTES_MAX: Final = 96 * 2**20
"""Of the three processes that serve and their supervisor together, over what they had under the same load before."""


@pytest.mark.campaign
async def test_an_outage_fills_no_memory_is_answered_in_time_and_ends_by_itself(
    fleets: Fleets, campaign: Campaign, record_property: Callable[[str, object], None]
) -> None:
    away_s = campaign.rounds(short=5, long=60)
    fleet = await asyncio.to_thread(fleets.next)
    postgres = fleet.servers.postgres
    async with fleet.loaded(campaign.random(), clients=FLOOD_CLIENTS) as load:
        resident = [fleet.resident_bytes]

        def over() -> bool:
            resident.append(fleet.resident_bytes)
            return time.monotonic() > gone_s + away_s

        await asyncio.to_thread(postgres.kill)
        gone_s = time.monotonic()
        await until_async(over, within_s=away_s + TRAFFIC_S, what="end of the outage", poll_s=SAMPLE_S)
        back_asked_s = time.monotonic()
        await asyncio.to_thread(postgres.start)
        back_s = await served_again(load)
    grown_bytes = max(resident) - resident[0]
    assert grown_bytes < GROWTH_BYTES_MAX

    meanwhile = [each for each in load.all if gone_s < each.asked_s and each.ended_s < back_asked_s]
    assert len(meanwhile) > FLOOD_CLIENTS
    for each in meanwhile:
        assert each.status == 503, each
        assert each.json["error"]["code"] == "ledger_unavailable", each
        assert int(each.headers["retry-after"]) >= 1
    slowest_s = max(map(took_s, meanwhile))
    assert slowest_s < LEDGER_TIMEOUT_S + MARGIN_S
    assert max(map(took_s, load.all)) < SLOWEST_S
    whole = await fleet.audit(load.all)
    facts = (
        f"{away_s} s; {len(meanwhile)} refused, within {slowest_s:.1f} s; {grown_bytes // 2**20} MiB more memory; "
        f"back within {back_s:.1f} s; {whole} whole answers, each charged once"
    )
    print(f"\noutage: {facts}; FAREBOX_TEST_SEED={campaign.seed}")
    record_property("outage", facts)


def took_s(seen: Seen) -> float:
    return seen.ended_s - seen.asked_s


@pytest.mark.campaign
async def test_what_is_served_while_the_ledger_is_away_is_charged_once_though_processes_die(
    fleets: Fleets, campaign: Campaign, record_property: Callable[[str, object], None]
) -> None:
    """The tenant chose to be served. A worker dies in the outage, and a host; each had served, and was serving."""
    rng = campaign.random()
    for _ in range(campaign.rounds(short=1, long=20)):
        facts = await outage_survived(await asyncio.to_thread(fleets.next), rng)
        print(f"\nfail-open: {facts}; FAREBOX_TEST_SEED={campaign.seed}")
        record_property("fail-open", facts)


async def outage_survived(fleet: Fleet, rng: random.Random) -> str:
    """One round; what was met."""
    choose(fleet.hosts[0], "open", "--open-allowance", ALLOWANCE)
    known_s = time.monotonic() + LEASE_S
    async with fleet.loaded(rng, clients=CLIENTS) as load:
        await until_async(lambda: time.monotonic() > known_s, within_s=TRAFFIC_S, what="end of the principals' lease")
        await asyncio.to_thread(fleet.servers.postgres.kill)
        await more_away(load, rng)
        os.kill(rng.choice(fleet.gateways[0].workers), signal.SIGKILL)
        await more_away(load, rng)
        fleet.gateways[1].kill()
        await more_away(load, rng)
        await asyncio.to_thread(fleet.servers.postgres.start)
        await asyncio.to_thread(fleet.serve_again, 1)
        load.base_urls = fleet.base_urls
        back_s = await served_again(load)
    whole = await fleet.audit(load.all)
    choose(fleet.hosts[0], "closed")
    return f"{away(load)} of {whole} whole answers while it was away, each charged once; back within {back_s:.1f} s"


def choose(host: Farebox, *choice: str) -> None:
    """What becomes of the tenant's requests while the ledger is away."""
    done = host.run("tenants", "change", host.tenant_id, "--when-ledger-is-down", *choice)
    assert done.code == 0, done.err


def away(load: Load) -> int:
    """How many whole answers came without the ledger."""
    return sum(each.served and each.headers.get("x-quota-ledger") == "away" for each in load.all)


async def more_away(load: Load, rng: random.Random) -> None:
    goal = away(load) + rng.randrange(10, 60)
    await until_async(
        lambda: away(load) >= goal, within_s=TRAFFIC_S, what="service without the ledger", poll_s=SAMPLE_S
    )


@pytest.mark.campaign
async def test_a_promoted_standby_has_every_charge_that_was_answered(
    tmp_path: Path, campaign: Campaign, record_property: Callable[[str, object], None]
) -> None:
    rng = campaign.random()
    for number in range(campaign.rounds(short=1, long=20)):
        with running_replicated_servers() as servers, running_fleet(tmp_path / f"fleet-{number}", servers) as fleet:
            async with fleet.loaded(rng, clients=CLIENTS) as load:
                await asyncio.to_thread(servers.pair.primary.kill)
                await asyncio.to_thread(servers.pair.promote)
                back_s = await served_again(load)
            whole = await fleet.audit(load.all)
        facts = f"{whole} whole answers, each charged once on the standby; back within {back_s:.1f} s"
        print(f"\nfail-over: {facts}; FAREBOX_TEST_SEED={campaign.seed}")
        record_property(f"fail-over {number}", facts)
