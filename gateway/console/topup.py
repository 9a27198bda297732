"""The page where a customer adds credits: what they have, what they can buy, and what has become of what they bought.

Whoever holds a link is let in (`gateway/payments/links.py`); there are no cookies and no log-in. It shows credits and
money, never what a provider is paid. It is for people: what goes wrong is said in a page, too.
"""

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from gateway.api.route import read_body
from gateway.api.services import Here
from gateway.console.amounts import credits_text, debt_text, dollars_text, money_text
from gateway.console.notices import CreditsFrozen, FormInvalid, OrderNotFound, answered
from gateway.console.page import page
from gateway.console.returned import REFRESHES_MAX, told
from gateway.console.visit import Visit, opened, ordered
from gateway.errors import ApiError
from gateway.payments.packages import Package
from gateway.payments.processor import ProcessorUnavailable

router = APIRouter(include_in_schema=False)

LOOKS_PER_MINUTE: Final = 60
PAYMENTS_PER_MINUTE: Final = 6
"""How often a customer may be led to the processor, and how often they may look: each look reads the books."""

FORM_BYTES_MAX: Final = 4096
FORM_FIELDS_MAX: Final = 10
ORDER_LENGTH_MAX: Final = 64


@router.api_route("/topup/{token}", methods=["GET", "HEAD"])
async def add_credits(token: str, request: Request, services: Here) -> Response:
    """The balance, and the packages to choose from."""

    async def show() -> Response:
        visit = await opened(token, services, LOOKS_PER_MINUTE, "look")
        receivable = 0 if visit.wallet is None else visit.wallet.receivable
        return page(
            "topup.html",
            plain_targets=services.settings.stripe_api_base is not None,
            packages=list(_offered(visit)),
            cancelled="cancelled" in request.query_params,
            owes=debt_text(receivable, visit.asset) if receivable > 0 else None,
            stuck=visit.stuck,
            frozen=visit.frozen,
            **visit.shown(),
        )

    return await answered(request, token, show)


@router.post("/topup/{token}")
async def pay(token: str, request: Request, services: Here) -> Response:
    """Lead the customer to the processor's page, for the package that the form names."""

    async def show() -> Response:
        form = await _form(request)
        visit = await opened(token, services, PAYMENTS_PER_MINUTE, "pay")
        if visit.frozen:
            raise CreditsFrozen
        package_id = form.get("package", [""])[0]
        order = await ordered(visit, package_id, keep_card="keep_card" in form)
        if order.checkout_url is None:
            raise ProcessorUnavailable("the order is over before its page was made")
        headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        return RedirectResponse(order.checkout_url, 303, headers)

    return await answered(request, token, show)


@router.api_route("/topup/{token}/return", methods=["GET", "HEAD"])
async def come_back(token: str, request: Request, services: Here) -> Response:
    """What has become of an order. The processor is asked where its event is not there yet."""

    async def show() -> Response:
        visit = await opened(token, services, LOOKS_PER_MINUTE, "look")
        order_id = request.query_params.get("order", "")[:ORDER_LENGTH_MAX]
        order = None if "\x00" in order_id else await visit.payments.orders.find(visit.link.scope, order_id)
        if order is None or order.customer_id != visit.link.customer_id:
            raise OrderNotFound
        returned = await visit.payments.returns.look(order)
        # The credits may just have come.
        visit = await opened(token, services)
        return page("return.html", **told(visit, returned, _looks(request)), **visit.shown())

    return await answered(request, token, show)


async def _form(request: Request) -> dict[str, list[str]]:
    """Raises FormInvalid."""
    try:
        body = await read_body(request, FORM_BYTES_MAX)
        return parse_qs(body.decode("ascii"), max_num_fields=FORM_FIELDS_MAX)
    except (ApiError, ValueError):
        raise FormInvalid from None


def _offered(visit: Visit) -> Iterator[dict[str, Any]]:
    """The packages that bring something, as the page shows them."""
    asset = visit.asset
    sold = [package for package in visit.payments.packages if package.in_credits(asset).credited]
    chosen = visit.link.package
    if chosen not in {package.id for package in sold} and sold:
        chosen = sold[0].id
    for package in sold:
        bought = package.in_credits(asset)
        yield {
            "id": package.id,
            "chosen": package.id == chosen,
            "price": money_text(package.price_minor, package.currency),
            "credits": credits_text(bought.credited, asset),
            "bonus": credits_text(bought.bonus, asset) if bought.bonus else None,
            "worth": None if _at_face_value(package, bought.spread) else dollars_text(bought.credited, asset),
        }


def _at_face_value(package: Package, spread: int) -> bool:
    """Whether the price says already what its credits are worth."""
    return package.currency == "usd" and not spread


def _looks(request: Request) -> int:
    """How often the page has looked by itself."""
    text = request.query_params.get("look", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else REFRESHES_MAX
