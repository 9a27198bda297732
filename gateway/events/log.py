"""The events of a tenant's mode as a list, for as long as they are kept, and asking for one again."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from sqlalchemy import Select, or_, select
from sqlmodel import col

from gateway.database import Database, Transactions, of
from gateway.errors import invalid_request, not_found
from gateway.events.endpoints import ENABLED, Endpoint, enabled_endpoints, read_endpoint
from gateway.events.event import CUSTOMER_WALLET, TOLD_WALLETS, USAGE_RECORDED, StoredEvent
from gateway.events.lanes import NewDelivery, enqueue, stored_event
from gateway.tables import WebhookDelivery
from ledger.model import Scope
from ledger.store.tables import LedgerEventRow

_DIGITS_MAX: Final = 18


class DeliveryInfo(NamedTuple):
    """What became of an event at an endpoint."""

    event_id: str
    event_type: str
    state: str
    attempts: int
    next_at_us: int | None
    last_status: int | None
    last_error: str | None
    delivered_at_us: int | None
    created_at_us: int


class EventsPage(NamedTuple):
    """Newest first; *cursor* goes on with what is older, and is None at the end."""

    events: list[StoredEvent]
    cursor: str | None


class EventLog:
    """Reads events and deliveries."""

    def __init__(self, database: Database, *, now_us: Callable[[], int]) -> None:
        self._database = database
        self._now_us = now_us

    async def page(
        self, scope: Scope, *, kind: str | None, customer_id: str | None, cursor: str | None, limit: int
    ) -> EventsPage:
        """A page of events, of one type or customer where these are given.

        Raises:
            ApiError: 400 for a cursor that is none of ours.
        """
        query = _told(scope)
        if kind is not None:
            query = query.where(col(LedgerEventRow.type) == kind)
            if kind != USAGE_RECORDED:  # Lets the index of the rare ones be used.
                query = query.where(col(LedgerEventRow.type) != USAGE_RECORDED)
        if customer_id is None:
            order: Any = col(LedgerEventRow.id)
            before: Any = cursor
        else:
            # Along the wallet's own numbers: a customer's events stand together by these.
            query = query.where(col(LedgerEventRow.wallet) == f"{CUSTOMER_WALLET}{customer_id}")
            order, before = col(LedgerEventRow.sequence), None
            if cursor is not None:
                if not cursor.isdecimal() or len(cursor) > _DIGITS_MAX:
                    raise invalid_request("cursor is not a next_cursor of this list.", param="cursor")
                before = int(cursor)
        if before is not None:
            query = query.where(order < before)
        async with self._database.read(of(*scope)) as connection:
            rows = (await connection.execute(query.order_by(order.desc()).limit(limit + 1))).all()
        events = [stored_event(row) for row in rows[:limit]]
        if len(rows) <= limit:
            return EventsPage(events, None)
        return EventsPage(events, events[-1].id if customer_id is None else str(events[-1].sequence))

    async def get(self, scope: Scope, event_id: str) -> StoredEvent:
        """Raises ApiError 404."""
        async with self._database.read(of(*scope)) as connection:
            row = (await connection.execute(_told(scope).where(col(LedgerEventRow.id) == event_id))).first()
        if row is None:
            raise not_found(f"event {event_id}")
        return stored_event(row)

    async def redeliver(
        self, scope: Scope, event: StoredEvent, endpoint_id: str | None, *, transactions: Transactions | None = None
    ) -> list[str]:
        """Deliver *event* again, beside the order: to one endpoint, or to all that are enabled and want its type.

        Returns the endpoints.

        Raises:
            ApiError: 404 for an endpoint that is not there, 400 for one that is disabled.
        """
        async with (transactions or self._database).write(of(*scope)) as connection:
            if endpoint_id is None:
                found = await enabled_endpoints(connection, scope)
                endpoints = [endpoint for endpoint in found if endpoint.wants(event.wallet, event.type)]
            else:
                endpoints = [_usable(await read_endpoint(connection, scope, endpoint_id), endpoint_id)]
            again = [
                NewDelivery(endpoint.id, event.wallet, event.sequence, event.id, event.type) for endpoint in endpoints
            ]
            await enqueue(connection, scope, again, now_us=self._now_us(), aside=True)
        return [endpoint.id for endpoint in endpoints]

    async def deliveries(
        self, scope: Scope, endpoint_id: str, *, state: str | None, before: str | None, limit: int
    ) -> list[DeliveryInfo]:
        """What an endpoint was told and is to be told, the newest event first."""
        columns = [getattr(WebhookDelivery, name) for name in DeliveryInfo._fields]
        query = select(*columns).where(
            col(WebhookDelivery.tenant) == scope.tenant,
            col(WebhookDelivery.mode) == scope.mode,
            col(WebhookDelivery.endpoint) == endpoint_id,
        )
        if before is not None:
            query = query.where(col(WebhookDelivery.event_id) < before)
        if state is not None:
            query = query.where(col(WebhookDelivery.state) == state)
        query = query.order_by(col(WebhookDelivery.event_id).desc()).limit(limit)
        async with self._database.read(of(*scope)) as connection:
            return [DeliveryInfo(*row) for row in await connection.execute(query)]


def _told(scope: Scope) -> Select[Any]:
    """The events that a tenant is told of, as `is_told` says it."""
    columns = [getattr(LedgerEventRow, name) for name in StoredEvent.__struct_fields__]
    wallets = [col(LedgerEventRow.wallet).startswith(wallet, autoescape=True) for wallet in TOLD_WALLETS]
    return select(*columns).where(
        col(LedgerEventRow.tenant) == scope.tenant,
        col(LedgerEventRow.mode) == scope.mode,
        or_(*wallets, col(LedgerEventRow.type).not_like("credit.%")),
    )


def _usable(endpoint: Endpoint | None, endpoint_id: str) -> Endpoint:
    if endpoint is None:
        raise not_found(f"webhook endpoint {endpoint_id}")
    if endpoint.status != ENABLED:
        raise invalid_request(f"The webhook endpoint {endpoint_id} is disabled: enable it first.", param="endpoint")
    return endpoint
