"""Two tenants on one installation. Whatever one sends, with its own keys and the other's ids, shows and moves nothing.

Each route is asked twice, with what the other tenant has and with what nobody has: the answers must be the same, so
that not even the existence of a thing shows. A route that is not in `attempts` fails the walk.
"""

import asyncio
import contextlib
import io
import json
import logging
import re
import sqlite3
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
import pytest
from sqlalchemy import literal_column, select
from sqlmodel import SQLModel, col

from gateway.billing.rollups import Rollups
from gateway.identity.keys import KeyScope
from gateway.identity.wallets import app_wallet
from gateway.ids import new_id
from gateway.installation import Books, Gift, add_tenant, give
from gateway.tables import Customer
from ledger.model import Scope
from pricing.money import CREDIT
from tests.gateway.office import Office
from tests.gateway.usage_events import commit, plain, waiting

MODES: Final = ("live", "test")
OURS: Final = ("live", "test", "owner", "sandbox-owner", "reader", "admin")
"""The names of all keys of the tenant who asks."""

PUBLIC: Final = ("/openapi.json", "/docs")
SOME_ID: Final = re.compile(r"\b[a-z]{2,5}_[0-9a-z]{26}(?:\d\d)?\b")
TOKEN: Final = re.compile(r"fb_(?:live|test|admin)_\w+|whsec_[\w+/=]+")
COMPLETION: Final = re.compile(r"chatcmpl-\w+")
PAGE: Final = re.compile(r"cs_test_\w+|(?<=/topup/)[\w-]+")
"""What leads to a page where one pays."""

LAST4: Final = re.compile(r'"last4":"\w+"')
NUMBER: Final = re.compile(r"\d+")
CHAT: Final = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}
PACK: Final = {"name": "Hour", "price": 0, "credits": 1000, "duration_seconds": 3600}
MONTHLY: Final = {"credits": 4_000_000, "period": {"every": "month"}}
OPERATORS: Final = {"payment_observations", "processor_transactions", "payment_sweeps"}
"""Tables of what the payment processor tells: their rows are the operator's, never another tenant's."""


@dataclass(frozen=True)
class Things:
    """What one could name of a tenant."""

    tenant: str
    app: str
    key: str
    customer: str
    user: str
    request: str
    block: str
    endpoint: str
    event: str
    budget: str
    reservation: str
    pack: str
    metric: str
    metric_key: str
    rule: str
    order: str
    idempotency_key: str

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(vars(self).values())


def nobodys() -> Things:
    """Of the same form as somebody's, and nobody has them."""
    ids = {name: new_id(prefix) for name, prefix in PREFIXES.items()}
    return Things(**ids, user="nobodys-user", metric_key="nobodys-metric", idempotency_key="nobodys-key")


PREFIXES: Final = {
    "tenant": "ten",
    "app": "app",
    "key": "key",
    "customer": "cus",
    "request": "req",
    "block": "blk",
    "endpoint": "whk",
    "event": "evt",
    "budget": "bud",
    "reservation": "rsv",
    "pack": "pck",
    "metric": "mtr",
    "rule": "rul",
    "order": "ord",
}


@dataclass(frozen=True)
class Attempt:
    """A request. *same*: the answer does not hang on where in time an id lies."""

    path: str
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    same: bool = True


