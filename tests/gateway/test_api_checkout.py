"""Packages, checkout and orders over the API: one order and one page, however often and wherever it is asked for."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import Gateway
from gateway.payments import checkout, stripe_api
from gateway.payments.processor_customers import ProcessorCustomer
from gateway.payments.service import Payments
from ledger.model import Scope
from tests.gateway.office import PUBLIC_URL, Office, open_office, paid_with
from tests.gateway.rig import open_store
from tests.servers.stripe import FakeStripe

ANN = {"customer_id": "ann", "package_id": "usd-10"}
BACK = {"success_url": "https://app.example.com/paid", "cancel_url": "https://app.example.com/back"}


def sessions(stripe: FakeStripe) -> list[Any]:
    return stripe.all("checkout.session")


def posts(stripe: FakeStripe, path: str = "/v1/checkout/sessions") -> int:
    return sum(asked.method == "POST" and asked.path == path for asked in stripe.requests)


def payments_of(office: Office) -> Payments:
    payments = office.gateway.services.payments
    assert payments is not None
    return payments


async def known_at_stripes(office: Office, name: str = "ann") -> ProcessorCustomer | None:
    customer = (await office.get(f"/v1/customers/{name}"))["id"]
    return await payments_of(office).customers.find(Scope(office.tenant, "live"), customer)


async def restarted(office: Office) -> None:
    """Another process in the place of the one that runs: nothing of what it had in mind is there."""
    settings = office.gateway.services.settings
    await office.gateway.stop()
    office.gateway._parts = None
    gateway = Gateway(settings, now_us=office.clock.now_us, open_store=open_store)
    await gateway.start()
    office.gateway = gateway
    office.client._transport.app = gateway  # type: ignore[attr-defined]


# Packages.


async def test_packages_are_shown_in_the_tenants_credits(till: Office):
    page = await till.get("/v1/packages")
    assert [package["id"] for package in page["data"]] == ["usd-5", "usd-10", "usd-25", "usd-50"]
    assert page["data"][1] == {
        "id": "usd-10",
        "price": "10.00",
        "price_minor": 1000,
        "currency": "usd",
        "credits": 1_000_000,
        "credits_decimal": "1000",
        "credits_usd": "10",
        "bonus_credits": 0,
        "bonus_credits_decimal": "0",
        "purchasable": True,
    }
    assert (page["has_more"], page["next_cursor"]) == (False, None)


async def test_an_operators_packages_have_their_own_worth_and_bonus(tmp_path: Path, stripe: FakeStripe):
    packages = [
        {"id": "small", "price": "10", "worth": "8.50"},
        {"id": "large", "price": "50", "bonus": "5"},
        {"id": "en", "price": "500", "currency": "jpy", "worth": "3"},
    ]
    async with open_office(tmp_path, **paid_with(stripe), packages=packages) as office:
        shown = {package["id"]: package for package in (await office.get("/v1/packages"))["data"]}
        assert list(shown) == ["en", "small", "large"]
        assert (shown["small"]["credits_decimal"], shown["small"]["bonus_credits_decimal"]) == ("850", "0")
        assert (shown["large"]["credits_decimal"], shown["large"]["bonus_credits_decimal"]) == ("5000", "500")
        assert (shown["en"]["price"], shown["en"]["price_minor"], shown["en"]["credits"]) == ("500", 500, 300_000)
        sold = await office.post("/v1/checkout", {**ANN, "package_id": "large"})
        assert (sold["credits_decimal"], sold["bonus_credits_decimal"]) == ("5000", "500")
        (session,) = sessions(stripe)
        (line,) = stripe.line_items(session["id"])
        assert line["description"] == "5500 credits"


async def test_without_payments_packages_are_shown_and_nothing_is_sold(office: Office):
    packages = (await office.get("/v1/packages"))["data"]
    assert [package["purchasable"] for package in packages] == [False] * 4
    assert await office.refused("POST", "/v1/checkout", ANN) == (404, "not_found", None)
    assert await office.refused("GET", "/v1/orders/ord_1") == (404, "not_found", None)
    assert await office.refused("GET", "/v1/customers/ann/orders") == (404, "not_found", None)
    sold = {"customerId": "ann", "creditPackCode": "usd-10"}
    assert await office.refused("POST", "/chargly/v1/checkout", sold) == (404, "not_found", None)
    assert (await office.get("/v1/customers"))["data"] == []


# Checkout.


async def test_a_checkout_is_an_order_with_a_page_to_pay_on(till: Office, stripe: FakeStripe):
    answer = await till.ask("POST", "/v1/checkout", {**ANN, **BACK})
    assert answer.status_code == 201
    sold = answer.json()
    customer = (await till.get("/v1/customers/ann"))["id"]
    (session,) = sessions(stripe)
    assert re.fullmatch(r"ord_[0-9a-z]{26}", sold["order_id"])
    assert sold == {
        "order_id": sold["order_id"],
        "customer_id": customer,
        "status": "open",
        "package_id": "usd-10",
        "price": "10.00",
        "price_minor": 1000,
        "currency": "usd",
        "credits": 1_000_000,
        "credits_decimal": "1000",
        "bonus_credits": 0,
        "bonus_credits_decimal": "0",
        "checkout_url": session["url"],
        "expires_at": sold["expires_at"],
    }
    assert (session["success_url"], session["cancel_url"]) == (BACK["success_url"], BACK["cancel_url"])
    assert session["client_reference_id"] == sold["order_id"]
    ours = {"farebox_order": sold["order_id"], "farebox_tenant": till.tenant, "farebox_mode": "live"}
    assert session["metadata"] == ours
    assert (session["amount_total"], session["currency"]) == (1000, "usd")
    (made,) = stripe.all("customer")
    assert session["customer"] == made["id"]
    # Neither the person nor the provider's cost is any business of the processor.
    assert "ann" not in json.dumps([asked.params for asked in stripe.requests])
    order = await till.get(f"/v1/orders/{sold['order_id']}")
    assert order["id"] == sold["order_id"]
    assert (order["status"], order["kind"], order["settled_at"]) == ("open", "checkout", None)
    assert order["checkout_url"] == sold["checkout_url"]
    assert order["block_id"] == sold["order_id"].replace("ord_", "blk_")


async def test_an_order_comes_before_its_page(till: Office, stripe: FakeStripe):
    stripe.fail_next("/v1/checkout/sessions", "reset", times=stripe_api.RETRIES + 1)
    refusal = await till.refused("POST", "/v1/checkout", ANN, once="k")
    assert refusal == (503, "payments_unavailable", None)
    (order,) = (await till.get("/v1/customers/ann/orders"))["data"]
    assert (order["status"], order["checkout_url"]) == ("open", None)
    sold = await till.post("/v1/checkout", ANN, once="k")
    assert sold["order_id"] == order["id"]
    assert sold["checkout_url"] is not None
    assert len(sessions(stripe)) == 1


@pytest.mark.parametrize("fault", ["reset", "reset-after-effect", 500])
async def test_a_broken_connection_makes_one_page(till: Office, stripe: FakeStripe, fault: Any):
    stripe.fail_next("/v1/checkout/sessions", fault)
    await till.post("/v1/checkout", ANN)
    assert len(sessions(stripe)) == 1


async def test_a_repeated_key_gives_the_same_order_and_the_same_page(till: Office, stripe: FakeStripe):
    first = await till.ask("POST", "/v1/checkout", {**ANN, **BACK}, once="k")
    again = await till.ask("POST", "/v1/checkout", {**ANN, **BACK}, once="k")
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert "x-idempotent-replayed" not in first.headers
    assert again.headers["x-idempotent-replayed"] == "true"
    assert posts(stripe) == 1
    other = await till.refused("POST", "/v1/checkout", {**ANN, "package_id": "usd-25"}, once="k")
    assert other == (422, "idempotency_key_reused", None)
    # Another mode has keys of its own.
    sandbox = await till.post("/v1/checkout", {**ANN, **BACK}, once="k", key="test")
    assert sandbox["order_id"] != first.json()["order_id"]


async def test_a_repeated_key_finds_its_order_when_the_package_is_sold_no_more(tmp_path: Path, stripe: FakeStripe):
    packages = [{"id": "old", "price": "10"}, {"id": "new", "price": "20"}]
    async with open_office(tmp_path, **paid_with(stripe), packages=packages) as office:
        first = await office.post("/v1/checkout", {**ANN, "package_id": "old"}, once="k")
        services = office.gateway.services
        services.packages._packages.pop("old")
        assert await office.post("/v1/checkout", {**ANN, "package_id": "old"}, once="k") == first
        gone = await office.refused("POST", "/v1/checkout", {**ANN, "package_id": "old"})
        assert gone == (404, "not_found", "package_id")


async def test_a_repeated_key_in_another_process_gives_the_same_page(till: Office, stripe: FakeStripe):
    first = await till.post("/v1/checkout", ANN, once="k")
    await restarted(till)
    assert await till.post("/v1/checkout", ANN, once="k") == first
    assert len(sessions(stripe)) == 1


async def test_a_crash_between_the_page_and_its_note_is_repaired_by_the_repetition(
    till: Office, stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
):
    async def dies(*args: object, **named: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(payments_of(till).orders, "note_session", dies)
    with pytest.raises(asyncio.CancelledError):
        await till.ask("POST", "/v1/checkout", ANN, once="k")
    await restarted(till)
    sold = await till.post("/v1/checkout", ANN, once="k")
    (session,) = sessions(stripe)
    assert sold["checkout_url"] == session["url"]


async def test_without_a_key_each_request_is_an_order(till: Office, stripe: FakeStripe):
    first, second = await till.post("/v1/checkout", ANN), await till.post("/v1/checkout", ANN)
    assert first["order_id"] != second["order_id"]
    assert first["checkout_url"] != second["checkout_url"]
    assert len(stripe.all("customer")) == 1


async def test_first_checkouts_at_once_make_one_customer_of_stripes(till: Office, stripe: FakeStripe):
    await asyncio.gather(*(till.post("/v1/checkout", ANN) for _ in range(8)))
    assert len(stripe.all("customer")) == 1
    assert len(sessions(stripe)) == 8
    await till.post("/v1/checkout", ANN, key="test")
    await till.post("/v1/checkout", {**ANN, "customer_id": "bob"})
    assert len(stripe.all("customer")) == 3


async def test_two_processes_at_once_make_one_page(till: Office, stripe: FakeStripe):
    settings = till.gateway.services.settings.model_copy(
        update={"journal_dir": till.gateway.services.settings.journal_dir / "second"}
    )
    second = Gateway(settings, now_us=till.clock.now_us, open_store=open_store)
    await second.start()
    try:
        beside = Office(
            **{
                **vars(till),
                "gateway": second,
                "client": httpx.AsyncClient(transport=httpx.ASGITransport(app=second), base_url="http://farebox"),
            }
        )
        asked = [where.post("/v1/checkout", ANN, once="k") for where in (till, beside) for _ in range(5)]
        answers = await asyncio.gather(*asked)
        assert all(answer == answers[0] for answer in answers)
        assert (len(sessions(stripe)), len(stripe.all("customer"))) == (1, 1)
        await beside.client.aclose()
    finally:
        await second.stop()


async def test_the_customer_comes_back_to_our_own_page_unless_the_app_says_where(till: Office, stripe: FakeStripe):
    sold = await till.post("/v1/checkout", ANN)
    (session,) = sessions(stripe)
    for url in (session["success_url"], session["cancel_url"]):
        assert url.startswith(f"{PUBLIC_URL}/topup/")
    assert sold["order_id"] in session["success_url"]


async def test_without_a_public_address_the_app_says_where_the_customer_comes_back(tmp_path: Path, stripe: FakeStripe):
    async with open_office(tmp_path, **{**paid_with(stripe), "public_url": None}) as office:
        assert await office.refused("POST", "/v1/checkout", ANN) == (400, "invalid_request", "success_url")
        half = {**ANN, "success_url": BACK["success_url"]}
        assert await office.refused("POST", "/v1/checkout", half) == (400, "invalid_request", "cancel_url")
        await office.post("/v1/checkout", {**ANN, **BACK})


@pytest.mark.parametrize(
    "url",
    [
        "/paid",
        "example.com/paid",
        "ftp://example.com/",
        "javascript:alert(1)",
        "https://",
        "https:///paid",
        "https://example.com/a b",
        "https://example.com/\n",
        "https://exämple.com/",
        "https://example.com:x/",
        "https://[::1/",
        "https://example.com/" + "a" * 2048,
    ],
)
@pytest.mark.sqlite
async def test_where_the_customer_comes_back_is_an_absolute_url(till: Office, stripe: FakeStripe, url: str):
    for param in BACK:
        asked = await till.refused("POST", "/v1/checkout", {**ANN, **BACK, param: url})
        assert asked == (400, "invalid_request", param)
    assert sessions(stripe) == []


@pytest.mark.sqlite
async def test_a_placeholder_of_stripes_may_stand_in_the_url(till: Office, stripe: FakeStripe):
    url = "http://localhost:3000/paid?session={CHECKOUT_SESSION_ID}"
    await till.post("/v1/checkout", {**ANN, "success_url": url})
    assert sessions(stripe)[0]["success_url"] == url


@pytest.mark.sqlite
async def test_what_cannot_be_sold_is_refused_with_its_place(till: Office, stripe: FakeStripe):
    for body, refusal in (
        ({**ANN, "package_id": "usd-11"}, (404, "not_found", "package_id")),
        ({**ANN, "package_id": ""}, (400, "invalid_request", "package_id")),
        ({"package_id": "usd-10"}, (400, "invalid_request", None)),
        ({**ANN, "customer_id": "cus_01k7m3v9c2q8x5t4n6r1b0w3ye"}, (404, "not_found", None)),
        ({**ANN, "save_payment_method": "yes"}, (400, "invalid_request", "save_payment_method")),
        ({**ANN, "price": 1}, (400, "invalid_request", "price")),
    ):
        assert await till.refused("POST", "/v1/checkout", body) == refusal, body
    assert await till.refused("POST", "/v1/checkout", ANN, key="reader") == (403, "permission_denied", None)
    assert stripe.requests == []


async def test_with_a_live_key_nobody_pays_for_the_sandbox(tmp_path: Path):
    with FakeStripe(live=True) as stripe:
        async with open_office(tmp_path, **paid_with(stripe)) as office:
            assert await office.refused("POST", "/v1/checkout", ANN, key="test") == (400, "invalid_request", None)
            assert sessions(stripe) == []
            live, sandbox = [(await office.get("/v1/packages", key=key))["data"][0] for key in ("live", "test")]
            assert (live["purchasable"], sandbox["purchasable"]) == (True, False)
            await office.post("/v1/checkout", ANN)


async def test_a_payment_method_is_kept_where_it_is_asked_for(till: Office, stripe: FakeStripe):
    await till.post("/v1/checkout", {**ANN, "save_payment_method": True})
    (asked,) = [asked for asked in stripe.requests if asked.path == "/v1/checkout/sessions"]
    assert asked.params["payment_intent_data"]["setup_future_usage"] == "off_session"


async def test_a_customer_whom_stripe_does_not_know_any_more_is_made_anew(till: Office, stripe: FakeStripe):
    await till.post("/v1/checkout", ANN)
    (before,) = stripe.all("customer")
    stripe.delete_customer(before["id"])
    sold = await till.post("/v1/checkout", ANN)
    assert sold["checkout_url"] is not None
    found = await known_at_stripes(till)
    assert found is not None
    assert found.processor_id not in (None, before["id"])
    assert {session["customer"] for session in sessions(stripe)} == {before["id"], found.processor_id}


async def test_a_key_that_stripe_refuses_is_ours_to_mend_and_told_in_the_log(
    tmp_path: Path, stripe: FakeStripe, capsys: pytest.CaptureFixture[str]
):
    async with open_office(tmp_path, **{**paid_with(stripe), "stripe_secret_key": "sk_test_revoked"}) as office:
        assert await office.refused("POST", "/v1/checkout", ANN) == (503, "payments_unavailable", None)
    told = capsys.readouterr().out
    assert "authentication_error" in told
    assert "sk_test_revoked" not in told


async def test_an_order_that_got_no_page_in_time_has_expired(till: Office, stripe: FakeStripe):
    stripe.fail_next("/v1/checkout/sessions", 500, times=stripe_api.RETRIES + 1)
    await till.refused("POST", "/v1/checkout", ANN, once="k")
    till.clock.pass_s(checkout.PAGE_LIFE_S - checkout.PAGE_LIFE_LEAST_S + 1)
    sold = await till.post("/v1/checkout", ANN, once="k")
    assert (sold["status"], sold["checkout_url"]) == ("expired", None)
    assert sessions(stripe) == []


# Orders.


async def test_a_customers_orders_are_listed_newest_first(till: Office):
    made = []
    for name in ("usd-5", "usd-10", "usd-25", "usd-50", "usd-5"):
        made.append((await till.post("/v1/checkout", {**ANN, "package_id": name}, once=f"{len(made)}"))["order_id"])
    await till.post("/v1/checkout", {**ANN, "customer_id": "bob"})
    whole = await till.get("/v1/customers/ann/orders")
    assert [order["id"] for order in whole["data"]] == made[::-1]
    walked, cursor = [], ""
    while cursor is not None:
        page = await till.get(f"/v1/customers/ann/orders?limit=2{cursor and '&cursor='}{cursor}")
        walked += [order["id"] for order in page["data"]]
        cursor = page["next_cursor"]
    assert walked == made[::-1]
    for cursor in ("ord_none", "é"):
        refusal = await till.refused("GET", f"/v1/customers/ann/orders?cursor={cursor}")
        assert refusal == (400, "invalid_request", "cursor")
    assert await till.refused("GET", "/v1/customers/nobody/orders") == (404, "not_found", None)


async def test_an_order_is_its_tenants_and_its_modes(till: Office):
    order = (await till.post("/v1/checkout", ANN))["order_id"]
    assert (await till.get(f"/v1/orders/{order}", key="reader"))["id"] == order
    for key in ("test", "other"):
        assert (await till.refused("GET", f"/v1/orders/{order}", key=key))[0] == 404
    for nothing in ("ord_none", "é"):
        assert (await till.refused("GET", f"/v1/orders/{nothing}"))[0] == 404


async def test_an_order_tells_what_has_become_of_its_payment(till: Office, stripe: FakeStripe):
    order = (await till.post("/v1/checkout", ANN))["order_id"]
    session = sessions(stripe)[0]["id"]

    async def after(events: list[Any]) -> tuple[str, str, int, bool]:
        for event in events:
            body, signature = stripe.signed(event)
            told = await till.client.post("/stripe/webhook", content=body, headers={"Stripe-Signature": signature})
            assert told.status_code == 200
        found = await till.get(f"/v1/orders/{order}")
        return found["status"], found["returned"], found["returned_minor"], found["disputed"]

    assert await after([]) == ("open", "0.00", 0, False)
    assert await after(stripe.pay(session)) == ("paid", "0.00", 0, False)
    payment = stripe.payment_of(session)
    assert await after(stripe.refund(payment, 250)) == ("paid", "2.50", 250, False)
    disputed = stripe.dispute(payment)
    assert await after(disputed) == ("paid", "2.50", 250, True)
    credits = await till.get("/v1/customers/ann/credits")
    assert (credits["balance"], credits["effective_balance"]) == (750_000, 0)


# Erasure.


async def test_who_is_erased_is_forgotten_by_stripe_too(till: Office, stripe: FakeStripe):
    personal = {key: f"{url}?who=ann@example.com" for key, url in BACK.items()}
    sold = await till.post("/v1/checkout", {**ANN, **personal})
    assert (await till.ask("DELETE", "/v1/customers/ann")).status_code == 204
    assert [asked.method for asked in stripe.requests if asked.path.startswith("/v1/customers/")] == ["DELETE"]
    assert sessions(stripe)[0]["status"] == "expired"
    assert (await till.get(f"/v1/orders/{sold['order_id']}"))["status"] == "expired"
    order = await payments_of(till).orders.find(Scope(till.tenant, "live"), sold["order_id"])
    assert order is not None
    assert (order.success_url, order.cancel_url) == (None, None)
    found = await payments_of(till).customers.find(Scope(till.tenant, "live"), sold["customer_id"])
    assert found is not None
    assert (found.processor_id, found.payment_method) == (None, None)
    # Whoever comes with the name next is somebody new, there as here.
    again = await till.post("/v1/checkout", ANN)
    assert again["customer_id"] != sold["customer_id"]


async def test_an_erasure_waits_for_stripe_and_is_done_again(till: Office, stripe: FakeStripe):
    await till.post("/v1/checkout", ANN)
    stripe.fail_next("/v1/customers/", 500, times=stripe_api.RETRIES + 1, method="DELETE")
    assert await till.refused("DELETE", "/v1/customers/ann") == (503, "payments_unavailable", None)
    assert (await till.ask("DELETE", "/v1/customers/ann")).status_code == 204
    assert (await till.ask("DELETE", "/v1/customers/ann")).status_code == 404


async def test_what_was_paid_before_the_erasure_stays_as_it_ends(till: Office, stripe: FakeStripe):
    sold = await till.post("/v1/checkout", ANN)
    (session,) = sessions(stripe)
    stripe.pay(session["id"])
    assert (await till.ask("DELETE", "/v1/customers/ann")).status_code == 204
    assert (await till.get(f"/v1/orders/{sold['order_id']}"))["status"] == "open"


async def test_a_checkout_that_meets_an_erasure_leaves_nobody_at_stripes(
    till: Office, stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
):
    payments = payments_of(till)
    make = payments.stripe.create_customer

    async def meanwhile(scope: Scope, customer_id: str, **named: Any) -> str:
        made = await make(scope, customer_id, **named)
        assert (await till.ask("DELETE", "/v1/customers/ann")).status_code == 204
        return made

    monkeypatch.setattr(payments.stripe, "create_customer", meanwhile)
    assert await till.refused("POST", "/v1/checkout", ANN) == (404, "not_found", None)
    assert [asked.method for asked in stripe.requests] == ["POST", "DELETE"]


async def test_a_page_that_is_made_while_its_customer_goes_is_closed(
    till: Office, stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
):
    payments = payments_of(till)
    make = payments.stripe.create_session

    async def meanwhile(*order: Any, **named: Any) -> Any:
        made = await make(*order, **named)
        assert (await till.ask("DELETE", "/v1/customers/ann")).status_code == 204
        return made

    monkeypatch.setattr(payments.stripe, "create_session", meanwhile)
    sold = await till.post("/v1/checkout", ANN)
    assert (sold["status"], sold["checkout_url"]) == ("expired", None)
    assert sessions(stripe)[0]["status"] == "expired"


# Chargly's dialect.


async def test_charglys_checkout_is_the_same_in_its_words(till: Office, stripe: FakeStripe):
    asked = {
        "customerId": "ann",
        "creditPackCode": "usd-10",
        "successUrl": BACK["success_url"],
        "cancelUrl": BACK["cancel_url"],
    }
    first = await till.ask("POST", "/chargly/v1/checkout", asked, once="k")
    assert first.status_code == 201
    (session,) = sessions(stripe)
    order = (await till.get("/v1/customers/ann/orders"))["data"][0]
    assert first.json() == {
        "id": order["id"],
        "customerId": "ann",
        "creditPackCode": "usd-10",
        "status": "open",
        "credits": 1000,
        "checkoutUrl": session["url"],
        "expiresAt": order["expires_at"],
    }
    assert (session["success_url"], session["cancel_url"]) == (BACK["success_url"], BACK["cancel_url"])
    again = await till.ask("POST", "/chargly/v1/checkout", asked, once="k")
    assert again.json() == first.json()
    assert again.headers["x-idempotent-replayed"] == "true"
    unknown = await till.refused("POST", "/chargly/v1/checkout", {**asked, "creditPackCode": "none"})
    assert unknown == (404, "not_found", "creditPackCode")
    wrong = await till.refused("POST", "/chargly/v1/checkout", {**asked, "successUrl": "/paid"})
    assert wrong == (400, "invalid_request", "successUrl")
