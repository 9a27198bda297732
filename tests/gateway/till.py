"""A gateway that takes payments, the stand-in for Stripe that it asks, and orders that are about to be paid."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import insert, select

from gateway.app import Gateway
from gateway.clock import now_us
from gateway.database import of
from gateway.identity.wallets import customer_wallet
from gateway.payments.observed import SELECTED
from gateway.payments.orders import Order
from gateway.payments.service import Payments
from gateway.tables import PaymentCustomer, PaymentObservation
from ledger.commands import Debit, ReserveLeg
from ledger.errors import InsufficientCredits, ReceivableOutstanding
from ledger.ledger import WalletView
from ledger.model import Charge, ReservationRef, Scope, Settlement
from tests.gateway.office import Office, open_office
from tests.gateway.payment_histories import order as an_order
from tests.gateway.payment_histories import session_for
from tests.servers.stripe import FakeStripe
from tests.servers.stripe_objects import Object

WEBHOOK = "/stripe/webhook"


@dataclass
class Sale:
    """An order, the Checkout Session on which it is paid, and what was told of the payment."""

    till: "Till"
    order: Order
    session: str

    @property
    def payment(self) -> str:
        return self.till.stripe.payment_of(self.session)

    def pay(self, **options: Any) -> list[Object]:
        return selected(self.till.stripe.pay(self.session, **options))

    async def now(self) -> Order:
        """The order as it is now."""
        found = await self.till.payments.orders.find(self.order.scope, self.order.id)
        assert found is not None
        return found

    async def wallet(self) -> WalletView | None:
        return await self.till.gateway.services.ledger.wallet_view(self._wallet)

    async def balance(self) -> int:
        view = await self.wallet()
        return 0 if view is None else view.balance

    async def spend(self, amount: int) -> int:
        """Charge the wallet if it can pay; what it paid."""
        new_id = self.till.gateway.services.new_id
        command = Debit(
            id=new_id("cmd"),
            scope=self.order.scope,
            reservation=ReservationRef(*self.order.scope, new_id("rsv")),
            asset=self.order.asset,
            legs=(ReserveLeg((self._wallet,), amount, amount),),
            settlement=Settlement((Charge(amount),)),
        )
        try:
            await self.till.gateway.services.ledger.execute(command)
        except (InsufficientCredits, ReceivableOutstanding):
            return 0
        return amount

    async def events(self) -> list[str]:
        """The types of all events of the customer."""
        page = await self.till.office.get(f"/v1/events?customer_id={self.order.customer_id}", key=self.order.mode)
        return [event["type"] for event in page["data"]]

    async def told(self, type: str) -> list[dict[str, Any]]:
        """What the customer's events of that type tell."""
        path = f"/v1/events?type={type}&customer_id={self.order.customer_id}"
        page = await self.till.office.get(path, key=self.order.mode)
        return [event["data"] for event in page["data"]]

    @property
    def _wallet(self) -> Any:
        return customer_wallet(self.order.tenant, self.order.mode, self.order.customer_id)


@dataclass
class Till:
    office: Office
    stripe: FakeStripe

    @property
    def gateway(self) -> Gateway:
        return self.office.gateway

    @property
    def payments(self) -> Payments:
        payments = self.gateway.services.payments
        assert payments is not None
        return payments

    async def sale(self, **fields: Any) -> Sale:
        """An order of a new customer, with a Checkout Session that waits to be paid."""
        new_id = self.gateway.services.new_id
        made = await self.office.post("/v1/customers", {"external_id": new_id("user")}, key=fields.get("mode", "live"))
        terms = {"id": new_id("ord"), "tenant": self.office.tenant, "customer_id": made["id"]}
        order = an_order(**{**terms, "created_at_us": now_us(), **fields})
        assert await self.payments.orders.add(order)
        return Sale(self, order, session_for(self.stripe, order))

    async def send(self, body: bytes, signature: str | None) -> httpx.Response:
        headers = {b"content-type": b"application/json"}
        if signature is not None:
            headers[b"stripe-signature"] = signature.encode("latin-1")
        answer = await self.office.client.post(WEBHOOK, content=body, headers=headers)
        assert answer.headers["x-request-id"].startswith("req_")
        return answer

    async def deliver(self, event: Object) -> dict[str, Any]:
        """Deliver it once; the answer, which is 200."""
        answer = await self.send(*self.stripe.signed(event))
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        assert found["received"] is True
        return found

    async def outcomes(self, events: list[Object]) -> list[str]:
        return [(await self.deliver(event))["outcome"] for event in events]

    async def refused(self, body: bytes, signature: str | None) -> tuple[int, str]:
        answer = await self.send(body, signature)
        return answer.status_code, answer.json()["error"]["code"]

    async def observations(self) -> dict[str, str | None]:
        """What each has come to, by id; None while it is not done."""
        scope = await self.payments.operator()
        async with self.gateway.services.database.read(of(*scope)) as connection:
            rows = await connection.execute(select(PaymentObservation.id, PaymentObservation.outcome))
            return {row.id: row.outcome for row in rows}

    async def known_to_stripe(self, sale: Sale, processor_id: str = "cus_1") -> None:
        """The customer is one of Stripe's, as after a checkout."""
        row = {"customer_id": sale.order.customer_id, "processor_id": processor_id, "created_at_us": 0, "failures": 0}
        async with self.gateway.services.database.write(of(*sale.order.scope)) as connection:
            await connection.execute(insert(PaymentCustomer).values(**sale.order.scope._asdict(), **row))

    async def method_kept(self, scope: Scope, customer_id: str) -> str | None:
        async with self.gateway.services.database.read(of(*scope)) as connection:
            query = select(PaymentCustomer.payment_method).where(PaymentCustomer.customer_id == customer_id)
            found: str | None = (await connection.execute(query)).scalar_one_or_none()
            return found


def selected(events: list[Object]) -> list[Object]:
    """Those that Stripe was told to send."""
    return [event for event in events if event["type"] in SELECTED]


@contextlib.asynccontextmanager
async def open_till(folder: Path, *, live: bool = False, **settings: Any) -> AsyncIterator[Till]:
    async with FakeStripe(live=live) as stripe:
        known = {
            "stripe_secret_key": stripe.secret_key,
            "stripe_webhook_secret": stripe.webhook_secret,
            "stripe_api_base": stripe.url,
        }
        async with open_office(folder, **{**known, **settings}) as office:
            await office.gateway.services.webhooks.stop()
            yield Till(office, stripe)
