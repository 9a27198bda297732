"""What a request's usage comes to: the model's prices, the markup, or a product action's fixed price.

``pricing`` and ``ledger`` meet here: usage in, the charge of each leg of the reservation out, all plain integers.
"""

import msgspec

from gateway.billing.catalog import PricedMetric
from ledger.model import Charge, Settlement, UsageRecord
from pricing.book import RateCard
from pricing.charge import Charge as Priced
from pricing.charge import action_charge, charge
from pricing.money import Asset
from pricing.quote import affordable_ceiling, affordable_output, worst_charge
from pricing.usage import Usage


class Action(msgspec.Struct, frozen=True):
    """A product action: *price* in the asset's smallest unit, whatever the tokens.

    *metric* is the tenant's own, whose metering rule says the price; None where the settings say it.
    """

    key: str
    price: int
    metric: PricedMetric | None = None


class Tariff(msgspec.Struct, frozen=True):
    """How one request is charged. With an *action* there are two legs: the payer's, and the developer's subsidy."""

    card: RateCard
    markup_bps: int
    asset: Asset
    action: Action | None = None

    def charges(self, usage: Usage) -> tuple[Charge, ...]:
        """What *usage* costs, a leg each."""
        return tuple(Charge(base=leg.base, markup=leg.markup) for leg in self._priced(usage))

    def _priced(self, usage: Usage) -> tuple[Priced, ...]:
        """The charge of each leg; the provider's cost stands on the first."""
        if self.action is None:
            return (charge(usage, self.card, markup_bps=self.markup_bps, asset=self.asset),)
        return action_charge(self.action.price, usage, self.card, asset=self.asset)

    @property
    def _price_version(self) -> str:
        metric = None if self.action is None else self.action.metric
        return self.card.version if metric is None else metric.price_version

    def total(self, usage: Usage) -> int:
        """What *usage* costs, all legs together."""
        return sum(leg.total for leg in self.charges(usage))

    def worst(self, *, prompt_tokens: int, output_tokens: int) -> int:
        """The most that so many tokens may cost, be they cached, written to a cache, or reasoning."""
        return worst_charge(
            self.card,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            markup_bps=self.markup_bps,
            asset=self.asset,
            margin_bps=0,
            margin_tokens=0,
        ).total

    def output_within(self, budget: int, *, prompt_tokens: int) -> int:
        """The most output tokens whose ``worst`` is within *budget*; -1 when it does not even pay the prompt."""
        return affordable_ceiling(
            self.card,
            prompt_tokens=prompt_tokens,
            budget=budget,
            markup_bps=self.markup_bps,
            asset=self.asset,
            margin_bps=0,
            margin_tokens=0,
        )

    def plain_output_within(self, budget: int, *, prompt_tokens: int) -> int:
        """The most output tokens whose ``total`` is within *budget*, where none is cached or reasoning."""
        return affordable_output(
            self.card, prompt_tokens=prompt_tokens, budget=budget, markup_bps=self.markup_bps, asset=self.asset
        )

    def settlement(self, usage: Usage, record: UsageRecord) -> Settlement:
        """What to commit for *usage*; *record* holds the request's facts."""
        legs = self._priced(usage)
        filled = msgspec.structs.replace(
            record,
            units=usage.as_dict(),
            provider_cost_nanos=legs[0].provider_cost_nanos,
            price_version=self._price_version,
        )
        return Settlement(charges=tuple(Charge(base=leg.base, markup=leg.markup) for leg in legs), usage=filled)
