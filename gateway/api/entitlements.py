"""Entitlement checks: may this customer do that now?

An app asks before every action, so these endpoints are raw ASGI: what the framework does for a route costs several
times what the answer does. Where all of it is at hand, `Checks.at_once` gives the answer without a task of its own, and
the server writes it while it reads the request (`gateway/server.py`); else the same is asked for in order. The routes
below tell the rest of the API, and its document, that they exist.
"""

import re
import time
from decimal import Decimal
from typing import Annotated, Any, Final, NamedTuple
from urllib.parse import parse_qsl

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from gateway.api.access import MODES, caller, token_of
from gateway.api.chat import Proxied
from gateway.api.customers import SYNONYMS, CustomerPath
from gateway.api.frame import REFUSAL, REQUEST_ID
from gateway.api.services import Here, Services
from gateway.api.wire import Credits, Millicredits, View, amounts
from gateway.billing.entitlements import Entitlement, Named
from gateway.errors import ApiError, Headers, internal_error, invalid_request
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Mode, Principal
from gateway.refusals import REFUSALS
from ledger.model import Scope as Wallets
from pricing.charge import ChargeTooLarge
from pricing.metering import UnitsInvalid

router = APIRouter(prefix="/v1", tags=["entitlements"])

CHECK_PATH: Final = "/v1/entitlements/check"
CUSTOMER_PATH: Final = "/v1/customers/{customer}/entitlements/{metric}"
EXTERNAL_PATH: Final = "/v1/customer-by-external-id/{external_id}/entitlements/{metric}"
PREFIXES: Final = {"/v1/customers/": CUSTOMER_PATH, "/v1/customer-by-external-id/": EXTERNAL_PATH}

METRIC_NAMES: Final = ("billable_metric_key", "feature_key")
UNITS: Final = r"^[0-9]{1,10}(\.[0-9]{1,6})?$"
_UNITS: Final = re.compile(UNITS)

JSON: Final = (b"content-type", b"application/json")

_encode: Final = msgspec.json.Encoder().encode


