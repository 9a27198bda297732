"""The dispatcher: takes lanes that are due, and delivers what is in them.

Every process has one. How many attempts are under way at once is bounded, in all, for each tenant and for each
endpoint, so that one that hangs, and one who has many that do, leaves room for the others.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import structlog

from gateway.database import DatabaseUnavailable
from gateway.events.endpoints import Endpoint
from gateway.events.event import StoredEvent
from gateway.events.lanes import Attempted, Job, LaneRef, Lanes
from gateway.events.post import Answer, Outcome, Poster
from gateway.events.signing import signed_headers

AT_ONCE_MAX: Final = 32
AT_ONCE_OF_TENANT_MAX: Final = 16
AT_ONCE_OF_ENDPOINT_MAX: Final = 8
TRANSACTIONS_AT_ONCE: Final = 2
"""Of the few connections that a process has to its own tables, most stay with the callers."""

PAGE: Final = 100
IN_A_ROW_MAX: Final = 50
"""Deliveries of one lane before others have their turn."""

STOP_S: Final = 5.0
"""How long an attempt under way may take to end when the process stops."""

Render = Callable[[StoredEvent], Awaitable[str]]

log = structlog.get_logger(__name__)


class Dispatcher:
    """Delivers. *render* writes an event as its JSON; *counted* is told how each attempt ended."""

    def __init__(
        self,
        lanes: Lanes,
        poster: Poster,
        *,
        render: Render,
        now_us: Callable[[], int],
        counted: Callable[[str], None] = lambda outcome: None,
        freed: Callable[[], None] = lambda: None,
    ) -> None:
        """*freed* is called when there is room for another lane."""
        self._lanes = lanes
        self._poster = poster
        self._render = render
        self._now_us = now_us
        self._counted = counted
        self._freed = freed
        self._turns = asyncio.Semaphore(TRANSACTIONS_AT_ONCE)
        self._visits: dict[LaneRef, asyncio.Task[None]] = {}
        self._stopping = False

    @property
    def under_way(self) -> int:
        return len(self._visits)

    async def round(self) -> None:
        """Begin with as many of the lanes that are due as there is room for.

        Raises:
            DatabaseUnavailable
        """
        if len(self._visits) >= AT_ONCE_MAX:
            return
        busy = Counter(lane.endpoint for lane in self._visits)
        of_tenant = Counter(lane.tenant for lane in self._visits)
        for lane in await self._lanes.due(of_each=2 * AT_ONCE_OF_ENDPOINT_MAX, page=PAGE):
            if len(self._visits) >= AT_ONCE_MAX:
                break
            room = busy[lane.endpoint] < AT_ONCE_OF_ENDPOINT_MAX and of_tenant[lane.tenant] < AT_ONCE_OF_TENANT_MAX
            if lane not in self._visits and room:
                busy[lane.endpoint] += 1
                of_tenant[lane.tenant] += 1
                visit = asyncio.create_task(self._visit(lane), name="webhook-visit")
                self._visits[lane] = visit
                visit.add_done_callback(partial(self._left, lane))

    async def stop(self) -> None:
        """Let what is under way end, for a while. What is cut off comes again when its lease has ended."""
        self._stopping = True
        if self._visits:
            _, late = await asyncio.wait(self._visits.values(), timeout=STOP_S)
            for visit in late:
                visit.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _left(self, lane: LaneRef, done: asyncio.Task[None]) -> None:
        del self._visits[lane]
        if not done.cancelled() and (error := done.exception()) is not None:
            if isinstance(error, DatabaseUnavailable):
                log.warning("the database is away", dispatcher="visit")
            else:
                log.error("a lane could not be worked on", exc_info=error)
        self._freed()

    async def _visit(self, lane: LaneRef) -> None:
        async with self._turns:
            job = await self._lanes.take(lane)
        left = IN_A_ROW_MAX
        while job is not None:
            left -= 1
            answer = await self._attempt(job.endpoint, job.event)
            self._counted(answer.outcome)
            attempted = Attempted(
                delivered=answer.outcome is Outcome.DELIVERED,
                gone=answer.outcome is Outcome.GONE,
                status=answer.status,
                error=answer.error,
            )
            job = await self._recorded(job, attempted, more=left > 0 and not self._stopping)

    async def _recorded(self, job: Job, attempted: Attempted, *, more: bool) -> Job | None:
        async with self._turns:
            return await self._lanes.record(job, attempted, more=more)

    async def _attempt(self, endpoint: Endpoint, event: StoredEvent) -> Answer:
        try:
            body = await self._render(event)
        except DatabaseUnavailable:
            raise
        except Exception:
            # It would come again for ever; so it has its attempts like every other failure.
            log.exception("an event could not be written", event_id=event.id, event_type=event.type)
            return Answer(Outcome.UNRENDERED, error="the event could not be written; we were told")
        headers = signed_headers(event.id, body, endpoint.secrets, now_us=self._now_us())
        try:
            return await self._poster.post(endpoint.url, body.encode(), headers)
        except Exception:
            log.exception("an attempt broke off", event_id=event.id, endpoint=endpoint.id)
            return Answer(Outcome.BROKEN, error="the attempt broke off; we were told")
