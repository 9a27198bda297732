"""Checkout: a customer is led to the processor's page to pay for a package.

How it works. The order is written down before the processor is asked for a page, and the processor is asked with an
idempotency key that derives from the order: whoever repeats a request, in whatever process and after whatever crash,
finds the same order and gets the same page. All that goes into the page stands in the order, so that it is asked for in
the same words. In one process a customer's checkouts take turns: who ask at once ask the processor once.

A page can be paid on for PAGE_LIFE_S. An order for which no page was made in time has expired, as one whose page has.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakValueDictionary

import structlog
from msgspec.structs import replace

from gateway.ids import derived_id
from gateway.payments.links import Links
from gateway.payments.orders import Order, Orders
from gateway.payments.packages import Packages
from gateway.payments.processor import ProcessorRefused, ProcessorUnavailable, Session, pays_for
from gateway.payments.processor_customers import CustomerErased, ProcessorCustomers
from ledger.commands import Key
from ledger.errors import KeyReused
from ledger.model import Scope
from pricing.money import Asset

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI

SECOND_US: Final = 1_000_000
PAGE_LIFE_S: Final = 12 * 3600
"""From when the order was made. The processor takes half an hour to a day from when the page is."""

PAGE_LIFE_LEAST_S: Final = 35 * 60
"""An order that has less left gets no page any more."""

TURN_TIMEOUT_S: Final = 30.0
"""How long a checkout waits for others of the same customer."""

URL_PARAMS: Final = ("success_url", "cancel_url")

log = structlog.get_logger(__name__)


class PackageNotFound(Exception):
    def __init__(self, package_id: str) -> None:
        super().__init__(f"no package {package_id[:64]!r}")
        self.package_id = package_id


class PackageWorthless(Exception):
    """The package brings less than the smallest unit of the tenant's credits."""


class SandboxNotServed(Exception):
    """The customer is in test mode, and with the operator's key real money moves."""


