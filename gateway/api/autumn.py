"""Autumn's dialect, under `/autumn/v1`: its paths and words for what the native endpoints do.

A feature is a billable metric, a value is a number of its units, and amounts are credits. A customer's id is the
tenant's own. Not here: `attach`, which sells products, and `usage`, which sets what was used so far: the journal knows
events only.
"""

from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway.api import customers as native
from gateway.api import reservations, usage
from gateway.api.access import Reader, Writer
from gateway.api.credits import WhichCredits, get_credits
from gateway.api.customers import Cursor, CustomerName, CustomerPath, CustomerView, Limit, NewCustomer
from gateway.api.frame import ERROR_BESIDE
from gateway.api.idempotency import key_named, mark_replayed
from gateway.api.metrics import MetricKey
from gateway.api.reservations import TTL_DEFAULT_S, CommitReservation
from gateway.api.route import ExactRoute, Handler
from gateway.api.services import Here, Services
from gateway.api.usage import EVENTS_MAX, AcceptedView, NewUsage, NewUsageBatch, UsageView
from gateway.api.wire import (
    PAGE_DEFAULT,
    Body,
    Exactly,
    Metadata,
    Text,
    Units,
    View,
    exact,
    shown_units,
)
from gateway.billing.entitlements import Entitlement, Named
from gateway.billing.reservations import NewTask, Quantity, reservation_id_of
from gateway.errors import ApiError, invalid_request
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Principal
from gateway.ids import derived_id
from gateway.refusals import UNAFFORDABLE
from pricing.charge import ChargeTooLarge
from pricing.metering import MICROS_PER_UNIT, microunits


class AutumnRoute(ExactRoute):
    """An error has its code and its message where Autumn's clients look for them as well."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def spoken(request: Request) -> Response:
            request.scope[ERROR_BESIDE] = True
            return await handle(request)

        return spoken


router = APIRouter(prefix="/autumn/v1", tags=["Autumn's dialect"], route_class=AutumnRoute)

LOCK_OPERATION: Final = "autumn.lock"
REFUSED_STATUS: Final = 402
"""Of whatever is refused for lack of credits, or of what a budget leaves."""

LockId = Annotated[
    str,
    Field(pattern=r"^[!-~]{1,255}$", description="Your own name for the lock, once and for ever.", examples=["job_42"]),
]
FeatureId = Annotated[MetricKey, Field(description="The metric's key.", examples=["small-model-tokens"])]
Properties = Annotated[Metadata | None, Field(description="Kept with the event; usage can be asked for by them.")]
EXAMPLE: Final = {"customer_id": "user_123", "feature_id": "small-model-tokens"}


class Lock(BaseModel):
    """Hold what the check asks for, until `finalize` or for so long: a reservation."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    lock_id: LockId
    enabled: bool = Field(default=True, strict=True)
    expires_at: int | None = Field(
        default=None,
        strict=True,
        ge=0,
        description=f"Milliseconds since 1970, at most a day ahead. Default: {TTL_DEFAULT_S} seconds from now.",
        examples=[2091520800000],
    )


class CheckRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{**EXAMPLE, "required_balance": 2000}, {**EXAMPLE, "lock": {"lock_id": "job_42"}}]
        }
    )

    customer_id: CustomerName = Field(examples=["user_123"])
    feature_id: FeatureId
    required_balance: Units = Field(default=Decimal(1), description="How many units of the feature are wanted.")
    send_event: bool = Field(
        default=False, strict=True, description="Track `required_balance` at once, if it is allowed."
    )
    lock: Lock | None = None
    with_preview: bool = Field(default=False, description="Accepted, and without effect: there is no preview.")

    @model_validator(mode="after")
    def _one_effect(self) -> "CheckRequest":
        if self.send_event and self.lock is not None:
            raise ValueError("send_event and lock are two ways to take the same credits: choose one")
        return self


class EntitledRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{**EXAMPLE, "required_quantity": 60}]})

    customer_id: CustomerName = Field(examples=["user_123"])
    feature_id: FeatureId
    required_quantity: Units = Field(default=Decimal(1), description="How many units of the feature are wanted.")


class TrackRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{**EXAMPLE, "value": 2000, "idempotency_key": "msg-4711"}]}
    )

    customer_id: CustomerName = Field(examples=["user_123"])
    feature_id: FeatureId | None = None
    event_name: FeatureId | None = Field(default=None, description="The same as `feature_id`.")
    value: Units = Field(default=Decimal(1), description="How many units were used.")
    properties: Properties = None
    async_: bool = Field(
        default=False, alias="async", description="Accepted, and without effect: a charge is durable before the answer."
    )

    @model_validator(mode="after")
    def _one_feature(self) -> "TrackRequest":
        if (self.feature_id is None) == (self.event_name is None):
            raise ValueError("name the feature once: feature_id or event_name")
        return self

    @property
    def feature(self) -> str:
        return self.feature_id or self.event_name or ""

    def usage(self) -> NewUsage:
        return NewUsage(
            customer_id=self.customer_id,
            billable_metric_key=self.feature,
            units=self.value,
            metadata=self.properties or {},
            idempotency_key=self.idempotency_key,
        )


class BatchTrackRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"events": [{**EXAMPLE, "value": 2000}]}]})

    events: Annotated[tuple[TrackRequest, ...], Field(min_length=1, max_length=EVENTS_MAX)]


class FinalizeRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lock_id": "job_42", "action": "confirm", "override_value": 1500}]}
    )

    lock_id: LockId
    action: Literal["confirm", "release"]
    override_value: Units | None = Field(
        default=None, description="What was used, in units. Default: what the check asked for."
    )


class CustomerRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "user_123", "name": "Ada", "email": "ada@example.com"}]}
    )

    id: CustomerName = Field(description="Your own id of the user.", examples=["user_123"])
    name: Text | None = Field(default=None, description="Kept in the metadata.")
    email: Text | None = Field(default=None, description="Kept in the metadata.")
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _kept(self) -> "CustomerRequest":
        self.customer()
        return self

    def customer(self) -> NewCustomer:
        """Raises ValueError for metadata that are too large with the name."""
        told = {name: value for name, value in (("name", self.name), ("email", self.email)) if value is not None}
        metadata = {**(self.metadata or {}), **told} if told or self.metadata is not None else None
        return NewCustomer(external_id=self.id, metadata=metadata, idempotency_key=self.idempotency_key)


class CheckAnswer(View):
    """`allowed` counts what this app could spend on the feature, and budgets; `balance` is the whole wallet's."""

    allowed: bool
    code: Literal["feature_found"] = "feature_found"
    customer_id: str
    feature_id: str
    required_balance: float | int = Field(description="In units of the feature.", examples=[2000])
    balance: Exactly = Field(description="Credits.", examples=[500])
    unlimited: bool = Field(description="Nothing bounds it: it costs nothing.")
    overage_allowed: bool = Field(description="The metric's `overage_policy` lets the wallet owe.")


class FeatureBalance(View):
    feature_id: str
    required: Exactly = Field(description="Credits that it costs.", examples=[200])
    balance: Exactly = Field(description="Credits.", examples=[500])
    unlimited: bool
    usage_allowed: bool = Field(description="The metric's `overage_policy` lets the wallet owe.")


class EntitledAnswer(View):
    allowed: bool
    balances: list[FeatureBalance]


class TrackAnswer(View):
    id: str = Field(
        examples=["req_01k7m3v9c2q8x5t4n6r1b0w3ye"], description="Names the receipt: `GET /v1/requests/{id}`."
    )
    code: Literal["event_received"] = "event_received"
    customer_id: str
    feature_id: str
    value: float | int = Field(examples=[2000])
    credits_used: Exactly = Field(examples=[200])
    balance: Exactly = Field(description="Credits, after this event.", examples=[300])


class RefusedAnswer(View):
    code: str = Field(examples=["insufficient_credits"])
    message: str
    error: dict[str, Any]


class BatchTrackAnswer(View):
    answers: list[TrackAnswer | RefusedAnswer] = Field(
        serialization_alias="list", description="One for each event, in their order."
    )


class FinalizeAnswer(View):
    success: Literal[True] = True
    lock_id: str
    credits_used: Exactly = Field(examples=[150])
    balance: Exactly = Field(examples=[350])


