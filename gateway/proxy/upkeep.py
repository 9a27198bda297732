"""The proxy's periodic work: renew what is alive, settle what is orphaned, tell the ledger what it missed.

Each round is idempotent and safe in every process at once; a round that fails is logged and comes again.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from gateway.proxy.hold import LiveHolds
from gateway.proxy.journal import SettlementJournal
from ledger.errors import LedgerUnavailable
from ledger.ledger import Ledger, Swept

SWEEP_S: Final = 5.0
"""How long an orphan may wait beyond its time, at most."""

REPLAY_S: Final = 1.0

PAUSE_LEAST: Final = 0.75
"""Each pause is drawn from this part of it to all of it."""

log = structlog.get_logger(__name__)


class Upkeep:
    """Three loops, from ``start`` to ``stop``. *swept* is told what each sweep did."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        live: LiveHolds,
        journal: SettlementJournal,
        heartbeat_s: float,
        now_us: Callable[[], int],
        swept: Callable[[Swept], None] = lambda swept: None,
        sweep_s: float = SWEEP_S,
        replay_s: float = REPLAY_S,
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._journal = journal
        self._now_us = now_us
        self._swept = swept
        self._rounds = {
            "heartbeat": (heartbeat_s, self._live.heartbeat),
            "sweep": (sweep_s, self.sweep),
            "replay": (replay_s, self.replay),
        }
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for name, (pause_s, work) in self._rounds.items():
            self._loops.append(asyncio.create_task(self._repeat(name, pause_s, work), name=f"upkeep-{name}"))

    async def stop(self) -> None:
        """End the loops, each between two rounds or at its next wait."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._loops.clear()

    async def sweep(self) -> None:
        """Settle every reservation, and book every block, whose time has passed."""
        swept = await self._ledger.sweep(self._now_us())
        self._swept(swept)
        if swept.reservations or swept.failures:
            log.info("swept", reservations=swept.reservations, wallets=swept.wallets, failures=len(swept.failures))

    async def replay(self) -> None:
        """Tell the ledger what it could not be told, this process's and that of dead ones."""
        told = await self._journal.replay(self._ledger) + await self._journal.adopt(self._ledger)
        if told:
            log.info("settlements replayed", count=told, waiting=self._journal.waiting)

    async def _repeat(self, name: str, pause_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except LedgerUnavailable:
                log.warning("the ledger is away", upkeep=name)
            except Exception:
                log.exception("upkeep failed", upkeep=name)
            # Processes that found the ledger back in the same moment do not come in step for ever.
            await asyncio.sleep(pause_s * random.uniform(PAUSE_LEAST, 1))  # noqa: S311
