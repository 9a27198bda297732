"""Prices: what each unit of a model costs, and since when.

How it works: a RateCard is one immutable version of a model's prices, in integer pico-dollars a unit, complete (every
unit has a rate). A PriceBook holds the versions; a price is looked up by the time the request began. Cards that were
added to the book come before those of its catalogue.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from pricing.usage import Unit

TOKEN_RATE_PICOS_MAX = 10**10
"""$10,000 a million tokens; the dearest known model asks 600."""
PIECE_RATE_PICOS_MAX = 10**14
"""$100 an image or a request."""
MODEL_NAME_MAX = 256
LOOKUPS_CACHED_MAX = 4096
ANY_PROVIDER = ""
"""The provider of a card that holds whoever serves the model."""

# What a unit costs that has no rate of its own. In this order, so that a default may itself be a default.
_DEFAULT_RATES: Mapping[Unit, Unit | None] = {
    Unit.CACHED_INPUT: Unit.INPUT,
    Unit.CACHE_WRITE: Unit.INPUT,
    Unit.CACHE_WRITE_1H: Unit.CACHE_WRITE,
    Unit.INPUT_AUDIO: Unit.INPUT,
    Unit.REASONING: Unit.OUTPUT,
    Unit.OUTPUT_AUDIO: Unit.OUTPUT,
    Unit.IMAGE: None,
    Unit.REQUEST: None,
}
_PIECES = frozenset({Unit.IMAGE, Unit.REQUEST})


class PriceInvalid(ValueError):
    """A price that is missing, negative or absurd; names the model and the unit."""

    def __init__(self, model: str, unit: str, message: str) -> None:
        super().__init__(f"the price of {model}, {unit}: {message}")
        self.model = model
        self.unit = unit


class ModelNotPriced(LookupError):
    """No price is known for the model at that time, so it cannot be served.

    Attributes:
        candidates: providers that price it, when there are several and none was named.
    """

    def __init__(self, model: str, candidates: tuple[str, ...] = ()) -> None:
        several = f"; several providers price it ({', '.join(candidates)}): name one" if candidates else ""
        super().__init__(
            f"no price is known for the model {model[:MODEL_NAME_MAX]!r}{several}; set one in the settings"
        )
        self.model = model
        self.candidates = candidates


class Tier(msgspec.Struct, frozen=True):
    """Rates that hold for ALL tokens of a request whose prompt is longer than the threshold (a cliff)."""

    input_tokens_above: int
    rates: Mapping[Unit, int]


class RateCard(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a model's prices. Make it with `rate_card`, which checks and completes it.

    Attributes:
        version: stable id of this price version: the same prices from the same time have the same id.
        effective_from_us: microseconds since 1970; holds from then until the next version.
        rates: pico-dollars a unit, complete.
        tiers: ascending thresholds, each with complete rates.
        hidden_reasoning: tokens are charged that do not show in the stream.
    """

    provider: str
    model: str
    version: str
    effective_from_us: int
    rates: Mapping[Unit, int]
    tiers: tuple[Tier, ...] = ()
    context_window: int | None = None
    max_output_tokens: int | None = None
    hidden_reasoning: bool = False

    def rates_for(self, input_total: int) -> Mapping[Unit, int]:
        """The rates of a request with this many prompt tokens in all: those of the highest threshold it exceeds."""
        rates = self.rates
        for tier in self.tiers:
            if input_total <= tier.input_tokens_above:
                break
            rates = tier.rates
        return rates

    def dearest_rate(self, units: Iterable[Unit], *, input_total_max: int) -> int:
        """The highest rate that any of the units may have for a prompt of at most this many tokens."""
        reachable = [self.rates, *(tier.rates for tier in self.tiers if input_total_max > tier.input_tokens_above)]
        return max(rates[unit] for rates in reachable for unit in units)


def rate_card(
    *,
    provider: str,
    model: str,
    rates: Mapping[Unit, int],
    tiers: Mapping[int, Mapping[Unit, int]] | None = None,
    effective_from_us: int = 0,
    context_window: int | None = None,
    max_output_tokens: int | None = None,
    hidden_reasoning: bool = False,
) -> RateCard:
    """Check the rates, give every unit one, and name the version.

    Args:
        rates: pico-dollars a unit; INPUT and OUTPUT are required, a free one says 0.
        tiers: threshold in prompt tokens -> the rates that differ above it.

    Raises:
        PriceInvalid: a rate is missing, not an integer, negative or above the maximum.
    """
    complete = _complete(model, rates)
    steps = tuple(
        Tier(input_tokens_above=above, rates=_complete(model, {**rates, **(tiers or {})[above]}))
        for above in sorted(tiers or {})
    )
    for name, limit in (("context_window", context_window), ("max_output_tokens", max_output_tokens)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0):
            raise PriceInvalid(model, name, "must be a positive integer")
    content = msgspec.json.encode([provider, model, effective_from_us, complete, steps], order="deterministic")
    return RateCard(
        provider=provider,
        model=model,
        version=f"prc_{hashlib.sha256(content).hexdigest()[:16]}",
        effective_from_us=effective_from_us,
        rates=complete,
        tiers=steps,
        context_window=context_window,
        max_output_tokens=max_output_tokens,
        hidden_reasoning=hidden_reasoning,
    )


