"""Texts to tokens, offline: tiktoken's own results, in time that is linear in the length."""

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken_ext.openai_public  # type: ignore[import-untyped]
from hypothesis import example, given
from hypothesis import strategies as st

from pricing import encodings
from pricing.encodings import (
    CHUNK_CHARS,
    EXACT_CHARS_MAX,
    count_text,
    encoding,
    encoding_for,
    last_boundary,
    needs_thread,
    utf8_length,
    warm,
)

NAMES = ["o200k_base", "cl100k_base"]

# Texts in the scripts and with the punctuation of the world, and what tokenisers stumble over.
SAMPLES = [
    "The quick brown fox, jumps over the lazy dog's back; don't you SEE? I'LL 'tis 123456 times.\n\n\tdef f(x): x\n",
    "Zażółć gęślą jaźń — «cytat» „dolny”… 12,5 % „x”",
    "Привет, мир! Как дела? Это — тест №5.\r\n",
    "今天天气很好，我们去公园吧。你觉得怎么样？（好的！）「テスト」です。カタカナ、ひらがな。",
    "สวัสดีครับ ผมชื่อสมชาย ยินดีที่ได้รู้จัก",
    "مرحبا، كيف حالك؟ أنا بخير؛ شكرا.",
    "नमस्ते, आप कैसे हैं? मैं ठीक हूँ। धन्यवाद॥",
    "e\u0301a\u0308 a\u0301, \u0301x '\u0301s x'\u0301",
    "👩‍👩‍👧‍👦🏳️‍🌈 emoji 😀😀 x²y³ ½ Ⅷ ªº ǅ ʰ",
    "   leading\n\n\n   spaces \t \t tabs\u00a0nbsp\u3000wide \u200b zero\u200dwidth",
    '{"name":"get_weather","arguments":"{\\"city\\":\\"Paris\\",\\"n\\":[1,2,3]}"}',
    "https://example.com/a_b-c/d.e?f=g&h=%20i#j snake_case camelCase HTTPServer __init__ a'b'c 'S 'LL x'RE",
    "<|endoftext|><|im_start|>system<|endofprompt|>",
]


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("o200k_base", "hello world", [24912, 2375]),
        ("cl100k_base", "hello world", [15339, 1917]),
        ("cl100k_base", "tiktoken is great!", [83, 1609, 5963, 374, 2294, 0]),
    ],
)
def test_known_facts(name: str, text: str, tokens: list[int]) -> None:
    assert encoding(name).encode_ordinary(text) == tokens
    assert count_text(text, name) == len(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_the_patterns_and_the_hashes_are_tiktokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[str | None] = []

    def load(_: str, expected_hash: str | None = None) -> dict[bytes, int]:
        expected.append(expected_hash)
        return {}

    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", load)
    constructor: Callable[[], dict[str, Any]] = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]
    assert constructor()["pat_str"] == encodings._PATTERN[name]
    assert expected == [encodings._SHA256[name]]


def test_loading_touches_neither_the_network_nor_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = encoding.__wrapped__("cl100k_base")
    assert loaded.encode_ordinary("hello world") == [15339, 1917]
    assert list(tmp_path.iterdir()) == []


def test_damaged_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_SHA256", {"cl100k_base": "0" * 64})
    with pytest.raises(ValueError, match="damaged"):
        encoding.__wrapped__("cl100k_base")


def test_an_encoding_is_built_once() -> None:
    warm(["gpt-4o", "gpt-4"])
    assert encoding("o200k_base") is encoding("o200k_base")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-turbo-2024-04-09", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("ft:gpt-3.5-turbo:acme::x", "cl100k_base"),
        ("ft:gpt-4o:acme::x", "o200k_base"),
        ("openai/gpt-4", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("claude-sonnet-4-5", "o200k_base"),
        ("anything", "o200k_base"),
        ("", "o200k_base"),
    ],
)
def test_the_encoding_of_a_model(model: str, name: str) -> None:
    assert encoding_for(model) == name


def test_control_tokens_in_a_text_are_characters() -> None:
    assert count_text("<|endoftext|>", "o200k_base") == 7
    assert count_text("<|im_start|>", "cl100k_base") > 1


# Letters, digits, marks and punctuation of many scripts, densely mixed.
texts = st.text(
    alphabet=st.one_of(
        st.sampled_from("aZ'sS tTlL\n\r\t ,.!_-/1²½٣\u0301\u200d\u00a0\u3000，。文ひกé😀ªǅʰ〇々"),
        st.characters(),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", NAMES)
@given(text=texts)
@example(text="x'll 'S, y")
def test_no_token_spans_a_boundary(name: str, text: str) -> None:
    """At every place that the pattern allows, not only the last: the counts of both sides add up."""
    whole = encoding(name).encode_ordinary(text)
    for match in encodings._BOUNDARY.finditer(text):
        before, after = text[: match.end()], text[match.end() :]
        assert encoding(name).encode_ordinary(before) + encoding(name).encode_ordinary(after) == whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sample", SAMPLES)
def test_a_long_text_counts_exactly_though_it_is_cut(name: str, sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample * 40
    for chars in (64, 257):
        monkeypatch.setattr(encodings, "CHUNK_CHARS", chars)
        assert count_text(whole, name) == len(encoding(name).encode_ordinary(whole))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", ["a", " ", "\n", "!", "文", "😀", "\u3000 ", "\u0301", "=", "A"])
def test_a_run_without_a_safe_place_is_counted_within_a_few_tokens(name: str, run: str) -> None:
    text = run * (2 * CHUNK_CHARS // len(run) + 10)
    exact = len(encoding(name).encode_ordinary(text))
    assert abs(count_text(text, name) - exact) <= 2 * (len(text) // CHUNK_CHARS)


def test_a_megabyte_of_spaces_does_not_panic() -> None:
    assert 0 < count_text(" " * 1_000_000, "o200k_base") < 20_000


def test_what_no_model_reads_counts_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "EXACT_CHARS_MAX", CHUNK_CHARS)
    beyond = "é " * 50
    text = "a " * (CHUNK_CHARS // 2) + beyond
    assert count_text(text, "o200k_base") == count_text("a " * (CHUNK_CHARS // 2), "o200k_base") + len(beyond.encode())
    assert EXACT_CHARS_MAX >= 2**20


def test_lone_surrogates_are_counted_not_raised() -> None:
    assert count_text("a\ud83db", "o200k_base") > 0
    assert utf8_length("a\ud83db") == 5


@given(st.text())
def test_tokens_are_at_most_the_bytes(text: str) -> None:
    assert count_text(text, "o200k_base") <= utf8_length(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [("", 0), ("word", 0), ("two words", 3), ("two words, ok", 9), (" " * 9, 0), ("a" + "文" * 3000, 0)],
)
def test_the_last_boundary(text: str, place: int) -> None:
    assert last_boundary(text) == place


def test_a_boundary_far_back_is_found() -> None:
    assert last_boundary("ab " + "c" * 5000) == 2


def test_long_texts_leave_the_loop() -> None:
    assert not needs_thread(1_000)
    assert needs_thread(100_000)
