"""Adds usage up, beside the ledger: every charge once, soon after it was made.

How it works. A charge writes its usage row and no sum: a row of sums in the charge's transaction would be one lock for
all charges of an hour. The row begins unfolded. A page of unfolded rows of one tenant and mode is added to the sums and
marked in one transaction, so that a row is in the tail or in the sums, never in both or neither, whenever somebody
looks and wherever a process dies. It is the mark that tells, not an order: a row that commits late is found as well.

Any process may fold at any time. On PostgreSQL a page takes the scope's lock, and who does not get it leaves the scope
to whoever has it; on SQLite writers take turns anyway. Scopes take turns by the page, so nobody's flood holds up the
others; a scope that cannot be folded is told to the log and does not hold them up either.
"""

import asyncio
import random
from typing import Final

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.usage_facts import (
    DAY_US,
    HOUR_US,
    NAMES,
    POSTGRESQL,
    SQLITE,
    SUMS,
    Dialect,
    facts,
    pairs,
    sums_of_fact,
    totals,
)
from gateway.database import NOBODY, Database, DatabaseUnavailable, of
from ledger.model import Scope

PAGE_ROWS: Final = 500
"""How many charges one transaction adds up: few enough that on SQLite the ledger does not wait long for its turn."""

PAUSE_S: Final = 5.0
"""How long a charge may wait in the tail, about. Each page on SQLite makes the ledger load its wallets anew."""

PAUSE_LEAST: Final = 0.75
"""Each pause is drawn from this part of it to all of it."""

log = structlog.get_logger(__name__)


