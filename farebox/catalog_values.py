"""What answers about the catalog hold: metrics and their prices, packs, budgets, webhook endpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from farebox.credits import Amount, Credits
from farebox.values import Restrictions


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Something that usage is counted in."""

    id: str
    key: str
    name: str
    overage_policy: str
    priority_max: int | None
    archived: bool
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A tier of a new rule: credits for each unit up to *up_to*, and for being in it. The last tier has no end."""

    up_to: Amount | None = None
    unit_cost: Amount = 0
    flat_cost: Amount = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleTier:
    up_to: Decimal | None
    unit_cost: Credits
    flat_cost: Credits


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A version of a metric's price. `credit_cost` is that of a unit, or with the type `flat` of an event."""

    id: str
    billable_metric_id: str
    billable_metric_key: str
    version: int
    cost_type: str
    credit_cost: Credits | None
    tiers: tuple[RuleTier, ...] | None
    package_size: Decimal | None
    package_cost: Credits | None
    effective_from: datetime
    archived: bool
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Credits for a price, and for a time."""

    id: str
    key: str
    name: str
    price: Credits
    credits: Credits
    duration_seconds: int | None
    priority: int
    restrictions: Restrictions
    metadata: Mapping[str, Any]
    archived: bool
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whose budget it is: `tenant`, `app`, `key` or `customer`."""

    type: str
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """How a budget recurs. `starts_at` and `ends_at` are those of the period that is now."""

    every: str
    anchor_day: int | None
    anchor_month: int | None
    anchor_weekday: int | None
    time_zone: str
    starts_at: datetime | None
    ends_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much may be spent in each period, and what is left of it in this one."""

    id: str
    name: str
    subject: Subject
    credits: Credits
    spent: Credits
    reserved: Credits
    remaining: Credits
    period: Period
    thresholds: tuple[int, ...]
    archived: bool
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookEndpoint:
    """Where webhooks go. `secret` verifies them; only the answer that made the endpoint has it."""

    id: str
    url: str
    event_types: tuple[str, ...]
    description: str
    status: str
    disabled_reason: str | None
    livemode: bool
    version: int
    created_at: datetime
    secret: str | None = None
