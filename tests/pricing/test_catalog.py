"""The catalogue of genai-prices as integer rate cards, and the operator's overrides before it."""

import pkgutil
import subprocess
import sys
from datetime import UTC, date, datetime, time
from decimal import Decimal

import pytest
from genai_prices import Usage as GenaiUsage
from genai_prices.data import providers
from genai_prices.types import (
    ClauseEquals,
    ClauseStartsWith,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    Tier,
    TieredPrices,
    TimeOfDateConstraint,
)

import pricing
from pricing.book import ModelNotPriced, PriceBook, PriceInvalid
from pricing.catalog import GenaiCatalogue, PriceOverride, build_price_book
from pricing.charge import cost_picos
from pricing.known_models import hidden_reasoning_of, max_output_tokens_of
from pricing.usage import Unit, Usage

AT_US = 1_780_000_000 * 10**6
AT = datetime.fromtimestamp(AT_US // 10**6, UTC)


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return build_price_book()


def us(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 10**6


@pytest.mark.parametrize(
    ("name", "provider", "model"),
    [
        ("gpt-4o-mini", "openai", "gpt-4o-mini"),
        ("gpt-4o-mini-2024-07-18", "openai", "gpt-4o-mini"),
        ("gpt-4o-2024-11-20", "openai", "gpt-4o"),
        ("gpt-4o-2024-05-13", "openai", "gpt-4o-2024-05-13"),
        ("GPT-4o", "openai", "gpt-4o"),
        ("claude-sonnet-4-5-20250929", "anthropic", "claude-sonnet-4-5"),
        ("gemini-2.5-flash", "google", "gemini-2.5-flash"),
        ("deepseek-chat", "deepseek", "deepseek-chat"),
        ("llama-3.3-70b-versatile", "groq", "llama-3.3-70b-versatile"),
        ("llama-3.3-70b", "cerebras", "llama-3.3-70b"),
    ],
)
def test_a_bare_name_means_its_maker_or_the_only_provider(
    book: PriceBook, name: str, provider: str, model: str
) -> None:
    found = book.lookup(name, AT_US)
    assert (found.provider, found.model) == (provider, model)


def test_a_name_that_several_providers_share_must_be_qualified(book: PriceBook) -> None:
    name = "meta-llama/Llama-3.3-70B-Instruct"
    with pytest.raises(ModelNotPriced) as refused:
        book.lookup(name, AT_US)
    assert {"openrouter", "novita"} <= set(refused.value.candidates)
    assert book.lookup(name, AT_US, "openrouter").provider == "openrouter"


@pytest.mark.parametrize(
    ("name", "dearer"),
    [
        ("claude-opus-4.8-fast", "github-copilot"),
        ("anthropic/claude-opus-4.6-fast", "openrouter"),
        ("deepseek-r1-distill-llama-70b", "groq"),
        ("openai/gpt-oss-20b", "huggingface_groq"),
    ],
)
def test_a_bare_name_never_gets_a_cheaper_price_than_whoever_lists_it_asks(
    book: PriceBook, name: str, dearer: str
) -> None:
    with pytest.raises(ModelNotPriced) as refused:
        book.lookup(name, AT_US)
    assert dearer in refused.value.candidates
    assert book.lookup(name, AT_US, dearer).provider == dearer


@pytest.mark.parametrize(
    ("name", "provider"),
    [("no-such-model", None), ("gpt-4o-mini", "no-such-provider"), ("tts-1", None), ("gpt-4o", "zai")],
)
def test_what_has_no_price_is_refused(book: PriceBook, name: str, provider: str | None) -> None:
    with pytest.raises(ModelNotPriced):
        book.lookup(name, AT_US, provider)


def test_a_reseller_is_priced_by_whose_model_it_is(book: PriceBook) -> None:
    assert book.lookup("gpt-4o-mini-2024-07-18", AT_US, "azure").rates[Unit.INPUT] == 150_000


def test_a_price_holds_from_its_date(book: PriceBook) -> None:
    change = us(date(2025, 6, 10))
    assert [book.lookup("o3", at).rates[Unit.INPUT] for at in (0, change - 1, change)] == [10**7, 10**7, 2 * 10**6]
    assert book.lookup("o3", change - 1).version != book.lookup("o3", change).version


def test_of_prices_by_the_time_of_day_the_dearest_holds(book: PriceBook) -> None:
    rates = book.lookup("deepseek-chat", AT_US).rates
    assert (rates[Unit.INPUT], rates[Unit.CACHED_INPUT], rates[Unit.OUTPUT]) == (270_000, 70_000, 1_100_000)


def model_of(prices: ModelPrice | list[ConditionalPrice]) -> GenaiCatalogue:
    model = ModelInfo(id="m", match=ClauseEquals(equals="m"), prices=prices)
    return GenaiCatalogue([Provider(id="openai", name="x", api_pattern="x", models=[model])])


def price(usd: str, **more: str | TieredPrices) -> ModelPrice:
    prices = {name: value if isinstance(value, TieredPrices) else Decimal(value) for name, value in more.items()}
    return ModelPrice(**{"input_mtok": Decimal(usd), "output_mtok": Decimal(usd), **prices})


def test_dates_and_times_of_day_together() -> None:
    night = TimeOfDateConstraint(time(0, 0, tzinfo=UTC), time(8, 0, tzinfo=UTC))
    catalogue = model_of(
        [
            ConditionalPrice(prices=price("5")),
            ConditionalPrice(night, prices=price("1")),
            ConditionalPrice(StartDateConstraint(date(2026, 1, 1)), prices=price("3")),
            ConditionalPrice(StartDateConstraint(date(2026, 2, 1)), prices=price("3")),
            ConditionalPrice(night, prices=price("4")),
        ]
    )
    steps = [(c.effective_from_us, c.rates[Unit.INPUT]) for c in catalogue.versions("m", None)]
    assert steps == [(0, 5_000_000), (us(date(2026, 1, 1)), 4_000_000)]


def test_a_first_price_with_a_date_holds_before_it_as_well() -> None:
    catalogue = model_of([ConditionalPrice(StartDateConstraint(date(2026, 1, 1)), prices=price("3"))])
    assert [(c.effective_from_us, c.rates[Unit.INPUT]) for c in catalogue.versions("m", None)] == [(0, 3_000_000)]


def test_tiers_follow_the_source_threshold_by_threshold() -> None:
    tiers = TieredPrices(base=Decimal(1), tiers=[Tier(200, Decimal(4)), Tier(100, Decimal(2))])
    catalogue = model_of(price("1", input_mtok=tiers, cache_read_mtok="0.5"))
    (card,) = catalogue.versions("m", None)
    at = {n: (card.rates_for(n)[Unit.INPUT], card.rates_for(n)[Unit.CACHED_INPUT]) for n in (100, 101, 200, 201)}
    assert at == {
        100: (10**6, 500_000),
        101: (2 * 10**6, 500_000),
        200: (2 * 10**6, 500_000),
        201: (4 * 10**6, 500_000),
    }


def test_a_price_that_is_no_whole_pico_dollar_is_rounded_up() -> None:
    (card,) = model_of(price("0.0000001", output_mtok="1.0000001")).versions("m", None)
    assert (card.rates[Unit.INPUT], card.rates[Unit.OUTPUT]) == (1, 1_000_001)


@pytest.mark.parametrize("prices", [ModelPrice(), ModelPrice(input_mtok=Decimal(1)), price("0")])
def test_a_source_without_a_price_is_no_price(prices: ModelPrice) -> None:
    assert model_of(prices).versions("m", None) == ()


def test_audio_of_models_whose_data_lacks_it_is_not_sold_as_text(book: PriceBook) -> None:
    rates = book.lookup("gpt-4o-audio-preview", AT_US).rates
    assert (rates[Unit.INPUT_AUDIO], rates[Unit.OUTPUT_AUDIO]) == (40_000_000, 80_000_000)


def test_every_card_agrees_with_the_source_on_plain_text() -> None:
    """Each priced model of the makers, against genai-prices' own calculator, below and above every threshold."""
    catalogue, checked = GenaiCatalogue(providers), 0
    for provider in providers:
        if provider.id not in ("openai", "anthropic", "google", "x-ai", "mistral"):
            continue
        for model in provider.models:
            names = vars(model.get_prices(AT))
            if any(
                names.get(n) for n in ("output_image_mtok", "input_image_mtok", "output_video_mtok", "input_video_mtok")
            ):
                continue
            for card in reversed(catalogue._versions(provider.id, model)):
                if card.effective_from_us > AT_US:
                    continue
                for tokens in (1000, 250_000, 300_000):
                    source = model.calc_price(
                        GenaiUsage(input_tokens=tokens, output_tokens=70), provider, genai_request_timestamp=AT
                    )
                    picos = cost_picos(Usage(input=tokens, output=70), card.rates_for(tokens))
                    assert picos == source.total_price * 10**12, (model.id, tokens)
                checked += 1
                break
    assert checked > 150


def test_the_catalogue_lists_its_models(book: PriceBook) -> None:
    listed = {card.model for card in book.models(AT_US, provider="openai")}
    assert {"gpt-4o", "gpt-4o-mini", "o3", "gpt-5"} <= listed
    assert "tts-1" not in listed


def test_limits_and_hidden_reasoning_are_known_for_the_common_models(book: PriceBook) -> None:
    mini = book.lookup("gpt-4o-mini", AT_US)
    assert (mini.context_window, mini.max_output_tokens, mini.hidden_reasoning) == (128_000, 16_384, False)
    o3 = book.lookup("o3", AT_US)
    assert (o3.context_window, o3.max_output_tokens, o3.hidden_reasoning) == (200_000, 100_000, True)


@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        ("o1-mini", True),
        ("o3", True),
        ("openai/o4-mini", True),
        ("gpt-5-nano", True),
        ("gpt-5-chat-latest", False),
        ("gpt-4o", False),
        ("gpt-oss-120b", True),
        ("deepseek-reasoner", True),
        ("deepseek-chat", False),
        ("gemini-2.5-pro", True),
        ("gemini-2.0-flash", False),
        ("grok-4", True),
        ("grok-4-fast-non-reasoning", False),
        ("claude-3-7-sonnet-thinking", True),
        ("claude-sonnet-4-5", False),
        ("llama-3.3-70b", False),
    ],
)
def test_hidden_reasoning_by_name(model: str, hidden: bool) -> None:
    assert hidden_reasoning_of(model) is hidden


