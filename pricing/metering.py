"""What one metered event costs: a tenant's rule for a feature, times the units that were used.

How it works: prices are ints of pico-credits (1e-12 of a credit), quantities ints of micro-units (1e-6 of a unit), so
that every cost is an exact int of 1e-18 credits, which is rounded up once, to the smallest unit of the asset
(`ceil_div`). A rule prices ONE event: tiers and packages begin anew with each, they do not accumulate over events.

No units cost nothing, except under a flat rule, which prices the event itself. A cost never falls as units rise, except
under a volume rule, where the next tier's lower rate holds for all units of the event.

Source: usage-based prices of Stripe Billing (per unit, graduated, volume, package), in credits instead of money.
"""

from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, Final

import msgspec

from pricing.charge import ChargeTooLarge
from pricing.money import AMOUNT_MAX, Asset, ceil_div

PICOS_PER_CREDIT: Final = 10**12
MICROS_PER_UNIT: Final = 10**6
UNIT_PLACES: Final = 6
"""Decimal places of a quantity."""

UNITS_MAX: Final = 10**9
"""Of one event."""

PRICE_PICOS_MAX: Final = 10**9 * PICOS_PER_CREDIT
TIERS_MAX: Final = 100

_SHARES: Final = PICOS_PER_CREDIT * MICROS_PER_UNIT
_DIGITS_MAX: Final = 60


class UnitsInvalid(ValueError):
    """Not a quantity: negative, more than UNITS_MAX, or finer than a millionth of a unit."""


class FlatRule(msgspec.Struct, frozen=True, tag_field="cost_type", tag="flat"):
    """Every event costs the same, whatever its units."""

    cost_picos: int

    def __post_init__(self) -> None:
        _require_prices([self.cost_picos])


class PerUnitRule(msgspec.Struct, frozen=True, tag_field="cost_type", tag="per_unit"):
    """Each unit costs the same; a part of a unit costs its part."""

    unit_cost_picos: int

    def __post_init__(self) -> None:
        _require_prices([self.unit_cost_picos])


class Tier(msgspec.Struct, frozen=True, omit_defaults=True):
    """What units up to *up_to_micros*, that one included, cost; None has no end. *flat_cost_picos* comes on top."""

    up_to_micros: int | None
    unit_cost_picos: int
    flat_cost_picos: int = 0


class GraduatedRule(msgspec.Struct, frozen=True, tag_field="cost_type", tag="graduated"):
    """Each tier's units cost that tier's rate; the flat cost of each tier that is entered comes on top."""

    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        _require_tiers(self.tiers)


class VolumeRule(msgspec.Struct, frozen=True, tag_field="cost_type", tag="volume"):
    """All units cost the rate of the tier that their number falls into, and its flat cost."""

    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        _require_tiers(self.tiers)


class PackageRule(msgspec.Struct, frozen=True, tag_field="cost_type", tag="package"):
    """Units come in packages of *size_micros*; one that is begun is paid in full."""

    size_micros: int
    cost_picos: int

    def __post_init__(self) -> None:
        _require_prices([self.cost_picos])
        if not 0 < self.size_micros <= UNITS_MAX * MICROS_PER_UNIT:
            raise ValueError(f"a package holds more than nothing and at most {UNITS_MAX} units")


Rule = FlatRule | PerUnitRule | GraduatedRule | VolumeRule | PackageRule


def rule_from(stored: Any) -> Rule:
    """A rule as `rule_as_dict` wrote it."""
    rule: Rule = msgspec.convert(stored, type=Rule)
    return rule


def rule_as_dict(rule: Rule) -> dict[str, Any]:
    """*rule* in plain JSON values."""
    written: dict[str, Any] = msgspec.to_builtins(rule)
    return written


def microunits(units: Decimal) -> int:
    """*units* as a whole number of millionths, exactly.

    Raises:
        UnitsInvalid
    """
    # The size is looked at first: 1E+999999 has a million digits.
    sensible = units.is_finite() and (not units or abs(units.adjusted()) <= _DIGITS_MAX)
    if not sensible or len(units.as_tuple().digits) > _DIGITS_MAX:
        raise UnitsInvalid(f"units are a number of at most {UNITS_MAX}")
    micros = Fraction(units) * MICROS_PER_UNIT if units else Fraction(0)
    if micros.denominator != 1:
        raise UnitsInvalid(f"units have at most {UNIT_PLACES} decimal places")
    if not 0 <= micros <= UNITS_MAX * MICROS_PER_UNIT:
        raise UnitsInvalid(f"units lie between 0 and {UNITS_MAX}")
    return micros.numerator


def cost(rule: Rule, units: Decimal, asset: Asset) -> int:
    """What one event of so many *units* costs, in the smallest unit of *asset*: exact, and rounded up once.

    Raises:
        UnitsInvalid: *units* is not a quantity.
        ChargeTooLarge: the cost does not fit an account.
    """
    amount = ceil_div(_shares(rule, microunits(units)) * int(10**asset.scale), _SHARES)
    if amount > AMOUNT_MAX:
        raise ChargeTooLarge("the cost is more than an account can hold")
    return amount


