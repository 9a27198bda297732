"""The texts in a chunk of a stream: where they stand, whose token counter each belongs to, and how to cut them short.

A whole answer is one large chunk to this module: what stands in a ``delta`` there stands in a ``message``.

How it works. ``read_chunk`` parses a chunk. Nearly all chunks of a stream differ in one text only, so ``Skeletons``
remember the bytes around it: where these come again, the text between them is all there is to know, and nothing is
parsed. That a skeleton holds is proved when it is learnt, by parsing it with another text in it.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

SKELETONS_MAX: Final = 4
"""Choices, reasoning and tool calls that take turns."""

LESSONS_MAX: Final = 16
"""A stream whose chunks never repeat themselves is parsed, and is not tried to be learnt from for ever."""

_DECODER: Final = msgspec.json.Decoder()
_ENCODER: Final = msgspec.json.Encoder()
_NOT_A_CHUNK: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, AttributeError, TypeError)
_PROBE: Final = "probe"
_STEP_CHARS: Final = 16

_DELTA_TEXTS: Final = (
    ("content", "text", 0),
    ("refusal", "text", 1),
    ("reasoning_content", "reasoning", 0),
    ("reasoning", "reasoning", 0),
)
_CALL_TEXTS: Final = (("function", ("name", "arguments")), ("custom", ("name", "input")))


class Place(NamedTuple):
    """Which text of the answer a piece goes on with: a choice's text, its reasoning, or one of its tool calls."""

    kind: str
    choice: int
    part: int


class Piece(NamedTuple):
    """A piece of a text; *size* is its length in bytes, which its tokens cannot exceed."""

    place: Place
    text: str
    size: int


class Chunk(NamedTuple):
    """A chunk's pieces, and the finish reason of every choice in it, None of those that go on."""

    pieces: tuple[Piece, ...]
    finish_reasons: dict[int, str | None]


class _Field(NamedTuple):
    place: Place
    holder: dict[str, Any]
    key: str


def read_chunk(data: bytes) -> Chunk:
    """Find the texts of a chunk. Of what is no chunk that we know, everything is text: it is delivered as well."""
    try:
        whole = _DECODER.decode(data)
        pieces = tuple(_piece(place, holder[key]) for place, holder, key in _fields(whole))
        finish_reasons = {choice.get("index", 0): choice.get("finish_reason") for choice in whole.get("choices") or ()}
    except _NOT_A_CHUNK:
        return Chunk((_piece(Place("text", 0, 0), data.decode("utf-8", "replace")),), {})
    return Chunk(pieces, finish_reasons)


def _fields(whole: dict[str, Any]) -> list[_Field]:
    """Where the texts of a chunk are, in the order in which they count."""
    found: list[_Field] = []

    def add(place: Place, holder: dict[str, Any] | None, key: str) -> None:
        if holder and holder.get(key):
            found.append(_Field(place, holder, key))

    for choice in whole.get("choices") or ():
        index = choice.get("index", 0)
        add(Place("text", index, 0), choice, "text")
        delta = choice.get("delta") or choice.get("message")
        if not delta:
            continue
        for key, kind, part in _DELTA_TEXTS:
            add(Place(kind, index, part), delta, key)
        for position, call in enumerate(delta.get("tool_calls") or ()):
            for holder, keys in _CALL_TEXTS:
                for key in keys:
                    add(Place("tool", index, call.get("index", position)), call.get(holder), key)
        for key in ("name", "arguments"):
            add(Place("tool", index, -1), delta.get("function_call"), key)
    return found


def _piece(place: Place, value: Any) -> Piece:
    text = value if isinstance(value, str) else _ENCODER.encode(value).decode()
    return Piece(place, text, len(text) if text.isascii() else len(text.encode()))


class _Skeleton(NamedTuple):
    before: bytes
    after: bytes
    length: int
    place: Place


class Skeletons:
    """What the chunks of one stream have in common."""

    __slots__ = ("_known", "_lessons")

    def __init__(self) -> None:
        self._known: tuple[_Skeleton, ...] = ()
        self._lessons = 0

    def match(self, data: bytes) -> Piece | None:
        """The only piece of a chunk that is otherwise known, with no usage and no end; None when it must be parsed."""
        for before, after, length, place in self._known:
            if data.startswith(before) and data.endswith(after) and len(data) >= length:
                text = data[len(before) : len(data) - len(after)]
                if b'"' in text or b"\\" in text:
                    return None
                try:
                    return Piece(place, text.decode(), len(text))
                except UnicodeDecodeError:
                    return None
        return None

    def learn(self, data: bytes, chunk: Chunk) -> None:
        """Remember the bytes around the only text of a chunk."""
        if self._lessons == LESSONS_MAX or len(chunk.pieces) != 1 or any(chunk.finish_reasons.values()):
            return
        self._lessons += 1
        place, text, _ = chunk.pieces[0]
        quoted = b'"' + text.encode() + b'"'
        start = data.rfind(quoted)
        if start < 0:
            return
        before, after = data[: start + 1], data[start + len(quoted) - 1 :]
        probed = read_chunk(before + _PROBE.encode() + after)
        if probed == Chunk((_piece(place, _PROBE),), chunk.finish_reasons):
            skeleton = _Skeleton(before, after, len(before) + len(after), place)
            self._known = (skeleton, *self._known)[:SKELETONS_MAX]


def cut_chunk(data: bytes, fits: Callable[[list[Piece]], bool]) -> tuple[bytes, Chunk] | None:
    """As much of the beginning of a chunk's texts as *fits*, in a chunk that ends nothing; None where nothing does."""
    try:
        whole = _DECODER.decode(data)
        fields = _fields(whole)
    except _NOT_A_CHUNK:
        return None
    kept: list[Piece] = []
    full = False
    for field in fields:
        text, start = field.holder[field.key], ""
        if not full and isinstance(text, str):
            start = _start_after(kept, field.place, text, fits)
        if start:
            kept.append(_piece(field.place, start))
        full = full or start != text
        field.holder[field.key] = start
    if not kept:
        return None
    for choice in whole["choices"]:
        choice.update(finish_reason=None, logprobs=None)
    if "usage" in whole:
        whole["usage"] = None
    going_on = dict.fromkeys(choice.get("index", 0) for choice in whole["choices"])
    return b"data: " + _ENCODER.encode(whole) + b"\n\n", Chunk(tuple(kept), going_on)


def _start_after(kept: list[Piece], place: Place, text: str, fits: Callable[[list[Piece]], bool]) -> str:
    return longest_start(text, lambda start: fits([*kept, _piece(place, start)]))


def longest_start(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of *text* that *fits*, found by asking for few that are much longer than it."""
    low, step = 0, _STEP_CHARS
    while low < len(text) and fits(text[: low + step]):
        low += step
        step *= 2
    high = min(low + step, len(text) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(text[:middle]):
            low = middle
        else:
            high = middle
    return text[:low]
