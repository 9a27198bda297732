"""Values to the parameters of the batch functions: JSON arrays of objects with the columns' names, None for no rows.

One text for each kind of change was measured as fast as arrays of composite types, with less work on our side, and it
needs no types to be looked up on each connection.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from sqlmodel import SQLModel

from ledger.batch import BlockRef, CommandRef, Writes
from ledger.model import Block, ReservationRef, WalletRef
from ledger.state import KeyRef
from ledger.store import tables  # noqa: F401  (fills the metadata)
from ledger.store.rows import (
    Row,
    block_row,
    event_row,
    key_row,
    reservation_row,
    to_json,
    transfer_row,
    usage_row,
    wallet_row,
)

_encode = msgspec.json.Encoder().encode


def columns(table: str) -> tuple[str, ...]:
    """A table's columns, in the order of a row of :mod:`ledger.store.rows`."""
    return tuple(column.name for column in SQLModel.metadata.tables[table].columns)


WALLET: Final = columns("ledger_wallet")
BLOCK: Final = columns("ledger_block")
KEY: Final = columns("ledger_key")
_COMMAND: Final = columns("ledger_command")
_TRANSFER: Final = columns("ledger_transfer")
_RESERVATION: Final = columns("ledger_reservation")
_EVENT: Final = columns("ledger_event")
_USAGE: Final = columns("ledger_usage")
_RESPONSE: Final = ("tenant", "mode", "operation", "key", "status", "headers", "number", "expires_at_us")
_BLOCK_CHANGES: Final = (
    *("tenant", "mode", "wallet", "id", "granted", "consumed", "reserved", "expired", "revoked", "clawed", "remaining"),
    *("live", "frozen"),
)
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
        block.granted,
        block.consumed,
        block.reserved,
        block.expired,
        block.revoked,
        block.clawed,
        block.remaining,
        block.live,
        block.frozen,
    )


class Written(NamedTuple):
    """What a batch writes: the parameters of ``farebox_write_v1``, in its order, and the texts of the reservations."""

    parameters: tuple[Any, ...]
    bodies: dict[ReservationRef, str]


def writes_of(writes: Writes, keys_there: Iterable[KeyRef]) -> Written:
    """*keys_there* were taken before the batch."""
    commands: list[Row] = []
    transfers: list[Row] = []
    for number, entry in enumerate(writes.journal, start=1):
        counted = len(entry.transfers)
        facts, result = to_json(entry.facts), to_json(entry.result)
        commands.append((*entry.scope, entry.id, number, entry.kind, entry.at_us, counted, facts, result))
        for position, transfer in enumerate(entry.transfers):
            transfers.append(transfer_row(transfer, seq=number, position=position, at_us=entry.at_us))
    there = set(keys_there)
    taken_anew = [
        (taken.scope, taken.operation, taken.key)
        for taken in writes.keys_taken
        if (taken.scope, taken.operation, taken.key) in there
    ]
    # A reservation that is charged twice in one batch answers with the last.
    responses = list({row[:4]: row for row in writes.responses}.values())
    opened = [reservation_row(reservation) for reservation in writes.reservations_opened]
    changed = [reservation_row(reservation) for reservation in writes.reservations_changed]
    parameters = (
        objects(WALLET, map(wallet_row, writes.wallets_opened)),
        objects((*WALLET, "was"), ((*wallet_row(wallet), was) for wallet, was in writes.wallets_changed)),
        len(writes.wallets_changed),
        key_names([*writes.keys_freed, *taken_anew]),
        objects(KEY, map(key_row, writes.keys_taken)),
        objects(_COMMAND, commands),
        objects(_TRANSFER, transfers),
        len(commands),
        objects(BLOCK, map(block_row, writes.blocks_opened)),
        objects(_BLOCK_CHANGES, (_changes_of(block) for block, _ in writes.blocks_changed)),
        len(writes.blocks_changed),
        objects(_RESERVATION, opened),
        objects(_RESERVATION, changed),
        len(changed),
        objects(_RESPONSE, ((*row[:6], number, row[7]) for number, row in enumerate(responses, start=1))),
        [row[6] for row in responses],
        objects(_EVENT, map(event_row, writes.events)),
        objects(_USAGE, map(usage_row, writes.usage)),
    )
    return Written(parameters, {ReservationRef(*row[:3]): row[-1] for row in (*opened, *changed)})
