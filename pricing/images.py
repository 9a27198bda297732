"""What an image in a prompt counts, by the published formula of the model's maker.

How it works: older OpenAI models cut an image into tiles, newer ones into patches with a multiplier; Anthropic counts
its area, Google tiles of its own. Where the size is not known (a URL: we do not fetch it), the formula's worst case
counts. Where the documentation and what is billed differ, the higher figure stands, because this bounds a reservation.

Sources: OpenAI, «Images and vision», calculating costs; Anthropic, «Vision», image costs; Google, «Understand and count
tokens», multimodal tokens.
"""

from __future__ import annotations

import binascii
import re
import struct
from collections.abc import Sequence
from typing import Protocol

import msgspec

from pricing.money import ceil_div

Size = tuple[int, int]

HEADER_BYTES_MAX = 256 * 1024
"""How far into an image its size is looked for: a JPEG may carry a profile and a preview before it."""
_FIRST_BYTES = 48
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


class ImageRule(Protocol):
    """How a family of models counts an image."""

    def tokens(self, size: Size | None, detail: str) -> int:
        """Tokens of an image of (width, height) pixels; the worst case when the size is not known."""
        ...


class Tiles(msgspec.Struct, frozen=True):
    """Fit into 2048 x 2048, then the shorter side to 768; a base, and as much for each tile of 512 x 512.

    Nothing is scaled up: a small image is billed as one tile.
    """

    base: int
    tile: int

    def tokens(self, size: Size | None, detail: str) -> int:
        if detail == "low":
            return self.base
        width, height = size or (768, 2048)
        width, height = _shrink(width, height, max(width, height), 2048)
        width, height = _shrink(width, height, min(width, height), 768)
        return self.base + self.tile * ceil_div(width, 512) * ceil_div(height, 512)


class Patches(msgspec.Struct, frozen=True):
    """Patches of 32 x 32 up to a cap, times a multiplier in percent. The detail makes no difference but «original»."""

    percent: int
    cap: int = 1536
    original_cap: int = 1536

    def tokens(self, size: Size | None, detail: str) -> int:
        cap = self.original_cap if detail == "original" else self.cap
        patches = min(cap, ceil_div(size[0], 32) * ceil_div(size[1], 32)) if size else cap
        return ceil_div(patches * self.percent, 100)


class Area(msgspec.Struct, frozen=True):
    """A token for so many pixels, up to a cap (larger images are scaled down)."""

    pixels_per_token: int
    cap: int

    def tokens(self, size: Size | None, detail: str) -> int:
        return min(self.cap, ceil_div(size[0] * size[1], self.pixels_per_token)) if size else self.cap


class Crops(msgspec.Struct, frozen=True):
    """One count for a small image, else for each crop of at most 768 pixels a side, up to a cap."""

    crop: int
    cap: int

    def tokens(self, size: Size | None, detail: str) -> int:
        if size is None:
            return self.cap
        if max(size) <= 384:
            return self.crop
        unit = min(768, max(256, min(size) * 2 // 3))
        return min(self.cap, self.crop * ceil_div(size[0], unit) * ceil_div(size[1], unit))


FALLBACK_IMAGE_RULE: ImageRule = Tiles(85, 170)

# The first prefix that fits the model's name. For gpt-5-mini and -nano the documented multipliers stand, which are
# higher than what is billed.
_RULE_BY_PREFIX: Sequence[tuple[str, ImageRule]] = (
    ("gpt-4o-mini", Tiles(2833, 5667)),
    ("gpt-4.1-mini", Patches(162)),
    ("gpt-4.1-nano", Patches(246)),
    ("o4-mini", Patches(172)),
    ("codex-mini", Patches(172)),
    ("gpt-5-mini", Patches(162)),
    ("gpt-5-nano", Patches(246)),
    ("gpt-5.", Patches(120, 2500, 10_000)),
    ("gpt-5", Tiles(70, 140)),
    ("o1", Tiles(75, 150)),
    ("o3", Tiles(75, 150)),
    ("computer-use", Tiles(65, 129)),
    ("gpt-4", Tiles(85, 170)),
    ("claude", Area(750, 4784)),
    ("gemini", Crops(258, 4128)),
)


def image_rule_for(model: str) -> ImageRule:
    """How a model of this name counts images; FALLBACK_IMAGE_RULE where it is not known."""
    name = model.lower().rpartition("/")[2]
    return next((rule for prefix, rule in _RULE_BY_PREFIX if name.startswith(prefix)), FALLBACK_IMAGE_RULE)


def size_of_data_url(url: str) -> Size | None:
    """Pixels of an image in a base64 `data:` URL, from its first bytes; None for any other URL or format."""
    head = _DATA_URL.match(url)
    return size_of_base64(url, head.end()) if head else None


def size_of_base64(text: str, start: int = 0) -> Size | None:
    """Pixels of an image in base64, which begins at *start*."""
    image = _decode(text, start, _FIRST_BYTES)
    if image.startswith(b"\xff\xd8"):
        return _jpeg_size(_decode(text, start, HEADER_BYTES_MAX))
    if len(image) < 30:
        return None
    size: Size | None = None
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        size = struct.unpack(">II", image[16:24])
    elif image.startswith(b"GIF8"):
        size = struct.unpack("<HH", image[6:10])
    elif image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        size = _webp_size(image)
    return size if size and min(size) > 0 else None


def _webp_size(image: bytes) -> Size | None:
    match image[12:16]:
        case b"VP8 ":
            width, height = struct.unpack("<HH", image[26:30])
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            bits = int.from_bytes(image[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return int.from_bytes(image[24:27], "little") + 1, int.from_bytes(image[27:30], "little") + 1
    return None


def _jpeg_size(image: bytes) -> Size | None:
    """Walk the segments to the frame header, which holds height and width."""
    at = 2
    while at + 9 <= len(image) and image[at] == 0xFF:
        marker = image[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", image[at + 5 : at + 9])
            return (width, height) if width and height else None
        else:
            at += 2 + int.from_bytes(image[at + 2 : at + 4], "big")
    return None


def _decode(text: str, start: int, length: int) -> bytes:
    """The first bytes of a base64 text, as far as it is one."""
    quads = text[start : start + ceil_div(length, 3) * 4]
    try:
        return binascii.a2b_base64(quads[: len(quads) // 4 * 4])
    except ValueError:
        return b""


def _shrink(width: int, height: int, side: int, limit: int) -> Size:
    """Scale down, rounded to the nearest pixel, so that *side* (one of the two) becomes the limit."""
    if side <= limit:
        return width, height
    return _scaled(width, limit, side), _scaled(height, limit, side)


def _scaled(length: int, limit: int, side: int) -> int:
    return max(1, (2 * length * limit + side) // (2 * side))
