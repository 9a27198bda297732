"""Grants for payments made elsewhere: the tenant was paid, so the customer gets credits."""

from typing import Any, Final, Self

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator

from gateway.api.access import Writer
from gateway.api.credits import RestrictionView
from gateway.api.customers import NamesCustomer
from gateway.api.idempotency import key_of, mark_replayed
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.wire import (
    Credits,
    FutureTime,
    Metadata,
    Millicredits,
    Text,
    Time,
    View,
    Word,
    amounts,
    time_us,
    units_of_millis,
)
from gateway.clock import time_text
from gateway.errors import ApiError, invalid_request
from gateway.identity.wallets import customer_wallet
from ledger.commands import Grant
from ledger.errors import InvalidAmount
from ledger.model import PRIORITY_MAX, Funding, Restriction, Scope
from ledger.outcomes import Granted

router = APIRouter(prefix="/v1", tags=["credits"], route_class=ExactRoute)

OPERATION: Final = "topup.grant"
RESTRICTIONS_MAX: Final = 100
SOURCE_DEFAULT: Final = "topup"


class TopupGrant(NamesCustomer):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "customer_id": "user_12345",
                    "credits": 500000,
                    "metadata": {"source": "wallet_recharge", "payment_id": "pay_abc123", "amount_paid": "499"},
                },
                {
                    "customer_id": "user_12345",
                    "credits": 200000,
                    "expires_at": "2036-04-13T11:00:00Z",
                    "metadata": {"source": "plan_1hr", "priority": 10},
                },
                {
                    "customer_id": "user_12345",
                    "credits": 50000,
                    "source": "monthly_free",
                    "accumulation_cap": 100000,
                },
            ]
        }
    )

    credits: int = Field(strict=True, ge=1, description="Millicredits: 1000 are one credit.")
    expires_at: FutureTime | None = Field(default=None, description="From then on it pays no more. Default: never.")
    priority: int | None = Field(
        default=None,
        strict=True,
        ge=-PRIORITY_MAX,
        le=PRIORITY_MAX,
        description="Higher burns first. Default: `metadata.priority`, else 0.",
    )
    source: Text | None = Field(default=None, description="Default: `metadata.source`, else `topup`.")
    accumulation_cap: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        description=(
            "Millicredits that the wallet may hold of this `source` and funding, this grant included: what is free of "
            "the oldest lapses at once. For a recurring grant that carries over what was unused up to a cap."
        ),
    )
    metadata: Metadata = Field(default={})
    apps: tuple[Word, ...] = Field(default=(), max_length=RESTRICTIONS_MAX, description="Pays only in these apps.")
    metrics: tuple[Word, ...] = Field(default=(), max_length=RESTRICTIONS_MAX, description="Pays only these metrics.")
    models: tuple[Word, ...] = Field(default=(), max_length=RESTRICTIONS_MAX, description="Pays only these models.")

    @model_validator(mode="after")
    def _within_its_cap(self) -> Self:
        if self.accumulation_cap is not None and self.credits > self.accumulation_cap:
            raise ValueError("credits must not be more than accumulation_cap")
        return self

    def burns_at(self) -> int:
        """The priority, which older clients send inside the metadata.

        Raises:
            ApiError: 400 for a priority in the metadata that is out of range.
        """
        if self.priority is not None:
            return self.priority
        named = self.metadata.get("priority")
        if not isinstance(named, int) or isinstance(named, bool):
            return 0
        if not -PRIORITY_MAX <= named <= PRIORITY_MAX:
            raise invalid_request(
                f"metadata.priority must lie between -{PRIORITY_MAX} and {PRIORITY_MAX}.", param="metadata.priority"
            )
        return named

    def comes_from(self) -> str:
        named = self.metadata.get("source")
        return self.source or (named[:256] if isinstance(named, str) and named else SOURCE_DEFAULT)


class GrantedBlockView(View):
    """The new block as it was when it was opened."""

    id: str = Field(examples=["blk_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    customer_id: str
    granted_amount: Millicredits
    granted_amount_decimal: Credits
    remaining_amount: Millicredits = Field(description="Less than granted where it repaid what the wallet owed.")
    remaining_amount_decimal: Credits
    priority: int
    source: str
    funding: str
    created_at: Time
    expires_at: Time | None
    restrictions: RestrictionView
    metadata: dict[str, Any]


class GrantView(View):
    customer_id: str
    ledger_id: str = Field(description="The block's id.")
    amount_granted: Millicredits
    amount_granted_decimal: Credits
    lapsed_amount: Millicredits = Field(description="What `accumulation_cap` took of older blocks.")
    lapsed_amount_decimal: Credits
    balance_before: Millicredits
    balance_before_decimal: Credits
    balance_after: Millicredits
    balance_after_decimal: Credits
    balance: Millicredits = Field(description="The same as `balance_after`.")
    balance_decimal: Credits
    block: GrantedBlockView


@router.post("/topup/grant")
async def grant_topup(body: TopupGrant, request: Request, principal: Writer, services: Here) -> GrantView:
    """Give a customer credits that were paid for elsewhere. The customer is created on first use.

    Send an idempotency key that derives from the payment: however often it is repeated, there is one block.
    """
    asset = principal.asset
    amount = units_of_millis(body.credits, asset, param="credits")
    priority, source, cap = body.burns_at(), body.comes_from(), body.accumulation_cap
    key = key_of(request, body, OPERATION)
    customer_id = await body.customer(services, principal)
    command = Grant(
        id=services.new_id("cmd"),
        scope=Scope(principal.tenant_id, principal.mode),
        key=key,
        wallet=customer_wallet(principal.tenant_id, principal.mode, customer_id),
        asset=asset.code,
        block_id=services.new_id("blk"),
        amount=amount,
        funding=Funding.EXTERNAL,
        operator_paid=False,
        priority=priority,
        expires_at_us=None if body.expires_at is None else time_us(body.expires_at),
        source=source,
        restriction=Restriction(apps=body.apps, metrics=body.metrics, models=body.models),
        metadata=body.metadata,
        accumulation_cap=None if cap is None else units_of_millis(cap, asset, param="accumulation_cap"),
    )
    try:
        applied = await services.ledger.execute(command)
    except InvalidAmount:
        raise _not_grantable(body) from None
    if applied.replayed:
        mark_replayed(request)
    granted = applied.result
    assert isinstance(granted, Granted)
    return GrantView(
        customer_id=customer_id,
        ledger_id=granted.block_id,
        block=GrantedBlockView(
            id=granted.block_id,
            customer_id=customer_id,
            priority=priority,
            source=source,
            funding=Funding.EXTERNAL.value,
            created_at=time_text(granted.at_us),
            expires_at=None if body.expires_at is None else time_text(time_us(body.expires_at)),
            restrictions=RestrictionView(apps=body.apps, metrics=body.metrics, models=body.models),
            metadata=body.metadata,
            **amounts(asset, granted_amount=granted.amount, remaining_amount=granted.amount - granted.repaid),
        ),
        **amounts(
            asset,
            amount_granted=granted.amount,
            lapsed_amount=granted.lapsed,
            balance_before=granted.balance_before,
            balance_after=granted.balance_after,
            balance=granted.balance_after,
        ),
    )


def _not_grantable(body: TopupGrant) -> ApiError:
    # Only the ledger can tell: a repeated grant is answered as it was, even after its block has expired.
    if body.expires_at is not None:
        return invalid_request("expires_at must lie in the future.", param="expires_at")
    return invalid_request("credits is not an amount that can be granted.", param="credits")
