"""The gateway's own tables. The ledger's stand in `ledger/store/tables.py`; both share one migration history.

Tenant, and mode where a row is live or test data, come first in every primary and unique key: a distributed database
then keeps a tenant together, and row-level security has its columns. The one exception is an API key's id, which is
unique by itself, because the key is what tells the tenant. All times are microseconds since the epoch, UTC.
"""

from gateway.tables.budgets import Budget
from gateway.tables.catalog import METRIC_KEY_LENGTH_MAX, BillableMetric, MeteringRule
from gateway.tables.identity import (
    AMOUNT_MAX,
    EXTERNAL_ID_LENGTH_MAX,
    MARKUP_BPS_MAX,
    NAME_LENGTH_MAX,
    ApiKey,
    App,
    AssetVersion,
    Customer,
    KeptAnswer,
    Tenant,
)
from gateway.tables.packs import PACK_DURATION_S_MAX, Pack
from gateway.tables.payments import (
    REDIRECT_LENGTH_MAX,
    PaymentCustomer,
    PaymentObservation,
    PaymentOrder,
    PaymentSweep,
    ProcessorTransaction,
)
from gateway.tables.rollups import UsageByCustomer, UsageByMetadata, UsageRollup
from gateway.tables.webhooks import URL_LENGTH_MAX, OutboxLease, WebhookDelivery, WebhookEndpoint, WebhookLane

__all__ = [
    "AMOUNT_MAX",
    "EXTERNAL_ID_LENGTH_MAX",
    "MARKUP_BPS_MAX",
    "METRIC_KEY_LENGTH_MAX",
    "NAME_LENGTH_MAX",
    "PACK_DURATION_S_MAX",
    "REDIRECT_LENGTH_MAX",
    "URL_LENGTH_MAX",
    "ApiKey",
    "App",
    "AssetVersion",
    "BillableMetric",
    "Budget",
    "Customer",
    "KeptAnswer",
    "MeteringRule",
    "OutboxLease",
    "Pack",
    "PaymentCustomer",
    "PaymentObservation",
    "PaymentOrder",
    "PaymentSweep",
    "ProcessorTransaction",
    "Tenant",
    "UsageByCustomer",
    "UsageByMetadata",
    "UsageRollup",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookLane",
]
