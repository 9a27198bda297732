"""PostgreSQL's reads: short queries for the facade, and the whole ledger in pages for replay."""

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import msgspec

from ledger.commands import StoredResponse
from ledger.model import Block, Reservation, ReservationRef, Scope, Wallet, WalletRef
from ledger.outcomes import KeyTaken, UsageRecorded
from ledger.store.postgres_connection import Connection, translated
from ledger.store.postgres_rows import BLOCK, WALLET, columns
from ledger.store.protocol import JournalEntry, Position, Transaction, WalletBlocks
from ledger.store.replay import COMMAND_COLUMNS, JOURNAL_PAGE, SEQ_MAX, entries, page_end, values
from ledger.store.row_security import naming
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

T = TypeVar("T")


def _select(table: str, rest: str) -> str:
    names = ", ".join(f'"{name}"' for name in columns(table))
    return f"SELECT {names} FROM {table} {rest}"  # noqa: S608


_WALLET = "SELECT farebox_wallet_v1($1, $2, $3, $4)"
_RESERVATION = "SELECT body FROM ledger_reservation WHERE tenant = $1 AND mode = $2 AND reservation = $3"
_RESERVATIONS_OF_REQUEST = "SELECT body FROM ledger_reservation WHERE tenant = $1 AND mode = $2 AND request_id = $3"
_USAGE_OF_REQUEST = _select(
    "ledger_usage", "WHERE tenant = $1 AND mode = $2 AND request_id = $3 ORDER BY at_us, reservation, part"
)
_RESPONSE = """
    SELECT status, headers, body FROM ledger_response
    WHERE tenant = $1 AND mode = $2 AND operation = $3 AND key = $4 AND expires_at_us > $5
"""
_DUE_RESERVATIONS = "SELECT tenant, mode, reservation FROM farebox_due_reservations($1, $2)"
_DUE_WALLETS = "SELECT tenant, mode, wallet FROM farebox_due_wallets($1, $2)"
_DUE_RESPONSES = "SELECT tenant, mode, operation, key FROM farebox_due_responses($1, $2)"
_SCOPES = "SELECT tenant, mode FROM farebox_ledger_scopes()"
_PURGE = """
    DELETE FROM ledger_response AS r USING unnest($2::text[], $3::text[], $4::text[], $5::text[])
           AS n (tenant, mode, operation, key)
    WHERE r.tenant = n.tenant AND r.mode = n.mode AND r.operation = n.operation AND r.key = n.key
          AND r.expires_at_us <= $1
"""
_TRANSACTIONS_SIDE = """
    (SELECT t.seq, t.position, t.at_us, t.amount * {sign} AS amount, t.{other} AS counterparty, t.asset, t.block,
            t.reference
     FROM ledger_transfer AS t
     WHERE t.tenant = $1 AND t.mode = $2 AND t.{side} = $3 AND t.{side} LIKE 'wallet:%'
           AND (t.seq, t.position) < ($4, $5)
     ORDER BY t.seq DESC, t.position DESC LIMIT $6)
"""
_TRANSACTIONS = f"""
    SELECT p.seq, p.position, p.at_us, c.id, c.kind, p.amount, p.counterparty, p.asset, p.block, p.reference,
           u.request_id, u.metric, u.action, u.model
    FROM ({_TRANSACTIONS_SIDE.format(side="debit", other="credit", sign=-1)} UNION ALL
          {_TRANSACTIONS_SIDE.format(side="credit", other="debit", sign=1)}
          ORDER BY seq DESC, position DESC LIMIT $6) AS p
    JOIN ledger_command AS c ON c.tenant = $1 AND c.mode = $2 AND c.seq = p.seq
    LEFT JOIN ledger_usage AS u ON u.tenant = $1 AND u.mode = $2 AND u.reservation = p.reference AND u.part = 1
    ORDER BY p.seq DESC, p.position DESC
"""  # noqa: S608
_JOURNAL = f"SELECT {COMMAND_COLUMNS} FROM ledger_command WHERE seq > $1 ORDER BY seq LIMIT $2"  # noqa: S608
_TRANSFERS = _select("ledger_transfer", "WHERE seq > $1 AND seq <= $2 ORDER BY seq, position")


class _Found(msgspec.Struct):
    """What ``farebox_wallet_v1`` returns."""

    wallet: dict[str, Any]
    blocks: list[dict[str, Any]] | None


_decode_found = msgspec.json.Decoder(_Found).decode


