"""A whole answer, as opposed to a stream: its usage, its text where there is none, and what we add to it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from gateway.proxy.chunks import read_chunk
from gateway.proxy.meter import usage_body
from gateway.proxy.tally import Counter, Tally
from pricing.money import Asset
from pricing.usage import Usage, UsageInvalid, usage_from_openai

_TOP: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])


class NoAnswer(Exception):
    """A body that is not a JSON object, or one without choices or usage: whatever it is, it is not an answer."""


class Answer:
    """The body of a finished request. Only its top level and its usage are taken apart; the rest passes as it came.

    Raises:
        NoAnswer: the body is none, an error for example, whatever its status says.
    """

    def __init__(self, body: bytes, *, hidden_reasoning: bool = False) -> None:
        try:
            self._fields = _TOP.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise NoAnswer from None
        if "choices" not in self._fields and "usage" not in self._fields:
            raise NoAnswer
        self.reported = self._reported(hidden_reasoning)

    def _reported(self, hidden_reasoning: bool) -> Usage | None:
        try:
            report = _OBJECT.decode(self._fields["usage"])
            return usage_from_openai(report, hidden_reasoning=hidden_reasoning)
        except (KeyError, msgspec.DecodeError, UsageInvalid, UnicodeDecodeError, RecursionError):
            return None

    def counted(self, new_counter: Callable[[], Counter]) -> tuple[int, int]:
        """Output and reasoning tokens of the texts in the answer."""
        tally = Tally(new_counter)
        tally.add_chunk(read_chunk(msgspec.json.encode(self._fields)))
        return tally.exact()

    def report(self, usage: Usage) -> None:
        """Put our own count into an answer whose upstream reported none."""
        self._fields["usage"] = msgspec.Raw(msgspec.json.encode(usage_body(usage)))

    def body(self, quota: Mapping[str, str]) -> bytes:
        """The answer with *quota* in its usage."""
        reported = _TOP.decode(self._fields["usage"])
        return msgspec.json.encode({**self._fields, "usage": {**reported, **quota}})


def quota_of(asset: Asset, *, cost: int, balance: int | None) -> dict[str, str]:
    """What we say of a charge beside the upstream's usage: decimal credits. A balance that nobody knows is left out."""
    quota = {"cost": asset.format(cost)}
    if balance is not None:
        quota["balance"] = asset.format(balance)
    return quota
