"""Webhook endpoints: where you are told of what happens to your customers' credits."""

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import AfterValidator, ConfigDict, Field

from gateway.api.access import CatalogWriter, Reader
from gateway.api.customers import Cursor, Limit
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.versions import etag, expected_version
from gateway.api.wire import PAGE_DEFAULT, Body, Page, Text, Time, View
from gateway.clock import time_text, time_text_or_none
from gateway.database import Transactions
from gateway.errors import invalid_request
from gateway.events.endpoints import Endpoint
from gateway.events.event import ALL_TYPES, EVENT_TYPES
from gateway.events.log import DeliveryInfo
from gateway.events.signing import ROTATION_S_MAX
from gateway.events.target import URL_LENGTH_MAX, TargetRefused
from gateway.events.webhooks import Webhooks
from gateway.identity.principals import Principal
from ledger.model import Scope

router = APIRouter(prefix="/v1/webhook-endpoints", tags=["webhooks"], route_class=ExactRoute)

ROTATION_S: Final = 24 * 3600


def _known(types: tuple[str, ...]) -> tuple[str, ...]:
    for each in types:
        if each != ALL_TYPES and each not in EVENT_TYPES:
            raise ValueError(f"there is no event type {each[:64]!r}; there are {', '.join(sorted(EVENT_TYPES))}, and *")
    return tuple(dict.fromkeys(types))


EventTypes = Annotated[
    tuple[Annotated[str, Field(max_length=64)], ...],
    AfterValidator(_known),
    Field(
        min_length=1,
        max_length=len(EVENT_TYPES) + 1,
        description="What it is told of; `*` is everything.",
        examples=[["credit.expired", "credit.granted"]],
    ),
]
Url = Annotated[str, Field(min_length=1, max_length=URL_LENGTH_MAX, examples=["https://example.com/farebox"])]
EndpointPath = Annotated[str, Path(max_length=64, examples=["whk_01k7m3v9c2q8x5t4n6r1b0w3ye"])]


class NewEndpoint(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"url": "https://example.com/farebox", "event_types": ["credit.expired"]}]}
    )

    url: Url
    event_types: EventTypes = (ALL_TYPES,)
    description: Text = ""


