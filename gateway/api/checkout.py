"""Checkout: a customer pays for a package on the payment processor's page. Orders: what has become of that."""

from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from fastapi import APIRouter, Path, Request
from pydantic import AfterValidator, ConfigDict, Field

from gateway.api.access import Reader, Writer
from gateway.api.customers import Cursor, CustomerPath, Limit, NamesCustomer
from gateway.api.idempotency import key_of, mark_replayed
from gateway.api.packages import PRICE, PRICE_MINOR
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.wire import PAGE_DEFAULT, Credits, Millicredits, Page, Time, View, Word, amounts
from gateway.clock import time_text, time_text_or_none
from gateway.errors import invalid_request, not_found, payments_not_set_up
from gateway.identity.principals import Principal
from gateway.payments.checkout import Begun, Wanted, expires_at_s
from gateway.payments.orders import Order
from gateway.payments.packages import price_text
from gateway.payments.service import Payments
from gateway.tables.payments import REDIRECT_LENGTH_MAX
from ledger.model import Scope
from pricing.money import Asset

router = APIRouter(prefix="/v1", tags=["payments"], route_class=ExactRoute)

OPERATION: Final = "checkout"
"""The scope of a checkout's idempotency key."""

SECOND_US: Final = 1_000_000


def _absolute(url: str) -> str:
    if not url.isascii() or any(not "!" <= character <= "~" for character in url):
        raise ValueError("it has characters that no URL has")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("it must be an absolute URL that begins with http:// or https://")
    return url


ReturnURL = Annotated[str, AfterValidator(_absolute), Field(max_length=REDIRECT_LENGTH_MAX)]
OrderPath = Annotated[str, Path(max_length=64, examples=["ord_01k7m3v9c2q8x5t4n6r1b0w3ye"])]


class NewCheckout(NamesCustomer):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "customer_id": "user_12345",
                    "package_id": "usd-10",
                    "success_url": "https://example.com/paid",
                    "cancel_url": "https://example.com/credits",
                }
            ]
        }
    )

    package_id: Word = Field(description="One of `GET /v1/packages`.", examples=["usd-10"])
    success_url: ReturnURL | None = Field(
        default=None,
        description="Where the customer goes after paying. Default: this installation's own page, where it has a "
        "public address. That they arrive there does not mean that it is paid: ask for the order, or wait for "
        "`topup.succeeded`.",
    )
    cancel_url: ReturnURL | None = Field(default=None, description="Where the customer goes without paying.")
    save_payment_method: bool = Field(
        default=False, strict=True, description="Keep how they pay for automatic top-ups, which the page tells them."
    )


