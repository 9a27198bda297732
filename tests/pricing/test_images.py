"""Image tokens by the published formulas, with the examples of their documentation, and sizes read from headers."""

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.images import image_rule_for, size_of_data_url


def png(width: int, height: int) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + b"\x08\x02\x00\x00\x00" + b"\0" * 50
    )


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0" * 50


def jpeg(width: int, height: int, *, before: int = 0) -> bytes:
    profile = b"".join(b"\xff\xe1" + struct.pack(">H", 65_535) + b"x" * 65_533 for _ in range(before))
    tables = b"\xff\xdb\x00\x04ab" + b"\xff\xc4\x00\x04ab"
    return (
        b"\xff\xd8" + profile + tables + b"\xff\xff\xc2\x00\x11\x08" + struct.pack(">HH", height, width) + b"\x03" * 30
    )


def webp(kind: bytes, width: int, height: int) -> bytes:
    header = b"RIFF\0\0\0\0WEBP" + kind + b"\0\0\0\0"
    match kind:
        case b"VP8 ":
            return header + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width | 0x4000, height) + b"\0" * 20
        case b"VP8L":
            return header + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0" * 20
        case _:
            return (
                header
                + b"\0\0\0\0"
                + (width - 1).to_bytes(3, "little")
                + (height - 1).to_bytes(3, "little")
                + b"\0" * 9
            )


def data_url(image: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


@pytest.mark.parametrize(
    ("model", "size", "detail", "tokens"),
    [
        # OpenAI, «Images and vision»: the worked examples.
        ("gpt-4o", (1024, 1024), "high", 765),
        ("gpt-4o", (2048, 4096), "high", 1105),
        ("gpt-4o", (4096, 8192), "low", 85),
        ("gpt-4o", (512, 512), "high", 255),
        ("gpt-4o", (128, 64), "auto", 255),
        ("gpt-4o", (2049, 513), "high", 1445),
        ("gpt-4o", (2050, 513), "high", 765),
        ("gpt-4o-mini", (128, 64), "high", 8500),
        ("gpt-4o-mini", (128, 64), "low", 2833),
        ("gpt-4.1-2025-04-14", (128, 64), "high", 255),
        ("o3", (128, 64), "high", 225),
        ("gpt-5", (1024, 1024), "high", 70 + 4 * 140),
        ("gpt-4.1-mini", (1024, 1024), "high", 1659),
        ("gpt-4.1-mini", (4000, 1474), "high", 2489),
        ("o4-mini", (33, 32), "low", 4),
        ("gpt-5.2", (1024, 1024), "high", 1229),
        ("gpt-5.4", (5000, 5000), "original", 12_000),
        ("openai/gpt-4o", (512, 512), "high", 255),
        # Unknown sizes: the worst case of the formula.
        ("gpt-4o", None, "auto", 85 + 8 * 170),
        ("gpt-4o", None, "low", 85),
        ("gpt-4.1-nano", None, "auto", 3779),
        ("claude-sonnet-4-5", None, "auto", 4784),
        # Anthropic and Google, their worked examples.
        ("claude-sonnet-4-5", (1092, 1092), "auto", 1590),
        ("gemini-2.0-flash", (384, 384), "auto", 258),
        ("gemini-2.0-flash", (960, 540), "auto", 1548),
        # A model that nobody knows counts as gpt-4o does.
        ("whatever", (1024, 1024), "high", 765),
    ],
)
def test_the_published_formulas(model: str, size: tuple[int, int] | None, detail: str, tokens: int) -> None:
    assert image_rule_for(model).tokens(size, detail) == tokens


@pytest.mark.parametrize(
    "model", ["gpt-4o", "gpt-4o-mini", "gpt-4.1-mini", "o3", "gpt-5.2", "claude-x", "gemini-2.5-pro"]
)
@given(size=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)))
def test_an_unknown_size_counts_at_least_as_much_as_any(model: str, size: tuple[int, int]) -> None:
    rule = image_rule_for(model)
    assert 0 < rule.tokens(size, "high") <= rule.tokens(None, "high")


@pytest.mark.parametrize(
    "image",
    [
        png(640, 480),
        gif(640, 480),
        jpeg(640, 480),
        jpeg(640, 480, before=2),
        webp(b"VP8 ", 640, 480),
        webp(b"VP8L", 640, 480),
        webp(b"VP8X", 640, 480),
    ],
)
def test_the_size_is_read_from_the_header(image: bytes) -> None:
    assert size_of_data_url(data_url(image)) == (640, 480)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://example.com/cat.png",
        "data:image/png,abc",
        "data:image/png;base64,",
        "data:image/png;base64,!!!!",
        data_url(b"\x89PNG\r\n\x1a\n"),
        data_url(png(0, 10)),
        data_url(b"RIFF\0\0\0\0WEBPabcd" + b"\0" * 40),
        data_url(b"\xff\xd8\xff"),
        data_url(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 9),
        data_url(jpeg(640, 480, before=9)),
        data_url(b"BM" + b"\0" * 100),
    ],
)
def test_what_says_nothing_of_its_size_is_unknown(url: str) -> None:
    assert size_of_data_url(url) is None


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF1234WEBPVP8 "]),
)
def test_no_image_makes_it_fail(noise: bytes, start: bytes) -> None:
    size = size_of_data_url(data_url(start + noise))
    assert size is None or min(size) > 0