@pytest.mark.parametrize(
    ("model", "most"), [("gpt-4o-2024-05-13", 4096), ("gpt-4o-2024-08-06", 16_384), ("gpt-4", 8192), ("llama-9", None)]
)
def test_the_longest_answer_by_name(model: str, most: int | None) -> None:
    assert max_output_tokens_of(model) == most


def override(**fields: object) -> PriceOverride:
    return PriceOverride(**{"model": "gpt-4o-mini", "input": "1", "output": "2", **fields})  # type: ignore[arg-type]


def test_an_override_wins_from_its_time_and_keeps_what_is_known_of_the_model() -> None:
    book = build_price_book([override(effective_from_us=1000, cached_input="0.5", request="0.01", image="0.04")])
    assert book.lookup("gpt-4o-mini", 999).rates[Unit.INPUT] == 150_000
    card = book.lookup("gpt-4o-mini", 1000, "openai")
    assert dict(card.rates) == {
        Unit.INPUT: 1_000_000,
        Unit.CACHED_INPUT: 500_000,
        Unit.CACHE_WRITE: 1_000_000,
        Unit.CACHE_WRITE_1H: 1_000_000,
        Unit.INPUT_AUDIO: 1_000_000,
        Unit.OUTPUT: 2_000_000,
        Unit.REASONING: 2_000_000,
        Unit.OUTPUT_AUDIO: 2_000_000,
        Unit.IMAGE: 40_000_000_000,
        Unit.REQUEST: 10_000_000_000,
    }
    assert (card.context_window, card.max_output_tokens) == (128_000, 16_384)


