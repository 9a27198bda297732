"""Packs: offered by a tenant, bought by customers out of their own credits, stacked, at each companion's price."""

import asyncio
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest

from tests.gateway.office import Office

HOUR = {
    "key": "plan_1hr",
    "name": "1-Hour Plan",
    "price": 100_000,
    "credits": 200_000,
    "duration_seconds": 3600,
    "metadata": {"plan_type": "1hr"},
}


async def offer(office: Office, credits: int = 500_000, **terms: Any) -> Any:
    """A pack, and alice with as many millicredits of her own."""
    if credits:
        await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": credits})
    return await office.post("/v1/packs", {**HOUR, **terms})


async def blocks_of_alice(office: Office) -> list[dict[str, Any]]:
    view = await office.get("/v1/customers/alice/credits?include_blocks=true")
    blocks: list[dict[str, Any]] = view["blocks"]
    return blocks


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def test_a_pack_is_bought_in_one_step(office: Office):
    pack = await offer(office)
    bought = await office.post(
        "/v1/customers/alice/packs", {"pack": "plan_1hr", "metadata": {"companion_id": "companion_42"}}
    )
    assert (bought["pack_id"], bought["price"], bought["credits"]) == (pack["id"], 100_000, 200_000)
    assert (bought["balance_before"], bought["balance_after"]) == (500_000, 600_000)
    assert (at(bought["expires_at"]) - at(bought["created_at"])).total_seconds() == 3600
    plan, wallet = await blocks_of_alice(office)
    assert (plan["id"], plan["priority"], plan["funding"], plan["source"]) == (
        bought["block_id"],
        10,
        "plan",
        "plan_1hr",
    )
    assert plan["metadata"] == {"plan_type": "1hr", "companion_id": "companion_42", "pack": pack["id"]}
    assert wallet["remaining_amount"] == 400_000
    (line, *_) = (await office.get("/v1/customers/alice/transactions"))["data"]
    assert (line["type"], line["amount"]) == ("purchase", 100_000)
    assert sorted(part["amount"] for part in line["parts"]) == [-100_000, 200_000]


async def test_a_plan_stacks_on_the_latest_that_is_active(office: Office):
    await offer(office)
    first = await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"})
    second = await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"})
    assert (at(second["expires_at"]) - at(first["expires_at"])).total_seconds() == 3600
    assert len((await office.get("/v1/customers/alice/packs"))["data"]) == 2
    office.clock.pass_s(3601)
    (left,) = (await office.get("/v1/customers/alice/packs"))["data"]
    assert left["id"] == second["block_id"]
    office.clock.pass_s(3601)
    assert (await office.get("/v1/customers/alice/packs"))["data"] == []
    third = await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"})
    assert (at(third["expires_at"]) - at(third["created_at"])).total_seconds() == 3600


async def test_each_companion_has_its_price(office: Office):
    await offer(office)
    bought = await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr", "price": 150_000, "credits": 180_000})
    assert (bought["price"], bought["credits"]) == (150_000, 180_000)
    free = await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr", "price": 0})
    assert free["balance_after"] - free["balance_before"] == 200_000


