"""What a tenant's credits are, for whoever has no key of that tenant that says it."""

from sqlalchemy import and_, select
from sqlmodel import col

from gateway.database import of
from gateway.records import Records
from gateway.tables import AssetVersion, Tenant
from pricing.money import Asset


class Assets(Records):
    async def in_force(self, tenant_id: str) -> Asset | None:
        """The tenant's credits as they are worth now; None where there is no such tenant."""
        query = (
            select(col(AssetVersion.code), col(AssetVersion.scale), col(AssetVersion.usd_value_picos))
            .join(
                Tenant,
                and_(col(Tenant.id) == col(AssetVersion.tenant), col(Tenant.asset_code) == col(AssetVersion.code)),
            )
            .where(col(AssetVersion.tenant) == tenant_id, col(AssetVersion.effective_from_us) <= self._now_us())
            .order_by(col(AssetVersion.effective_from_us).desc())
            .limit(1)
        )
        async with self._transactions.read(of(tenant_id)) as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else Asset(code=row[0], scale=row[1], usd_value_picos=row[2])
