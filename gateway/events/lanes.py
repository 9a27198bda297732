"""Whose turn it is: the deliveries of one wallet at one endpoint, in order and one at a time.

How it works. A lane is there while its wallet has something for its endpoint. A process takes a lane that is due:
nobody else does until its lease ends, also if it dies. It delivers one event after the other, each recorded before the
next, and then gives the lane back, due when its next attempt is. Whoever adds a delivery, records one or gives a lane
back locks the lane's row first, so that they neither miss each other nor wait for each other in a ring.

An attempt is recorded after it was made: whoever dies in between makes it again. Hence «at least once».
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import and_, case, delete, literal, literal_column, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.database import NOBODY, Database, of
from gateway.events.endpoints import ENABLED, Endpoint, disable, read_endpoint
from gateway.events.event import StoredEvent
from gateway.events.schedule import DELIVERED, FAILED, PARKED, PENDING, Next, after_failure
from gateway.tables import WebhookDelivery, WebhookLane
from ledger.model import Scope
from ledger.store.tables import LedgerEventRow

LEASE_S: Final = 30
"""Longer than an attempt may take. What a process had when it died waits so long."""

_KEY: Final = ("tenant", "mode", "endpoint", "wallet", "sequence")

ERROR_LENGTH_MAX: Final = 200
SECOND_US: Final = 1_000_000

GONE: Final = "The receiver answered 410 Gone."
NOT_ENABLED: Final = "the endpoint is disabled"


class LaneRef(NamedTuple):
    tenant: str
    mode: str
    endpoint: str
    wallet: str

    @property
    def scope(self) -> Scope:
        return Scope(self.tenant, self.mode)


class Job(NamedTuple):
    """A delivery that is due, in a lane that we hold."""

    lane: LaneRef
    endpoint: Endpoint
    event: StoredEvent
    state: str
    attempts: int
    started_at_us: int


class Attempted(NamedTuple):
    """How an attempt went. *gone*: the receiver wants no more, ever. *error* is for the endpoint's owner."""

    delivered: bool
    status: int | None
    error: str | None
    gone: bool = False


class NewDelivery(NamedTuple):
    endpoint: str
    wallet: str
    sequence: int
    event_id: str
    event_type: str


