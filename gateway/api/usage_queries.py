"""What was used: sums of charges by day, metric, customer, model, action, app or a key of their metadata."""

import base64
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field

from gateway.api.access import Reader, sees_margins
from gateway.api.customers import Limit
from gateway.api.services import Here, Services
from gateway.api.wire import PAGE_DEFAULT, Credits, Millicredits, Page, View, amounts, shown_units, time_us
from gateway.billing.usage_facts import DAY_US, KEY_BYTES_MAX, PAIRS_MAX, VALUE_BYTES_MAX
from gateway.billing.usage_queries import UsageSum
from gateway.billing.usage_statement import DAY, GROUPS, GROUPS_MAX, METADATA, Key, UsageQuestion
from gateway.clock import EPOCH, MICROSECOND
from gateway.errors import invalid_request
from gateway.identity.principals import Principal
from gateway.tables import EXTERNAL_ID_LENGTH_MAX
from ledger.model import Scope
from pricing.money import format_decimal

router = APIRouter(prefix="/v1", tags=["metering"])

PERIOD_DAYS: Final = 30
"""How far back usage is shown unless `from` says otherwise: today and the days before it."""

GROUP_BY_LENGTH_MAX: Final = 3 * (len(METADATA) + KEY_BYTES_MAX)
TIME_LENGTH_MAX: Final = 40
METRIC_LENGTH_MAX: Final = 128
CURSOR_LENGTH_MAX: Final = 4096
"""A value of the metadata and two further names, as JSON in base64."""

UNITS_PLACES: Final = 6
NANO_PLACES: Final = 9

Name = Annotated[str | None, Query(max_length=EXTERNAL_ID_LENGTH_MAX)]
When = Annotated[
    str | None,
    Query(
        max_length=TIME_LENGTH_MAX,
        description="RFC 3339, or a date, which is its first moment in UTC.",
        examples=["2026-04-13", "2026-04-13T11:00:00Z"],
    ),
]


class UsageMarginView(View):
    """What only `admin` sees."""

    provider_cost_usd: str = Field(examples=["0.000123"])
    base_decimal: Credits
    markup_decimal: Credits


class UsageView(View):
    """What the charges of one group come to."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "group": {"day": "2026-04-13", "metric": "chat_message"},
                    "events": 1200,
                    "units": 1200,
                    "units_decimal": "1200",
                    "credits_used": 4800000,
                    "credits_used_decimal": "4800",
                    "input_tokens": 0,
                    "output_tokens": 0,
                }
            ]
        }
    )

    group: dict[str, str | None] = Field(description="The keys that were asked for; null where a charge has none.")
    events: int = Field(description="Charges. A reservation that is committed in parts has one for each part.")
    units: int | float = Field(description="Metered units. Tokens of proxied requests are counted apart.")
    units_decimal: str = Field(description="The same, exact.", examples=["12.5"])
    credits_used: Millicredits
    credits_used_decimal: Credits = Field(description="As charged: refunds are not taken off.")
    input_tokens: int
    output_tokens: int
    margin: UsageMarginView | None = Field(default=None, description="Only with `admin`.")


@router.get("/usage", response_model_exclude_unset=True)
async def query_usage(
    principal: Reader,
    services: Here,
    *,
    group_by: Annotated[
        str,
        Query(
            max_length=GROUP_BY_LENGTH_MAX,
            description=f"Up to {GROUPS_MAX} of `{'`, `'.join(GROUPS)}` and one `metadata.KEY`, with commas between.",
            examples=["day,metric", "customer", "metadata.conversation_id"],
        ),
    ] = DAY,
    start: Annotated[When, Query(alias="from")] = None,
    end: Annotated[When, Query(alias="to", description="The first moment that is not part of it.")] = None,
    customer_id: Annotated[Name, Query(description="Of this customer alone: our id or yours.")] = None,
    end_user_id: Annotated[Name, Query(description="The same as `customer_id`.")] = None,
    external_user_id: Annotated[Name, Query(description="The same as `customer_id`.")] = None,
    billable_metric_key: Annotated[str | None, Query(max_length=METRIC_LENGTH_MAX)] = None,
    feature_key: Annotated[
        str | None, Query(max_length=METRIC_LENGTH_MAX, description="The same as `billable_metric_key`.")
    ] = None,
    limit: Limit = PAGE_DEFAULT,
    cursor: Annotated[
        str | None, Query(max_length=CURSOR_LENGTH_MAX, description="The `next_cursor` of the page before.")
    ] = None,
) -> Page[UsageView]:
    """What was charged in a period, summed up by group, exact up to the last charge. Without a period: 30 days up to
    now, in UTC. Rows are in the order of their keys, customers and values of metadata first. A page can have fewer rows
    than `limit` and a next one. A key sees its own app's usage; with `admin`, all of it."""
    groups = _groups(group_by)
    start_us, end_us = _period(start, end, services.now_us())
    names = {"customer_id": customer_id, "end_user_id": end_user_id, "external_user_id": external_user_id}
    question = UsageQuestion(
        scope=Scope(principal.tenant_id, principal.mode),
        groups=groups,
        start_us=start_us,
        end_us=end_us,
        customer=await _customer(services, principal, _one_of(names)),
        metric=_one_of({"billable_metric_key": billable_metric_key, "feature_key": feature_key}),
        app=None if sees_margins(principal) else principal.app_id,
        limit=limit,
    )
    if cursor is not None:
        question = msgspec.structs.replace(question, after=_after(cursor, question.order))
    page = await services.usage_queries.ask(question)
    return Page(
        data=[_view(each, groups, principal) for each in page.sums],
        has_more=page.after is not None,
        next_cursor=None if page.after is None else _cursor(page.after),
    )


