"""The meter of a stream: events pass through it, and none passes that is not covered.

How it works, sans-io. ``feed`` splits bytes into events and queues them; ``take`` hands out those that the covered
number of output tokens allows. A text's bytes bound its tokens, so most events pass on a sum; only when the bound
reaches what is covered is the text encoded, which brings the bound near to the true count. On the last stretch of a
wallet, ``exact``, every event counts to the token, and the first that is not covered is cut where the cover ends.

A chunk of usage is not passed on to a client that did not ask for it. For one that did, the last is held back until the
charge is known.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from gateway.proxy.chunks import Chunk, Piece, Skeletons, cut_chunk, read_chunk
from gateway.proxy.sse import SSEDecoder, SSEEvent
from gateway.proxy.tally import Counter, Tally
from pricing.usage import Usage, UsageInvalid, usage_from_openai

LARGE_BYTES: Final = 2 * 1024
"""The text of an event from which it is encoded before it is said to be uncovered: its bytes would say too much."""

HEAVY_BYTES: Final = 32 * 1024
"""Text that waits from which counting belongs in a thread."""

DONE_EVENT: Final = b"data: [DONE]\n\n"
ENVELOPE: Final[Mapping[str, Any]] = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": ""}
SHARED: Final = (*ENVELOPE, "service_tier", "system_fingerprint")
"""The fields that all chunks of a stream share; the first ones must be there."""

_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')
_BARE_DONE: Final = re.compile(rb"data: ?\[DONE\]\s*")
_TOP: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])
_NULL: Final = msgspec.Raw(b"null")
_EMPTY: Final = msgspec.Raw(b"[]")
_GOING_ON: Final[dict[int, str | None]] = {}
_NOTHING: Final = Chunk((), _GOING_ON)
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Waiting(msgspec.Struct):
    """An event that has come and not passed. *tokens* are all with it, once it has been worth counting them."""

    raw: bytes
    data: bytes | None
    chunk: Chunk
    size: int
    tokens: int | None = None


class StreamMeter:
    """Counts a stream of chat completion chunks as it passes.

    Attributes:
        finished: the upstream said ``[DONE]``.
        exact: count every event to the token, and nothing for what the upstream may count beside the texts.
        delivered: some event with data has been handed out.
        stale: something came after the last report of usage, which therefore may not cover it.
    """

    def __init__(self, new_counter: Callable[[], Counter], *, wants_usage: bool, hidden_reasoning: bool) -> None:
        self._wants_usage = wants_usage
        self._hidden_reasoning = hidden_reasoning
        self._decoder = SSEDecoder()
        self._skeletons = Skeletons()
        self._tally = Tally(new_counter)
        self._queue: deque[Waiting] = deque()
        self._waiting_bytes = 0
        self._latest = b"{}"
        self._held: SSEEvent | None = None
        self._usage: dict[str, Any] | None = None
        self._measured = (0, 0)
        self._passed_since = 0
        self.finished = False
        self.exact = False
        self.stale = False
        self.delivered = False

    # Events in.

    def feed(self, chunk: bytes) -> None:
        """Queue the events that *chunk* completes.

        Raises:
            SSETooLarge: an event is longer than any chunk of a stream needs to be.
        """
        self._arrive(self._decoder.feed(chunk))

    def close(self) -> None:
        """No more bytes come: queue what only waited for that."""
        self._arrive(self._decoder.close())
        if self.finished:
            return
        if _BARE_DONE.fullmatch(self._decoder.remainder):
            self._finish()
        else:
            self._release_held()

    def _arrive(self, events: list[SSEEvent]) -> None:
        for event in events:
            data = event.data
            if self.finished:
                return
            if data is None:
                self._queue.append(Waiting(event.raw, None, _NOTHING, 0))
                continue
            if self._held is not None and not event.is_done:
                self._release_held()
            piece = self._skeletons.match(data)
            if piece is not None:
                self.stale = self._usage is not None
                self._wait(event.raw, data, Chunk((piece,), _GOING_ON))
            elif event.is_done:
                self._finish()
            elif _USAGE.search(data) is None or not self._take_usage(event):
                self.stale = self._usage is not None
                chunk = read_chunk(data)
                self._skeletons.learn(data, chunk)
                self._wait(event.raw, data, chunk)

    def _wait(self, raw: bytes, data: bytes, chunk: Chunk) -> None:
        size = sum([piece.size for piece in chunk.pieces])
        self._queue.append(Waiting(raw, data, chunk, size))
        self._waiting_bytes += size
        self._latest = data

    def _release_held(self) -> None:
        """What was held back as the last report of usage was not the last event: it goes on as it came."""
        held, self._held = self._held, None
        if held is not None and held.data is not None:
            self._wait(held.raw, held.data, read_chunk(held.data))

    def _finish(self) -> None:
        """The last report of usage goes out with the charge; a text that came with it, like any other, before that."""
        self.finished = True
        held = self._held
        if held is not None and held.data is not None and _has_choices(_TOP.decode(held.data)):
            self._wait_without_usage(held.data)

    def _take_usage(self, event: SSEEvent) -> bool:
        """Note the usage in an event, and do with the event what the client's wish is. False where there is none."""
        data = event.data
        assert data is not None
        try:
            fields = _TOP.decode(data)
            usage = _OBJECT.decode(fields["usage"])
        except (*_UNREADABLE, KeyError):
            return False
        self._usage = merged(self._usage or {}, usage)
        self.stale = False
        if self._wants_usage:
            self._held = event
        elif _has_choices(fields):
            self._wait_without_usage(data)
        return True

    def _wait_without_usage(self, data: bytes) -> None:
        without = msgspec.json.encode({**_TOP.decode(data), "usage": _NULL})
        self._wait(_event(without), without, read_chunk(without))

    # Events out.

    def take(self, covered: int) -> bytes:
        """The queued events, up to the first that needs more output tokens than *covered*."""
        queue = self._queue
        passed: list[bytes] = []
        while queue:
            event = queue[0]
            if event.size and not self._fits(event, covered):
                break
            queue.popleft()
            passed.append(event.raw)
            if event.data is not None:
                self._pass(event.chunk, event.size)
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def _pass(self, chunk: Chunk, size: int) -> None:
        self.delivered = True
        self._passed_since += 1
        self._waiting_bytes -= size
        self._tally.add_chunk(chunk)

    def _fits(self, event: Waiting, covered: int) -> bool:
        tally = self._tally
        room = covered - self._beside
        if tally.bound + event.size <= room:
            return True
        tally.tighten()
        return tally.bound + event.size <= room or self.needed <= covered

    def _tokens_with(self, event: Waiting) -> int:
        if event.tokens is None:
            event.tokens = self._tally.exact_with(event.chunk.pieces)
        return event.tokens

    @property
    def needed(self) -> int:
        """Output tokens that have to be covered for the next event to pass."""
        event = self._queue[0]
        worth_counting = self.exact or event.size >= LARGE_BYTES
        return self._beside + (self._tokens_with(event) if worth_counting else self._tally.bound + event.size)

    @property
    def _beside(self) -> int:
        """Room for what the upstream may count beside the texts."""
        return 0 if self.exact else self._tally.overhead

    def cut(self, covered: int) -> bytes:
        """As much of the next event as is covered, to the token. The rest is forgotten: not delivered, not charged."""
        event = self._queue[0]
        self._queue.clear()
        self._waiting_bytes = 0

        def fits(pieces: list[Piece]) -> bool:
            return self._tally.exact_with(pieces) <= covered

        part = cut_chunk(event.data, fits) if event.data is not None else None
        if part is None:
            return b""
        raw, chunk = part
        self._pass(chunk, 0)
        return raw

    @property
    def waiting(self) -> bool:
        """Whether an event is held up because it is not covered."""
        return bool(self._queue)

    @property
    def heavy(self) -> bool:
        """Whether so much text waits that counting it belongs in a thread."""
        return self._waiting_bytes > HEAVY_BYTES

    @property
    def bound(self) -> int:
        """No less than the output tokens of all that has passed."""
        return self._tally.bound

    def measure(self) -> None:
        """Count all that has passed, to the token."""
        self._measured = self._tally.exact()
        self._passed_since = 0

    @property
    def passed(self) -> tuple[int, int]:
        """Output and reasoning tokens of all that had passed when it was measured, and one for each event since."""
        output, reasoning = self._measured
        return output + self._passed_since, reasoning

    # The end.

    @property
    def reported(self) -> Usage | None:
        """The upstream's usage, None where it reported none that can be charged."""
        if self._usage is None:
            return None
        try:
            return usage_from_openai(self._usage, hidden_reasoning=self._hidden_reasoning)
        except UsageInvalid:
            return None

    def ending(self, usage: Usage, quota: Mapping[str, str]) -> bytes:
        """The last bytes of a stream that has finished: its usage with *quota* in it, if asked for, and ``[DONE]``."""
        if self._usage is None or self.reported is None:
            return self._usage_event(usage_body(usage), quota) + DONE_EVENT
        return self._usage_event(self._usage, quota) + DONE_EVENT

    def cut_short(self, usage: Usage, quota: Mapping[str, str], reason: Mapping[str, str]) -> bytes:
        """The last bytes of a stream that we stop: each open choice ends with ``length``, and the *reason*."""
        reasons = self._tally.finish_reasons or {0: None}
        ends = b""
        for index in sorted(index for index, finish_reason in reasons.items() if finish_reason is None):
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": "length"}
            ends += _event(msgspec.json.encode({**self._envelope(), "choices": [choice], "quota": reason}))
        return ends + self._usage_event(usage_body(usage), quota) + DONE_EVENT

    def _usage_event(self, usage: Mapping[str, Any], quota: Mapping[str, str]) -> bytes:
        if not self._wants_usage:
            return b""
        held = self._held
        fields = self._envelope() if held is None or held.data is None else _TOP.decode(held.data)
        return _event(msgspec.json.encode({**fields, "choices": _EMPTY, "usage": {**usage, **quota}}))

    def _envelope(self) -> dict[str, Any]:
        try:
            latest = _TOP.decode(self._latest)
        except _UNREADABLE:
            latest = {}
        return {**ENVELOPE, **{name: latest[name] for name in SHARED if name in latest}}


def usage_body(usage: Usage) -> dict[str, Any]:
    """*usage* as OpenAI's object, for an upstream that reported none."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.input_total,
        "completion_tokens": usage.output_total,
        "total_tokens": usage.input_total + usage.output_total,
    }
    if usage.reasoning:
        body["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning}
    return body


def merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two reports of one stream as one: a total grows and a part may come alone, so the larger number counts."""
    result = dict(before)
    for name, value in after.items():
        known = result.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            result[name] = merged(known, value)
        elif value is not None and not (_number(known) and _number(value) and known > value):
            result[name] = value
    return result


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_choices(fields: Mapping[str, msgspec.Raw]) -> bool:
    return bytes(fields.get("choices", _NULL)) not in (b"[]", b"null")


def _event(data: bytes) -> bytes:
    """A line break in JSON is white space; in an event it would end the line."""
    return b"data: " + data.replace(b"\n", b" ").replace(b"\r", b" ") + b"\n\n"