class Lanes:
    """The lanes of all tenants, in the database. *holder* names this process; *jitter* draws a whole percentage."""

    def __init__(
        self, database: Database, *, holder: str, now_us: Callable[[], int], jitter: Callable[[], int]
    ) -> None:
        self._database = database
        self._holder = holder
        self._now_us = now_us
        self._jitter = jitter

    async def due(self, *, of_each: int, page: int) -> list[LaneRef]:
        """Lanes that somebody may take, at most *of_each* for every endpoint, and of each tenant one after the other.

        Candidates, read without locks.
        """
        values = {"now_us": self._now_us(), "of_each": of_each, "page": page}
        async with self._database.read(NOBODY) as connection:
            query = _DUE_POSTGRESQL if connection.dialect.name == "postgresql" else _DUE_SQLITE
            return [LaneRef(*row) for row in await connection.execute(query, values)]

    async def take(self, lane: LaneRef) -> Job | None:
        """Hold the lane, and say what is to do first; None where another was quicker or nothing is due."""
        now_us = self._now_us()
        async with self._database.write(of(*lane.scope)) as connection:
            held = update(WebhookLane).where(*_is(lane), col(WebhookLane.due_at_us) <= now_us)
            taken = await connection.execute(held.values(holder=self._holder, due_at_us=now_us + LEASE_S * SECOND_US))
            return await self._next(connection, lane) if taken.rowcount else None

    async def record(self, job: Job, attempted: Attempted, *, more: bool) -> Job | None:
        """Write down how *job* went. With *more*, go on with what is due next; else, or without any, give it back.

        Nothing is written where another has the lane meanwhile: it makes the attempt again.
        """
        now_us = self._now_us()
        async with self._database.write(of(*job.lane.scope)) as connection:
            held = update(WebhookLane).where(*_is(job.lane), col(WebhookLane.holder) == self._holder)
            kept = await connection.execute(held.values(due_at_us=now_us + LEASE_S * SECOND_US))
            if not kept.rowcount:
                return None
            await connection.execute(
                update(WebhookDelivery)
                .where(
                    *_within(job.lane),
                    col(WebhookDelivery.sequence) == job.event.sequence,
                    # Else it was asked for again meanwhile, and is due anew.
                    col(WebhookDelivery.started_at_us) == job.started_at_us,
                )
                .values(
                    attempts=job.attempts + 1,
                    last_status=attempted.status,
                    last_error=None if attempted.error is None else attempted.error[:ERROR_LENGTH_MAX],
                    **self._follows(job, attempted, now_us),
                )
            )
            if attempted.gone:
                await disable(connection, job.lane.scope, job.endpoint.id, reason=GONE)
            return await self._next(connection, job.lane, only_back=not more)

    def _follows(self, job: Job, attempted: Attempted, now_us: int) -> dict[str, Any]:
        if attempted.delivered:
            return {"state": DELIVERED, "next_at_us": None, "delivered_at_us": now_us}
        follows = Next(FAILED, None)
        if not attempted.gone:
            follows = after_failure(
                state=job.state,
                attempts=job.attempts + 1,
                started_at_us=job.started_at_us,
                now_us=now_us,
                jitter=self._jitter(),
            )
        return {"state": follows.state, "next_at_us": follows.at_us}

    async def _next(self, connection: AsyncConnection, lane: LaneRef, *, only_back: bool = False) -> Job | None:
        """What is due in a lane that we hold, or give it back."""
        endpoint = await read_endpoint(connection, lane.scope, lane.endpoint)
        if endpoint is None or endpoint.status != ENABLED:
            await _give_up(connection, lane)
            return None
        while True:
            waiting = await _waiting(connection, lane)
            if not waiting:
                await connection.execute(delete(WebhookLane).where(*_is(lane)))
                return None
            first = min(waiting, key=lambda each: each.next_at_us)
            if only_back or first.next_at_us > self._now_us():
                back = update(WebhookLane).where(*_is(lane))
                await connection.execute(back.values(holder=None, due_at_us=first.next_at_us))
                return None
            event = await _event(connection, lane, first.sequence)
            if event is not None:
                return Job(lane, endpoint, event, first.state, first.attempts, first.started_at_us)
            lost = {"state": FAILED, "next_at_us": None, "last_error": "the event is no longer kept"}
            this = (*_within(lane), col(WebhookDelivery.sequence) == first.sequence)
            await connection.execute(update(WebhookDelivery).where(*this).values(**lost))


class _Waiting(NamedTuple):
    sequence: int
    state: str
    attempts: int
    next_at_us: int
    started_at_us: int


async def _waiting(connection: AsyncConnection, lane: LaneRef) -> list[_Waiting]:
    """The first of those that keep the order, and the next of those that stand aside."""
    columns = [getattr(WebhookDelivery, name) for name in _Waiting._fields]
    found: list[_Waiting] = []
    # Each literally, so that the planner takes the index of that state.
    for state, order in ((PENDING, WebhookDelivery.sequence), (PARKED, WebhookDelivery.next_at_us)):
        of_state = col(WebhookDelivery.state) == literal_column(f"'{state}'")
        query = select(*columns).where(*_within(lane), of_state).order_by(col(order)).limit(1)
        found += [_Waiting(*row) for row in await connection.execute(query)]
    return found


async def _event(connection: AsyncConnection, lane: LaneRef, sequence: int) -> StoredEvent | None:
    columns = [getattr(LedgerEventRow, name) for name in StoredEvent.__struct_fields__]
    query = select(*columns).where(
        col(LedgerEventRow.tenant) == lane.tenant,
        col(LedgerEventRow.mode) == lane.mode,
        col(LedgerEventRow.wallet) == lane.wallet,
        col(LedgerEventRow.sequence) == sequence,
    )
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else stored_event(row)


