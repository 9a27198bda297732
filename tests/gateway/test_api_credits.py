"""Grants, balances, blocks and the statement, as a tenant's server sees them."""

import asyncio
from typing import Any

from gateway.clock import time_text
from gateway.identity.wallets import customer_wallet
from ledger.commands import Grant
from ledger.model import Funding, Scope
from pricing.money import CREDIT
from tests.gateway.office import Office

PLAN_PRIORITY = 10

SEED_WALLET = {
    "credits": 500000,
    "metadata": {"source": "wallet_recharge", "payment_id": "pay_abc123", "amount_paid": "499"},
}
SEED_FREE = {"credits": 50000, "metadata": {"source": "free_conversation", "conversation_id": "conv_789"}}
SEED_PLAN = {
    "credits": 200000,
    "expires_at": "2096-04-13T11:00:00Z",
    "metadata": {"source": "plan_1hr", "companion_id": "companion_42", "priority": PLAN_PRIORITY},
}


async def test_the_chat_app_of_the_seed_sees_its_wallet_plan_and_free_views(office: Office):
    customer = await office.post("/v1/customers", {"external_id": "user_12345"}, once="signup:user_12345")
    for key, body in (("topup:1", SEED_WALLET), ("convo-grant:1", SEED_FREE), ("topup:plan-grant-1", SEED_PLAN)):
        await office.post("/v1/topup/grant", {"customer_id": customer["id"], **body}, once=key)

    view = await office.get(f"/v1/customers/{customer['id']}/credits?include_blocks=true")
    blocks = view["blocks"]

    assert view["customer_id"] == customer["id"]
    assert view["balance"] == 750_000
    assert view["balance_decimal"] == "750"
    plans = [block for block in blocks if block["priority"] == PLAN_PRIORITY]
    assert blocks[0] == plans[0], "the plan burns first"
    assert sum(block["remaining_amount"] for block in plans) == 200_000
    assert max(block["expires_at"] for block in plans) == "2096-04-13T11:00:00Z"
    assert plans[0]["metadata"] == SEED_PLAN["metadata"]
    wallet = [block for block in blocks if block["expires_at"] is None and block["source"] == "wallet_recharge"]
    assert sum(block["remaining_amount"] for block in wallet) == 500_000
    assert [block["remaining_amount"] for block in blocks if block["source"] == "free_conversation"] == [50_000]
    assert [block["funding"] for block in blocks] == ["external"] * 3


async def test_each_view_of_the_chat_app_follows_what_is_spent_reserved_and_expired(office: Office):
    """Plan credits burn first, then the oldest; what has expired is in no view."""
    plan = {**SEED_PLAN, "expires_at": time_text(office.clock.now_us() + 3_600_000_000)}
    for body in (SEED_WALLET, SEED_FREE, plan, SEED_PLAN):
        await office.post("/v1/topup/grant", {"customer_id": "ann", **body})
    await spend(office, 150_000)
    held = await office.post("/v1/reservations", {"customer_id": "ann", "credits": 30_000})
    assert await seed_views(office) == {
        "wallet": 500_000,
        "plan": 250_000,
        "plan_expires_at": SEED_PLAN["expires_at"],
        "free": 50_000,
        "messages": 800,
    }
    assert (await office.get("/v1/customers/ann/credits"))["reserved"] == 30_000
    await office.post(f"/v1/reservations/{held['id']}/release")

    office.clock.pass_s(3600)
    await spend(office, 230_000)

    views = await seed_views(office)
    assert (views["plan"], views["plan_expires_at"]) == (0, None)
    assert (views["wallet"], views["free"], views["messages"]) == (470_000, 50_000, 520)


async def spend(office: Office, credits: int) -> None:
    held = await office.post("/v1/reservations", {"customer_id": "ann", "credits": credits})
    await office.post(f"/v1/reservations/{held['id']}/commit", {"credits": credits})


