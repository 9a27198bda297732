"""SQLite's reads: short queries for the facade, and the whole ledger in pages for replay."""

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ledger.commands import StoredResponse
from ledger.model import Block, Reservation, ReservationRef, Scope, Wallet, WalletRef
from ledger.outcomes import KeyTaken, UsageRecorded
from ledger.store.protocol import JournalEntry, Position, Transaction, WalletBlocks
from ledger.store.replay import COMMAND_COLUMNS, JOURNAL_PAGE, SEQ_MAX, entries, page_end, values
from ledger.store.rows import (
    Row,
    block_from,
    block_row,
    key_from,
    key_row,
    reservation_from,
    reservation_row,
    response_from,
    usage_from,
    usage_row,
    wallet_from,
    wallet_row,
)
from ledger.store.statements import columns

T = TypeVar("T")


def _select(table: str, rest: str) -> str:
    return f"SELECT {', '.join(columns(table))} FROM {table} {rest}"  # noqa: S608


_WALLET = _select("ledger_wallet", "WHERE tenant = ? AND mode = ? AND wallet = ?")
_WALLET_VERSION = "SELECT version FROM ledger_wallet WHERE tenant = ? AND mode = ? AND wallet = ?"
_LIVE_BLOCKS = _select("ledger_block", "WHERE tenant = ? AND mode = ? AND wallet = ? AND live ORDER BY sequence")
_RESERVATION = "SELECT body FROM ledger_reservation WHERE tenant = ? AND mode = ? AND reservation = ?"
_RESERVATIONS_OF_REQUEST = "SELECT body FROM ledger_reservation WHERE tenant = ? AND mode = ? AND request_id = ?"
_USAGE_OF_REQUEST = _select(
    "ledger_usage", "WHERE tenant = ? AND mode = ? AND request_id = ? ORDER BY at_us, reservation, part"
)
_RESPONSE = """
    SELECT status, headers, body FROM ledger_response
    WHERE tenant = ? AND mode = ? AND operation = ? AND key = ? AND expires_at_us > ?
"""
_DUE_RESERVATIONS = """
    SELECT tenant, mode, reservation FROM ledger_reservation
    WHERE state = 'open' AND expires_at_us <= ? ORDER BY expires_at_us LIMIT ?
"""
_DUE_WALLETS = """
    SELECT DISTINCT tenant, mode, wallet FROM ledger_block
    WHERE live AND expires_at_us IS NOT NULL AND expires_at_us <= ? AND remaining > reserved LIMIT ?
"""
_TRANSACTIONS_SIDE = """
    SELECT * FROM (
        SELECT t.seq, t.position, t.at_us, t.amount * {sign} AS amount, t.{other} AS counterparty, t.asset, t.block,
               t.reference
        FROM ledger_transfer AS t
        WHERE t.tenant = :tenant AND t.mode = :mode AND t.{side} = :account AND t.{side} LIKE 'wallet:%'
              AND (t.seq, t.position) < (:seq, :position)
        ORDER BY t.seq DESC, t.position DESC LIMIT :limit
    )
"""
_TRANSACTIONS = f"""
    SELECT p.seq, p.position, p.at_us, c.id, c.kind, p.amount, p.counterparty, p.asset, p.block, p.reference,
           u.request_id, u.metric, u.action, u.model
    FROM ({_TRANSACTIONS_SIDE.format(side="debit", other="credit", sign=-1)} UNION ALL
          {_TRANSACTIONS_SIDE.format(side="credit", other="debit", sign=1)}) AS p
    JOIN ledger_command AS c ON c.seq = p.seq AND c.tenant = :tenant AND c.mode = :mode
    LEFT JOIN ledger_usage AS u
         ON u.tenant = :tenant AND u.mode = :mode AND u.reservation = p.reference AND u.part = 1
    ORDER BY p.seq DESC, p.position DESC LIMIT :limit
"""  # noqa: S608

_JOURNAL = f"SELECT {COMMAND_COLUMNS} FROM ledger_command WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608
_TRANSFERS = _select("ledger_transfer", "WHERE seq > ? AND seq <= ? ORDER BY seq, position")