def stored_event(row: Sequence[Any]) -> StoredEvent:
    """A row of `StoredEvent`'s fields, whose body is JSON."""
    tenant, mode, wallet, sequence, event_id, kind, at_us, body = row
    return StoredEvent(tenant, mode, wallet, sequence, event_id, kind, at_us, msgspec.json.decode(body))


async def _give_up(connection: AsyncConnection, lane: LaneRef) -> None:
    """Nobody listens any more: what waits has failed, and can be asked for again."""
    for state in (PENDING, PARKED):
        waits = (*_within(lane), col(WebhookDelivery.state) == literal_column(f"'{state}'"))
        ended = {"state": FAILED, "next_at_us": None, "last_error": NOT_ENABLED}
        await connection.execute(update(WebhookDelivery).where(*waits).values(**ended))
    await connection.execute(delete(WebhookLane).where(*_is(lane)))


async def enqueue(
    connection: AsyncConnection, scope: Scope, deliveries: Sequence[NewDelivery], *, now_us: int, aside: bool = False
) -> None:
    """Add deliveries, which are due now. Those that are there already stay as they are.

    With *aside* they stand beside the order and hold up nobody, and those that are there begin anew; one that still
    waits for its turn keeps it.
    """
    if not deliveries:
        return
    begin = {
        "state": PARKED if aside else PENDING,
        "attempts": 0,
        "next_at_us": now_us,
        "started_at_us": now_us,
        "last_status": None,
        "last_error": None,
        "delivered_at_us": None,
    }
    named = {"tenant": scope.tenant, "mode": scope.mode}
    rows = [{**named, **each._asdict(), **begin, "created_at_us": now_us} for each in deliveries]
    added = _insert(connection, WebhookDelivery)
    if aside:
        anew = {name: added.excluded[name] for name in begin}
        kept = col(WebhookDelivery.state) == PENDING
        anew["state"] = case((kept, PENDING), else_=PARKED)
        added = added.on_conflict_do_update(index_elements=_KEY, set_=anew)
    else:
        added = added.on_conflict_do_nothing()
    lanes = sorted({(each.endpoint, each.wallet) for each in deliveries})
    opened = _insert(connection, WebhookLane)
    due, holder = col(WebhookLane.due_at_us), col(WebhookLane.holder)
    # While somebody holds it, its time is the end of the lease: they look for themselves when they give it back.
    sooner = case((and_(holder.is_(None), due > now_us), literal(now_us)), else_=due)
    opened = opened.on_conflict_do_update(index_elements=LaneRef._fields, set_={"due_at_us": sooner})
    lane_rows = [
        {**named, "endpoint": endpoint, "wallet": wallet, "due_at_us": now_us, "holder": None}
        for endpoint, wallet in lanes
    ]
    await connection.execute(opened, lane_rows)
    await connection.execute(added, rows)


def _insert(connection: AsyncConnection, table: Any) -> Any:
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def _is(lane: LaneRef) -> tuple[Any, ...]:
    return tuple(col(getattr(WebhookLane, name)) == value for name, value in lane._asdict().items())


def _within(lane: LaneRef) -> tuple[Any, ...]:
    return tuple(col(getattr(WebhookDelivery, name)) == value for name, value in lane._asdict().items())


_DUE_POSTGRESQL: Final = text("SELECT tenant, mode, endpoint, wallet FROM farebox_due_lanes(:now_us, :of_each, :page)")
_DUE_SQLITE: Final = text(
    """
    SELECT tenant, mode, endpoint, wallet FROM (
        SELECT *, row_number() OVER (PARTITION BY tenant, mode, endpoint ORDER BY due_at_us) AS place
        FROM webhook_lanes WHERE due_at_us <= :now_us
    ) WHERE place <= :of_each
    ORDER BY row_number() OVER (PARTITION BY tenant ORDER BY due_at_us), due_at_us LIMIT :page
    """
)
