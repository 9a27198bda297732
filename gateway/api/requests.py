"""The receipt of a request, metered or proxied: what was reserved, what was charged, and which blocks paid."""

from typing import Any, Final

from fastapi import APIRouter
from pydantic import Field

from gateway.api.access import Reader, sees_margins
from gateway.api.services import Here, Services
from gateway.api.wire import Credits, Millicredits, Time, View, amounts
from gateway.clock import time_text, time_text_or_none
from gateway.errors import not_found
from gateway.identity.principals import Principal
from gateway.proxy.open_serving import LEDGER_AWAY
from ledger.ledger import Receipt
from ledger.model import Payment, ReservationState, UsageRecord
from pricing.money import Asset, format_decimal

router = APIRouter(prefix="/v1", tags=["requests"])

NANO_DIGITS: Final = 9
MICRO_DIGITS: Final = 6
MICROUNITS: Final = "microunits"
"""What a metered event's usage is counted in."""


class PaymentView(View):
    """What one block paid."""

    block_id: str | None = Field(description="None: the wallet's agreed overdraft.")
    wallet: str
    amount: Millicredits
    amount_decimal: Credits


class MarginView(View):
    """What only `admin` sees."""

    provider_cost_usd: str = Field(examples=["0.000123"])
    base_decimal: Credits
    markup_decimal: Credits
    shortfall_decimal: Credits = Field(description="What the operator bore because the upstream used more than quoted.")


class ReceiptView(View):
    request_id: str
    status: str = Field(description="in_progress, charged, released or, when all was given back, refunded.")
    model: str | None
    action: str | None
    metric: str | None = Field(description="What was used, where it is no completion.", examples=["image_generation"])
    app_id: str | None
    customer_id: str | None
    started_at: Time | None
    reserved_at: Time
    settled_at: Time | None
    usage: dict[str, int] = Field(description="By unit; each token stands in one of them.", examples=[{"input": 12}])
    units: Credits | None = Field(description="Of the metric, as a decimal.", examples=["1.5"])
    usage_source: str | None = Field(description="provider, counted or partial.")
    ending: str | None
    reserved_decimal: Credits
    charged: Millicredits
    charged_decimal: Credits
    refunded: Millicredits
    refunded_decimal: Credits
    ledger_away: bool = Field(description="It was served while the ledger could not be reached, and charged later.")
    price_version: str | None
    payments: list[PaymentView] = Field(description="The blocks that paid.")
    upstream: str | None = Field(default=None, description="Only with `admin`.")
    margin: MarginView | None = Field(default=None, description="Only with `admin`.")


@router.get("/requests/{request_id}", response_model_exclude_unset=True)
async def get_request(request_id: str, principal: Reader, services: Here) -> ReceiptView:
    """The receipt of a request, by the `X-Request-Id` of its response."""
    return receipt_view(await receipt_of(request_id, principal, services), request_id, principal)


async def receipt_of(request_id: str, principal: Principal, services: Services) -> Receipt:
    """Raises ApiError 404 for what is not there, or is another app's."""
    receipt = await services.ledger.receipt(principal.tenant_id, principal.mode, request_id)
    if receipt is None or not principal.sees_app(receipt.reservation.tags.app):
        raise not_found(f"request {request_id[:64]}")
    return receipt


def receipt_view(receipt: Receipt, request_id: str, principal: Principal) -> ReceiptView:
    reservation, asset = receipt.reservation, principal.asset
    record = receipt.usage[-1].record if receipt.usage else UsageRecord(request_id=request_id)
    usage = _units(receipt)
    micros = usage.pop(MICROUNITS, None)
    charged, refunded = sum(leg.total for leg in reservation.charged), sum(reservation.refunded)
    view = ReceiptView(
        request_id=request_id,
        status=_status(reservation.state, charged=charged, refunded=refunded),
        model=record.model or reservation.tags.model,
        action=record.action,
        metric=record.metric or reservation.tags.metric,
        app_id=record.app_id or reservation.tags.app,
        customer_id=record.customer_id,
        started_at=time_text_or_none(record.started_at_us or None),
        reserved_at=time_text(reservation.created_at_us),
        settled_at=time_text_or_none(reservation.settled_at_us),
        usage=usage,
        units=None if micros is None else format_decimal(micros, MICRO_DIGITS),
        usage_source=record.source or None,
        ending=record.ending or None,
        reserved_decimal=asset.format(reservation.reserved),
        price_version=record.price_version,
        payments=[_payment(payment, asset) for payment in reservation.payments],
        ledger_away=LEDGER_AWAY.items() <= record.metadata.items(),
        **amounts(asset, charged=charged, refunded=refunded),
    )
    if not sees_margins(principal):
        return view
    nanos = sum(part.record.provider_cost_nanos for part in receipt.usage)
    margin = MarginView(
        provider_cost_usd=format_decimal(nanos, NANO_DIGITS),
        base_decimal=asset.format(sum(leg.base for leg in reservation.charged)),
        markup_decimal=asset.format(sum(leg.markup for leg in reservation.charged)),
        shortfall_decimal=asset.format(reservation.shortfall),
    )
    return view.model_copy(update={"upstream": record.upstream, "margin": margin})


def _status(state: ReservationState, *, charged: int, refunded: int) -> str:
    if state is ReservationState.OPEN:
        return "in_progress"
    if refunded == charged > 0:
        return "refunded"
    ended_unused = state is not ReservationState.COMMITTED and charged == 0
    return "released" if ended_unused else "charged"


def _units(receipt: Receipt) -> dict[str, int]:
    units: dict[str, int] = {}
    for part in receipt.usage:
        for unit, quantity in part.record.units.items():
            units[unit] = units.get(unit, 0) + quantity
    return units


def _payment(payment: Payment, asset: Asset) -> PaymentView:
    facts: dict[str, Any] = amounts(asset, amount=payment.base + payment.markup)
    return PaymentView(block_id=payment.block, wallet=payment.wallet.wallet, **facts)