def attempts(things: Things) -> dict[str, list[Attempt]]:
    """For every route, each place in which a thing can be named."""
    once = {"Idempotency-Key": things.idempotency_key}
    names = [{"customer_id": things.customer}, {"customer_id": things.user}]
    people = (things.customer, things.user)
    metrics, price = (things.metric, things.metric_key), {"cost_type": "flat", "credit_cost": 7}
    chat = [Attempt("/v1/chat/completions", CHAT, {"X-Quota-User": user, **once}) for user in people]
    chat += [
        Attempt("/v1/chat/completions", {**CHAT, "user": things.user}, once),
        Attempt("/v1/chat/completions", {**CHAT, "model": things.app}),
        Attempt("/v1/chat/completions", CHAT, {"X-Quota-User": things.user, "X-Quota-Action": things.app}),
        Attempt("/v1/chat/completions", {**CHAT, "stream": True}, {"X-Quota-User": things.user, **once}),
    ]
    return {
        "POST /v1/chat/completions": chat,
        "POST /v1/users/{user}/chat/completions": [
            Attempt(f"/v1/users/{user}/chat/completions", CHAT, once) for user in people
        ],
        "POST /v1/quote": [Attempt("/v1/quote", CHAT, {"X-Quota-User": user}) for user in people],
        "GET /v1/models": [Attempt("/v1/models")],
        "GET /v1/models/{model}": [Attempt(f"/v1/models/{things.app}")],
        "GET /v1/requests/{request_id}": [
            *(Attempt(f"/v1/requests/{thing}") for thing in (things.request, things.block)),
            *(Attempt(f"/v1/requests/{things.request}?mode={mode}") for mode in MODES),
        ],
        "POST /v1/requests/{request_id}/refund": [
            *(Attempt(f"/v1/requests/{thing}/refund", {}, once) for thing in (things.request, things.block)),
            Attempt(f"/v1/requests/{things.request}/refund", {"credits": 1}),
        ],
        "POST /v1/customers/{customer}/credits/{block_id}/revoke": [
            *(Attempt(f"/v1/customers/{person}/credits/{things.block}/revoke", {}, once) for person in people),
            Attempt(f"/v1/customers/alice/credits/{things.block}/revoke", {"clawback": True}),
        ],
        **{
            f"POST /v1/{verb}": [
                Attempt(f"/v1/{verb}", {**name, "credits": 10, "metadata": {"job": things.reservation}}, once)
                for name in names
            ]
            for verb in ("reservations", "reserve")
        },
        "GET /v1/reservations/{reservation_id}": [
            Attempt(f"/v1/reservations/{thing}") for thing in (things.reservation, things.request)
        ],
        **{
            f"POST /v1/reservations/{{reservation_id}}/{verb}": [
                Attempt(f"/v1/reservations/{things.reservation}/{verb}", body, headers) for headers in ({}, once)
            ]
            for verb, body in (("commit", {"credits": 1}), ("release", None), ("extend", {"ttl_seconds": 60}))
        },
        "POST /v1/topup/grant": [
            *(Attempt("/v1/topup/grant", {**name, "credits": 1000}, once) for name in names),
            Attempt("/v1/topup/grant", {"end_user_id": things.user, "credits": 1, "apps": [things.app]}),
            Attempt("/v1/topup/grant", {**names[1], "credits": 1000, "idempotency_key": things.idempotency_key}),
        ],
        "GET /v1/funding": [Attempt("/v1/funding"), Attempt(f"/v1/funding?app_id={things.app}")],
        "POST /v1/funding/grant": [Attempt("/v1/funding/grant", {**name, "amount": "0.01"}, once) for name in names],
        "POST /v1/funding/pool": [Attempt("/v1/funding/pool", {"credits": 1000}, once)],
        "POST /v1/packs": [Attempt("/v1/packs", {**PACK, "key": things.user, "apps": [things.app]}, once)],
        "GET /v1/packs": [Attempt("/v1/packs", same=False), Attempt(f"/v1/packs?cursor={things.pack}", same=False)],
        "GET /v1/packs/{pack}": [Attempt(f"/v1/packs/{pack}") for pack in (things.pack, things.key)],
        "PATCH /v1/packs/{pack}": [
            Attempt(f"/v1/packs/{things.pack}", {"price": 0, "archived": True}),
            Attempt(f"/v1/packs/{things.pack}", {"name": "Taken"}, {"If-Match": '"1"'}),
        ],
        "POST /v1/packs/{pack}/archive": [Attempt(f"/v1/packs/{things.pack}/archive", headers=once)],
        "POST /v1/customers/{customer}/packs": [
            *(Attempt(f"/v1/customers/{person}/packs", {"pack": things.pack}, once) for person in people),
            *(Attempt(f"/v1/customers/{person}/packs", {"pack": "our-pack"}, once) for person in people),
        ],
        "GET /v1/customers/{customer}/packs": [Attempt(f"/v1/customers/{person}/packs") for person in people],
        "GET /v1/packages": [Attempt("/v1/packages")],
        "POST /v1/checkout": [
            *(Attempt("/v1/checkout", {**name, "package_id": "usd-5"}, once) for name in names),
            Attempt("/v1/checkout", {**names[1], "package_id": things.pack}),
        ],
        "GET /v1/orders/{order_id}": [Attempt(f"/v1/orders/{thing}") for thing in (things.order, things.block)],
        "GET /v1/customers/{customer}/orders": [
            *(Attempt(f"/v1/customers/{person}/orders") for person in people),
            Attempt(f"/v1/customers/alice/orders?cursor={things.order}"),
        ],
        "GET /v1/customers/{customer}/credits": [
            Attempt(f"/v1/customers/{person}/credits?include_blocks=true&metric={things.app}") for person in people
        ],
        "GET /v1/customers/{customer}/transactions": [
            *(Attempt(f"/v1/customers/{person}/transactions") for person in people),
            Attempt(f"/v1/customers/{things.customer}/transactions?cursor={things.block}"),
        ],
        "POST /v1/customers": [
            Attempt("/v1/customers", {"external_id": things.customer}),
            Attempt("/v1/customers", {"external_id": things.user, "metadata": {"a": 1}}, once),
        ],
        "GET /v1/customers": [
            Attempt(f"/v1/customers?external_id={things.customer}"),
            Attempt(f"/v1/customers?cursor={things.customer}", same=False),
        ],
        "GET /v1/customers/{customer}": [Attempt(f"/v1/customers/{person}") for person in people],
        "PATCH /v1/customers/{customer}": [
            Attempt(f"/v1/customers/{person}", {"metadata": {"a": 1}, "settings": {"auto_buy_enabled": True}})
            for person in people
        ],
        "DELETE /v1/customers/{customer}": [Attempt(f"/v1/customers/{person}") for person in people],
        "GET /v1/customer-by-external-id/{external_id}": [
            Attempt(f"/v1/customer-by-external-id/{person}") for person in people
        ],
        "PATCH /v1/customer-by-external-id/{external_id}": [
            Attempt(f"/v1/customer-by-external-id/{person}", {"metadata": {"a": 1}}) for person in people
        ],
        "GET /v1/customer-by-external-id/{external_id}/credits": [
            Attempt(f"/v1/customer-by-external-id/{person}/credits") for person in people
        ],
        "GET /v1/tenants/{tenant}/config": [Attempt(f"/v1/tenants/{things.tenant}/config")],
        "PATCH /v1/tenants/{tenant}/config": [
            Attempt(f"/v1/tenants/{things.tenant}/config", {"default_grant": {"credits": 1000}})
        ],
        "GET /v1/events": [
            *(Attempt(f"/v1/events?customer_id={person}") for person in people),
            Attempt(f"/v1/events?type=credit.granted&cursor={things.event}", same=False),
        ],
        "GET /v1/events/{event_id}": [Attempt(f"/v1/events/{things.event}")],
        "POST /v1/events/{event_id}/redeliver": [
            Attempt(f"/v1/events/{things.event}/redeliver", {}, once),
            Attempt(f"/v1/events/{things.event}/redeliver", {"endpoint": things.endpoint}),
        ],
        "GET /v1/webhook-endpoints": [
            Attempt("/v1/webhook-endpoints"),
            Attempt(f"/v1/webhook-endpoints?cursor={things.endpoint}", same=False),
        ],
        "POST /v1/webhook-endpoints": [Attempt("/v1/webhook-endpoints", {"url": "https://ours.invalid/"}, once)],
        "GET /v1/webhook-endpoints/{endpoint_id}": [Attempt(f"/v1/webhook-endpoints/{things.endpoint}")],
        "PATCH /v1/webhook-endpoints/{endpoint_id}": [
            Attempt(f"/v1/webhook-endpoints/{things.endpoint}", {"url": "https://taken.invalid/"}),
            Attempt(f"/v1/webhook-endpoints/{things.endpoint}", {"status": "disabled"}, {"If-Match": '"1"'}),
        ],
        "DELETE /v1/webhook-endpoints/{endpoint_id}": [Attempt(f"/v1/webhook-endpoints/{things.endpoint}")],
        "POST /v1/webhook-endpoints/{endpoint_id}/rotate-secret": [
            Attempt(f"/v1/webhook-endpoints/{things.endpoint}/rotate-secret", {}, once)
        ],
        "GET /v1/webhook-endpoints/{endpoint_id}/deliveries": [
            Attempt(f"/v1/webhook-endpoints/{things.endpoint}/deliveries"),
            Attempt(f"/v1/webhook-endpoints/{things.endpoint}/deliveries?cursor={things.event}"),
        ],
        "GET /v1/customers/{customer}/entitlements/{metric}": [
            Attempt(f"/v1/customers/{person}/entitlements/{name}") for person in people for name in metrics
        ],
        "GET /v1/customer-by-external-id/{external_id}/entitlements/{metric}": [
            Attempt(f"/v1/customer-by-external-id/{person}/entitlements/{things.metric_key}") for person in people
        ],
        "GET /v1/entitlements/check": [
            *(Attempt(f"/v1/entitlements/check?customer_id={person}&feature_key={metrics[1]}") for person in people),
            *(Attempt(f"/v1/entitlements/check?end_user_id=alice&feature_key={name}&units=2") for name in metrics),
        ],
        "GET /v1/apps": [Attempt("/v1/apps"), Attempt(f"/v1/apps?tenant={things.tenant}")],
        "POST /v1/apps": [Attempt("/v1/apps", {"name": "Another"}, once)],
        "PATCH /v1/apps/{app_id}": [Attempt(f"/v1/apps/{things.app}", {"name": "Taken", "markup_bps": 9_999})],
        "GET /v1/keys": [Attempt("/v1/keys")],
        "POST /v1/keys": [
            Attempt("/v1/keys", {"app_id": things.app, "mode": mode, "name": "Taken"}, once) for mode in MODES
        ],
        "POST /v1/keys/{key_id}/revoke": [Attempt(f"/v1/keys/{things.key}/revoke", headers=once)],
        "GET /v1/usage": [
            Attempt("/v1/usage?group_by=customer,metadata.note"),
            Attempt(f"/v1/usage?group_by=app,metric,day&billable_metric_key={things.app}"),
            *(Attempt(f"/v1/usage?{name}={person}") for name in ("customer_id", "end_user_id") for person in people),
            Attempt(f"/v1/usage?group_by=metadata.{things.user}"),
        ],
        "GET /v1/budgets": [Attempt("/v1/budgets"), Attempt(f"/v1/budgets?cursor={things.budget}", same=False)],
        "POST /v1/budgets": [
            *(
                Attempt("/v1/budgets", {"subject": {"type": kind, "id": thing}, **MONTHLY}, once)
                for kind, thing in (
                    ("tenant", things.tenant),
                    ("app", things.app),
                    ("key", things.key),
                    ("customer", things.customer),
                    ("customer", things.user),
                )
            ),
        ],
        "GET /v1/budgets/{budget_id}": [Attempt(f"/v1/budgets/{things.budget}")],
        "PATCH /v1/budgets/{budget_id}": [Attempt(f"/v1/budgets/{things.budget}", {"credits": 0})],
        "POST /v1/budgets/{budget_id}/archive": [Attempt(f"/v1/budgets/{things.budget}/archive", headers=once)],
        "POST /v1/billable-metrics": [
            Attempt("/v1/billable-metrics", {"key": things.metric}),
            Attempt("/v1/billable-metrics", {"key": things.metric_key, "name": "Taken"}, once),
        ],
        "GET /v1/billable-metrics": [
            Attempt("/v1/billable-metrics", same=False),
            Attempt(f"/v1/billable-metrics?cursor={things.metric}", same=False),
        ],
        # After the one before, the first tenant has a metric of that key, too: only the id is the other's alone.
        "GET /v1/billable-metrics/{metric}": [Attempt(f"/v1/billable-metrics/{name}") for name in metrics],
        "PATCH /v1/billable-metrics/{metric}": [
            Attempt(f"/v1/billable-metrics/{name}", {"name": "Taken"}) for name in metrics
        ],
        "POST /v1/metering-rules": [
            Attempt("/v1/metering-rules", {"billable_metric_key": name, **price}, once) for name in metrics
        ],
        "GET /v1/metering-rules": [
            Attempt(f"/v1/metering-rules?billable_metric_key={things.metric}"),
            Attempt(f"/v1/metering-rules?cursor={things.rule}", same=False),
        ],
        "GET /v1/metering-rules/{rule_id}": [Attempt(f"/v1/metering-rules/{things.rule}")],
        "PATCH /v1/metering-rules/{rule_id}": [Attempt(f"/v1/metering-rules/{things.rule}", {"credit_cost": 1})],
        "POST /v1/metering-rules/{rule_id}/archive": [Attempt(f"/v1/metering-rules/{things.rule}/archive")],
        "POST /v1/usage": [
            *(Attempt("/v1/usage", {**name, "billable_metric_key": things.metric_key}, once) for name in names),
            Attempt("/v1/usage", {**names[1], "feature_key": things.metric}),
        ],
        "POST /v1/usage/batch": [
            Attempt("/v1/usage/batch", {"events": [{**name, "feature_key": things.metric_key} for name in names]}),
            Attempt("/v1/usage/batch", {"events": [{**names[1], "feature_key": things.metric_key}]}, once),
        ],
        "POST /v1/billable-metrics/{metric}/archive": [
            Attempt(f"/v1/billable-metrics/{name}/archive") for name in metrics
        ],
        **autumn_attempts(things),
        "POST /chargly/v1/meter": [
            Attempt("/chargly/v1/meter", {"customerId": person, "event": things.metric_key, "credits": 1}, once)
            for person in people
        ],
        "POST /chargly/v1/checkout": [
            Attempt("/chargly/v1/checkout", {"customerId": person, "creditPackCode": "usd-5"}) for person in people
        ],
        "GET /chargly/v1/wallet": [Attempt(f"/chargly/v1/wallet?customerId={person}") for person in people],
        "GET /health/live": [Attempt("/health/live")],
        "GET /health/ready": [Attempt("/health/ready")],
        "GET /metrics": [Attempt("/metrics", same=False)],
    }


