"""Which price a route charges, when what clients ask for has another name at the upstream."""

from typing import Any

import pytest

from gateway.prices import price_book
from gateway.proxy.routing import Router
from gateway.proxy.simulated import SimulatedUpstream
from gateway.settings import Settings
from pricing.usage import Unit

AT_US = 1_780_000_000 * 10**6


@pytest.mark.parametrize(
    ("more", "input_picos"),
    [
        ({}, 2_500_000),
        ({"max_output_tokens": 100}, 2_500_000),
        ({"price": {"input": "7", "output": "8"}}, 7_000_000),
        ({"upstream_model": "our-deployment"}, 150_000),
        ({"name": "fast"}, 2_500_000),
    ],
    ids=["what is served", "with a limit", "the operator's price", "a name that only the upstream knows", "an alias"],
)
@pytest.mark.parametrize("mode", ["live", "test"])
def test_what_is_served_is_charged_unless_the_operator_says_otherwise(
    more: dict[str, Any], input_picos: int, mode: str
) -> None:
    model = {"name": "gpt-4o-mini", "upstream": "simulated", "upstream_model": "gpt-4o", **more}
    settings = Settings.model_validate({"models": [model]})
    router = Router(settings, {"simulated": SimulatedUpstream()}, price_book(settings))
    (candidate,) = router.route(model["name"], mode=mode, at_us=AT_US).candidates
    assert candidate.card.rates[Unit.INPUT] == input_picos
    assert router.models(AT_US)[model["name"]].rates[Unit.INPUT] == input_picos
