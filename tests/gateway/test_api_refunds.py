"""Refunds and revocation: credits given back to who paid, and taken back from who got them."""

import asyncio
from decimal import Decimal
from typing import Any

import pytest

from gateway.identity.keys import KeyScope
from gateway.identity.wallets import customer_wallet
from gateway.ids import new_id
from gateway.installation import Books, add_tenant
from ledger.commands import TopUp
from pricing.money import CREDIT
from tests.gateway.office import Office

ONE_CREDIT = 1000


async def grant(office: Office, credits: int, **fields: Any) -> str:
    answer = await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": credits, **fields})
    block: str = answer["ledger_id"]
    return block


async def charge(office: Office) -> tuple[str, Decimal]:
    """A completion that alice pays: its id and its cost in credits."""
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    answer = await office.chat(max_tokens=100, simulate={"usage": usage})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-request-id"], Decimal(answer.json()["usage"]["cost"])


async def balance(office: Office) -> Decimal:
    return Decimal((await office.get("/v1/customers/alice/credits"))["balance_decimal"])


async def test_a_whole_charge_goes_back_to_the_wallet_and_shows_on_its_receipt(office: Office):
    await grant(office, ONE_CREDIT)
    request, cost = await charge(office)
    assert await balance(office) == 1 - cost

    answer = await office.post(f"/v1/requests/{request}/refund", {"reason": "cut off"}, once="refund:1")

    assert (Decimal(answer["amount_decimal"]), Decimal(answer["refunded_decimal"])) == (cost, cost)
    assert answer["balance"] == ONE_CREDIT
    assert await balance(office) == 1
    receipt = await office.get(f"/v1/requests/{request}")
    assert (receipt["status"], Decimal(receipt["refunded_decimal"])) == ("refunded", cost)
    assert Decimal(receipt["charged_decimal"]) == cost, "what was charged stays told"
    refund, charged, _ = (await office.get("/v1/customers/alice/transactions"))["data"]
    assert (refund["type"], charged["type"]) == ("refund", "charge")
    assert Decimal(refund["amount_decimal"]) == -Decimal(charged["amount_decimal"]) == cost
    assert refund["request_id"] == charged["request_id"] == request


async def test_a_part_goes_back_to_the_block_that_paid_last(office: Office):
    first = await grant(office, 1, priority=10)
    second = await grant(office, ONE_CREDIT)
    request, cost = await charge(office)
    assert cost > Decimal("0.001"), "the first block does not cover it"
    part = Decimal("0.000001")

    answer = await office.post(f"/v1/requests/{request}/refund", {"amount_decimal": str(part)})

    assert (Decimal(answer["amount_decimal"]), Decimal(answer["refunded_decimal"])) == (part, part)
    assert (await office.get(f"/v1/requests/{request}"))["status"] == "charged"
    left = {block["id"]: block for block in (await blocks(office))}
    assert first not in left
    assert Decimal(left[second]["remaining_amount_decimal"]) == 1 - (cost - Decimal("0.001")) + part


async def blocks(office: Office) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await office.get("/v1/customers/alice/credits?include_blocks=true"))["blocks"]
    return found


async def test_no_more_is_given_back_than_was_charged(office: Office):
    await grant(office, ONE_CREDIT)
    request, cost = await charge(office)
    path = f"/v1/requests/{request}/refund"
    await office.post(path, {"amount_decimal": "0.000001"})

    answer = await office.ask("POST", path, {"amount_decimal": str(cost)})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", "amount_decimal")
    assert Decimal(error["asked_decimal"]) == cost
    assert Decimal(error["refundable_decimal"]) == cost - Decimal("0.000001")
    assert (await office.refused("POST", path, {"credits": 10**9}))[2] == "credits"
    assert await balance(office) == 1 - cost + Decimal("0.000001")


async def test_a_refund_has_one_effect_for_each_key(office: Office):
    await grant(office, ONE_CREDIT)
    request, _ = await charge(office)
    path, part = f"/v1/requests/{request}/refund", {"amount_decimal": "0.00001"}
    first = await office.ask("POST", path, part, once="k")
    again = await office.ask("POST", path, part, once="k")
    assert again.content == first.content
    assert again.headers["x-idempotent-replayed"] == "true"
    assert await office.refused("POST", path, {}, once="k") == (422, "idempotency_key_reused", None)
    other, _ = await charge(office)
    refused = await office.refused("POST", f"/v1/requests/{other}/refund", part, once="k")
    assert refused == (422, "idempotency_key_reused", None)
    assert Decimal((await office.get(f"/v1/requests/{request}"))["refunded_decimal"]) == Decimal("0.00001")