def autumn_attempts(things: Things) -> dict[str, list[Attempt]]:
    """The same in Autumn's dialect."""
    once = {"Idempotency-Key": things.idempotency_key}
    named = [
        {"customer_id": person, "feature_id": metric}
        for person in (things.customer, things.user)
        for metric in (things.metric, things.metric_key)
    ]
    checks = [*named, {**named[1], "send_event": True}, {**named[3], "lock": {"lock_id": f"lock-of-{things.user}"}}]
    bodies: dict[str, list[dict[str, Any]]] = {
        "check": checks,
        "balances.check": checks,
        "entitled": named,
        "track": named,
        "events": named,
        "balances.track": named,
        "balances.batch_track": [{"events": named}],
        "balances.finalize": [
            {"lock_id": lock, "action": action}
            for lock in (f"lock-of-{things.user}", things.reservation)
            for action in ("confirm", "release")
        ],
        "customers": [{"id": things.customer}, {"id": things.user, "name": "Taken"}],
    }
    tried = {
        f"POST /autumn/v1/{verb}": [Attempt(f"/autumn/v1/{verb}", body, once) for body in sent]
        for verb, sent in bodies.items()
    }
    return {
        **tried,
        "GET /autumn/v1/customers": [Attempt(f"/autumn/v1/customers?cursor={things.customer}", same=False)],
        "GET /autumn/v1/customers/{customer}": [
            Attempt(f"/autumn/v1/customers/{person}") for person in (things.customer, things.user)
        ],
    }


