"""One idempotency key, fifty times at once: one effect and one answer, for every POST and PATCH that there is.

A row arranges what its request needs, and counts how often the request has taken effect. A route without a row fails
the walk. A DELETE takes no key: what is gone is gone, and whoever comes later is told so.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from gateway.app import Gateway
from tests.gateway.office import Office
from tests.gateway.rig import open_store

AT_ONCE = 50
WHILE_IT_RUNS = 409
SHOWN_ONCE = ("duplicate", "key", "secret")
"""Members of an answer that a repetition does not have, or that tell of the repetition itself."""

CHANGES_NOTHING = {"POST /v1/quote", "POST /autumn/v1/entitled"}
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}
PACK = {"key": "hour", "name": "Hour", "price": 1000, "credits": 2000, "duration_seconds": 3600}


@pytest.fixture
def office(till: Office) -> Office:
    return till


@dataclass(frozen=True)
class Asked:
    """A request, and *other*, a body of it that asks for something else; None where it has none."""

    path: str
    body: dict[str, Any] | None
    other: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """*effects* is how often the request has taken effect since it was arranged."""

    route: str
    arrange: Callable[[Office], Awaitable[Asked]]
    effects: Callable[[Office, Asked], Awaitable[int]]
    key: str = "live"

    @property
    def method(self) -> str:
        return self.route.partition(" ")[0]


async def lines(office: Office, kind: str) -> int:
    """How many lines of ann's statement are of this kind."""
    page = await office.get("/v1/customers/ann/transactions?limit=200")
    return sum(line["type"] == kind for line in page["data"])


async def fund(office: Office) -> str:
    """Give ann ten credits; the block."""
    made = await office.post("/v1/topup/grant", {"customer_id": "ann", "credits": 10_000})
    block: str = made["ledger_id"]
    return block


async def reserve(office: Office, credits: int = 4000) -> dict[str, Any]:
    await fund(office)
    made: dict[str, Any] = await office.post("/v1/reservations", {"customer_id": "ann", "credits": credits})
    return made


async def a_grant(office: Office) -> Asked:
    return Asked("/v1/topup/grant", {"customer_id": "ann", "credits": 700}, {"customer_id": "ann", "credits": 701})


async def grants(office: Office, asked: Asked) -> int:
    return await lines(office, "grant")


async def a_capped_grant(office: Office) -> Asked:
    await office.post("/v1/topup/grant", {"customer_id": "ann", "credits": 900, "source": "monthly"})
    body = {"customer_id": "ann", "credits": 500, "source": "monthly", "accumulation_cap": 1000}
    return Asked("/v1/topup/grant", body, {**body, "accumulation_cap": 2000})


async def capped_grants(office: Office, asked: Asked) -> int:
    balance = (await office.get("/v1/customers/ann/credits"))["balance"]
    return await lines(office, "grant") - 1 if balance == 1000 else -1


async def a_pool(office: Office) -> Asked:
    await office.fund_developer("100")
    return Asked("/v1/funding/pool", {"credits": 1000}, {"credits": 1001})


async def pool_moves(office: Office, asked: Asked) -> int:
    balance: int = (await office.get("/v1/funding"))["pool"]["balance"]
    return balance // 1000


async def a_gift(office: Office) -> Asked:
    await office.fund_developer("100")
    await office.post("/v1/funding/pool", {"credits": 90_000})
    body = {"customer_id": "ann", "amount": "0.01"}
    return Asked("/v1/funding/grant", body, {**body, "amount": "0.02"})


async def a_reservation(office: Office) -> Asked:
    await fund(office)
    body = {"customer_id": "ann", "credits": 100}
    return Asked("/v1/reservations", body, {**body, "credits": 101})


async def another_reservation(office: Office) -> Asked:
    return replace(await a_reservation(office), path="/v1/reserve")


async def reservations(office: Office, asked: Asked) -> int:
    reserved: int = (await office.get("/v1/customers/ann/credits"))["reserved"]
    return reserved // 100


