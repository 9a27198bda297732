"""The price book of an installation: the genai-prices package's data, and the operator's overrides before it.

How it works: genai-prices ships dated, tiered and conditional prices of many providers with clauses that match model
names. Its data is read as it was installed; its updater, which fetches from the network, is never used. A model's
prices become integer rate cards when the model is first asked for: one card for each date from which prices differ.

What the data says that a rate card cannot say is priced at the dearest: of prices that change with the time of day the
highest, of token prices by modality (image and video beside text) the highest, because a usage report does not tell
them apart. Surcharges for searches, and discounts for batches and service tiers, are not known to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING

import msgspec

from pricing.book import ANY_PROVIDER, ModelNotPriced, PriceBook, PriceInvalid, RateCard, rate_card
from pricing.known_models import hidden_reasoning_of, max_output_tokens_of
from pricing.money import PICOS_PER_USD, ceil_div, parse_decimal
from pricing.usage import Unit

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider

PROVIDER_ORDER = (
    "openai",
    "anthropic",
    "google",
    "deepseek",
    "mistral",
    "x-ai",
    "cohere",
    "moonshotai",
    "perplexity",
    "zai",
    "minimax",
)
"""Whose price a bare model name means: its maker's. Any other provider must be the only one that has the name."""

_PICOS_PER_USD_PER_MTOK = PICOS_PER_USD // 10**6
_PICOS_PER_USD_PER_KILO = PICOS_PER_USD // 10**3
_US_PER_DAY = 86_400 * 10**6

# The prices of genai-prices that each unit is charged by: the dearest of those present. The first must be present.
_TOKEN_PRICES: Mapping[Unit, tuple[str, ...]] = {
    Unit.INPUT: ("input_mtok", "input_image_mtok", "input_video_mtok"),
    Unit.CACHED_INPUT: ("cache_read_mtok", "cache_image_read_mtok"),
    Unit.CACHE_WRITE: ("cache_write_mtok",),
    Unit.CACHE_WRITE_1H: ("cache_write_1h_mtok",),
    Unit.INPUT_AUDIO: ("input_audio_mtok",),
    Unit.OUTPUT: ("output_mtok", "output_image_mtok", "output_video_mtok"),
    Unit.REASONING: ("output_reasoning_mtok",),
    Unit.OUTPUT_AUDIO: ("output_audio_mtok",),
}

_WHOLES = (Unit.INPUT, Unit.OUTPUT)

# Published by OpenAI ($/Mtok of audio), absent from the data: without them audio would cost what text does.
_AUDIO_PRICES: Sequence[tuple[str, str, str]] = (
    ("gpt-4o-audio-preview", "40", "80"),
    ("gpt-4o-mini-audio-preview", "10", "20"),
)


