"""Customers: the tenant's users, by our id or by the tenant's own name for them."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway.api.access import Reader, Writer
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.versions import etag, expected_version
from gateway.api.wire import (
    CURSOR_LENGTH_MAX,
    PAGE_DEFAULT,
    PAGE_MAX,
    Body,
    Metadata,
    Page,
    Thresholds,
    Time,
    View,
    Word,
    check_thresholds,
    units_of_millis,
)
from gateway.clock import time_text
from gateway.database import Transactions
from gateway.identity.customer_rows import CustomerChange, CustomerInfo
from gateway.identity.customers import check_external_id
from gateway.identity.principals import Principal
from gateway.identity.thresholds import LOW_BALANCE
from gateway.tables import EXTERNAL_ID_LENGTH_MAX
from ledger.model import Scope
from pricing.money import Asset

router = APIRouter(prefix="/v1", tags=["customers"], route_class=ExactRoute)

SYNONYMS = ("customer_id", "end_user_id", "external_user_id")

CustomerPath = Annotated[
    str,
    Path(
        description="Our id (`cus_…`), or your own id of the customer.",
        examples=["user_12345"],
        min_length=1,
        max_length=EXTERNAL_ID_LENGTH_MAX,
    ),
]
CustomerName = Annotated[str, Field(max_length=EXTERNAL_ID_LENGTH_MAX)]
Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]
Cursor = Annotated[str | None, Query(max_length=CURSOR_LENGTH_MAX, description="The `next_cursor` of the page before.")]


class NamesCustomer(Body):
    """One of the three names, whichever you are used to: our id, or your own id of the customer."""

    customer_id: CustomerName | None = Field(default=None, examples=["user_12345"])
    end_user_id: CustomerName | None = Field(default=None, description="The same as `customer_id`.")
    external_user_id: CustomerName | None = Field(default=None, description="The same as `customer_id`.")

    @model_validator(mode="after")
    def _one_name(self) -> "NamesCustomer":
        if sum(getattr(self, name) is not None for name in SYNONYMS) != 1:
            raise ValueError("name the customer once: customer_id, end_user_id or external_user_id")
        return self

    @property
    def customer_named(self) -> str:
        """The customer, as they are named."""
        return self.customer_id or self.end_user_id or self.external_user_id or ""

    async def customer(self, services: Services, principal: Principal) -> str:
        """Our id of the customer, who is created if you name them for the first time.

        Raises:
            ApiError: 404 for an id of ours that is not there, 400 for a name that is none.
        """
        param = next(name for name in SYNONYMS if getattr(self, name) is not None)
        reference: str = getattr(self, param)
        return await services.customers.named(principal.tenant_id, principal.mode, reference, param=param)


class CustomerSettings(BaseModel):
    """What a customer has agreed to, and what is told of them. What is left out stays as it is; null goes back to what
    the pack, or the tenant, has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    auto_buy_enabled: bool = Field(
        default=False, strict=True, description="Buy the pack when credits run short, or a plan has expired."
    )
    auto_buy_pack: Word | None = Field(default=None, description="The pack's id or key.", examples=["plan_1hr"])
    auto_buy_price: int | None = Field(
        default=None, strict=True, ge=0, description="Millicredits, instead of the pack's price."
    )
    auto_buy_credits: int | None = Field(
        default=None, strict=True, ge=1, description="Millicredits, instead of the pack's credits."
    )

    low_balance_thresholds: Thresholds | None = Field(
        default=None,
        description="Millicredits below which `credit.low` tells, instead of the tenant's. An empty list: none.",
    )

    def named(self, asset: Asset) -> dict[str, Any]:
        """Those that were sent.

        Raises:
            ApiError: 400 for an amount that the asset cannot hold.
        """
        for name in ("auto_buy_price", "auto_buy_credits"):
            amount = getattr(self, name)
            if amount is not None:
                units_of_millis(amount, asset, param=f"settings.{name}")
        if self.low_balance_thresholds is not None:
            check_thresholds(self.low_balance_thresholds, asset, param=f"settings.{LOW_BALANCE}")
        return self.model_dump(exclude_unset=True, mode="json")


class NewCustomer(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"external_id": "user_12345"}]})

    external_id: CustomerName = Field(description="Your own id of the user.", examples=["user_12345"])
    metadata: Metadata | None = None
    settings: CustomerSettings | None = None


