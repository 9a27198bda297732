"""Billable metrics: what a tenant meters, by our id or by the tenant's own key for it."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field

from gateway.api.access import CatalogWriter, Reader
from gateway.api.customers import Cursor, Limit
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here
from gateway.api.versions import etag, expected_version
from gateway.api.wire import PAGE_DEFAULT, Body, Page, Text, Time, View
from gateway.billing.catalog import Metric, OveragePolicy
from gateway.billing.metrics import MetricChange
from gateway.clock import time_text
from gateway.database import Transactions
from gateway.tables import METRIC_KEY_LENGTH_MAX, NAME_LENGTH_MAX
from ledger.model import PRIORITY_MAX

router = APIRouter(prefix="/v1/billable-metrics", tags=["metering"], route_class=ExactRoute)

MetricKey = Annotated[str, Field(max_length=METRIC_KEY_LENGTH_MAX, examples=["chat_message"])]
MetricPath = Annotated[
    str,
    Path(
        description="Our id (`mtr_…`), or your own key of the metric.",
        examples=["chat_message"],
        min_length=1,
        max_length=METRIC_KEY_LENGTH_MAX,
    ),
]
MetricTitle = Annotated[Text, Field(min_length=1, max_length=NAME_LENGTH_MAX)]
PriorityMax = Annotated[
    int | None,
    Field(
        strict=True,
        ge=-PRIORITY_MAX,
        le=PRIORITY_MAX,
        description="Only blocks of this priority or a lower one pay for it: so plan credits do not pay for plans.",
    ),
]
Policy = Annotated[
    OveragePolicy,
    Field(
        description="What becomes of usage that the wallet cannot pay. `block`: it is refused with 402. `allow`: it is "
        "recorded, and the wallet owes what is missing. `notify`: the same, and an event `usage.overage` tells of it."
    ),
]


class NewMetric(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"key": "chat_message", "name": "Chat Message"}]})

    key: MetricKey = Field(description="Your own name for it, by which usage names it. It never changes.")
    name: MetricTitle | None = Field(default=None, description="For people. Default: the key.")
    overage_policy: Policy = "block"
    priority_max: PriorityMax = None


class MetricChanges(Body):
    """What is left out stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"overage_policy": "notify"}]})

    name: MetricTitle = ""
    overage_policy: Policy = "block"
    priority_max: PriorityMax = None
    archived: Annotated[bool, Field(strict=True)] = False

    def change(self) -> MetricChange:
        named = self.model_fields_set - {"idempotency_key"}
        return MetricChange(**{name: getattr(self, name) for name in named})


class MetricView(View):
    id: str = Field(examples=["mtr_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    key: str = Field(examples=["chat_message"])
    name: str = Field(examples=["Chat Message"])
    overage_policy: Literal["block", "allow", "notify"]
    priority_max: int | None
    archived: bool = Field(description="Usage of an archived metric is refused; its key stays taken.")
    version: int = Field(description="Rises with every change; the header `ETag` has it, too.")
    created_at: Time


def metric_view(metric: Metric) -> MetricView:
    return MetricView(
        id=metric.id,
        key=metric.key,
        name=metric.name,
        overage_policy=metric.overage_policy,
        priority_max=metric.priority_max,
        archived=metric.archived,
        version=metric.version,
        created_at=time_text(metric.created_at_us),
    )


@router.post("", status_code=201)
async def create_metric(
    body: NewMetric, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> MetricView:
    """Create a metric. It needs a price next: `POST /v1/metering-rules`."""

    async def act(transactions: Transactions) -> MetricView:
        metric = await services.billables.within(transactions).create(
            principal.tenant_id,
            principal.mode,
            key=body.key,
            name=body.name or body.key,
            overage_policy=body.overage_policy,
            priority_max=body.priority_max,
        )
        return metric_view(metric)

    key = key_of(request, body, "metrics.create")
    answer = await once(request, response, services, principal, key=key, act=act, view=MetricView)
    services.changes.announce()
    etag(response, answer.version)
    return answer


@router.get("")
async def list_metrics(
    principal: Reader,
    services: Here,
    cursor: Cursor = None,
    limit: Limit = PAGE_DEFAULT,
    archived: Annotated[bool | None, Query(description="Only those that are, or are not, archived.")] = None,
) -> Page[MetricView]:
    """All metrics, newest first."""
    found = await services.billables.page(
        principal.tenant_id, principal.mode, before=cursor, limit=limit + 1, archived=archived
    )
    more = len(found) > limit
    return Page(
        data=[metric_view(metric) for metric in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


@router.get("/{metric:path}")
async def get_metric(metric: MetricPath, response: Response, principal: Reader, services: Here) -> MetricView:
    """One metric."""
    found = await services.billables.find(principal.tenant_id, principal.mode, metric)
    etag(response, found.version)
    return metric_view(found)


@router.patch("/{metric:path}")
async def change_metric(
    *,
    metric: MetricPath,
    body: MetricChanges,
    request: Request,
    response: Response,
    principal: CatalogWriter,
    services: Here,
) -> MetricView:
    """Change a metric, or bring an archived one back. With `If-Match`, only the version that you have seen."""
    expected = expected_version(request)

    async def act(transactions: Transactions) -> MetricView:
        billables = services.billables.within(transactions)
        changed = await billables.change(principal.tenant_id, principal.mode, metric, body.change(), expected=expected)
        return metric_view(changed)

    key = key_of(request, body, "metrics.change", about=metric, change=True)
    answer = await once(request, response, services, principal, key=key, act=act, view=MetricView)
    services.changes.announce()
    etag(response, answer.version)
    return answer


@router.post("/{metric:path}/archive")
async def archive_metric(
    metric: MetricPath, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> MetricView:
    """Stop metering: usage of it is refused from now on. What was recorded stays. Repeating it changes nothing."""

    async def act(transactions: Transactions) -> MetricView:
        billables, change = services.billables.within(transactions), MetricChange(archived=True)
        return metric_view(await billables.change(principal.tenant_id, principal.mode, metric, change))

    key = key_of(request, None, "metrics.archive", about=metric)
    answer = await once(request, response, services, principal, key=key, act=act, view=MetricView)
    services.changes.announce()
    etag(response, answer.version)
    return answer
