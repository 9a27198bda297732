"""Customers: the tenant's users, by our id or by the tenant's own name for them."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field, model_validator

from gateway.api.access import Reader, Writer
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.wire import (
    CURSOR_LENGTH_MAX,
    PAGE_DEFAULT,
    PAGE_MAX,
    Body,
    Metadata,
    Page,
    Time,
    View,
    time_text,
)
from gateway.database import Transactions
from gateway.identity.customers import CustomerInfo, check_external_id
from gateway.identity.principals import Principal
from gateway.tables import EXTERNAL_ID_LENGTH_MAX

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


class NewCustomer(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"external_id": "user_12345"}]})

    external_id: CustomerName = Field(description="Your own id of the user.", examples=["user_12345"])
    metadata: Metadata | None = None


class CustomerView(View):
    id: str = Field(examples=["cus_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    external_id: str
    livemode: bool = Field(description="Live data, or the sandbox's.")
    metadata: dict[str, Any]
    created_at: Time


def customer_view(customer: CustomerInfo, principal: Principal) -> CustomerView:
    return CustomerView(
        id=customer.id,
        external_id=customer.external_id,
        livemode=principal.mode == "live",
        metadata=customer.metadata,
        created_at=time_text(customer.created_at_us),
    )


@router.post("/customers", status_code=201, responses={200: {"model": CustomerView, "description": "Known already"}})
async def create_customer(
    body: NewCustomer, request: Request, response: Response, principal: Writer, services: Here
) -> CustomerView:
    """Create a customer, or find the one with this `external_id`; `metadata` replaces what was there."""
    check_external_id(body.external_id, param="external_id")

    async def act(transactions: Transactions) -> CustomerView:
        customer, created = await services.customers.put(
            principal.tenant_id, principal.mode, body.external_id, body.metadata, transactions=transactions
        )
        response.status_code = 201 if created else 200
        return customer_view(customer, principal)

    key = key_of(request, body, "customers.create")
    return await once(request, response, services, principal, key=key, act=act, view=CustomerView)


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
        data=[customer_view(customer, principal) for customer in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


@router.get("/customers/{customer:path}")
async def get_customer(customer: CustomerPath, principal: Reader, services: Here) -> CustomerView:
    """One customer."""
    return customer_view(await services.customers.find(principal.tenant_id, principal.mode, customer), principal)
