"""The document that clients are generated from: it is complete, and what it shows works."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from gateway.api.openapi import LINKS
from tests.gateway.office import Office

PREFIXES = {
    "cus",
    "blk",
    "rsv",
    "req",
    "evt",
    "whk",
    "mtr",
    "rul",
    "pck",
    "bud",
    "app",
    "key",
    "ten",
    "txn",
    "conv",
    "ord",
}
PREFIXES |= {"pay", "job", "companion", "user", "plan"}
"""Of our ids, and what tenants call their own things in the examples."""

METHODS = ("get", "post", "patch", "delete")
STREAMED = {"/v1/chat/completions", "/v1/users/{user}/chat/completions"}
SINGLE_PAGE = {"/v1/apps", "/v1/keys", "/v1/packages", "/v1/customers/{customer}/packs"}
"""Lists that are bounded, and come whole."""

NO_PAGE = {"/v1/models"}
"""OpenAI's own form of a list."""

Operation = dict[str, Any]


@pytest.fixture
def office(till: Office) -> Office:
    return till


@pytest.fixture
async def document(office: Office) -> dict[str, Any]:
    found: dict[str, Any] = (await office.ask_plain("/openapi.json")).json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, Operation]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def named(operation: Operation) -> set[str]:
    return {each["name"] for each in operation.get("parameters", ())}


def resolved(document: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in part:
        part = document["components"]["schemas"][part["$ref"].rpartition("/")[2]]
    return part


def body_examples(document: dict[str, Any], operation: Operation) -> list[Any]:
    content = operation["requestBody"]["content"]["application/json"]
    if "example" in content:
        return [content["example"]]
    schema = content["schema"]
    options = schema.get("anyOf", [schema])
    return [example for option in options for example in resolved(document, option).get("examples", ())]


async def test_the_document_is_valid_openapi(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        jsonschema_rs.meta.validate(schema), name
    references = set(re.findall(r'"\$ref": "#/components/(\w+)/([^"]+)"', json.dumps(document)))
    assert all(name in document["components"][kind] for kind, name in references)
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    for method, path, operation in operations(document):
        assert method in METHODS
        in_path = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path)), path


async def test_every_operation_says_what_it_does_takes_and_answers(document: dict[str, Any]):
    tags = {tag["name"] for tag in document["tags"]}
    for method, path, operation in operations(document):
        context = f"{method} {path}"
        assert operation["summary"], context
        assert operation["description"], context
        assert set(operation["tags"]) <= tags, context
        if not path.startswith("/v1"):
            continue
        assert operation["security"], context
        if "requestBody" in operation:
            assert body_examples(document, operation), context
        responses = operation["responses"]
        fine = [status for status in responses if status.startswith("2")]
        assert fine, context
        for status, response in responses.items():
            assert response["description"], (context, status)
            assert "X-Request-Id" in response["headers"], (context, status)
            if status == "204":
                assert "content" not in response, context
            elif status.startswith("2"):
                assert response["content"]["application/json"]["schema"], (context, status)
            else:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, (context, status)
        assert {"400", "401", "403", "404", "429", "503"} <= responses.keys(), context
        assert ("413" in responses) == ("requestBody" in operation), context
        assert ("422" in responses) == (method in ("post", "patch")), context
        assert ("412" in responses) == (method == "patch"), context


async def test_what_changes_something_takes_an_idempotency_key_and_a_patch_a_version(document: dict[str, Any]):
    for method, path, operation in operations(document):
        changes = method in ("post", "patch")
        assert ("Idempotency-Key" in named(operation)) == changes, path
        assert ("If-Match" in named(operation)) == (method == "patch"), path
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                continue
            assert ("X-Idempotent-Replayed" in response.get("headers", ())) == changes, path
            if method == "patch":
                assert "ETag" in response["headers"], path


async def test_every_list_is_a_page_with_cursor_and_limit(document: dict[str, Any]):
    lists = 0
    for method, path, operation in operations(document):
        if method != "get" or path in NO_PAGE or "200" not in operation["responses"]:
            continue
        content = operation["responses"]["200"]["content"].get("application/json", {"schema": {}})
        answer = resolved(document, content["schema"])
        if "next_cursor" not in answer.get("properties", {}):
            continue
        lists += 1
        data = "list" if path.startswith("/autumn/") else "data"
        assert answer["properties"].keys() == {data, "has_more", "next_cursor"}, path
        assert path in SINGLE_PAGE or {"cursor", "limit"} <= named(operation), path
    assert lists >= 12


async def test_every_id_in_an_example_has_a_prefix_of_ours(document: dict[str, Any]):
    found = set(re.findall(r'"([a-z]+)_[0-9a-z]{26}', json.dumps(document)))
    assert found
    assert found <= PREFIXES


async def test_every_link_leads_somewhere(document: dict[str, Any]):
    by_id = {operation["operationId"]: operation for _, _, operation in operations(document)}
    assert by_id.keys() >= LINKS.keys()
    for source, links in LINKS.items():
        for link in links:
            target = by_id[link.target]
            assert link.parameters.keys() <= named(target), (source, link)
            if link.body:
                schema = target["requestBody"]["content"]["application/json"]["schema"]
                assert link.body.keys() <= resolved(document, schema)["properties"].keys(), (source, link)