class SoldView(View):
    """What is sold, for how much, and how far that is."""

    customer_id: str = Field(examples=["cus_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    status: str = Field(
        description="As it is now: `open`, `paid`, `failed` or `expired`. Who pays late has paid.", examples=["open"]
    )
    package_id: str = Field(examples=["usd-10"])
    price: str = Field(description=PRICE, examples=["10.00"])
    price_minor: int = Field(description=PRICE_MINOR, examples=[1000])
    currency: str = Field(examples=["usd"])
    credits: Millicredits
    credits_decimal: Credits
    bonus_credits: Millicredits = Field(description="What comes on top, in millicredits.")
    bonus_credits_decimal: Credits
    checkout_url: str | None = Field(
        description="The page to pay on, which is of use until `expires_at`; null where there is none.",
        examples=["https://checkout.stripe.com/c/pay/cs_test_a1b2c3"],
    )
    expires_at: Time


class CheckoutView(SoldView):
    order_id: str = Field(examples=["ord_01k7m3v9c2q8x5t4n6r1b0w3ye"])


class OrderView(SoldView):
    id: str = Field(examples=["ord_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    kind: str = Field(description="`checkout`, or `auto` for an automatic top-up.", examples=["checkout"])
    block_id: str = Field(
        description="The block of credits that it brings; a bonus is one with the suffix `_bonus`.",
        examples=["blk_01k7m3v9c2q8x5t4n6r1b0w3ye"],
    )
    failure: str | None = Field(description="Why it failed, in the processor's words.", examples=["card_declined"])
    created_at: Time
    settled_at: Time | None = Field(description="When it was paid, failed or expired.")


class OrderStandingView(OrderView):
    """An order, and what has become of the payment since."""

    returned: str = Field(
        description="How much of the price has gone back to who paid it, by refunds and lost disputes. Its part of the "
        "credits was taken back.",
        examples=["0.00"],
    )
    returned_minor: int = Field(description=PRICE_MINOR, examples=[0])
    disputed: bool = Field(description="A dispute is open: until it ends, what is left of the credits pays nothing.")


def payments_of(services: Services) -> Payments:
    """Raises ApiError 404 where no payments are set up."""
    if services.payments is None:
        raise payments_not_set_up()
    return services.payments


@router.post("/checkout", status_code=201)
async def create_checkout(body: NewCheckout, request: Request, principal: Writer, services: Here) -> CheckoutView:
    """Sell a package: send the customer to `checkout_url`, where they pay. The customer is created on first use.

    The credits come when it is paid, whether or not the customer comes back. Send an idempotency key: a repeated
    request gives the same order and the same page, so that nobody pays twice.
    """
    payments = payments_of(services)
    key = key_of(request, body, OPERATION)
    customer_id = await body.customer(services, principal)
    begun = await payments.checkout.begin(
        Wanted(
            scope=Scope(principal.tenant_id, principal.mode),
            customer_id=customer_id,
            package_id=body.package_id,
            asset=principal.asset,
            success_url=body.success_url,
            cancel_url=body.cancel_url,
            save_payment_method=body.save_payment_method,
            key=key,
        )
    )
    return checkout_view(begun, request, principal)


def checkout_view(begun: Begun, request: Request, principal: Principal) -> CheckoutView:
    if begun.replayed:
        mark_replayed(request)
    return CheckoutView(order_id=begun.order.id, **_sold(begun.order, principal.asset))


@router.get("/orders/{order_id}")
async def get_order(order_id: OrderPath, principal: Reader, services: Here) -> OrderStandingView:
    """What has become of an order, and of its payment since."""
    payments = payments_of(services)
    found = await payments.orders.find(Scope(principal.tenant_id, principal.mode), order_id)
    if found is None:
        raise not_found(f"order {order_id}")
    standing = await payments.settler.standing(found)
    return OrderStandingView(
        returned=price_text(standing.taken_minor, found.currency),
        returned_minor=standing.taken_minor,
        disputed=standing.frozen,
        **order_view(found, principal.asset).model_dump(),
    )


@router.get("/customers/{customer:path}/orders")
async def list_orders(
    customer: CustomerPath, principal: Reader, services: Here, cursor: Cursor = None, limit: Limit = PAGE_DEFAULT
) -> Page[OrderView]:
    """A customer's orders, newest first."""
    payments = payments_of(services)
    scope = Scope(principal.tenant_id, principal.mode)
    customer_id = (await services.customers.find(principal.tenant_id, principal.mode, customer)).id
    before = None
    if cursor is not None:
        before = await payments.orders.find(scope, cursor)
        if before is None:
            raise invalid_request("cursor is not the next_cursor of a page before.", param="cursor")
    found = await payments.orders.page(scope, customer_id, before=before, limit=limit + 1)
    more = len(found) > limit
    return Page(
        data=[order_view(order, principal.asset) for order in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


def order_view(order: Order, asset: Asset) -> OrderView:
    return OrderView(
        id=order.id,
        kind=order.kind,
        block_id=order.block_id,
        failure=order.failure,
        created_at=time_text(order.created_at_us),
        settled_at=time_text_or_none(order.settled_at_us),
        **_sold(order, asset),
    )


def _sold(order: Order, asset: Asset) -> dict[str, Any]:
    return {
        "customer_id": order.customer_id,
        "status": order.status,
        "package_id": order.package,
        "price": price_text(order.price_minor, order.currency),
        "price_minor": order.price_minor,
        "currency": order.currency,
        "checkout_url": order.checkout_url,
        "expires_at": time_text(expires_at_s(order) * SECOND_US),
        **amounts(asset, credits=order.credited, bonus_credits=order.bonus),
    }