async def wallet(connection: Connection, ref: WalletRef) -> WalletBlocks | None:
    """One round trip: the function names the scope itself."""
    found = await connection.fetchval(_WALLET, *ref, True)
    if found is None:
        return None
    read = _decode_found(found)
    blocks = (block_from([row[name] for name in BLOCK]) for row in read.blocks or ())
    return WalletBlocks(wallet_from([read.wallet[name] for name in WALLET]), tuple(blocks))


async def wallet_version(connection: Connection, ref: WalletRef) -> int | None:
    found = await connection.fetchval(_WALLET, *ref, False)
    return None if found is None else int(_decode_found(found).wallet["version"])


async def reservation(connection: Connection, ref: ReservationRef) -> Reservation | None:
    rows = await _named(connection, ref.scope, _RESERVATION, *ref)
    return reservation_from(rows[0][0]) if rows else None


async def reservation_of_request(connection: Connection, scope: Scope, request_id: str) -> Reservation | None:
    rows = await _named(connection, scope, _RESERVATIONS_OF_REQUEST, *scope, request_id)
    found = [reservation_from(body) for (body,) in rows]
    return max(found, key=lambda known: (known.created_at_us, known.ref), default=None)


async def usage_of_request(connection: Connection, scope: Scope, request_id: str) -> tuple[UsageRecorded, ...]:
    return tuple(map(usage_from, await _named(connection, scope, _USAGE_OF_REQUEST, *scope, request_id)))


async def response(
    connection: Connection, scope: Scope, operation: str, key: str, now_us: int
) -> StoredResponse | None:
    rows = await _named(connection, scope, _RESPONSE, *scope, operation, key, now_us)
    for status, headers, body in rows:
        return response_from(status=status, headers=headers, body=body)
    return None


async def transactions(
    connection: Connection, ref: WalletRef, before: Position | None, limit: int
) -> list[Transaction]:
    end = before or Position(SEQ_MAX, 0)
    account = Wallet(ref=ref, asset="").account
    rows = await _named(connection, ref.scope, _TRANSACTIONS, *ref.scope, account, end.seq, end.position, limit)
    return [Transaction(*row) for row in rows]


async def due_reservations(connection: Connection, now_us: int, limit: int) -> list[ReservationRef]:
    return [ReservationRef(*row) for row in await connection.fetch(_DUE_RESERVATIONS, now_us, limit)]


async def due_wallets(connection: Connection, now_us: int, limit: int) -> list[WalletRef]:
    return [WalletRef(*row) for row in await connection.fetch(_DUE_WALLETS, now_us, limit)]


async def purge_responses(connection: Connection, now_us: int, limit: int) -> int:
    due = sorted(tuple(row) for row in await connection.fetch(_DUE_RESPONSES, now_us, limit))
    if not due:
        return 0
    await connection.execute(f"BEGIN; {naming(Scope(row[0], row[1]) for row in due)}")
    status = await connection.execute(_PURGE, now_us, *map(list, zip(*due, strict=True)))
    await connection.execute("COMMIT")
    return int(status.removeprefix("DELETE "))


async def _named(connection: Connection, scope: Scope, query: str, *values: Any) -> list[Row]:
    """The rows of *query* in a transaction that may see *scope*. What a reader sees need not be waited for on disk."""
    await connection.execute(f"BEGIN READ ONLY; {naming((scope,))}")
    rows = _tuples(await connection.fetch(query, *values))
    await connection.execute("COMMIT")
    return rows


async def begin_snapshot(connection: Connection) -> None:
    """From here on everything is read as it is now, of all scopes that there are."""
    await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    scopes = await connection.fetch(_SCOPES)
    await connection.execute(naming(Scope(*row) for row in scopes))


class PostgresSnapshot:
    """Iterates inside one transaction that sees one moment. Numbers of the journal rise, with gaps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def journal(self) -> AsyncIterator[JournalEntry]:
        last = 0
        while page := await self._journal_page(last):
            for entry in page:
                yield entry
            last = page[-1].seq

    async def _journal_page(self, after: int) -> list[JournalEntry]:
        with translated():
            commands = _tuples(await self._connection.fetch(_JOURNAL, after, JOURNAL_PAGE))
            transfers = _tuples(await self._connection.fetch(_TRANSFERS, after, page_end(commands)))
        return entries(commands, transfers)

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
        with translated():
            cursor = await self._connection.cursor(_select(table, ""))
            while rows := await cursor.fetch(JOURNAL_PAGE):
                for value in values(table, _tuples(rows), value_of, row_of):
                    yield value


def _tuples(rows: Iterable[Any]) -> list[Row]:
    return [tuple(row) for row in rows]
