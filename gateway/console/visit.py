"""Who comes to a page by a link: their wallet, and what they may do, how often."""

from dataclasses import dataclass
from typing import Any, Final

from gateway.api.services import Services
from gateway.console.amounts import credits_text, dollars_text
from gateway.console.notices import AccountGone, NoPayments, TooOften
from gateway.errors import ApiError
from gateway.identity.wallets import customer_wallet
from gateway.payments.checkout import Wanted
from gateway.payments.links import TopUpLink
from gateway.payments.orders import Order
from gateway.payments.service import Payments
from ledger.commands import Key
from ledger.ledger import WalletView
from pricing.money import Asset

REUSED_FOR_S: Final = 30 * 60
"""An order that is still open is gone on with for so long: who comes back, or presses twice, has one order."""

OPERATION: Final = "topup.page"


@dataclass(frozen=True, slots=True)
class Visit:
    """A customer on their page."""

    payments: Payments
    token: str
    link: TopUpLink
    seller: str
    asset: Asset
    wallet: WalletView | None
    now_us: int

    @property
    def frozen(self) -> bool:
        return self.wallet is not None and self.wallet.wallet.frozen

    @property
    def stuck(self) -> bool:
        """Whether there are credits that pay for nothing before a debt is repaid."""
        wallet = self.wallet
        return wallet is not None and wallet.balance > 0 and wallet.receivable > wallet.wallet.overdraft_limit

    def shown(self) -> dict[str, Any]:
        """What every page of theirs says."""
        balance = 0 if self.wallet is None else self.wallet.balance
        return {
            "seller": self.seller,
            "balance": credits_text(balance, self.asset),
            "balance_usd": dollars_text(balance, self.asset),
            "test": self.payments.stripe.mode == "test",
        }


async def opened(token: str, services: Services, limit: int | None = None, what: str = "") -> Visit:
    """Whoever holds the link, within the *limit* of requests a minute of their customer.

    Raises:
        One of `NOTICES`.
    """
    payments = services.payments
    if payments is None:
        raise NoPayments
    link = payments.links.opened(token)
    tenant, mode = link.scope.tenant, link.scope.mode
    if not payments.serves(mode):
        raise NoPayments
    if limit is not None:
        decision = await services.rate_limit.check(f"topup-{what}:{link.customer_id}", limit)
        if not decision.allowed:
            raise TooOften(decision.retry_after_s)
    try:
        await services.customers.get(tenant, mode, link.customer_id)
    except ApiError:
        raise AccountGone from None
    asset = await services.assets.in_force(tenant)
    if asset is None:
        raise NoPayments
    return Visit(
        payments=payments,
        token=token,
        link=link,
        seller=(await services.tenants.tenant(tenant)).name,
        asset=asset,
        wallet=await services.ledger.wallet_view(customer_wallet(tenant, mode, link.customer_id)),
        now_us=services.now_us(),
    )


async def ordered(visit: Visit, package_id: str, *, keep_card: bool) -> Order:
    """The order that is gone on with, or a new one."""
    payments, link = visit.payments, visit.link
    recent = await payments.orders.of_customer(
        link.scope, link.customer_id, since_us=visit.now_us - REUSED_FOR_S * 1_000_000
    )
    package = payments.packages.find(package_id)
    for order in recent:
        if (
            (order.kind, order.status, order.package, order.save_payment_method)
            == ("checkout", "open", package_id, keep_card)
            and package is not None
            and (order.price_minor, order.currency) == (package.price_minor, package.currency)
            and order.checkout_url is not None
            and payments.links.leads_back_here(order.success_url)
        ):
            return order
    # Who presses twice at once sees the same orders before, so the key makes it one order.
    # One that has no page yet does not count: repeated, its key makes the page.
    done = (order.id for order in recent if order.checkout_url is not None or order.status != "open")
    before = next(done, str(visit.now_us // (REUSED_FOR_S * 1_000_000)))
    named = f"{link.customer_id}:{package_id}:{keep_card}:{before}"
    wanted = Wanted(
        scope=link.scope,
        customer_id=link.customer_id,
        package_id=package_id,
        asset=visit.asset,
        save_payment_method=keep_card,
        key=Key(operation=OPERATION, key=named, digest=named),
    )
    return (await payments.checkout.begin(wanted)).order
