"""Takes a customer's metadata out of their usage, and out of the sums that are kept of it.

How it works. A page of the customer's usage rows loses its metadata, and what the folded ones of it had added to the
sums of their metadata is taken off again, in one transaction; a sum that comes to nothing is gone, and its value with
it. It takes the scope's turn among those who fold, so no row is folded with metadata that is emptied at that moment.
Numbers stay, in every other sum: only what metadata they had is forgotten.
"""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.rollups import PAGE_ROWS
from gateway.billing.usage_facts import DAY_US, NAMES, POSTGRESQL, SQLITE, SUMS, facts, pairs, sums_of_fact, totals
from gateway.database import Database, of
from ledger.model import Scope


async def erase_metadata(database: Database, scope: Scope, customer: str, *, page_rows: int = PAGE_ROWS) -> int:
    """Forget the metadata of all usage of *customer*, by our id; how many rows had any. Repeatable.

    Raises:
        DatabaseUnavailable: some of it may be done. Do it again.
    """
    values: dict[str, str | int] = {"tenant": scope.tenant, "mode": scope.mode, "customer": customer, "rows": page_rows}
    done = 0
    while True:
        async with database.write(of(*scope)) as connection:
            if connection.dialect.name == "postgresql":
                await connection.execute(text(_TURN), {"scope": f"{scope.tenant}/{scope.mode}"})
                erased = int(await connection.scalar(text(_ERASE), values) or 0)
            else:
                erased = await _erase_in_file(connection, values)
        done += erased
        if erased < page_rows:
            return done


async def _erase_in_file(connection: AsyncConnection, values: dict[str, str | int]) -> int:
    for table in ("usage_page", "usage_fact", "usage_less"):
        await connection.exec_driver_sql(f"DROP TABLE IF EXISTS temp.{table}")
    await connection.execute(text(f"CREATE TEMP TABLE usage_page AS {_PAGE}"), values)
    await connection.exec_driver_sql(f"CREATE TEMP TABLE usage_fact AS {facts(SQLITE, _PAGE_ROWS)}")
    await connection.exec_driver_sql(f"CREATE TEMP TABLE usage_less AS {_less(pairs(SQLITE, 'usage_fact'))}")
    await connection.exec_driver_sql(f"DELETE {_WHERE_NOTHING_IS_LEFT_IN_FILE}")
    await connection.exec_driver_sql(_TAKE_OFF)
    emptied = await connection.exec_driver_sql(_EMPTY)
    return emptied.rowcount


_KEY: Final = ("tenant", "mode", "key", "value", "starts_at_us", *NAMES)
_KEY_AND_EVENTS: Final = ", ".join((*_KEY, "events"))
_SAME_KEY: Final = " AND ".join(f"usage_by_metadata.{name} = s.{name}" for name in _KEY)

_PAGE: Final = """
    SELECT u.tenant, u.mode, u.reservation, u.part FROM ledger_usage AS u
    WHERE u.tenant = :tenant AND u.mode = :mode AND u.customer_id = :customer AND u.metadata <> '{}' LIMIT :rows
"""
_SAME_ROW: Final = " AND ".join(f"u.{name} = p.{name}" for name in ("tenant", "mode", "reservation", "part"))
_PAGE_ROWS: Final = f"usage_page AS p CROSS JOIN ledger_usage AS u WHERE {_SAME_ROW} AND u.folded"
_EMPTY: Final = f"UPDATE ledger_usage AS u SET metadata = '{{}}' FROM usage_page AS p WHERE {_SAME_ROW}"  # noqa: S608


def _less(by_pair: str) -> str:
    """What the facts of a page had added, by the key of the sums."""
    day = {"starts_at_us": f"f.at_us - f.at_us % {DAY_US}"}
    taken = ", ".join(f"{day.get(name, f'f.{name}')} AS {name}" for name in _KEY)
    return f"""
        SELECT {", ".join(_KEY)}, {totals()} FROM (SELECT {taken}, {sums_of_fact()} FROM {by_pair} AS f) AS taken
        GROUP BY {", ".join(_KEY)}"""  # noqa: S608


_TAKE_OFF: Final = f"""
    UPDATE usage_by_metadata SET {", ".join(f"{name} = usage_by_metadata.{name} - s.{name}" for name in SUMS)}
    FROM usage_less AS s WHERE {_SAME_KEY} AND usage_by_metadata.events > s.events
"""  # noqa: S608
_WHERE_NOTHING_IS_LEFT: Final = (
    f"FROM usage_by_metadata USING usage_less AS s WHERE {_SAME_KEY} AND usage_by_metadata.events = s.events"
)
_WHERE_NOTHING_IS_LEFT_IN_FILE: Final = f"""
    FROM usage_by_metadata WHERE ({_KEY_AND_EVENTS}) IN (SELECT {_KEY_AND_EVENTS} FROM usage_less)
"""  # noqa: S608

_TURN: Final = "SELECT pg_advisory_xact_lock(hashtextextended('farebox usage ' || :scope, 0))"

# Every part sees the rows as they were before the statement, with their metadata.
_ERASE: Final = f"""
    WITH usage_page AS MATERIALIZED ({_PAGE}),
    usage_fact AS MATERIALIZED ({facts(POSTGRESQL, _PAGE_ROWS)}),
    usage_less AS MATERIALIZED ({_less(pairs(POSTGRESQL, "usage_fact"))}),
    gone AS (DELETE {_WHERE_NOTHING_IS_LEFT}),
    less AS ({_TAKE_OFF}),
    emptied AS ({_EMPTY} RETURNING 1)
    SELECT count(*) FROM emptied
"""  # noqa: S608
