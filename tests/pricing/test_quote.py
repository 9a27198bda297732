"""A quote bounds the charge; what a budget affords agrees with the charge to the last token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.book import RateCard, rate_card
from pricing.charge import charge
from pricing.money import CREDIT, Asset
from pricing.quote import (
    NOT_EVEN_THE_PROMPT,
    affordable_ceiling,
    affordable_output,
    dearest,
    expected_output,
    prompt_with_margin,
    quote,
)
from pricing.usage import QUANTITY_MAX, Unit, Usage

PICO = Asset("pico", 0, 1)
CARD = rate_card(provider="p", model="m", rates={Unit.INPUT: 10, Unit.OUTPUT: 40})

cards = st.builds(
    lambda rates, above, factors: rate_card(
        provider="p",
        model="m",
        rates=dict(zip(Unit, rates, strict=True)),
        tiers={above: {u: r * f for u, r, f in zip(Unit, rates, factors, strict=True)}},
    ),
    st.lists(st.integers(0, 10**8), min_size=len(Unit), max_size=len(Unit)),
    st.integers(0, 3_000),
    st.lists(st.integers(0, 3), min_size=len(Unit), max_size=len(Unit)),
)
assets = st.builds(Asset, st.just("a"), st.integers(0, 9), st.integers(10**6, 10**13))
markups = st.integers(0, 20_000)
tokens = st.integers(0, 5_000)


@pytest.mark.parametrize(("tokens", "with_margin"), [(0, 8), (1, 10), (100, 109), (101, 111), (10_000, 10_108)])
def test_the_margin_is_one_percent_and_eight_tokens(tokens: int, with_margin: int) -> None:
    assert prompt_with_margin(tokens) == with_margin


@pytest.mark.parametrize(
    ("most", "n", "expected"), [(0, 1, 0), (1, 1, 1), (16, 1, 4), (17, 2, 10), (100_000, 1, 512), (100_000, 3, 1536)]
)
def test_a_quarter_of_the_limit_is_expected(most: int, n: int, expected: int) -> None:
    assert expected_output(most, n) == expected


def test_a_quote_by_hand() -> None:
    quoted = quote(CARD, prompt_tokens=100, output_tokens_max=40, n=2, markup_bps=5000, asset=PICO)
    assert quoted.output_ceiling == 80
    assert quoted.expected.total == (100 * 10 + 20 * 40) * 3 // 2
    assert quoted.worst.total == (109 * 10 + 80 * 40) * 3 // 2
    assert quoted.prompt_only.total == 109 * 10 * 3 // 2


def test_the_worst_case_takes_the_dearest_rate_that_the_tokens_may_have() -> None:
    rates = {Unit.INPUT: 10, Unit.CACHE_WRITE: 13, Unit.CACHE_WRITE_1H: 20, Unit.INPUT_AUDIO: 90}
    card = rate_card(
        provider="p", model="m", rates={**rates, Unit.OUTPUT: 40, Unit.REASONING: 50, Unit.OUTPUT_AUDIO: 99}
    )

    def worst(**asked: bool) -> int:
        return quote(
            card, prompt_tokens=1, output_tokens_max=1, markup_bps=0, asset=PICO, margin_bps=0, margin_tokens=0, **asked
        ).worst.total

    assert worst() == 13 + 50
    assert worst(cache_write_1h=True) == 20 + 50
    assert worst(input_audio=True) == 90 + 50
    assert worst(output_audio=True) == 13 + 99


def test_the_margin_may_lift_the_prompt_into_the_next_tier() -> None:
    card = rate_card(provider="p", model="m", rates={Unit.INPUT: 1, Unit.OUTPUT: 1}, tiers={1000: {Unit.OUTPUT: 9}})
    below = quote(card, prompt_tokens=900, output_tokens_max=1, markup_bps=0, asset=PICO)
    above = quote(card, prompt_tokens=990, output_tokens_max=1, markup_bps=0, asset=PICO)
    assert below.worst.total - below.prompt_only.total == 1
    assert above.worst.total - above.prompt_only.total == 9


@pytest.mark.parametrize(("prompt", "output", "n"), [(-1, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_a_quote_for_less_than_nothing_is_refused(prompt: int, output: int, n: int) -> None:
    with pytest.raises(ValueError, match="quote"):
        quote(CARD, prompt_tokens=prompt, output_tokens_max=output, n=n, markup_bps=0, asset=PICO)


@given(cards, st.tuples(tokens, tokens), markups, assets, st.data())
def test_the_worst_case_bounds_every_charge_within_the_margin(
    card: RateCard, request: tuple[int, int], markup_bps: int, asset: Asset, data: st.DataObject
) -> None:
    prompt, output = request
    quoted = quote(card, prompt_tokens=prompt, output_tokens_max=output, markup_bps=markup_bps, asset=asset)
    used = data.draw(st.integers(0, prompt_with_margin(prompt)))
    cached = data.draw(st.integers(0, used))
    written = data.draw(st.integers(0, used - cached))
    answered = data.draw(st.integers(0, output))
    reasoning = data.draw(st.integers(0, answered))
    usage = Usage(
        input=used - cached - written,
        cached_input=cached,
        cache_write=written,
        output=answered - reasoning,
        reasoning=reasoning,
    )
    assert charge(usage, card, markup_bps=markup_bps, asset=asset).total <= quoted.worst.total


@given(cards, tokens, st.integers(0, 10**15), markups, assets)
def test_what_is_affordable_is_exactly_what_the_charge_says(
    card: RateCard, prompt: int, budget: int, markup_bps: int, asset: Asset
) -> None:
    def total(output: int) -> int:
        return charge(Usage(input=prompt, output=output), card, markup_bps=markup_bps, asset=asset).total

    most = affordable_output(card, prompt_tokens=prompt, budget=budget, markup_bps=markup_bps, asset=asset)
    if most == NOT_EVEN_THE_PROMPT:
        assert total(0) > budget
    else:
        assert total(most) <= budget
        assert most == QUANTITY_MAX or total(most + 1) > budget


@given(cards, tokens, st.integers(0, 10**12), markups, assets)
def test_the_affordable_ceiling_is_exactly_what_the_worst_case_says(
    card: RateCard, prompt: int, budget: int, markup_bps: int, asset: Asset
) -> None:
    def worst(output: int) -> int:
        return quote(
            card, prompt_tokens=prompt, output_tokens_max=output, markup_bps=markup_bps, asset=asset
        ).worst.total

    most = affordable_ceiling(card, prompt_tokens=prompt, budget=budget, markup_bps=markup_bps, asset=asset)
    if most == NOT_EVEN_THE_PROMPT:
        assert worst(0) > budget
    else:
        assert worst(most) <= budget
        assert most == QUANTITY_MAX or worst(most + 1) > budget


def test_free_output_is_affordable_without_end_but_for_the_limit() -> None:
    free = rate_card(provider="p", model="m", rates={Unit.INPUT: 10, Unit.OUTPUT: 0})
    assert affordable_output(free, prompt_tokens=1, budget=10, markup_bps=0, asset=PICO) == QUANTITY_MAX
    assert affordable_output(free, prompt_tokens=1, budget=9, markup_bps=0, asset=PICO) == NOT_EVEN_THE_PROMPT


def test_a_budget_by_hand() -> None:
    # $0.000001 a token of either kind is 0.0001 credits; 0.01 credits are 100 tokens, 10 of them the prompt's.
    card = rate_card(provider="p", model="m", rates={Unit.INPUT: 10**6, Unit.OUTPUT: 10**6})
    budget = CREDIT.parse("0.01")
    assert affordable_output(card, prompt_tokens=10, budget=budget, markup_bps=0, asset=CREDIT) == 90
    assert affordable_output(card, prompt_tokens=10, budget=budget, markup_bps=10_000, asset=CREDIT) == 40
    assert affordable_output(card, prompt_tokens=100, budget=budget, markup_bps=0, asset=CREDIT) == 0
    assert affordable_output(card, prompt_tokens=101, budget=budget, markup_bps=0, asset=CREDIT) == -1


def test_of_a_model_and_its_fallbacks_the_dearest_counts() -> None:
    talker = rate_card(provider="p", model="talker", rates={Unit.INPUT: 1, Unit.OUTPUT: 9})
    reader = rate_card(provider="p", model="reader", rates={Unit.INPUT: 9, Unit.OUTPUT: 1})

    def of(prompt: int, output: int) -> str:
        card, quoted = dearest(
            [talker, reader], prompt_tokens=prompt, output_tokens_max=output, markup_bps=0, asset=PICO
        )
        assert quoted == quote(card, prompt_tokens=prompt, output_tokens_max=output, markup_bps=0, asset=PICO)
        return card.model

    assert of(10_000, 10) == "reader"
    assert of(10, 10_000) == "talker"
