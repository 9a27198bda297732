"""The link to Redis answers soon or says that Redis is away, and finds it again by itself."""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import ssl
import subprocess
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.asyncio.cluster import RedisCluster
from redis.crc import key_slot

from gateway.shared import link as link_module
from gateway.shared.link import WAITING_MAX, Link
from gateway.shared.rate_limit import Bucket
from gateway.shared.wallets import _keys
from gateway.shared.wire import RedisAway, Script
from gateway.telemetry import Metrics
from ledger.model import WalletRef
from tests.servers.valkey import ValkeyServer

PATIENT_S = 2.0
"""A time limit that a busy machine does not reach."""

LEASE_S = 0.05
DEADLINE_S = 20.0

ECHO = Script("return ARGV[1]")
SET = Script("return redis.call('SET', KEYS[1], ARGV[1])")
KEY = "farebox:{a}"


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


@pytest.fixture
def server_of() -> Iterator[Callable[..., ValkeyServer]]:
    """Starts servers of the test's own, as it wants them."""
    servers: list[ValkeyServer] = []

    def start(*, cluster: bool) -> ValkeyServer:
        servers.append(ValkeyServer(cluster=cluster))
        return servers[-1].start()

    yield start
    for server in servers:
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


def clients(server: ValkeyServer) -> int:
    """How many are connected, with the one that asks."""
    with server.client() as client:
        count: int = client.info("clients")["connected_clients"]
    return count


def knows(client: redis.Redis, node: ValkeyServer) -> bool:
    """Whether *node* has joined the cluster, as the server says that *client* asks."""
    nodes: dict[str, dict[str, str]] = client.execute_command("CLUSTER NODES")
    return nodes.get(f"127.0.0.1:{node.port}", {}).get("flags") == "master"


async def move_slot(ours: ValkeyServer, other: ValkeyServer) -> None:
    """*other* joins the cluster, and has the slot of `KEY` from now on."""
    with ours.client() as client, other.client() as newcomer:
        newcomer.execute_command("CLUSTER RESET", "HARD")
        newcomer.execute_command("CLUSTER MEET", "127.0.0.1", ours.port, ours.cluster_port)
        await until(lambda: knows(client, other))
        await until(lambda: knows(newcomer, ours))
        other_id = newcomer.execute_command("CLUSTER MYID")
        for one in (newcomer, client):
            one.execute_command("CLUSTER SETSLOT", key_slot(KEY.encode()), "NODE", other_id)


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
    assert link._wire is not None
    assert isinstance(link._wire.client, RedisCluster)
    server.kill()
    await until(lambda: not link.up)
    server.start()
    await until(lambda: link.up)
    assert await link.ask("balance", ECHO, ("farebox:{a}",), "x") == b"x"
    await link.stop()
    server.close()


async def test_a_slot_that_moves_is_followed(server_of: Callable[..., ValkeyServer], metrics: Metrics):
    """To a node that has joined the cluster since."""
    ours, other = server_of(cluster=True), server_of(cluster=True)
    link = Link(ours.url, metrics, timeout_s=PATIENT_S)
    await link.start()
    connected: list[bool] = []
    link.when_connected(lambda: connected.append(link.up))
    assert await link.ask("balance", ECHO, (KEY,), "before") == b"before"
    await move_slot(ours, other)
    with other.client() as client:
        await until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        for n in range(20):
            assert await link.ask("balance", SET, (KEY,), n) == b"OK"
        assert client.get(KEY) == b"19"
    assert link.up
    assert not connected
    other.kill()
    with pytest.raises(RedisAway):
        await link.ask("balance", SET, (KEY,), "x")
    await link.stop()


async def test_a_slot_that_moves_to_a_node_that_died_cuts_the_link_to_all(
    server_of: Callable[..., ValkeyServer], metrics: Metrics
):
    ours, other = server_of(cluster=True), server_of(cluster=True)
    link = Link(ours.url, metrics, timeout_s=PATIENT_S)
    await link.start()
    await move_slot(ours, other)
    other.kill()
    with pytest.raises(RedisAway):
        await link.ask("balance", ECHO, (KEY,), "x")
    assert not link.up
    await link.stop()
    await until(lambda: clients(ours) == 1)


