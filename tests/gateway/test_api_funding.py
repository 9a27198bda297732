"""The developer's wallet, the grant pool, and grants from it."""

import asyncio

from tests.gateway.office import Office

WELCOME = b'{"external_user_id": "alice", "amount": 0.50, "description": "Welcome bonus"}'


async def test_a_developer_fills_the_pool_and_gives_from_it(office: Office):
    await office.fund_developer("1000")
    pool = await office.post("/v1/funding/pool", {"credits": 300_000})
    assert (pool["amount_moved"], pool["balance_before"], pool["balance_after"]) == (300_000, 0, 300_000)

    answer = (await office.ask("POST", "/v1/funding/grant", content=WELCOME)).json()
    assert answer["amount_granted"] == 50_000
    assert answer["balance_after_decimal"] == "50"
    assert answer["duplicate"] is False

    funding = await office.get("/v1/funding")
    assert funding["developer"]["balance_decimal"] == "700"
    assert funding["pool"]["balance_decimal"] == "250"
    assert funding["pool"]["balance_usd"] == "2.5"


async def test_a_grant_is_spent_before_the_users_own_credits_and_only_in_this_app(office: Office):
    await office.fund_developer("100")
    await office.post("/v1/funding/pool", {"amount": "0.50"})
    own = await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000, "priority": 10})
    given = (await office.ask("POST", "/v1/funding/grant", content=WELCOME)).json()

    charged = await office.chat()
    receipt = await office.get(f"/v1/requests/{charged.headers['x-request-id']}")
    assert [payment["block_id"] for payment in receipt["payments"]] == [given["ledger_id"]]

    blocks = (await office.get("/v1/customers/alice/credits?include_blocks=true"))["blocks"]
    assert [block["id"] for block in blocks] == [given["ledger_id"], own["ledger_id"]]
    assert blocks[0]["restrictions"]["apps"] == [office.app]
    assert blocks[0]["funding"] == "developer_grant"
    assert blocks[0]["metadata"] == {"description": "Welcome bonus"}


async def test_once_the_grant_is_used_up_the_users_own_balance_pays(office: Office):
    await office.fund_developer("100")
    await office.post("/v1/funding/pool", {"amount": "0.50"})
    own = await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 30_000})
    given = (await office.ask("POST", "/v1/funding/grant", content=WELCOME)).json()
    spent = []
    for credits in (20_000, 40_000):
        held = await office.post("/v1/reservations", {"customer_id": "alice", "credits": credits})
        await office.post(f"/v1/reservations/{held['id']}/commit", {"credits": credits})
        receipt = await office.get(f"/v1/requests/{held['request_id']}")
        spent.append({payment["block_id"]: payment["amount"] for payment in receipt["payments"]})
    assert spent == [{given["ledger_id"]: 20_000}, {given["ledger_id"]: 30_000, own["ledger_id"]: 10_000}]
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 20_000
    pool = (await office.get("/v1/funding"))["pool"]
    assert pool["balance"] == 50_000, "what was the developer's own price comes back to the pool"


async def test_a_pool_that_is_short_gives_nothing(office: Office):
    await office.fund_developer("100")
    await office.post("/v1/funding/pool", {"credits": 49_999})
    answer = await office.ask("POST", "/v1/funding/grant", content=WELCOME)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (402, "insufficient_credits")
    assert (error["needed"], error["needed_decimal"]) == (50_000, "50")
    assert (error["available"], error["available_decimal"]) == (49_999, "49.999")
    assert (await office.get("/v1/funding"))["pool"]["balance"] == 49_999


async def test_a_developer_who_is_short_moves_nothing(office: Office):
    assert (await office.refused("POST", "/v1/funding/pool", {"credits": 1}))[:2] == (402, "insufficient_credits")
    await office.fund_developer("1")
    assert (await office.refused("POST", "/v1/funding/pool", {"amount": "0.02"}))[:2] == (402, "insufficient_credits")


EXACT = {
    "0.1": "10",
    "0.50": "50",
    '"0.07"': "7",
    "1": "100",
    "1e-2": "1",
    "0.00000000001": "0.000000001",
    "12345678.90123456789": "1234567890.123456789",
}


async def test_dollars_are_read_exactly(office: Office):
    await office.fund_developer("4000000000")
    await office.post("/v1/funding/pool", {"credits": 3_000_000_000_000})
    for amount, credits in EXACT.items():
        content = f'{{"external_user_id": "alice", "amount": {amount}}}'
        answer = (await office.ask("POST", "/v1/funding/grant", content=content)).json()
        assert answer["amount_granted_decimal"] == credits


async def test_dollars_that_no_wallet_can_hold_are_refused(office: Office):
    numbers = ("0", "-1", "0.000000000001", "1e30", "1e999999")
    texts = ('"NaN"', '"1,5"', '"1_000"', '" 1"', '"1e3"', '"+1"', '".5"', '""')
    for amount in (*numbers, *texts, "null", "true", "[1]"):
        content = f'{{"external_user_id": "alice", "amount": {amount}}}'
        refused = await office.refused("POST", "/v1/funding/grant", content=content)
        assert refused == (400, "invalid_request", "amount"), amount


async def test_a_grant_repeated_is_the_same_grant_and_says_so(office: Office):
    await office.fund_developer("100")
    await office.post("/v1/funding/pool", {"credits": 100_000}, once="fill")
    assert (await office.post("/v1/funding/pool", {"credits": 100_000}, once="fill"))["balance_after"] == 100_000
    answers = await asyncio.gather(
        *(office.ask("POST", "/v1/funding/grant", content=WELCOME, once="welcome:alice") for _ in range(20))
    )
    bodies = [answer.json() for answer in answers]
    assert sum(body.pop("duplicate") for body in bodies) == 19
    assert all(body == bodies[0] for body in bodies)
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 50_000


async def test_one_amount_fills_a_pool(office: Office):
    for body in ({}, {"amount": "1", "credits": 1}):
        assert (await office.refused("POST", "/v1/funding/pool", body))[0] == 400


async def test_the_installations_key_has_no_pool(office: Office):
    assert await office.refused("GET", "/v1/funding", key="admin") == (403, "permission_denied", None)
    refused = await office.refused("POST", "/v1/funding/grant", {"external_user_id": "a", "amount": "1"}, key="admin")
    assert refused == (403, "permission_denied", None)
