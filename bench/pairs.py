"""How many reservations a second the ledger can make and commit, durably, on SQLite, or on PostgreSQL beside pgbench.

python -m bench.pairs --in-flight 64 --seconds 3
python -m bench.pairs --postgres --in-flight 256 --seconds 3
"""

import argparse
import asyncio
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import uvloop

from gateway.clock import now_us
from gateway.ids import new_id
from gateway.migrations import migrate
from gateway.stores import open_store
from ledger.commands import Commit, Grant, Reserve, ReserveLeg
from ledger.ledger import Ledger
from ledger.model import Charge, Funding, ReservationRef, Scope, Settlement, UsageRecord, WalletRef
from ledger.writer import BATCH_MAX, Writer
from tests.servers.postgres import DURABLE, PostgresServer

SCOPE = Scope("ten_bench", "live")
AMOUNT = 1_000
PLENTY = 10**15

PGBENCH_CLIENTS: Final = 32

PGBENCH_SCALE: Final = 10
"""A million accounts: its clients seldom want the same row."""


class Pairs(NamedTuple):
    """What a run came to: pairs a second, and how long a reserve took, in microseconds."""

    a_second: float
    reserve_p50_us: float
    reserve_p99_us: float


@contextmanager
def sqlite() -> Iterator[str]:
    """The URL of a new ledger in a file."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'bench.db'}"
        migrate(url)
        yield url


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A durable server, with pgbench's tables in its first database."""
    server = PostgresServer(settings=DURABLE).create().start()
    try:
        server.program("pgbench", "-i", "-q", "-s", str(PGBENCH_SCALE), server.url)
        yield server
    finally:
        server.close()


@contextmanager
def postgres(server: PostgresServer) -> Iterator[str]:
    """The URL of a new ledger on *server*. The store becomes the gateway's role there."""
    url = server.create_database()
    migrate(url)
    yield url
    server.drop_database(url)


def pgbench(server: PostgresServer, *, seconds: float) -> float:
    """Transactions a second of ``pgbench -N``: an update of one row of many, a select, and an insert."""
    arguments = ("-N", "-n", "-c", str(PGBENCH_CLIENTS), "-j", "2", "-T", str(max(1, round(seconds))))
    said = server.program("pgbench", *arguments, server.url).decode()
    found = re.search(r"tps = ([\d.]+)", said)
    assert found is not None, said
    return float(found[1])


async def measure(
    url: str, *, in_flight: int, seconds: float, batch_max: int = BATCH_MAX, one_wallet: bool = False
) -> Pairs:
    """Reserve and commit with *in_flight* workers, a wallet each or one for all; *batch_max* 1 commits each alone."""
    store = await open_store(url, clock=now_us)
    writer = Writer(store.run_batch, at_once=store.batches_at_once, batch_max=batch_max)
    ledger = Ledger(store, writer, now_us, lambda: new_id("cmd"), None)
    wallets = [WalletRef(*SCOPE, f"customer:{number}") for number in range(1 if one_wallet else in_flight)]
    for wallet in wallets:
        await ledger.execute(
            Grant(
                id=new_id("cmd"),
                scope=SCOPE,
                wallet=wallet,
                asset="credit",
                block_id=new_id("blk"),
                amount=PLENTY,
                funding=Funding.PAID,
                operator_paid=True,
            )
        )
    waits_us: list[float] = []
    ends = time.perf_counter() + seconds
    done = await asyncio.gather(
        *(_work(ledger, wallets[number % len(wallets)], ends, waits_us) for number in range(in_flight))
    )
    await ledger.close()
    quantiles = statistics.quantiles(waits_us, n=100)
    return Pairs(sum(done) / seconds, quantiles[49], quantiles[98])


async def _work(ledger: Ledger, wallet: WalletRef, ends: float, waits_us: list[float]) -> int:
    done = 0
    while time.perf_counter() < ends:
        reservation = ReservationRef(*SCOPE, new_id("rsv"))
        request_id = new_id("req")
        began = time.perf_counter()
        await ledger.execute(
            Reserve(
                id=new_id("cmd"),
                scope=SCOPE,
                reservation=reservation,
                asset="credit",
                legs=(ReserveLeg(wallets=(wallet,), amount=AMOUNT, minimum=AMOUNT),),
                ttl_us=60_000_000,
                request_id=request_id,
            )
        )
        waits_us.append((time.perf_counter() - began) * 1e6)
        await ledger.execute(
            Commit(
                id=new_id("cmd"),
                scope=SCOPE,
                reservation=reservation,
                settlement=Settlement(
                    charges=(Charge(base=700, markup=100),),
                    usage=UsageRecord(request_id=request_id, units={"input": 60, "output": 20}),
                ),
            )
        )
        done += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--one-wallet", action="store_true")
    parser.add_argument("--batch-max", type=int, default=BATCH_MAX)
    parser.add_argument("--postgres", action="store_true", help="on a durable PostgreSQL of its own")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.postgres:
            server = stack.enter_context(postgres_server())
            print(f"pgbench -N: {pgbench(server, seconds=options.seconds):,.0f} TPS")
            url = stack.enter_context(postgres(server))
        else:
            url = stack.enter_context(sqlite())
        work = measure(
            url,
            in_flight=options.in_flight,
            seconds=options.seconds,
            batch_max=options.batch_max,
            one_wallet=options.one_wallet,
        )
        print(uvloop.run(work))


if __name__ == "__main__":
    main()