async def seed_views(office: Office) -> dict[str, Any]:
    """As the walk-through computes them from one answer."""
    view = await office.get("/v1/customers/ann/credits?include_blocks=true")
    blocks = view["blocks"]
    plans = [block for block in blocks if block["priority"] == PLAN_PRIORITY]
    return {
        "wallet": sum(
            block["remaining_amount"]
            for block in blocks
            if block["expires_at"] is None and block["source"] == "wallet_recharge"
        ),
        "plan": sum(block["remaining_amount"] for block in plans),
        "plan_expires_at": max((block["expires_at"] for block in plans), default=None),
        "free": sum(block["remaining_amount"] for block in blocks if block["source"] == "free_conversation"),
        "messages": view["balance"] // 1000,
    }


async def test_a_block_of_the_future_is_shown_and_counted_but_pays_nothing_yet(office: Office):
    customer = await office.post("/v1/customers", {"external_id": "ann"})
    begins_us = office.clock.now_us() + 60_000_000
    await operator_grants(office, customer["id"], effective_at_us=begins_us)
    view = await office.get("/v1/customers/ann/credits?include_blocks=true")
    assert (view["balance"], view["effective_balance"]) == (1000, 0)
    assert view["blocks"][0]["effective_at"] == time_text(begins_us)
    office.clock.pass_s(61)
    assert (await office.get("/v1/customers/ann/credits"))["effective_balance"] == 1000


async def operator_grants(office: Office, customer_id: str, **fields: Any) -> None:
    """A credit that the operator was paid for."""
    services = office.gateway.services
    command = Grant(
        id=services.new_id("cmd"),
        scope=Scope(office.tenant, "live"),
        wallet=customer_wallet(office.tenant, "live", customer_id),
        asset=CREDIT.code,
        block_id=services.new_id("blk"),
        amount=CREDIT.parse("1"),
        funding=Funding.PAID,
        operator_paid=True,
        **fields,
    )
    await services.ledger.execute(command)


async def test_a_wallet_of_a_thousand_blocks_shows_all_of_them(office: Office):
    customer = await office.post("/v1/customers", {"external_id": "ann"})
    await asyncio.gather(*(operator_grants(office, customer["id"]) for _ in range(1_010)))
    view = await office.get("/v1/customers/ann/credits?include_blocks=true")
    assert len(view["blocks"]) == len({block["id"] for block in view["blocks"]}) == 1_010
    assert view["balance"] == sum(block["remaining_amount"] for block in view["blocks"]) == 1_010_000


async def test_a_recurring_grant_carries_over_no_more_than_its_cap(office: Office):
    body = {"customer_id": "ann", "credits": 50_000, "source": "monthly_free", "accumulation_cap": 80_000}
    await office.post("/v1/topup/grant", {"customer_id": "ann", "credits": 7000, "source": "gift"})
    first = await office.post("/v1/topup/grant", body, once="month:1")
    await spend(office, 17_000)
    second = await office.post("/v1/topup/grant", body, once="month:2")
    assert (first["lapsed_amount"], second["lapsed_amount"]) == (0, 10_000)
    assert (second["balance_before"], second["balance_after"]) == (40_000, 80_000)
    assert await office.post("/v1/topup/grant", body, once="month:2") == second
    view = await office.get("/v1/customers/ann/credits?include_blocks=true")
    assert [block["remaining_amount"] for block in view["blocks"]] == [30_000, 50_000]
    line = (await office.get("/v1/customers/ann/transactions"))["data"][0]
    assert (line["type"], line["amount"]) == ("grant", 40_000)
    assert sorted(part["amount"] for part in line["parts"]) == [-10_000, 50_000]


async def test_a_grant_tells_the_block_and_the_balance(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "user_1", "credits": 1500})
    answer = await office.post("/v1/topup/grant", {"end_user_id": "user_1", **SEED_PLAN})

    assert answer["amount_granted"] == 200_000
    assert answer["balance_before"] == 1500
    assert answer["balance_before_decimal"] == "1.5"
    assert answer["balance"] == answer["balance_after"] == 201_500
    assert answer["ledger_id"] == answer["block"]["id"]
    assert answer["block"]["priority"] == PLAN_PRIORITY
    assert answer["block"]["source"] == "plan_1hr"
    assert answer["block"]["remaining_amount_decimal"] == "200"


