"""The management API as one application: every router, and one envelope for whatever is refused."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from gateway import __version__
from gateway.api import (
    apps,
    autumn,
    budgets,
    chargly,
    chat,
    checkout,
    credits,
    customers,
    customers_by_name,
    docs,
    entitlements,
    events,
    funding,
    health,
    keys,
    metrics,
    models,
    packages,
    packs,
    quote,
    refunds,
    requests,
    reservations,
    revocations,
    rules,
    stripe_webhook,
    tenants,
    topup,
    usage,
    usage_queries,
    webhook_endpoints,
)
from gateway.api.access import SECURITY
from gateway.api.frame import ERROR_BESIDE, REFUSAL, REQUEST_ID, Frame
from gateway.api.openapi import Documented, operation_id
from gateway.api.services import Services
from gateway.errors import ApiError, internal_error, invalid_request, method_not_allowed, not_found
from gateway.refusals import REFUSALS

DESCRIPTION: Final = """
The prepaid meter in front of an LLM. Point an OpenAI SDK at this server, name the user whose wallet pays in a header,
and every completion is reserved, streamed and charged exactly.

Amounts are integer millicredits (1000 are one credit), rounded down; each has a twin with the suffix `_decimal` that is
exact. Times are RFC 3339, UTC. Every POST and PATCH takes an `Idempotency-Key`; repeated, it answers as it did the
first time, with `X-Idempotent-Replayed: true`.
"""


RESOURCES: Final = (
    chat,
    quote,
    models,
    requests,
    refunds,
    reservations,
    topup,
    funding,
    revocations,
    packs,
    packages,
    checkout,
    entitlements,
    credits,
    customers,
    customers_by_name,
    events,
    webhook_endpoints,
    apps,
    keys,
    tenants,
    metrics,
    rules,
    usage,
    usage_queries,
    budgets,
    autumn,
    chargly,
)
PLAIN: Final = (health, docs, stripe_webhook)
"""They need no key."""


class ErrorView(BaseModel):
    """Further members hold the facts, such as `needed` and `available`."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str = Field(examples=["invalid_request_error"])
    code: str = Field(examples=["invalid_request"])
    param: str | None
    request_id: str


class ErrorEnvelope(BaseModel):
    error: ErrorView


REFUSED: Final[Mapping[int, str]] = {
    400: "The request is not valid; `param` says where",
    401: "The key is missing, unknown or revoked",
    402: "Not enough credits",
    403: "The key may not do this",
    404: "There is no such thing, or it is another tenant's",
    405: "Another method is needed",
    409: "It is there already, settled already, or under way",
    412: "`If-Match` names another version than the present one",
    413: "The body is too large",
    422: "The idempotency key was used for another request",
    429: "Too many requests",
    503: "The ledger cannot be reached",
}

_REFUSED: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorEnvelope, "description": description} for status, description in REFUSED.items()
}


def create_api(services: Services) -> ASGIApp:
    """The management API over *services*."""
    api = Documented(
        title="Farebox",
        version=__version__,
        description=DESCRIPTION,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
    )
    api.state.services = services
    for resource in RESOURCES:
        api.include_router(resource.router, responses=_REFUSED, dependencies=list(SECURITY))
    for plain in PLAIN:
        api.include_router(plain.router)
    api.add_exception_handler(Exception, _broken)
    api.add_exception_handler(ApiError, _refused)
    api.add_exception_handler(HTTPException, _not_routed)
    api.add_exception_handler(RequestValidationError, _not_valid)
    for kind in REFUSALS.kinds:
        api.add_exception_handler(kind, _refused)
    return Frame(api, metrics=services.metrics, new_id=services.new_id)


def _answer(request: Request, refusal: ApiError) -> Response:
    request.scope[REFUSAL] = refusal.code
    body = refusal.to_body(request.scope[REQUEST_ID], beside=request.scope.get(ERROR_BESIDE, False))
    return Response(body, refusal.status, dict(refusal.headers), media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    return _answer(request, REFUSALS.translate(error) or internal_error())


async def _broken(request: Request, error: Exception) -> Response:
    return _answer(request, internal_error())


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _answer(request, method_not_allowed(", ".join(_methods(request))))
    if error.status_code == 404:
        return _answer(request, not_found(f"endpoint {request.method} {request.url.path[:200]}"))
    return _answer(request, invalid_request("The request could not be read."))


def _methods(request: Request) -> list[str]:
    """Those that the path has. The framework names only those of the first route that fits."""
    routes = (route for resource in (*RESOURCES, *PLAIN) for route in resource.router.routes)
    here = (route for route in routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in here for method in route.methods or ()})


async def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    param = place(problem["loc"])
    return _answer(request, invalid_request(sentence(problem, param), param=param))


def place(location: Sequence[int | str]) -> str | None:
    """`metadata.priority`, or `apps[0]`; None for the body as a whole."""
    where = ""
    for step in location[1:]:
        where += f"[{step}]" if isinstance(step, int) else f".{step}" if where else step
    return where or None


def sentence(problem: Mapping[str, Any], param: str | None) -> str:
    """What is wrong and where. What was sent is not repeated: it may be secret."""
    subject = param or "The body"
    match problem["type"]:
        case "extra_forbidden":
            return f"{subject} is not a known parameter here."
        case "missing":
            return f"{subject} is missing."
        case "value_error":
            return f"{subject}: {problem['ctx']['error']}."
        case _:
            text: str = problem["msg"]
            return f"{subject}: {text[0].lower()}{text[1:]}."