async def test_fifty_refunds_of_everything_at_once_give_it_back_once(office: Office):
    await grant(office, ONE_CREDIT)
    request, cost = await charge(office)
    answers = await asyncio.gather(*(office.post(f"/v1/requests/{request}/refund") for _ in range(50)))
    assert sum(Decimal(answer["amount_decimal"]) for answer in answers) == cost
    assert {Decimal(answer["refunded_decimal"]) for answer in answers} == {cost}
    assert await balance(office) == 1


async def test_fifty_partial_refunds_at_once_give_back_what_fits(office: Office):
    await grant(office, ONE_CREDIT)
    request, cost = await charge(office)
    part = cost / 10
    answers = await asyncio.gather(
        *(office.ask("POST", f"/v1/requests/{request}/refund", {"amount_decimal": f"{part:f}"}) for _ in range(50))
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [400] * 40
    assert await balance(office) == 1


async def test_what_was_not_charged_is_not_refunded(office: Office):
    await grant(office, ONE_CREDIT)
    failed = await office.chat(model="gpt-4o-mini", simulate={"status": 500})
    assert failed.status_code == 502
    request = failed.headers["x-request-id"]
    assert await office.refused("POST", f"/v1/requests/{request}/refund") == (400, "invalid_request", None)
    assert await office.refused("POST", "/v1/requests/req_nobodys/refund") == (404, "not_found", None)
    assert await balance(office) == 1


NOT_REFUNDS: list[tuple[dict[str, Any], str | None]] = [
    ({"credits": 0}, "credits"),
    ({"credits": -1}, "credits"),
    ({"credits": 1.5}, "credits"),
    ({"credits": 10**30}, "credits"),
    ({"amount_decimal": "0"}, "amount_decimal"),
    ({"amount_decimal": "-1"}, "amount_decimal"),
    ({"amount_decimal": "1e3"}, "amount_decimal"),
    ({"amount_decimal": 1}, "amount_decimal"),
    ({"amount_decimal": "0.0000000001"}, "amount_decimal"),
    ({"credits": 1, "amount_decimal": "1"}, None),
    ({"amount": 1}, "amount"),
    ({"reason": "a\nb"}, "reason"),
]


async def test_a_refund_that_is_not_right_is_refused_with_its_place(office: Office):
    await grant(office, ONE_CREDIT)
    request, cost = await charge(office)
    for body, param in NOT_REFUNDS:
        refused = await office.refused("POST", f"/v1/requests/{request}/refund", body)
        assert refused == (400, "invalid_request", param), body
    assert await balance(office) == 1 - cost


@pytest.mark.parametrize("key", ["reader", "other", "test"])
async def test_who_may_not_give_credits_back_does_not(office: Office, key: str):
    await grant(office, ONE_CREDIT)
    request, cost = await charge(office)
    refused = await office.refused("POST", f"/v1/requests/{request}/refund", key=key)
    assert refused[0] == (403 if key == "reader" else 404)
    assert await balance(office) == 1 - cost


# Revocation.


async def test_what_is_free_of_a_block_is_revoked(office: Office):
    block = await grant(office, 2 * ONE_CREDIT)
    _, cost = await charge(office)
    path = f"/v1/customers/alice/credits/{block}/revoke"

    part = await office.post(path, {"credits": 500, "reason": "granted twice"}, once="r1")
    rest = await office.post(path)

    assert (part["revoked_amount_decimal"], part["owed_amount"], part["receivable"]) == ("0.5", 0, 0)
    assert part["block_id"] == block
    assert Decimal(rest["revoked_amount_decimal"]) == Decimal("1.5") - cost
    assert (rest["balance"], rest["owed_amount"]) == (0, 0)
    lines = (await office.get("/v1/customers/alice/transactions"))["data"]
    assert [line["type"] for line in lines] == ["revocation", "revocation", "charge", "grant"]
    assert lines[1]["reference"] == "granted twice"


async def test_a_clawback_makes_what_is_spent_a_debt_that_the_next_grant_repays(office: Office):
    block = await grant(office, ONE_CREDIT)
    _, cost = await charge(office)
    path = f"/v1/customers/alice/credits/{block}/revoke"

    answer = await office.post(path, {"clawback": True})

    assert Decimal(answer["revoked_amount_decimal"]) == 1 - cost
    assert Decimal(answer["owed_amount_decimal"]) == Decimal(answer["receivable_decimal"]) == cost
    assert Decimal(answer["balance_decimal"]) == -cost
    assert (await office.chat()).status_code == 402
    assert Decimal((await office.post(path, {"clawback": True}))["owed_amount_decimal"]) == 0
    await grant(office, ONE_CREDIT)
    assert await balance(office) == 1 - cost
    assert (await office.get("/v1/customers/alice/credits"))["receivable"] == 0


async def test_a_revocation_has_one_effect_for_each_key_and_block(office: Office):
    one, other = await grant(office, ONE_CREDIT), await grant(office, ONE_CREDIT)
    body = {"credits": 100}
    first = await office.ask("POST", f"/v1/customers/alice/credits/{one}/revoke", body, once="k")
    again = await office.ask("POST", f"/v1/customers/alice/credits/{one}/revoke", body, once="k")
    assert first.content == again.content
    assert again.headers["x-idempotent-replayed"] == "true"
    refused = await office.refused("POST", f"/v1/customers/alice/credits/{other}/revoke", body, once="k")
    assert refused == (422, "idempotency_key_reused", None)
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 1900


async def test_a_block_that_is_not_this_customers_is_not_found(office: Office):
    block = await grant(office, ONE_CREDIT)
    await office.post("/v1/customers", {"external_id": "bob"})
    refused = await office.refused("POST", f"/v1/customers/bob/credits/{block}/revoke")
    assert refused == (404, "not_found", None)
    assert (await office.refused("POST", f"/v1/customers/nobody/credits/{block}/revoke"))[0] == 404
    assert (await office.refused("POST", f"/v1/customers/alice/credits/{block}/revoke", key="reader"))[0] == 403
    for body in ({"credits": ONE_CREDIT + 1}, {"credits": 0}, {"credits": "1"}):
        refused = await office.refused("POST", f"/v1/customers/alice/credits/{block}/revoke", body)
        assert refused == (400, "invalid_request", "credits"), body
    assert await balance(office) == 1


async def test_what_came_out_of_a_pool_goes_back_to_it(office: Office):
    await office.fund_developer("100")
    await office.post("/v1/funding/pool", {"credits": 60_000})
    granted = await office.post("/v1/funding/grant", {"external_user_id": "alice", "amount": "0.50"})
    answer = await office.post(f"/v1/customers/alice/credits/{granted['ledger_id']}/revoke")
    assert (answer["revoked_amount"], answer["balance"]) == (50_000, 0)
    assert (await office.get("/v1/funding"))["pool"]["balance"] == 60_000


async def test_what_a_tenant_gives_back_of_paid_credits_it_owes_within_its_line(office: Office):
    """Or else its customers could spend one payment for ever, at the operator's cost."""
    services = office.gateway.services
    books = Books(services.database, services.ledger, services.tenants, services.customers)
    tenant = await add_tenant(books, "Limited", unfunded_limit=CREDIT.parse("0.01"))
    app = await services.tenants.create_app(tenant.id, "App")
    made = await services.tenants.create_key(tenant.id, "live", app_id=app.id, name="k", scopes=list(KeyScope))
    office.keys["limited"] = made.token
    customer = (await office.post("/v1/customers", {"external_id": "alice"}, key="limited"))["id"]
    payer = customer_wallet(tenant.id, "live", customer)
    paid = TopUp(
        id=new_id("cmd"),
        scope=payer.scope,
        wallet=payer,
        asset=CREDIT.code,
        block_id=new_id("blk"),
        amount=CREDIT.parse("100"),
        payment="ord_1",
    )
    await services.ledger.execute(paid)
    usage = {"prompt_tokens": 100_000, "completion_tokens": 100, "total_tokens": 100_100}
    answer = await office.chat(key="limited", max_tokens=100, simulate={"usage": usage})
    cost = Decimal(answer.json()["usage"]["cost"])
    assert cost > Decimal("0.01")
    path = f"/v1/requests/{answer.headers['x-request-id']}/refund"

    refused = (await office.ask("POST", path, key="limited")).json()["error"]

    assert refused["code"] == "insufficient_credits"
    assert (Decimal(refused["needed_decimal"]), Decimal(refused["available_decimal"])) == (cost, Decimal("0.01"))
    assert "your line" in refused["message"]
    given = await office.post(path, {"amount_decimal": "0.01"}, key="limited")
    assert Decimal(given["balance_decimal"]) == 100 - cost + Decimal("0.01")
    assert (await office.refused("POST", path, {"amount_decimal": "0.001"}, key="limited"))[0] == 402
