"""Faults under load on PostgreSQL: no wrong cent, and the service comes back by itself.

How it works. In each round clients ask both hosts without a pause; a fault comes and goes; every client must be served
again in time; then the clients stop, and the books are audited. A fault of what is never the truth (Redis, a host's
clock) may not even fail a request.
"""

import asyncio
import os
import random
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import pytest

from tests.conftest import Campaign
from tests.e2e.farebox import until_async
from tests.e2e.fleet import ANSWER_S, MARGIN_S, SLOWEST_S, TRAFFIC_S, Fleet, Fleets, served_again
from tests.e2e.load import Load, Seen
from tests.servers.postgres_proxy import Spot

CLIENTS: Final = 24
HANG_S: Final = 5.0
MINUTE_S: Final = 60.0


@dataclass
class Findings:
    """What a campaign met, added up over its rounds."""

    rounds: int = 0
    asked: int = 0
    whole: int = 0
    failed: int = 0
    back_s: list[float] = field(default_factory=list)
    slowest_s: float = 0.0

    def add(self, seen: list[Seen], *, whole: int, back_s: float) -> None:
        self.rounds += 1
        self.asked += len(seen)
        self.whole += whole
        self.failed += len(seen) - whole
        self.back_s.append(back_s)
        self.slowest_s = max([self.slowest_s, *(each.ended_s - each.asked_s for each in seen)])

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.asked} requests, {self.whole} whole answers, each charged once; "
            f"{self.failed} not served; back within {max(self.back_s):.1f} s; slowest answer {self.slowest_s:.1f} s"
        )


# The faults: each ends when it is over.

Fault = Callable[[Fleet, Load, random.Random], Awaitable[None]]


async def a_worker_is_killed(fleet: Fleet, load: Load, rng: random.Random) -> None:
    before = fleet.gateways[0].workers
    os.kill(rng.choice(before), signal.SIGKILL)


async def a_host_is_killed(fleet: Fleet, load: Load, rng: random.Random) -> None:
    """And its gateway started again, on another port; until then half of what is asked finds nobody."""
    number = rng.randrange(2)
    fleet.gateways[number].kill()
    await asyncio.to_thread(fleet.serve_again, number)
    load.base_urls = fleet.base_urls


async def postgres_is_killed(fleet: Fleet, load: Load, rng: random.Random) -> None:
    await asyncio.to_thread(fleet.servers.postgres.kill)
    await asyncio.to_thread(fleet.servers.postgres.start)


async def postgres_stands_still(fleet: Fleet, load: Load, rng: random.Random) -> None:
    over = asyncio.Event()
    fleet.servers.postgres.pause()
    asyncio.get_running_loop().call_later(HANG_S, over.set)
    try:
        await over.wait()
    finally:
        fleet.servers.postgres.resume()


async def the_network_stands_still(fleet: Fleet, load: Load, rng: random.Random) -> None:
    """The server goes on: what was asked before happens, and nobody hears of it for five seconds."""
    fleet.servers.proxy.hang(for_s=HANG_S)
    await until_async(lambda: not fleet.servers.proxy.hanging, within_s=TRAFFIC_S, what="end of the stillness")


async def the_connection_is_cut(fleet: Fleet, load: Load, rng: random.Random, *, spot: Spot) -> None:
    proxy = fleet.servers.proxy
    wanted = proxy.cuts + rng.randrange(2, 6)
    proxy.cut_at(spot, every=rng.randrange(2, 12), times=wanted - proxy.cuts)
    await until_async(lambda: proxy.cuts == wanted, within_s=TRAFFIC_S, what="connection cut")


async def the_journal_has_no_room(fleet: Fleet, load: Load, rng: random.Random) -> None:
    """While the database is away as well: no process may write a byte to a file."""
    pids = [pid for gateway in fleet.gateways for pid in (gateway.pid, *gateway.workers)]
    began_s = time.monotonic()
    with no_room(pids):
        await asyncio.to_thread(fleet.servers.postgres.kill)
        await until_async(
            lambda: any(each.status == 503 and each.ended_s > began_s for each in load.all),
            within_s=TRAFFIC_S,
            what="refusal",
        )
        await asyncio.to_thread(fleet.servers.postgres.start)