class Rollups:
    """The sums of an installation's usage, kept up to date from `start` to `stop`."""

    def __init__(self, database: Database, *, page_rows: int = PAGE_ROWS, pause_s: float = PAUSE_S) -> None:
        self._database = database
        self._page_rows = page_rows
        self._pause_s = pause_s
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.create_task(self._keep_up(), name="rollups")

    async def stop(self) -> None:
        """End, between two pages or by giving up the one under way, of which nothing is kept then."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def fold(self) -> int:
        """Add up a page of every scope that has charges waiting; how many charges that were.

        Raises:
            DatabaseUnavailable
        """
        done, scope = 0, Scope("", "")
        while (found := await self._next_after(scope)) is not None:
            scope = found
            try:
                done += await self.fold_page(scope)
            except DatabaseUnavailable:
                raise
            except Exception:
                log.exception("usage cannot be added up", tenant=scope.tenant, mode=scope.mode)
        return done

    async def fold_page(self, scope: Scope) -> int:
        """Add up the oldest charges of *scope* that are not; how many, and 0 where another process is at it.

        Raises:
            DatabaseUnavailable
        """
        values: dict[str, str | int] = {"tenant": scope.tenant, "mode": scope.mode, "rows": self._page_rows}
        async with self._database.write(of(scope.tenant, scope.mode)) as connection:
            if connection.dialect.name != "postgresql":
                return await _fold_on_sqlite(connection, values)
            if not await connection.scalar(text(_LOCK), {"scope": f"{scope.tenant}/{scope.mode}"}):
                return 0
            return int(await connection.scalar(text(_FOLD), values) or 0)

    async def _next_after(self, scope: Scope) -> Scope | None:
        """The scope with unfolded charges that comes after *scope*."""
        async with self._database.read(NOBODY) as connection:
            query = _NEXT_SCOPE if connection.dialect.name == "postgresql" else _NEXT_SCOPE_IN_FILE
            row = (await connection.execute(text(query), scope._asdict())).one_or_none()
        return None if row is None else Scope(*row)

    async def _keep_up(self) -> None:
        done = 0
        while True:
            if done < self._page_rows:  # Else there may be a scope with more than its page.
                await asyncio.sleep(self._pause_s * random.uniform(PAUSE_LEAST, 1))  # noqa: S311
            done = 0
            try:
                done = await self.fold()
            except DatabaseUnavailable:
                log.warning("the database is away", upkeep="rollups")
            except Exception:
                log.exception("upkeep failed", upkeep="rollups")


async def _fold_on_sqlite(connection: AsyncConnection, values: dict[str, str | int]) -> int:
    """Step by step: nobody else writes meanwhile, and what a page says is read once, into a table of its own."""
    await connection.exec_driver_sql("DROP TABLE IF EXISTS temp.usage_fact")
    await connection.execute(text(_TAKE_IN_FILE), values)
    for statement in _ADD_IN_FILE:
        await connection.exec_driver_sql(statement)
    marked = await connection.execute(text(_MARK_IN_FILE), values)
    await connection.exec_driver_sql("DROP TABLE temp.usage_fact")
    return marked.rowcount


def _add(table: str, lead: dict[str, str], source: str) -> str:
    """Add the facts of *source* to the sums of *table*, whose key has *lead* (a column and what it is) first."""
    key = {"tenant": "f.tenant", "mode": "f.mode", **lead, **{name: f"f.{name}" for name in NAMES}}
    grown = ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in SUMS)
    taken = ", ".join(f"{value} AS {name}" for name, value in key.items())
    return f"""
        INSERT INTO {table} ({", ".join((*key, *SUMS))})
        SELECT {", ".join(key)}, {totals()} FROM (SELECT {taken}, {sums_of_fact()} FROM {source}) AS taken
        WHERE true GROUP BY {", ".join(key)}
        ON CONFLICT ({", ".join(key)}) DO UPDATE SET {grown}"""  # noqa: S608


_DAY: Final = f"f.at_us - f.at_us % {DAY_US}"
_GRAINS: Final = f"(SELECT 'hour' AS grain, {HOUR_US} AS us UNION ALL SELECT 'day', {DAY_US})"


def additions(speaks: Dialect) -> tuple[str, ...]:
    """The statements that add the facts of the table `usage_fact` to the sums."""
    by_pair = pairs(speaks, "usage_fact")
    return (
        _add(
            "usage_rollups",
            {"grain": "g.grain", "starts_at_us": "f.at_us - f.at_us % g.us"},
            f"usage_fact AS f CROSS JOIN {_GRAINS} AS g",
        ),
        _add("usage_by_customer", {"customer": "f.customer", "starts_at_us": _DAY}, "usage_fact AS f"),
        _add("usage_by_metadata", {"key": "f.key", "value": "f.value", "starts_at_us": _DAY}, f"{by_pair} AS f"),
    )


_WAITING: Final = "tenant = :tenant AND mode = :mode AND NOT folded ORDER BY at_us LIMIT :rows"

_ADD_IN_FILE: Final = additions(SQLITE)
_TAKE_IN_FILE: Final = "CREATE TEMP TABLE usage_fact AS" + facts(SQLITE, f"{SQLITE.unfolded} WHERE {_WAITING}")
_MARK_IN_FILE: Final = """
    UPDATE ledger_usage SET folded = true FROM temp.usage_fact AS f
    WHERE ledger_usage.tenant = :tenant AND ledger_usage.mode = :mode
          AND ledger_usage.reservation = f.reservation AND ledger_usage.part = f.part
"""
_NEXT_SCOPE_IN_FILE: Final = """
    SELECT tenant, mode FROM ledger_usage INDEXED BY ix_ledger_usage_unfolded
    WHERE NOT folded AND (tenant, mode) > (:tenant, :mode) ORDER BY tenant, mode LIMIT 1
"""

_LOCK: Final = "SELECT pg_try_advisory_xact_lock(hashtextextended('farebox usage ' || :scope, 0))"
_NEXT_SCOPE: Final = "SELECT tenant, mode FROM farebox_unfolded_scope(:tenant, :mode)"

# One statement, in which every part sees the page that was marked and nothing else.
_FOLD: Final = f"""
    WITH page AS (SELECT reservation, part FROM ledger_usage WHERE {_WAITING}),
    marked AS (
        UPDATE ledger_usage AS u SET folded = true FROM page
        WHERE u.tenant = :tenant AND u.mode = :mode AND u.reservation = page.reservation AND u.part = page.part
              AND NOT u.folded
        RETURNING u.*
    ),
    usage_fact AS MATERIALIZED ({facts(POSTGRESQL, "marked AS u")}),
    {", ".join(f"added_{number} AS ({statement})" for number, statement in enumerate(additions(POSTGRESQL)))}
    SELECT count(*) FROM marked
"""  # noqa: S608
