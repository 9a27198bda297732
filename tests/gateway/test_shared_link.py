"""The link to Redis answers soon or says that Redis is away, and finds it again by itself."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from gateway.shared import link as link_module
from gateway.shared.link import WAITING_MAX, Link
from gateway.shared.rate_limit import Bucket
from gateway.shared.wallets import _keys
from gateway.shared.wire import ClusterWire, Command, RedisAway, Script, ServerWire
from gateway.telemetry import Metrics
from ledger.model import WalletRef
from tests.servers.valkey import ValkeyServer

PATIENT_S = 2.0
"""A time limit that a busy machine does not reach."""

LEASE_S = 0.05
DEADLINE_S = 20.0

ECHO = Script("return ARGV[1]")


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to that"
        await asyncio.sleep(0.002)


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """A server of the test's own, which it may kill."""
    server = ValkeyServer().start()
    yield server
    server.close()


@pytest.fixture(params=["single", "cluster"])
def any_url(request: pytest.FixtureRequest) -> str:
    """An empty server or cluster that others use too."""
    url: str = request.getfixturevalue("redis_url" if request.param == "single" else "redis_cluster_url")
    return url


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def link(server: ValkeyServer, metrics: Metrics) -> AsyncIterator[Link]:
    link = Link(server.url, metrics, timeout_s=PATIENT_S, lease_s=LEASE_S)
    await link.start()
    assert link.up
    yield link
    await link.stop()


def value(metrics: Metrics, name: str) -> float:
    for line in metrics.exposition().decode().splitlines():
        if line.startswith(name + " "):
            return float(line.split()[-1])
    return 0.0


async def test_a_script_that_redis_does_not_know_is_sent_whole(any_url: str, metrics: Metrics):
    link = Link(any_url, metrics, timeout_s=PATIENT_S)
    await link.start()
    assert await link.ask("balance", ECHO, ("farebox:{a}",), "one") == b"one"
    with redis.from_url(any_url) as client:
        client.script_flush()
    assert await link.ask("balance", ECHO, ("farebox:{a}",), "two") == b"two"
    await link.stop()


async def test_a_thousand_commands_get_their_own_replies(any_url: str, metrics: Metrics):
    link = Link(any_url, metrics, timeout_s=PATIENT_S)
    await link.start()
    replies = [link.ask("balance", ECHO, (f"farebox:{{{n}}}",), n) for n in range(1_000)]
    assert [int(await reply) for reply in replies] == list(range(1_000))
    await link.stop()


async def test_a_cluster_that_is_killed_is_found_again(metrics: Metrics):
    server = ValkeyServer(cluster=True).start()
    link = Link(server.url, metrics, timeout_s=PATIENT_S, lease_s=LEASE_S)
    await link.start()
    assert isinstance(link._wire, ClusterWire)
    server.kill()
    await until(lambda: not link.up)
    server.start()
    await until(lambda: link.up)
    assert await link.ask("balance", ECHO, ("farebox:{a}",), "x") == b"x"
    await link.stop()
    server.close()


async def test_a_slot_that_moves_is_followed():
    """Two servers that say of each other's slots where they are."""
    answers = {"mine": [b"-MOVED 15495 127.0.0.1:{other}\r\n"], "other": [b"$2\r\nok\r\n"]}
    ports: dict[str, int] = {}
    closed: list[str] = []

    def serve(name: str) -> Callable[..., Coroutine[Any, Any, None]]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while await reader.read(65_536):
                    writer.write(answers[name][0].replace(b"{other}", str(ports["other"]).encode()))
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            closed.append(name)

        return answer

    servers = [await asyncio.start_server(serve(name), "127.0.0.1", 0) for name in answers]
    ports.update({name: server.sockets[0].getsockname()[1] for name, server in zip(answers, servers, strict=True)})
    loop = asyncio.get_running_loop()
    nodes = {}
    for port in ports.values():
        _, nodes[f"127.0.0.1:{port}"] = await loop.create_connection(ServerWire, "127.0.0.1", port)
    wire = ClusterWire(nodes, [(0, 16_383, f"127.0.0.1:{ports['mine']}")])
    broken: list[Exception] = []
    wire.when_broken = broken.append
    for _ in range(2):  # The second one goes there at once, or it would be told the same again.
        command = Command("balance", ECHO, (1, "farebox:{a}"), reply=loop.create_future(), asked_s=0)
        wire.send([command])
        assert await command.reply == b"ok"
    answers["other"] = answers["mine"]
    command = Command("balance", ECHO, (1, "farebox:{a}"), reply=loop.create_future(), asked_s=0)
    wire.send([command])
    with pytest.raises(RedisAway, match="MOVED"):
        await command.reply
    assert broken
    wire.close()
    await until(lambda: len(closed) == len(servers))
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_what_one_tick_asks_is_one_packet(redis_url: str, metrics: Metrics, valkey_server: ValkeyServer):
    link = Link(redis_url, metrics, timeout_s=PATIENT_S)
    await link.start()
    with valkey_server.client() as client:
        await link.ask("balance", ECHO, ("farebox:{a}",), "known")
        before = client.info("stats")["total_reads_processed"]
        for reply in [link.ask("balance", ECHO, ("farebox:{a}",), n) for n in range(100)]:
            await reply
        after = client.info("stats")["total_reads_processed"]
    assert after - before <= 5  # The packet, the question that asked for this, perhaps a sign of life.
    await link.stop()


