"""The limit over all processes: exact while Redis answers, and short of others' requests for no more than a lease."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.proxy.rate_limit import UNLIMITED, WINDOW_S, Decision
from gateway.shared.link import Link
from gateway.shared.rate_limit import BUCKETS, SharedRateLimit
from gateway.telemetry import Metrics
from tests.gateway.test_shared_link import until
from tests.servers.valkey import ValkeyServer

PATIENT_S = 2.0
LEASE_S = 0.1


class Clock:
    """A host's monotonic clock, which begins anywhere."""

    def __init__(self, began_s: float = 0.0) -> None:
        self.ahead_s = began_s

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Process:
    """One of the processes of an installation, as far as the limit goes."""

    def __init__(self, url: str, *, clock_s: float = 0.0, timeout_s: float = PATIENT_S, lease_s: float = LEASE_S):
        self.clock = Clock(clock_s)
        self.link = Link(url, Metrics(), timeout_s=timeout_s, lease_s=lease_s)
        self.limit = SharedRateLimit(self.link, monotonic_s=self.clock, lease_s=lease_s)

    async def check(self, limit: int, key: str = "key_a") -> Decision:
        return await self.limit.check(key, limit)

    async def admitted(self, tries: int, limit: int, key: str = "key_a") -> int:
        decisions = await asyncio.gather(*(self.check(limit, key) for _ in range(tries)))
        return sum(decision.allowed for decision in decisions)


@contextlib.asynccontextmanager
async def processes(url: str, *options: dict[str, float]) -> AsyncIterator[list[Process]]:
    opened = [Process(url, **each) for each in options]
    for process in opened:
        await process.link.start()
        process.limit.start()
    yield opened
    for process in opened:
        await process.limit.stop()
        await process.link.stop()


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """A server of the test's own, which it may kill."""
    server = ValkeyServer().start()
    yield server
    server.close()


@pytest.fixture(params=["single", "cluster"])
def shared(request: pytest.FixtureRequest) -> ValkeyServer:
    """An empty server or cluster that others use too."""
    single = request.param == "single"
    request.getfixturevalue("redis_url" if single else "redis_cluster_url")
    server: ValkeyServer = request.getfixturevalue("valkey_server" if single else "valkey_cluster")
    return server


def counted(server: ValkeyServer, key: str = "key_a") -> int:
    """How many requests of *key* Redis knows."""
    with server.client() as client:
        (found,) = client.keys(f"farebox:{{rate:*}}:{key}") or (None,)
        return 0 if found is None else client.zcard(found)


def pass_in_redis(server: ValkeyServer, seconds: float, key: str = "key_a") -> None:
    """Let time pass for Redis, by making everything that it knows so much older."""
    with server.client() as client:
        (found,) = client.keys(f"farebox:{{rate:*}}:{key}")
        for name, at_us in client.zrange(found, 0, -1, withscores=True):
            client.zadd(found, {name: at_us - seconds * 1_000_000})


async def test_exactly_the_limit_is_admitted_over_all_processes(shared: ValkeyServer):
    # Their clocks have nothing to do with each other.
    async with processes(shared.url, {"clock_s": 0.0}, {"clock_s": 3_600.0}, {"clock_s": 86_400.0}) as three:
        admitted = await asyncio.gather(*(process.admitted(100, limit=50) for process in three))
        assert sum(admitted) == 50
        refused = await three[0].check(50)
        assert (refused.allowed, refused.remaining) == (False, 0)
        assert 55 <= refused.retry_after_s <= 60
        assert counted(shared) == 50


async def test_the_window_moves_with_the_clock_of_redis(redis_url: str, valkey_server: ValkeyServer):
    async with processes(redis_url, {}, {}) as (one, other):
        assert await one.admitted(2, limit=3) == 2
        pass_in_redis(valkey_server, 40)
        assert await other.check(3) == Decision(True, 3, 0, 20, 0)
        assert await one.check(3) == Decision(False, 3, 0, 20, 20)
        pass_in_redis(valkey_server, 20)
        assert await one.check(3) == Decision(True, 3, 1, 40, 0)


async def test_in_no_window_are_there_more_than_the_limit(redis_url: str, valkey_server: ValkeyServer):
    async with processes(redis_url, {}, {}) as both:
        admitted_at_s: list[float] = []
        for turn in range(24):
            for process in both:
                admitted_at_s += [turn * 7.0] * await process.admitted(3, limit=5)
            pass_in_redis(valkey_server, 7.0)
            for process in both:
                process.clock.ahead_s += 7.0
        for end_s in admitted_at_s:
            assert sum(end_s - WINDOW_S < at_s <= end_s for at_s in admitted_at_s) <= 5
        assert len(admitted_at_s) == 15  # Three whole windows in 168 seconds.


async def test_what_is_over_the_own_count_does_not_ask_redis(redis_url: str, valkey_server: ValkeyServer):
    async with processes(redis_url, {"lease_s": 60.0}) as (one,):
        assert await one.admitted(5, limit=5) == 5
        with valkey_server.client() as client:
            before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            assert await one.admitted(100, limit=5) == 0
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before


