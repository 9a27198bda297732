"""The customer's paths with your own id of them spelt out: for clients that never use ours."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from gateway.api.access import Reader, Writer
from gateway.api.credits import CreditsView, WhichCredits, get_credits
from gateway.api.customers import CustomerChanges, CustomerView, change_customer, get_customer
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.errors import not_found
from gateway.identity.customer_rows import CUSTOMER_PREFIX
from gateway.tables import EXTERNAL_ID_LENGTH_MAX

router = APIRouter(prefix="/v1/customer-by-external-id", tags=["customers"], route_class=ExactRoute)


def external_id(
    external_id: Annotated[
        str,
        Path(
            description="Your own id of the customer.",
            examples=["user_12345"],
            min_length=1,
            max_length=EXTERNAL_ID_LENGTH_MAX,
        ),
    ],
) -> str:
    """The name in the path.

    Raises:
        ApiError: 404 for an id of ours, which is nobody's external id.
    """
    if external_id.startswith(CUSTOMER_PREFIX):
        raise not_found(f"customer with the external id {external_id}")
    return external_id


ExternalId = Annotated[str, Depends(external_id)]


@router.get("/{external_id:path}/credits")
async def get_credits_by_external_id(
    external_id: ExternalId, principal: Reader, services: Here, which: Annotated[WhichCredits, Query()]
) -> CreditsView:
    """The same as `GET /v1/customers/{customer}/credits`."""
    return await get_credits(external_id, principal, services, which)


@router.get("/{external_id:path}")
async def get_customer_by_external_id(
    external_id: ExternalId, response: Response, principal: Reader, services: Here
) -> CustomerView:
    """The same as `GET /v1/customers/{customer}`."""
    return await get_customer(external_id, response, principal, services)


@router.patch("/{external_id:path}")
async def change_customer_by_external_id(
    *,
    external_id: ExternalId,
    body: CustomerChanges,
    request: Request,
    response: Response,
    principal: Writer,
    services: Here,
) -> CustomerView:
    """The same as `PATCH /v1/customers/{customer}`."""
    return await change_customer(
        customer=external_id, body=body, request=request, response=response, principal=principal, services=services
    )
