"""The ledger's tables as an auditor reads them: plain SQL, and none of the ledger's own code."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

SQLITE = "sqlite:///"


class Booked(NamedTuple):
    """What the books say of one request.

    *charged* is the sum of the journal's entries that its reservation took from wallets, *refunded* of those that gave
    something back; *recorded* is the sum of its usage rows, whose *endings* say how it ended.
    """

    state: str
    charged: int
    recorded: int
    endings: tuple[str, ...]
    refunded: int = 0


class Totals(NamedTuple):
    """A wallet: what it was given and what is left, by its blocks; what came and went, by the journal."""

    granted: int
    remaining: int
    reserved: int
    receivable: int
    journalled: int
    """What all entries together leave in it."""


class Books:
    """Those of a SQLite file, or of a PostgreSQL as its superuser, whom no row is hidden from."""

    def __init__(self, database: Path | str) -> None:
        """*database* is a file's path, or a URL as in the settings."""
        self._url = database if isinstance(database, str) else f"{SQLITE}{database}"

    @contextmanager
    def _read(self) -> Iterator["_Snapshot"]:
        if self._url.startswith(SQLITE):
            path = self._url.removeprefix(SQLITE)
            with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
                connection.execute("BEGIN")
                yield _Snapshot(connection, "?")
        else:
            with psycopg.connect(self._url) as connection:
                connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                yield _Snapshot(connection, "%s")

    def requests(self) -> dict[str, Booked]:
        """All requests that reserved, by their ids; the ledger has never more than one reservation of each."""
        with self._read() as rows:
            states = rows("SELECT reservation, request_id, state FROM ledger_reservation")
            charged, refunded = (
                dict(
                    rows(
                        f"SELECT reference, CAST(SUM(amount) AS bigint) FROM ledger_transfer"
                        f" WHERE {side} LIKE 'wallet:%' AND reference IS NOT NULL GROUP BY reference"
                    )
                )
                for side in ("debit", "credit")
            )
            usage: dict[str, list[tuple[int, str]]] = {}
            for reservation, amount, ending in rows(
                "SELECT reservation, charged, ending FROM ledger_usage ORDER BY reservation, part"
            ):
                usage.setdefault(reservation, []).append((amount, ending))
        found = {}
        for reservation, request_id, state in states:
            assert request_id not in found, f"{request_id} reserved twice"
            parts = usage.get(reservation, [])
            found[request_id] = Booked(
                state,
                charged.get(reservation, 0),
                sum(part[0] for part in parts),
                tuple(part[1] for part in parts),
                refunded.get(reservation, 0),
            )
        return found

    def commands(self) -> int:
        """How many commands the journal has."""
        with self._read() as rows:
            count: int = rows("SELECT COUNT(*) FROM ledger_command")[0][0]
            return count

    def open_requests(self, model: str | None = None) -> set[str]:
        """The ids of requests whose credits are still reserved."""
        with self._read() as rows:
            found = rows("SELECT request_id, body FROM ledger_reservation WHERE state = 'open'")
        return {row[0] for row in found if model is None or json.loads(row[1])["tags"]["model"] == model}

    def last_expiry_us(self) -> int:
        """When the last of the open reservations runs out; 0 when there is none."""
        with self._read() as rows:
            query = "SELECT COALESCE(MAX(expires_at_us), 0) FROM ledger_reservation WHERE state = 'open'"
            latest: int = rows(query)[0][0]
            return latest

    def settled_requests(self) -> set[str]:
        with self._read() as rows:
            return {row[0] for row in rows("SELECT request_id FROM ledger_reservation WHERE state <> 'open'")}

    def lowest_balances(self) -> dict[str, int]:
        """Of each wallet the lowest balance that it ever had, entry by entry through the journal."""
        balances: dict[str, int] = {}
        lowest: dict[str, int] = {}
        for name, change in self._changes():
            balances[name] = balances.get(name, 0) + change
            lowest[name] = min(lowest.get(name, 0), balances[name])
        return lowest

    def wallets(self) -> dict[str, Totals]:
        """Every wallet, by tenant, mode and name, as the tables have it and as the journal adds up to."""
        balances: dict[str, int] = {}
        for name, change in self._changes():
            balances[name] = balances.get(name, 0) + change
        with self._read() as rows:
            blocks = {
                f"{tenant}/{mode}/wallet:{wallet}": amounts
                for tenant, mode, wallet, *amounts in rows(
                    "SELECT tenant, mode, wallet, CAST(SUM(granted) AS bigint), CAST(SUM(remaining) AS bigint),"
                    " CAST(SUM(reserved) AS bigint) FROM ledger_block GROUP BY tenant, mode, wallet"
                )
            }
            owed = {
                f"{tenant}/{mode}/wallet:{wallet}": receivable
                for tenant, mode, wallet, receivable in rows(
                    "SELECT tenant, mode, wallet, receivable FROM ledger_wallet"
                )
            }
        return {
            name: Totals(granted, remaining, reserved, receivable, balances.get(name, 0))
            for name, receivable in owed.items()
            for granted, remaining, reserved in (blocks.get(name, (0, 0, 0)),)
        }

    def _changes(self) -> Iterator[tuple[str, int]]:
        """What each entry changes in which wallet, in the journal's order."""
        with self._read() as rows:
            entries = rows("SELECT tenant, mode, debit, credit, amount FROM ledger_transfer ORDER BY seq, position")
        for tenant, mode, debit, credit, amount in entries:
            for account, change in ((debit, -amount), (credit, amount)):
                if account.startswith("wallet:"):
                    yield f"{tenant}/{mode}/{account}", change

    def reserved(self) -> int:
        """All that any block still holds for a reservation."""
        with self._read() as rows:
            total: int = rows("SELECT CAST(COALESCE(SUM(reserved), 0) AS bigint) FROM ledger_block")[0][0]
            return total

    def remaining(self, customer: str) -> int:
        """What is left of the live credits of the tenant's user *customer*."""
        with self._read() as rows:
            found = rows(
                "SELECT CAST(COALESCE(SUM(block.remaining), 0) AS bigint) FROM ledger_block AS block JOIN customers"
                " ON block.wallet = 'customer:' || customers.id AND block.mode = customers.mode"
                " WHERE customers.external_id = ? AND customers.mode = 'live'",
                customer,
            )
            total: int = found[0][0]
            return total


class _Snapshot:
    """One transaction of either database; parameters are written `?`."""

    def __init__(self, connection: Any, placeholder: str) -> None:
        self._connection = connection
        self._placeholder = placeholder

    def __call__(self, query: str, *parameters: object) -> Sequence[tuple[Any, ...]]:
        if not parameters:
            return self._connection.execute(query).fetchall()  # type: ignore[no-any-return]
        return self._connection.execute(query.replace("?", self._placeholder), parameters).fetchall()  # type: ignore[no-any-return]
