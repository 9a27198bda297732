"""What can be asked of Farebox about what is sold: metrics and their prices, packs, budgets, webhook endpoints."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from farebox.call import PAGE_SIZE, Call, Pages, change, listed
from farebox.calls import segment
from farebox.catalog_values import Budget, Metric, Pack, Rule, Tier, WebhookEndpoint
from farebox.credits import Amount, millis, text
from farebox.reading import reader


def create_metric(
    key: str,
    *,
    name: str | None = None,
    overage_policy: str | None = None,
    priority_max: int | None = None,
    idempotency_key: str | None = None,
) -> Call[Metric]:
    """Something to count usage in. It needs a price next: `create_rule`.

    Args:
        overage_policy: what becomes of usage that the wallet cannot pay: `block` (the default), `allow` or `notify`.
        priority_max: only blocks of this priority or a lower one pay for it.
    """
    body = {"key": key, "name": name, "overage_policy": overage_policy, "priority_max": priority_max}
    return change("POST", "billable-metrics", reader(Metric), body, key=idempotency_key)


def metrics(*, page_size: int = PAGE_SIZE) -> Pages[Metric]:
    """All metrics, newest first."""
    return listed("billable-metrics", Metric, page_size=page_size)


def archive_metric(metric: str, *, idempotency_key: str | None = None) -> Call[Metric]:
    """Refuse usage of a metric from now on."""
    path = f"billable-metrics/{segment(metric)}/archive"
    return change("POST", path, reader(Metric), key=idempotency_key)


def create_rule(
    metric: str,
    *,
    cost_type: str = "per_unit",
    credits: Amount | None = None,
    tiers: Sequence[Tier] = (),
    package_size: Amount | None = None,
    effective_from: datetime | None = None,
    idempotency_key: str | None = None,
) -> Call[Rule]:
    """What a metric costs, from now on or from a later time.

    Args:
        cost_type: `per_unit`, `flat` (each event costs the same), `package`, `graduated` or `volume`.
        credits: of a unit, an event or a package; down to a trillionth of a credit.
        tiers: of the types `graduated` and `volume`, in their order.
        package_size: units in a package.
    """
    cost = "package_cost_decimal" if cost_type == "package" else "credit_cost_decimal"
    body = {
        "billable_metric_key": metric,
        "cost_type": cost_type,
        cost: None if credits is None else text(credits, name="credits"),
        "tiers": [_tier(tier) for tier in tiers] or None,
        "package_size": None if package_size is None else text(package_size, name="package_size"),
        "effective_from": None if effective_from is None else effective_from.isoformat(),
    }
    return change("POST", "metering-rules", reader(Rule), body, key=idempotency_key)


def rules(*, metric: str | None = None, page_size: int = PAGE_SIZE) -> Pages[Rule]:
    """All versions of all prices, or of one metric's, newest first."""
    return listed("metering-rules", Rule, {"billable_metric_key": metric}, page_size=page_size)


def archive_rule(rule_id: str, *, idempotency_key: str | None = None) -> Call[Rule]:
    """Take a version of a price out of force: the one before it holds again."""
    return change("POST", f"metering-rules/{segment(rule_id)}/archive", reader(Rule), key=idempotency_key)


def create_pack(
    key: str,
    *,
    name: str,
    price: Amount,
    credits: Amount,
    duration_seconds: int | None = None,
    priority: int | None = None,
    apps: Iterable[str] = (),
    metrics: Iterable[str] = (),
    models: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[Pack]:
    """Offer credits for a price, for a time or for ever."""
    body = {
        "key": key,
        "name": name,
        "price": millis(price, name="price"),
        "credits": millis(credits, name="credits"),
        "duration_seconds": duration_seconds,
        "priority": priority,
        "apps": list(apps) or None,
        "metrics": list(metrics) or None,
        "models": list(models) or None,
        "metadata": metadata,
    }
    return change("POST", "packs", reader(Pack), body, key=idempotency_key)


def packs(*, page_size: int = PAGE_SIZE) -> Pages[Pack]:
    """All packs, newest first."""
    return listed("packs", Pack, page_size=page_size)


def create_budget(
    subject: str,
    subject_id: str | None = None,
    *,
    credits: Amount,
    every: str,
    anchor_day: int | None = None,
    anchor_month: int | None = None,
    anchor_weekday: int | None = None,
    time_zone: str = "UTC",
    thresholds: Iterable[int] = (),
    name: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Budget]:
    """Bound what somebody spends in each period.

    Args:
        subject: `tenant`, `app`, `key` or `customer`.
        subject_id: whose; by default the app or the key that asks.
        every: `day`, `week`, `month`, `year` or `never`.
        thresholds: percent of the credits at which the event `budget.threshold` tells.
    """
    period = {
        "every": every,
        "anchor_day": anchor_day,
        "anchor_month": anchor_month,
        "anchor_weekday": anchor_weekday,
        "time_zone": time_zone,
    }
    body = {
        "subject": {"type": subject, "id": subject_id},
        "credits": millis(credits, name="credits"),
        "period": {name: value for name, value in period.items() if value is not None},
        "thresholds": list(thresholds) or None,
        "name": name,
    }
    return change("POST", "budgets", reader(Budget), body, key=idempotency_key)


def budgets(*, page_size: int = PAGE_SIZE) -> Pages[Budget]:
    """All budgets and what is left of them, newest first."""
    return listed("budgets", Budget, page_size=page_size)


def archive_budget(budget_id: str, *, idempotency_key: str | None = None) -> Call[Budget]:
    """End a budget: it bounds nothing any more."""
    return change("POST", f"budgets/{segment(budget_id)}/archive", reader(Budget), key=idempotency_key)


def create_webhook_endpoint(
    url: str,
    *,
    event_types: Iterable[str] = (),
    description: str | None = None,
    idempotency_key: str | None = None,
) -> Call[WebhookEndpoint]:
    """Be told of events at *url*, of all types unless you name some. Keep the answer's `secret`: it is shown once."""
    body = {"url": url, "event_types": list(event_types) or None, "description": description}
    return change("POST", "webhook-endpoints", reader(WebhookEndpoint), body, key=idempotency_key)


def webhook_endpoints(*, page_size: int = PAGE_SIZE) -> Pages[WebhookEndpoint]:
    """All webhook endpoints, newest first."""
    return listed("webhook-endpoints", WebhookEndpoint, page_size=page_size)


def delete_webhook_endpoint(endpoint_id: str) -> Call[None]:
    """Take an endpoint away."""
    return change("DELETE", f"webhook-endpoints/{segment(endpoint_id)}", lambda _: None, key=None)


def _tier(tier: Tier) -> dict[str, str | None]:
    return {
        "up_to": None if tier.up_to is None else text(tier.up_to, name="up_to"),
        "unit_cost_decimal": text(tier.unit_cost, name="unit_cost"),
        "flat_cost_decimal": text(tier.flat_cost, name="flat_cost"),
    }
