"""Events: what happened, as the webhooks tell it, for 30 days."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.config import JsonDict

from gateway.api.access import CatalogWriter, Reader
from gateway.api.credits import BlockView
from gateway.api.customers import Cursor, CustomerView, Limit
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.wire import PAGE_DEFAULT, Body, Page, Time, View
from gateway.database import Transactions
from gateway.events.event import EVENT_TYPES
from gateway.tables import EXTERNAL_ID_LENGTH_MAX
from ledger.model import Scope

router = APIRouter(prefix="/v1/events", tags=["webhooks"], route_class=ExactRoute)

EventPath = Annotated[str, Path(max_length=64, examples=["evt_01k7m3v9c2q8x5t4n6r1b0w3ye00"])]

EXAMPLE: Final[JsonDict] = {
    "id": "evt_01k7m3v9c2q8x5t4n6r1b0w3ye00",
    "type": "credit.expired",
    "timestamp": "2026-04-13T11:00:03Z",
    "livemode": True,
    "sequence": 7,
    "customer_id": "cus_01k7m3v9c2q8x5t4n6r1b0w3ye",
    "customer": None,
    "credit_block": None,
    "data": {"amount": 180000, "amount_decimal": "180"},
}


def _known(kind: str | None) -> str | None:
    if kind is not None and kind not in EVENT_TYPES:
        raise ValueError(f"there is no such event type; there are {', '.join(sorted(EVENT_TYPES))}")
    return kind


class EventView(View):
    """The body of a webhook."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    id: str = Field(description="The same on every attempt: the header `webhook-id`.")
    type: str = Field(examples=["credit.expired"])
    timestamp: Time
    livemode: bool
    sequence: int = Field(description="Counts the events of the customer, without gaps.")
    customer_id: str | None = Field(description="Null for a wallet of your own.")
    customer: CustomerView | None = Field(description="The whole customer, as they are now.")
    credit_block: BlockView | None = Field(description="The whole block, as it was then, where the event is of one.")
    data: dict[str, Any] = Field(description="What else there is to say, by type.")


class Redelivery(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"endpoint": "whk_01k7m3v9c2q8x5t4n6r1b0w3ye"}]})

    endpoint: str | None = Field(
        default=None, max_length=64, description="Default: every enabled endpoint that wants this type."
    )


class RedeliveryView(View):
    event_id: str
    endpoints: list[str] = Field(description="Where it is delivered again.")


@router.get("")
async def list_events(
    principal: Reader,
    *,
    services: Here,
    kind: Annotated[str | None, AfterValidator(_known), Query(alias="type", max_length=64)] = None,
    customer_id: Annotated[
        str | None,
        Query(min_length=1, max_length=EXTERNAL_ID_LENGTH_MAX, description="Our id, or your own id of the customer."),
    ] = None,
    cursor: Cursor = None,
    limit: Limit = PAGE_DEFAULT,
) -> Page[EventView]:
    """What happened in the last 30 days, newest first."""
    if customer_id is not None:
        customer_id = (await services.customers.find(principal.tenant_id, principal.mode, customer_id)).id
    scope = Scope(principal.tenant_id, principal.mode)
    page = await services.webhooks.events.page(scope, kind=kind, customer_id=customer_id, cursor=cursor, limit=limit)
    return Page(
        data=[EventView(**(await services.event_view(event))) for event in page.events],
        has_more=page.cursor is not None,
        next_cursor=page.cursor,
    )


@router.get("/{event_id}")
async def get_event(event_id: EventPath, principal: Reader, services: Here) -> EventView:
    """One event."""
    event = await services.webhooks.events.get(Scope(principal.tenant_id, principal.mode), event_id)
    return EventView(**(await services.event_view(event)))


@router.post("/{event_id}/redeliver", status_code=202)
async def redeliver_event(
    event_id: EventPath,
    *,
    body: Redelivery,
    request: Request,
    response: Response,
    principal: CatalogWriter,
    services: Here,
) -> RedeliveryView:
    """Deliver an event again, with the same id. It keeps no order: what came later may have been delivered before."""
    scope = Scope(principal.tenant_id, principal.mode)
    event = await services.webhooks.events.get(scope, event_id)

    async def act(transactions: Transactions) -> RedeliveryView:
        endpoints = await services.webhooks.events.redeliver(scope, event, body.endpoint, transactions=transactions)
        return RedeliveryView(event_id=event.id, endpoints=endpoints)

    key = key_of(request, body, "events.redeliver", about=event_id)
    answer = await once(request, response, services, principal, key=key, act=act, view=RedeliveryView)
    services.webhooks.wake()
    return answer
