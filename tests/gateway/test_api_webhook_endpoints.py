"""Webhook endpoints and the list of events, as the API has them."""

import asyncio

import pytest

from gateway.events.endpoints import ENDPOINTS_MAX
from gateway.events.event import EVENT_TYPES
from gateway.events.retention import RETENTION_S, Retention
from tests.gateway.office import Office

HOOK = {"url": "https://receiver.invalid/hooks", "event_types": ["credit.expired"], "description": "Ours"}
PATH = "/v1/webhook-endpoints"


async def test_the_secret_is_shown_once_and_never_again(office: Office):
    made = await office.post(PATH, HOOK, once="hook")
    assert made["secret"].startswith("whsec_")
    again = await office.ask("POST", PATH, HOOK, once="hook")
    assert again.headers["x-idempotent-replayed"] == "true"
    assert again.json() == {**made, "secret": None}
    shown = {name: value for name, value in made.items() if name != "secret"}
    assert await office.get(f"{PATH}/{made['id']}") == shown
    assert (await office.get(PATH))["data"] == [shown]
    assert shown["event_types"] == ["credit.expired"]
    assert (shown["status"], shown["version"], shown["livemode"]) == ("enabled", 1, True)


async def test_a_rotated_secret_is_shown_once(office: Office):
    made = await office.post(PATH, HOOK)
    path = f"{PATH}/{made['id']}/rotate-secret"
    rotated = await office.post(path, {"expire_current_after_seconds": 0}, once="rotate")
    assert rotated["secret"] not in (None, made["secret"])
    assert rotated["version"] == 2
    assert (await office.post(path, {"expire_current_after_seconds": 0}, once="rotate"))["secret"] is None
    for seconds in (-1, 7 * 86_400 + 1, 1.5, "60"):
        refused = await office.refused("POST", path, {"expire_current_after_seconds": seconds})
        assert refused == (400, "invalid_request", "expire_current_after_seconds")


async def test_a_change_of_an_older_version_is_refused(office: Office):
    made = await office.ask("POST", PATH, HOOK)
    path, tag = f"{PATH}/{made.json()['id']}", made.headers["etag"]
    changed = await office.ask("PATCH", path, {"description": "Other"}, headers={"If-Match": tag})
    assert (changed.json()["description"], changed.json()["url"]) == ("Other", HOOK["url"])
    assert changed.headers["etag"] == '"2"' == (await office.ask("GET", path)).headers["etag"]
    refused = await office.refused("PATCH", path, {"description": "Late"}, headers={"If-Match": tag})
    assert refused == (412, "version_mismatch", "If-Match")
    assert (await office.get(path))["description"] == "Other"


async def test_what_is_deleted_is_gone(office: Office):
    made = await office.post(PATH, HOOK)
    path = f"{PATH}/{made['id']}"
    assert (await office.ask("DELETE", path)).status_code == 204
    for method in ("GET", "PATCH", "DELETE"):
        body = {} if method == "PATCH" else None
        assert (await office.refused(method, path, body))[:2] == (404, "not_found")
    assert (await office.refused("GET", f"{path}/deliveries"))[:2] == (404, "not_found")


@pytest.mark.parametrize(
    "url", ["http://receiver.invalid/", "https://127.0.0.1/", "https://u:p@receiver.invalid/", "receiver", ""]
)
async def test_a_url_that_would_not_be_called_is_refused(office: Office, url: str):
    assert await office.refused("POST", PATH, {**HOOK, "url": url}) == (400, "invalid_request", "url")
    made = await office.post(PATH, HOOK)
    assert await office.refused("PATCH", f"{PATH}/{made['id']}", {"url": url}) == (400, "invalid_request", "url")


async def test_only_known_types_are_taken(office: Office):
    for types in ([], ["credit.expire"], ["*", "x"], "credit.expired"):
        status, code, _ = await office.refused("POST", PATH, {**HOOK, "event_types": types})
        assert (status, code) == (400, "invalid_request")
    every = await office.post(PATH, {**HOOK, "event_types": sorted(EVENT_TYPES)})
    assert set(every["event_types"]) == EVENT_TYPES
    assert (await office.post(PATH, {"url": HOOK["url"]}))["event_types"] == ["*"]


async def test_there_are_only_so_many_and_they_come_in_pages(office: Office):
    made = [(await office.post(PATH, HOOK))["id"] for _ in range(ENDPOINTS_MAX)]
    assert (await office.refused("POST", PATH, HOOK))[:2] == (400, "invalid_request")
    assert (await office.post(PATH, HOOK, key="test"))["livemode"] is False
    found: list[str] = []
    cursor = ""
    while True:
        page = await office.get(f"{PATH}?limit=7{cursor}")
        found += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert found == sorted(made, reverse=True)


