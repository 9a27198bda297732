"""A process that works on a ledger until it is told to stop, or killed. It prints what it was promised.

Arguments: the database's URL, the worker's name, how many run at once, and how many pairs each makes (0: for ever).
Every line it prints is one answer that it got: ``reserved NAME`` or ``charged NAME AMOUNT``, or ``refused NAME``.
"""

import asyncio
import itertools
import sys

from gateway.stores import open_store
from ledger.commands import Watch
from ledger.errors import InsufficientCredits
from ledger.ledger import Ledger
from ledger.model import Alert
from tests.ledger.rig import Say, machine_clock, wallet

AMOUNT = 3
HALF = 150
"""Below this the shared wallet rings, and below two."""

WATCHED = {"shared": (Watch(wallet("shared"), (Alert("low", HALF), Alert("exhausted", 2))),)}


async def work(url: str, name: str, at_once: int, pairs: int) -> None:
    store = await open_store(url, clock=machine_clock)
    ids = (f"cmd_{name}_{number:08d}" for number in itertools.count())
    ledger = await Ledger.open(store, clock=machine_clock, new_command_id=lambda: next(ids))
    say = Say()
    print("ready", flush=True)

    async def one(worker: int) -> None:
        for number in itertools.count() if pairs == 0 else range(pairs):
            rsv = f"{name}_{worker}_{number}"
            payer = "shared" if number % 2 else f"own_{name}"
            try:
                await ledger.execute(say.reserve(payer, rsv, AMOUNT, id=next(ids), watches=WATCHED.get(payer, ())))
            except InsufficientCredits:
                print("refused", rsv, flush=True)
                continue
            print("reserved", rsv, flush=True)
            await ledger.execute(say.commit(rsv, AMOUNT, id=next(ids)))
            print("charged", rsv, AMOUNT, flush=True)

    await asyncio.gather(*(one(worker) for worker in range(at_once)))
    await ledger.close()


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
