"""Events as one service: what the endpoints ask, and the three loops that work on the outbox, the lanes and the past.

The loops run in every process. A commit of this process wakes the outbox at once; what other processes commit, or left
when they died, is found by looking every second.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import structlog

from gateway.database import Database, DatabaseUnavailable
from gateway.events.delivery import Dispatcher, Render
from gateway.events.endpoints import Endpoints
from gateway.events.event import Reaction
from gateway.events.lanes import Lanes
from gateway.events.log import EventLog
from gateway.events.outbox import Outbox
from gateway.events.post import TOTAL_S, Poster
from gateway.events.retention import Retention
from gateway.events.schedule import JITTER_PERCENT
from gateway.events.target import Resolve, Target, ThreadedResolver, target_of
from ledger.errors import LedgerUnavailable
from ledger.outcomes import Applied

POLL_S: Final = 1.0
RETENTION_PAUSE_S: Final = 3600.0

CANCEL_S: Final = 1.0

GATHER_S: Final = 0.02
"""A pause after each round, in which what comes next gathers: under load a round is then a page."""

UNASKED_S: Final = 0.25
"""The same after events that nobody had asked for: most are of that kind, and each round costs the ledger's disk."""

PAUSE_LEAST: Final = 0.75
"""Each wait is drawn from this part of it to all of it: processes do not come in step."""

log = structlog.get_logger(__name__)


class Counters(Protocol):
    """Where it is counted how deliveries end, and how far behind the outbox is."""

    def count_delivery(self, outcome: str) -> None: ...

    def note_outbox_lag(self, age_us: int) -> None: ...


class Webhooks:
    """What happened, told outside. `start` and `stop` are for the loops; the rest can be used at any time."""

    def __init__(
        self,
        database: Database,
        *,
        counters: Counters,
        allow_private: bool,
        now_us: Callable[[], int],
        new_id: Callable[[str], str],
        resolve: Resolve | None = None,
        total_s: float = TOTAL_S,
    ) -> None:
        """*resolve* looks a host's addresses up, and *total_s* bounds an attempt; the defaults are for production."""
        self._database = database
        self._counters = counters
        self._now_us = now_us
        self._allow_private = allow_private
        self._holder = new_id("run")
        self._resolver = ThreadedResolver()
        self._resolve = resolve or self._resolver
        self._total_s = total_s
        self._events_came = asyncio.Event()
        self._lanes_due = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._dispatcher: Dispatcher | None = None
        self._poster: Poster | None = None
        self.endpoints = Endpoints(database, now_us=now_us, new_id=new_id)
        self.events = EventLog(database, now_us=now_us)

    def check_url(self, url: str) -> Target:
        """Raises TargetRefused."""
        return target_of(url, allow_private=self._allow_private)

    def applied(self, applied: Applied) -> None:
        """A command was committed here: work its events off soon."""
        if applied.events:
            self._events_came.set()

    def wake(self) -> None:
        """There is something to deliver."""
        self._lanes_due.set()

    def start(self, *, render: Render, reactions: Sequence[Reaction] = ()) -> None:
        """Begin to deliver, and to react; *render* writes an event as its JSON."""
        self._poster = Poster(self._resolve, allow_private=self._allow_private, total_s=self._total_s)
        self._dispatcher = dispatcher = Dispatcher(
            Lanes(
                self._database,
                holder=self._holder,
                now_us=self._now_us,
                jitter=lambda: random.randint(-JITTER_PERCENT, JITTER_PERCENT),  # noqa: S311
            ),
            self._poster,
            render=render,
            now_us=self._now_us,
            counted=self._counters.count_delivery,
            freed=self.wake,
        )
        outbox = Outbox(
            self._database,
            holder=self._holder,
            reactions=reactions,
            now_us=self._now_us,
            lag=self._counters.note_outbox_lag,
            added=self.wake,
        )
        retention = Retention(self._database, now_us=self._now_us)

        async def work_off() -> float:
            worked = await outbox.round()
            if worked.more:
                self._events_came.set()
            return GATHER_S if worked.more or worked.asked else UNASKED_S

        async def deliver() -> float:
            await dispatcher.round()
            return GATHER_S

        async def prune() -> float:
            await retention.round()
            return GATHER_S

        for name, loop in (
            ("outbox", _repeat("outbox", work_off, POLL_S, self._events_came)),
            ("dispatcher", _repeat("dispatcher", deliver, POLL_S, self._lanes_due)),
            ("retention", _later(RETENTION_PAUSE_S, _repeat("retention", prune, RETENTION_PAUSE_S, asyncio.Event()))),
        ):
            self._loops.append(asyncio.create_task(loop, name=f"events-{name}"))

    async def stop(self) -> None:
        """End the loops; what is being delivered has a moment to end. Repeatable."""
        while self._loops:
            for loop in self._loops:
                loop.cancel()
            # A library on the way may have taken a cancellation for its own: then it is said again.
            await asyncio.wait(self._loops, timeout=CANCEL_S)
            self._loops = [loop for loop in self._loops if not loop.done()]
        if self._dispatcher is not None:
            await self._dispatcher.stop()
        if self._poster is not None:
            await self._poster.close()
        self._resolver.close()


async def _later(pause_s: float, work: Coroutine[Any, Any, None]) -> None:
    """Begin with *work* after a part of the pause: processes that start together do not prune together."""
    try:
        await asyncio.sleep(pause_s * random.uniform(0, 1))  # noqa: S311
    except asyncio.CancelledError:
        work.close()
        raise
    await work


async def _repeat(name: str, work: Callable[[], Awaitable[float]], pause_s: float, woken: asyncio.Event) -> None:
    """Do *work* when *woken*, or after *pause_s*; it says how long it rests in any case."""
    while True:
        woken.clear()
        rest_s = GATHER_S
        try:
            rest_s = await work()
        except (DatabaseUnavailable, LedgerUnavailable):
            log.warning("the database is away", events=name)
            woken.clear()
        except Exception:
            log.exception("events are held up", events=name)
            woken.clear()
        await asyncio.sleep(rest_s)
        # Not `wait_for`, which before Python 3.12 swallows a cancellation that comes together with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s * random.uniform(PAUSE_LEAST, 1)):  # noqa: S311
                await woken.wait()