async def test_a_key_needs_the_scope(office: Office):
    made = await office.post(PATH, HOOK)
    assert (await office.get(f"{PATH}/{made['id']}", key="reader"))["id"] == made["id"]
    for method, path, body in (
        ("POST", PATH, HOOK),
        ("PATCH", f"{PATH}/{made['id']}", {}),
        ("DELETE", f"{PATH}/{made['id']}", None),
        ("POST", f"{PATH}/{made['id']}/rotate-secret", {}),
    ):
        assert (await office.refused(method, path, body, key="reader"))[:2] == (403, "permission_denied")


# Events.


async def some_events(office: Office) -> None:
    """Four grants and a charge."""
    for user in ("alice", "bob", "alice"):
        await office.post("/v1/topup/grant", {"customer_id": user, "credits": 1000})
    await office.chat("alice")
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000})


async def every(office: Office, query: str) -> list[tuple[str, int]]:
    """Type and sequence of all events, over pages of two."""
    found: list[tuple[str, int]] = []
    cursor = ""
    while True:
        page = await office.get(f"/v1/events?limit=2{query}{cursor}")
        found += [(event["type"], event["sequence"]) for event in page["data"]]
        if not page["has_more"]:
            return found
        cursor = f"&cursor={page['next_cursor']}"


async def test_events_are_listed_newest_first_by_type_and_by_customer(office: Office):
    await some_events(office)
    granted, charged = "credit.granted", "usage.recorded"
    assert await every(office, "") == [(granted, 4), (charged, 3), (granted, 2), (granted, 1), (granted, 1)]
    assert await every(office, "&customer_id=alice") == [(granted, 4), (charged, 3), (granted, 2), (granted, 1)]
    assert await every(office, "&type=usage.recorded") == [(charged, 3)]
    assert await every(office, "&type=credit.granted&customer_id=bob") == [(granted, 1)]
    assert await every(office, "&type=credit.expired") == []
    assert (await office.get("/v1/events", key="test"))["data"] == []


async def test_what_cannot_be_listed_is_refused(office: Office):
    assert await office.refused("GET", "/v1/events?type=credit.expire") == (400, "invalid_request", "type")
    assert (await office.refused("GET", "/v1/events?customer_id=nobody"))[:2] == (404, "not_found")
    await some_events(office)
    refused = await office.refused("GET", "/v1/events?customer_id=alice&cursor=evt_1")
    assert refused == (400, "invalid_request", "cursor")
    assert (await office.refused("GET", "/v1/events/evt_nobodys"))[:2] == (404, "not_found")


async def test_the_line_for_unfunded_credits_and_its_like_are_nobodys_events(office: Office):
    """The operator's own bookkeeping is done with wallets too."""
    await office.fund_developer("10")
    await office.chat(None)
    wallets = [event["data"].get("wallet", "") for event in (await office.get("/v1/events"))["data"]]
    assert wallets == [f"app:{office.app}"] * 2


async def test_an_event_is_delivered_again_only_where_somebody_listens(office: Office):
    await some_events(office)
    event = (await office.get("/v1/events"))["data"][0]["id"]
    path = f"/v1/events/{event}/redeliver"
    assert (await office.ask("POST", path, {})).json() == {"event_id": event, "endpoints": []}
    hook = (await office.post(PATH, HOOK))["id"]
    assert (await office.ask("POST", path, {})).json()["endpoints"] == []
    assert (await office.ask("POST", path, {"endpoint": hook})).json()["endpoints"] == [hook]
    await office.ask("PATCH", f"{PATH}/{hook}", {"status": "disabled"})
    assert await office.refused("POST", path, {"endpoint": hook}) == (400, "invalid_request", "endpoint")
    assert (await office.refused("POST", path, {"endpoint": "whk_nobodys"}))[:2] == (404, "not_found")


async def test_events_are_kept_for_a_month_after_they_were_told(office: Office):
    hook = (await office.post(PATH, {**HOOK, "event_types": ["*"]}))["id"]
    gone = (await office.post(PATH, {**HOOK, "event_types": ["*"]}))["id"]
    await some_events(office)
    services = office.gateway.services
    deadline = asyncio.get_running_loop().time() + 20
    while len((await office.get(f"{PATH}/{gone}/deliveries"))["data"]) < 5:
        assert asyncio.get_running_loop().time() < deadline
    await services.webhooks.stop()
    await office.ask("DELETE", f"{PATH}/{gone}")
    retention = Retention(services.database, now_us=office.clock.now_us)
    assert await retention.round() == 5  # The deliveries to what is gone.
    assert await retention.round() == 0
    assert len((await office.get("/v1/events"))["data"]) == 5
    await office.ask("PATCH", f"{PATH}/{hook}", {"status": "disabled"})
    office.clock.pass_s(RETENTION_S + 60)
    # What is yet to be delivered stays, until somebody finds that nobody listens.
    assert await retention.round() == 5
    assert (await office.get("/v1/events"))["data"] == []
    assert len((await office.get(f"{PATH}/{hook}/deliveries"))["data"]) == 5
