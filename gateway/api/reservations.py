"""Reservations for tasks outside the proxy: image generation, agent runs, batch jobs."""

from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Self

from fastapi import APIRouter, Path, Request
from pydantic import ConfigDict, Field, model_validator

from gateway.api.access import Reader, Writer
from gateway.api.customers import NamesCustomer
from gateway.api.idempotency import key_of, mark_replayed
from gateway.api.metrics import MetricKey
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.wire import (
    Body,
    Credits,
    Metadata,
    Millicredits,
    Time,
    Units,
    View,
    amounts,
    shown_units,
    units_of_millis,
)
from gateway.billing.reservations import NewTask, NoMetric, Quantity, Task
from gateway.clock import time_text, time_text_or_none
from gateway.errors import invalid_request
from gateway.identity.principals import Principal
from gateway.refusals import UNAFFORDABLE, unaffordable
from ledger.model import ReservationState, Scope
from ledger.outcomes import Applied, Reserved, Settled
from pricing.charge import ChargeTooLarge
from pricing.money import Asset

router = APIRouter(prefix="/v1", tags=["reservations"], route_class=ExactRoute)

TTL_DEFAULT_S: Final = 900
TTL_MAX_S: Final = 24 * 3600

Status = Literal["active", "committed", "released", "expired"]
STATUS: Final[dict[ReservationState, Status]] = {
    ReservationState.OPEN: "active",
    ReservationState.COMMITTED: "committed",
    ReservationState.RELEASED: "released",
    ReservationState.EXPIRED: "expired",
}

ReservationPath = Annotated[str, Path(max_length=64, examples=["rsv_01k7m3v9c2q8x5t4n6r1b0w3ye"])]
Millis = Annotated[int, Field(strict=True, ge=0, description="Millicredits: 1000 are one credit.")]
TtlSeconds = Annotated[int, Field(strict=True, ge=1, le=TTL_MAX_S)]


class NewReservation(NamesCustomer):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "customer_id": "user_12345",
                    "billable_metric_key": "image_generation",
                    "estimated_units": 4,
                    "ttl_seconds": 600,
                    "metadata": {"job": "job_42"},
                },
                {"end_user_id": "user_12345", "credits": 25000},
            ]
        }
    )

    billable_metric_key: MetricKey | None = Field(default=None, description="Its rule of now prices every commit.")
    feature_key: MetricKey | None = Field(default=None, description="The same as `billable_metric_key`.")
    estimated_units: Units | None = Field(default=None, description="What the task may take, of the metric.")
    credits: Millis | None = Field(default=None, description="Or how much to hold, in millicredits.")
    ttl_seconds: TtlSeconds = Field(
        default=TTL_DEFAULT_S, description="How long it may take: then everything that is held is given back."
    )
    metadata: Metadata = Field(default={})

    @model_validator(mode="after")
    def _one_estimate(self) -> Self:
        if self.billable_metric_key is not None and self.feature_key is not None:
            raise ValueError("name the metric once: billable_metric_key or feature_key")
        if (self.estimated_units is None) == (self.credits is None):
            raise ValueError("say once how much to hold: estimated_units or credits")
        if self.estimated_units is not None and self.metric is None:
            raise ValueError("estimated_units need a billable_metric_key, which says what a unit costs")
        return self

    @property
    def metric(self) -> str | None:
        return self.billable_metric_key or self.feature_key


class CommitReservation(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"units": 3}, {"credits": 1500, "final": False}]})

    units: Units | None = Field(default=None, description="What the work took. Each commit is priced as one event.")
    credits: Millis | None = Field(default=None, description="Or what it costs, in millicredits.")
    final: bool = Field(default=True, strict=True, description="`false` charges a part, and keeps the rest held.")

    @model_validator(mode="after")
    def _one_quantity(self) -> Self:
        if (self.units is None) == (self.credits is None):
            raise ValueError("say once what the work came to: units or credits")
        return self


