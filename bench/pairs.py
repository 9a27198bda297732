"""How many reservations a second the ledger can make and commit, durably, on SQLite.

python -m bench.pairs --in-flight 64 --seconds 3
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import uvloop

from gateway.clock import now_us
from gateway.ids import new_id
from gateway.migrations import migrate
from ledger.commands import Commit, Grant, Reserve, ReserveLeg
from ledger.ledger import Ledger
from ledger.model import Charge, Funding, ReservationRef, Scope, Settlement, UsageRecord, WalletRef
from ledger.store.sqlite import SqliteStore
from ledger.writer import BATCH_MAX, Writer

SCOPE = Scope("ten_bench", "live")
AMOUNT = 1_000
PLENTY = 10**15


class Pairs(NamedTuple):
    """What a run came to: pairs a second, and how long a reserve took, in microseconds."""

    a_second: float
    reserve_p50_us: float
    reserve_p99_us: float


async def measure(*, in_flight: int, seconds: float, batch_max: int = BATCH_MAX, one_wallet: bool = False) -> Pairs:
    """Reserve and commit with *in_flight* workers, a wallet each or one for all; *batch_max* 1 commits each alone."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'bench.db'}"
        migrate(url)
        store = await SqliteStore.open(url, clock=now_us)
        writer = Writer(store.run_batch, batch_max=batch_max)
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
    options = parser.parse_args()
    pairs = uvloop.run(
        measure(
            in_flight=options.in_flight,
            seconds=options.seconds,
            batch_max=options.batch_max,
            one_wallet=options.one_wallet,
        )
    )
    print(pairs)


if __name__ == "__main__":
    main()
