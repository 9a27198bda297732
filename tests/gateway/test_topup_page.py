"""The page where credits are added, as a browser without scripts meets it: what it shows, where it leads, and what it
says when something is in the way. The payment processor's stand-in is asked for real; its events never come here, so
whatever is credited was learnt by asking.
"""

import asyncio
import html
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from sqlalchemy import update
from sqlmodel import col

from gateway.database import of
from gateway.identity.wallets import customer_wallet
from gateway.payments.links import LIFE_S
from gateway.payments.orders import Order
from gateway.payments.service import Payments
from gateway.settings import PackageSettings
from gateway.tables import PaymentOrder, Tenant
from ledger.commands import Debit, Freeze, ReserveLeg
from ledger.model import Charge, ReservationRef, Scope, Settlement
from tests.gateway.office import Office, open_office
from tests.servers.stripe import FakeStripe, fake_stripe

HOME = "http://farebox"
"""Where the office's client reaches the gateway."""

PACKAGES = (
    PackageSettings(id="usd-5", price="5"),
    PackageSettings(id="usd-10", price="10", worth="8.50", bonus="0.50"),
    PackageSettings(id="eur-20", price="20", currency="eur", worth="22"),
)


@dataclass
class Shop:
    """An office that takes payments, and alice's page."""

    office: Office
    stripe: FakeStripe
    url: str
    customer_id: str

    @property
    def payments(self) -> Payments:
        payments = self.office.gateway.services.payments
        assert payments is not None
        return payments

    @property
    def scope(self) -> Scope:
        return Scope(self.office.tenant, "live")

    async def get(self, url: str) -> httpx.Response:
        return await self.office.client.get(url)

    async def page(self, url: str, *, status: int = 200) -> str:
        """The text that a reader sees."""
        answer = await self.get(url)
        assert answer.status_code == status, answer.text
        return seen(answer)

    async def choose(self, package: str = "usd-5", *, url: str | None = None, **form: str) -> httpx.Response:
        return await self.office.client.post(url or self.url, data={"package": package, **form})

    async def order(self, **form: str) -> Order:
        """One that was just begun on the page."""
        answer = await self.choose(**form)
        assert answer.status_code == 303, answer.text
        return await self.newest()

    async def newest(self) -> Order:
        return (await self.payments.orders.of_customer(self.scope, self.customer_id))[0]

    async def orders(self) -> int:
        return len(await self.payments.orders.of_customer(self.scope, self.customer_id))

    async def use(self, amount: int) -> None:
        """*amount* is in the smallest unit of the credits."""
        services, ref = self.office.gateway.services, customer_wallet(*self.scope, self.customer_id)
        await services.ledger.execute(
            Debit(
                id=services.new_id("cmd"),
                scope=self.scope,
                reservation=ReservationRef(*self.scope, services.new_id("rsv")),
                asset="credit",
                legs=(ReserveLeg((ref,), amount, amount),),
                settlement=Settlement((Charge(amount),)),
            )
        )

    async def balance(self) -> int:
        """In millicredits."""
        credits = await self.office.get(f"/v1/customers/{self.customer_id}/credits")
        return int(credits["balance"])


def session_of(order: Order) -> str:
    assert order.session_id is not None
    return order.session_id


def back_of(order: Order) -> str:
    assert order.success_url is not None
    return order.success_url


def seen(answer: httpx.Response) -> str:
    """What a page says, on one line."""
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    body = answer.text.partition("<body>")[2]
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", body).split()))


async def customer(office: Office, name: str, mode: str = "live") -> str:
    return await office.gateway.services.customers.resolve(office.tenant, mode, name)


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with opened(tmp_path) as shop:
        yield shop


