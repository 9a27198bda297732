"""Usage: what a tenant's app did for a customer, charged by the metric's rule; one event, or many at once."""

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator

from gateway.api.access import Writer
from gateway.api.customers import NamesCustomer
from gateway.api.idempotency import key_named, key_of, mark_replayed
from gateway.api.metrics import MetricKey
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.wire import Body, Credits, Metadata, Millicredits, Units, View, amounts, shown_units
from gateway.billing.repetition import earlier
from gateway.billing.usage import UsageAccepted, UsageEvent
from gateway.errors import ApiError, idempotency_key_reused, invalid_request
from gateway.identity.principals import Principal
from gateway.refusals import REFUSALS, UNAFFORDABLE, unaffordable
from ledger.commands import Key
from ledger.model import Scope
from pricing.charge import ChargeTooLarge
from pricing.metering import microunits

router = APIRouter(prefix="/v1/usage", tags=["metering"], route_class=ExactRoute)

OPERATION: Final = "usage.record"
BATCH_OPERATION: Final = "usage.batch"
"""The scope of the keys that the events of a batch get from the batch's own."""

EVENTS_MAX: Final = 1_000
CUSTOMERS_AT_ONCE: Final = 256
"""How many customers' events of one batch are under way together."""

METRIC_SYNONYMS: Final = ("billable_metric_key", "feature_key")


class NewUsage(NamesCustomer):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "customer_id": "user_12345",
                    "billable_metric_key": "chat_message",
                    "units": 1,
                    "metadata": {"conversation_id": "conv_789", "companion_id": "companion_42"},
                },
                {
                    "end_user_id": "user_12345",
                    "feature_key": "small-model-tokens",
                    "units": 2000,
                    "idempotency_key": "usage:msg-4711",
                },
            ]
        }
    )

    billable_metric_key: MetricKey | None = None
    feature_key: MetricKey | None = Field(default=None, description="The same as `billable_metric_key`.")
    units: Units = Field(default=Decimal(1), description="How much of it; up to six decimal places.")
    metadata: Metadata = Field(default={})

    @model_validator(mode="after")
    def _one_metric(self) -> "NewUsage":
        if sum(getattr(self, name) is not None for name in METRIC_SYNONYMS) != 1:
            raise ValueError("name the metric once: billable_metric_key or feature_key")
        return self

    @property
    def metric(self) -> str:
        return self.billable_metric_key or self.feature_key or ""


class NewUsageBatch(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {"customer_id": "user_12345", "billable_metric_key": "chat_message", "units": 2},
                        {
                            "customer_id": "user_67890",
                            "billable_metric_key": "chat_message",
                            "idempotency_key": "usage:msg-4712",
                        },
                    ]
                }
            ]
        }
    )

    events: Annotated[tuple[NewUsage, ...], Field(min_length=1, max_length=EVENTS_MAX)]


class UsageView(View):
    """What an event was charged."""

    id: str = Field(
        examples=["req_01k7m3v9c2q8x5t4n6r1b0w3ye"], description="Names the receipt: `GET /v1/requests/{id}`."
    )
    customer_id: str
    billable_metric_key: str
    units: float | int = Field(examples=[1])
    credits_used: Millicredits
    credits_used_decimal: Credits
    balance: Millicredits = Field(description="The wallet's, after this event.")
    balance_decimal: Credits
    status: Literal["accepted"] = "accepted"


class AcceptedView(UsageView):
    index: int = Field(description="The event's place in the batch, from 0.")


class RefusedView(View):
    index: int = Field(description="The event's place in the batch, from 0.")
    status: Literal["refused"] = "refused"
    error: dict[str, Any] = Field(
        description="As `error` in the answer to a single event that is refused.",
        examples=[{"message": "…", "type": "insufficient_quota", "code": "insufficient_credits", "param": None}],
    )


class BatchView(View):
    data: list[AcceptedView | RefusedView] = Field(description="One for each event, in their order.")
    accepted: int
    refused: int


@router.post("", status_code=202)
async def record_usage(body: NewUsage, request: Request, principal: Writer, services: Here) -> UsageView:
    """Record one event and charge its customer, who is created on first use. The charge is durable before the answer.

    What the wallet cannot pay is refused with 402, and nothing is recorded, unless the metric's `overage_policy` says
    otherwise. Repeated with the same idempotency key, the answer is the first one.
    """
    event = await _event(body, principal, services, key_of(request, body, OPERATION))
    accepted = await recorded(event, principal, services)
    if accepted.replayed:
        mark_replayed(request)
    return _view(event, accepted, principal)


