"""What FastAPI cannot know of our operations: headers, which refusals each has, and what leads from one to another.

How it works. FastAPI writes the document from the routes; `completed` goes over it once. Every operation that changes
something takes an idempotency key, and a PATCH an `If-Match`; an answer that has a `version` has it as its ETag, too.
`LINKS` says which field of an answer is which parameter, or which field of the body, of a further operation: for
generated clients, and for the tests that walk from one to the next.

Source: OpenAPI 3.1, Link Object.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from fastapi import FastAPI
from fastapi.routing import APIRoute

Document = dict[str, Any]

TAGS: Final[Mapping[str, str]] = {
    "proxy": "OpenAI's endpoints, metered.",
    "requests": "Receipts of what was charged, and refunds.",
    "reservations": "Credits that are held for tasks outside the proxy.",
    "credits": "Balances, blocks and statements; grants and revocations.",
    "funding": "A developer's own wallet and pool.",
    "packs": "Plan packs, which customers buy out of their own credits.",
    "payments": "Credits for money: packages, checkout, orders.",
    "entitlements": "May this customer do that now?",
    "customers": "Your users.",
    "webhooks": "Events, and where you are told of them.",
    "apps": "Your products: who pays in them, and what is added to the base cost.",
    "keys": "The keys of your apps.",
    "tenants": "What you have chosen for all of your apps.",
    "metering": "Metrics, what they cost, usage, and questions about it.",
    "budgets": "Limits to what is spent in a period.",
    "Autumn's dialect": "The same for clients of Autumn: they change their base URL. Amounts are credits.",
    "Chargly's dialect": "The same for clients of Chargly: they change their base URL. Amounts are credits.",
    "operations": "Whether this process lives and can serve, and what it has counted.",
}

IDEMPOTENCY_KEY: Final[Document] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key and request have one effect and one answer, however often they are sent.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    "example": "topup:pay_abc123",
}
IF_MATCH: Final[Document] = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "The `ETag` of what the change was decided on: at another version it is refused with 412.",
    "schema": {"type": "string", "pattern": '^(\\*|(W/)?"[0-9]{1,18}")$'},
    "example": '"3"',
}


def _header(description: str, example: str, kind: str = "string") -> Document:
    return {"description": description, "schema": {"type": kind}, "example": example}


HEADERS: Final[Mapping[str, Document]] = {
    "X-Request-Id": _header("Names this request in the log.", "req_01k7m3v9c2q8x5t4n6r1b0w3ye"),
    "X-Idempotent-Replayed": _header("`true`: the answer to an earlier request with this idempotency key.", "true"),
    "ETag": _header("The version that is shown; send it as `If-Match` with a PATCH.", '"3"'),
    "X-RateLimit-Limit": _header("Requests a minute with this key.", "600"),
    "X-RateLimit-Remaining": _header("How many are left.", "599"),
    "X-RateLimit-Reset": _header("In so many seconds all are there again.", "12"),
    "Retry-After": _header("Seconds.", "1"),
    "WWW-Authenticate": _header("How to authenticate.", "Bearer"),
    "Allow": _header("The methods that the path has.", "GET, POST"),
}
OF_STATUS: Final[Mapping[str, tuple[str, ...]]] = {
    "401": ("WWW-Authenticate",),
    "405": ("Allow",),
    "409": ("Retry-After",),
    "429": ("Retry-After",),
    "503": ("Retry-After",),
}
RATE_LIMIT: Final = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")

NOT_OF: Final[Mapping[str, frozenset[str]]] = {
    "get": frozenset({"402", "409", "412", "413", "422"}),
    "delete": frozenset({"402", "409", "412", "413", "422"}),
    "post": frozenset({"412"}),
    "patch": frozenset({"402"}),
}
"""The refusals that no operation of a method has."""


class Link(NamedTuple):
    """From an answer to *target*: by parameters, and by fields of its body, as places in the answer."""

    target: str
    parameters: Mapping[str, str] = {}
    body: Mapping[str, Any] = {}


def _links(targets: str, parameter: str, place: str) -> tuple[Link, ...]:
    """To several operations that take the same parameter."""
    return tuple(Link(target, {parameter: place}) for target in targets.split())


def _bodies(targets: str, field: str, place: str) -> tuple[Link, ...]:
    return tuple(Link(target, body={field: place}) for target in targets.split())


OF_CUSTOMER: Final = "get_customer change_customer get_credits list_transactions list_plans buy_pack list_orders"
CHARGED: Final = "get_request refund_request"

LINKS: Final[Mapping[str, tuple[Link, ...]]] = {
    "create_customer": (
        *_links(f"{OF_CUSTOMER} erase_customer", "customer", "/id"),
        *_bodies("grant_topup record_usage create_reservation grant_from_pool", "customer_id", "/id"),
        *_links("list_events query_usage", "customer_id", "/id"),
        Link("create_budget", body={"subject": {"type": "customer", "id": "/id"}}),
    ),
    "grant_topup": (
        *_links("get_credits list_transactions buy_pack", "customer", "/customer_id"),
        *_bodies("record_usage create_reservation", "customer_id", "/customer_id"),
        Link("revoke_credits", {"customer": "/customer_id", "block_id": "/ledger_id"}),
    ),
    "create_metric": (
        *_links("get_metric change_metric archive_metric", "metric", "/id"),
        *_bodies("create_rule", "billable_metric_key", "/key"),
    ),
    "create_rule": (
        *_links("get_rule revise_rule archive_rule", "rule_id", "/id"),
        *_bodies("record_usage create_reservation", "billable_metric_key", "/billable_metric_key"),
        *_links("check_customer", "metric", "/billable_metric_key"),
    ),
    "record_usage": (
        *_links(CHARGED, "request_id", "/id"),
        *_links("get_credits", "customer", "/customer_id"),
        *_links("query_usage", "billable_metric_key", "/billable_metric_key"),
    ),
    "create_reservation": _links(
        "get_reservation commit_reservation release_reservation extend_reservation", "reservation_id", "/id"
    ),
    "commit_reservation": (
        *_links(CHARGED, "request_id", "/request_id"),
        *_links("get_reservation release_reservation", "reservation_id", "/id"),
    ),
    "create_pack": (
        *_links("get_pack change_pack archive_pack", "pack", "/id"),
        *_bodies("buy_pack", "pack", "/id"),
    ),
    "buy_pack": (
        *_links("list_plans get_credits", "customer", "/customer_id"),
        Link("revoke_credits", {"customer": "/customer_id", "block_id": "/block_id"}),
    ),
    "list_packages": _bodies("create_checkout", "package_id", "/data/0/id"),
    "create_checkout": (
        *_links("get_order", "order_id", "/order_id"),
        *_links("list_orders", "customer", "/customer_id"),
    ),
    "create_budget": _links("get_budget change_budget archive_budget", "budget_id", "/id"),
    "create_webhook_endpoint": _links(
        "get_webhook_endpoint change_webhook_endpoint delete_webhook_endpoint rotate_webhook_secret "
        "list_webhook_deliveries",
        "endpoint_id",
        "/id",
    ),
    "list_events": _links("get_event redeliver_event", "event_id", "/data/0/id"),
    "create_app": (*_links("change_app", "app_id", "/id"), *_bodies("create_key", "app_id", "/id")),
    "create_key": _links("revoke_key", "key_id", "/id"),
}
"""By the operation that is answered."""


class Documented(FastAPI):
    """FastAPI, with a document that says all of the contract."""

    def openapi(self) -> Document:
        if self.openapi_schema is None:
            self.openapi_schema = completed(super().openapi())
        return self.openapi_schema


def operation_id(route: APIRoute) -> str:
    """A function's name, which is also the method that a generated client has; in a dialect, what is asked of it."""
    dialect, _, asked = route.path.removeprefix("/").partition("/v1/")
    if not asked or not dialect:
        return route.name
    return "_".join((dialect, *map(str.lower, route.methods or ()), *re.findall("[a-z]+", asked.partition(":")[0])))