async def add_up(office: Office, scope: Scope) -> None:
    """Add up the usage of *scope*, if the gateway does not do it at this moment."""
    database = office.gateway.services.database
    while await waiting(database, scope):
        await Rollups(database).fold_page(scope)


async def settle_in(office: Office, name: str) -> dict[str, Things]:
    """A further tenant with something in every table, live and test; what could be named of it, by mode."""
    services = office.gateway.services
    books = Books(services.database, services.ledger, services.tenants, services.customers)
    tenant = await add_tenant(books, f"{name} Limited", unfunded_limit=CREDIT.parse("100"))
    app = await services.tenants.create_app(tenant.id, f"{name} App", markup_bps=1_234)
    settled: dict[str, Things] = {}
    for mode in MODES:
        key = await services.tenants.create_key(
            tenant.id, mode, app_id=app.id, name=f"{name} Key", scopes=list(KeyScope)
        )
        label = office.keys.setdefault(f"{name}-{mode}", key.token) and f"{name}-{mode}"
        await give(books, app_wallet(tenant.id, mode, app.id), Gift(amount=CREDIT.parse("5000"), source="test"))
        user, once = f"{name}-user", f"{name}-key"
        made = await office.post(
            "/v1/customers", {"external_id": user, "metadata": {"note": f"{name}-note"}}, key=label, once=once
        )
        hook = {"url": f"https://{name}-receiver.invalid/", "description": f"{name}-hook"}
        endpoint = await office.post("/v1/webhook-endpoints", hook, key=label, once=once)
        grant = {
            "customer_id": user,
            "credits": 5_000_000,
            "source": f"{name}-source",
            "expires_at": "2096-01-01T00:00:00Z",
        }
        block = await office.post("/v1/topup/grant", grant, key=label, once=once)
        metric = await office.post("/v1/billable-metrics", {"key": f"{name}-metric"}, key=label, once=once)
        price = {"billable_metric_key": f"{name}-metric", "cost_type": "flat", "credit_cost": 1000}
        rule = await office.post("/v1/metering-rules", price, key=label, once=once)
        await office.post("/v1/funding/pool", {"credits": 1_000_000}, key=label, once=once)
        await office.post("/v1/funding/grant", {"customer_id": user, "amount": "0.5"}, key=label, once=once)
        budget = await office.post(
            "/v1/budgets",
            {"subject": {"type": "customer", "id": user}, "name": f"{name}-budget", **MONTHLY},
            key=label,
            once=once,
        )
        answer = await office.ask(
            "POST", "/v1/chat/completions", CHAT, key=label, once=once, headers={"X-Quota-User": user}
        )
        assert answer.status_code == 200, answer.text
        (event, *_) = (await office.get(f"/v1/events?customer_id={user}", key=label))["data"]
        held = await office.post("/v1/reservations", {"customer_id": user, "credits": 1000}, key=label, once=once)
        lock = {"customer_id": user, "feature_id": f"{name}-metric", "lock": {"lock_id": f"lock-of-{user}"}}
        assert (await office.post("/autumn/v1/check", lock, key=label))["allowed"]
        pack = await office.post("/v1/packs", {**PACK, "key": user}, key=label, once=once)
        await office.post(f"/v1/customers/{user}/packs", {"pack": user}, key=label, once=once)
        sold = await office.post("/v1/checkout", {"customer_id": user, "package_id": "usd-5"}, key=label, once=once)
        # What was measured outside the proxy may have metadata of the tenant's own.
        scope = Scope(tenant.id, mode)
        await commit(services.database, plain(1, scope=scope, customer=made["id"], metadata={"note": f"{name}-note"}))
        await add_up(office, scope)
        settled[mode] = Things(
            tenant=tenant.id,
            app=app.id,
            key=key.info.id,
            customer=made["id"],
            user=user,
            request=answer.headers["x-request-id"],
            block=block["ledger_id"],
            endpoint=endpoint["id"],
            event=event["id"],
            budget=budget["id"],
            reservation=held["id"],
            pack=pack["id"],
            metric=metric["id"],
            metric_key=f"{name}-metric",
            rule=rule["id"],
            order=sold["order_id"],
            idempotency_key=once,
        )
    return settled


