"""What is known of models by their names, where the price data says nothing: the longest answer, hidden reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

# The most a model answers with, as its maker's model page says; the first pattern that fits. None: not known.
_MAX_OUTPUT_TOKENS: Sequence[tuple[str, int]] = (
    ("gpt-4o-2024-05-13", 4_096),
    ("gpt-4o*", 16_384),
    ("chatgpt-4o*", 16_384),
    ("gpt-4.1*", 32_768),
    ("gpt-4.5*", 16_384),
    ("gpt-5-chat*", 16_384),
    ("gpt-5*", 128_000),
    ("o1-preview*", 32_768),
    ("o1-mini*", 65_536),
    ("o1*", 100_000),
    ("o3*", 100_000),
    ("o4-mini*", 100_000),
    ("gpt-4-turbo*", 4_096),
    ("gpt-4-1106*", 4_096),
    ("gpt-4-0125*", 4_096),
    ("gpt-4-vision*", 4_096),
    ("gpt-4*", 8_192),
    ("gpt-3.5*", 4_096),
    ("claude-3-5-*", 8_192),
    ("claude-3-*", 4_096),
    ("gemini-1.5*", 8_192),
    ("gemini-2.0*", 8_192),
    ("gemini-2.5*", 65_536),
)

# Whether a model charges for tokens that it does not show; the first pattern that fits, else not.
_HIDDEN_REASONING: Sequence[tuple[str, bool]] = (
    ("gpt-5-chat*", False),
    ("*non-reasoning*", False),
    ("o1*", True),
    ("o3*", True),
    ("o4*", True),
    ("codex-mini*", True),
    ("gpt-5*", True),
    ("gpt-oss*", True),
    ("deepseek-reasoner*", True),
    ("deepseek-r1*", True),
    ("*thinking*", True),
    ("*reasoning*", True),
    ("gemini-2.5*", True),
    ("gemini-3*", True),
    ("grok-3-mini*", True),
    ("grok-4*", True),
    ("magistral*", True),
    ("qwq*", True),
)


def hidden_reasoning_of(model: str) -> bool:
    """Whether a model of this name is known to charge for tokens that it does not show."""
    name = _bare(model)
    return next((hidden for pattern, hidden in _HIDDEN_REASONING if fnmatchcase(name, pattern)), False)


def max_output_tokens_of(model: str) -> int | None:
    """The most tokens that a model of this name answers with, where that is known."""
    name = _bare(model)
    return next((tokens for pattern, tokens in _MAX_OUTPUT_TOKENS if fnmatchcase(name, pattern)), None)


def _bare(model: str) -> str:
    """The name without the path that resellers put before it ("openai/o3")."""
    return model.lower().rpartition("/")[2]