class CustomerChanges(Body):
    """What is left out, or null, stays as it is. `metadata` is replaced as a whole; of `settings`, what you name."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"settings": {"auto_buy_enabled": True, "auto_buy_pack": "plan_1hr"}}]}
    )

    external_id: CustomerName | None = Field(default=None, description="A new name; nobody else may have it.")
    metadata: Metadata | None = None
    settings: CustomerSettings | None = None


class CustomerView(View):
    id: str = Field(examples=["cus_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    external_id: str
    livemode: bool = Field(description="Live data, or the sandbox's.")
    metadata: dict[str, Any]
    settings: CustomerSettings
    version: int = Field(description="Rises with every change; the ETag.")
    created_at: Time


def customer_view(customer: CustomerInfo, *, mode: str) -> CustomerView:
    return CustomerView(
        id=customer.id,
        external_id=customer.external_id,
        livemode=mode == "live",
        metadata=customer.metadata,
        settings=CustomerSettings(**customer.settings),
        version=customer.version,
        created_at=time_text(customer.created_at_us),
    )


@router.post("/customers", status_code=201, responses={200: {"model": CustomerView, "description": "Known already"}})
async def create_customer(
    body: NewCustomer, request: Request, response: Response, principal: Writer, services: Here
) -> CustomerView:
    """Create a customer, or find the one with this `external_id`.

    Of one who is known `metadata` is replaced and `settings` are changed, where you send them. A new one gets what the
    tenant's `default_grant` says.
    """
    check_external_id(body.external_id, param="external_id")
    settings = None if body.settings is None else body.settings.named(principal.asset)
    change = CustomerChange(metadata=body.metadata, settings=settings)

    async def act(transactions: Transactions) -> CustomerView:
        customer, created = await services.customers.put(
            principal.tenant_id, principal.mode, body.external_id, change, transactions=transactions
        )
        response.status_code = 201 if created else 200
        return customer_view(customer, mode=principal.mode)

    key = key_of(request, body, "customers.create")
    view = await once(request, response, services, principal, key=key, act=act, view=CustomerView)
    # The ledger is not asked within the transaction. Whoever comes first after us would do it too.
    await services.customers.named(principal.tenant_id, principal.mode, view.id)
    if body.settings is not None:
        services.alerts.forget(Scope(principal.tenant_id, principal.mode), view.id)
    etag(response, view.version)
    return view


@router.get("/customers")
async def list_customers(
    principal: Reader,
    services: Here,
    cursor: Cursor = None,
    limit: Limit = PAGE_DEFAULT,
    external_id: Annotated[str | None, Query(max_length=EXTERNAL_ID_LENGTH_MAX)] = None,
) -> Page[CustomerView]:
    """All customers, newest first, or the one with *external_id*."""
    found = await services.customers.page(
        principal.tenant_id, principal.mode, before=cursor, limit=limit + 1, external_id=external_id
    )
    more = len(found) > limit
    return Page(
        data=[customer_view(customer, mode=principal.mode) for customer in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


@router.get("/customers/{customer:path}")
async def get_customer(customer: CustomerPath, response: Response, principal: Reader, services: Here) -> CustomerView:
    """One customer."""
    found = await services.customers.find(principal.tenant_id, principal.mode, customer)
    etag(response, found.version)
    return customer_view(found, mode=principal.mode)


@router.patch("/customers/{customer:path}")
async def change_customer(
    *,
    customer: CustomerPath,
    body: CustomerChanges,
    request: Request,
    response: Response,
    principal: Writer,
    services: Here,
) -> CustomerView:
    """Change a customer; with `If-Match`, only the version that you have read."""
    expected = expected_version(request)
    change = CustomerChange(
        external_id=body.external_id,
        metadata=body.metadata,
        settings=None if body.settings is None else body.settings.named(principal.asset),
    )

    async def act(transactions: Transactions) -> CustomerView:
        changed = await services.customers.change(
            principal.tenant_id, principal.mode, customer, change, version=expected, transactions=transactions
        )
        return customer_view(changed, mode=principal.mode)

    key = key_of(request, body, "customers.change", about=customer, change=True)
    view = await once(request, response, services, principal, key=key, act=act, view=CustomerView)
    if body.external_id is not None:
        services.changes.announce()
    if body.settings is not None:
        services.alerts.forget(Scope(principal.tenant_id, principal.mode), view.id)
    etag(response, view.version)
    return view


@router.delete("/customers/{customer:path}", status_code=204)
async def erase_customer(customer: CustomerPath, principal: Writer, services: Here) -> None:
    """Erase what is known of a person: external id, metadata, settings, metadata of their blocks, usage, reservations
    and events, the names of their budgets, which end, and the answers that are kept to be repeated.

    The journal keeps its numbers under an id that names nobody. What is left of their credits is frozen. Whoever comes
    with the same external id afterwards is a new customer. Repeat it until it answers: 204 once all is gone, 404 after.
    """
    await services.erasure.erase(principal.tenant_id, principal.mode, customer)