@router.post("/batch", status_code=202)
async def record_usage_batch(body: NewUsageBatch, request: Request, principal: Writer, services: Here) -> BatchView:
    """Record up to 1000 events, each by itself: one that is refused stops no other.

    The events of a customer are charged in their order, those of different customers side by side. An event's own
    `idempotency_key` is the one that it would have alone; to those without, the batch's key is handed down, so a
    batch that was cut off can be sent again as it was. A body that is not valid is refused as a whole.
    """
    keys = _keys(request, body)
    outcomes = await _all_recorded(body.events, keys, principal, services)
    views: list[AcceptedView | RefusedView] = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, ApiError):
            views.append(RefusedView(index=index, error={**outcome.inner, **outcome.facts}))
        else:
            event, accepted = outcome
            views.append(AcceptedView(index=index, **_view(event, accepted, principal).model_dump()))
    done = [outcome for outcome in outcomes if not isinstance(outcome, ApiError)]
    if done and all(accepted.replayed for _, accepted in done):
        mark_replayed(request)
    return BatchView(data=views, accepted=len(done), refused=len(views) - len(done))


async def _event(body: NewUsage, principal: Principal, services: Services, key: Key | None) -> UsageEvent:
    return UsageEvent(
        customer_id=await body.customer(services, principal),
        metric_key=body.metric,
        units=body.units,
        metadata=body.metadata,
        key=key,
    )


async def recorded(event: UsageEvent, principal: Principal, services: Services) -> UsageAccepted:
    """Raises ApiError for what only the caller's asset can put into words, and whatever else `record` does."""
    try:
        return await services.metering.record(principal, event)
    except UNAFFORDABLE as error:
        url = services.top_up_url(Scope(principal.tenant_id, principal.mode), event.customer_id)
        raise unaffordable(error, principal.asset, top_up_url=url) from None
    except ChargeTooLarge:
        raise invalid_request("So many units cost more than an account can hold.", param="units") from None


def _view(event: UsageEvent, accepted: UsageAccepted, principal: Principal) -> UsageView:
    return UsageView(
        id=accepted.request_id,
        customer_id=event.customer_id,
        billable_metric_key=event.metric_key,
        units=shown_units(microunits(event.units)),
        **amounts(principal.asset, credits_used=accepted.charged, balance=accepted.balance),
    )


def _keys(request: Request, body: NewUsageBatch) -> list[Key | None]:
    """Each event's key: its own, or its place under the batch's.

    A batch's key stands for the batch as a whole, so each that is handed down has the digest of all events.
    """
    of_batch = key_of(request, body, BATCH_OPERATION)
    keys: list[Key | None] = []
    for index, event in enumerate(body.events):
        if event.idempotency_key is not None:
            keys.append(key_named(event.idempotency_key, event, OPERATION))
        elif of_batch is not None:
            keys.append(msgspec.structs.replace(of_batch, key=f"{of_batch.key}:{index}"))
        else:
            keys.append(None)
    return keys


Outcome = tuple[UsageEvent, UsageAccepted] | ApiError


async def _all_recorded(
    bodies: Sequence[NewUsage], keys: Sequence[Key | None], principal: Principal, services: Services
) -> list[Outcome]:
    """What each event came to, in their order.

    Raises:
        ApiError: 422 when the batch's key is another batch's; 503 when the ledger took none of them.
    """
    turns = asyncio.Semaphore(CUSTOMERS_AT_ONCE)
    outcomes: dict[int, Outcome] = {}

    async def record_each(indices: Sequence[int]) -> None:
        async with turns:
            for index in indices:
                outcomes[index] = await _outcome(bodies[index], keys[index], principal, services)

    handed_down = (index for index, key in enumerate(keys) if key is not None and key.operation == BATCH_OPERATION)
    first = next(handed_down, None)
    # Of a batch that reuses a key nothing is recorded.
    if first == 0:
        await record_each([0])
        if isinstance(outcome := outcomes[0], ApiError) and outcome.code == "idempotency_key_reused":
            raise idempotency_key_reused()
    elif first is not None:
        await earlier(services.ledger, Scope(principal.tenant_id, principal.mode), keys[first], new_id=services.new_id)
    by_customer: dict[str, list[int]] = {}
    for index, body in enumerate(bodies):
        if index not in outcomes:
            by_customer.setdefault(body.customer_named, []).append(index)
    await asyncio.gather(*map(record_each, by_customer.values()))
    ordered = [outcomes[index] for index in range(len(bodies))]
    away = [outcome for outcome in ordered if isinstance(outcome, ApiError) and outcome.status == 503]
    if len(away) == len(ordered):
        raise away[0]
    return ordered


async def _outcome(body: NewUsage, key: Key | None, principal: Principal, services: Services) -> Outcome:
    try:
        event = await _event(body, principal, services, key)
        return event, await recorded(event, principal, services)
    except Exception as error:
        refusal = REFUSALS.translate(error)
        if refusal is None:
            raise
        return refusal
