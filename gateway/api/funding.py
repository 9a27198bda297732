"""A developer's own money in an app: their wallet, the grant pool that it fills, and grants to users from the pool."""

from decimal import Decimal
from typing import Final, Self

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator

from gateway.api.access import Reader, Writer, app_of
from gateway.api.credits import wallet_now
from gateway.api.customers import NamesCustomer
from gateway.api.idempotency import key_of, mark_replayed
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.wire import (
    Body,
    Credits,
    ExactDecimal,
    Millicredits,
    Text,
    View,
    amounts,
    units_of_millis,
    units_of_usd,
)
from gateway.errors import ApiError
from gateway.identity.principals import Principal
from gateway.identity.wallets import app_wallet, customer_wallet, pool_wallet
from ledger.commands import Grant
from ledger.errors import InsufficientCredits, ReceivableOutstanding
from ledger.model import Funding, Restriction, Scope, WalletRef
from ledger.outcomes import Granted
from pricing.money import Asset

router = APIRouter(prefix="/v1/funding", tags=["funding"], route_class=ExactRoute)

DEVELOPER_GRANT_PRIORITY: Final = 100
"""Above anything that a user is likely to hold: what the developer gives is spent before the user's own credits."""

DEVELOPER_GRANT_SOURCE: Final = "developer_grant"

UsdText = str


class FundingGrant(NamesCustomer):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"external_user_id": "user_123", "amount": 0.50, "description": "Welcome bonus"}]
        }
    )

    amount: ExactDecimal = Field(description="Dollars, as a number or a string; read exactly.")
    description: Text = ""


class FundingGrantView(View):
    customer_id: str
    ledger_id: str
    amount_granted: Millicredits
    amount_granted_decimal: Credits
    balance_before: Millicredits
    balance_before_decimal: Credits
    balance_after: Millicredits
    balance_after_decimal: Credits
    balance: Millicredits
    balance_decimal: Credits
    duplicate: bool = Field(description="This key had its effect before; nothing was granted again.")


class FundPool(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"amount": "25.00"}, {"credits": 2500000}]})

    amount: ExactDecimal | None = Field(default=None, description="Dollars, as a number or a string; read exactly.")
    credits: int | None = Field(default=None, strict=True, ge=1, description="Or millicredits.")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.amount is None) == (self.credits is None):
            raise ValueError("name the amount once: amount in dollars, or credits in millicredits")
        return self


class HoldingView(View):
    balance: Millicredits
    balance_decimal: Credits
    available: Millicredits = Field(description="What is not reserved by requests under way.")
    available_decimal: Credits
    balance_usd: UsdText = Field(description="The exact value in dollars.", examples=["25"])


class FundingView(View):
    app_id: str
    developer: HoldingView = Field(description="The developer's wallet: pays where no user does, and fills the pool.")
    pool: HoldingView = Field(description="What `POST /v1/funding/grant` gives away.")


class PoolView(View):
    app_id: str
    ledger_id: str
    amount_moved: Millicredits
    amount_moved_decimal: Credits
    balance_before: Millicredits = Field(description="Of the pool.")
    balance_before_decimal: Credits
    balance_after: Millicredits
    balance_after_decimal: Credits
    balance: Millicredits
    balance_decimal: Credits


@router.get("")
async def get_funding(principal: Reader, services: Here) -> FundingView:
    """What the developer's wallet of this key's app holds, and its grant pool."""
    return await _funding(services, principal, app_of(principal))


