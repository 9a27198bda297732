"""What a chat request would cost, asked before it is sent."""

from typing import Annotated

from fastapi import APIRouter, Header, Request
from pydantic import Field

from gateway.api.access import Proxier, app_of
from gateway.api.credits import wallet_now
from gateway.api.route import read_body
from gateway.api.services import Here
from gateway.api.wire import Credits, Millicredits, View, amounts
from gateway.proxy.payer import resolve_payer
from gateway.proxy.request import parse_chat
from ledger.model import Tags

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
        }
    },
)
async def quote(
    request: Request,
    principal: Proxier,
    services: Here,
    action: Annotated[str | None, Header(alias="X-Quota-Action", max_length=256)] = None,
) -> QuoteView:
    """What this chat request is expected to cost, and at most; nothing is sent or reserved.

    The body is that of `POST /v1/chat/completions`, and the same headers name the user and the action.
    """
    body = await read_body(request, services.settings.body_bytes_max)
    app_of(principal)
    chat = parse_chat(body)
    user = request.headers.get(services.settings.user_header)
    payer = await resolve_payer(principal, services.customers, header=user, path=None)
    route = services.router.route(chat.model, mode=principal.mode, at_us=services.now_us())
    plan = await services.quoter.plan(chat, route, principal=principal, payer=payer, action=action)
    fixed = plan.tariff.action
    tags = Tags(app=principal.app_id, model=chat.model)
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
