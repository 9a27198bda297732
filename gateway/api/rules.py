"""Metering rules: the versions of what a metric costs."""

from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field

from gateway.api.access import CatalogWriter, Reader
from gateway.api.customers import Cursor, Limit
from gateway.api.idempotency import key_of, once
from gateway.api.metrics import MetricKey
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.versions import etag, expected_version
from gateway.api.wire import (
    PAGE_DEFAULT,
    Body,
    Credits,
    ExactDecimal,
    FutureTime,
    Millicredits,
    Page,
    Time,
    View,
    shown_units,
    time_us,
)
from gateway.billing.metrics import RuleVersion
from gateway.clock import time_text
from gateway.database import Transactions
from gateway.errors import invalid_request
from gateway.tables import METRIC_KEY_LENGTH_MAX
from pricing.metering import (
    PICOS_PER_CREDIT,
    TIERS_MAX,
    FlatRule,
    GraduatedRule,
    PackageRule,
    PerUnitRule,
    Rule,
    Tier,
    VolumeRule,
    microunits,
)
from pricing.money import format_decimal

router = APIRouter(prefix="/v1/metering-rules", tags=["metering"], route_class=ExactRoute)

PICO_PLACES: Final = 12
PICOS_PER_MILLICREDIT: Final = PICOS_PER_CREDIT // 1000
SIZE_MAX: Final = 30
"""The order of magnitude of a number that is looked at closer."""

CostType = Literal["flat", "per_unit", "graduated", "volume", "package"]
AnyCostType = Literal["flat", "per_unit", "graduated", "volume", "tiered", "package"]
Millis = Annotated[ExactDecimal | None, Field(description="Millicredits, with fractions if need be.")]
Exact = Annotated[ExactDecimal | None, Field(description="The same in credits. Give either of the two.")]

FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "flat": ("credit_cost", "unit_cost"),
    "per_unit": ("credit_cost", "unit_cost"),
    "graduated": ("tiers",),
    "volume": ("tiers",),
    "package": ("package_size", "package_cost"),
}
"""What says the price, for each type; nothing else may be given."""


COST_TYPES: Final[dict[type[Rule], CostType]] = {
    FlatRule: "flat",
    PerUnitRule: "per_unit",
    GraduatedRule: "graduated",
    VolumeRule: "volume",
    PackageRule: "package",
}


class TierBody(View):
    up_to: ExactDecimal | None = Field(
        default=None, description="The last unit of the tier; null, or left out, for the last tier, without end."
    )
    unit_cost: Millis = None
    unit_cost_decimal: Exact = None
    flat_cost: Millis = None
    flat_cost_decimal: Exact = None

    def tier(self, place: str) -> Tier:
        unit = _price(self, "unit_cost", place)
        flat = _price(self, "flat_cost", place)
        if unit is None and flat is None:
            raise invalid_request(f"{place} has no price: give unit_cost, flat_cost or both.", param=place)
        return Tier(
            up_to_micros=None if self.up_to is None else _micros(self.up_to, f"{place}.up_to"),
            unit_cost_picos=unit or 0,
            flat_cost_picos=flat or 0,
        )


