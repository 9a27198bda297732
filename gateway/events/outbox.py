"""The outbox: events that the ledger wrote with what they tell become deliveries, each once.

How it works. An event is pending until it is marked, in the transaction that adds its deliveries: all of them are there
then, or none and it is pending still. One process at a time works on a tenant's mode, in the order of the events; it
holds a lease, which its transactions check, because our own reactions come between reading and marking. Most events
interest nobody: those of types that no endpoint and no reaction asks for are marked by the thousand, in one statement.

A wallet's events become visible in their order and are told in it: a page, oldest first, leaves out none that is asked
for. Who subscribes is told of everything that is committed after the answer: so a page counts only if the endpoints
after it was read are those from before, each at its version.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Any, Final, NamedTuple

import structlog
from sqlalchemy import ColumnElement, any_, bindparam, func, literal_column, select, text, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.database import NOBODY, Database, DatabaseUnavailable, of
from gateway.events.endpoints import ENABLED, Endpoint, enabled_endpoints
from gateway.events.event import ALL_TYPES, Reaction, StoredEvent
from gateway.events.lanes import NewDelivery, enqueue, stored_event
from gateway.tables import OutboxLease, WebhookEndpoint
from ledger.errors import LedgerUnavailable
from ledger.model import Scope, WalletRef
from ledger.store.tables import LedgerEventRow

PAGE: Final = 500
"""Events that are looked at one by one in a transaction."""

BULK_PAGE: Final = 5_000
"""Events that are marked at once where nobody asks for their type."""

LEASE_S: Final = 30
"""What a process had when it died waits so long. Longer than a page's reactions may take."""

REACTING_MAX: Final = 40
"""Events of a page that we react to; the page ends there."""

REACTIONS_AT_ONCE: Final = 8
REACTION_S: Final = 5.0
REACTION_ATTEMPTS_MAX: Final = 8
REACTION_DELAY_S: Final = 1
"""The pause after the first failure; each further one is twice as long."""

HELD_BACK_MAX: Final = 1_000
"""Wallets whose events wait because a reaction failed."""

HELD_BACK_S: Final = 600
"""So long after its time to be tried again it is remembered that a wallet's reaction failed."""

SECOND_US: Final = 1_000_000

log = structlog.get_logger(__name__)


class _Pending(NamedTuple):
    wallet: str
    sequence: int
    id: str
    type: str
    at_us: int


class Worked(NamedTuple):
    """What a round has done. *more*: there may be more to do. *asked*: somebody had asked for some of it."""

    more: bool
    asked: bool


