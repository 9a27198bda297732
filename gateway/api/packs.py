"""Plan packs: bundles of credits that customers buy out of their own wallets."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field

from gateway.api.access import CatalogWriter, Reader, Writer
from gateway.api.credits import BlockView, RestrictionView, block_view, wallet_now
from gateway.api.customers import Cursor, CustomerPath, Limit
from gateway.api.idempotency import key_of, mark_replayed, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.topup import RESTRICTIONS_MAX
from gateway.api.versions import etag, expected_version
from gateway.api.wire import (
    PAGE_DEFAULT,
    Body,
    Credits,
    Metadata,
    Millicredits,
    Page,
    Text,
    Time,
    View,
    Word,
    amounts,
    units_of_millis,
)
from gateway.billing.packs import PACK_KEY_LENGTH_MAX, Buyer, PackInfo, PackTerms
from gateway.clock import time_text, time_text_or_none
from gateway.database import Transactions
from gateway.identity.wallets import customer_wallet
from gateway.refusals import unaffordable
from gateway.tables import NAME_LENGTH_MAX, PACK_DURATION_S_MAX
from ledger.burndown import burn_order
from ledger.errors import InsufficientCredits, ReceivableOutstanding
from ledger.model import PRIORITY_MAX, Funding, Restriction, Scope
from ledger.outcomes import Purchased
from pricing.money import Asset

router = APIRouter(prefix="/v1", tags=["packs"], route_class=ExactRoute)

OPERATION: Final = "pack.buy"
"""The scope of a purchase's idempotency key."""

RESTRICTIONS: Final = ("apps", "metrics", "models")

_UNCHANGED_NAMES: Final = ("name", "priority", "metadata", "archived")
"""The fields of a change that go as they come."""

PRICE = "Millicredits that it costs."
CREDITS = "Millicredits that it brings."
DURATION = "How long its credits pay; null is for ever. Bought while a plan is active, they end so much after that one."
PRIORITY = "Of its credits: higher burns first. Credits of this priority or above do not pay for it."
RESTRICTED = "Its credits pay only"

PackPath = Annotated[
    str,
    Path(description="Our id (`pck_…`), or your own key of the pack.", examples=["plan_1hr"], max_length=256),
]
Names = Annotated[tuple[Word, ...], Field(max_length=RESTRICTIONS_MAX)]
Millis = Annotated[int, Field(strict=True)]
Duration = Annotated[int, Field(strict=True, ge=1, le=PACK_DURATION_S_MAX)]
Priority = Annotated[int, Field(strict=True, ge=-PRIORITY_MAX, le=PRIORITY_MAX)]
Name = Annotated[Text, Field(min_length=1, max_length=NAME_LENGTH_MAX)]


class NewPack(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "key": "plan_1hr",
                    "name": "1-Hour Plan",
                    "price": 100000,
                    "credits": 200000,
                    "duration_seconds": 3600,
                    "priority": 10,
                }
            ]
        }
    )

    key: str = Field(max_length=PACK_KEY_LENGTH_MAX, description="Your own name for it.", examples=["plan_1hr"])
    name: Name
    price: Millis = Field(ge=0, description=PRICE)
    credits: Millis = Field(ge=1, description=CREDITS)
    duration_seconds: Duration | None = Field(default=None, description=DURATION)
    priority: Priority = Field(default=10, description=PRIORITY)
    apps: Names = Field(default=(), description=f"{RESTRICTED} in these apps.")
    metrics: Names = Field(default=(), description=f"{RESTRICTED} for these metrics.")
    models: Names = Field(default=(), description=f"{RESTRICTED} for these models.")
    metadata: Metadata = Field(default={})


