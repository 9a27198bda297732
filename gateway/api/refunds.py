"""Refunds: a charge given back, all of it or a part, to the blocks that paid."""

from typing import Final, Self

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator

from gateway.api.access import Writer
from gateway.api.idempotency import key_of, mark_replayed
from gateway.api.requests import receipt_of
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.wire import Body, Credits, Millicredits, Text, View, amounts, units_of_credits, units_of_millis
from gateway.billing.refunds import NothingCharged, RefundTooLarge
from gateway.errors import ApiError, invalid_request
from ledger.errors import LimitReached
from ledger.outcomes import Refunded
from pricing.money import Asset

router = APIRouter(prefix="/v1", tags=["requests"], route_class=ExactRoute)

OPERATION: Final = "requests.refund"


class RefundRequest(Body):
    """Without an amount, all that is left of the charge."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"reason": "the answer was cut off"}, {"credits": 500, "reason": "goodwill"}]}
    )

    credits: int | None = Field(default=None, strict=True, ge=1, description="Millicredits: 1000 are one credit.")
    amount_decimal: Credits | None = Field(default=None, description="Or decimal credits, exactly.", examples=["0.5"])
    reason: Text | None = Field(default=None, description="Stands in the event `charge.refunded`.")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.credits is not None and self.amount_decimal is not None:
            raise ValueError("name the amount once: credits, or amount_decimal")
        return self

    @property
    def param(self) -> str:
        return "credits" if self.credits is not None else "amount_decimal"

    def units(self, asset: Asset) -> int | None:
        """Raises ApiError 400 for what the asset cannot hold, and for nothing."""
        if self.credits is not None:
            return units_of_millis(self.credits, asset, param="credits")
        if self.amount_decimal is not None:
            return units_of_credits(self.amount_decimal, asset, param="amount_decimal")
        return None


class RefundView(View):
    request_id: str = Field(examples=["req_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    amount: Millicredits = Field(description="Given back now. Nothing, if all was given back before.")
    amount_decimal: Credits
    refunded: Millicredits = Field(description="Given back in all.")
    refunded_decimal: Credits
    balance: Millicredits = Field(description="Of the wallet that paid first. What went to an expired block lapsed.")
    balance_decimal: Credits


@router.post("/requests/{request_id}/refund")
async def refund_request(
    request_id: str, request: Request, principal: Writer, services: Here, body: RefundRequest | None = None
) -> RefundView:
    """Give back all or part of what a request was charged: a completion, a usage event or a reservation.

    The last block that paid gets its part first, whatever the burn order is by now. No more is ever given back than was
    charged. What paid for it had paid the operator, too: you owe him the base cost of what you give back, within the
    line that he grants you. Send an idempotency key with a partial refund: without one, a repetition is another refund.
    """
    asked = body or RefundRequest()
    amount = asked.units(principal.asset)
    key = key_of(request, asked, OPERATION, about=request_id)
    receipt = await receipt_of(request_id, principal, services)
    try:
        applied = await services.refunds.refund(
            receipt.reservation, amount, unfunded=principal.unfunded, key=key, reason=asked.reason
        )
    except RefundTooLarge as error:
        raise _too_large(error, asked, principal.asset) from None
    except NothingCharged:
        raise invalid_request("Nothing has been charged for this request, so there is nothing to refund.") from None
    except LimitReached as error:
        raise _beyond_the_line(error, principal.asset) from None
    if applied.replayed:
        mark_replayed(request)
    refunded = applied.result
    assert isinstance(refunded, Refunded)
    return RefundView(
        request_id=request_id,
        **amounts(
            principal.asset,
            amount=sum(refunded.amounts),
            refunded=sum(refunded.refunded),
            balance=refunded.balance,
        ),
    )


def _beyond_the_line(error: LimitReached, asset: Asset) -> ApiError:
    facts = amounts(asset, needed=error.needed, available=error.available)
    needed, available = facts["needed_decimal"], facts["available_decimal"]
    return ApiError(
        "insufficient_credits",
        f"To give this back costs you {needed} credits, which the operator was paid for, and your line leaves "
        f"{available}. Ask the operator to raise it, or refund less.",
        facts=facts,
    )


def _too_large(error: RefundTooLarge, request: RefundRequest, asset: Asset) -> ApiError:
    facts = amounts(asset, asked=error.asked, refundable=error.refundable)
    asked_for, left = facts["asked_decimal"], facts["refundable_decimal"]
    return ApiError(
        "invalid_request",
        f"{asked_for} credits are more than the {left} that are left of the charge.",
        param=request.param,
        facts=facts,
    )
