"""Apps: what a tenant's users use. Who pays in it, and what is added to the base cost."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field

from gateway.api.access import Administrator, refuse_test_keys
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.versions import etag, expected_version
from gateway.api.wire import Body, Page, Time, View
from gateway.clock import time_text
from gateway.database import Transactions
from gateway.identity.principals import BillingMode, OnDisconnect
from gateway.identity.tenants import AppInfo
from gateway.tables import MARKUP_BPS_MAX, NAME_LENGTH_MAX

router = APIRouter(prefix="/v1/apps", tags=["apps"], route_class=ExactRoute)

MARKUP = "In hundredths of a percent: 2000 is 20 %."
DISCONNECT = "What happens when a client hangs up: `cancel`, or `drain` to learn the exact usage."


class NewApp(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Companion", "markup_bps": 2000}]})

    name: str = Field(min_length=1, max_length=NAME_LENGTH_MAX)
    billing_mode: BillingMode = "user_pays"
    markup_bps: int | None = Field(default=None, strict=True, ge=0, le=MARKUP_BPS_MAX, description=MARKUP)
    on_disconnect: OnDisconnect | None = Field(default=None, description=DISCONNECT)


class AppChange(Body):
    """What is left out, or null, stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"markup_bps": 2500}]})

    name: str | None = Field(default=None, min_length=1, max_length=NAME_LENGTH_MAX)
    billing_mode: BillingMode | None = None
    markup_bps: int | None = Field(default=None, strict=True, ge=0, le=MARKUP_BPS_MAX, description=MARKUP)
    on_disconnect: OnDisconnect | Literal["default"] | None = Field(
        default=None, description=f"{DISCONNECT} `default` follows the installation."
    )
    archived: bool | None = Field(default=None, strict=True, description="The keys of an archived app do not work.")


class AppView(View):
    id: str = Field(examples=["app_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    name: str
    billing_mode: str
    markup_bps: int
    on_disconnect: str | None
    archived: bool
    version: int = Field(description="Rises with every change; the ETag.")
    created_at: Time


def app_view(app: AppInfo) -> AppView:
    return AppView(
        id=app.id,
        name=app.name,
        billing_mode=app.billing_mode,
        markup_bps=app.markup_bps,
        on_disconnect=app.on_disconnect,
        archived=app.archived,
        version=app.version,
        created_at=time_text(app.created_at_us),
    )


@router.get("")
async def list_apps(principal: Administrator, services: Here) -> Page[AppView]:
    """All of the tenant's apps, oldest first."""
    apps = await services.tenants.list_apps(principal.tenant_id)
    return Page(data=[app_view(app) for app in apps], has_more=False, next_cursor=None)


@router.post("", status_code=201)
async def create_app(
    body: NewApp, request: Request, response: Response, principal: Administrator, services: Here
) -> AppView:
    """Create an app. It needs a key next: `POST /v1/keys`."""
    refuse_test_keys(principal)
    markup_bps = services.settings.markup_bps if body.markup_bps is None else body.markup_bps

    async def act(transactions: Transactions) -> AppView:
        app = await services.tenants.within(transactions).create_app(
            principal.tenant_id,
            body.name,
            billing_mode=body.billing_mode,
            markup_bps=markup_bps,
            on_disconnect=body.on_disconnect,
        )
        return app_view(app)

    key = key_of(request, body, "apps.create")
    answer = await once(request, response, services, principal, key=key, act=act, view=AppView)
    etag(response, answer.version)
    return answer


@router.patch("/{app_id}")
async def change_app(
    app_id: Annotated[str, Path(max_length=64, examples=["app_01k7m3v9c2q8x5t4n6r1b0w3ye"])],
    body: AppChange,
    request: Request,
    response: Response,
    *,
    principal: Administrator,
    services: Here,
) -> AppView:
    """Change an app; with `If-Match`, only the version that you have read.

    Requests that are under way are charged by the terms that they were reserved with.
    """
    refuse_test_keys(principal)
    expected = expected_version(request)

    async def act(transactions: Transactions) -> AppView:
        app = await services.tenants.within(transactions).change_app(
            principal.tenant_id,
            app_id,
            name=body.name,
            billing_mode=body.billing_mode,
            markup_bps=body.markup_bps,
            on_disconnect=body.on_disconnect,
            archived=body.archived,
            version=expected,
        )
        return app_view(app)

    key = key_of(request, body, "apps.change", about=app_id, change=True)
    answer = await once(request, response, services, principal, key=key, act=act, view=AppView)
    services.changes.announce()
    etag(response, answer.version)
    return answer
