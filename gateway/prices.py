"""The installation's prices: the catalogue's, then what the settings say, and the list of what is served."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from gateway.proxy.routing import Router
from gateway.settings import Settings
from pricing.book import PriceBook, RateCard
from pricing.catalog import LimitOverride, PriceOverride, build_price_book

LIST_LEASE_US: Final = 3_600_000_000
"""How long a list of models is shown before it is made again: prices change by the date."""


def price_book(settings: Settings) -> PriceBook:
    """All prices.

    Raises:
        PriceInvalid: a price in the settings is absurd.
        ModelNotPriced: the settings give limits of a model that has no price.
    """
    providers = {upstream.name: upstream.provider for upstream in settings.upstreams}
    prices = [
        PriceOverride(
            model=model.name,
            context_window=model.context_window,
            max_output_tokens=model.max_output_tokens,
            hidden_reasoning=model.hidden_reasoning,
            **model.price.model_dump(),
        )
        for model in settings.models
        if model.price is not None
    ]
    limits = [
        LimitOverride(
            model=model.name,
            priced_as=model.upstream_model or model.name,
            provider=providers.get(model.upstream or settings.live_upstream or ""),
            context_window=model.context_window,
            max_output_tokens=model.max_output_tokens,
            hidden_reasoning=model.hidden_reasoning,
        )
        for model in settings.models
        if model.price is None and model.described
    ]
    return build_price_book(prices, limits)


class ServedModels:
    """The models that clients may ask for. Working all of them out takes a second, so a thread does it, seldom."""

    def __init__(self, settings: Settings, now_us: Callable[[], int]) -> None:
        self._settings = settings
        self._now_us = now_us
        self._lock = asyncio.Lock()
        self._models: Mapping[str, RateCard] = {}
        self._until_us = 0

    async def all(self) -> Mapping[str, RateCard]:
        """By the name that clients use. A model in the settings that has no price is not served, and not among them."""
        async with self._lock:
            now_us = self._now_us()
            if now_us >= self._until_us:
                self._models = await asyncio.to_thread(self._work_out, now_us)
                self._until_us = now_us + LIST_LEASE_US
            return self._models

    def _work_out(self, now_us: int) -> Mapping[str, RateCard]:
        # A book of its own: the proxy's is not made for two threads.
        return Router(self._settings, {}, price_book(self._settings)).models(now_us)
