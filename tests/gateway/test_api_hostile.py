"""Whatever stands in a field, the answer is ours: never a fault, always the envelope, and the books hold."""

import json
import re
from typing import Any, Final

import pytest

from gateway.api.route import BODY_BYTES_MAX
from gateway.clock import now_us
from gateway.stores import open_store
from ledger.verify import verify
from tests.gateway.office import Office

NUMBERS = [
    "0",
    "-0",
    "-1",
    "1",
    "1.5",
    "1e3",
    "1e400",
    "-1e400",
    "1e-400",
    "1e99999999999999999999",
    "9007199254740993",
    "9223372036854775808",
    "4611686018427387904",
    "1000000000000000000000000000000",
]
TEXTS = [
    "",
    "x",
    " ",
    "NaN",
    "Infinity",
    "-1",
    "1e9",
    "0.1",
    "\0",
    "\n",
    "\u2028",
    "\u202e",
    "\U0001f4a5",
    "cus_1",
    "app_1",
]
TEXTS += ["../..", "2036-01-01T00:00:00Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "live", "x" * 5000]
OTHERS = ["null", "true", "[]", "[[]]", "[null]", '["x"]', "{}", '{"a": 1}', '{"": ""}', '{"a": {"b": [1e400]}}']
OTHERS += ['"\\ud800"', "[" * 900 + "]" * 900]
NASTY = [*NUMBERS, *map(json.dumps, TEXTS), *OTHERS]

GRANT = {"credits": 1000, "priority": 1, "expires_at": "2096-01-01T00:00:00Z", "source": "a", "metadata": {}}
GRANT |= {"apps": ["a"], "metrics": ["a"], "models": ["a"], "idempotency_key": None}
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/topup/grant", {"customer_id": "a", **GRANT}),
    ("POST", "/v1/topup/grant", {"end_user_id": "a", "credits": 1, "metadata": {"priority": 1}}),
    ("POST", "/v1/funding/grant", {"external_user_id": "a", "amount": "0.5", "description": "a"}),
    ("POST", "/v1/funding/pool", {"amount": 0.5}),
    ("POST", "/v1/funding/pool", {"credits": 500}),
    ("POST", "/v1/customers", {"external_id": "a", "metadata": {"a": 1}}),
    ("POST", "/v1/apps", {"name": "a", "billing_mode": "user_pays", "markup_bps": 1, "on_disconnect": "cancel"}),
    ("PATCH", "/v1/apps/{app}", {"name": "a", "markup_bps": 1, "billing_mode": "user_pays", "archived": False}),
    ("POST", "/v1/keys", {"app_id": "a", "mode": "live", "name": "a", "scopes": ["proxy"]}),
    ("POST", "/v1/quote", {"model": "gpt-4o-mini", "messages": [], "max_tokens": 1, "n": 1, "stream": True}),
]


async def test_no_field_of_any_body_can_break_us(office: Office):
    await office.fund_developer("1000000")
    for method, path, body in BODIES:
        for field in body:
            for nasty in NASTY:
                if (field, nasty) == ("archived", "true"):
                    continue  # It would end the keys that the test asks with.
                written = {name: json.dumps(value) for name, value in body.items()} | {field: nasty}
                content = "{" + ", ".join(f'"{name}": {value}' for name, value in written.items()) + "}"
                key = "live" if path == "/v1/quote" else "owner"
                answer = await office.ask(method, path.format(app=office.app), key=key, content=content)
                assert answer.status_code < 500, (path, field, nasty[:40], answer.text)
    await _everything_can_be_shown(office)


async def test_no_name_in_a_path_or_query_can_break_us(office: Office):
    for name in (
        "%00",
        "%0a",
        "%ff",
        "%2e%2e",
        "..",
        "%2f",
        "a%2f..%2f..",
        "%F0%9F%92%A5",
        "x" * 3000,
        "cus_1",
        "*",
        "a b",
    ):
        for path in (
            f"/v1/customers/{name}",
            f"/v1/customers/{name}/credits?include_blocks=true&metric={name}&model={name}",
            f"/v1/customers/{name}/transactions?cursor={name}",
            f"/v1/customers?cursor={name}&external_id={name}",
            f"/v1/customers?limit={name}",
            f"/v1/requests/{name}?mode={name}",
            f"/v1/models/{name}",
            f"/v1/keys/{name}/revoke",
            f"/v1/apps/{name}",
            f"/{name}",
        ):
            for method in ("GET", "POST", "PATCH"):
                answer = await office.ask(method, path, key="owner")
                assert answer.status_code < 500, (method, path[:60], answer.text)


