"""A person who asks to be forgotten is in no row of any table afterwards, and the books still hold."""

import asyncio
from typing import Any, Final

import pytest
from sqlalchemy import update
from sqlmodel import col

from gateway.app import Gateway
from gateway.database import of
from gateway.errors import ApiError
from gateway.identity.wallets import customer_wallet
from gateway.tables import Customer
from ledger.commands import Debit, Reserve, ReserveLeg
from ledger.errors import LedgerUnavailable
from ledger.model import Charge, ReservationRef, Scope, Settlement, UsageRecord
from ledger.verify import verify
from tests.gateway.office import Office
from tests.gateway.rig import open_store
from tests.gateway.test_isolation import CHAT, rows_of

SAID: Final = "zebra-4711"
NAME: Final = f"{SAID}@example.com"
ABOUT: Final[dict[str, Any]] = {"note": SAID, SAID: [{"deep": SAID}]}


def holders(office: Office, said: str = SAID) -> set[str]:
    """The tables with a row of the tenant that has the text."""
    rows = rows_of(office.gateway.services.settings.database_url, office.tenant)
    return {table for table, found in rows.items() if any(said in row for row in found)}


@pytest.fixture
def office(till: Office) -> Office:
    """Payments know people, too."""
    return till


async def live(office: Office, name: str = NAME, about: dict[str, Any] = ABOUT) -> str:
    """Put a person everywhere where one can be; our id of them."""
    services = office.gateway.services
    made = await office.post("/v1/customers", {"external_id": name, "metadata": about}, once="create")
    grant = {"customer_id": name, "credits": 5_000_000, "metadata": about, "expires_at": "2096-01-01T00:00:00Z"}
    await office.post("/v1/topup/grant", grant)
    say = {"X-Quota-User": name, "Idempotency-Key": "chat"}
    spoken = {**CHAT, "messages": [{"role": "user", "content": f"I am {name}"}], "simulate": {"text": name}}
    assert (await office.ask("POST", "/v1/chat/completions", spoken, headers=say)).status_code == 200
    await office.ask("PATCH", f"/v1/customers/{name}", {"settings": {"auto_buy_pack": f"{name}"[:40]}})
    await office.post("/v1/billable-metrics", {"key": "message"}, once="metric")
    rule = {"billable_metric_key": "message", "cost_type": "flat", "credit_cost": 1}
    await office.post("/v1/metering-rules", rule, once="rule")
    event = {"customer_id": name, "billable_metric_key": "message", "metadata": about}
    charged = await office.ask("POST", "/v1/usage", event)
    assert charged.status_code == 202
    await office.post(f"/v1/requests/{charged.json()['id']}/refund", {"reason": SAID}, once="refund")
    task = {"customer_id": name, "credits": 1, "metadata": about}
    held = await office.post("/v1/reservations", task, once="task")
    await office.post(f"/v1/reservations/{held['id']}/commit", {"credits": 1}, once="commit")
    batch = {"events": [event, {**event, "units": 2}]}
    assert (await office.ask("POST", "/v1/usage/batch", batch, once="batch")).status_code == 202
    pack = {"key": "hour", "name": "Hour", "price": 1, "credits": 1, "duration_seconds": 3600}
    await office.post("/v1/packs", pack, once="pack")
    await office.post(f"/v1/customers/{name}/packs", {"pack": "hour", "metadata": about}, once="buy")
    back = {"success_url": f"https://example.com/{SAID}", "cancel_url": f"https://example.com/?who={SAID}"}
    await office.post("/v1/checkout", {"customer_id": name, "package_id": "usd-5", **back}, once="checkout")
    subject = {"type": "customer", "id": name}
    budget = {"subject": subject, "credits": 10**9, "period": {"every": "month"}, "name": f"{SAID}'s"}
    await office.post("/v1/budgets", budget, once="budget")
    # As a reservation has it, and what is charged if nobody settles it.
    customer_id: str = made["id"]
    wallet, scope = customer_wallet(office.tenant, "live", customer_id), Scope(office.tenant, "live")
    usage = UsageRecord(request_id="req_usage", customer_id=customer_id, metadata=about)
    hold: dict[str, Any] = {"scope": scope, "asset": "credit", "legs": (ReserveLeg((wallet,), 5, 5),)}
    hold["asset"] = (await services.ledger.wallet_view(wallet)).wallet.asset  # type: ignore[union-attr]
    charged = Settlement((Charge(5),), usage)
    debit = ReservationRef(*scope, "rsv_debit")
    await services.ledger.execute(Debit(id=services.new_id("cmd"), reservation=debit, settlement=charged, **hold))
    open_one = ReservationRef(*scope, "rsv_open")
    await services.ledger.execute(
        Reserve(id=services.new_id("cmd"), reservation=open_one, ttl_us=10**9, metadata=about, mark=charged, **hold)
    )
    return customer_id


