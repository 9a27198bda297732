"""Rows of a snapshot to the values that are replayed and compared: the same for every store."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from ledger.erasable import facts_to_keep
from ledger.model import Scope
from ledger.outcomes import Transfer
from ledger.store.protocol import DamagedRow, JournalEntry
from ledger.store.rows import Row, facts_from, result_from, transfer_from

T = TypeVar("T")

SEQ_MAX = 2**63 - 1

JOURNAL_PAGE = 1_000
"""How many commands of the journal are in memory at once."""

COMMAND_COLUMNS = "seq, tenant, mode, id, kind, at_us, transfers, facts, result"


def page_end(commands: Sequence[Sequence[Any]]) -> int:
    """The number up to which the transfers belong to a page of *commands*, each with its number first."""
    return int(commands[-1][0]) if len(commands) == JOURNAL_PAGE else SEQ_MAX


def entries(commands: Iterable[Sequence[Any]], transfers: Iterable[Sequence[Any]]) -> list[JournalEntry]:
    """A page of the journal, in order, from rows of ``COMMAND_COLUMNS`` and rows of the table of transfers.

    A transfer of no command is an entry of its own without an id, which no replay accepts.

    Raises:
        DamagedRow: one cannot be read.
    """
    commands = list(commands)
    told = {seq: (count, at_us) for seq, _, _, _, _, at_us, count, _, _ in commands}
    booked: dict[int, list[Transfer]] = defaultdict(list)
    for row in transfers:
        seq, position, at_us = row[2], row[3], row[10]
        count, told_us = told.get(seq, (position + 1, at_us))
        if not 0 <= position < count or at_us != told_us:
            raise DamagedRow(f"ledger_transfer {seq}, {position}: its place or its time is not its command's")
        booked[seq].append(transfer_from(row))
    found = [
        JournalEntry(
            seq=seq,
            scope=Scope(tenant, mode),
            id=command_id,
            kind=kind,
            at_us=at_us,
            # An older release, beside this one during an upgrade, wrote metadata as well.
            facts=tuple(facts_to_keep(_read(facts_from, facts, seq))),
            transfers=tuple(booked.pop(seq, ())),
            transfers_written=count,
            result=_read(result_from, result, seq),
        )
        for seq, tenant, mode, command_id, kind, at_us, count, facts, result in commands
    ]
    found += [
        JournalEntry(
            seq=seq,
            scope=strays[0].scope,
            id="",
            kind="",
            at_us=0,
            facts=(),
            transfers=tuple(strays),
            transfers_written=0,
            result=None,
        )
        for seq, strays in booked.items()
    ]
    return sorted(found, key=lambda entry: entry.seq)


def _read(decode: Callable[[str], T], text: str, seq: int) -> T:
    try:
        return decode(text)
    except msgspec.MsgspecError as error:
        raise DamagedRow(f"ledger_command {seq}: {error}") from error


def values(table: str, found: Iterable[Row], value_of: Callable[[Row], T], row_of: Callable[[T], Row]) -> Iterator[T]:
    """Every row's value, which must make the same row again: some columns repeat what others say.

    Raises:
        DamagedRow: it cannot be read, or does not.
    """
    for row in found:
        try:
            value = value_of(row)
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise DamagedRow(f"{table} {row[:4]}: {error}") from error
        if row_of(value) != row:
            raise DamagedRow(f"{table} {row[:4]}: its columns contradict each other")
        yield value
