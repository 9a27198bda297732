"""The ledger's file as an auditor reads it: plain SQL, and none of the ledger's own code."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple


class Booked(NamedTuple):
    """What the file says of one request.

    *charged* is the sum of the journal's entries that its reservation took from wallets; *recorded* that of its
    usage rows, whose *endings* say how it ended.
    """

    state: str
    charged: int
    recorded: int
    endings: tuple[str, ...]


class Books:
    def __init__(self, database: Path) -> None:
        self._database = database

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._database, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            yield connection

    def requests(self) -> dict[str, Booked]:
        """All requests that reserved, by their ids; the ledger has never more than one reservation of each."""
        with self._read() as connection:
            states = connection.execute("SELECT reservation, request_id, state FROM ledger_reservation").fetchall()
            charged = dict(
                connection.execute(
                    "SELECT reference, SUM(amount) FROM ledger_transfer"
                    " WHERE debit LIKE 'wallet:%' AND reference IS NOT NULL GROUP BY reference"
                )
            )
            usage: dict[str, list[tuple[int, str]]] = {}
            for reservation, amount, ending in connection.execute(
                "SELECT reservation, charged, ending FROM ledger_usage ORDER BY reservation, part"
            ):
                usage.setdefault(reservation, []).append((amount, ending))
        found = {}
        for reservation, request_id, state in states:
            assert request_id not in found, f"{request_id} reserved twice"
            rows = usage.get(reservation, [])
            found[request_id] = Booked(
                state, charged.get(reservation, 0), sum(row[0] for row in rows), tuple(row[1] for row in rows)
            )
        return found

    def open_requests(self, model: str | None = None) -> set[str]:
        """The ids of requests whose credits are still reserved."""
        with self._read() as connection:
            rows = connection.execute(
                "SELECT request_id FROM ledger_reservation WHERE state = 'open'"
                " AND ?1 IN ('', json_extract(body, '$.tags.model'))",
                (model or "",),
            )
            return {row[0] for row in rows}

    def last_expiry_us(self) -> int:
        """When the last of the open reservations runs out; 0 when there is none."""
        with self._read() as connection:
            query = "SELECT COALESCE(MAX(expires_at_us), 0) FROM ledger_reservation WHERE state = 'open'"
            latest: int = connection.execute(query).fetchone()[0]
            return latest

    def settled_requests(self) -> set[str]:
        with self._read() as connection:
            rows = connection.execute("SELECT request_id FROM ledger_reservation WHERE state <> 'open'")
            return {row[0] for row in rows}

    def lowest_balances(self) -> dict[str, int]:
        """Of each wallet the lowest balance that it ever had, entry by entry through the journal."""
        balances: dict[str, int] = {}
        lowest: dict[str, int] = {}
        with self._read() as connection:
            for tenant, mode, debit, credit, amount in connection.execute(
                "SELECT tenant, mode, debit, credit, amount FROM ledger_transfer ORDER BY seq, position"
            ):
                for account, change in ((debit, -amount), (credit, amount)):
                    if account.startswith("wallet:"):
                        name = f"{tenant}/{mode}/{account}"
                        balances[name] = balances.get(name, 0) + change
                        lowest[name] = min(lowest.get(name, 0), balances[name])
        return lowest

    def reserved(self) -> int:
        """All that any block still holds for a reservation."""
        with self._read() as connection:
            total: int = connection.execute("SELECT COALESCE(SUM(reserved), 0) FROM ledger_block").fetchone()[0]
            return total

    def remaining(self, customer: str) -> int:
        """What is left of the live credits of the tenant's user *customer*."""
        with self._read() as connection:
            row = connection.execute(
                "SELECT COALESCE(SUM(block.remaining), 0) FROM ledger_block AS block JOIN customers"
                " ON block.wallet = 'customer:' || customers.id AND block.mode = customers.mode"
                " WHERE customers.external_id = ? AND customers.mode = 'live'",
                (customer,),
            ).fetchone()
            total: int = row[0]
            return total