class CustomerAnswer(View):
    id: str = Field(description="Your own id.", examples=["user_123"])
    internal_id: str = Field(description="Ours.", examples=["cus_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    name: str | None
    email: str | None
    metadata: dict[str, Any]
    env: Literal["live", "sandbox"]
    created_at: str


class CustomerWithBalance(CustomerAnswer):
    balance: Exactly = Field(description="Credits.", examples=[500])


class CustomersAnswer(View):
    customers: list[CustomerAnswer] = Field(serialization_alias="list")
    has_more: bool
    next_cursor: str | None


@router.post("/check", response_model=CheckAnswer)
@router.post("/balances.check", response_model=CheckAnswer, summary="Check (balances.check)")
async def check(body: CheckRequest, request: Request, principal: Reader, services: Here) -> Response:
    """Whether a customer may use a feature now. One whom you name for the first time is created.

    With `send_event` it is tracked at once, with `lock` it is held for `finalize`: then `allowed` says whether that was
    done. Both need the scope `credits:write`.
    """
    taken = None
    if body.send_event:
        principal.require(KeyScope.CREDITS_WRITE)
        taken = await _tracked(body, request, principal, services)
    elif body.lock is not None and body.lock.enabled:
        principal.require(KeyScope.CREDITS_WRITE)
        taken = await _locked(body, body.lock, request, principal, services)
    found = await _found(body.customer_id, body.feature_id, body.required_balance, principal, services)
    answer = CheckAnswer(
        allowed=found.allowed if taken is None else taken,
        customer_id=body.customer_id,
        feature_id=body.feature_id,
        required_balance=shown_units(microunits(body.required_balance)),
        balance=_credits(principal, found.balance),
        unlimited=found.affordable_units is None,
        overage_allowed=found.overage_allowed,
    )
    return exact(answer)


@router.post("/entitled", response_model=EntitledAnswer)
async def entitled(body: EntitledRequest, principal: Reader, services: Here) -> Response:
    """The older form of `check`: what is required and what is there, in credits."""
    found = await _found(body.customer_id, body.feature_id, body.required_quantity, principal, services)
    balance = FeatureBalance(
        feature_id=body.feature_id,
        required=_credits(principal, found.cost_total),
        balance=_credits(principal, found.balance),
        unlimited=found.affordable_units is None,
        usage_allowed=found.overage_allowed,
    )
    return exact(EntitledAnswer(allowed=found.allowed, balances=[balance]))


@router.post("/track", response_model=TrackAnswer)
@router.post("/events", response_model=TrackAnswer, summary="Track (events)")
@router.post("/balances.track", response_model=TrackAnswer, summary="Track (balances.track)")
async def track(body: TrackRequest, request: Request, principal: Writer, services: Here) -> Response:
    """Record that a customer used a feature, and charge it. The same as `POST /v1/usage`.

    A repeated idempotency key gets the first answer. What the wallet cannot pay is refused with 402, unless the
    metric's `overage_policy` says otherwise.
    """
    recorded = await usage.record_usage(body.usage(), request, principal, services)
    return exact(_track_answer(body, recorded))


@router.post("/balances.batch_track", response_model=BatchTrackAnswer, summary="Track many (balances.batch_track)")
async def batch_track(body: BatchTrackRequest, request: Request, principal: Writer, services: Here) -> Response:
    """Track up to 1000 events, each by itself. The same as `POST /v1/usage/batch`."""
    events = tuple(event.usage() for event in body.events)
    native_body = NewUsageBatch(events=events, idempotency_key=body.idempotency_key)
    recorded = await usage.record_usage_batch(native_body, request, principal, services)
    answers = [
        _track_answer(event, one)
        if isinstance(one, AcceptedView)
        else RefusedAnswer(code=one.error["code"], message=one.error["message"], error=one.error)
        for event, one in zip(body.events, recorded.data, strict=True)
    ]
    return exact(BatchTrackAnswer(answers=answers))


@router.post("/balances.finalize", response_model=FinalizeAnswer, summary="Finalize a lock (balances.finalize)")
async def finalize(body: FinalizeRequest, request: Request, principal: Writer, services: Here) -> Response:
    """Settle what a check's `lock` holds: charge it, or what was really used, or give it back."""
    reservation_id = reservation_id_of(_request_id(principal, body.lock_id))
    if body.action == "release":
        settled = await reservations.release_reservation(reservation_id, request, principal, services)
    else:
        estimate = (await services.reservations.find(principal, reservation_id)).terms.microunits or 0
        units = Decimal(estimate) / MICROS_PER_UNIT if body.override_value is None else body.override_value
        commit = CommitReservation(units=units, idempotency_key=body.idempotency_key)
        settled = await reservations.commit_reservation(reservation_id, commit, request, principal, services)
    answer = FinalizeAnswer(
        lock_id=body.lock_id,
        credits_used=Decimal(settled.charged_amount_decimal),
        balance=Decimal(settled.balance_decimal),
    )
    return exact(answer)


@router.post("/customers", status_code=201, responses={200: {"model": CustomerAnswer, "description": "Known already"}})
async def create_customer(
    body: CustomerRequest, request: Request, response: Response, principal: Writer, services: Here
) -> CustomerAnswer:
    """Create a customer, or find the one with this id."""
    made = await native.create_customer(body.customer(), request, response, principal, services)
    return CustomerAnswer(**_customer(made))


@router.get("/customers")
async def list_customers(
    principal: Reader, services: Here, cursor: Cursor = None, limit: Limit = PAGE_DEFAULT
) -> CustomersAnswer:
    """All customers, newest first."""
    page = await native.list_customers(principal, services, cursor, limit, external_id=None)
    found = [CustomerAnswer(**_customer(customer)) for customer in page.data]
    return CustomersAnswer(customers=found, has_more=page.has_more, next_cursor=page.next_cursor)


@router.get("/customers/{customer:path}", response_model=CustomerWithBalance)
async def get_customer(customer: CustomerPath, response: Response, principal: Reader, services: Here) -> Response:
    """One customer, and their balance."""
    found = await native.get_customer(customer, response, principal, services)
    credits = await get_credits(found.id, principal, services, WhichCredits())
    return exact(CustomerWithBalance(**_customer(found), balance=Decimal(credits.balance_decimal)))


async def _found(
    customer_id: str, feature_id: str, units: Decimal, principal: Principal, services: Services
) -> Entitlement:
    try:
        return await services.entitlements.check(principal, Named(customer_id), feature_id, units)
    except ChargeTooLarge:
        raise invalid_request("So many units cost more than an account can hold.") from None


async def _tracked(body: CheckRequest, request: Request, principal: Principal, services: Services) -> bool:
    """Whether what the check asks for was there, and has been charged."""
    event = NewUsage(
        customer_id=body.customer_id,
        billable_metric_key=body.feature_id,
        units=body.required_balance,
        idempotency_key=body.idempotency_key,
    )
    try:
        await usage.record_usage(event, request, principal, services)
    except ApiError as refusal:
        if refusal.status != REFUSED_STATUS:
            raise
        return False
    return True


async def _locked(body: CheckRequest, lock: Lock, request: Request, principal: Principal, services: Services) -> bool:
    """Whether what the check asks for was there, and is held."""
    request_id = _request_id(principal, lock.lock_id)
    new = NewTask(
        customer_id=await services.customers.named(principal.tenant_id, principal.mode, body.customer_id),
        metric_key=body.feature_id,
        estimate=Quantity(units=body.required_balance),
        ttl_us=TTL_DEFAULT_S * 1_000_000 if lock.expires_at is None else lock.expires_at * 1000 - services.now_us(),
        metadata={},
        key=key_named(request_id, body, LOCK_OPERATION),
        request_id=request_id,
    )
    try:
        begun = await services.reservations.begin(principal, new)
    except UNAFFORDABLE:
        return False
    except ChargeTooLarge:
        raise invalid_request("So many units cost more than an account can hold.", param="required_balance") from None
    if begun.replayed:
        mark_replayed(request)
    return True


def _request_id(principal: Principal, lock_id: str) -> str:
    """What a lock is charged as: the same whenever this app says its name."""
    return derived_id("req", principal.tenant_id, principal.mode, principal.app_id or "", LOCK_OPERATION, lock_id)


def _track_answer(asked: TrackRequest, recorded: UsageView) -> TrackAnswer:
    return TrackAnswer(
        id=recorded.id,
        customer_id=asked.customer_id,
        feature_id=recorded.billable_metric_key,
        value=recorded.units,
        credits_used=Decimal(recorded.credits_used_decimal),
        balance=Decimal(recorded.balance_decimal),
    )


def _customer(customer: CustomerView) -> dict[str, Any]:
    named = {name: value for name in ("name", "email") if isinstance(value := customer.metadata.get(name), str)}
    return {
        "id": customer.external_id,
        "internal_id": customer.id,
        "name": named.get("name"),
        "email": named.get("email"),
        "metadata": customer.metadata,
        "env": "live" if customer.livemode else "sandbox",
        "created_at": customer.created_at,
    }


def _credits(principal: Principal, amount: int) -> Decimal:
    return Decimal(principal.asset.format(amount))
