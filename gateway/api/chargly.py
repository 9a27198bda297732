"""Chargly's dialect, under `/chargly/v1`: an event costs credits, whatever the tokens, and the caller is told how many.

An event is a billable metric, a credit pack one of the operator's packages, and amounts are credits.
"""

from decimal import Decimal
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from pydantic import ConfigDict, Field

from gateway.api.access import Reader, Writer
from gateway.api.checkout import OPERATION as CHECKOUT
from gateway.api.checkout import ReturnURL, checkout_view, payments_of
from gateway.api.credits import WhichCredits, get_credits
from gateway.api.customers import CustomerName
from gateway.api.idempotency import key_of, mark_replayed
from gateway.api.metrics import MetricKey
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.usage import OPERATION, recorded
from gateway.api.wire import Body, ExactDecimal, Exactly, Metadata, Time, View, Word, exact, units_of_credits
from gateway.billing.usage import UsageEvent
from gateway.errors import ApiError, invalid_request
from gateway.payments.checkout import PackageNotFound, ReturnUnknown, Wanted
from gateway.tables import EXTERNAL_ID_LENGTH_MAX
from ledger.model import Scope

router = APIRouter(prefix="/chargly/v1", tags=["Chargly's dialect"], route_class=ExactRoute)

ONE: Final = Decimal(1)

CustomerQuery = Annotated[str, Query(alias="customerId", min_length=1, max_length=EXTERNAL_ID_LENGTH_MAX)]


class MeterRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"event": "chat.reply", "customerId": "user_123"},
                {"event": "image.generation", "customerId": "user_123", "credits": 12.5, "idempotency_key": "img-42"},
            ]
        }
    )

    event: MetricKey = Field(description="The metric's key.", examples=["chat.reply"])
    customer: CustomerName = Field(alias="customerId", examples=["user_123"])
    credits: ExactDecimal | None = Field(
        default=None, description="What it costs, if not what the metric's rule says.", examples=[4]
    )
    metadata: Metadata = Field(default={})


class MeterAnswer(View):
    id: str = Field(
        examples=["req_01k7m3v9c2q8x5t4n6r1b0w3ye"], description="Names the receipt: `GET /v1/requests/{id}`."
    )
    event: str
    customer: str = Field(serialization_alias="customerId")
    credits_used: Exactly = Field(serialization_alias="creditsUsed", examples=[4])
    balance: Exactly = Field(description="Credits, after this event.", examples=[996])
    message: str = Field(description="For the user.", examples=["4 credits used"])


class CheckoutRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "customerId": "user_123",
                    "creditPackCode": "usd-10",
                    "successUrl": "https://example.com/paid",
                    "cancelUrl": "https://example.com/credits",
                }
            ]
        }
    )

    customer: CustomerName = Field(alias="customerId", examples=["user_123"])
    pack: Word = Field(alias="creditPackCode", description="The id of a package.", examples=["usd-10"])
    success_url: ReturnURL | None = Field(default=None, alias="successUrl")
    cancel_url: ReturnURL | None = Field(default=None, alias="cancelUrl")


class CheckoutAnswer(View):
    id: str = Field(examples=["ord_01k7m3v9c2q8x5t4n6r1b0w3ye"], description="Names the order: `GET /v1/orders/{id}`.")
    customer: str = Field(serialization_alias="customerId")
    pack: str = Field(serialization_alias="creditPackCode", examples=["usd-10"])
    status: str = Field(examples=["open"])
    credits: Exactly = Field(description="What it brings, a bonus included.", examples=[1000])
    checkout_url: str | None = Field(
        serialization_alias="checkoutUrl", examples=["https://checkout.stripe.com/c/pay/cs_test_a1b2c3"]
    )
    expires_at: Time = Field(serialization_alias="expiresAt")


class WalletAnswer(View):
    customer: str = Field(serialization_alias="customerId")
    balance: Exactly = Field(description="Credits.", examples=[996])
    available: Exactly = Field(description="What this app could spend now.", examples=[996])
    reserved: Exactly = Field(examples=[0])


@router.post("/meter", response_model=MeterAnswer)
async def meter(body: MeterRequest, request: Request, principal: Writer, services: Here) -> Response:
    """Charge a customer for one event. The customer is created on first use.

    A repeated idempotency key gets the first answer. What the wallet cannot pay is refused with 402, unless the
    metric's `overage_policy` says otherwise.
    """
    asset = principal.asset
    amount = None if body.credits is None else units_of_credits(body.credits, asset, param="credits")
    key = key_of(request, body, OPERATION)
    customer_id = await services.customers.named(principal.tenant_id, principal.mode, body.customer, param="customerId")
    event = UsageEvent(
        customer_id=customer_id, metric_key=body.event, units=ONE, metadata=body.metadata, key=key, amount=amount
    )
    accepted = await recorded(event, principal, services)
    if accepted.replayed:
        mark_replayed(request)
    used = asset.format(accepted.charged)
    answer = MeterAnswer(
        id=accepted.request_id,
        event=body.event,
        customer=body.customer,
        credits_used=Decimal(used),
        balance=Decimal(asset.format(accepted.balance)),
        message=f"{used} {'credit' if used == '1' else 'credits'} used",
    )
    return exact(answer)


@router.get("/wallet", response_model=WalletAnswer)
async def wallet(customer: CustomerQuery, principal: Reader, services: Here) -> Response:
    """What a customer has."""
    credits = await get_credits(customer, principal, services, WhichCredits())
    answer = WalletAnswer(
        customer=customer,
        balance=Decimal(credits.balance_decimal),
        available=Decimal(credits.effective_balance_decimal),
        reserved=Decimal(credits.reserved_decimal),
    )
    return exact(answer)


@router.post("/checkout", status_code=201, response_model=CheckoutAnswer)
async def checkout(body: CheckoutRequest, request: Request, principal: Writer, services: Here) -> Response:
    """Sell a customer credits: send them to `checkoutUrl`. The customer is created on first use."""
    payments = payments_of(services)
    key = key_of(request, body, CHECKOUT)
    customer_id = await services.customers.named(principal.tenant_id, principal.mode, body.customer, param="customerId")
    wanted = Wanted(
        scope=Scope(principal.tenant_id, principal.mode),
        customer_id=customer_id,
        package_id=body.pack,
        asset=principal.asset,
        success_url=body.success_url,
        cancel_url=body.cancel_url,
        key=key,
    )
    try:
        begun = await payments.checkout.begin(wanted)
    except PackageNotFound:
        raise ApiError("not_found", f"There is no credit pack {body.pack[:64]!r}.", param="creditPackCode") from None
    except ReturnUnknown as error:
        param = {"success_url": "successUrl", "cancel_url": "cancelUrl"}[error.param]
        raise invalid_request(f"{param} must be the absolute URL of a page of yours.", param=param) from None
    sold = checkout_view(begun, request, principal)
    answer = CheckoutAnswer(
        id=sold.order_id,
        customer=body.customer,
        pack=sold.package_id,
        status=sold.status,
        credits=Decimal(sold.credits_decimal) + Decimal(sold.bonus_credits_decimal),
        checkout_url=sold.checkout_url,
        expires_at=sold.expires_at,
    )
    return exact(answer, status=201)
