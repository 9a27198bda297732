"""Counting the tokens of a chat request before the call, and of an answer as it streams.

How it works: the messages of a request come as raw JSON. Each is counted once, by the formulas of `pricing.formula`,
and remembered by its bytes, so that a conversation that grows by one message costs one message.

An answer is counted as it passes: what lies before a place that no token spans is encoded once, in batches; what is
behind it is bounded by its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from pricing.encodings import (
    FALLBACK_ENCODING,
    count_text,
    encoding_for,
    last_boundary,
    needs_thread,
    utf8_length,
    warm,
)
from pricing.formula import (
    TOKENS_PER_REPLY,
    RequestInvalid,
    Rules,
    count_message,
    count_tools,
    decoded,
    encoded,
    rules_for,
)

__all__ = [
    "FALLBACK_ENCODING",
    "PromptCounter",
    "RequestInvalid",
    "TextCounter",
    "encoding_for",
    "needs_thread",
    "warm",
]

MESSAGES_MAX = 100_000
MODEL_NAME_MAX = 256
REMEMBERED_MESSAGES_MAX = 16_384
REMEMBERED_KEY_BYTES_MAX = 1_024
"""Messages up to this size are remembered by their very bytes, larger ones by a digest."""
STREAM_BATCH_BYTES = 2_048
"""A streamed answer is encoded in batches of at least this size."""
STREAM_TAIL_BYTES_MAX = 65_536
"""A tail without a safe place is encoded when it gets this long."""


class PromptCounter:
    """Counts prompts and remembers what each message counted. Safe to share between threads.

    The memory has two generations: when the young one is full it becomes the old one, and what is used again moves
    back. That keeps the most recently used messages, in at most REMEMBERED_MESSAGES_MAX entries, without a lock.
    """

    def __init__(self) -> None:
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}

    def count(self, request: Mapping[str, Any]) -> int:
        """The prompt tokens of a decoded chat request: messages, tools or functions, and the response format.

        Raises:
            RequestInvalid: `messages` is not a list of objects, or a part of them has the wrong type.
        """
        messages = request.get("messages")
        if not isinstance(messages, list | tuple):
            raise RequestInvalid("messages", "must be a list")
        tools = request.get("tools")
        functions = request.get("functions")
        response_format = request.get("response_format")
        return self.count_messages(
            [encoded(message, "messages") for message in messages],
            tools=None if tools is None else encoded(tools, "tools"),
            functions=None if functions is None else encoded(functions, "functions"),
            response_format=None if response_format is None else encoded(response_format, "response_format"),
            model=str(request.get("model", "")),
        )

    def count_messages(
        self,
        raw_messages: Sequence[bytes | msgspec.Raw],
        tools: bytes | msgspec.Raw | None = None,
        model: str = "",
        *,
        functions: bytes | msgspec.Raw | None = None,
        response_format: bytes | msgspec.Raw | None = None,
    ) -> int:
        """The prompt tokens of a chat request whose parts are still raw JSON.

        Raises:
            RequestInvalid: a part is not valid JSON or has the wrong type.
        """
        if len(raw_messages) > MESSAGES_MAX:
            raise RequestInvalid("messages", f"must hold at most {MESSAGES_MAX} messages")
        rules = rules_for(model[:MODEL_NAME_MAX])
        prefix = rules.key
        remembered = self._young.get
        tokens = TOKENS_PER_REPLY
        for index, raw in enumerate(raw_messages):
            key = prefix + bytes(raw)
            if len(key) > REMEMBERED_KEY_BYTES_MAX:
                key = blake2b(key, digest_size=20).digest()
            counted = remembered(key)
            if counted is None:
                counted = self._recall(key)
                if counted is None:
                    counted = count_message(raw, f"messages[{index}]", rules)
                self._remember(key, counted)
                remembered = self._young.get
            tokens += counted
        for part, param in ((tools, "tools"), (functions, "functions"), (response_format, "response_format")):
            if part is not None:
                tokens += self._count_part(bytes(part), param, rules)
        return tokens

    def needs_thread(self, total_bytes: int) -> bool:
        """Whether counting so many bytes that are not remembered should leave the event loop."""
        return needs_thread(total_bytes)

    def uncounted_bytes(self, raw_messages: Sequence[bytes | msgspec.Raw], model: str = "") -> int:
        """Bytes of the messages that are not remembered: what `needs_thread` should be asked about."""
        prefix = rules_for(model[:MODEL_NAME_MAX]).key
        total = 0
        for raw in raw_messages:
            key = prefix + bytes(raw)
            size = len(key)
            if size > REMEMBERED_KEY_BYTES_MAX:
                key = blake2b(key, digest_size=20).digest()
            if key not in self._young and key not in self._old:
                total += size - len(prefix)
        return total

    def _count_part(self, raw: bytes, param: str, rules: Rules) -> int:
        key = blake2b(raw, digest_size=20, key=rules.key, person=param.encode()).digest()
        counted = self._recall(key)
        if counted is None:
            value = decoded(raw, param)
            counted = rules.json(value, param) if param == "response_format" else count_tools(value, param, rules)
            self._remember(key, counted)
        return counted

    def _recall(self, key: bytes) -> int | None:
        counted = self._young.get(key)
        return self._old.get(key) if counted is None else counted

    def _remember(self, key: bytes, counted: int) -> None:
        if len(self._young) >= REMEMBERED_MESSAGES_MAX // 2:
            self._old, self._young = self._young, {}
        self._young[key] = counted


class TextCounter:
    """Counts a streamed answer incrementally. Not shared between threads; one for each choice or tool call."""

    def __init__(self, encoding_name: str = FALLBACK_ENCODING) -> None:
        self._encoding_name = encoding_name
        self._counted = 0
        self._tail: list[str] = []
        self._tail_bytes = 0
        self._batch_bytes = STREAM_BATCH_BYTES

    def feed(self, text: str) -> None:
        """Take text that passed. Costs a microsecond, and an encoding once a batch; for a chunk that
        `needs_thread`, call it in one."""
        if text:
            self._tail.append(text)
            self._tail_bytes += utf8_length(text)
            if self._tail_bytes >= self._batch_bytes:
                self._advance()

    @property
    def upper_bound(self) -> int:
        """At least the tokens of what was fed, at no cost: exact up to the last batch, one token a byte after it."""
        return self._counted + self._tail_bytes

    @property
    def count(self) -> int:
        """The exact tokens up to the last safe place, and one token a byte after it. May be lower than a bound that
        was given earlier, never lower than `exact`."""
        self._advance()
        return self.upper_bound

    def exact(self) -> int:
        """The tokens of all that was fed, as `count_text` counts the whole, however it was split.

        Only where more than STREAM_TAIL_BYTES_MAX came without a safe place may it differ, by a few tokens for each
        time that much did.
        """
        return self.exact_with("")

    def exact_with(self, text: str) -> int:
        """What `exact` would be if *text* were fed too, which it is not."""
        self._advance()
        return self._counted + count_text("".join((*self._tail, text)), self._encoding_name)

    def _advance(self) -> None:
        """Encode what lies before the last safe place, and keep the rest."""
        if not self._tail:
            return
        text = "".join(self._tail)
        cut = last_boundary(text)
        if not cut and self._tail_bytes >= STREAM_TAIL_BYTES_MAX:
            cut = len(text)
        if cut:
            self._counted += count_text(text[:cut], self._encoding_name)
            text = text[cut:]
        self._tail = [text] if text else []
        self._tail_bytes = utf8_length(text)
        # A long tail is looked through again only when it has doubled, so that the whole stays linear.
        self._batch_bytes = min(STREAM_TAIL_BYTES_MAX, max(STREAM_BATCH_BYTES, 2 * self._tail_bytes))
