"""Receipts, quotes, models, and what an operator looks at."""

import re
import sqlite3
from html.parser import HTMLParser

import pytest

from tests.gateway.office import Office, open_office


@pytest.fixture
async def funded(office: Office) -> Office:
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 100_000})
    return office


async def test_a_receipt_agrees_with_the_answer_and_the_wallet(funded: Office):
    answer = await funded.chat()
    receipt = await funded.get(f"/v1/requests/{answer.headers['x-request-id']}")
    usage = answer.json()["usage"]
    assert receipt["status"] == "charged"
    assert receipt["charged_decimal"] == usage["cost"] == answer.headers["x-quota-cost"]
    assert receipt["reserved_decimal"] == answer.headers["x-quota-reserved"]
    assert receipt["usage"] == {"input": usage["prompt_tokens"], "output": usage["completion_tokens"]}
    assert (receipt["usage_source"], receipt["ending"], receipt["model"]) == ("provider", "finished", "gpt-4o-mini")
    assert [payment["amount_decimal"] for payment in receipt["payments"]] == [usage["cost"]]
    assert receipt["price_version"].startswith("prc_")
    assert (await funded.get("/v1/customers/alice/credits"))["balance_decimal"] == usage["balance"]


async def test_only_an_administrator_sees_what_the_provider_took(funded: Office):
    await funded.ask("PATCH", f"/v1/apps/{funded.app}", {"markup_bps": 5000}, key="admin")
    request_id = (await funded.chat()).headers["x-request-id"]
    seen = await funded.get(f"/v1/requests/{request_id}")
    assert not {"margin", "upstream"} & seen.keys()
    assert not re.search("provider_cost|markup|base", str(seen))
    for key in ("admin", "owner"):
        margin = (await funded.get(f"/v1/requests/{request_id}", key=key))["margin"]
        assert float(margin["markup_decimal"]) == pytest.approx(float(margin["base_decimal"]) / 2)
        assert float(margin["provider_cost_usd"]) * 100 == pytest.approx(float(margin["base_decimal"]))


async def test_a_refused_request_shows_as_released(funded: Office):
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}], "simulate": {"status": 400}}
    headers = {"Authorization": f"Bearer {funded.keys['live']}", "X-Quota-User": "alice"}
    answer = await funded.client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 400
    receipt = await funded.get(f"/v1/requests/{answer.headers['x-request-id']}")
    assert (receipt["status"], receipt["charged_decimal"], receipt["payments"]) == ("released", "0", [])


async def test_a_request_that_never_was_has_no_receipt(funded: Office):
    assert (await funded.refused("GET", "/v1/requests/req_00000000000000000000000000"))[:2] == (404, "not_found")


async def test_a_quote_is_what_would_be_reserved_and_reserves_nothing(funded: Office):
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 100}
    quote = await funded.post("/v1/quote", body, headers={"X-Quota-User": "alice"})
    answer = await funded.chat(max_tokens=100)
    assert quote["at_most_amount_decimal"] == answer.headers["x-quota-reserved"]
    assert float(answer.headers["x-quota-cost"]) <= float(quote["at_most_amount_decimal"])
    assert quote["expected_amount"] <= quote["at_most_amount"]
    assert (quote["output_tokens_max"], quote["affordable"], quote["available"]) == (100, True, 100_000)
    poor = await funded.post("/v1/quote", body, headers={"X-Quota-User": "poor"})
    assert (poor["affordable"], poor["available_decimal"]) == (False, "0")


