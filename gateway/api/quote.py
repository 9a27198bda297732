"""What a chat request would cost, asked before it is sent."""

from fastapi import APIRouter, Request
from pydantic import Field

from gateway.api.access import Proxier, app_of
from gateway.api.chat import HEADERS
from gateway.api.credits import wallet_now
from gateway.api.idempotency import key_of
from gateway.api.route import read_body
from gateway.api.services import Here
from gateway.api.wire import Credits, Millicredits, View, amounts
from gateway.proxy.exchange import only_value
from gateway.proxy.payer import resolve_payer
from gateway.proxy.request import parse_chat

router = APIRouter(prefix="/v1", tags=["proxy"])


class QuoteView(View):
    model: str
    prompt_tokens: int = Field(description="Our own count.")
    output_tokens_max: int = Field(description="The most that the answer can have, over all choices.")
    expected_amount: Millicredits
    expected_amount_decimal: Credits
    at_most_amount: Millicredits
    at_most_amount_decimal: Credits
    available: Millicredits = Field(description="What the payer could reserve now.")
    available_decimal: Credits
    affordable: bool = Field(description="Whether the payer can afford the most that it could cost.")
    price_version: str


@router.post(
    "/quote",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "required": ["model", "messages"]},
                    "example": {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]},
                }
            },
        },
        "parameters": [HEADERS["X-Quota-User"], HEADERS["X-Quota-Action"]],
    },
)
async def quote(request: Request, principal: Proxier, services: Here) -> QuoteView:
    """What this chat request is expected to cost, and at most; nothing is sent or reserved.

    The body is that of `POST /v1/chat/completions`, and the same headers name the user and the action.
    """
    body = await read_body(request, services.settings.body_bytes_max)
    app_of(principal)
    key_of(request, None, "quote")  # It changes nothing, so the key is only checked.
    chat = parse_chat(body)
    user, action = (_header(request, name) for name in (services.settings.user_header, "X-Quota-Action"))
    payer = await resolve_payer(principal, services.customers, header=user, path=None)
    at_us = services.now_us()
    route = services.router.route(chat.model, mode=principal.mode, at_us=at_us)
    plan = await services.quoter.plan(chat, route, principal=principal, payer=payer, at_us=at_us, action=action)
    fixed, tags = plan.tariff.action, plan.tags(principal.app_id)
    wallets = [
        await wallet_now(services.ledger, wallet, principal.asset, tags, unfunded=payer.unfunded)
        for wallet in payer.wallets
    ]
    available = sum(wallet.effective_balance for wallet in wallets)
    at_most = plan.quote.worst.total if fixed is None else fixed.price
    return QuoteView(
        model=chat.model,
        prompt_tokens=plan.prompt_tokens,
        output_tokens_max=plan.ceiling,
        affordable=available >= at_most,
        price_version=plan.tariff.card.version,
        **amounts(
            principal.asset,
            expected_amount=plan.quote.expected.total if fixed is None else fixed.price,
            at_most_amount=at_most,
            available=available,
        ),
    )


def _header(request: Request, name: str) -> str | None:
    """As the proxy reads it: the quote is for the user and the action that the request would be charged for."""
    return only_value(name, [value.encode("latin-1") for value in request.headers.getlist(name)])
