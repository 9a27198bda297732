"""What a customer has: the balance, the blocks that it is made of, and the statement."""

from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from gateway.api.access import Reader
from gateway.api.customers import Cursor, CustomerPath, Limit
from gateway.api.services import Here
from gateway.api.wire import PAGE_DEFAULT, Credits, Millicredits, Page, Time, View, amounts
from gateway.clock import time_text, time_text_or_none
from gateway.errors import invalid_request
from gateway.identity.wallets import customer_wallet
from ledger.burndown import burn_order
from ledger.ledger import Ledger, WalletView, cursor_after
from ledger.model import Block, Tags, Wallet, WalletRef
from ledger.store.protocol import PAGE_MAX, Transaction
from pricing.money import Asset

router = APIRouter(prefix="/v1", tags=["credits"])

KINDS: Final = {
    "grant": "grant",
    "top_up": "topup",
    "reverse": "reversal",
    "purchase": "purchase",
    "commit": "charge",
    "debit": "charge",
    "lapse": "charge",
    "revoke": "revocation",
    "expire": "expiry",
}
"""What a line of a statement is called, by the command that made it."""


class RestrictionView(View):
    """Where a block may pay; an empty list allows everything."""

    apps: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class BlockView(View):
    """Credits that came in together."""

    id: str = Field(examples=["blk_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    customer_id: str
    granted_amount: Millicredits
    granted_amount_decimal: Credits
    remaining_amount: Millicredits
    remaining_amount_decimal: Credits
    reserved_amount: Millicredits
    reserved_amount_decimal: Credits
    consumed_amount: Millicredits
    consumed_amount_decimal: Credits
    priority: int = Field(description="Higher burns first.")
    source: str = Field(examples=["wallet_recharge"])
    funding: str = Field(description="What stands behind it.", examples=["external"])
    created_at: Time
    effective_at: Time
    expires_at: Time | None
    frozen: bool
    restrictions: RestrictionView
    metadata: dict[str, Any]


class CreditsView(View):
    """`balance` is what has not expired, reserved or not, less `receivable`; `effective_balance` is what this app (and
    the metric and model that you ask for) could reserve now."""

    customer_id: str
    balance: Millicredits
    balance_decimal: Credits
    effective_balance: Millicredits
    effective_balance_decimal: Credits
    reserved: Millicredits
    reserved_decimal: Credits
    receivable: Millicredits
    receivable_decimal: Credits
    blocks: list[BlockView] | None = Field(default=None, description="In the order in which they burn.")


class PartView(View):
    block_id: str | None
    amount: Millicredits
    amount_decimal: Credits


class TransactionView(View):
    """One line of the statement: negative amounts left the wallet."""

    id: str = Field(examples=["txn_1042"])
    type: str = Field(examples=["charge"])
    amount: Millicredits
    amount_decimal: Credits
    reference: str | None = Field(description="The reservation or payment that it belongs to.")
    request_id: str | None = Field(description="The receipt: `GET /v1/requests/{request_id}`.")
    metric: str | None = Field(description="What was used.", examples=["chat_message"])
    action: str | None
    model: str | None
    parts: list[PartView] = Field(description="The blocks concerned.")
    created_at: Time


class WhichCredits(BaseModel):
    """What a balance is asked for."""

    include_blocks: bool = False
    metric: str | None = Field(default=None, max_length=256, description="What `effective_balance` is for.")
    model: str | None = Field(default=None, max_length=256, description="The same, for a model.")


@router.get("/customers/{customer:path}/credits")
async def get_credits(
    customer: CustomerPath,
    principal: Reader,
    services: Here,
    which: Annotated[WhichCredits, Query()],
) -> CreditsView:
    """A customer's balance, and with `include_blocks=true` the blocks that have something left."""
    customer_id = (await services.customers.find(principal.tenant_id, principal.mode, customer)).id
    ref = customer_wallet(principal.tenant_id, principal.mode, customer_id)
    tags = Tags(app=principal.app_id, metric=which.metric, model=which.model)
    wallet = await wallet_now(services.ledger, ref, principal.asset, tags, unfunded=principal.unfunded)
    blocks = None
    if which.include_blocks:
        unexpired = [block for block in wallet.blocks if not _expired(block, services.now_us())]
        blocks = [block_view(block, customer_id, principal.asset) for block in sorted(unexpired, key=burn_order)]
    return CreditsView(
        customer_id=customer_id,
        blocks=blocks,
        **amounts(
            principal.asset,
            balance=wallet.balance,
            effective_balance=wallet.effective_balance,
            reserved=wallet.reserved,
            receivable=wallet.receivable,
        ),
    )


@router.get("/customers/{customer:path}/transactions")
async def list_transactions(
    customer: CustomerPath, principal: Reader, services: Here, cursor: Cursor = None, limit: Limit = PAGE_DEFAULT
) -> Page[TransactionView]:
    """The journal of a customer's wallet as a statement, newest first: one line for everything that happened."""
    customer_id = (await services.customers.find(principal.tenant_id, principal.mode, customer)).id
    wallet = customer_wallet(principal.tenant_id, principal.mode, customer_id)
    return await statement_of(services.ledger, wallet, principal.asset, cursor=cursor, limit=limit)


async def statement_of(
    ledger: Ledger, wallet: WalletRef, asset: Asset, *, cursor: str | None, limit: int
) -> Page[TransactionView]:
    """A page of a wallet's statement, newest first.

    Raises:
        ApiError: 400 for a cursor that is none of ours.
    """
    try:
        page = await ledger.transactions(wallet, cursor, limit=PAGE_MAX)
    except ValueError:
        raise invalid_request("cursor is not a next_cursor of this list.", param="cursor") from None
    lines = [list(entries) for _, entries in groupby(page.transactions, key=lambda entry: entry.seq)]
    if page.cursor is not None and len(lines) > 1:
        lines.pop()  # The rest of it stands on the next page.
    more = page.cursor is not None or len(lines) > limit
    lines = lines[:limit]
    return Page(
        data=[transaction_view(line, asset) for line in lines],
        has_more=more,
        next_cursor=cursor_after(lines[-1][-1]) if more else None,
    )


async def wallet_now(
    ledger: Ledger, ref: WalletRef, asset: Asset, tags: Tags | None = None, *, unfunded: WalletRef | None = None
) -> WalletView:
    """The wallet now; an empty one where nothing was ever granted."""
    view = await ledger.wallet_view(ref, tags, unfunded=unfunded)
    if view is not None:
        return view
    nothing = Wallet(ref=ref, asset=asset.code)
    return WalletView(wallet=nothing, blocks=(), balance=0, effective_balance=0, reserved=0, receivable=0)


def _expired(block: Block, now_us: int) -> bool:
    return block.expires_at_us is not None and block.expires_at_us <= now_us


def block_view(block: Block, customer_id: str, asset: Asset) -> BlockView:
    return BlockView(
        id=block.id,
        customer_id=customer_id,
        priority=block.priority,
        source=block.source,
        funding=block.funding.value,
        created_at=time_text(block.created_at_us),
        effective_at=time_text(block.effective_at_us),
        expires_at=time_text_or_none(block.expires_at_us),
        frozen=block.frozen or block.reversal.frozen,
        restrictions=RestrictionView(
            apps=block.restriction.apps, metrics=block.restriction.metrics, models=block.restriction.models
        ),
        metadata=block.metadata,
        **amounts(
            asset,
            granted_amount=block.granted,
            remaining_amount=block.remaining,
            reserved_amount=block.reserved,
            consumed_amount=block.consumed,
        ),
    )


def transaction_view(entries: list[Transaction], asset: Asset) -> TransactionView:
    """The entries of one command as one line: who gets which part of a charge is not the customer's concern."""
    first = entries[0]
    blocks = {entry.block: 0 for entry in entries}
    for entry in entries:
        blocks[entry.block] += entry.amount
    return TransactionView(
        id=f"txn_{first.seq}",
        type=KINDS.get(first.kind, first.kind),
        reference=next((entry.reference for entry in entries if entry.reference), None),
        request_id=first.request_id,
        metric=first.metric,
        action=first.action,
        model=first.model,
        parts=[PartView(block_id=block, **amounts(asset, amount=amount)) for block, amount in blocks.items()],
        created_at=time_text(first.at_us),
        **amounts(asset, amount=_sum(entries)),
    )


def _sum(entries: Iterable[Transaction]) -> int:
    return sum(entry.amount for entry in entries)