class ExtendReservation(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"ttl_seconds": 600}, {"units": 2, "ttl_seconds": 600}]})

    ttl_seconds: TtlSeconds | None = Field(
        default=None, description="From now on; never shorter than before, nor more than a day after it was made."
    )
    units: Units | None = Field(default=None, description="To hold in addition, all of it or nothing.")
    credits: Millis | None = Field(default=None, description="The same in millicredits.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.units is not None and self.credits is not None:
            raise ValueError("say once how much more to hold: units or credits")
        if self.units is None and self.credits is None and self.ttl_seconds is None:
            raise ValueError("say what to extend: ttl_seconds, units or credits")
        return self


class ReservationView(View):
    id: str = Field(examples=["rsv_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    status: Status
    customer_id: str
    billable_metric_key: str | None
    estimated_units: float | int | None = Field(examples=[4])
    reserved_amount: Millicredits = Field(description="What it holds.")
    reserved_amount_decimal: Credits
    charged_amount: Millicredits = Field(description="By all of its commits.")
    charged_amount_decimal: Credits
    uncovered_amount: Millicredits = Field(description="What its commits asked for and nobody could pay.")
    uncovered_amount_decimal: Credits
    request_id: str | None = Field(description="Names the receipt: `GET /v1/requests/{request_id}`.")
    created_at: Time
    expires_at: Time
    settled_at: Time | None
    metadata: dict[str, Any]


class SettledView(View):
    """What a commit or a release came to."""

    id: str = Field(examples=["rsv_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    status: Status
    request_id: str | None = Field(description="Names the receipt: `GET /v1/requests/{request_id}`.")
    charged_amount: Millicredits = Field(description="By all of its commits.")
    charged_amount_decimal: Credits
    uncovered_amount: Millicredits = Field(description="What its commits asked for and nobody could pay.")
    uncovered_amount_decimal: Credits
    reserved_amount: Millicredits = Field(description="What it still holds.")
    reserved_amount_decimal: Credits
    balance: Millicredits = Field(description="Of the wallet.")
    balance_decimal: Credits
    late: bool = Field(description="Its time had run out before: this commit took what was free.")


class ExtendedView(View):
    id: str = Field(examples=["rsv_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    status: Status
    reserved_amount: Millicredits = Field(description="What it holds now.")
    reserved_amount_decimal: Credits
    expires_at: Time


@router.post("/reservations", status_code=201)
@router.post("/reserve", status_code=201, summary="Reserve", operation_id="reserve")
async def create_reservation(
    body: NewReservation, request: Request, principal: Writer, services: Here
) -> ReservationView:
    """Hold a customer's credits for a task to come. Nobody else can spend them until you commit or release.

    A metric's rule of now prices the reservation and all of its commits. Nothing is charged if you never come back:
    when `ttl_seconds` have passed, everything is given back. `POST /v1/reserve` is the same.
    """
    estimate = _quantity(body.estimated_units, body.credits, principal.asset)
    new = NewTask(
        customer_id=await body.customer(services, principal),
        metric_key=body.metric,
        estimate=estimate,
        ttl_us=body.ttl_seconds * 1_000_000,
        metadata=body.metadata,
        key=key_of(request, body, "reservations.create"),
    )
    try:
        begun = await services.reservations.begin(principal, new)
    except UNAFFORDABLE as error:
        raise unaffordable(error, principal.asset, top_up_url=_page_of(services, principal, new.customer_id)) from None
    except ChargeTooLarge:
        raise invalid_request("So many units cost more than an account can hold.", param="estimated_units") from None
    if begun.replayed:
        mark_replayed(request)
    reserved = begun.reserved
    return _view(
        begun.task,
        principal.asset,
        status="active",
        expires_at_us=reserved.expires_at_us,
        settled_at_us=None,
        reserved_amount=sum(reserved.held),
        charged_amount=0,
        uncovered_amount=0,
    )


@router.get("/reservations/{reservation_id}")
async def get_reservation(reservation_id: ReservationPath, principal: Reader, services: Here) -> ReservationView:
    """A reservation as it is now."""
    task = await services.reservations.find(principal, reservation_id)
    reservation = task.reservation
    return _view(
        task,
        principal.asset,
        status=STATUS[reservation.state],
        expires_at_us=reservation.expires_at_us,
        settled_at_us=reservation.settled_at_us,
        reserved_amount=reservation.held,
        charged_amount=sum(leg.total for leg in reservation.charged),
        uncovered_amount=reservation.waived,
    )


@router.post("/reservations/{reservation_id}/commit")
async def commit_reservation(
    reservation_id: ReservationPath, body: CommitReservation, request: Request, principal: Writer, services: Here
) -> SettledView:
    """Charge what the work came to, and give the rest back; with `final: false` keep the rest held.

    Less than was held frees the rest. More draws on what is free in the wallet, then on an agreed overdraft; what is
    still missing is owed where the metric's `overage_policy` lets it, and else is not charged (`uncovered_amount`): a
    commit is never refused for lack of credits. After its time has run out a commit takes what is free, once.
    """
    quantity = _quantity(body.units, body.credits, principal.asset)
    key = key_of(request, body, "reservations.commit", about=reservation_id)
    try:
        applied = await services.reservations.commit(principal, reservation_id, quantity, final=body.final, key=key)
    except ChargeTooLarge:
        raise invalid_request("So many units cost more than an account can hold.", param="units") from None
    except NoMetric:
        raise _no_metric() from None
    return _settled(request, applied, principal.asset)


@router.post("/reservations/{reservation_id}/release")
async def release_reservation(
    reservation_id: ReservationPath, request: Request, principal: Writer, services: Here
) -> SettledView:
    """Give everything back that is held; repeating it changes nothing. What partial commits charged stays charged."""
    key = key_of(request, None, "reservations.release", about=reservation_id)
    return _settled(request, await services.reservations.release(principal, reservation_id, key=key), principal.asset)


@router.post("/reservations/{reservation_id}/extend")
async def extend_reservation(
    reservation_id: ReservationPath, body: ExtendReservation, request: Request, principal: Writer, services: Here
) -> ExtendedView:
    """Hold more, or for longer, or both. It lives for a day at most."""
    more = _quantity(body.units, body.credits or 0, principal.asset)
    ttl_us = None if body.ttl_seconds is None else body.ttl_seconds * 1_000_000
    key = key_of(request, body, "reservations.extend", about=reservation_id)
    try:
        applied = await services.reservations.extend(principal, reservation_id, more, ttl_us=ttl_us, key=key)
    except UNAFFORDABLE as error:
        customer_id = (await services.reservations.find(principal, reservation_id)).terms.customer_id
        raise unaffordable(error, principal.asset, top_up_url=_page_of(services, principal, customer_id)) from None
    except ChargeTooLarge:
        raise invalid_request("So many units cost more than an account can hold.", param="units") from None
    except NoMetric:
        raise _no_metric() from None
    if applied.replayed:
        mark_replayed(request)
    reserved = applied.result
    assert isinstance(reserved, Reserved)
    return ExtendedView(
        id=reservation_id,
        status="active",
        expires_at=time_text(reserved.expires_at_us),
        **amounts(principal.asset, reserved_amount=sum(reserved.held)),
    )


def _quantity(units: Decimal | None, credits: int | None, asset: Asset) -> Quantity:
    """Raises ApiError 400 for an amount that the asset cannot hold."""
    if units is not None:
        return Quantity(units=units)
    return Quantity(amount=units_of_millis(credits or 0, asset, param="credits"))


def _page_of(services: Services, principal: Principal, customer_id: str) -> str | None:
    """Where the customer adds credits."""
    return services.top_up_url(Scope(principal.tenant_id, principal.mode), customer_id)


def _no_metric() -> Exception:
    return invalid_request("This reservation has no metric, so units have no price here: name credits.", param="units")


def _view(
    task: Task, asset: Asset, *, status: Status, expires_at_us: int, settled_at_us: int | None, **units: int
) -> ReservationView:
    reservation, terms = task.reservation, task.terms
    return ReservationView(
        id=reservation.ref.reservation,
        status=status,
        customer_id=terms.customer_id,
        billable_metric_key=terms.metric,
        estimated_units=None if terms.microunits is None else shown_units(terms.microunits),
        request_id=reservation.request_id,
        created_at=time_text(reservation.created_at_us),
        expires_at=time_text(expires_at_us),
        settled_at=time_text_or_none(settled_at_us),
        metadata=terms.metadata,
        **amounts(asset, **units),
    )


def _settled(request: Request, applied: Applied, asset: Asset) -> SettledView:
    if applied.replayed:
        mark_replayed(request)
    settled = applied.result
    assert isinstance(settled, Settled)
    return SettledView(
        id=settled.reservation,
        status=STATUS[settled.state],
        request_id=f"req_{settled.reservation.partition('_')[2]}",
        late=settled.late,
        **amounts(
            asset,
            charged_amount=sum(leg.total for leg in settled.charged),
            uncovered_amount=settled.waived,
            reserved_amount=settled.held,
            balance=settled.balance,
        ),
    )