class opened:  # noqa: N801 - read as a function
    """A shop, until the block ends."""

    def __init__(self, folder: Path, *, live: bool = False, **settings: Any) -> None:
        self._stripe = fake_stripe(live=live)
        self._office = open_office(
            folder,
            stripe_secret_key=self._stripe.secret_key,
            stripe_webhook_secret=self._stripe.webhook_secret,
            **{"stripe_api_base": self._stripe.url, "public_url": HOME, "packages": PACKAGES, **settings},
        )

    async def __aenter__(self) -> Shop:
        await self._stripe.__aenter__()
        office = await self._office.__aenter__()
        customer_id = await customer(office, "alice")
        url = office.gateway.services.top_up_url(Scope(office.tenant, "live"), customer_id)
        return Shop(office, self._stripe, url or "", customer_id)

    async def __aexit__(self, *failure: Any) -> None:
        await self._office.__aexit__(*failure)
        await self._stripe.__aexit__(*failure)


# What it shows.


async def test_it_shows_what_there_is_and_what_can_be_bought_in_credits_and_money(shop: Shop):
    await shop.office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1_234_567})
    text = await shop.page(shop.url)
    assert "Acme Add credits" in text
    assert "Your balance 1,234.56 credits worth $12.34" in text
    assert "$5.00 500 credits" in text
    assert "$10.00 850 credits worth $8.50 + 50 free" in text
    assert "€20.00 2,200 credits worth $22.00" in text
    assert "Keep this card for automatic top" in text
    assert "No real money moves" in text


@pytest.mark.sqlite
async def test_who_owes_reads_that_too(shop: Shop):
    await shop.office.post("/v1/billable-metrics", {"key": "image", "name": "image", "overage_policy": "allow"})
    rule = {"billable_metric_key": "image", "cost_type": "per_unit", "unit_cost": 1000, "credit_cost": 1000}
    await shop.office.post("/v1/metering-rules", rule)
    used = {"customer_id": "alice", "billable_metric_key": "image", "units": 3}
    assert (await shop.office.ask("POST", "/v1/usage", used)).status_code == 202
    assert "−3 credits worth −$0.03 You owe 3 credits: what you add repays them first. How much?" in await shop.page(
        shop.url
    )


@pytest.mark.sqlite
async def test_who_owes_a_trifle_reads_why_nothing_else_can_be_used(shop: Shop):
    order = await shop.order()
    shop.stripe.pay(session_of(order))
    await shop.get(back_of(order))
    await shop.use(1)
    await shop.office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 7_000})
    body, signature = shop.stripe.signed(shop.stripe.refund(shop.stripe.payment_of(session_of(order)))[1])
    told = await shop.office.client.post("/stripe/webhook", content=body, headers={"Stripe-Signature": signature})
    assert told.json()["outcome"] == "done"
    told_of_debt = "You owe 0.01 credits: what you add repays them first. Until then your balance cannot be used."
    assert f"6.99 credits worth $0.06 {told_of_debt}" in await shop.page(shop.url)


