"""What can be erased, and therefore is not in the journal: metadata.

How it works. Metadata is the caller's own and may be about a person, who may ask for it to be gone. The journal is
never edited. So what is written into it has no metadata: that stands once, in the row of the block, the reservation or
the usage that it came with, and is erased there. No number hangs on it: a replay leaves it out on both sides.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import msgspec

from ledger.model import Block, Reservation, Settlement, UsageRecord
from ledger.outcomes import BlockOpened, Fact, ReservationChanged, UsageRecorded

ERASED: Final = frozenset({"metadata", "reason"})
"""What of an event is in the caller's own words: the reason is a refund's."""

V = TypeVar("V")


def facts_to_keep(facts: Iterable[Fact]) -> list[Fact]:
    """*facts* as the journal has them."""
    return [bare(fact) if type(fact) in _BARE else fact for fact in facts]


def bare(value: V) -> V:
    """*value* without metadata: a fact, a block, a reservation. It is the same object where it has none."""
    strip = _BARE.get(type(value))
    return value if strip is None else strip(value)


def without_metadata(body: Any) -> Any:
    """An event's *body* without the caller's own words, however deep."""
    if isinstance(body, dict):
        return {name: without_metadata(value) for name, value in body.items() if name not in ERASED}
    if isinstance(body, list):
        return [without_metadata(item) for item in body]
    return body


def _block(block: Block) -> Block:
    return msgspec.structs.replace(block, metadata={}) if block.metadata else block


def _record(record: UsageRecord) -> UsageRecord:
    return msgspec.structs.replace(record, metadata={}) if record.metadata else record


def _mark(mark: Settlement | None) -> Settlement | None:
    if mark is None or mark.usage is None or not mark.usage.metadata:
        return mark
    return msgspec.structs.replace(mark, usage=_record(mark.usage))


def _reservation(reservation: Reservation) -> Reservation:
    mark = _mark(reservation.mark)
    if mark is reservation.mark and not reservation.metadata:
        return reservation
    return msgspec.structs.replace(reservation, mark=mark, metadata={})


def _block_opened(fact: BlockOpened) -> BlockOpened:
    return BlockOpened(_block(fact.block)) if fact.block.metadata else fact


def _reservation_changed(fact: ReservationChanged) -> ReservationChanged:
    stripped = _reservation(fact.reservation)
    return fact if stripped is fact.reservation else ReservationChanged(stripped)


def _usage_recorded(fact: UsageRecorded) -> UsageRecorded:
    return msgspec.structs.replace(fact, record=_record(fact.record)) if fact.record.metadata else fact


_BARE: Final[dict[type, Callable[[Any], Any]]] = {
    Block: _block,
    Reservation: _reservation,
    BlockOpened: _block_opened,
    ReservationChanged: _reservation_changed,
    UsageRecorded: _usage_recorded,
}