async def a_commit(office: Office) -> Asked:
    made = await reserve(office)
    return Asked(f"/v1/reservations/{made['id']}/commit", {"credits": 300}, {"credits": 301})


async def a_partial_commit(office: Office) -> Asked:
    asked = await a_commit(office)
    return replace(asked, body={"credits": 300, "final": False}, other={"credits": 300})


async def charges(office: Office, asked: Asked) -> int:
    return await lines(office, "charge")


async def an_extension(office: Office) -> Asked:
    made = await reserve(office)
    return Asked(f"/v1/reservations/{made['id']}/extend", {"credits": 100}, {"credits": 101})


async def extensions(office: Office, asked: Asked) -> int:
    reserved: int = (await office.get("/v1/customers/ann/credits"))["reserved"]
    return (reserved - 4000) // 100


async def a_release(office: Office) -> Asked:
    made = await reserve(office)
    await reserve(office)
    return Asked(f"/v1/reservations/{made['id']}/release", None)


async def releases(office: Office, asked: Asked) -> int:
    reserved: int = (await office.get("/v1/customers/ann/credits"))["reserved"]
    return (8000 - reserved) // 4000


async def a_refund(office: Office) -> Asked:
    made = await reserve(office)
    done = await office.post(f"/v1/reservations/{made['id']}/commit", {"credits": 4000})
    return Asked(f"/v1/requests/{done['request_id']}/refund", {"credits": 50}, {})


async def refunds(office: Office, asked: Asked) -> int:
    return await lines(office, "refund")


async def a_revocation(office: Office) -> Asked:
    block = await fund(office)
    return Asked(f"/v1/customers/ann/credits/{block}/revoke", {"credits": 100}, {"credits": 100, "clawback": True})


async def revocations(office: Office, asked: Asked) -> int:
    return await lines(office, "revocation")


async def a_customer(office: Office) -> Asked:
    return Asked("/v1/customers", {"external_id": "ann"}, {"external_id": "bob"})


async def customers(office: Office, asked: Asked) -> int:
    return len((await office.get("/v1/customers"))["data"])


async def listed(office: Office, path: str, **fields: Any) -> int:
    """How many things a list has with these values."""
    things = (await office.get(f"{path}?limit=200", key="owner"))["data"]
    return sum(all(thing[name] == value for name, value in fields.items()) for thing in things)


def in_list(path: str, **fields: Any) -> Callable[[Office, Asked], Awaitable[int]]:
    async def effects(office: Office, asked: Asked) -> int:
        return await listed(office, path, **fields)

    return effects


async def versions(office: Office, asked: Asked) -> int:
    """How often the thing at the path has changed; an action's path has one step more."""
    path = asked.path
    for action in ("/archive", "/rotate-secret"):
        path = path.removesuffix(action)
    version: int = (await office.get(path, key="owner"))["version"]
    return version - 1


async def a_metric(office: Office) -> str:
    await office.post("/v1/billable-metrics", {"key": "chat_message"})
    rule = await office.post(
        "/v1/metering-rules", {"billable_metric_key": "chat_message", "cost_type": "per_unit", "credit_cost": 100}
    )
    rule_id: str = rule["id"]
    return rule_id


async def a_new_metric(office: Office) -> Asked:
    return Asked("/v1/billable-metrics", {"key": "sms"}, {"key": "sms", "overage_policy": "allow"})


async def a_metric_change(office: Office) -> Asked:
    await a_metric(office)
    body = {"overage_policy": "allow"}
    return Asked("/v1/billable-metrics/chat_message", body, {**body, "archived": False})


async def a_metrics_end(office: Office) -> Asked:
    await a_metric(office)
    return Asked("/v1/billable-metrics/chat_message/archive", None)


async def a_new_rule(office: Office) -> Asked:
    await a_metric(office)
    body = {"billable_metric_key": "chat_message", "cost_type": "flat", "credit_cost": 7}
    return Asked("/v1/metering-rules", body, {**body, "credit_cost": 8})