def wallet(connection: sqlite3.Connection, ref: WalletRef) -> WalletBlocks | None:
    row = connection.execute(_WALLET, ref).fetchone()
    if row is None:
        return None
    return WalletBlocks(wallet_from(row), tuple(map(block_from, connection.execute(_LIVE_BLOCKS, ref))))


def wallet_version(connection: sqlite3.Connection, ref: WalletRef) -> int | None:
    row = connection.execute(_WALLET_VERSION, ref).fetchone()
    return None if row is None else int(row[0])


def reservation(connection: sqlite3.Connection, ref: ReservationRef) -> Reservation | None:
    row = connection.execute(_RESERVATION, ref).fetchone()
    return None if row is None else reservation_from(row[0])


def reservation_of_request(connection: sqlite3.Connection, scope: Scope, request_id: str) -> Reservation | None:
    found = [reservation_from(body) for (body,) in connection.execute(_RESERVATIONS_OF_REQUEST, (*scope, request_id))]
    return max(found, key=lambda known: (known.created_at_us, known.ref), default=None)


def usage_of_request(connection: sqlite3.Connection, scope: Scope, request_id: str) -> tuple[UsageRecorded, ...]:
    return tuple(map(usage_from, connection.execute(_USAGE_OF_REQUEST, (*scope, request_id))))


def response(
    connection: sqlite3.Connection, scope: Scope, operation: str, key: str, now_us: int
) -> StoredResponse | None:
    row = connection.execute(_RESPONSE, (*scope, operation, key, now_us)).fetchone()
    return None if row is None else response_from(status=row[0], headers=row[1], body=row[2])


def transactions(
    connection: sqlite3.Connection, ref: WalletRef, before: Position | None, limit: int
) -> list[Transaction]:
    end = before or Position(SEQ_MAX, 0)
    parameters = {
        "tenant": ref.tenant,
        "mode": ref.mode,
        "account": Wallet(ref=ref, asset="").account,
        "seq": end.seq,
        "position": end.position,
        "limit": limit,
    }
    return [Transaction(*row) for row in connection.execute(_TRANSACTIONS, parameters)]


def due_reservations(connection: sqlite3.Connection, now_us: int, limit: int) -> list[ReservationRef]:
    return [ReservationRef(*row) for row in connection.execute(_DUE_RESERVATIONS, (now_us, limit))]


def due_wallets(connection: sqlite3.Connection, now_us: int, limit: int) -> list[WalletRef]:
    return [WalletRef(*row) for row in connection.execute(_DUE_WALLETS, (now_us, limit))]


class SqliteSnapshot:
    """Iterates inside one read transaction. *run* does its work in a thread."""

    def __init__(
        self, connection: sqlite3.Connection, run: Callable[[Callable[[], list[Any]]], Awaitable[list[Any]]]
    ) -> None:
        self._connection = connection
        self._run = run

    async def journal(self) -> AsyncIterator[JournalEntry]:
        last = 0
        while entries := await self._run(lambda: self._journal_page(last)):  # noqa: B023
            for entry in entries:
                yield entry
            last = entries[-1].seq

    def _journal_page(self, after: int) -> list[JournalEntry]:
        """The commands after *after*, with all transfers up to the last of them."""
        commands = self._connection.execute(_JOURNAL, (after, JOURNAL_PAGE)).fetchall()
        return entries(commands, self._connection.execute(_TRANSFERS, (after, page_end(commands))))

    def wallets(self) -> AsyncIterator[Wallet]:
        return self._rows("ledger_wallet", wallet_from, wallet_row)

    def blocks(self) -> AsyncIterator[Block]:
        return self._rows("ledger_block", block_from, block_row)

    def reservations(self) -> AsyncIterator[Reservation]:
        return self._rows("ledger_reservation", lambda row: reservation_from(row[-1]), reservation_row)

    def keys(self) -> AsyncIterator[KeyTaken]:
        return self._rows("ledger_key", key_from, key_row)

    def usage(self) -> AsyncIterator[UsageRecorded]:
        return self._rows("ledger_usage", usage_from, usage_row)

    async def _rows(self, table: str, value_of: Callable[[Row], T], row_of: Callable[[T], Row]) -> AsyncIterator[T]:
        cursor = self._connection.execute(_select(table, ""))
        while rows := await self._run(lambda: cursor.fetchmany(JOURNAL_PAGE)):
            for value in values(table, rows, value_of, row_of):
                yield value
