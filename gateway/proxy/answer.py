"""A whole answer, as opposed to a stream: its usage, its text where there is none, and what we add to it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from gateway.proxy.meter import Counter, usage_body
from pricing.money import Asset
from pricing.usage import Usage, UsageInvalid, usage_from_openai

_TOP: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None


class _Choices(msgspec.Struct):
    choices: list[_Choice] | None = None


_CHOICES: Final = msgspec.json.Decoder(_Choices)


class NoAnswer(Exception):
    """A body that is not a JSON object: whatever it is, it is not an answer."""


class Answer:
    """The body of a finished request. Only its top level and its usage are taken apart; the rest passes as it came.

    Raises:
        NoAnswer: the body is not a JSON object.
    """

    def __init__(self, body: bytes, *, hidden_reasoning: bool = False) -> None:
        try:
            self._fields = _TOP.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise NoAnswer from None
        self.reported = self._reported(hidden_reasoning)

    def _reported(self, hidden_reasoning: bool) -> Usage | None:
        try:
            report = _OBJECT.decode(self._fields["usage"])
            return usage_from_openai(report, hidden_reasoning=hidden_reasoning)
        except (KeyError, msgspec.DecodeError, UsageInvalid, UnicodeDecodeError, RecursionError):
            return None

    def counted(self, new_counter: Callable[[], Counter]) -> tuple[int, int]:
        """Output and reasoning tokens of the texts in the answer."""
        output, reasoning = new_counter(), new_counter()
        try:
            choices = _CHOICES.decode(msgspec.json.encode(self._fields)).choices or []
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            output.feed(msgspec.json.encode(self._fields).decode("utf-8", "replace"))
            return output.exact(), 0
        for choice in choices:
            output.feed(choice.text or "")
            message = choice.message or _Message()
            reasoning.feed(message.reasoning_content or message.reasoning or "")
            functions = [call.function for call in message.tool_calls or ()] + [message.function_call]
            for text in (message.content, message.refusal):
                output.feed(text or "")
            for function in functions:
                if function is not None:
                    output.feed(function.name or "")
                    output.feed(function.arguments or "")
        return output.exact(), reasoning.exact()

    def report(self, usage: Usage) -> None:
        """Put our own count into an answer whose upstream reported none."""
        self._fields["usage"] = msgspec.Raw(msgspec.json.encode(usage_body(usage)))

    def body(self, quota: Mapping[str, str]) -> bytes:
        """The answer with *quota* in its usage."""
        reported = _TOP.decode(self._fields["usage"])
        return msgspec.json.encode({**self._fields, "usage": {**reported, **quota}})


def quota_of(asset: Asset, *, cost: int, balance: int) -> dict[str, str]:
    """What we say of a charge beside the upstream's usage: decimal credits."""
    return {"cost": asset.format(cost), "balance": asset.format(balance)}