@pytest.mark.parametrize("cluster", [False, True])
async def test_a_link_that_was_cut_leaves_no_socket_open(
    cluster: bool, server_of: Callable[..., ValkeyServer], metrics: Metrics
):
    server = server_of(cluster=cluster)
    with warnings.catch_warnings(record=True, action="always", category=ResourceWarning) as unclosed:
        link = Link(server.url, metrics, timeout_s=0.1, lease_s=LEASE_S)
        await link.start()
        await link.ask("balance", ECHO, (KEY,), "known")
        connected = clients(server)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for reply in [link.ask("balance", ECHO, (f"farebox:{{{n}}}",), n) for n in range(10)]:
                with pytest.raises(RedisAway):
                    await reply
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await until(lambda: value(metrics, "farebox_redis_up") == 1 and clients(server) == connected)
        await link.stop()
        await until(lambda: clients(server) == 1)
        del link
        gc.collect()
    assert not unclosed


async def test_a_redis_that_restarts_between_two_commands_is_a_new_link(server: ValkeyServer, metrics: Metrics):
    """What Redis knew is gone, so nobody may go on as if it were the same."""
    link = Link(server.url, metrics, timeout_s=PATIENT_S)
    await link.start()
    connected: list[bool] = []
    link.when_connected(lambda: connected.append(link.up))
    server.kill()
    server.start()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)  # The loop has turned: the client may know.
    writer.close()
    await writer.wait_closed()
    with pytest.raises(RedisAway):
        await link.ask("balance", ECHO, (KEY,), "x")
    await until(lambda: link.up)
    assert connected == [True]
    await link.stop()


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


async def test_a_loop_that_stays_busy_does_not_blame_redis(redis_url: str, metrics: Metrics):
    """Every command is late by our clock, and has its reply as soon as the loop comes to read it."""
    link = Link(redis_url, metrics, timeout_s=0.02)
    await link.start()
    ends_s = time.monotonic() + 1.0
    replies = []
    while time.monotonic() < ends_s:
        replies.append(link.ask("balance", ECHO, ("farebox:{a}",), "x"))
        await asyncio.sleep(0)
        time.sleep(0.005)  # noqa: ASYNC251 - what is tested is a loop that does much else meanwhile
    assert {await reply for reply in replies} == {b"x"}
    assert link.up
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
    assert "AuthenticationError: invalid username-password pair" in refused.describe()
    with redis.Redis(port=server.port, password="hunter2secret", db=3) as client:
        assert client.exists("farebox:{a}")
    assert "hunter2secret" not in log.getvalue()
    await refused.stop()
    await link.stop()
    server.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of 127.0.0.1, by itself, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    path = tmp_path / "certificate.pem"
    request = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {path} -out {path}.only"
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run([openssl, *request.split(), *names], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_suffix(".pem.only").read_text())
    return path


@pytest.fixture
async def tls_port(certificate: Path, valkey_server: ValkeyServer) -> AsyncIterator[int]:
    """TLS before a Redis that may have been built without."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(65_536):
                writer.write(part)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", valkey_server.port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def test_it_speaks_tls_with_whom_it_trusts(tls_port: int, certificate: Path, metrics: Metrics):
    url = f"rediss://127.0.0.1:{tls_port}/0"
    link = Link(f"{url}?ssl_ca_certs={certificate}", metrics, timeout_s=PATIENT_S)
    await link.start()
    assert await link.ask("balance", ECHO, (KEY,), "x") == b"x"
    await link.stop()
    stranger = Link(url, metrics, timeout_s=PATIENT_S)
    await stranger.start()
    assert "certificate verify failed" in stranger.describe()
    await stranger.stop()


def test_what_one_script_touches_lies_in_one_slot():
    bucket = Bucket(7, 1)
    assert key_slot((bucket.tag + "management:key_a").encode()) == key_slot(bucket.epoch_key.encode())
    floor, kept = _keys(WalletRef("ten_a", "live", "customer:cus_b"))
    assert key_slot(floor.encode()) == key_slot(kept.encode())
    assert link_module.TIMEOUT_S <= 0.05