async def test_a_customer_is_created_on_first_use_under_any_of_the_three_names(office: Office):
    by_name = [
        await office.post("/v1/topup/grant", {name: "user_1", "credits": 1000})
        for name in ("customer_id", "end_user_id", "external_user_id")
    ]
    assert len({answer["customer_id"] for answer in by_name}) == 1
    assert [answer["balance"] for answer in by_name] == [1000, 2000, 3000]


NOT_GRANTS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"customer_id": "a", "end_user_id": "a"}, None),
    ({"customer_id": "cus_00000000000000000000000000"}, None),
    ({"customer_id": "evt_1"}, "customer_id"),
    ({"external_user_id": ""}, "external_user_id"),
    ({"external_user_id": "cus_" + "x" * 300}, "external_user_id"),
    ({"end_user_id": "a\u0000b"}, "end_user_id"),
    ({"customer_id": 12}, "customer_id"),
    ({"customer_id": "a", "credits": 0}, "credits"),
    ({"customer_id": "a", "credits": -1}, "credits"),
    ({"customer_id": "a", "credits": "1000"}, "credits"),
    ({"customer_id": "a", "credits": 1000.0}, "credits"),
    ({"customer_id": "a", "credits": True}, "credits"),
    ({"customer_id": "a", "credits": 10**30}, "credits"),
    ({"customer_id": "a", "credits": None}, "credits"),
    ({"customer_id": "a", "expire_at": "2096-01-01T00:00:00Z"}, "expire_at"),
    ({"customer_id": "a", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
    ({"customer_id": "a", "expires_at": "2096-01-01T00:00:00"}, "expires_at"),
    ({"customer_id": "a", "expires_at": "soon"}, "expires_at"),
    ({"customer_id": "a", "expires_at": 4102444800}, "expires_at"),
    ({"customer_id": "a", "expires_at": 4102444800.5}, "expires_at"),
    ({"customer_id": "a", "expires_at": "4102444800"}, "expires_at"),
    ({"customer_id": "a", "expires_at": "9999-12-31T23:59:59-14:00"}, "expires_at"),
    ({"customer_id": "a", "priority": "10"}, "priority"),
    ({"customer_id": "a", "metadata": {"priority": 10**9}}, "metadata.priority"),
    ({"customer_id": "a", "metadata": []}, "metadata"),
    ({"customer_id": "a", "metadata": {"a": "\x00"}}, "metadata"),
    ({"customer_id": "a", "metadata": {"a": "x" * 20_000}}, "metadata"),
    ({"customer_id": "a", "source": "a\nb"}, "source"),
    ({"customer_id": "a", "apps": ["x", ""]}, "apps[1]"),
    ({"customer_id": "a", "accumulation_cap": 999}, None),
    ({"customer_id": "a", "accumulation_cap": "2000"}, "accumulation_cap"),
    ({"customer_id": "a", "accumulation_cap": 10**30}, "accumulation_cap"),
    ({"customer_id": "a", "idempotency_key": ""}, "idempotency_key"),
    ({"customer_id": "a", "idempotency_key": "ü"}, "idempotency_key"),
]


async def test_a_grant_that_is_not_right_is_refused_with_its_place(office: Office):
    for body, param in NOT_GRANTS:
        status, _, where = await office.refused("POST", "/v1/topup/grant", {"credits": 1000, **body})
        assert (status in (400, 404), where) == (True, param), body
        assert await balance_of_a(office) == 0


async def balance_of_a(office: Office) -> int:
    answer = await office.ask("GET", "/v1/customers/a/credits")
    balance: int = 0 if answer.status_code == 404 else answer.json()["balance"]
    return balance


UNHEARD_OF = (b'{"credits": 1e99999999999999999999}', b'{"metadata": {"a": 1e-99999999999999999999}}')
"""Exponents that no decimal can have."""


async def test_a_body_that_is_no_json_object_is_refused(office: Office):
    for content in (
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"credits": NaN}',
        b"1" * 10_000,
        *UNHEARD_OF,
    ):
        status, code, _ = await office.refused("POST", "/v1/topup/grant", content=content)
        assert (status, code) == (400, "invalid_request"), content[:20]


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(office: Office):
    status, code, _ = await office.refused("POST", "/v1/topup/grant", content=b" " * (2**20 + 1))
    assert (status, code) == (413, "request_too_large")