async def a_rule_change(office: Office) -> Asked:
    return Asked(f"/v1/metering-rules/{await a_metric(office)}", {"unit_cost": 7}, {"unit_cost": 8})


async def a_rules_end(office: Office) -> Asked:
    return Asked(f"/v1/metering-rules/{await a_metric(office)}/archive", None)


async def rules(office: Office, asked: Asked) -> int:
    return await listed(office, "/v1/metering-rules") - 1


async def a_usage_event(office: Office) -> Asked:
    await a_metric(office)
    await fund(office)
    body = {"customer_id": "ann", "billable_metric_key": "chat_message", "units": 2}
    return Asked("/v1/usage", body, {**body, "units": 3})


async def a_batch(office: Office) -> Asked:
    event = (await a_usage_event(office)).body
    return Asked("/v1/usage/batch", {"events": [event, event]}, {"events": [event]})


async def batches(office: Office, asked: Asked) -> int:
    events = await charges(office, asked)
    return events // 2 if events % 2 == 0 else -1


def autumns(path: str, **more: Any) -> Callable[[Office], Awaitable[Asked]]:
    """Two uses of a feature, tracked in Autumn's words."""

    async def a_tracked_event(office: Office) -> Asked:
        await a_usage_event(office)
        body = {"customer_id": "ann", "feature_id": "chat_message", **more}
        return Asked(f"/autumn/v1/{path}", body, {**body, "feature_id": "sms"})

    return a_tracked_event


async def autumns_batch(office: Office) -> Asked:
    event = (await autumns("track", value=2)(office)).body
    return Asked("/autumn/v1/balances.batch_track", {"events": [event, event]}, {"events": [event]})


async def autumns_end_of_a_lock(office: Office) -> Asked:
    await a_usage_event(office)
    body = {"customer_id": "ann", "feature_id": "chat_message", "lock": {"lock_id": "one", "enabled": True}}
    await office.post("/autumn/v1/check", body)
    ended = {"lock_id": "one", "action": "confirm"}
    return Asked("/autumn/v1/balances.finalize", ended, {**ended, "override_value": 3})


async def autumns_customer(office: Office) -> Asked:
    return Asked("/autumn/v1/customers", {"id": "ann"}, {"id": "bob"})


async def charglys_event(office: Office) -> Asked:
    await a_usage_event(office)
    body = {"event": "chat_message", "customerId": "ann"}
    return Asked("/chargly/v1/meter", body, {**body, "credits": 3})


async def a_pack(office: Office) -> Asked:
    return Asked("/v1/packs", PACK, {**PACK, "price": 1})


async def a_pack_change(office: Office) -> Asked:
    await office.post("/v1/packs", PACK)
    return Asked("/v1/packs/hour", {"price": 1}, {"price": 1, "duration_seconds": None})


async def a_packs_end(office: Office) -> Asked:
    await office.post("/v1/packs", PACK)
    return Asked("/v1/packs/hour/archive", None)


async def a_purchase(office: Office) -> Asked:
    await office.post("/v1/packs", PACK)
    await fund(office)
    return Asked("/v1/customers/ann/packs", {"pack": "hour"}, {"pack": "hour", "price": 1})


async def purchases(office: Office, asked: Asked) -> int:
    return len((await office.get("/v1/customers/ann/packs"))["data"])


async def a_budget(office: Office) -> Asked:
    body = {"subject": {"type": "customer", "id": "ann"}, "credits": 1000, "period": {"every": "day"}}
    return Asked("/v1/budgets", body, {**body, "credits": 1001})


async def a_budget_change(office: Office) -> Asked:
    asked = await a_budget(office)
    made = await office.post(asked.path, asked.body)
    return Asked(f"/v1/budgets/{made['id']}", {"credits": 2000}, {"credits": 2000, "name": "Two"})


async def a_budgets_end(office: Office) -> Asked:
    return replace(asked := await a_budget_change(office), path=f"{asked.path}/archive", body=None, other=None)


HOOK = {"url": "https://receiver.invalid/"}