def test_an_override_for_one_provider_leaves_the_others() -> None:
    book = build_price_book([override(provider="azure")])
    assert book.lookup("gpt-4o-mini", AT_US, "azure").rates[Unit.INPUT] == 1_000_000
    assert book.lookup("gpt-4o-mini", AT_US, "openai").rates[Unit.INPUT] == 150_000


def test_an_override_prices_a_model_that_nobody_knows_and_may_give_it_away() -> None:
    free = override(model="my-model", input="0", output="0", hidden_reasoning=True, context_window=8192)
    card = build_price_book([free]).lookup("my-model", 0)
    assert set(card.rates.values()) == {0}
    assert (card.hidden_reasoning, card.context_window, card.max_output_tokens) == (True, 8192, None)


@pytest.mark.parametrize(
    ("fields", "unit"),
    [
        ({"input": None}, "input"),
        ({"output": None}, "output"),
        ({"input": ""}, "input"),
        ({"input": "-1"}, "input"),
        ({"input": "NaN"}, "input"),
        ({"output": "1e3"}, "output"),
        ({"output": "10000.01"}, "output"),
        ({"output": 2}, "output"),
        ({"cached_input": "free"}, "cached_input"),
        ({"request": "100.5"}, "request"),
        ({"context_window": -1}, "context_window"),
    ],
)
def test_a_bad_override_is_refused_at_load_by_model_and_unit(fields: dict[str, object], unit: str) -> None:
    with pytest.raises(PriceInvalid) as refused:
        build_price_book([override(**fields)])
    assert (refused.value.model, refused.value.unit) == ("gpt-4o-mini", unit)


def test_an_alias_still_has_the_catalogues_price() -> None:
    book = build_price_book([override()])
    assert book.lookup("gpt-4o-mini-2024-07-18", AT_US).rates[Unit.INPUT] == 150_000


def test_a_clause_of_the_source_is_matched_for_a_new_name() -> None:
    model = ModelInfo(id="m", match=ClauseStartsWith(starts_with="m-"), prices=price("1"))
    catalogue = GenaiCatalogue([Provider(id="anyone", name="x", api_pattern="x", models=[model])])
    assert catalogue.versions("m-2026", None)[0].model == "m"


def test_importing_pricing_does_not_import_the_slow_parts() -> None:
    names = [module.name for module in pkgutil.iter_modules(pricing.__path__)]
    program = "import sys\n" + "".join(f"import pricing.{name}\n" for name in names)
    program += "print([m for m in ('genai_prices', 'tiktoken', 'httpx', 'httpx2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
