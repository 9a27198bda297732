"""What every store does to erase what is known of a person: the statements, page by page.

How it works. :func:`erasing` is a generator: it yields one transaction at a time, as statements of which the last one
may return rows, and is sent these. So a store that waits for its answers and one that does not run the same. A page is
bounded, and the next one begins behind it, so that no lock is held for long and a repetition finds nothing to do.

The values stand in the statements as ``$1``, which SQLite takes for a name and PostgreSQL for a number.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from ledger.batch import RESPONSE_LIFE_US
from ledger.erasable import bare, without_metadata
from ledger.model import WalletRef
from ledger.store.rows import Row, reservation_from, to_json

PAGE_ROWS: Final = 500

_FIRST: Final = -(2**62)


class Statement(NamedTuple):
    sql: str
    values: tuple[Any, ...]


Pages = Generator[Sequence[Statement], list[Row], None]

_BLOCKS: Final = """
    UPDATE ledger_block SET metadata = '{}' WHERE tenant = $1 AND mode = $2 AND wallet = $3 AND metadata <> '{}'
"""
_EVENTS: Final = """
    SELECT sequence, body FROM ledger_event
    WHERE tenant = $1 AND mode = $2 AND wallet = $3 AND sequence > $4 ORDER BY sequence LIMIT $5
"""
_PUT_EVENT: Final = """
    UPDATE ledger_event SET body = $5 WHERE tenant = $1 AND mode = $2 AND wallet = $3 AND sequence = $4
"""
_USAGE: Final = """
    SELECT at_us, reservation, part, metadata FROM ledger_usage
    WHERE tenant = $1 AND mode = $2 AND customer_id = $3 AND (at_us, reservation, part) > ($4, $5, $6)
    ORDER BY at_us, reservation, part LIMIT $7
"""
_EMPTY_USAGE: Final = """
    UPDATE ledger_usage SET metadata = '{}' WHERE tenant = $1 AND mode = $2 AND reservation = $3 AND part = $4
"""
RESERVATIONS: Final = {
    "sqlite": """
        SELECT reservation, body FROM ledger_reservation
        WHERE tenant = $1 AND mode = $2 AND instr(body, '"metadata":') > 0 AND reservation > $4
              AND instr(body, '"' || $3 || '"') > 0
        ORDER BY reservation LIMIT $5
    """,
    "postgresql": """
        SELECT reservation, body FROM ledger_reservation
        WHERE tenant = $1 AND mode = $2 AND strpos(body, '"metadata":') > 0 AND reservation > $4
              AND split_part(split_part(body, '"wallets":[["', 2), '"', 5) = $3
        ORDER BY reservation LIMIT $5
    """,
}
"""Those that *wallet* pays for and that have metadata. Each kind of database has an index of them."""

_PUT_RESERVATION: Final = """
    UPDATE ledger_reservation SET body = $5 WHERE tenant = $1 AND mode = $2 AND reservation = $3 AND body = $4
"""
_CHARGED_LATELY: Final = """
    SELECT u.at_us, u.reservation, u.part, r.body FROM ledger_usage AS u
    JOIN ledger_reservation AS r ON r.tenant = u.tenant AND r.mode = u.mode AND r.reservation = u.reservation
    WHERE u.tenant = $1 AND u.mode = $2 AND u.customer_id = $3 AND (u.at_us, u.reservation, u.part) > ($4, $5, $6)
    ORDER BY u.at_us, u.reservation, u.part LIMIT $7
"""
_DROP_RESPONSE: Final = """
    DELETE FROM ledger_response WHERE tenant = $1 AND mode = $2 AND operation = $3 AND key = $4
"""


def erasing(dialect: str, wallet: WalletRef, customer_id: str, *, now_us: int) -> Pages:
    """Metadata of *wallet* and of the usage of *customer_id*, and the answers that are kept for a day."""
    yield [Statement(_BLOCKS, tuple(wallet))]
    yield from _events(wallet)
    yield from _reservations(dialect, wallet)
    yield from _usage(wallet, customer_id)
    yield from _responses(wallet, customer_id, since_us=now_us - 2 * RESPONSE_LIFE_US)


def _events(wallet: WalletRef) -> Pages:
    last, more = _FIRST, True
    while more:
        rows = yield [Statement(_EVENTS, (*wallet, last, PAGE_ROWS))]
        if changed := list(_changed_events(wallet, rows)):
            yield changed
        last, more = rows[-1][0] if rows else last, len(rows) == PAGE_ROWS


def _changed_events(wallet: WalletRef, rows: Sequence[Row]) -> Iterator[Statement]:
    for sequence, body in rows:
        told = msgspec.json.decode(body)
        left = without_metadata(told)
        if left != told:
            yield Statement(_PUT_EVENT, (*wallet, sequence, to_json(left)))


def _reservations(dialect: str, wallet: WalletRef) -> Pages:
    last, more = "", True
    while more:
        rows = yield [Statement(RESERVATIONS[dialect], (*wallet, last, PAGE_ROWS))]
        # One that has moved since it was read is met by the next erasure: see `Ledger.erase`.
        changed = [
            Statement(_PUT_RESERVATION, (*wallet.scope, reservation, body, to_json(bare(reservation_from(body)))))
            for reservation, body in rows
        ]
        if changed:
            yield changed
        last, more = rows[-1][0] if rows else last, len(rows) == PAGE_ROWS


def _usage(wallet: WalletRef, customer_id: str) -> Pages:
    last, more = (_FIRST, "", 0), True
    while more:
        rows = yield [Statement(_USAGE, (*wallet.scope, customer_id, *last, PAGE_ROWS))]
        changed = [
            Statement(_EMPTY_USAGE, (*wallet.scope, reservation, part))
            for _, reservation, part, metadata in rows
            if metadata != "{}"
        ]
        if changed:
            yield changed
        last, more = rows[-1][:3] if rows else last, len(rows) == PAGE_ROWS


def _responses(wallet: WalletRef, customer_id: str, *, since_us: int) -> Pages:
    """The answers to what the customer was charged for lately, by the keys of the reservations."""
    last, more = (since_us, "", 0), True
    while more:
        rows = yield [Statement(_CHARGED_LATELY, (*wallet.scope, customer_id, *last, PAGE_ROWS))]
        keys = [reservation_from(row[3]).key for row in rows]
        dropped = [Statement(_DROP_RESPONSE, (*wallet.scope, *key)) for key in keys if key is not None]
        if dropped:
            yield dropped
        last, more = rows[-1][:3] if rows else last, len(rows) == PAGE_ROWS
