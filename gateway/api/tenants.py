"""What a tenant has chosen for itself: what new customers get, and what happens while the ledger is away."""

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field

from gateway.api.access import Administrator, refuse_test_keys
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.versions import etag, expected_version
from gateway.api.wire import (
    Body,
    Credits,
    Metadata,
    Millicredits,
    Text,
    Thresholds,
    View,
    Word,
    amounts,
    check_thresholds,
    units_of_millis,
)
from gateway.database import Transactions
from gateway.errors import not_found
from gateway.identity.availability import Availability
from gateway.identity.default_grant import DefaultGrant
from gateway.identity.principals import Principal
from gateway.identity.tenants import GRANT_LIFE_S_MAX, GRANT_PARAM, TenantInfo
from gateway.identity.thresholds import LOW_BALANCE
from ledger.model import PRIORITY_MAX
from pricing.money import Asset

router = APIRouter(prefix="/v1/tenants", tags=["tenants"], route_class=ExactRoute)

ME: Final = "me"
RESTRICTIONS_MAX: Final = 100
"""As of a top-up's grant."""

TenantPath = Annotated[str, Path(max_length=64, description="Your tenant's id (`ten_…`), or `me`.", examples=[ME])]
Restrictions = Annotated[tuple[Word, ...], Field(max_length=RESTRICTIONS_MAX)]


class DefaultGrantTerms(Body):
    """A block of credits for each customer who is new from now on, live and test. They have it before they are served.

    It is your gift: the operator is not paid for it.
    """

    credits: int = Field(strict=True, ge=1, description="Millicredits: 1000 are one credit.")
    expires_after_seconds: int | None = Field(
        default=None, strict=True, ge=1, le=GRANT_LIFE_S_MAX, description="From the grant on. Default: never."
    )
    priority: int = Field(default=0, strict=True, ge=-PRIORITY_MAX, le=PRIORITY_MAX, description="Higher burns first.")
    source: Text = "default_grant"
    metadata: Metadata = Field(default={})
    apps: Restrictions = Field(default=(), description="Pays only in these apps.")
    metrics: Restrictions = Field(default=(), description="Pays only these metrics.")
    models: Restrictions = Field(default=(), description="Pays only these models.")

    def terms(self, asset: Asset) -> DefaultGrant:
        """Raises ApiError 400 for an amount that the asset cannot hold."""
        return DefaultGrant(
            amount=units_of_millis(self.credits, asset, param=f"{GRANT_PARAM}.credits"),
            expires_after_s=self.expires_after_seconds,
            priority=self.priority,
            source=self.source,
            apps=self.apps,
            metrics=self.metrics,
            models=self.models,
            metadata=self.metadata,
        )


class TenantConfigChange(Body):
    """What is left out stays as it is; `default_grant: null` ends it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"default_grant": {"credits": 50000, "expires_after_seconds": 2592000}}]}
    )

    default_grant: DefaultGrantTerms | None = None
    when_ledger_is_down: Availability | None = Field(
        default=None, description="Refuse (`closed`), or serve from the allowance (`open`)."
    )
    open_allowance: int | None = Field(
        default=None, strict=True, ge=0, description="Millicredits that each process may serve before it is back."
    )
    low_balance_thresholds: Thresholds | None = Field(
        default=None,
        description="Millicredits. `credit.low` tells when the balance of a customer, or of a developer's own wallet, "
        "sinks below one of them. An empty list: none.",
    )


class DefaultGrantView(View):
    credits: Millicredits
    credits_decimal: Credits
    expires_after_seconds: int | None
    priority: int
    source: str
    metadata: dict[str, Any]
    apps: tuple[str, ...]
    metrics: tuple[str, ...]
    models: tuple[str, ...]


class TenantConfigView(View):
    tenant_id: str = Field(examples=["ten_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    default_grant: DefaultGrantView | None
    when_ledger_is_down: str = Field(examples=["closed"])
    open_allowance: Millicredits
    open_allowance_decimal: Credits
    low_balance_thresholds: tuple[Millicredits, ...] = Field(examples=[[5000, 1000]])
    version: int = Field(description="Rises with every change; the ETag.")


def config_view(tenant: TenantInfo, asset: Asset) -> TenantConfigView:
    grant, availability = tenant.default_grant, tenant.availability
    shown = None
    if grant is not None:
        shown = DefaultGrantView(
            expires_after_seconds=grant.expires_after_s,
            priority=grant.priority,
            source=grant.source,
            metadata=grant.metadata,
            apps=grant.apps,
            metrics=grant.metrics,
            models=grant.models,
            **amounts(asset, credits=grant.amount),
        )
    return TenantConfigView(
        tenant_id=tenant.id,
        default_grant=shown,
        when_ledger_is_down=availability.choice,
        low_balance_thresholds=tenant.low_balance_thresholds,
        version=tenant.version,
        **amounts(asset, open_allowance=availability.allowance),
    )


def _own(tenant: str, principal: Principal) -> str:
    """Raises ApiError 404 for another tenant than the key's."""
    if tenant not in (ME, principal.tenant_id):
        raise not_found(f"tenant {tenant}")
    return principal.tenant_id


@router.get("/{tenant}/config")
async def get_tenant_config(
    tenant: TenantPath, response: Response, principal: Administrator, services: Here
) -> TenantConfigView:
    """What your tenant has chosen."""
    found = await services.tenants.tenant(_own(tenant, principal))
    etag(response, found.version)
    return config_view(found, principal.asset)


@router.patch("/{tenant}/config")
async def change_tenant_config(
    *,
    tenant: TenantPath,
    body: TenantConfigChange,
    request: Request,
    response: Response,
    principal: Administrator,
    services: Here,
) -> TenantConfigView:
    """Change what your tenant has chosen; with `If-Match`, only the version that you have read.

    Customers who are there already get nothing of a new `default_grant`. All processes follow within a second.
    """
    tenant_id = _own(tenant, principal)
    refuse_test_keys(principal)
    allowance = None
    if body.open_allowance is not None:
        allowance = units_of_millis(body.open_allowance, principal.asset, param="open_allowance")
    grant: DefaultGrant | Literal["none"] | None = None
    if GRANT_PARAM in body.model_fields_set:
        grant = "none" if body.default_grant is None else body.default_grant.terms(principal.asset)
    thresholds = body.low_balance_thresholds
    if thresholds is not None:
        check_thresholds(thresholds, principal.asset, param=LOW_BALANCE)
    expected = expected_version(request)

    async def act(transactions: Transactions) -> TenantConfigView:
        changed = await services.tenants.within(transactions).change_tenant(
            tenant_id,
            when_ledger_is_down=body.when_ledger_is_down,
            open_allowance=allowance,
            default_grant=grant,
            low_balance_thresholds=thresholds,
            version=expected,
        )
        return config_view(changed, principal.asset)

    key = key_of(request, body, "tenants.change", change=True)
    answer = await once(request, response, services, principal, key=key, act=act, view=TenantConfigView)
    services.changes.announce()
    etag(response, answer.version)
    return answer
