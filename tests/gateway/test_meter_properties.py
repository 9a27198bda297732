"""Properties of the meter for any stream, cut into any pieces, under any cover."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from gateway.proxy.meter import StreamMeter
from pricing.encodings import count_text
from pricing.tokens import TextCounter
from pricing.usage import Usage

UNLIMITED = 2**62
QUOTA = {"cost": "1", "balance": "2"}

TEXTS = st.one_of(
    st.sampled_from(
        [" the", " meter", "counts", ". ", "\n\n", "中文字", "。", "🎉", "👩‍👩‍👧", "e\u0301", '"', "\\", "'ll", "  "]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
CHOICE = st.integers(0, 2)


def delta(index: int, fields: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": fields, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "created": 1, "model": "m", "choices": [choice], **more}


def call(index: int, part: int, name: str | None, arguments: str) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": name} if name is not None else {})}
    return delta(index, {"tool_calls": [{"index": part, "function": function}]})


USAGES = st.builds(
    lambda prompt, completion: {"prompt_tokens": prompt, "completion_tokens": completion}, CHOICE, st.integers(0, 9)
)
CHUNKS = st.one_of(
    st.builds(lambda index, text: delta(index, {"content": text}), CHOICE, TEXTS),
    st.builds(lambda text: delta(0, {"content": text}), TEXTS),
    st.builds(lambda index, text: delta(index, {"reasoning_content": text}), CHOICE, TEXTS),
    st.builds(call, CHOICE, st.integers(0, 1), st.none() | st.just("search"), TEXTS),
    st.builds(lambda index: delta(index, {"role": "assistant", "content": ""}), CHOICE),
    st.builds(lambda index, text: delta(index, {"content": text}, "stop"), CHOICE, st.just("") | TEXTS),
    st.builds(lambda usage: {"id": "chatcmpl-1", "created": 1, "model": "m", "choices": [], "usage": usage}, USAGES),
    st.builds(lambda text, usage: delta(0, {"content": text}, usage=usage), TEXTS, USAGES),
    st.builds(lambda text: delta(0, {"content": text}, usage=None), TEXTS),
)
END_OF_LINE = st.sampled_from([b"\n", b"\r\n", b"\r"])


@dataclass(frozen=True)
class Event:
    """One event as sent, and the chunk in it, None when it is a comment."""

    raw: bytes
    chunk: dict[str, Any] | None


def as_event(chunk: dict[str, Any], ascii_only: bool, end: bytes) -> Event:
    return Event(b"data: " + json.dumps(chunk, ensure_ascii=ascii_only).encode() + end + end, chunk)


EVENTS = st.one_of(
    st.builds(as_event, CHUNKS, st.booleans(), st.just(b"\n")),
    st.builds(as_event, CHUNKS, st.booleans(), END_OF_LINE),
    st.builds(lambda end: Event(b": ping" + end + end, None), END_OF_LINE),
)
STREAMS = st.lists(EVENTS, max_size=30)
DONE = Event(b"data: [DONE]\n\n", None)


@st.composite
def cut_up(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[start:end] for start, end in itertools.pairwise([0, *places, len(data)])]


def parsed(data: bytes) -> Iterator[dict[str, Any]]:
    """The chunks in *data*, by the rules of server-sent events."""
    for raw in data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        lines = [line.removeprefix(b"data: ") for line in raw.split(b"\n") if line.startswith(b"data: ")]
        if lines and lines != [b"[DONE]"]:
            yield json.loads(b"\n".join(lines))


def texts(data: bytes) -> dict[Any, str]:
    """Every text of an answer, put together from what a client got."""
    found: dict[Any, str] = defaultdict(str)
    for chunk in parsed(data):
        for choice in chunk["choices"]:
            index, fields = choice["index"], choice["delta"]
            found[index, "content"] += fields.get("content") or ""
            found[index, "reasoning"] += fields.get("reasoning_content") or ""
            for tool in fields.get("tool_calls", ()):
                found[index, tool["index"]] += (tool["function"].get("name") or "") + tool["function"]["arguments"]
    return found


def tokens(data: bytes) -> int:
    return sum(count_text(text, "o200k_base") for text in texts(data).values())


def without_usage(chunk: dict[str, Any]) -> dict[str, Any]:
    return {**chunk, "usage": None}


def expected(stream: list[Event], *, wants_usage: bool) -> list[dict[str, Any]]:
    """What a client is to get of a finished stream before its last bytes, chunk by chunk."""
    chunks = [each.chunk for each in stream if each.chunk is not None]
    got: list[dict[str, Any]] = []
    for place, chunk in enumerate(chunks):
        if not chunk.get("usage") or (wants_usage and place < len(chunks) - 1):
            got.append(chunk)
        elif chunk["choices"]:
            got.append(without_usage(chunk))
    return got


@given(st.data(), STREAMS, st.booleans())
def test_whatever_the_pieces_a_finished_stream_passes_whole(
    data: st.DataObject, stream: list[Event], wants_usage: bool
) -> None:
    meter = StreamMeter(TextCounter, wants_usage=wants_usage, hidden_reasoning=False)
    passed = b""
    for piece in data.draw(cut_up(b"".join(each.raw for each in [*stream, DONE]))):
        meter.feed(piece)
        passed += meter.take(UNLIMITED)
        assert not meter.waiting
    assert meter.finished
    assert list(parsed(passed)) == expected(stream, wants_usage=wants_usage)
    if not any(each.chunk and each.chunk.get("usage") for each in stream):
        assert passed == b"".join(each.raw for each in stream)
    meter.measure()
    assert sum(meter.passed) == tokens(passed)
    assert tokens(passed) == tokens(b"".join(each.raw for each in stream))
    _check_ending(meter.ending(Usage(), QUOTA), wants_usage=wants_usage, ends=0)


@settings(deadline=None)
@given(st.data(), STREAMS, st.booleans(), st.integers(0, 60), st.booleans())
def test_nothing_uncovered_passes_and_what_is_stopped_ends_well_formed(
    data: st.DataObject, stream: list[Event], wants_usage: bool, covered: int, exact: bool
) -> None:
    """As the journey does it: more cover in steps, then the last stretch, then the cut."""
    meter = StreamMeter(TextCounter, wants_usage=wants_usage, hidden_reasoning=False)
    meter.exact = exact
    steps = data.draw(st.lists(st.integers(1, 20), max_size=3))
    passed = b""
    dry = False
    for piece in data.draw(cut_up(b"".join(each.raw for each in [*stream, DONE]))):
        meter.feed(piece)
        while True:
            passed += meter.take(covered)
            assert tokens(passed) <= meter.bound
            assert tokens(passed) <= covered
            if not meter.waiting:
                break
            needed = meter.needed
            assert needed > covered
            if steps:
                covered += steps.pop()
            elif not meter.exact:
                meter.exact = True
            else:
                passed += meter.cut(covered)
                dry = True
                break
        if dry:
            break
    assert tokens(passed) <= covered
    meter.measure()
    assert sum(meter.passed) == tokens(passed)
    sent = texts(b"".join(each.raw for each in stream))
    assert all(sent[place].startswith(text) for place, text in texts(passed).items())
    event("dry" if dry else "finished")
    if not dry:
        assert meter.finished
        return
    got = list(parsed(passed))
    seen = {choice["index"] for chunk in got for choice in chunk["choices"]}
    ended = {choice["index"] for chunk in got for choice in chunk["choices"] if choice["finish_reason"]}
    ending = meter.cut_short(Usage(input=1, output=2), QUOTA, {"code": "insufficient_credits"})
    _check_ending(ending, wants_usage=wants_usage, ends=len(seen - ended) if seen else 1)


def _check_ending(ending: bytes, *, wants_usage: bool, ends: int) -> None:
    assert ending.endswith(b"data: [DONE]\n\n")
    chunks = list(parsed(ending))
    assert len(chunks) == ends + wants_usage
    for chunk in chunks[:ends]:
        assert [choice["finish_reason"] for choice in chunk["choices"]] == ["length"]
    if wants_usage:
        assert chunks[-1]["choices"] == []
        assert QUOTA.items() <= chunks[-1]["usage"].items()


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=20), st.integers(0, 200))
def test_of_what_is_covered_a_cut_leaves_next_to_nothing(words: list[str], covered: int) -> None:
    text = "".join(words * 8)
    meter = StreamMeter(TextCounter, wants_usage=False, hidden_reasoning=False)
    meter.exact = True
    raw = as_event(delta(0, {"content": text}), False, b"\n").raw
    meter.feed(raw)
    passed = meter.take(covered)
    if meter.waiting:
        passed += meter.cut(covered)
    used = tokens(passed)
    assert used <= covered
    delivered = texts(passed)[0, "content"]
    if delivered != text:
        more = text[: len(delivered) + 1]
        assert count_text(more, "o200k_base") > covered