async def test_every_example_of_a_body_is_accepted(office: Office, document: dict[str, Any]):
    """Each with what it refers to made before, and asked with a key that may."""
    await office.fund_developer("100000")
    await office.gateway.services.webhooks.stop()
    tried = 0
    for method, path, operation in operations(document):
        if "requestBody" not in operation:
            continue
        for index, example in enumerate(body_examples(document, operation)):
            body = json.loads(json.dumps(example).replace("app_01k7m3v9c2q8x5t4n6r1b0w3ye", office.app))
            where = await path_with_things(office, path, f"{method}-{tried}")
            body = without_taken_names(path, body, tried)
            once = None if "idempotency_key" in body else f"{method} {path} {index}"
            answer = await office.ask(method.upper(), where, body, key="owner", once=once)
            assert answer.status_code < 300, (method, path, body, answer.text)
            tried += 1
    assert tried >= 35


METRICS = ("chat_message", "chat.reply", "image.generation", "image_generation", "images", "sms", "small-model-tokens")


async def path_with_things(office: Office, path: str, name: str) -> str:
    """The path to something that was just made, with what the examples name: a customer with credits, metrics with
    prices, a pool, and a pack."""
    grant = {"customer_id": "user_12345", "credits": 90_000_000}
    block = await office.post("/v1/topup/grant", grant, key="owner", once=f"grant {name}")
    await office.post("/v1/topup/grant", {**grant, "customer_id": "user_123"}, key="owner", once=f"another {name}")
    await office.post("/v1/funding/pool", {"credits": 1_000_000}, key="owner", once="pool")
    for key in METRICS:
        answer = await office.ask("POST", "/v1/billable-metrics", {"key": key}, key="owner")
        if answer.status_code == 201:
            price = {"billable_metric_key": key, "cost_type": "per_unit", "credit_cost": 1000}
            await office.post("/v1/metering-rules", price, key="owner")
    pack = {"key": "plan_1hr", "name": "Hour", "price": 100_000, "credits": 200_000, "duration_seconds": 3600}
    await office.ask("POST", "/v1/packs", pack, key="owner")
    things: dict[str, str] = {
        "customer": "user_12345",
        "external_id": "user_12345",
        "user": "user_12345",
        "block_id": block["ledger_id"],
        "metric": "chat_message",
        "pack": "plan_1hr",
        "app_id": office.app,
        "tenant": "me",
    }
    if "{reservation_id}" in path:
        held = {"customer_id": "user_12345", "billable_metric_key": "image_generation", "estimated_units": 4}
        things["reservation_id"] = (await office.post("/v1/reservations", held, key="owner"))["id"]
    if "{request_id}" in path:
        event = {"customer_id": "user_12345", "billable_metric_key": "chat_message"}
        things["request_id"] = (await office.ask("POST", "/v1/usage", event, key="owner")).json()["id"]
    if "{rule_id}" in path:
        price = {"billable_metric_key": "chat_message", "cost_type": "per_unit", "credit_cost": 1000}
        things["rule_id"] = (await office.post("/v1/metering-rules", price, key="owner"))["id"]
    if "{budget_id}" in path:
        budget = {"subject": {"type": "customer", "id": name}, "credits": 1, "period": {"every": "day"}}
        things["budget_id"] = (await office.post("/v1/budgets", budget, key="owner"))["id"]
    if "{endpoint_id}" in path or "{event_id}" in path:
        made = await office.post("/v1/webhook-endpoints", {"url": "https://example.com/"}, key="owner")
        things["endpoint_id"] = made["id"]
    if "{event_id}" in path:
        things["event_id"] = (await office.get("/v1/events", key="owner"))["data"][0]["id"]
    return path.format(**things)


def without_taken_names(path: str, body: Any, number: int) -> Any:
    """What was made for other examples has its name already; an endpoint of the example is nobody's."""
    if path in ("/v1/packs", "/v1/billable-metrics"):
        return {**body, "key": f"{body['key']}-{number}"}
    if path.endswith("/redeliver"):
        return {}
    return body


async def test_every_list_walks_over_all_of_its_things_once(office: Office):
    await office.gateway.services.webhooks.stop()
    for number in range(7):
        name = f"thing-{number}"
        await office.post("/v1/topup/grant", {"customer_id": name, "credits": 1000})
        await office.post("/v1/topup/grant", {"customer_id": "thing-0", "credits": 1000})
        await office.post("/v1/billable-metrics", {"key": name})
        price = {"billable_metric_key": name, "cost_type": "flat", "credit_cost": 1}
        await office.post("/v1/metering-rules", price)
        await office.ask("POST", "/v1/usage", {"customer_id": name, "billable_metric_key": name})
        await office.post("/v1/packs", {"key": name, "name": name, "price": 0, "credits": 1})
        budget = {"subject": {"type": "customer", "id": name}, "credits": 1000, "period": {"every": "day"}}
        await office.post("/v1/budgets", budget)
        await office.post("/v1/webhook-endpoints", {"url": f"https://{name}.invalid/"})
        await office.post("/v1/checkout", {"customer_id": "thing-0", "package_id": "usd-5"})
    for path in (
        "/v1/customers",
        "/v1/customers/thing-0/transactions",
        "/v1/customers/thing-0/orders",
        "/v1/billable-metrics",
        "/v1/metering-rules",
        "/v1/packs",
        "/v1/budgets",
        "/v1/webhook-endpoints",
        "/v1/events",
        "/v1/usage?group_by=metric",
    ):
        whole = (await office.get(with_query(path, "limit=200")))["data"]
        assert len(whole) >= 7, path
        walked: list[Any] = []
        cursor = ""
        while cursor is not None:
            page = await office.get(with_query(path, f"limit=3{cursor and '&cursor='}{cursor}"))
            assert page["has_more"] == (page["next_cursor"] is not None), path
            assert len(page["data"]) <= 3, path
            walked += page["data"]
            cursor = page["next_cursor"]
        assert walked == whole, path


def with_query(path: str, query: str) -> str:
    return f"{path}{'&' if '?' in path else '?'}{query}"
