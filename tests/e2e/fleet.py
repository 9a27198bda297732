"""Farebox as a company runs it: two hosts, one durable PostgreSQL, one Redis-protocol server, and a way to break each.

The gateways log in as a role that owns nothing and bypasses nothing, and reach both servers through proxies.
"""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg

from gateway.proxy.upkeep import SWEEP_S
from tests.e2e.audit import assert_each_paid_once, assert_nothing_made_or_lost
from tests.e2e.books import Books
from tests.e2e.farebox import Clock, Farebox, Gateway, Upstream, installed, until_async
from tests.e2e.load import Load, Seen, a_brief_request
from tests.servers.postgres import DURABLE, PostgresServer, database_of
from tests.servers.postgres_proxy import WRITES, PostgresProxy
from tests.servers.proxy import Proxy
from tests.servers.standby import Pair
from tests.servers.valkey import ValkeyServer

LIFE_S: Final = 2.0
LEDGER_TIMEOUT_S: Final = 3
SETTINGS: Final = {
    "reservation_life_s": LIFE_S,
    "heartbeat_s": 0.5,
    "ledger_timeout_s": LEDGER_TIMEOUT_S,
    # Counted, so that Redis has work to do, and never reached.
    "rate_limit_per_minute": 1_000_000,
}

SETTLED_S: Final = LIFE_S + SWEEP_S + 15.0
"""When the last orphan is settled, at the latest: its time, the sweeper's pause, and two busy cores."""

BACK_S: Final = 10.0
"""When every client has been served again after a fault has gone, the time of its request included."""

TRAFFIC_S: Final = 60.0
"""Until there is enough of it; only a failure waits for that."""

ANSWER_S: Final = 1.0
"""The longest that a request of the load takes by itself."""

WAITS: Final = 3
"""How often one request may wait for the ledger: for its key, its credits, its charge."""

MARGIN_S: Final = 3.0
"""Two busy cores."""

SLOWEST_S: Final = WAITS * LEDGER_TIMEOUT_S + ANSWER_S + MARGIN_S
"""By when each request is answered, one way or the other, also during a fault."""

ROUNDS_OF_ONE_FLEET: Final = 10
"""`farebox verify` replays the whole journal after each round; a fresh ledger now and then keeps that short."""

POLL_S: Final = 0.05
"""What is asked so often costs the machine something."""

USERS: Final = tuple(f"user-{number}" for number in range(8))
FUNDS_MILLICREDITS: Final = 10**9
UNITS_OF_MILLICREDIT: Final = 10**6

BATCHES: Final = re.compile(rf"\bfarebox_(apply|write)_v\d+\(|{WRITES.pattern}", re.IGNORECASE)
"""What the gateways write with."""

WORKERS: Final = ("2", "1")
"""Of each host."""

LOGIN: Final = "gateway_login"


@dataclass(slots=True)
class Servers:
    """What the hosts share."""

    postgres: PostgresServer
    proxy: PostgresProxy
    valkey: ValkeyServer
    valkey_proxy: Proxy

    def urls(self) -> tuple[str, str]:
        """A new database: as the superuser, and as the gateways reach it."""
        url = self.postgres.create_database()
        return url, self.proxy.url_of(self.postgres.url_of(database_of(url), user=LOGIN))


@dataclass(slots=True)
class ReplicatedServers(Servers):
    """Their PostgreSQL has a synchronous standby, and every URL names both."""

    pair: Pair

    def urls(self) -> tuple[str, str]:
        name = database_of(self.postgres.create_database())
        return self.pair.url_of(name), self.pair.url_of(name, user=LOGIN)


@contextmanager
def running_servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        postgres = PostgresServer(settings=DURABLE)
        stack.callback(postgres.close)
        postgres.create().start()
        yield Servers(postgres, *_beside(stack, postgres))


@contextmanager
def running_replicated_servers() -> Iterator[ReplicatedServers]:
    with ExitStack() as stack:
        pair = Pair()
        stack.callback(pair.close)
        pair.start()
        yield ReplicatedServers(pair.primary, *_beside(stack, pair.primary), pair)


def _beside(stack: ExitStack, postgres: PostgresServer) -> tuple[PostgresProxy, ValkeyServer, Proxy]:
    """The proxy to *postgres*, a Valkey, and the proxy to that."""
    valkey = ValkeyServer()
    stack.callback(valkey.close)
    valkey.start()
    proxy, valkey_proxy = PostgresProxy(postgres.port, watched=BATCHES), Proxy(valkey.port)
    for each in (proxy, valkey_proxy):
        stack.callback(each.start().close)
    return proxy, valkey, valkey_proxy


