"""All that takes money in, put together once for a process. Without a processor's key there is none of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.database import Database
from gateway.identity.tenants import Tenants
from gateway.payments.agreements import Agreements
from gateway.payments.auto_top_up import AutoTopUps
from gateway.payments.checkout import Checkout
from gateway.payments.intake import Intake
from gateway.payments.links import Links
from gateway.payments.off_session import OffSession
from gateway.payments.open_orders import OpenOrders
from gateway.payments.operator import OperatorScope
from gateway.payments.orders import Orders
from gateway.payments.packages import Packages
from gateway.payments.processor_customers import ProcessorCustomers
from gateway.payments.reconciliation import Reconciler
from gateway.payments.returns import Returns
from gateway.payments.settling import Settler
from gateway.payments.sweeps import Sweeps
from gateway.payments.top_up_failures import TopUpFailures
from gateway.settings import Settings
from ledger.ledger import Ledger
from ledger.model import Scope

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI


@dataclass(frozen=True, slots=True)
class Payments:
    packages: Packages
    orders: Orders
    stripe: "StripeAPI"
    operator: OperatorScope
    links: Links
    customers: ProcessorCustomers
    checkout: Checkout
    settler: Settler
    intake: Intake
    reconciler: Reconciler
    sweeps: Sweeps
    returns: Returns
    auto_top_ups: AutoTopUps
    open_orders: OpenOrders

    async def close(self) -> None:
        """Let go of connections. Whoever works with it has ended."""
        await self.stripe.close()

    def serves(self, mode: str) -> bool:
        """Whether customers of *mode* can pay."""
        return self.checkout.serves(mode)

    async def forget(self, scope: Scope, customer_id: str) -> None:
        """Let nobody pay for a customer who is being erased, and the processor forget them. Repeatable.

        Raises:
            ProcessorUnavailable, ProcessorRefused, DatabaseUnavailable: some of it is not done; do it again.
        """
        await self.checkout.close_open(scope, customer_id)
        await self.customers.erase(scope, customer_id)


def open_payments(
    settings: Settings,
    *,
    packages: Packages,
    database: Database,
    ledger: Ledger,
    tenants: Tenants,
    now_us: Callable[[], int],
    new_id: Callable[[str], str],
) -> Payments | None:
    """None where the settings name no payment processor."""
    if settings.stripe_secret_key is None or settings.stripe_webhook_secret is None:
        return None
    # Not imported where nobody pays: Stripe's library takes 10 MB.
    from gateway.payments.stripe_api import StripeAPI  # noqa: PLC0415

    secret_key = settings.stripe_secret_key.get_secret_value()
    stripe = StripeAPI(
        secret_key=secret_key,
        webhook_secret=settings.stripe_webhook_secret.get_secret_value(),
        api_base=settings.stripe_api_base,
    )
    operator = OperatorScope(tenants, stripe.mode)
    orders = Orders(database, now_us=now_us, new_id=new_id)
    links = Links(secret_key=secret_key, processor_mode=stripe.mode, public_url=settings.public_url, now_us=now_us)
    failures = TopUpFailures(database, links, now_us=now_us)
    settler = Settler(
        database,
        ledger,
        orders=orders,
        stripe=stripe,
        operator=operator,
        changed=(failures.changed,),
        reversing=failures.reversing,
        told_of_failure=failures.told,
        now_us=now_us,
        new_id=new_id,
    )
    customers = ProcessorCustomers(database, stripe, now_us=now_us)
    checkout = Checkout(
        packages=packages,
        orders=orders,
        stripe=stripe,
        customers=customers,
        links=links,
        now_us=now_us,
        new_id=new_id,
    )
    auto_top_ups = AutoTopUps(
        database,
        ledger,
        agreements=Agreements(packages, serves=checkout.serves, now_us=now_us),
        orders=orders,
        off_session=OffSession(stripe),
        settler=settler,
        links=links,
        now_us=now_us,
        new_id=new_id,
    )
    return Payments(
        packages=packages,
        orders=orders,
        stripe=stripe,
        operator=operator,
        links=links,
        customers=customers,
        checkout=checkout,
        settler=settler,
        auto_top_ups=auto_top_ups,
        intake=Intake(stripe, settler),
        reconciler=Reconciler(
            processor=stripe,
            database=database,
            tenants=tenants,
            orders=orders,
            operator=operator,
            settler=settler,
            now_us=now_us,
        ),
        sweeps=Sweeps(database, operator, now_us=now_us),
        returns=Returns(orders=orders, stripe=stripe, settler=settler),
        open_orders=OpenOrders(
            database, orders=orders, stripe=stripe, settler=settler, go_on=auto_top_ups.consider, now_us=now_us
        ),
    )