async def test_a_priority_that_is_only_the_tenants_own_note_is_kept_and_not_read(office: Office):
    body = {
        "customer_id": "user_1",
        "credits": 1000,
        "metadata": {"priority": "high", "share": 0.1, "deep": {"a": [1]}},
    }
    answer = await office.post("/v1/topup/grant", body)
    assert answer["block"]["priority"] == 0
    [block] = (await office.get("/v1/customers/user_1/credits?include_blocks=true"))["blocks"]
    assert block["metadata"] == body["metadata"]


async def test_a_restricted_block_counts_only_where_it_may_pay(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "user_1", "credits": 1000, "models": ["gpt-4o"]})
    await office.post("/v1/topup/grant", {"customer_id": "user_1", "credits": 200, "apps": ["app_other"]})
    path = "/v1/customers/user_1/credits"
    assert (await office.get(path))["balance"] == 1200
    assert (await office.get(path))["effective_balance"] == 0
    assert (await office.get(f"{path}?model=gpt-4o"))["effective_balance"] == 1000


async def test_the_same_key_twenty_times_at_once_has_one_effect_and_one_answer(office: Office):
    body = {"customer_id": "user_1", **SEED_PLAN}
    answers = await asyncio.gather(
        *(office.ask("POST", "/v1/topup/grant", body, once="convo-grant:1") for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("x-idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert (await office.get("/v1/customers/user_1/credits"))["balance"] == 200_000


async def test_a_key_in_the_body_is_the_same_as_in_the_header(office: Office):
    first = await office.ask("POST", "/v1/topup/grant", {"customer_id": "a", "credits": 7, "idempotency_key": "k"})
    again = await office.ask("POST", "/v1/topup/grant", {"customer_id": "a", "credits": 7}, once="k")
    assert again.content == first.content
    assert again.headers["x-idempotent-replayed"] == "true"
    both = await office.refused(
        "POST", "/v1/topup/grant", {"customer_id": "a", "credits": 7, "idempotency_key": "k"}, once="l"
    )
    assert both == (400, "invalid_request", "idempotency_key")


async def test_a_key_with_another_body_is_refused_and_grants_nothing(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "a", "credits": 1000}, once="k")
    refused = await office.refused("POST", "/v1/topup/grant", {"customer_id": "a", "credits": 1001}, once="k")
    assert refused == (422, "idempotency_key_reused", None)
    assert (await office.get("/v1/customers/a/credits"))["balance"] == 1000


async def test_a_key_belongs_to_its_tenant_and_mode(office: Office):
    for key in ("live", "test", "other"):
        answer = await office.ask("POST", "/v1/topup/grant", {"customer_id": "a", "credits": 1000}, once="k", key=key)
        assert answer.status_code == 200
        assert "x-idempotent-replayed" not in answer.headers


async def test_a_grant_is_repeated_as_it_was_even_after_its_block_has_expired(office: Office):
    body = {"customer_id": "a", "credits": 1000, "expires_at": time_text(office.clock.now_us() + 3_600_000_000)}
    first = await office.post("/v1/topup/grant", body, once="plan")
    assert (await office.get("/v1/customers/a/credits"))["balance"] == 1000
    office.clock.pass_s(3600)
    view = await office.get("/v1/customers/a/credits?include_blocks=true")
    assert (view["balance"], view["blocks"]) == (0, [])
    assert await office.post("/v1/topup/grant", body, once="plan") == first
    assert (await office.refused("POST", "/v1/topup/grant", body, once="late"))[2] == "expires_at"


async def test_the_statement_has_a_line_for_everything_that_happened_newest_first(office: Office):
    for credits in (1000, 2000, 3000):
        await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": credits})
    charged = await office.chat()
    lines = (await office.get("/v1/customers/alice/transactions"))["data"]
    assert [line["type"] for line in lines] == ["charge", "grant", "grant", "grant"]
    assert lines[0]["amount_decimal"] == f"-{charged.json()['usage']['cost']}"
    assert lines[1]["amount"] == 3000
    assert sum(len(line["parts"]) for line in lines) == 4


async def test_a_statement_is_read_in_pages_without_gaps_or_repeats(office: Office):
    for credits in range(1, 8):
        await office.post("/v1/topup/grant", {"customer_id": "a", "credits": credits})
    seen, cursor = [], ""
    while True:
        page = await office.get(f"/v1/customers/a/transactions?limit=3{cursor}")
        seen += [line["amount"] for line in page["data"]]
        if not page["has_more"]:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == [7, 6, 5, 4, 3, 2, 1]
    assert page["next_cursor"] is None


async def test_a_cursor_that_is_none_of_ours_is_refused(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "a", "credits": 1})
    for cursor in ("x", "1", "1.x", "-1.0", "9" * 150, "9" * 30 + ".1", "1.1.1"):
        status, _, param = await office.refused("GET", f"/v1/customers/a/transactions?cursor={cursor}")
        assert (status, param) == (400, "cursor"), cursor


async def test_looking_at_a_user_whom_nobody_has_seen_creates_nobody(office: Office):
    for path in ("", "/credits", "/transactions"):
        assert await office.refused("GET", f"/v1/customers/nobody{path}") == (404, "not_found", None)
    assert (await office.get("/v1/customers"))["data"] == []


async def test_a_name_with_a_slash_in_it_is_a_name(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "team/ann@example.com", "credits": 5})
    assert (await office.get("/v1/customers/team%2Fann%40example.com/credits"))["balance"] == 5


