"""The SSE decoder: the same events however the bytes were cut, and not one byte lost."""

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy.sse import SSEDecoder, SSEEvent, SSETooLarge

BOM = b"\xef\xbb\xbf"
PIECES = [b"data: ", b"data", b":", b" ", b"\n", b"\r", b"\r\n", b"x", BOM, b"[DONE]"]

# what came -> (the data of each event), what is left when the stream is closed
STREAMS: dict[str, tuple[bytes, list[bytes | None], bytes]] = {
    "nothing": (b"", [], b""),
    "one event": (b'data: {"a":1}\n\n', [b'{"a":1}'], b""),
    "two events": (b"data: a\n\ndata: b\n\n", [b"a", b"b"], b""),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"], b""),
    "cr": (b"data: a\r\rdata: b\r\r", [b"a", b"b"], b""),
    "line ends mixed": (b"data: a\n\r\ndata: b\r\n\ndata: c\r\r\ndata: d\n\r", [b"a", b"b", b"c", b"d"], b""),
    "crlf is one line end": (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"], b""),
    "several data lines": (b"data: a\ndata: b\ndata:\ndata: c\n\n", [b"a\nb\n\nc"], b""),
    "one space is taken off": (b"data:a\n\ndata:  b\n\n", [b"a", b" b"], b""),
    "data without a colon": (b"data\n\n", [b""], b""),
    "comment": (b": keep-alive\n\ndata: a\n\n", [None, b"a"], b""),
    "comment within": (b": why\ndata: a\n: because\n\n", [b"a"], b""),
    "other fields": (b"event: error\nid: 7\nretry: 10\ndata: a\n\n", [b"a"], b""),
    "unknown fields": (b"datum: x\ndata : y\n data: z\ngarbage\n\n", [None], b""),
    "extra blank lines": (b"data: a\n\n\ndata: b\n\n\n\ndata: c\n\n", [b"a", b"b", None, b"c"], b""),
    "bom at the start": (BOM + b"data: a\n\ndata: b\n\n", [b"a", b"b"], b""),
    "bom later is no bom": (b"data: a\n\n" + BOM + b"data: b\n\n", [b"a", None], b""),
    "unterminated": (b"data: a\n\ndata: b\n", [b"a"], b"data: b\n"),
    "unterminated line": (b"data: [DONE]", [], b"data: [DONE]"),
    "unterminated crlf": (b"data: a\r\n", [], b"data: a\r\n"),
    "line ends of other alphabets": ("data: a\u2028b\x0bc\x85\n\n".encode(), ["a\u2028b\x0bc\x85".encode()], b""),
    "not utf-8": (b"data: \xff\xfe\n\n", [b"\xff\xfe"], b""),
}


def decode(parts: list[bytes]) -> tuple[list[SSEEvent], bytes]:
    decoder = SSEDecoder()
    events = [event for part in parts for event in decoder.feed(part)]
    events += decoder.close()
    return events, decoder.remainder


def cut(stream: bytes, positions: list[int]) -> list[bytes]:
    edges = [0, *sorted(positions), len(stream)]
    return [stream[left:right] for left, right in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", STREAMS)
def test_the_events_are_the_same_at_every_split(name: str) -> None:
    stream, data, remainder = STREAMS[name]
    whole, left = decode([stream])
    assert [event.data for event in whole] == data
    assert left == remainder
    for one in range(len(stream) + 1):
        for two in range(one, len(stream) + 1):
            assert decode(cut(stream, [one, two])) == (whole, left), (one, two)
    assert decode([bytes([byte]) for byte in stream]) == (whole, left)


@pytest.mark.parametrize("name", STREAMS)
def test_no_byte_is_lost(name: str) -> None:
    stream = STREAMS[name][0]
    events, remainder = decode([stream])
    assert b"".join(event.raw for event in events) + remainder == stream


@given(st.lists(st.sampled_from(PIECES), max_size=40), st.lists(st.integers(0, 200), max_size=8))
def test_any_bytes_at_any_split(pieces: list[bytes], positions: list[int]) -> None:
    stream = b"".join(pieces)
    whole, remainder = decode([stream])
    assert decode(cut(stream, [min(position, len(stream)) for position in positions])) == (whole, remainder)
    assert b"".join(event.raw for event in whole) + remainder == stream


def test_an_event_is_out_with_its_last_byte() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\n") == [SSEEvent(b"data: a\n\n", b"a")]
    assert decoder.feed(b"data: b\n\n") == [SSEEvent(b"data: b\n\n", b"b")]
    assert decoder.remainder == b""


def test_the_remainder_is_what_has_not_ended() -> None:
    decoder = SSEDecoder()
    decoder.feed(b"data: a\n\ndata: b")
    assert decoder.remainder == b"data: b"


def test_lf_after_a_crlf_event() -> None:
    decoder = SSEDecoder()
    decoder.feed(b"data: a\r\n\r\n")
    assert [event.data for event in decoder.feed(b"data: b\n\n")] == [b"b"]


@pytest.mark.parametrize(
    ("raw", "is_done"),
    [
        (b"data: [DONE]\n\n", True),
        (b"data:[DONE]\r\n\r\n", True),
        (b"data:   [DONE]  \n\n", True),
        (b'data: {"content":"[DONE]"}\n\n', False),
        (b"data: [DONE][DONE]\n\n", False),
        (b": [DONE]\n\n", False),
    ],
)
def test_done(raw: bytes, is_done: bool) -> None:
    [event] = SSEDecoder().feed(raw)
    assert event.is_done is is_done


@pytest.mark.parametrize(
    "parts",
    [
        [b"data: " + b"x" * 93 + b"\n\n"],
        [b"data: a\n\ndata: " + b"x" * 93 + b"\n\n"],
        [b"x" * 101],
        [b"x"] * 101,
        [b"x" * 50, b"y" * 50, b"\n\n"],
        [b"data: a\n\n" + b"x" * 101],
    ],
)
def test_an_event_over_the_limit_is_refused(parts: list[bytes]) -> None:
    decoder = SSEDecoder(event_bytes_max=100)
    for _ in range(2):
        assert len(decoder.feed(b"data: " + b"x" * 92 + b"\n\n")) == 1  # exactly at the limit
    with pytest.raises(SSETooLarge) as refused:
        deque(map(decoder.feed, parts))
    assert refused.value.bytes_max == 100


def test_a_long_event_in_small_pieces() -> None:
    text = b"x" * 300_000
    decoder = SSEDecoder()
    stream = b"data: " + text + b"\n\n"
    events = [event for start in range(0, len(stream), 3) for event in decoder.feed(stream[start : start + 3])]
    assert [event.data for event in events] == [text]
