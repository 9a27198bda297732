"""How many tokens a stream's texts have: an upper bound at no cost, the true count where it is worth its time."""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from gateway.proxy.chunks import Chunk, Piece, Place

CHOICE_TOKENS_MAX: Final = 4
"""Tokens that a choice may cost beside its text: the end of turn and its like."""

TOOL_CALL_TOKENS_MAX: Final = 16
"""Tokens that a tool call may cost beside its name and arguments."""


class Counter(Protocol):
    """Counts the tokens of a text that comes in pieces. `pricing.tokens.TextCounter` is one."""

    def feed(self, text: str) -> None: ...

    @property
    def upper_bound(self) -> int:
        """Never less than the true count."""
        ...

    @property
    def count(self) -> int:
        """The same, as near to the true count as is worth its time."""
        ...

    def exact(self) -> int: ...

    def exact_with(self, text: str) -> int: ...


class Tally:
    """The texts of one stream.

    Attributes:
        bound: no less than the tokens of all texts.
        overhead: what choices and tool calls may cost beside their texts, as the upstream counts.
        finish_reasons: of every choice that has appeared, None while it goes on.
    """

    def __init__(self, new_counter: Callable[[], Counter]) -> None:
        self._new_counter = new_counter
        self._counters: dict[Place, Counter] = {}
        self._exact: dict[Place, int] = {}
        self.bound = 0
        self.overhead = 0
        self.finish_reasons: dict[int, str | None] = {}

    def add(self, piece: Piece) -> None:
        """Count one more piece."""
        place = piece.place
        counter = self._counters.get(place)
        if counter is None:
            counter = self._counters[place] = self._new_counter()
            self._appeared(place.choice)
            if place.kind == "tool":
                self.overhead += TOOL_CALL_TOKENS_MAX
        counter.feed(piece.text)
        self.bound += piece.size
        self._exact.pop(place, None)

    def add_chunk(self, chunk: Chunk) -> None:
        for piece in chunk.pieces:
            self.add(piece)
        for index, finish_reason in chunk.finish_reasons.items():
            self._appeared(index)
            if finish_reason is not None:
                self.finish_reasons[index] = finish_reason

    def _appeared(self, index: int) -> None:
        if index not in self.finish_reasons:
            self.finish_reasons[index] = None
            self.overhead += CHOICE_TOKENS_MAX

    def tighten(self) -> None:
        """Bring the bound near to the true count."""
        self.bound = sum(counter.count for counter in self._counters.values())

    def exact_with(self, pieces: Sequence[Piece]) -> int:
        """The tokens of all texts as if *pieces* were added, which they are not."""
        more: dict[Place, str] = {}
        for piece in pieces:
            more[piece.place] = more.get(piece.place, "") + piece.text
        total = sum(self._exact_of(place) for place in self._counters if place not in more)
        for place, text in more.items():
            counter = self._counters.get(place) or self._new_counter()
            total += counter.exact_with(text)
        return total

    def exact(self) -> tuple[int, int]:
        """The tokens of all texts but reasoning, and those of reasoning."""
        output = reasoning = 0
        for place in self._counters:
            if place.kind == "reasoning":
                reasoning += self._exact_of(place)
            else:
                output += self._exact_of(place)
        return output, reasoning

    def _exact_of(self, place: Place) -> int:
        count = self._exact.get(place)
        if count is None:
            count = self._exact[place] = self._counters[place].exact()
        return count