def rows_of(database_url: str, tenant: str) -> dict[str, list[str]]:
    """Every row of a tenant, in every table, as nobody but the superuser can see them."""
    tables = {name: "id" if name == "tenants" else "tenant" for name in SQLModel.metadata.tables}
    if database_url.startswith("sqlite:"):
        with sqlite3.connect(database_url.removeprefix("sqlite:///")) as file:
            found = {
                table: [str(row) for row in file.execute(f"SELECT * FROM {table} WHERE {owner} = ?", (tenant,))]
                for table, owner in tables.items()
            }
        file.close()
    else:
        with psycopg.connect(database_url.replace("farebox_login@", "postgres@")) as server:
            found = {
                table: [str(row) for row in server.execute(f"SELECT * FROM {table} WHERE {owner} = %s", (tenant,))]
                for table, owner in tables.items()
            }
    return {table: sorted(rows) for table, rows in found.items()}


def same_for_all(text: str, things: Things) -> str:
    """An answer without what differs from one request to the next: names, and numbers, as balances go down."""
    for thing in things.all:
        text = text.replace(thing, "<named>")
    for what, put in (
        (TOKEN, "<key>"),
        (SOME_ID, "<id>"),
        (COMPLETION, "<id>"),
        (PAGE, "<id>"),
        (LAST4, "<last4>"),
        (NUMBER, "<n>"),
    ):
        text = what.sub(put, text)
    return text


