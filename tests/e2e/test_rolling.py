"""Rolling restarts: gateways come and go under load, and no client notices.

The balancer is the plainest there is: it passes bytes, and tries the next gateway only where a connection is refused.
What it does not repair must not break: a request that a gateway has taken, a connection that it keeps open.
"""

import asyncio
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import httpx

from tests.e2e.books import Books
from tests.e2e.conftest import Install
from tests.e2e.farebox import Farebox, Gateway, until, until_async
from tests.e2e.load import Seen, Traffic, chat, units

CLIENTS: Final = 8
ROUNDS: Final = 2
PART_BYTES: Final = 2**16
MORE_ANSWERS: Final = 30
"""Between two steps, so that each is taken under load."""


class Balancer:
    """Connections go to the gateways in turn, to the next one where the port is closed."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._turn = 0
        self.passed: Counter[int] = Counter()
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Balancer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=PART_BYTES)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._turn += 1
        turn = self._turn % len(self._ports)
        try:
            for port in (*self._ports[turn:], *self._ports[:turn]):
                try:
                    back_reader, back_writer = await asyncio.open_connection("127.0.0.1", port, limit=PART_BYTES)
                except ConnectionRefusedError:
                    continue
                self.passed[port] += 1
                await asyncio.gather(_pass(reader, back_writer), _pass(back_reader, writer))
                return
        finally:
            writer.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the end of one side, which is then the end of the other."""
    with suppress(ConnectionError):
        while part := await reader.read(PART_BYTES):
            writer.write(part)
            await writer.drain()
    with suppress(ConnectionError, OSError):
        writer.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def some_body(rng: random.Random) -> dict[str, Any]:
    """Short answers and short streams, so that connections are used again and again."""
    if rng.random() < 0.4:
        return chat("meter", simulate={"tokens": rng.randrange(1, 6), "first_byte_delay_ms": rng.randrange(20)})
    simulate = {"tokens": rng.randrange(5, 25), "chunk_delay_ms": rng.randrange(1, 8)}
    return chat("meter", simulate=simulate, stream=True, stream_options={"include_usage": True})


def charged_once(farebox: Farebox, all_seen: list[Seen]) -> None:
    """Every answer came whole, and what its client was told is what the books say, once."""
    failed = [(seen.status, seen.body[-200:]) for seen in all_seen if seen.status != 200 or not seen.complete]
    assert failed == []
    booked = Books(farebox.database).requests()
    assert len({seen.request_id for seen in all_seen}) == len(all_seen) == len(booked)
    for seen in all_seen:
        entry = booked[seen.request_id or ""]
        assert seen.usage is not None
        assert (entry.state, entry.endings) == ("committed", ("finished",))
        assert entry.charged == entry.recorded == units(seen.usage["cost"]) > 0
    assert Books(farebox.database).reserved() == 0
    farebox.verify()


async def more_answers(traffic: Traffic) -> None:
    wanted = sum(seen.complete for seen in traffic.seen) + MORE_ANSWERS
    await until_async(
        lambda: sum(seen.complete for seen in traffic.seen) >= wanted, within_s=60, what="progress under load"
    )


async def test_rolling_two_gateways_twice_loses_no_request(install: Install) -> None:
    farebox = install(shutdown_grace_s=30)
    ports = [free_port(), free_port()]
    gateways: list[Gateway] = [await asyncio.to_thread(farebox.serve, "--port", str(port)) for port in ports]
    async with Balancer(ports).running() as balancer:
        users = [farebox.headers(farebox.user)]
        traffic = Traffic(balancer.url, users, some_body, random.Random(7))
        load = asyncio.create_task(traffic.run(clients=CLIENTS))
        for _ in range(ROUNDS):
            for number, port in enumerate(ports):
                await more_answers(traffic)
                gateways[number].terminate()
                code = await asyncio.to_thread(gateways[number].ended)
                assert code == 0, gateways[number].err
                gateways[number] = await asyncio.to_thread(farebox.serve, "--port", str(port))
        await more_answers(traffic)
        traffic.stop()
        all_seen = await load
    assert min(balancer.passed[port] for port in ports) > 0
    for gateway in gateways:
        assert await asyncio.to_thread(gateway.stop) == 0, gateway.err
    charged_once(farebox, all_seen)


