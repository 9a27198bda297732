"""Who pays: a key, a header or a path, and the app's billing mode, become the wallets that pay, in their order."""

import msgspec

from gateway.errors import invalid_request
from gateway.identity.customers import Customers
from gateway.identity.principals import Principal
from gateway.identity.wallets import app_wallet, customer_wallet
from ledger.model import WalletRef


class Payer(msgspec.Struct, frozen=True):
    """The wallets that pay, and what they pay.

    Attributes:
        wallets: the payer chain. The developer's wallet is never in a user's.
        developer_wallet: bears what a product action's price leaves uncovered.
        customer_id: the user whom the request names, whoever pays.
        markup_bps: 0 where the developer pays.
        unfunded: the tenant's line for credits that the operator was not paid for; None leaves it unbounded.
    """

    wallets: tuple[WalletRef, ...]
    developer_wallet: WalletRef
    customer_id: str | None
    markup_bps: int
    unfunded: WalletRef | None

    @property
    def user_pays(self) -> bool:
        return self.customer_id is not None and self.wallets[0] != self.developer_wallet


async def resolve_payer(principal: Principal, customers: Customers, *, header: str | None, path: str | None) -> Payer:
    """The payer of a request whose user stands in the *header*, in the *path*, in neither, or the same in both.

    Raises:
        ApiError: 400 when the two name different users, or a name that is none.
    """
    if header is not None and path is not None and header != path:
        raise invalid_request("The path and the header name different users; name one.", param="user")
    assert principal.app_id is not None, "only an app's key proxies"
    user = path if path is not None else header
    customer_id = None
    if user is not None:
        customer_id = await customers.resolve(principal.tenant_id, principal.mode, user)
    developer = app_wallet(principal.tenant_id, principal.mode, principal.app_id)
    user_pays = customer_id is not None and principal.billing_mode == "user_pays"
    wallets = (developer,)
    if user_pays and customer_id is not None:
        wallets = (customer_wallet(principal.tenant_id, principal.mode, customer_id),)
    return Payer(
        wallets=wallets,
        developer_wallet=developer,
        customer_id=customer_id,
        markup_bps=principal.markup_bps if user_pays else 0,
        unfunded=principal.unfunded,
    )
