"""Server-sent events: bytes in, events out, at any split.

How it works. An event ends at a blank line: two line ends in a row, where a line end is LF, CRLF or CR. The decoder
only looks for that; the fields of an event are read when it is complete. Each event keeps its exact bytes, so that
joining the `raw` of all events and the remainder gives the input back, and how the input was cut never shows.

A CR that ends what has arrived so far may be a whole line end or half a CRLF. An event that ends on such a CR waits
for the next byte, or for `close`; nobody sends CR alone, and waiting keeps the events independent of the cuts.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import re
from typing import Final

import msgspec

EVENT_BYTES_MAX: Final = 16 * 1024 * 1024
"""One event may be this long; longer is an upstream that never ends an event, and would fill the memory."""

_BOM: Final = b"\xef\xbb\xbf"
_DONE_BYTES_MAX: Final = 64
_EVENT_END: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")
_LOOK_BACK: Final = 3  # An event's end is at most 4 bytes long, so it may begin 3 bytes before what is new.


class SSETooLarge(Exception):
    """An event is longer than the decoder's limit; the decoder is of no more use."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"a server-sent event is longer than {bytes_max} bytes")
        self.bytes_max = bytes_max


class SSEEvent(msgspec.Struct, frozen=True, gc=False):
    """One event as it came.

    Attributes:
        raw: the exact bytes, with the blank line that ends the event.
        data: the `data` lines joined by LF; None when there is none (a comment, a keep-alive).
    """

    raw: bytes
    data: bytes | None

    @property
    def is_done(self) -> bool:
        """Whether this is `[DONE]`, by which OpenAI's streams say that they are complete."""
        data = self.data
        return data is not None and len(data) <= _DONE_BYTES_MAX and data.strip() == b"[DONE]"


class SSEDecoder:
    """Cuts a stream of bytes into events."""

    __slots__ = ("_at_start", "_event_bytes_max", "_has_cr", "_pending")

    def __init__(self, *, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._pending = bytearray()  # A bytearray grows in place: an event in a million pieces stays linear.
        self._has_cr = False
        self._at_start = True

    @property
    def remainder(self) -> bytes:
        """The bytes of the event that has not ended yet; after `close`, what was cut off."""
        return bytes(self._pending)

    def feed(self, chunk: bytes) -> list[SSEEvent]:
        """Take the next bytes, of any length; return the events that they complete.

        Raises:
            SSETooLarge: an event grew over the limit, finished or not.
        """
        pending = self._pending
        if (  # One whole event of one data line in one read: nearly every read of a live stream.
            chunk.find(b"\n") == len(chunk) - 2
            and chunk.startswith(b"data: ")
            and chunk.endswith(b"\n\n")
            and not pending
            and not self._at_start
            and b"\r" not in chunk
            and len(chunk) <= self._event_bytes_max
        ):
            return [SSEEvent(chunk, chunk[6:-2])]
        if not self._has_cr and b"\r" in chunk:
            self._has_cr = True
        if not pending:
            return self._split(chunk, search_from=0)
        search_from = max(0, len(pending) - _LOOK_BACK)
        pending += chunk
        if self._find_end(pending, search_from, closing=False) is None:
            self._check_size(len(pending))
            return []
        buffer = bytes(pending)
        pending.clear()
        return self._split(buffer, search_from=search_from)

    def close(self) -> list[SSEEvent]:
        """Say that no more bytes come; return the event that only waited for that, if there is one.

        What was not ended by a blank line is no event: it stays in `remainder`.
        """
        buffer = bytes(self._pending)
        self._pending.clear()
        return self._split(buffer, search_from=0, closing=True)

    def _split(self, buffer: bytes, *, search_from: int, closing: bool = False) -> list[SSEEvent]:
        events: list[SSEEvent] = []
        start = 0
        while (found := self._find_end(buffer, search_from, closing=closing)) is not None:
            end_of_text, end = found
            self._check_size(end - start)
            raw = buffer[start:end]
            if self._at_start:
                self._at_start = False
                data = _data_of(raw.removeprefix(_BOM))
            elif (
                buffer.startswith(b"data: ", start) and buffer.find(b"\n", start, end_of_text) < 0 and not self._has_cr
            ):
                data = buffer[start + 6 : end_of_text]
            else:
                data = _data_of(raw)
            events.append(SSEEvent(raw, data))
            start = search_from = end
        if start < len(buffer):
            self._check_size(len(buffer) - start)
            self._pending += buffer[start:]
        else:
            self._has_cr = False
        return events

    def _find_end(self, buffer: bytes | bytearray, search_from: int, *, closing: bool) -> tuple[int, int] | None:
        """Where the text of the next event ends, and where the event does."""
        if not self._has_cr:
            found = buffer.find(b"\n\n", search_from)
            return None if found < 0 else (found, found + 2)
        match = _EVENT_END.search(buffer, search_from)
        if match is None or (not closing and match.end() == len(buffer) and buffer.endswith(b"\r")):
            return None
        return match.span()

    def _check_size(self, size: int) -> None:
        if size > self._event_bytes_max:
            raise SSETooLarge(self._event_bytes_max)


def _data_of(event: bytes) -> bytes | None:
    values: list[bytes] = []
    for line in event.splitlines():  # For bytes these are LF, CRLF and CR, and no other.
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
