"""Values to the parameters of the batch functions: arrays of rows in the order of a composite type, None for no rows.

Names to look up are JSON arrays of objects with the columns' names. asyncpg asks for the composite types once a
connection.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from ledger.batch import BlockRef, CommandRef, Writes
from ledger.model import Block, ReservationRef, Scope, WalletRef
from ledger.state import KeyRef
from ledger.store import tables
from ledger.store.rows import (
    Row,
    block_amounts,
    block_row,
    event_row,
    facts_json,
    key_row,
    reservation_row,
    reversal_json,
    to_json,
    transfer_row,
    usage_row,
    wallet_books,
    wallet_watched,
)

_encode = msgspec.json.Encoder().encode


def columns(table: str) -> tuple[str, ...]:
    """A table's columns, in the order of a row of :mod:`ledger.store.rows`."""
    return tables.row_columns(table)


WALLET: Final = columns("ledger_wallet")
BLOCK: Final = columns("ledger_block")
KEY: Final = columns("ledger_key")
_KEY_NAME: Final = ("tenant", "mode", "operation", "key")


def objects(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str | None:
    made = [dict(zip(names, row, strict=False)) for row in rows]
    return _encode(made).decode() if made else None


def wallet_names(refs: Iterable[WalletRef]) -> str | None:
    return objects(("tenant", "mode", "wallet"), refs)


def block_names(refs: Iterable[BlockRef]) -> str | None:
    return objects(("tenant", "mode", "wallet", "id"), ((*ref, block_id) for ref, block_id in refs))


def reservation_names(refs: Iterable[ReservationRef]) -> str | None:
    return objects(("tenant", "mode", "reservation"), refs)


def key_names(refs: Iterable[KeyRef]) -> str | None:
    return objects(_KEY_NAME, ((*scope, operation, key) for scope, operation, key in refs))


def command_names(refs: Iterable[CommandRef]) -> str | None:
    return objects(("tenant", "mode", "id"), ((*scope, command_id) for scope, command_id in refs))


def _changes_of(block: Block) -> Row:
    """What a batch can change of a block, after its name."""
    return (
        *block.wallet,
        block.id,
        *block_amounts(block),
        block.live,
        block.frozen,
        reversal_json(block),
    )


class Written(NamedTuple):
    """What a batch writes: the parameters of ``farebox_write_v2``, in its order, and the texts of the reservations.

    What wallets are watched for comes last, for ``farebox_write_v3``, and only where that has changed.
    """

    parameters: tuple[Any, ...]
    bodies: dict[ReservationRef, str]


def writes_of(writes: Writes, keys_there: Iterable[KeyRef]) -> Written:
    """*keys_there* were taken before the batch."""
    commands: list[Row] = []
    transfers: list[Row] = []
    for number, entry in enumerate(writes.journal, start=1):
        counted = len(entry.transfers)
        facts, result = facts_json(entry.facts), to_json(entry.result)
        commands.append((*entry.scope, entry.id, number, entry.kind, entry.at_us, counted, facts, result))
        for position, transfer in enumerate(entry.transfers):
            transfers.append(transfer_row(transfer, seq=number, position=position, at_us=entry.at_us))
    there = set(keys_there)
    taken = [key_row(key) for key in writes.keys_taken]
    taken_anew = [row[:4] for row in taken if (Scope(*row[:2]), *row[2:4]) in there]
    # A reservation that is charged twice in one batch answers with the last.
    responses = list({row[:4]: row for row in writes.responses}.values())
    opened = [reservation_row(reservation) for reservation in writes.reservations_opened]
    changed = [reservation_row(reservation) for reservation in writes.reservations_changed]
    parameters = (
        list(map(wallet_books, writes.wallets_opened)),
        [(*wallet_books(wallet), was) for wallet, was in writes.wallets_changed],
        [*((*scope, operation, key) for scope, operation, key in writes.keys_freed), *taken_anew],
        taken,
        commands,
        transfers,
        list(map(block_row, writes.blocks_opened)),
        [_changes_of(block) for block, _ in writes.blocks_changed],
        opened,
        changed,
        responses,
        [event_row(raised)[:-1] for raised in writes.events],
        list(map(usage_row, writes.usage)),
    )
    given = [rows or None for rows in parameters]
    if writes.wallets_watched:
        given.append([(*wallet.ref, *wallet_watched(wallet)) for wallet in writes.wallets_watched])
    return Written(tuple(given), {ReservationRef(*row[:3]): row[-1] for row in (*opened, *changed)})
