"""Periodic work of payments, each done once by all processes together.

How it works. A work has a row that tells when it is due. Who moves that on from what it read, to when its lease ends,
does the work, and moves it on to the next time when it is done. A work that takes longer than its lease is ended, so
that nobody does it beside another; of a process that dies, or a work that fails, somebody begins anew when the lease
has ended. So a work is done at least once: what it does must bear being done again.

A work can keep something for the next time, which is stored in the same step that makes it done; all processes see it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
import structlog
from sqlalchemy import ColumnElement, select, update
from sqlmodel import col

from gateway.database import Database, DatabaseUnavailable, insert_new, of
from gateway.payments.operator import NoOperator
from gateway.tables import PaymentSweep
from ledger.model import Scope

PAUSE_S: Final = 30.0
"""How long it may take at most until a process sees that a work is due."""

PAUSE_LEAST: Final = 0.75
"""Each pause is drawn from this part of it to all of it."""

PAUSE_SHORTEST_S: Final = 0.5

LEASE_S: Final = 600.0

SECOND_US: Final = 1_000_000
DAY_US: Final = 86_400 * SECOND_US

Kept = Mapping[str, Any]
"""What a work keeps for the next time, as JSON has it; nothing before the first time."""

Schedule = Callable[[int], int]
"""When a work is due next after a time, both in microseconds."""

log = structlog.get_logger(__name__)


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """*work* must end within *lease_s*, or is ended; after a failure it is tried again when that has passed.

    It is given what it kept the last time, and returns what it keeps. *look* is called in every process, with what is
    kept, each time that it looks whether the work is due.
    """

    name: str
    schedule: Schedule
    work: Callable[[Kept], Awaitable[Kept]]
    look: Callable[[Kept], None] | None = None
    lease_s: float = LEASE_S


def forgetful(work: Callable[[], Awaitable[object]]) -> Callable[[Kept], Awaitable[Kept]]:
    """A work that keeps nothing."""

    async def done(_: Kept) -> Kept:
        await work()
        return {}

    return done


def every(seconds: int) -> Schedule:
    """*seconds* after the last time."""
    return lambda now_us: now_us + seconds * SECOND_US


def daily(hour: int) -> Schedule:
    """At *hour* o'clock, UTC."""
    return lambda now_us: now_us + DAY_US - (now_us - hour * 3_600 * SECOND_US) % DAY_US


class Sweeps:
    """The periodic works that were added, from `start` to `stop`.

    Args:
        scope: whose the rows are: the operator's.
    """

    def __init__(
        self,
        database: Database,
        scope: Callable[[], Awaitable[Scope]],
        *,
        now_us: Callable[[], int],
        pause_s: float = PAUSE_S,
    ) -> None:
        self._database = database
        self._scope = scope
        self._now_us = now_us
        self._pause_s = pause_s
        self._sweeps: list[Sweep] = []
        self._loops: list[asyncio.Task[None]] = []

    def add(self, sweep: Sweep) -> None:
        """Before `start`; names differ."""
        assert not self._loops
        assert sweep.name not in {known.name for known in self._sweeps}
        self._sweeps.append(sweep)

    def start(self) -> None:
        self._loops = [asyncio.create_task(self._keep_up(sweep), name=f"sweep {sweep.name}") for sweep in self._sweeps]

    async def stop(self) -> None:
        """End; a work under way is given up, and begun anew by somebody when its lease has ended."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._loops = []

    async def run_if_due(self, sweep: Sweep) -> bool:
        """Do *sweep* if it is due and nobody else is at it; whether it was done.

        Raises:
            DatabaseUnavailable, NoOperator, and what the work raises, TimeoutError among it.
        """
        scope = await self._scope()
        due_at_us, kept = await self._due(scope, sweep)
        if sweep.look is not None:
            sweep.look(kept)
        now_us = self._now_us()
        leased_us = now_us + int(sweep.lease_s * SECOND_US)
        if due_at_us > now_us or not await self._move(scope, sweep, due_at_us, leased_us):
            return False
        async with asyncio.timeout(sweep.lease_s):
            keeps = await sweep.work(kept)
        done = await self._move(scope, sweep, leased_us, sweep.schedule(self._now_us()), kept=dict(keeps))
        if done and sweep.look is not None:
            sweep.look(keeps)
        return True

    async def _due(self, scope: Scope, sweep: Sweep) -> tuple[int, Kept]:
        """When it is due, and what it kept; the first time is the next that its schedule has."""
        query = select(col(PaymentSweep.due_at_us), col(PaymentSweep.kept)).where(*_is(scope, sweep))
        async with self._database.read(of(*scope)) as connection:
            found = (await connection.execute(query)).one_or_none()
        if found is not None:
            return found.due_at_us, found.kept
        first_us = sweep.schedule(self._now_us())
        row = {"tenant": scope.tenant, "mode": scope.mode, "name": sweep.name, "due_at_us": first_us, "kept": {}}
        async with self._database.write(of(*scope)) as connection:
            await connection.execute(insert_new(PaymentSweep, connection.dialect.name), row)
        return first_us, {}

    async def _move(self, scope: Scope, sweep: Sweep, before_us: int, after_us: int, **kept: dict[str, Any]) -> bool:
        """Let it be due later; False where somebody else has moved it meanwhile."""
        matches = (*_is(scope, sweep), col(PaymentSweep.due_at_us) == before_us)
        async with self._database.write(of(*scope)) as connection:
            moved = await connection.execute(update(PaymentSweep).where(*matches).values(due_at_us=after_us, **kept))
        return moved.rowcount == 1

    async def _keep_up(self, sweep: Sweep) -> None:
        while True:
            await asyncio.sleep(self._pause(sweep))
            try:
                await self.run_if_due(sweep)
            except NoOperator:
                continue  # `farebox init` has not been run yet, so nobody can have paid.
            except DatabaseUnavailable:
                log.warning("the database is away", upkeep=sweep.name)
            except Exception:
                log.exception("upkeep failed", upkeep=sweep.name)

    def _pause(self, sweep: Sweep) -> float:
        """Until it is looked at again: often enough for its schedule, and not for all processes at once."""
        now_us = self._now_us()
        between_s = (sweep.schedule(now_us) - now_us) / SECOND_US
        longest_s = max(PAUSE_SHORTEST_S, min(self._pause_s, between_s))
        return longest_s * random.uniform(PAUSE_LEAST, 1)  # noqa: S311


def _is(scope: Scope, sweep: Sweep) -> tuple[ColumnElement[bool], ...]:
    return (
        col(PaymentSweep.tenant) == scope.tenant,
        col(PaymentSweep.mode) == scope.mode,
        col(PaymentSweep.name) == sweep.name,
    )
