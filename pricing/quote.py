"""What a request may cost, before the call.

How it works: the worst case takes our own count of the prompt with a margin over it, at the dearest input rate that its
tokens may have, and every output token that the request allows at the dearest output rate; where price tiers depend on
the prompt's length, the dearest tier that the prompt can reach. The largest output that a budget affords is the same
arithmetic turned round, so that it agrees with `charge` to the last unit.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pricing.book import RateCard
from pricing.charge import BPS, Charge, charge, charge_of_picos, require_markup
from pricing.money import Asset, ceil_div
from pricing.usage import QUANTITY_MAX, Unit, Usage

COUNT_MARGIN_BPS = 100
COUNT_MARGIN_TOKENS = 8
"""How far an upstream's count of a prompt may be above ours: 1 % and 8 tokens."""

EXPECTED_DIVISOR = 4
EXPECTED_OUTPUT_MAX = 512
"""A choice is expected to use a quarter of what it may, at most 512 tokens."""

NOT_EVEN_THE_PROMPT = -1


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """Before the call: what is expected, and what it costs at most.

    Attributes:
        prompt_tokens: as counted, without margin.
        output_ceiling: the most output tokens, of all choices together.
        expected: the prompt as counted and the expected output, at plain input and output rates.
        worst: an upper bound as long as the upstream's count of the prompt is within the margin.
        prompt_only: the prompt of the worst case without any output.
    """

    prompt_tokens: int
    output_ceiling: int
    expected: Charge
    worst: Charge
    prompt_only: Charge


def quote(
    card: RateCard,
    *,
    prompt_tokens: int,
    output_tokens_max: int,
    n: int = 1,
    markup_bps: int,
    asset: Asset,
    margin_bps: int = COUNT_MARGIN_BPS,
    margin_tokens: int = COUNT_MARGIN_TOKENS,
    input_audio: bool = False,
    output_audio: bool = False,
    cache_write_1h: bool = False,
) -> Quote:
    """Price a request before it is made.

    Args:
        output_tokens_max: for one choice; *n* choices may each use it.
        input_audio, output_audio, cache_write_1h: the request has audio, asks for it, or asks for an hour's cache, so
            that its tokens may cost what those cost.

    Raises:
        ChargeTooLarge: the worst case does not fit an account.
        ValueError: a negative quantity, or no choice at all.
    """
    if prompt_tokens < 0 or output_tokens_max < 0 or n < 1:
        raise ValueError("a quote needs quantities that are not negative and at least one choice")
    output_ceiling = output_tokens_max * n
    worst = _WorstCase(
        card,
        prompt_tokens=prompt_with_margin(prompt_tokens, margin_bps=margin_bps, margin_tokens=margin_tokens),
        input_audio=input_audio,
        output_audio=output_audio,
        cache_write_1h=cache_write_1h,
    )
    return Quote(
        prompt_tokens=prompt_tokens,
        output_ceiling=output_ceiling,
        expected=charge(
            Usage(input=prompt_tokens, output=expected_output(output_tokens_max, n)),
            card,
            markup_bps=markup_bps,
            asset=asset,
        ),
        worst=charge_of_picos(worst.picos(output_ceiling), markup_bps=markup_bps, asset=asset),
        prompt_only=charge_of_picos(worst.picos(0), markup_bps=markup_bps, asset=asset),
    )


def worst_charge(
    card: RateCard,
    *,
    prompt_tokens: int,
    output_tokens: int,
    markup_bps: int,
    asset: Asset,
    margin_bps: int = COUNT_MARGIN_BPS,
    margin_tokens: int = COUNT_MARGIN_TOKENS,
    output_audio: bool = False,
) -> Charge:
    """The worst case of a quote alone; *output_tokens* are those of all choices together."""
    worst = _WorstCase(
        card,
        prompt_tokens=prompt_with_margin(prompt_tokens, margin_bps=margin_bps, margin_tokens=margin_tokens),
        input_audio=False,
        output_audio=output_audio,
        cache_write_1h=False,
    )
    return charge_of_picos(worst.picos(output_tokens), markup_bps=markup_bps, asset=asset)


def dearest(
    cards: Iterable[RateCard],
    *,
    prompt_tokens: int,
    output_tokens_max: int,
    n: int = 1,
    markup_bps: int,
    asset: Asset,
    margin_bps: int = COUNT_MARGIN_BPS,
    margin_tokens: int = COUNT_MARGIN_TOKENS,
    input_audio: bool = False,
    output_audio: bool = False,
    cache_write_1h: bool = False,
) -> tuple[RateCard, Quote]:
    """Of a model and its fallbacks the one with the highest worst case, and its quote; the first of equals."""
    quotes = [
        (
            card,
            quote(
                card,
                prompt_tokens=prompt_tokens,
                output_tokens_max=output_tokens_max,
                n=n,
                markup_bps=markup_bps,
                asset=asset,
                margin_bps=margin_bps,
                margin_tokens=margin_tokens,
                input_audio=input_audio,
                output_audio=output_audio,
                cache_write_1h=cache_write_1h,
            ),
        )
        for card in cards
    ]
    return max(quotes, key=lambda pair: pair[1].worst.total)