@pytest.fixture
def office(till: Office) -> Office:
    """All of it is walked, payments as well."""
    return till


@pytest.fixture
async def neighbours(office: Office) -> tuple[Office, dict[str, Things]]:
    """The office's first tenant, with data of its own, beside another with as much."""
    theirs = await settle_in(office, "theirs")
    await office.fund_developer("100")
    for key in ("live", "test"):
        await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 5_000_000}, key=key)
        assert (await office.chat(key=key)).status_code == 200
        await office.post("/v1/packs", {**PACK, "key": "our-pack"}, key=key)
    await stand_still(office)
    return office, theirs


async def stand_still(office: Office) -> None:
    """Wait until every event has its deliveries, and then deliver no more: nothing changes but what is asked for."""
    url = office.gateway.services.settings.database_url
    deadline = asyncio.get_running_loop().time() + 20
    while pending_events(url):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.005)
    await office.gateway.services.webhooks.stop()


def pending_events(database_url: str) -> int:
    query = "SELECT count(*) FROM ledger_event WHERE delivered_at_us IS NULL"
    if database_url.startswith("sqlite:"):
        with contextlib.closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as file:
            return int(file.execute(query).fetchone()[0])
    with psycopg.connect(database_url.replace("farebox_login@", "postgres@")) as server:
        return int(server.execute(query).fetchone()[0])  # type: ignore[index]