@router.post("/grant")
async def grant_from_pool(body: FundingGrant, request: Request, principal: Writer, services: Here) -> FundingGrantView:
    """Give a user free balance from the app's pool. It is spent before the user's own credits, and only in this app."""
    app_id = app_of(principal)
    asset = principal.asset
    amount = units_of_usd(body.amount, asset, param="amount")
    key = key_of(request, body, "funding.grant", about=app_id)
    customer_id = await body.customer(services, principal)
    command = Grant(
        id=services.new_id("cmd"),
        scope=Scope(principal.tenant_id, principal.mode),
        key=key,
        wallet=customer_wallet(principal.tenant_id, principal.mode, customer_id),
        asset=asset.code,
        block_id=services.new_id("blk"),
        amount=amount,
        funding=Funding.DEVELOPER_GRANT,
        operator_paid=False,  # The pool's credits bring their own answer.
        from_wallet=pool_wallet(principal.tenant_id, principal.mode, app_id),
        priority=DEVELOPER_GRANT_PRIORITY,
        source=DEVELOPER_GRANT_SOURCE,
        restriction=Restriction(apps=(app_id,)),
        metadata={"description": body.description} if body.description else {},
    )
    granted, replayed = await _move(
        services, command, asset, short="The app's grant pool", fill="POST /v1/funding/pool"
    )
    if replayed:
        mark_replayed(request)
    return FundingGrantView(
        customer_id=customer_id,
        ledger_id=granted.block_id,
        duplicate=replayed,
        **amounts(
            asset,
            amount_granted=granted.amount,
            balance_before=granted.balance_before,
            balance_after=granted.balance_after,
            balance=granted.balance_after,
        ),
    )


@router.post("/pool")
async def fund_pool(body: FundPool, request: Request, principal: Writer, services: Here) -> PoolView:
    """Move credits from the developer's wallet into the app's grant pool."""
    app_id = app_of(principal)
    asset = principal.asset
    if body.credits is not None:
        amount = units_of_millis(body.credits, asset, param="credits")
    else:
        amount = units_of_usd(body.amount or Decimal(0), asset, param="amount")
    command = Grant(
        id=services.new_id("cmd"),
        scope=Scope(principal.tenant_id, principal.mode),
        key=key_of(request, body, "funding.pool", about=app_id),
        wallet=pool_wallet(principal.tenant_id, principal.mode, app_id),
        asset=asset.code,
        block_id=services.new_id("blk"),
        amount=amount,
        funding=Funding.EXTERNAL,
        operator_paid=False,  # So do the developer's.
        from_wallet=app_wallet(principal.tenant_id, principal.mode, app_id),
        source="pool",
    )
    moved, replayed = await _move(services, command, asset, short="The developer's wallet", fill="a top-up")
    if replayed:
        mark_replayed(request)
    return PoolView(
        app_id=app_id,
        ledger_id=moved.block_id,
        **amounts(
            asset,
            amount_moved=moved.amount,
            balance_before=moved.balance_before,
            balance_after=moved.balance_after,
            balance=moved.balance_after,
        ),
    )


async def _move(services: Services, command: Grant, asset: Asset, *, short: str, fill: str) -> tuple[Granted, bool]:
    """Do *command*, and tell whether it was done before.

    Raises:
        ApiError: 402 when the wallet that gives is short.
    """
    try:
        applied = await services.ledger.execute(command)
    except (InsufficientCredits, ReceivableOutstanding) as error:
        facts = amounts(asset, needed=command.amount, available=error.available)
        raise ApiError(
            "insufficient_credits",
            f"{short} has {facts['available_decimal']} credits and this takes {facts['needed_decimal']}. "
            f"Fill it first: {fill}.",
            facts=facts,
        ) from None
    assert isinstance(applied.result, Granted)
    return applied.result, applied.replayed


async def _funding(services: Services, principal: Principal, app_id: str) -> FundingView:
    developer = app_wallet(principal.tenant_id, principal.mode, app_id)
    pool = pool_wallet(principal.tenant_id, principal.mode, app_id)
    return FundingView(
        app_id=app_id,
        developer=await _holding(services, developer, principal.asset),
        pool=await _holding(services, pool, principal.asset),
    )


async def _holding(services: Services, wallet: WalletRef, asset: Asset) -> HoldingView:
    view = await wallet_now(services.ledger, wallet, asset)
    return HoldingView(
        balance_usd=asset.to_usd_text(view.balance),
        **amounts(asset, balance=view.balance, available=view.effective_balance),
    )
