"""Periodic work: when it is due, one of all processes does it, and what was broken off is done again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import pytest

from gateway.database import Database
from gateway.identity.tenants import Tenants
from gateway.payments.sweeps import Kept, Sweep, Sweeps, daily, every, forgetful
from ledger.model import Scope
from tests.gateway.conftest import Clock

HOUR_S = 3_600
LEASE_S = 600
WAIT_S = 20


@pytest.fixture
async def scope(database: Database) -> Scope:
    tenant = await Tenants(database).create_tenant("Operator", first=True)
    return Scope(tenant.id, "live")


@pytest.fixture
async def processes(database_url: str, scope: Scope, clock: Clock) -> AsyncIterator[list[Sweeps]]:
    databases = [Database(database_url) for _ in range(3)]
    yield [Sweeps(each, whose(scope), now_us=clock.now_us, pause_s=0.01) for each in databases]
    for each in databases:
        await each.close()


def whose(scope: Scope) -> Callable[[], Awaitable[Scope]]:
    async def told() -> Scope:
        return scope

    return told


def hourly(work: Callable[[], Awaitable[object]]) -> Sweep:
    return Sweep(name="count", schedule=every(HOUR_S), work=forgetful(work), lease_s=LEASE_S)


def at_us(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


class Counted:
    def __init__(self, *, failures: int = 0) -> None:
        self.done = 0
        self.failures = failures

    async def work(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("the other side is away")
        self.done += 1


@pytest.mark.parametrize(
    ("now", "due"),
    [
        ("2026-11-21T02:59:59", "2026-11-21T03:00:00"),
        ("2026-11-21T03:00:00", "2026-11-22T03:00:00"),
        ("2026-12-31T12:00:00", "2027-01-01T03:00:00"),
    ],
)
def test_a_daily_work_is_due_at_its_hour(now: str, due: str) -> None:
    assert daily(3)(at_us(now)) == at_us(due)


async def test_of_all_processes_one_does_it_when_it_is_due(processes: list[Sweeps], clock: Clock) -> None:
    counted = Counted()
    sweep = hourly(counted.work)
    assert not any([await each.run_if_due(sweep) for each in processes])
    for turn in (1, 2):
        clock.pass_s(HOUR_S)
        done = await asyncio.gather(*(each.run_if_due(sweep) for each in processes))
        assert sorted(done) == [False, False, True]
        assert counted.done == turn


async def test_what_failed_is_tried_again_when_its_lease_has_ended(processes: list[Sweeps], clock: Clock) -> None:
    counted = Counted(failures=1)
    sweep = hourly(counted.work)
    await processes[0].run_if_due(sweep)
    clock.pass_s(HOUR_S)
    with pytest.raises(OSError, match="away"):
        await processes[0].run_if_due(sweep)
    assert not await processes[1].run_if_due(sweep)
    clock.pass_s(LEASE_S)
    assert await processes[1].run_if_due(sweep)
    assert counted.done == 1


async def test_what_takes_too_long_is_ended(processes: list[Sweeps], clock: Clock) -> None:
    """Somebody else begins when the lease has ended: two must not be at it together."""
    sweep = Sweep(name="endless", schedule=every(HOUR_S), work=forgetful(asyncio.Event().wait), lease_s=0.05)
    await processes[0].run_if_due(sweep)
    clock.pass_s(HOUR_S)
    with pytest.raises(TimeoutError):
        await processes[0].run_if_due(sweep)


async def test_what_a_work_keeps_it_has_the_next_time_and_every_process_sees_it(
    processes: list[Sweeps], clock: Clock
) -> None:
    seen: list[Kept] = []

    async def count(kept: Kept) -> Kept:
        if kept.get("times") == 2:
            raise OSError("the other side is away")
        return {"times": kept.get("times", 0) + 1}

    sweep = Sweep(name="count", schedule=every(HOUR_S), work=count, look=seen.append, lease_s=LEASE_S)
    await processes[0].run_if_due(sweep)
    for process in processes[:2]:
        clock.pass_s(HOUR_S)
        assert await process.run_if_due(sweep)
    clock.pass_s(HOUR_S)
    with pytest.raises(OSError, match="away"):
        await processes[2].run_if_due(sweep)
    seen.clear()
    assert not await processes[0].run_if_due(sweep)
    assert seen == [{"times": 2}], "what failed leaves it as it was"


async def test_the_loop_goes_on_after_a_failure(processes: list[Sweeps], clock: Clock) -> None:
    counted = Counted(failures=1)
    for each in processes:
        each.add(hourly(counted.work))
        each.start()
    try:
        async with asyncio.timeout(WAIT_S):
            while counted.failures or not counted.done:
                clock.pass_s(HOUR_S)
                await asyncio.sleep(0.02)
    finally:
        for each in processes:
            await each.stop()