async def an_endpoint(office: Office) -> Asked:
    return Asked("/v1/webhook-endpoints", HOOK, {**HOOK, "description": "Another"})


async def a_known_endpoint(office: Office) -> str:
    """The path of an endpoint to which nothing is delivered."""
    await office.gateway.services.webhooks.stop()
    made = await office.post("/v1/webhook-endpoints", HOOK)
    return f"/v1/webhook-endpoints/{made['id']}"


async def an_endpoint_change(office: Office) -> Asked:
    return Asked(await a_known_endpoint(office), {"description": "Mine"}, {"status": "disabled"})


async def a_rotation(office: Office) -> Asked:
    path = await a_known_endpoint(office)
    return Asked(f"{path}/rotate-secret", {}, {"expire_current_after_seconds": 0})


async def a_redelivery(office: Office) -> Asked:
    await fund(office)
    event = (await office.get("/v1/events"))["data"][0]["id"]
    endpoint = (await a_known_endpoint(office)).rpartition("/")[2]
    return Asked(f"/v1/events/{event}/redeliver", {}, {"endpoint": endpoint})


async def redeliveries(office: Office, asked: Asked) -> int:
    endpoint = (await office.get("/v1/webhook-endpoints"))["data"][0]["id"]
    return await listed(office, f"/v1/webhook-endpoints/{endpoint}/deliveries")


async def an_app(office: Office) -> Asked:
    return Asked("/v1/apps", {"name": "Second"}, {"name": "Third"})


async def apps(office: Office, asked: Asked) -> int:
    return len((await office.get("/v1/apps", key="owner"))["data"]) - 1


async def an_app_change(office: Office) -> Asked:
    body = {"markup_bps": 7}
    return Asked(f"/v1/apps/{office.app}", body, {**body, "archived": False})


async def app_versions(office: Office, asked: Asked) -> int:
    (app,) = (await office.get("/v1/apps", key="owner"))["data"]
    version: int = app["version"]
    return version - 1


async def a_key(office: Office) -> Asked:
    body = {"app_id": office.app, "name": "new"}
    return Asked("/v1/keys", body, {**body, "mode": "test"})


async def keys(office: Office, asked: Asked) -> int:
    return sum(key["name"] == "new" for key in (await office.get("/v1/keys", key="owner"))["data"])


async def a_keys_end(office: Office) -> Asked:
    made = await office.post("/v1/keys", {"app_id": office.app, "name": "new"}, key="owner")
    return Asked(f"/v1/keys/{made['id']}/revoke", None)


async def revoked_keys(office: Office, asked: Asked) -> int:
    return sum(key["revoked_at"] is not None for key in (await office.get("/v1/keys", key="owner"))["data"])


async def a_tenants_choice(office: Office) -> Asked:
    body = {"default_grant": {"credits": 5}}
    return Asked("/v1/tenants/me/config", body, {"default_grant": None})


async def a_customer_change(office: Office) -> Asked:
    await office.post("/v1/customers", {"external_id": "ann"})
    body = {"settings": {"auto_buy_enabled": False}}
    return Asked("/v1/customers/ann", body, {**body, "metadata": {}})


async def a_named_customers_change(office: Office) -> Asked:
    return replace(await a_customer_change(office), path="/v1/customer-by-external-id/ann")


async def a_checkout(office: Office) -> Asked:
    await office.post("/v1/customers", {"external_id": "ann"})
    body = {"customer_id": "ann", "package_id": "usd-5", "success_url": "https://example.com/paid"}
    return Asked("/v1/checkout", body, {**body, "package_id": "usd-10"})


async def charglys_checkout(office: Office) -> Asked:
    await office.post("/v1/customers", {"external_id": "ann"})
    body = {"customerId": "ann", "creditPackCode": "usd-5"}
    return Asked("/chargly/v1/checkout", body, {**body, "creditPackCode": "usd-10"})