NO_BODIES: Final = {
    "cut off": b'{"customer_id": "a"',
    "nothing but spaces": b"   ",
    "two values": b"{} {}",
    "not UTF-8": b'{"name": "\xff\xfe"}',
    "half a character": b'{"name": "\\ud800"}',
    "a zero byte": b'{"name": "a"}\x00',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "an exponent of no decimal": b'{"credits": 1e99999999999999999999}',
    "a number of many digits": b'{"credits": ' + b"9" * 100_000 + b"}",
    "a list": b"[]",
    "a text": b'"{}"',
    "null": b"null",
    "not a number": b'{"credits": NaN}',
    "too large": b'{"name": "' + b"a" * BODY_BYTES_MAX + b'"}',
}
"""None of them is a body of any route; what has no body, or need not have one, ignores it or takes null for none."""

PROXIED: Final = ("/v1/chat/completions", "/v1/users/{user}/chat/completions", "/v1/quote")


async def test_what_is_no_body_is_refused_in_the_envelope_by_every_route(office: Office):
    routes = (await office.ask_plain("/openapi.json")).json()["paths"]
    for path, methods in routes.items():
        for method, operation in methods.items():
            required = operation.get("requestBody", {}).get("required", False)
            if not required:
                continue
            for name, content in NO_BODIES.items():
                # Each name in the path is one that nobody has, and the body is read before anybody looks for it.
                where = re.sub(r"{\w+}", "nobody", path)
                answer = await office.ask(method.upper(), where, key="owner", content=content)
                context = (method, path, name, answer.text)
                large = name == "too large" and path not in PROXIED
                assert answer.status_code == (413 if large else 400), context
                assert answer.json()["error"]["code"] == ("request_too_large" if large else "invalid_request"), context


async def test_every_route_refuses_who_has_no_key_in_the_envelope(office: Office):
    routes = (await office.ask_plain("/openapi.json")).json()["paths"]
    for path, methods in routes.items():
        for method in methods:
            if path.startswith("/v1"):
                where = re.sub(r"{\w+}", "nobody", path)
                refused = await office.refused(method.upper(), where, key="nobody's")
                assert refused[:2] == (401, "invalid_api_key"), (method, path)


async def test_what_is_nowhere_is_refused_in_the_envelope(office: Office):
    for path in ("/", "/v1", "/v1/nothing", "/v2/customers", "/v1//customers", "/v1/usage/"):
        assert (await office.refused("GET", path))[0] in (404, 405), path
    for method, path, allowed in (
        ("DELETE", "/v1/usage", "GET, POST"),
        ("PUT", "/v1/reservations", "POST"),
        ("POST", "/v1/entitlements/check", "GET"),
        ("POST", "/v1/packs/hour", "GET, PATCH"),
        ("DELETE", "/v1/budgets/bud_1", "GET, PATCH"),
    ):
        answer = await office.ask(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed), path
        assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("feature_key=m", "customer_id"),
        ("customer_id=a", "billable_metric_key"),
        ("customer_id=a&end_user_id=a&feature_key=m", "customer_id"),
        ("customer_id=a&feature_key=m&units=NaN", "units"),
        ("customer_id=a&feature_key=m&units=1e400", "units"),
        ("customer_id=a&feature_key=m&units=-1", "units"),
        ("customer_id=a&feature_key=m&units=99999999999", "units"),
        ("customer_id=a&feature_key=m&mode=both", "mode"),
        ("customer_id=%00&feature_key=m", None),
        ("customer_id=a&feature_key=%00", None),
    ],
)
async def test_a_check_that_cannot_be_read_is_refused_in_the_envelope(office: Office, query: str, param: str | None):
    assert await office.refused("GET", f"/v1/entitlements/check?{query}") == (400, "invalid_request", param)


async def test_a_check_of_odd_names_is_answered_or_refused_in_the_envelope(office: Office):
    for name in ("%ff", "%F0%9F%92%A5", "x" * 3000, "..", "a%2fb", "%20", "cus_1", "%0a"):
        for path in (
            f"/v1/entitlements/check?customer_id={name}&feature_key=m",
            f"/v1/entitlements/check?customer_id=a&feature_key={name}",
            f"/v1/customers/{name}/entitlements/m",
            f"/v1/customers/a/entitlements/{name}",
            f"/v1/customer-by-external-id/{name}/entitlements/m?units={name}",
        ):
            assert (await office.ask("GET", path)).status_code in (400, 404), path


async def _everything_can_be_shown(office: Office) -> None:
    cursor = ""
    while cursor is not None:
        page = await office.get(f"/v1/customers?limit=200{cursor and '&cursor='}{cursor}")
        for customer in page["data"]:
            await office.get(f"/v1/customers/{customer['id']}/credits?include_blocks=true")
            await office.get(f"/v1/customers/{customer['id']}/transactions")
        cursor = page["next_cursor"]
    for path in ("/v1/apps", "/v1/keys"):
        await office.get(path, key="owner")
    store = await open_store(office.gateway.services.settings.database_url, clock=now_us)
    try:
        assert not (await verify(store, operator=office.tenant)).violations
    finally:
        await store.close()