@pytest.mark.sqlite
async def test_a_page_needs_nothing_but_itself_and_is_held_to_that(shop: Shop):
    answer = await shop.get(shop.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy
    assert {name: answer.headers[name] for name in ("cache-control", "referrer-policy", "x-content-type-options")} == {
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    assert "set-cookie" not in answer.headers
    assert "<script" not in answer.text
    assert re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)[a-z]+:", answer.text) == []
    assert '<html lang="en">' in answer.text
    for field in re.findall(r'<input type="radio"[^>]* id="([^"]+)"', answer.text):
        assert f'<label for="{field}">' in answer.text


@pytest.mark.sqlite
async def test_only_a_stand_in_may_be_led_to_without_tls(shop: Shop):
    assert "form-action 'self' https: http:;" in (await shop.get(shop.url)).headers["content-security-policy"]


@pytest.mark.sqlite
async def test_stripe_itself_is_led_to_with_tls(tmp_path: Path):
    async with opened(tmp_path, stripe_api_base=None) as shop:
        assert "form-action 'self' https:;" in (await shop.get(shop.url)).headers["content-security-policy"]


@pytest.mark.sqlite
async def test_a_look_costs_nothing_and_creates_nothing(shop: Shop):
    answer = await shop.office.client.head(shop.url)
    assert answer.status_code == 200
    await shop.get(shop.url)
    assert shop.stripe.requests == []
    assert await shop.orders() == 0


@pytest.mark.sqlite
async def test_what_others_wrote_is_text_and_never_markup(shop: Shop):
    evil = "<script>alert(1)</script>\"&'"
    database = shop.office.gateway.services.database
    async with database.write(of(shop.office.tenant)) as connection:
        await connection.execute(update(Tenant).where(col(Tenant.id) == shop.office.tenant).values(name=evil))
    answer = await shop.get(shop.url)
    assert "<script" not in answer.text
    assert evil in seen(answer)


@pytest.mark.sqlite
async def test_the_package_of_the_link_is_the_one_that_is_proposed(shop: Shop):
    def chosen(text: str) -> list[str]:
        return re.findall(r'value="([^"]+)" required checked', text)

    assert chosen((await shop.get(shop.url)).text) == ["eur-20"]
    for package, proposed in (("usd-10", "usd-10"), ("gone", "eur-20")):
        url = shop.payments.links.url_of(shop.scope, shop.customer_id, package=package)
        assert url is not None
        assert chosen((await shop.get(url)).text) == [proposed]


@pytest.mark.sqlite
async def test_it_is_no_part_of_the_api(shop: Shop):
    paths = (await shop.office.get("/openapi.json"))["paths"]
    assert not [path for path in paths if path.startswith("/topup")]


# Where it leads.


@pytest.mark.parametrize("keep", [False, True])
async def test_the_form_leads_to_the_processors_page_for_that_package(shop: Shop, keep: bool):
    answer = await shop.choose("usd-10", **({"keep_card": "yes"} if keep else {}))
    assert answer.status_code == 303
    order = await shop.newest()
    assert answer.headers["location"] == order.checkout_url
    assert (order.package, order.price_minor, order.save_payment_method) == ("usd-10", 1000, keep)
    session = shop.stripe.get(session_of(order))
    assert (session["amount_total"], session["client_reference_id"]) == (1000, order.id)
    assert session["success_url"].startswith(f"{HOME}/topup/")
    assert "Nothing was paid" in await shop.page(session["cancel_url"])


async def test_who_comes_back_goes_on_with_the_same_order(shop: Shop):
    first = await shop.choose()
    shop.office.clock.pass_s(29 * 60)
    assert (await shop.choose()).headers["location"] == first.headers["location"]
    assert await shop.orders() == 1

    assert (await shop.choose("usd-10")).headers["location"] != first.headers["location"]
    assert (await shop.choose(keep_card="yes")).headers["location"] != first.headers["location"]
    assert await shop.orders() == 3


async def test_who_presses_twice_at_once_has_one_order(shop: Shop):
    answers = await asyncio.gather(*(shop.choose() for _ in range(5)))
    assert {answer.status_code for answer in answers} == {303}
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert await shop.orders() == 1


async def test_after_half_an_hour_or_once_it_is_paid_there_is_a_new_one(shop: Shop):
    first = await shop.order()
    shop.office.clock.pass_s(31 * 60)
    second = await shop.order()
    assert second.id != first.id
    shop.stripe.pay(session_of(second))
    await shop.page(back_of(second))
    third = await shop.order()
    assert third.id not in (first.id, second.id)


@pytest.mark.sqlite
@pytest.mark.parametrize("terms", [{"price_minor": 400}, {"currency": "eur"}])
async def test_what_the_package_cost_before_is_not_what_is_paid_now(shop: Shop, terms: dict[str, Any]):
    before = await shop.order()
    database, mine = shop.office.gateway.services.database, col(PaymentOrder.id) == before.id
    async with database.write(of(*shop.scope)) as connection:
        await connection.execute(update(PaymentOrder).where(mine).values(terms))
    after = await shop.order()
    assert after.id != before.id
    assert (after.price_minor, after.currency) == (500, "usd")


@pytest.mark.sqlite
async def test_an_apps_own_order_is_not_taken_over(shop: Shop):
    urls = {"success_url": "https://app.example/done", "cancel_url": "https://app.example/back"}
    theirs = await shop.office.post("/v1/checkout", {"customer_id": "alice", "package_id": "usd-5", **urls})
    order = await shop.order()
    assert order.id != theirs["order_id"]


# Coming back.


async def test_who_paid_has_their_credits_when_they_are_back_though_no_event_has_come(shop: Shop):
    order = await shop.order(package="usd-10")
    shop.stripe.pay(session_of(order))
    for _ in range(3):
        text = await shop.page(back_of(order))
        assert "Your payment has arrived" in text
        assert "Your balance 900 credits worth $9.00" in text
        assert "You bought 850 credits for $10.00, and got 50 more" in text
    assert await shop.balance() == 900_000
    assert (await shop.newest()).status == "paid"


async def test_two_who_look_at_once_are_credited_once(shop: Shop):
    order = await shop.order()
    shop.stripe.pay(session_of(order))
    await asyncio.gather(*(shop.page(back_of(order)) for _ in range(8)))
    assert await shop.balance() == 500_000


async def test_a_payment_that_takes_days_is_looked_after(shop: Shop):
    order = await shop.order()
    shop.stripe.pay_later(session_of(order))
    answer = await shop.get(back_of(order))
    assert "Your payment is on its way" in seen(answer)
    assert await shop.balance() == 0
    looks = 0
    url = back_of(order)
    while (refresh := re.search(r'http-equiv="refresh" content="3;url=([^"]+)"', answer.text)) is not None:
        shop.office.clock.pass_s(3)
        url = f"{urlsplit(url)._replace(query='').geturl()}{html.unescape(refresh[1])}"
        answer = await shop.get(url)
        looks += 1
        assert looks <= 20
    assert looks == 20
    assert "Look again" in seen(answer)
    shop.stripe.arrive(shop.stripe.payment_of(session_of(order)))
    assert "Your payment has arrived" in await shop.page(back_of(order))
    assert await shop.balance() == 500_000


async def test_a_payment_that_bounces_credits_nothing(shop: Shop):
    order = await shop.order()
    shop.stripe.pay_later(session_of(order))
    shop.stripe.bounce(shop.stripe.payment_of(session_of(order)))
    answer = await shop.get(back_of(order))
    assert "Nothing was credited" in seen(answer)
    (again,) = re.findall(r'<a class="button" href="([^"]+)"', answer.text)
    assert again == f"../{urlsplit(shop_url_of(order)).path.rpartition('/')[2]}"
    assert await shop.balance() == 0


def shop_url_of(order: Order) -> str:
    return back_of(order).partition("/return")[0]


@pytest.mark.sqlite
async def test_who_has_not_paid_may_go_on(shop: Shop):
    order = await shop.order()
    answer = await shop.get(back_of(order))
    assert "Not paid yet" in seen(answer)
    assert f'href="{html.escape(order.checkout_url or "")}"' in answer.text
    assert await shop.balance() == 0


@pytest.mark.sqlite
async def test_a_page_that_has_expired_can_be_had_anew(shop: Shop):
    order = await shop.order()
    shop.stripe.expire(session_of(order))
    assert "Nothing was paid" in await shop.page(back_of(order))


@pytest.mark.sqlite
async def test_only_their_own_orders_are_shown(shop: Shop):
    mine = await shop.order()
    bob = await customer(shop.office, "bob")
    bobs = shop.payments.links.return_url_of(shop.scope, bob, mine.id)
    nobodys = shop.payments.links.return_url_of(shop.scope, shop.customer_id, "ord_none")
    assert bobs is not None
    assert nobodys is not None
    for url in (bobs, nobodys, f"{nobodys}%00", shop.url + "/return"):
        assert "We do not know this order" in await shop.page(url, status=404)


# What is in the way.


@pytest.mark.sqlite
async def test_a_link_that_is_none(shop: Shop):
    for url in (shop.url[:-3], f"{HOME}/topup/x", f"{HOME}/topup/x/return?order=ord_1"):
        assert "This link does not work" in await shop.page(url, status=404)
    assert "This link does not work" in seen(await shop.choose(url=shop.url[:-3]))


@pytest.mark.sqlite
async def test_a_link_that_was_one(shop: Shop):
    shop.office.clock.pass_s(LIFE_S)
    assert "This link has expired" in await shop.page(shop.url, status=410)


@pytest.mark.sqlite
async def test_a_customer_who_is_gone(shop: Shop):
    assert (await shop.office.ask("DELETE", "/v1/customers/alice", key="owner")).status_code == 204
    assert "This account is gone" in await shop.page(shop.url, status=404)
    answer = await shop.choose()
    assert (answer.status_code, await shop.orders()) == (404, 0)


@pytest.mark.sqlite
async def test_a_package_that_is_not_sold(shop: Shop):
    for package in ("usd-9", "", "<b>"):
        answer = await shop.choose(package)
        assert answer.status_code == 400
        assert "This is not sold any more" in seen(answer)


@pytest.mark.sqlite
async def test_a_form_that_is_none(shop: Shop):
    for body in (b"package=" + b"x" * 5000, b"\xff", b"&".join(b"a=1" for _ in range(50))):
        answer = await shop.office.client.post(shop.url, content=body)
        assert (answer.status_code, "That did not work" in seen(answer)) == (400, True)


@pytest.mark.sqlite
async def test_frozen_credits(shop: Shop):
    await shop.office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000})
    wallet = customer_wallet(*shop.scope, shop.customer_id)
    await shop.office.gateway.services.ledger.execute(Freeze(id="cmd_1", scope=shop.scope, wallet=wallet, frozen=True))
    answer = await shop.get(shop.url)
    assert "These credits are frozen" in seen(answer)
    assert "<form" not in answer.text
    assert (await shop.choose()).status_code == 403
    assert shop.stripe.requests == []