class PackChange(Body):
    """What is left out stays as it is. What was bought keeps the terms that it was bought with."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"price": 120000}]})

    name: Name | None = None
    price: Millis | None = Field(default=None, ge=0, description=PRICE)
    credits: Millis | None = Field(default=None, ge=1, description=CREDITS)
    duration_seconds: Duration | None = Field(default=None, description=DURATION)
    priority: Priority | None = Field(default=None, description=PRIORITY)
    apps: Names | None = Field(default=None, description=f"{RESTRICTED} in these apps.")
    metrics: Names | None = Field(default=None, description=f"{RESTRICTED} for these metrics.")
    models: Names | None = Field(default=None, description=f"{RESTRICTED} for these models.")
    metadata: Metadata | None = None
    archived: bool | None = Field(default=None, strict=True, description="An archived pack is sold no more.")


class PackView(View):
    id: str = Field(examples=["pck_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    key: str
    name: str
    price: Millicredits
    price_decimal: Credits
    credits: Millicredits
    credits_decimal: Credits
    duration_seconds: int | None
    priority: int
    restrictions: RestrictionView
    metadata: dict[str, Any]
    archived: bool
    version: int = Field(description="The answer's ETag has it, too.")
    created_at: Time


class PackPurchase(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"pack": "plan_1hr", "price": 120000, "metadata": {"companion_id": "companion_42"}}]
        }
    )

    pack: str = Field(max_length=256, description="Our id or your key of the pack.", examples=["plan_1hr"])
    price: Millis | None = Field(default=None, ge=0, description="Millicredits, where it is not the pack's price.")
    credits: Millis | None = Field(default=None, ge=1, description="Millicredits, where they are not the pack's.")
    metadata: Metadata = Field(default={})


class PurchaseView(View):
    """What was paid and what came for it."""

    customer_id: str
    pack_id: str
    block_id: str = Field(
        description="The block of its credits. Where a part of them is not covered by credits that the operator was "
        "paid for, that part is a second block with the suffix `_2`."
    )
    price: Millicredits
    price_decimal: Credits
    credits: Millicredits
    credits_decimal: Credits
    balance_before: Millicredits
    balance_before_decimal: Credits
    balance_after: Millicredits
    balance_after_decimal: Credits
    balance: Millicredits = Field(description="The same as `balance_after`.")
    balance_decimal: Credits
    created_at: Time
    expires_at: Time | None


def pack_view(pack: PackInfo, asset: Asset) -> PackView:
    return PackView(
        id=pack.id,
        key=pack.key,
        name=pack.name,
        duration_seconds=pack.duration_s,
        priority=pack.priority,
        restrictions=RestrictionView(
            apps=pack.restriction.apps, metrics=pack.restriction.metrics, models=pack.restriction.models
        ),
        metadata=pack.metadata,
        archived=pack.archived,
        version=pack.version,
        created_at=time_text(pack.created_at_us),
        **amounts(asset, price=pack.price, credits=pack.credits),
    )


@router.post("/packs", status_code=201)
async def create_pack(
    body: NewPack, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> PackView:
    """Offer a pack. Customers buy it with `POST /v1/customers/{customer}/packs`, or by auto-buy."""
    asset = principal.asset
    terms = PackTerms(
        name=body.name,
        price=units_of_millis(body.price, asset, param="price"),
        credits=units_of_millis(body.credits, asset, param="credits"),
        duration_s=body.duration_seconds,
        priority=body.priority,
        restriction=Restriction(apps=body.apps, metrics=body.metrics, models=body.models),
        metadata=body.metadata,
    )

    async def act(transactions: Transactions) -> PackView:
        packs = services.packs.within(transactions)
        return pack_view(await packs.create(principal.tenant_id, principal.mode, body.key, terms), asset)

    key = key_of(request, body, "packs.create")
    view = await once(request, response, services, principal, key=key, act=act, view=PackView)
    etag(response, view.version)
    return view


@router.get("/packs")
async def list_packs(
    principal: Reader, services: Here, cursor: Cursor = None, limit: Limit = PAGE_DEFAULT
) -> Page[PackView]:
    """All packs, newest first, archived ones among them."""
    found = await services.packs.page(principal.tenant_id, principal.mode, before=cursor, limit=limit + 1)
    more = len(found) > limit
    return Page(
        data=[pack_view(pack, principal.asset) for pack in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


@router.get("/packs/{pack}")
async def get_pack(pack: PackPath, response: Response, principal: Reader, services: Here) -> PackView:
    """One pack."""
    found = await services.packs.find(principal.tenant_id, principal.mode, pack)
    etag(response, found.version)
    return pack_view(found, principal.asset)


@router.patch("/packs/{pack}")
async def change_pack(
    pack: PackPath,
    body: PackChange,
    request: Request,
    response: Response,
    *,
    principal: CatalogWriter,
    services: Here,
) -> PackView:
    """Change a pack, with `If-Match` only if it is still as you know it. Plans that were bought stay as they are."""
    asked = {name: value for name, value in body.model_dump(exclude_unset=True).items() if value is not None}
    restricted: dict[str, tuple[str, ...]] = {name: asked.pop(name) for name in RESTRICTIONS if name in asked}
    changes = {name: value for name, value in asked.items() if name in _UNCHANGED_NAMES}
    for name in asked.keys() & {"price", "credits"}:
        changes[name] = units_of_millis(asked[name], principal.asset, param=name)
    if "duration_seconds" in body.model_fields_set:
        changes["duration_s"] = body.duration_seconds
    expected = expected_version(request)

    async def act(transactions: Transactions) -> PackView:
        changed = await services.packs.within(transactions).change(
            principal.tenant_id, principal.mode, pack, changes, restricted=restricted, expected=expected
        )
        return pack_view(changed, principal.asset)

    key = key_of(request, body, "packs.change", about=pack, change=True)
    view = await once(request, response, services, principal, key=key, act=act, view=PackView)
    etag(response, view.version)
    return view


@router.post("/packs/{pack}/archive")
async def archive_pack(
    pack: PackPath, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> PackView:
    """Sell a pack no more. Its key stays taken, and plans that were bought stay as they are. Repeatable."""

    async def act(transactions: Transactions) -> PackView:
        packs = services.packs.within(transactions)
        archived = await packs.change(principal.tenant_id, principal.mode, pack, {"archived": True})
        return pack_view(archived, principal.asset)

    key = key_of(request, None, "packs.archive", about=pack)
    view = await once(request, response, services, principal, key=key, act=act, view=PackView)
    etag(response, view.version)
    return view


@router.post("/customers/{customer:path}/packs")
async def buy_pack(
    customer: CustomerPath, body: PackPurchase, request: Request, principal: Writer, services: Here
) -> PurchaseView:
    """Buy a pack out of the customer's own credits: the price goes and the plan comes at once, or neither.

    Plans do not pay for plans. While one is active, the new one ends so much later. Not affordable: 402, and nothing
    has changed.
    """
    asset = principal.asset
    price = None if body.price is None else units_of_millis(body.price, asset, param="price")
    credits = None if body.credits is None else units_of_millis(body.credits, asset, param="credits")
    pack = await services.packs.find(principal.tenant_id, principal.mode, body.pack)
    customer_id = await services.customers.named(principal.tenant_id, principal.mode, customer, param="customer")
    key = key_of(request, body, OPERATION, about=customer_id)
    buyer = Buyer(Scope(principal.tenant_id, principal.mode), customer_id, asset.code, principal.app_id)
    try:
        applied = await services.packs.buy(
            buyer, pack.at(price=price, credits=credits), key=key, cause="bought", metadata=body.metadata
        )
    except (InsufficientCredits, ReceivableOutstanding) as error:
        raise unaffordable(error, asset, top_up_url=services.top_up_url(buyer.scope, customer_id)) from None
    if applied.replayed:
        mark_replayed(request)
    bought = applied.result
    assert isinstance(bought, Purchased)
    return PurchaseView(
        customer_id=customer_id,
        pack_id=pack.id,
        block_id=bought.block_id,
        created_at=time_text(bought.at_us),
        expires_at=time_text_or_none(bought.expires_at_us),
        **amounts(
            asset,
            price=bought.price,
            credits=bought.amount,
            balance_before=bought.balance_before,
            balance_after=bought.balance_after,
            balance=bought.balance_after,
        ),
    )


@router.get("/customers/{customer:path}/packs")
async def list_plans(customer: CustomerPath, principal: Reader, services: Here) -> Page[BlockView]:
    """The blocks of the customer's plans that still pay, in the order in which they burn."""
    customer_id = (await services.customers.find(principal.tenant_id, principal.mode, customer)).id
    wallet = await wallet_now(
        services.ledger, customer_wallet(principal.tenant_id, principal.mode, customer_id), principal.asset
    )
    now_us = services.now_us()
    plans = [block for block in wallet.blocks if block.funding is Funding.PLAN and block.pays_at(now_us)]
    views = [block_view(block, customer_id, principal.asset) for block in sorted(plans, key=burn_order)]
    return Page(data=views, has_more=False, next_cursor=None)
