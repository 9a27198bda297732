"""What a request used: a quantity for each unit, in disjoint parts, so that each token is charged once.

How it works: providers report a whole (prompt, completion) and parts of it (cached, audio, reasoning);
`usage_from_openai` takes the parts out of the whole. A part that is larger than what is left of its whole is cut down
to it, in the order cached, cache write, audio and reasoning, audio: a token that is claimed twice is charged once, as
the first of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

import msgspec

QUANTITY_MAX = 10**8
"""More of any unit in one request than any model takes; a larger report is a broken report."""


class Unit(StrEnum):
    """What is priced. The values are the field names of Usage."""

    INPUT = "input"
    CACHED_INPUT = "cached_input"
    CACHE_WRITE = "cache_write"
    INPUT_AUDIO = "input_audio"
    OUTPUT = "output"
    REASONING = "reasoning"
    OUTPUT_AUDIO = "output_audio"
    IMAGE = "image"
    REQUEST = "request"
    CACHE_WRITE_1H = "cache_write_1h"


# Iterating an enum takes as long as the whole sum of a charge.
_UNITS = tuple(Unit)


class UsageInvalid(ValueError):
    """A provider's usage report that cannot be charged; `field` says where."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"usage{field and '.'}{field}: {message}")
        self.field = field


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Quantities by unit, all disjoint: `input` is without cached, cache writes and audio; `output` without reasoning
    and audio. Tokens, but for `image` (images) and `request` (provider calls).

    `cache_write_1h` are writes that a provider keeps for an hour, at a price of their own; `cache_write` all others.
    """

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    input_audio: int = 0
    output: int = 0
    reasoning: int = 0
    output_audio: int = 0
    image: int = 0
    request: int = 0
    cache_write_1h: int = 0

    def __post_init__(self) -> None:
        if min(msgspec.structs.astuple(self)) < 0:
            raise UsageInvalid("", "a quantity is negative")

    @property
    def input_total(self) -> int:
        """All tokens of the prompt; price tiers are chosen by it."""
        return self.input + self.cached_input + self.cache_write + self.cache_write_1h + self.input_audio

    @property
    def output_total(self) -> int:
        """All tokens of the answer, seen or not."""
        return self.output + self.reasoning + self.output_audio

    def items(self) -> Iterator[tuple[Unit, int]]:
        """Every unit with its quantity, in the order of Unit."""
        return zip(_UNITS, msgspec.structs.astuple(self), strict=True)

    def as_dict(self) -> dict[str, int]:
        """The parts that are not zero, by unit."""
        return {unit.value: quantity for unit, quantity in self.items() if quantity}

    def __add__(self, other: Usage) -> Usage:
        if not isinstance(other, Usage):
            return NotImplemented
        return Usage(**{unit.value: a + b for (unit, a), (_, b) in zip(self.items(), other.items(), strict=True)})


def usage_from_openai(report: Mapping[str, Any], *, hidden_reasoning: bool = False) -> Usage:
    """Read a provider's `usage` object, in the dialects of OpenAI (chat and responses), DeepSeek, xAI, Gemini,
    OpenRouter, LiteLLM and Anthropic. An explicit zero is a zero; null is «not reported».

    A synonym is looked up in a fixed order and the first that is reported counts. Tokens outside the whole are added
    only where the report's own `total_tokens` proves it (xAI's reasoning; a cache beside the prompt), or where
    Anthropic's names say so: its `input_tokens` are without the cache.

    Args:
        hidden_reasoning: the model is known to reason out of sight. If then no figure for reasoning is reported at all,
            what `total_tokens` holds beyond prompt and completion is reasoning (Gemini's OpenAI endpoint).

    Raises:
        UsageInvalid: a quantity is not an integer, is negative or more than QUANTITY_MAX, or neither prompt nor
            completion is reported.
    """
    if not isinstance(report, Mapping):
        raise UsageInvalid("", "must be an object")
    prompt_details = _details(report, "prompt_tokens_details", "input_tokens_details")
    completion_details = _details(report, "completion_tokens_details", "output_tokens_details")
    cached = _first(
        (prompt_details, "cached_tokens"),
        (report, "prompt_cache_hit_tokens"),
        (report, "cache_read_input_tokens"),
        (report, "cached_tokens"),
    )
    written = _first(
        (prompt_details, "cache_write_tokens"),
        (prompt_details, "cache_creation_tokens"),
        (report, "cache_creation_input_tokens"),
    )
    written_1h = _first(
        (_details(report, "cache_creation"), "ephemeral_1h_input_tokens"),
        (_details(prompt_details, "cache_creation_token_details"), "ephemeral_1h_input_tokens"),
    )
    reasoning = _first((completion_details, "reasoning_tokens"), (report, "reasoning_tokens"))
    total = _quantity(report, "total_tokens")
    prompt, completion = _wholes(report, total)

    cache = (cached or 0) + (written or 0)
    if cache and _cache_is_beside(report, prompt=prompt, completion=completion, cache=cache, total=total):
        prompt += cache
    beside = 0 if total is None else total - prompt - completion
    if reasoning is None and hidden_reasoning and beside > 0:
        reasoning = beside
    if reasoning and reasoning == beside:
        completion += reasoning

    cached_part, rest = _take(cached, prompt)
    written_part, rest = _take(written, rest)
    written_1h_part, written_part = _take(written_1h, written_part)
    audio_part, input_part = _take(_first((prompt_details, "audio_tokens")), rest)
    reasoning_part, rest = _take(reasoning, completion)
    output_audio_part, output_part = _take(_first((completion_details, "audio_tokens")), rest)
    return Usage(
        input=input_part,
        cached_input=cached_part,
        cache_write=written_part,
        cache_write_1h=written_1h_part,
        input_audio=audio_part,
        output=output_part,
        reasoning=reasoning_part,
        output_audio=output_audio_part,
    )


def _wholes(report: Mapping[str, Any], total: int | None) -> tuple[int, int]:
    """Prompt and completion; one that is missing is what the total leaves for it, else zero (embeddings)."""
    prompt = _first((report, "prompt_tokens"), (report, "input_tokens"))
    completion = _first((report, "completion_tokens"), (report, "output_tokens"))
    if prompt is None and completion is None:
        raise UsageInvalid("prompt_tokens", "neither prompt nor completion tokens are reported")
    if prompt is None:
        prompt = max(0, (total or 0) - (completion or 0))
    if completion is None:
        completion = max(0, (total or 0) - prompt)
    return prompt, completion


def _cache_is_beside(report: Mapping[str, Any], *, prompt: int, completion: int, cache: int, total: int | None) -> bool:
    """Whether cached and written tokens come on top of the prompt rather than within it."""
    if total is not None:
        return total == prompt + completion + cache
    names_of_anthropic = "cache_read_input_tokens" in report or "cache_creation_input_tokens" in report
    return names_of_anthropic and report.get("prompt_tokens") is None


def _take(part: int | None, whole: int) -> tuple[int, int]:
    taken = min(part or 0, whole)
    return taken, whole - taken


def _first(*places: tuple[Mapping[str, Any], str]) -> int | None:
    """The first quantity that is reported. All of them are checked, so that no order hides a broken one."""
    quantities = [_quantity(mapping, key) for mapping, key in places]
    return next((quantity for quantity in quantities if quantity is not None), None)


def _details(report: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = report.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise UsageInvalid(key, "must be an object")
        return value
    return {}


def _quantity(mapping: Mapping[str, Any], key: str) -> int | None:
    value = mapping.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageInvalid(key, "must be an integer")
    if not 0 <= value <= QUANTITY_MAX:
        raise UsageInvalid(key, f"must be 0..{QUANTITY_MAX}")
    return value