async def verified(office: Office) -> None:
    settings = office.gateway.services.settings
    store = await open_store(settings.database_url, clock=office.clock.now_us)
    try:
        assert (await verify(store, operator=office.tenant)).violations == ()
    finally:
        await store.close()


async def test_no_table_holds_what_was_known_of_a_person(office: Office):
    customer_id = await live(office)
    before = holders(office)
    assert before >= {
        "budgets",
        "customers",
        "kept_answers",
        "ledger_block",
        "ledger_event",
        "ledger_reservation",
        "ledger_usage",
    }
    assert "ledger_response" in holders(office, "chatcmpl")
    statement = await office.get(f"/v1/customers/{customer_id}/transactions")
    answer = await office.ask("DELETE", f"/v1/customers/{NAME}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert holders(office) == set()
    assert holders(office, "chatcmpl") == set()
    assert statement["data"], "numbers are kept"
    assert "ledger_transfer" in holders(office, customer_id)
    (budget,) = (await office.get("/v1/budgets"))["data"]
    assert (budget["subject"]["id"], budget["name"], budget["archived"]) == (customer_id, "", True)
    await verified(office)


@pytest.mark.parametrize("by", ["external id", "our id"])
async def test_nobody_finds_who_is_erased(office: Office, by: str):
    customer_id = await live(office)
    assert (
        await office.ask("DELETE", f"/v1/customers/{NAME if by == 'external id' else customer_id}")
    ).status_code == 204
    for name in (NAME, customer_id):
        for method, path, body in (
            ("GET", f"/v1/customers/{name}", None),
            ("GET", f"/v1/customers/{name}/credits", None),
            ("GET", f"/v1/customers/{name}/transactions", None),
            ("PATCH", f"/v1/customers/{name}", {"metadata": ABOUT}),
            ("DELETE", f"/v1/customers/{name}", None),
        ):
            assert (await office.refused(method, path, body))[:2] == (404, "not_found"), (method, path)
    refused = await office.refused("POST", "/v1/topup/grant", {"customer_id": customer_id, "credits": 1})
    assert refused[:2] == (404, "not_found")
    assert (await office.get("/v1/customers"))["data"] == []
    assert (await office.get(f"/v1/customers?external_id={NAME}"))["data"] == []
    assert holders(office) == set()


async def test_who_comes_back_is_somebody_new(office: Office):
    erased = await live(office)
    assert (await office.ask("DELETE", f"/v1/customers/{erased}")).status_code == 204
    assert (await office.chat(NAME)).status_code == 402, "without the credits of before"
    back = await office.ask("POST", "/v1/customers", {"external_id": NAME, "metadata": ABOUT}, once="create")
    assert back.status_code == 200, "an answer that was kept of before is not given again"
    customer = back.json()
    assert customer["id"] != erased
    assert (customer["metadata"], customer["settings"]["auto_buy_pack"]) == (ABOUT, None)
    assert (await office.get(f"/v1/customers/{NAME}/credits"))["balance"] == 0


async def test_a_grant_right_after_is_for_who_has_the_name_now(office: Office):
    erased = await live(office)
    before = await office.post("/v1/topup/grant", {"customer_id": NAME, "credits": 1000})
    assert before["customer_id"] == erased
    assert (await office.ask("DELETE", f"/v1/customers/{NAME}")).status_code == 204
    after = await office.post("/v1/topup/grant", {"customer_id": NAME, "credits": 1000})
    assert after["customer_id"] != erased


async def test_another_process_that_knows_the_name_hears_of_it_or_looks_again(office: Office):
    erased = await live(office)
    second = Gateway(office.gateway.services.settings, now_us=office.clock.now_us, open_store=open_store)
    await second.start()
    try:
        theirs = second.services.customers
        assert await theirs.resolve(office.tenant, "live", NAME) == erased
        await office.ask("DELETE", f"/v1/customers/{NAME}")
        assert await theirs.resolve(office.tenant, "live", NAME) == erased, "nobody has told it here"
        theirs.forget()
        assert await theirs.resolve(office.tenant, "live", NAME) != erased
    finally:
        await second.stop()


async def test_what_is_left_of_their_credits_is_frozen(office: Office):
    customer_id = await live(office)
    await office.ask("DELETE", f"/v1/customers/{NAME}")
    view = await office.gateway.services.ledger.wallet_view(customer_wallet(office.tenant, "live", customer_id))
    assert view is not None
    assert view.balance > 0
    assert (view.wallet.frozen, view.effective_balance) == (True, 0)


async def test_others_lose_nothing(office: Office):
    await office.post("/v1/customers", {"external_id": "bob", "metadata": {"note": "bob-note"}}, once="bob")
    await office.post("/v1/topup/grant", {"customer_id": "bob", "credits": 1000, "metadata": {"note": "bob-note"}})
    before = holders(office, "bob-note")
    await live(office)
    assert (await office.ask("DELETE", f"/v1/customers/{NAME}")).status_code == 204
    assert holders(office, "bob-note") == before == {"customers", "kept_answers", "ledger_block", "ledger_event"}
    replayed = await office.ask(
        "POST", "/v1/customers", {"external_id": "bob", "metadata": {"note": "bob-note"}}, once="bob"
    )
    assert replayed.headers["x-idempotent-replayed"] == "true"


async def test_an_erasure_that_was_cut_short_is_done_by_the_next_one(office: Office, monkeypatch: pytest.MonkeyPatch):
    erased = await live(office)

    async def away(*given: Any, **more: Any) -> None:
        raise LedgerUnavailable("the test took it away")

    with monkeypatch.context() as patch:
        patch.setattr(office.gateway.services.ledger, "erase", away)
        assert (await office.refused("DELETE", f"/v1/customers/{NAME}"))[0] == 503
    assert holders(office) > {"ledger_block"}, "some of it is still there"
    # Nobody finds them, and nobody new can have the name before it is done.
    for method, path, body in (
        ("GET", f"/v1/customers/{NAME}", None),
        ("GET", f"/v1/customers/{erased}", None),
        ("POST", "/v1/customers", {"external_id": NAME}),
        ("POST", "/v1/topup/grant", {"customer_id": NAME, "credits": 1}),
    ):
        assert (await office.refused(method, path, body))[:2] == (404, "not_found"), (method, path)
    assert (await office.chat(NAME)).status_code == 404
    assert (await office.ask("DELETE", f"/v1/customers/{NAME}")).status_code == 204
    assert holders(office) == set()
    assert (await office.ask("DELETE", f"/v1/customers/{erased}")).status_code == 404
    await verified(office)


async def test_of_many_who_erase_at_once_all_are_told_that_it_is_done(office: Office):
    await live(office)
    answers = await asyncio.gather(*(office.ask("DELETE", f"/v1/customers/{NAME}") for _ in range(10)))
    assert {answer.status_code for answer in answers} <= {204, 404}
    assert 204 in {answer.status_code for answer in answers}
    assert holders(office) == set()
    await verified(office)


async def test_requests_beside_an_erasure_are_served_or_refused_and_the_books_hold(office: Office):
    await live(office)
    requests = [office.chat(NAME) for _ in range(10)]
    grants = [office.ask("POST", "/v1/topup/grant", {"customer_id": NAME, "credits": 9}) for _ in range(5)]
    erased, *answers = await asyncio.gather(office.ask("DELETE", f"/v1/customers/{NAME}"), *requests, *grants)
    assert erased.status_code == 204
    assert {answer.status_code for answer in answers} <= {200, 402, 403, 404}
    await verified(office)


async def test_a_default_grant_that_was_due_is_due_no_more(office: Office):
    await office.post("/v1/customers", {"external_id": NAME})
    services = office.gateway.services
    due = {"asset": "credit", "grant": {"amount": 1}}
    async with services.database.write(of(office.tenant, "live")) as connection:
        await connection.execute(update(Customer).where(col(Customer.external_id) == NAME).values(welcome=due))
    customer_id = (await office.get(f"/v1/customers/{NAME}"))["id"]
    await office.ask("DELETE", f"/v1/customers/{NAME}")
    with pytest.raises(ApiError, match="no customer"):
        await services.customers.named(office.tenant, "live", customer_id)
    assert await services.ledger.wallet_view(customer_wallet(office.tenant, "live", customer_id)) is None