class PriceOverride(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's own price for a model: decimal strings in dollars, per million tokens unless said otherwise.

    A unit without a price costs what its whole costs (cached input as input, reasoning as output), never what the
    catalogue says. Limits that are not given are taken from the catalogue where it has the model.

    Attributes:
        provider: of which provider; None for whoever serves it.
        image: dollars an image.
        request: dollars a request.
        effective_from_us: from when it comes before the catalogue's price.
    """

    model: str
    input: str | None
    output: str | None
    provider: str | None = None
    cached_input: str | None = None
    cache_write: str | None = None
    cache_write_1h: str | None = None
    reasoning: str | None = None
    input_audio: str | None = None
    output_audio: str | None = None
    image: str | None = None
    request: str | None = None
    context_window: int | None = None
    max_output_tokens: int | None = None
    hidden_reasoning: bool | None = None
    effective_from_us: int = 0


class LimitOverride(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator knows better than the catalogue of a model, whose prices stay the catalogue's.

    Attributes:
        model: the name that clients use.
        priced_as: the name that the catalogue has it under.
    """

    model: str
    priced_as: str
    provider: str | None = None
    context_window: int | None = None
    max_output_tokens: int | None = None
    hidden_reasoning: bool | None = None


def build_price_book(overrides: Sequence[PriceOverride] = (), limits: Sequence[LimitOverride] = ()) -> PriceBook:
    """The book of this installation. Imports genai-prices, which takes about half a second: once, at the start.

    Raises:
        PriceInvalid: an override's price is missing, negative, absurd or not a number.
        ModelNotPriced: the catalogue has no price for a model whose limits are given.
    """
    from genai_prices.data import providers  # noqa: PLC0415 - its import is slow, and only this needs it

    catalogue = GenaiCatalogue(providers)
    book = PriceBook(catalogue)
    for override in overrides:
        book.add(_override_card(override, catalogue))
    for limit in limits:
        known = {
            "context_window": limit.context_window,
            "max_output_tokens": limit.max_output_tokens,
            "hidden_reasoning": limit.hidden_reasoning,
        }
        changes = {name: value for name, value in known.items() if value is not None}
        for card in catalogue.versions(limit.priced_as, limit.provider):
            book.add(msgspec.structs.replace(card, model=limit.model, **changes))
    return book


class GenaiCatalogue:
    """Rate cards from genai-prices' providers, built when first asked for and then kept."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        self._providers = list(providers)
        self._by_id = {provider.id: provider for provider in self._providers}
        self._cards: dict[tuple[str, str], tuple[RateCard, ...]] = {}

    def versions(self, model: str, provider: str | None) -> tuple[RateCard, ...]:
        """All versions for a name as a client writes it (aliases and dated names too), earliest first.

        Raises:
            ModelNotPriced: no provider is named, and several, none of them the maker, have the model; or the maker's
                clauses catch a name that somebody else lists as it stands, and dearer.
        """
        if provider is not None:
            owner = self._by_id.get(provider)
            found = owner.find_model(model, all_providers=self._providers) if owner else None
            return self._versions(provider, found) if found else ()
        for provider_id in PROVIDER_ORDER:
            owner = self._by_id.get(provider_id)
            if owner is not None and (found := owner.find_model(model)) is not None:
                cards = self._versions(provider_id, found)
                if found.id.lower() != model.lower() and (dearer := self._who_lists_it_dearer(model, cards)):
                    raise ModelNotPriced(model, (provider_id, *dearer))
                return cards
        others = [
            (other.id, found)
            for other in self._providers
            if other.id not in PROVIDER_ORDER and (found := other.find_model(model)) is not None
        ]
        if len(others) > 1:
            raise ModelNotPriced(model, tuple(provider_id for provider_id, _ in others))
        return self._versions(*others[0]) if others else ()

    def _who_lists_it_dearer(self, model: str, cards: Sequence[RateCard]) -> tuple[str, ...]:
        """The providers that have a model of this very name, at a higher price than *cards* say.

        A maker's clauses are made for its own names and catch others' too: "deepseek-r1-distill-llama-70b".
        """
        listed = [
            (other.id, self._versions(other.id, found))
            for other in self._providers
            for found in other.models
            if found.id.lower() == model.lower()
        ]
        return tuple(
            provider_id
            for provider_id, theirs in listed
            if theirs and (not cards or any(theirs[-1].rates[unit] > cards[-1].rates[unit] for unit in _WHOLES))
        )

    def all_versions(self) -> Iterable[tuple[RateCard, ...]]:
        """The versions of every model of every provider that has a price by token."""
        for provider in self._providers:
            for model in provider.models:
                if cards := self._versions(provider.id, model):
                    yield cards

    def _versions(self, provider_id: str, model: ModelInfo) -> tuple[RateCard, ...]:
        key = (provider_id, model.id)
        if key not in self._cards:
            self._cards[key] = tuple(_versions(provider_id, model))
        return self._cards[key]


def _versions(provider_id: str, model: ModelInfo) -> Iterable[RateCard]:
    """One card for each time from which the prices differ; none where a token of input or output has no price."""
    last: RateCard | None = None
    for effective_from_us, prices in _price_steps(model):
        cards = [card for p in prices if (card := _card(provider_id, model, p, effective_from_us)) is not None]
        if not cards:
            continue
        card = _dearest(cards)
        if last is None or (last.rates, last.tiers) != (card.rates, card.tiers):
            yield card
            last = card


def _price_steps(model: ModelInfo) -> Iterable[tuple[int, list[ModelPrice]]]:
    """From when, and every price that may then apply at some time of the day.

    The package's rule: of the conditions that hold, the last one listed wins; if none holds, the first price does.
    """
    from genai_prices.types import ModelPrice, StartDateConstraint, TimeOfDateConstraint  # noqa: PLC0415

    if isinstance(model.prices, ModelPrice):
        yield 0, [model.prices]
        return
    starts = {
        price.constraint.start_date for price in model.prices if isinstance(price.constraint, StartDateConstraint)
    }
    for start in [None, *sorted(starts)]:
        possible: list[ModelPrice] = []
        for price in reversed(model.prices):
            if isinstance(price.constraint, TimeOfDateConstraint):
                possible.append(price.prices)
            elif price.constraint is None or (start is not None and price.constraint.start_date <= start):
                possible.append(price.prices)
                break
        else:
            possible.extend(price.prices for price in model.prices[:1])
        yield (0 if start is None else (start - date(1970, 1, 1)).days * _US_PER_DAY), possible


def _card(provider_id: str, model: ModelInfo, prices: ModelPrice, effective_from_us: int) -> RateCard | None:
    from genai_prices.types import TieredPrices  # noqa: PLC0415

    listed = {name: price for name, price in vars(prices).items() if price is not None}
    if "input_mtok" not in listed or "output_mtok" not in listed:
        return None
    thresholds = sorted(
        {tier.start for price in listed.values() if isinstance(price, TieredPrices) for tier in price.tiers}
    )

    def price_at(name: str, threshold: int) -> Decimal:
        price: Decimal | TieredPrices = listed[name]
        if not isinstance(price, TieredPrices):
            return price
        reached = [tier.price for tier in price.tiers if tier.start <= threshold]
        return reached[-1] if reached else price.base

    def rates_at(threshold: int) -> dict[Unit, int]:
        rates = {
            unit: max(_rate(price_at(name, threshold), _PICOS_PER_USD_PER_MTOK) for name in names if name in listed)
            for unit, names in _TOKEN_PRICES.items()
            if names[0] in listed
        }
        for pattern, audio_in, audio_out in _AUDIO_PRICES:
            if provider_id == "openai" and model.id == pattern:
                rates.setdefault(Unit.INPUT_AUDIO, _rate(Decimal(audio_in), _PICOS_PER_USD_PER_MTOK))
                rates.setdefault(Unit.OUTPUT_AUDIO, _rate(Decimal(audio_out), _PICOS_PER_USD_PER_MTOK))
        if "requests_kcount" in listed:
            rates[Unit.REQUEST] = _rate(price_at("requests_kcount", threshold), _PICOS_PER_USD_PER_KILO)
        return rates

    base = rates_at(-1)
    if not base[Unit.INPUT] and not base[Unit.OUTPUT]:
        # A price of nothing is taken for an unknown one: who gives a model away says so in an override.
        return None
    return rate_card(
        provider=provider_id,
        model=model.id,
        rates=base,
        tiers={threshold: rates_at(threshold) for threshold in thresholds},
        effective_from_us=effective_from_us,
        context_window=model.context_window or None,
        max_output_tokens=max_output_tokens_of(model.id),
        hidden_reasoning=hidden_reasoning_of(model.id),
    )


def _dearest(cards: Sequence[RateCard]) -> RateCard:
    """One card that asks, for each unit and prompt length, the highest of several."""
    first = cards[0]
    if len(cards) == 1:
        return first
    thresholds = sorted({tier.input_tokens_above for card in cards for tier in card.tiers})
    return rate_card(
        provider=first.provider,
        model=first.model,
        rates={unit: max(card.rates[unit] for card in cards) for unit in Unit},
        tiers={
            above: {unit: max(card.rates_for(above + 1)[unit] for card in cards) for unit in Unit}
            for above in thresholds
        },
        effective_from_us=first.effective_from_us,
        context_window=first.context_window,
        max_output_tokens=first.max_output_tokens,
        hidden_reasoning=first.hidden_reasoning,
    )


def _rate(usd: Decimal | Fraction, picos: int) -> int:
    """A price in pico-dollars, rounded up where it is not a whole number of them."""
    exact = Fraction(usd) * picos
    return ceil_div(exact.numerator, exact.denominator)


def _override_card(override: PriceOverride, catalogue: GenaiCatalogue) -> RateCard:
    rates: dict[Unit, int] = {}
    for unit in Unit:
        text = getattr(override, unit.value)
        if text is None:
            continue
        try:
            price = parse_decimal(text)
        except ValueError as error:
            raise PriceInvalid(override.model, unit, str(error)) from None
        rates[unit] = _rate(price, PICOS_PER_USD if unit in (Unit.IMAGE, Unit.REQUEST) else _PICOS_PER_USD_PER_MTOK)
    try:
        known = catalogue.versions(override.model, override.provider)
    except ModelNotPriced:
        known = ()
    context_window = override.context_window
    max_output_tokens = override.max_output_tokens
    hidden_reasoning = override.hidden_reasoning
    return rate_card(
        provider=override.provider or ANY_PROVIDER,
        model=override.model,
        rates=rates,
        effective_from_us=override.effective_from_us,
        context_window=known[-1].context_window if known and context_window is None else context_window,
        max_output_tokens=max_output_tokens_of(override.model) if max_output_tokens is None else max_output_tokens,
        hidden_reasoning=hidden_reasoning_of(override.model) if hidden_reasoning is None else hidden_reasoning,
    )