async def test_a_killed_redis_is_known_at_once_and_found_again(link: Link, server: ValkeyServer, metrics: Metrics):
    connected: list[bool] = []
    link.when_connected(lambda: connected.append(link.up))
    server.kill()
    await until(lambda: not link.up)
    assert value(metrics, "farebox_redis_up") == 0
    began_s = time.monotonic()
    with pytest.raises(RedisAway):
        link.ask("balance", ECHO, ("farebox:{a}",), "x")
    assert time.monotonic() - began_s < 0.01
    assert value(metrics, 'farebox_redis_failures_total{use="balance"}') == 1
    assert link.describe().startswith("away: ")
    server.start()
    await until(lambda: link.up)
    assert await link.ask("balance", ECHO, ("farebox:{a}",), "x") == b"x"
    assert link.describe() == "ok"
    assert value(metrics, "farebox_redis_up") == 1
    assert connected == [True]


async def test_who_waits_when_redis_is_killed_is_told(link: Link, server: ValkeyServer):
    os.kill(server.pid, signal.SIGSTOP)
    replies = [link.ask("balance", ECHO, ("farebox:{a}",), n) for n in range(10)]
    await asyncio.sleep(0)
    os.kill(server.pid, signal.SIGKILL)
    for reply in replies:
        with pytest.raises(RedisAway):
            await reply
    server.kill()


async def test_a_redis_that_hangs_is_away_after_the_time_limit(server: ValkeyServer, metrics: Metrics):
    link = Link(server.url, metrics, timeout_s=0.1, lease_s=LEASE_S)
    await link.start()
    await link.ask("balance", ECHO, ("farebox:{a}",), "known")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        with pytest.raises(RedisAway, match="no answer within 100 ms"):
            await link.ask("balance", ECHO, ("farebox:{a}",), "x")
        assert 0.1 <= time.monotonic() - began_s < 1.0
        assert not link.up
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await until(lambda: link.up)
    await link.stop()


async def test_a_hanging_redis_is_noticed_without_a_request(server: ValkeyServer, metrics: Metrics):
    link = Link(server.url, metrics, timeout_s=0.1, lease_s=LEASE_S)
    await link.start()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await until(lambda: not link.up)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await link.stop()


async def test_a_slow_redis_is_one_that_is_away(redis_url: str, metrics: Metrics):
    link = Link(redis_url, metrics, timeout_s=0.05, lease_s=LEASE_S)
    await link.start()
    with pytest.raises(RedisAway):
        await link.ask("balance", None, (), "DEBUG", "SLEEP", "0.3")
    assert not link.up
    await until(lambda: link.up)
    await link.stop()


async def test_a_loop_that_was_busy_does_not_blame_redis(redis_url: str, metrics: Metrics):
    link = Link(redis_url, metrics, timeout_s=0.05)
    await link.start()
    await link.ask("balance", ECHO, ("farebox:{a}",), "known")
    reply = link.ask("balance", ECHO, ("farebox:{a}",), "x")
    await asyncio.sleep(0)  # It has been sent.
    time.sleep(0.2)  # noqa: ASYNC251 - what is tested is a loop that does nothing else meanwhile
    assert await reply == b"x"
    await link.stop()


async def test_a_gateway_starts_without_redis(metrics: Metrics):
    server = ValkeyServer()
    link = Link(server.url, metrics, timeout_s=PATIENT_S, lease_s=LEASE_S)
    await link.start()
    assert not link.up
    server.start()
    await until(lambda: link.up)
    await link.stop()
    server.close()


async def test_an_error_of_redis_is_a_failure(link: Link, server: ValkeyServer):
    with server.client() as client:
        client.set("farebox:{a}", "no hash")
    with pytest.raises(RedisAway, match="WRONGTYPE"):
        await link.ask("balance", Script("return redis.call('HGET', KEYS[1], 'x')"), ("farebox:{a}",))
    assert not link.up


async def test_commands_without_a_reply_are_bounded(redis_url: str, metrics: Metrics):
    link = Link(redis_url, metrics, timeout_s=PATIENT_S)
    await link.start()
    for n in range(WAITING_MAX):
        link.ask("balance", ECHO, ("farebox:{a}",), n)
    with pytest.raises(RedisAway):
        link.ask("balance", ECHO, ("farebox:{a}",), "one too many")
    await link.stop()


async def test_it_logs_in_and_chooses_its_database(metrics: Metrics, log):
    server = ValkeyServer().start()
    with server.client() as client:
        client.config_set("requirepass", "hunter2secret")
    url = f"redis://:hunter2secret@127.0.0.1:{server.port}/3"
    link = Link(url, metrics, timeout_s=PATIENT_S)
    await link.start()
    await link.ask("balance", Script("redis.call('SET', KEYS[1], 1)"), ("farebox:{a}",))
    refused = Link(f"redis://:wrong@127.0.0.1:{server.port}/3", metrics, timeout_s=PATIENT_S)
    await refused.start()
    assert "WRONGPASS" in refused.describe()
    with redis.Redis(port=server.port, password="hunter2secret", db=3) as client:
        assert client.exists("farebox:{a}")
    assert "hunter2secret" not in log.getvalue()
    await refused.stop()
    await link.stop()
    server.close()


def test_what_one_script_touches_lies_in_one_slot():
    bucket = Bucket(7, 1)
    assert key_slot((bucket.tag + "management:key_a").encode()) == key_slot(bucket.epoch_key.encode())
    floor, kept = _keys(WalletRef("ten_a", "live", "customer:cus_b"))
    assert key_slot(floor.encode()) == key_slot(kept.encode())
    assert link_module.TIMEOUT_S <= 0.05