class ReturnUnknown(Exception):
    """Nobody said where the customer goes then, or the processor does not take it: *param* is which."""

    def __init__(self, param: str) -> None:
        super().__init__(f"no usable {param}")
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a customer is to pay for. Repeated with the same *key*, it is the same order.

    Attributes:
        save_payment_method: for automatic top-ups, which the customer agrees to on the processor's page.
    """

    scope: Scope
    customer_id: str
    package_id: str
    asset: Asset
    success_url: str | None = None
    cancel_url: str | None = None
    save_payment_method: bool = False
    key: Key | None = None


class Begun(NamedTuple):
    order: Order
    replayed: bool


class Checkout:
    """Makes orders and the pages to pay for them."""

    def __init__(
        self,
        *,
        packages: Packages,
        orders: Orders,
        stripe: "StripeAPI",
        customers: ProcessorCustomers,
        links: Links,
        now_us: Callable[[], int],
        new_id: Callable[[str], str],
    ) -> None:
        self._packages = packages
        self._orders = orders
        self._stripe = stripe
        self._customers = customers
        self._links = links
        self._now_us = now_us
        self._new_id = new_id
        self._turns: WeakValueDictionary[tuple[Scope, str], asyncio.Lock] = WeakValueDictionary()

    def serves(self, mode: str) -> bool:
        """Whether customers of *mode* can pay."""
        return pays_for(self._stripe.mode, mode)

    async def begin(self, wanted: Wanted) -> Begun:
        """An order for what is *wanted*, with the page to pay for it; or the one that the key stands for, as it is now.

        Raises:
            SandboxNotServed, PackageNotFound, PackageWorthless, ReturnUnknown, KeyReused: the caller's fault.
            CustomerErased: the customer is going.
            ProcessorUnavailable: the order may be there without a page; repeat it with its key.
        """
        if not self.serves(wanted.scope.mode):
            raise SandboxNotServed
        order_id = self._new_id("ord") if wanted.key is None else order_of(wanted.scope, wanted.key)
        async with self._turn(wanted.scope, wanted.customer_id):
            order = None if wanted.key is None else await self._orders.find(wanted.scope, order_id)
            if order is None:
                order = self._terms(wanted, order_id)
                if await self._orders.add(order):
                    return Begun(await self._with_page(order, wanted.asset), replayed=False)
                order = await self._orders.find(wanted.scope, order_id)
                assert order is not None, "an order that is there cannot be found"
            if wanted.key is not None and order.digest != wanted.key.digest:
                raise KeyReused(f"the order {order.id} was for something else")
            return Begun(await self._with_page(order, wanted.asset), replayed=True)

    async def close_open(self, scope: Scope, customer_id: str) -> None:
        """Nobody pays for the customer's open orders any more; those that are being paid end as they end. Repeatable.

        Raises:
            ProcessorUnavailable
        """
        for order in await self._orders.of_customer(scope, customer_id):
            if order.status == "open" and order.kind == "checkout" and await self._page_closed(order):
                await self._orders.ended(order, "expired")

    def _terms(self, wanted: Wanted, order_id: str) -> Order:
        package = self._packages.find(wanted.package_id)
        if package is None:
            raise PackageNotFound(wanted.package_id)
        success_url, cancel_url = self._return_urls(wanted, order_id)
        bought = package.in_credits(wanted.asset)
        if not bought.credited:
            raise PackageWorthless
        return Order(
            tenant=wanted.scope.tenant,
            mode=wanted.scope.mode,
            id=order_id,
            kind="checkout",
            status="open",
            customer_id=wanted.customer_id,
            package=package.id,
            price_minor=package.price_minor,
            currency=package.currency,
            asset=wanted.asset.code,
            credited=bought.credited,
            bonus=bought.bonus,
            spread=bought.spread,
            save_payment_method=wanted.save_payment_method,
            success_url=success_url,
            cancel_url=cancel_url,
            digest="" if wanted.key is None else wanted.key.digest,
            created_at_us=self._now_us(),
        )

    def _return_urls(self, wanted: Wanted, order_id: str) -> tuple[str, str]:
        """Where the customer goes afterwards: as the app says, else to our own page."""
        scope, customer_id = wanted.scope, wanted.customer_id
        success_url = wanted.success_url or self._links.return_url_of(scope, customer_id, order_id)
        cancel_url = wanted.cancel_url or self._links.cancel_url_of(scope, customer_id)
        if success_url is None:
            raise ReturnUnknown("success_url")
        if cancel_url is None:
            raise ReturnUnknown("cancel_url")
        return success_url, cancel_url

    async def _with_page(self, order: Order, asset: Asset) -> Order:
        """*order* with its page, which is made now if it was not."""
        if order.status != "open" or order.session_id is not None:
            return order
        left_s = expires_at_s(order) - self._now_us() // SECOND_US
        if left_s < PAGE_LIFE_LEAST_S or order.success_url is None or order.cancel_url is None:
            await self._orders.ended(order, "expired")
            return replace(order, status="expired")
        try:
            session = await self._page(order, asset, success_url=order.success_url, cancel_url=order.cancel_url)
        except CustomerErased:
            await self._orders.ended(order, "expired")
            raise
        except ProcessorUnavailable:
            # Another process may be making it: then it is there soon, or the caller asks again.
            found = await self._orders.find(order.scope, order.id)
            if found is None or found.session_id is None:
                raise
            return found
        except ProcessorRefused as error:
            if error.param in URL_PARAMS:
                await self._orders.ended(order, "failed", failure="url_invalid")
                raise ReturnUnknown(error.param) from None
            log.error("the payment processor makes no page", status=error.status, code=error.code, param=error.param)
            raise ProcessorUnavailable(f"it refuses to make a page ({error.code})") from None
        if await self._orders.note_session(order, session_id=session.id, checkout_url=session.url):
            return replace(order, session_id=session.id, checkout_url=session.url)
        # It has ended meanwhile: nobody is to pay on a page that nobody would close.
        with suppress(ProcessorRefused):
            await self._stripe.expire_session(session.id)
        return await self._orders.find(order.scope, order.id) or order

    async def _page(self, order: Order, asset: Asset, *, success_url: str, cancel_url: str) -> Session:
        async def made(processor_id: str) -> Session:
            return await self._stripe.create_session(
                order,
                processor_id=processor_id,
                success_url=success_url,
                cancel_url=cancel_url,
                title=title_of(order, asset),
                expires_at_s=expires_at_s(order),
            )

        processor_id = await self._customers.processor_id(order.scope, order.customer_id)
        try:
            return await made(processor_id)
        except ProcessorRefused as error:
            if error.param != "customer":
                raise
        return await made(await self._customers.replaced(order.scope, order.customer_id, gone=processor_id))

    async def _page_closed(self, order: Order) -> bool:
        """Whether nobody has paid on the order's page, nor ever will."""
        if order.session_id is None:
            return True
        try:
            await self._stripe.expire_session(order.session_id)
        except ProcessorRefused:
            # It is over already: paid, or expired before.
            session = await self._stripe.session(order.session_id)
            return bool(session["status"] == "expired")
        return True

    @asynccontextmanager
    async def _turn(self, scope: Scope, customer_id: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault((scope, customer_id), asyncio.Lock())
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                await turn.acquire()
        except TimeoutError:
            raise ProcessorUnavailable("other checkouts of this customer take too long") from None
        try:
            yield
        finally:
            turn.release()


def order_of(scope: Scope, key: Key) -> str:
    """The id of the order that *key* stands for."""
    return derived_id("ord", scope.tenant, scope.mode, key.operation, key.key)


def expires_at_s(order: Order) -> int:
    """When the order can be paid no more, in seconds."""
    return order.created_at_us // SECOND_US + PAGE_LIFE_S


def title_of(order: Order, asset: Asset) -> str:
    """What the customer reads that they buy: `850 credits`."""
    credits = asset.format(order.credited + order.bonus)
    return f"{credits} {'credit' if credits == '1' else 'credits'}"
