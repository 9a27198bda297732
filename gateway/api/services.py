"""What the endpoints work with. `gateway/app.py` puts it together; an endpoint takes it as `Here`."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.types import ASGIApp

from gateway.billing.alerts import Alerts
from gateway.billing.budget_book import BudgetBook
from gateway.billing.budgets import Budgets
from gateway.billing.catalog import Catalog
from gateway.billing.charging import Charging
from gateway.billing.entitlements import Entitlements
from gateway.billing.erasure import Erasure
from gateway.billing.metrics import BillableMetrics
from gateway.billing.packs import Packs
from gateway.billing.refunds import Refunds
from gateway.billing.reservations import Reservations
from gateway.billing.usage import Metering
from gateway.billing.usage_queries import UsageQueries
from gateway.database import Database
from gateway.events.event import StoredEvent
from gateway.events.webhooks import Webhooks
from gateway.identity.customers import Customers
from gateway.identity.principals import Principals
from gateway.identity.tenants import Tenants
from gateway.payments.packages import Packages
from gateway.payments.service import Payments
from gateway.prices import ServedModels
from gateway.proxy.quoting import Quoter
from gateway.proxy.rate_limit import RateLimit
from gateway.proxy.routing import Router
from gateway.readiness import Readiness
from gateway.settings import Settings
from gateway.shared.changes import Changes
from gateway.telemetry import Metrics
from ledger.ledger import Ledger
from ledger.model import Scope

EventViews = Callable[[StoredEvent], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    database: Database
    ledger: Ledger
    principals: Principals
    changes: Changes
    tenants: Tenants
    customers: Customers
    erasure: Erasure
    rate_limit: RateLimit
    router: Router
    models: ServedModels
    quoter: Quoter
    charging: Charging
    budgets: Budgets
    budget_book: BudgetBook
    alerts: Alerts
    refunds: Refunds
    reservations: Reservations
    packs: Packs
    catalog: Catalog
    entitlements: Entitlements
    billables: BillableMetrics
    metering: Metering
    proxy: ASGIApp
    metrics: Metrics
    now_us: Callable[[], int]
    new_id: Callable[[str], str]
    readiness: Readiness
    usage_queries: UsageQueries
    webhooks: Webhooks
    event_view: EventViews
    packages: Packages
    payments: Payments | None

    def top_up_url(self, scope: Scope, customer_id: str) -> str | None:
        """The page where this customer adds credits; None where there is none."""
        return None if self.payments is None else self.payments.links.url_of(scope, customer_id)


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Here = Annotated[Services, Depends(services_of)]