@pytest.mark.sqlite
async def test_a_processor_that_is_away(shop: Shop):
    shop.stripe.fail_next("/v1/", 500, times=100)
    answer = await shop.choose()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "The payment service does not answer" in seen(answer)
    shop.stripe.heal()
    order = await shop.order()
    assert await shop.orders() == 1, "it is the order that had no page"
    shop.stripe.fail_next("/v1/", 500, times=100)
    assert "Nothing that you have paid is lost" in await shop.page(back_of(order), status=503)


@pytest.mark.sqlite
async def test_nobody_is_led_there_all_the_time(shop: Shop):
    answers = [await shop.choose() for _ in range(7)]
    assert [answer.status_code for answer in answers] == [303] * 6 + [429]
    assert int(answers[-1].headers["retry-after"]) > 0
    assert "A little slower" in seen(answers[-1])
    statuses = {(await shop.get(shop.url)).status_code for _ in range(61)}
    assert statuses == {200, 429}


@pytest.mark.sqlite
async def test_without_payments_there_is_no_page(tmp_path: Path, shop: Shop):
    (tmp_path / "other").mkdir()
    async with open_office(tmp_path / "other") as office:
        answer = await office.client.get(shop.url)
        assert (answer.status_code, "Nothing can be paid here" in seen(answer)) == (404, True)


@pytest.mark.sqlite
async def test_the_sandbox_is_not_paid_for_with_real_money(tmp_path: Path):
    async with opened(tmp_path, live=True) as shop:
        sandboxed = Scope(shop.office.tenant, "test")
        assert shop.payments.links.url_of(sandboxed, "cus_1") is None
        assert "No real money moves" not in await shop.page(shop.url)


@pytest.mark.sqlite
async def test_a_link_is_not_in_what_the_processor_is_told_of_the_customer(shop: Shop):
    await shop.order()
    told = [asked.params for asked in shop.stripe.requests if asked.path == "/v1/customers"]
    assert told
    assert "topup" not in str(told)
    query = parse_qs(urlsplit(back_of(await shop.newest())).query)
    assert list(query) == ["order"]
