"""Who may do what: scopes, tenants, live and test data; and the envelope of every refusal."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.identity.keys import generate
from gateway.ids import new_id
from tests.gateway.office import Office, open_office

ENDPOINTS = [
    ("POST", "/v1/customers", {"external_id": "alice"}, "credits:write"),
    ("GET", "/v1/customers", None, "credits:read"),
    ("GET", "/v1/customers/alice", None, "credits:read"),
    ("GET", "/v1/customers/alice/credits", None, "credits:read"),
    ("GET", "/v1/customers/alice/transactions", None, "credits:read"),
    ("POST", "/v1/topup/grant", {"customer_id": "alice", "credits": 1}, "credits:write"),
    ("POST", "/v1/funding/grant", {"customer_id": "alice", "amount": "1"}, "credits:write"),
    ("POST", "/v1/funding/pool", {"credits": 1}, "credits:write"),
    ("GET", "/v1/funding", None, "credits:read"),
    ("GET", "/v1/requests/req_1", None, "credits:read"),
    ("POST", "/v1/quote", {"model": "gpt-4o-mini", "messages": []}, "proxy"),
    ("GET", "/v1/models", None, "proxy"),
    ("GET", "/v1/models/gpt-4o-mini", None, "proxy"),
    ("GET", "/v1/apps", None, "admin"),
    ("POST", "/v1/apps", {"name": "A"}, "admin"),
    ("PATCH", "/v1/apps/app_1", {"markup_bps": 1}, "admin"),
    ("GET", "/v1/keys", None, "admin"),
    ("POST", "/v1/keys", {"app_id": "app_1"}, "admin"),
    ("POST", "/v1/keys/key_1/revoke", None, "admin"),
]


async def test_every_endpoint_wants_a_key_with_its_scope(office: Office):
    for method, path, body, scope in ENDPOINTS:
        assert await office.refused(method, path, body, key="none") == (401, "invalid_api_key", None), path
        if scope != "credits:read":
            answer = await office.ask(method, path, body, key="reader")
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied"), path
            assert scope in answer.json()["error"]["message"]


async def test_a_key_that_is_none_is_refused(office: Office):
    for name, value in (
        ("Authorization", "Bearer "),
        ("Authorization", "Basic abc"),
        ("Authorization", "Bearer fb_live_x_y"),
        ("Authorization", f"Bearer {generate('live', new_id('key')).token}"),
        ("X-API-Key", "ü"),
        ("X-API-Key", "x" * 10_000),
    ):
        headers = {name: value.encode("latin-1")}
        refused = await office.refused("GET", "/v1/customers", key="none", headers=headers)
        assert refused == (401, "invalid_api_key", None), value[:30]


async def test_nobody_without_a_key_has_a_body_read(office: Office):
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    for method, path, body, _ in ENDPOINTS:
        if body is not None:
            refused = await office.refused(method, path, key="none", content=never())
            assert refused == (401, "invalid_api_key", None), path


async def test_a_key_may_come_in_either_header(office: Office):
    for headers in (
        {"X-API-Key": office.keys["live"]},
        {"Authorization": f"bearer {office.keys['live']}"},
    ):
        assert (await office.ask("GET", "/v1/customers", key="none", headers=headers)).status_code == 200


async def test_another_tenants_rows_are_not_found(office: Office):
    mine = await office.post("/v1/customers", {"external_id": "alice"})
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000})
    charged = (await office.chat()).headers["x-request-id"]
    key = (await office.get("/v1/keys", key="admin"))["data"][0]["id"]
    for path in (
        f"/v1/customers/{mine['id']}",
        f"/v1/customers/{mine['id']}/credits",
        f"/v1/customers/{mine['id']}/transactions",
        "/v1/customers/alice",
        "/v1/customers/alice/credits",
        f"/v1/requests/{charged}",
    ):
        assert (await office.refused("GET", path, key="other"))[:2] == (404, "not_found"), path
    for path, body in (
        ("/v1/topup/grant", {"customer_id": mine["id"], "credits": 1}),
        ("/v1/keys", {"app_id": office.app}),
        (f"/v1/keys/{key}/revoke", None),
    ):
        assert (await office.refused("POST", path, body, key="other"))[:2] == (404, "not_found"), path
    assert (await office.refused("PATCH", f"/v1/apps/{office.app}", {"markup_bps": 9}, key="other"))[0] == 404
    assert (await office.get("/v1/customers", key="other"))["data"] == []
    assert office.app not in str(await office.get("/v1/apps", key="other"))


async def test_live_and_test_data_do_not_meet(office: Office):
    live = await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000})
    assert (await office.refused("GET", "/v1/customers/alice", key="test"))[0] == 404
    assert (await office.refused("GET", f"/v1/customers/{live['customer_id']}/credits", key="test"))[0] == 404
    test = await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 7}, key="test")
    assert test["customer_id"] != live["customer_id"]
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 1000
    assert (await office.get("/v1/customers/alice", key="test"))["livemode"] is False


async def test_the_installations_key_chooses_the_mode_and_an_apps_key_cannot(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 7}, key="test")
    assert (await office.get("/v1/customers?mode=test", key="admin"))["data"][0]["external_id"] == "alice"
    assert (await office.get("/v1/customers", key="admin"))["data"] == []
    assert (await office.refused("GET", "/v1/customers?mode=test"))[:2] == (403, "permission_denied")
    assert (await office.refused("GET", "/v1/customers?mode=other", key="admin"))[2] == "mode"


async def test_a_revoked_key_is_refused_at_once_here(office: Office):
    made = await office.post("/v1/keys", {"app_id": office.app}, key="owner")
    office.keys["new"] = made["key"]
    assert (await office.ask("GET", "/v1/customers", key="new")).status_code == 200
    revoked = await office.post(f"/v1/keys/{made['id']}/revoke", key="owner")
    assert revoked["revoked_at"] is not None
    assert await office.refused("GET", "/v1/customers", key="new") == (401, "invalid_api_key", None)
    assert await office.post(f"/v1/keys/{made['id']}/revoke", key="owner") == revoked


async def test_a_key_is_shown_once(office: Office):
    body = {"app_id": office.app, "mode": "test", "scopes": ["credits:read"], "name": "reports"}
    made = await office.post("/v1/keys", body, key="owner", once="k")
    assert made["key"].startswith("fb_test_")
    assert made["key"].endswith(made["last4"])
    replayed = await office.ask("POST", "/v1/keys", body, key="owner", once="k")
    assert replayed.json() == {**made, "key": None}
    assert replayed.headers["x-idempotent-replayed"] == "true"
    listed = await office.get("/v1/keys", key="owner")
    assert [key["id"] for key in listed["data"]].count(made["id"]) == 1
    assert made["key"] not in str(listed)
    secret = made["key"].rpartition("_")[2].encode()
    assert not any(secret in file.read_bytes() for file in database_files(office))


def database_files(office: Office) -> list[Path]:
    path = office.gateway.services.settings.database_url.removeprefix("sqlite:///")
    return [file for file in Path(path).parent.glob("farebox.db*") if file.is_file()]


async def test_a_sandboxs_owner_touches_nothing_live(office: Office):
    live = next(key for key in (await office.get("/v1/keys", key="admin"))["data"] if key["mode"] == "live")
    admin = next(key for key in (await office.get("/v1/keys", key="admin"))["data"] if key["mode"] == "admin")
    for method, path, body in (
        ("POST", "/v1/keys", {"app_id": office.app, "mode": "live"}),
        ("POST", f"/v1/keys/{live['id']}/revoke", None),
        ("POST", f"/v1/keys/{admin['id']}/revoke", None),
        ("POST", "/v1/apps", {"name": "A"}),
        ("PATCH", f"/v1/apps/{office.app}", {"markup_bps": 1}),
    ):
        assert (await office.refused(method, path, body, key="sandbox-owner"))[:2] == (403, "permission_denied")
    assert (await office.refused("POST", f"/v1/keys/{admin['id']}/revoke", key="owner"))[0] == 403
    assert (await office.post("/v1/keys", {"app_id": office.app, "mode": "test"}, key="sandbox-owner"))["key"]


async def test_apps_are_made_and_changed(office: Office):
    made = await office.post("/v1/apps", {"name": "Second", "markup_bps": 2000}, key="admin", once="k")
    assert await office.post("/v1/apps", {"name": "Second", "markup_bps": 2000}, key="admin", once="k") == made
    assert (made["billing_mode"], made["markup_bps"], made["on_disconnect"]) == ("user_pays", 2000, None)
    body = {"markup_bps": 333, "billing_mode": "developer_pays", "on_disconnect": "drain"}
    changed = (await office.ask("PATCH", f"/v1/apps/{made['id']}", body, key="admin")).json()
    assert changed == {**made, **body, "version": 2}
    back = (await office.ask("PATCH", f"/v1/apps/{made['id']}", {"on_disconnect": "default"}, key="admin")).json()
    assert back == {**changed, "on_disconnect": None, "version": 3}
    assert (await office.get("/v1/apps", key="owner"))["data"][1] == back
    for wrong in ({"markup_bps": -1}, {"markup_bps": 1_000_001}, {"markup_bps": "5"}, {"billing_mode": "free"}):
        assert (await office.refused("PATCH", f"/v1/apps/{made['id']}", wrong, key="admin"))[0] == 400


async def test_a_changed_markup_is_charged_at_once(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 10_000})
    plain = (await office.chat()).json()["usage"]["cost"]
    await office.ask("PATCH", f"/v1/apps/{office.app}", {"markup_bps": 10_000}, key="admin")
    assert float((await office.chat()).json()["usage"]["cost"]) == pytest.approx(2 * float(plain))


async def test_every_refusal_has_the_envelope(office: Office):
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("DELETE", "/v1/topup/grant", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/customers?limit=1000", 400, "invalid_request"),
        ("GET", "/v1/models/no-such-model", 404, "model_not_found"),
    ):
        assert (await office.refused(method, path))[:2] == (status, code), path


async def test_a_wrong_method_is_told_all_right_ones(office: Office):
    for path, methods in (
        ("/v1/customers", "GET, POST"),
        ("/v1/customers/alice", "DELETE, GET, PATCH"),
        ("/v1/apps/app_1", "PATCH"),
        ("/v1/chat/completions", "POST"),
        ("/health/live", "GET"),
    ):
        answer = await office.ask("PUT", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


async def test_a_fault_of_ours_has_the_envelope_and_tells_no_secret(
    office: Office, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
):
    async def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("the database password is hunter2")

    monkeypatch.setattr(office.gateway.services.customers, "page", broken)
    answer = await office.ask("GET", "/v1/customers")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "hunter2" not in answer.text
    entry = json.loads(log.getvalue().splitlines()[0])
    assert (entry["event"], entry["request_id"]) == ("request failed", answer.headers["x-request-id"])
    assert "RuntimeError" in entry["exception"]


async def test_management_has_a_rate_limit_of_its_own(tmp_path):
    async with open_office(tmp_path, management_rate_limit_per_minute=3) as office:
        await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000})
        left = [(await office.ask("GET", "/v1/customers")).headers["x-ratelimit-remaining"] for _ in range(2)]
        assert left == ["1", "0"]
        answer = await office.ask("GET", "/v1/customers")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["x-ratelimit-limit"] == "3"
        assert (await office.chat()).status_code == 200, "the proxy counts on its own"
        assert (await office.ask("GET", "/v1/customers", key="test")).status_code == 200, "each key counts on its own"


async def test_a_gateway_that_shuts_down_takes_no_new_request(office: Office):
    office.gateway.draining = office.gateway._stopping = True
    assert (await office.refused("GET", "/v1/customers"))[:2] == (503, "shutting_down")
    ready = await office.ask_plain("/health/ready")
    assert (ready.status_code, ready.json()["checks"]["process"]) == (503, "shutting down")
    assert (await office.ask_plain("/health/live")).status_code == 200


async def test_many_readers_and_writers_at_once_get_their_own_answers(office: Office):
    async def one(number: int) -> None:
        granted = await office.post("/v1/topup/grant", {"customer_id": f"u{number}", "credits": number})
        assert granted["amount_granted"] == number
        assert (await office.get(f"/v1/customers/u{number}/credits"))["balance"] == number

    await asyncio.gather(*(one(number) for number in range(1, 41)))