async def test_no_route_shows_or_moves_anything_of_another_tenant(
    neighbours: tuple[Office, dict[str, Things]], log: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("httpx"), "disabled", True)  # It tells what the test asks, not the gateway.
    office, theirs = neighbours
    url = office.gateway.services.settings.database_url
    tenant = theirs["live"].tenant
    before = rows_of(url, tenant)
    assert {table for table, rows in before.items() if not rows} == OPERATORS, "the walk wants a row in every table"
    secrets = {*SOME_ID.findall(str(before)), "theirs", tenant, *office.keys.values()}
    assert len(secrets) > 20
    log.truncate(0)

    routes = (await office.ask_plain("/openapi.json")).json()["paths"]
    walked = attempts(theirs["live"])
    assert {f"{method.upper()} {path}" for path, methods in routes.items() for method in methods} == walked.keys()
    unknown = nobodys()
    for mode in MODES:
        walked, unnamed = attempts(theirs[mode]), attempts(unknown)
        for route, tried in walked.items():
            method = route.partition(" ")[0]
            for attempt, control in zip(tried, unnamed[route], strict=True):
                for key in OURS:
                    context = (route, attempt, key)
                    answer = await office.ask(method, attempt.path, attempt.body, key=key, headers=attempt.headers)
                    other = await office.ask(method, control.path, control.body, key=key, headers=control.headers)
                    said = f"{answer.text} {json.dumps(dict(answer.headers))}"
                    for sent in theirs[mode].all:
                        said = said.replace(sent, "")
                    assert not [secret for secret in secrets if secret in said], context
                    assert answer.status_code == other.status_code, (context, answer.text, other.text)
                    if attempt.same:
                        assert same_for_all(answer.text, theirs[mode]) == same_for_all(other.text, unknown), context
    for path in PUBLIC:
        assert not [secret for secret in secrets if secret in (await office.ask_plain(path)).text], path
    assert rows_of(url, tenant) == before
    logged = log.getvalue()
    assert not [secret for secret in secrets if secret in logged], logged


