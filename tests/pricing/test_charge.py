"""Charges to the last digit, against a table that was computed with Decimal from published prices."""

import json
from decimal import ROUND_CEILING, Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.book import PriceBook, RateCard, rate_card
from pricing.catalog import build_price_book
from pricing.charge import MARKUP_BPS_MAX, ChargeTooLarge, action_charge, charge
from pricing.money import CREDIT, Asset
from pricing.usage import Unit, Usage

GOLDEN = json.loads((Path(__file__).parent / "golden_charges.json").read_text())
AT_US = 1_780_000_000 * 10**6
"""2026-05-28: the published prices of the table hold then."""

# What a provider that lists no price of its own for a unit charges for it.
LISTED_UNDER = {
    "cached_input": "input",
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "input_audio": "input",
    "reasoning": "output",
    "output_audio": "output",
}


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return build_price_book()


def published(row: dict[str, Any]) -> tuple[int, int, int]:
    """Base, total and provider cost of a row by Decimal arithmetic: nothing of ours but the rounding rule."""
    with localcontext() as context:
        context.prec = 100
        prices: dict[str, Any] = GOLDEN["usd_per_mtok"][row["model"]]
        usage: dict[str, int] = row["usage"]
        prompt = sum(usage.get(u, 0) for u in ("input", "cached_input", "cache_write", "cache_write_1h", "input_audio"))
        if "above" in prices and prompt > prices["above"]:
            prices = prices["long"]
        usd = Decimal(0)
        for unit, quantity in usage.items():
            while unit not in prices:
                unit = LISTED_UNDER[unit]  # noqa: PLW2901
            usd += Decimal(quantity) * Decimal(prices[unit]) / Decimal(1_000_000)
        asset = GOLDEN["assets"][row["asset"]]
        smallest_usd = Decimal(asset["usd_value_picos"]).scaleb(-12 - asset["scale"])
        marked_up = usd * (1 + Decimal(row["markup_bps"]) / Decimal(10_000))
        base, total, nanos = (
            amount.to_integral_value(ROUND_CEILING)
            for amount in (usd / smallest_usd, marked_up / smallest_usd, usd * 10**9)
        )
        return int(base), int(total), int(nanos)


@pytest.mark.parametrize("row", GOLDEN["charges"], ids=lambda row: f"{row['model']}-{row['markup_bps']}-{row['asset']}")
def test_the_golden_table(book: PriceBook, row: dict[str, Any]) -> None:
    assert published(row) == (row["base"], row["total"], row["provider_cost_nanos"])
    charged = charge(
        Usage(**row["usage"]),
        book.lookup(row["model"], AT_US),
        markup_bps=row["markup_bps"],
        asset=Asset(**GOLDEN["assets"][row["asset"]]),
    )
    assert (charged.base, charged.total, charged.provider_cost_nanos) == published(row)
    assert charged.markup == charged.total - charged.base


def test_the_golden_table_covers_what_it_should() -> None:
    rows = GOLDEN["charges"]
    assert len(rows) >= 40
    assert {unit for row in rows for unit in row["usage"]} >= set(LISTED_UNDER)
    assert {row["markup_bps"] for row in rows} >= {0, 1, 333, 2000, 10_000}
    assert {GOLDEN["assets"][row["asset"]]["scale"] for row in rows} == {0, 2, 6, 9}


def card(**rates: int) -> RateCard:
    return rate_card(provider="p", model="m", rates={Unit(name): rate for name, rate in rates.items()})


CARD = card(input=150_000, output=600_000)


def test_a_hand_computed_charge() -> None:
    # 1000 x $0.15/M + 500 x $0.60/M = $0.00045 = 0.045 credits; with 20 % markup 0.054.
    charged = charge(Usage(input=1000, output=500), CARD, markup_bps=2000, asset=CREDIT)
    assert CREDIT.format(charged.base) == "0.045"
    assert CREDIT.format(charged.markup) == "0.009"
    assert charged.provider_cost_nanos == 450_000


def test_it_is_rounded_once_at_the_end() -> None:
    # Three tokens of 0.4 units each are 1.2 units, so 2: not 3 x 1, and not 1 as rounded to the nearest.
    point = Asset("point", 0, 10)
    assert charge(Usage(input=2, output=1), card(input=4, output=4), markup_bps=0, asset=point).total == 2
    # Base 1.2 and markup 0.6 are rounded up together: 1.8 is 2, not 2 + 1.
    assert charge(Usage(input=3), card(input=4, output=4), markup_bps=5000, asset=point).total == 2


def test_nothing_used_is_nothing_charged() -> None:
    assert charge(Usage(), CARD, markup_bps=2000, asset=CREDIT).total == 0


def test_a_fee_for_each_request_is_charged_once_though_nobody_counted_it() -> None:
    fee = card(input=1, output=1, request=7_000)
    point = Asset("point", 0, 1000)
    assert charge(Usage(), fee, markup_bps=0, asset=point).total == 7
    assert charge(Usage(request=1), fee, markup_bps=0, asset=point).total == 7
    assert charge(Usage(request=3), fee, markup_bps=0, asset=point).total == 21


def test_images_are_charged_by_the_piece() -> None:
    assert (
        charge(Usage(image=2), card(input=1, output=1, image=40 * 10**9), markup_bps=0, asset=CREDIT).total == 8 * 10**9
    )