def completed(document: Document) -> Document:
    """FastAPI's *document* with headers, links and tags, and without refusals that cannot be. It is changed."""
    operations = [
        (method, operation) for methods in document["paths"].values() for method, operation in methods.items()
    ]
    for method, operation in operations:
        _refusals(method, operation)
        _parameters(method, operation)
        _headers(operation, document)
        _add_links(operation)
    used = {tag for _, operation in operations for tag in operation["tags"]}
    document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items() if name in used]
    document["components"]["headers"] = dict(HEADERS)
    return document


def _refusals(method: str, operation: Document) -> None:
    for status in NOT_OF[method]:
        operation["responses"].pop(status, None)
    if "requestBody" not in operation:
        operation["responses"].pop("413", None)


def _parameters(method: str, operation: Document) -> None:
    taken = {"post": [IDEMPOTENCY_KEY], "patch": [IDEMPOTENCY_KEY, IF_MATCH]}.get(method, [])
    if taken:
        operation["parameters"] = [*operation.get("parameters", ()), *taken]


def _headers(operation: Document, document: Document) -> None:
    takes_key = "422" in operation["responses"]
    for status, response in operation["responses"].items():
        names = ["X-Request-Id", *OF_STATUS.get(status, ())]
        if "security" in operation and status != "401":
            names += RATE_LIMIT
        if status.startswith("2"):
            names += ["X-Idempotent-Replayed"] if takes_key else []
            names += ["ETag"] if _has_version(response, document) else []
        headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
        operation["responses"][status] = {**response, "headers": headers}


def _has_version(response: Document, document: Document) -> bool:
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return "version" in document["components"]["schemas"].get(name, {}).get("properties", {})


def _add_links(operation: Document) -> None:
    links = {link.target: _written(link) for link in LINKS.get(operation["operationId"], ())}
    for status, response in operation["responses"].items():
        if links and status.startswith("2"):
            response["links"] = links


def _written(link: Link) -> Document:
    written: Document = {"operationId": link.target}
    if link.parameters:
        written["parameters"] = dict(_expressions(link.parameters))
    if link.body:
        written["requestBody"] = dict(_expressions(link.body))
    return written


def _expressions(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Places in the answer as the expressions that OpenAPI has for them; any other text stands for itself."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield name, dict(_expressions(value))
        else:
            yield name, f"$response.body#{value}" if value.startswith("/") else value