class EndpointChange(Body):
    """What is left out, or null, stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "enabled"}]})

    url: Url | None = None
    event_types: EventTypes | None = None
    description: Text | None = None
    status: Literal["enabled", "disabled"] | None = Field(
        default=None, description="What happens while it is disabled is not delivered later by itself."
    )


class Rotation(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"expire_current_after_seconds": 86400}]})

    expire_current_after_seconds: int = Field(
        default=ROTATION_S,
        strict=True,
        ge=0,
        le=ROTATION_S_MAX,
        description="So long each delivery is signed with the old secret as well.",
    )


class EndpointView(View):
    id: str = Field(examples=["whk_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    url: str
    event_types: list[str]
    description: str
    status: Literal["enabled", "disabled"]
    disabled_reason: str | None = Field(description="Why, where it was not you who disabled it.")
    livemode: bool
    version: int = Field(description="The same as the `ETag`; send it as `If-Match` with a PATCH.")
    created_at: Time


class EndpointSecretView(EndpointView):
    secret: str | None = Field(
        description="Verifies the signatures. Keep it: it is not shown again, nor by a repeated request.",
        examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
    )


class DeliveryView(View):
    """What became of an event at an endpoint."""

    event_id: str = Field(examples=["evt_01k7m3v9c2q8x5t4n6r1b0w3ye00"])
    event_type: str
    state: Literal["pending", "parked", "delivered", "failed"] = Field(
        description="`parked`: it stands beside the order, and is attempted still. `failed`: no attempt follows."
    )
    attempts: int
    next_attempt_at: Time | None
    last_status: int | None = Field(description="What the receiver last answered with.")
    last_error: str | None
    delivered_at: Time | None
    created_at: Time


def _fields(endpoint: Endpoint, principal: Principal) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "event_types": list(endpoint.types),
        "description": endpoint.description,
        "status": endpoint.status,
        "disabled_reason": endpoint.disabled_reason,
        "livemode": principal.mode == "live",
        "version": endpoint.version,
        "created_at": time_text(endpoint.created_at_us),
    }


def endpoint_view(endpoint: Endpoint, principal: Principal) -> EndpointView:
    return EndpointView(**_fields(endpoint, principal))


def _with_secret(endpoint: Endpoint, principal: Principal) -> EndpointSecretView:
    return EndpointSecretView(secret=endpoint.secrets[0].secret, **_fields(endpoint, principal))


def _without_secret(shown: EndpointSecretView) -> EndpointSecretView:
    return shown.model_copy(update={"secret": None})


def _delivery_view(delivery: DeliveryInfo) -> DeliveryView:
    return DeliveryView(
        event_id=delivery.event_id,
        event_type=delivery.event_type,
        state=delivery.state,  # type: ignore[arg-type]
        attempts=delivery.attempts,
        next_attempt_at=time_text_or_none(delivery.next_at_us),
        last_status=delivery.last_status,
        last_error=delivery.last_error,
        delivered_at=time_text_or_none(delivery.delivered_at_us),
        created_at=time_text(delivery.created_at_us),
    )


@router.post("", status_code=201)
async def create_webhook_endpoint(
    body: NewEndpoint, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> EndpointSecretView:
    """Be told at this URL from now on. The answer shows the secret that verifies the signatures, once."""
    _check_url(services.webhooks, body.url)

    async def act(transactions: Transactions) -> EndpointSecretView:
        made = await services.webhooks.endpoints.create(
            _scope(principal),
            url=body.url,
            types=body.event_types,
            description=body.description,
            transactions=transactions,
        )
        return _with_secret(made, principal)

    key = key_of(request, body, "webhook_endpoints.create")
    view = EndpointSecretView
    shown = await once(request, response, services, principal, key=key, act=act, view=view, keep=_without_secret)
    etag(response, shown.version)
    return shown


@router.get("")
async def list_webhook_endpoints(
    principal: Reader, services: Here, cursor: Cursor = None, limit: Limit = PAGE_DEFAULT
) -> Page[EndpointView]:
    """All webhook endpoints, newest first."""
    found = await services.webhooks.endpoints.page(_scope(principal), before=cursor, limit=limit + 1)
    more = len(found) > limit
    return Page(
        data=[endpoint_view(endpoint, principal) for endpoint in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


@router.get("/{endpoint_id}")
async def get_webhook_endpoint(
    endpoint_id: EndpointPath, response: Response, principal: Reader, services: Here
) -> EndpointView:
    """One webhook endpoint."""
    found = await services.webhooks.endpoints.get(_scope(principal), endpoint_id)
    etag(response, found.version)
    return endpoint_view(found, principal)


@router.patch("/{endpoint_id}")
async def change_webhook_endpoint(
    endpoint_id: EndpointPath,
    *,
    body: EndpointChange,
    request: Request,
    response: Response,
    principal: CatalogWriter,
    services: Here,
) -> EndpointView:
    """Change an endpoint, or enable one that was disabled because its receiver answered 410."""
    if body.url is not None:
        _check_url(services.webhooks, body.url)
    named = {
        "url": body.url,
        "types": body.event_types,
        "description": body.description,
        "status": body.status,
    }
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if body.status is not None:
        changes["disabled_reason"] = None
    expected = expected_version(request)

    async def act(transactions: Transactions) -> EndpointView:
        changed = await services.webhooks.endpoints.change(
            _scope(principal), endpoint_id, changes, expected_version=expected, transactions=transactions
        )
        return endpoint_view(changed, principal)

    key = key_of(request, body, "webhook_endpoints.change", about=endpoint_id, change=True)
    answer = await once(request, response, services, principal, key=key, act=act, view=EndpointView)
    services.webhooks.wake()
    etag(response, answer.version)
    return answer


@router.delete("/{endpoint_id}", status_code=204)
async def delete_webhook_endpoint(endpoint_id: EndpointPath, principal: CatalogWriter, services: Here) -> None:
    """Take an endpoint away. What it was yet to be told is not delivered."""
    await services.webhooks.endpoints.delete(_scope(principal), endpoint_id)


@router.post("/{endpoint_id}/rotate-secret")
async def rotate_webhook_secret(
    endpoint_id: EndpointPath,
    *,
    body: Rotation,
    request: Request,
    response: Response,
    principal: CatalogWriter,
    services: Here,
) -> EndpointSecretView:
    """Get a new secret. For a while each delivery is signed with the old one too."""

    async def act(transactions: Transactions) -> EndpointSecretView:
        changed = await services.webhooks.endpoints.rotate(
            _scope(principal),
            endpoint_id,
            expire_current_us=body.expire_current_after_seconds * 1_000_000,
            transactions=transactions,
        )
        return _with_secret(changed, principal)

    key = key_of(request, body, "webhook_endpoints.rotate", about=endpoint_id)
    view = EndpointSecretView
    shown = await once(request, response, services, principal, key=key, act=act, view=view, keep=_without_secret)
    etag(response, shown.version)
    return shown


@router.get("/{endpoint_id}/deliveries")
async def list_webhook_deliveries(
    endpoint_id: EndpointPath,
    *,
    principal: Reader,
    services: Here,
    state: Annotated[Literal["pending", "parked", "delivered", "failed"] | None, Query()] = None,
    cursor: Cursor = None,
    limit: Limit = PAGE_DEFAULT,
) -> Page[DeliveryView]:
    """What an endpoint was told and is to be told, the newest event first."""
    scope = _scope(principal)
    await services.webhooks.endpoints.get(scope, endpoint_id)
    found = await services.webhooks.events.deliveries(scope, endpoint_id, state=state, before=cursor, limit=limit + 1)
    more = len(found) > limit
    return Page(
        data=[_delivery_view(delivery) for delivery in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].event_id if more else None,
    )


def _scope(principal: Principal) -> Scope:
    return Scope(principal.tenant_id, principal.mode)


def _check_url(webhooks: Webhooks, url: str) -> None:
    """Raises ApiError 400 for a URL that will not be called. Where its name leads is checked with each attempt."""
    try:
        webhooks.check_url(url)
    except TargetRefused as refused:
        raise invalid_request(f"url: {refused}.", param="url") from None