class PriceBody(Body):
    """A price. Which fields say it hangs on `cost_type`; amounts are millicredits, their twins credits."""

    credit_cost: Millis = Field(default=None, examples=[1000])
    credit_cost_decimal: Exact = None
    unit_cost: Millis = Field(default=None, description="Millicredits a unit; the same as `credit_cost`.")
    unit_cost_decimal: Exact = None
    tier_mode: Literal["graduated", "volume"] | None = Field(default=None, description="With the type `tiered`.")
    tiers: tuple[TierBody, ...] | None = Field(default=None, min_length=1, max_length=TIERS_MAX)
    package_size: ExactDecimal | None = Field(default=None, description="Units in a package.")
    package_cost: Millis = None
    package_cost_decimal: Exact = None
    effective_from: FutureTime | None = Field(
        default=None, description="When this price takes effect: not in the past. Default: now."
    )

    def rule(self, cost_type: str) -> Rule:
        """The rule that the fields say.

        Raises:
            ApiError: 400 naming the field that is missing, does not belong, or says no price.
        """
        if cost_type == "tiered":
            if self.tier_mode is None:
                raise invalid_request("tier_mode is missing: graduated or volume.", param="tier_mode")
            cost_type = self.tier_mode
        elif self.tier_mode is not None and self.tier_mode != cost_type:
            raise invalid_request("tier_mode goes with the cost_type tiered.", param="tier_mode")
        self._refuse_others(cost_type)
        if cost_type in ("graduated", "volume"):
            return _tiered(cost_type, self.tiers or ())
        if cost_type == "package":
            return self._package()
        prices = {_price(self, "unit_cost"), _price(self, "credit_cost")} - {None}
        if len(prices) > 1:
            raise invalid_request("unit_cost and credit_cost are the same thing, but differ.", param="unit_cost")
        if not prices:
            raise invalid_request("unit_cost is missing.", param="unit_cost")
        (picos,) = prices
        assert picos is not None
        return _made(lambda: FlatRule(picos) if cost_type == "flat" else PerUnitRule(picos), "unit_cost")

    def _package(self) -> Rule:
        picos, size = _price(self, "package_cost"), self.package_size
        if size is None or picos is None:
            missing = "package_size" if size is None else "package_cost"
            raise invalid_request(f"{missing} is missing.", param=missing)
        micros = _micros(size, "package_size")
        return _made(lambda: PackageRule(micros, picos), "package_size")

    def _refuse_others(self, cost_type: str) -> None:
        every = {name for names in FIELDS.values() for name in names}
        for name in sorted(every - set(FIELDS[cost_type])):
            for field in (name, f"{name}_decimal"):
                if getattr(self, field, None) is not None:
                    raise invalid_request(f"{field} does not go with the cost_type {cost_type}.", param=field)


class NewRule(PriceBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "billable_metric_key": "chat_message",
                    "cost_type": "per_unit",
                    "credit_cost": 1000,
                    "unit_cost": 1000,
                },
                {
                    "billable_metric_key": "images",
                    "cost_type": "graduated",
                    "tiers": [{"up_to": 100, "unit_cost": 500}, {"up_to": None, "unit_cost": 250}],
                },
                {
                    "billable_metric_key": "sms",
                    "cost_type": "package",
                    "package_size": 1000,
                    "package_cost_decimal": "2",
                },
            ]
        }
    )

    billable_metric_key: MetricKey
    cost_type: AnyCostType = Field(
        description="`flat`: every event costs the same. `per_unit`. `graduated`: each tier's units cost that tier's "
        "rate. `volume`: all units cost the rate of the tier that their number falls into. `package`: one that is "
        "begun is paid in full. Tiers and packages begin anew with each event."
    )


class RuleChange(PriceBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"unit_cost": 1200}]})

    cost_type: AnyCostType | None = Field(default=None, description="Default: that of the rule.")


class TierView(View):
    up_to: float | int | None = Field(description="Units.", examples=[100])
    unit_cost: Millicredits
    unit_cost_decimal: Credits
    flat_cost: Millicredits
    flat_cost_decimal: Credits


