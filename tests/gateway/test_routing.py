"""Which price a route charges, when what clients ask for has another name at the upstream."""

from typing import Any

import pytest

from gateway.errors import ApiError
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


def test_a_model_without_a_price_is_not_listed_and_hides_no_other() -> None:
    settings = Settings.model_validate(
        {"default_upstream": "simulated", "models": [{"name": "nobody-sells-this"}, {"name": "gpt-4o-mini"}]}
    )
    router = Router(settings, {"simulated": SimulatedUpstream()}, price_book(settings))
    assert list(router.models(AT_US)) == ["gpt-4o-mini"]
    with pytest.raises(ApiError, match="no price"):
        router.route("nobody-sells-this", mode="live", at_us=AT_US)


def test_a_model_without_an_upstream_is_listed_at_the_price_of_the_default_one() -> None:
    upstream = {"name": "azure", "base_url": "http://127.0.0.1:1/v1", "provider": "azure"}
    settings = Settings.model_validate({"upstreams": [upstream], "models": [{"name": "gpt-4o"}]})
    router = Router(settings, {"azure": SimulatedUpstream()}, price_book(settings))
    (candidate,) = router.route("gpt-4o", mode="live", at_us=AT_US).candidates
    assert router.models(AT_US) == {"gpt-4o": candidate.card}
