"""Two processes on one PostgreSQL and one Redis: what either answers, both see, whatever is cached."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

from gateway.clock import now_us
from gateway.ids import new_id
from gateway.shared.balances import Balances
from gateway.shared.link import Link
from gateway.shared.wallets import SharedWallets
from gateway.telemetry import Metrics
from ledger.commands import Grant
from ledger.ledger import Ledger
from ledger.model import Funding, Scope, WalletRef
from ledger.store.postgres import PostgresStore
from tests.gateway.test_shared_link import until
from tests.servers.valkey import ValkeyServer

PATIENT_S = 5.0
ROUNDS = 25
REF = WalletRef("ten_a", "live", "customer:cus_a")


class Process(NamedTuple):
    ledger: Ledger
    link: Link
    metrics: Metrics

    async def grant(self) -> None:
        await self.ledger.execute(
            Grant(
                id=new_id("cmd"),
                scope=Scope(REF.tenant, REF.mode),
                wallet=REF,
                asset="CREDIT",
                block_id=new_id("blk"),
                amount=1,
                funding=Funding.PAID,
                operator_paid=True,
            )
        )

    async def balance(self) -> int:
        view = await self.ledger.wallet_view(REF)
        return 0 if view is None else view.balance

    def hits(self) -> float:
        return self.metrics.cache_looks.labels("balance", "hit")._value.get()  # type: ignore[no-any-return]


@contextlib.asynccontextmanager
async def process(database_url: str, redis_url: str) -> AsyncIterator[Process]:
    metrics = Metrics()
    link = Link(redis_url, metrics, timeout_s=PATIENT_S, lease_s=0.05)
    await link.start()
    shared = SharedWallets(link, now_us=now_us)
    store = await PostgresStore.open(database_url, watcher=shared)
    ledger = await Ledger.open(
        store,
        clock=now_us,
        new_command_id=lambda: new_id("cmd"),
        read_wallet=Balances(store, metrics, shared=shared).wallet,
    )
    try:
        yield Process(ledger, link, metrics)
    finally:
        await ledger.close()
        await link.stop()


async def test_no_look_is_older_than_an_answer_in_either_process(gateway_url: str, redis_url: str):
    granted = 0
    async with process(gateway_url, redis_url) as one, process(gateway_url, redis_url) as other:

        async def grants(own: Process) -> None:
            nonlocal granted
            for _ in range(ROUNDS):
                await own.grant()
                granted += 1

        async def looks(own: Process, work: asyncio.Future[list[None]]) -> None:
            while not work.done():
                known = granted
                assert await own.balance() >= known

        work = asyncio.gather(grants(one), grants(other))
        await asyncio.gather(work, *(looks(own, work) for own in (one, other) * 2))
        assert [await own.balance() for own in (one, other)] == [2 * ROUNDS] * 2
        assert one.hits() + other.hits() > 0


async def test_the_books_go_on_without_redis(gateway_url: str):
    server = ValkeyServer().start()
    try:
        async with process(gateway_url, server.url) as one, process(gateway_url, server.url) as other:
            await one.grant()
            assert await other.balance() == 1
            server.kill()
            await until(lambda: not one.link.up and not other.link.up)
            await one.grant()
            assert await other.balance() == 2
            server.start()
            await until(lambda: one.link.up and other.link.up)
            await other.grant()
            assert [await own.balance() for own in (one, other)] == [3, 3]
    finally:
        server.close()