def _complete(model: str, rates: Mapping[Unit, int]) -> Mapping[Unit, int]:
    complete: dict[Unit, int] = {}
    for unit in (Unit.INPUT, Unit.OUTPUT):
        if unit not in rates:
            raise PriceInvalid(model, unit, "is missing; a free model says 0")
    for unit, rate in rates.items():
        limit = PIECE_RATE_PICOS_MAX if unit in _PIECES else TOKEN_RATE_PICOS_MAX
        if isinstance(rate, bool) or not isinstance(rate, int):
            raise PriceInvalid(model, unit, "must be an integer of pico-dollars")
        if not 0 <= rate <= limit:
            raise PriceInvalid(model, unit, f"{rate} pico-dollars is not within 0..{limit}")
        complete[unit] = rate
    for unit, default in _DEFAULT_RATES.items():
        complete.setdefault(unit, complete[default] if default is not None else 0)
    return complete


class Catalogue(Protocol):
    """Where a book finds the prices that nobody added to it."""

    def versions(self, model: str, provider: str | None) -> tuple[RateCard, ...]:
        """All versions for a model name, earliest first; empty if it has no price.

        Raises:
            ModelNotPriced: several providers price it and none was named.
        """
        ...

    def all_versions(self) -> Iterable[tuple[RateCard, ...]]:
        """The versions of every model that has a price."""
        ...


class PriceBook:
    """Versions of prices by model; appended, never edited."""

    def __init__(self, catalogue: Catalogue | None = None) -> None:
        self._catalogue = catalogue
        self._added: dict[str, list[RateCard]] = {}
        self._found: OrderedDict[tuple[str, str | None], tuple[RateCard, ...] | ModelNotPriced] = OrderedDict()

    def add(self, card: RateCard) -> None:
        """Append a version. It comes before the catalogue's from its `effective_from_us` on; of two that begin at the
        same time, the later addition holds. A card of ANY_PROVIDER yields to one of the provider that is asked for."""
        self._added.setdefault(card.model, []).append(card)

    def lookup(self, model: str, at_us: int, provider: str | None = None) -> RateCard:
        """The prices of a model for a request that began at this time.

        Args:
            provider: whose price; without it, that of the model's maker, else of the only provider that has one.

        Raises:
            ModelNotPriced: there is none.
        """
        added = [
            card
            for card in self._added.get(model, ())
            if card.effective_from_us <= at_us and (provider is None or card.provider in (provider, ANY_PROVIDER))
        ]
        if added:
            return max(enumerate(added), key=lambda at: (at[1].provider == provider, at[1].effective_from_us, at[0]))[1]
        for card in reversed(self._catalogued(model, provider)):
            if card.effective_from_us <= at_us:
                return card
        raise ModelNotPriced(model)

    def models(self, at_us: int, provider: str | None = None) -> list[RateCard]:
        """The cards in force at this time, by model and provider; all of the catalogue, so not for a hot path."""
        names = {(card.model, card.provider) for cards in self._added.values() for card in cards}
        names |= {(v[0].model, v[0].provider) for v in (self._catalogue.all_versions() if self._catalogue else ())}
        current: dict[tuple[str, str], RateCard] = {}
        for model, owner in sorted(names):
            if provider is not None and owner not in (provider, ANY_PROVIDER):
                continue
            try:
                card = self.lookup(model, at_us, owner or provider)
            except ModelNotPriced:
                continue
            current[(model, card.provider)] = card
        return [current[key] for key in sorted(current)]

    def _catalogued(self, model: str, provider: str | None) -> tuple[RateCard, ...]:
        """Names match clauses in the catalogue, which takes a while: the last LOOKUPS_CACHED_MAX answers are kept."""
        if self._catalogue is None or not 0 < len(model) <= MODEL_NAME_MAX:
            return ()
        key = (model, provider)
        answer = self._found.get(key)
        if answer is None:
            try:
                answer = self._catalogue.versions(model, provider)
            except ModelNotPriced as refusal:
                answer = refusal.with_traceback(None)
            self._found[key] = answer
            if len(self._found) > LOOKUPS_CACHED_MAX:
                self._found.popitem(last=False)
        else:
            self._found.move_to_end(key)
        if isinstance(answer, ModelNotPriced):
            raise ModelNotPriced(model, answer.candidates)
        return answer
