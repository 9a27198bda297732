"""Several real processes on one database, and processes that are killed in the middle of their work."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ledger.ledger import Ledger
from ledger.model import ReservationState
from ledger.outcomes import Applied
from ledger.store.protocol import Store
from ledger.verify import verify
from tests.conftest import Campaign
from tests.ledger.rig import SECOND_US, Database, Say, machine_clock, reservation, wallet
from tests.ledger.worker import AMOUNT

Lines = list[list[str]]


def start(url: str, name: str, *, at_once: int, pairs: int) -> "subprocess.Popen[str]":
    arguments = [url, name, str(at_once), str(pairs)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ledger.worker", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def read(process: "subprocess.Popen[str]", count: int) -> Lines:
    assert process.stdout is not None
    return [process.stdout.readline().split() for _ in range(count)]


def rest_of(process: "subprocess.Popen[str]") -> Lines:
    """What it still says until it ends. A line that it was killed in the middle of says nothing.

    Read from the same buffer as before: ``communicate`` with a timeout would pass over what stands in it.
    """
    assert process.stdout is not None
    with process.stdout as pipe:
        output = pipe.read()
    process.wait(120)
    return [line.split() for line in output.splitlines(keepends=True) if line.endswith("\n")]


@asynccontextmanager
async def opened(database: Database, *, ahead_us: int = 0) -> AsyncIterator[tuple[Store, Ledger, Say]]:
    """The ledger of this process, on the machine's clock or *ahead_us* of it."""

    def clock() -> int:
        return machine_clock() + ahead_us

    store = await database.open(clock if ahead_us else None)
    ledger = await Ledger.open(store, clock=clock, new_command_id=lambda: f"cmd_{os.urandom(8).hex()}")
    yield store, ledger, Say()
    await ledger.close()


async def fund(ledger: Ledger, say: Say, credits: dict[str, int]) -> None:
    for name, amount in credits.items():
        await ledger.execute(say.grant(name, name, amount, id=ledger.new_command_id()))


async def test_processes_on_one_database_do_not_overspend_nor_lose(database: Database) -> None:
    """Two processes want more of the shared wallet than there is: exactly what it affords is charged, by both."""
    affordable = 150
    async with opened(database) as (store, ledger, say):
        await fund(ledger, say, {"shared": affordable * AMOUNT + 1, "own_one": 10**6, "own_two": 10**6})
        workers = [start(database.url, name, at_once=16, pairs=20) for name in ("one", "two")]
        lines = await asyncio.gather(*(asyncio.to_thread(rest_of, worker) for worker in workers))
        assert [worker.returncode for worker in workers] == [0, 0]
        charged = [line[1] for printed in lines for line in printed if line[0] == "charged"]
        refused = [line[1] for printed in lines for line in printed if line[0] == "refused"]
        assert len(charged) + len(refused) == 2 * 16 * 20
        assert len(charged) - 2 * 16 * 10 == affordable, "every other pair is on the shared wallet"
        shared = await ledger.wallet_view(wallet("shared"))
        assert shared is not None
        assert (shared.balance, shared.reserved) == (1, 0)
        assert all(any(line[0] == "charged" for line in printed) for printed in lines), "neither starved"
        assert (await verify(store)).violations == ()


@pytest.mark.campaign
async def test_a_process_that_is_killed_loses_no_answer(database: Database, campaign: Campaign) -> None:
    """kill -9 at random moments: what a caller was told is stored, nothing is stored by half, others go on."""
    seed = campaign.random()
    async with opened(database) as (store, ledger, say):
        names = [f"w{number}" for number in range(campaign.rounds(short=5, long=60))]
        await fund(ledger, say, {"shared": 10**9, **{f"own_{name}": 10**9 for name in names}})
        for name in names:
            process = start(database.url, name, at_once=50, pairs=0)
            lines = read(process, seed.randint(20, 600))
            process.send_signal(signal.SIGKILL)
            lines += rest_of(process)
            for kind, rsv, *amount in lines:
                known = await ledger.reservation(reservation(rsv))
                assert known is not None, f"{kind} {rsv}, then killed"
                if kind == "charged":
                    assert known.state is ReservationState.COMMITTED
                    assert sum(charge.total for charge in known.charged) == int(amount[0])
            applied = await ledger.execute(say.debit("shared", f"after_{name}", 1, id=ledger.new_command_id()))
            assert isinstance(applied, Applied), "nobody waits for the dead"
        assert (await verify(store)).violations == ()
    async with opened(database, ahead_us=3600 * SECOND_US) as (store, ledger, _):
        now_us = machine_clock() + 3600 * SECOND_US
        assert (await ledger.sweep(now_us)).failures == ()
        assert await store.due_reservations(now_us, limit=10) == [], "no reservation outlives its time"
        view = await ledger.wallet_view(wallet("shared"))
        assert view is not None
        assert view.reserved == 0
        assert (await verify(store)).violations == ()


async def test_a_process_that_is_stopped_holds_the_others_up_only_until_it_goes_on(database: Database) -> None:
    async with opened(database) as (store, ledger, say):
        await fund(ledger, say, {"shared": 10**9, "own_one": 10**9})
        process = start(database.url, "one", at_once=50, pairs=0)
        for number in range(5):
            read(process, 50)
            process.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(
                ledger.execute(say.debit("shared", f"{number}", 1, id=ledger.new_command_id()))
            )
            await asyncio.sleep(0)
            process.send_signal(signal.SIGCONT)
            assert isinstance(await waiting, Applied)
        process.kill()
        rest_of(process)
        assert (await verify(store)).violations == ()