class _Page(NamedTuple):
    """*full*: there may be more. *age_us*: how old its oldest event was. *added*: there is something new to deliver."""

    age_us: int = 0
    full: bool = False
    added: bool = False
    pending: tuple[_Pending, ...] = ()
    reacting: tuple[StoredEvent, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()


class _HeldBack(NamedTuple):
    attempts: int
    until_us: int


class Outbox:
    """Works pending events off. *holder* names this process; *lag* is told how old, in microseconds, the oldest was."""

    def __init__(
        self,
        database: Database,
        *,
        holder: str,
        reactions: Sequence[Reaction] = (),
        now_us: Callable[[], int],
        lag: Callable[[int], None] = lambda age_us: None,
        added: Callable[[], None] = lambda: None,
    ) -> None:
        """*added* is called when there is something new to deliver."""
        self._database = database
        self._holder = holder
        self._now_us = now_us
        self._lag = lag
        self._added = added
        self._reactions = tuple(reactions)
        self._reacting = frozenset[str]().union(*(reaction.types for reaction in self._reactions))
        self._held_back: dict[WalletRef, _HeldBack] = {}

    async def round(self) -> Worked:
        """Work off one page of each scope that has something pending.

        Raises:
            DatabaseUnavailable, LedgerUnavailable: what was not marked comes again.
        """
        ages_us = [0]
        more = asked = False
        for scope in await self._pending_scopes():
            try:
                page = await self._work_off(scope)
            except (DatabaseUnavailable, LedgerUnavailable):
                raise
            except Exception:
                # It comes again, and may fail again: the others have their turn meanwhile.
                log.exception("events are held up", tenant=scope.tenant, mode=scope.mode)
                continue
            ages_us.append(page.age_us)
            more = more or page.full
            asked = asked or page.added or bool(page.pending)
        self._lag(max(ages_us))
        return Worked(more, asked)

    async def _pending_scopes(self) -> list[Scope]:
        async with self._database.read(NOBODY) as connection:
            query = _SCOPES_POSTGRESQL if connection.dialect.name == "postgresql" else _SCOPES_SQLITE
            return [Scope(*row) for row in await connection.execute(query)]

    async def _work_off(self, scope: Scope) -> _Page:
        page = await self._begin(scope)
        if page.reacting:
            failed = await self._react(page.reacting)
            page = page._replace(added=await self._finish(scope, page, failed))
        if page.added:
            self._added()
        return page

    async def _begin(self, scope: Scope) -> _Page:
        """Read a page; and tell it at once where we do not react to any of it."""
        async with self._database.write(of(*scope)) as connection:
            if not await self._lease(connection, scope):
                return _Page()
            endpoints = await enabled_endpoints(connection, scope)
            asked = self._reacting.union(*(endpoint.types for endpoint in endpoints))
            skipped = 0
            if ALL_TYPES not in asked:
                skipped = await _skip(connection, scope, asked, endpoints, now_us=self._now_us())
            pending = await self._oldest(connection, scope, asked)
            if await enabled_endpoints(connection, scope) != endpoints:
                return _Page(full=True)
            age_us = max(0, self._now_us() - pending[0].at_us) if pending else 0
            full = len(pending) == PAGE or skipped == BULK_PAGE
            reacting = [event for event in pending if event.type in self._reacting]
            if not reacting:
                added = await self._tell(connection, scope, pending, endpoints)
                await self._release(connection, scope)
                return _Page(age_us, full=full, added=added)
            if len(reacting) > REACTING_MAX:
                pending, full = pending[: pending.index(reacting[REACTING_MAX])], True
            events = await _with_bodies(connection, scope, reacting[:REACTING_MAX])
            return _Page(age_us, full=full, pending=tuple(pending), reacting=tuple(events), endpoints=tuple(endpoints))

    async def _finish(self, scope: Scope, page: _Page, failed: Set[str]) -> bool:
        """Tell of what was reacted to; whether that added deliveries. Where the lease was lost, another does it.

        All of a wallet's events of a page wait with one of them that failed: what was reacted to is repeatable.
        """
        async with self._database.write(of(*scope)) as connection:
            if not await self._lease(connection, scope, anew=False):
                return False
            ready = [event for event in page.pending if event.wallet not in failed]
            added = await self._tell(connection, scope, ready, page.endpoints)
            await self._release(connection, scope)
            return added

    async def _lease(self, connection: AsyncConnection, scope: Scope, *, anew: bool = True) -> bool:
        """Take the scope for `LEASE_S`; without *anew*, only where it was ours all the time."""
        ours = {"holder": self._holder, "until_us": self._now_us() + LEASE_S * SECOND_US}
        mine = col(OutboxLease.holder) == self._holder
        if not anew:
            kept = update(OutboxLease).where(*_is(scope), mine).values(**ours)
            return bool((await connection.execute(kept)).rowcount)
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        taken = dialect.insert(OutboxLease).values(tenant=scope.tenant, mode=scope.mode, **ours)
        taken = taken.on_conflict_do_update(
            index_elements=Scope._fields,
            set_=ours,
            where=mine | col(OutboxLease.holder).is_(None) | (col(OutboxLease.until_us) <= self._now_us()),
        )
        return bool((await connection.execute(taken)).rowcount)

    async def _release(self, connection: AsyncConnection, scope: Scope) -> None:
        await connection.execute(update(OutboxLease).where(*_is(scope)).values(holder=None, until_us=0))

    async def _oldest(self, connection: AsyncConnection, scope: Scope, asked: Set[str]) -> list[_Pending]:
        """A page of what is *asked* for, without the wallets that wait for a reaction to be tried again."""
        columns = [getattr(LedgerEventRow, name) for name in _Pending._fields]
        query = select(*columns).where(*_of(scope), col(LedgerEventRow.delivered_at_us).is_(None))
        if ALL_TYPES not in asked:
            query = query.where(col(LedgerEventRow.type).in_(sorted(asked)))
        now_us = self._now_us()
        waiting = [ref.wallet for ref, held in self._held_back.items() if ref.scope == scope and now_us < held.until_us]
        if waiting:
            query = query.where(col(LedgerEventRow.wallet).not_in(waiting))
        query = query.order_by(col(LedgerEventRow.at_us), col(LedgerEventRow.wallet), col(LedgerEventRow.sequence))
        return [_Pending(*row) for row in await connection.execute(query.limit(PAGE))]

    async def _tell(
        self, connection: AsyncConnection, scope: Scope, events: Sequence[_Pending], endpoints: Sequence[Endpoint]
    ) -> bool:
        """Add the deliveries of *events* and mark them, in the transaction that is open; whether there are any."""
        if not events:
            return False
        now_us = self._now_us()
        deliveries = [
            NewDelivery(endpoint.id, event.wallet, event.sequence, event.id, event.type)
            for event in events
            for endpoint in endpoints
            if endpoint.wants(event.wallet, event.type)
        ]
        await enqueue(connection, scope, deliveries, now_us=now_us)
        marks = [{"of_wallet": wallet, "first": first, "last": last} for wallet, first, last in _runs(events)]
        marked = (
            update(LedgerEventRow)
            .where(
                *_of(scope),
                col(LedgerEventRow.wallet) == bindparam("of_wallet"),
                col(LedgerEventRow.sequence).between(bindparam("first"), bindparam("last")),
                col(LedgerEventRow.delivered_at_us).is_(None),
            )
            .values(delivered_at_us=now_us)
        )
        await connection.execute(marked, marks)
        return bool(deliveries)

    # Reactions of our own.

    async def _react(self, events: Sequence[StoredEvent]) -> set[str]:
        """Call every reaction, in order for each wallet. Wallets whose reaction failed; they are held back from now."""
        by_wallet: dict[WalletRef, list[StoredEvent]] = {}
        for event in events:
            by_wallet.setdefault(event.ref, []).append(event)
        at_once = asyncio.Semaphore(REACTIONS_AT_ONCE)
        failed: set[str] = set()

        async def of_wallet(ref: WalletRef) -> None:
            async with at_once:
                for event in by_wallet[ref]:
                    if not await self._reacted(event):
                        failed.add(ref.wallet)
                        return
            self._held_back.pop(ref, None)

        done = await asyncio.gather(*map(of_wallet, by_wallet), return_exceptions=True)
        for failure in done:
            if failure is not None:
                raise failure
        return failed

    async def _reacted(self, event: StoredEvent) -> bool:
        """Whether nothing has to be tried again.

        Raises:
            DatabaseUnavailable, LedgerUnavailable: nobody's reaction would do better now.
        """
        try:
            async with asyncio.timeout(REACTION_S):
                for reaction in self._reactions:
                    if event.type in reaction.types:
                        await reaction.act(event)
        except (DatabaseUnavailable, LedgerUnavailable):
            raise
        except Exception:
            held = self._held_back.get(event.ref, _HeldBack(0, 0))
            attempts = held.attempts + 1
            log.exception("a reaction failed", event_id=event.id, event_type=event.type, attempts=attempts)
            if attempts == 1:
                self._forget_stale()
            if attempts >= REACTION_ATTEMPTS_MAX or (attempts == 1 and len(self._held_back) >= HELD_BACK_MAX):
                log.error("a reaction is given up", event_id=event.id, event_type=event.type)
                self._held_back.pop(event.ref, None)
                return True
            delay_us = (REACTION_DELAY_S << (attempts - 1)) * SECOND_US
            self._held_back[event.ref] = _HeldBack(attempts, self._now_us() + delay_us)
            return False
        return True

    def _forget_stale(self) -> None:
        """Forget wallets whose events another process has worked off meanwhile: here they never come again."""
        before_us = self._now_us() - HELD_BACK_S * SECOND_US
        for ref in [ref for ref, held in self._held_back.items() if held.until_us < before_us]:
            del self._held_back[ref]


_SCOPES_POSTGRESQL: Final = text("SELECT tenant, mode FROM farebox_pending_events()")
_SCOPES_SQLITE: Final = text("SELECT DISTINCT tenant, mode FROM ledger_event WHERE delivered_at_us IS NULL")


def _is(scope: Scope) -> tuple[Any, ...]:
    return col(OutboxLease.tenant) == scope.tenant, col(OutboxLease.mode) == scope.mode


def _of(scope: Scope) -> tuple[Any, ...]:
    return col(LedgerEventRow.tenant) == scope.tenant, col(LedgerEventRow.mode) == scope.mode


async def _skip(
    connection: AsyncConnection, scope: Scope, asked: Set[str], endpoints: Sequence[Endpoint], *, now_us: int
) -> int:
    """Mark a page of events whose types are not *asked* for; how many. None, where there are other *endpoints* now."""
    here = (col(WebhookEndpoint.tenant) == scope.tenant, col(WebhookEndpoint.mode) == scope.mode)
    others = select(col(WebhookEndpoint.id)).where(*here, col(WebhookEndpoint.status) == ENABLED)
    for endpoint in endpoints:
        others = others.where(
            (col(WebhookEndpoint.id) != endpoint.id) | (col(WebhookEndpoint.version) != endpoint.version)
        )
    # By where the rows lie: a table that has grown since the planner last looked has led it to read all for each.
    on_server = connection.dialect.name == "postgresql"
    place: ColumnElement[Any] = literal_column("ctid" if on_server else "rowid")
    oldest = (
        select(place)
        .select_from(LedgerEventRow)
        .where(
            *_of(scope),
            col(LedgerEventRow.delivered_at_us).is_(None),
            col(LedgerEventRow.type).not_in(sorted(asked)),
            ~others.exists(),
        )
        .order_by(col(LedgerEventRow.at_us))
        .limit(BULK_PAGE)
    )
    these = place == any_(func.array(oldest.scalar_subquery())) if on_server else place.in_(oldest)
    marked = update(LedgerEventRow).where(*_of(scope), these).values(delivered_at_us=now_us)
    return (await connection.execute(marked)).rowcount


def _runs(events: Sequence[_Pending]) -> Iterator[tuple[str, int, int]]:
    """The events as spans of a wallet's numbers that have no gap, by wallet."""
    by_wallet = sorted((event.wallet, event.sequence) for event in events)
    for _, run in groupby(enumerate(by_wallet), key=lambda each: (each[1][0], each[1][1] - each[0])):
        (_, (wallet, first)), *rest = run
        yield wallet, first, rest[-1][1][1] if rest else first


async def _with_bodies(connection: AsyncConnection, scope: Scope, events: Sequence[_Pending]) -> list[StoredEvent]:
    """The whole events, in the order given."""
    columns = [getattr(LedgerEventRow, name) for name in StoredEvent.__struct_fields__]
    key = tuple_(col(LedgerEventRow.wallet), col(LedgerEventRow.sequence))
    query = select(*columns).where(*_of(scope), key.in_([(event.wallet, event.sequence) for event in events]))
    found: Mapping[str, StoredEvent] = {row.id: stored_event(row) for row in await connection.execute(query)}
    return [found[event.id] for event in events]