@contextmanager
def no_room(pids: list[int]) -> Iterator[None]:
    """The kernel refuses what those processes write to files, with EFBIG rather than ENOSPC."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


async def redis_is_killed(fleet: Fleet, load: Load, rng: random.Random) -> None:
    fleet.servers.valkey.kill()
    try:
        await more_served(load, rng)
    finally:
        fleet.servers.valkey.start()
    await more_served(load, rng)


async def redis_is_flushed(fleet: Fleet, load: Load, rng: random.Random) -> None:
    with fleet.servers.valkey.client() as client:
        for _ in range(rng.randrange(1, 5)):
            client.flushall()
            await more_served(load, rng)


async def redis_is_slow(fleet: Fleet, load: Load, rng: random.Random) -> None:
    fleet.servers.valkey_proxy.slow(by_s=rng.choice([0.05, 0.5, 5]))
    try:
        await more_served(load, rng)
    finally:
        fleet.servers.valkey_proxy.slow(by_s=0)
    await more_served(load, rng)


async def a_clock_steps(fleet: Fleet, load: Load, rng: random.Random) -> None:
    """One host's: a minute off, and back."""
    clock = rng.choice(fleet.clocks)
    clock.step(by_s=rng.choice([MINUTE_S, -MINUTE_S]))
    await more_served(load, rng)
    clock.step(by_s=0)
    await more_served(load, rng)


async def more_served(load: Load, rng: random.Random) -> None:
    goal = load.served + rng.randrange(50, 150)
    await until_async(lambda: load.served >= goal, within_s=TRAFFIC_S, what="service in spite of it")


FELT: Final[dict[str, Fault]] = {
    "a worker is killed": a_worker_is_killed,
    "a host is killed": a_host_is_killed,
    "PostgreSQL is killed": postgres_is_killed,
    "PostgreSQL stands still": postgres_stands_still,
    "the network stands still": the_network_stands_still,
    **{f"cut: {spot.value}": partial(the_connection_is_cut, spot=spot) for spot in Spot},
    "the journal has no room": the_journal_has_no_room,
}
"""Requests may fail while it lasts."""

DEADLY: Final = {"a worker is killed", "a host is killed"}
"""Connections end without an answer. All others fail requests with 503, or streams without `[DONE]`."""

NOT_FELT: Final[dict[str, Fault]] = {
    "Redis is killed": redis_is_killed,
    "Redis is flushed": redis_is_flushed,
    "Redis is slow": redis_is_slow,
    "a clock steps": a_clock_steps,
}
"""No request may fail."""


# The rounds.


async def one_round(fleet: Fleet, fault: Fault, rng: random.Random, findings: Findings) -> list[Seen]:
    """The fault under load, until everybody is served again; then the audit. What the clients saw."""
    async with fleet.loaded(rng, clients=CLIENTS) as load:
        await fault(fleet, load, rng)
        back_s = await served_again(load)
    findings.add(load.all, whole=await fleet.audit(load), back_s=back_s)
    return load.all


@pytest.mark.campaign
@pytest.mark.parametrize("name", FELT)
async def test_a_fault_costs_nobody_a_cent_and_passes(
    name: str, fleets: Fleets, campaign: Campaign, record_property: Callable[[str, object], None]
) -> None:
    rng, findings = campaign.random(), Findings()
    for _ in range(campaign.rounds(short=1, long=20)):
        seen = await one_round(await asyncio.to_thread(fleets.next), FELT[name], rng, findings)
        if name not in DEADLY:
            assert [each for each in seen if each.status not in (200, 503)] == []
    assert findings.slowest_s < SLOWEST_S, findings
    report(name, findings, campaign, record_property)


@pytest.mark.campaign
@pytest.mark.parametrize("name", NOT_FELT)
async def test_a_fault_beside_the_truth_is_not_even_noticed(
    name: str, fleets: Fleets, campaign: Campaign, record_property: Callable[[str, object], None]
) -> None:
    rng, findings = campaign.random(), Findings()
    for _ in range(campaign.rounds(short=1, long=20)):
        seen = await one_round(await asyncio.to_thread(fleets.next), NOT_FELT[name], rng, findings)
        assert [each for each in seen if not each.served] == []
    assert findings.slowest_s < ANSWER_S + MARGIN_S, findings
    report(name, findings, campaign, record_property)


def report(name: str, findings: Findings, campaign: Campaign, record_property: Callable[[str, object], None]) -> None:
    """Shown with `-s`, and kept in a report of the run."""
    print(f"\n{name}: {findings}; FAREBOX_TEST_SEED={campaign.seed}")
    record_property(name, str(findings))