async def test_a_key_of_theirs_with_our_secret_is_nobodys(neighbours: tuple[Office, dict[str, Things]]):
    office, _ = neighbours
    kind, ours = office.keys["live"].rsplit("_", 1)
    theirs, secret = office.keys["theirs-live"].rsplit("_", 1)
    for mixed in (f"{kind}_{secret}", f"{theirs}_{ours}", office.keys["theirs-live"].replace("live", "test", 1)):
        office.keys["mixed"] = mixed
        assert (await office.refused("GET", "/v1/customers", key="mixed"))[:2] == (401, "invalid_api_key")


async def test_one_name_is_another_customer_for_each_tenant_and_mode(neighbours: tuple[Office, dict[str, Things]]):
    office, theirs = neighbours
    found = {theirs[mode].customer for mode in MODES}
    for key in ("live", "test"):
        made = await office.post("/v1/customers", {"external_id": "theirs-user"}, key=key)
        assert made["metadata"] == {}
        credits = await office.get(f"/v1/customers/{made['id']}/credits", key=key)
        assert credits["balance"] == 0
        found.add(made["id"])
    assert len(found) == 4


async def test_a_fault_is_logged_without_what_was_asked_or_by_whom(
    neighbours: tuple[Office, dict[str, Things]], log: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("httpx"), "disabled", True)
    office, theirs = neighbours
    things = theirs["live"]

    def broken(tenant_id: str, mode: str) -> Any:
        """A mistake of ours in a query: the driver's message would have its values."""
        named = (col(Customer.id) == things.customer, col(Customer.tenant) == tenant_id, col(Customer.mode) == mode)
        return select(literal_column("no_such_column")).where(*named)

    monkeypatch.setattr("gateway.identity.customers.select_customers", broken)
    log.truncate(0)
    answer = await office.ask("GET", f"/v1/customers/{things.customer}", key="live")
    assert answer.status_code in (500, 503)
    logged = log.getvalue()
    assert answer.status_code == 503 or 'column \\"no_such_column\\" does not exist' in logged
    for secret in (*things.all, *office.keys.values(), office.tenant):
        assert secret not in logged, logged
        assert secret not in answer.text.replace(things.customer, "")