async def a_chat(office: Office) -> Asked:
    await fund(office)
    return Asked("/v1/chat/completions", CHAT, {**CHAT, "max_tokens": 9}, headers={"X-Quota-User": "ann"})


async def a_users_chat(office: Office) -> Asked:
    return replace(await a_chat(office), path="/v1/users/ann/chat/completions", headers={})


RESERVATION = "/v1/reservations/{reservation_id}"
ENDPOINT = "/v1/webhook-endpoints/{endpoint_id}"

TABLE = [
    Row("POST /v1/topup/grant", a_grant, grants),
    Row("POST /v1/topup/grant", a_capped_grant, capped_grants),
    Row("POST /v1/funding/pool", a_pool, pool_moves),
    Row("POST /v1/funding/grant", a_gift, grants),
    Row("POST /v1/reservations", a_reservation, reservations),
    Row("POST /v1/reserve", another_reservation, reservations),
    Row(f"POST {RESERVATION}/commit", a_commit, charges),
    Row(f"POST {RESERVATION}/commit", a_partial_commit, charges),
    Row(f"POST {RESERVATION}/extend", an_extension, extensions),
    Row(f"POST {RESERVATION}/release", a_release, releases),
    Row("POST /v1/requests/{request_id}/refund", a_refund, refunds),
    Row("POST /v1/customers/{customer}/credits/{block_id}/revoke", a_revocation, revocations),
    Row("POST /v1/customers", a_customer, customers),
    Row("PATCH /v1/customers/{customer}", a_customer_change, versions),
    Row("PATCH /v1/customer-by-external-id/{external_id}", a_named_customers_change, versions),
    Row("POST /v1/billable-metrics", a_new_metric, in_list("/v1/billable-metrics")),
    Row("PATCH /v1/billable-metrics/{metric}", a_metric_change, versions),
    Row("POST /v1/billable-metrics/{metric}/archive", a_metrics_end, versions),
    Row("POST /v1/metering-rules", a_new_rule, rules),
    Row("PATCH /v1/metering-rules/{rule_id}", a_rule_change, rules),
    Row("POST /v1/metering-rules/{rule_id}/archive", a_rules_end, in_list("/v1/metering-rules", archived=True)),
    Row("POST /v1/usage", a_usage_event, charges),
    Row("POST /v1/usage/batch", a_batch, batches),
    Row("POST /v1/packs", a_pack, in_list("/v1/packs")),
    Row("PATCH /v1/packs/{pack}", a_pack_change, versions),
    Row("POST /v1/packs/{pack}/archive", a_packs_end, versions),
    Row("POST /v1/customers/{customer}/packs", a_purchase, purchases),
    Row("POST /v1/budgets", a_budget, in_list("/v1/budgets")),
    Row("PATCH /v1/budgets/{budget_id}", a_budget_change, versions),
    Row("POST /v1/budgets/{budget_id}/archive", a_budgets_end, versions),
    Row("POST /v1/webhook-endpoints", an_endpoint, in_list("/v1/webhook-endpoints")),
    Row(f"PATCH {ENDPOINT}", an_endpoint_change, versions),
    Row(f"POST {ENDPOINT}/rotate-secret", a_rotation, versions),
    Row("POST /v1/events/{event_id}/redeliver", a_redelivery, redeliveries),
    Row("POST /v1/apps", an_app, apps, key="owner"),
    Row("PATCH /v1/apps/{app_id}", an_app_change, app_versions, key="owner"),
    Row("POST /v1/keys", a_key, keys, key="owner"),
    Row("POST /v1/keys/{key_id}/revoke", a_keys_end, revoked_keys, key="owner"),
    Row("PATCH /v1/tenants/{tenant}/config", a_tenants_choice, versions, key="owner"),
    Row("POST /autumn/v1/track", autumns("track", value=2), charges),
    Row("POST /autumn/v1/events", autumns("events", value=2), charges),
    Row("POST /autumn/v1/balances.track", autumns("balances.track", value=2), charges),
    Row("POST /autumn/v1/check", autumns("check", required_balance=2, send_event=True), charges),
    Row("POST /autumn/v1/balances.check", autumns("balances.check", send_event=True), charges),
    Row("POST /autumn/v1/balances.batch_track", autumns_batch, batches),
    Row("POST /autumn/v1/balances.finalize", autumns_end_of_a_lock, charges),
    Row("POST /autumn/v1/customers", autumns_customer, customers),
    Row("POST /chargly/v1/meter", charglys_event, charges),
    Row("POST /v1/checkout", a_checkout, in_list("/v1/customers/ann/orders")),
    Row("POST /chargly/v1/checkout", charglys_checkout, in_list("/v1/customers/ann/orders")),
    Row("POST /v1/chat/completions", a_chat, charges),
    Row("POST /v1/users/{user}/chat/completions", a_users_chat, charges),
]


