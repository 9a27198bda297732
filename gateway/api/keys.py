"""API keys of a tenant's apps: made, listed and revoked."""

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field

from gateway.api.access import Administrator
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.wire import Body, Page, Text, Time, View
from gateway.clock import time_text, time_text_or_none
from gateway.database import Transactions
from gateway.errors import not_found, permission_denied
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Principal
from gateway.identity.tenants import KeyInfo
from gateway.tables import NAME_LENGTH_MAX

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=ExactRoute)

SCOPES_MAX: Final = len(KeyScope)


class NewKeyBody(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"app_id": "app_01k7m3v9c2q8x5t4n6r1b0w3ye", "mode": "live"}]}
    )

    app_id: Annotated[Text, Field(max_length=64)]
    mode: Literal["live", "test"] = "live"
    name: str = Field(default="", max_length=NAME_LENGTH_MAX)
    scopes: tuple[KeyScope, ...] | None = Field(
        default=None, max_length=SCOPES_MAX, description="Default: all of an app's scopes, without `admin`."
    )


class KeyView(View):
    id: str = Field(examples=["key_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    app_id: str | None
    mode: str
    name: str
    last4: str = Field(description="The key's last four characters, to tell it from others.")
    scopes: list[str]
    created_at: Time
    revoked_at: Time | None


class NewKeyView(KeyView):
    key: str | None = Field(description="The key itself. It is shown this once; a replay has null here.")


def key_view(key: KeyInfo) -> KeyView:
    return KeyView(
        id=key.id,
        app_id=key.app_id,
        mode=key.mode,
        name=key.name,
        last4=key.last4,
        scopes=key.scopes,
        created_at=time_text(key.created_at_us),
        revoked_at=time_text_or_none(key.revoked_at_us),
    )


@router.get("")
async def list_keys(principal: Administrator, services: Here) -> Page[KeyView]:
    """All of the tenant's keys, oldest first, the revoked ones too."""
    keys = await services.tenants.list_keys(principal.tenant_id)
    return Page(data=[key_view(key) for key in keys], has_more=False, next_cursor=None)


@router.post("", status_code=201)
async def create_key(
    body: NewKeyBody, request: Request, response: Response, principal: Administrator, services: Here
) -> NewKeyView:
    """Create a key of an app. Keep it: only its hash is stored, and nobody can show it again."""
    _refuse_other_mode(principal, body.mode)

    async def act(transactions: Transactions) -> NewKeyView:
        new = await services.tenants.within(transactions).create_key(
            principal.tenant_id, body.mode, app_id=body.app_id, name=body.name, scopes=body.scopes
        )
        return NewKeyView(key=new.token, **key_view(new.info).model_dump())

    key = key_of(request, body, "keys.create")
    return await once(
        request,
        response,
        services,
        principal,
        key=key,
        act=act,
        view=NewKeyView,
        keep=lambda made: made.model_copy(update={"key": None}),
    )


@router.post("/{key_id}/revoke")
async def revoke_key(
    key_id: Annotated[str, Path(max_length=64)],
    request: Request,
    response: Response,
    principal: Administrator,
    services: Here,
) -> KeyView:
    """End a key. Every gateway refuses it within a second. Repeating it changes nothing."""
    known = {key.id: key for key in await services.tenants.list_keys(principal.tenant_id)}.get(key_id)
    if known is None:
        raise not_found(f"key {key_id}")
    _refuse_other_mode(principal, known.mode)

    async def act(transactions: Transactions) -> KeyView:
        return key_view(await services.tenants.within(transactions).revoke_key(principal.tenant_id, key_id))

    key = key_of(request, None, "keys.revoke", about=key_id)
    answer = await once(request, response, services, principal, key=key, act=act, view=KeyView)
    services.changes.announce()
    return answer


def _refuse_other_mode(principal: Principal, mode: str) -> None:
    """A sandbox's key neither makes nor ends a live one, and no app's key ends the installation's.

    Raises:
        ApiError: 403.
    """
    if principal.app_id is None:
        return
    if mode == "admin":
        raise permission_denied("Only the installation's own key manages its keys.")
    if principal.mode == "test" and mode != "test":
        raise permission_denied("A test key manages only test keys. Use a live key with the scope admin.")