def prompt_with_margin(
    prompt_tokens: int, *, margin_bps: int = COUNT_MARGIN_BPS, margin_tokens: int = COUNT_MARGIN_TOKENS
) -> int:
    """The most tokens that the upstream is taken to count for a prompt for which we count so many."""
    return prompt_tokens + ceil_div(prompt_tokens * margin_bps, BPS) + margin_tokens


def expected_output(output_tokens_max: int, n: int = 1) -> int:
    """The output that a typical request has: a quarter of what each choice may, at most EXPECTED_OUTPUT_MAX of it;
    at least one token where any is allowed."""
    return n * min(EXPECTED_OUTPUT_MAX, ceil_div(output_tokens_max, EXPECTED_DIVISOR))


def affordable_output(card: RateCard, *, prompt_tokens: int, budget: int, markup_bps: int, asset: Asset) -> int:
    """The most plain output tokens whose `charge`, with this prompt, is within the budget.

    Returns:
        The largest T with charge(Usage(input=prompt_tokens, output=T)).total <= budget, at most QUANTITY_MAX;
        0 when the prompt fits but no token does; NOT_EVEN_THE_PROMPT (-1) when the prompt alone costs more.
    """
    rates = card.rates_for(prompt_tokens)
    fixed_picos = prompt_tokens * rates[Unit.INPUT] + rates[Unit.REQUEST]
    return _affordable(fixed_picos, rates[Unit.OUTPUT], budget=budget, markup_bps=markup_bps, asset=asset)


def affordable_ceiling(
    card: RateCard,
    *,
    prompt_tokens: int,
    budget: int,
    markup_bps: int,
    asset: Asset,
    margin_bps: int = COUNT_MARGIN_BPS,
    margin_tokens: int = COUNT_MARGIN_TOKENS,
    input_audio: bool = False,
    output_audio: bool = False,
    cache_write_1h: bool = False,
) -> int:
    """The highest output ceiling, of all choices together, whose quote's worst case is within the budget.

    Returns:
        As `affordable_output`, for the worst case; with several cards take the least.
    """
    worst = _WorstCase(
        card,
        prompt_tokens=prompt_with_margin(prompt_tokens, margin_bps=margin_bps, margin_tokens=margin_tokens),
        input_audio=input_audio,
        output_audio=output_audio,
        cache_write_1h=cache_write_1h,
    )
    return _affordable(worst.picos(0), worst.output_rate, budget=budget, markup_bps=markup_bps, asset=asset)


class _WorstCase:
    """The dearest rates that a request may meet."""

    def __init__(
        self, card: RateCard, *, prompt_tokens: int, input_audio: bool, output_audio: bool, cache_write_1h: bool
    ) -> None:
        inputs = [Unit.INPUT, Unit.CACHED_INPUT, Unit.CACHE_WRITE]
        outputs = [Unit.OUTPUT, Unit.REASONING]
        inputs += [Unit.INPUT_AUDIO] * input_audio + [Unit.CACHE_WRITE_1H] * cache_write_1h
        outputs += [Unit.OUTPUT_AUDIO] * output_audio
        input_rate = card.dearest_rate(inputs, input_total_max=prompt_tokens)
        self._fixed_picos = prompt_tokens * input_rate + card.dearest_rate(
            [Unit.REQUEST], input_total_max=prompt_tokens
        )
        self.output_rate = card.dearest_rate(outputs, input_total_max=prompt_tokens)

    def picos(self, output_tokens: int) -> int:
        return self._fixed_picos + output_tokens * self.output_rate


def _affordable(fixed_picos: int, output_rate: int, *, budget: int, markup_bps: int, asset: Asset) -> int:
    """Turn the charge round: ceil(picos x m / d) <= budget if and only if picos <= budget x d // m."""
    require_markup(markup_bps)
    multiplier = 10**asset.scale * (BPS + markup_bps)
    spare_picos = budget * asset.usd_value_picos * BPS // multiplier - fixed_picos
    if spare_picos < 0:
        return NOT_EVEN_THE_PROMPT
    return min(spare_picos // output_rate, QUANTITY_MAX) if output_rate else QUANTITY_MAX