async def a_known_customer(office: Office) -> str:
    await fund(office)
    return "/v1/customers/ann"


ENDS = {
    "DELETE /v1/customers/{customer}": a_known_customer,
    f"DELETE {ENDPOINT}": a_known_endpoint,
}


@pytest.mark.sqlite
async def test_every_route_that_changes_something_has_a_row(office: Office):
    routes = (await office.ask_plain("/openapi.json")).json()["paths"]
    changing = {f"{method.upper()} {path}" for path, methods in routes.items() for method in methods if method != "get"}
    assert changing - CHANGES_NOTHING == {row.route for row in TABLE} | ENDS.keys()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.route} {row.arrange.__name__}")
async def test_one_key_fifty_times_at_once_has_one_effect_and_one_answer(office: Office, row: Row):
    asked = await row.arrange(office)

    async def ask(where: Office, body: dict[str, Any] | None = asked.body) -> httpx.Response:
        return await where.ask(row.method, asked.path, body, key=row.key, once="the-key", headers=asked.headers)

    answers = await asyncio.gather(*(ask(office) for _ in range(AT_ONCE)))

    answered = [answer for answer in answers if answer.status_code != WHILE_IT_RUNS]
    assert answered
    assert answered[0].status_code in (200, 201, 202), answered[0].text
    assert {answer.status_code for answer in answered} == {answered[0].status_code}
    assert len({without_what_is_shown_once(answer) for answer in answered}) == 1
    assert sum("x-idempotent-replayed" not in answer.headers for answer in answered) == 1
    assert await row.effects(office, asked) == 1

    async with another_process(office) as other:
        again = await ask(other)
        assert again.status_code == answered[0].status_code
        assert without_what_is_shown_once(again) == without_what_is_shown_once(answered[0])
        assert again.headers["x-idempotent-replayed"] == "true"
    if asked.other is not None:
        refused = await ask(office, asked.other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert await row.effects(office, asked) == 1


@pytest.mark.parametrize("route", ENDS)
async def test_what_is_deleted_fifty_times_at_once_is_gone_and_stays_so(office: Office, route: str):
    path = await ENDS[route](office)
    answers = await asyncio.gather(*(office.ask("DELETE", path) for _ in range(AT_ONCE)))
    assert {answer.status_code for answer in answers} in ({204}, {204, 404})
    async with another_process(office) as other:
        assert (await other.refused("DELETE", path))[:2] == (404, "not_found")
        assert (await other.refused("GET", path))[:2] == (404, "not_found")


def without_what_is_shown_once(answer: httpx.Response) -> str:
    said = answer.json()
    return str({name: value for name, value in said.items() if name not in SHOWN_ONCE})


@contextlib.asynccontextmanager
async def another_process(office: Office) -> AsyncIterator[Office]:
    """A gateway that remembers nothing, on the same database: as after a restart."""
    settings = office.gateway.services.settings
    apart = settings.model_copy(update={"journal_dir": settings.journal_dir / "other"})
    gateway = Gateway(apart, now_us=office.clock.now_us, open_store=open_store)
    await gateway.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway), base_url="http://farebox") as client:
            yield replace(office, gateway=gateway, client=client)
    finally:
        await gateway.stop()
