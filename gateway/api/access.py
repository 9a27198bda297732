"""Who calls the management API, and what their key allows.

An app's key reaches the data of its own mode only. The installation's key has no app; it acts on live data, and on
test data with `?mode=test`.
"""

from typing import Annotated, Any, Final

import msgspec
from fastapi import Depends, Query, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from gateway.api.services import Here
from gateway.errors import invalid_request, permission_denied, rate_limit_exceeded
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Mode, Principal

MODES: Final[tuple[Mode, ...]] = ("live", "test")

EXTRA_HEADERS: Final = "farebox.response_headers"
"""Where in a request's scope an endpoint leaves headers for the response, be it an answer or a refusal."""

_bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer fb_live_…`")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same key, for clients that prefer this.")


async def caller(
    request: Request,
    services: Here,
    mode: Annotated[
        Mode | None, Query(description="Which data the installation's key means. An app's key has its own.")
    ] = None,
) -> Principal:
    """The principal of a management request, within its rate limit.

    Raises:
        ApiError: 401, 403 for another mode than an app's key has, 429; 400 for a zero character, which no name has.
    """
    principal = await services.principals.authenticate(token_of(request))
    if "\x00" in request.url.path or "%00" in request.url.query:
        raise invalid_request("A name in the path or the query has a zero character.")
    limit = services.settings.management_rate_limit_per_minute
    decision = await services.rate_limit.check(f"management:{principal.key_id}", limit)
    request.scope.setdefault(EXTRA_HEADERS, []).extend(decision.headers())
    if not decision.allowed:
        raise rate_limit_exceeded(limit=decision.limit, retry_after_s=decision.retry_after_s)
    if mode is None or mode == principal.mode:
        return principal
    if principal.app_id is not None:
        raise permission_denied(f"This key belongs to {principal.mode} data; use a key for {mode} data.")
    return msgspec.structs.replace(principal, mode=mode)


def token_of(request: Request) -> bytes:
    """The key as it stands in the headers; empty where there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("x-api-key", "")
    return token.strip().encode("latin-1")


def _allowed(scope: KeyScope) -> Any:
    async def allowed(principal: Annotated[Principal, Depends(caller)]) -> Principal:
        principal.require(scope)
        return principal

    return Depends(allowed)


Reader = Annotated[Principal, _allowed(KeyScope.CREDITS_READ)]
Writer = Annotated[Principal, _allowed(KeyScope.CREDITS_WRITE)]
CatalogWriter = Annotated[Principal, _allowed(KeyScope.CATALOG_WRITE)]
Proxier = Annotated[Principal, _allowed(KeyScope.PROXY)]
Administrator = Annotated[Principal, _allowed(KeyScope.ADMIN)]

SECURITY: Final = [Depends(_bearer), Depends(_api_key)]
"""Tells OpenAPI how to authenticate; `caller` does it."""


def sees_margins(principal: Principal) -> bool:
    return KeyScope.ADMIN in principal.scopes


def app_of(principal: Principal) -> str:
    """The app that the key belongs to.

    Raises:
        ApiError: 403 for the installation's key, which has none.
    """
    if principal.app_id is None:
        raise permission_denied("This needs the key of an app: the installation's key has no wallet or pool.")
    return principal.app_id


def refuse_test_keys(principal: Principal) -> None:
    """Apps serve live traffic too, so a test key does not change them, whatever its scopes.

    Raises:
        ApiError: 403.
    """
    if principal.app_id is not None and principal.mode == "test":
        raise permission_denied("A test key reaches only test data, and apps have no test copy. Use a live key.")