class EntitlementView(View):
    """`allowed` is decided in the exact amounts, of which the integers show thousandths of a credit, rounded down."""

    allowed: bool
    customer_id: str = Field(examples=["cus_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    billable_metric_key: str = Field(examples=["chat_message"])
    balance: Millicredits
    balance_decimal: Credits
    effective_balance: Millicredits = Field(description="What this app could spend on this metric now.")
    effective_balance_decimal: Credits
    cost_per_unit: Millicredits = Field(description="What one unit costs.", examples=[1000])
    cost_per_unit_decimal: Credits = Field(examples=["1"])
    cost_total: Millicredits = Field(description="What `units` cost together.", examples=[1000])
    cost_total_decimal: Credits = Field(examples=["1"])
    affordable_units: int | None = Field(
        description="How many whole units the credits pay for; null where nothing bounds them.", examples=[245]
    )
    top_up_url: str | None = Field(
        default=None,
        description="Where the customer adds credits: there only if these are what lacks, and payments are set up.",
        examples=["https://api.example.com/topup/MQB0ZW5f"],
    )


class Answer(NamedTuple):
    body: bytes
    headers: list[tuple[bytes, bytes]]


class Checks:
    """The endpoint of all checks."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def at_once(self, scope: Scope, route: str) -> Answer | None:
        """An answer to a request of *route* that needs nobody else; None where somebody must be asked, or there is
        something to refuse.

        It is counted like any other request.
        """
        began_s = time.perf_counter()
        services = self._services
        principal = services.principals.known(token_of(Request(scope)))
        if principal is None or KeyScope.CREDITS_READ not in principal.scopes:
            return None
        fields = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        if "mode" in fields:
            return None
        try:
            named, metric_key = _subject(route, scope["path"], fields)
            found = services.entitlements.check_at_once(principal, named, metric_key, _units(fields))
        except (ApiError, UnitsInvalid, ChargeTooLarge):
            return None
        if found is None:
            return None
        limit = services.settings.management_rate_limit_per_minute
        decision = services.rate_limit.check_at_once(f"management:{principal.key_id}", limit)
        if decision is None or not decision.allowed:
            return None
        body = _encode(self._fields(found, principal))
        headers = [
            JSON,
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", services.new_id("req").encode()),
            *decision.headers(),
        ]
        services.metrics.requests(route, "GET", "200").inc()
        services.metrics.request_seconds(route).observe(time.perf_counter() - began_s)
        return Answer(body, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse in our envelope; within a `Frame`."""
        scope["route"] = Routed(route_of(scope))
        try:
            status, body, headers = 200, await self._answer(scope), Headers()
        except Exception as error:
            refusal = REFUSALS.translate(error)
            known = refusal or internal_error()
            scope[REFUSAL] = known.code
            await _send(send, known.status, known.to_body(scope[REQUEST_ID]), known.headers)
            if refusal is None:
                raise
            return
        await _send(send, status, body, headers)

    async def _answer(self, scope: Scope) -> bytes:
        fields = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        principal = await caller(Request(scope), self._services, _mode(fields))
        principal.require(KeyScope.CREDITS_READ)
        named, metric_key = _subject(route_of(scope), scope["path"], fields)
        try:
            units, entitlements = _units(fields), self._services.entitlements
            # Where only the rate limit had to be asked for, the rest is at hand all the same.
            found = entitlements.check_at_once(principal, named, metric_key, units)
            if found is None:
                found = await entitlements.check(principal, named, metric_key, units)
        except (UnitsInvalid, ChargeTooLarge) as error:
            raise invalid_request(f"units: {error}.", param="units") from None
        return _encode(self._fields(found, principal))

    def _fields(self, found: Entitlement, principal: Principal) -> dict[str, Any]:
        fields = entitlement_fields(found, principal)
        if found.short:
            url = self._services.top_up_url(Wallets(principal.tenant_id, principal.mode), found.customer_id)
            if url is not None:
                fields["top_up_url"] = url
        return fields


class Routed(NamedTuple):
    """What the frame counts a request by."""

    path_format: str


def route_of(scope: Scope) -> str:
    """The route of a request that is a check; empty for any other."""
    path: str = scope["path"]
    if scope["method"] != "GET":
        return ""
    if path == CHECK_PATH:
        return CHECK_PATH
    for prefix, route in PREFIXES.items():
        if path.startswith(prefix):
            named = path[len(prefix) :].rsplit("/", 2)
            return route if len(named) == 3 and named[0] and named[1] == "entitlements" and named[2] else ""
    return ""


def entitlement_fields(found: Entitlement, principal: Principal) -> dict[str, Any]:
    return {
        "allowed": found.allowed,
        "customer_id": found.customer_id,
        "billable_metric_key": found.metric_key,
        **amounts(
            principal.asset,
            balance=found.balance,
            effective_balance=found.effective_balance,
            cost_per_unit=found.cost_per_unit,
            cost_total=found.cost_total,
        ),
        "affordable_units": found.affordable_units,
    }


def _subject(route: str, path: str, fields: dict[str, str]) -> tuple[Named, str]:
    """Whom and which metric a request names, in its path or its query.

    Raises:
        ApiError: 400 for a name that is missing, or stands there twice in other words.
    """
    if route == CHECK_PATH:
        customer = _one_of(SYNONYMS, fields, "the customer")
        metric = _one_of(METRIC_NAMES, fields, "the metric")
        return Named(fields[customer], param=customer), fields[metric]
    customer, _, metric_key = path[path.index("/", len("/v1/")) + 1 :].rsplit("/", 2)
    if route == EXTERNAL_PATH:
        return Named(customer, param="external_id", external=True), metric_key
    return Named(customer, param="customer"), metric_key


def _one_of(names: tuple[str, ...], fields: dict[str, str], what: str) -> str:
    given = [name for name in names if name in fields]
    if len(given) != 1:
        raise invalid_request(f"Name {what} once: {' or '.join(names)}.", param=given[0] if given else names[0])
    return given[0]


def _units(fields: dict[str, str]) -> Decimal:
    """Raises ApiError 400 for what is no quantity."""
    text = fields.get("units", "1")
    if _UNITS.fullmatch(text) is None:
        raise invalid_request("units is a decimal number with at most 6 places, such as 1 or 0.5.", param="units")
    return Decimal(text)


def _mode(fields: dict[str, str]) -> Mode | None:
    """Raises ApiError 400 for a mode that there is not."""
    given = fields.get("mode")
    mode = next((mode for mode in MODES if mode == given), None)
    if given is not None and mode is None:
        raise invalid_request("mode is live or test.", param="mode")
    return mode


async def _send(send: Send, status: int, body: bytes, headers: Headers) -> None:
    encoded = [JSON, (b"content-length", b"%d" % len(body))]
    encoded += [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


# What the rest of the API, and its document, know of this. These requests seldom come here; see `gateway/app.py`.

MetricPath = Annotated[str, InPath(description="The metric's key.", examples=["chat_message"], min_length=1)]
_ANSWERED: Final[dict[int | str, dict[str, Any]]] = {200: {"model": EntitlementView}}


class HowMuch(BaseModel):
    units: str = Field(
        default="1", description="How much of it; at most 6 decimal places.", pattern=UNITS, examples=["1"]
    )
    mode: Mode | None = Field(
        default=None, description="Which data the installation's key means. An app's key has its own."
    )


class Subject(HowMuch):
    """A customer under one of three names, and a metric under one of two."""

    customer_id: str | None = Field(default=None, examples=["user_123"])
    end_user_id: str | None = Field(default=None, description="The same as `customer_id`.")
    external_user_id: str | None = Field(default=None, description="The same as `customer_id`.")
    billable_metric_key: str | None = Field(default=None, examples=["api_calls"])
    feature_key: str | None = Field(default=None, description="The same as `billable_metric_key`.")


@router.get("/entitlements/check", response_class=Response, responses=_ANSWERED)
async def check(asked: Annotated[Subject, Query()], request: Request, services: Here) -> Response:
    """Whether a customer may do something now. Name the customer and the metric, each in one of the ways.

    A customer whom you name for the first time is created.
    """
    return Proxied(Checks(services), request)


@router.get("/customers/{customer:path}/entitlements/{metric}", response_class=Response, responses=_ANSWERED)
async def check_customer(
    customer: CustomerPath, metric: MetricPath, asked: Annotated[HowMuch, Query()], request: Request, services: Here
) -> Response:
    """Whether a customer may do something now, what it costs, and how many units of it their credits pay for."""
    return Proxied(Checks(services), request)


@router.get(
    "/customer-by-external-id/{external_id:path}/entitlements/{metric}", response_class=Response, responses=_ANSWERED
)
async def check_external(
    external_id: CustomerPath, metric: MetricPath, asked: Annotated[HowMuch, Query()], request: Request, services: Here
) -> Response:
    """The same, by your own id of the customer."""
    return Proxied(Checks(services), request)
