"""The SQL of SQLite's batches, made from the tables.

How it works. Python's sqlite3 gives the interpreter lock away for every step of a statement and has to win it back
after it. Beside a busy event loop that wait is up to a switch interval (5 ms), so a step a row would take seconds a
batch. Therefore many rows go in with one step, as one statement with many rows of values in a few fixed sizes, and many
rows come out with one step, as one JSON array.

Table and column names are the models' own; every value is a parameter.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ledger.store import tables
from ledger.store.rows import Row

BULK_ROWS = (64, 16, 4, 1)
"""How many rows one statement takes: a few sizes, so that the prepared statements are used again."""

_decode_rows = msgspec.json.Decoder(list[list[Any]]).decode
_encode = msgspec.json.Encoder().encode


def columns(table: str) -> list[str]:
    return [f'"{name}"' for name in tables.row_columns(table)]


class Bulk:
    """A statement over many rows of values. *head* and *tail* go around the rows, *joint* between them."""

    def __init__(self, head: str, row: str, *, joint: str = ", ", tail: str = "") -> None:
        self.sql = {size: f"{head} {joint.join([row] * size)} {tail}" for size in BULK_ROWS}

    def run(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> int:
        """How many rows of the table it changed."""
        changed = done = 0
        for size in BULK_ROWS:
            while len(rows) - done >= size:
                values = [value for row in rows[done : done + size] for value in row]
                changed += connection.execute(self.sql[size], values).rowcount
                done += size
        return changed


def insert(table: str, *, replace: bool = False) -> Bulk:
    """Insert whole rows; with *replace*, over what has the same key."""
    names = columns(table)
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    return Bulk(f"{verb} INTO {table} ({', '.join(names)}) VALUES", _values(len(names)))


def update(table: str, keys: Sequence[str], changes: Sequence[str]) -> Bulk:
    """Set *changes* where *keys* are equal; a row of values has the keys first, then the changes."""
    assignments = ", ".join(f'"{name}" = n.column{len(keys) + number}' for number, name in enumerate(changes, start=1))
    conditions = " AND ".join(f'{table}."{name}" = n.column{number}' for number, name in enumerate(keys, start=1))
    head = f"UPDATE {table} SET {assignments} FROM (VALUES"  # noqa: S608
    return Bulk(head, _values(len(keys) + len(changes)), tail=f") AS n WHERE {conditions}")


def delete(table: str, keys: Sequence[str]) -> Bulk:
    """An OR of keys is looked up one by one; a list of tuples would be a scan."""
    row = "(" + " AND ".join(f'"{name}" = ?' for name in keys) + ")"
    return Bulk(f"DELETE FROM {table} WHERE", row, joint=" OR ")  # noqa: S608


def _values(width: int) -> str:
    return f"({','.join('?' * width)})"


def lookup(table: str, keys: Sequence[str], *, take: Sequence[str] | None = None, where: str = "TRUE") -> str:
    """One JSON array of the rows whose *keys* are in the JSON array that is its parameter."""
    taken = columns(table) if take is None else [f'"{name}"' for name in take]
    conditions = " AND ".join(
        f"t.\"{name}\" = json_extract(n.value, '$[{number}]')" for number, name in enumerate(keys)
    )
    values = ", ".join(f"t.{name}" for name in taken)
    return (
        f"SELECT json_group_array(json_array({values})) "  # noqa: S608
        f"FROM json_each(?) AS n CROSS JOIN {table} AS t WHERE {conditions} AND {where}"
    )


def fetch(connection: sqlite3.Connection, sql: str, references: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """The rows that a :func:`lookup` finds for *references*; no round trip for none."""
    named = list(references)
    if not named:
        return []
    (found,) = connection.execute(sql, (_encode(named).decode(),)).fetchone()
    return _decode_rows(found)
