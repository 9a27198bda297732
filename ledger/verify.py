"""Is every stored number what the journal says? Replays it all, then compares each table with the replay's end.

Metadata is left out of the comparison: the journal does not have it, so that it can be erased.

It reads one moment of the ledger, so it may run beside a ledger in use. Memory holds what is alive, a digest of each
settled reservation and key, and one page of rows.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import msgspec

from ledger.entries import check_entry
from ledger.erasable import bare
from ledger.invariants import Audit, Violation, digest
from ledger.model import Reservation, ReservationRef
from ledger.money import MoneyAudit
from ledger.outcomes import KeyTaken
from ledger.state import KeyRef
from ledger.store.protocol import DamagedRow, Snapshot, Store

Row = TypeVar("Row", bound=msgspec.Struct)
Ref = TypeVar("Ref")

VIOLATIONS_MAX = 1_000
"""Enough to see what is wrong: the report ends here."""


class Verified(msgspec.Struct, frozen=True):
    """*entries* is how many commands were replayed. Without violations, everything holds."""

    entries: int
    violations: tuple[Violation, ...]


async def verify(store: Store, *, operator: str | None = None) -> Verified:
    """Replay the journal of *store*, check every invariant at every step, and compare every stored row.

    Args:
        operator: the tenant whose wallets others may pay from.

    Raises:
        StoreUnavailable: the database cannot be read.
    """
    audit = Audit(operator=operator)
    money = MoneyAudit()
    async with store.snapshot() as snapshot:
        try:
            async for entry in snapshot.journal():
                audit.observe(entry)
                audit.found += check_entry(entry)
                audit.found += money.check(entry, audit.state)
                if len(audit.found) >= VIOLATIONS_MAX:
                    return _verified(audit, [])
            audit.finish()
            differences = [difference async for difference in _differences(audit, snapshot)]
        except DamagedRow as error:
            return _verified(audit, [Violation("a row is damaged: the rest was not looked at", {"row": str(error)})])
    return _verified(audit, differences)


def _verified(audit: Audit, differences: list[Violation]) -> Verified:
    return Verified(entries=audit.entries, violations=tuple((audit.found + differences)[:VIOLATIONS_MAX]))


async def _differences(audit: Audit, snapshot: Snapshot) -> AsyncIterator[Violation]:
    """Every stored row that is not as replayed, and every replayed one that is not stored."""
    state = audit.state
    blocks = {(ref, block.id): block for ref, opened in state.blocks.items() for block in opened.values()}
    for differences in (
        _compared("wallet", snapshot.wallets(), lambda wallet: wallet.ref, dict(state.wallets)),
        _compared("block", snapshot.blocks(), lambda block: (block.wallet, block.id), blocks),
        _reservation_differences(audit, snapshot),
        _compared("key", snapshot.keys(), _key_ref, dict(audit.keys)),
        _usage_differences(audit, snapshot),
    ):
        async for difference in differences:
            yield difference


async def _reservation_differences(audit: Audit, snapshot: Snapshot) -> AsyncIterator[Violation]:
    replayed: dict[ReservationRef, Reservation | bytes] = {**audit.state.reservations, **audit.settled}
    async for difference in _compared(
        "reservation", snapshot.reservations(), lambda reservation: reservation.ref, replayed
    ):
        yield difference


async def _compared(
    kind: str, stored: AsyncIterator[Row], name_of: Callable[[Row], Ref], replayed: Mapping[Ref, Row | bytes]
) -> AsyncIterator[Violation]:
    """Compare rows with what the replay has of them: the value, or the digest of what is over."""
    missing = dict(replayed)
    async for found in stored:
        row = bare(found)
        name = name_of(row)
        expected = missing.pop(name, None)
        if expected is None:
            yield Violation(f"a {kind} is stored that the journal does not have", {"name": name})
        elif (digest(row) if isinstance(expected, bytes) else row) != expected:
            fields = {} if isinstance(expected, bytes) else _fields(row, expected)
            yield Violation(f"a {kind} is stored otherwise than the journal says", {"name": name, **fields})
    for name in missing:
        yield Violation(f"the journal has a {kind} that is not stored", {"name": name})


async def _usage_differences(audit: Audit, snapshot: Snapshot) -> AsyncIterator[Violation]:
    count = total = 0
    async for usage in snapshot.usage():
        count += 1
        total += int.from_bytes(digest(bare(usage)))
    if (count, total) != (audit.usage_count, audit.usage_sum):
        yield Violation("the stored usage is not the journal's", {"stored": count, "in_the_journal": audit.usage_count})


def _fields(stored: msgspec.Struct, replayed: msgspec.Struct) -> dict[str, Any]:
    """The fields that differ, as stored and as replayed."""
    return {
        field: (getattr(stored, field), getattr(replayed, field))
        for field in stored.__struct_fields__
        if getattr(stored, field) != getattr(replayed, field)
    }


def _key_ref(taken: KeyTaken) -> KeyRef:
    return (taken.scope, taken.operation, taken.key)
