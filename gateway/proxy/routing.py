"""Where a model's requests go, and at which price: the candidates in the order in which they are tried."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import msgspec

from gateway.errors import model_not_found, model_not_priced, upstream_error
from gateway.proxy.upstream import Upstream
from gateway.settings import SIMULATED, ModelSettings, Settings, UpstreamSettings
from pricing.book import ModelNotPriced, PriceBook, RateCard

CONTEXT_WINDOW_DEFAULT: Final = 128_000
"""Tokens of prompt and answer of a model of which neither the catalogue nor the settings tell."""


class Candidate(msgspec.Struct, frozen=True):
    """An upstream that can serve the request, and the name and price of the model there."""

    upstream: Upstream
    model: str
    card: RateCard
    stream_usage: bool = True
    limit_field: str = "max_tokens"
    retries: int = 1


class Route(msgspec.Struct, frozen=True):
    """What is known of a model before its request is sent.

    Attributes:
        candidates: at least one; the first is the one that the client means.
        hidden_reasoning: some candidate spends tokens that do not show in the stream.
    """

    model: str
    candidates: tuple[Candidate, ...]
    hidden_reasoning: bool

    def output_ceiling(self, prompt_tokens: int) -> int:
        """The most tokens that a choice may have when the request sets no limit: the largest of the candidates'."""
        return max(_ceiling(candidate.card, prompt_tokens) for candidate in self.candidates)


def _ceiling(card: RateCard, prompt_tokens: int) -> int:
    if card.max_output_tokens is not None:
        return card.max_output_tokens
    return max(1, (card.context_window or CONTEXT_WINDOW_DEFAULT) - prompt_tokens)


def _price_names(listed: ModelSettings) -> tuple[str, ...]:
    """Where to look for a listed model's price: what the operator says of it stands under the name that clients use.

    Otherwise what is served is charged, whatever clients call it; a name that only the upstream knows has no price.
    """
    there = listed.upstream_model or listed.name
    return (listed.name, there) if listed.described else (there, listed.name)


class Router:
    """Settings and price book, put together into routes.

    With no model in the settings, every priced model goes to the first upstream. Test keys reach the test upstream
    only, whatever the settings say of a model.
    """

    def __init__(self, settings: Settings, upstreams: Mapping[str, Upstream], book: PriceBook) -> None:
        self._settings = settings
        self._upstreams = upstreams
        self._book = book
        self._models = {model.name: model for model in settings.models}
        self._configured = {upstream.name: upstream for upstream in settings.upstreams}

    def route(self, model: str, *, mode: str, at_us: int) -> Route:
        """The route of *model* for live or test traffic, at the prices of *at_us*.

        Raises:
            ApiError: 404 `model_not_found`, `model_not_priced`; 502 where no upstream is set up for live traffic.
        """
        listed = self._models.get(model)
        if self._models and listed is None:
            raise model_not_found(model)
        candidates = tuple(
            self._candidate(upstream, name, price_names, at_us)
            for upstream, name, price_names in self._targets(model, listed, mode)
        )
        hidden = any(candidate.card.hidden_reasoning for candidate in candidates)
        return Route(model=model, candidates=candidates, hidden_reasoning=hidden)

    def models(self, at_us: int) -> dict[str, RateCard]:
        """What clients may ask for, by the name that they use. Takes a second at first: all prices are worked out."""
        live = self._settings.live_upstream
        if self._models:
            priced = {
                name: self._priced(_price_names(listed), listed.upstream or live, at_us)
                for name, listed in self._models.items()
            }
        else:
            names = {card.model for card in self._book.models(at_us, provider=self._provider(live))}
            priced = {name: self._priced((name,), live, at_us) for name in sorted(names)}
        return {name: card for name, card in priced.items() if card is not None}

    def _targets(self, model: str, listed: ModelSettings | None, mode: str) -> list[tuple[str, str, tuple[str, ...]]]:
        """The upstream, the model's name there, and the names that its price may stand under."""
        there = (listed and listed.upstream_model) or model
        price_names = (model,) if listed is None else _price_names(listed)
        if mode == "test":
            return [(self._settings.test_upstream, there, price_names)]
        first = (listed and listed.upstream) or self._settings.live_upstream
        if first is None:
            raise upstream_error("No upstream is set up for live traffic. The operator names one under [[upstreams]].")
        targets = [(first, there, price_names)]
        if listed is not None:
            targets += [(fallback.upstream, fallback.model, (fallback.model,)) for fallback in listed.fallbacks]
        return targets

    def _candidate(self, upstream: str, model: str, price_names: tuple[str, ...], at_us: int) -> Candidate:
        configured = self._configured.get(upstream)
        card = self._priced(price_names, upstream, at_us)
        if card is None:
            raise model_not_priced(price_names[0])
        if configured is None:
            return Candidate(upstream=self._upstreams[upstream], model=model, card=card)
        return Candidate(
            upstream=self._upstreams[upstream],
            model=model,
            card=card,
            stream_usage=configured.stream_usage,
            limit_field=configured.max_tokens_field,
            retries=configured.retries,
        )

    def _provider(self, upstream: str | None) -> str | None:
        """Whose published prices hold at an upstream: what the operator says, else nobody's in particular."""
        configured: UpstreamSettings | None = self._configured.get(upstream or "")
        if configured is None or upstream == SIMULATED:
            return None
        return configured.provider

    def _priced(self, names: tuple[str, ...], upstream: str | None, at_us: int) -> RateCard | None:
        """The price at *upstream* under the first of *names* that has one."""
        provider = self._provider(upstream)
        for name in names:
            with suppress(ModelNotPriced):
                return self._book.lookup(name, at_us, provider=provider)
        return None
