"""A price book: complete cards, refused nonsense, versions by time."""

import pytest

from pricing.book import (
    ANY_PROVIDER,
    TOKEN_RATE_PICOS_MAX,
    ModelNotPriced,
    PriceBook,
    PriceInvalid,
    RateCard,
    rate_card,
)
from pricing.usage import Unit


def card(rate: int = 1, *, model: str = "m", provider: str = "p", since: int = 0) -> RateCard:
    rates = {Unit.INPUT: rate, Unit.OUTPUT: rate}
    return rate_card(provider=provider, model=model, rates=rates, effective_from_us=since)


def test_a_unit_without_a_rate_costs_what_its_whole_costs() -> None:
    assert dict(rate_card(provider="p", model="m", rates={Unit.INPUT: 3, Unit.OUTPUT: 5}).rates) == {
        Unit.INPUT: 3,
        Unit.CACHED_INPUT: 3,
        Unit.CACHE_WRITE: 3,
        Unit.CACHE_WRITE_1H: 3,
        Unit.INPUT_AUDIO: 3,
        Unit.OUTPUT: 5,
        Unit.REASONING: 5,
        Unit.OUTPUT_AUDIO: 5,
        Unit.IMAGE: 0,
        Unit.REQUEST: 0,
    }


def test_an_hours_cache_costs_what_a_shorter_one_does_if_it_has_no_rate() -> None:
    rates = {Unit.INPUT: 3, Unit.OUTPUT: 5, Unit.CACHE_WRITE: 4}
    assert rate_card(provider="p", model="m", rates=rates).rates[Unit.CACHE_WRITE_1H] == 4


def test_tiers_are_complete_and_ascending() -> None:
    tiered = rate_card(
        provider="p",
        model="m",
        rates={Unit.INPUT: 1, Unit.OUTPUT: 2},
        tiers={256: {Unit.INPUT: 5, Unit.OUTPUT: 6}, 128: {Unit.INPUT: 3, Unit.OUTPUT: 4}},
    )
    by_length = {
        n: (tiered.rates_for(n)[Unit.CACHED_INPUT], tiered.rates_for(n)[Unit.REASONING])
        for n in (0, 128, 129, 256, 257)
    }
    assert by_length == {0: (1, 2), 128: (1, 2), 129: (3, 4), 256: (3, 4), 257: (5, 6)}


@pytest.mark.parametrize(
    ("rates", "unit"),
    [
        ({Unit.INPUT: 1}, Unit.OUTPUT),
        ({Unit.OUTPUT: 1}, Unit.INPUT),
        ({Unit.INPUT: -1, Unit.OUTPUT: 1}, Unit.INPUT),
        ({Unit.INPUT: 1, Unit.OUTPUT: 1.5}, Unit.OUTPUT),
        ({Unit.INPUT: 1, Unit.OUTPUT: True}, Unit.OUTPUT),
        ({Unit.INPUT: 1, Unit.OUTPUT: TOKEN_RATE_PICOS_MAX + 1}, Unit.OUTPUT),
        ({Unit.INPUT: 1, Unit.OUTPUT: 1, Unit.IMAGE: 10**15}, Unit.IMAGE),
        ({Unit.INPUT: 1, Unit.OUTPUT: 1, Unit.CACHE_WRITE: None}, Unit.CACHE_WRITE),
    ],
)
def test_a_price_that_is_missing_negative_or_absurd_is_refused_by_name(rates: dict[Unit, int], unit: Unit) -> None:
    with pytest.raises(PriceInvalid) as refused:
        rate_card(provider="p", model="gpt-x", rates=rates)
    assert (refused.value.model, refused.value.unit) == ("gpt-x", unit)
    assert "gpt-x" in str(refused.value)


def test_a_broken_tier_is_refused_too() -> None:
    with pytest.raises(PriceInvalid):
        rate_card(provider="p", model="m", rates={Unit.INPUT: 1, Unit.OUTPUT: 1}, tiers={10: {Unit.INPUT: -1}})


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_a_limit_must_be_a_positive_integer(limit: int) -> None:
    with pytest.raises(PriceInvalid):
        rate_card(provider="p", model="m", rates={Unit.INPUT: 1, Unit.OUTPUT: 1}, max_output_tokens=limit)


def test_the_version_names_the_prices() -> None:
    assert card(1).version == card(1).version
    assert len({card(1).version, card(2).version, card(1, since=5).version, card(1, model="n").version}) == 4


def test_a_price_is_looked_up_by_the_time_the_request_began() -> None:
    book = PriceBook()
    for since, rate in ((100, 1), (300, 3), (200, 2)):
        book.add(card(rate, since=since))
    assert [book.lookup("m", at).rates[Unit.INPUT] for at in (100, 199, 200, 299, 300, 10**18)] == [1, 1, 2, 2, 3, 3]
    with pytest.raises(ModelNotPriced):
        book.lookup("m", 99)


def test_of_two_versions_from_the_same_time_the_later_addition_holds() -> None:
    book = PriceBook()
    book.add(card(1))
    book.add(card(2))
    assert book.lookup("m", 0).rates[Unit.INPUT] == 2


def test_a_price_for_any_provider_yields_to_one_for_this_provider() -> None:
    book = PriceBook()
    book.add(card(1, provider="openai"))
    book.add(card(2, provider=ANY_PROVIDER, since=5))
    assert book.lookup("m", 9, "openai").rates[Unit.INPUT] == 1
    assert book.lookup("m", 9, "azure").rates[Unit.INPUT] == 2


@pytest.mark.parametrize("model", ["", "unknown", "x" * 300])
def test_a_model_without_a_price_is_refused(model: str) -> None:
    with pytest.raises(ModelNotPriced) as refused:
        PriceBook().lookup(model, 0)
    assert refused.value.model == model


class Catalogue:
    """One model of one provider; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def versions(self, model: str, provider: str | None) -> tuple[RateCard, ...]:
        self.asked += 1
        if model == "many":
            raise ModelNotPriced(model, ("a", "b"))
        return (card(7), card(8, since=100)) if model == "m" and provider in (None, "p") else ()

    def all_versions(self) -> list[tuple[RateCard, ...]]:
        return [(card(7), card(8, since=100))]


def test_the_catalogue_is_asked_once_for_each_name_even_in_vain() -> None:
    catalogue = Catalogue()
    book = PriceBook(catalogue)
    assert [book.lookup("m", at).rates[Unit.INPUT] for at in (0, 99, 100)] == [7, 7, 8]
    for name in ("many", "unknown"):
        for _ in range(3):
            with pytest.raises(ModelNotPriced) as refused:
                book.lookup(name, 0)
            assert refused.value.candidates == (("a", "b") if name == "many" else ())
    assert catalogue.asked == 3


def test_an_added_price_comes_before_the_catalogue_from_its_time_on() -> None:
    book = PriceBook(Catalogue())
    book.add(card(1, provider=ANY_PROVIDER, since=50))
    assert [book.lookup("m", at, "p").rates[Unit.INPUT] for at in (0, 49, 50, 100, 1000)] == [7, 7, 1, 1, 1]


def test_models_lists_the_card_in_force() -> None:
    book = PriceBook(Catalogue())
    book.add(card(3, model="own", provider=ANY_PROVIDER))
    book.add(card(4, model="later", since=1000))
    assert [(c.model, c.rates[Unit.INPUT]) for c in book.models(100)] == [("m", 8), ("own", 3)]
    assert [c.model for c in book.models(100, provider="q")] == ["own"]