def affordable_units(rule: Rule, budget: int, asset: Asset) -> Decimal | None:
    """The most whole units that one event may have within *budget*; None where nothing bounds them.

    It tells what the wallet affords, and may exceed what one event can have (`UNITS_MAX`). Under a flat rule it is 0
    or None, because what is affordable is the event.

    Args:
        budget: >= 0, in the smallest unit of *asset*.
    """
    # A cost, rounded up, is within a whole budget exactly when it is without the rounding.
    shares = budget * _SHARES // int(10**asset.scale)
    micros = _affordable(rule, shares)
    return None if micros is None else Decimal(micros // MICROS_PER_UNIT)


def _shares(rule: Rule, micros: int) -> int:
    """What so many micro-units cost, in 1e-18 credits."""
    match rule:
        case FlatRule(cost_picos):
            return cost_picos * MICROS_PER_UNIT
        case PerUnitRule(unit_cost_picos):
            return micros * unit_cost_picos
        case PackageRule(size_micros, cost_picos):
            return ceil_div(micros, size_micros) * cost_picos * MICROS_PER_UNIT
        case GraduatedRule(tiers):
            return sum(
                _tier_shares(tier, min(micros, _end(tier, micros)) - low) for low, tier in _entered(tiers, micros)
            )
        case VolumeRule(tiers):
            held = [tier for _, tier in _entered(tiers, micros)]
            return _tier_shares(held[-1], micros) if held else 0


def _affordable(rule: Rule, shares: int) -> int | None:
    """The most micro-units whose cost is within *shares*, at least as far as whole units go; None for no bound."""
    match rule:
        case FlatRule(cost_picos):
            return None if cost_picos * MICROS_PER_UNIT <= shares else 0
        case PerUnitRule(unit_cost_picos):
            return _within(shares, unit_cost_picos)
        case PackageRule(size_micros, cost_picos):
            packages = _within(shares, cost_picos * MICROS_PER_UNIT)
            return None if packages is None else packages * size_micros
        case GraduatedRule(tiers):
            return _affordable_graduated(tiers, shares)
        case VolumeRule(tiers):
            return _affordable_volume(tiers, shares)


def _affordable_graduated(tiers: tuple[Tier, ...], shares: int) -> int | None:
    low = 0
    for tier in tiers:
        left = shares - tier.flat_cost_picos * MICROS_PER_UNIT
        if left < 0:
            return low
        more = _within(left, tier.unit_cost_picos)
        if tier.up_to_micros is None:
            return None if more is None else low + more
        whole = tier.up_to_micros - low
        if more is not None and more < whole:
            return low + more
        shares = left - whole * tier.unit_cost_picos
        low = tier.up_to_micros
    raise AssertionError("the last tier has no end")


def _affordable_volume(tiers: tuple[Tier, ...], shares: int) -> int | None:
    """The dearest tier that is affordable need not be the last: a later one may cost less in total."""
    lows = [0, *(tier.up_to_micros or 0 for tier in tiers[:-1])]
    for low, tier in reversed(list(zip(lows, tiers, strict=True))):
        left = shares - tier.flat_cost_picos * MICROS_PER_UNIT
        most = _within(left, tier.unit_cost_picos) if left >= 0 else 0
        if most is None and tier.up_to_micros is None:
            return None
        if tier.up_to_micros is not None:
            most = tier.up_to_micros if most is None else min(most, tier.up_to_micros)
        assert most is not None
        # Only whole units count: between 1.5 and 1.9 there is none of this tier.
        if most // MICROS_PER_UNIT * MICROS_PER_UNIT > low:
            return most
    return 0


def _within(shares: int, rate: int) -> int | None:
    """How often *rate* goes into *shares*; None when it is nothing."""
    return None if rate == 0 else shares // rate


def _entered(tiers: tuple[Tier, ...], micros: int) -> list[tuple[int, Tier]]:
    """The tiers that so many micro-units reach into, each with where it begins."""
    lows = [0, *(tier.up_to_micros or 0 for tier in tiers[:-1])]
    return [(low, tier) for low, tier in zip(lows, tiers, strict=True) if micros > low]


def _end(tier: Tier, micros: int) -> int:
    return micros if tier.up_to_micros is None else tier.up_to_micros


def _tier_shares(tier: Tier, micros: int) -> int:
    return micros * tier.unit_cost_picos + tier.flat_cost_picos * MICROS_PER_UNIT


def _require_prices(picos: Iterable[int]) -> None:
    if not all(0 <= price <= PRICE_PICOS_MAX for price in picos):
        raise ValueError(f"a price is 0 to {PRICE_PICOS_MAX // PICOS_PER_CREDIT} credits")


def _require_tiers(tiers: tuple[Tier, ...]) -> None:
    if not 1 <= len(tiers) <= TIERS_MAX:
        raise ValueError(f"a rule has 1 to {TIERS_MAX} tiers")
    _require_prices(price for tier in tiers for price in (tier.unit_cost_picos, tier.flat_cost_picos))
    ends = [tier.up_to_micros for tier in tiers]
    if ends[-1] is not None:
        raise ValueError("the last tier has no end: its up_to is null")
    bounded = [0, *(end or 0 for end in ends[:-1])]
    if any(low >= high for low, high in pairwise(bounded)) or bounded[-1] > UNITS_MAX * MICROS_PER_UNIT:
        raise ValueError(
            f"each tier ends after the one before, at {UNITS_MAX} units at most, and only the last has no end"
        )
