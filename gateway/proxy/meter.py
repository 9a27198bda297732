"""The meter of a stream: events pass through it, and none passes that is not covered.

How it works, sans-io. ``feed`` splits bytes into events and queues them. ``take`` hands out those that the covered
number of output tokens allows. An event is not parsed for that: its text cannot have more tokens than the bytes behind
its ``"choices"``, so these bytes are its bound. Only when the bounds reach what is covered is the text behind them
parsed and counted, all at once, which tightens the bound to the true count; a long stream is parsed seldom, and one
whose upstream reports its usage may never be. A chunk of usage is not passed on to a client that did not ask for it;
for one that did, the last is held back until the charge is known.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from gateway.proxy.sse import SSEDecoder, SSEEvent
from pricing.usage import Usage, UsageInvalid, usage_from_openai

CHOICE_TOKENS_MAX: Final = 4
"""Tokens that a choice may cost beside its text: the end of turn and its like."""

TOOL_CALL_TOKENS_MAX: Final = 16
"""Tokens that a tool call may cost beside its name and arguments."""

HEAVY_BYTES: Final = 32 * 1024
"""Uncounted text from which counting belongs in a thread."""

DONE_EVENT: Final = b"data: [DONE]\n\n"

_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')
_TOP: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULL: Final = msgspec.Raw(b"null")


class Counter(Protocol):
    """Counts the tokens of a text that comes in pieces. `pricing.tokens.TextCounter` is one."""

    def feed(self, text: str) -> None: ...

    @property
    def upper_bound(self) -> int: ...

    @property
    def count(self) -> int: ...

    def exact(self) -> int: ...


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None


_CHUNK: Final = msgspec.json.Decoder(_Chunk)


class Waiting(msgspec.Struct):
    """An event that has come and not passed. *bound* is the most output tokens it can have."""

    raw: bytes
    data: bytes | None
    bound: int


class StreamMeter:
    """Counts a stream of chat completion chunks as it passes.

    Attributes:
        finished: the upstream said ``[DONE]``.
        reported: the usage that the upstream has reported so far, or None.
        exact: count every event to the token, rather than by its bound: for the last stretch of a wallet.
        delivered: some event has been handed out.
        stale: something came after the last report of usage, which therefore may not cover it.
    """

    def __init__(self, new_counter: Callable[[], Counter], *, wants_usage: bool, hidden_reasoning: bool) -> None:
        self._new_counter = new_counter
        self._wants_usage = wants_usage
        self._hidden_reasoning = hidden_reasoning
        self._decoder = SSEDecoder()
        self._queue: deque[Waiting] = deque()
        self._uncounted: list[bytes] = []
        self._uncounted_bound = 0
        self._texts: dict[tuple[str, int, int], Counter] = {}
        self._finish_reasons: dict[int, str | None] = {}
        self._template: bytes | None = None
        self._held: SSEEvent | None = None
        self._usage: dict[str, Any] | None = None
        self._passed_counts = (0, 0)
        self._dropped = False
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
        for event in self._decoder.feed(chunk):
            if self.finished:
                return
            self._queue_event(event)

    def _queue_event(self, event: SSEEvent) -> None:
        data = event.data
        if data is None:
            self._queue.append(Waiting(event.raw, None, 0))
            return
        if data.startswith(b"[DONE]"):
            self.finished = True
            return
        self._release_held()
        raw = event.raw
        if _USAGE.search(data) is not None:
            self.stale = False
            passed = self._read_usage(event)
            if passed is None:
                return
            raw = passed
        else:
            self.stale = self._usage is not None
        place = data.find(b'"choices"')
        self._queue.append(Waiting(raw, data, len(data) - max(place, 0)))

    def _release_held(self) -> None:
        """What was held back as the last usage chunk was not the last event: it goes on as it came."""
        if self._held is not None:
            self._queue.append(Waiting(self._held.raw, self._held.data, len(self._held.data or b"")))
            self._held = None

    def _read_usage(self, event: SSEEvent) -> bytes | None:
        """Note the usage in an event. What passes on of the event now: None where nothing does."""
        assert event.data is not None
        try:
            fields = _TOP.decode(event.data)
            usage = _OBJECT.decode(fields["usage"])
        except (msgspec.DecodeError, KeyError, RecursionError, UnicodeDecodeError):
            return event.raw
        self._usage = merged(self._usage or {}, usage)
        if self._template is None:
            self._template = event.data
        if self._wants_usage:
            self._held = event
            return None
        if bytes(fields.get("choices", _NULL)) in (b"[]", b"null"):
            return None
        return b"data: " + msgspec.json.encode({**fields, "usage": _NULL}) + b"\n\n"

    # Events out.

    def take(self, covered: int) -> bytes:
        """The queued events, up to the first that needs more output tokens than *covered*."""
        passed: list[bytes] = []
        while self._queue:
            event = self._queue[0]
            if event.data is not None and event.bound > 0:
                if self.exact or self.bound + event.bound > covered:
                    self._count_uncounted()
                    self._passed_counts = self._exact_counts()
                    self._count(event.data)
                    event.bound = 0
                    if self._counted() > covered and self._tightened() > covered:
                        break
                else:
                    self._uncounted.append(event.data)
                    self._uncounted_bound += event.bound
            elif event.data is not None and self._tightened() > covered:
                break
            self._queue.popleft()
            passed.append(event.raw)
        if passed:
            self.delivered = True
        return b"".join(passed)

    @property
    def waiting(self) -> bool:
        """Whether an event is held up because it is not covered."""
        return bool(self._queue)

    @property
    def heavy(self) -> bool:
        """Whether the next ``take`` may count so much text that it belongs in a thread."""
        return self._uncounted_bound + sum(event.bound for event in self._queue) > HEAVY_BYTES

    # Counts.

    @property
    def bound(self) -> int:
        """The most output tokens that all that has passed can have."""
        return self._counted() + self._uncounted_bound

    def _counted(self) -> int:
        """The tokens of all counted text: the true count where ``exact`` is set, else never less than it."""
        if self.exact:
            return sum(counter.exact() for counter in self._texts.values())
        return sum(counter.upper_bound for counter in self._texts.values()) + self._overhead()

    def _tightened(self) -> int:
        """The same, as near to the true count as is worth its time."""
        if self.exact:
            return self._counted()
        return sum(counter.count for counter in self._texts.values()) + self._overhead()

    def _overhead(self) -> int:
        tool_calls = sum(1 for kind, _, _ in self._texts if kind == "tool")
        return CHOICE_TOKENS_MAX * len(self._finish_reasons) + TOOL_CALL_TOKENS_MAX * tool_calls

    def counted(self) -> tuple[int, int]:
        """Output and reasoning tokens, to the token, of all that has passed or waits."""
        if self._dropped:
            return self._passed_counts
        self._count_uncounted()
        return self._exact_counts()

    def _exact_counts(self) -> tuple[int, int]:
        counts = dict.fromkeys(("text", "tool", "reasoning"), 0)
        for (kind, _, _), counter in self._texts.items():
            counts[kind] += counter.exact()
        return counts["text"] + counts["tool"], counts["reasoning"]

    def drop_waiting(self) -> None:
        """Forget the events that were not covered: they are not delivered and not charged."""
        self._dropped = bool(self._queue)
        self._queue.clear()

    def _count_uncounted(self) -> None:
        for data in self._uncounted:
            self._count(data)
        self._uncounted.clear()
        self._uncounted_bound = 0

    def _count(self, data: bytes) -> None:
        try:
            chunk = _CHUNK.decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            # It is not a chunk that we know, but it is delivered: all of it counts as text.
            self._text("text", 0, 0, data.decode("utf-8", "replace"))
            return
        self._template = data
        for choice in chunk.choices or ():
            if choice.finish_reason is not None or choice.index not in self._finish_reasons:
                self._finish_reasons[choice.index] = choice.finish_reason
            self._text("text", choice.index, 0, choice.text)
            delta = choice.delta
            if delta is None:
                continue
            self._text("text", choice.index, 0, delta.content)
            self._text("text", choice.index, 1, delta.refusal)
            self._text("reasoning", choice.index, 0, delta.reasoning_content or delta.reasoning)
            calls = [(call.index, call.function) for call in delta.tool_calls or ()]
            for index, function in [*calls, (-1, delta.function_call)]:
                if function is not None:
                    self._text("tool", choice.index, index, function.name)
                    self._text("tool", choice.index, index, function.arguments)

    def _text(self, kind: str, choice: int, part: int, text: str | None) -> None:
        if not text:
            return
        counter = self._texts.get((kind, choice, part))
        if counter is None:
            counter = self._texts[kind, choice, part] = self._new_counter()
        counter.feed(text)

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
        return self._usage_event(usage, quota) + DONE_EVENT

    def cut_short(self, usage: Usage, quota: Mapping[str, str], reason: Mapping[str, str]) -> bytes:
        """The last bytes of a stream that we stop: each open choice ends with ``length``, and the *reason*."""
        self._count_uncounted()
        ends = b""
        unfinished = [index for index, finish_reason in self._finish_reasons.items() if finish_reason is None]
        for index in sorted(unfinished or ([] if self._finish_reasons else [0])):
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": "length"}
            ends += _event({**self._envelope(), "choices": [choice], "quota": reason})
        return ends + self._usage_event(usage, quota) + DONE_EVENT

    def _usage_event(self, usage: Usage, quota: Mapping[str, str]) -> bytes:
        if not self._wants_usage:
            return b""
        if self._held is not None and self._held.data is not None:
            fields = _TOP.decode(self._held.data)
            reported = _FIELDS.decode(fields["usage"])
            return _event({**fields, "usage": {**reported, **quota}})
        return _event({**self._envelope(), "choices": [], "usage": {**usage_body(usage), **quota}})

    def _envelope(self) -> dict[str, Any]:
        """The fields that all chunks of this stream share."""
        try:
            fields: dict[str, Any] = dict(_TOP.decode(self._template or b"{}"))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            fields = {}
        for name in ("choices", "usage"):
            fields.pop(name, None)
        return {"object": "chat.completion.chunk", **fields}


def usage_body(usage: Usage) -> dict[str, Any]:
    """*usage* as OpenAI's object, for an upstream that reported none."""
    return {
        "prompt_tokens": usage.input_total,
        "completion_tokens": usage.output_total,
        "total_tokens": usage.input_total + usage.output_total,
    }


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


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
