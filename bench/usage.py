"""How long questions about usage take over ten million charges, on SQLite and on a durable PostgreSQL.

python -m bench --only usage              ten million charges: some ten minutes and 10 GB of disk
python -m bench --only usage --quick      two hundred thousand

The charges are written by SQL, over thirty days: five metrics and models, ten thousand customers, a character of fifty
and a conversation in the metadata. Most are added up a day at a time, by the gateway's statements; the last ones by the
gateway's own pages, which are timed. A few that came after that are in the tail. Every figure is the median of nine;
every answer is compared with a recount.
"""

import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg

from gateway.billing.rollups import PAGE_ROWS, Rollups, additions
from gateway.billing.usage_facts import DAY_US, HOUR_US, POSTGRESQL, SQLITE, facts
from gateway.billing.usage_queries import UsageQueries, UsageSum
from gateway.billing.usage_statement import UsageQuestion
from gateway.database import Database
from gateway.migrations import migrate
from ledger.model import Scope
from tests.servers.postgres import DURABLE, PostgresServer

SCOPE: Final = Scope("ten_bench", "live")
ROWS: Final = 10_000_000
ROWS_QUICK: Final = 200_000
TAIL: Final = 2_000
"""Charges that nobody has added up: those of a few seconds."""

PAGED: Final = 50_000
"""Charges that are added up by pages, before the tail."""

DAYS: Final = 30
FIRST_US: Final = 1_764_547_200_000_000
"""The beginning of a day."""

ROUNDS: Final = 9

_OURS: Final = f"u.tenant = '{SCOPE.tenant}' AND u.mode = '{SCOPE.mode}'"
_INDEXES: Final = ("request", "customer", "time", "unfolded")


class Asked(NamedTuple):
    """A question, and how a recount of its groups is written."""

    name: str
    groups: tuple[str, ...]
    recount: tuple[str, ...]
    start_us: int = FIRST_US
    end_us: int = FIRST_US + DAYS * DAY_US


_DAY: Final = f"at_us - at_us % {DAY_US}"
_LAST_US: Final = FIRST_US + DAYS * DAY_US - 7 * HOUR_US // 3

QUESTIONS: Final = (
    Asked("by day and model", ("day", "model"), (_DAY, "model")),
    Asked("by metric", ("metric",), ("metric",)),
    Asked("by customer, first page", ("customer",), ("customer_id",)),
    Asked("by character, a key of the metadata", ("metadata.character",), ("character",)),
    Asked("by conversation, first page", ("metadata.conversation",), ("conversation",)),
    Asked("by model, 24 h that begin at no full hour", ("model",), ("model",), _LAST_US - DAY_US, _LAST_US),
)


