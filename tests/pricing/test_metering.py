"""What an event costs under each kind of rule, to the last digit, and how many units a budget affords."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.charge import ChargeTooLarge
from pricing.metering import (
    MICROS_PER_UNIT,
    PICOS_PER_CREDIT,
    PRICE_PICOS_MAX,
    TIERS_MAX,
    UNITS_MAX,
    FlatRule,
    GraduatedRule,
    PackageRule,
    PerUnitRule,
    Rule,
    Tier,
    UnitsInvalid,
    VolumeRule,
    affordable_units,
    cost,
    microunits,
    rule_as_dict,
    rule_from,
)
from pricing.money import CREDIT, Asset

POINT = Asset("point", 0, 10**9)
"""A credit that has no fractions."""


def picos(credits: str) -> int:
    return int(Decimal(credits) * PICOS_PER_CREDIT)


def micros(units: str) -> int:
    return int(Decimal(units) * MICROS_PER_UNIT)


def per_unit(credits: str) -> PerUnitRule:
    return PerUnitRule(picos(credits))


def tier(up_to: str | None, unit: str, flat: str = "0") -> Tier:
    return Tier(None if up_to is None else micros(up_to), picos(unit), picos(flat))


TIERS = (tier("10", "1"), tier("100", "0.5", "2"), tier(None, "0.1"))
"""Ten units at a credit, ninety at half a credit and two credits on entry, then a tenth."""


@pytest.mark.parametrize(
    ("rule", "units", "expected"),
    [
        # A chat product's three models, at a tenth of a credit, one and five credits a token.
        (per_unit("0.1"), "2000", "200"),
        (per_unit("1"), "10000", "10000"),
        (per_unit("5"), "60", "300"),
        # Finer than a thousandth of a credit, and finer than the credit itself: rounded up once, at the end.
        (per_unit("0.00012"), "1", "0.00012"),
        (per_unit("0.00012"), "7", "0.00084"),
        (per_unit("0.0000000004"), "1", "0.000000001"),
        (per_unit("0.0000000004"), "5", "0.000000002"),
        (per_unit("0.0000000004"), "6", "0.000000003"),
        (per_unit("1"), "0.000001", "0.000001"),
        (per_unit("4"), "2.5", "10"),
        (per_unit("1"), "0", "0"),
        (FlatRule(picos("4")), "1", "4"),
        (FlatRule(picos("4")), "99", "4"),
        (FlatRule(picos("4")), "0", "4"),
        (PackageRule(micros("1000"), picos("2")), "0", "0"),
        (PackageRule(micros("1000"), picos("2")), "1", "2"),
        (PackageRule(micros("1000"), picos("2")), "1000", "2"),
        (PackageRule(micros("1000"), picos("2")), "1000.000001", "4"),
        (PackageRule(micros("0.5"), picos("2")), "1.2", "6"),
        (GraduatedRule(TIERS), "0", "0"),
        (GraduatedRule(TIERS), "9", "9"),
        (GraduatedRule(TIERS), "10", "10"),
        (GraduatedRule(TIERS), "10.000001", "12.0000005"),
        (GraduatedRule(TIERS), "11", "12.5"),
        (GraduatedRule(TIERS), "100", "57"),
        (GraduatedRule(TIERS), "110", "58"),
        (VolumeRule(TIERS), "0", "0"),
        (VolumeRule(TIERS), "10", "10"),
        (VolumeRule(TIERS), "11", "7.5"),
        (VolumeRule(TIERS), "100", "52"),
        (VolumeRule(TIERS), "101", "10.1"),
    ],
)
def test_what_an_event_costs(rule: Rule, units: str, expected: str):
    assert cost(rule, Decimal(units), CREDIT) == CREDIT.parse(expected)


def test_five_hundred_credits_pay_2000_small_and_60_large_tokens():
    left = CREDIT.parse("500") - cost(per_unit("0.1"), Decimal(2000), CREDIT) - cost(per_unit("5"), Decimal(60), CREDIT)
    assert left == 0
    assert affordable_units(per_unit("0.1"), left, CREDIT) == 0


def test_a_credit_without_fractions_is_rounded_up_once():
    assert cost(per_unit("0.4"), Decimal(1), POINT) == 1
    assert cost(per_unit("0.4"), Decimal(3), POINT) == 2
    assert cost(GraduatedRule((tier("1", "0.4"), tier(None, "0.4"))), Decimal(2), POINT) == 1


@pytest.mark.parametrize(
    ("rule", "budget", "expected"),
    [
        (per_unit("1"), "245", 245),
        (per_unit("1"), "244.999999999", 244),
        (per_unit("0.1"), "0.25", 2),
        (per_unit("0"), "0", None),
        (FlatRule(picos("4")), "4", None),
        (FlatRule(picos("4")), "3.999999999", 0),
        (PackageRule(micros("1000"), picos("2")), "5", 2000),
        (PackageRule(micros("1000"), picos("2")), "1.9", 0),
        (PackageRule(micros("0.4"), picos("1")), "4", 1),
        (PackageRule(micros("1000"), 0), "0", None),
        (GraduatedRule(TIERS), "10", 10),
        (GraduatedRule(TIERS), "11.9", 10),
        (GraduatedRule(TIERS), "12.5", 11),
        (GraduatedRule(TIERS), "57", 100),
        (GraduatedRule(TIERS), "57.1", 101),
        (GraduatedRule((tier("50", "0"), tier(None, "1"))), "0", 50),
        (GraduatedRule((tier("50", "1"), tier(None, "0"))), "50", None),
        # All units of the event fall into the cheap tier, so that more of them cost less.
        (VolumeRule(TIERS), "7", 7),
        (VolumeRule(TIERS), "10.1", 101),
        (VolumeRule(TIERS), "10", 16),
        (VolumeRule((tier("10", "1"), tier(None, "0", "5"))), "5", None),
        (VolumeRule((tier("10", "1"), tier(None, "0", "5"))), "4.9", 4),
        (VolumeRule((tier("1.5", "1"), tier("1.9", "0"), tier(None, "10"))), "1", 1),
    ],
)
def test_what_a_budget_affords(rule: Rule, budget: str, expected: int | None):
    assert affordable_units(rule, CREDIT.parse(budget), CREDIT) == expected


@pytest.mark.parametrize("units", ["-1", "0.0000001", "1000000001", "NaN", "Infinity", "1E+999999", "1E-999999"])
def test_what_is_no_quantity(units: str):
    with pytest.raises(UnitsInvalid):
        cost(per_unit("1"), Decimal(units), CREDIT)


@pytest.mark.parametrize("units", ["0", "0E-999999", "1.0000000", "1E+9", "0.000001"])
def test_a_quantity_may_be_written_in_any_way(units: str):
    assert microunits(Decimal(units)) == Decimal(units) * MICROS_PER_UNIT


def test_a_cost_that_no_account_holds_is_refused():
    with pytest.raises(ChargeTooLarge):
        cost(PerUnitRule(PRICE_PICOS_MAX), Decimal(UNITS_MAX), CREDIT)


@pytest.mark.parametrize(
    "tiers",
    [
        (),
        (tier("10", "1"),),
        (tier(None, "1"), tier(None, "1")),
        (tier("10", "1"), tier("10", "1"), tier(None, "1")),
        (tier("10", "1"), tier("9", "1"), tier(None, "1")),
        (tier("0", "1"), tier(None, "1")),
        (Tier(UNITS_MAX * MICROS_PER_UNIT + 1, 1), tier(None, "1")),
        (Tier(None, -1),),
        (Tier(None, 0, PRICE_PICOS_MAX + 1),),
        (*(Tier(number, 1) for number in range(1, TIERS_MAX + 1)), tier(None, "1")),
    ],
)
def test_tiers_that_make_no_price(tiers: tuple[Tier, ...]):
    for kind in (GraduatedRule, VolumeRule):
        with pytest.raises(ValueError, match=r"tier|price"):
            kind(tiers)


@pytest.mark.parametrize(
    "make", [lambda: FlatRule(-1), lambda: PerUnitRule(PRICE_PICOS_MAX + 1), lambda: PackageRule(0, 1)]
)
def test_prices_that_are_none(make):
    with pytest.raises(ValueError, match=r"price|package"):
        make()


# Properties.

some_prices = st.one_of(st.integers(0, 3), st.integers(0, 10 * PICOS_PER_CREDIT), st.integers(0, PRICE_PICOS_MAX))
some_ends = st.lists(
    st.one_of(st.integers(1, 20 * MICROS_PER_UNIT), st.integers(1, 20).map(lambda n: n * MICROS_PER_UNIT)),
    unique=True,
    max_size=5,
).map(sorted)


@st.composite
def some_tiers(draw: st.DrawFn) -> tuple[Tier, ...]:
    return tuple(
        Tier(end, draw(some_prices), draw(st.sampled_from([0, 7, PICOS_PER_CREDIT])))
        for end in [*draw(some_ends), None]
    )


monotone_rules = st.one_of(
    st.builds(FlatRule, some_prices),
    st.builds(PerUnitRule, some_prices),
    st.builds(PackageRule, st.integers(1, 50 * MICROS_PER_UNIT), some_prices),
    st.builds(GraduatedRule, some_tiers()),
)
rules = st.one_of(monotone_rules, st.builds(VolumeRule, some_tiers()))
quantities = st.integers(0, 40 * MICROS_PER_UNIT).map(lambda count: Decimal(count) / MICROS_PER_UNIT)
assets = st.sampled_from([CREDIT, POINT, Asset("cent", 2, 10**10)])


@given(rule=monotone_rules, asset=assets, one=quantities, other=quantities)
def test_more_units_never_cost_less(rule: Rule, asset: Asset, one: Decimal, other: Decimal):
    less, more = sorted((one, other))
    assert 0 <= cost(rule, less, asset) <= cost(rule, more, asset)


@given(rule=rules, asset=assets, budget=st.one_of(st.integers(0, 100), st.integers(0, 40 * 10**9)))
def test_what_is_affordable_is_within_the_budget_and_one_more_is_not(rule: Rule, asset: Asset, budget: int):
    most = affordable_units(rule, budget, asset)
    if most is None:
        assert cost(rule, Decimal(UNITS_MAX), asset) <= budget
    elif most < UNITS_MAX:
        if most:
            assert cost(rule, most, asset) <= budget
        for more in range(1, 30):
            assert cost(rule, most + more, asset) > budget


def by_the_book(rule: Rule, units: Decimal) -> Fraction:
    """The cost in credits, unit by unit of a millionth where that is how the rule says it; nothing is rounded."""
    count = Fraction(units)
    credits = lambda price: Fraction(price, PICOS_PER_CREDIT)  # noqa: E731
    match rule:
        case FlatRule(price):
            return credits(price)
        case PerUnitRule(price):
            return count * credits(price)
        case PackageRule(size, price):
            begun = 0
            while begun * Fraction(size, MICROS_PER_UNIT) < count:
                begun += 1
            return begun * credits(price)
    total, low = Fraction(0), Fraction(0)
    for step in rule.tiers:
        end = None if step.up_to_micros is None else Fraction(step.up_to_micros, MICROS_PER_UNIT)
        if count > low:
            here = credits(step.flat_cost_picos)
            if isinstance(rule, VolumeRule):
                total = here + count * credits(step.unit_cost_picos)
            else:
                within = (count if end is None else min(count, end)) - low
                total += here + within * credits(step.unit_cost_picos)
        low = count if end is None else end
    return total


@given(rule=rules, asset=assets, units=quantities)
def test_a_cost_is_the_exact_one_rounded_up(rule: Rule, asset: Asset, units: Decimal):
    if isinstance(rule, PackageRule) and units * MICROS_PER_UNIT / rule.size_micros > 1000:
        units = Decimal(rule.size_micros) / MICROS_PER_UNIT * 3
    exact = by_the_book(rule, units) * 10**asset.scale
    assert exact <= cost(rule, units, asset) < exact + 1


@given(rule=rules)
def test_a_rule_is_kept_as_it_is(rule: Rule):
    assert rule_from(rule_as_dict(rule)) == rule
