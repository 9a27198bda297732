"""Farebox as a company runs it: two hosts, one durable PostgreSQL, one Redis-protocol server, and a way to break each.

The gateways log in as a role that owns nothing and bypasses nothing, and reach both servers through proxies.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg

from gateway.proxy.upkeep import SWEEP_S
from tests.e2e.audit import assert_each_paid_once, assert_nothing_made_or_lost
from tests.e2e.books import Books
from tests.e2e.farebox import Clock, Farebox, Gateway, Upstream, installed, until_async
from tests.e2e.load import Load
from tests.servers.postgres import DURABLE, PostgresServer, database_of
from tests.servers.postgres_proxy import WRITES, PostgresProxy
from tests.servers.proxy import Proxy
from tests.servers.valkey import ValkeyServer

LIFE_S: Final = 4.0
LEDGER_TIMEOUT_S: Final = 3
SETTINGS: Final = {
    "reservation_life_s": LIFE_S,
    "heartbeat_s": 1.0,
    "ledger_timeout_s": LEDGER_TIMEOUT_S,
    # Counted, so that Redis has work to do, and never reached.
    "rate_limit_per_minute": 1_000_000,
}

SETTLED_S: Final = LIFE_S + SWEEP_S + 15.0
"""When the last orphan is settled, at the latest: its time, the sweeper's pause, and two busy cores."""

USERS: Final = tuple(f"user-{number}" for number in range(8))
FUNDS_MILLICREDITS: Final = 10**9
UNITS_OF_MILLICREDIT: Final = 10**6

BATCHES: Final = re.compile(rf"\bfarebox_(apply|write)_v|{WRITES.pattern}", re.IGNORECASE)
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


@contextmanager
def running_servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        postgres = PostgresServer(settings=DURABLE).create().start()
        stack.callback(postgres.close)
        valkey = ValkeyServer().start()
        stack.callback(valkey.close)
        proxy = PostgresProxy(postgres.port, watched=BATCHES).start()
        stack.callback(proxy.close)
        valkey_proxy = Proxy(valkey.port).start()
        stack.callback(valkey_proxy.close)
        yield Servers(postgres, proxy, valkey, valkey_proxy)


@dataclass(slots=True)
class Fleet:
    """An installation on two hosts: on the first two workers, on the second one process.

    Attributes:
        given: what each user has been given, in the credit's smallest unit.
    """

    servers: Servers
    upstream: Upstream
    gateway_url: str
    hosts: tuple[Farebox, Farebox]
    clocks: tuple[Clock, Clock]
    gateways: list[Gateway] = field(default_factory=list)
    given: dict[str, int] = field(default_factory=dict)
    rounds: int = 0

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
        self.gateways = [self._serve(number) for number in range(len(self.hosts))]
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

    async def all_settled(self) -> None:
        """Wait until no reservation is open: none outlives its time."""
        books = self.books
        await until_async(
            lambda: not books.open_requests(), within_s=SETTLED_S, what="end of the last orphan's reservation"
        )

    async def audit(self, load: Load) -> int:
        """Once all is settled: every answer charged once, nothing made or lost; how many answers there were."""
        await self.all_settled()
        whole = assert_each_paid_once(self.books, self.upstream, load.all)
        assert_nothing_made_or_lost(self.books, given=self.given)
        await asyncio.to_thread(self.hosts[0].verify)
        return whole


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
