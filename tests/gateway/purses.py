"""An office that takes payments: Stripe's stand-in, customers with a kept card, and what became of them."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlalchemy import select, update
from sqlmodel import col

from gateway.app import Gateway
from gateway.database import insert_new, of
from gateway.identity.wallets import customer_wallet
from gateway.payments.orders import Order
from gateway.payments.service import Payments
from gateway.tables import PaymentCustomer
from ledger.commands import Debit, ReserveLeg
from ledger.model import Charge, ReservationRef, Scope, Settlement, UsageRecord
from ledger.store.tables import LedgerEventRow
from pricing.money import CREDIT
from tests.gateway.office import Office, open_office
from tests.servers.stripe import FakeStripe

PUBLIC_URL: Final = "https://credits.example"
AGREED: Final = {"auto_topup_enabled": True, "auto_topup_threshold": 200_000, "auto_topup_package": "usd-10"}
USD_10: Final = 1_000
"""What the package brings, in credits: a credit is worth a cent."""


@dataclass
class Purses:
    """The wallets of one tenant's customers. `consider` and `sweep` top them up."""

    office: Office
    stripe: FakeStripe
    gateway: Gateway

    @property
    def scope(self) -> Scope:
        return Scope(self.office.tenant, "live")

    @property
    def payments(self) -> Payments:
        payments = self.gateway.services.payments
        assert payments is not None
        return payments

    async def customer(
        self, name: str = "alice", *, credits: int = 100, card: str | None = "pm_card_visa", **settings: Any
    ) -> str:
        """A customer with so many credits and a kept card, who has agreed unless *settings* say otherwise."""
        if credits:
            await self.office.post("/v1/topup/grant", {"customer_id": name, "credits": credits * 1_000})
        made = await self.office.post("/v1/customers", {"external_id": name})
        customer_id: str = made["id"]
        await self.keep_card(customer_id, card)
        if agreed := AGREED | settings:
            await self.agree(customer_id, **agreed)
        return customer_id

    async def agree(self, customer_id: str, **settings: Any) -> None:
        answer = await self.office.ask("PATCH", f"/v1/customers/{customer_id}", {"settings": settings})
        assert answer.status_code == 200, answer.text

    async def keep_card(self, customer_id: str, card: str | None) -> None:
        """What a checkout leaves behind of a customer who wants their card to be charged again."""
        processor_id = await self.payments.stripe.create_customer(self.scope, customer_id)
        row = {
            "tenant": self.scope.tenant,
            "mode": self.scope.mode,
            "customer_id": customer_id,
            "failures": 0,
            "created_at_us": self.office.clock.now_us(),
        }
        async with self.gateway.services.database.write(of(*self.scope)) as connection:
            await connection.execute(insert_new(PaymentCustomer, connection.dialect.name), row)
            kept = update(PaymentCustomer).where(col(PaymentCustomer.customer_id) == customer_id)
            await connection.execute(kept.values(processor_id=processor_id))
        await self.change_card(customer_id, card)

    async def change_card(self, customer_id: str, card: str | None) -> None:
        async with self.gateway.services.database.write(of(*self.scope)) as connection:
            kept = update(PaymentCustomer).where(col(PaymentCustomer.customer_id) == customer_id)
            await connection.execute(kept.values(payment_method=card))

    async def consider(self, customer_id: str) -> None:
        await self.payments.auto_top_ups.consider(self.scope, customer_id)

    async def sweep(self) -> None:
        await self.payments.auto_top_ups.round()

    async def spend(self, customer_id: str, credits: int = 1) -> None:
        """A charge of so many credits."""
        services = self.gateway.services
        amount = credits * 10**CREDIT.scale
        request_id = services.new_id("req")
        await services.ledger.execute(
            Debit(
                id=services.new_id("cmd"),
                scope=self.scope,
                reservation=ReservationRef(*self.scope, services.new_id("rsv")),
                asset=CREDIT.code,
                legs=(ReserveLeg((customer_wallet(*self.scope, customer_id),), amount, amount),),
                settlement=Settlement(
                    (Charge(0, amount),), UsageRecord(request_id=request_id, customer_id=customer_id)
                ),
            )
        )

    async def balance(self, customer_id: str) -> int:
        """In credits."""
        view = await self.gateway.services.ledger.wallet_view(customer_wallet(*self.scope, customer_id))
        return 0 if view is None else view.balance // 10**CREDIT.scale

    async def orders(self, customer_id: str) -> list[Order]:
        """The newest first."""
        return await self.payments.orders.of_customer(self.scope, customer_id)

    async def outcomes(self, customer_id: str) -> list[str]:
        """What became of the orders, the oldest first."""
        return [order.status for order in reversed(await self.orders(customer_id))]

    async def payer(self, customer_id: str) -> PaymentCustomer:
        query = select(PaymentCustomer.__table__).where(  # type: ignore[attr-defined]
            col(PaymentCustomer.tenant) == self.scope.tenant,
            col(PaymentCustomer.mode) == self.scope.mode,
            col(PaymentCustomer.customer_id) == customer_id,
        )
        async with self.gateway.services.database.read(of(*self.scope)) as connection:
            return PaymentCustomer(**(await connection.execute(query)).one()._mapping)

    async def told(self, customer_id: str, kind: str) -> list[dict[str, Any]]:
        """The bodies of the customer's events of a type, the oldest first."""
        query = (
            select(col(LedgerEventRow.body))
            .where(
                col(LedgerEventRow.tenant) == self.scope.tenant,
                col(LedgerEventRow.mode) == self.scope.mode,
                col(LedgerEventRow.wallet) == f"customer:{customer_id}",
                col(LedgerEventRow.type) == kind,
            )
            .order_by(col(LedgerEventRow.sequence))
        )
        async with self.gateway.services.database.read(of(*self.scope)) as connection:
            return [msgspec.json.decode(body) for body in (await connection.execute(query)).scalars()]

    def stripe_customer(self, customer_id: str) -> str:
        """Stripe's id of the customer."""
        (found,) = [each["id"] for each in self.stripe.all("customer") if _is(each, customer_id)]
        return str(found)

    def paid(self) -> list[dict[str, Any]]:
        """Payments that succeeded at Stripe."""
        return self.stripe.all("payment_intent", status="succeeded")


@contextlib.asynccontextmanager
async def open_purses(
    folder: Path, *, live: bool = False, by_itself: bool = False, **settings: Any
) -> AsyncIterator[Purses]:
    """*by_itself*: wallets are topped up as they are in production, too."""
    clocks: list[Callable[[], int]] = []
    async with (
        FakeStripe(live=live, now_s=lambda: clocks[0]() // 1_000_000) as stripe,
        open_office(folder, **(stripe_settings(stripe) | settings)) as office,
    ):
        clocks.append(office.clock.now_us)
        purses = Purses(office, stripe, office.gateway)
        if not by_itself:
            await purses.payments.auto_top_ups.stop()
        yield purses


def stripe_settings(stripe: FakeStripe) -> dict[str, Any]:
    return {
        "stripe_secret_key": stripe.secret_key,
        "stripe_webhook_secret": stripe.webhook_secret,
        "stripe_api_base": stripe.url,
        "public_url": PUBLIC_URL,
    }


def _is(customer: dict[str, Any], customer_id: str) -> bool:
    return bool(customer["metadata"]["farebox_customer"] == customer_id)