async def test_a_plan_buys_no_plan(office: Office):
    await offer(office, credits=100_000)
    await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"})
    answer = await office.ask("POST", "/v1/customers/alice/packs", {"pack": "plan_1hr"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (402, "insufficient_credits")
    assert (error["needed"], error["available"]) == (100_000, 0)
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 200_000


async def test_what_is_not_affordable_changes_nothing_and_its_key_may_come_again(office: Office):
    await offer(office, credits=99_999)
    refused = await office.refused("POST", "/v1/customers/alice/packs", {"pack": "plan_1hr"}, once="plan:1")
    assert refused[:2] == (402, "insufficient_credits")
    assert len(await blocks_of_alice(office)) == 1
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1})
    assert (await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"}, once="plan:1"))["balance"] == 200_000


async def test_a_key_buys_once_however_often_and_whatever_became_of_the_pack(office: Office):
    await offer(office)
    body = {"pack": "plan_1hr", "metadata": {"companion_id": "c"}}
    answers = await asyncio.gather(
        *(office.ask("POST", "/v1/customers/alice/packs", body, once="plan:1") for _ in range(50))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert sum("x-idempotent-replayed" in answer.headers for answer in answers) == 49
    await office.ask("PATCH", "/v1/packs/plan_1hr", {"price": 5, "duration_seconds": None, "archived": True})
    again = await office.ask("POST", "/v1/customers/alice/packs", body, once="plan:1")
    assert again.text == answers[0].text
    other = {**body, "price": 7}
    assert (await office.refused("POST", "/v1/customers/alice/packs", other, once="plan:1"))[0] == 422
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 600_000


async def test_two_who_buy_at_once_do_not_end_their_plans_together(office: Office):
    await offer(office)
    answers = await asyncio.gather(*(office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"}) for _ in range(3)))
    ends = sorted(at(answer["expires_at"]) for answer in answers)
    assert [(later - earlier).total_seconds() for earlier, later in pairwise(ends)] == [3600, 3600]


async def test_an_archived_pack_is_sold_no_more(office: Office):
    pack = await offer(office)
    archived = await office.post(f"/v1/packs/{pack['id']}/archive", once="archive:1")
    assert archived["archived"]
    assert await office.post("/v1/packs/plan_1hr/archive") == archived
    refused = await office.refused("POST", "/v1/customers/alice/packs", {"pack": "plan_1hr"}, once="k")
    assert refused == (400, "invalid_request", "pack")
    assert (await office.refused("POST", "/v1/packs", HOUR))[:2] == (409, "already_exists")
    again = await office.ask("PATCH", "/v1/packs/plan_1hr", {"archived": False})
    assert (again.status_code, again.json()["archived"]) == (200, False)
    replayed = await office.ask("POST", f"/v1/packs/{pack['id']}/archive", once="archive:1")
    assert (replayed.json(), replayed.headers["x-idempotent-replayed"]) == (archived, "true")
    await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"}, once="k")


async def test_a_pack_is_changed_for_those_who_buy_later(office: Office):
    await offer(office, metrics=["chat_message"])
    first = await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"})
    answer = await office.ask("GET", "/v1/packs/plan_1hr")
    assert answer.headers["etag"] == '"1"'
    change = {"price": 50_000, "credits": 60_000, "duration_seconds": None, "apps": [office.app], "name": "Plan"}
    changed = await office.ask("PATCH", "/v1/packs/plan_1hr", change, headers={"If-Match": '"1"'})
    view = changed.json()
    assert changed.headers["etag"] == '"2"'
    assert (view["price"], view["credits"], view["duration_seconds"]) == (50_000, 60_000, None)
    assert view["restrictions"] == {"apps": [office.app], "metrics": ["chat_message"], "models": []}
    stale = await office.ask("PATCH", "/v1/packs/plan_1hr", {"price": 1}, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["error"]["code"]) == (412, "version_mismatch")
    same = await office.ask("PATCH", "/v1/packs/plan_1hr", {"price": 50_000})
    assert same.json() == view
    second = await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"})
    blocks = {block["id"]: block for block in await blocks_of_alice(office)}
    assert blocks[first["block_id"]]["restrictions"]["apps"] == []
    assert blocks[second["block_id"]]["restrictions"]["apps"] == [office.app]
    assert second["expires_at"] is None


async def test_packs_are_listed_newest_first(office: Office):
    for name in ("a", "b", "c"):
        await office.post("/v1/packs", {**HOUR, "key": name})
    page = await office.get("/v1/packs?limit=2")
    assert [pack["key"] for pack in page["data"]] == ["c", "b"]
    rest = await office.get(f"/v1/packs?limit=2&cursor={page['next_cursor']}")
    assert [pack["key"] for pack in rest["data"]] == ["a"]
    assert not rest["has_more"]


NOT_PACKS: list[tuple[dict[str, Any], str]] = [
    ({"key": ""}, "key"),
    ({"key": " a"}, "key"),
    ({"key": "pck_1"}, "key"),
    ({"key": "a\u0000"}, "key"),
    ({"name": ""}, "name"),
    ({"price": -1}, "price"),
    ({"price": 1.5}, "price"),
    ({"price": 10**30}, "price"),
    ({"credits": 0}, "credits"),
    ({"duration_seconds": 0}, "duration_seconds"),
    ({"duration_seconds": 10**12}, "duration_seconds"),
    ({"priority": 10**9}, "priority"),
    ({"metrics": [""]}, "metrics[0]"),
    ({"metadata": 1}, "metadata"),
    ({"expires_at": "2036-01-01T00:00:00Z"}, "expires_at"),
]


async def test_a_pack_that_is_not_right_is_refused_with_its_place(office: Office):
    for body, param in NOT_PACKS:
        assert await office.refused("POST", "/v1/packs", {**HOUR, **body}) == (400, "invalid_request", param), body
    assert (await office.get("/v1/packs"))["data"] == []


async def test_who_may_sell_and_who_may_buy(office: Office):
    assert (await office.refused("POST", "/v1/packs", HOUR, key="reader"))[0] == 403
    await offer(office)
    assert len((await office.get("/v1/packs", key="reader"))["data"]) == 1
    assert (await office.refused("POST", "/v1/customers/alice/packs", {"pack": "plan_1hr"}, key="reader"))[0] == 403
    assert (await office.refused("POST", "/v1/customers/alice/packs", {"pack": "plan_1hr"}, key="test"))[0] == 404
    assert (await office.refused("GET", "/v1/packs/plan_2hr"))[0] == 404
    assert (await office.get("/v1/packs", key="test"))["data"] == []


async def test_one_answer_for_one_key_when_a_pack_is_offered(office: Office):
    answers = await asyncio.gather(*(office.ask("POST", "/v1/packs", HOUR, once="pack:1") for _ in range(5)))
    assert {(answer.status_code, answer.text) for answer in answers} == {(201, answers[0].text)}
    assert (await office.refused("POST", "/v1/packs", {**HOUR, "price": 1}, once="pack:1"))[0] == 422


@pytest.mark.sqlite
async def test_a_purchase_is_told_to_the_outbox_with_the_whole_block(office: Office):
    pack = await offer(office)
    await office.post("/v1/customers/alice/packs", {"pack": "plan_1hr"})
    async with office.gateway.services.database.engine.connect() as connection:
        rows = await connection.exec_driver_sql("SELECT body FROM ledger_event WHERE type = 'pack.purchased'")
        (body,) = (text for (text,) in rows)
    assert '"cause":"bought"' in body
    assert f'"pack":"{pack["id"]}"' in body
    assert '"expires_at_us":' in body
