"""What an upstream does with one request, as a value: what it sends, when it waits, how it fails."""

from collections.abc import Iterable

import msgspec


class Send(msgspec.Struct, frozen=True, gc=False):
    """Write these bytes of the body; the first one is preceded by status and headers."""

    data: bytes


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Do nothing for a while."""

    seconds: float


class Cut(msgspec.Struct, frozen=True, gc=False):
    """End the connection here, whatever is still missing."""


class Hang(msgspec.Struct, frozen=True, gc=False):
    """Send nothing more, and keep the connection open."""


Step = Send | Wait | Cut | Hang


class Script(msgspec.Struct, frozen=True):
    """One answer.

    Attributes:
        headers: with `content-length` when the body's length is known before, as of any answer that is no stream.
        steps: may be iterated again and gives the same; a body is complete when they end.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    steps: Iterable[Step]
