"""Where Stripe tells of payments. It proves itself by its signature, has no API key, and reads nothing but the status.

It is not in the OpenAPI document: only Stripe can call it.
"""

from typing import Final, Literal

import structlog
from fastapi import APIRouter, Request
from pydantic import Field

from gateway.api.route import read_body
from gateway.api.services import Here
from gateway.api.wire import View
from gateway.errors import ApiError, invalid_request, payments_not_set_up, retry_after
from gateway.payments.intake import TooManyEvents
from gateway.payments.processor import SignatureInvalid

router = APIRouter(tags=["operations"], include_in_schema=False)

EVENT_BYTES_MAX: Final = 2**20
SIGNATURE: Final = "stripe-signature"
AGAIN_S: Final = 5

log = structlog.get_logger(__name__)


class EventReceived(View):
    """Stripe shows it to who looks at the delivery."""

    received: Literal[True] = True
    outcome: Literal["done", "duplicate", "kept", "refused", "ignored"] = Field(
        description="`kept`: until more is known of the payment. `refused`: for `reason`, which no retry changes."
    )
    reason: str | None = None


@router.post("/stripe/webhook")
async def receive_stripe_event(request: Request, services: Here) -> EventReceived:
    """Take in an event of Stripe's. The answer is 200 only when its effect is there: else Stripe sends it again."""
    payments = services.payments
    if payments is None:
        raise payments_not_set_up()
    body = await read_body(request, EVENT_BYTES_MAX)
    try:
        outcome = await payments.intake.receive(body, request.headers.get(SIGNATURE, ""))
    except SignatureInvalid as error:
        log.warning("an event was refused that Stripe has not signed, or not lately", reason=str(error))
        raise invalid_request(
            "The signature is missing, wrong or too old. Check stripe_webhook_secret and this machine's clock.",
            param="Stripe-Signature",
        ) from None
    except TooManyEvents:
        raise ApiError(
            "payments_unavailable",
            "Too many events are being taken in at once. Send it again shortly.",
            headers=retry_after(AGAIN_S),
        ) from None
    return EventReceived(outcome=outcome.result, reason=outcome.reason)
