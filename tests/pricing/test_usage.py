"""Each token is charged once, whatever dialect reports it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.usage import QUANTITY_MAX, Unit, Usage, UsageInvalid, usage_from_openai


def details(**parts: Any) -> dict[str, Any]:
    return {"prompt_tokens_details": parts}


REPORTS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "openai, plain": ({"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}, {"input": 9, "output": 12}),
    "openai, cached and reasoning": (
        {
            "prompt_tokens": 2006,
            "completion_tokens": 300,
            "total_tokens": 2306,
            "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 192,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        {"input": 86, "cached_input": 1920, "output": 108, "reasoning": 192},
    ),
    "openai, audio both ways": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "prompt_tokens_details": {"audio_tokens": 70},
            "completion_tokens_details": {"audio_tokens": 40},
        },
        {"input": 30, "input_audio": 70, "output": 10, "output_audio": 40},
    ),
    "openai, responses": (
        {
            "input_tokens": 36,
            "output_tokens": 87,
            "total_tokens": 123,
            "input_tokens_details": {"cached_tokens": 6},
            "output_tokens_details": {"reasoning_tokens": 80},
        },
        {"input": 30, "cached_input": 6, "output": 7, "reasoning": 80},
    ),
    "explicit zeros": ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, {}),
    "null details": (
        {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "prompt_tokens_details": None,
            "completion_tokens_details": {"reasoning_tokens": None},
        },
        {"input": 3, "output": 4},
    ),
    "deepseek": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 5,
            "prompt_cache_hit_tokens": 64,
            "prompt_cache_miss_tokens": 36,
            "total_tokens": 105,
        },
        {"input": 36, "cached_input": 64, "output": 5},
    ),
    "moonshot": (
        {"prompt_tokens": 100, "completion_tokens": 5, "cached_tokens": 40},
        {"input": 60, "cached_input": 40, "output": 5},
    ),
    "xai, reasoning outside completion": (
        {
            "prompt_tokens": 32,
            "completion_tokens": 9,
            "total_tokens": 135,
            "completion_tokens_details": {"reasoning_tokens": 94},
        },
        {"input": 32, "output": 9, "reasoning": 94},
    ),
    "reasoning inside completion although it is more than half": (
        {
            "prompt_tokens": 32,
            "completion_tokens": 103,
            "total_tokens": 135,
            "completion_tokens_details": {"reasoning_tokens": 94},
        },
        {"input": 32, "output": 9, "reasoning": 94},
    ),
    "openrouter, cache write": (
        {"prompt_tokens": 1000, "completion_tokens": 1, **details(cached_tokens=100, cache_write_tokens=800)},
        {"input": 100, "cached_input": 100, "cache_write": 800, "output": 1},
    ),
    "litellm, cache within the prompt, told twice": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 1,
            "total_tokens": 1001,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 800,
            **details(cached_tokens=100, cache_creation_tokens=800),
        },
        {"input": 100, "cached_input": 100, "cache_write": 800, "output": 1},
    ),
    "a total that proves the cache is beside the prompt": (
        {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 108, "cache_read_input_tokens": 100},
        {"input": 7, "cached_input": 100, "output": 1},
    ),
    "anthropic": (
        {
            "input_tokens": 21,
            "cache_creation_input_tokens": 2048,
            "cache_read_input_tokens": 188086,
            "output_tokens": 393,
        },
        {"input": 21, "cached_input": 188086, "cache_write": 2048, "output": 393},
    ),
    "anthropic, an hour's cache": (
        {
            "input_tokens": 21,
            "cache_creation_input_tokens": 500,
            "cache_read_input_tokens": 0,
            "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 352},
            "output_tokens": 3,
        },
        {"input": 21, "cache_write": 148, "cache_write_1h": 352, "output": 3},
    ),
    "embeddings": ({"prompt_tokens": 8, "total_tokens": 8}, {"input": 8}),
    "prompt missing, total known": ({"completion_tokens": 8, "total_tokens": 20}, {"input": 12, "output": 8}),
    "cached more than the prompt": (
        {"prompt_tokens": 5, "completion_tokens": 1, **details(cached_tokens=9)},
        {"cached_input": 5, "output": 1},
    ),
    "parts that overlap count as the first": (
        {"prompt_tokens": 10, "completion_tokens": 0, **details(cached_tokens=6, cache_write_tokens=3, audio_tokens=9)},
        {"cached_input": 6, "cache_write": 3, "input_audio": 1},
    ),
    "reasoning more than the completion": (
        {
            "prompt_tokens": 1,
            "completion_tokens": 5,
            "completion_tokens_details": {"reasoning_tokens": 9, "audio_tokens": 2},
        },
        {"input": 1, "reasoning": 5},
    ),
    "unknown fields": (
        {"prompt_tokens": 1, "completion_tokens": 1, "queue_time": 0.03, "cost": "x"},
        {"input": 1, "output": 1},
    ),
    "a total that nothing explains is not charged": (
        {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 50},
        {"input": 1, "output": 1},
    ),
}


@pytest.mark.parametrize(("report", "parts"), REPORTS.values(), ids=REPORTS.keys())
def test_a_report_is_read_into_disjoint_parts(report: dict[str, Any], parts: dict[str, int]) -> None:
    assert usage_from_openai(report).as_dict() == parts


def test_what_a_reasoning_model_leaves_unexplained_is_reasoning() -> None:
    gemini = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 130}
    assert usage_from_openai(gemini, hidden_reasoning=True) == Usage(input=10, output=20, reasoning=100)


def test_a_reported_zero_of_reasoning_is_believed() -> None:
    report: dict[str, Any] = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 130}
    report |= {"completion_tokens_details": {"reasoning_tokens": 0}}
    assert usage_from_openai(report, hidden_reasoning=True) == Usage(input=10, output=20)


BROKEN: list[Any] = [
    {},
    {"total_tokens": 5},
    {"prompt_tokens": None, "completion_tokens": None},
    {"prompt_tokens": -1, "completion_tokens": 1},
    {"prompt_tokens": 1.0, "completion_tokens": 1},
    {"prompt_tokens": "1", "completion_tokens": 1},
    {"prompt_tokens": True, "completion_tokens": 1},
    {"prompt_tokens": QUANTITY_MAX + 1, "completion_tokens": 1},
    {"prompt_tokens": 1, "completion_tokens": 10**400},
    {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": float("nan")},
    {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": 5},
    {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": [1]},
    {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": -3}},
    {"prompt_tokens": 1, "completion_tokens": 1, **details(cached_tokens=0), "cache_read_input_tokens": "many"},
    [],
    "usage",
    None,
]


@pytest.mark.parametrize("report", BROKEN)
def test_a_broken_report_is_refused(report: Any) -> None:
    with pytest.raises(UsageInvalid):
        usage_from_openai(report)


quantities = st.none() | st.integers(0, 1000)


@given(st.lists(quantities, min_size=8, max_size=8))
def test_parts_never_exceed_their_wholes(reported: list[int | None]) -> None:
    prompt, completion, cached, written, audio, reasoning, spoken, total = reported
    report = {
        "prompt_tokens": prompt or 0,
        "completion_tokens": completion,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written, "audio_tokens": audio},
        "completion_tokens_details": {"reasoning_tokens": reasoning, "audio_tokens": spoken},
    }
    usage = usage_from_openai(report)
    whole = total if total is not None else (prompt or 0) + (completion or 0)
    assert usage.input_total + usage.output_total <= max(whole, (prompt or 0) + (completion or 0))
    assert usage.input_total >= (prompt or 0)
    assert usage.output_total >= (completion or 0)


def test_adding_adds_every_unit() -> None:
    every = Usage(**{unit.value: 2**index for index, unit in enumerate(Unit)})
    assert every + every == Usage(**{unit.value: 2 ** (index + 1) for index, unit in enumerate(Unit)})
    assert every + Usage() == every


def test_every_unit_has_its_field() -> None:
    assert {unit.value for unit in Unit} == set(Usage.__struct_fields__)
    assert [unit for unit, _ in Usage().items()] == [Unit(name) for name in Usage.__struct_fields__]


def test_a_negative_quantity_cannot_be_made() -> None:
    with pytest.raises(UsageInvalid):
        Usage(input=5, output=-1)