def test_the_tier_is_a_cliff_and_the_cache_counts_towards_it() -> None:
    tiered = rate_card(
        provider="p", model="m", rates={Unit.INPUT: 10, Unit.OUTPUT: 20}, tiers={100: {Unit.INPUT: 30, Unit.OUTPUT: 50}}
    )
    pico = Asset("pico", 0, 1)
    assert charge(Usage(input=100, output=1), tiered, markup_bps=0, asset=pico).total == 100 * 10 + 20
    assert charge(Usage(input=60, cached_input=41, output=1), tiered, markup_bps=0, asset=pico).total == 101 * 30 + 50


@pytest.mark.parametrize("markup_bps", [-1, MARKUP_BPS_MAX + 1])
def test_a_markup_out_of_range_is_refused(markup_bps: int) -> None:
    with pytest.raises(ValueError, match="markup"):
        charge(Usage(input=1), CARD, markup_bps=markup_bps, asset=CREDIT)


def test_a_charge_that_no_account_can_hold_is_refused() -> None:
    with pytest.raises(ChargeTooLarge):
        charge(Usage(input=10**8), CARD, markup_bps=0, asset=Asset("dust", 9, 1))


@pytest.mark.parametrize(
    ("price", "pay", "subsidy"),
    [
        (0, (0, 0), 45),
        (1, (1, 0), 44),
        (45, (45, 0), 0),
        (46, (45, 1), 0),
        (4_000, (45, 3_955), 0),
    ],
)
def test_an_action_costs_its_price_and_the_developer_adds_what_is_missing(
    price: int, pay: tuple[int, int], subsidy: int
) -> None:
    thousandth = Asset("credit", 3, 10**10)
    paid, added = action_charge(price, Usage(input=1000, output=500), CARD, thousandth)
    assert (paid.base, paid.markup) == pay
    assert (added.base, added.markup) == (subsidy, 0)
    assert paid.total == price
    assert paid.provider_cost_nanos == 450_000
    assert added.provider_cost_nanos == 0


@pytest.mark.parametrize("price", [-1, 2**63])
def test_an_action_at_an_impossible_price_is_refused(price: int) -> None:
    with pytest.raises(ChargeTooLarge):
        action_charge(price, Usage(), CARD, CREDIT)


cards = st.builds(
    lambda rates, above, factor: rate_card(
        provider="p",
        model="m",
        rates=dict(zip(Unit, rates, strict=True)),
        tiers={above: {unit: rate * factor for unit, rate in zip(Unit, rates, strict=True)}},
    ),
    st.lists(st.integers(0, 10**9), min_size=len(Unit), max_size=len(Unit)),
    st.integers(0, 10_000),
    st.integers(1, 3),
)
usages = st.builds(
    lambda parts: Usage(**{unit.value: part for unit, part in zip(Unit, parts, strict=True)}),
    st.lists(st.integers(0, 10_000), min_size=len(Unit), max_size=len(Unit)),
)
assets = st.builds(Asset, st.just("a"), st.integers(0, 9), st.integers(10**6, 10**13))
markups = st.integers(0, 20_000)


@given(usages, cards, markups, assets)
def test_parts_are_never_negative_and_never_below_cost(
    usage: Usage, card: RateCard, markup_bps: int, asset: Asset
) -> None:
    charged = charge(usage, card, markup_bps=markup_bps, asset=asset)
    rates = card.rates_for(usage.input_total)
    exact_picos = sum(n * rates[unit] for unit, n in usage.items()) + (0 if usage.request else rates[Unit.REQUEST])
    exact = Fraction(exact_picos * (10_000 + markup_bps) * 10**asset.scale, asset.usd_value_picos * 10_000)
    assert charged.base >= 0
    assert charged.markup >= 0
    assert exact <= charged.total < exact + 1
    assert charged.provider_cost_nanos * 1000 >= exact_picos


@given(usages, usages, cards, markups, assets)
def test_more_usage_never_costs_less(usage: Usage, more: Usage, card: RateCard, markup_bps: int, asset: Asset) -> None:
    once = charge(usage, card, markup_bps=markup_bps, asset=asset)
    both = charge(usage + more, card, markup_bps=markup_bps, asset=asset)
    fee_paid_once_only = usage.request == 0 and more.request > 0
    assert both.total >= once.total or fee_paid_once_only
    assert both.base >= once.base or fee_paid_once_only


@given(usages, cards, markups, markups, assets)
def test_a_higher_markup_never_costs_less(usage: Usage, card: RateCard, a: int, b: int, asset: Asset) -> None:
    low, high = (charge(usage, card, markup_bps=bps, asset=asset) for bps in sorted((a, b)))
    assert low.base == high.base
    assert low.markup <= high.markup


@given(st.integers(0, 10**12), usages, cards, assets)
def test_an_action_splits_exactly(price: int, usage: Usage, card: RateCard, asset: Asset) -> None:
    pay, subsidy = action_charge(price, usage, card, asset)
    assert pay.total == price
    assert pay.base + subsidy.base == charge(usage, card, markup_bps=0, asset=asset).base
    assert min(pay.base, pay.markup, subsidy.base, subsidy.markup) >= 0
    assert pay.markup == 0 or subsidy.base == 0
