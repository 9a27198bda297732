"""Where what the payment processor tells is kept: with the operator, whose account it is.

The processor's account is the installation's, not a tenant's. Its events, its movements and when they were last
compared stand with the first tenant, `live` or `test` as the processor has it.
"""

from gateway.identity.tenants import Tenants
from gateway.payments.processor import StripeMode
from ledger.model import Scope


class NoOperator(Exception):
    """The installation has no first tenant yet: `farebox init` makes it."""


class OperatorScope:
    """The scope of the operator, which never changes once it is there.

    Args:
        mode: of the processor's key.
    """

    def __init__(self, tenants: Tenants, mode: StripeMode) -> None:
        self._tenants = tenants
        self._mode = mode
        self._known: Scope | None = None

    async def __call__(self) -> Scope:
        """Raises NoOperator, DatabaseUnavailable."""
        if self._known is None:
            first = await self._tenants.first_tenant()
            if first is None:
                raise NoOperator
            self._known = Scope(first.id, self._mode)
        return self._known
