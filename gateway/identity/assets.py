"""What a tenant's credits are, for whoever has no key of that tenant that says it."""

from sqlalchemy import ColumnElement, and_, select
from sqlmodel import col

from gateway.database import of
from gateway.records import Records
from gateway.tables import AssetVersion, Tenant
from pricing.money import Asset


def in_force(now_us: int) -> ColumnElement[bool]:
    """That a version of an asset is of its tenant's credits and holds already. The newest such one is in force."""
    return and_(
        col(AssetVersion.tenant) == col(Tenant.id),
        col(AssetVersion.code) == col(Tenant.asset_code),
        col(AssetVersion.effective_from_us) <= now_us,
    )


class Assets(Records):
    async def in_force(self, tenant_id: str) -> Asset | None:
        """The tenant's credits as they are worth now; None where there is no such tenant."""
        query = (
            select(col(AssetVersion.code), col(AssetVersion.scale), col(AssetVersion.usd_value_picos))
            .join(Tenant, in_force(self._now_us()))
            .where(col(AssetVersion.tenant) == tenant_id)
            .order_by(col(AssetVersion.effective_from_us).desc())
            .limit(1)
        )
        async with self._transactions.read(of(tenant_id)) as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else Asset(code=row[0], scale=row[1], usd_value_picos=row[2])