async def test_a_quote_is_for_the_user_whom_the_request_would_be_charged_to(office: Office):
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}
    await office.post("/v1/topup/grant", {"customer_id": "Zoë", "credits": 7000})
    quote = await office.post("/v1/quote", body, headers={"X-Quota-User": "Zoë".encode()})
    assert quote["available"] == 7000
    assert len((await office.get("/v1/customers"))["data"]) == 1
    names = {"Authorization": f"Bearer {office.keys['live']}"}
    for path in ("/v1/quote", "/v1/chat/completions"):
        for twice in ("X-Quota-User", "X-Quota-Action"):
            headers = [*names.items(), (twice, "a"), (twice, "b")]
            answer = await office.client.post(path, json=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, twice)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_request", "model"),
        ({"model": "gpt-4o-mini", "messages": []}, 400, "invalid_request", "messages"),
        (
            {"model": "nobody-sells-this", "messages": [{"role": "user", "content": "x"}]},
            404,
            "model_not_priced",
            "model",
        ),
    ],
)
async def test_a_quote_refuses_what_the_request_would_be_refused_for(
    office: Office, body: dict, status: int, code: str, param: str
):
    assert await office.refused("POST", "/v1/quote", body) == (status, code, param)


async def test_an_actions_quote_is_its_price(tmp_path):
    async with open_office(tmp_path, actions=[{"key": "chat.reply", "credits": "4"}]) as office:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}
        quote = await office.post("/v1/quote", body, headers={"X-Quota-User": "a", "X-Quota-Action": "chat.reply"})
        assert (quote["expected_amount_decimal"], quote["at_most_amount_decimal"]) == ("4", "4")


async def test_models_are_listed_as_openai_lists_them(tmp_path):
    models = [
        {"name": "fast", "upstream": "simulated", "upstream_model": "gpt-4o-mini", "max_output_tokens": 50},
        {"name": "own/model", "upstream": "simulated", "price": {"input": "1", "output": "2"}},
    ]
    async with open_office(tmp_path, models=models) as office:
        listed = await office.get("/v1/models")
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["fast", "own/model"]
        assert await office.get("/v1/models/own/model") == listed["data"][1]
        assert listed["data"][1]["object"] == "model"
        body = {"model": "fast", "messages": [{"role": "user", "content": "Hello!"}]}
        assert (await office.post("/v1/quote", body))["output_tokens_max"] == 50


async def test_every_priced_model_is_listed_where_none_is_named(office: Office):
    names = {model["id"] for model in (await office.get("/v1/models"))["data"]}
    assert {"gpt-4o-mini", "gpt-4o", "claude-sonnet-4-5", "gemini-2.5-flash"} <= names


@pytest.mark.sqlite
async def test_a_database_that_is_gone_is_not_a_fault_of_ours(office: Office):
    path = office.gateway.services.settings.database_url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE customers RENAME TO moved")
    connection.close()
    answer = await office.ask("GET", "/v1/customers")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert int(answer.headers["retry-after"]) > 0


async def test_metrics_count_requests_and_charges_without_naming_anybody(funded: Office):
    cost = (await funded.chat()).json()["usage"]["cost"]
    await funded.refused("GET", "/v1/customers/nobody")
    text = (await funded.ask_plain("/metrics")).text
    assert 'farebox_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'farebox_requests_total{method="GET",route="/v1/customers/{customer}",status="404"} 1.0' in text
    assert 'farebox_settlements_total{ending="finished",source="provider"} 1.0' in text
    charged = re.search(r"^farebox_charged_total (\S+)$", text, re.MULTILINE)
    assert charged is not None
    assert float(charged[1]) == pytest.approx(float(cost) * 10**9)
    assert not re.search("alice|nobody|cus_|ten_|app_|key_", text)


async def test_openapi_describes_every_endpoint_with_our_errors(office: Office):
    schema = (await office.ask_plain("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/topup/grant", "/v1/customers/{customer}/credits"} <= schema["paths"].keys()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation["description"]
            if path.startswith("/v1"):
                reference = operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"]
                assert reference == "#/components/schemas/ErrorEnvelope"
                assert operation["security"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]


async def test_the_docs_load_nothing_from_elsewhere(office: Office):
    page = (await office.ask_plain("/docs")).text

    class Links(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "img", "iframe")
            self.found += [value for name, value in attrs if name in ("href", "src")]

    links = Links()
    links.found = []
    links.feed(page)
    assert all(link.startswith(("#", "/")) for link in links.found)
    assert "@import" not in page
    assert "/v1/topup/grant" in page
    assert "wallet_recharge" in page, "the examples are shown"