def _groups(group_by: str) -> tuple[str, ...]:
    """Raises ApiError 400 naming `group_by`."""
    groups = tuple(group.strip() for group in group_by.split(","))
    keys = [group.removeprefix(METADATA) for group in groups if group.startswith(METADATA)]
    unknown = [group for group in groups if group not in GROUPS and not group.startswith(METADATA)]
    if unknown:
        known = ", ".join(GROUPS)
        raise invalid_request(f"group_by: take one or more of {known} and metadata.KEY.", param="group_by")
    if len(groups) > GROUPS_MAX or len(set(groups)) < len(groups):
        raise invalid_request(f"group_by: at most {GROUPS_MAX} groups, each once.", param="group_by")
    if len(keys) > 1 or not all(1 <= len(key.encode()) <= KEY_BYTES_MAX for key in keys):
        raise invalid_request(
            f"group_by: one key of the metadata, of 1 to {KEY_BYTES_MAX} bytes. Of an event's metadata the first "
            f"{PAIRS_MAX} keys count whose value is a text of up to {VALUE_BYTES_MAX} bytes, a whole number or "
            "a boolean.",
            param="group_by",
        )
    return groups


def _period(start: str | None, end: str | None, now_us: int) -> tuple[int, int]:
    """By default whole days, which are the quickest to answer."""
    tomorrow_us = (now_us // DAY_US + 1) * DAY_US
    start_us = None if start is None else _moment(start, param="from")
    if end is not None:
        end_us = _moment(end, param="to")
    else:
        end_us = tomorrow_us if start_us is None else max(tomorrow_us, start_us + DAY_US)
    if start_us is None:
        start_us = max(0, end_us - PERIOD_DAYS * DAY_US)
    if start_us >= end_us:
        raise invalid_request("from must come before to.", param="from")
    return start_us, end_us


def _moment(written: str, *, param: str) -> int:
    """Raises ApiError 400 naming *param*."""
    try:
        if len(written) == len("2026-04-13"):
            at = datetime.combine(date.fromisoformat(written), datetime.min.time(), UTC)
        else:
            # A plus in a query is a space, unless it is escaped.
            at = datetime.fromisoformat(written.replace(" ", "+"))
        if at.tzinfo is None or not 1970 <= at.year <= 9000:
            raise ValueError
        at_us = time_us(at)
    except (ValueError, OverflowError):
        raise invalid_request(
            f"{param} must be a date such as 2026-04-13, or a time such as 2026-04-13T11:00:00Z.", param=param
        ) from None
    return max(0, at_us)


def _one_of(names: Mapping[str, str | None]) -> str | None:
    """The value of synonyms, of which one at most may be given.

    Raises:
        ApiError: 400 naming the second.
    """
    given = [(name, value) for name, value in names.items() if value is not None]
    if len(given) > 1:
        raise invalid_request(f"Give one of {', '.join(names)}: they mean the same.", param=given[1][0])
    return given[0][1] if given else None


async def _customer(services: Services, principal: Principal, reference: str | None) -> str | None:
    """Our id. Raises ApiError 404 for a customer that is not there."""
    if reference is None:
        return None
    return (await services.customers.find(principal.tenant_id, principal.mode, reference)).id


def _cursor(after: tuple[Key, ...]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(after)).decode().rstrip("=")


def _after(cursor: str, order: tuple[str, ...]) -> tuple[Key, ...]:
    """Raises ApiError 400 for what is not a cursor of such a question."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        keys = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True), type=tuple[Key, ...])
    except (ValueError, msgspec.MsgspecError):
        keys = ()
    kinds = [int if group == DAY else str for group in order]
    fits = 1 <= len(keys) <= len(order) and all(type(key) is kind for key, kind in zip(keys, kinds, strict=False))
    if not fits or not all(_can_be_compared(key) for key in keys):
        raise invalid_request("cursor is not one that this question gave.", param="cursor")
    return keys


def _can_be_compared(key: Key) -> bool:
    return "\x00" not in key if isinstance(key, str) else abs(key) < 2**63


def _view(found: UsageSum, groups: tuple[str, ...], principal: Principal) -> UsageView:
    asset = principal.asset
    fields: dict[str, Any] = amounts(asset, credits_used=found.charged)
    if sees_margins(principal):
        fields["margin"] = UsageMarginView(
            provider_cost_usd=format_decimal(found.provider_cost_nanos, NANO_PLACES),
            base_decimal=asset.format(found.charged - found.markup),
            markup_decimal=asset.format(found.markup),
        )
    return UsageView(
        group={group: _shown(found.keys[group]) for group in groups},
        events=found.events,
        units=shown_units(found.microunits),
        units_decimal=format_decimal(found.microunits, UNITS_PLACES),
        input_tokens=found.input_tokens,
        output_tokens=found.output_tokens,
        **fields,
    )


def _shown(key: Key) -> str | None:
    if isinstance(key, int):
        return (EPOCH + key * MICROSECOND).date().isoformat()
    return key or None
