"""All that takes money in, put together once for a process. Without a processor's key there is none of it."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.database import Database
from gateway.identity.tenants import Tenants
from gateway.payments.intake import Intake
from gateway.payments.links import Links
from gateway.payments.operator import OperatorScope
from gateway.payments.orders import Orders
from gateway.payments.packages import Packages
from gateway.payments.settling import Settler
from gateway.payments.stripe_api import StripeAPI
from gateway.settings import Settings
from ledger.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Payments:
    packages: Packages
    orders: Orders
    stripe: StripeAPI
    operator: OperatorScope
    links: Links
    settler: Settler
    intake: Intake

    async def close(self) -> None:
        """Let go of connections. Whoever works with it has ended."""
        await self.stripe.close()

    def serves(self, mode: str) -> bool:
        """Whether customers of *mode* can pay: real money pays for nothing in the sandbox."""
        return self.stripe.mode == "test" or mode == "live"


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
    secret_key = settings.stripe_secret_key.get_secret_value()
    stripe = StripeAPI(
        secret_key=secret_key,
        webhook_secret=settings.stripe_webhook_secret.get_secret_value(),
        api_base=settings.stripe_api_base,
    )
    orders = Orders(database, now_us=now_us, new_id=new_id)
    operator = OperatorScope(tenants, stripe.mode)
    settler = Settler(database, ledger, orders=orders, stripe=stripe, operator=operator, now_us=now_us, new_id=new_id)
    return Payments(
        packages=packages,
        orders=orders,
        stripe=stripe,
        operator=operator,
        links=Links(secret_key=secret_key, live=stripe.mode == "live", public_url=settings.public_url, now_us=now_us),
        settler=settler,
        intake=Intake(stripe, settler),
    )
