"""Revocation: credits of one block taken back."""

from typing import Annotated, Final

from fastapi import APIRouter, Path, Request
from pydantic import ConfigDict, Field

from gateway.api.access import Writer
from gateway.api.customers import CustomerPath
from gateway.api.idempotency import key_of, mark_replayed
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.wire import Body, Credits, Millicredits, Text, View, amounts, units_of_millis
from gateway.errors import invalid_request, not_found
from gateway.identity.wallets import customer_wallet
from ledger.commands import Revoke
from ledger.errors import InvalidAmount, NotFound
from ledger.model import Scope
from ledger.outcomes import Revoked

router = APIRouter(prefix="/v1", tags=["credits"], route_class=ExactRoute)

OPERATION: Final = "credits.revoke"


BlockPath = Annotated[str, Path(max_length=64, examples=["blk_01k7m3v9c2q8x5t4n6r1b0w3ye"])]


class Revocation(Body):
    """Without an amount, all that was granted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"reason": "granted twice"}, {"credits": 50000, "clawback": True}]}
    )

    credits: int | None = Field(default=None, strict=True, ge=1, description="Millicredits: 1000 are one credit.")
    clawback: bool = Field(
        default=False,
        strict=True,
        description="What is spent or reserved already is owed: the next grant repays it. Default: only what is free.",
    )
    reason: Text | None = Field(default=None, description="Stands in the statement and in the event.")


class RevocationView(View):
    customer_id: str
    block_id: str
    revoked_amount: Millicredits = Field(description="Was unspent, and is gone.")
    revoked_amount_decimal: Credits
    owed_amount: Millicredits = Field(description="Was spent, and joined `receivable`.")
    owed_amount_decimal: Credits
    receivable: Millicredits = Field(description="All that the wallet owes.")
    receivable_decimal: Credits
    balance: Millicredits
    balance_decimal: Credits


@router.post("/customers/{customer:path}/credits/{block_id}/revoke")
async def revoke_credits(
    customer: CustomerPath,
    block_id: BlockPath,
    request: Request,
    principal: Writer,
    services: Here,
    *,
    body: Revocation | None = None,
) -> RevocationView:
    """Take credits of one block back: what is free of them, or with `clawback` what was granted, spent or not.

    Never more than was granted and has not lapsed or been taken back before. What came out of a grant pool goes back
    there, and is taken back unspent only.
    """
    asked = body or Revocation()
    amount = None if asked.credits is None else units_of_millis(asked.credits, principal.asset, param="credits")
    customer_id = (await services.customers.find(principal.tenant_id, principal.mode, customer)).id
    command = Revoke(
        id=services.new_id("cmd"),
        scope=Scope(principal.tenant_id, principal.mode),
        key=key_of(request, asked, OPERATION, about=f"{customer_id} {block_id}"),
        wallet=customer_wallet(principal.tenant_id, principal.mode, customer_id),
        block_id=block_id,
        amount=amount,
        clawback=asked.clawback,
        reference=asked.reason,
    )
    try:
        applied = await services.ledger.execute(command)
    except NotFound:
        raise not_found(f"block {block_id} of this customer") from None
    except InvalidAmount:
        raise invalid_request("credits is more than was granted.", param="credits") from None
    if applied.replayed:
        mark_replayed(request)
    revoked = applied.result
    assert isinstance(revoked, Revoked)
    return RevocationView(
        customer_id=customer_id,
        block_id=block_id,
        **amounts(
            principal.asset,
            revoked_amount=revoked.amount,
            owed_amount=revoked.owed,
            receivable=revoked.receivable,
            balance=revoked.balance,
        ),
    )
