"""Whatever stands in a field, the answer is ours: never a fault, always the envelope, and the books hold."""

import json
from typing import Any

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