class RuleView(View):
    id: str = Field(examples=["rul_01k7m3v9c2q8x5t4n6r1b0w3ye"], description="The price version of what is charged.")
    billable_metric_id: str = Field(examples=["mtr_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    billable_metric_key: str = Field(examples=["chat_message"])
    version: int = Field(description="Counts the versions of the metric's price; the header `ETag` has it, too.")
    cost_type: CostType
    credit_cost: Millicredits | None
    credit_cost_decimal: Credits | None
    unit_cost: Millicredits | None = Field(description="Of the type `per_unit`: the same as `credit_cost`.")
    unit_cost_decimal: Credits | None
    tiers: list[TierView] | None
    package_size: float | int | None = Field(description="Units.")
    package_cost: Millicredits | None
    package_cost_decimal: Credits | None
    effective_from: Time
    archived: bool = Field(description="It is out of force: the version before it holds.")
    created_at: Time


def rule_view(version: RuleVersion) -> RuleView:
    rule = version.rule
    prices: dict[str, int | None] = {"credit_cost": None, "unit_cost": None, "package_cost": None}
    tiers: list[TierView] | None = None
    match rule:
        case FlatRule(cost_picos):
            prices["credit_cost"] = cost_picos
        case PerUnitRule(unit_cost_picos):
            prices["credit_cost"] = prices["unit_cost"] = unit_cost_picos
        case PackageRule(_, cost_picos):
            prices["package_cost"] = cost_picos
        case GraduatedRule(steps) | VolumeRule(steps):
            tiers = [_tier_view(step) for step in steps]
    return RuleView(
        id=version.id,
        billable_metric_id=version.metric_id,
        billable_metric_key=version.metric_key,
        version=version.version,
        cost_type=COST_TYPES[type(rule)],
        tiers=tiers,
        package_size=shown_units(rule.size_micros) if isinstance(rule, PackageRule) else None,
        effective_from=time_text(version.effective_from_us),
        archived=version.archived,
        created_at=time_text(version.created_at_us),
        **_amounts(prices),
    )


@router.post("", status_code=201)
async def create_rule(
    body: NewRule, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> RuleView:
    """Set what a metric costs, from now on or from a later time. The versions before it are kept.

    In force is the version that took effect last; of several that took effect at once, the newest.
    """
    rule = body.rule(body.cost_type)

    async def act(transactions: Transactions) -> RuleView:
        billables = services.billables.within(transactions)
        return rule_view(
            await billables.price(
                principal.tenant_id,
                principal.mode,
                body.billable_metric_key,
                rule,
                effective_from_us=_effective_from(body, services),
            )
        )

    key = key_of(request, body, "rules.create")
    answer = await once(request, response, services, principal, key=key, act=act, view=RuleView)
    services.changes.announce()
    etag(response, answer.version)
    return answer


@router.get("")
async def list_rules(
    principal: Reader,
    services: Here,
    cursor: Cursor = None,
    limit: Limit = PAGE_DEFAULT,
    billable_metric_key: Annotated[
        str | None, Query(max_length=METRIC_KEY_LENGTH_MAX, description="Only the versions of this metric.")
    ] = None,
) -> Page[RuleView]:
    """All versions of all prices, newest first."""
    found = await services.billables.rules(
        principal.tenant_id, principal.mode, before=cursor, limit=limit + 1, metric=billable_metric_key
    )
    more = len(found) > limit
    return Page(
        data=[rule_view(version) for version in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


RulePath = Annotated[str, Path(max_length=64, examples=["rul_01k7m3v9c2q8x5t4n6r1b0w3ye"])]


@router.get("/{rule_id}")
async def get_rule(rule_id: RulePath, response: Response, principal: Reader, services: Here) -> RuleView:
    """One version of a price."""
    found = await services.billables.rule(principal.tenant_id, principal.mode, rule_id)
    etag(response, found.version)
    return rule_view(found)


@router.patch("/{rule_id}", status_code=201)
async def revise_rule(
    *,
    rule_id: RulePath,
    body: RuleChange,
    request: Request,
    response: Response,
    principal: CatalogWriter,
    services: Here,
) -> RuleView:
    """Change a price: the answer is a further version with an id of its own; the one that you name stays as it is.

    With `If-Match`, only if the version that you have seen is the metric's newest.
    """
    expected = expected_version(request)

    async def act(transactions: Transactions) -> RuleView:
        billables = services.billables.within(transactions)
        known = await billables.rule(principal.tenant_id, principal.mode, rule_id)
        return rule_view(
            await billables.revise(
                principal.tenant_id,
                principal.mode,
                rule_id,
                body.rule(body.cost_type or COST_TYPES[type(known.rule)]),
                effective_from_us=_effective_from(body, services),
                expected=expected,
            )
        )

    key = key_of(request, body, "rules.revise", about=rule_id, change=True)
    answer = await once(request, response, services, principal, key=key, act=act, view=RuleView)
    services.changes.announce()
    etag(response, answer.version)
    return answer


@router.post("/{rule_id}/archive")
async def archive_rule(
    rule_id: RulePath, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> RuleView:
    """Take a version out of force: the one before it holds again. What was charged stays. Repeatable."""

    async def act(transactions: Transactions) -> RuleView:
        billables = services.billables.within(transactions)
        return rule_view(await billables.archive_rule(principal.tenant_id, principal.mode, rule_id))

    key = key_of(request, None, "rules.archive", about=rule_id)
    answer = await once(request, response, services, principal, key=key, act=act, view=RuleView)
    services.changes.announce()
    etag(response, answer.version)
    return answer


def _effective_from(body: PriceBody, services: Services) -> int | None:
    """Asked for what is new alone: a repetition is answered as it was, though its time has come by now."""
    if body.effective_from is None:
        return None
    at_us = time_us(body.effective_from)
    if at_us < services.now_us():
        raise invalid_request("effective_from lies in the past; leave it out for now.", param="effective_from")
    return at_us


def _price(body: Any, name: str, place: str = "") -> int | None:
    """A price in pico-credits, from its field in millicredits or from its twin in credits; None where neither is.

    Both may be given as an answer shows them: then the millicredits are the exact twin, rounded down.
    """
    millis, credits = getattr(body, name), getattr(body, f"{name}_decimal")
    where = f"{place}.{name}" if place else name
    rounded = None if millis is None else _picos(millis, PICOS_PER_MILLICREDIT, where)
    exact = None if credits is None else _picos(credits, PICOS_PER_CREDIT, f"{where}_decimal")
    if exact is None or rounded is None:
        return rounded if exact is None else exact
    if rounded not in (exact, exact - exact % PICOS_PER_MILLICREDIT):
        raise invalid_request(f"{where} and its twin {where}_decimal differ.", param=where)
    return exact


def _picos(value: Decimal, scale: int, param: str) -> int:
    # The size is looked at first: 1E+999999 has a million digits.
    if value and abs(value.adjusted()) > SIZE_MAX:
        raise invalid_request(f"{param} is not a price of a sensible size.", param=param)
    picos = Fraction(value) * scale if value else Fraction(0)
    if picos.denominator != 1:
        raise invalid_request(f"{param} is finer than a trillionth of a credit.", param=param)
    return picos.numerator


def _micros(units: Decimal, param: str) -> int:
    try:
        return microunits(units)
    except ValueError as error:
        raise invalid_request(f"{param}: {error}.", param=param) from None


def _tiered(cost_type: str, bodies: tuple[TierBody, ...]) -> Rule:
    if not bodies:
        raise invalid_request("tiers are missing.", param="tiers")
    tiers = tuple(body.tier(f"tiers[{place}]") for place, body in enumerate(bodies))
    return _made(lambda: GraduatedRule(tiers) if cost_type == "graduated" else VolumeRule(tiers), "tiers")


def _made(make: Any, param: str) -> Rule:
    try:
        rule: Rule = make()
    except ValueError as error:
        raise invalid_request(f"{param}: {error}.", param=param) from None
    return rule


def _tier_view(tier: Tier) -> TierView:
    return TierView(
        up_to=None if tier.up_to_micros is None else shown_units(tier.up_to_micros),
        **_amounts({"unit_cost": tier.unit_cost_picos, "flat_cost": tier.flat_cost_picos}),
    )


def _amounts(prices: dict[str, int | None]) -> dict[str, Any]:
    """Each price in millicredits, rounded down, with its exact twin in credits."""
    written: dict[str, Any] = {}
    for name, picos in prices.items():
        written[name] = None if picos is None else picos // PICOS_PER_MILLICREDIT
        written[f"{name}_decimal"] = None if picos is None else format_decimal(picos, PICO_PLACES)
    return written