@dataclass(slots=True)
class Fleet:
    """An installation on two hosts: on the first two workers, on the second one process.

    Attributes:
        given: what each user has been given, in the credit's smallest unit.
        sound: the last round ended with an audit that found nothing.
    """

    servers: Servers
    upstream: Upstream
    gateway_url: str
    hosts: tuple[Farebox, Farebox]
    clocks: tuple[Clock, Clock]
    gateways: list[Gateway] = field(default_factory=list)
    given: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    sound: bool = True

    @property
    def books(self) -> Books:
        return self.hosts[0].books

    @property
    def base_urls(self) -> list[str]:
        return [gateway.base_url for gateway in self.gateways]

    @property
    def headers(self) -> list[dict[str, str]]:
        return [self.hosts[0].headers(user) for user in self.given]

    @property
    def resident_bytes(self) -> int:
        return sum(gateway.resident_bytes for gateway in self.gateways)

    def serve(self) -> None:
        """Start a gateway on each host, and give each user credits."""
        with ThreadPoolExecutor() as threads:
            self.gateways = list(threads.map(self._serve, range(len(self.hosts))))
        for user in USERS:
            self.hosts[0].top_up(self.gateways[0], user, millicredits=FUNDS_MILLICREDITS)
            self.given[user] = FUNDS_MILLICREDITS * UNITS_OF_MILLICREDIT

    def serve_again(self, number: int) -> None:
        """Start that host's gateway once more, on a port of its own."""
        self.gateways[number] = self._serve(number)

    def _serve(self, number: int) -> Gateway:
        return self.hosts[number].serve(
            *("--workers", WORKERS[number]),
            clock=self.clocks[number],
            FAREBOX_DATABASE_URL=self.gateway_url,
            FAREBOX_REDIS_URL=f"redis://127.0.0.1:{self.servers.valkey_proxy.port}/0",
        )

    @asynccontextmanager
    async def loaded(self, rng: random.Random, *, clients: int) -> AsyncIterator[Load]:
        """Under load, each client served some times already; at the end all are, and what they asked is over."""
        load = Load(self.base_urls, self.headers, a_brief_request, rng)
        running = asyncio.create_task(load.run(clients=clients))
        try:
            await until_async(lambda: load.served >= 2 * clients, within_s=TRAFFIC_S, what="traffic")
            yield load
        finally:
            load.stop()
            await running

    async def all_settled(self) -> None:
        """Wait until no reservation is open, none outlives its time, and the ledger knows of all work."""
        books = self.books
        await until_async(
            lambda: not books.open_requests() and self.upstream.received <= books.requests().keys(),
            within_s=SETTLED_S,
            what="end of the last orphan's reservation",
            poll_s=POLL_S,
        )

    async def audit(self, seen: Sequence[Seen]) -> int:
        """Once all is settled: every answer charged once, nothing made or lost; how many answers there were."""
        await self.all_settled()
        assert all(gateway.running for gateway in self.gateways), [gateway.err for gateway in self.gateways]
        whole = assert_each_paid_once(self.books, self.upstream, seen)
        assert_nothing_made_or_lost(self.books, given=self.given)
        await asyncio.to_thread(self.hosts[0].verify)
        self.sound = True
        return whole


async def served_again(load: Load) -> float:
    """Wait until each client has been served something that it asked from now on; how many seconds that took."""
    over_s = time.monotonic()
    await until_async(
        lambda: load.served_again_s(over_s) is not None,
        within_s=BACK_S,
        what="service for everybody again",
        poll_s=POLL_S,
    )
    return (load.served_again_s(over_s) or over_s) - over_s


class Fleets:
    """The fleet that serves now, on a fresh ledger now and then."""

    def __init__(self, folder: Path, servers: Servers) -> None:
        self._folder = folder
        self.servers = servers
        self._stack = ExitStack()
        self._made = 0
        self._fleet: Fleet | None = None

    def next(self) -> Fleet:
        if self._fleet is None or self._fleet.rounds >= ROUNDS_OF_ONE_FLEET or not self._fleet.sound:
            self._stack.close()
            self._made += 1
            self._fleet = self._stack.enter_context(running_fleet(self._folder / f"fleet-{self._made}", self.servers))
        self._fleet.rounds += 1
        self._fleet.sound = False
        return self._fleet

    def close(self) -> None:
        self._stack.close()


@contextmanager
def running_fleet(folder: Path, servers: Servers, **settings: object) -> Iterator[Fleet]:
    """A fleet on a new database of *servers*, serving."""
    with ExitStack() as stack:
        folder.mkdir(parents=True)
        upstream = stack.enter_context(Upstream(folder))
        superuser_url, gateway_url = servers.urls()
        given = {**SETTINGS, "database_url": superuser_url, **settings}
        first = stack.enter_context(installed(folder / "first", upstream.url, settings=given))
        second = first.beside(folder / "second")
        stack.callback(second.close)
        allow_login(superuser_url)
        clocks = (Clock(folder / "clock-1"), Clock(folder / "clock-2"))
        fleet = Fleet(servers, upstream, gateway_url, (first, second), clocks)
        fleet.serve()
        yield fleet


def allow_login(superuser_url: str) -> None:
    """Make the gateways' login role, and the credit's value an hour old: no clock that is off finds it to come."""
    with psycopg.connect(superuser_url) as connection:
        if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (LOGIN,)).fetchone() is None:
            connection.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE farebox_gateway")
        connection.execute("UPDATE assets SET effective_from_us = effective_from_us - 3600000000")
