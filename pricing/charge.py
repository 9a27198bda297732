"""What a request costs, after the call: usage times rates, marked up, rounded up once.

How it works: the sum of quantity x rate is an exact int of pico-dollars. The total is that sum with the markup on it,
in the asset's smallest units, rounded up; the base is the same sum without markup, rounded up; the markup is the
difference. The markup is never negative, since the total's numerator is never below the base's and rounding up keeps
the order. Every part is non-negative, so a charge never credits anybody.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pricing.book import RateCard
from pricing.money import AMOUNT_MAX, PICOS_PER_USD, Asset, ceil_div
from pricing.usage import Unit, Usage

BPS = 10_000
"""Basis points in a whole."""
MARKUP_BPS_MAX = 1_000_000
"""A markup of 10,000 %."""

PICOS_PER_NANO = PICOS_PER_USD // 10**9


class ChargeTooLarge(ValueError):
    """More than an account can hold: the asset is too fine for the price, or a quantity is absurd."""


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """Base and markup in smallest units of the wallet's asset; provider cost in nano-dollars, rounded up."""

    base: int
    markup: int
    provider_cost_nanos: int

    @property
    def total(self) -> int:
        return self.base + self.markup


def cost_picos(usage: Usage, rates: Mapping[Unit, int]) -> int:
    """Exact pico-dollars. A metered call is at least one request, whether or not its usage counts it."""
    # `max` rather than trust: most usage reports say nothing of requests, and forgetting it would waive the fee.
    unreported_request = rates[Unit.REQUEST] if usage.request == 0 else 0
    return sum(quantity * rates[unit] for unit, quantity in usage.items()) + unreported_request


def charge(usage: Usage, card: RateCard, *, markup_bps: int, asset: Asset) -> Charge:
    """The exact charge for measured usage; the tier is chosen by the usage's own prompt.

    Args:
        markup_bps: 0..MARKUP_BPS_MAX.

    Raises:
        ChargeTooLarge: the total does not fit an account.
    """
    return charge_of_picos(cost_picos(usage, card.rates_for(usage.input_total)), markup_bps=markup_bps, asset=asset)


def charge_of_picos(picos: int, *, markup_bps: int, asset: Asset) -> Charge:
    """The charge for a provider cost of so many pico-dollars: the one place where a charge is rounded."""
    require_markup(markup_bps)
    scaled = picos * 10**asset.scale
    base = ceil_div(scaled, asset.usd_value_picos)
    total = ceil_div(scaled * (BPS + markup_bps), asset.usd_value_picos * BPS)
    return _bounded(Charge(base=base, markup=total - base, provider_cost_nanos=ceil_div(picos, PICOS_PER_NANO)))


def action_charge(price: int, usage: Usage, card: RateCard, asset: Asset) -> tuple[Charge, Charge]:
    """A product action's fixed price: what the user pays, and what the developer adds when it is below cost.

    The user pays exactly *price*: its base is the provider's cost as far as the price covers it, the rest is markup.
    The subsidy's base is what the price does not cover. The provider's cost stands on the first alone.

    Args:
        price: smallest units of the asset, 0..AMOUNT_MAX.
    """
    if not 0 <= price <= AMOUNT_MAX:
        raise ChargeTooLarge("the price of an action is not an amount that an account can hold")
    cost = charge(usage, card, markup_bps=0, asset=asset)
    base = min(price, cost.base)
    pay = Charge(base=base, markup=price - base, provider_cost_nanos=cost.provider_cost_nanos)
    return pay, Charge(base=cost.base - base, markup=0, provider_cost_nanos=0)


def require_markup(markup_bps: int) -> None:
    """Refuse a markup outside 0..MARKUP_BPS_MAX: a negative one would sell below cost."""
    if not 0 <= markup_bps <= MARKUP_BPS_MAX:
        raise ValueError(f"a markup must be 0..{MARKUP_BPS_MAX} basis points")


def _bounded(amount: Charge) -> Charge:
    if amount.total > AMOUNT_MAX or amount.provider_cost_nanos > AMOUNT_MAX:
        raise ChargeTooLarge("the charge is more than an account can hold")
    return amount
