"""Text to tokens: tiktoken's encodings, built from ranks that ship with this package, never from the network.

How it works: an encoding is built when it is first needed (about 0.3 s for o200k_base) and kept. Text is always encoded
as ordinary text: `<|endoftext|>` in a message is characters, not a control token.

tiktoken's pattern engine gives up on very long runs of white space (a megabyte of spaces panics), and no context
takes what is megabytes long. So a long text is encoded in pieces, cut where no token can span: between a letter or
digit and a character that is neither, nor a mark or an apostrophe. There the pieces' counts add up to the exact count.
Only where a piece of CHUNK_CHARS has no such place (a run of one kind of character) it is cut anywhere, which may move
the count by a few tokens either way.
"""

from __future__ import annotations

import binascii
import hashlib
import lzma
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiktoken import Encoding

FALLBACK_ENCODING = "o200k_base"
"""For every model whose tokeniser is not known: most vocabularies of today are about as fine."""

CHUNK_CHARS = 32_768
"""Characters that are given to tiktoken at once."""

EXACT_CHARS_MAX = 8 * 2**20
"""Of a longer text the rest counts one token a byte, an upper bound: no model reads that much."""

THREAD_BYTES_MIN = 32_768
"""From here on counting takes longer than an event loop should wait (about 2 ms)."""

# The first prefix that fits, after tiktoken's own table; vocabularies that no chat model uses are left out.
_ENCODING_BY_PREFIX: Sequence[tuple[str, str]] = (
    ("gpt-4o", "o200k_base"),
    ("gpt-4.", "o200k_base"),
    ("gpt-4", "cl100k_base"),
    ("gpt-3.5", "cl100k_base"),
    ("gpt-35", "cl100k_base"),
    ("text-embedding-", "cl100k_base"),
    ("davinci-002", "cl100k_base"),
    ("babbage-002", "cl100k_base"),
)

_SHA256: Mapping[str, str] = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}

# The patterns are tiktoken's, from tiktoken_ext.openai_public; a test holds them equal.
_PATTERN: Mapping[str, str] = {
    "o200k_base": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
    "cl100k_base": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
        r"""|\s+(?!\S)|\s"""
    ),
}

# A letter or digit, then a character of which we know in every version of Unicode that it is no letter, number, mark
# or apostrophe: ASCII, Latin-1, general punctuation, and the punctuation of Arabic, Devanagari, CJK and full-width.
_BOUNDARY = re.compile(
    r"[^\W_](?=[\x00-&(-/:-@\[-`{-\x7f\u00a0-\u00a9\u00ab-\u00b1\u060c\u061b\u061f\u0964\u0965\u2000-\u206f"
    r"\u3000-\u3004\u3008-\u3020\uff01-\uff06\uff08-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65])"
)
_BOUNDARY_WINDOWS = (64, 1024)


def encoding_for(model: str) -> str:
    """The name of the encoding of a model; FALLBACK_ENCODING where it is not known."""
    name = model.lower().rpartition("/")[2].removeprefix("ft:")
    return next((encoding for prefix, encoding in _ENCODING_BY_PREFIX if name.startswith(prefix)), FALLBACK_ENCODING)


@cache
def encoding(name: str) -> Encoding:
    """The encoding of this name, one of those that ship with the package; built once.

    Raises:
        ValueError: the shipped ranks are damaged.
    """
    from tiktoken import Encoding  # noqa: PLC0415 - a process that counts nothing need not load it

    packed = resources.files("pricing").joinpath("ranks", f"{name}.tiktoken.xz").read_bytes()
    listing = lzma.decompress(packed)
    if hashlib.sha256(listing).hexdigest() != _SHA256[name]:
        raise ValueError(f"the token ranks of {name} are damaged; install the package again")
    words = listing.split()
    ranks = dict(zip(map(binascii.a2b_base64, words[::2]), map(int, words[1::2]), strict=True))
    # Special tokens are left out: text is only ever encoded as ordinary text.
    return Encoding(name, pat_str=_PATTERN[name], mergeable_ranks=ranks, special_tokens={})


def warm(models: Sequence[str] = ("",)) -> None:
    """Build the encodings of these models (by default the fallback) now rather than in the first request."""
    for model in models:
        encoding(encoding_for(model))


def needs_thread(total_bytes: int) -> bool:
    """Whether counting this much text should leave the event loop. tiktoken releases the interpreter's lock."""
    return total_bytes >= THREAD_BYTES_MIN


def count_text(text: str, encoding_name: str) -> int:
    """The tokens of a text: exact, but as the module says of very long runs and texts. Time is linear in the length."""
    ordinary = encoding(encoding_name).encode_ordinary
    if len(text) <= CHUNK_CHARS:
        return len(ordinary(text)) if text else 0
    tokens = 0
    start = 0
    end = min(len(text), EXACT_CHARS_MAX)
    while end - start > CHUNK_CHARS:
        chunk = text[start : start + CHUNK_CHARS]
        cut = last_boundary(chunk) or CHUNK_CHARS
        tokens += len(ordinary(chunk[:cut]))
        start += cut
    return tokens + len(ordinary(text[start:end])) + utf8_length(text[end:])


def last_boundary(text: str) -> int:
    """The last place in the text that no token spans whatever follows it; 0 if there is none."""
    for window in (*_BOUNDARY_WINDOWS, len(text)):
        offset = max(0, len(text) - window)
        end = 0
        for match in _BOUNDARY.finditer(text, offset):
            end = match.end()
        if end:
            return end
    return 0


def utf8_length(text: str) -> int:
    """Bytes of the text in UTF-8: at least its tokens. A lone surrogate counts as what replaces it, three bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