@contextmanager
def _sqlite(rows: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.db"
        migrate(f"sqlite:///{path}")
        with closing(sqlite3.connect(path, isolation_level=None)) as file:
            file.execute("PRAGMA synchronous = OFF")
            made = dict(file.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index'").fetchall())
            indexes = [f"ix_ledger_usage_{name}" for name in _INDEXES]
            for index in indexes:
                file.execute(f"DROP INDEX {index}")
            counted = f"n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {rows - 1})"
            numbers = f"(WITH RECURSIVE {counted} SELECT i FROM n)"
            file.execute(_charges(rows, numbers))
            for index in indexes:
                file.execute(made[index])
            _add_up_in_file(file)
        yield f"sqlite:///{path}"


@contextmanager
def _postgresql(rows: int) -> Iterator[str]:
    server = PostgresServer(settings={**DURABLE, "shared_buffers": "512MB", "max_wal_size": "8GB"}).create().start()
    try:
        url = server.create_database()
        migrate(url)
        with psycopg.connect(url, autocommit=True) as connection:
            found = connection.execute("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'ledger_usage'")
            made: dict[str, str] = dict(found.fetchall())
            indexes = [f"ix_ledger_usage_{name}" for name in _INDEXES]
            for index in indexes:
                connection.execute(f"DROP INDEX {index}")
            numbers = f"(SELECT i::bigint FROM generate_series(0, {rows - 1}) AS i) AS n"
            connection.execute(_charges(rows, numbers))
            for index in indexes:
                connection.execute(made[index])
            connection.execute("VACUUM ANALYZE ledger_usage")
            for first_us in range(FIRST_US, FIRST_US + DAYS * DAY_US, DAY_US):
                added = ", ".join(f"a{n} AS ({each})" for n, each in enumerate(additions(POSTGRESQL)))
                taken = facts(POSTGRESQL, _of_day(first_us))
                connection.execute(f"WITH usage_fact AS MATERIALIZED ({taken}), {added} SELECT 1")
        yield url
        server.drop_database(url)
    finally:
        server.close()


def _charges(rows: int, numbers: str) -> str:
    """The statement that makes *rows* charges, evenly over the thirty days; *numbers* counts them as ``i``."""
    at = f"({FIRST_US} + i * {DAYS * DAY_US // rows})"
    return f"""
    INSERT INTO ledger_usage (tenant, mode, reservation, part, request_id, customer_id, app_id, key_id, model, metric,
                              units, provider_cost_nanos, base, markup, charged, shortfall, charges, price_version,
                              source, ending, upstream, started_at_us, at_us, metadata,
                              folded)
    SELECT '{SCOPE.tenant}', '{SCOPE.mode}', 'rsv_' || CAST(1000000000 + i AS TEXT), 1,
           'req_' || CAST(1000000000 + i AS TEXT), 'cus_' || CAST(100000 + i * 7919 % 10000 AS TEXT), 'app_1', 'key_1',
           'model-' || CAST(i / 21 % 5 AS TEXT), 'metric-' || CAST(i / 21 % 5 AS TEXT),
           '{{"microunits":1000000,"input":' || CAST(i % 900 AS TEXT) || ',"output":' || CAST(i % 70 AS TEXT) || '}}',
           1000 + i % 50, 900000000, 100000000, 1000000000, 0, '[{{"base":900000000,"markup":100000000}}]', 'rul_1',
           'provider', 'finished', 'openai', {at}, {at},
           '{{"character":"' || CAST(i * 31 % 50 AS TEXT) || '","conversation":"' || CAST(i / 21 AS TEXT) || '"}}',
           i < {rows - TAIL - PAGED}
    FROM {numbers}
"""


def measure(*, rows: int) -> list[str]:
    """The tables: how fast charges are added up, and how long each question takes."""
    lines = ["| question | database | p50 ms | slowest ms | agrees with a recount |", "|---|---|--:|--:|---|"]
    rates = []
    for name, database in (("PostgreSQL", _postgresql), ("SQLite", _sqlite)):
        with database(rows) as url:
            rate = asyncio.run(_fold(url, PAGED))
            rates.append(f"{name}: {rate:,.0f} charges a second are added up, by pages of {PAGE_ROWS:,}.")
            _settle(url)
            for asked in QUESTIONS:
                seconds, sums = asyncio.run(_ask(url, asked))
                agrees = _as_rows(sums) == _recounted(url, asked)[: len(sums)]
                p50_ms, most_ms = statistics.median(seconds) * 1000, max(seconds) * 1000
                lines.append(f"| {asked.name} | {name} | {p50_ms:.1f} | {most_ms:.1f} | {'yes' if agrees else 'NO'} |")
                print(lines[-1], flush=True)
    return [f"{rows:,} charges over {DAYS} days, {TAIL:,} of them in the tail.", "", *lines, "", *rates]


def _add_up_in_file(file: sqlite3.Connection) -> None:
    for first_us in range(FIRST_US, FIRST_US + DAYS * DAY_US, DAY_US):
        file.execute(f"CREATE TEMP TABLE usage_fact AS {facts(SQLITE, _of_day(first_us))}")
        for statement in additions(SQLITE):
            file.execute(statement)
        file.execute("DROP TABLE temp.usage_fact")


def _of_day(first_us: int) -> str:
    return f"ledger_usage AS u WHERE u.folded AND u.at_us >= {first_us} AND u.at_us < {first_us + DAY_US} AND {_OURS}"


async def _fold(url: str, rows: int) -> float:
    """Add up the oldest *rows* charges; how many a second."""
    database = Database(url)
    began_s, done = time.perf_counter(), 0
    while done < rows:
        done += await Rollups(database, page_rows=min(PAGE_ROWS, rows - done)).fold_page(SCOPE)
    await database.close()
    return done / (time.perf_counter() - began_s)


def _settle(url: str) -> None:
    """What autovacuum does in time, and a checkpoint."""
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return
    with psycopg.connect(url, autocommit=True) as connection:
        for table in ("ledger_usage", "usage_rollups", "usage_by_customer", "usage_by_metadata"):
            connection.execute(f"VACUUM ANALYZE {table}")


async def _ask(url: str, asked: Asked) -> tuple[Sequence[float], list[UsageSum]]:
    """How long the first page took each time, and what it had; of a short answer all pages."""
    database = Database(url)
    queries = UsageQueries(database)
    question = UsageQuestion(scope=SCOPE, groups=asked.groups, start_us=asked.start_us, end_us=asked.end_us, limit=200)
    seconds = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        page = await queries.ask(question)
        seconds.append(time.perf_counter() - began_s)
    await database.close()
    return seconds, page.sums


def _as_rows(sums: Sequence[UsageSum]) -> list[tuple[Any, ...]]:
    return [
        (*each.keys.values(), each.events, each.charged, each.markup, each.provider_cost_nanos, each.input_tokens)
        for each in sums
    ]


def _recounted(url: str, asked: Asked) -> list[tuple[Any, ...]]:
    """The same by plain SQL over all charges."""
    sqlite = url.startswith("sqlite:")

    def said(column: str, key: str) -> str:
        return f"json_extract({column}, '$.{key}')" if sqlite else f"({column}::json ->> '{key}')"

    keys = [said("metadata", key) if key in ("character", "conversation") else key for key in asked.recount]
    numbers = ", ".join(str(number + 1) for number in range(len(keys)))
    query = (
        f"SELECT {', '.join(keys)}, count(*), sum(charged), sum(markup), sum(provider_cost_nanos), "
        f"sum(CAST({said('units', 'input')} AS BIGINT)) FROM ledger_usage "
        f"WHERE at_us >= {asked.start_us} AND at_us < {asked.end_us} GROUP BY {numbers} ORDER BY {numbers}"
    )
    if sqlite:
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            return list(file.execute(query))
    with psycopg.connect(url) as connection:
        return [tuple(int(v) if not isinstance(v, str) else v for v in row) for row in connection.execute(query)]
