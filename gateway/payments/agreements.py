"""What customers have agreed to have bought by themselves, as it stands in their settings."""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.identity.assets import in_force
from gateway.payments.auto_top_up_terms import Agreement, agreement_of
from gateway.payments.packages import Packages
from gateway.tables import AssetVersion, Customer, Tenant
from ledger.model import Scope
from pricing.money import Asset


class Agreements:
    """Reads agreements.

    Args:
        serves: whether customers of a mode can pay.
    """

    def __init__(self, packages: Packages, *, serves: Callable[[str], bool], now_us: Callable[[], int]) -> None:
        self._packages = packages
        self._serves = serves
        self._now_us = now_us

    async def find(
        self, connection: AsyncConnection, scope: Scope, customer_id: str, *, hold: bool = False
    ) -> Agreement | None:
        """The agreement, in the tenant's credits as they are now. With *hold* it stays so until the transaction ends.

        None where the customer has not agreed, is erased, or cannot pay.
        """
        query = (
            select(
                col(Customer.settings),
                col(AssetVersion.code),
                col(AssetVersion.scale),
                col(AssetVersion.usd_value_picos),
            )
            .join(Tenant, col(Tenant.id) == col(Customer.tenant))
            .join(AssetVersion, in_force(self._now_us()))
            .where(
                col(Customer.tenant) == scope.tenant,
                col(Customer.mode) == scope.mode,
                col(Customer.id) == customer_id,
                col(Customer.erased_at_us).is_(None),
            )
            .order_by(col(AssetVersion.effective_from_us).desc())
            .limit(1)
        )
        if hold:
            query = query.with_for_update(read=True, of=Customer)
        row = (await connection.execute(query)).one_or_none()
        if row is None or not self._serves(scope.mode):
            return None
        asset = Asset(code=row.code, scale=row.scale, usd_value_picos=row.usd_value_picos)
        return agreement_of(row.settings, self._packages, asset)