async def test_customers_are_listed_newest_first_and_found_by_their_own_id(office: Office):
    made = [await office.post("/v1/customers", {"external_id": f"u{number}"}) for number in range(5)]
    first = await office.get("/v1/customers?limit=3")
    rest = await office.get(f"/v1/customers?limit=3&cursor={first['next_cursor']}")
    assert first["data"] + rest["data"] == made[::-1]
    assert (first["has_more"], rest["has_more"], rest["next_cursor"]) == (True, False, None)
    assert (await office.get("/v1/customers?external_id=u2"))["data"] == [made[2]]
    assert await office.get(f"/v1/customers/{made[2]['id']}") == made[2] == await office.get("/v1/customers/u2")


async def test_creating_a_customer_again_finds_them_and_replaces_their_metadata(office: Office):
    first = await office.ask("POST", "/v1/customers", {"external_id": "u", "metadata": {"a": 1}}, once="k")
    again = await office.ask("POST", "/v1/customers", {"external_id": "u"})
    changed = await office.post("/v1/customers", {"external_id": "u", "metadata": {"b": 2.5}})
    replayed = await office.ask("POST", "/v1/customers", {"external_id": "u", "metadata": {"a": 1}}, once="k")
    assert (first.status_code, again.status_code, replayed.status_code) == (201, 200, 201)
    assert again.json() == first.json() == replayed.json()
    assert changed == {**first.json(), "metadata": {"b": 2.5}, "version": 2}
    assert replayed.headers["x-idempotent-replayed"] == "true"
    assert await office.refused("POST", "/v1/customers", {"external_id": "v"}, once="k") == (
        422,
        "idempotency_key_reused",
        None,
    )


async def test_customers_are_created_once_by_twenty_at_once(office: Office):
    answers = await asyncio.gather(
        *(office.ask("POST", "/v1/customers", {"external_id": "u"}, once="k") for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