async def test_zero_is_off(redis_url: str):
    async with processes(redis_url, {}) as (one,):
        assert await one.check(0) == UNLIMITED


async def test_keys_and_lowered_limits_are_told_apart(redis_url: str):
    async with processes(redis_url, {}, {}) as (one, other):
        assert await one.admitted(5, limit=5) == 5
        assert (await other.check(5, "key_b")).allowed
        lowered = await other.check(2)
        assert (lowered.allowed, lowered.remaining) == (False, 0)
        assert (await other.check(6)).allowed


async def test_redis_forgets_what_has_left_the_window(redis_url: str, valkey_server: ValkeyServer):
    async with processes(redis_url, {}) as (one,):
        await one.admitted(10, limit=10)
        with valkey_server.client() as client:
            (window,) = client.keys("farebox:{rate:*}:key_a")
            assert 0 < client.pttl(window) <= WINDOW_S * 1000
        pass_in_redis(valkey_server, 61)
        one.clock.ahead_s += 61
        await one.check(10)
        assert counted(valkey_server) == 1


async def test_a_redis_whose_clock_is_set_back_keeps_nobody_out(redis_url: str, valkey_server: ValkeyServer):
    async with processes(redis_url, {}, {}) as (one, other):
        await one.admitted(2, limit=2)
        pass_in_redis(valkey_server, -3_600)
        refused = await other.check(2)
        assert (refused.allowed, refused.retry_after_s) == (False, 60)


async def test_after_flushall_it_is_told_again_before_it_decides(shared: ValkeyServer):
    async with processes(shared.url, {}) as (one,):
        assert await one.admitted(7, limit=10) == 7
        with shared.client() as client:
            client.flushall()
        assert await one.admitted(10, limit=10) == 3


async def test_after_flushall_an_idle_process_tells_within_a_lease(shared: ValkeyServer):
    async with processes(shared.url, {}, {}) as (idle, busy):
        assert await idle.admitted(7, limit=10) == 7
        with shared.client() as client:
            client.flushall()
        await until(lambda: counted(shared) == 7)
        assert await busy.admitted(10, limit=10) == 3


async def test_many_keys_are_told_again(redis_url: str, valkey_server: ValkeyServer):
    async with processes(redis_url, {}, {}) as (idle, busy):
        keys = [f"key_{number}" for number in range(3 * BUCKETS)]
        for key in keys:
            await idle.admitted(2, limit=2, key=key)
        with valkey_server.client() as client:
            client.flushall()
            await until(lambda: len(client.keys("farebox:{rate:*}:key_*")) == len(keys))
        assert not any([(await busy.check(2, key)).allowed for key in keys])


async def test_more_than_fits_one_command_is_told_again(redis_url: str, valkey_server: ValkeyServer):
    async with processes(redis_url, {}) as (one,):
        assert await one.admitted(1_300, limit=2_000) == 1_300
        with valkey_server.client() as client:
            client.flushall()
        await until(lambda: counted(valkey_server) == 1_300)


async def test_without_redis_each_process_counts_on_with_what_it_admitted(server: ValkeyServer):
    async with processes(server.url, {}, {}) as both:
        assert [await process.admitted(3, limit=10) for process in both] == [3, 3]
        server.kill()
        assert [await process.admitted(20, limit=10) for process in both] == [7, 7]
        server.start()
        # Each told what it had admitted: nobody gets more until the window has moved.
        await until(lambda: counted(server) == 20)
        assert [await process.admitted(5, limit=20) for process in both] == [0, 0]
        assert [await process.admitted(5, limit=22) for process in both] == [2, 0]


async def test_a_restart_from_an_old_snapshot_is_told_what_it_lacks(redis_url: str, valkey_server: ValkeyServer):
    """The epoch is the old one then, so only the new link tells of it."""
    async with processes(redis_url, {}) as (one,):
        assert await one.admitted(5, limit=5) == 5
        with valkey_server.client() as client:
            (window,) = client.keys("farebox:{rate:*}:key_a")
            client.delete(window)
            client.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: counted(valkey_server) == 5)


async def test_a_redis_that_hangs_costs_one_time_limit_and_no_request(server: ValkeyServer):
    async with processes(server.url, {"timeout_s": 0.1, "lease_s": 0.1}) as (one,):
        await one.admitted(1, limit=10)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            assert await one.admitted(20, limit=10) == 9
            assert time.monotonic() - began_s < 1.0
            # From then on nobody waits.
            began_s = time.monotonic()
            assert (await one.check(11)).allowed
            assert time.monotonic() - began_s < 0.05
        finally:
            os.kill(server.pid, signal.SIGCONT)
        # What Redis did after all and what it is told now are the same requests.
        await until(lambda: one.link.up)
        await until(lambda: counted(server) >= 11)
        assert not (await one.check(11)).allowed


async def test_keys_of_a_process_are_bounded(redis_url: str):
    link = Link(redis_url, Metrics(), timeout_s=PATIENT_S)
    limit = SharedRateLimit(link, keys_max=BUCKETS)
    for number in range(10 * BUCKETS):
        await limit.check(f"key_{number}", 1)
    assert sum(len(bucket.windows) for bucket in limit._buckets) <= BUCKETS
