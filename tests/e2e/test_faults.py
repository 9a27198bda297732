"""Faults under load on PostgreSQL: no wrong cent, and the service comes back by itself.

How it works. In each round clients ask both hosts without a pause; a fault comes and goes; every client must be served
again in time; then the clients stop, and the books are audited.
"""

import asyncio
import os
import random
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
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

    def add(self, seen: list[Seen], *, whole: int) -> None:
        self.rounds += 1
        self.asked += len(seen)
        self.whole += whole
        self.failed += len(seen) - whole
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
            assert client.dbsize(), "there was something to forget"
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
    goal = load.served + rng.randrange(30, 90)
    await until_async(lambda: load.served >= goal, within_s=TRAFFIC_S, what="service in spite of it")


KINDS: Final[dict[str, tuple[Fault, ...]]] = {
    "processes die": (a_worker_is_killed, a_host_is_killed),
    "PostgreSQL fails": (postgres_is_killed, postgres_stands_still, the_network_stands_still, the_journal_has_no_room),
    "connections are cut": tuple(partial(the_connection_is_cut, spot=spot) for spot in Spot),
    "Redis fails": (redis_is_killed, redis_is_flushed, redis_is_slow),
    "clocks step": (a_clock_steps,),
}
NOT_FELT: Final = {"Redis fails", "clocks step"}
"""No request may fail: neither is ever the truth."""

DEADLY: Final = {"processes die"}
"""Connections end without an answer. All others fail requests with 503, or streams without `[DONE]`."""


async def one_round(fleet: Fleet, faults: Sequence[Fault], rng: random.Random, findings: Findings) -> list[Seen]:
    """The faults under load, until everybody is served again after each; then the audit. What the clients saw."""
    async with fleet.loaded(rng, clients=CLIENTS) as load:
        for fault in faults:
            await fault(fleet, load, rng)
            findings.back_s.append(await served_again(load))
    findings.add(load.all, whole=await fleet.audit(load.all))
    return load.all


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
async def test_a_fault_costs_nobody_a_cent_and_passes(
    kind: str, fleets: Fleets, campaign: Campaign, record_property: Callable[[str, object], None]
) -> None:
    rng, findings = campaign.random(), Findings()
    faults = KINDS[kind]
    # A short campaign lets all of a kind strike under one load, and audits once.
    rounds = [[fault] for fault in faults for _ in range(20)] if campaign.long else [rng.sample(faults, len(faults))]
    for struck in rounds:
        seen = await one_round(await asyncio.to_thread(fleets.next), struck, rng, findings)
        if kind in NOT_FELT:
            assert [each for each in seen if not each.served] == []
        elif kind not in DEADLY:
            assert [each for each in seen if each.status not in (200, 503)] == []
    assert findings.slowest_s < (ANSWER_S + MARGIN_S if kind in NOT_FELT else SLOWEST_S), findings
    print(f"\n{kind}: {findings}; FAREBOX_TEST_SEED={campaign.seed}")
    record_property(kind, str(findings))