async def test_replacing_the_workers_of_one_host_loses_no_request(install: Install) -> None:
    farebox = install(shutdown_grace_s=30)
    gateway = await asyncio.to_thread(farebox.serve, "--workers", "2")
    traffic = Traffic(gateway.base_url, [farebox.headers(farebox.user)], some_body, random.Random(8))
    load = asyncio.create_task(traffic.run(clients=CLIENTS))
    before = workers_of(gateway.pid)
    assert len(before) == 2
    for turn in range(1, ROUNDS + 1):
        await more_answers(traffic)
        os.kill(gateway.pid, signal.SIGHUP)
        await until_async(
            lambda turn=turn: gateway.err.count("all workers were replaced") == turn, within_s=60, what="new workers"
        )
    await more_answers(traffic)
    await until_async(lambda: len(workers_of(gateway.pid)) == 2, within_s=60, what="end of the old workers")
    assert not before & workers_of(gateway.pid)
    traffic.stop()
    all_seen = await load
    assert await asyncio.to_thread(gateway.stop) == 0, gateway.err
    charged_once(farebox, all_seen)


async def test_new_workers_have_the_new_settings_and_unusable_ones_change_nothing(install: Install) -> None:
    farebox = install()
    gateway = await asyncio.to_thread(farebox.serve, "--workers", "2")
    before = workers_of(gateway.pid)
    usable = farebox.config.read_text()
    farebox.config.write_text(f"no_such_setting = 1\n{usable}")
    os.kill(gateway.pid, signal.SIGHUP)
    until(lambda: "no_such_setting" in gateway.err, within_s=60, what="word of the unusable setting")
    assert workers_of(gateway.pid) == before
    farebox.config.write_text(
        f'{usable}\n[[models]]\nname = "brand-new"\nupstream = "upstream"\nprice = {{ input = "1", output = "2" }}\n'
    )
    os.kill(gateway.pid, signal.SIGHUP)
    until(lambda: "all workers were replaced" in gateway.err, within_s=60, what="new workers")
    until(lambda: gateway.get("/models/brand-new", farebox.live_key).status_code == 200, within_s=60, what="new model")
    assert gateway.stop() == 0, gateway.err


def workers_of(pid: int) -> set[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return {int(child) for child in children.read().split()}


async def test_a_gateway_says_that_it_will_go_and_serves_until_then(install: Install) -> None:
    delay_s = 3.0
    farebox = install(drain_delay_s=delay_s)
    gateway = await asyncio.to_thread(farebox.serve)
    health = gateway.base_url.removesuffix("/v1") + "/health/ready"
    async with httpx.AsyncClient(timeout=30) as client:
        kept = await client.get(health)
        assert (kept.status_code, "connection" in kept.headers) == (200, False)
        began_s = time.monotonic()
        gateway.terminate()
        statuses = set()
        while (answer := await client.get(health)).status_code == 200:
            assert time.monotonic() - began_s < delay_s
            statuses.add(answer.status_code)
        assert answer.json()["checks"]["process"] == "shutting down"
        assert answer.headers["connection"] == "close"
        headers = farebox.headers(farebox.user)
        served = await client.post(f"{gateway.base_url}/chat/completions", json=chat("meter"), headers=headers)
        assert (served.status_code, served.headers["connection"]) == (200, "close")
    assert await asyncio.to_thread(gateway.ended) == 0, gateway.err
    assert time.monotonic() - began_s >= delay_s
    assert not re.search("Traceback|exception", gateway.err)
