"""Customers over HTTP: what they have agreed to, who they are, and whose version of it counts."""

import asyncio
from typing import Any, Final

import pytest

from tests.gateway.office import Office

NO_SETTINGS: Final = {
    "auto_buy_enabled": False,
    "auto_buy_pack": None,
    "auto_buy_price": None,
    "auto_buy_credits": None,
    "auto_topup_enabled": False,
    "auto_topup_threshold": None,
    "auto_topup_package": None,
    "auto_topup_monthly_cap": None,
    "low_balance_thresholds": None,
}


async def made(office: Office, name: str = "alice", **more: Any) -> dict[str, Any]:
    customer: dict[str, Any] = await office.post("/v1/customers", {"external_id": name, **more})
    return customer


async def test_a_customer_has_settings_and_a_version_that_is_the_etag(office: Office):
    answer = await office.ask("POST", "/v1/customers", {"external_id": "alice"})
    customer = answer.json()
    assert (customer["settings"], customer["version"], answer.headers["etag"]) == (NO_SETTINGS, 1, '"1"')
    got = await office.ask("GET", "/v1/customers/alice")
    assert (got.json(), got.headers["etag"]) == (customer, '"1"')


async def test_a_change_replaces_metadata_and_those_settings_that_it_names(office: Office):
    await made(office, metadata={"a": 1}, settings={"auto_buy_pack": "weekly", "auto_buy_price": 5000})
    answer = await office.ask("PATCH", "/v1/customers/alice", {"settings": {"auto_buy_enabled": True}})
    assert (answer.status_code, answer.headers["etag"]) == (200, '"2"')
    assert answer.json()["metadata"] == {"a": 1}
    agreed = {**NO_SETTINGS, "auto_buy_enabled": True, "auto_buy_pack": "weekly", "auto_buy_price": 5000}
    assert answer.json()["settings"] == agreed
    changes = {"metadata": {"b": [2.5]}, "settings": {"auto_buy_price": None}}
    changed = (await office.ask("PATCH", "/v1/customers/alice", changes)).json()
    assert (changed["metadata"], changed["version"]) == ({"b": [2.5]}, 3)
    assert changed["settings"] == {**agreed, "auto_buy_price": None}
    assert await office.get("/v1/customers/alice") == changed


async def test_who_is_created_again_keeps_the_settings_that_are_not_named(office: Office):
    await made(office, settings={"auto_buy_enabled": True, "auto_buy_pack": "weekly"})
    again = await office.ask("POST", "/v1/customers", {"external_id": "alice", "settings": {"auto_buy_price": 5000}})
    assert again.status_code == 200
    agreed = {**NO_SETTINGS, "auto_buy_enabled": True, "auto_buy_pack": "weekly", "auto_buy_price": 5000}
    assert again.json()["settings"] == agreed
    assert (await office.get("/v1/customers/alice"))["settings"] == agreed


async def test_to_change_nothing_is_no_version(office: Office):
    before = await made(office)
    assert (await office.ask("PATCH", "/v1/customers/alice", {})).json() == before
    again = await office.ask("POST", "/v1/customers", {"external_id": "alice"})
    assert again.json() == before


async def test_a_change_of_an_older_version_is_refused(office: Office):
    await made(office)
    first = {"If-Match": '"1"'}
    done = await office.ask("PATCH", "/v1/customers/alice", {"metadata": {"a": 1}}, headers=first)
    assert done.json()["version"] == 2
    late = await office.ask("PATCH", "/v1/customers/alice", {"metadata": {"a": 2}}, headers=first)
    assert (late.status_code, late.json()["error"]["code"], late.json()["error"]["version"]) == (
        412,
        "version_mismatch",
        2,
    )
    assert (await office.get("/v1/customers/alice"))["metadata"] == {"a": 1}
    for tag in ('"2"', 'W/"3"', "*"):
        answer = await office.ask("PATCH", "/v1/customers/alice", {"metadata": {"a": tag}}, headers={"If-Match": tag})
        assert answer.status_code == 200, tag
    for tag in ("2", '"two"', '""', '"1", "2"', '"9999999999999999999"'):
        refused = await office.refused("PATCH", "/v1/customers/alice", {}, headers={"If-Match": tag})
        assert refused == (400, "invalid_request", "If-Match"), tag


