"""Which wallet belongs to whom. A wallet's id follows from its owner, so nobody has to look it up.

All of a tenant's wallets are in the tenant's own scope: the customers', each app's developer's, each app's grant pool,
the line that bounds what may be burnt from credits that the operator was not paid for, and what its budgets leave.
"""

from typing import Final

from ledger.model import WalletRef

_BOUNDS: Final = ("limit:", "unfunded:")


def customer_wallet(tenant_id: str, mode: str, customer_id: str) -> WalletRef:
    """A user's own credits. *customer_id* is our id, `cus_…`."""
    return WalletRef(tenant_id, mode, f"customer:{customer_id}")


def app_wallet(tenant_id: str, mode: str, app_id: str) -> WalletRef:
    """The developer's wallet of an app: it pays where no user does."""
    return WalletRef(tenant_id, mode, f"app:{app_id}")


def pool_wallet(tenant_id: str, mode: str, app_id: str) -> WalletRef:
    """An app's grant pool: what the developer set aside to give to users."""
    return WalletRef(tenant_id, mode, f"pool:{app_id}")


def limit_wallet(tenant_id: str, mode: str, budget_id: str) -> WalletRef:
    """What may still be spent under a budget, `bud_…`."""
    return WalletRef(tenant_id, mode, f"limit:{budget_id}")


def unfunded_wallet(tenant_id: str, mode: str) -> WalletRef:
    """The tenant's line for credits that the operator was not paid for."""
    return WalletRef(tenant_id, mode, f"unfunded:{tenant_id}")


def bounds_spending(ref: WalletRef) -> bool:
    """Whether a wallet has no credits in it: it says how much may yet be spent of those in others."""
    return ref.wallet.startswith(_BOUNDS)