async def test_of_many_who_change_one_version_one_does(office: Office):
    await made(office)
    answers = await asyncio.gather(
        *(
            office.ask("PATCH", "/v1/customers/alice", {"metadata": {"n": n}}, headers={"If-Match": '"1"'})
            for n in range(20)
        )
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 19
    won = next(answer.json() for answer in answers if answer.status_code == 200)
    assert await office.get("/v1/customers/alice") == won


async def test_of_many_who_change_different_settings_none_takes_the_others_back(office: Office):
    await made(office)
    changes = [{"auto_buy_enabled": True}, {"auto_buy_pack": "weekly"}, {"auto_buy_price": 7}, {"auto_buy_credits": 9}]
    await asyncio.gather(*(office.ask("PATCH", "/v1/customers/alice", {"settings": change}) for change in changes))
    found = await office.get("/v1/customers/alice")
    agreed = NO_SETTINGS | {key: each[key] for each in changes for key in each}
    assert (found["settings"], found["version"]) == (agreed, 5)


async def test_a_customer_can_be_given_another_name(office: Office):
    before = await made(office)
    assert (await office.chat("alice")).status_code == 402, "the name is known to the proxy"
    changed = (await office.ask("PATCH", "/v1/customers/alice", {"external_id": "alice@example.com"})).json()
    assert changed == {**before, "external_id": "alice@example.com", "version": 2}
    assert await office.get(f"/v1/customers/{before['id']}") == changed
    assert (await office.refused("GET", "/v1/customers/alice"))[:2] == (404, "not_found")
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000})
    assert (await office.get("/v1/customers/alice"))["id"] != before["id"], "whoever has the name now is somebody else"


async def test_a_name_that_is_anothers_or_none_cannot_be_taken(office: Office):
    await made(office)
    await made(office, "bob")
    taken = await office.refused("PATCH", "/v1/customers/alice", {"external_id": "bob"})
    assert taken == (409, "already_exists", "external_id")
    for name in ("", " x", "cus_1", "a\nb", "x" * 257):
        refused = await office.refused("PATCH", "/v1/customers/alice", {"external_id": name})
        assert refused == (400, "invalid_request", "external_id"), name
    same = await office.ask("PATCH", "/v1/customers/alice", {"external_id": "alice"})
    assert same.status_code == 200


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"auto_buy_enabled": "yes"}, "settings.auto_buy_enabled"),
        ({"auto_buy_enabled": None}, "settings.auto_buy_enabled"),
        ({"auto_buy_pack": ""}, "settings.auto_buy_pack"),
        ({"auto_buy_price": -1}, "settings.auto_buy_price"),
        ({"auto_buy_price": 2**63}, "settings.auto_buy_price"),
        ({"auto_buy_credits": 0}, "settings.auto_buy_credits"),
        ({"auto_buy_credits": 1.5}, "settings.auto_buy_credits"),
        ({"auto_bye": True}, "settings.auto_bye"),
    ],
)
async def test_settings_that_cannot_be_are_refused(office: Office, settings: dict[str, Any], param: str):
    await made(office)
    assert await office.refused("PATCH", "/v1/customers/alice", {"settings": settings}) == (
        400,
        "invalid_request",
        param,
    )
    assert (await office.get("/v1/customers/alice"))["settings"] == NO_SETTINGS


async def test_nobody_is_created_by_a_change_or_an_erasure(office: Office):
    for method, body in (("PATCH", {"metadata": {}}), ("DELETE", None)):
        for name in ("nobody", "cus_nobody", "a%0Ab"):
            assert (await office.refused(method, f"/v1/customers/{name}", body))[:2] == (404, "not_found")
    assert (await office.get("/v1/customers"))["data"] == []


async def test_who_may_change_and_erase(office: Office):
    customer = await made(office)
    for method, body in (("PATCH", {"metadata": {"a": 1}}), ("DELETE", None)):
        assert (await office.refused(method, "/v1/customers/alice", body, key="reader"))[0] == 403
        for key in ("test", "other"):
            for name in ("alice", customer["id"]):
                assert (await office.refused(method, f"/v1/customers/{name}", body, key=key))[0] == 404
    assert await office.get("/v1/customers/alice") == customer


# By the tenant's own id.


async def test_the_paths_that_name_the_external_id_do_the_same(office: Office):
    customer = await made(office, "team/alice")
    await office.post("/v1/topup/grant", {"customer_id": "team/alice", "credits": 1000})
    path = "/v1/customer-by-external-id/team/alice"
    assert await office.get(path) == customer
    found = await office.get(f"{path}/credits?include_blocks=true")
    assert found == await office.get("/v1/customers/team/alice/credits?include_blocks=true")
    assert found["balance"] == 1000
    changed = await office.ask("PATCH", path, {"metadata": {"a": 1}}, headers={"If-Match": '"1"'})
    assert (changed.json()["metadata"], changed.headers["etag"]) == ({"a": 1}, '"2"')


async def test_an_id_of_ours_is_nobodys_external_id(office: Office):
    customer = await made(office)
    path = f"/v1/customer-by-external-id/{customer['id']}"
    for method, where in (("GET", path), ("GET", f"{path}/credits"), ("PATCH", path)):
        body = {} if method == "PATCH" else None
        assert (await office.refused(method, where, body))[:2] == (404, "not_found")
